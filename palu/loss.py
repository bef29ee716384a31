"""PALULoss: the two loss terms on a forget batch, a drop-in for a training loop that has logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from palu.data.roles import FORGET, NONE, PRESERVE, check_labels, check_roles, token_roles
from palu_kernels import LMHead
from palu_kernels import validation as arguments
from palu_kernels.backend import BACKENDS, Backend, check_values
from palu_kernels.roles import (
    linear_role_losses,
    prepare,
    role_losses,
    takes_dtensors,
    together,
)
from palu_kernels.row_loss import KL, LocalEntropy, ReferenceArgmaxNLL, RowLoss
from palu_kernels.validation import Center, Objective

PRESERVES = ("reverse_kl", "forward_kl", "nll", None)
SELECTIONS = ("reference", "current")


class PALUOutput(NamedTuple):
    """What a step gives, 0-dim tensors: the weighted sum to call `backward` on; the two means
    by themselves (detached, unweighted); and how many rows each was taken over."""

    loss: Tensor
    forget: Tensor
    preserve: Tensor
    num_forget: Tensor
    num_preserve: Tensor


class PALULoss(nn.Module):
    """Prefix-aware localized unlearning (arXiv 2601.03190).

    `loss = forget_weight * mean(forget rows) + preserve_weight * mean(preserve rows)`, each mean
    0 when it has no rows.

    Args:
        top_k: k, how many of the largest logits of a forget row are levelled; more than V means V.
        prefix_length: how many tokens of each sensitive run are forgotten; 0 or less takes all.
        objective: `flatten`, mean over S of `(z_i - c)^2` (the released code), or `entropy`,
            `log k - H(softmax(z_S))`, which reads no `center`.
        center: c of flatten: `global_mean` (the released code), `local_mean` or a number.
        preserve: `reverse_kl` KL(p_current || p_reference) (the released code), `forward_kl`
            (the paper's text), `nll` of the reference's most likely token, or None.
        forget_weight, preserve_weight: finite numbers of at least 0 (gamma and alpha in the
            released code).
        select_from: whose k largest logits are S, `reference` or `current`.
        eos_token_id: id or ids that end a run and are never sensitive.
        backend: `auto`, `triton` or `torch`, for every operator.
    """

    if TYPE_CHECKING:  # what a Module gives when it is called is any type
        __call__: Callable[..., PALUOutput]

    def __init__(
        self,
        top_k: int = 50,
        prefix_length: int = 3,
        objective: Objective = "flatten",
        center: Center | float = "global_mean",
        preserve: Literal["reverse_kl", "forward_kl", "nll"] | None = "reverse_kl",
        forget_weight: float = 1.0,
        preserve_weight: float = 1.0,
        select_from: Literal["reference", "current"] = "reference",
        eos_token_id: int | Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        arguments.positive_int("top_k", top_k)
        if isinstance(prefix_length, bool) or not isinstance(prefix_length, int):
            raise TypeError(
                f"prefix_length is {prefix_length!r} ({type(prefix_length).__name__}); "
                "it must be an int (0 or less takes whole runs)"
            )
        arguments.choice("objective", objective, arguments.OBJECTIVES)
        arguments.center(center)
        arguments.choice("preserve", preserve, PRESERVES)
        arguments.choice("select_from", select_from, SELECTIONS)
        arguments.choice("backend", backend, BACKENDS)
        arguments.number("forget_weight", forget_weight, above_zero=False)
        arguments.number("preserve_weight", preserve_weight, above_zero=False)
        self.top_k = top_k
        self.prefix_length = prefix_length
        self.objective = objective
        self.center = center
        self.preserve = preserve
        self.forget_weight = forget_weight
        self.preserve_weight = preserve_weight
        self.select_from = select_from
        self.eos_token_id = eos_token_id
        self.backend = backend
        self.roles(torch.empty(0, 0, dtype=torch.long))  # a wrong eos_token_id is seen here

    @property
    def needs_reference(self) -> bool:
        """Return whether `ref_logits` are needed: to choose S, or to preserve."""
        return self.select_from == "reference" or self.preserve is not None

    def extra_repr(self) -> str:
        names = ("top_k", "prefix_length", "objective", "center", "preserve", "select_from")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def roles(self, labels: Tensor) -> Tensor:
        """int8 `[B, T]`: what each label is for (0 nothing, 1 forget, 2 preserve)."""
        return token_roles(labels, self.prefix_length, self.eos_token_id)

    @takes_dtensors
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logits: Tensor | None = None,
        *,
        num_forget: float | Tensor | None = None,
        num_preserve: float | Tensor | None = None,
    ) -> PALUOutput:
        """The loss of a batch; the logits at position t-1 predict the label at t (shifted inside).

        Args:
            logits: `[B, T, V]` of the current model, float32, bfloat16, float16 or float64.
            labels: int64 or int32 `[B, T]`: -100 no loss, -200 preserve, a token id sensitive.
            ref_logits: `[B, T, V]` of the frozen reference, of any of these dtypes, no gradient.
            num_forget, num_preserve: denominators of the two means instead of this batch's row
                counts, so that a step split into micro-batches or processes has one objective.
                (What divides the loss or its gradient again by micro-batches or processes,
                as accelerate, Lightning and DDP do, has to be multiplied back.)

        Raises:
            TypeError, ValueError: an argument is not as above, or the reference is missing.
        """
        arguments.scores("logits", logits)
        arguments.no_transforms("PALULoss", logits=logits, labels=labels, ref_logits=ref_logits)
        if logits.dim() != 3:
            raise ValueError(f"logits has shape {list(logits.shape)}; it must be [B, T, V]")
        arguments.integers("labels", labels, list(logits.shape[:2]), logits)
        self._check_reference(logits, ref_logits)
        if check_values(labels.device):
            check_labels(labels, logits.shape[-1])
        return self._terms(logits, self._row_roles(labels), ref_logits, num_forget, num_preserve)

    @takes_dtensors
    def from_rows(
        self,
        logits: Tensor,
        row_roles: Tensor,
        ref_logits: Tensor | None = None,
        *,
        num_forget: float | Tensor | None = None,
        num_preserve: float | Tensor | None = None,
    ) -> PALUOutput:
        """The same loss for rows picked beforehand, where a model computes no others.

        Args:
            logits: `[R, V]`; row i predicts a label whose role is `row_roles[i]`.
            row_roles: int8 `[R]`, as `roles` gives them.
            ref_logits: `[R, V]` of the frozen reference, no gradient.
            num_forget, num_preserve: as in `forward`.

        Raises:
            TypeError, ValueError: an argument is not as above, or the reference is missing.
        """
        arguments.scores("logits", logits)
        arguments.dense("row_roles", row_roles)
        arguments.no_transforms(
            "PALULoss", logits=logits, row_roles=row_roles, ref_logits=ref_logits
        )
        if logits.dim() != 2 or list(row_roles.shape) != [logits.shape[0]]:
            raise ValueError(
                f"logits has shape {list(logits.shape)} and row_roles {list(row_roles.shape)}; "
                "they must be [R, V] and [R]"
            )
        if row_roles.is_floating_point() or row_roles.dtype == torch.bool:
            raise TypeError(
                f"row_roles has dtype {row_roles.dtype}; it must be int8, as of roles()"
            )
        if check_values(row_roles.device):
            check_roles(row_roles)
        self._check_reference(logits, ref_logits)
        return self._terms(logits, row_roles, ref_logits, num_forget, num_preserve)

    @together
    def from_hidden(
        self,
        hidden: Tensor,
        head: LMHead,
        labels: Tensor,
        ref_hidden: Tensor | None = None,
        ref_head: LMHead | None = None,
        *,
        ref_indices: Tensor | None = None,
        num_forget: float | Tensor | None = None,
        num_preserve: float | Tensor | None = None,
    ) -> PALUOutput:
        """The same loss from what enters the output head, without logits of whole rows.

        Args:
            hidden: `[B, T, D]` of the current model (`palu.model_hidden_states`).
            head: its output head (`palu.LMHead.from_model`); gradients reach it if it trains.
            labels: int64 or int32 `[B, T]`, as in `forward`.
            ref_hidden: the frozen reference's, `[B, T, D]`; or, with `ref_indices` or where S
                is the current model's choice, those of the preserve rows alone, `[rows, D]`, row
                after row.
            ref_head: the reference's head; None takes `head`, which must not train then.
            ref_indices: S of the forget rows, `[rows, k]`, row after row: what the reference's
                `topk_indices` are, computed before. No logit outside S is then computed where the
                loss needs none.
            num_forget, num_preserve: as in `forward`.

        Raises:
            TypeError, ValueError: an argument is not as above, or the reference is missing.
        """
        if ref_indices is not None:
            arguments.dense("ref_indices", ref_indices)
        integers = {"labels": labels, "ref_indices": ref_indices}
        prepare("PALULoss", hidden, head, ref_hidden, ref_head, **integers)
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden has shape {list(hidden.shape)}; it must be [B, T, {head.hidden_size}]"
            )
        arguments.integers("labels", labels, list(hidden.shape[:2]), hidden, "hidden")
        if check_values(labels.device):
            check_labels(labels, head.vocab_size)
        if (
            ref_hidden is not None
            and ref_hidden.dim() == 3
            and (ref_hidden.shape[:2] != hidden.shape[:2])
        ):
            raise ValueError(
                f"ref_hidden has shape {list(ref_hidden.shape)}; it must have the rows of "
                f"hidden, {list(hidden.shape)}"
            )
        losses = self.losses(self._score_source(ref_hidden, ref_indices))
        roles = self._row_roles(labels)
        counts, denominators = self._counts(roles, hidden, num_forget, num_preserve)
        loss, sums = linear_role_losses(
            hidden,
            head,
            roles,
            losses,
            self._weights(denominators) * denominators[: len(losses)].reciprocal(),
            ref_hidden=ref_hidden,
            ref_head=ref_head,
            data=[ref_indices, None][: len(losses)],
            backend=self.backend,
        )
        return self._output(loss, sums, denominators, counts)

    def _row_roles(self, labels: Tensor) -> Tensor:
        """What each row is for: position t - 1 predicts the label at t. (The roles are shifted and
        not the rows, so that no gradient of a slice is made beside that of the batch.)"""
        return torch.nn.functional.pad(self.roles(labels)[:, 1:], (0, 1), value=NONE)

    def _counts(
        self,
        roles: Tensor,
        like: Tensor,
        num_forget: float | Tensor | None,
        num_preserve: float | Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return rows of each kind; what their sums are divided by, `[2]`."""
        counts = (roles == FORGET).sum(), (roles == PRESERVE).sum()
        work = torch.float64 if like.dtype == torch.float64 else torch.float32
        found = (
            _denominator("num_forget", num_forget, counts[0]),
            _denominator("num_preserve", num_preserve, counts[1]),
        )
        made = [
            n.to(like.device, work, non_blocking=True)
            if isinstance(n, Tensor)
            else torch.ones((), dtype=work, device=like.device) * n  # compiled for any n
            for n in found
        ]
        return counts, torch.stack(made)

    def _terms(
        self,
        logits: Tensor,
        roles: Tensor,
        ref_logits: Tensor | None,
        num_forget: float | Tensor | None,
        num_preserve: float | Tensor | None,
    ) -> PALUOutput:
        """Rows `[..., V]` and their roles `[...]`."""
        counts, denominators = self._counts(roles, logits, num_forget, num_preserve)
        losses = self.losses(self.select_from)
        options = {"backend": self.backend}
        shares = self._weights(denominators) / denominators[: len(losses)]
        loss, sums = role_losses(logits, ref_logits, roles, losses, shares, **options)
        return self._output(loss, sums, denominators, counts)

    def _output(
        self, loss: Tensor, sums: Tensor, denominators: Tensor, counts: tuple[Tensor, Tensor]
    ) -> PALUOutput:
        means = [total / n for total, n in zip(sums, denominators, strict=False)]
        means += [loss.new_zeros(())] * (2 - len(means))
        return PALUOutput(loss, *means, *counts)

    def _weights(self, denominators: Tensor) -> Tensor:
        """Weights of the losses' means in the total."""
        weights = [self.forget_weight, self.preserve_weight]
        terms = 1 if self.preserve is None else 2
        # made on the device: a tensor made of a list is copied there, which waits
        return torch.stack([denominators.new_ones(()) * weight for weight in weights[:terms]])

    def _score_source(self, ref_hidden: Tensor | None, ref_indices: Tensor | None) -> str:
        """Whose scores choose S, of what `from_hidden` is given."""
        if ref_indices is not None:
            if self.select_from != "reference":
                raise ValueError(
                    "ref_indices is given and select_from is 'current'; it must be None, or "
                    "select_from 'reference'"
                )
            source = "indices"
        elif self.select_from == "reference" and (ref_hidden is None or ref_hidden.dim() != 3):
            raise ValueError(
                "neither ref_hidden [B, T, D] nor ref_indices is given; with "
                "select_from='reference' one of them must say which entries are levelled"
            )
        else:
            source = self.select_from
        if self.preserve is not None and ref_hidden is None:
            raise ValueError(
                f"ref_hidden is None; with preserve={self.preserve!r} it must be the frozen "
                "reference's hidden rows"
            )
        return source

    def center_parts(self) -> tuple[str, float]:
        """Kind (`number` or the name of a mean) and number of the center."""
        return arguments.center(self.center)

    def losses(self, score_source: str) -> list[RowLoss]:
        """Return the losses of the roles FORGET and, unless `preserve` is None, PRESERVE."""
        losses: list[RowLoss] = [
            LocalEntropy(self.top_k, self.objective, *self.center_parts(), score_source)
        ]
        if self.preserve == "nll":
            losses.append(ReferenceArgmaxNLL())
        elif self.preserve is not None:
            losses.append(KL(self.preserve.removesuffix("_kl")))
        return losses

    def _check_reference(self, logits: Tensor, ref_logits: Tensor | None) -> None:
        if ref_logits is not None:
            arguments.reference("ref_logits", ref_logits, logits)
        elif self.needs_reference:
            raise ValueError(
                "ref_logits is None; with "
                f"select_from={self.select_from!r} and preserve={self.preserve!r} it must be the "
                "frozen reference model's logits (select_from='current' with preserve=None needs "
                "none)"
            )


def _denominator(name: str, given: float | Tensor | None, rows: Tensor) -> Tensor | float:
    """What the sum over rows is divided by: 1 instead of 0, so that no rows give 0 and not NaN."""
    if given is None:
        return rows.clamp(min=1)
    if isinstance(given, Tensor):
        arguments.dense(name, given)
        arguments.no_transforms("PALULoss", **{name: given})
        if given.numel() != 1:
            raise ValueError(f"{name} has shape {list(given.shape)}; it must be one number")
        given = given.reshape(())
        # Its value is not looked at, which would wait for the device: what is no count makes NaN.
        return torch.where(given > 0, given, torch.where(given == 0, 1, math.nan))
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name} is {given!r} ({type(given).__name__}); it must be a number")
    if not 0 <= given < math.inf:  # (math.isfinite would break a graph whose numbers are symbols)
        raise ValueError(f"{name} is {given}; it must be a finite number of at least 0")
    return given or 1
