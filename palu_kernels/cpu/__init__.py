"""The CPU path's fused loops: one C file, compiled at first use where there is a C compiler.

Without one, on another platform than Linux, or with `PALU_CPU_EXTENSION=0`, `torch_backend.py`
computes the same in plain PyTorch; `served_by` tells.
"""

from palu_kernels.cpu.extension import (
    OBJECTIVES,
    Loops,
    loops_for,
    loops_for_indices,
    served_by,
)

__all__ = ["OBJECTIVES", "Loops", "loops_for", "loops_for_indices", "served_by"]
