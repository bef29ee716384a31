"""Parts of the run on a GPU, on CPU tensors under the interpreter: what is found, timed, chosen."""

import argparse

import pytest
import torch

from benchmarks import gpu_kernels, tables
from benchmarks.gpu_kernels import Part, noted, operator_call, rows_of
from palu_kernels import tuned
from palu_kernels.tuned import Settings, Walk

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands for the card")


@pytest.fixture
def part(tmp_path):
    given = {"tiny": True, "seconds": 600, "device": "cpu", "csv": tmp_path / "rows.csv"}
    given |= {"commit": "abc", "tuned": tmp_path / "tuned" / "sm_90.json"}
    return Part(argparse.Namespace(**given))


def test_launches_are_noted_and_made_again():
    V, N = 5000, 2
    given = rows_of("random", V, N, 9, CPU)
    with tuned.trying(None) as walks, noted(walks) as launches:
        operator_call("kl_reverse", given, 9)()
    walked = [one for one in launches if "BLOCK" in one.options]
    assert len(walked) >= 2 and all(one.name.startswith("_") for one in launches)
    assert {(one.walk.reads, one.walk.writes) for one in walked} == {(2, 0), (2, 1)}
    row = N * V * 2
    weighs = sorted(one.bytes for one in walked)
    assert weighs[0] >= 2 * row and 3 * row <= weighs[-1] < 3 * row + 1000
    written = next(t for t in reversed(walked[-1].arguments) if getattr(t, "shape", ()) == (N, V))
    before = written.clone()
    written.zero_()
    walked[-1].again()
    assert torch.equal(written, before) and before.abs().sum() > 0
    with noted() as launches:
        pass
    operator_call("cross_entropy", given, 9)()
    assert launches == []  # nothing is noted after the block


@pytest.mark.parametrize("name", gpu_kernels.FLOORS)
def test_every_operator_launches_kernels(name):
    with noted() as launches:
        operator_call(name, rows_of("level", 300, 2, 9, CPU), 9)()
    assert launches


def test_kernels(part, capsys, monkeypatch):
    sizes = part.sizes._replace(kernels=[(300, 2)], operators=("cross_entropy",))
    part.sizes = sizes
    gpu_kernels.kernels(part)
    part.write()
    said = capsys.readouterr().out
    assert "V = 300, N = 2" in said and "cross_entropy:" in said and not part.late
    rows = tables.read(part.given.csv)
    by = {row["provider"]: row["p50"] for row in rows if row["kernel"] == "cross_entropy"}
    alone = [one for name, one in by.items() if name.startswith("_")]
    assert by["kernels"] == pytest.approx(sum(alone)) and by["floor"] > 0


def test_a_part_ends_in_time(part):
    part.end = 0
    for name in ("kernels", "sweep", "loops", "head"):
        part.late = False
        gpu_kernels.PARTS[name](part)
        assert part.late


def test_the_sweep_keeps_what_is_fastest(part, monkeypatch, capsys):
    """Times are made up: 1 microsecond an entry of a block, so the smallest block is best."""

    def seconds(clock, call, calls=7):
        return [call.__self__.options["BLOCK"] * 1e-6]

    monkeypatch.setattr(gpu_kernels.Clock, "seconds", seconds)
    gpu_kernels.sweep(part)
    part.write()
    found = dict(tuned.read(part.given.tuned))
    walks = {(walk.reads, walk.writes) for walk in found}
    assert walks == {(2, 0), (2, 1)}
    assert {(w.columns, w.rows, w.bytes) for w in found} == {(5000, 2, 2)}
    assert set(found.values()) == {Settings(256, 4, 2)}
    assert "block=256" in capsys.readouterr().out
    settings = {row["setting"] for row in tables.read(part.given.csv)}
    assert settings == {"default", "block=256 warps=4 programs=2", "block=1024 warps=4 programs=2"}


def test_the_best_is_that_of_all_kernels_of_a_walk():
    walk, a, b = Walk(1, 0, 2, 5000, 2), Settings(256, 4, 2), Settings(1024, 4, 2)
    times = {None: {"x": 1.0, "y": 4.0}, a: {"x": 0.5, "y": 6.0}, b: {"x": 0.9, "y": 2.0}}
    entry = gpu_kernels._best(walk, times)
    assert entry["block"] == 1024 and entry["of_default"] == 0.7
    refused = times | {b: {"x": 0.1}}  # y does not run under it
    assert gpu_kernels._best(walk, refused)["block"] == 256


def test_ways_to_make_the_gradient_agree():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (
        torch.randn(*shape, generator=generator) for shape in ((5, 16), (257, 16), (5, 257))
    )
    ways = gpu_kernels.ways(hidden, weight, grad)
    one = ways["one product"]()
    torch.testing.assert_close(one, grad.t() @ hidden)
    torch.testing.assert_close(ways["accumulator"](), one)
    assert ways["loss"]()[1].shape == ways["products"]()[1].shape == weight.shape
