"""Row losses whose rows are cut into slices, against the same losses of whole rows, in one
process."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from palu_kernels import distributed, reference, slices
from palu_kernels.row_loss import (
    KL,
    CrossEntropy,
    LocalEntropy,
    Operands,
    ReferenceArgmaxNLL,
)

ROWS = 14
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-6}


class Ranks:
    """Threads that stand in for ranks. Only one computes at a time: Triton's interpreter is not
    made for more."""

    def __init__(self, count):
        self.turn = threading.Lock()
        self.all_here = threading.Barrier(count)
        self.said = [[] for _ in range(count)]

    def exchange(self, vocabulary, t):
        own = self.said[vocabulary.rank]
        own.append(t.clone())
        self.turn.release()
        try:
            self.all_here.wait(timeout=240)
        finally:
            self.turn.acquire()
        return torch.stack([self.said[rank][len(own) - 1] for rank in vocabulary.order])

    def run(self, compute):
        """What `compute(rank)` returns, of every rank."""

        def own(rank):
            with self.turn:
                try:
                    return compute(rank)
                except BaseException:
                    self.all_here.abort()
                    raise

        with ThreadPoolExecutor(len(self.said)) as pool:
            futures = [pool.submit(own, rank) for rank in range(len(self.said))]
        errors = [future.exception() for future in futures if future.exception()]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]


@pytest.fixture
def exchange(monkeypatch):
    """Make ranks of `threads.ranks` exchange what a `Vocabulary` does."""
    threads = SimpleNamespace(ranks=None)
    gather = lambda v, t, _: threads.ranks.exchange(v, t)  # noqa: E731
    monkeypatch.setattr(distributed.Vocabulary, "gather", gather)
    monkeypatch.setattr(
        distributed.Vocabulary, "sum", lambda v, t, _: gather(v, t, _).sum(0).to(t.dtype)
    )
    return threads


def by_slices(exchange, loss, counts, z, r, data, backend, cap, weights):
    """Losses and gradient of rows of which slices `counts` are on so many ranks."""
    starts = tuple(sum(counts[:rank]) for rank in range(len(counts)))

    def compute(rank):
        vocabulary = distributed.Vocabulary("", rank, starts, tuple(counts))
        own = vocabulary.of_rank(z.T).T.clone()
        ref = None if r is None else vocabulary.of_rank(r.T).T.clone()
        operands = Operands(own, ref, data, backend, cap, cap, vocabulary)
        return loss.fused(operands, True, weights), own

    exchange.ranks = Ranks(len(counts))
    losses, grads = zip(*exchange.ranks.run(compute), strict=True)
    assert all(torch.equal(losses[0].nan_to_num(-1), one.nan_to_num(-1)) for one in losses)
    return losses[0], torch.cat(grads, 1)


def hard_rows(columns, dtype, cap=None):
    """Rows of which each is hard in its own way."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, columns, generator=g, dtype=torch.float64) * 2
    r = z + torch.randn(ROWS, columns, generator=g, dtype=torch.float64)
    half = columns // 2
    z[1], r[1] = z[1].round(), r[1].round()  # ties between slices
    z[2, ::3] = r[2, ::3] = -torch.inf
    z[3, -1] = torch.nan
    z[4], r[4] = 300 + 100 * z[4], 100 * r[4]
    z[5, half], r[5, half] = -200, -torch.inf  # +inf, though p is 0 there
    r[6] = -torch.inf
    r[7, 0] = torch.nan
    z[8, half] = torch.inf
    z[9, :half], r[9, :half] = -60000, -30000
    z[10, :half] = r[10, :half] = -torch.inf  # all of a slice
    z[11] = -torch.inf
    z[12] = r[12] = 0
    if dtype != torch.float64:  # whose softmax takes more than one number
        z[13], r[13] = z[13] + 1e4, r[13] - 1e4
    if cap:  # it takes what is not finite to a number
        z, r = z.nan_to_num(0.0, 9.0, -9.0), r.nan_to_num(0.0, 9.0, -9.0)
    return z.to(dtype), r.to(dtype)


def cases(columns, ks):
    """(loss, whether it has the reference, its integers)."""
    labels = torch.arange(ROWS) * 3 % columns
    labels[1] = -100
    yield KL("reverse"), True, None
    yield KL("forward"), True, None
    yield CrossEntropy(-100), False, labels
    yield CrossEntropy(2), False, labels.clamp(min=0).int()
    yield ReferenceArgmaxNLL(), True, None
    kinds = [("flatten", c) for c in ("global_mean", "local_mean", "number")]
    for k, (objective, center) in itertools.product(ks, [*kinds, ("entropy", "global_mean")]):
        indices = (torch.arange(ROWS)[:, None] + 5 * torch.arange(min(k, columns))) % columns
        yield LocalEntropy(k, objective, center, 0.5, "reference"), True, None
        yield LocalEntropy(k, objective, center, 0.5, "current"), False, None
        yield LocalEntropy(k, objective, center, 0.5, "indices"), False, indices


