"""A disk that is full or read-only: looked for before the first step, and survived at the end."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from palu.errors import WriteError, failed_to_write, one_line
from palu.training.master_weights import HALF

MIB = 2**20
_MARGIN = MIB  # configs, records
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def small_files(folder: Path) -> int:
    """Bytes of a model folder's own files that are no weights: a tokenizer's, above all."""
    files = (path for path in folder.iterdir() if path.is_file())
    return sum(path.stat().st_size for path in files if path.suffix not in _WEIGHTS)


def model_bytes(model: nn.Module, saved: Mapping[str, torch.dtype] | None) -> int:
    """What a model takes when it is written.

    Args:
        saved: the dtypes it is written in; None: what trains alone (an adapter).
    """
    total = _MARGIN
    for name, parameter in model.named_parameters():
        if saved is not None:
            total += parameter.numel() * saved[name].itemsize
        elif parameter.requires_grad:
            total += parameter.numel() * parameter.element_size()
    return total


def checkpoint_bytes(model: nn.Module, *, adapter: bool, sharded: bool = False) -> int:
    """What a checkpoint takes: the weights (of an adapter those that train; of a sharded model,
    unless shards are saved, once for FSDP and once as a model), AdamW's two numbers a weight that
    trains, and float32 masters of 16-bit ones."""
    total = _MARGIN
    for parameter in model.parameters():
        if parameter.requires_grad or not adapter:
            total += parameter.numel() * parameter.element_size() * (2 if sharded else 1)
        if parameter.requires_grad:
            total += parameter.numel() * (12 if parameter.dtype in HALF else 8)
    return total


def check_room(needs: Mapping[str, tuple[Path, int]]) -> None:
    """Look whether files can be written, by writing one, and whether there is room for them all.

    Args:
        needs: what is written, in words, its place, and its bytes.

    Raises:
        ValueError: a place cannot be written, or a file system has too little room. Ones that tell
            no size are taken as they are.
    """
    shared: dict[int, list[tuple[str, Path, int]]] = {}
    for what, (place, size) in needs.items():
        folder = place.absolute().parent
        while not folder.exists():
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"palu")
                file.flush()
        except OSError as error:
            raise ValueError(
                f"{what} goes to {str(place)!r}, and nothing can be written in {str(folder)!r}: "
                f"{error.strerror or error}"
            ) from None
        shared.setdefault(os.stat(folder).st_dev, []).append((what, folder, size))
    for written_there in shared.values():
        usage = shutil.disk_usage(written_there[0][1])
        need = sum(size for _, _, size in written_there)
        if usage.total and usage.free < need:
            names, place = " and ".join(what for what, _, _ in written_there), written_there[0][1]
            raise ValueError(
                f"room for {names}: {need / MIB:,.1f} MiB are needed and {str(place)!r} has "
                f"{usage.free / MIB:,.1f} MiB free; make room or name a place on another disk"
            )


def keep(
    error: Exception,
    output: Path,
    write: Callable[[Path], None],
    *,
    rescue: Path | None,
    checkpoint: str | None,
    size: int,
) -> WriteError:
    """Keep a trained model whose output could not be written.

    Args:
        error: why not.
        write: writes the model to a place, as a whole.
        rescue: where the user wants it in such a case.
        checkpoint: a whole checkpoint of the run.
        size: bytes of the model.

    Returns:
        the error to raise: what failed, and where the weights are now.
    """
    said = f"the model could not be written to {str(output)!r} ({one_line(error, 200)})"
    places = [] if rescue is None else [rescue]
    places += [] if checkpoint is not None else [None]  # None: the system's temporary folder
    for place in places:
        try:
            place = _scratch(size) / output.name if place is None else place
            write(place)
        except Exception as second:
            if not failed_to_write(second):
                raise
            said += f"; nor to {str(place or 'the temporary folder')!r} ({one_line(second, 100)})"
        else:
            return WriteError(f"{said}: it is in {str(place)!r} now, whole; move it from there")
    if checkpoint is not None:
        return WriteError(
            f"{said}: the checkpoint {checkpoint!r} is kept; make room and run the same command "
            "with --resume"
        )
    return WriteError(f"{said}: the training is lost; --rescue DIR names a second place")


def _scratch(size: int) -> Path:
    """A new folder in the system's temporary one. Raises OSError where there is no room."""
    place = tempfile.gettempdir()
    usage = shutil.disk_usage(place)
    if usage.total and usage.free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
    return Path(tempfile.mkdtemp(prefix="palu-rescue-"))
