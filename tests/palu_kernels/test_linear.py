"""The linear operators: the same losses and gradients as on logits, without the logits."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from palu_kernels import (
    LMHead,
    linear_cross_entropy_loss,
    linear_kl_loss,
    linear_local_entropy_loss,
    reference,
)
from palu_kernels import torch_backend as eager
from palu_kernels.check.__main__ import CAPS, EPS
from palu_kernels.linear import chunked as loop
from palu_kernels.linear import head as head_module
from palu_kernels.linear import head_gradient, op
from palu_kernels.linear.op import linear_loss
from palu_kernels.roles import linear_role_losses
from palu_kernels.row_loss import KL, CrossEntropy, LocalEntropy, ReferenceArgmaxNLL

ROWS, VOCAB, DIM, K = 70, 101, 24, 9
HEADS = {
    "plain": {},
    "scaled": {"bias": True, "logit_scale": -0.5},
    "capped": {"bias": True, "logit_scale": 2.0, "softcap": 5.0},
}
LOSSES = ("reverse", "forward", "cross_entropy", "global", "local", "number", "entropy", "current")


class Problem:
    """Rows, a head that trains and a frozen one whose logits are small integers, so that every
    dtype finds the same S, ties included."""

    def __init__(self, dtype, head, rows=ROWS, columns=VOCAB, dim=DIM, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        options = {k: v for k, v in HEADS[head].items() if k != "bias"}
        bias = normal(columns) if "bias" in HEADS[head] else None
        self.options = options
        self.hidden = normal(rows, dim).to(dtype).requires_grad_()
        self.weight = (normal(columns, dim) * 3 / dim**0.5).to(dtype).requires_grad_()
        self.bias = None if bias is None else bias.to(dtype).requires_grad_()
        self.ref_hidden = normal(rows, dim).sign().to(dtype)
        self.ref_weight = (normal(columns, dim) / 2).round().clamp(-1, 1).to(dtype)
        self.ref_bias = None if bias is None else bias.detach().round().to(dtype)
        self.labels = torch.randint(0, columns, (rows,), generator=generator)
        self.labels[: max(rows // 8, 1)] = -100
        self.row_weights = torch.rand(rows, generator=generator) - 0.3
        self.k = K

    @property
    def inputs(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def head(self):
        return LMHead(self.weight, self.bias, **self.options)

    @property
    def ref_head(self):
        return LMHead(self.ref_weight, self.ref_bias, **self.options)

    def loss(self, name, reduction, **options):
        """By the linear operators."""
        options = {"reduction": reduction, **options}
        if name == "cross_entropy":
            return linear_cross_entropy_loss(self.hidden, self.head, self.labels, **options)
        ref = () if name == "current" else (self.ref_hidden, self.ref_head)
        if name in ("reverse", "forward"):
            return linear_kl_loss(self.hidden, self.head, *ref, direction=name, **options)
        options |= self.forget(name)
        return linear_local_entropy_loss(self.hidden, self.head, *ref, top_k=self.k, **options)

    def forget(self, name):
        if name in ("entropy", "current"):
            return {"objective": "entropy"}
        return {"center": {"global": "global_mean", "local": "local_mean", "number": 0.5}[name]}

    def plain(self, name, reduction, dtype):
        """By the definition on logits in `dtype`, with autograd: (loss, gradients)."""
        inputs = [t.detach().to(dtype).requires_grad_() for t in self.inputs]
        z = reference.head_logits(*inputs[:2], *(inputs[2:] or [None]), *self.caps)
        ref = [None if t is None else t.to(dtype) for t in (self.ref_weight, self.ref_bias)]
        r = reference.head_logits(self.ref_hidden.to(dtype), *ref, *self.caps)
        count = self.hidden.shape[0]
        if name == "cross_entropy":
            rows = reference.cross_entropy_loss(z, self.labels)
            count = int((self.labels != -100).sum())
        elif name in ("reverse", "forward"):
            rows = reference.kl_loss(z, r, direction=name)
        else:
            chooser = self.chosen_by_current if name == "current" else self.ref_scores
            s = reference.topk_indices(chooser, self.k)
            rows = reference.local_entropy_loss(z, top_k=self.k, indices=s, **self.forget(name))
        total = reduce(rows, reduction, count, self.row_weights)
        return total.detach(), torch.autograd.grad(total, inputs)

    @property
    def chosen_by_current(self):
        """The logits that the operator sees, rounded as they are: S is judged on them."""
        with torch.no_grad():
            bias = torch.zeros(1).to(self.weight.dtype) if self.bias is None else self.bias
            scale = self.options.get("logit_scale", 1.0)
            return torch.addmm(bias, self.hidden, self.weight.t(), beta=scale, alpha=scale)

    @property
    def ref_scores(self):
        """The reference's logits before its cap, which only makes more ties: exact in any dtype."""
        ref = LMHead(
            self.ref_weight.double(), None if self.bias is None else self.ref_bias.double()
        )
        return ref.logits(self.ref_hidden.double()) * self.caps[0]

    @property
    def caps(self):
        return self.options.get("logit_scale", 1.0), self.options.get("softcap")


