"""Every declared script runs on tiny sizes, its providers agree, and a wrong one is found."""

import csv
import subprocess
import sys

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import bench_linear as scaling
from benchmarks import bench_ops as logits_ops
from benchmarks import runner as harness
from benchmarks import suite, topk
from benchmarks import tables as report
from benchmarks.definitions import untied
from benchmarks.suite import Case, Provider

SIZES = {
    logits_ops: ["--vocab", "1003", "--rows", "5", "--top-k", "20"],
    topk: ["--vocab", "1003", "257", "--rows", "3", "--k", "1", "50", "257"],
    scaling: ["--vocab", "257", "--rows", "5", "70", "--hidden", "24", "--top-k", "20"],
}
COMMON = ["--calls", "1", "--repeats", "1", "--threads", "1", "--device", "cpu"]
DTYPES = {logits_ops: ["float32", "float16"]}  # of the smoke runs
WITHOUT_COMPILE = {
    script: [
        *("--providers",),
        *dict.fromkeys(
            name
            for providers in script.BENCHMARK.kernels.values()
            for name in providers
            if name != "compile"
        ),
    ]
    for script in SIZES
}


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`main` of a script without processes -> (exit status, rows)."""

    def run(script, *options, benchmark=None):
        benchmark = benchmark or script.BENCHMARK
        monkeypatch.setattr(
            harness, "run_worker", lambda module, task, threads: suite.work(benchmark, task)
        )
        path = tmp_path / "rows.csv"
        given = [*SIZES[script], *COMMON, "--csv", str(path), *options]
        return suite.main(benchmark, given), read(path)

    return run


@pytest.mark.parametrize("script", SIZES, ids=lambda s: s.BENCHMARK.name)
def test_smoke(script, run, tmp_path, capsys):
    dtypes = DTYPES.get(script, ["float32", "bfloat16"])
    status, rows = run(script, "--dtype", *dtypes, *WITHOUT_COMPILE[script])
    wrong = {row["status"] for row in rows if row["status"].startswith(("wrong", "failed"))}
    assert not wrong and status == 0
    kernels = {(row["kernel"], row["dtype"]) for row in rows if row["metric"] == "seconds"}
    assert len(kernels) == 2 * len(script.BENCHMARK.kernels)
    for kernel, providers in script.BENCHMARK.kernels.items():
        there = {row["provider"] for row in rows if row["kernel"] == kernel}
        assert there == set(providers) - {"compile"}
    for row in rows:
        if row["provider"] in ("palu", "eager", "palu sparse", "palu dense", "sort"):
            assert row["status"] == "ok"
        if row["metric"].endswith("_error") and row["dtype"] == "float32":
            assert float(row["p50"]) < 3e-6
        if row["metric"] == "seconds" and row["status"] == "ok":
            assert float(row["p50"]) > 0
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == sorted(f"rows-{dtype}.png" for dtype in dtypes)
    assert "of palu" in capsys.readouterr().out


def test_sizes_are_swept_one_at_a_time():
    sizes = ["--vocab", "257", "515", "--rows", "5", "70", "--top-k", "20", "1", "257"]
    options = [*sizes, "--hidden", "24", "--dtype", "float32"]
    cases = suite.selected(scaling.BENCHMARK, suite.options(scaling.BENCHMARK, options))
    base = Case("linear_flatten", 257, 24, 5, 20, "float32")
    sizes = [{"rows": 70}, {"V": 515}, {"k": 1}, {"k": 257}]
    wanted = {base, *(base._replace(**size) for size in sizes)}
    assert {case for case in cases if case.kernel == "linear_flatten"} == wanted
    assert len([case for case in cases if case.kernel == "linear_kl_reverse"]) == 3
    given = suite.options(topk.BENCHMARK, [*SIZES[topk], "--k", "258", "--dtype", "float32"])
    assert [case.V for case in suite.selected(topk.BENCHMARK, given)] == [1003]


def test_nothing_to_measure(capsys):
    for options in (["--top-k", "999"], ["--kernels", "linear_kl_reverse"]):
        given = ["--vocab", "99", "--providers", "palu sparse", *options]
        with pytest.raises(SystemExit):
            scaling.main(given)
        assert "leave nothing to measure" in capsys.readouterr().err


@pytest.mark.parametrize("script", [logits_ops, pytest.param(scaling, marks=pytest.mark.slow)])
def test_compiled(script, run):
    kernel = "kl_reverse" if script is logits_ops else "linear_kl_reverse"
    sizes = ["--rows", "5", "--vocab", "257", "--dtype", "bfloat16"]
    status, rows = run(script, "--kernels", kernel, "--providers", "compile", *sizes)
    assert status == 0 and rows[0]["status"] in ("ok", "no C++ compiler")


# ---- what is wrong is found ----------------------------------------------------------------------


def other_k(find):
    return lambda case, given: find(case._replace(k=case.k - 1), given)


def other_rows(case, given):
    return given._replace(ref_hidden=given.ref_hidden.flip(0))


@pytest.mark.parametrize(
    ("script", "kernel", "loss"),
    [
        (logits_ops, "flatten", other_k(logits_ops.eager)),
        (
            logits_ops,
            "kl_forward",
            lambda c, g: logits_ops.eager(c._replace(kernel="kl_reverse"), g),
        ),
        (
            logits_ops,
            "cross_entropy",
            lambda c, g: logits_ops.eager(c, g._replace(labels=g.labels.flip(0))),
        ),
        (
            scaling,
            "linear_flatten",
            lambda c, g: scaling.eager(c, g._replace(indices=g.indices.flip(0))),
        ),
        (scaling, "linear_kl_reverse", lambda c, g: scaling.eager(c, other_rows(c, g))),
        (
            scaling,
            "linear_kl_softcap",
            lambda c, g: scaling.eager(c, g._replace(head=scaling.LMHead(g.head.weight))),
        ),
        (
            scaling,
            "linear_cross_entropy_trained",
            lambda c, g: (
                scaling.eager(c, g._replace(head=g.head.detach())) + 0 * g.head.weight.sum()
            ),
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_computation_is_found(script, kernel, loss, dtype, run):
    provider = Provider(lambda case, given: logits_ops.differentiated(loss, case, given))
    benchmark = replaced(script, kernel, provider)
    options = ["--kernels", kernel, "--providers", "palu", "eager", "--dtype", dtype]
    status, rows = run(script, *options, benchmark=benchmark)
    assert status == 1
    assert {r["status"].split(":")[0] for r in rows if r["provider"] == "palu"} == {"wrong"}
    assert {r["status"] for r in rows if r["provider"] == "eager"} == {"ok"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda exact: exact.flip(0),
        lambda exact: exact[:, :-1],
        lambda exact: exact.where(exact != exact[:, :1], exact[:, -1:]),  # one of them twice
        lambda exact: exact - 1,
    ],
)
@pytest.mark.parametrize("order", ["exact", "any order"])
def test_other_indices_are_found(spoil, order, run):
    def make(case, scores):
        found = topk.topk_indices(scores, case.k)
        return suite.Call(lambda: {order: spoil(found).clamp(min=0)})

    benchmark = replaced(topk, topk.KERNEL, Provider(make))
    options = ["--vocab", "257", "--k", "50", "--providers", "palu", "--dtype", "float32"]
    status, rows = run(topk, *options, benchmark=benchmark)
    assert status == 1 and rows[0]["status"].startswith("wrong: rows off by")


def test_ties_by_another_rule_are_found_where_the_rule_is_promised():
    case = Case(topk.KERNEL, 4, None, 1, 2, "float32")
    scores = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    truth = topk.truth(case, scores)
    last = torch.tensor([[2, 1]])
    assert topk.errors(case, scores, {"any order": last}, truth) == {"rows": 0}
    assert topk.errors(case, scores, {"exact": last.sort(-1).values}, truth) == {"rows": 1}


def test_an_index_twice_is_found():
    case = Case(topk.KERNEL, 4, None, 1, 2, "float32")
    scores = torch.tensor([[3.0, 3.0, 1.0, 0.0]])
    found = {"any order": torch.tensor([[0, 0]])}
    assert topk.errors(case, scores, found, topk.truth(case, scores)) == {"rows": 1}


def test_untied_rows_have_one_s():
    rows = torch.randn(5, 999, generator=torch.Generator().manual_seed(0)).round().bfloat16()
    values = untied(rows, 50).sort(dim=-1, descending=True).values
    assert (values[:, 49] > values[:, 50]).all()
    assert (rows.sort(dim=-1, descending=True).values[:, 49:51].diff() == 0).all()
    assert untied(rows, 999).isfinite().all() and untied(rows, None) is rows


def replaced(script, kernel, provider):
    """The script's benchmark with another provider in the place of ``palu``."""
    kernels = script.BENCHMARK.kernels
    own = {**kernels, kernel: {**kernels[kernel], "palu": provider}}
    return type(script.BENCHMARK)(**{**vars(script.BENCHMARK), "kernels": own})


