"""PALU as a method of the trainer: the terms of `palu.PALULoss`, and a retain term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palu.data.roles import FORGET, PRESERVE
from palu.loss import PALULoss
from palu.methods.base import Method
from palu.methods.micro_batch import (
    RETAINED,
    ROLES,
    model_inputs,
    next_tokens,
    part_for_reference,
)
from palu.methods.step_loss import StepLoss, Terms
from palu.models.forward import logits_at
from palu.reference.cached import CachedReference
from palu.storage.fingerprint import example_ids
from palu_kernels import LMHead
from palu_kernels.roles import linear_role_losses
from palu_kernels.row_loss import KL, CrossEntropy, RowLoss

TERM_ROLES = FORGET, PRESERVE, RETAINED  # of the terms 0, 1, 2


class PALUStepLoss(StepLoss):
    """The forget, preserve and retain term of a micro-batch, in one pass over the head."""

    method: PALU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._by_source: dict[str, list[RowLoss]] = {}

    def terms(self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor) -> Terms:
        """See `StepLoss`."""
        if not self.without_logits:
            return self._from_logits(model, batch, denominators)
        roles = batch[ROLES]
        losses, weights, which = self._losses(batch)
        data: list[Tensor | None] = [None] * len(losses)
        if roles.retain and not self.retain_kl:
            data[-1] = next_tokens(batch)
        ref_hidden = None
        if isinstance(self.reference, CachedReference):
            indices, ref_hidden = self._cached(batch)
            data[0] = data[0] if indices is None else indices
        elif asking := [term for n, term in enumerate(which) if losses[n].needs_reference]:
            ref_hidden = self._reference_hidden(model, batch, asking)
        work = torch.promote_types(next(model.parameters()).dtype, denominators.dtype)
        shares = torch.stack([denominators[term] for term in which]).to(work)
        weights = torch.tensor(weights, dtype=work).to(shares.device, non_blocking=True)
        with self.reference_head(ref_hidden is not None) as ref_head:

            def compute(hidden: Tensor, head: LMHead) -> Terms:
                total, sums = linear_role_losses(
                    hidden,
                    head,
                    _numbered(roles.at, which),
                    losses,
                    weights * shares.reciprocal(),
                    ref_hidden=None if ref_hidden is None else ref_hidden.to(hidden.dtype),
                    ref_head=ref_head,
                    data=data,
                    backend=self.method.backend,
                )
                means = [shares.new_zeros(())] * 3
                for term, mean in zip(which, sums / shares, strict=True):
                    means[term] = mean
                return total, torch.stack(means).float()

            return self.over_head(model, model_inputs(batch), compute)

    def _reference_hidden(
        self, model: nn.Module, batch: Mapping[str, Any], terms: list[int]
    ) -> Tensor:
        """Return the original's hidden states for some terms: `[B, T, D]`, or `[r, D]`, those of
        their rows, where they do not need all examples."""
        part = part_for_reference(batch, forget=terms[0] < 2, retain=terms[-1] == 2)
        with self.autocast():
            hidden = self.reference.of(model, lambda m: self.hidden_states(m, model_inputs(part)))
        if part is batch:
            return hidden
        order = torch.cat([part[ROLES].order(TERM_ROLES[term]) for term in terms])
        return hidden.flatten(0, 1).index_select(0, order.to(hidden.device, non_blocking=True))

    def _losses(self, batch: Mapping[str, Any]) -> tuple[list[RowLoss], list[float], list[int]]:
        """Return the losses of a micro-batch, their weights, and which term (0 to 2) each is."""
        method, roles = self.method, batch[ROLES]
        losses: list[RowLoss] = []
        weights, which = [method.forget_weight, method.preserve_weight], [0, 1]
        if roles.forget:
            losses = self._forget_losses()
        weights, which = weights[: len(losses)], which[: len(losses)]
        if roles.retain:
            losses = [*losses, KL("forward") if self.retain_kl else CrossEntropy()]
            weights, which = [*weights, self.retain_weight], [*which, 2]
        return losses, weights, which

    def _forget_losses(self) -> list[RowLoss]:
        """Return the losses of the roles FORGET and PRESERVE; they are the same in every step."""
        by_cache = isinstance(self.reference, CachedReference)
        source = self.method.select_from
        source = "indices" if by_cache and source == "reference" else source
        if source not in self._by_source:
            self._by_source[source] = self.method.palu_loss.losses(source)
        return self._by_source[source]

    def _cached(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Return S of the forget rows, and the hidden rows of the losses that need them."""
        roles, cache, method = batch[ROLES], self.reference.cache, self.method
        for_retain = roles.retain and self.retain_kl
        if not roles.forget and not for_retain:
            return None, None
        ids = example_ids(batch)
        forget, retain = ids[: roles.forget], ids[roles.forget :]
        indices, hidden = None, []
        if roles.forget and method.select_from == "reference":
            indices = cache.forget_indices(forget)
        if roles.forget and method.preserve is not None:
            hidden.append(cache.preserve_hidden(forget))
        if for_retain:
            hidden.append(cache.retain_hidden(retain))
        return indices, torch.cat(hidden) if hidden else None

    def _from_logits(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> Terms:
        roles, at = batch[ROLES], self._roles_with_logits(batch)
        own, ref = int((at[: roles.forget] != 0).sum()), None
        for_forget = self.method.needs_reference and roles.forget > 0
        for_retain = self.retain_kl and roles.retain > 0
        if for_forget or for_retain:
            part = part_for_reference(batch, forget=for_forget, retain=for_retain)
            with self.autocast():
                ref = self.reference.of(model, lambda m: self._logits(m, part))
        logits = self._logits(model, batch)
        ref = None if ref is None else ref.to(logits.dtype)
        zero = logits.new_zeros((), dtype=denominators.dtype)
        total, means = zero, [zero] * 3
        if roles.forget:
            output = self.method.palu_loss.from_rows(
                logits[:own],
                at[at != 0][:own].to(logits.device, non_blocking=True),
                ref[:own] if for_forget else None,
                num_forget=denominators[0],
                num_preserve=denominators[1],
            )
            total, means = output.loss, [output.forget, output.preserve, zero]
        if roles.retain:
            ref_retain = ref[own if for_forget else 0 :] if for_retain else None
            kept = self.retain_sum(batch, logits[own:], None, ref_retain, None)
            means[2] = kept / denominators[2]
            total = total + self.retain_weight * means[2]
        return total, torch.stack(means).detach().float()

    def _roles_with_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the roles of rows; those to preserve have none where nothing preserves them."""
        at = batch[ROLES].at
        return at if self.method.preserve is not None else at * (at != PRESERVE)

    def _logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        keep = self._roles_with_logits(batch) != 0
        keep = keep.to(batch["input_ids"].device, non_blocking=True)
        return logits_at(model, positions=keep, **model_inputs(batch))


def _numbered(roles: Tensor, which: list[int]) -> Tensor:
    """Return roles of the terms 0, 1, 2 as 1, 2, ... in the order of the losses; 0 elsewhere."""
    numbered = torch.zeros_like(roles)
    for number, term in enumerate(which, 1):
        numbered += (roles == TERM_ROLES[term]) * number
    return numbered


@dataclass(kw_only=True)
class PALU(Method):
    """Prefix-aware localized unlearning (arXiv 2601.03190); see `palu.PALULoss`.

    Args:
        top_k, prefix_length, objective, center, preserve, preserve_weight, select_from,
        eos_token_id: as of `palu.PALULoss`.
    """

    name = "palu"
    step_loss: ClassVar[type[StepLoss]] = PALUStepLoss
    by_span = True
    top_k: int = 50
    prefix_length: int = 3
    objective: str = "flatten"
    center: str | float = "global_mean"
    preserve: str | None = "reverse_kl"
    preserve_weight: float = 1.0
    select_from: str = "reference"
    eos_token_id: int | Sequence[int] | None = None
    palu_loss: PALULoss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.palu_loss = PALULoss(
            top_k=self.top_k,
            prefix_length=self.prefix_length,
            objective=self.objective,
            center=self.center,
            preserve=self.preserve,
            forget_weight=self.forget_weight,
            preserve_weight=self.preserve_weight,
            select_from=self.select_from,
            eos_token_id=self.eos_token_id,
            backend=self.backend,
        )

    @property
    def needs_reference(self) -> bool:
        """Return whether the original chooses S, or is what is preserved."""
        return self.palu_loss.needs_reference

    def roles(self, labels: Tensor) -> Tensor:
        """int8 `[B, T]`: FORGET for the first tokens of sensitive runs, PRESERVE for the others."""
        return self.palu_loss.roles(labels)
