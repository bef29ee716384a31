"""What the training log tells of the steps since the last one: terms, row counts, speed, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from palu.models.inputs import real_tokens

try:
    import resource
except ImportError:  # Windows has none
    resource = None

TERMS = ("forget", "preserve", "retain")


class StepLog:
    """Add up the steps of a logging window; everything stays on the device until it is collected.

    Attributes:
        terms: float32 `[2, 3]`, to be added to: the sum of each term's row losses, in the order of
            `TERMS`, and how many rows that were.

    Args:
        device: where the batches are.
        preserve: whether there is a preserve term: without one its rows do not meet the head.
    """

    def __init__(self, device: torch.device, *, preserve: bool) -> None:
        self.device = device
        self.preserve = preserve
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self.steps = 0
        self.terms = torch.zeros(2, len(TERMS), device=self.device)
        self._tokens = torch.zeros((), device=self.device)
        self._positions = 0
        self._started: float | None = None
        self._pauses = 0.0

    def start_clock(self) -> None:
        """A step begins: its data are about to be drawn. The first one of a window counts."""
        if self._started is None:
            self._started = time.perf_counter()

    def add_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """One optimizer step of this process.

        Args:
            batches: every micro-batch, forget and retain: `input_ids` `[B, T]` and, where something
                is padded, `attention_mask`.
        """
        self.steps += 1
        for batch in batches:
            self._positions += batch["input_ids"].numel()
            real = real_tokens(batch)
            if real is None:
                self._tokens += batch["input_ids"].numel()
            else:
                self._tokens += real.sum().to(self.device, non_blocking=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training: its time does not count."""
        if self.device.type != "cpu":
            # What the device still has to do for the steps before is not part of the pause.
            torch.accelerator.synchronize(self.device)
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._started is not None:
                self._pauses += time.perf_counter() - began

    def collect(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The numbers of the window, over all processes; then a new window begins.

        Every process must call it. It waits for the device once.

        Args:
            gather: `[1, n]` of this process -> `[processes, n]`, as `Accelerator.gather`.

        Returns:
            forget, preserve, retain: unweighted means over the tokens of the window; 0 without any.
            num_forget, num_preserve, num_retain: tokens a step.
            loss_token_fraction: tokens that carry a loss, for which the output head is needed, as a
                share of all positions of the forget and retain batches, padding included. (Where
                neither the model's hidden states nor a mask as `logits_to_keep` can be used the
                model computes all logits nevertheless: see `palu.models.forward.logits_at`.)
                `head_rows_share`, its old name, stands beside it for one release.
            tokens_per_second: input tokens of forget and retain examples, padding not counted, a
                second of training, with loading of data and without evaluation and checkpoints.
            peak_memory_mib: the largest process's, see `peak_memory_mib`; absent where unknown.
        """
        others = [self._positions, peak_memory_mib(self.device) or 0.0]
        own = [self.terms.flatten(), self._tokens[None], self._tokens.new_tensor(others)]
        found = gather(torch.cat(own)[None]).tolist()
        # That copy to the host has waited for the device, so the clock is read after it.
        seconds = time.perf_counter() - (self._started or 0.0) - self._pauses
        *totals, tokens, positions, _ = (sum(column) for column in zip(*found, strict=True))
        sums, rows = totals[:3], totals[3:]
        memory = max(process[-1] for process in found)
        in_head = sum(rows) if self.preserve else sum(rows) - rows[1]
        logs = dict(zip(TERMS, row_means(sums, rows), strict=True))
        logs |= {f"num_{n}": count / self.steps for n, count in zip(TERMS, rows, strict=True)}
        logs["loss_token_fraction"] = logs["head_rows_share"] = in_head / max(positions, 1.0)
        logs["tokens_per_second"] = tokens / seconds
        if memory:
            logs["peak_memory_mib"] = memory
        self.reset()
        return logs


def row_means(sums: Sequence[float], rows: Sequence[float]) -> list[float]:
    """Each term's mean over its rows; 0 without rows."""
    return [total / max(count, 1.0) for total, count in zip(sums, rows, strict=True)]


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory this process has held so far, MiB.

    On an accelerator what its allocator has handed out to tensors; on the CPU, and on accelerators
    that do not tell, the largest resident size of the process. None where the system does not tell.
    """
    allocator = torch.get_device_module(device)
    if hasattr(allocator, "max_memory_allocated"):
        return allocator.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, else KiB
