"""Top-k of awkward rows on every road of the kernels: S is the definition's, entry by entry."""

import pytest
import torch

from palu_kernels import reference, topk_indices
from palu_kernels.layout import LANES
from palu_kernels.triton.topk import CHUNK, MOST, SHORT, Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASKED, NAN = float("-inf"), float("nan")


def rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random, level, masked, NaN, +inf, many ties, zeros of both signs, few that are live, the
    largest entries side by side, and NaN behind more +inf than are asked for."""
    z = 3 * torch.randn(10, columns, generator=torch.Generator().manual_seed(0))
    z[1], z[2], z[3, 5 % columns], z[4, columns // 2 :] = 1.5, MASKED, NAN, -MASKED
    z[5] = z[5].round()
    z[6], z[6, ::2] = 0.0, -0.0
    z[7, : columns - 3] = MASKED
    z[8] = torch.arange(columns).flip(0)
    z[9, : columns - columns // 4] = -MASKED
    z[9, -2:] = NAN
    return z.to(DEVICE, dtype)


def same(z: torch.Tensor, k: int) -> None:
    found, right = topk_indices(z, k, backend="triton"), reference.topk_indices(z, k)
    assert torch.equal(found, right), (found != right).any(-1).nonzero().flatten().tolist()


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (7, 1), (7, 3), (7, 9), (300, 50)]


# every dtype twice by default, with all kinds of rows, and every shape
@pytest.mark.parametrize(
    ("columns", "k", "dtype"),
    [
        pytest.param(*shape, dtype, marks=() if shape[0] > 7 or i % 3 == j else pytest.mark.slow)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_short_rows(columns, k, dtype):
    same(rows(columns, dtype), k)


@pytest.mark.parametrize("k", [1, 100])
def test_rows_with_maxima(k):
    assert Plan.of(9001, k).maxima
    same(rows(9001, torch.bfloat16), k)


def test_rows_of_float32_that_start_anywhere():
    z = rows(9001, torch.float32)[[0, 3, 5]]
    same(torch.cat([z, z[:, :3]], 1)[:, 2:-1], 60)


def test_k_beyond_the_maxima():
    columns = MOST + 100
    assert not (plan := Plan.of(columns, columns // 2)).maxima and not plan.room
    same(rows(columns, torch.bfloat16)[[0, 1, 3]], columns // 2)


def test_plans():
    """Rooms suffice: k segments may hold k candidates and more, and fit in registers."""
    assert Plan.of(SHORT, 50).maxima == 0
    for columns in (SHORT + 1, 32000, 128256, 151936, 262144, 1_000_000):
        for k in (1, 50, 1000, 10_000):
            plan = Plan.of(columns, k)
            if plan.maxima:
                assert k < plan.enough and 3 * k <= 2 * plan.room and plan.room <= MOST
                assert plan.maxima_held <= MOST and plan.maxima * plan.segment >= columns + 7
    assert Plan.of(128256, 10_000).maxima
    longest = MOST * CHUNK - LANES + 1  # of whose segments one fits in what is listed together
    assert Plan.of(longest, 50).segment == CHUNK and Plan.of(longest, 50).maxima
    assert not Plan.of(longest + 1, 50).maxima
