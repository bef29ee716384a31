"""The three terms of one batch: from hidden rows where the model's head allows it, else from
logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import palu_kernels
from palu.data.roles import FORGET, IGNORE, NONE, PRESERVE
from palu.hidden_terms import HiddenTerm, sum_of_terms
from palu.loss import PALULoss
from palu.models.forward import logits_at, model_hidden_states, shift_to_logits
from palu.models.inputs import COLUMNS, joined, more_inputs
from palu.models.lm_head import fusable_head
from palu.models.router_loss import RouterLoss, wanted
from palu.reference.cached import CachedReference, Reference
from palu.reference.model import Inputs, ReferenceRows
from palu.reference.rows import refuse_unknown_inputs
from palu_kernels import cross_entropy_loss, kl_loss
from palu_kernels.row_loss import KL, CrossEntropy

RETAIN = "palu_retain"  # the key of the retain batch beside a forget batch


class Objective:
    """`forget_weight * forget + preserve_weight * preserve + retain_weight * retain` of a batch.

    Forget and retain rows of a batch go through the model in one call: a second one before backward
    would run DDP's and FSDP's hooks twice. (`in_turns` makes two batches of one, each for a forward
    and backward of its own.) Whether losses are computed from hidden rows is found out with the
    first batch (`palu.models.lm_head.fusable_head`).

    Args:
        loss: the forget and preserve terms.
        reference: the frozen original, or None where no term needs it.
        retain_loss: `nll`, or `kl` to the reference.
        retain_weight: of the retain term.
        autocast: the context that the model runs in.
    """

    def __init__(
        self,
        loss: PALULoss,
        reference: Reference | None,
        *,
        retain_loss: str,
        retain_weight: float,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.loss = loss
        self.reference = reference
        self.retain_kl = retain_loss == "kl"
        self.retain_weight = retain_weight
        self.autocast = autocast
        self.head: palu_kernels.LMHead | None = None
        self._asked = False
        self.router = RouterLoss()

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Float32 `[3]`: rows of each term in a batch."""
        roles = self.loss.roles(batch["labels"])
        retain = batch.get(RETAIN)
        kept = (retain["labels"][:, 1:] != IGNORE).sum() if retain is not None else 0
        counts = [(roles == FORGET).sum(), (roles == PRESERVE).sum()]
        counts.append(torch.as_tensor(kept).to(roles.device))
        return torch.stack(counts).float()

    def state(self) -> dict[str, float]:
        """What training changes and checkpoints keep: nothing, unless a subclass says so."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Puts back what `state` gave; an empty one stands for the beginning."""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> (the weighted total, each term's sum divided by its denominator, detached float32
        `[3]`).

        Args:
            model: as the trainer holds it.
            batch: `input_ids`, `labels`, `attention_mask`, and a retain batch under `RETAIN`.
            denominators: `[3]`, at least 1 each.
        """
        inputs = self._inputs(batch)
        if not self._asked:
            self._choose_road(model, inputs, batch)
        terms = self._from_hidden if self.head is not None else self._from_logits
        with self.router.watching(model) as outputs:
            total, means = terms(model, batch, inputs, denominators)
        retain = batch.get(RETAIN)
        if retain is None or self.retain_kl or not wanted(model):
            return total, means
        own = len(inputs.input_ids) - len(retain["input_ids"])
        extra = self.router.of(model, outputs, inputs.attention_mask, own)
        extra = extra * (self.count(batch)[2] / denominators[2])
        total = total + self.retain_weight * extra
        return total, means + nn.functional.pad(extra.detach()[None], (2, 0))

    def _inputs(self, batch: Mapping[str, Any], with_retain: bool = True) -> Inputs:
        roles = self.loss.roles(batch["labels"])
        # Without a preserve term its rows need no logits.
        predicted = roles == FORGET if self.loss.preserve is None else roles != NONE
        is_forget = roles[:, 1:][predicted[:, 1:]] == FORGET
        retain = batch.get(RETAIN) if with_retain else None
        keep = shift_to_logits(predicted)
        if retain is not None:
            kept = shift_to_logits(retain["labels"] != IGNORE)
            if len(keep):
                batch, keep = joined(batch, retain), _padded_rows(keep, kept)
            else:
                batch, keep = retain, kept
        mask = batch.get("attention_mask")
        return Inputs(batch["input_ids"], mask, keep, is_forget, more_inputs(batch))

    def _choose_road(self, model: nn.Module, inputs: Inputs, batch: Mapping[str, Any]) -> None:
        self._asked = True
        self.head = fusable_head(model, *inputs[:2], **inputs.more)
        if self.head is not None and self.reference is not None:
            with self.autocast():
                if not self.reference.has_fusable_head(inputs):
                    self.head = None
        if isinstance(self.reference, CachedReference):
            refuse_unknown_inputs(batch)
        if not _all_agree(self.head is not None, inputs.input_ids.device):
            self.head = None
        if self.head is None and isinstance(self.reference, CachedReference):
            raise ValueError(
                "reference='cached' needs losses from hidden rows, which this model does not allow "
                "(the warning above says why); use reference='live'"
            )

    # ---- from hidden rows ------------------------------------------------------------------------

    def _from_hidden(
        self, model: nn.Module, batch: Mapping[str, Any], inputs: Inputs, denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = model_hidden_states(model, *inputs[:2], **inputs.more)[inputs.keep]
        own = len(inputs.is_forget)
        forget, preserve = hidden[:own][inputs.is_forget], hidden[:own][~inputs.is_forget]
        ref_forget = indices = ref_preserve = ref_retain = ref_head = None
        if self.reference is not None:
            ref_inputs = inputs if self.retain_kl else self._inputs(batch, with_retain=False)
            none = hidden[:0].detach()
            rows = ReferenceRows(none, None, none, None)
            if len(ref_inputs.input_ids):
                with self.autocast():
                    rows = self.reference.rows(model, ref_inputs, batch)
            ref_forget, ref_preserve, ref_retain = (
                None if t is None else t.to(hidden.dtype)
                for t in (rows.forget, rows.preserve, rows.retain)
            )
            indices, ref_head = rows.indices, self.reference.head
        with self.autocast():
            terms = self.loss.hidden_terms(
                forget,
                preserve,
                self.head,
                ref_forget,
                ref_preserve,
                indices,
                denominators[0],
                denominators[1],
            )
            places = [0, 1][: len(terms)]
            retain = batch.get(RETAIN)
            if retain is not None:
                places.append(2)
                weights = self.retain_weight, denominators[2]
                targets = None if self.retain_kl else answer_tokens(retain)
                loss = KL("forward") if self.retain_kl else CrossEntropy()
                terms.append(HiddenTerm(loss, hidden[own:], ref_retain, targets, *weights))
            total, sums = sum_of_terms(self.head, ref_head, terms, self.loss.backend)
        means = [denominators.new_zeros(())] * 3
        for place, found in zip(places, sums, strict=True):
            means[place] = found / denominators[place]
        return total, torch.stack(means).float()

    # ---- from logits -----------------------------------------------------------------------------

    def _from_logits(
        self, model: nn.Module, batch: Mapping[str, Any], inputs: Inputs, denominators: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = logits_at(model, *inputs[:3], **inputs.more)
        ref = ref_retain = None
        own = len(inputs.is_forget)
        if self.reference is not None:
            ref_inputs = inputs if self.retain_kl else self._inputs(batch, with_retain=False)
            ref = logits[:0].detach()
            if len(ref_inputs.input_ids):
                with self.autocast():
                    ref = self.reference.logits(model, ref_inputs).to(logits.dtype)
            ref, ref_retain = ref[:own], ref[own:]
        roles = torch.where(inputs.is_forget, FORGET, PRESERVE)
        output = self.loss.from_rows(
            logits[:own],
            roles,
            ref if self.loss.needs_reference else None,
            num_forget=denominators[0],
            num_preserve=denominators[1],
        )
        retain_mean = logits.new_zeros((), dtype=torch.float32)
        retain = batch.get(RETAIN)
        if retain is not None:
            retain_mean = self._retain_sum(logits[own:], retain, ref_retain) / denominators[2]
        total = output.loss + self.retain_weight * retain_mean
        means = torch.stack([output.forget, output.preserve, retain_mean.detach()]).float()
        return total, means.detach()

    def _retain_sum(
        self, logits: Tensor, retain: Mapping[str, Tensor], ref_logits: Tensor | None
    ) -> Tensor:
        options = {"reduction": "sum", "backend": self.loss.backend}
        if self.retain_kl:
            return kl_loss(logits, ref_logits, direction="forward", **options)
        return cross_entropy_loss(logits, answer_tokens(retain), **options)


def in_turns(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch as two, the forget rows and the retain rows, whose losses add up to that of the
    batch: the second has a forget batch without rows."""
    own = {name: value for name, value in batch.items() if name != RETAIN}
    inputs = {name: own[name] for name in COLUMNS if name in own} | more_inputs(own)
    none = {name: value[:0] for name, value in inputs.items()}
    return [own, {**own, **none, RETAIN: batch[RETAIN]}]


def _all_agree(value: bool, device: torch.device) -> bool:
    """Whether every process says so: they have to take one road."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    votes = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes)


def answer_tokens(retain: Mapping[str, Tensor]) -> Tensor:
    """The tokens themselves: -200 marks an answer token and is no token."""
    return retain["input_ids"][:, 1:][retain["labels"][:, 1:] != IGNORE]


def _padded_rows(first: Tensor, second: Tensor) -> Tensor:
    """Bool `[B1, T1]` and `[B2, T2]`, one after the other, false where one is shorter."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([nn.functional.pad(x, (0, length - x.shape[1])) for x in (first, second)])
