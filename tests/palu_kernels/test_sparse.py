"""Losses from selected rows of the head: the same numbers as the definition on all logits."""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from palu_kernels import reference
from palu_kernels.backend import accum_dtype
from palu_kernels.linear import cost_model, sparse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["triton", "torch"]
LOSSES = [("flatten", "global_mean"), ("flatten", "local_mean"), ("flatten", 0.7), ("entropy", 0.0)]
IDS = ["global_mean", "local_mean", "number", "entropy"]
# relative norm; work is in float32 whatever the inputs, which are exact in float64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SHAPES = [(3, 37, 5, 4), (2, 50, 130, 50), (5, 64, 1, 1), (2, 1, 7, 1), (1, 200, 600, 131)]
NAMES = ("losses", "grad_hidden", "grad_weight", "grad_bias")


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def problem(n=4, v=101, d=48, k=9, dtype=torch.float32, bias=True):
    """hidden, weight, bias, indices in no order, row weights; logits of order 3."""
    hidden, weight = normal(n, d, dtype=dtype), normal(v, d, seed=1) * 3 / d**0.5
    indices = normal(n, v, seed=2).argsort(-1)[:, :k].contiguous()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0] * n, device=DEVICE)[:n]
    b = normal(v, seed=3, dtype=dtype) if bias else None
    return hidden, weight.to(dtype), b, indices, weights


def truth(hidden, weight, bias, indices, weights, loss, scale=1.0, softcap=None):
    """NAMES by autograd on all logits in float64: the definition. The hidden gradient is that of
    each row's own loss, the others are of the weighted sum."""
    objective, center = loss
    leaves = [None if t is None else t.double().requires_grad_() for t in (hidden, weight, bias)]
    rows = reference.local_entropy_loss(
        reference.head_logits(*leaves, scale, softcap),
        top_k=indices.shape[1],
        indices=indices,
        objective=objective,
        center=center,
    )
    (grad_hidden,) = torch.autograd.grad(rows.sum(), leaves[:1], retain_graph=True)
    wanted = [t for t in leaves[1:] if t is not None]
    grads = torch.autograd.grad((rows * weights).sum(), wanted, allow_unused=True)
    return dict(zip(NAMES, (rows.detach(), grad_hidden, *grads), strict=False))


def ours(hidden, weight, bias, indices, weights, loss, scale=1.0, softcap=None, *, backend):
    objective, center = loss
    kind, number = (center, 0.0) if isinstance(center, str) else ("number", center)
    global_mean = cost_model.needs_mean(objective, kind)
    rows = sparse.forward(
        hidden,
        weight,
        bias,
        scale,
        softcap,
        indices,
        sparse.mean_row(weight, bias) if global_mean else None,
        objective=objective,
        center_kind=kind,
        center_value=number,
        backend=backend,
        want_hidden=True,
    )
    work = accum_dtype(hidden.dtype)
    acc_weight = torch.zeros(weight.shape, dtype=work, device=DEVICE)
    acc_bias = None if bias is None else torch.zeros(bias.shape, dtype=work, device=DEVICE)
    shares = rows.mean_coeff if global_mean else None
    sparse.add_weight_gradient(
        acc_weight,
        acc_bias,
        hidden,
        bias,
        indices,
        rows.dloss_dx,
        shares,
        weights,
        backend=backend,
    )
    if acc_weight.isfinite().all():
        kept = torch.full((len(hidden), len(weight)), torch.nan, dtype=work, device=DEVICE)
        made = indices, rows.dloss_dx, shares
        sparse.write_logits_gradient(kept, bias, scale, *made)
        kept = kept.double() * scale * weights[:, None]
        assert relative(kept.T @ hidden.double(), acc_weight) <= TOLERANCE[torch.float32]
        assert bias is None or relative(kept.sum(0), acc_bias) <= TOLERANCE[torch.float32]
    assert {t.dtype for t in rows} == {work}
    found = dict(zip(NAMES, (rows.losses, rows.grad_hidden, acc_weight, acc_bias), strict=True))
    return {name: t for name, t in found.items() if t is not None}


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-6))


def agree(inputs, loss, *, backend, tolerance=None, **head):
    expected = truth(*inputs, loss, **head)
    found = ours(*inputs, loss, backend=backend, **head)
    assert found.keys() == expected.keys()
    for name, t in found.items():
        error = relative(t, expected[name])
        assert error <= (tolerance or TOLERANCE[inputs[0].dtype]), (name, error)


# Kernels make the products and sums, PyTorch whatever a loss makes of them: they get a loss with a
# mean over the vocabulary, and one without.
OTHERS = LOSSES[1:3]
LOSS_AND_BACKEND = [
    pytest.param(
        loss,
        backend,
        marks=pytest.mark.slow if backend == "triton" and loss in OTHERS else (),
        id=f"{name}-{backend}",
    )
    for loss, name in zip(LOSSES, IDS, strict=True)
    for backend in BACKENDS
]


