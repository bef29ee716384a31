"""All providers of `bench_loss` compute the same; one that does not is found."""

import dataclasses
import functools

import pytest
import torch

from benchmarks import bench_loss, providers, runner, tables
from benchmarks.bench_loss import FORGET_LOSS, LOSS, Losses, make_batch, make_labels
from benchmarks.declare import Case
from benchmarks.providers import released_terms
from palu import PALULoss, token_roles
from palu_kernels import kl_loss

SIZES = {"vocab": 1003, "hidden": 24, "positions": 160, "forget": 19, "preserve": 71, "top-k": 20}
OPTIONS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
CASE = Case(LOSS, 1003, 24, 160, 20, "float32", "batch=8 forget=19 preserve=71")
CPU = torch.device("cpu")


@pytest.fixture
def run(in_process, tmp_path):
    def run(*options, kernels=bench_loss.KERNELS):
        benchmark = dataclasses.replace(bench_loss.BENCHMARK, kernels=kernels)
        given = [*OPTIONS, "--calls", "1", "--repeats", "1", "--together", *options]
        return in_process(benchmark, tmp_path / "rows.csv", *given)

    return run


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_providers_agree(backend, run, capsys, monkeypatch):
    """C++ takes long to make and is test_bench_ops.py's; what Dynamo traces for it is run here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    bench_loss._compiled.cache_clear()
    status, rows = run()
    bench_loss._compiled.cache_clear()
    assert status == 0
    assert {row["provider"] for row in rows} == set(bench_loss.KERNELS[LOSS])
    by = {(row["dtype"], row["provider"], row["metric"]): row for row in rows}
    for dtype in ("float32", "bfloat16"):
        absent = by.pop((dtype, "liger", "seconds"))
        assert absent["status"] in ("needs a GPU", "liger-kernel is not installed")
        assert absent["p50"] is None and absent["V"] == 1003 and absent["commit"]
    for (dtype, provider, metric), row in by.items():
        assert row["status"] == "ok" and row["setting"] == CASE.setting
        if metric.endswith("error") and dtype == "float32":
            assert row["p50"] < 2e-6
        if metric == "seconds":
            assert row["p50"] > 0
        if provider == "floor":
            memory = ("peak_bytes", "bytes_before", "allocated_bytes")
            assert metric in ("seconds", "cpu_seconds", *memory)
    for provider in ("released", "linear", "sparse+cached"):
        assert by["float32", provider, "forget_loss"]["p50"] > 1
        assert by["float32", provider, "preserve_loss"]["p50"] > 0.1
    # logged once a process for calls of a kind
    assert by["float32", "linear", "sparse"]["p50"] in (0, 1)
    assert all(name in capsys.readouterr().out for name in ("of released",))


def test_a_head_that_trains(run):
    """Its gradient is compared too, and the floor makes it."""
    names = ["--providers", "released", "rows", "linear", "sparse+cached", "floor"]
    status, rows = run("--heads", "frozen", "trained", "--dtype", "float32", *names)
    assert status == 0 and {row["status"] for row in rows} == {"ok"}
    errors = {(row["kernel"], row["provider"]) for row in rows if "weight" in row["metric"]}
    wanted = {(bench_loss.TRAINED_LOSS, name) for name in names[1:-1]}
    assert errors == wanted
    assert {row["kernel"] for row in rows} == {LOSS, bench_loss.TRAINED_LOSS}
    batch = make_batch(CASE._replace(kernel=bench_loss.TRAINED_LOSS), CPU)
    floor = bench_loss.Floor(batch)
    floor()
    torch.testing.assert_close(floor.weight_grad, floor.z.t() @ floor.own)


def test_the_summary_is_over_products_and_released():
    rows = []
    for name, values in (("linear", [3.0, 1.0]), ("floor", [1.5, 1.0]), ("released", [6.0, 4.0])):
        rows.append(tables.row(CASE._asdict(), name, "seconds", [values], "ok", {}))
    said = bench_loss.summary(rows)
    assert said.startswith("loss_step V=1003") and "wall time: linear 1.50 of floor" in said
    assert said.endswith("0.38 of released")  # of 0.5 and 0.25


def test_forget_rows_alone(run):
    status, rows = run("--forget-only", "--dtype", "float32")
    assert status == 0 and {row["kernel"] for row in rows} == {FORGET_LOSS}
    assert {row["provider"] for row in rows} == {"dense", "sparse", "dense+live"}
    assert not any(row["metric"] == "preserve_loss" for row in rows)


def other_k(batch):
    return bench_loss.linear(dataclasses.replace(batch, k=batch.k + 1))


def other_direction(batch):
    own, ref = (batch.head.logits(batch.rows(h)[1]) for h in (batch.hidden, batch.ref_hidden))
    losses = bench_loss.linear(batch)
    return losses._replace(preserve=kl_loss(own, ref, direction="forward"))


def other_rows(batch):
    flipped = dataclasses.replace(batch, ref_hidden=batch.ref_hidden.flip(1))
    return bench_loss.linear(flipped)


def with_gradient(change):
    """The right losses, with a gradient that is changed in place."""

    def loss(batch):
        losses = bench_loss.linear(batch)
        total = losses.total
        wanted = torch.autograd.grad(total, batch.hidden)[0]
        change(wanted, batch)
        product = (batch.hidden * wanted).sum()
        total = total.detach() + product - product.detach()
        return Losses(losses.forget.detach(), losses.preserve.detach(), total)

    return loss


def no_preserve_gradient(grad, batch):
    grad[:, :-1][batch.roles == providers.PRESERVE_ROLE] = 0


def gradient_at_padding(grad, batch):
    grad[:, -1] += 1e-6


def swapped_rows(grad, batch):
    (a, b), (c, d) = (batch.roles == providers.FORGET_ROLE).nonzero()[:2].tolist()
    grad[a, b], grad[c, d] = grad[c, d].clone(), grad[a, b].clone()


WRONG = {"other_k": other_k, "other_direction": other_direction, "other_rows": other_rows}
WRONG |= {
    change.__name__: with_gradient(change)
    for change in (no_preserve_gradient, gradient_at_padding, swapped_rows)
}
WRONG["no_gradient"] = with_gradient(lambda grad, batch: grad.zero_())
WRONG["nan"] = with_gradient(lambda grad, batch: grad.mul_(torch.nan))


@pytest.mark.parametrize("wrong", WRONG)
def test_another_computation_is_found(wrong, run):
    broken = bench_loss.KERNELS[LOSS] | {"linear": bench_loss.provider(WRONG[wrong])}
    kernels = bench_loss.KERNELS | {LOSS: broken}
    status, rows = run("--providers", "rows", "linear", kernels=kernels)
    statuses = {(row["provider"], row["dtype"]): row["status"] for row in rows}
    assert status == 1
    for dtype in ("float32", "bfloat16"):
        assert statuses["rows", dtype] == "ok"
        assert statuses["linear", dtype].startswith("wrong: ")


def test_released_is_the_definition():
    batch = make_batch(CASE, CPU)
    logits = batch.head.logits(batch.hidden.detach()).requires_grad_()
    ref_logits = batch.head.logits(batch.ref_hidden)
    terms = released_terms(logits, ref_logits, batch.labels, top_k=20)
    gradient = torch.autograd.grad(sum(terms), logits)[0]
    truth = PALULoss(top_k=20, prefix_length=3)(logits.double(), batch.labels, ref_logits.double())
    wanted = torch.autograd.grad(truth.loss, logits)[0]
    torch.testing.assert_close(terms.forget.double(), truth.forget, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.preserve.double(), truth.preserve, rtol=1e-6, atol=0)
    assert (gradient - wanted).norm() < 1e-6 * wanted.norm()


def test_floor_makes_the_three_products():
    batch = make_batch(CASE, CPU)
    floor = bench_loss.Floor(batch)
    floor()
    own, ref = (torch.cat(batch.rows(h)).detach() for h in (batch.hidden, batch.ref_hidden))
    assert list(floor.z.shape) == [90, 1003]
    torch.testing.assert_close(floor.z, batch.head.logits(own))
    torch.testing.assert_close(floor.r, batch.head.logits(ref))
    torch.testing.assert_close(floor.grad, floor.z @ batch.head.weight)


# ---- the batch -----------------------------------------------------------------------------------

LABELS = {"vocab": 1003, "positions": 160, "batch": 8, "forget": 19, "preserve": 71}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"vocab": 128256, "positions": 832, "forget": 50, "preserve": 226},
        {"vocab": 50, "positions": 64 * 104, "batch": 64, "forget": 400, "preserve": 1808},
    ],
)
def test_labels_have_the_rows_that_were_asked_for(sizes):
    sizes = LABELS | sizes
    labels = make_labels(**sizes)
    roles = token_roles(labels, providers.PREFIX)
    assert list(labels.shape) == [sizes["batch"], sizes["positions"] // sizes["batch"]]
    forget, preserve = (
        int((roles == role).sum()) for role in (providers.FORGET_ROLE, providers.PRESERVE_ROLE)
    )
    assert forget == int((labels >= 0).sum()) == sizes["forget"] and preserve == sizes["preserve"]
    assert (labels[:, 0] == -100).all() and labels.max() < sizes["vocab"]
    lengths = (labels != -100).sum(1)
    assert lengths.min() > 0 and lengths.min() < lengths.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": 161}, "positions is 161; it must be a multiple of 8"),
        ({"preserve": 9}, "preserve is 9; it must be enough to keep"),
        ({"positions": 88}, "positions is 88; an example has 11"),
    ],
)
def test_sizes_that_do_not_fit(change, message, capsys):
    with pytest.raises(ValueError, match=message):
        make_labels(**LABELS | change)
    words = [word for name, size in change.items() for word in (f"--{name}", str(size))]
    with pytest.raises(SystemExit):
        bench_loss.main([*OPTIONS, *words])
    assert message in capsys.readouterr().err


def test_scale_and_memory_alone(run):
    options = ["--calls", "0", "--scale", "2", "--dtype", "float32"]
    status, rows = run(*options, "--providers", "linear", "sparse+cached")
    assert status == 0 and {row["rows"] for row in rows} == {320}
    assert {row["setting"] for row in rows} == {"batch=16 forget=38 preserve=142"}
    assert {row["samples"] for row in rows if row["metric"] == "seconds"} == {"0"}
    assert [row["provider"] for row in rows if row["metric"] == "peak_bytes"] == [
        "linear",
        "sparse+cached",
    ]


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path):
    path = tmp_path / "rows.csv"
    given = [*OPTIONS, "--calls", "1", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    given += ["--dtype", "float32", "--providers", "linear", "--csv", str(path)]
    assert runner.main(bench_loss.BENCHMARK, given) == 0
    rows = {row["metric"]: row for row in bench_loss.runner.tables.read(path)}
    assert rows["seconds"]["threads"] == "1" and rows["bytes_before"]["p50"] > 2**20
