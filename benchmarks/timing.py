"""What one call takes: time of the wall, the process and the device, and memory at its peak."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.declare import Call

FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any card
FLUSH_SECONDS = FLUSH_BYTES / 8e12  # at least, whatever the card
MOST_FLUSHES = 64


class Times(NamedTuple):
    """Seconds of a call."""

    wall: float  # until the device has done it
    process: float  # of this process on all its threads


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, Times]:
    """Return (what the call returns, what it took)."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    result = call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return result, Times(time.perf_counter() - start, time.process_time() - used)


def device_times(call: Call, device: torch.device, count: int) -> tuple[list[float], list[float]]:
    """Return the seconds between two events around each call, in the device's own time, and those
    that the host needs to issue it.

    The L2 cache is flushed before each call, and so often that the device is still at it when the
    host has issued the whole call: what the device takes is then free of waiting for the host.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    run = call.ready()
    start = time.perf_counter()
    run()
    flushes = min(MOST_FLUSHES, 2 + int((time.perf_counter() - start) / FLUSH_SECONDS))
    of_device, of_host = [], []
    for _ in range(count):
        run = call.ready()
        torch.accelerator.synchronize(device)
        for _ in range(flushes):
            flush.zero_()
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        run()
        of_host.append(time.perf_counter() - start)
        end.record()
        torch.accelerator.synchronize(device)
        of_device.append(begin.elapsed_time(end) / 1e3)
    return of_device, of_host


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.before` and `peak.extra`, in bytes: what
    was there before the block, and how much more there was at most inside.

    On the CPU it is resident memory as the kernel counts it (VmHWM, which is set back first), so
    scratch space of libraries counts too. Memory that was freed earlier but is still held by the
    allocator is given back first, or the block would use it without being seen. On an accelerator
    it is what PyTorch's allocator has handed out.

    Raises:
        OSError: the CPU's memory is measured, and this is no Linux with /proc/self/clear_refs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self.extra = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
            self.before = _resident("VmRSS")
        else:
            torch.accelerator.synchronize(self.device)
            torch.accelerator.reset_peak_memory_stats(self.device)
            self.before = torch.accelerator.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cpu":
            peak = _resident("VmHWM")
        else:
            torch.accelerator.synchronize(self.device)
            peak = torch.accelerator.max_memory_allocated(self.device)
        self.extra = peak - self.before


def _resident(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)[1]) * 1024


class AllocatorPeak:
    """`with AllocatorPeak() as peak: ...`, then `peak.extra`: the bytes that PyTorch's CPU
    allocator had handed out at most inside the block, over what it had before.

    The allocator's own events, which `torch.profiler` collects: tensors and the buffers that
    operators ask it for, the same number every time. What libraries allocate by themselves is not
    in it; resident memory (`PeakMemory`) has that too.
    """

    def __init__(self) -> None:
        self.extra = 0

    def __enter__(self) -> AllocatorPeak:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._profile.__exit__(*raised)
        events = self._profile.profiler.kineto_results.events()
        changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
        total = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            total += change
            self.extra = max(self.extra, total)
