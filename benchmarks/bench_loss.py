"""What does the loss of one batch cost, forward plus backward, from hidden rows to their gradient?

    python -m benchmarks.bench_loss
    python -m benchmarks.bench_loss --forget-only --csv benchmarks/results/loss_step_forget.csv
    python -m benchmarks.bench_loss --scale 8 --calls 0 --repeats 1 \\
        --providers linear sparse+cached --csv benchmarks/results/loss_step_x8.csv

A batch [8, T] of random hidden rows, of which some carry a forget loss (flatten to the global mean)
and some a preserve loss (reverse KL), meets a frozen head. The providers, by what they are given:

* ``released``: both models' logits of all positions and everything after them over all positions
  (``released.py``), differentiated by autograd.
* ``compile``: both models' logits of the rows that carry a loss, then the definitions of
  ``palu_kernels/reference.py`` under `torch.compile`, S by `torch.topk`: PyTorch alone.
* ``liger``: the preserve loss by liger-kernel's fused linear JSD with beta 1; it has no forget
  loss, which is that of ``compile`` without `torch.compile`. It needs a GPU. (cut-cross-entropy has
  neither loss, flash-linear-attention not this direction of the KL.)
* ``rows``: both models' logits of those rows, then the operators on logits.
* ``linear``: ``PALULoss.from_hidden`` with the reference's hidden states; rows are picked inside
  the call.
* ``sparse+cached``: ``PALULoss.from_hidden`` with the forget rows' top-k indices and the preserve
  rows' reference hidden states computed before, as from a `ReferenceCache`.
* ``floor``: no loss. The matrix products that the selected rows cannot avoid, into memory that is
  already there: both models' logits and the gradient to the hidden rows. (``sparse+cached`` avoids
  those of the forget rows, so it may be below.)

With ``--forget-only`` the preserve rows are left out: ``dense`` and ``sparse`` are given the top-k
indices, ``dense+live`` the reference's hidden rows.

Every measurement is a process of its own; providers take turns (``harness.py``). In it, after a
call on a few rows of a small head that loads the code, the first call is watched for its peak
memory over what was there before (inputs and head were); then ``--calls`` calls are timed and their
median is the process's time. (The mean row of a frozen head, which ``sparse`` needs, is made in the
first call and kept.) The table shows medians over the processes. The exit status is 1 if the
providers disagree on the losses or on the gradient. A provider that cannot run here has a row that
says why.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from benchmarks import runner as harness
from benchmarks.loss_providers import (
    BATCH,
    BOTH_TERMS,
    FLATTEN,
    FLOOR,
    FORGET_ONLY,
    PREFIX,
    PROVIDERS,
    Case,
    Shape,
    caller,
    make_case,
    make_labels,
    why_not,
)
from palu.data.roles import FORGET, NONE, PRESERVE, token_roles
from palu.models.loading import resolve_device
from palu_kernels.linear.op import settle
from palu_kernels.row_loss import LocalEntropy

# Relative, of a loss and of the gradient in norm. In bfloat16 some providers round the logits of
# forget rows and some do not.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
# In bfloat16 dozens of entries equal the k-th; `torch.topk` takes other ones of them into S, and
# the gradient of a forget row lies on S.
BY_TORCH_TOPK = ("released", "compile", "liger")
TIES_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-3}
LOSSES = ("loss", "forget_loss", "preserve_loss")
COLUMNS = (
    *("dtype", "provider", "repeat", "seconds", "peak_bytes", "bytes_before", *LOSSES),
    *("gradient_error", "forget_rows_by", "calls", "vocab", "hidden", "positions", "forget"),
    *("preserve", "top_k", "batch", "status", *harness.ENVIRONMENT),
)


# ---- one measurement -----------------------------------------------------------------------------


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Measures a provider in this process -> its row, all but the repeat, the commit and how its
    gradient compares; the gradient goes to ``task["gradient"]``, if that is a path."""
    shape, device = Shape(*task["shape"]), resolve_device(task["device"])
    dtype, provider = getattr(torch, task["dtype"]), task["provider"]
    small = Shape(256, 64, BATCH * 16, BATCH, 4 * BATCH, 8)
    caller(provider, make_case(small, dtype, device))()
    case = make_case(shape, dtype, device)
    call = caller(provider, case)
    with harness.PeakMemory(device) as peak:
        losses = call()
    if task["gradient"] and losses is not None:
        save_file({"gradient": case.hidden.grad.float().cpu()}, task["gradient"])
    numbers = [None if loss is None else float(loss) for loss in losses or (None,) * 3]
    seconds = [harness.timed(call, device)[1] for _ in range(task["calls"])]
    return {
        "dtype": task["dtype"],
        "provider": provider,
        "seconds": statistics.median(seconds) if seconds else None,
        # the floor's memory was there before
        "peak_bytes": None if provider == FLOOR else peak.extra,
        "bytes_before": peak.before,
        **dict(zip(LOSSES, numbers, strict=True)),
        "forget_rows_by": forget_rows_by(provider, case),
        "calls": task["calls"],
        "status": "ok",
        **shape._asdict(),
        **harness.environment(device),
    }