def backends_of(dtype, loss):
    return ["torch"] if dtype == torch.float64 or loss in OTHERS else BACKENDS


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_numbers(loss, dtype):
    for backend in backends_of(dtype, loss):
        agree(problem(n=3, k=6, dtype=dtype), loss, backend=backend, scale=0.6)
        agree(problem(n=3, k=6, dtype=dtype, bias=False), loss, backend=backend)


@pytest.mark.parametrize("loss", LOSSES[1:], ids=IDS[1:])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_softcap(loss, dtype):
    """Logits up to 10 before a cap of 4: some of them lie flat against it."""
    for backend in backends_of(dtype, loss):
        agree(problem(n=3, k=6, dtype=dtype), loss, backend=backend, scale=-1.5, softcap=4.0)


def is_large(n, k, backend):
    """The interpreter takes seconds for each."""
    return backend == "triton" and n * k >= 100


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES[1:], ids=IDS[1:])
@pytest.mark.parametrize("n, v, d, k", [s for s in SHAPES if is_large(s[0], s[3], "triton")])
def test_more_losses_of_large_shapes(n, v, d, k, loss):
    if k > 1 or loss not in (LOSSES[1], LOSSES[3]):
        agree(problem(n, v, d, k), loss, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, v, d, k", SHAPES)
def test_shapes(n, v, d, k, backend):
    zero = (LOSSES[1], LOSSES[3]) if k == 1 else ()
    for loss in LOSSES[:1] if is_large(n, k, backend) else LOSSES:
        if loss not in zero:
            agree(problem(n, v, d, k), loss, backend=backend)
    found = ours(*problem(n, v, d, 1), LOSSES[1], backend=backend)
    assert not any(t.any() for t in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_strides(index_dtype, backend):
    """Views of larger tensors, transposed ones, expanded bias: the same as a copy."""
    hidden, weight, bias, indices, weights = problem()
    for w in (
        torch.cat([weight, weight], 1)[:, :48],
        torch.cat([weight[:, :3], weight], 1)[:, 3:],
        weight.T.contiguous().T,
        weight.repeat_interleave(2, 0)[::2],
    ):
        assert torch.equal(w, weight)
        h = torch.cat([hidden, hidden], 1)[:, :48]
        b = bias.repeat_interleave(3)[::3]
        s = torch.cat([indices, indices], 1).to(index_dtype)[:, :9]
        agree((h, w, b, s, weights), LOSSES[0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden, weight, bias, indices, weights = problem()
    inputs = (hidden[:0], weight, bias, indices[:0], weights[:0])
    for loss in LOSSES:
        found = ours(*inputs, loss, backend=backend)
        assert found["losses"].shape == (0,) and found["grad_hidden"].shape == (0, 48)
        assert not found["grad_weight"].any() and not found["grad_bias"].any()


@pytest.mark.parametrize(("loss", "backend"), LOSS_AND_BACKEND)
def test_nan_spoils_its_row_only(loss, backend):
    inputs = problem()
    clean = ours(*inputs, loss, backend=backend)
    inputs[0][2, 5] = torch.nan
    found = ours(*inputs, loss, backend=backend)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    for name in ("losses", "grad_hidden"):
        assert found[name][2].isnan().all()
        assert torch.equal(found[name][others], clean[name][others])
    assert found["grad_weight"][inputs[3][2]].isnan().all()


@pytest.mark.parametrize(("loss", "backend"), LOSS_AND_BACKEND)
def test_masked_by_the_bias(loss, backend):
    """-inf takes no part: not in k, not in either mean, and it receives no gradient."""
    inputs = problem()
    hidden, weight, bias, indices, weights = inputs
    masked = torch.cat([indices[0, :3], indices[1, 2:4], torch.arange(90, 101, device=DEVICE)])
    bias[masked] = -torch.inf
    indices[3] = torch.arange(90, 99, device=DEVICE)  # nothing left of S: the loss is 0
    # autograd has no road around a -inf: the truth is the method's gradient formula
    z = reference.head_logits(hidden.double(), weight.double(), bias.double())
    options = {"top_k": 9, "indices": indices, "objective": loss[0], "center": loss[1]}
    slope = reference.local_entropy_gradient(z, None, torch.ones_like(weights), **options)
    expected = {
        "losses": reference.local_entropy_loss(z, **options),
        "grad_hidden": slope @ weight.double(),
        "grad_weight": (slope * weights[:, None]).T @ hidden.double(),
        "grad_bias": (slope * weights[:, None]).sum(0),
    }
    found = ours(*inputs, loss, backend=backend)
    for name, t in found.items():
        assert relative(t, expected[name]) <= 2e-6, name
    assert found["losses"][3] == 0
    assert not found["grad_weight"][masked].any()


def test_capped_mask_is_not_a_mask():
    """Under a softcap a bias of -inf is a logit of -softcap, which takes part."""
    inputs = problem()
    inputs[2][inputs[3][0, :3]] = -torch.inf
    for backend in BACKENDS:
        found = ours(*inputs, LOSSES[1], softcap=4.0, backend=backend)
        z = reference.head_logits(*(t.double() for t in inputs[:3]), softcap=4.0)
        options = {"top_k": 9, "indices": inputs[3], "center": "local_mean"}
        assert relative(found["losses"], reference.local_entropy_loss(z, **options)) <= 2e-6
        assert all(t.isfinite().all() for t in found.values())


class Largest(TorchDispatchMode):
    """The most bytes that one operation allocated."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.bytes = {t.untyped_storage().data_ptr() for t in given}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_large_is_held(monkeypatch, backend):
    """No [N, k, D] and no copy of the weight: nothing over a block or a few [N, k]."""
    hidden, weight, _, indices, weights = problem(n=4, v=1100, d=16, k=40, dtype=torch.bfloat16)
    monkeypatch.setattr(sparse, "BLOCK_BYTES", 4096)
    kind = {"objective": "flatten", "center_kind": "global_mean", "center_value": 0.0}
    acc = torch.zeros(weight.shape, device=DEVICE)
    with Largest(hidden, weight, indices, weights, acc) as largest:
        mean = sparse.mean_row(weight, None)
        args = (hidden, weight, None, 1.0, None, indices, mean)
        rows = sparse.forward(*args, **kind, backend=backend, want_hidden=True)
        rest = (hidden, None, indices, rows.dloss_dx, rows.mean_coeff, weights)
        sparse.add_weight_gradient(acc, None, *rest, backend=backend)
    assert 4096 <= largest.bytes <= 1100 * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_64_bits(backend):
    """The last row of the head lies 2^31 entries after the first (memory that is not touched)."""
    weight = torch.empty(2**31 + 48, dtype=torch.bfloat16, device=DEVICE)
    weight = weight.as_strided((3, 48), (2**30, 1))
    hidden, small, bias, indices, weights = problem(v=3, k=2, dtype=torch.bfloat16)
    weight.copy_(small)
    agree((hidden, weight, bias, indices, weights), LOSSES[2], backend=backend)
    kind = {"objective": "entropy", "center_kind": "number", "center_value": 0.0}
    args = (hidden, weight, bias, 1.0, None, indices, None)
    rows = sparse.forward(*args, **kind, backend=backend, want_hidden=False)
    acc = torch.empty(2**31 + 48, device=DEVICE).as_strided((3, 48), (2**30, 1)).zero_()
    rest = (hidden, bias, indices, rows.dloss_dx, None, weights)
    sparse.add_weight_gradient(acc, None, *rest, backend=backend)
    expected = truth(hidden, small, bias, indices, weights, LOSSES[3])["grad_weight"]
    assert relative(acc, expected) <= 2e-6


def test_blocks_of_any_size(monkeypatch):
    """Several rows in a block, one, and a part of one: the same numbers."""
    inputs = problem(n=7, k=20)
    for block_rows in (1000, 61, 45, 20, 19, 7, 1):
        monkeypatch.setattr(sparse, "BLOCK_BYTES", block_rows * 48 * 4)
        for loss in LOSSES:
            agree(inputs, loss, backend="torch")


def test_parts_of_s(monkeypatch):
    """The kernel's sums over parts of S, with the last part shorter."""
    from palu_kernels.triton import gathered_matmul as gathered

    inputs = problem(n=2, v=120, d=48, k=4 * 10 + 3)  # tiles of 4, in two parts or four
    for programs in (1, 1000):
        monkeypatch.setattr(gathered, "programs_wanted", lambda device, n=programs: n)
        agree(inputs, LOSSES[0], backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    hidden, weight, bias, indices, weights = problem()
    both = ours(hidden, weight, bias, indices, weights, LOSSES[0], backend=backend)
    mean = sparse.mean_row(weight, bias)
    kind = {"objective": "flatten", "center_kind": "global_mean", "center_value": 0.0}
    args = (hidden, weight, bias, 1.0, None, indices, mean)
    rows = sparse.forward(*args, **kind, backend=backend, want_hidden=False)
    assert rows.grad_hidden is None
    assert torch.equal(rows.losses, both["losses"])
    for wanted in ("grad_weight", "grad_bias"):
        acc = torch.ones_like(both[wanted])
        accumulators = (acc, None) if wanted == "grad_weight" else (None, acc)
        rest = (hidden, bias, indices, rows.dloss_dx, rows.mean_coeff, weights)
        sparse.add_weight_gradient(*accumulators, *rest, backend=backend)
        torch.testing.assert_close(acc, both[wanted] + 1)
    sparse.add_weight_gradient(None, None, *rest, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulators_of_any_stride(backend):
    hidden, weight, bias, indices, weights = problem()
    expected = ours(hidden, weight, bias, indices, weights, LOSSES[1], backend=backend)
    kind = {"objective": "flatten", "center_kind": "local_mean", "center_value": 0.0}
    args = (hidden, weight, bias, 1.0, None, indices, None)
    rows = sparse.forward(*args, **kind, backend=backend, want_hidden=False)
    acc_weight = torch.zeros(48, 101, device=DEVICE).T
    acc_bias = torch.zeros(101, 2, device=DEVICE)[:, 0]
    rest = (hidden, bias, indices, rows.dloss_dx, None, weights)
    sparse.add_weight_gradient(acc_weight, acc_bias, *rest, backend=backend)
    torch.testing.assert_close(acc_weight, expected["grad_weight"])
    torch.testing.assert_close(acc_bias, expected["grad_bias"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend):
    """The scatter adds in one order, whether or not deterministic algorithms are asked for."""
    inputs = problem(n=6, v=12, k=8)
    first = ours(*inputs, LOSSES[0], backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        second = ours(*inputs, LOSSES[0], backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_grad_mode_change_nothing(backend):
    inputs = problem(n=2)
    expected = ours(*inputs, LOSSES[0], backend=backend)
    inputs[1].requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = ours(*inputs, LOSSES[0], backend=backend)
    for name, t in found.items():
        assert torch.equal(t, expected[name]) and not t.requires_grad, name


def test_an_index_out_of_range_spoils_its_row():
    """On an accelerator indices are not checked: the row is NaN, the others are right."""
    inputs = problem()
    clean = ours(*inputs, LOSSES[1], backend="triton")
    inputs[3][1, 4], inputs[3][2, 0] = 101, -1
    found = ours(*inputs, LOSSES[1], backend="triton")
    for name in ("losses", "grad_hidden"):
        assert found[name][1:3].isnan().all()
        assert torch.equal(found[name][[0, 3]], clean[name][[0, 3]])


CALL = {
    "rows": 50,
    "k": 1000,
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "device_type": "cpu",
    "dtype": torch.float32,
    "train_head": False,
}


def choice(implementation="auto", objective="flatten", center="global_mean", cap=None, **call):
    return cost_model.choose(implementation, objective, center, cap, **{**CALL, **call})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "xpu"])
def test_few_of_many_are_sparse_and_most_are_dense(device_type, dtype):
    kind = {"device_type": device_type, "dtype": dtype}
    for rows in (1, 50, 2000):
        for train_head in (False, True):
            call = {"rows": rows, "train_head": train_head, "center": "local_mean", **kind}
            assert choice(k=50, **call)
            assert not choice(k=128_256, **call)
            # once dense, dense for every larger k
            chosen = [choice(k=k, **call) for k in (50, 500, 5000, 50_000, 128_256)]
            assert chosen == sorted(chosen, reverse=True)


def test_what_else_decides():
    assert choice() and choice(train_head=True, center="local_mean")
    assert choice(rows=2, k=50, dtype=torch.bfloat16)
    # the mean row and a visit to every row of the gradient
    assert choice(k=4_000, center="local_mean", train_head=True) and choice(k=4_000)


def test_forced():
    assert choice("sparse", k=128_256) and not choice("dense", k=1)
    assert choice("sparse", center="local_mean", cap=30.0, k=128_256)
    assert choice("sparse", objective="entropy", cap=30.0, k=128_256)
    with pytest.raises(ValueError, match=r"'sparse', center is 'global_mean' and softcap is 30\.0"):
        choice("sparse", cap=30.0)
    with pytest.raises(ValueError, match="implementation is 'fast'; it must be one of 'auto'"):
        choice("fast")
    assert not choice(cap=30.0, k=1)


def test_logged_once_for_every_kind_of_call(caplog, monkeypatch):
    monkeypatch.setattr(cost_model, "_logged", set())
    with caplog.at_level(logging.INFO, logger="palu_kernels.linear.cost_model"):
        for rows in (50, 51, 52):
            choice(rows=rows)
        choice(k=1001)
        choice(cap=30.0)
        choice("sparse")
        choice("dense")
    messages = [record.getMessage() for record in caplog.records]
    assert [m.split()[0] for m in messages] == ["sparse", "sparse", "dense"]
    assert "50 rows, k = 1000, V = 128256, D = 2048 on cpu in torch.float32" in messages[0]
