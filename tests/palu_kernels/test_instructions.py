"""Instructions of a hot loop are counted along its main path."""

from types import SimpleNamespace

import pytest

from benchmarks.static import instructions, machine_code

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
    parts |= {"signature": {"z": "*bf16", "cap": "fp32"}, "dtypes": ["bf16"], "loads": {}}
    return {"kernel": kernel, "loop": loop, "registers": 32, "spills": 0, **parts}


def test_bounds():
    kernel = "cross_entropy._ce_stats_kernel"
    plain, softcap, _ = instructions.BOUNDS[kernel]
    assert instructions.over(row_of(kernel, plain, cap=None)) is None
    assert "at most" in instructions.over(row_of(kernel, plain + 0.1, cap=None))
    assert instructions.over(row_of(kernel, softcap)) is None
    assert "at most" in instructions.over(row_of(kernel, softcap + 0.1))
    assert "no bound" in instructions.over(row_of("a_new.one", 1))
