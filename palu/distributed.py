"""Runs of several processes: which of them speaks and writes, and how the others wait for it.

`torchrun` and `accelerate launch` start a process for each device and tell it its number in
environment variables, which are read here without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def rank() -> int:
    """The number of this process, 0 where there is only one."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: torch.device) -> torch.device:
    """A device as the user named it, which must leave the choice of one among several to the
    launcher.

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
    """`make()` in the main process; when it has succeeded, `take()` in the others.

    The others wait as long as the process group allows (`ddp_timeout`, half an hour by default).

    Raises:
        Exception: what `make` or `take` raised; in the others a `failed` that repeats what the main
            process said.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return make()
    if state.is_main_process:
        try:
            made = make()
        except Exception as error:
            broadcast_object_list([str(error)])
            raise
        broadcast_object_list([None])
        return made
    said: list[str | None] = [None]
    broadcast_object_list(said)
    if said[0] is not None:
        raise failed(f"the main process failed: {said[0]}")
    return take()
