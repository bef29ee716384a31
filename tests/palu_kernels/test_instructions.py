"""Instructions of a hot loop are counted along its main path."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.static import instructions, machine_code, predict

ROOT = Path(__file__).parents[2]
# predicted at most for 4,096 rows of 128,256 in bfloat16 on an H100 with Triton 3.6
MILLISECONDS = {"cross-entropy": 1.09, "kl": 1.78}

# a block inside a row is loaded whole, one at its end under a mask; a rare branch lies behind
SASS = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/              @!P3 LDG.E.128 R4, desc[UR10][R2.64] ;
        /*0030*/              @!P3 BRA `(.L_x_1) ;
        /*0040*/               @P2 LDG.E.U16 R4, desc[UR10][R2.64] ;
        /*0050*/               @P2 LDG.E.U16 R5, desc[UR10][R2.64+0x2] ;
.L_x_1:
        /*0060*/                   FMNMX R2, R8, R3, !PT ;
        /*0070*/                   MUFU.EX2 R8, R8 ;
        /*0080*/                   IMAD.U32 R8, R8, 0x10000, RZ ;
        /*0090*/                   NOP ;
        /*00a0*/               @P1 BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/                   STG.E.64 desc[UR10][R2.64], R8 ;
        /*00c0*/                   UIADD3 UR8, UR4, 0x1000, URZ ;
        /*00d0*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*00e0*/                   EXIT ;
.L_x_2:
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0100*/                   SHFL.BFLY PT, R7, R21, 0x10, 0x1f ;
        /*0110*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*0120*/                   BRA `(.L_x_5);
"""
AMD = """
kernel:
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[2:5], v9, s[4:7], 0 offen
\ts_waitcnt vmcnt(0)
\tv_exp_f32_e32 v2, v2
\tv_add_f32_e32 v2, v2, v3
\tv_max_f32_e32 v2, v2, v3
\tds_write_b32 v2, v3
\ts_barrier
\ts_cbranch_scc0 .LBB0_1
.LBB0_2:
\ts_endpgm
"""


def test_main_path_of_nvidia(monkeypatch):
    monkeypatch.setattr(machine_code, "sass", lambda cubin: SASS)
    monkeypatch.setattr(machine_code, "disassembler", lambda: "nvdisasm")
    loop = machine_code.hot_loop(SimpleNamespace(asm={"cubin": b""}), True)
    assert (loop.least, loop.most, loop.bytes, loop.barriers) == (9, 12, 16 + 8, 1)
    assert loop.pipes == {"alu": 1, "fma": 1, "xu": 1, "lsu": 2, "other": 4}
    an_entry = loop.an_entry(2)
    assert (an_entry["least"], an_entry["bytes"], an_entry["barriers"]) == (4.5, 12, 1)
    assert an_entry["clocks"] == pytest.approx(4.5 / 128, abs=1e-4)  # issue: MUFU waits for less


def test_main_path_of_amd():
    loop = machine_code.hot_loop(SimpleNamespace(asm={"amdgcn": AMD}), False)
    assert (loop.least, loop.most, loop.bytes, loop.barriers) == (7, 7, 16, 1)
    assert loop.pipes == {"alu": 1, "fma": 1, "xu": 1, "lsu": 2, "other": 2}


def test_without_a_disassembler_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(machine_code, "disassembler", lambda: None)
    assert machine_code.hot_loop(SimpleNamespace(asm={"cubin": b""}), True) is None


def row_of(kernel: str, least: float, **constants: object) -> dict:
    loop = {"least": least, "barriers": 0}
    parts = {"constants": {"BLOCK": 4096, **constants}, "threads": 256, "arch": "sm_90"}
    cap = "constexpr" if "cap" in constants else "fp32"
    parts |= {"signature": {"z": "*bf16", "cap": cap}, "dtypes": ["bf16"], "loads": {}}
    return {"kernel": kernel, "loop": loop, "registers": 32, "spills": 0, **parts}


def test_bounds():
    kernel = "cross_entropy._ce_stats_kernel"
    plain, softcap, _ = instructions.BOUNDS[kernel]
    assert instructions.over(row_of(kernel, plain, cap=None)) is None
    assert "at most" in instructions.over(row_of(kernel, plain + 0.1, cap=None))
    assert instructions.over(row_of(kernel, softcap)) is None
    assert "at most" in instructions.over(row_of(kernel, softcap + 0.1))
    assert "no bound" in instructions.over(row_of("a_new.one", 1))


def launch_of(kernel: str, rows: int, columns: int, **constants: object) -> tuple:
    variant = SimpleNamespace(kernel=kernel, named=constants, signature={})
    return variant, (rows, 1), columns


def test_a_prediction_is_the_longer_of_bytes_and_clocks():
    card = predict.CARDS["H100"]
    place = (card.arch, "kl_div._kl_stats_kernel", "BLOCK=4096")
    launch = launch_of(place[1], 4096, 128256, BLOCK=4096, n_cols=1)
    moved = {place: {"clocks": "0.1", "bytes": "4.0"}}
    seconds = predict.seconds(card, launch, moved)
    assert seconds == pytest.approx(4 * 4096 * 128256 / card.bandwidth + predict.LAUNCH)
    busy = {place: {"clocks": "1.0", "bytes": "4.0"}}
    clocks = 4096 * 128256 / card.multiprocessors / predict.REACHED
    assert predict.seconds(card, launch, busy) == pytest.approx(clocks / card.hertz, rel=1e-2)
    assert predict.seconds(card, launch_of("kl_div._kl_combine_kernel", 9, 0), {}) == predict.LAUNCH
    assert predict.cell(card, [launch], 0, {}) == "-"


def test_predictions_follow_from_the_committed_table():
    """In a process of its own: the interpreter, which the tests run under, records no launch."""
    command = [sys.executable, "-m", "benchmarks.static.predict", "--columns", "128256"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PALU_"))}
    done = subprocess.run(
        [*command, "--rows", "4096", "--versions", "3.6.0"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cells = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    for name, most in MILLISECONDS.items():
        floor, predicted = (int(cells[name][at]) for at in (6, 7))  # of the H100
        assert floor < predicted < most * 1000
