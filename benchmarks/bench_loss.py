"""What does the loss of one batch cost, forward plus backward, from hidden rows to their gradient?

    python -m benchmarks.bench_loss
    python -m benchmarks.bench_loss --heads frozen trained --in-turns --repeats 1 --calls 7
    python -m benchmarks.bench_loss --forget-only --csv benchmarks/results/loss_step_forget.csv
    python -m benchmarks.bench_loss --scale 8 --calls 0 --repeats 1 \\
        --providers linear sparse+cached --csv benchmarks/results/loss_step_x8.csv
    python -m benchmarks.bench_loss --repo OTHER_CHECKOUT --csv other.csv

A batch `[8, T]` of random hidden rows, of which some carry a forget loss (flatten to the global
mean) and some a preserve loss (reverse KL), meets a head that is frozen, or with `--heads trained`
one whose weight gets its gradient too (the reference's stays frozen). The providers, by what they
are given:

* `released`: both models' logits of all positions and everything after them over all positions
  (`providers.py`), differentiated by autograd.
* `compile`: both models' logits of the rows that carry a loss, then the formulas as one writes them
  for speed (`providers.plain_loss`) under `torch.compile`: PyTorch alone.
* `liger`: the preserve loss by liger-kernel's fused linear JSD with beta 1; it has no forget loss,
  which is that of `compile` without `torch.compile`. It needs a GPU. (cut-cross-entropy has neither
  loss, flash-linear-attention not this direction of the KL.)
* `rows`: both models' logits of those rows, then the operators on logits.
* `linear`: `PALULoss.from_hidden` with the reference's hidden states; the rows are picked inside
  the call.
* `sparse+cached`: `PALULoss.from_hidden` with the forget rows' top-k indices and the preserve rows'
  reference hidden states computed before, as from a `ReferenceCache`.
* `floor`: no loss. The matrix products that the selected rows cannot avoid, into memory that is
  already there: both models' logits, the gradient to the hidden rows, and that of a weight that
  trains. (`sparse+cached` avoids those of the forget rows, so it may be below.)

With `--forget-only` the preserve rows are left out: `dense` and `sparse` are given the top-k
indices, `dense+live` the reference's hidden rows.

The truth is float64, with S as the inputs' own dtype gives it. In bfloat16 dozens of entries equal
the k-th; `torch.topk` takes other ones of them into S, and the gradient of a forget row lies on S,
so a gradient by it may be further off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import declare, providers, runner, tables
from benchmarks.declare import Call, Case, Outputs, Provider
from benchmarks.providers import (
    FORGET_ROLE,
    IGNORE,
    KEEP,
    NONE,
    PREFIX,
    PRESERVE_ROLE,
    released_terms,
    row_losses,
)
from benchmarks.tables import Row
from palu import PALULoss, token_roles
from palu_kernels import (
    LMHead,
    kl_loss,
    linear_local_entropy_loss,
    local_entropy_loss,
    topk_indices,
)

BATCH = 8
LOSS, TRAINED_LOSS, FORGET_LOSS = "loss_step", "loss_step_trained", "loss_step_forget"
HEADS = {"frozen": LOSS, "trained": TRAINED_LOSS}
# Relative, of a loss and of the gradient in norm: in bfloat16 some providers round the logits of
# forget rows and some do not. The last is for gradients with S by `torch.topk`.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6, "float16": 2**-9}
GRADIENT_TOLERANCE = TOLERANCE | {"bfloat16": 2**-5}
TIES_TOLERANCE = TOLERANCE | {"bfloat16": 2**-3, "float16": 2**-6}


@dataclass
class Batch:
    """What a provider may be given."""

    k: int
    labels: Tensor  # [B, T]
    hidden: Tensor  # [B, T, D], a leaf that wants its gradient
    ref_hidden: Tensor  # [B, T, D]
    head: LMHead
    ref_head: LMHead  # the same weight, frozen
    roles: Tensor  # [B, T - 1]: of the tokens that rows predict
    indices: Tensor  # int32 [forget rows, k], S by the reference
    ref_preserve: Tensor  # [preserve rows, D]

    def rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The forget rows and the preserve rows of `hidden` `[B, T, D]`."""
        return tuple(hidden[:, :-1][self.roles == role] for role in (FORGET_ROLE, PRESERVE_ROLE))


class Losses(NamedTuple):
    """0-dim; their sum is what backward is called on, unless `total` is given."""

    forget: Tensor
    preserve: Tensor | None = None
    total: Tensor | None = None


# ---- providers -----------------------------------------------------------------------------------


