"""Check a model before it is trained or measured: that it is causal, and with `adapter_off` that
it is the original once its adapter is off. Both show in its logits on a few tokens of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from palu.models.wrappers import (
    UnsupportedHead,
    adapters_off,
    eval_mode,
    is_sharded,
    output_embedding,
    peft_model,
    unwrap,
)

_ROWS, _TOKENS = 2, 64  # of the data, to check the model on


def first_texts(
    rows: Sequence[Mapping[str, Any]], collator: Callable | None = None
) -> list[Tensor]:
    """Return the tokens of the first rows, int64 `[T]` each, without padding and at most 64.

    Args:
        rows: mappings with `input_ids`, or what `collator` makes such a batch of.
    """
    rows = [rows[i] for i in range(min(_ROWS, len(rows)))]
    if collator is not None:
        batch = collator(rows)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None and mask.shape == ids.shape:
            real = mask.bool()
        return [row[keep][:_TOKENS] for row, keep in zip(ids, real, strict=True)][:_ROWS]
    return [torch.as_tensor(row["input_ids"])[:_TOKENS] for row in rows]


# ---- causal --------------------------------------------------------------------------------------


def refuse_encoder(model: nn.Module) -> None:
    """Raise ValueError for a model whose config says that it has an encoder."""
    inner = unwrap(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"the model must be a causal language model; {type(inner).__name__} is an "
            "encoder-decoder, whose encoder sees the whole text"
        )


def refuse_parts(model: nn.Module) -> None:
    """Raise ValueError for a model that is shared out among processes already: ranks of a tensor
    parallel one must have the same rows, and the trainer gives every process its own."""
    part = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
    if part is not None:
        raise ValueError(
            f"the parameter {part} of model is a DTensor, of which each process has a part "
            "(tp_plan, parallelize_module or fully_shard): give PALUTrainer a whole model, which "
            "it shards with fsdp='full_shard'; tensor parallel models train in a loop of your own "
            "(docs/distributed.md)"
        )


def is_whole(model: nn.Module) -> bool:
    """Return whether this process has all weights and may call the model by itself: not so on
    the meta device, under FSDP and where DeepSpeed (ZeRO 3) keeps a part."""
    parts = any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters())
    return not parts and not is_sharded(model)


def check_causal(model: nn.Module, texts: Sequence[Tensor]) -> None:
    """Check that the logits of a position do not change with later tokens.

    Later tokens are changed at three places of each text, and so are as many earlier ones. In a
    causal model later ones change nothing but roundings (a mixture's experts get other batches); in
    others they weigh about as much as earlier ones.

    Raises:
        ValueError: they do, or the config says that the model has an encoder.
    """
    refuse_encoder(model)
    name = type(unwrap(model)).__name__
    leaks, later, earlier = [], [], []
    with eval_mode(model):
        for text in texts:
            for before, after, noise in _changes(model, text):
                leaks.append(after > max(noise, before / 4))
                later.append(after)
                earlier.append(before)
    # In a mixture of experts, rounding may route a token differently at one place.
    if 2 * sum(leaks) > len(leaks):
        raise ValueError(
            f"the model must be a causal language model; the logits of {name} change with later "
            f"tokens (by {max(later):.2g} of their size, with earlier ones by {max(earlier):.2g}): "
            "it sees the tokens that it is to predict"
        )


def _changes(model: nn.Module, text: Tensor) -> Iterator[tuple[float, float, float]]:
    """Yield, at places of a text, how much the logits change with the tokens before, with those
    after, and by rounding. The text and all that is changed of it are one batch."""
    length = len(text)
    others = [next((t for t in text.tolist() if t != token), None) for token in text.tolist()]
    if length < 4 or None in others:
        return
    other = torch.tensor(others, dtype=text.dtype, device=text.device)
    places = sorted({length // 3, length // 2, 2 * length // 3} - {0})
    texts = [text]
    for position in places:
        count = min(position, length - 1 - position)
        for start in (position - count, position + 1):
            changed = text.clone()
            changed[start : start + count] = other[start : start + count]
            texts.append(changed)
    logits = _logits(model, torch.stack(texts))
    if logits is None:
        _refuse_headless(model)
        return
    noise = max(_eps(model, logits) / 8, 1e-5)
    for position, before, after in zip(places, logits[1::2], logits[2::2], strict=True):
        plain = logits[0, position]
        yield *(_distance(changed[position], plain) for changed in (before, after)), noise


def _refuse_headless(model: nn.Module) -> None:
    """Raise ValueError where there is no output embedding either, whose rows a loss could take."""
    try:
        output_embedding(model)
    except UnsupportedHead:
        raise ValueError(
            "the model must be a causal language model (AutoModelForCausalLM loads one): "
            f"{type(unwrap(model)).__name__} gives no logits [B, T, V] and has no module for them"
        ) from None


# ---- the original, with the adapter off ----------------------------------------------------------


def check_adapter_off(model: nn.Module, texts: Sequence[Tensor]) -> None:
    """Check that a PEFT model without its adapters computes what it computes with them.

    Raises:
        ValueError: it is not, by more than roundings (an adapter whose initialisation takes it out
            of the base weights, or that was trained before).
    """
    whole = peft_model(model)
    worst = tolerance = 0.0
    with eval_mode(model):
        on = [_logits(whole, text[None]) for text in texts]
        with adapters_off(whole):
            for text, logits in zip(texts, on, strict=True):
                if logits is not None:
                    worst = max(worst, _distance(_logits(whole, text[None]), logits))
                    tolerance = 8 * _eps(model, logits)
    if worst > max(tolerance, 1e-4) or worst != worst:
        raise ValueError(
            "reference='adapter_off' takes the model without its adapter for the original, and the "
            f"adapter changes the logits already (by {worst:.2g} of their size): it was trained "
            "before, or its initialisation takes it out of the base weights (PiSSA, OLoRA, ...). "
            "Use reference='live' or 'cached', which hold on to the model as it is now; or pass "
            "ref_model; or merge the adapter and start a fresh one. If the base without the "
            "adapter is the original you want, say base_is_original=True in PALUConfig"
        )


# ---- logits --------------------------------------------------------------------------------------


def _logits(model: nn.Module, texts: Tensor) -> Tensor | None:
    """`[B, T, V]` of texts `[B, T]`; None of a model that has none, or for no token."""
    if texts.numel() == 0:
        return None
    ids = texts.to(next(model.parameters()).device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def _distance(logits: Tensor, other: Tensor) -> float:
    """Between logits up to a constant in each row, relative to their spread."""
    logits, other = (x.float() - x.float().mean(-1, keepdim=True) for x in (logits, other))
    return ((logits - other).norm() / other.norm().clamp(min=1e-30)).item()


def _eps(model: nn.Module, logits: Tensor) -> float:
    """Of the coarsest dtype that the model computes in; quantized weights are computed with in half
    precision."""
    kinds = {p.dtype for p in model.parameters()} | {logits.dtype}
    if any(not kind.is_floating_point for kind in kinds):
        kinds.add(torch.bfloat16)
    return max(torch.finfo(kind).eps for kind in kinds if kind.is_floating_point)
