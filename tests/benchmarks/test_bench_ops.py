"""`bench_ops` and `bench_linear` run on tiny sizes, their providers agree, a wrong one is found."""

import dataclasses
import sys

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import bench_linear, bench_ops, declare, runner, tables
from benchmarks.declare import Call, Case, Provider
from benchmarks.providers import differentiated, untied

OPS = ["--vocab", "1003", "--rows", "5", "--top-k", "20"]
TOP_K = ["--vocab", "1003", "257", "--rows", "3", "--top-k", "1", "50", "257"]
TOP_K += ["--kernels", bench_ops.TOP_K]
LINEAR = ["--vocab", "257", "--rows", "5", "70", "--hidden", "24", "--top-k", "20"]
ONCE = ["--calls", "1", "--repeats", "1"]


@pytest.fixture
def run(in_process, tmp_path):
    def run(module, *options, benchmark=None, **given):
        sizes = OPS if module is bench_ops else LINEAR
        benchmark = benchmark or module.BENCHMARK
        return in_process(benchmark, tmp_path / "rows.csv", *sizes, *ONCE, *options, **given)

    return run


def without_compile(benchmark):
    """Compiling takes long: a test of its own does it."""
    names = {name for them in benchmark.kernels.values() for name in them} - {"compile"}
    return ["--providers", *sorted(names)]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (bench_ops, ["--dtype", "float32", "float16", "--kernels", *bench_ops.LOSSES]),
        (bench_ops, [*TOP_K, "--dtype", "float32", "bfloat16"]),
        pytest.param(
            bench_linear,
            ["--dtype", "float32", "bfloat16", "--together", "--kernels", *bench_linear.KERNELS],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ops", "topk", "linear"],
)
def test_smoke(module, options, run, tmp_path, capsys):
    drawn = "--vocab" in options  # curves over few sizes, as every panel takes long
    options = [*options, *without_compile(module.BENCHMARK)]
    status, rows = run(module, *options, pictures=drawn)
    assert not {row["status"] for row in rows if declare.is_bad(row["status"])} and status == 0
    kernels = [name for name in options if name in module.BENCHMARK.kernels]
    for kernel in kernels:
        there = {row["provider"] for row in rows if row["kernel"] == kernel}
        assert there == set(module.BENCHMARK.kernels[kernel]) - {"compile"}
    for row in rows:
        if row["provider"] in ("palu", "eager", "palu sparse", "palu dense", "sort"):
            assert row["status"] == "ok"
        if row["metric"].endswith("_error") and row["dtype"] == "float32":
            assert row["p50"] < 3e-6
        if row["metric"] == "seconds" and row["status"] == "ok":
            assert row["p50"] > 0
    dtypes = {row["dtype"] for row in rows}
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(dtypes) == 2
    assert pictures == (sorted(f"rows-{dtype}.png" for dtype in dtypes) if drawn else [])
    assert "of palu" in capsys.readouterr().out


def selected(module, *options):
    return runner.selected(module.BENCHMARK, runner.options(module.BENCHMARK, options))


def test_sizes_are_swept_one_at_a_time():
    sizes = ["--vocab", "257", "515", "--rows", "5", "70", "--top-k", "20", "1", "257"]
    options = [*sizes, "--hidden", "24", "--dtype", "float32"]
    cases = selected(bench_linear, *options)
    base = Case("linear_flatten", 257, 24, 5, 20, "float32")
    changes = [{"rows": 70}, {"V": 515}, {"k": 1}, {"k": 257}]
    wanted = {base, *(base._replace(**change) for change in changes)}
    assert {case for case in cases if case.kernel == "linear_flatten"} == wanted
    assert len([case for case in cases if case.kernel == "linear_kl_reverse"]) == 3
    grid = selected(bench_linear, *options, "--grid")
    assert len([case for case in grid if case.kernel == "linear_flatten"]) == 12
    cases = selected(bench_ops, *TOP_K, "--top-k", "258", "--dtype", "float32")
    assert [case.V for case in cases] == [1003]
    default = {(case.V, case.rows, case.k) for case in selected(bench_ops)}
    assert default == {(128256, 128, 1000), (128256, 128, None)}