def released(batch: Batch) -> Losses:
    logits = batch.head.logits(batch.hidden)
    with torch.no_grad():
        ref_logits = batch.ref_head.logits(batch.ref_hidden)
    return Losses(*released_terms(logits, ref_logits, batch.labels, top_k=batch.k))


def rows(batch: Batch) -> Losses:
    forget, preserve = map(batch.head.logits, batch.rows(batch.hidden))
    ref_forget, ref_preserve = map(batch.ref_head.logits, batch.rows(batch.ref_hidden))
    forget_mean = local_entropy_loss(forget, ref_forget, top_k=batch.k)
    return Losses(forget_mean, kl_loss(preserve, ref_preserve))


def compiled(batch: Batch) -> Losses:
    forget, preserve = map(batch.head.logits, batch.rows(batch.hidden))
    ref_forget, ref_preserve = map(batch.ref_head.logits, batch.rows(batch.ref_hidden))
    forget_mean = _compiled(_flatten)(forget, ref_forget, batch.k)
    return Losses(forget_mean, _compiled(_reverse_kl)(preserve, ref_preserve))


def liger(batch: Batch) -> Losses:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    forget, preserve = batch.rows(batch.hidden)
    ref_forget, ref_preserve = batch.rows(batch.ref_hidden)
    logits, ref_logits = batch.head.logits(forget), batch.ref_head.logits(ref_forget)
    forget_mean = _flatten(logits, ref_logits, batch.k)
    weight, frozen = batch.head.weight, batch.ref_head.weight
    jsd = liger_fused_linear_jsd(preserve, weight, ref_preserve, frozen, jsd_beta=1.0)
    return Losses(forget_mean, jsd)


def _flatten(logits: Tensor, ref_logits: Tensor, k: int) -> Tensor:
    return providers.plain_loss("flatten", logits, k=k, ref_logits=ref_logits)


def _reverse_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    return providers.plain_loss("kl_reverse", logits, ref_logits=ref_logits)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def linear(batch: Batch) -> Losses:
    return _from_hidden(batch, batch.ref_hidden)


def sparse_cached(batch: Batch) -> Losses:
    return _from_hidden(batch, batch.ref_preserve, ref_indices=batch.indices)


def _from_hidden(batch: Batch, ref_hidden: Tensor, **given: Tensor) -> Losses:
    loss = PALULoss(top_k=batch.k, prefix_length=PREFIX)
    head = batch.head
    if head.requires_grad:
        # A head keeps the mean row of its weight; of one that trains it is taken anew every step.
        head = LMHead(head.weight)
    rows = (batch.labels, ref_hidden, batch.ref_head)
    output = loss.from_hidden(batch.hidden, head, *rows, **given)
    return Losses(output.forget, output.preserve, output.loss)


def dense(batch: Batch) -> Losses:
    return _forget_alone(batch, "dense", indices=batch.indices)


def sparse(batch: Batch) -> Losses:
    return _forget_alone(batch, "sparse", indices=batch.indices)


def dense_live(batch: Batch) -> Losses:
    return _forget_alone(batch, "dense", ref_hidden=batch.rows(batch.ref_hidden)[0])


def _forget_alone(batch: Batch, implementation: str, **source: Tensor) -> Losses:
    forget = batch.rows(batch.hidden)[0]
    options = {"top_k": batch.k, "implementation": implementation}
    return Losses(linear_local_entropy_loss(forget, batch.head, **source, **options))


class Floor:
    """z = h W^T, r = h_ref W^T, dL/dh = dL/dz W and, where the head trains, dL/dW = (dL/dz)^T h for
    the selected rows; z stands for dL/dz."""

    def __init__(self, batch: Batch) -> None:
        self.weight = batch.head.weight.detach()
        self.weight_grad = torch.empty_like(self.weight) if batch.head.requires_grad else None
        self.own, self.ref = (
            torch.cat(batch.rows(h)).detach() for h in (batch.hidden, batch.ref_hidden)
        )
        self.z = self.own.new_empty((len(self.own), len(self.weight)))
        self.r, self.grad = torch.empty_like(self.z), torch.empty_like(self.own)

    def __call__(self) -> None:
        torch.mm(self.own, self.weight.t(), out=self.z)
        torch.mm(self.ref, self.weight.t(), out=self.r)
        torch.mm(self.z, self.weight, out=self.grad)
        if self.weight_grad is not None:
            torch.mm(self.z.t(), self.own, out=self.weight_grad)


def outputs_of(loss: Callable[[Batch], Losses], batch: Batch) -> Outputs:
    """The losses and, for each role, the gradient of its rows."""
    batch.hidden.grad = batch.head.weight.grad = None
    losses = loss(batch)
    total = losses.total
    if total is None:
        total = losses.forget if losses.preserve is None else losses.forget + losses.preserve
    total.backward()
    named = {"loss": total, "forget_loss": losses.forget, "preserve_loss": losses.preserve}
    outputs = {name: t.detach().float() for name, t in named.items() if t is not None}
    if batch.head.requires_grad:
        outputs["weight_gradient"] = batch.head.weight.grad
    return outputs | by_role(batch.hidden.grad, batch)


