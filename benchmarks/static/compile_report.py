"""What does every kernel variant cost on every chip? No GPU is needed to ask.

The operators run on CPU tensors, forward and backward, with the launch of a kernel replaced by a
recorder: it specialises the arguments as Triton's own launch would (pointers and integers that are
multiples of 16, integers equal to 1, constexprs) and keeps each variant it has not seen. Nothing is
executed. Every variant is then compiled for each target, and what it needs is read from what the
compiler leaves behind.

    python -m benchmarks.static.compile_report [--arch sm_90 ...] [--only NAME] [--reduced] \\
        [--quick] [--triton FOLDER] [--json FILE]
    python -m benchmarks.static.compile_report --entries 8 16 32   # block sizes: registers

`--triton` takes another Triton than the installed one: a folder that
`pip install --target FOLDER --no-deps triton==3.6.0` has filled.

The exit status is 1 if a variant does not compile or spills. Loads read `8x16 16x2`: eight of 16
bytes, sixteen of 2, counted in the code and not by how often they run (the masked loads for the
block at a row's end stand beside the wide ones for the blocks inside). What the hot loop costs an
entry is in the JSON, and for long rows in the table of `benchmarks.static.instructions`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.static import before_triton

if __name__ == "__main__":
    before_triton()

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime import jit

from benchmarks.static import machine_code
from palu.storage.files import check_json, write_json
from palu_kernels import functional as operators
from palu_kernels.linear.chunked import buffer
from palu_kernels.row_loss import KL, CrossEntropy, LocalEntropy, Operands
from palu_kernels.triton import gathered_matmul as gathered
from palu_kernels.triton import row_io as rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ITEM_BYTES = {"bf16": 2, "fp16": 2, "i16": 2, "fp32": 4, "i32": 4}
# One block and several; rows that all start on 16 bytes, rows that start anywhere, and (8 more
# than a multiple of 16) rows that do start on 16 bytes though no argument says so.
COLUMNS = (272, 257, 12288, 12289, 12296)
ROWS, TOP_K, SHORT = 3, 50, 8192
WARP, WARPS = 32, 8  # threads, and warps of a long row


@dataclass
class Variant:
    """A kernel with its arguments specialised: all that the compiler needs to know."""

    module: str
    name: str
    backend: str
    warps: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    dtypes: set[str] = field(default_factory=set)  # of the calls that launched it
    columns: set[int] = field(default_factory=set)

    @property
    def kernel(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.name}"

    @property
    def named(self) -> dict[str, Any]:
        """Constants by name: the constexprs, and integers that are one because they equal 1."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constants.items()}

    @property
    def walk(self) -> str:
        """How it walks rows: `aligned` (the arguments say that they start on 16 bytes),
        `shifted` (from the aligned address below), `unproven` (neither), `narrow` (rows of
        the head that start anywhere) or `none`."""
        shift = self.named.get("HAS_OFFSET")
        proven = not any(columns % 16 for columns in self.columns)
        if self.kernel.startswith("gathered_matmul."):
            return "aligned" if proven else "narrow"
        if shift is not False:
            return "shifted" if shift else "none"
        return "aligned" if proven else "unproven"

    def factors(self, arch: str) -> set[tuple[str, str, str]]:
        """What `reduced` wants to see at least once: each constant's value on each chip, and
        beside each walk."""
        values = {k: str(v) for k, v in self.named.items()}
        values |= {"dtypes": str(sorted(self.dtypes)), "warps": str(self.warps)}
        beside = {(self.walk, *pair) for pair in values.items()}
        return beside | {(arch, *pair) for pair in (values | {"walk": self.walk}).items()}

    @property
    def capped(self) -> bool:
        """Whether it is given a softcap: one that is None is a constant."""
        return any(name.endswith("cap") and name not in self.named for name in self.signature)

    def fewer_factors(self, arch: str) -> set[tuple[str, str, str]]:
        """What `reduced` wants to see at least once where it is to be quick: each constant's value
        on each chip; each two of the walk, the bytes of an entry and whether a row has several
        blocks; and the longest blocks, of 16-bit entries, without a softcap and with one."""
        values = {k: str(v) for k, v in self.named.items()}
        values |= {"dtypes": str(sorted(self.dtypes)), "warps": str(self.warps), "walk": self.walk}
        found = {(arch, *pair) for pair in (values | {"capped": str(self.capped)}).items()}
        if self.walk == "none" or len(self.dtypes) > 1:  # walks nothing, or no rows of the dtype
            return found
        size, several = ITEM_BYTES[min(self.dtypes)], max(self.columns) > SHORT
        found |= {("bytes", self.walk, str(size)), ("several", self.walk, str(several))}
        longest = self.capped if size == 2 and several else None
        return found | {("bytes, several", f"{size} {several}", str(longest))}

    @property
    def common(self) -> tuple[bool, ...]:
        """A key that puts the commonest variants first."""
        columns = max(self.columns) > SHORT
        return (self.walk != "aligned", "bf16" not in self.dtypes, not columns, self.capped)


