"""Order-preserving integer keys of floating-point entries.

Keys are uint32 for every dtype (16 bits of it for bfloat16 and float16) and compare as the
entries do: -0.0 is made +0.0 first, and every NaN becomes the largest key of the width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F800000, torch.float16: 0x7C000000}


@triton.jit
def order_keys(bits, IS_16BIT: tl.constexpr, INFINITY: tl.constexpr):
    """-> (keys, which are NaN) of raw bits, int16 or int32.

    Negative entries have all bits flipped, the others their sign bit. 16-bit patterns work in the
    top half of the word, where the same arithmetic serves both widths; INFINITY is +inf there.
    """
    word = bits.to(tl.int32)
    if IS_16BIT:
        word = word << 16
    magnitude = word & 0x7FFFFFFF
    word = tl.where(magnitude == 0, 0, word)
    nan = magnitude > INFINITY
    key = tl.where(nan, -1, word ^ ((word >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    if IS_16BIT:
        key = key >> 16
    return key, nan


def key_format(t: Tensor) -> dict[str, int | bool]:
    """The constants that `order_keys` wants for a dtype."""
    return {"IS_16BIT": t.dtype != torch.float32, "INFINITY": _INFINITY[t.dtype]}


def digit_shifts(t: Tensor) -> tuple[int, ...]:
    """Where the 8-bit digits of a key start, the highest first."""
    return (24, 16, 8, 0) if t.dtype == torch.float32 else (8, 0)