def reduce(rows, reduction, count, weights):
    if reduction == "none":
        return (rows * weights.to(rows.dtype)).sum()
    return rows.sum() / (count if reduction == "mean" else 1)


def check(problem, name, reduction, **options):
    """The rule of DESIGN.md: at most twice as far from the truth as plain PyTorch in the input's
    dtype, plus a floor, and never further than the cap."""
    dtype = problem.hidden.dtype
    loss = problem.loss(name, reduction, **options)
    if reduction == "none":
        loss = (loss * problem.row_weights.to(loss.dtype)).sum()
    grads = torch.autograd.grad(loss, problem.inputs)
    truth, right = problem.plain(name, reduction, torch.float64)
    _, plain = problem.plain(name, reduction, dtype)
    assert loss.dtype == torch.float64 if dtype == torch.float64 else torch.float32
    rounding = torch.finfo(dtype).eps
    size = max(truth.abs().item(), 0.1)
    assert (loss - truth).abs().item() <= (5e-6 + (4 * rounding if rounding > 1e-4 else 0)) * size
    for ours, exact, theirs in zip(grads, right, plain, strict=True):
        assert ours.dtype == dtype
        norm = exact.norm()
        allowed = 2 * (theirs.double() - exact).norm() + 12 * EPS * norm
        if dtype in CAPS:
            allowed = min(allowed, CAPS[dtype] * norm)
        if options.get("backend") == "triton" and dtype == torch.bfloat16:
            allowed = allowed + rounding * norm  # the interpreter cuts where it should round
        assert norm > 0
        assert (ours.double() - exact).norm() <= allowed


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_float32_by_both_backends(name, head):
    for reduction in ("mean", "sum", "none"):
        check(Problem(torch.float32, head), name, reduction, backend="torch", chunk_bytes=1)
    if head != "plain":  # the kernels see no scale, and nothing of a bias but in the sparse losses
        problem = Problem(torch.float32, head, rows=5)
        check(problem, name, "mean", backend="triton")


def test_chunks_by_kernels(monkeypatch):
    """Of few rows, which the interpreter takes one by one; the last one is shorter."""
    monkeypatch.setattr(loop, "TILE_ROWS", 4)
    problem = Problem(torch.float32, "capped", rows=10)
    check(problem, "reverse", "mean", backend="triton", chunk_bytes=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_other_dtypes(name, head, dtype):
    for reduction in ("mean", "none"):
        check(Problem(dtype, head), name, reduction, backend="torch", chunk_bytes=1)
    turn = LOSSES.index(name) + list(HEADS).index(head)  # a head each for either half dtype
    if dtype == (torch.bfloat16, torch.float16, None)[turn % 3]:
        check(Problem(dtype, head, rows=5), name, "mean", backend="triton")


@pytest.mark.parametrize("name", ["reverse", "global", "cross_entropy"])
@pytest.mark.parametrize("rows,columns,dim", [(1, 1, 1), (1, 5, 3), (130, 7, 5), (65, 257, 2)])
def test_odd_shapes(name, rows, columns, dim):
    problem = Problem(torch.float64, "scaled", rows, columns, dim)
    problem.labels[:] = 0
    for reduction in ("mean", "sum"):
        loss = problem.loss(name, reduction, chunk_bytes=1)
        truth, right = problem.plain(name, reduction, torch.float64)
        torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-14)
        grads = torch.autograd.grad(loss, problem.inputs)
        torch.testing.assert_close(grads, right, rtol=1e-9, atol=1e-13)