Task = tuple[Variant, str]  # for an architecture


@contextlib.contextmanager
def recording(
    variants: dict[str, Variant], dtype: str, columns: int, launches: list[tuple] | None = None
) -> Iterator[None]:
    """Launches inside the block are noted in `variants`, one entry a backend, and not made; each
    one, with its grid and its argument `n_cols`, in `launches`."""
    backends = {t.backend: make_backend(t) for t in TARGETS.values()}

    @cache
    def binder(kernel: Any, name: str) -> Callable[..., tuple[Any, Any, Any]]:
        return jit.create_function_from_signature(kernel.signature, kernel.params, backends[name])

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for name, backend in backends.items():
            bound, specialization, options = binder(kernel, name)(*args, **kwargs)
            packed = kernel._pack_args(backend, kwargs, bound, specialization, options)
            names = (kernel.__module__, kernel.__name__, name)
            variant = Variant(*names, packed[0].num_warps, *packed[1:])
            variant = variants.setdefault(repr(variant), variant)
            variant.dtypes.add(dtype)
            variant.columns.add(columns)
            if launches is not None:
                launches.append((variant, grid, bound.get("n_cols", 0)))

    launch, jit.JITFunction.run = jit.JITFunction.run, record
    try:
        yield
    finally:
        jit.JITFunction.run = launch


def call_operators(dtype: torch.dtype, columns: int) -> None:
    """Every launcher, forward and backward; the values do not matter."""
    logits = torch.zeros(ROWS, columns, dtype=dtype, requires_grad=True)
    reference = torch.zeros(ROWS, columns, dtype=dtype)
    labels, indices = torch.zeros(ROWS, dtype=torch.int64), torch.arange(TOP_K).repeat(ROWS, 1)
    operators.topk_indices(reference, TOP_K, backend="triton")
    if SHORT < columns < 2 * SHORT:  # rows that start alike, with room for more maxima
        for k in (TOP_K, 100 * TOP_K):
            operators.topk_indices(reference.repeat(1, 9), k, backend="triton")
    losses = []
    by_indices = [{"indices": indices}, {"indices": indices.int()}]
    for chooser in ({}, {"ref_logits": reference}, *by_indices):
        for center in ("global_mean", "local_mean", 0.5):
            kind = {"objective": "flatten", "center": center, "top_k": TOP_K, **chooser}
            losses.append(operators.local_entropy_loss(logits, **kind, backend="triton"))
        kind = {"objective": "entropy", "top_k": TOP_K, **chooser}
        losses.append(operators.local_entropy_loss(logits, **kind, backend="triton"))
    for way in ("reverse", "forward"):
        losses.append(operators.kl_loss(logits, reference, direction=way, backend="triton"))
    for integers in (labels, labels.int()):
        losses.append(operators.cross_entropy_loss(logits, integers, backend="triton"))
    for loss in losses:
        loss.backward()


