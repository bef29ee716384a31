"""The kernels move no more bytes than their budget, and the counter counts what is moved."""

import os

import pytest
import torch
from triton.runtime import interpreter

from benchmarks.static import traffic
from benchmarks.static.traffic import Traffic
from palu_kernels import functional as operators

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="bytes are counted in Triton's interpreter, which does not run beside a real GPU",
)

# forward plus backward in transfers of a row, as the design sets them for 16-bit types
BUDGETS = {
    "topk_indices": 1.2,
    "flatten, S by reference": 3.2,
    "flatten, S by indices": 2.1,
    "flatten, S by current": 3.2,
    "entropy, S by reference": 3.2,
    "entropy, S by indices": 2.1,
    "entropy, S by current": 3.2,
    "reverse kl": 5,
    "forward kl": 5,
    "cross-entropy": 3,
}


@pytest.fixture(scope="module")
def measured():
    # half as many columns as a model has now: what is moved beside the row weighs twice as much
    return {one.operator: one for one in traffic.measure(64000, 1, "bfloat16")}


@pytest.mark.parametrize("operator", BUDGETS)
def test_budget(measured, operator):
    one = measured[operator]
    print(f"{operator}: {one.transfers:.3f} row transfers, budget {BUDGETS[operator]}")
    assert one.budget == BUDGETS[operator]
    assert one.transfers < BUDGETS[operator] + 0.05
    assert not one.over


def test_no_operator_is_left_out(measured):
    assert set(measured) == set(BUDGETS)


def test_over_budget_is_a_failure(capsys):
    # of a row this short S weighs as much as the row
    assert traffic.main(["--columns", "1000", "--rows", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("topk_indices")).endswith("over")
    assert not next(line for line in lines if line.startswith("cross-entropy")).endswith("over")


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        (8192, torch.float32),
        (10007, torch.bfloat16),
        pytest.param(8192, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(10007, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_hand_counts(columns, dtype):
    """A launch of `programs` programs on 3 rows: what each reads and writes beside its rows."""
    torch.manual_seed(0)
    logits = torch.randn(3, columns).to(dtype).requires_grad_()
    reference = torch.randn(3, columns).to(dtype)
    row = 3 * columns * dtype.itemsize
    number = 4  # bytes of a float32 or int32

    def launches(loss: torch.Tensor) -> dict[str, traffic.Launch]:
        loss.backward()
        return {one.kernel: one for one in counted.launches}

    def check(one: traffic.Launch, loaded: int, stored: int) -> None:
        assert (one.loaded, one.stored, one.atomic) == (loaded, stored, 0), one

    with Traffic() as counted:
        found = launches(operators.kl_loss(logits, reference, backend="triton"))
    one = found["kl_div._kl_stats_kernel"]
    check(one, 2 * row, 6 * number * one.programs)
    one = found["kl_div._kl_grad_kernel"]
    check(one, 2 * row + 5 * number * one.programs, row)

    with Traffic() as counted:
        labels = torch.tensor([1, -100, columns - 1])
        found = launches(operators.cross_entropy_loss(logits, labels, backend="triton"))
    one = found["cross_entropy._ce_stats_kernel"]
    check(one, row, 2 * number * one.programs)
    one = found["cross_entropy._ce_grad_kernel"]  # label (int64), two numbers of the state, weight
    check(one, row + (8 + 3 * number) * one.programs, row)

    with Traffic() as counted:
        operators.topk_indices(reference, 5, backend="triton")
    # row i starts i * columns % 8 lanes after an aligned one
    lanes = [i * columns % 8 + columns for i in range(3)]
    maxima, pick, search = counted.launches
    segment = 32 if columns >= 512 * 5 else 8
    check(maxima, row, sum((n + segment - 1) // segment for n in lanes) * dtype.itemsize)
    assert pick.stored > 3 * 5 * number and pick.loaded < row / 2
    check(search, 3 * number, 0)

    with Traffic() as counted:
        indices = torch.arange(5).repeat(3, 1)
        loss = operators.local_entropy_loss(logits, top_k=5, indices=indices, backend="triton")
        found = launches(loss)
    one = found["local_entropy._row_sums_kernel"]
    # of the first 128 lanes of a split a number near the mean is looked for
    near = (128 * one.programs - sum(lanes) + 3 * columns) * dtype.itemsize
    check(one, row + near, 3 * number * one.programs)
    one = found["local_entropy._local_entropy_grad_kernel"]  # a number and an index of S, 3 numbers
    check(one, 4 * number * one.programs + 5 * 2 * number * one.programs, row + 15 * dtype.itemsize)


def test_counting_changes_nothing():
    """The counted run is the real one, and afterwards nothing is counted or replaced."""
    before = (interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_masked_load)
    logits = torch.randn(2, 1001, dtype=torch.float32, requires_grad=True)

    def loss(backend: str) -> torch.Tensor:
        return operators.local_entropy_loss(logits, top_k=9, backend=backend)

    with Traffic() as counted:
        inside = loss("triton")
    number = len(counted.launches)
    after = (interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_masked_load)
    assert after == before
    torch.testing.assert_close(loss("triton"), inside, rtol=0, atol=0)
    torch.testing.assert_close(loss("torch"), inside)
    assert len(counted.launches) == number


def test_counting_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), Traffic():
        pass
