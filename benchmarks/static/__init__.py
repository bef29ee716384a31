"""What can be found out without running anything for long: compiled kernels, bytes, calls."""

import os
import sys


def before_triton() -> None:
    """Prepare a script that compiles kernels, before it imports Triton: no interpreter, kernels
    for CPU tensors, and of `--triton FOLDER` the Triton that lies there. Its processes inherit
    all three."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["PALU_TRITON_CPU"] = "1"
    if "--triton" in sys.argv[:-1]:
        sys.path.insert(0, sys.argv[sys.argv.index("--triton") + 1])
