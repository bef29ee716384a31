"""How many instructions does an entry of a row cost in the hot loop of every kernel?

    python -m benchmarks.static.instructions [--triton FOLDER] [--arch sm_90 ...] [--only NAME]
        [--dtypes bf16 fp32] [--jobs 2] [--csv FILE]

Every kernel that walks long rows is compiled as for a vocabulary of 128,256 entries whose rows
start on 16 bytes, and its loop is counted (`machine_code.py`): instructions of the shortest main
path and of the longest, those of each pipe, clocks of the busiest one, bytes of global memory,
barriers a block, registers, spills and the widest load. `--csv` puts the rows into a file, in
place of those of the same Triton, architecture, type and kernel, so that versions stand side by
side (`benchmarks/results/instructions.csv`). The exit status is 1 if something does not compile,
spills or is over its bound.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from benchmarks.static import before_triton

if __name__ == "__main__":
    before_triton()

import torch
import triton

from benchmarks import tables
from benchmarks.static import compile_report as report
from benchmarks.static import machine_code
from palu_kernels import functional as operators

COLUMNS, TOP_K = 128256, 1000
OF_LOOP = ("least", "most", "alu", "fma", "xu", "lsu", "other", "clocks", "bytes", "barriers")
KEYS = ("triton", "arch", "dtype", "kernel", "constants")
FIELDS = (*KEYS, *OF_LOOP, "registers", "spills", "widest")
# Of a thread with eight entries or more, on NVIDIA's chips: instructions an entry without and with
# a softcap, barriers a block. A tenth more than what was counted on any of the Tritons.
BOUNDS = {
    "cross_entropy._ce_stats_kernel": (12, 28, 0),
    "cross_entropy._ce_grad_kernel": (21, 42, 0),
    "kl_div._kl_stats_kernel": (28, 62, 0),
    "kl_div._kl_grad_kernel": (26, 62, 0),
    "local_entropy._row_sums_kernel": (15, 40, 0),
    "local_entropy._local_entropy_grad_kernel": (25, 45, 6),
    "topk._segment_maxima_kernel": (14, 0, 3),
    "topk._search_kernel": (110, 0, 14),
    "topk._pick_kernel": (62, 0, 12),  # of few maxima: a warp or two
    "gathered_matmul._gathered_matmul_kernel": (15, 15, 0),
}
FEW_ENTRIES = 8
HIDDEN = ("HAS_OFFSET", "INFINITY")  # the same in all rows of a type


def variants(dtypes: list[str], only: str = "") -> list[report.Variant]:
    """Those of long, aligned rows, without and with a softcap."""
    found: dict[str, report.Variant] = {}
    for name in dtypes:
        with report.recording(found, name, COLUMNS):
            report.call_operators(report.DTYPES[name], COLUMNS)
            report.call_capped(report.DTYPES[name], COLUMNS)
            # the select's segments depend on k
            operators.topk_indices(
                torch.zeros(1, COLUMNS, dtype=report.DTYPES[name]), TOP_K, backend="triton"
            )
    walks = [v for v in found.values() if "BLOCK" in v.named and only in v.kernel]
    # the launch on int32 and int64 labels or indices is counted once
    once = {(v.backend, v.kernel, str(v.named), str(v.dtypes)): v for v in walks}
    return sorted(once.values(), key=lambda v: (v.kernel, str(v.named)))


def words_of(named: dict[str, Any], signature: dict[str, str]) -> str:
    """The constants that tell variants of long, aligned rows apart."""
    caps = [name for name in signature if name.endswith("cap")]
    words = [f"{k}={v}" for k, v in named.items() if k.isupper() and k not in HIDDEN]
    # a cap that is None is a constant
    return " ".join(words + ["softcap"] * any(signature[name] != "constexpr" for name in caps))


def cells_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, from one of the compile report's."""
    cells = {"triton": triton.__version__, "arch": row["arch"], "dtype": "/".join(row["dtypes"])}
    cells |= {"kernel": row["kernel"]}
    cells |= {"constants": words_of(row["constants"], row["signature"])}
    cells |= {"registers": row["registers"], "spills": row["spills"]}
    cells |= {"widest": max(row["loads"], default=0)}
    return cells | {name: (row["loop"] or {}).get(name, "") for name in OF_LOOP}


def over(row: dict[str, Any]) -> str | None:
    """What is wrong with the hot loop of a row of the compile report; None if nothing is."""
    loop, few = row.get("loop"), row["constants"].get("BLOCK", 0) < FEW_ENTRIES * row["threads"]
    if loop is None or few or not row["arch"].startswith("sm_"):
        return None
    if row["kernel"] not in BOUNDS:
        return "has no bound in benchmarks/static/instructions.py"
    plain, softcap, barriers = BOUNDS[row["kernel"]]
    most = softcap if cells_of(row)["constants"].endswith("softcap") else plain
    if loop["least"] <= most and loop["barriers"] <= barriers:
        return None
    return (
        f"takes {loop['least']} instructions an entry and {loop['barriers']} barriers a block; at "
        f"most {most} and {barriers}"
    )


def replace_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a CSV in place of those of the same Triton, architecture, type and kernel."""
    replaced = {tuple(row[key] for key in KEYS[:4]) for row in rows}
    kept = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            kept = list(csv.DictReader(stream))
    kept = [row for row in kept if tuple(row[key] for key in KEYS[:4]) not in replaced]
    tables.write(file, sorted(kept + rows, key=lambda row: [row[key] for key in KEYS]), FIELDS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    archs = list(report.TARGETS)
    parser.add_argument("--triton", metavar="FOLDER", help="take Triton from there")
    parser.add_argument("--arch", nargs="+", choices=archs, default=archs)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--dtypes", nargs="+", choices=report.DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")
    parser.add_argument("--csv", type=Path, help="put the rows into this file")
    given = parser.parse_args(arguments)
    tasks = report.tasks_of(variants(given.dtypes, given.only), given.arch)
    if not tasks:
        parser.error(f"no kernel's name contains {given.only!r}")
    if machine_code.disassembler() is None:
        print("Triton has brought no nvdisasm: NVIDIA's loops are not counted")
    found = list(report.compiled_rows(tasks, given.jobs))
    for row in filter(report.is_bad, found):
        print(row["kernel"], row["arch"], row.get("error", f"spills {row.get('spills')} bytes"))
    rows = [cells_of(row) for row in found if "error" not in row]
    print(f"triton {triton.__version__}, an entry of a row of {COLUMNS}")
    headings = ["kernel", "constants", *FIELDS[1:3], *FIELDS[5:]]
    print(tables.text(headings, [[str(row[name]) for name in headings] for row in rows]))
    if given.csv:
        replace_rows(given.csv, rows)
    worse = [f"{row['kernel']} {row['arch']} {over(row)}" for row in found if over(row)]
    print(*worse, sep="\n", end="\n" * bool(worse))
    return int(bool(worse) or any(map(report.is_bad, found)))


if __name__ == "__main__":
    sys.exit(main())