def by_role(gradient: Tensor, batch: Batch) -> Outputs:
    roles = F.pad(batch.roles, (0, 1), value=NONE)
    names = {NONE: "other", FORGET_ROLE: "forget", PRESERVE_ROLE: "preserve"}
    return {f"{name}_gradient": gradient[roles == role] for role, name in names.items()}


def provider(loss: Callable[[Batch], Losses], ties: bool = False, **options: object) -> Provider:
    def allowed(case: Case, name: str) -> float:
        if "gradient" not in name:
            return TOLERANCE[case.dtype]
        return (TIES_TOLERANCE if ties else GRADIENT_TOLERANCE)[case.dtype]

    return Provider(
        lambda case, batch: Call(lambda: outputs_of(loss, batch)), allowed=allowed, **options
    )


KERNELS = {
    LOSS: {
        "released": provider(released, ties=True),
        "compile": provider(compiled, ties=True, lacks=providers.no_compiler),
        "liger": provider(liger, ties=True, package=providers.LIGER, lacks=providers.needs_gpu),
        "rows": provider(rows),
        "linear": provider(linear),
        "sparse+cached": provider(sparse_cached),
        "floor": Provider(lambda case, batch: Call(Floor(batch))),
    },
    TRAINED_LOSS: {},
    FORGET_LOSS: {
        "dense": provider(dense),
        "sparse": provider(sparse),
        "dense+live": provider(dense_live),
    },
}
KERNELS[TRAINED_LOSS] = KERNELS[LOSS]


# ---- inputs and truth ----------------------------------------------------------------------------