def test_chunks_are_whole_tiles_within_their_budget():
    size = 2 * loop.padded(101)
    assert loop.padded(101) == 128 and loop.padded(128256) == 128256
    assert loop.chunk_rows(50, 101, 2, 2**28) == 50
    assert loop.chunk_rows(1000, 101, 2, 2**28) == 1000
    for budget in (1, 64 * size, 130 * size, 300 * size, 511 * size):
        step = loop.chunk_rows(1000, 101, 2, budget)
        assert step % loop.TILE_ROWS == 0
        assert step * size <= max(budget, loop.TILE_ROWS * size)
        # evenly spread: no smaller step needs as few chunks
        assert math.ceil(1000 / step) < math.ceil(1000 / max(step - loop.TILE_ROWS, 1))


def test_rows_of_a_buffer_start_on_16_bytes():
    for dtype in (torch.float32, torch.bfloat16):
        chunk = loop.buffer(torch.empty(0, dtype=dtype), 3, 101)
        assert chunk.shape == (3, 128) and not chunk[:, 101:].any()
        assert all(row.data_ptr() % 16 == 0 for row in chunk)


def test_more_chunks_change_nothing(monkeypatch):
    made = []
    addmm = loop.Head.logits

    def counted(self, hidden, out):
        made.append(hidden.shape[0])
        return addmm(self, hidden, out)

    monkeypatch.setattr(loop.Head, "logits", counted)
    found = []
    for chunk_bytes in (1, 2**28):
        problem = Problem(torch.float64, "capped", rows=200)
        loss = problem.loss("reverse", "mean", chunk_bytes=chunk_bytes)
        found.append((loss.detach(), *torch.autograd.grad(loss, problem.inputs)))
    assert made == [64, 64, 64, 64, 64, 64, 8, 8, 200, 200]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_losses_by_role_share_a_call():
    """Rows with four losses, weighted apart, across chunk borders: the sum of the four alone."""
    problem = Problem(torch.float64, "capped", rows=200)
    generator = torch.Generator().manual_seed(3)
    roles = torch.randint(0, 5, (4, 50), generator=generator)
    labels = problem.labels.clamp(min=0)
    losses = [
        LocalEntropy(K, "flatten", "local_mean", 0.0, "reference"),
        CrossEntropy(),
        KL("reverse"),
        ReferenceArgmaxNLL(),
    ]
    weights = torch.tensor([5, 1, 0.1, 0], dtype=torch.float64)
    hidden, ref_hidden = (x.view(4, 50, -1) for x in (problem.hidden, problem.ref_hidden))
    total, sums = linear_role_losses(
        hidden,
        problem.head,
        roles,
        losses,
        weights,
        ref_hidden=ref_hidden,
        ref_head=problem.ref_head,
        data=[None, labels.view(4, 50), None, None],
        chunk_bytes=1,
    )
    grads = torch.autograd.grad(total, problem.inputs)
    z = problem.head.logits(problem.hidden)
    r = problem.ref_head.logits(problem.ref_hidden)
    likeliest = reference.topk_indices(r, 1)[:, 0]
    one, two, three, four = (roles.flatten() == i for i in (1, 2, 3, 4))
    alone = torch.stack(
        [
            reference.local_entropy_loss(z[one], r[one], top_k=K, center="local_mean").sum(),
            reference.cross_entropy_loss(z[two], labels[two]).sum(),
            reference.kl_loss(z[three], r[three]).sum(),
            reference.cross_entropy_loss(z[four], likeliest[four]).sum(),
        ]
    )
    torch.testing.assert_close(sums, alone.detach(), rtol=1e-12, atol=1e-14)
    right = torch.autograd.grad((alone * weights).sum(), problem.inputs)
    torch.testing.assert_close(grads, right, rtol=1e-10, atol=1e-13)
    assert not sums.requires_grad


