"""The two terms of RMU in a batch: from the activations after one decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palu.data.roles import FORGET, IGNORE
from palu.methods.rmu import RMU
from palu.methods.step_loss import RETAIN, Objective, in_turns
from palu.models.layers import layer_output
from palu.reference.model import Inputs
from palu_kernels.reference import work_dtype


class RMUObjective(Objective):
    """`forget_weight * forget + retain_weight * retain` of a batch; see `RMU`.

    Args: as of `Objective`, whose `loss` is an `RMU` here.
    """

    loss: RMU

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Float32 `[3]`: answers to forget, 0, answers to keep."""
        forget = self._at_forget(batch).any(1).sum()
        retain = batch.get(RETAIN)
        kept = forget * 0 if retain is None else _at_answer(retain).any(1).sum()
        return torch.stack([forget, forget * 0, kept.to(forget.device)]).float()

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Objective`."""
        inputs, retain = self._inputs(batch), batch.get(RETAIN)
        rows = self._activations(model, inputs)
        own = len(inputs.is_forget)
        forget = kept = rows.new_zeros((), dtype=denominators.dtype)
        # Without any rows too: DDP waits for a gradient.
        if own or retain is None:
            target = self.loss.target(rows.shape[1]).to(rows)
            forget = _sum_of_means(rows[:own] - target, self._at_forget(batch))
        if retain is not None:
            alone = self._inputs(in_turns(batch)[1])
            with self.autocast():
                original = self.reference.of(model, lambda m: self._activations(m, alone))
            kept = _sum_of_means(rows[own:] - original.to(rows), _at_answer(retain))
        means = forget / denominators[0], kept / denominators[2]
        total = self.loss.forget_weight * means[0] + self.retain_weight * means[1]
        return total, torch.stack([means[0], means[0] * 0, means[1]]).detach().float()

    def _activations(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """`[answer tokens, D]`, at least float32."""
        output = layer_output(model, self.loss.layer_id, *inputs[:2], **inputs.more)
        # `keep` marks the rows before the tokens; here it is the tokens themselves that count.
        rows = output[:, 1:][inputs.keep[:, :-1]]
        return rows.to(work_dtype(rows.dtype))

    def _at_forget(self, batch: Mapping[str, Any]) -> Tensor:
        return self.loss.roles(batch["labels"]) == FORGET


def _at_answer(retain: Mapping[str, Tensor]) -> Tensor:
    """Bool `[B, T]`: the answer tokens, but one at position 0."""
    tokens = retain["labels"] != IGNORE
    tokens[:, :1] = False
    return tokens


def _sum_of_means(difference: Tensor, tokens: Tensor) -> Tensor:
    """Over answers, of the mean square over the tokens of each.

    Args:
        difference: `[n, D]`, of the tokens one after the other.
        tokens: bool `[B, T]`, where they are: an answer a row.
    """
    share = tokens.to(difference.dtype) / tokens.sum(1, keepdim=True).clamp(min=1)
    return (difference.square().mean(1) * share[tokens]).sum()