def make_labels(vocab: int, positions: int, batch: int, forget: int, preserve: int) -> Tensor:
    """Return int64 `[batch, T]` as a batch of questions has them: a prompt, an answer in which runs
    of PREFIX sensitive tokens lie evenly between others, padding. The rows are of unequal length.

    Raises:
        ValueError: the rows do not fit, or are too few to keep the runs apart.
    """
    length = positions // batch
    if length * batch != positions:
        raise ValueError(f"positions is {positions}; it must be a multiple of {batch}")
    labels = torch.full((batch, length), IGNORE)
    counts = zip(_even(forget, batch), _even(preserve, batch), strict=True)
    for row, (sensitive, other) in enumerate(counts):
        runs = -(-sensitive // PREFIX)
        if other < runs + 1:
            raise ValueError(
                f"preserve is {preserve}; it must be enough to keep the runs of {forget} forget "
                f"rows apart, {runs + 1} in each of {batch} examples"
            )
        answer: list[int] = []
        sizes = _even(sensitive, runs)
        for gap, size in zip(_even(other, runs + 1), [*sizes, 0], strict=True):
            answer += [KEEP] * gap
            answer += [(row + len(answer) + n) % vocab for n in range(size)]
        spare = length - len(answer)
        if spare < 1:
            raise ValueError(
                f"positions is {positions}; an example has {length} of them, and a prompt "
                f"and {len(answer)} answer tokens must fit"
            )
        start = 1 + (spare - 1) * (row + batch) // (2 * batch)
        labels[row, start : start + len(answer)] = torch.tensor(answer)
    return labels


def _even(total: int, parts: int) -> list[int]:
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


def labels_of(case: Case) -> Tensor:
    given = {name: int(value) for name, value in case.given().items()}
    return make_labels(case.V, case.rows, given["batch"], given["forget"], given["preserve"])


def make_batch(case: Case, device: torch.device) -> Batch:
    """Random rows and weights: logits with a standard deviation near 2, the current model far
    enough from the reference that neither loss is small."""
    generator, dtype = torch.Generator(device).manual_seed(0), getattr(torch, case.dtype)
    labels = labels_of(case).to(device)
    head = LMHead(providers.normal(generator, 0.02, case.V, case.D, dtype=dtype))
    scale = 2 / (0.02 * case.D**0.5)
    ref_hidden = providers.normal(generator, scale, *labels.shape, case.D, dtype=dtype)
    hidden = ref_hidden + providers.normal(
        generator, 0.5 * scale, *labels.shape, case.D, dtype=dtype
    )
    roles = token_roles(labels, PREFIX)[:, 1:]
    ref_forget, ref_preserve = (
        ref_hidden[:, :-1][roles == role] for role in (FORGET_ROLE, PRESERVE_ROLE)
    )
    indices = [topk_indices(head.logits(piece), case.k) for piece in ref_forget.split(64)]
    chosen = torch.cat(indices)
    hidden.requires_grad_()
    ref_head, head = head, LMHead(head.weight.detach())
    head.weight.requires_grad_(case.kernel == TRAINED_LOSS)
    heads = (head, ref_head)
    return Batch(case.k, labels, hidden, ref_hidden, *heads, roles, chosen, ref_preserve)


def truth(case: Case, batch: Batch) -> Outputs:
    """Piece by piece in float64, S as `indices` gives it."""
    weight = batch.head.weight.detach().double().requires_grad_(batch.head.requires_grad)
    gradient = torch.zeros_like(batch.hidden, dtype=torch.float64)
    losses = {}
    own_rows, ref_rows = (batch.rows(h.detach()) for h in (batch.hidden, batch.ref_hidden))
    terms = {
        "forget_loss": ("flatten", FORGET_ROLE),
        "preserve_loss": ("kl_reverse", PRESERVE_ROLE),
    }
    if case.kernel == FORGET_LOSS:
        del terms["preserve_loss"]
    for number, (name, (loss, role)) in enumerate(terms.items()):
        losses[name], grads = 0.0, []
        for start in range(0, len(own_rows[number]), providers.TRUTH_ROWS):
            piece = slice(start, start + providers.TRUTH_ROWS)
            hidden = own_rows[number][piece].double().requires_grad_()
            source = {"ref_logits": ref_rows[number][piece].double() @ weight.detach().T}
            if role == FORGET_ROLE:
                source = {"k": case.k, "indices": batch.indices[piece].long()}
            part = row_losses(loss, hidden @ weight.T, **source).sum() / len(own_rows[number])
            part.backward()
            grads.append(hidden.grad)
            losses[name] = losses[name] + part.detach()
        gradient[:, :-1][batch.roles == role] = torch.cat(grads)
    of_weight = {} if weight.grad is None else {"weight_gradient": weight.grad}
    return {"loss": sum(losses.values()), **losses, **of_weight, **by_role(gradient, batch)}


# ---- the benchmark -------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = {
        "vocab": (128256, "V"),
        "hidden": (2048, "D"),
        "positions": (832, "of the batch of 8, padded"),
        "forget": (50, "rows with a forget loss"),
        "preserve": (226, "rows with a preserve loss"),
        "top-k": (1000, "k"),
        "scale": (1, "so many times the batch"),
    }
    for name, (default, words) in sizes.items():
        parser.add_argument(f"--{name}", type=runner.positive, default=default, help=words)
    heads = {"nargs": "+", "choices": HEADS, "default": ["frozen"]}
    parser.add_argument("--heads", **heads, help="whether its weight gets a gradient")
    parser.add_argument("--forget-only", action="store_true", help="forget rows alone")


def cases(given: argparse.Namespace) -> list[Case]:
    """Raises: ValueError: the rows do not fit into the batch."""
    sizes = {name: given.scale * getattr(given, name) for name in ("forget", "preserve")}
    setting = " ".join(f"{k}={v}" for k, v in {"batch": given.scale * BATCH, **sizes}.items())
    kernels = [FORGET_LOSS] if given.forget_only else [HEADS[head] for head in given.heads]
    rows = given.scale * given.positions
    base = Case("", given.vocab, given.hidden, rows, given.top_k, "", setting)
    labels_of(base)
    return [base._replace(kernel=kernel, dtype=d) for kernel in kernels for d in given.dtype]


def summary(rows: Sequence[Row]) -> str:
    """Return ours over the bare products and over the released way: the median over rounds, which
    are neighbours in time with `--in-turns`."""
    lines = []
    for same in tables.grouped(rows, tables.label).values():
        at = {(row["provider"], row["metric"]): row for row in same}
        for ours, kind in product(("rows", "linear", "sparse+cached"), ("seconds", "cpu_seconds")):
            others = {
                name: tables.round_ratio(at.get((ours, kind)), at.get((name, kind)))
                for name in ("floor", "released", "compile")
            }
            said = [f"{one:.2f} of {name}" for name, one in others.items() if one is not None]
            if said:
                words = "wall" if kind == "seconds" else "process"
                lines.append(f"{tables.label(same[0])}, {words} time: {ours} {', '.join(said)}")
    return "\n".join(lines)


BENCHMARK = declare.Benchmark(
    name="bench_loss",
    description=__doc__,
    kernels=KERNELS,
    add_options=add_options,
    cases=cases,
    inputs=make_batch,
    truth=truth,
    repeats=5,
    calls=2,
    csv="loss_step.csv",
    summary=summary,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runner.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
