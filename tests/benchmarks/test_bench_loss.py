"""All providers of `loss_step` compute the same; one that does not is found; the CSV is whole."""

import csv
import dataclasses

import pytest
import torch

from benchmarks import bench_loss as loss_step
from benchmarks import loss_providers
from benchmarks import runner as harness
from benchmarks.loss_providers import Losses, Shape, make_case, make_labels
from benchmarks.released import released_terms
from palu import PALULoss
from palu.data.roles import FORGET, PRESERVE, token_roles
from palu_kernels import kl_loss
from palu_kernels.linear import cost_model

SHAPE = Shape(1003, 24, 8 * 20, 19, 71, 20)  # odd V, unequal examples
SIZES = {"vocab": 1003, "hidden": 24, "positions": 160, "forget": 19, "preserve": 71, "top-k": 20}
OPTIONS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
CPU = torch.device("cpu")


@pytest.fixture
def in_this_process(monkeypatch):
    """`main` without a new process for every measurement."""
    monkeypatch.setattr(harness, "run_worker", lambda module, task, threads: loss_step.work(task))


@pytest.fixture(params=[False, True], ids=["by_cost", "sparse"])
def sparse_pays(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(cost_model, "prefer_sparse", lambda *args, **kwargs: True)
    return request.param


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def split(rows):
    """-> rows of providers that could not run, the others."""
    absent = [row for row in rows if row["status"] != "ok"]
    return absent, [row for row in rows if row["status"] == "ok"]


def run(tmp_path, *options):
    path = tmp_path / "rows.csv"
    status = loss_step.main([*OPTIONS, "--csv", str(path), "--calls", "1", *options])
    return status, read(path)


# ---- the numbers ---------------------------------------------------------------------------------


def test_providers_agree(tmp_path, in_this_process, sparse_pays, capsys):
    status, rows = run(tmp_path, "--repeats", "2")
    out = capsys.readouterr().out
    assert status == 0 and "DISAGREE" not in out
    (f32, bf16), rows = split(rows)
    for absent in (f32, bf16):
        assert absent["provider"] == "liger" and absent["seconds"] == ""
        assert absent["status"] in ("needs a GPU", "liger-kernel is not installed")
        assert absent["vocab"] == "1003" and absent["processor"] and absent["commit"]
    assert "needs a GPU" in out or "is not installed" in out
    assert len(rows) == 2 * 2 * (len(loss_providers.BOTH_TERMS) - 1)
    for row in rows:
        assert list(row) == list(loss_step.COLUMNS)
        assert float(row["seconds"]) > 0 and row["commit"] and row["processor"]
        assert (row["loss"] == "") == (row["provider"] == "floor")
        first = row["repeat"] == "0" and row["provider"] != "floor"
        assert (row["gradient_error"] != "") == first
        if first and row["dtype"] == "float32":
            assert float(row["gradient_error"]) < 2e-6
        if row["provider"] != "floor":
            assert float(row["forget_loss"]) > 1 and float(row["preserve_loss"]) > 0.1
        by = "sparse" if sparse_pays and row["provider"] == "sparse+cached" else "dense"
        assert row["forget_rows_by"] == by
    assert all(name in out for name in loss_providers.BOTH_TERMS)


def test_forget_rows_alone(tmp_path, in_this_process):
    status, rows = run(tmp_path, "--repeats", "1", "--forget-only", "--dtype", "float32")
    assert status == 0
    assert [row["provider"] for row in rows] == ["dense", "sparse", "dense+live"]
    assert [row["forget_rows_by"] for row in rows] == ["dense", "sparse", "dense"]
    assert all(row["preserve_loss"] == "" and row["loss"] == row["forget_loss"] for row in rows)


def other_k(case):
    k = case.shape.top_k + 1
    return loss_providers.linear(dataclasses.replace(case, shape=case.shape._replace(top_k=k)))


def other_direction(case):
    forget = loss_providers.linear(case).forget
    own, ref = (case.head.logits(case.rows(h)[1]) for h in (case.hidden, case.ref_hidden))
    preserve = kl_loss(own, ref, direction="forward")
    return Losses(loss_providers.rows(case).total, forget, preserve)


def other_rows(case):
    return loss_providers.linear(dataclasses.replace(case, ref_hidden=case.ref_hidden.flip(1)))


def _with_gradient(case, change):
    losses = loss_providers.linear(case)
    wanted = torch.autograd.grad(losses.total, case.hidden)[0]
    wanted = change(wanted, case)
    product = (case.hidden * wanted).sum()
    return losses._replace(total=losses.total.detach() + product - product.detach())


def no_gradient(case):
    return _with_gradient(case, lambda grad, case: torch.zeros_like(grad))


def no_preserve_gradient(case):
    def change(grad, case):
        grad[:, :-1][case.is_preserve] = 0
        return grad

    return _with_gradient(case, change)


def gradient_at_padding(case):
    def change(grad, case):
        grad[:, -1] += 1e-6
        return grad

    return _with_gradient(case, change)


def swapped_rows(case):
    def change(grad, case):
        places = case.is_forget.nonzero()[:2].tolist()
        (a, b), (c, d) = places
        grad[a, b], grad[c, d] = grad[c, d].clone(), grad[a, b].clone()
        return grad

    return _with_gradient(case, change)


def spoiled(case):
    return _with_gradient(case, lambda grad, case: grad * torch.nan)


WRONG = [other_k, other_direction, other_rows, no_gradient, no_preserve_gradient]
WRONG += [gradient_at_padding, swapped_rows, spoiled]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_computation_is_found(wrong, dtype, tmp_path, in_this_process, monkeypatch, capsys):
    monkeypatch.setitem(loss_providers.PROVIDERS, "linear", wrong)
    options = ["--repeats", "1", "--dtype", dtype, "--providers", "rows", "linear"]
    status, rows = run(tmp_path, *options)
    assert status == 1 and len(rows) == 2
    assert "of linear is" in capsys.readouterr().out


def test_a_loss_that_differs_in_a_later_process_is_found():
    row = {"dtype": "float32", "provider": "linear", "gradient_error": None}
    row |= {"loss": 3.0, "forget_loss": 2.0, "preserve_loss": 1.0}
    assert loss_step.disagreements([row, dict(row)]) == []
    for name in loss_step.LOSSES:
        assert len(loss_step.disagreements([row, row | {name: row[name] * 1.00002}])) == 1
        assert len(loss_step.disagreements([row, row | {name: float("nan")}])) == 1


def test_released_is_the_definition():
    case = make_case(SHAPE, torch.float32, CPU)
    logits = case.head.logits(case.hidden.detach()).requires_grad_()
    ref_logits = case.head.logits(case.ref_hidden)
    terms = released_terms(logits, ref_logits, case.labels, top_k=20, prefix_length=3)
    found = torch.autograd.grad(sum(terms), logits)[0]
    truth = PALULoss(top_k=20, prefix_length=3)(logits.double(), case.labels, ref_logits.double())
    wanted = torch.autograd.grad(truth.loss, logits)[0]
    torch.testing.assert_close(terms.forget.double(), truth.forget, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.preserve.double(), truth.preserve, rtol=1e-6, atol=0)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_floor_makes_the_three_products():
    case = make_case(SHAPE, torch.float32, CPU)
    floor = loss_providers.Floor(case)
    floor()
    own, ref = (torch.cat(case.rows(h)).detach() for h in (case.hidden, case.ref_hidden))
    assert list(floor.z.shape) == [90, 1003]
    torch.testing.assert_close(floor.z, case.head.logits(own))
    torch.testing.assert_close(floor.r, case.head.logits(ref))
    torch.testing.assert_close(floor.grad, floor.z @ case.head.weight)


# ---- the batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [SHAPE, Shape(128256, 8, 832, 50, 226, 1000), Shape(50, 8, 64 * 104, 400, 1808, 9, 64)]
)
def test_labels_have_the_rows_that_were_asked_for(shape):
    labels = make_labels(shape)
    roles = token_roles(labels, loss_providers.PREFIX)
    assert list(labels.shape) == [shape.batch, shape.positions // shape.batch]
    assert int((roles == FORGET).sum()) == int((labels >= 0).sum()) == shape.forget
    assert int((roles == PRESERVE).sum()) == shape.preserve
    assert (labels[:, 0] == -100).all() and labels.max() < shape.vocab
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
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        make_labels(SHAPE._replace(**change))


# ---- the run -------------------------------------------------------------------------------------


def test_memory_alone(tmp_path, in_this_process, capsys):
    options = ["--calls", "0", "--repeats", "1", "--scale", "2", "--dtype", "float32"]
    status, rows = run(tmp_path, *options, "--providers", "linear", "sparse+cached")
    assert status == 0
    assert [row["provider"] for row in rows] == ["linear", "sparse+cached"]
    assert all(row["seconds"] == "" and int(row["peak_bytes"]) >= 0 for row in rows)
    sizes = {tuple(row[name] for name in ("positions", "forget", "batch")) for row in rows}
    assert sizes == {("320", "38", "16")}


def test_summary_takes_medians():
    rows = []
    for provider, seconds, peak in (("released", (8, 2, 4), 900), ("floor", (1, 3, 2), None)):
        for repeat, one in enumerate(seconds):
            row = {
                "dtype": "float32",
                "provider": provider,
                "repeat": repeat,
                "seconds": one,
                "status": "ok",
            }
            rows.append(row | {"peak_bytes": peak and peak * 2**20, "gradient_error": None})
    released, floor = loss_step.summary(rows, ["released", "floor"]).splitlines()[1:]
    cells = ["4.000", "2.000", "8.000", "1.00", "2.00", "900.0", "1.0", "-", "ok"]
    assert released.split() == ["float32", "released", *cells]
    cells = ["2.000", "1.000", "3.000", "2.00", "1.00", "-", "-", "-", "ok"]
    assert floor.split() == ["float32", "floor", *cells]


def test_providers_of_the_other_kind(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--providers", "dense")
    assert "--providers must be of released, compile" in capsys.readouterr().err


def test_in_processes_of_their_own(tmp_path, capsys):
    options = ["--repeats", "1", "--dtype", "float32", "--threads", "1", "--device", "cpu"]
    status, rows = run(tmp_path, *options, "--providers", "released", "linear")
    assert status == 0 and {row["threads"] for row in rows} == {"1"}
    assert all(int(row["bytes_before"]) > 2**20 for row in rows)
    assert "released" in capsys.readouterr().out
