"""Order-preserving integer keys of floating-point entries.

Keys are signed and compare as the entries do: -0.0 is made +0.0 first, and every NaN becomes the
key above that of +inf. Those of 16-bit types fit in 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
LOWEST = tl.constexpr(-(2**31))  # below every key


@triton.jit
def order_keys(bits, INFINITY: tl.constexpr):
    """Keys, int32, of raw bits, int16 or int32; INFINITY is those of +inf.

    Negative entries have all bits but the sign flipped.
    """
    NUMBER: tl.constexpr = 0x7FFF if INFINITY < 0x8000 else 0x7FFFFFFF
    word = bits.to(tl.int32)
    magnitude = word & NUMBER
    key = tl.where(magnitude == 0, 0, word ^ ((word >> 31) & NUMBER))
    return tl.where(magnitude > INFINITY, INFINITY + 1, key)


def infinity(t: Tensor) -> int:
    """The constant that `order_keys` wants for a dtype."""
    return _INFINITY[t.dtype]
