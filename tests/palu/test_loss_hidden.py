"""PALULoss.from_hidden: the loss on logits, without them."""

import pytest
import torch

from palu import PALULoss
from palu_kernels import LMHead, topk_indices
from tests.palu.test_loss import V, batch

D = 6


def problem(softcap=None, bias=True, seed=0):
    _, labels, _ = batch(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    hidden = normal(*labels.shape, D).requires_grad_()
    weight = normal(V, D).requires_grad_()
    offset = normal(V).requires_grad_() if bias else None
    ref_hidden = hidden.detach() + 0.3 * normal(*hidden.shape)
    ref_weight = weight.detach() + 0.1 * normal(*weight.shape)
    head = LMHead(weight, offset, 1.3, softcap)
    ref_head = LMHead(ref_weight, None if offset is None else offset.detach(), 1.3, softcap)
    return hidden, head, labels, ref_hidden, ref_head


def inputs_of(hidden, head):
    return [t for t in (hidden, head.weight, head.bias) if t is not None]


def by_logits(loss, hidden, head, labels, ref_hidden, ref_head, **counts):
    return loss(head.logits(hidden), labels, ref_head.logits(ref_hidden), **counts)


def same(ours, theirs, hidden, head):
    for name in ("loss", "forget", "preserve", "num_forget", "num_preserve"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=0)
    inputs = inputs_of(hidden, head)
    grads = [torch.autograd.grad(out.loss, inputs, retain_graph=True) for out in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("preserve", ["reverse_kl", "forward_kl", "nll", None])
@pytest.mark.parametrize("select_from", ["reference", "current"])
@pytest.mark.parametrize(
    ("objective", "center"),
    [("flatten", "global_mean"), ("flatten", "local_mean"), ("flatten", 0.5), ("entropy", 0.0)],
)
def test_it_is_the_loss_on_logits(objective, center, select_from, preserve, softcap):
    options = {"top_k": 5, "prefix_length": 2, "forget_weight": 0.7, "preserve_weight": 0.3}
    options |= {"objective": objective, "center": center, "eos_token_id": 2}
    loss = PALULoss(**options, preserve=preserve, select_from=select_from)
    made = problem(softcap)
    hidden, head, labels, ref_hidden, ref_head = made
    theirs = by_logits(loss, *made)
    assert theirs.num_forget > 3 and theirs.num_preserve > 3
    same(loss.from_hidden(*made), theirs, hidden, head)
    counts = {"num_forget": 11, "num_preserve": torch.tensor(3.0)}
    same(loss.from_hidden(*made, **counts), by_logits(loss, *made, **counts), hidden, head)

    # from what a cache holds: indices of the forget rows, hidden states of the preserve rows
    roles = loss.roles(labels)[:, 1:]
    kept = ref_hidden[:, :-1][roles == 2]
    indices = None
    if select_from == "reference":
        chosen = ref_head.logits(ref_hidden[:, :-1][roles == 1])
        indices = topk_indices(chosen, 5)
    cached = loss.from_hidden(hidden, head, labels, kept, ref_head, ref_indices=indices)
    same(cached, theirs, hidden, head)


def test_indices_by_row_that_look_like_the_batch():
    """As many forget rows as examples, and k as long as they are."""
    hidden, head, labels, ref_hidden, ref_head = made = problem()
    labels[labels >= 0] = -200
    labels[:, 3] = 9
    loss = PALULoss(top_k=labels.shape[1])
    indices = topk_indices(ref_head.logits(ref_hidden[:, 2]), labels.shape[1])
    assert indices.shape == labels.shape
    found = loss.from_hidden(*made, ref_indices=indices)
    same(found, by_logits(loss, *made), hidden, head)


def test_frozen_head_of_its_own():
    loss = PALULoss(top_k=5)
    hidden, head, labels, ref_hidden, _ = problem()
    frozen = head.detach()
    ours = loss.from_hidden(hidden, frozen, labels, ref_hidden)
    theirs = loss(frozen.logits(hidden), labels, frozen.logits(ref_hidden))
    torch.testing.assert_close(ours.loss, theirs.loss)
    (grad,) = torch.autograd.grad(ours.loss, [hidden])
    torch.testing.assert_close(grad, *torch.autograd.grad(theirs.loss, [hidden]))


def test_no_row_at_all():
    loss = PALULoss(top_k=5)
    hidden, head, labels, ref_hidden, ref_head = problem()
    out = loss.from_hidden(hidden, head, torch.full_like(labels, -100), ref_hidden, ref_head)
    assert out.loss.item() == out.forget.item() == out.preserve.item() == 0
    grads = torch.autograd.grad(out.loss, inputs_of(hidden, head))
    assert not any(g.any() for g in grads)


def test_bad_input():
    loss = PALULoss(top_k=5)
    hidden, head, labels, ref_hidden, ref_head = problem()
    out = loss.from_hidden(hidden, head, labels, ref_hidden, ref_head)
    forget, rows = int(out.num_forget), int(out.num_preserve)

    def refused(words, error=ValueError, loss=loss, **change):
        call = {
            "hidden": hidden,
            "head": head,
            "labels": labels,
            "ref_hidden": ref_hidden,
            "ref_head": ref_head,
        }
        with pytest.raises(error, match=words):
            loss.from_hidden(**{**call, **change})

    refused(r"hidden has shape \[3, 6\]; it must be \[B, T, 6\]", hidden=hidden[0, :3])
    refused(r"labels has shape \[4, 7\]; it must be \[4, 8\]", labels=labels[:, 1:])
    refused("labels holds 23; a label must be", labels=labels.clamp(max=2).where(labels < 9, 23))
    refused("neither ref_hidden .* nor ref_indices is given", ref_hidden=None, ref_head=None)
    refused(r"ref_hidden has shape \[4, 7, 6\]", ref_hidden=ref_hidden[:, 1:])
    refused("neither ref_hidden", ref_hidden=ref_hidden[0, :rows])
    indices = torch.zeros(2, 5, dtype=torch.int32)
    refused(f"ref_indices has shape .2, 5.; it must be .{forget}, 5.", ref_indices=indices)
    refused("ref_indices holds 3 a row", ref_indices=torch.zeros(forget, 3, dtype=torch.int32))
    current = PALULoss(top_k=5, select_from="current")
    refused(
        f"ref_hidden has 3 rows.*{rows} preserve rows", loss=current, ref_hidden=ref_hidden[0, :3]
    )
    refused("ref_indices is given and select_from is 'current'", loss=current, ref_indices=indices)
    refused("ref_hidden is None; with preserve='reverse_kl'", loss=current, ref_hidden=None)
    refused("ref_head is None and head requires grad", ref_head=None)
    refused("the head beside hidden is a Linear", TypeError, head=torch.nn.Linear(D, V))
