"""The terms of one micro-batch, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import palu_kernels
from palu.data.roles import FORGET
from palu.methods.answers import Answers
from palu.methods.micro_batch import (
    RETAINED,
    ROLES,
    model_inputs,
    next_tokens,
    part_for_reference,
)
from palu.models.forward import HiddenStates, logits_at
from palu.models.lm_head import fusable_head
from palu.models.router_loss import RouterLoss, wanted
from palu.reference.cached import CachedReference, Reference
from palu.reference.rows import refuse_unknown_inputs
from palu_kernels import (
    cross_entropy_loss,
    kl_loss,
    linear_cross_entropy_loss,
    linear_kl_loss,
)

if TYPE_CHECKING:
    from palu.methods.base import Method


class StepLoss:
    """`forget_weight * forget + preserve_weight * preserve + retain_weight * retain` of a
    micro-batch (`palu.methods.micro_batch`): of examples to forget, of retained ones, or of both
    (`together`, where a second forward before backward would run a wrapper's hooks twice).

    A subclass computes the `terms`; the router loss of a mixture is added here. Whether losses are
    computed from hidden states is found out with the first batch
    (`palu.models.lm_head.fusable_head`).

    Args:
        method: the forget term, a `palu.methods.Method`.
        reference: the frozen original, or None where no term needs it.
        retain_loss: `nll`, or `kl` to the reference.
        retain_weight: of the retain term.
        autocast: the context that the model runs in.
    """

    def __init__(
        self,
        method: Method,
        reference: Reference | None,
        *,
        retain_loss: str,
        retain_weight: float,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.method = method
        self.reference = reference
        self.retain_kl, self.retain_nll = retain_loss == "kl", retain_loss == "nll"
        self.retain_weight = retain_weight
        self.autocast = autocast
        self.head: palu_kernels.LMHead | None = None
        self._path_chosen = False
        self._hidden: dict[nn.Module, HiddenStates] = {}
        self.router = RouterLoss()
        self._add_router_loss: bool | None = None  # asked at the first call

    def choose_path_again(self) -> None:
        """Find out with the next batch how losses are computed: the model is another one, or is
        going to be wrapped."""
        self.head, self._path_chosen, self._add_router_loss = None, False, None
        self._hidden.clear()

    def state(self) -> dict[str, float]:
        """Return what training changes and checkpoints keep: nothing, unless a subclass does."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Put back what `state` gave; an empty one stands for the beginning."""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted total, and each term's sum divided by its denominator (detached
        float32 `[3]`).

        Args:
            model: as the trainer holds it.
            batch: a micro-batch.
            denominators: float32 `[3]`, at least 1 each.
        """
        if not self._path_chosen:
            self._choose_path(model, batch)
        if self._add_router_loss is None:
            self._add_router_loss = self.retain_nll and wanted(model)
        roles = batch[ROLES]
        if not (self._add_router_loss and roles.retain):
            return self.terms(model, batch, denominators)
        with self.router.watching(model) as outputs:
            total, means = self.terms(model, batch, denominators)
        extra = self.router.of(model, outputs, batch.get("attention_mask"), roles.forget)
        count = torch.tensor(roles.count(RETAINED), dtype=denominators.dtype)
        extra = extra * (count.to(extra.device, non_blocking=True) / denominators[2])
        total = total + self.retain_weight * extra
        return total, means + nn.functional.pad(extra.detach()[None], (2, 0))

    def terms(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what a call does, without a router loss."""
        raise NotImplementedError

    def retain_sum(self, batch: Mapping[str, Any], rows: Tensor, ref_rows: Tensor | None) -> Tensor:
        """Return the sum of the retain loss.

        Args:
            rows: of the retained tokens: `[n, D]`, or logits `[n, V]` where there is no head.
            ref_rows: the original's, for `kl`.
        """
        options: dict[str, Any] = {"reduction": "sum", "backend": self.method.backend}
        if self.retain_kl:
            options["direction"] = "forward"
            if self.head is None:
                return kl_loss(rows, ref_rows, **options)
            return linear_kl_loss(rows, self.head, ref_rows, self.reference.head, **options)
        order = batch[ROLES].order(RETAINED).to(rows.device, non_blocking=True)
        targets = next_tokens(batch).flatten()[order]
        if self.head is None:
            return cross_entropy_loss(rows, targets, **options)
        return linear_cross_entropy_loss(rows, self.head, targets, **options)

    def hidden_states(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return `[B, T, D]`; see `palu.models.forward.model_hidden_states`."""
        call = self._hidden.get(model)
        if call is None:
            call = self._hidden[model] = HiddenStates(model)
        return call(**inputs)

    def _choose_path(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self._path_chosen = True
        inputs = model_inputs(batch)
        self.head = fusable_head(model, **inputs)
        if self.head is not None and self.reference is not None:
            with self.autocast():
                if not self.reference.has_fusable_head(inputs):
                    self.head = None
        if isinstance(self.reference, CachedReference):
            refuse_unknown_inputs(batch)
        if not _all_agree(self.head is not None, batch["input_ids"].device):
            self.head = None
        if self.head is None and isinstance(self.reference, CachedReference):
            raise ValueError(
                "reference='cached' needs losses from hidden rows, which this model does not allow "
                "(the warning above says why); use reference='live'"
            )


class AnswerStepLoss(StepLoss):
    """The terms of a method that is a loss on whole answers; the preserve term is 0."""

    def terms(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `StepLoss`."""
        roles = batch[ROLES]
        rows = self.rows(model, batch)
        own = roles.count(FORGET)
        ref_own = ref_retain = None
        for_forget = self.method.needs_reference and roles.forget > 0
        for_retain = self.retain_kl and roles.retain > 0
        if for_forget or for_retain:
            part = part_for_reference(batch, forget=for_forget, retain=for_retain)
            with self.autocast():
                ref_rows = self.reference.of(model, lambda m: self.rows(m, part)).to(rows.dtype)
            ref_own = ref_rows[:own] if for_forget else None
            ref_retain = ref_rows[own if for_forget else 0 :] if for_retain else None
        forget = kept = rows.new_zeros((), dtype=denominators.dtype)
        with self.autocast():
            # Without any rows too: DDP waits for a gradient of the head.
            if roles.forget or not roles.retain:
                forget = self.method.loss(self._answers(batch, rows[:own], ref_own)).sum()
            if roles.retain:
                kept = self.retain_sum(batch, rows[own:], ref_retain)
        means = forget / denominators[0], kept / denominators[2]
        total = self.method.forget_weight * means[0] + self.retain_weight * means[1]
        return total, torch.stack([means[0], means[0] * 0, means[1]]).detach().float()

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return what enters the head, `[n, D]`, or logits `[n, V]`, of the rows with a role:
        those of answers to forget, then of retained ones."""
        roles, inputs = batch[ROLES], model_inputs(batch)
        if self.head is None:
            keep = (roles.at != 0).to(inputs["input_ids"].device, non_blocking=True)
            return logits_at(model, positions=keep, **inputs)
        hidden = self.hidden_states(model, inputs)
        order = torch.cat([roles.order(FORGET), roles.order(RETAINED)])
        return hidden.flatten(0, 1).index_select(0, order.to(hidden.device, non_blocking=True))

    def _answers(self, batch: Mapping[str, Any], rows: Tensor, ref_rows: Tensor | None) -> Answers:
        roles, device = batch[ROLES], rows.device
        return Answers(
            rows,
            self.head,
            next_tokens(batch).flatten()[roles.order(FORGET).to(device, non_blocking=True)],
            roles.lengths(FORGET).to(device, non_blocking=True),
            ref_rows,
            None if ref_rows is None else self.reference.head,
            self.method.backend,
        )


def _all_agree(value: bool, device: torch.device) -> bool:
    """Logical AND over ranks: all of them must use the same path."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    votes = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes)
