"""Accuracy check: compare every operator with its float64 definition on this machine.

    python -m palu_kernels.check [--device cuda|cpu] [--backend triton|torch] [--quick]
                                 [--json FILE]

For each operator, dtype and shape the loss of every row and the gradient are compared with
`reference.py` run in float64 on the same inputs (a half-precision input is exact in float64, so S
is the same). The rule:

* norm: the error may be at most twice that of plain PyTorch (`reference.py` in the input's own
  dtype), plus a floor, and never more than 2^-6 (bfloat16), 2^-9 (float16) or 1e-4 (float32) of
  the truth's norm; losses are float32 whatever the inputs and are held to 1e-4.
* elementwise: at most twice plain PyTorch's error there, two roundings of the output dtype, and
  the floor.

The floor is six roundings of float32: of the result, and of the inputs, by which the truth itself
moves (rows of 1e4 whose deviations are of order 1 are a case where that is most of it; where the
truth is 0 it is all). Where loss or gradient are not finite the kernel must agree on where. Fresh
memory is filled with NaN while the operators run, so that what reads it shows.

Exit status 1 when a comparison fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from palu_kernels import functional as operators
from palu_kernels import reference
from palu_kernels.backend import triton_runs_on
from palu_kernels.check.linear_cases import LinearCase, compare_linear, linear_cases, poisoned
from palu_kernels.cpu import served_by

CAPS = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}
DTYPES = tuple(CAPS)
EPS = torch.finfo(torch.float32).eps
FLOOR = 6.0  # roundings of float32, of the inputs or of the result
COLUMNS = (7, 257, 4099, 32001, 50257, 128256)
KINDS = ("normal", "ties", "level", "masked", "large", "strided", "batched", "empty")


@dataclass(frozen=True)
class Case:
    """One comparison: an operator with its options, on rows of one kind."""

    operator: str  # topk, flatten, entropy, kl or cross_entropy
    option: str = ""  # centre or direction
    select: str = ""  # reference, indices or current
    dtype: torch.dtype = torch.float32
    columns: int = 257
    k: int = 50
    kind: str = "normal"

    def __str__(self) -> str:
        name = " ".join(part for part in (self.operator, self.option, self.select) if part)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name} {dtype} V={self.columns} k={self.k} {self.kind}"


@dataclass(frozen=True)
class Comparison:
    """An error beside what was allowed; `error` and `allowed` are relative norms."""

    case: Case | LinearCase
    what: str  # loss, gradient or indices
    error: float
    allowed: float
    worst: float  # largest elementwise error as a share of what is allowed there
    passed: bool


def variants() -> Iterator[Case]:
    """Every operator with every option."""
    yield Case("topk")
    for select in ("reference", "indices", "current"):
        for center in ("global_mean", "local_mean", "0.5"):
            yield Case("flatten", center, select)
        yield Case("entropy", "", select)
    yield Case("kl", "reverse")
    yield Case("kl", "forward")
    yield Case("cross_entropy")


def cases(*, quick: bool = False, full: bool = False) -> Iterator[Case]:
    """Pairwise over dtype, V, k and kind of rows: each operator meets each value of each (of the
    long rows one), not every combination. `quick` leaves the long rows out; `full` is every
    combination."""
    if full:
        for case in variants():
            for v in COLUMNS:
                for k in ks(v):
                    for dtype in DTYPES:
                        for kind in KINDS:
                            yield replace(case, dtype=dtype, columns=v, k=k, kind=kind)
        return
    short = [v for v in COLUMNS if v <= 4099]
    for number, case in enumerate(variants()):
        for step in range(max(len(KINDS), len(ks(257)))):
            v = short[(step + number) % len(short)]
            yield replace(
                case,
                dtype=DTYPES[(step + step // 3 + number) % 3],
                columns=v,
                k=ks(v)[(step + number) % len(ks(v))],
                kind=KINDS[step % len(KINDS)],
            )
        if not quick:  # one long row kind each: the interpreter takes seconds for one
            v = (32001, 50257, 128256, 50257, 32001)[number % 5]
            yield replace(case, dtype=DTYPES[number % 3], columns=v, k=ks(v)[(3 * number) % 7])


def ks(columns: int) -> tuple[int, ...]:
    return (1, 2, 50, 1000, max(columns - 1, 1), columns, columns + 3)


def rows_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (logits, reference logits, labels, indices) of a case, the same on every call."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(str(case)))
    generator = torch.Generator().manual_seed(seed)
    shape = {"batched": (2, 2), "empty": (0,)}.get(case.kind, (3,))
    v = case.columns

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    logits, ref = normal(*shape, v) * 2, normal(*shape, v) * 2
    ref = logits + 0.5 * ref  # near enough for the KL to be of order one, far enough to be large
    if case.kind == "ties":
        logits, ref = logits.round(), ref.round()
    elif case.kind == "level":
        logits, ref = torch.full_like(logits, 3.0), torch.full_like(ref, -1.5)
        logits[1:] += normal(*logits[1:].shape)
    elif case.kind == "masked":
        hidden = torch.rand(v, generator=generator) < 0.3
        hidden[0] = False
        logits, ref = (t.masked_fill(hidden, float("-inf")) for t in (logits, ref))
        ref[0, v // 2] = float("-inf")
        logits[2] = float("nan") if case.columns % 2 else logits[2]
    elif case.kind == "large":
        scale = 1e3 if case.dtype == torch.float16 else 1e4
        logits, ref = logits.clamp(-6, 6) * scale / 6, ref.clamp(-6, 6) * scale / 6
    logits, ref = logits.to(case.dtype), ref.to(case.dtype)
    if case.kind == "strided":
        # a row stride of its own, and neither row starts on 16 bytes
        wide = torch.cat([logits, ref, logits[:, :1]], dim=-1)
        logits, ref = wide[:, :v], wide[:, v : 2 * v]
    labels = torch.randint(0, v, shape, generator=generator)
    if labels.numel() and case.kind in ("batched", "ties"):
        labels.view(-1)[0] = -100
    rows = max(labels.numel(), 1)
    order = torch.stack([torch.randperm(v, generator=generator) for _ in range(rows)])
    indices = order[: labels.numel(), : min(case.k, v)].reshape(*shape, min(case.k, v))
    return logits.to(device), ref.to(device), labels.to(device), indices.to(device)


def loss_of(case: Case, logits: Tensor, rows: tuple[Tensor, ...], backend: str) -> Tensor:
    """Row losses of a case by the public operator."""
    _, ref, labels, indices = rows
    if case.operator == "cross_entropy":
        return operators.cross_entropy_loss(logits, labels, reduction="none", backend=backend)
    if case.operator == "kl":
        return operators.kl_loss(
            logits, ref, direction=case.option, reduction="none", backend=backend
        )
    chosen = {"reference": {"ref_logits": ref}, "indices": {"indices": indices}, "current": {}}
    center = case.option or "global_mean"
    return operators.local_entropy_loss(
        logits,
        top_k=case.k,
        objective=case.operator,
        center=center if center.endswith("mean") else float(center),
        reduction="none",
        backend=backend,
        **chosen[case.select],
    )


def truth_of(case: Case, logits: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """Row losses of a case by the definition, S chosen on the rows as they were given."""
    original, ref, indices = (t.reshape(-1, t.shape[-1]) for t in (rows[0], rows[1], rows[3]))
    labels = rows[2].reshape(-1)
    z = logits.reshape(-1, logits.shape[-1])
    if case.operator == "cross_entropy":
        return reference.cross_entropy_loss(z, labels)
    if case.operator == "kl":
        return reference.kl_loss(z, ref.to(z.dtype), direction=case.option)
    spoiled = original.isnan().any(-1)
    if case.select == "reference":
        spoiled = spoiled | ref.isnan().any(-1)
    if case.select != "indices":
        chooser = ref if case.select == "reference" else original
        indices = reference.topk_indices(chooser, case.k)
    center = case.option or "global_mean"
    return reference.local_entropy_loss(
        z * torch.where(spoiled, torch.nan, 1.0).to(z.dtype)[:, None],
        top_k=case.k,
        indices=indices,
        objective=case.operator,
        center=center if center.endswith("mean") else float(center),
    )


def loss_and_gradient(
    loss: Callable[[Tensor], Tensor], logits: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    z = logits.detach().requires_grad_()
    rows = loss(z)
    (grad,) = torch.autograd.grad(rows, z, weights.to(rows.dtype).reshape(rows.shape))
    return rows.detach().double().reshape(-1), grad.double().reshape(-1, grad.shape[-1])


def compare(case: Case, device: torch.device, backend: str) -> list[Comparison]:
    """Loss and gradient of a case (for topk, the indices) against the truth."""
    rows = rows_of(case, device)
    logits = rows[0]
    if case.operator == "topk":
        with poisoned():
            found = operators.topk_indices(logits, case.k, backend=backend)
        right = reference.topk_indices(logits.reshape(-1, case.columns).double(), case.k)
        wrong = (found.reshape(right.shape) != right).float().mean().item() if right.numel() else 0
        return [Comparison(case, "indices", wrong, 0.0, wrong, wrong == 0)]
    generator = torch.Generator().manual_seed(1)
    weights = (torch.rand(rows[2].shape, generator=generator) + 0.5).to(device)
    weights = weights * torch.where(torch.arange(weights.numel()) % 2 == 0, 1.0, -1.5).to(
        device
    ).reshape(weights.shape)

    exact = logits.double()
    sign = torch.randint(0, 2, exact.shape, generator=generator).to(device).double() * 2 - 1
    noise = 1 + EPS * sign
    truth = loss_and_gradient(lambda z: truth_of(case, z, rows), exact, weights)
    moved = loss_and_gradient(lambda z: truth_of(case, z, rows), exact * noise, weights)
    plain = loss_and_gradient(lambda z: truth_of(case, z, rows), logits, weights)
    with poisoned():
        ours = loss_and_gradient(lambda z: loss_of(case, z, rows, backend), logits, weights)
    # the interpreter cuts float32 to bfloat16 where compiled code rounds: one more unit there
    cuts = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    ulp = torch.finfo(case.dtype).eps
    extra = ulp if cuts and case.dtype == torch.bfloat16 else 0.0
    half = case.dtype == torch.float16
    smallest = torch.finfo(case.dtype).smallest_normal * ulp if half else 0.0
    losses, gradients = zip(ours, truth, plain, moved, strict=True)
    return [
        judge(case, "loss", losses, 1e-4, EPS, 0.0, 0.0),
        judge(case, "gradient", gradients, CAPS[case.dtype], ulp, extra, smallest),
    ]


def judge(
    case: Case,
    what: str,
    values: tuple[Tensor, ...],
    cap: float,
    ulp: float,
    extra: float,
    smallest: float,
) -> Comparison:
    """The rule at the head of this file. `ulp`: a rounding of the output dtype, `extra`: what
    the interpreter adds, `smallest`: the step below which the dtype holds nothing."""
    ours, truth, plain, moved = values
    finite = truth.isfinite()
    agree = torch.equal(finite, ours.isfinite())
    if what == "loss":  # +inf and NaN are told apart; a gradient is only not finite
        agree = agree and torch.equal(truth.isnan(), ours.isnan())
    ours, truth, plain, moved = (
        torch.where(finite & t.isfinite(), t, 0) for t in (ours, truth, plain, moved)
    )
    error, base = (ours - truth).abs(), (plain - truth).abs()
    by_inputs = FLOOR * (moved - truth).abs()
    norm = truth.norm().item()
    allowed = 2 * base.norm().item() + (FLOOR * EPS + extra) * norm
    allowed = max(min(allowed, cap * norm), by_inputs.norm().item())
    allowed += smallest * truth.numel() ** 0.5
    row = by_inputs.amax(-1, keepdim=True) if by_inputs.numel() else by_inputs
    bound = 2 * base + (2 * ulp + FLOOR * EPS + extra) * truth.abs() + row + smallest
    worst = (error / bound.clamp(min=1e-300)).amax().item() if error.numel() else 0.0
    passed = agree and error.norm().item() <= allowed and worst <= 1
    scale = norm or 1.0
    return Comparison(case, what, error.norm().item() / scale, allowed / scale, worst, passed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m palu_kernels.check",
        description="Every operator against its float64 definition on this machine.",
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--backend",
        choices=("triton", "torch"),
        help="default: triton where it can run on the device",
    )
    parser.add_argument("--quick", action="store_true", help="leave the long rows out")
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="of every N cases the I-th"
    )
    parser.add_argument("--json", metavar="FILE", help="write every comparison there")
    options = parser.parse_args(argv)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    backend = options.backend or ("triton" if triton_runs_on(device) else "torch")
    if backend == "triton" and not triton_runs_on(device):
        parser.error(f"--backend triton cannot run on {device} (TRITON_INTERPRET=1 interprets)")

    if options.json:
        try:
            check_json(Path(options.json))
        except OSError as error:
            parser.error(f"--json: {error}")

    print(f"palu_kernels on {device}, backend {backend}, torch {torch.__version__}")
    if backend == "torch" and device.type == "cpu":
        print(f"served by {served_by()}")
    print(f"{'operator':<64}{'what':<10}{'error':>10}{'allowed':>10}{'worst':>7}")
    results = []
    for result in comparisons(options.quick, device, backend, *options.shard):
        results.append(result)
        mark = "" if result.passed else "  FAILED"
        print(
            f"{result.case!s:<64}{result.what:<10}{result.error:>10.1e}{result.allowed:>10.1e}"
            f"{result.worst:>7.2f}{mark}",
            flush=True,
        )
    failed = sum(not result.passed for result in results)
    if options.json:
        write_json(options.json, results, device, backend)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def shard(text: str) -> tuple[int, int]:
    """`0/8` -> (0, 8)."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with 0 <= I < N, like 0/8")
    return int(index), int(count)


