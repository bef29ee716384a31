"""The two terms of a batch when the method is not PALU, by the same two roads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palu.data.roles import FORGET
from palu.methods.answers import Answers
from palu.methods.base import Method
from palu.methods.step_loss import RETAIN, Objective, answer_tokens, in_turns
from palu.models.forward import logits_at, model_hidden_states
from palu.models.inputs import stacked
from palu.reference.model import Inputs
from palu_kernels import linear_cross_entropy_loss, linear_kl_loss


class MethodObjective(Objective):
    """`forget_weight * forget + retain_weight * retain` of a batch; the preserve term is 0.

    Args: as of `Objective`, whose `loss` is a `Method` here.
    """

    loss: Method

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Float32 `[3]`: what each term is a mean over, in a batch: tokens, or answers of a method
        that is `per_example`."""
        counts = super().count(batch)
        if self.loss.per_example:
            counts[0] = (self.loss.roles(batch["labels"]) == FORGET).any(1).sum()
        return counts

    def _inputs(self, batch: Mapping[str, Any], with_retain: bool = True) -> Inputs:
        return super()._inputs({**batch, **self._whole(batch)}, with_retain)

    def _whole(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The forget batch, with second answers under the first where the method has them."""
        return stacked(batch) if self.loss.needs_alternates else batch

    def _from_hidden(
        self, model: nn.Module, batch: Mapping[str, Any], inputs: Inputs, denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = model_hidden_states(model, *inputs[:2], **inputs.more)[inputs.keep]
        with self.autocast():
            return self._terms(model, batch, inputs, hidden, denominators)

    def _from_logits(
        self, model: nn.Module, batch: Mapping[str, Any], inputs: Inputs, denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = logits_at(model, *inputs[:3], **inputs.more)
        return self._terms(model, batch, inputs, logits, denominators)

    def _terms(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        inputs: Inputs,
        rows: Tensor,
        denominators: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own, retain = len(inputs.is_forget), batch.get(RETAIN)
        ref_own, ref_retain = self._reference_rows(model, batch, inputs, rows)
        forget = kept = rows.new_zeros((), dtype=denominators.dtype)
        # Without any rows too: DDP waits for a gradient of the head.
        if own or retain is None:
            forget = self.loss.loss(self._answers(batch, rows[:own], ref_own)).sum()
        if retain is not None:
            kept = self._retain_sum(rows[own:], retain, ref_retain)
        means = forget / denominators[0], kept / denominators[2]
        total = self.loss.forget_weight * means[0] + self.retain_weight * means[1]
        return total, torch.stack([means[0], means[0] * 0, means[1]]).detach().float()

    def _answers(self, batch: Mapping[str, Any], rows: Tensor, ref_rows: Tensor | None) -> Answers:
        batch = self._whole(batch)
        chosen = self.loss.roles(batch["labels"])[:, 1:] == FORGET
        lengths = chosen.sum(1)
        return Answers(
            rows,
            self.head,
            batch["input_ids"][:, 1:][chosen],
            lengths[lengths > 0],
            ref_rows,
            None if ref_rows is None else self.reference.head,
            self.loss.backend,
        )

    def _reference_rows(
        self, model: nn.Module, batch: Mapping[str, Any], inputs: Inputs, rows: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The original's rows, hidden or logits, of the forget and of the retain batch; None where
        no term asks for them."""
        own, retain = len(inputs.is_forget), batch.get(RETAIN)
        for_forget = self.loss.needs_reference and (own > 0 or retain is None)
        for_retain = self.retain_kl and retain is not None
        if not for_forget and not for_retain:
            return None, None
        if not for_retain:
            inputs = self._inputs(batch, with_retain=False)
        elif not for_forget:
            own, inputs = 0, self._inputs(in_turns(batch)[1])
        with self.autocast():
            if self.head is None:
                found = self.reference.logits(model, inputs)
            else:
                hidden = self.reference.rows(model, inputs, batch)
                found = torch.cat([hidden.forget, hidden.retain])
        found = found.to(rows.dtype)
        return found[:own] if for_forget else None, found[own:] if for_retain else None

    def _retain_sum(
        self, rows: Tensor, retain: Mapping[str, Tensor], ref_rows: Tensor | None
    ) -> Tensor:
        if self.head is None:
            return super()._retain_sum(rows, retain, ref_rows)
        options = {"reduction": "sum", "backend": self.loss.backend}
        if self.retain_kl:
            ref = ref_rows, self.reference.head
            return linear_kl_loss(rows, self.head, *ref, direction="forward", **options)
        return linear_cross_entropy_loss(rows, self.head, answer_tokens(retain), **options)
