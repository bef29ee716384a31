"""The reference of a training run: made of the model before it changes, or read from a cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import palu_kernels
from palu.distributed import main_first, rank
from palu.reference.cache import CacheError, ReferenceCache
from palu.reference.model import (
    REFERENCES,
    AdapterOffReference,
    LiveReference,
)

STARTING_MODEL = "palu_reference.json"  # in a checkpoint: which model its reference cache is of


class CachedReference:
    """Rows that were computed before training (`palu.reference.cache`): no second model or pass."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache

    @property
    def head(self) -> palu_kernels.LMHead | None:
        """The frozen head, where training may change the model's."""
        return self.cache.head

    def to(self, device: torch.device | str) -> CachedReference:
        """Return rows on this device."""
        self.cache.to(device)
        return self

    def why_not_fusable(self, inputs: Mapping[str, Any]) -> str | None:
        """Return None: only models that allow it can be cached."""
        return None

    def whole_head(self) -> AbstractContextManager[palu_kernels.LMHead | None]:
        """Yield `head`."""
        return nullcontext(self.head)


Reference = LiveReference | AdapterOffReference | CachedReference


def make_reference(
    kind: str, model: nn.Module, ref_model: nn.Module | None, *, needed: bool
) -> Reference | None:
    """Make the reference of a run; None where no term needs one, and for a cache, which is opened
    when training begins.

    Raises:
        ValueError: `kind` is unknown, or a `ref_model` is given and `kind` is not live.
    """
    if kind not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, not {kind!r}")
    if ref_model is not None and kind != "live":
        raise ValueError(
            f"ref_model is given and reference is {kind!r}; a ref_model must come with "
            "reference='live'"
        )
    if not needed or kind == "cached":
        return None
    if kind == "adapter_off":
        return AdapterOffReference(model)
    return LiveReference(model, ref_model)


def open_run_cache(
    model: nn.Module, dataset: Any, folder: str, checkpoint: str | None, **options: Any
) -> ReferenceCache:
    """Open the cache in `folder`; where there is none the main process builds it before the others
    open it.

    Args:
        checkpoint: the folder of a checkpoint: it remembers which model its run started from, and
            may go on with that model's cache.

    Raises:
        CacheError, CacheWriteError, FloatingPointError: as `ReferenceCache.open_or_build`.
    """
    started = Path(checkpoint, STARTING_MODEL) if checkpoint else None
    starting_model = None
    if started is not None and started.is_file():
        starting_model = json.loads(started.read_text(encoding="utf-8"))["starting_model"]

    def make() -> ReferenceCache:
        return ReferenceCache.open_or_build(
            model, dataset, folder, starting_model=starting_model, **options
        )

    def take() -> ReferenceCache:
        if not Path(folder).is_dir():
            raise CacheError(
                f"process {rank()} does not see the reference cache {folder!r} that the main "
                "process has; reference_cache must be a folder that all processes share"
            )
        return make()

    return main_first(make, take, failed=CacheError)


def remember_starting_model(folder: Path, cache: ReferenceCache) -> None:
    """Write into a checkpoint which model its run's cache is of."""
    content = json.dumps({"starting_model": cache.starting_model})
    (folder / STARTING_MODEL).write_text(content, encoding="utf-8")


def autocast_dtype(accelerator: Any) -> torch.dtype | None:
    """Return the dtype that the accelerator runs the model in, by the training arguments or the
    launcher; None without autocast."""
    kind = accelerator.device.type
    with accelerator.autocast():
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
