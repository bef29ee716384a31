"""`python -m benchmarks run ops`: what it measures, its ratios, and what it says of its limits."""

import dataclasses
import faulthandler
import json
import re
from contextlib import redirect_stdout
from io import StringIO

import pytest

import benchmarks.__main__ as command
from benchmarks import bench_linear, bench_ops, declare, ops, runner, tables, worker
from benchmarks.declare import Case
from tests.support import ROOT

TINY = ["--vocab", "257", "--rows", "5", "--top-k", "9", "20", "--linear-rows", "5"]
TINY += ["--hidden", "24", "--calls", "2", "--linear-calls", "2", "--device", "cpu", "--cached"]


def row(provider, values, kernel="kl_reverse", metric="seconds"):
    case = Case(kernel, 1000, None, 30, None, "bfloat16")
    return tables.row(case._asdict(), provider, metric, [values], "ok", {})


def test_it_is_a_command():
    assert "ops" in command.scripts()


def test_every_script_of_the_readme_is_a_command():
    """`python -m benchmarks run NAME` takes each name that the README has in its first table."""
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    table = text.split("| script |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `([\w.]+)`", table, re.M))
    assert len(named) > 20 and named <= {*command.scripts()}, named - {*command.scripts()}


def test_every_operator_is_measured():
    measured = {}
    for benchmark, words in ops.parts(ops.options(["--device", "cpu"])):
        given = runner.options(benchmark, words)
        for case in runner.selected(benchmark, given):
            assert case not in measured and given.in_turns and given.threads is None
            measured[case] = list(runner.asked_for(benchmark, case, given))
    operators = {f"{name}{by}" for name in bench_ops.FORGET for by in ("", "_indices")}
    operators |= {"topk_indices", "kl_reverse", "kl_forward", "cross_entropy", *ops.LINEAR}
    sizes = {(V, dtype) for V in (32000, 128256) for dtype in ("float32", "bfloat16")}
    for operator in operators:
        own = [case for case in measured if case.kernel == operator]
        assert {(case.V, case.dtype) for case in own} == sizes
        ks = {case.k for case in own}
        wanted = {None} if "kl" in operator or "cross" in operator else {50, 1000}
        assert ks == ({1000} if operator.startswith("linear_flatten") else wanted)
        assert all(measured[case][0] == ops.OURS for case in own)
        others = set(measured[own[0]][1:])
        wanted = {"topk"} if operator == "topk_indices" else {"eager", "compile"}
        assert others == wanted | ({"torch", "products"} if "linear" in operator else set())
    assert {case.kernel for case in measured} == operators
    fewer = ops.options(["--device", "cpu", "--providers", "eager", "torch"])
    for benchmark, words in ops.parts(fewer):
        given = runner.options(benchmark, words)
        assert given.providers[0] == ops.OURS and "compile" not in given.providers


@pytest.mark.slow
def test_a_run(tmp_path, capsys, monkeypatch):
    """Both benchmarks leave their rows in one file; nothing is compiled, which takes long."""
    benchmarks = {f"benchmarks.{b.name}": b for b in (bench_ops.BENCHMARK, bench_linear.BENCHMARK)}

    def run_worker(module, task, threads, repo=None):
        with redirect_stdout(StringIO()) as printed:
            worker.work(benchmarks[module], json.loads(json.dumps(task)))
        for line in printed.getvalue().splitlines():
            number, result = json.loads(line)
            yield number, declare.Result(*result)

    monkeypatch.setattr(runner, "run_worker", run_worker)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **options: None)
    for benchmark in benchmarks.values():
        for them in benchmark.kernels.values():
            if "compile" in them:
                lacking = dataclasses.replace(them["compile"], lacks=lambda device: "no compiler")
                monkeypatch.setitem(them, "compile", lacking)
    path = tmp_path / "ops.csv"
    assert ops.main([*TINY, "--csv", str(path)]) == 0
    rows = tables.read(path)
    assert {row["status"] for row in rows if row["provider"] in ("palu", "eager", "topk")} == {"ok"}
    found = ops.ratios(rows)
    for case, own in found.items():
        if case.startswith("topk_indices"):
            others = {"topk"}
        else:
            others = {"eager", *(["products"] if case.startswith("linear") else [])}
            others |= {"torch"} if "linear_cross" in case else set()
        assert {name for name, _ in own} - {"torch"} == others - {"torch"}
        assert {kind for _, kind in own} == {"wall", "process"} and min(own.values()) > 0
    assert len(found) == 2 * (2 * (1 + 6) + 3 + 6)  # dtypes, k
    said = capsys.readouterr().out
    assert f"of {len(found) - 4} rows above 1.00 of eager (wall time)" in said
    assert ops.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() in said


def test_ratios_are_of_neighbours():
    """The median over rounds, not of medians: both sides of a round share what the machine did."""
    rows = [row("palu", [1.0, 20.0, 3.0]), row("eager", [2.0, 10.0, 6.0])]
    rows += [row("compile", [1.0])]  # another number of rounds: no neighbours
    rows += [row(name, [v], metric="cpu_seconds") for name, v in (("palu", 3.0), ("eager", 2.0))]
    (own,) = ops.ratios(rows).values()
    assert own == {("eager", "wall"): 0.5, ("eager", "process"): 1.5}


def test_what_is_above_a_limit_is_named():
    rows = [row("palu", [1.2]), row("eager", [1.0]), row("compile", [1.1])]
    rows += [row(name, [v], kernel="cross_entropy") for name, v in (("palu", 1.0), ("eager", 1.0))]
    trained = "linear_cross_entropy_trained"
    for kernel in (trained, "linear_cross_entropy"):
        rows += [row("palu", [1.3], kernel=kernel), row("products", [1.0], kernel=kernel)]
    said = ops.table(rows)
    label = "kl_reverse V=1000 rows=30 bfloat16"
    assert f"1 of 2 rows above 1.00 of eager (wall time); {label} 1.20" in said
    assert "0 of 1 rows above 1.10 of compile (wall time)" in said
    assert "1 of 1 rows above 1.15 of products (wall time); linear_cross_entropy_trained" in said
    assert "process time" not in said
    assert "1.20 / -" in said  # of eager, in wall time alone


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        ops.options(["--vocab", "5", "7", "--rows", "3"])
    assert "--rows has 1 numbers; it must have one for each of --vocab" in capsys.readouterr().err
