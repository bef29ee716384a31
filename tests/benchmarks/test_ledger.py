"""The ledger sees every tensor, those inside custom operators too, and forgets what is gone."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from benchmarks.memory.ledger import Ledger
from benchmarks.timing import AllocatorPeak
from palu_kernels import LMHead, linear_cross_entropy_loss

KIB = 1024


def kib(n):
    return torch.empty(n * KIB, dtype=torch.uint8)


@torch.library.custom_op("palu_ledger_test::through_a_buffer", mutates_args=())
def through_a_buffer(x: torch.Tensor) -> torch.Tensor:
    buffer = x.new_empty(50 * KIB)
    buffer.fill_(1)
    return x + buffer[: x.numel()]


# ---- single tensors ------------------------------------------------------------------------------


def test_counts_storages_while_they_live():
    with Ledger() as ledger:
        a = kib(3)
        assert ledger.total == 3 * KIB
        view = a[:10].view(2, 5)
        a.add_(1)
        assert ledger.total == 3 * KIB
        b = a + 1
        assert ledger.total == 6 * KIB
        del a
        assert ledger.total == 6 * KIB  # the view is still there
        del view
        assert ledger.total == 3 * KIB
        del b
        assert ledger.total == 0 and ledger.peak == 6 * KIB


def test_arguments_from_outside_count_once():
    outside = kib(4)
    with Ledger() as ledger:
        outside + 1
        assert ledger.total == 4 * KIB and ledger.peak == 8 * KIB
        outside + 1
        assert ledger.total == 4 * KIB
    del outside
    assert ledger.total == 0


def test_start_forgets_the_peak():
    with Ledger() as ledger:
        a = kib(1)
        b = kib(9)
        del b
        ledger.start()
        assert ledger.peak == KIB
        c = kib(2)
        del a, c
    assert ledger.peak == 3 * KIB and ledger.total == 0


def test_at_peak_lists_what_was_there():
    with Ledger() as ledger:
        a = kib(1)
        ledger.start()
        b = kib(5)
        c = b + 1
        del b
        d = kib(2)
        del a, c, d
    entries = ledger.at_peak()
    assert [entry.bytes for entry in entries] == [5 * KIB, 5 * KIB, KIB]
    assert {entry.operator for entry in entries} == {
        "aten::empty.memory_format",
        "aten::add.Tensor",
    }
    assert entries[0].shape == (5 * KIB,) and entries[0].dtype == torch.uint8


def test_resized_by_out():
    with Ledger() as ledger:
        a, out = kib(2), kib(0)
        torch.add(a, 1, out=out)
        assert ledger.total == 4 * KIB


def test_a_storage_that_is_freed_and_allocated_again():
    """As FSDP does with what it gathers; outside no ledger hears of it."""
    a = kib(3)
    with Ledger() as ledger:
        a.add_(1)
        storage = a.untyped_storage()
        storage.resize_(0)
        assert ledger.total == 0
        storage.resize_(5 * KIB)
        assert ledger.total == ledger.peak == 5 * KIB
    a.untyped_storage().resize_(9 * KIB)
    assert ledger.total == 5 * KIB


def test_a_tensor_of_tensors_counts_by_what_is_in_it():
    """As a DTensor by its local tensor."""
    with Ledger() as ledger:
        both = TwoTensor(kib(2), kib(2))
        both.add_(1)
        assert ledger.total == 4 * KIB
        more = both + 1
        assert ledger.total == 8 * KIB
        del both, more
        assert ledger.total == 0


def test_ignored_is_never_counted():
    data = kib(7)
    with Ledger() as ledger:
        ledger.ignore(data)
        data + 1
        assert ledger.peak == 7 * KIB  # of the sum alone
        seen = kib(2)
        ledger.ignore(seen)
        assert ledger.total == 0


def test_saved_for_backward():
    x = torch.zeros(KIB, requires_grad=True)
    with Ledger() as ledger:
        y = x.exp()
        loss = y.sum()
        del y
        assert ledger.total >= 8 * KIB  # x, and what exp saved
        loss.backward()
        del loss
        assert ledger.total == 8 * KIB  # x and its gradient


# ---- custom operators ----------------------------------------------------------------------------


def test_looks_into_custom_operators():
    x = torch.zeros(KIB)
    with Ledger() as ledger:
        y = through_a_buffer(x)
        assert ledger.total == 8 * KIB
    assert torch.equal(y, torch.ones(KIB))
    assert ledger.peak == (4 + 200 + 4) * KIB
    assert "aten::new_empty" in [entry.operator for entry in ledger.at_peak()]


def linear_loss(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(200, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(1001, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 1001, (200,))
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sees_the_chunk_buffer_of_a_linear_loss(dtype):
    hidden, weight, labels = linear_loss(dtype)
    with Ledger() as ledger:
        loss = linear_cross_entropy_loss(hidden, LMHead(weight), labels, chunk_bytes=1)
        shapes = [entry.shape for entry in ledger.at_peak()]
        assert (64, 1001) in shapes or (64, 1008) in shapes or (64, 1024) in shapes
        loss.backward()
    alone = linear_loss(dtype)
    linear_cross_entropy_loss(alone[0], LMHead(alone[1]), alone[2], chunk_bytes=1).backward()
    assert torch.equal(weight.grad, alone[1].grad) and torch.equal(hidden.grad, alone[0].grad)


# ---- beside the allocator's own count ------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, recompute):
        super().__init__()
        # rows of logits are contiguous then, and softmax makes no copy that no operator shows
        self.embed = torch.nn.Embedding(512, 24)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(4))
        self.recompute = recompute

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:

            def run(x, layer=layer):
                return x + torch.tanh(layer(torch.nn.functional.silu(x)))

            # (the saved state of the random generator is made without an operator)
            options = {"use_reentrant": False, "preserve_rng_state": False}
            x = checkpoint(run, x, **options) if self.recompute else run(x)
        return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_as_the_allocator_counts(recompute, autocast):
    torch.manual_seed(0)
    net = Net(recompute)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    ids = torch.randint(0, 512, (4, 40))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = net(ids).flatten(0, 1)
            head = LMHead(net.embed.weight)  # tied
            loss = linear_cross_entropy_loss(hidden, head, ids.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Ledger() as ledger:
        step()
        before = ledger.total
        ledger.start()
        step()
    with AllocatorPeak() as allocator:
        step()
    assert ledger.peak - before == pytest.approx(allocator.extra, rel=0.01)
