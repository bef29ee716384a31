"""How long a device takes for a call, and what it can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.runner import timed
from benchmarks.tables import quantiles

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any card
FLUSH_SECONDS = FLUSH_BYTES / 8e12  # at least, whatever the card
MOST_FLUSHES = 64
FEWEST, MOST = 5, 50  # calls


class Times(NamedTuple):
    """Seconds of every timed call."""

    device: list[float]  # between two events around the call, in the device's own time
    host: list[float]  # until the call returned: what the host needs to issue it


def times(call: Callable[[], object], device: torch.device, seconds: float) -> Times:
    """Times a call again and again, for about ``seconds``; it must have run before.

    On a GPU the L2 cache is flushed before each call, and so often that the device is still at it
    when the host has issued the whole call: what the device takes is then free of waiting for the
    host. On the CPU both numbers are the call's.
    """
    whole = timed(call, device)[1]
    if device.type == "cpu":
        count = _count(seconds / whole)
        taken = [timed(call, device)[1] for _ in range(count)]
        return Times(taken, taken)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    start = time.perf_counter()
    call()
    issued = time.perf_counter() - start
    flushes = min(MOST_FLUSHES, 2 + int(issued / FLUSH_SECONDS))
    found = Times([], [])
    for _ in range(_count(seconds / (whole + flushes * 2 * FLUSH_SECONDS))):
        torch.accelerator.synchronize(device)
        for _ in range(flushes):
            flush.zero_()
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        call()
        found.host.append(time.perf_counter() - start)
        end.record()
        torch.accelerator.synchronize(device)
        found.device.append(begin.elapsed_time(end) / 1e3)
    return found


def _count(wanted: float) -> int:
    return max(FEWEST, min(MOST, int(wanted)))


def rates(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """What the device does at best, a row each: GB/s of a copy of 1 GiB (bytes read plus written),
    TFLOP/s of products of 8192 x 8192 matrices of random numbers in bfloat16 and float32 (as
    PyTorch does them unless told otherwise)."""
    source = torch.empty(2**16 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = [_rate("copy", source, "GB/s", 2e-9 * len(source), lambda: target.copy_(source))]
    size = 64 if tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.empty((size, size), dtype=dtype, device=device).normal_() for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        found.append(_rate("matmul", a, "TFLOP/s", 2e-12 * size**3, product))
    return found


def _rate(
    kernel: str, operand: torch.Tensor, metric: str, work: float, call: Callable[[], object]
) -> dict[str, Any]:
    call()
    taken = times(call, operand.device, seconds=1.0).device
    row = {"kernel": kernel, "rows": len(operand), "dtype": str(operand.dtype).split(".")[1]}
    return row | {"metric": metric} | quantiles([work / seconds for seconds in taken])
