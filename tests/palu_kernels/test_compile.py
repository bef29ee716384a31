"""Every kernel compiles for every chip, spills nothing, and reads and writes its rows wide.

The interpreter runs what the compiler may refuse, so the kernels are also compiled, without a GPU,
in a process of its own (`TRITON_INTERPRET` is read when Triton is imported).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.static import instructions
from tests.support.once import once

ROOT = Path(__file__).parents[2]
MAKERS = (("sm_80", "sm_90", "sm_100"), ("gfx942",))
ROWS_READ = {
    "topk._segment_maxima_kernel": 1,
    "local_entropy._row_sums_kernel": 1,
    "local_entropy._local_entropy_grad_kernel": 1,
    "kl_div._kl_stats_kernel": 2,
    "kl_div._kl_grad_kernel": 2,
    "cross_entropy._ce_stats_kernel": 1,
    "cross_entropy._ce_grad_kernel": 1,
    # rows of the head (a tile of them counts as one), and of its gradient
    "gathered_matmul._gathered_matmul_kernel": 2,  # of the head and of hidden states
    "gathered_matmul._gathered_combine_kernel": 1,
    "gathered_matmul._gathered_scatter_kernel": 1,
}
WRITERS = ("_grad_kernel", "_scatter_kernel")
DTYPES = {"bf16", "fp16", "fp32"}


# one chip by default, and no more variants than give every two of what the walk of a row depends on
CHIPS = [
    ("quick", "sm_90"),
    pytest.param(("all", "sm_90"), marks=pytest.mark.slow),
    pytest.param(("all", "sm_80", "sm_100", "gfx942"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CHIPS, ids="-".join)
def chosen(request):
    return request.param


@pytest.fixture(scope="module")
def quick(chosen):
    return chosen[0] == "quick"


@pytest.fixture(scope="module")
def archs(chosen):
    return chosen[1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory, chosen, quick, archs):
    """(exit status, rows) of the report."""
    name = "compile-" + "-".join(chosen)
    return once(tmp_path_factory, name, lambda f: compiled(f, quick, archs))[1]


def compiled(folder, quick, archs):
    file = folder / "report.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PALU_"))}
    command = [
        sys.executable,
        "-m",
        "benchmarks.static.compile_report",
        "--reduced",
        # each further process imports torch, which takes as long as five kernels
        *(["--quick", "--jobs", "1"] if quick else []),
        "--arch",
        *archs,
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    if not file.exists():
        pytest.fail(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
    return done.returncode, json.loads(file.read_text())["kernels"]


@pytest.fixture
def report(run):
    return run[1]


@pytest.fixture
def streaming(report):
    # a scatter into a bias alone reads no row
    return [
        row for row in report if row["kernel"] in ROWS_READ and row["constants"].get("WEIGHT", True)
    ]


def named(row: dict) -> str:
    constants = " ".join(f"{k}={v}" for k, v in row["constants"].items())
    return f"{row['kernel']} {constants} {row['dtypes']} {row['walk']} {row['arch']}"


def entries(row: dict) -> int:
    """What a program reads of one row in one block, or of several rows in one tile."""
    constants = row["constants"]
    if "TILE_ROWS" in constants:
        return constants["TILE_ROWS"] * constants["TILE_WIDTH"]
    return constants["WIDTH"] if "WIDTH" in constants else constants["BLOCK"]


def bytes_a_thread(row: dict) -> int:
    """What a thread reads of one row in one block."""
    return entries(row) * row["item_bytes"] // row["threads"]


def wide(row: dict, kind: str) -> int:
    """Bytes that a thread's code moves 16 at a time. Where AMD's 64 threads a warp leave a thread
    fewer than 16 of a row, or a short row does, all that it has at a time."""
    small = row["arch"] == "gfx942" or entries(row) <= 512
    least = min(16, bytes_a_thread(row)) if small else 16
    return sum(int(width) * n for width, n in row[kind].items() if int(width) >= least)


def narrow_rows(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        short = wide(row, "loads") < ROWS_READ[row["kernel"]] * bytes_a_thread(row)
        if row["kernel"].endswith(WRITERS):
            short |= wide(row, "stores") < bytes_a_thread(row)
        if short:
            found.append(f"{named(row)}: loads {row['loads']}, stores {row['stores']}")
    return found


def dtypes(rows: list[dict]) -> set[str]:
    return {dtype for row in rows for dtype in row["dtypes"]}


def test_report_is_complete(report, streaming, quick, archs):
    launched = {
        f"{file.stem}.{kernel}"
        for file in (ROOT / "palu_kernels/triton").glob("*.py")
        for kernel in re.findall(r"(\w+_kernel)\[", file.read_text())
    }
    for maker in MAKERS:
        own_archs = [arch for arch in maker if arch in archs]
        for kernel in ROWS_READ if own_archs else ():
            rows = [r for r in streaming if r["kernel"] == kernel and r["arch"] in own_archs]
            anywhere = "narrow" if kernel.startswith("gathered_matmul.") else "shifted"
            for walk in ("aligned", anywhere):
                on_walk = [r for r in rows if r["walk"] == walk]
                if quick:  # how wide a row is read depends on the bytes of an entry alone
                    assert dtypes(on_walk) >= {"fp32"} and dtypes(on_walk) & {"bf16", "fp16"}
                else:
                    assert dtypes(on_walk) == DTYPES, (kernel, walk)
            for arch in own_archs:
                own = [row for row in rows if row["arch"] == arch]
                assert dtypes(own) == DTYPES, (kernel, arch)
                assert {row["walk"] for row in own} >= {"aligned", anywhere}, (kernel, arch)
        for arch in own_archs:
            assert {row["kernel"] for row in report if row["arch"] == arch} == launched


def test_rows_of_one_block_and_of_several_are_walked(streaming):
    """By every walk, and with a softcap."""
    for kernel in {row["kernel"] for row in streaming if "shifted" in row["walk"]}:
        own = [row for row in streaming if row["kernel"] == kernel]
        lengths = {(row["walk"], max(row["columns"]) > 1000) for row in own}
        walks = ("aligned", "shifted", "unproven")
        several = {True} if kernel.startswith("topk.") else {True, False}
        assert lengths >= {(walk, long) for walk in walks for long in several}, kernel
        caps = {name: [row["signature"][name] for row in own] for name in own[0]["signature"]}
        for name, kinds in caps.items():
            assert not name.endswith("cap") or {"constexpr", "fp32"} <= {*kinds}, (kernel, name)


def test_everything_compiles(report):
    failed = [f"{named(row)}: {row['error']}" for row in report if "error" in row]
    assert not failed, "\n".join(failed)


def test_nothing_spills(run):
    status, report = run
    spilling = [f"{named(row)}: {row['spills']}" for row in report if row.get("spills")]
    assert not spilling, "\n".join(spilling)
    assert status == 0


def test_hot_loops_stay_within_their_bounds(report, archs):
    counted = {row["kernel"] for row in report if row["arch"] != "gfx942" and row["loop"]}
    if not counted:
        pytest.skip("Triton has brought no nvdisasm, so no loop of NVIDIA's was counted")
    assert counted >= set(instructions.BOUNDS)
    worse = [f"{named(row)} {instructions.over(row)}" for row in report if instructions.over(row)]
    assert not worse, "\n".join(worse)


def test_rows_are_read_and_written_wide(streaming):
    narrow = narrow_rows([row for row in streaming if row["walk"] in ("aligned", "shifted")])
    assert not narrow, "\n".join(narrow)


def test_rows_that_no_argument_calls_aligned_are_wide_too(streaming):
    # V is 8 more than a multiple of 16: such rows start on 16 bytes, but an integer argument is
    # known to the compiler only as a multiple of 16 or as nothing
    narrow = narrow_rows([row for row in streaming if row["walk"] == "unproven"])
    assert not narrow, "\n".join(narrow)
