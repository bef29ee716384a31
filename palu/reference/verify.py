"""Checking a whole cache: every byte, and on request the numbers once more from the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palu.data.collator import Collator
from palu.loss import PALULoss
from palu.models.wrappers import eval_mode
from palu.reference.build import ReferencePass, Source
from palu.reference.cache import ReferenceCache, cache_info
from palu.reference.rows import model_dtype
from palu.reference.store import CacheMismatch

# Allowed differences from the build, since another device, number of threads or version sums in
# another order: hidden states in relative norm, and the share of indices swapped with near ties.
TOLERANCE = {
    torch.float64: {"hidden": 1e-9, "indices": 0.01},
    torch.float32: {"hidden": 1e-4, "indices": 0.01},
    torch.float16: {"hidden": 2**-8, "indices": 0.25},
    torch.bfloat16: {"hidden": 2**-5, "indices": 0.25},
}


def verify_cache(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    dataset: Any = None,
    retain_dataset: Any = None,
    tokenizer: Any = None,
    report: Callable[..., None] | None = None,
) -> dict[str, float]:
    """Read every byte of a cache, compare its fingerprints with what is given and, where both model
    and data are, compute its numbers again.

    Args:
        path, model, dataset, retain_dataset, tokenizer: as for `ReferenceCache.open`. Label
            settings and autocast are those in the manifest.
        report: called with (batches done, batches).

    Returns:
        where numbers were computed, and none else: `hidden`, the worst batch's distance of hidden
        states in relative norm; `indices`, the share of indices that are others now.

    Raises:
        CacheMismatch: something differs, a number by more than `TOLERANCE` among it.
        CacheDamaged: a file is missing, truncated or changed.
    """
    path = Path(path)
    content = cache_info(path)
    autocast = getattr(torch, content["autocast"], None)
    cache = ReferenceCache.open(
        path,
        model=model,
        dataset=dataset,
        retain_dataset=retain_dataset,
        tokenizer=tokenizer,
        autocast_dtype=autocast,
        train_head=False,
    )
    if model is None or dataset is None:
        return {}
    loss = PALULoss(
        top_k=content["top_k"] or 1,
        prefix_length=content["prefix_length"],
        eos_token_id=content["eos_token_id"],
        select_from=content["select_from"],
        preserve=content["preserve"],
    )
    collator = Collator(tokenizer if tokenizer is not None else 0)
    sources = [Source("forget", dataset)]
    sources += [] if retain_dataset is None else [Source("retain", retain_dataset)]
    worst: dict[str, float] = {}
    with eval_mode(model, autocast=autocast or False):
        run = ReferencePass(model, sources, loss, collator)
        batches = run.batches(content["batch_size"])
        for done, (source, numbers) in enumerate(batches, 1):
            for kind, error in _errors(cache, run.rows(source, numbers), source.name).items():
                worst[kind] = max(worst.get(kind, 0.0), error)
            if report is not None:
                report(done, len(batches))
    allowed = TOLERANCE[_coarsest_dtype(model, autocast)]
    wrong = [
        f"{kind} by {error:.3g}" for kind, error in worst.items() if not error <= allowed[kind]
    ]
    if wrong:
        raise CacheMismatch(
            f"the numbers in reference cache {str(path)!r} differ from the model's: "
            f"{', '.join(wrong)} (allowed: {allowed}); build it anew"
        )
    return worst


def _errors(cache: ReferenceCache, rows: dict[str, Tensor], source: str) -> dict[str, float]:
    errors, ids = {}, rows["example_ids"]
    if "hidden" in rows and rows["hidden"].numel():
        read = cache.retain_hidden if source == "retain" else cache.preserve_hidden
        now, then = rows["hidden"].double(), read(ids).double()
        errors["hidden"] = ((now - then).norm() / now.norm().clamp(min=1e-30)).item()
    if "indices" in rows and rows["indices"].numel():
        now, then = rows["indices"].long(), cache.forget_indices(ids).long()
        width = int(torch.maximum(now, then).max()) + 1
        member = torch.zeros(len(now), width, dtype=torch.bool).scatter_(1, then, True)
        errors["indices"] = 1 - member.gather(1, now).double().mean().item()
    return errors


def _coarsest_dtype(model: nn.Module, autocast: torch.dtype | None) -> torch.dtype:
    """Return the dtype whose roundings decide."""
    kinds = [model_dtype(model), autocast or torch.float64]
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)
