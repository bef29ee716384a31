"""What is asked of any causal language model: logits of only the rows that carry a loss, and the
tokens that end an answer.

Most positions of a batch (prompts, padding, answer tokens without a loss) never need logits, and
with a large vocabulary the logits are the largest tensors of a step. `kept_logits` asks the model
for the rows that matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Per model class: does its `logits_to_keep` take a 2-D boolean mask? Filled by the first real call.
_TAKES_MASK: dict[type, bool] = {}


def prediction_rows(at_labels: Tensor) -> Tensor:
    """Moves a mask from label positions to the rows of logits that predict them.

    Args:
        at_labels: bool `[B, T]`, true where the token at `t` is to be predicted. Position 0 is
            never predicted.

    Returns:
        bool `[B, T]`, true at `t - 1`; the last column is false. Row-major order is kept, so
        `x[:, 1:][at_labels[:, 1:]]` lines up with `logits[prediction_rows(at_labels)]`.
    """
    rows = torch.zeros_like(at_labels)
    rows[:, :-1] = at_labels[:, 1:]
    return rows


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DDP, `torch.compile` and PEFT wrappers. To look at, never to
    call."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode inside; every module's own mode and the random state are put
    back."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Without adapters, gradients and dropout inside; every module's own mode is put back, and what
    trains (PEFT turns all adapters' gradients on when it puts them back)."""
    modes = [(module, module.training) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), peft_model(model).disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, train in trains:
            parameter.requires_grad_(train)


def peft_model(model: nn.Module) -> nn.Module:
    """The `PeftModel` inside the trainer's wrappers."""
    return next(module for module in model.modules() if hasattr(module, "disable_adapter"))


def image_marks(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """What Gemma 3 asks for in training: which tokens stand for images. None do."""
    inner = unwrap(model)
    if inner.training and getattr(getattr(inner, "config", None), "model_type", None) == "gemma3":
        return {"token_type_ids": torch.zeros_like(input_ids)}
    return {}


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every id that ends an answer, ascending: the tokenizer's end token and those that the model's
    generation settings and its config name.

    Args:
        model: wrapped or not.
        tokenizer: or None, where there is none.
    """
    inner = unwrap(model)
    found: set[int] = set()
    for name in ("generation_config", "config"):
        found |= _end_tokens_of(getattr(inner, name, None))
    return sorted(found | _end_tokens_of(tokenizer))


def kept_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    keep: Tensor,
    **model_inputs: Any,
) -> Tensor:
    """Logits of the rows where `keep` is true, in row-major order.

    The module that the caller holds is the one that is called, so hooks of DDP, FSDP and PEFT run.
    Where the installed transformers takes a boolean mask as `logits_to_keep` (5.23 does, 5.17 does
    not) only these rows go through the output head. Elsewhere all logits are computed and the rows
    are picked out of them: slower, same numbers. Which of the two holds is found out on the first
    call for a model class and remembered.

    Args:
        model: a causal language model, wrapped or not.
        input_ids: int64 `[B, T]`.
        attention_mask: `[B, T]`, 1 for real tokens, or None when nothing is padded.
        keep: bool `[B, T]` on the same device; row `(b, t)` predicts the token at `(b, t + 1)`.
        **model_inputs: more arguments of the model's forward (`position_ids`, ...); no `labels`.

    Returns:
        `[keep.sum(), V]` in the model's logits dtype, differentiable.

    Raises:
        TypeError: `keep` is not boolean.
        ValueError: `keep` has another shape than `input_ids`.
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool tensor, not {keep.dtype}")
    if keep.shape != input_ids.shape:
        raise ValueError(
            f"keep must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"not {tuple(keep.shape)}"
        )
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    inputs |= image_marks(model, input_ids) | model_inputs
    kind = type(unwrap(model))
    takes_mask = _TAKES_MASK.get(kind)
    if takes_mask is None and not _names_logits_to_keep(unwrap(model)):
        takes_mask = _TAKES_MASK[kind] = False
    if takes_mask:
        return model(**inputs, logits_to_keep=keep).logits
    if takes_mask is None:
        logits = _probe(model, inputs, keep)
        _TAKES_MASK[kind] = logits is not None and logits.dim() == 2
        if logits is not None:
            # A model may accept the argument and ignore it; then all logits came back.
            return logits if logits.dim() == 2 else logits[keep]
    return model(**inputs).logits[keep]


def _end_tokens_of(holder: Any) -> set[int]:
    ids = getattr(holder, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _names_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _probe(model: nn.Module, inputs: dict, keep: Tensor) -> Tensor | None:
    """The logits of a call with the mask: `[rows, V]` if it was taken, `[B, T, V]` if ignored, None
    if refused."""
    try:
        logits = model(**inputs, logits_to_keep=keep).logits
    except torch.OutOfMemoryError:
        raise
    except (IndexError, TypeError, ValueError, RuntimeError):
        # Older versions index `hidden[:, mask, :]`, which fails. Any other fault comes back in the
        # call without a mask.
        return None
    rows = int(keep.sum())
    if logits.dim() == 2 and logits.shape[0] == rows:
        return logits
    if logits.shape[:-1] == keep.shape:
        return logits
    return None
