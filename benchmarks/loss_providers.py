"""The providers of ``loss_step.py`` and the batch that they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import providers as peers
from benchmarks import runner as harness
from benchmarks.definitions import no_compiler, row_losses
from benchmarks.released import released_terms
from palu import PALULoss
from palu.data.roles import FORGET, IGNORE, KEEP, PRESERVE, token_roles
from palu_kernels import LMHead, kl_loss, linear_local_entropy_loss, local_entropy_loss
from palu_kernels.functional import topk_indices

BATCH, PREFIX = 8, 3
FLATTEN = ("flatten", "global_mean", 0.0)


class Shape(NamedTuple):
    vocab: int
    hidden: int
    positions: int  # batch * length, padding included
    forget: int
    preserve: int
    top_k: int
    batch: int = BATCH


@dataclass
class Case:
    """A batch and what a provider may be given beside it."""

    shape: Shape
    labels: Tensor  # [B, T]
    hidden: Tensor  # [B, T, D], a leaf that wants its gradient
    ref_hidden: Tensor  # [B, T, D]
    head: LMHead  # frozen, and the reference's too
    is_forget: Tensor  # bool [B, T - 1]: rows that predict a token to forget
    is_preserve: Tensor
    indices: Tensor  # int32 [forget rows, k], S by the reference
    ref_preserve: Tensor  # [preserve rows, D]

    def rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The forget rows and the preserve rows of ``hidden [B, T, D]``."""
        return hidden[:, :-1][self.is_forget], hidden[:, :-1][self.is_preserve]


# ---- providers -----------------------------------------------------------------------------------


class Losses(NamedTuple):
    """0-dim; ``total`` is what backward is called on."""

    total: Tensor
    forget: Tensor
    preserve: Tensor | None = None


def released(case: Case) -> Losses:
    logits = case.head.logits(case.hidden)
    with torch.no_grad():
        ref_logits = case.head.logits(case.ref_hidden)
    options = {"top_k": case.shape.top_k, "prefix_length": PREFIX}
    terms = released_terms(logits, ref_logits, case.labels, **options)
    return Losses(sum(terms), *terms)


def rows(case: Case) -> Losses:
    forget, preserve = map(case.head.logits, case.rows(case.hidden))
    ref_forget, ref_preserve = map(case.head.logits, case.rows(case.ref_hidden))
    forget_mean = local_entropy_loss(forget, ref_forget, top_k=case.shape.top_k)
    preserve_mean = kl_loss(preserve, ref_preserve)
    return Losses(forget_mean + preserve_mean, forget_mean, preserve_mean)


def compiled(case: Case) -> Losses:
    forget, preserve = map(case.head.logits, case.rows(case.hidden))
    ref_forget, ref_preserve = map(case.head.logits, case.rows(case.ref_hidden))
    forget_mean = _compiled(_flatten)(forget, ref_forget, case.shape.top_k)
    preserve_mean = _compiled(_reverse_kl)(preserve, ref_preserve)
    return Losses(forget_mean + preserve_mean, forget_mean, preserve_mean)


def liger(case: Case) -> Losses:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    forget, preserve = case.rows(case.hidden)
    ref_forget, ref_preserve = case.rows(case.ref_hidden)
    logits, ref_logits = case.head.logits(forget), case.head.logits(ref_forget)
    forget_mean = _flatten(logits, ref_logits, case.shape.top_k)
    weight = case.head.weight
    preserve_mean = liger_fused_linear_jsd(preserve, weight, ref_preserve, weight, jsd_beta=1.0)
    return Losses(forget_mean + preserve_mean, forget_mean, preserve_mean)


def _flatten(logits: Tensor, ref_logits: Tensor, k: int) -> Tensor:
    return row_losses("flatten", logits, k=k, ref_logits=ref_logits).mean()


def _reverse_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return row_losses("kl_reverse", logits, ref_logits=ref_logits).mean()


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def linear(case: Case) -> Losses:
    loss = PALULoss(top_k=case.shape.top_k, prefix_length=PREFIX)
    return Losses(*loss.from_hidden(case.hidden, case.head, case.labels, case.ref_hidden)[:3])


def sparse_cached(case: Case) -> Losses:
    loss = PALULoss(top_k=case.shape.top_k, prefix_length=PREFIX)
    return Losses(
        *loss.from_hidden(
            case.hidden, case.head, case.labels, case.ref_preserve, ref_indices=case.indices
        )[:3]
    )


def dense(case: Case) -> Losses:
    return _forget_alone(case, "dense", indices=case.indices)


def sparse(case: Case) -> Losses:
    return _forget_alone(case, "sparse", indices=case.indices)


def dense_live(case: Case) -> Losses:
    return _forget_alone(case, "dense", ref_hidden=case.rows(case.ref_hidden)[0])


def _forget_alone(case: Case, implementation: str, **chooser: Tensor) -> Losses:
    forget = case.rows(case.hidden)[0]
    options = {"top_k": case.shape.top_k, "implementation": implementation}
    total = linear_local_entropy_loss(forget, case.head, **chooser, **options)
    return Losses(total, total)