# --- what is computed, kept and left alone -----------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("rows", [DIM // 2, ROWS])  # the logits' gradient is kept, or is not
def test_each_gradient_only_if_asked_for(trained, rows, reduction, monkeypatch):
    problem = Problem(torch.float64, "scaled", rows=rows)
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name == trained)
    made = []
    product, add = op.weight_gradient, head_gradient.HeadGradAccumulator.add
    monkeypatch.setattr(op, "weight_gradient", lambda *a: (made.append("kept"), product(*a))[1])

    def counted(self, *args):
        made.append("summed" if self.want_weight else "")
        add(self, *args)

    monkeypatch.setattr(head_gradient.HeadGradAccumulator, "add", counted)
    loss = problem.loss("reverse", reduction)
    loss = (loss * problem.row_weights).sum() if reduction == "none" else loss
    (grad,) = torch.autograd.grad(loss, [getattr(problem, trained)])
    problem.hidden.requires_grad_(), problem.weight.requires_grad_(), problem.bias.requires_grad_()
    _, right = problem.plain("reverse", reduction, torch.float64)
    place = ["hidden", "weight", "bias"].index(trained)
    torch.testing.assert_close(grad, right[place], rtol=1e-9, atol=1e-12)
    wanted = {"summed" if rows == ROWS else "kept"} if trained == "weight" else set()
    assert set(filter(None, made)) == wanted


def test_nothing_is_saved_without_gradients():
    problem = Problem(torch.float32, "plain")
    with torch.no_grad():
        assert problem.loss("reverse", "mean").grad_fn is None
    frozen = problem.hidden.detach()
    head = problem.head.detach()
    assert linear_kl_loss(frozen, head, problem.ref_hidden, problem.ref_head).grad_fn is None


def test_no_large_tensor_is_made_beside_the_buffers(monkeypatch):
    """Whatever the number of rows: one buffer, another one where there is a reference."""
    monkeypatch.setattr(eager, "TILE_ENTRIES", 4 * 1024)
    problem = Problem(torch.float32, "plain", rows=130, columns=1024, dim=4)
    budget = 64 * 1024 * 4
    activities = [torch.profiler.ProfilerActivity.CPU]
    for name in ("reverse", "forward", "cross_entropy", "global", "entropy"):
        options = {"implementation": "dense"} if name in ("global", "entropy") else {}
        with torch.profiler.profile(activities=activities, profile_memory=True) as run:
            problem.loss(name, "mean", chunk_bytes=budget, **options).backward()
        sizes = [event.self_cpu_memory_usage for event in run.events()]
        large = [size for size in sizes if size >= budget / 4]
        assert large == [budget] * (1 if name == "cross_entropy" else 2), name


@pytest.mark.parametrize("rows", [64, 600])  # the logits' gradient is kept, or is not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_backward_makes_the_heads_gradient_and_nothing_as_large(dtype, rows, monkeypatch):
    monkeypatch.setattr(loop, "HEAD_BLOCK_BYTES", 2**16)
    problem = Problem(dtype, "plain", rows=rows, columns=4000, dim=128)
    loss = problem.loss("cross_entropy", "mean") * 3
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as run:
        loss.backward()
    size = 4000 * 128 * dtype.itemsize
    sizes = [event.self_cpu_memory_usage for event in run.events()]
    assert [made for made in sizes if made >= size / 2] == [size]
    _, right = problem.plain("cross_entropy", "mean", torch.float64)
    off = problem.weight.grad.double() - 3 * right[1]
    assert off.norm() < 2**-6 * (3 * right[1]).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kept_gradients_of_several_chunks(reduction, head, dtype, monkeypatch):
    """Forward alone visits the chunks, whatever comes from upstream."""
    problem = Problem(dtype, head, rows=100, columns=150, dim=128)
    made = []
    logits = loop.Head.logits
    monkeypatch.setattr(
        loop.Head, "logits", lambda self, h, out: (made.append(len(h)), logits(self, h, out))[1]
    )
    check(problem, "forward", reduction, chunk_bytes=1)
    assert made == [64, 64, 36, 36]