# ---- the command ---------------------------------------------------------------------------------


def test_list(capsys):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("bench_ops", "topk", "bench_loss", "bench_train_step", "static.traffic"):
        assert any(line.startswith(name) for line in out.splitlines())
    assert "harness" not in out and "__main__" not in out


def test_run_plot_compare(tmp_path, capsys):
    """In processes of their own, as a user runs it."""
    path = tmp_path / "topk.csv"
    words = ["run", "topk", "--vocab", "257", "--rows", "3", "--k", "5", "--dtype", "float32"]
    words += ["--providers", "palu", *COMMON, "--csv", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=harness.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "topk_indices V=257 rows=3 k=5 float32" in done.stdout
    rows = report.read(path)
    assert {row["provider"] for row in rows} == {"palu"}
    assert all(int(row["threads"]) == 1 for row in rows)
    assert command.main(["plot", str(path)]) == 0
    assert "of palu" in capsys.readouterr().out
    assert command.main(["compare", str(path), str(path)]) == 0
    slower = tmp_path / "slower.csv"
    with slower.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, suite.COLUMNS)
        writer.writeheader()
        for row in rows:
            twice = {q: row[q] * 2 for q in report.QUANTILES} if row["metric"] == "seconds" else {}
            writer.writerow(row | twice)
    assert command.main(["compare", str(path), str(slower)]) == 1
    assert capsys.readouterr().out.count("worse") == 1
    with pytest.raises(SystemExit):
        command.main(["compare", str(path), str(tmp_path / "none.csv")])
    assert "none.csv" in capsys.readouterr().err