def call_capped(dtype: torch.dtype, columns: int) -> None:
    """The row losses on a chunk of a head with a softcap, whose gradient overwrites the chunk."""
    indices, labels = torch.arange(TOP_K).repeat(ROWS, 1), torch.zeros(ROWS, dtype=torch.int64)
    forget = [
        LocalEntropy(TOP_K, objective, "global_mean", 0.0, chooser)
        for objective in ("flatten", "entropy")
        for chooser in ("reference", "indices", "current")
    ]
    for loss in (*forget, KL("reverse"), KL("forward"), CrossEntropy()):
        pair = [buffer(torch.zeros(0, dtype=dtype), ROWS, columns) for _ in range(2)]
        chunk, ref_chunk = (whole[:, :columns] for whole in pair)
        ref_chunk = ref_chunk if loss.needs_reference else None
        data = labels if isinstance(loss, CrossEntropy) else None
        if isinstance(loss, LocalEntropy) and loss.select_by == "indices":
            data = indices
        loss.fused(Operands(chunk, ref_chunk, data, "triton", 30.0, 30.0), gradient=True)


def call_gathered(dtype: torch.dtype, width: int) -> None:
    """The launchers of `gathered`, on a head whose hidden size is `width`."""
    hidden, weight = torch.zeros(ROWS, width, dtype=dtype), torch.zeros(TOP_K, width, dtype=dtype)
    bias, slopes = weight[:, 0].contiguous(), torch.zeros(ROWS, TOP_K)
    acc_weight, acc_bias = torch.zeros(TOP_K, width), torch.zeros(TOP_K)
    for indices in (torch.zeros(ROWS, TOP_K, dtype=t) for t in (torch.int32, torch.int64)):
        for b in (None, bias):
            gathered.products(hidden, weight, b, indices)
        gathered.combine(slopes, weight, indices)
        for acc in ((acc_weight, None), (acc_weight, acc_bias), (None, acc_bias)):
            gathered.scatter(*acc, hidden, indices, slopes, TOP_K)


def all_variants() -> list[Variant]:
    variants: dict[str, Variant] = {}
    for name, dtype in DTYPES.items():
        for columns in COLUMNS:
            with recording(variants, name, columns):
                call_operators(dtype, columns)
                call_capped(dtype, columns)
                call_gathered(dtype, columns)
    return sorted(variants.values(), key=lambda v: (v.kernel, str(v.named), sorted(v.dtypes)))


def tasks_of(variants: list[Variant], archs: list[str]) -> list[Task]:
    return [(v, a) for v in variants for a in archs if TARGETS[a].backend == v.backend]


def reduced(tasks: list[Task], quick: bool = False) -> list[Task]:
    """A few tasks a kernel, in which every value of every constant, every dtype, every number of
    warps and every walk occurs on every chip, and each of the others with every walk on some chip
    of NVIDIA's and of AMD's; `quick`: fewer, as `Variant.fewer_factors` says, and rather those that
    are common."""
    factors = Variant.fewer_factors if quick else Variant.factors
    kept = []
    for kernel in dict.fromkeys((v.kernel, v.backend) for v, _ in tasks):
        pool = [(t, factors(*t)) for t in tasks if (t[0].kernel, t[0].backend) == kernel]
        missing = set().union(*(has for _, has in pool))
        if quick:
            pool.sort(key=lambda one: one[0][0].common)
        own = []
        while missing:
            own.append(max(pool, key=lambda one: len(one[1] & missing)))
            missing -= own[-1][1]
        for one in list(own):  # what later ones cover too
            others = set().union(*(other[1] for other in own if other is not one))
            own = [other for other in own if other is not one or not one[1] <= others]
        kept += [task for task, _ in own]
    return kept