@pytest.mark.parametrize("rows", [9, 90])  # the logits' gradient is kept, or is not
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_and_negative_upstream_gradients(dtype, reduction, rows):
    """Of losses on float32 weights under autocast: nothing is lost on the way to them."""
    problem = Problem(torch.float32, "scaled", rows=rows)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = problem.loss("reverse", reduction)
    factors = -1e-9 * (1 + torch.arange(rows) % 5) if reduction == "none" else -1e-9
    grads = torch.autograd.grad((loss * factors).sum(), problem.inputs)
    leaves = [t.detach().double().requires_grad_() for t in problem.inputs]
    z = reference.head_logits(*leaves, *problem.caps)
    ref = problem.ref_hidden.double(), problem.ref_weight.double(), problem.ref_bias.double()
    losses = reference.kl_loss(z, reference.head_logits(*ref, *problem.caps))
    losses = losses if reduction == "none" else losses.mean()
    right = torch.autograd.grad((losses * factors).sum(), leaves)
    for ours, exact in zip(grads, right, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - exact).norm() <= CAPS[dtype] * exact.norm()


def test_tied_head():
    problem = Problem(torch.float64, "plain")
    ids = torch.randint(0, VOCAB, (ROWS,))
    loss = linear_cross_entropy_loss(F.embedding(ids, problem.weight), problem.head, ids)
    (grad,) = torch.autograd.grad(loss, [problem.weight])
    logits = F.embedding(ids, problem.weight) @ problem.weight.t()
    (right,) = torch.autograd.grad(F.cross_entropy(logits, ids), [problem.weight])
    torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero_rows(backend):
    for name in LOSSES:
        problem = Problem(torch.float32, "scaled", rows=0)
        for reduction in ("mean", "sum"):
            loss = problem.loss(name, reduction, backend=backend)
            assert loss.item() == 0
            grads = torch.autograd.grad(loss, problem.inputs)
            assert [g.shape for g in grads] == [t.shape for t in problem.inputs]
            assert not any(g.any() for g in grads)
        assert problem.loss(name, "none", backend=backend).shape == (0,)


def test_all_labels_ignored():
    problem = Problem(torch.float32, "plain")
    problem.labels[:] = -100
    loss = problem.loss("cross_entropy", "mean")
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, problem.inputs))


def test_batches_keep_their_shape():
    problem = Problem(torch.float64, "scaled", rows=12)
    flat = problem.loss("reverse", "none")
    batched = linear_kl_loss(
        problem.hidden.view(3, 4, DIM),
        problem.head,
        problem.ref_hidden.view(3, 4, DIM),
        problem.ref_head,
        reduction="none",
    )
    assert torch.equal(batched, flat.view(3, 4))
    strided = problem.hidden.detach().t().contiguous().t()
    assert torch.equal(
        linear_kl_loss(strided, problem.head, problem.ref_hidden, problem.ref_head),
        problem.loss("reverse", "mean"),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_can_be_taken_twice_and_overwrites_nothing(reduction):
    problem = Problem(torch.float32, "capped")
    before = [t.detach().clone() for t in problem.inputs]
    loss = problem.loss("reverse", reduction).sum()
    first = torch.autograd.grad(loss, problem.inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, problem.inputs)
    for a, b, c in zip(first, second, kept, strict=True):
        torch.testing.assert_close(2 * a, b)
        assert torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.inputs, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, problem.inputs)


