"""The accuracy rule on both backends, and that it can fail."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from palu_kernels.check import __main__ as check
from palu_kernels.check.__main__ import Case, cases, compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Every entry of a long row is in S, which the interpreter takes long for.
LONG = [c for c in cases() if c.k and min(c.k, c.columns) > 2**14]


def values(case, together):
    """So many of its values together: operator, way to choose S, dtype, V, kind of rows, k."""
    v, k = case.columns, min(case.k, case.columns)
    size = "V" if k == v else "V - 1" if k == v - 1 else k
    own = enumerate((case.operator + case.option, case.select, case.dtype, v, case.kind, size))
    return set(itertools.combinations(own, together))


def with_all_values(cases, together):
    """A few of these cases that hold all the values together which any of them holds."""
    chosen, missing = [], set().union(*(values(case, together) for case in cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(values(case, together) & missing)))
        missing -= values(chosen[-1], together)
    return chosen


def by_both_backends():
    """The interpreter takes a tenth of a second for a case and more for a long row: of short rows
    it gets every pair of values, of long rows every value."""
    kept = with_all_values([c for c in cases() if c.columns <= 4099], 2)
    kept += with_all_values([c for c in cases() if c.columns > 4099 and c not in LONG], 1)
    for case in cases():
        yield pytest.param(case, "triton", marks=() if case in kept else pytest.mark.slow)
        yield pytest.param(case, "torch", marks=pytest.mark.slow if case in LONG else ())


@pytest.mark.parametrize(("case", "backend"), [*by_both_backends()], ids=str)
def test_operator(case, backend):
    for result in compare(case, DEVICE, backend):
        assert result.passed, result


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", [c for c in cases(full=True) if c.kind != "empty"], ids=str)
def test_operator_on_the_full_grid(case, backend):
    for result in compare(case, DEVICE, backend):
        assert result.passed, result


def test_every_option_meets_every_value():
    """Pairwise: no dtype, kind of rows or V is left out for any operator."""
    for variant in check.variants():
        same = [
            c
            for c in cases()
            if (c.operator, c.option, c.select)
            == (variant.operator, variant.option, variant.select)
        ]
        assert {c.dtype for c in same} == set(check.DTYPES)
        assert {c.kind for c in same} == set(check.KINDS)
        assert {c.columns for c in same} > {7, 257, 4099}
        assert len({min(c.k, c.columns) for c in same}) >= 4
    assert {c.columns for c in cases()} == set(check.COLUMNS)


BREAKAGES = {
    "zeroed": torch.zeros_like,
    "rows swapped": lambda g: g[[1, 0, *range(2, len(g))]],
    "two entries swapped": lambda g: g[:, [1, 0, *range(2, g.shape[1])]],
    "three percent too large": lambda g: g * 1.03,
    "small entries lost": lambda g: torch.where(g.abs() < g.abs().max() / 2, 0, g),
    "weights forgotten": lambda g: g.abs(),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize(
    "case",
    [
        replace(case, dtype=dtype, columns=257, k=50)
        for case, dtype in zip(
            [c for c in check.variants() if c.operator != "topk"], 5 * check.DTYPES, strict=True
        )
    ],
    ids=str,
)
def test_a_wrong_gradient_fails(case, breakage, monkeypatch):
    if breakage == "two entries swapped":
        # k of 257 entries are not 0: make sure that one of the two is
        case = replace(case, k=256)
    if breakage == "three percent too large" and case.dtype == torch.bfloat16:
        case = replace(case, dtype=torch.float16)  # 2^-6 is what bfloat16 is allowed
    right = check.loss_of

    def broken(case, z, rows, backend):
        with torch.enable_grad():
            inner = z.detach().requires_grad_()
            losses = right(case, inner, rows, backend)
            grads = torch.autograd.grad(losses.sum(), inner)[0]
        return Replaced.apply(z, losses.detach(), grads, BREAKAGES[breakage])

    assert all(r.passed for r in compare(case, DEVICE, "torch"))
    monkeypatch.setattr(check, "loss_of", broken)
    failed = [r.what for r in compare(case, DEVICE, "torch") if not r.passed]
    assert failed == ["gradient"]


class Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, losses, grads, how):
        ctx.save_for_backward(grads)
        ctx.how = how
        return losses.clone()

    @staticmethod
    def backward(ctx, weights):
        (grads,) = ctx.saved_tensors
        return ctx.how(grads * weights.reshape(-1, 1).to(grads.dtype)), None, None, None


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a wrong loss", lambda x: x * (1 + 2e-4)),
        ("rows swapped", lambda x: x[[1, 0, *range(2, len(x))]]),
        ("a NaN", lambda x: torch.where(torch.arange(len(x)) == 0, torch.nan, x)),
    ],
)
def test_a_wrong_loss_fails(what, change, monkeypatch):
    right = check.loss_of
    monkeypatch.setattr(check, "loss_of", lambda *args: change(right(*args)))
    results = compare(Case("kl", "reverse"), torch.device("cpu"), "torch")
    assert not results[0].passed


def test_a_tie_broken_the_other_way_fails(monkeypatch):
    right = check.operators.topk_indices

    def last_first(scores, k, *, backend):
        flipped = right(scores.flip(-1), k, backend=backend)
        return (scores.shape[-1] - 1 - flipped).sort(-1).values.to(torch.int32)

    case = Case("topk", kind="ties")
    assert compare(case, torch.device("cpu"), "torch")[0].passed
    monkeypatch.setattr(check.operators, "topk_indices", last_first)
    assert not compare(case, torch.device("cpu"), "torch")[0].passed
    assert compare(Case("topk"), torch.device("cpu"), "torch")[0].passed


def test_command_passes_and_writes_its_table(tmp_path, capsys):
    file = tmp_path / "check.json"
    assert (
        check.main(["--device", "cpu", "--backend", "torch", "--quick", "--json", str(file)]) == 0
    )
    printed = capsys.readouterr().out
    assert "0 failed" in printed and "FAILED" not in printed
    content = json.loads(file.read_text())
    assert content["backend"] == "torch"
    assert all(row["passed"] for row in content["results"])
    assert len(content["results"]) > 200


def test_command_fails_when_a_comparison_does(monkeypatch, capsys):
    monkeypatch.setattr(check, "cases", lambda **_: iter([Case("kl", "reverse")]))
    right = check.loss_of
    monkeypatch.setattr(check, "loss_of", lambda *args: 2 * right(*args))
    assert check.main(["--device", "cpu", "--backend", "torch"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "nonsense"], "--device nonsense"),
        (["--backend", "numpy"], "invalid choice"),
    ],
)
def test_command_names_a_bad_option(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_shards_are_all_of_it(monkeypatch):
    """Every case in exactly one shard, so that processes side by side check what one would."""
    seen = []

    def compared(case, device, backend):
        seen.append(case)
        return iter(())

    monkeypatch.setattr(check, "_compared", compared)
    list(check.comparisons(True, torch.device("cpu"), "torch"))
    whole, sharded = list(map(str, seen)), []
    for index in range(3):
        seen.clear()
        list(check.comparisons(True, torch.device("cpu"), "torch", index, 3))
        assert seen
        sharded += map(str, seen)
    assert sorted(sharded) == sorted(whole)
