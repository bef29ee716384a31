"""PALULoss against METHOD's formulas, written out row by row in float64."""

import math

import pytest
import torch

from palu import PALULoss
from palu.data.roles import IGNORE, KEEP
from palu_kernels import local_entropy_loss

V = 23


def batch(seed=0, dtype=torch.float64):
    """Runs at either end of a row, an EOS inside, a row without any sensitive token."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(
        [
            [5, 6, 7, 8, 9, 10, KEEP, IGNORE],
            [IGNORE, IGNORE, KEEP, 4, 3, 2, 2, 6],
            [IGNORE, KEEP, KEEP, KEEP, KEEP, IGNORE, IGNORE, IGNORE],
            [IGNORE] * 8,
        ]
    )
    logits = 2 * torch.randn(*labels.shape, V, dtype=torch.float64, generator=generator)
    ref = logits + torch.randn(logits.shape, dtype=torch.float64, generator=generator)
    return logits.to(dtype), labels, ref.to(dtype)


def expected_rows(labels, prefix_length, eos):
    """(forget rows, preserve rows) as (b, t) of the logits, by the plainest loop."""
    forget, preserve = [], []
    for b, row in enumerate(labels.tolist()):
        run = 0
        for t, label in enumerate(row):
            if t == 0:
                continue
            if label >= 0 and label != eos:
                run += 1
                if prefix_length <= 0 or run <= prefix_length:
                    forget.append((b, t - 1))
            else:
                run = 0
                if label == KEEP or (label >= 0 and label == eos):
                    preserve.append((b, t - 1))
    return forget, preserve


def expected_forget(z, chooser, k, objective, center):
    order = sorted(range(V), key=lambda j: (-chooser[j].item(), j))[:k]
    chosen = z[order]
    if objective == "entropy":
        q = chosen.softmax(-1)
        return math.log(len(order)) + (q * q.log()).sum()
    c = {"global_mean": z.mean(), "local_mean": chosen.mean()}.get(center, center)
    return ((chosen - c) ** 2).sum() / len(order)


def expected_preserve(z, r, how):
    p, q = z.log_softmax(-1), r.log_softmax(-1)
    if how == "nll":
        return -p[r.argmax()]
    return (p.exp() * (p - q)).sum() if how == "reverse_kl" else (q.exp() * (q - p)).sum()


@pytest.mark.parametrize("preserve", ["reverse_kl", "forward_kl", "nll", None])
@pytest.mark.parametrize("select_from", ["reference", "current"])
@pytest.mark.parametrize(
    ("objective", "center"),
    [
        ("flatten", "global_mean"),
        ("flatten", "local_mean"),
        ("flatten", -0.7),
        ("entropy", "global_mean"),
    ],
)
@pytest.mark.parametrize(("prefix_length", "top_k", "eos"), [(3, 5, None), (0, 99, 2), (1, 1, 6)])
def test_formulas(preserve, select_from, objective, center, prefix_length, top_k, eos):
    logits, labels, ref = batch()
    logits.requires_grad_()
    loss_fn = PALULoss(
        top_k=top_k,
        prefix_length=prefix_length,
        objective=objective,
        center=center,
        preserve=preserve,
        forget_weight=0.3,
        preserve_weight=1.7,
        select_from=select_from,
        eos_token_id=eos,
    )
    out = loss_fn(logits, labels, ref)
    forget_rows, preserve_rows = expected_rows(labels, prefix_length, eos)
    forget = torch.stack(
        [
            expected_forget(
                logits[i],
                (ref if select_from == "reference" else logits)[i],
                top_k,
                objective,
                center,
            )
            for i in forget_rows
        ]
    ).mean()
    kept = logits.new_zeros(())
    if preserve:
        kept = torch.stack(
            [expected_preserve(logits[i], ref[i], preserve) for i in preserve_rows]
        ).mean()
    total = 0.3 * forget + 1.7 * kept
    torch.testing.assert_close(out.loss, total)
    torch.testing.assert_close(out.forget, forget.detach())
    torch.testing.assert_close(out.preserve, kept.detach())
    assert (out.num_forget, out.num_preserve) == (len(forget_rows), len(preserve_rows))
    assert not (out.forget.requires_grad or out.preserve.requires_grad)
    (expected,) = torch.autograd.grad(total, logits, retain_graph=True)
    (grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(grad, expected)
    assert grad.abs().sum(-1).count_nonzero() <= len(forget_rows) + len(preserve_rows)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_float64(backend, dtype):
    logits, labels, ref = batch(dtype=dtype)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = PALULoss(top_k=5, backend=backend)(x, labels, ref)
    truth = PALULoss(top_k=5)(y, labels, ref.double())
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    truth.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    error = (x.grad.double() - y.grad).norm() / y.grad.norm()
    assert error < tolerance


@pytest.mark.parametrize(
    "labels",
    [
        [[IGNORE, IGNORE, IGNORE]],
        [[IGNORE, KEEP, KEEP]],
        [[IGNORE, 3, 4]],
        [[3, IGNORE, IGNORE]],
    ],
    ids=["nothing", "no forget row", "no preserve row", "position 0 only"],
)
def test_terms_without_rows_are_zero(labels):
    labels = torch.tensor(labels)
    logits = torch.randn(1, 3, V, requires_grad=True)
    out = PALULoss(top_k=5)(logits, labels, torch.randn(1, 3, V))
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad.isfinite().all()
    assert (out.forget == 0) == (out.num_forget == 0)
    assert (out.preserve == 0) == (out.num_preserve == 0)


def test_denominators_make_two_halves_one_step():
    logits, labels, ref = batch()
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss_fn = PALULoss(top_k=5)
    whole = loss_fn(x, labels, ref)
    whole.loss.backward()
    counts = {"num_forget": whole.num_forget, "num_preserve": whole.num_preserve.item()}
    parts = [loss_fn(y[i : i + 2], labels[i : i + 2], ref[i : i + 2], **counts) for i in (0, 2)]
    sum(p.loss for p in parts).backward()
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(x.grad, y.grad)
    assert sum(p.num_forget for p in parts) == whole.num_forget
    # fewer than one row a process is a fair share of one
    half = loss_fn(logits, labels, ref, num_forget=0.5)
    torch.testing.assert_close(half.forget, 2 * whole.forget * whole.num_forget)


def test_rows_picked_beforehand():
    logits, labels, ref = batch()
    loss_fn = PALULoss(top_k=5)
    roles = loss_fn.roles(labels)[:, 1:]
    keep = roles != 0
    rows = loss_fn.from_rows(logits[:, :-1][keep], roles[keep], ref[:, :-1][keep])
    for a, b in zip(rows, loss_fn(logits, labels, ref), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="row_roles holds -200; a role must be 0"):
        loss_fn.from_rows(logits[0, :4], torch.tensor([KEEP, 7, 9, IGNORE]), ref[0, :4])
    with pytest.raises(TypeError, match=r"row_roles has dtype torch\.bool; it must be int8"):
        loss_fn.from_rows(logits[0, :2], torch.tensor([True, False]), ref[0, :2])


def test_no_reference_is_needed_to_select_from_current_and_preserve_nothing():
    logits, labels, _ = batch()
    loss_fn = PALULoss(top_k=5, select_from="current", preserve=None)
    assert not loss_fn.needs_reference
    forget_rows, _ = expected_rows(labels, 3, None)
    rows = torch.stack([logits[i] for i in forget_rows])
    torch.testing.assert_close(loss_fn(logits, labels).loss, local_entropy_loss(rows, top_k=5))


def test_drop_in_step_learns():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, V)
    hidden, labels = torch.randn(2, 6, 8), torch.tensor([[IGNORE, 3, 4, KEEP, 5, KEEP]] * 2)
    with torch.no_grad():
        ref = head(hidden)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        out = PALULoss(top_k=5, objective="entropy")(head(hidden), labels, ref)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.forget.item())
    assert losses[-1] < 0.2 * losses[0]


GOOD = (torch.randn(1, 3, V), torch.tensor([[IGNORE, 3, KEEP]]), torch.randn(1, 3, V))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k is 0; it must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k is 1.5"),
        ({"prefix_length": None}, TypeError, "prefix_length is None"),
        ({"objective": "level"}, ValueError, "objective is 'level'; it must be one of"),
        ({"center": "mean"}, ValueError, "center is 'mean'; it must be"),
        ({"preserve": "kl"}, ValueError, "preserve is 'kl'; it must be one of 'reverse_kl'"),
        ({"forget_weight": -1}, ValueError, "forget_weight is -1; it must be a finite number"),
        ({"preserve_weight": "1"}, TypeError, r"preserve_weight is '1' \(str\)"),
        ({"select_from": "me"}, ValueError, "select_from is 'me'; it must be one of"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id"),
        ({"backend": "cpu"}, ValueError, "backend is 'cpu'; it must be one of"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        PALULoss(**options)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((GOOD[0][0], GOOD[1], GOOD[2]), ValueError, r"logits has shape \[3, 23\]; it must be \[B"),
        ((GOOD[0], GOOD[1][:, :2], GOOD[2]), ValueError, r"labels has shape \[1, 2\]"),
        ((GOOD[0], GOOD[1].float(), GOOD[2]), TypeError, "labels has dtype torch.float32"),
        ((GOOD[0], GOOD[1] * 7, GOOD[2]), ValueError, "labels holds -700; a label must be -100"),
        ((GOOD[0], GOOD[1].clamp(min=V), GOOD[2]), ValueError, r"or a token id in 0\.\.22"),
        ((GOOD[0], GOOD[1], None), ValueError, "ref_logits is None"),
        ((GOOD[0], GOOD[1], GOOD[2][:, :2]), ValueError, r"ref_logits has shape \[1, 2, 23\]"),
        (
            (GOOD[0], GOOD[1], GOOD[2].clone().requires_grad_()),
            ValueError,
            "ref_logits requires grad",
        ),
    ],
)
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=message):
        PALULoss(top_k=5)(*arguments)


def test_bad_denominators():
    with pytest.raises(ValueError, match="num_forget is -2; it must be a finite number"):
        PALULoss()(*GOOD, num_forget=-2)
    with pytest.raises(TypeError, match="num_preserve is '3'"):
        PALULoss()(*GOOD, num_preserve="3")
    with pytest.raises(ValueError, match=r"num_forget has shape \[2\]"):
        PALULoss()(*GOOD, num_forget=torch.ones(2))
    # The value of a tensor is not looked at: a number that is no count gives no number.
    for wrong in (-2.0, float("nan")):
        assert PALULoss()(*GOOD, num_forget=torch.tensor(wrong)).loss.isnan()
    assert PALULoss()(*GOOD, num_forget=torch.tensor(0)).loss.isfinite()