def test_small_weights_survive_float16():
    """A mean over many rows times a small weight: lost if it entered the half-precision chunk, and
    a GradScaler's factor would come too late."""
    problem = Problem(torch.float16, "plain", rows=2048)
    loss = problem.loss("reverse", "mean") * 1e-3 * 2.0**16
    grads = torch.autograd.grad(loss, problem.inputs)
    _, right = problem.plain("reverse", "mean", torch.float64)
    for ours, exact in zip(grads, right, strict=True):
        exact = exact * 1e-3 * 2.0**16
        assert (ours.double() - exact).norm() <= 2**-9 * exact.norm()


def test_autocast_follows_f_linear():
    problem = Problem(torch.float32, "scaled")
    with torch.autocast("cpu", torch.bfloat16):
        loss = problem.loss("reverse", "mean")
        z = F.linear(problem.hidden, problem.weight, problem.bias)
        r = F.linear(problem.ref_hidden, problem.ref_weight, problem.ref_bias)
    assert z.dtype == torch.bfloat16
    grads = torch.autograd.grad(loss, problem.inputs)
    assert all(g.dtype == torch.float32 for g in grads)
    scale = problem.options["logit_scale"]
    theirs = reference.kl_loss(z.float() * scale, r.float() * scale).mean()
    torch.testing.assert_close(loss, theirs, rtol=5e-3, atol=0)
    _, right = problem.plain("reverse", "mean", torch.float64)
    by_linear = torch.autograd.grad(theirs, problem.inputs)
    for ours, plain, exact in zip(grads, by_linear, right, strict=True):
        error = (ours.double() - exact).norm()
        assert 1e-5 * exact.norm() < error  # it did run in bfloat16
        assert error <= 1.2 * (plain.double() - exact).norm()


@pytest.mark.parametrize("what", ["cast", "mean_row"])
def test_what_a_frozen_head_keeps(what, monkeypatch):
    weight, bias = torch.randn(7, 5), torch.randn(7)
    head = LMHead(weight, bias)
    make = {"cast": lambda: head.cast(torch.bfloat16), "mean_row": head.mean_row}[what]
    first = make()
    assert make()[0] is first[0] and make()[1] is first[1]
    for written in (weight, bias):
        with torch.no_grad():
            written.mul_(2)
        second = make()
        assert second[0] is not first[0] and make()[0] is second[0]
        right = LMHead(weight.clone(), bias.clone())
        fresh = {"cast": lambda h=right: h.cast(torch.bfloat16), "mean_row": right.mean_row}[what]()
        assert all(map(torch.equal, second, fresh))
        first = second
    # a graph would read what was kept when the head has changed
    with monkeypatch.context() as patch:
        patch.setattr(head_module, "_capturing", lambda _: True)
        assert make()[0] is not second[0]
    assert make()[0] is second[0]
    weight.requires_grad_()  # some optimizers write by raw pointers
    assert make()[0] is not make()[0] and not make()[0].requires_grad
    with torch.inference_mode():
        head = LMHead(torch.randn(7, 5))  # its writes are not counted
        assert make()[0] is not make()[0]


def test_a_frozen_head_is_cast_once():
    """Under autocast, that of the reference too; one that trains in every call."""
    problem = Problem(torch.float32, "scaled", rows=9)
    frozen, trained, ref = problem.head.detach(), problem.head, problem.ref_head
    weight, casts = problem.weight, []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "palu_kernels":
                with self:
                    made = torch._library.custom_ops.OPDEFS[func._schema.name]
                    return made._init_fn(*args, **kwargs or {})
            result = func(*args, **kwargs or {})
            is_cast = func._schema.name in ("aten::to", "aten::_to_copy")
            if is_cast and args[0].shape == weight.shape and result.dtype != args[0].dtype:
                casts.append(result.dtype)
            return result

    for head, expected in ((frozen, [2, 0, 0]), (trained, [1, 1, 1])):
        for count in expected:
            casts.clear()
            with torch.autocast("cpu", torch.bfloat16), Casts():
                linear_kl_loss(problem.hidden, head, problem.ref_hidden, ref)
            assert casts == [torch.bfloat16] * count