class Floor:
    """z = h W^T, r = h_ref W^T and dL/dh = dL/dz W for the selected rows; z stands for dL/dz."""

    def __init__(self, case: Case) -> None:
        self.weight = case.head.weight
        self.own, self.ref = (
            torch.cat(case.rows(h)).detach() for h in (case.hidden, case.ref_hidden)
        )
        self.z = self.own.new_empty((len(self.own), len(self.weight)))
        self.r, self.grad = torch.empty_like(self.z), torch.empty_like(self.own)

    def __call__(self) -> None:
        torch.mm(self.own, self.weight.t(), out=self.z)
        torch.mm(self.ref, self.weight.t(), out=self.r)
        torch.mm(self.z, self.weight, out=self.grad)


FLOOR = "floor"
BOTH_TERMS: dict[str, Callable[[Case], Losses] | None] = {
    "released": released,
    "compile": compiled,
    "liger": liger,
    "rows": rows,
    "linear": linear,
    "sparse+cached": sparse_cached,
    FLOOR: None,
}
FORGET_ONLY: dict[str, Callable[[Case], Losses]] = {
    "dense": dense,
    "sparse": sparse,
    "dense+live": dense_live,
}
PROVIDERS = BOTH_TERMS | FORGET_ONLY


def why_not(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot run on ``device`` here; None: it can."""
    if provider == "liger":
        return harness.not_installed(peers.LIGER) or peers.needs_gpu(device)
    return no_compiler(device) if provider == "compile" else None


def caller(provider: str, case: Case) -> Callable[[], Losses | None]:
    """Forward plus backward; ``case.hidden.grad`` is then the gradient."""
    losses_of = PROVIDERS[provider]
    if losses_of is None:
        return Floor(case)

    def call() -> Losses:
        case.hidden.grad = None
        losses = losses_of(case)
        losses.total.backward()
        return Losses(*(None if loss is None else loss.detach() for loss in losses))

    return call


# ---- inputs --------------------------------------------------------------------------------------


def make_labels(shape: Shape) -> Tensor:
    """int64 ``[batch, T]`` as a batch of questions has them: a prompt, an answer in which runs of
    PREFIX sensitive tokens lie evenly between others, padding. The rows are of unequal length.

    Raises:
        ValueError: the rows do not fit, or are too few to keep the runs apart.
    """
    batch, length = shape.batch, shape.positions // shape.batch
    if length * batch != shape.positions:
        raise ValueError(f"positions is {shape.positions}; it must be a multiple of {batch}")
    labels = torch.full((batch, length), IGNORE)
    counts = zip(_even(shape.forget, batch), _even(shape.preserve, batch), strict=True)
    for row, (forget, preserve) in enumerate(counts):
        runs = -(-forget // PREFIX)
        if preserve < runs + 1:
            raise ValueError(
                f"preserve is {shape.preserve}; it must be enough to keep the runs of "
                f"{shape.forget} forget rows apart, {runs + 1} in each of {batch} examples"
            )
        answer: list[int] = []
        sizes = _even(forget, runs)
        for gap, size in zip(_even(preserve, runs + 1), [*sizes, 0], strict=True):
            answer += [KEEP] * gap
            answer += [(row + len(answer) + n) % shape.vocab for n in range(size)]
        spare = length - len(answer)
        if spare < 1:
            raise ValueError(
                f"positions is {shape.positions}; an example has {length} of them, and a prompt "
                f"and {len(answer)} answer tokens must fit"
            )
        start = 1 + (spare - 1) * (row + batch) // (2 * batch)
        labels[row, start : start + len(answer)] = torch.tensor(answer)
    return labels


def _even(total: int, parts: int) -> list[int]:
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Random rows and weights: logits with a standard deviation near 2, the current model far
    enough from the reference that neither loss is small."""
    generator = torch.Generator(device).manual_seed(0)
    length = shape.positions // shape.batch

    def random(size: float, *of: int) -> Tensor:
        out = torch.empty(of, dtype=dtype, device=device)
        # piece by piece, so that no float32 copy of a whole weight is ever there
        for piece in out.flatten(0, -2).split(4096):
            piece.copy_(torch.randn(piece.shape, generator=generator, device=device) * size)
        return out

    labels = make_labels(shape).to(device)
    roles = token_roles(labels, PREFIX)[:, 1:]
    head = LMHead(random(0.02, shape.vocab, shape.hidden))
    scale = 2 / (0.02 * shape.hidden**0.5)
    ref_hidden = random(scale, shape.batch, length, shape.hidden)
    hidden = ref_hidden + random(0.5 * scale, shape.batch, length, shape.hidden)
    is_forget, is_preserve = roles == FORGET, roles == PRESERVE
    ref_forget, ref_preserve = ref_hidden[:, :-1][is_forget], ref_hidden[:, :-1][is_preserve]
    indices = [topk_indices(head.logits(piece), shape.top_k) for piece in ref_forget.split(64)]
    return Case(
        shape,
        labels,
        hidden.requires_grad_(),
        ref_hidden,
        head,
        is_forget,
        is_preserve,
        torch.cat(indices),
        ref_preserve,
    )
