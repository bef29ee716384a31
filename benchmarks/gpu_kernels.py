"""How fast is every kernel alone, under which launch settings, and which way makes what best?

    python -m benchmarks.gpu_kernels {compile,kernels,sweep,loops,head,once} --csv FILE

Parts of `benchmarks/gpu.sh`, which runs them on a card one after the other. No list of kernels is
kept here: an operator is run once, forward and backward, and what it launches is noted and then
launched again alone, between two events and with a cold L2 cache.

* `compile`: every variant that the other parts launch, for this card, in parallel processes. It
  needs no card (`--arch` names one): launches are noted and not made.
* `kernels`: each alone at N = 1, 50, 256 and 4096, beside what its tensors weigh; and the sum of an
  operator's beside the physical floor (`FLOORS`: every row read once, every gradient written once).
* `sweep`: block, warps and programs a multiprocessor, for every walk over rows; the best are
  written to `--tuned FILE`, which `palu_kernels.tuned` reads. `num_stages` is not among them:
  loads stand in a branch, which Triton's pipeliner leaves alone.
* `loops`: the operators that choose S on random rows, rows of equal entries and rows of one
  exponent, beside `torch.topk`; a walk whose loads stand in a branch beside one without, which
  Triton pipelines.
* `head`: the ways to make the gradient of the head's weight.
* `once`: every kernel once, for a profiler.

The exit status is 3 if the time was up (`--seconds`) before all was done.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "compile" in sys.argv[1:2]:
    # read when triton and palu_kernels are imported: launches of CPU tensors are compiled ones
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["PALU_TRITON_CPU"] = "1"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from triton.runtime.jit import KernelInterface

from benchmarks import bench_ops, declare, machine, runner, tables, timing
from benchmarks.bench_ops import TOP_K, Inputs
from benchmarks.declare import Case
from benchmarks.tables import Row
from palu_kernels import LMHead, linear_cross_entropy_loss, topk_indices, tuned
from palu_kernels.tuned import Settings, Walk

OUT_OF_TIME = 3
# Transfers of a row of logits, forward plus backward, that no implementation avoids.
FLOORS = {TOP_K: 1, "cross_entropy": 2, "kl_reverse": 3, "kl_forward": 3}
_BY = (("", 3), ("_indices", 2))
FLOORS |= {f"{name}{by}": n for name in ("flatten", "entropy") for by, n in _BY}
BY_K = (TOP_K, "flatten", "flatten_indices", "entropy")
SWEPT = (TOP_K, "flatten", "entropy", "kl_reverse", "cross_entropy")
GRID = {"block": (1024, 2048, 4096, 8192), "warps": (4, 8, 16), "programs": (2, 4, 8, 16)}
# A setting that needs too many registers or too much shared memory, or that a kernel cannot have.
REFUSED = (RuntimeError, triton.OutOfResources, triton.CompilationError)
CALLS = 7  # of which the median is taken


class Sizes(NamedTuple):
    operators: Sequence[str]
    swept: Sequence[str]
    kernels: Sequence[tuple[int, int]]  # V, N
    sweep: Sequence[tuple[int, int]]
    loops: Sequence[tuple[int, int]]
    head: Sequence[tuple[int, int, int]]  # V, D, N
    k: int
    grid: dict[str, Sequence[int]]

    @classmethod
    def of(cls, tiny: bool) -> Sizes:
        if tiny:
            few = {"block": (256, 1024), "warps": (4,), "programs": (2,)}
            names = (TOP_K, "flatten", "kl_reverse")
            return cls(
                names, names[2:], [(5000, 2)], [(5000, 2)], [(5000, 2)], [(257, 16, 5)], 9, few
            )
        V = 128256
        kernels = [(V, 50), (V, 256), (V, 4096), (V, 1), (32000, 50), (32000, 4096), (262144, 50)]
        head = [(V, D, N) for D in (4096, 2048) for N in (276, 50, 1024, 4096)]
        return cls(tuple(FLOORS), SWEPT, kernels, kernels[:6], kernels[:3], head, 1000, GRID)


# ---- launches ------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A launch that was made, and can be made again."""

    kernel: Any
    grid: Any
    arguments: tuple
    options: dict[str, Any]
    walk: Walk | None  # of the launch settings that were asked for last

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def again(self) -> None:
        self.kernel.run(*self.arguments, grid=self.grid, warmup=False, **self.options)

    @property
    def bytes(self) -> int:
        """What its tensors weigh, each counted once."""
        given = [t for t in (*self.arguments, *self.options.values()) if isinstance(t, Tensor)]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in given}.values())