# --- torch.compile, higher orders --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("reverse", "mean"),
        ("global", "none"),
        ("cross_entropy", "mean"),
        pytest.param("reverse", "none", marks=pytest.mark.slow),
        pytest.param("global", "mean", marks=pytest.mark.slow),
        pytest.param("cross_entropy", "none", marks=pytest.mark.slow),
    ],
)
def test_one_node_under_compile(name, reduction):
    problem = Problem(torch.float32, "capped")

    def step(*_):
        loss = problem.loss(name, reduction)
        return loss if reduction != "none" else (loss * problem.row_weights).sum()

    nodes = []

    def backend(module, _):
        nodes.extend(n for n in module.graph.nodes if "palu_kernels" in str(n.target))
        return module

    expected = step()
    right = torch.autograd.grad(expected, problem.inputs)
    found = torch.compile(step, fullgraph=True, backend=backend)()
    assert len(nodes) == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, problem.inputs), right)
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(torch.autograd.grad(found, problem.inputs), right)
    torch._dynamo.reset()


def test_compiled_once_for_any_number_of_rows():
    problem = Problem(torch.float32, "scaled")
    head, ref_head = problem.head, problem.ref_head
    loss = torch.compile(
        lambda h, r: linear_kl_loss(h, head, r, ref_head),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (70, 41, 9):
        h = problem.hidden[:rows].detach().requires_grad_()
        found = loss(h, problem.ref_hidden[:rows])
        right = linear_kl_loss(h, head, problem.ref_hidden[:rows], ref_head)
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(*(torch.autograd.grad(x, [h])[0] for x in (found, right)))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, monkeypatch):
    """The calls that the operators make, replayed for torch's own checks of a custom op."""
    calls = []
    monkeypatch.setattr(op, "linear_loss", lambda *a: (calls.append(a), linear_loss(*a))[1])
    kinds = [("reverse", "mean"), ("cross_entropy", "none"), ("local", "sum")]
    # what the fakes promise is the same for both: the interpreter has one of them
    for name, reduction in kinds if backend == "torch" else kinds[1:2]:
        problem = Problem(torch.float32, "scaled", rows=6, columns=11, dim=3)
        problem.loss(name, reduction, backend=backend)
        problem.hidden.requires_grad_(False)
        problem.loss(name, reduction, backend=backend)
    # rows picked before the op, as in eager code, and inside it, as in compiled code
    problem = Problem(torch.float32, "scaled", rows=6, columns=11, dim=3)
    roles = torch.tensor([[2, 0, 1], [1, 2, 0]])
    given = {"ref_hidden": problem.ref_hidden.view(2, 3, -1), "ref_head": problem.ref_head}
    losses = [LocalEntropy(3, "entropy", "global_mean", 0.0, "reference"), KL("forward")]
    args = problem.hidden.view(2, 3, -1), problem.head, roles, losses, torch.ones(2)
    linear_role_losses(*args, **given, backend=backend)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    linear_role_losses(*args, **given, backend=backend)
    # of the kernels one call of the first operator, and the one with rows picked inside
    for call in calls if backend == "torch" else calls[::3]:
        torch.library.opcheck(linear_loss, call)