def test_nothing_to_measure(capsys):
    for options in (["--top-k", "999"], ["--kernels", "linear_kl_reverse"]):
        given = ["--vocab", "99", "--providers", "palu sparse", *options]
        with pytest.raises(SystemExit):
            bench_linear.main(given)
        assert "leave nothing to measure" in capsys.readouterr().err


@pytest.mark.parametrize("module", [bench_ops, pytest.param(bench_linear, marks=pytest.mark.slow)])
def test_compiled(module, run):
    kernel = "kl_reverse" if module is bench_ops else "linear_kl_reverse"
    sizes = ["--rows", "5", "--vocab", "257", "--dtype", "bfloat16"]
    status, rows = run(module, "--kernels", kernel, "--providers", "compile", *sizes)
    assert status == 0 and rows[0]["status"] in ("ok", "no C++ compiler")


def test_three_rows_of_many_are_compared(monkeypatch):
    from benchmarks import providers

    monkeypatch.setattr(providers, "ALL_ROWS", 5000)
    case = Case("linear_cross_entropy_trained", 257, 16, 70, None, "float32")
    given = bench_linear.make_inputs(case, torch.device("cpu"))
    truth = bench_linear.BENCHMARK.truth(case, given)
    assert truth.keys() == {"gradient", "rows"} and len(truth["gradient"]) == 3
    outputs = differentiated(bench_linear.palu, case, given).run()
    assert declare.relative_errors(case, given, outputs, truth)["gradient"] < 1e-5
    outputs["gradient"][-1] *= 1.1
    assert declare.relative_errors(case, given, outputs, truth)["gradient"] > 0.04


# ---- what is wrong is found ----------------------------------------------------------------------


def changed(module, **changes):
    """Another computation: the definition of another case or of other inputs."""

    def loss(case, given):
        names = {name: value for name, value in changes.items() if name in case._fields}
        other = {name: f(getattr(given, name)) for name, f in changes.items() if callable(f)}
        case = case._replace(**{name: f for name, f in names.items() if not callable(f)})
        return module.eager(case, given._replace(**other))

    return loss


def flip(tensor):
    return tensor.flip(0)


def no_gradient_of_the_head(case, given):
    detached = given._replace(head=given.head.detach())
    return bench_linear.eager(case, detached) + 0 * given.head.weight.sum()


@pytest.mark.parametrize(
    ("module", "kernel", "loss"),
    [
        (bench_ops, "flatten", changed(bench_ops, k=19)),
        (bench_ops, "kl_forward", changed(bench_ops, kernel="kl_reverse")),
        (bench_ops, "cross_entropy", changed(bench_ops, labels=flip)),
        (bench_linear, "linear_flatten", changed(bench_linear, indices=flip)),
        (bench_linear, "linear_kl_reverse", changed(bench_linear, ref_hidden=flip)),
        (
            bench_linear,
            "linear_kl_softcap",
            changed(bench_linear, head=lambda head: bench_linear.LMHead(head.weight)),
        ),
        (bench_linear, "linear_cross_entropy_trained", no_gradient_of_the_head),
    ],
)
def test_another_computation_is_found(module, kernel, loss, run):
    provider = Provider(lambda case, given: differentiated(loss, case, given))
    benchmark = replaced(module, kernel, provider)
    options = ["--kernels", kernel, "--providers", "palu", "eager"]
    status, rows = run(
        module, *options, "--dtype", "float32", "bfloat16", "--together", benchmark=benchmark
    )
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
    def make(case, given):
        indices = bench_ops.topk_indices(given.ref_logits, case.k)
        return Call(lambda: {order: spoil(indices).clamp(min=0)})

    benchmark = replaced(bench_ops, bench_ops.TOP_K, Provider(make))
    options = [*TOP_K, "--top-k", "50", "--providers", "palu", "--dtype", "float32"]
    status, rows = run(bench_ops, *options, benchmark=benchmark)
    assert status == 1 and rows[0]["status"].startswith("wrong: rows off by")