def check(exchange, columns, counts, dtype, backend, cap, ks, places=None, whole=None):
    z, r = hard_rows(columns, dtype, cap)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.linspace(0.5, 2, ROWS, dtype=work)
    for place, (loss, has_reference, data) in enumerate(cases(columns, ks)):
        if places is not None and place not in places:
            continue
        ref = r if has_reference else None
        own = z.clone()
        right = loss.fused(Operands(own, ref, data, whole or backend, cap, cap), True, weights)
        found = by_slices(exchange, loss, counts, z, ref, data, backend, cap, weights)
        same(loss, found[0], right, min(BOUNDS[dtype], BOUNDS[torch.float32]))
        same(loss, found[1], own, BOUNDS[dtype])


def same(loss, found, right, bound):
    found, right = found.double(), right.double()
    torch.testing.assert_close(found.isnan(), right.isnan(), msg=f"{loss}: NaN where it is not")
    error = torch.where(found == right, 0, (found - right).abs() / (1 + right.abs()))
    assert not (error > bound).any(), f"{loss}: {error.nan_to_num(0).max()}"


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("counts", [(19, 18), (20, 0, 17)])
def test_slices_give_what_whole_rows_do(exchange, monkeypatch, counts, dtype, cap):
    monkeypatch.setattr(slices, "GATHERED_K", 10)  # both ways to select
    check(exchange, 37, counts, dtype, "torch", cap, (5, 25, 100))


def test_slices_by_kernels(exchange):
    """What kernels do of a slice: either KL, cross-entropy, S, the sums of a row, the gradients.
    Centres are left to PyTorch."""
    places = (0, 1, 2, 4, 5, 16)
    check(exchange, 37, (20, 17), torch.float32, "triton", None, (5,), places, whole="torch")


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(19, 18), (0, 37), (1200, 1101), (700, 900, 701)])
def test_slices_by_kernels_on_all_rows(exchange, counts, dtype, cap):
    check(exchange, sum(counts), counts, dtype, "triton", cap, (1, 70))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_integers_that_nobody_checked_spoil_their_row_alone(exchange, backend):
    z, weights = torch.randn(3, 9), torch.ones(3)
    labels, indices = torch.tensor([-200, 1, 9]), torch.tensor([[1, -1], [2, 7], [99, 0]])
    losses = LocalEntropy(2, "flatten", "number", 0.5, "indices"), CrossEntropy(-100)
    for loss, data in zip(losses, (indices, labels), strict=True):
        for found in by_slices(exchange, loss, (4, 5), z, None, data, backend, None, weights):
            assert found[[0, 2]].isnan().all() and found[1].isfinite().all(), loss


def test_no_rows(exchange):
    z = torch.zeros(0, 9)
    for loss, has_reference, _ in cases(9, (3,)):
        if isinstance(loss, CrossEntropy) or loss.needs_reference != has_reference:
            continue
        data = torch.zeros(0, 3, dtype=torch.long)
        data = data if getattr(loss, "select_by", "") == "indices" else None
        ref = z if has_reference else None
        found = by_slices(exchange, loss, (4, 5), z, ref, data, "torch", None, z[:, 0])
        assert found[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keys_order_as_entries_do(dtype):
    z = torch.tensor([-torch.inf, -5.0, -1e-7, 0.0, 2.0, torch.inf, torch.nan], dtype=dtype)
    keys = slices.sort_keys(z)
    assert bool((keys[1:] >= keys[:-1]).all()) and keys[-1] > keys[-2] > keys[-3]
    assert slices.sort_keys(-z[3:4]) == keys[3]
    shuffled = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    order = slices.sort_keys(shuffled).sort(stable=True, descending=True).indices
    chosen = reference.topk_indices(shuffled[None], 50)[0]
    assert torch.equal(order[:50].sort().values, chosen.long())


def test_hidden_rows_of_ranks_are_compared_within_rounding():
    """Ranks that added up the same rows in another order agree; other rows do not."""
    rows = torch.randn(14, 24, generator=torch.Generator().manual_seed(0))
    number = distributed._projection(rows)
    noise = torch.randn(14, 24, generator=torch.Generator().manual_seed(1))
    near = 1e-3 + 8 * torch.finfo(torch.float32).eps
    assert distributed._is_near(distributed._projection(rows + 1e-6 * noise), number, near)
    for other in (rows + 0.1 * noise, rows.flip(0), rows.flip(1), rows + 1, -rows):
        assert not distributed._is_near(distributed._projection(other), number, near)
    assert distributed._projection(rows * 0) == 0
    spoiled = distributed._projection(rows.index_fill(0, torch.tensor([3]), torch.nan))
    assert spoiled is None and not distributed._is_near(spoiled, number, near)
