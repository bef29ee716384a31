"""The linear operators by the rule of `python -m palu_kernels.check`; and the rule can fail."""

from dataclasses import replace

import pytest
import torch

from palu_kernels import torch_backend as eager
from palu_kernels.check.__main__ import CAPS, DTYPES, EPS, FLOOR
from palu_kernels.check.linear_cases import compare_linear, linear_cases
from palu_kernels.linear import chunked as linear

CPU = torch.device("cpu")
CASES = list(linear_cases(DTYPES))


def failures(case, backend):
    found = compare_linear(case, CPU, backend, CAPS, 2 * FLOOR * EPS)
    return [(what, error, allowed) for what, error, allowed in found if not error <= allowed]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_pytorch(case):
    assert not failures(case, "torch")


def by_triton():
    """Steps through operators, dtypes and heads; spoiled rows, which are many and slow, once for
    the chunk loop and once for the sparse losses."""
    spoiled = set()
    for case in CASES[::3]:
        again = case.spoiled and case.implementation in spoiled
        spoiled |= {case.implementation} if case.spoiled else set()
        yield pytest.param(case, marks=pytest.mark.slow if again else (), id=str(case))


@pytest.mark.parametrize("case", list(by_triton()))
def test_by_triton(case):
    # the interpreter takes a row at a time, and an entry of S where they are sparse
    if not case.spoiled:
        case = replace(case, rows=3)
    if case.implementation == "sparse":
        case = replace(case, rows=36, k=3) if case.spoiled else replace(case, rows=2, k=21)
    assert not failures(case, "triton")


@pytest.mark.parametrize("broken", ["zero gradient", "swapped rows", "no bias", "no scale"])
def test_it_can_fail(broken, monkeypatch):
    case = next(c for c in CASES if c.operator == "linear_kl" and c.head == "scaled")
    store, logits = eager.store, linear.Head.logits

    def spoil(chunk, grad, slope, weights):
        if broken == "zero gradient":
            grad = torch.zeros_like(grad)
        elif broken == "swapped rows":
            grad = grad.flip(0)
        store(chunk, grad, slope, weights)

    def other(self, hidden, out):
        if broken == "no bias":
            self = linear.Head(self.weight, None, self.scale, self.softcap)
        elif broken == "no scale":
            self = linear.Head(self.weight, self.bias, 1.0, self.softcap)
        return logits(self, hidden, out)

    assert not failures(case, "torch")
    monkeypatch.setattr(eager, "store", spoil)
    monkeypatch.setattr(linear.Head, "logits", other)
    assert failures(case, "torch")


def test_an_error_in_one_case_does_not_end_the_check(monkeypatch, capsys):
    from palu_kernels.check import __main__ as check

    def broken(case, *_):
        if case.operator == "kl":
            raise RuntimeError("does not compile")
        return []

    monkeypatch.setattr(check, "compare", broken)
    monkeypatch.setattr(check, "compare_linear", lambda *_: [("loss", 0.0, 1.0)])
    assert check.main(["--quick", "--backend", "torch", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out and "does not compile" in said.err
    assert "linear_kl" in said.out
