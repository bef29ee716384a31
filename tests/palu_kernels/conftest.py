"""The kernels' tests run in Triton's interpreter, where there is no GPU."""

import os

from tests.support.interpreter import look_up_types_once, patch_once_a_launch

if os.environ.get("TRITON_INTERPRET") == "1":
    look_up_types_once()
    patch_once_a_launch()