def access_widths(code: str, kind: str, nvidia: bool) -> dict[int, int]:
    """Bytes -> how many global loads (`kind`: or stores) of so many bytes a thread's code has."""
    if nvidia:
        word = {"load": "ld", "store": "st"}[kind]
        found = re.findall(rf"\b{word}\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\b", code)
        widths = [int(times or 1) * int(bits) // 8 for times, bits in found]
    else:
        sizes = {"byte": 1, "short": 2, "dword": 4}
        pattern = rf"\b(?:global|buffer|flat)_{kind}_[us]?(byte|short|dword)(?:x(\d))?"
        widths = [int(times or 1) * sizes[word] for word, times in re.findall(pattern, code)]
    return dict(sorted(Counter(widths).items(), reverse=True))


def first_int(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has nothing like {pattern!r}: {text[:200]!r}")
    return int(found[1])


def loops_of(tasks: list[Task], quick: bool) -> list[bool]:
    """Of each task, whether its hot loop is counted, for which disassembling takes longer than
    compiling; `quick`: one of a kernel, bytes of an entry and softcap, for rows of several blocks.
    """
    seen, found = set(), []
    for variant, arch in tasks:
        kind = (variant.kernel, arch, ITEM_BYTES[min(variant.dtypes)], variant.capped)
        several = max(variant.columns) > SHORT
        found.append("BLOCK" in variant.named and (not quick or (several and kind not in seen)))
        seen |= {kind} if found[-1] else set()
    return found


def compile_one(task: Task, counted: bool = True) -> dict[str, Any]:
    """Compiles a variant for an architecture -> a row of the report (with `error` on failure).
    `counted`: with its hot loop."""
    variant, arch = task
    target = TARGETS[arch]
    first = next(iter(variant.signature.values())).lstrip("*")
    row: dict[str, Any] = {"kernel": variant.kernel, "arch": arch, "walk": variant.walk}
    row |= {"constants": variant.named, "signature": variant.signature}
    row |= {"dtypes": sorted(variant.dtypes), "columns": sorted(variant.columns)}
    row |= {"threads": variant.warps * target.warp_size, "item_bytes": ITEM_BYTES.get(first, 0)}
    kernel = getattr(importlib.import_module(variant.module), variant.name)
    source = ASTSource(kernel, variant.signature, variant.constants, variant.attrs)
    log, nvidia = io.StringIO(), target.backend == "cuda"
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options={"num_warps": variant.warps})
        code = compiled.asm["ptx" if nvidia else "amdgcn"]
        if nvidia:
            usage = log.getvalue()  # what `ptxas -v` said, under the flags that Triton gave it
            row["registers"] = first_int(r"Used (\d+) registers", usage)
            row["stack"] = first_int(r"(\d+) bytes stack frame", usage)
            row["spills"] = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", usage)))
        else:
            row["registers"] = first_int(r"\.vgpr_count:\s+(\d+)", code)
            row["stack"] = first_int(r"\.private_segment_fixed_size:\s+(\d+)", code)
            # A scalar register spills to a lane of a vector register, which moves no memory; where
            # it does not fit there it counts as a vector spill.
            row["vector_spills"] = first_int(r"\.vgpr_spill_count:\s+(\d+)", code)
            row["scalar_spills"] = first_int(r"\.sgpr_spill_count:\s+(\d+)", code)
            row["spills"] = row["vector_spills"]
        row["shared"] = compiled.metadata.shared
        row["loads"] = access_widths(code, "load", nvidia)
        row["stores"] = access_widths(code, "store", nvidia)
        entries = variant.named.get("BLOCK", 0) / row["threads"]
        loop = machine_code.hot_loop(compiled, nvidia) if counted and entries else None
        row["loop"] = loop.an_entry(entries) if loop else None
    except Exception as error:  # any failure of the compiler is a result, not an accident
        row["error"] = f"{type(error).__name__}: {str(error).strip()}"
    return row


def prepare_worker(cache: str) -> None:
    knobs.cache.dir = cache
    knobs.compilation.always_compile = True  # a cached kernel would leave no log
    knobs.nvidia.dump_ptxas_log = True
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


FORMAT = "{:<44} {:<48} {:<14} {:<7} {:<7} {:>9} {:>6} {:>5} {:>6} {:>6}  {:<18} {}"
HEADINGS = "kernel constants dtype columns arch registers spills stack shared widest loads stores"


def table_line(row: dict[str, Any]) -> str:
    constants = [f"{k}={v}" for k, v in row["constants"].items() if k != "INFINITY"]
    columns = f"{row['columns'][0]}" + ("+" if len(row["columns"]) > 1 else "")
    start = (row["kernel"], " ".join(constants), "/".join(row["dtypes"]), columns, row["arch"])
    if "error" in row:
        return FORMAT.format(*start, *["-"] * 7) + f"\n    FAILED: {row['error'][:2000]}"
    numbers = [row[k] for k in ("registers", "spills", "stack", "shared")]
    moves = [" ".join(f"{n}x{w}" for w, n in row[k].items()) or "-" for k in ("loads", "stores")]
    return FORMAT.format(*start, *numbers, max(row["loads"], default=0), *moves)


def summary(rows: list[dict[str, Any]]) -> str:
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = ["", "most registers of so many variants, and how many of these fail or spill:"]
    lines.append(f"{'kernel':<28}" + "".join(f"{arch:>16}" for arch in archs))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        line = f"{kernel:<28}"
        for arch in archs:
            mine = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
            most = max((row["registers"] for row in mine if "error" not in row), default="-")
            line += f"{f'{most} of {len(mine)}, {sum(map(is_bad, mine))}':>16}"
        lines.append(line)
    return "\n".join(lines)


def try_entries(counts: list[int], archs: list[str], jobs: int) -> None:
    """A table of the most registers, and of spills, where a thread has so many entries of a block
    in place of what `rows.BLOCKS` gives it; 8 warps, rows of several blocks."""
    lines = ["entries a thread   most registers (variants that spill), by kernel and architecture"]
    for count in counts:
        blocks = {size: ((float("inf"), count * WARP * WARPS, WARPS),) for size in (2, 4)}
        rows.BLOCKS, before = blocks, rows.BLOCKS
        variants = [v for v in all_variants() if "BLOCK" in v.named and v.named.get("HAS_OFFSET")]
        rows.BLOCKS = before
        for dtype in ("bf16", "fp32"):
            own = [v for v in variants if dtype in v.dtypes and max(v.columns) > 4096]
            tasks = [task for arch in archs for task in reduced(tasks_of(own, [arch]))]
            found = list(compiled_rows(tasks, jobs))
            for kernel in dict.fromkeys(row["kernel"] for row in found):
                cells = []
                for arch in archs:
                    mine = [r for r in found if (r["kernel"], r["arch"]) == (kernel, arch)]
                    most = max((r["registers"] for r in mine if "error" not in r), default="-")
                    cells.append(f"{arch} {most} ({sum(map(is_bad, mine))})")
                lines.append(f"{count:>3} {dtype}  {kernel:<28}" + "  ".join(cells))
    print("\n".join(lines))


def compiled_rows(tasks: list[Task], jobs: int, quick: bool = False) -> Iterator[dict[str, Any]]:
    counted = loops_of(tasks, quick)
    with tempfile.TemporaryDirectory() as cache:
        if jobs == 1:
            prepare_worker(cache)
            yield from map(compile_one, tasks, counted)
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawn, prepare_worker, (cache,)) as pool:
            yield from pool.map(compile_one, tasks, counted, chunksize=4)


