"""Whether losses may be computed from the hidden rows that enter a model's head: its own logits
are compared with those of an `LMHead`, on a few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import palu_kernels
from palu.distributed import agreed, in_group
from palu.models.forward import model_hidden_states
from palu.models.in_head import LossInHead
from palu.models.wrappers import (
    UnsupportedHead,
    eval_mode,
    output_embedding,
    refuse_compiled,
)

# The rows that are tried: at most this many tokens, and logits of at least this size, beyond any
# cap in use (15 to 50).
_CHECK_TOKENS, _CHECK_PEAK = 8, 100.0


def why_not_fusable(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **model_inputs: Any
) -> str | None:
    """Return why losses cannot be computed in the head's forward (`palu.loss_in_head`); None where
    they can, in all processes. Runs the model three times on a few tokens: ask once, not in every
    step. All processes of a group have to ask, and all get an answer of one kind.

    Args:
        model: a causal language model, wrapped as it will be called.
        input_ids, attention_mask, **model_inputs: any batch for this model, as for
            `palu.models.forward.logits_at`.
    """
    # First what needs no call of the model, in which the processes wait for one another.
    reason = in_head = None
    try:
        in_head = LossInHead(model)
        if in_head.tensor_parallel:
            raise UnsupportedHead("the output embedding is tensor parallel")
    except UnsupportedHead as refusal:
        reason = str(refusal)
    reason = agreed(reason)
    if reason is not None:
        return reason
    try:
        _check(model, in_head, None, input_ids, attention_mask, model_inputs)
    except UnsupportedHead as refusal:
        reason = str(refusal)
    return agreed(reason)


def check_head(
    model: nn.Module,
    head: palu_kernels.LMHead,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **model_inputs: Any,
) -> None:
    """Compare the model's own logits with those of `head`, on a few tokens of the given batch.

    One row of the test enters the output embedding as it is, another one scaled until the largest
    logit is 100 or 4 times its own, so that a cap shows. Nothing of the model or of the random
    state is changed.

    With `u` the eps of the coarser dtype (64 times it in float32 and float64, where the order of
    sums shows): a row may differ by `u` in relative norm, an entry by 4 eps of itself plus `u / 2`
    of the row's largest.

    Raises:
        UnsupportedHead: they differ by more, the rows cannot be tested, or `model_hidden_states`
            does not work for this model.
    """
    _check(model, None, head, input_ids, attention_mask, model_inputs)


def _check(
    model: nn.Module,
    in_head: LossInHead | None,
    head: palu_kernels.LMHead | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    model_inputs: Mapping[str, Any],
) -> None:
    """`check_head` of a head, or of the one that `in_head` finds in the forward."""
    ids, more = _few_tokens(input_ids, attention_mask, model_inputs)
    tried: list[_Trial] = []

    def amplify(module: nn.Module, args: tuple) -> tuple:
        # Inside the hook, where the model's own autocast is in force, and parameters are whole.
        tried.append(_Trial(in_head.head() if head is None else head, args[0]))
        return tried[-1].rows, *args[1:]

    with eval_mode(model):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
        if in_head is None:
            model_hidden_states(model, **inputs)
        else:
            in_head(lambda hidden, _: hidden.new_zeros(()), **inputs)
            model_hidden_states(model, **inputs)  # as a reference may be called
        layer = output_embedding(model)
        refuse_compiled(model, layer)
        hook = layer.register_forward_pre_hook(amplify)
        try:
            output = model(**inputs, use_cache=False)
        finally:
            hook.remove()
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedHead("the output of the model has no logits to compare with")
    tried[-1].compare(logits)


class _Trial:
    """Rows `[2, n, D]` on their way into the head, the second ones scaled, and what `head` makes of
    them. (What is wrong is told later: in the forward of a sharded model one process must not leave
    the others.)"""

    def __init__(self, head: palu_kernels.LMHead, hidden: Tensor) -> None:
        self.head, self.rows = head, hidden
        self.peak = replace(head, softcap=None).logits(hidden).abs().max().item()
        if not self.untestable:
            room = torch.finfo(hidden.dtype).max / 8 / hidden.abs().max().item()
            factor = min(max(_CHECK_PEAK / self.peak, 4.0), room)
            self.rows = torch.stack([hidden[0], hidden[1] * factor])
        self.expected = head.logits(self.rows)

    @property
    def untestable(self) -> bool:
        return not 0 < self.peak < float("inf")

    def compare(self, logits: Tensor) -> None:
        if self.untestable:
            raise UnsupportedHead(f"the largest logit of a test row is {self.peak}")
        _compare(logits, self.expected, self.head)


def _compare(logits: Tensor, expected: Tensor, head: palu_kernels.LMHead) -> None:
    if logits.shape != expected.shape:
        raise UnsupportedHead(
            f"the model gives logits of shape {list(logits.shape)}, its output embedding of shape "
            f"{list(expected.shape)}"
        )
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(expected.dtype).eps)
    of_row = eps if eps > 1e-6 else 64 * eps
    got, want = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, expected))
    error, size = (got - want).abs(), want.abs()
    entries = error <= 4 * eps * size + of_row / 2 * size.amax(-1, keepdim=True)
    rows = error.norm(dim=-1) <= of_row * size.norm(dim=-1)
    if not (entries.all() and rows.all()):  # a NaN is an error too
        raise UnsupportedHead(
            f"the logits of the model differ by up to {error.max().item():.3g} from cap(scale * "
            f"(hidden @ weight.T + bias)) with scale {head.logit_scale:g} and softcap "
            f"{head.softcap} of its config"
        )


def _few_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, model_inputs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same few real tokens twice, `[2, n]`, and the other inputs of theirs."""
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        real = attention_mask.bool()
    if not real.any() and not in_group():
        raise UnsupportedHead("the batch has no token to test the output head on")
    if not real.any():  # the other processes wait for this one: padding will do
        real = torch.ones_like(real)

    def few(values: Tensor) -> Tensor:
        return torch.stack([values[real][:_CHECK_TOKENS]] * 2)

    shape = input_ids.shape
    more = {
        n: few(v) for n, v in model_inputs.items() if isinstance(v, Tensor) and v.shape[:2] == shape
    }
    return few(input_ids), more