@pytest.mark.parametrize(
    ("scores", "indices", "wrong"),
    [
        ([1.0, 3.0, 1.0, 0.0], [2, 1], {"any order": 0, "exact": 1}),  # ties by another rule
        ([3.0, 3.0, 1.0, 0.0], [0, 0], {"any order": 1, "exact": 1}),  # an index twice
    ],
)
def test_ties_by_another_rule_are_found_where_the_rule_is_promised(scores, indices, wrong):
    case = Case(bench_ops.TOP_K, 4, None, 1, 2, "float32")
    given = bench_ops.Inputs(*[torch.tensor([scores])] * 4)
    truth = bench_ops.truth(case, given)
    for order, share in wrong.items():
        found = torch.tensor([sorted(indices) if order == "exact" else indices])
        assert bench_ops.errors(case, given, {order: found}, truth) == {"rows": share}


def test_untied_rows_have_one_s():
    rows = torch.randn(5, 999, generator=torch.Generator().manual_seed(0)).round().bfloat16()
    values = untied(rows, 50).sort(dim=-1, descending=True).values
    assert (values[:, 49] > values[:, 50]).all()
    assert (rows.sort(dim=-1, descending=True).values[:, 49:51].diff() == 0).all()
    assert untied(rows, 999).isfinite().all() and untied(rows, None) is rows


def replaced(module, kernel, provider):
    """The benchmark with another provider in the place of `palu`."""
    kernels = module.BENCHMARK.kernels
    own = {**kernels, kernel: {**kernels[kernel], "palu": provider}}
    return dataclasses.replace(module.BENCHMARK, kernels=own)


def test_a_head_that_trains_takes_its_mean_row_anew(monkeypatch):
    made = []
    original = bench_linear.LMHead.mean_row

    def mean_row(head):
        made.append(head)
        return original(head)

    monkeypatch.setattr(bench_linear.LMHead, "mean_row", mean_row)
    for kernel in ("linear_flatten", "linear_flatten_trained"):
        case = Case(kernel, 257, 16, 5, 9, "float32")
        given = bench_linear.make_inputs(case, torch.device("cpu"))
        for _ in range(2):
            bench_linear.palu(case, given, "sparse")
    frozen, trained = made[:2], made[2:]
    assert frozen[0] is frozen[1] and trained[0] is not trained[1]


# ---- the command ---------------------------------------------------------------------------------


def test_list(capsys):
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("bench_ops", "bench_linear", "bench_loss", "bench_train_step", "static.traffic"):
        assert any(line.startswith(name) for line in lines)
    assert not any(line.startswith(("runner", "__main__")) for line in lines)


def test_run_plot_compare(tmp_path, capsys, monkeypatch):
    """As a user runs it: what is measured, in a process of its own."""
    path = tmp_path / "topk.csv"
    words = ["run", "bench_ops", *TOP_K, "--vocab", "257", "--top-k", "5", "--dtype", "float32"]
    words += ["--providers", "palu", *ONCE, "--threads", "1", "--device", "cpu", "--together"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["benchmarks"])  # which `run` replaces
        patch.delitem(sys.modules, "benchmarks.bench_ops")  # runpy warns of what is there
        command.main([*words, "--csv", str(path)])
    assert ended.value.code == 0
    assert "topk_indices V=257 rows=3 k=5 float32" in capsys.readouterr().out
    rows = tables.read(path)
    assert {row["provider"] for row in rows} == {"palu"}
    assert all(int(row["threads"]) == 1 for row in rows)
    assert command.main(["plot", str(path)]) == 0
    assert "of palu" in capsys.readouterr().out
    assert command.main(["compare", str(path), str(path)]) == 0
    slower = [
        row | {q: row[q] * 2 for q in tables.QUANTILES if row["metric"] == "seconds"}
        for row in rows
    ]
    tables.write(tmp_path / "slower.csv", slower)
    assert command.main(["compare", str(path), str(tmp_path / "slower.csv")]) == 1
    assert capsys.readouterr().out.count("worse") == 1
    with pytest.raises(SystemExit):
        command.main(["compare", str(path), str(tmp_path / "none.csv")])
    assert "none.csv" in capsys.readouterr().err
