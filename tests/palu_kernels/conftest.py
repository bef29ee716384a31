"""The kernels' tests run in Triton's interpreter, where there is no GPU."""

import os

from tests.support.interpreter import patch_once_a_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once_a_launch()
