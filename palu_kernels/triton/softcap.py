"""A logit softcap applied on load, and its slope for the gradient: a chunk of logits holds what the
head's product gave, before the cap."""

import triton
import triton.language as tl


@triton.jit
def capped(x, live, cap):
    """-> (cap * tanh(x / cap), its derivative); -inf and 0 off the live lanes. ``cap`` None: (x,
    1).

    By exp(-2|x| / cap), so that neither overflows and the slope of a saturated entry keeps its
    digits.
    """
    if cap is None:
        z = x
        slope = 1.0
    else:
        share = x / cap
        shrunk = tl.exp(-2.0 * tl.abs(share))
        size = (1.0 - shrunk) / (1.0 + shrunk)
        z = tl.where(live, cap * tl.where(share < 0, -size, size), float("-inf"))
        slope = tl.where(live, 4.0 * shrunk / ((1.0 + shrunk) * (1.0 + shrunk)), 0.0)
    return z, slope
