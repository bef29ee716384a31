"""The roads of ``train_step.py``: from a batch to its losses and the gradients they leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks import providers as peers
from benchmarks.definitions import no_compiler, row_losses
from benchmarks.released import released_retain, released_terms
from palu import PALULoss
from palu.data.roles import FORGET, IGNORE, PRESERVE, token_roles
from palu.methods import PALU
from palu.methods.micro_batch import ROLES
from palu.reference.cache import ReferenceCache
from palu.reference.cached import CachedReference
from palu.reference.model import LiveReference
from palu.training.batching import BatchBuilder

PREFIX = 3
Batch = dict[str, Tensor]


class Losses(NamedTuple):
    """0-dim, detached; ``total`` is the sum of the other three."""

    total: Tensor
    forget: Tensor
    preserve: Tensor
    retain: Tensor


class Settings(NamedTuple):
    """``autocast`` makes the context that models run in; ``dtype`` is its dtype, None for none."""

    top_k: int
    autocast: Callable[[], AbstractContextManager]
    dtype: torch.dtype | None


class Released:
    """A second model beside the first, all logits of both, each batch in a call of its own."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.settings = settings
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.reference_bytes = _bytes(self.reference)

    def __call__(self, model: PreTrainedModel, batch: Batch, retain: Batch) -> Losses:
        with self.settings.autocast():
            logits = self._logits(model, batch)
            with torch.no_grad():
                ref_logits = self._logits(self.reference, batch)
            options = {"top_k": self.settings.top_k, "prefix_length": PREFIX}
            terms = released_terms(logits, ref_logits, batch["labels"], **options)
            kept = released_retain(
                self._logits(model, retain), retain["input_ids"], retain["labels"]
            )
        total = sum(terms) + kept
        total.backward()
        return Losses(*(loss.detach() for loss in (total, *terms, kept)))

    @staticmethod
    def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, use_cache=False).logits


class Torch(Released):
    """The best that PyTorch alone has: logits of the rows that carry a loss, the definitions under
    `torch.compile`, `linear_cross_entropy` for the retain rows; a second model beside the first,
    and forget and retain rows in turns."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        super().__init__(model, settings)
        self.loss = torch.compile(self._loss, dynamic=True)

    def __call__(self, model: PreTrainedModel, batch: Batch, retain: Batch) -> Losses:
        with self.settings.autocast():
            roles = token_roles(batch["labels"], PREFIX)[:, 1:]
            hidden = self._hidden(model, batch)
            with torch.no_grad():
                ref_hidden = self._hidden(self.reference, batch)
            terms = []
            for kind, name in ((FORGET, "flatten"), (PRESERVE, "kl_reverse")):
                logits = model.lm_head(hidden[roles == kind])
                with torch.no_grad():
                    ref_logits = self.reference.lm_head(ref_hidden[roles == kind])
                terms.append(self.loss(name, logits, ref_logits))
        sum(terms).backward()
        with self.settings.autocast():
            answers = retain["labels"][:, 1:] != IGNORE
            rows, targets = (
                self._hidden(model, retain)[answers],
                retain["input_ids"][:, 1:][answers],
            )
            weight = model.lm_head.weight
            if torch.is_autocast_enabled(rows.device.type):
                rows, weight = (t.to(self.settings.dtype) for t in (rows, weight))
            kept = F.linear_cross_entropy(rows, weight, targets)
        kept.backward()
        terms = [loss.detach().float() for loss in (*terms, kept)]
        return Losses(sum(terms), *terms)

    def _loss(self, name: str, logits: Tensor, ref_logits: Tensor) -> Tensor:
        k = self.settings.top_k
        return row_losses(name, logits, k=k, ref_logits=ref_logits).mean()

    @staticmethod
    def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
        """``[B, T - 1, D]`` of the rows that predict a token."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]


class Library:
    """What `PALUTrainer` computes in a step, called without its loop: forget and retain rows in
    turns, each with a backward of its own."""

    def __init__(
        self,
        settings: Settings,
        reference: LiveReference | CachedReference,
        reference_bytes: int,
    ) -> None:
        self.settings, self.reference_bytes = settings, reference_bytes
        method = PALU(top_k=settings.top_k, prefix_length=PREFIX)
        self.builder = BatchBuilder(None, None, "step", method)
        self.step_loss = method.step_loss(
            method,
            reference,
            retain_loss="nll",
            retain_weight=1.0,
            autocast=settings.autocast,
        )

    def __call__(self, model: PreTrainedModel, batch: Batch, retain: Batch) -> Losses:
        parts = self.builder.forget(batch), self.builder.retained(retain)
        counts = [self.step_loss.method.counts(part[ROLES]) for part in parts]
        rows = torch.tensor(counts).sum(0).clamp(min=1).float()
        total, means = 0.0, 0.0
        for part in parts:
            with self.settings.autocast():
                loss, found = self.step_loss(model, part, rows)
            loss.backward()
            total, means = total + loss.detach(), means + found
        if self.step_loss.head is None:
            raise RuntimeError("the model's head is not plain: this would measure another road")
        return Losses(total, *means)


Road = Released | Library


def palu_loss(top_k: int) -> PALULoss:
    return PALULoss(top_k=top_k, prefix_length=PREFIX)


def released(model: PreTrainedModel, settings: Settings, cache: str) -> Road:
    return Released(model, settings)


def pytorch(model: PreTrainedModel, settings: Settings, cache: str) -> Road:
    return Torch(model, settings)


def live(model: PreTrainedModel, settings: Settings, cache: str) -> Road:
    reference = LiveReference(model)
    return Library(settings, reference, _bytes(reference.model))


def cached(model: PreTrainedModel, settings: Settings, cache: str) -> Road:
    opened = ReferenceCache.open(
        cache, model=model, loss=palu_loss(settings.top_k), autocast_dtype=settings.dtype
    )
    opened.to(model.device)
    reference = CachedReference(opened)
    return Library(settings, reference, opened.info()["bytes"])


PROVIDERS = {"released": released, "torch": pytorch, "live": live, "cached": cached}


def why_not(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot run on ``device`` here; None: it can."""
    if provider != "torch":
        return None
    return no_compiler(device) or peers.old_torch(device)


def _bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
