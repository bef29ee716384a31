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
from palu.reference.rows import dtype_name, model_dtype
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


def unlike(name: str, cached: Any, present: Any) -> list[str]:
    return [] if cached == present else [f"{name} is {cached} in the cache and {present} here"]


def label_differences(manifest: Mapping[str, Any], loss: PALULoss) -> list[str]:
    """Compare label settings: what the loss asks for must be there, more may be."""
    asked = label_settings(loss, manifest["head"]["vocab_size"])
    differences = []
    for name in ("prefix_length", "eos_token_id"):
        differences += unlike(name, manifest[name], asked[name])
    if asked["select_from"] == "reference":
        if manifest["select_from"] == "reference":
            differences += unlike("top_k", manifest["top_k"], asked["top_k"])
        else:
            differences += unlike("select_from", manifest["select_from"], asked["select_from"])
    if asked["preserve"] is not None and manifest["preserve"] is None:
        differences += unlike("preserve", manifest["preserve"], asked["preserve"])
    return differences


def data_differences(manifest: Mapping[str, Any], name: str, rows: Any) -> list[str]:
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


def model_differences(
    manifest: Mapping[str, Any],
    model: nn.Module,
    autocast_dtype: torch.dtype | None,
    starting_model: str | None,
) -> list[str]:
    differences = unlike("autocast", manifest["autocast"], dtype_name(autocast_dtype))
    other_dtype = unlike("dtype", manifest["dtype"], dtype_name(model_dtype(model)))
    if other_dtype:
        return differences + other_dtype  # then all weights differ as well
    if starting_model is None:
        return differences + unlike("model", manifest["model"][:12], model_fingerprint(model)[:12])
    differences += unlike("model", manifest["model"][:12], starting_model[:12])
    if not manifest["head"]["stored"]:
        # The trained model's head is used as the reference's: training must not have changed it.
        head = unwrap(model).get_output_embeddings()
        present = tensor_fingerprint(head.weight, getattr(head, "bias", None))
        differences += unlike("head", manifest["head"]["fingerprint"][:12], present[:12])
    return differences
