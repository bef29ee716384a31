"""The terms of one micro-batch, and their weighted sum."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
from palu.models.head_check import why_not_fusable
from palu.models.in_head import LossInHead, Result
from palu.models.router_loss import RouterLoss, wanted
from palu.reference.cached import CachedReference, Reference
from palu.reference.rows import refuse_unknown_inputs
from palu_kernels import (
    LMHead,
    cross_entropy_loss,
    kl_loss,
    linear_cross_entropy_loss,
    linear_kl_loss,
)

if TYPE_CHECKING:
    from palu.methods.base import Method

logger = logging.getLogger(__name__)

Terms = tuple[Tensor, Tensor]  # the total, and the means of the three terms


class StepLoss:
    """`forget_weight * forget + preserve_weight * preserve + retain_weight * retain` of a
    micro-batch (`palu.methods.micro_batch`): of examples to forget, of retained ones, or of both
    (`together`, where a second forward before backward would run a wrapper's hooks twice).

    A subclass computes the `terms`; the router loss of a mixture is added here. Whether losses are
    computed from the hidden rows that enter the head, in its forward (`palu.loss_in_head`), or from
    logits, is found out with the first batch (`palu.models.head_check.why_not_fusable`).

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
        self.without_logits = False
        self._path_chosen = False
        self._hidden: dict[nn.Module, HiddenStates] = {}
        self._in_head: dict[nn.Module, LossInHead] = {}
        self.router = RouterLoss()
        self._add_router_loss: bool | None = None  # asked at the first call

    def choose_path_again(self) -> None:
        """Find out with the next batch how losses are computed: the model is another one, or is
        going to be wrapped."""
        self.without_logits, self._path_chosen, self._add_router_loss = False, False, None
        self._hidden.clear()
        self._in_head.clear()

    def state(self) -> dict[str, float]:
        """Return what training changes and checkpoints keep: nothing, unless a subclass does."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Put back what `state` gave; an empty one stands for the beginning. A step that was begun
        and a window of the log are given up."""
        self.router = RouterLoss()

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor) -> Terms:
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

    def terms(self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor) -> Terms:
        """Return what a call does, without a router loss."""
        raise NotImplementedError

    def retain_sum(
        self,
        batch: Mapping[str, Any],
        rows: Tensor,
        head: LMHead | None,
        ref_rows: Tensor | None,
        ref_head: LMHead | None,
    ) -> Tensor:
        """Return the sum of the retain loss.

        Args:
            rows: of the retained tokens: `[n, D]`, or logits `[n, V]` where there is no head.
            ref_rows, ref_head: the original's, for `kl`.
        """
        options: dict[str, Any] = {"reduction": "sum", "backend": self.method.backend}
        if self.retain_kl:
            options["direction"] = "forward"
            if head is None:
                return kl_loss(rows, ref_rows, **options)
            return linear_kl_loss(rows, head, ref_rows, ref_head, **options)
        order = batch[ROLES].order(RETAINED).to(rows.device, non_blocking=True)
        targets = next_tokens(batch).flatten()[order]
        if head is None:
            return cross_entropy_loss(rows, targets, **options)
        return linear_cross_entropy_loss(rows, head, targets, **options)

    def over_head(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        compute: Callable[[Tensor, LMHead], Result],
    ) -> Result:
        """Call the model and return what `compute` gives of the rows `[B, T, D]` that enter its
        head, and of the head; see `palu.loss_in_head`."""
        call = self._in_head.get(model)
        if call is None:
            call = self._in_head[model] = LossInHead(model)

        def inside(hidden: Tensor, head: LMHead) -> Result:
            with self.autocast():
                return compute(hidden, head)

        return call(inside, **inputs)

    def hidden_states(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return `[B, T, D]`; see `palu.models.forward.model_hidden_states`."""
        call = self._hidden.get(model)
        if call is None:
            call = self._hidden[model] = HiddenStates(model)
        return call(**inputs)

    def reference_head(self, asked: bool) -> AbstractContextManager[LMHead | None]:
        """Yield the head of the original's rows, if it was asked for some; None: the model's."""
        return self.reference.whole_head() if asked else nullcontext()

    def _choose_path(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self._path_chosen = True
        inputs, cached = model_inputs(batch), isinstance(self.reference, CachedReference)
        if cached:
            refuse_unknown_inputs(batch)
        reason = why_not_fusable(model, **inputs)
        if reason is None and self.reference is not None:
            with self.autocast():
                reason = self.reference.why_not_fusable(inputs)
        self.without_logits = reason is None
        if reason is not None:
            logger.warning("losses are computed from logits, not from hidden rows: %s", reason)
        if reason is not None and cached:
            raise ValueError(
                "reference='cached' needs losses from hidden rows, which this model does not allow "
                f"({reason}); use reference='live'"
            )


class AnswerStepLoss(StepLoss):
    """The terms of a method that is a loss on whole answers; the preserve term is 0."""

    def terms(self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor) -> Terms:
        """See `StepLoss`."""
        roles, ref_rows = batch[ROLES], None
        for_forget = self.method.needs_reference and roles.forget > 0
        for_retain = self.retain_kl and roles.retain > 0
        if for_forget or for_retain:
            part = part_for_reference(batch, forget=for_forget, retain=for_retain)
            with self.autocast():
                ref_rows = self.reference.of(model, lambda m: self._rows(m, part))
        asked = ref_rows is not None and self.without_logits
        with self.reference_head(asked) as ref_head:

            def compute(rows: Tensor, head: LMHead | None) -> Terms:
                rows = rows if head is None else _picked(rows, batch)
                own, refs = roles.count(FORGET), [None, None]
                if ref_rows is not None:
                    split = own if for_forget else 0
                    refs = [part.to(rows.dtype) for part in (ref_rows[:split], ref_rows[split:])]
                forget = kept = rows.new_zeros((), dtype=denominators.dtype)
                # Without any rows too: DDP waits for a gradient of the head.
                if roles.forget or not roles.retain:
                    ref = refs[0] if for_forget else None
                    answers = self._answers(batch, rows[:own], head, ref, ref_head)
                    forget = self.method.loss(answers).sum()
                if roles.retain:
                    kept = self.retain_sum(batch, rows[own:], head, refs[1], ref_head)
                means = forget / denominators[0], kept / denominators[2]
                total = self.method.forget_weight * means[0] + self.retain_weight * means[1]
                return total, torch.stack([means[0], means[0] * 0, means[1]]).detach().float()

            if self.without_logits:
                return self.over_head(model, model_inputs(batch), compute)
            logits = self._rows(model, batch)
            with self.autocast():
                return compute(logits, None)

    def _rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return what enters the head, `[n, D]`, or logits `[n, V]`, of the rows with a role:
        those of answers to forget, then of retained ones."""
        roles, inputs = batch[ROLES], model_inputs(batch)
        if self.without_logits:
            return _picked(self.hidden_states(model, inputs), batch)
        keep = (roles.at != 0).to(inputs["input_ids"].device, non_blocking=True)
        return logits_at(model, positions=keep, **inputs)

    def _answers(
        self,
        batch: Mapping[str, Any],
        rows: Tensor,
        head: LMHead | None,
        ref_rows: Tensor | None,
        ref_head: LMHead | None,
    ) -> Answers:
        roles, device = batch[ROLES], rows.device
        return Answers(
            rows,
            head,
            next_tokens(batch).flatten()[roles.order(FORGET).to(device, non_blocking=True)],
            roles.lengths(FORGET).to(device, non_blocking=True),
            ref_rows,
            None if ref_rows is None else ref_head,
            self.method.backend,
        )


def _picked(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return the rows of answers to forget, then those of retained ones, `[n, D]`."""
    order = torch.cat([batch[ROLES].order(role) for role in (FORGET, RETAINED)])
    return hidden.flatten(0, 1).index_select(0, order.to(hidden.device, non_blocking=True))