def is_bad(row: dict[str, Any]) -> bool:
    return "error" in row or row["spills"] > 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--reduced", action="store_true", help="a few variants a kernel")
    words = "with --reduced: still fewer, and fewer loops"
    parser.add_argument("--quick", action="store_true", help=words)
    parser.add_argument("--triton", metavar="FOLDER", help="take Triton from there")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes; 1: this one")
    parser.add_argument("--entries", nargs="+", type=int, help="a thread's, of a block: try these")
    given = parser.parse_args(arguments)
    if given.entries:
        try_entries(given.entries, given.arch, given.jobs)
        return 0

    tasks = tasks_of([v for v in all_variants() if given.only in v.kernel], given.arch)
    if not tasks:
        parser.error(f"no kernel's name contains {given.only!r}")
    tasks = reduced(tasks, given.quick) if given.reduced else tasks
    if given.json:
        try:
            check_json(given.json, {"kernels"}, "this report")
        except OSError as error:
            parser.error(f"--json: {error}")
    print(f"triton {triton.__version__}\n{FORMAT.format(*HEADINGS.split())}")
    found: list[dict[str, Any]] = []
    for row in compiled_rows(tasks, given.jobs, given.quick):
        found.append(row)
        print(table_line(row), flush=True)
    print(summary(found))
    if given.json:
        write_json(given.json, {"kernels": found})
    return int(any(map(is_bad, found)))


if __name__ == "__main__":
    sys.exit(main())
