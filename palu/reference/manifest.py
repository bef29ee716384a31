"""The manifest of a reference cache: what decided its numbers, and whether that is what it is used
with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from palu.loss import PALULoss
from palu.models.wrappers import unwrap
from palu.reference.build import ReferencePass, Source
from palu.reference.rows import dtype_name, head_may_train, model_dtype
from palu.reference.store import CacheMismatch
from palu.storage.fingerprint import (
    data_fingerprint,
    model_fingerprint,
    tensor_fingerprint,
    tokenizer_fingerprint,
)


def describe(
    run: ReferencePass, tokenizer: Any, template: Any, autocast_dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return everything that decides the numbers of a cache, as JSON values for its manifest."""
    head, data = run.head, {source.name: source for source in run.sources}
    return {
        "model": model_fingerprint(run.model),
        "dtype": dtype_name(model_dtype(run.model)),
        "autocast": dtype_name(autocast_dtype),
        "data": {name: data_fingerprint(source.ids) for name, source in data.items()},
        "examples": {name: source.unique for name, source in data.items()},
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "template": None if template is None else repr(template),
        **label_settings(run.loss, head.vocab_size),
        "head": {
            "fingerprint": tensor_fingerprint(head.weight, head.bias),
            "vocab_size": head.vocab_size,
            "hidden_size": head.hidden_size,
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
        },
    }


def label_settings(loss: PALULoss, vocab_size: int) -> dict[str, Any]:
    """Return the loss settings that decide which rows it asks a cache for, and what of them."""
    eos = loss.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    chosen_by_reference = loss.select_from == "reference"
    return {
        "prefix_length": max(loss.prefix_length, 0),
        "eos_token_id": sorted({int(token) for token in eos}),
        "select_from": loss.select_from,
        "top_k": min(loss.top_k, vocab_size) if chosen_by_reference else None,
        "preserve": loss.preserve,
    }


def check_match(
    manifest: Mapping[str, Any],
    path: str,
    *,
    model: nn.Module | None,
    dataset: Any,
    retain_dataset: Any,
    loss: PALULoss | None,
    tokenizer: Any,
    template: Any,
    autocast_dtype: torch.dtype | None,
    train_head: bool | None,
    starting_model: str | None,
) -> None:
    """Compare a manifest with everything that is given; see `ReferenceCache.open`.

    Raises:
        CacheMismatch: names all that differs.
    """
    differences = []
    if loss is not None:
        differences += _of_labels(manifest, loss)
    for name, rows in (("forget", dataset), ("retain", retain_dataset)):
        if rows is not None:
            differences += _of_data(manifest, name, rows)
    if tokenizer is not None and manifest["tokenizer"] is not None:
        present = tokenizer_fingerprint(tokenizer)
        differences += _unlike("tokenizer", manifest["tokenizer"][:12], present[:12])
    if template is not None and manifest["template"] is not None:
        differences += _unlike("template", manifest["template"], repr(template))
    if model is not None:
        differences += _of_model(manifest, model, autocast_dtype, starting_model)
        train_head = head_may_train(model) if train_head is None else train_head
    elif starting_model is not None:
        differences += _unlike("model", manifest["model"][:12], starting_model[:12])
    if train_head and not manifest["head"]["stored"]:
        differences.append(
            "head: training may change the output head (or the embedding tied to it), and the "
            "cache was built without a frozen copy of it (--no-train-head, train_head=False)"
        )
    if differences:
        raise CacheMismatch(
            f"reference cache {path!r} does not fit: {'; '.join(differences)}. Use the model, data "
            "and settings it was built with, name another folder, or delete this one and have it "
            "built anew (`palu cache build` and `palu unlearn --reference cached` do so)"
        )


def _unlike(name: str, cached: Any, present: Any) -> list[str]:
    return [] if cached == present else [f"{name} is {cached} in the cache and {present} here"]


def _of_labels(manifest: Mapping[str, Any], loss: PALULoss) -> list[str]:
    """Compare label settings: what the loss asks for must be there, more may be."""
    asked = label_settings(loss, manifest["head"]["vocab_size"])
    differences = []
    for name in ("prefix_length", "eos_token_id"):
        differences += _unlike(name, manifest[name], asked[name])
    if asked["select_from"] == "reference":
        if manifest["select_from"] == "reference":
            differences += _unlike("top_k", manifest["top_k"], asked["top_k"])
        else:
            differences += _unlike("select_from", manifest["select_from"], asked["select_from"])
    if asked["preserve"] is not None and manifest["preserve"] is None:
        differences += _unlike("preserve", manifest["preserve"], asked["preserve"])
    return differences


def _of_data(manifest: Mapping[str, Any], name: str, rows: Any) -> list[str]:
    cached = manifest["data"].get(name)
    if cached is None:
        return [f"{name} data: the cache was built without a {name} set"]
    source = Source(name, rows)
    present = data_fingerprint(source.ids)
    if cached == present:
        return []
    return [
        f"{name} data is {cached[:12]} ({manifest['examples'][name]} examples) in the cache and "
        f"{present[:12]} ({source.unique} examples) here (tokens and labels count, order does not)"
    ]


def _of_model(
    manifest: Mapping[str, Any],
    model: nn.Module,
    autocast_dtype: torch.dtype | None,
    starting_model: str | None,
) -> list[str]:
    differences = _unlike("autocast", manifest["autocast"], dtype_name(autocast_dtype))
    other_dtype = _unlike("dtype", manifest["dtype"], dtype_name(model_dtype(model)))
    if other_dtype:
        return differences + other_dtype  # then all weights differ as well
    if starting_model is None:
        return differences + _unlike("model", manifest["model"][:12], model_fingerprint(model)[:12])
    differences += _unlike("model", manifest["model"][:12], starting_model[:12])
    if not manifest["head"]["stored"]:
        # The head of the trained model stands for the reference's: training must have left it.
        head = unwrap(model).get_output_embeddings()
        present = tensor_fingerprint(head.weight, getattr(head, "bias", None))
        differences += _unlike("head", manifest["head"]["fingerprint"][:12], present[:12])
    return differences