def forget_rows_by(provider: str, case: Case) -> str:
    """Whether the forget rows' loss came from all their logits or from those of S alone."""
    if provider == "sparse+cached":
        loss = LocalEntropy(case.shape.top_k, *FLATTEN, "indices")
        rows, head = case.rows(case.hidden)[0], case.head
        options = {"train_head": head.requires_grad, "compute": rows.dtype}
        (chosen,) = settle([loss], [len(rows)], head.weight, head.softcap, **options)
        return "dense" if chosen is loss else "sparse"
    return "sparse" if provider == "sparse" else "dense"


# ---- the run -------------------------------------------------------------------------------------


def run(given: argparse.Namespace, shape: Shape, folder: Path) -> list[dict[str, Any]]:
    """Measures everything; the rows are written after each process."""
    rows: list[dict[str, Any]] = []
    commit, device = harness.commit(), resolve_device(given.device)
    reasons = {name: why_not(name, device) for name in given.providers}
    providers = [name for name in given.providers if reasons[name] is None]
    for dtype in given.dtype:
        for provider in given.providers:
            if reasons[provider] is not None:
                row = {"dtype": dtype, "provider": provider, "status": reasons[provider]}
                place = harness.environment(device) | {"commit": commit}
                rows.append(dict.fromkeys(COLUMNS) | row | shape._asdict() | place)
        first = len(rows)
        gradients = {name: folder / f"{dtype}-{name}.safetensors" for name in providers}
        for repeat, provider in harness.turns(providers, given.repeats):
            task = {"provider": provider, "dtype": dtype, "shape": shape, "calls": given.calls}
            task |= {"device": given.device, "gradient": None}
            if repeat == 0:
                task["gradient"] = str(gradients[provider])
            row = harness.run_worker("benchmarks.bench_loss", task, given.threads)
            rows.append(row | {"repeat": repeat, "gradient_error": None, "commit": commit})
            if len(rows) - first == len(providers):
                compare_gradients(rows[first:], shape, gradients)
            harness.write_csv(given.csv, COLUMNS, rows)
            seconds = "-" if row["seconds"] is None else f"{row['seconds']:.3f} s"
            print(dtype, provider, repeat, seconds, file=sys.stderr, flush=True)
    return rows


def yardstick(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that the others of its dtype are compared with: not one by `torch.topk`, if
    possible."""
    with_loss = [row for row in rows if row["loss"] is not None]
    return min(with_loss, key=lambda row: row["provider"] in BY_TORCH_TOPK, default=None)


def compare_gradients(
    rows: Sequence[dict[str, Any]], shape: Shape, gradients: Mapping[str, Path]
) -> None:
    """Puts the ``gradient_error`` into a row of every provider."""
    start = yardstick(rows)
    roles = functional.pad(token_roles(make_labels(shape), PREFIX)[:, 1:], (0, 1), value=NONE)
    for row in rows:
        if row["loss"] is not None:
            found, truth = (
                load_file(gradients[one["provider"]])["gradient"] for one in (row, start)
            )
            row["gradient_error"] = gradient_error(found, truth, roles)


def gradient_error(found: Tensor, truth: Tensor, roles: Tensor) -> float:
    """Relative in norm, ``[B, T, D]``: the larger of the forget rows' and the preserve rows';
    infinite where a row has a gradient that should have none."""
    errors = [0.0]
    for role in (NONE, FORGET, PRESERVE):
        a, b = found[roles == role], truth[roles == role]
        off, size = float((a - b).norm()), float(b.norm())
        errors.append(off / size if size else math.inf if off else 0.0)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def disagreements(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the providers do not agree on: losses and gradients against one provider's."""
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype and row["loss"] is not None]
        start = yardstick(own)
        for row in own:
            checks = [
                (name, abs(row[name] - start[name]) / abs(start[name]), TOLERANCE[dtype])
                for name in LOSSES
                if start[name] is not None
            ]
            if row["gradient_error"] is not None:
                limits = TIES_TOLERANCE if row["provider"] in BY_TORCH_TOPK else TOLERANCE
                checks.append(("gradient", row["gradient_error"], limits[dtype]))
            found += [
                f"{dtype}: the {name} of {row['provider']} is {error:.2e} from that of "
                f"{start['provider']}, more than {limit:.2e}"
                for name, error, limit in checks
                if not error <= limit  # a NaN too
            ]
    return found