@contextlib.contextmanager
def noted(walks: Sequence[Walk] = ()) -> Iterator[list[Launch]]:
    """Note what is launched inside the block; `walks` grows with every question for settings."""
    found: list[Launch] = []
    original = KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
        launch = original(kernel, grid)

        def run(*arguments: Any, **options: Any) -> Any:
            walk = walks[-1] if walks else None
            found.append(Launch(kernel, grid, arguments, options, walk))
            return launch(*arguments, **options)

        return run

    KernelInterface.__getitem__ = getitem
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = original


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """Return the launches of a call; one before compiles its kernels."""
    call()
    with noted() as launches:
        call()
    return launches


def operator_call(name: str, given: Inputs, k: int) -> Callable[[], None]:
    """Return a function that runs an operator, forward and backward, by its kernels."""
    case = Case(name, given.logits.shape[-1], None, len(given.logits), k, "bfloat16")

    def run() -> None:
        if name == TOP_K:
            topk_indices(given.ref_logits, k, backend="triton")
        else:
            loss = bench_ops.palu(case, given, backend="triton")
            torch.autograd.grad(loss, [given.logits])

    return run


def rows_of(kind: str, V: int, N: int, k: int, device: torch.device) -> Inputs:
    """`random`; `level`: all entries equal; `exponent`: from 1 to 2; `empty`: whatever is there."""
    generator = torch.Generator(device).manual_seed(0)

    def rows() -> Tensor:
        out = torch.empty(N, V, dtype=torch.bfloat16, device=device)
        if kind == "random":
            out.normal_(0, 2, generator=generator)
        elif kind == "level":
            out.fill_(1)
        elif kind == "exponent":
            out.uniform_(1, 2, generator=generator)
        return out

    logits, ref_logits = rows().requires_grad_(), rows()
    indices = torch.arange(k, device=device).expand(N, k).contiguous() * (V // k)
    return Inputs(logits, ref_logits, indices, torch.arange(N, device=device) % V)


class Clock:
    """Time of a call on the device, with a cold L2 cache; on a CPU, which only tests the run, of
    the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type != "cpu":
            size = timing.FLUSH_BYTES
            self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any], calls: int = CALLS) -> list[float]:
        call()
        if self.device.type == "cpu":
            return [timing.timed(call, self.device)[1].wall]
        events = []
        for _ in range(calls):
            self.flush.zero_()
            pair = [torch.Event(self.device, enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.accelerator.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in events]


# ---- the parts -----------------------------------------------------------------------------------


class Part:
    """What every part has: its sizes, its clock, its end, and its rows."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.sizes = given, Sizes.of(given.tiny)
        self.end = time.monotonic() + given.seconds
        self.device = torch.device(given.device)
        self.clock = Clock(self.device)
        self.rows: list[Row] = []
        self.written, self.late = 0.0, False
        self.place = machine.environment(self.device) | {"commit": given.commit}

    def out_of_time(self) -> bool:
        self.late = self.late or time.monotonic() > self.end
        return self.late

    def add(self, case: Case, provider: str, metric: str, samples: Sequence[float]) -> None:
        row = tables.row(case._asdict(), provider, metric, [samples], declare.OK, self.place)
        self.rows.append(row)
        if time.monotonic() > self.written + 1:  # not each time: a sweep has thousands
            self.write()

    def write(self) -> None:
        tables.write(self.given.csv, self.rows)
        self.written = time.monotonic()

    def case(self, name: str, V: int, N: int, setting: str = "") -> Case:
        k = None if name in (*bench_ops.KL, bench_ops.CROSS_ENTROPY) else self.sizes.k
        return Case(name, V, None, N, k, "bfloat16", setting)

    def copy_rate(self) -> float:
        """Return bytes a second of a copy, read plus written."""
        size = 2**16 if self.given.tiny else 2**30
        a, b = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        seconds = self.clock.seconds(lambda: b.copy_(a))
        self.add(Case("copy", None, None, size, None, "uint8"), "torch", "device_seconds", seconds)
        return 2 * size / statistics.median(seconds)


def kernels(part: Part) -> None:
    rate = part.copy_rate()
    print(f"copy: {rate / 1e9:.0f} GB/s; us of a kernel, what its tensors need at that rate, share")
    for V, N in part.sizes.kernels:
        given = rows_of("random", V, N, part.sizes.k, part.device)
        print(f"V = {V}, N = {N}")
        for name in part.sizes.operators:
            if part.out_of_time():
                return
            launches = launches_of(operator_call(name, given, part.sizes.k))
            total = 0.0
            for number, launch in enumerate(launches):
                seconds = part.clock.seconds(launch.again)
                case = part.case(name, V, N, f"launch={number} bytes={launch.bytes}")
                part.add(case, launch.name, "device_seconds", seconds)
                total += statistics.median(seconds)
                print(_share(f"  {launch.name}", statistics.median(seconds), launch.bytes / rate))
            floor = FLOORS[name] * N * V * 2 / rate
            print(_share(f"{name}: {len(launches)} kernels", total, floor), flush=True)
            part.add(part.case(name, V, N), "kernels", "device_seconds", [total])
            part.add(part.case(name, V, N), "floor", "device_seconds", [floor])


def _share(name: str, seconds: float, floor: float) -> str:
    return f"{name:<44}{seconds * 1e6:>10.1f}{floor * 1e6:>10.1f}{floor / seconds:>7.2f}"


def sweep(part: Part) -> None:
    """Time every walking kernel under every setting; keep, for each walk and size, the setting that
    is best for all its kernels together."""
    best: list[dict[str, Any]] = []
    grid = [Settings(*values) for values in product(*part.sizes.grid.values())]
    for V, N in part.sizes.sweep:
        given = rows_of("random", V, N, part.sizes.k, part.device)
        times: dict[Walk, dict[Settings | None, dict[str, float]]] = {}
        for name in part.sizes.swept:
            call = operator_call(name, given, part.sizes.k)
            for settings in (None, *grid):
                if part.out_of_time():
                    return
                for launch, seconds in _timed_walks(part, call, settings):
                    at = times.setdefault(launch.walk, {}).setdefault(settings, {})
                    at[f"{name} {launch.name}"] = statistics.median(seconds)
                    words = "default" if settings is None else _words(settings)
                    part.add(part.case(name, V, N, words), launch.name, "device_seconds", seconds)
        best += [_best(walk, own) for walk, own in times.items()]
        for entry in best[-len(times) :]:
            print(" ".join(f"{k}={v}" for k, v in entry.items()), flush=True)
        write_tuned(part, best)


def _timed_walks(
    part: Part, call: Callable[[], None], settings: Settings | None
) -> Iterator[tuple[Launch, list[float]]]:
    """Yield the launches that walk rows, and what they took; none where a kernel is refused."""
    try:
        with tuned.trying(settings) as walks:
            call()
            with noted(walks) as launches:
                call()
        for launch in launches:
            if launch.walk is not None and "BLOCK" in launch.options:
                yield launch, part.clock.seconds(launch.again)
    except REFUSED as error:
        print(f"{settings}: {str(error).splitlines()[0][:100]}", file=sys.stderr)


def _best(walk: Walk, times: dict[Settings | None, dict[str, float]]) -> dict[str, Any]:
    """Return an entry of a tuned file: the settings with the least sum of shares of the default's
    time, over the kernels that ran under all of them."""
    default = times[None]

    def share(settings: Settings) -> float:
        own = times[settings]
        return statistics.fmean(own.get(name, float("inf")) / one for name, one in default.items())

    chosen = min((s for s in times if s is not None), key=share)
    entry = walk._asdict() | chosen._asdict()
    return entry | {"of_default": round(share(chosen), 3)}


def _words(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings._asdict().items())


def write_tuned(part: Part, entries: list[dict[str, Any]]) -> None:
    content = {"card": part.place["processor"], "versions": part.place["versions"]}
    content |= {"commit": part.given.commit or machine.commit()}
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    head = json.dumps(content)[:-1]
    part.given.tuned.parent.mkdir(parents=True, exist_ok=True)
    aside = part.given.tuned.with_suffix(".aside")
    aside.write_text(f'{head},\n "settings": [\n  {lines}\n]}}\n', encoding="utf-8")
    aside.replace(part.given.tuned)
    tuned.read.__wrapped__(part.given.tuned)  # what is written can be read


def loops(part: Part) -> None:
    names = [name for name in part.sizes.operators if name in BY_K]
    print("us of all kernels of an operator; torch.topk")
    for V, N in part.sizes.loops:
        for kind in ("random", "level", "exponent"):
            given = rows_of(kind, V, N, part.sizes.k, part.device)
            found = []
            for name in names:
                if part.out_of_time():
                    return
                launches = launches_of(operator_call(name, given, part.sizes.k))
                seconds = [
                    sum(statistics.median(part.clock.seconds(one.again)) for one in launches)
                ]
                part.add(part.case(name, V, N, f"rows={kind}"), "palu", "device_seconds", seconds)
                found.append(f"{name} {seconds[0] * 1e6:.1f}")
            topk = part.clock.seconds(partial(given.ref_logits.topk, part.sizes.k))
            part.add(part.case(TOP_K, V, N, f"rows={kind}"), "topk", "device_seconds", topk)
            found.append(f"torch.topk {statistics.median(topk) * 1e6:.1f}")
            print(f"V = {V}, N = {N}, {kind} rows:", ", ".join(found), flush=True)
    pipelined(part)


@triton.jit
def _walk_kernel(
    z_ptr, out_ptr, n_cols, BRANCH: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of a row's exponentials, its loads in a branch as the library's, or not."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        offsets = begin + tl.arange(0, BLOCK)
        if BRANCH:
            if begin + BLOCK <= n_cols:
                z = tl.load(z_ptr + row * n_cols + offsets)
            else:
                z = tl.load(
                    z_ptr + row * n_cols + offsets, mask=offsets < n_cols, other=float("-inf")
                )
        else:
            inside = offsets < n_cols
            z = tl.load(z_ptr + row * n_cols + offsets, mask=inside, other=float("-inf"))
        sums += tl.exp(z.to(tl.float32))
    tl.store(out_ptr + row, tl.sum(sums, 0))


def pipelined(part: Part) -> None:
    """Is a loop that Triton pipelines worth taking its loads out of their branch?"""
    for V, N in part.sizes.loops:
        z = rows_of("random", V, N, 1, part.device).logits.detach()
        out = z.new_empty(N, dtype=torch.float32)
        for branch, stages in ((True, 1), (False, 1), (False, 3)):
            if part.out_of_time():
                return
            launch = partial(_walk_kernel[(N,)], z, out, V, branch, stages, 2048, num_warps=8)
            seconds = part.clock.seconds(launch)
            case = Case("walk", V, None, N, None, "bfloat16", f"branch={branch} stages={stages}")
            part.add(case, "loop", "device_seconds", seconds)
            rate = z.numel() * 2 / statistics.median(seconds) / 1e9
            print(f"V = {V}, N = {N}, {case.setting}: {rate:.0f} GB/s", flush=True)


# ---- the head's gradient -------------------------------------------------------------------------


def head(part: Part) -> None:
    print("us of the gradient of the weight [V, D] from N rows, bfloat16")
    for V, D, N in part.sizes.head:
        hidden, weight, grad = (
            torch.randn(a, b, dtype=torch.bfloat16, device=part.device)
            for a, b in ((N, D), (V, D), (N, V))
        )
        found = []
        for name, call in ways(hidden, weight, grad).items():
            if part.out_of_time():
                return
            case = Case("head_gradient", V, D, N, None, "bfloat16")
            try:
                seconds = part.clock.seconds(call)
            except (RuntimeError, TypeError) as error:  # addmm out_dtype is CUDA's, from torch 2.8
                found.append(f"{name}: {str(error).splitlines()[0][:60]}")
                continue
            part.add(case, name, "device_seconds", seconds)
            found.append(f"{name} {statistics.median(seconds) * 1e6:.0f}")
        print(f"V = {V}, D = {D}, N = {N}:", ", ".join(found), flush=True)


def ways(hidden: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Callable[[], Any]]:
    """The ways to make `grad.t() @ hidden`; `loss`: all of a cross-entropy with a trained head, and
    `products`: its bare matrix products."""
    chunks = range(0, len(hidden), 1024)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]

    def accumulated(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in chunks:
            rows = slice(start, start + 1024)
            total = product(total, grad[rows].t(), hidden[rows])
        return total.to(weight.dtype)

    def loss() -> Any:
        total = linear_cross_entropy_loss(leaves[0], LMHead(leaves[1]), labels)
        return torch.autograd.grad(total, leaves)

    def products() -> Any:
        z = hidden @ weight.t()
        return z @ weight, z.t() @ hidden

    return {
        "one product": lambda: grad.t() @ hidden,
        "addmm out_dtype": lambda: accumulated(partial(torch.addmm, out_dtype=torch.float32)),
        "accumulator": lambda: accumulated(lambda total, a, b: total.add_(a @ b)),
        "loss": loss,
        "products": products,
    }


# ---- compiling, profiling ------------------------------------------------------------------------


def once(part: Part) -> None:
    V, N = part.sizes.kernels[1 % len(part.sizes.kernels)]
    given = rows_of("random", V, N, part.sizes.k, part.device)
    for name in part.sizes.operators:
        operator_call(name, given, part.sizes.k)()


def compile_all(given: argparse.Namespace) -> int:
    """Note what the other parts launch, on CPU tensors, and compile it in parallel processes."""
    from benchmarks.static import compile_report as report

    number = given.arch.removeprefix("sm_")
    target = GPUTarget("cuda", int(number), 32) if number.isdigit() else report.TARGETS[given.arch]
    sizes = Sizes.of(given.tiny)
    variants: dict[str, Any] = {}
    grid = [Settings(*values) for values in product(*sizes.grid.values())]
    grid = list({(s.block, s.warps): s for s in grid}.values())  # programs are no constant
    for V, N in sizes.kernels:
        rows = rows_of("empty", V, N, sizes.k, torch.device("cpu"))
        swept = grid if (V, N) in sizes.sweep else []
        with report.recording(variants, "bf16", V):
            asked = [(name, None) for name in sizes.operators]
            for name, settings in (*asked, *product(sizes.swept, swept)):
                with tuned.trying(settings):
                    operator_call(name, rows, sizes.k)()
    tasks = [v for v in variants.values() if v.backend == target.backend]
    failed, end = 0, time.monotonic() + given.seconds
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:  # its end stops all of it
        work = partial(compile_variant, target=target)
        for number, error in enumerate(pool.imap_unordered(work, tasks), 1):
            if error:
                failed += 1
                print(error, flush=True)
            if time.monotonic() > end and number < len(tasks):
                print(f"{number} of {len(tasks)} variants before the time was up", flush=True)
                return OUT_OF_TIME
    print(f"{len(tasks)} variants compiled for {given.arch}, {failed} refused")
    return 0


def compile_variant(variant: Any, target: GPUTarget) -> str | None:
    kernel = getattr(importlib.import_module(variant.module), variant.name)
    source = ASTSource(kernel, variant.signature, variant.constants, variant.attrs)
    try:
        triton.compile(source, target=target, options={"num_warps": variant.warps})
    except Exception as error:  # a setting of the sweep may need too much
        return f"{variant.kernel} {variant.named}: {str(error).splitlines()[0][:120]}"
    return None


# ---- the command ---------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Part], None]] = {
    part.__name__: part for part in (kernels, sweep, loops, head, once)
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("part", choices=("compile", *PARTS))
    add("--device", default="cuda")
    add("--arch", default="sm_90", help="of `compile`")
    add("--jobs", type=runner.positive, default=os.cpu_count(), help="of `compile`: processes")
    add("--tiny", action="store_true")
    add("--seconds", type=float, default=600.0, help="begin nothing after this time")
    add("--csv", type=Path, default=Path("gpu_kernels.csv"))
    add("--tuned", type=Path, default=Path("tuned.json"), help="of `sweep`: the file to write")
    add("--commit", default="")
    given = parser.parse_args(arguments)
    if given.part == "compile":
        return compile_all(given)
    part = Part(given)
    PARTS[given.part](part)
    part.write()
    return OUT_OF_TIME if part.late else 0


if __name__ == "__main__":
    sys.exit(main())
