"""Work in batches of rows of like length, on one process or on several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Processes(NamedTuple):
    """This process among those that share the work."""

    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls, *, cpu: bool) -> Processes:
        """Those that `accelerate launch` or `torchrun` started (the environment says so), or this
        one alone. Joins the process group and, on accelerators, takes this process's device.

        Args:
            cpu: stay on the CPU.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        return cls(state.process_index, state.num_processes)

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank; all of them must call."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        import torch.distributed

        torch.distributed.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """Leaves the process group."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()


ALONE = Processes()


def in_batches(
    lengths: Sequence[int],
    batch_size: int,
    work: Callable[[list[int]], Sequence[T]],
    *,
    processes: Processes = ALONE,
    report: Callable[[int, int], None] | None = None,
) -> list[T]:
    """`work(numbers of rows)` on batches of rows of like length, longest first (what does not fit
    in memory fails at once).

    Whole batches go to processes in turn, so a row meets the same rows and the same padding however
    many there are, and every process gets every result.

    Args:
        lengths: one a row.
        work: returns one result for each row number of the batch.
        report: called with (rows done, of how many), this process's rows only.

    Returns:
        one result a row, in the order of `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[processes.rank :: processes.count]
    total, done = sum(map(len, mine)), 0
    found: dict[int, T] = {}
    for batch in mine:
        found.update(zip(batch, work(batch), strict=True))
        done += len(batch)
        if report is not None:
            report(done, total)
    everything: dict[int, T] = {}
    for part in processes.gather(found):
        everything.update(part)
    return [everything[i] for i in range(len(lengths))]