def status(rows: Sequence[dict[str, Any]], provider: str) -> str:
    return next(row["status"] for row in rows if row["provider"] == provider)


class Medians(NamedTuple):
    seconds: float | None
    peak: float | None
    fastest: float | None
    slowest: float | None
    error: float | None


def medians(rows: Sequence[dict[str, Any]], dtype: str, provider: str) -> Medians:
    """Of the processes of one provider; None where nothing was measured."""
    own = [row for row in rows if (row["dtype"], row["provider"]) == (dtype, provider)]
    seconds, peaks, errors = (
        [row[name] for row in own if row[name] is not None]
        for name in ("seconds", "peak_bytes", "gradient_error")
    )
    return Medians(
        statistics.median(seconds) if seconds else None,
        statistics.median(peaks) if peaks else None,
        min(seconds, default=None),
        max(seconds, default=None),
        max(errors, default=None),
    )


def summary(rows: Sequence[dict[str, Any]], providers: Sequence[str]) -> str:
    """A line a dtype and provider: medians over the processes, and ratios of them."""
    base, lines = providers[0], []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        first, floor = (medians(rows, dtype, name) for name in (base, FLOOR))
        for provider in providers:
            own = medians(rows, dtype, provider)
            cells = [
                (own.seconds, ".3f"),
                (own.fastest, ".3f"),
                (own.slowest, ".3f"),
                (_ratio(first.seconds, own.seconds), ".2f"),
                (_ratio(own.seconds, floor.seconds), ".2f"),
                (_ratio(own.peak, 2**20), ".1f"),
                (_ratio(first.peak, own.peak), ".1f"),
                (own.error, ".1e"),
            ]
            shown = ["-" if value is None else format(value, how) for value, how in cells]
            lines.append([f"{dtype} {provider}", *shown, status(rows, provider)])
    headings = ["", "seconds", "from", "to", f"{base} / it", "it / floor", "peak MiB"]
    return harness.table([*headings, f"{base} / peak", "gradient off by", "status"], lines)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count = harness.positive
    parser.add_argument("--vocab", type=count, default=128256, help="V")
    parser.add_argument("--hidden", type=count, default=2048, help="D")
    parser.add_argument("--positions", type=count, default=832, help="of the batch of 8, padded")
    parser.add_argument("--forget", type=count, default=50, help="rows with a forget loss")
    parser.add_argument("--preserve", type=count, default=226, help="rows with a preserve loss")
    parser.add_argument("--top-k", type=count, default=1000)
    parser.add_argument("--scale", type=count, default=1, help="so many times the batch")
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument("--forget-only", action="store_true", help="forget rows alone")
    parser.add_argument(
        "--calls", type=int, default=2, help="timed calls a process; 0: memory only"
    )
    harness.add_options(parser, "loss_step.csv", repeats=5)
    given = parser.parse_args(arguments)
    allowed = list(FORGET_ONLY if given.forget_only else BOTH_TERMS)
    given.providers = given.providers or allowed
    if wrong := [name for name in given.providers if name not in allowed]:
        parser.error(f"{', '.join(wrong)}: here --providers must be of {', '.join(allowed)}")
    if given.calls < 0:
        parser.error(f"--calls is {given.calls}; it must be at least 0")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    if task := harness.worker_task(arguments):
        print(json.dumps(work(task)))
        return 0
    given = options(arguments)
    sizes = [given.positions, given.forget, given.preserve]
    shape = Shape(given.vocab, given.hidden, *(given.scale * n for n in sizes), given.top_k)
    shape = shape._replace(batch=BATCH * given.scale)
    make_labels(shape)  # sizes that do not fit are an error now
    with tempfile.TemporaryDirectory() as folder:
        rows = run(given, shape, Path(folder))
    print(", ".join(f"{name} {value}" for name, value in shape._asdict().items()))
    print(*(rows[0][name] for name in harness.ENVIRONMENT), sep=", ")
    print(summary(rows, given.providers))
    wrong = disagreements(rows)
    for line in wrong:
        print("DISAGREE:", line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