def test_what_is_not_defined_says_so():
    problem = Problem(torch.float32, "plain")
    loss = problem.loss("reverse", "mean")
    (grad,) = torch.autograd.grad(loss, [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(
            lambda h: linear_cross_entropy_loss(h[None], problem.head, problem.labels[:1])
        )(problem.hidden)
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        dual = forward_ad.make_dual(problem.hidden.detach(), torch.ones(ROWS, DIM))
        linear_cross_entropy_loss(dual, problem.head, problem.labels)


def test_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            problem = Problem(torch.float32, "capped", rows=9)
            loss = problem.loss("reverse", "mean", backend="triton")
            found.append((loss.detach(), *torch.autograd.grad(loss, problem.inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,words",
    [
        (
            {"hidden": torch.randn(4, 5)},
            ValueError,
            r"hidden has shape \[4, 5\]; it must be \[N, ",
        ),
        ({"hidden": [1.0]}, TypeError, "hidden is a list; it must be a torch.Tensor"),
        ({"hidden": torch.randn(4, DIM).long()}, TypeError, "hidden has dtype torch.int64"),
        (
            {"hidden": torch.randn(4, DIM).double()},
            TypeError,
            "head.weight has dtype",
        ),
        (
            {"head": torch.randn(3, 3)},
            TypeError,
            "head beside hidden is a Tensor",
        ),
        (
            {"ref_hidden": torch.randn(3, DIM)},
            ValueError,
            r"ref_hidden has shape \[3, 24\]",
        ),
        ({"ref_head": None}, ValueError, "ref_head is None and head requires grad"),
        ({"direction": "up"}, ValueError, "direction is 'up'; it must be one of"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0; it must be at least 1"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        (
            {"ref_hidden": torch.randn(4, DIM, requires_grad=True)},
            ValueError,
            "ref_hidden requires grad; it must be frozen",
        ),
        (
            {"ref_head": LMHead(torch.randn(7, DIM))},
            ValueError,
            "ref_head has 7 rows of weight; it must have those of head, 101",
        ),
    ],
)
def test_bad_input(change, error, words):
    problem = Problem(torch.float32, "plain", rows=4)
    call = {
        "hidden": problem.hidden,
        "head": problem.head,
        "ref_hidden": problem.ref_hidden,
        "ref_head": problem.ref_head,
    }
    with pytest.raises(error, match=words):
        linear_kl_loss(**{**call, **change})


def test_bad_integers():
    problem = Problem(torch.float32, "plain", rows=4)
    with pytest.raises(ValueError, match="labels holds 101; a label must be"):
        linear_cross_entropy_loss(problem.hidden, problem.head, torch.tensor([0, 1, 2, 101]))
    with pytest.raises(ValueError, match=r"labels has shape \[3\]; it must be \[4\] beside hidden"):
        linear_cross_entropy_loss(problem.hidden, problem.head, torch.tensor([0, 1, 2]))
    indices = torch.tensor([[0, 1]]).repeat(4, 1)
    with pytest.raises(ValueError, match="top_k is 3 and indices holds 2 a row"):
        linear_local_entropy_loss(problem.hidden, problem.head, top_k=3, indices=indices)
    indices[2] = 1
    with pytest.raises(ValueError, match="same index twice"):
        linear_local_entropy_loss(problem.hidden, problem.head, top_k=2, indices=indices)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        ({"weight": torch.randn(3)}, ValueError, r"weight has shape \[3\]; it must be \[V, D\]"),
        ({"weight": [[1.0]]}, TypeError, "weight is a list"),
        ({"bias": torch.randn(4)}, ValueError, r"bias has shape \[4\]; it must be \[5\]"),
        ({"bias": torch.randn(5).double()}, ValueError, "bias is torch.float64"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; it must be finite"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0; it must be above 0"),
        ({"softcap": "30"}, TypeError, "softcap is '30'"),
    ],
)
def test_bad_heads(arguments, error, words):
    with pytest.raises(error, match=words):
        LMHead(**{"weight": torch.randn(5, 3), **arguments})


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_saved_tensors_are_unpacked_once(name, reduction):
    """More is what `torch.utils.checkpoint` refuses (non-reentrant, its default)."""
    problem = Problem(torch.float32, "scaled")
    unpacked = []

    def unpack(at):
        unpacked.append(at)
        return kept[at]

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t), len(kept) - 1)[1], unpack
    ):
        loss = problem.loss(name, reduction)
    grads = torch.autograd.grad(loss.sum(), problem.inputs)
    assert sorted(unpacked) == list(range(len(kept)))
    again = torch.utils.checkpoint.checkpoint(
        lambda *_: problem.loss(name, reduction), *problem.inputs, use_reentrant=False
    )
    assert all(map(torch.equal, grads, torch.autograd.grad(again.sum(), problem.inputs)))
