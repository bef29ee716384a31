"""What lies beyond a row's end reaches no result: fresh memory, or a neighbour that is not finite.

PyTorch's bfloat16 products on CPUs with AMX read it (`layout.READ`). `Products` looks at what they
could read, on every processor, and does what such a CPU does.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import palu_kernels as pk
from palu import PALULoss
from palu_kernels.check.__main__ import CAPS, DTYPES, EPS, FLOOR
from palu_kernels.check.linear_cases import compare_linear, linear_cases, poisoned
from palu_kernels.layout import READ
from palu_kernels.linear import chunked as linear
from palu_kernels.linear import op as linear_op

LEFT = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "addmv": 1, "addmv_": 1}


class Products(TorchDispatchMode):
    """Every matrix product, those inside of palu's operators too."""

    def __init__(self, amx=False):
        super().__init__()
        self.amx, self.seen, self.bad = amx, set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("palu", "palu_kernels"):
            with self:
                made = torch._library.custom_ops.OPDEFS[func._schema.name]
                return made._init_fn(*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name in LEFT:
            self.seen.add(name)
            for operand in args[LEFT[name] : LEFT[name] + 2]:
                memory = operand.new_empty(0).set_(operand.untyped_storage())
                if not memory.isfinite().all():
                    self.bad.append((name, tuple(operand.shape), operand.stride()))
            if self.amx:
                add_what_is_read(result, args[LEFT[name]])
        return result


def add_what_is_read(result, left):
    """0 times what follows each row of the left side, up to the next multiple of `READ`; NaN beyond
    its memory."""
    more = -left.shape[-1] % READ
    if left.dtype != torch.bfloat16 or left.dim() < 2 or left.stride(-1) != 1 or not more:
        return
    memory = left.new_empty(0).set_(left.untyped_storage())
    memory = torch.cat([memory, torch.full_like(memory[:1], torch.nan).expand(READ)])
    start = left.storage_offset() + left.shape[-1]
    beyond = memory.as_strided((*left.shape[:-1], more), left.stride(), start)
    result += (0 * beyond).sum(-1, keepdim=True)


N, D, V, K = 70, 33, 123, 20


def tensors(dtype, n=N, d=D):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return normal(n, d), normal(V, d), normal(V), normal(n, d), normal(V, d)


def linear_losses(dtype, backend="torch", n=N, d=D):
    """name -> hidden rows -> losses of the rows and the gradients of hidden rows, weight, bias."""
    hidden, weight, bias, ref_hidden, ref_weight = tensors(dtype, n, d)
    labels = torch.arange(n) % V
    s = pk.topk_indices(torch.randn(n, V, generator=torch.Generator().manual_seed(1)), K)

    def of(loss, bias, *, by_reference=True):
        frozen = (ref_hidden, pk.LMHead(ref_weight)) if by_reference else ()

        def call(hidden):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
            rows = loss(leaves[0], pk.LMHead(*leaves[1:]), *frozen, reduction="none")
            mean = loss(leaves[0], pk.LMHead(*leaves[1:]), *frozen, reduction="mean")
            weights = torch.arange(n) + 1.0
            grads = torch.autograd.grad((rows * weights).sum() + mean, leaves)
            return [rows.detach(), *grads]

        return lambda h=hidden: call(h)

    def forget(**more):
        return lambda *a, **k: pk.linear_local_entropy_loss(
            *a, top_k=K, chunk_bytes=1, backend=backend, **more, **k
        )

    def kl(**more):
        return lambda *a, **k: pk.linear_kl_loss(*a, chunk_bytes=1, backend=backend, **more, **k)

    def nll(hidden, head, **k):
        options = {"chunk_bytes": 1, "backend": backend}
        return pk.linear_cross_entropy_loss(hidden, head, labels, **options, **k)

    return {
        "reverse kl": of(kl(), bias),
        "forward kl": of(kl(direction="forward"), None),
        "cross entropy": of(nll, bias, by_reference=False),
        "flatten dense": of(forget(implementation="dense"), bias),
        "flatten sparse": of(forget(implementation="sparse"), bias),
        "flatten by current": of(forget(), None, by_reference=False),
        "entropy dense": of(forget(objective="entropy", implementation="dense"), None),
        "entropy sparse": of(forget(objective="entropy", indices=s), None, by_reference=False),
        "local sparse": of(forget(center="local_mean", implementation="sparse"), None),
    }


def logits_losses(dtype, backend="torch"):
    """name -> logits, loss and their gradient, of rows that are laid out in several ways."""
    generator = torch.Generator().manual_seed(2)
    z, r = (torch.randn(2, 5, V + 4, generator=generator).to(dtype) for _ in range(2))
    loss = {
        "kl": lambda z, r, **k: pk.kl_loss(z, r, **k),
        "flatten": lambda z, r, **k: pk.local_entropy_loss(z, r, top_k=K, **k),
        "current": lambda z, r, **k: pk.local_entropy_loss(z, top_k=K, **k),
        "cross entropy": lambda z, r, **k: pk.cross_entropy_loss(z, r.argmax(-1), **k),
        "topk": lambda z, r, **k: pk.topk_indices(z, K, **k).float() + 0 * z.sum(),
    }

    def of(f, cut):
        def call():
            with_grad = cut(z).detach().requires_grad_()
            made = f(with_grad, cut(r), backend=backend)
            grad = torch.autograd.grad(made.sum(), with_grad)[0]
            memory = grad.new_empty(0).set_(grad.untyped_storage())
            return [made.detach(), grad, memory]

        return call

    return {
        f"{name} {shape}": of(f, cut)
        for name, f in loss.items()
        for shape, cut in {
            "plain": lambda t: t[..., :V].contiguous(),
            "apart": lambda t: t[0, :, 2 : 2 + V],
            "batches apart": lambda t: t[:, :3, :V],
        }.items()
    }


def batch_losses(dtype, backend="torch"):
    """PALULoss on logits and on hidden rows, eager and as the one node that is compiled."""
    hidden, weight, _, ref_hidden, ref_weight = tensors(dtype)
    hidden, ref_hidden = hidden.view(2, -1, D), ref_hidden.view(2, -1, D)
    labels = torch.full((2, N // 2), -200)
    labels[:, ::3] = 4
    labels[:, 0] = -100
    loss = PALULoss(top_k=K, backend=backend)

    def on_logits():
        z, r = (pk.LMHead(w).logits(h) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
        z = z.detach().requires_grad_()
        out = loss(z, labels, r)
        return [out.loss.detach(), out.forget, *torch.autograd.grad(out.loss, z)]

    def on_hidden():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = loss.from_hidden(h, pk.LMHead(w), labels, ref_hidden, pk.LMHead(ref_weight))
        return [out.loss.detach(), out.forget, *torch.autograd.grad(out.loss, (h, w))]

    def as_one_node():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return on_hidden()

    return {"logits": on_logits, "hidden": on_hidden, "hidden, one node": as_one_node}


ALL = {"linear": linear_losses, "logits": logits_losses, "batch": batch_losses}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", ALL)
def test_fresh_memory_reaches_no_result(group, dtype):
    for name, call in ALL[group](dtype).items():
        plain = call()
        products = Products()
        with poisoned(), products:
            filled = call()
        for a, b in zip(plain, filled, strict=True):
            assert b.isfinite().all(), name
            assert torch.equal(a, b), name
        assert not products.bad, name
        if group == "linear":
            assert products.seen >= {"addmm"} or dtype == torch.float16 or "sparse" in name


def test_fresh_memory_reaches_no_result_of_the_kernels(monkeypatch):
    """Chunks of few rows, the last of one, whose head's gradient is kept, and added up."""
    monkeypatch.setattr(linear, "TILE_ROWS", 4)
    # the others: test_check_linear.py
    call = linear_losses(torch.bfloat16, "triton", 9, 3)["reverse kl"]
    plain, products = call(), Products()
    with poisoned(), products:
        filled = call()
    assert all(map(torch.equal, plain, filled)) and not products.bad


@pytest.mark.parametrize("name", linear_losses(torch.bfloat16))
def test_a_row_that_is_not_finite_spoils_no_other_under_amx(name):
    """`Products` does what the processor does: without zeros between the rows this fails."""
    hidden = tensors(torch.bfloat16)[0]
    call = linear_losses(torch.bfloat16)[name]
    right = call(hidden)
    for row, value in ((3, torch.nan), (4, torch.inf), (63, torch.nan), (66, torch.nan)):
        hidden[row, 5] = value
    with poisoned(), Products(amx=True):
        found = call(hidden)
    lost = torch.zeros(N, dtype=torch.bool)
    lost[[3, 4, 63, 66]] = True
    for a, b in zip(right[:2], found[:2], strict=True):
        assert not b[lost].reshape(4, -1).isfinite().all(-1).any()
        torch.testing.assert_close(b[~lost], a[~lost])


CASES = [c for c in linear_cases(DTYPES[:1]) if c.spoiled or (c.rows, c.head) == (5, "plain")]


def failures(case):
    found = compare_linear(case, torch.device("cpu"), "torch", CAPS, 2 * FLOOR * EPS)
    return [what for what, error, allowed in found if not error <= allowed]


@pytest.mark.parametrize("broken", ["nothing", "buffer", "apart"])
def test_the_check_sees_what_is_read(broken, monkeypatch):
    """`python -m palu_kernels.check` on a CPU with AMX, with the padding as it was."""
    if broken == "buffer":
        monkeypatch.setattr(linear, "buffer", lambda like, n, v: like.new_empty((n, v + 7)))
    if broken == "apart":
        monkeypatch.setattr(linear_op, "apart", lambda rows: rows)
    with Products(amx=True):
        found = {str(case): failures(case) for case in CASES}
    dense = {name for name, failed in found.items() if failed and "sparse" not in name}
    assert dense == (set() if broken == "nothing" else {n for n in found if "sparse" not in n})
