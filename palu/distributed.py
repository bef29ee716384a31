"""Ranks of a distributed run: which process writes, and how the others wait or share the work.

`torchrun` and `accelerate launch` start a process for each device and set `RANK` and `WORLD_SIZE`,
which are read here without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process, 0 where there is only one."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: torch.device) -> torch.device:
    """Return the device that the user named; among several processes it may have no index.

    Raises:
        ValueError: it has an index, and there are several processes.
    """
    if count() > 1 and device.index is not None:
        raise ValueError(
            f"device {str(device)!r} is one device, and this run has {count()} processes with a "
            f"device each: name {device.type!r}"
        )
    return device


def main_first(make: Callable[[], T], take: Callable[[], T], *, failed: type[Exception]) -> T:
    """Run `make()` in the main process and, once it has succeeded, `take()` in the others.

    The others wait as long as the process group allows (`ddp_timeout`, half an hour by default).

    Raises:
        Exception: what `make` or `take` raised; in the others a `failed` with the main process's
            message.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return make()
    if state.is_main_process:
        try:
            result = make()
        except Exception as error:
            broadcast_object_list([str(error)])
            raise
        broadcast_object_list([None])
        return result
    message: list[str | None] = [None]
    broadcast_object_list(message)
    if message[0] is not None:
        raise failed(f"the main process failed: {message[0]}")
    return take()


def in_group() -> bool:
    """Return whether this process is one of a process group."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def agreed(reason: str | None) -> str | None:
    """Return the reason that the first of all processes has, naming it where it is not this one's
    too; None where none has one. All processes of the group have to call, so that none goes on
    while another stops."""
    found = everyone(reason)
    number = next((number for number, one in enumerate(found) if one is not None), None)
    if number is None or found[number] == reason:
        return reason
    return f"in process {number} {found[number]}"


def agree(problem: str | None, failed: type[Exception]) -> None:
    """Raise in every process what any of them has found wrong; all of them must call.

    Args:
        problem: what this one has found, or None.
        failed: the error to raise; it takes a message, which names the processes.
    """
    found = everyone(problem)
    wrong = {number: said for number, said in enumerate(found) if said is not None}
    if not wrong:
        return
    if len(set(found)) == 1:
        raise failed(problem)
    raise failed("; ".join(f"process {number}: {said}" for number, said in wrong.items()))


def everyone(value: T) -> list[T]:
    """Return the value of every process, in order of rank; all of them must call."""
    if not in_group():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Processes(NamedTuple):
    """The rank of this process and the number of those that share the work."""

    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls, *, cpu: bool) -> Processes:
        """Join the process group of `accelerate launch` or `torchrun` and take this process's
        device; without a launcher there is one process.

        Args:
            cpu: stay on the CPU.
        """
        if count() == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        return cls(state.process_index, state.num_processes)

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, in order of rank; all of them must call."""
        return [value] if self.count == 1 else everyone(value)

    def leave(self) -> None:
        """Leave the process group."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()


ALONE = Processes()