def comparisons(
    quick: bool, device: torch.device, backend: str, index: int = 0, count: int = 1
) -> Iterator[Comparison]:
    """Of the operators on logits and of the linear ones (whose column `worst` is the norm's share
    of what is allowed); of every `count` cases the one numbered `index`."""
    for case in [*cases(quick=quick), *linear_cases(DTYPES)][index::count]:
        try:
            yield from _compared(case, device, backend)
        except Exception as error:  # a kernel that does not compile must not hide the others
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)
            yield Comparison(case, type(error).__name__[:9], math.inf, 0.0, math.inf, False)


def _compared(case: Case | LinearCase, device: torch.device, backend: str) -> Iterator[Comparison]:
    if isinstance(case, Case):
        yield from compare(case, device, backend)
        return
    for what, error, allowed in compare_linear(case, device, backend, CAPS, 2 * FLOOR * EPS):
        yield Comparison(case, what, error, allowed, error / allowed, error <= allowed)


def write_json(path: str, results: list[Comparison], device: torch.device, backend: str) -> None:
    """Every comparison with what it ran on. Raises OSError."""
    rows = [asdict(r) | {"case": asdict(r.case) | {"dtype": str(r.case.dtype)}} for r in results]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    content = {"device": name, "backend": backend, "torch": torch.__version__, "results": rows}
    place = Path(path).resolve()
    number, aside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:100]}.")
    try:
        with open(number, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, place)
    except BaseException:
        os.unlink(aside)
        raise


def check_json(path: Path) -> None:
    """Raises FileExistsError where something is that this check did not write."""
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    keys: set[str] = set()
    if path.is_file():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            keys = set(json.loads(path.read_text("utf-8")))
    if not {"device", "backend", "results"} <= keys:
        raise FileExistsError(f"{str(path)!r} exists and this check did not write it")


if __name__ == "__main__":
    sys.exit(main())
