"""What the operators owe PyTorch: autograd, torch.compile, strides, and what they must not do."""

import pytest
import torch

from palu_kernels import (
    LMHead,
    cross_entropy_loss,
    kl_loss,
    linear_local_entropy_loss,
    local_entropy_loss,
    logits_op,
    topk_indices,
)
from palu_kernels.backend import resolve, triton_runs_on
from palu_kernels.row_loss import ReferenceArgmaxNLL, RowLoss, decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["triton", "torch"]


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def losses(ref, labels, indices, which="none"):
    """Every operator as a function of (logits, backend)."""
    return {
        "flatten": lambda z, b: local_entropy_loss(z, ref, top_k=9, reduction=which, backend=b),
        "flatten by indices": lambda z, b: local_entropy_loss(
            z, indices=indices, top_k=9, center="local_mean", reduction=which, backend=b
        ),
        "entropy by current": lambda z, b: local_entropy_loss(
            z, top_k=9, objective="entropy", reduction=which, backend=b
        ),
        "kl": lambda z, b: kl_loss(z, ref, reduction=which, backend=b),
        "cross_entropy": lambda z, b: cross_entropy_loss(z, labels, reduction=which, backend=b),
    }


NAMES = list(losses(None, None, None))
WITH_REFERENCE = ("flatten", "kl")


def inputs(*shape, columns=100, dtype=torch.float32):
    z, ref = normal(*shape, columns, dtype=dtype), normal(*shape, columns, seed=1, dtype=dtype)
    labels = torch.arange(z[..., 0].numel(), device=DEVICE).reshape(shape) * 3 % columns
    indices = torch.topk(normal(*shape, columns, seed=2), 9).indices
    return z, ref, labels, indices


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(name, backend, reduction):
    z, ref, labels, indices = inputs(2)
    rows = losses(ref, labels, indices)[name](z, backend)
    x = z.clone().requires_grad_()
    loss = losses(ref, labels, indices, reduction)[name](x, backend)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), getattr(rows, reduction)())
    (3.5 * loss).backward()
    y = z.clone().requires_grad_()
    weights = torch.full((2,), 3.5 / (2 if reduction == "mean" else 1), device=DEVICE)
    losses(ref, labels, indices)[name](y, backend).backward(weights)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_mean_is_over_the_rows_that_count(backend):
    z, _, labels, _ = inputs(4)
    labels[1] = labels[2] = -1
    loss = cross_entropy_loss(z, labels, ignore_index=-1, backend=backend)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z, labels, ignore_index=-1))
    nothing = torch.full_like(labels, -100)
    x = z.clone().requires_grad_()
    loss = cross_entropy_loss(x, nothing, backend=backend)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(name, backend, shape):
    z, ref, labels, _ = inputs(*shape)
    indices = torch.zeros(*shape, 9, dtype=torch.long, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        x = z.clone().requires_grad_()
        loss = losses(ref, labels, indices, reduction)[name](x, backend)
        assert loss.shape == (shape if reduction == "none" else ())
        assert loss.sum().item() == 0
        loss.sum().backward()
        assert x.grad.shape == x.shape
    assert topk_indices(z, 4, backend=backend).shape == (*shape, 4)


SHAPES = [((2, 2), 101), ((1, 2), 101), ((2, 1), 101), ((2, 2), 96), ((1, 1), 101)]
# of the kernels one loss by default where both dimensions are not stepped through: seconds each
STRIDES = [
    pytest.param(
        name,
        backend,
        *shape,
        marks=pytest.mark.slow if backend == "triton" and place and name != "kl" else (),
    )
    for name in NAMES
    for backend in BACKENDS
    for place, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize(("name", "backend", "shape", "columns"), STRIDES)
def test_rows_of_any_stride(name, backend, shape, columns):
    """Slices of [B, T, V], padded rows, transposed columns: same numbers as a dense copy."""
    z, ref, labels, indices = inputs(*shape, columns=columns)
    dense = z.clone().requires_grad_()
    losses(ref, labels, indices)[name](dense, backend).sum().backward()
    expected = losses(ref, labels, indices)[name](z, backend)
    layouts = {
        "shifted": lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1],
        "part of a batch": lambda t: torch.cat([t, t[:1]])[:-1],
        "padded": lambda t: torch.cat([t, t[..., :5]], -1)[..., :-5],
        "strided columns": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        "misaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].reshape(t.shape),
    }
    for key, lay in layouts.items():
        # the reference may keep another layout than the logits
        for other in (ref, lay(ref)) if name in WITH_REFERENCE else (ref,):
            x = lay(z).detach().requires_grad_()
            loss = losses(other, labels, indices)[name](x, backend)
            torch.testing.assert_close(loss.detach(), expected, msg=key)
            loss.sum().backward()
            torch.testing.assert_close(x.grad, dense.grad, msg=key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_callers_is_overwritten(name, backend):
    z, ref, labels, indices = inputs(3)
    before = [t.clone() for t in (z, ref, labels, indices)]
    x = z.requires_grad_()
    loss = losses(ref, labels, indices)[name](x, backend)
    weights = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    (first,) = torch.autograd.grad(loss, x, weights, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, 2 * weights)
    for tensor, copy in zip((x, ref, labels, indices), before, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("name", NAMES)
def test_backward_twice_raises(name):
    z, ref, labels, indices = inputs(3)
    loss = losses(ref, labels, indices, "sum")[name](z.requires_grad_(), "torch")
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_defined_says_so(name):
    z, ref, labels, indices = inputs(3)
    f = losses(ref, labels, indices, "sum")[name]
    x = z.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x, "torch"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda row: losses(ref, labels, indices)[name](row, "torch"))(
            z.expand(2, *z.shape)
        )
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda a: f(a, "torch"), (z,), (z,))


@pytest.mark.parametrize("name", NAMES)
def test_without_grad_nothing_is_kept(name):
    z, ref, labels, indices = inputs(3)
    assert losses(ref, labels, indices)[name](z, "torch").grad_fn is None
    with torch.no_grad():
        loss = losses(ref, labels, indices)[name](z.requires_grad_(), "torch")
    assert loss.grad_fn is None


def calls_of_the_op(z, ref, labels, indices, backend):
    """What every operator hands to the one op."""
    calls, op = [], logits_op.logits_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_op, "logits_loss", lambda *a: (calls.append(a), op(*a))[1])
        for loss in losses(ref, labels, indices, "mean").values():
            loss(z, backend)
    return calls


def test_every_row_loss_is_tested_here():
    """All tests of this file take what `losses` lists; a new row loss must stand there."""
    in_the_chunk_loop_only = {ReferenceArgmaxNLL}
    tested = {type(decode(call[3])[0]) for call in calls_of_the_op(*inputs(3), "torch")}
    assert tested == set(RowLoss.__subclasses__()) - in_the_chunk_loop_only


@pytest.mark.parametrize(
    ("backend", "batch", "shifted"),
    [
        ("torch", 1, True),
        ("torch", 2, True),
        ("triton", 1, True),
        *(pytest.param("torch", batch, False, marks=pytest.mark.slow) for batch in (1, 2)),
        pytest.param("triton", 2, False, marks=pytest.mark.slow),
    ],
)
def test_opcheck(backend, batch, shifted):
    """Fakes promise the strides of the real results, of logits[:, :-1] with an odd V too."""
    z, ref, labels, indices = inputs(batch, 2, columns=101)
    if shifted:
        z = torch.cat([z, z[:, :1]], 1)[:, :-1]
    z.requires_grad_()
    torch.library.opcheck(logits_op.topk, (ref, 5, backend))
    for arguments in calls_of_the_op(z, ref, labels, indices, backend):
        torch.library.opcheck(logits_op.logits_loss, arguments)


# what is traced is the same for both backends, and `test_opcheck` sees all results of the kernels
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "torch") for name in NAMES),
        ("flatten", "triton"),
        *(pytest.param(name, "triton", marks=pytest.mark.slow) for name in NAMES[1:]),
    ],
)
def test_one_node_under_compile(name, backend):
    z, ref, labels, indices = inputs(2, columns=40)
    f = losses(ref, labels, indices, "mean")[name]
    graphs = []
    torch._dynamo.reset()  # the lambdas below share their code: each would be a recompilation

    def count(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled = torch.compile(lambda t: f(t, backend), fullgraph=True, backend=count)
    loss = compiled(x)
    assert sum("palu_kernels" in node for node in graphs[0]) == 1
    torch.testing.assert_close(loss, f(y, backend))
    torch.compile(lambda t: f(t, backend), fullgraph=True, backend="aot_eager")(x).backward()
    f(y, backend).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_number_that_changes_is_compiled_again():
    """A second value makes `torch.compile` take the number for a symbol."""
    z, ref, labels, _ = inputs(2, columns=40)
    head = LMHead(normal(40, 40, seed=3))
    calls = {
        lambda k: local_entropy_loss(z, ref, top_k=k): (3, 4, 5),
        lambda c: local_entropy_loss(z, ref, top_k=5, center=c): (0.5, 0.1, -1.5),
        lambda y: cross_entropy_loss(z, labels.clamp(min=0), ignore_index=y): (-100, 0, -1),
        lambda k: linear_local_entropy_loss(z, head, ref, head, top_k=k): (3, 4, 5),
    }
    for call, values in calls.items():
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        for value in values:
            torch.testing.assert_close(compiled(value), call(value), rtol=0, atol=0)


def test_deterministic_mode():
    z, ref, labels, indices = inputs(2)
    torch.use_deterministic_algorithms(True)
    try:
        for f in losses(ref, labels, indices, "sum").values():
            for backend in BACKENDS:
                results = []
                for _ in range(2):
                    x = z.clone().requires_grad_()
                    f(x, backend).backward()
                    results.append(x.grad)
                assert torch.equal(*results)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_of_loss_and_gradient(name, dtype):
    z, ref, labels, indices = inputs(3, dtype=dtype)
    loss = losses(ref, labels, indices)[name](z.requires_grad_(), "auto")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.sum().backward()
    assert z.grad.dtype == dtype


@pytest.mark.parametrize("objective", ["flatten", "entropy"])
def test_a_spoiled_row_spoils_no_other(objective):
    for backend in BACKENDS:
        z, ref, _, _ = inputs(4)
        clean = z.clone().requires_grad_()
        kw = {"top_k": 9, "objective": objective, "reduction": "none", "backend": backend}
        local_entropy_loss(clean, ref, **kw).sum().backward()
        z[0, 50], ref[2, 7] = torch.nan, torch.nan
        x = z.requires_grad_()
        loss = local_entropy_loss(x, ref, **kw)
        loss.sum().backward()
        assert loss.isnan().tolist() == [True, False, True, False]
        assert x.grad[[0, 2]].isnan().all()
        assert torch.equal(x.grad[[1, 3]], clean.grad[[1, 3]])


@pytest.mark.parametrize("objective", ["flatten", "entropy"])
def test_ways_of_choosing_agree(objective):
    z, ref, _, _ = inputs(2, columns=3000)
    ref = ref.round(decimals=1)  # with ties across the threshold
    for backend in BACKENDS:
        kw = {"top_k": 40, "objective": objective, "reduction": "none", "backend": backend}
        chosen = topk_indices(ref, 40, backend=backend)
        by_reference = local_entropy_loss(z, ref, **kw)
        shuffled = chosen[:, torch.randperm(40)].long()
        torch.testing.assert_close(by_reference, local_entropy_loss(z, indices=shuffled, **kw))
        torch.testing.assert_close(
            local_entropy_loss(ref, **kw), local_entropy_loss(ref, ref, **kw)
        )


def test_kernels_may_write_over_their_input():
    """What the linear operators will rely on: a chunk of logits becomes its own gradient."""
    from palu_kernels.triton import cross_entropy, local_entropy
    from palu_kernels.triton import kl_div as divergence

    z, ref, labels, _ = inputs(3, columns=5000)
    weights = torch.rand(3, device=DEVICE)
    _, state, chosen = local_entropy.forward(z, ref, None, 9, "flatten", "global_mean", 0.0)
    expected = local_entropy.backward(weights, z, state, chosen, torch.empty_like(z))
    buffer = z.clone()
    local_entropy.backward(weights, buffer, state, chosen, buffer)
    assert torch.equal(buffer, expected)

    _, state = divergence.forward(z, ref, "reverse")
    expected = divergence.backward(weights, z, ref, state, "reverse", torch.empty_like(z))
    buffer = z.clone()
    divergence.backward(weights, buffer, ref, state, "reverse", buffer)
    assert torch.equal(buffer, expected)

    _, state = cross_entropy.forward(z, labels, -100)
    expected = cross_entropy.backward(weights, z, labels, state, -100, torch.empty_like(z))
    buffer = z.clone()
    cross_entropy.backward(weights, buffer, labels, state, -100, buffer)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_over_several_programs(name, monkeypatch):
    """Few rows are split over programs so that the chip is full; ties cross the slices."""
    from palu_kernels.triton import row_io

    z, ref, labels, indices = inputs(2, columns=20_001)
    z, ref = z.round(decimals=1), ref.round(decimals=1)
    results = []
    for programs, slices in ((1, 1), (1000, 5)):
        monkeypatch.setattr(row_io, "programs_wanted", lambda _, n=programs: n)
        assert row_io.RowLaunch.of(z).splits == slices
        x = z.clone().requires_grad_()
        loss = losses(ref, labels, indices)[name](x, "triton")
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(*results)


def test_a_buffer_that_cannot_be_walked_is_refused():
    """It would have to be copied, and what is written into a copy is lost."""
    from palu_kernels.triton import cross_entropy, local_entropy
    from palu_kernels.triton import kl_div as divergence

    z, ref, labels, _ = inputs(3, columns=101)
    weights, elsewhere = torch.ones(3, device=DEVICE), torch.empty(3, 102, device=DEVICE)[:, :101]
    _, state, chosen = local_entropy.forward(z, ref, None, 9, "flatten", "global_mean", 0.0)
    calls = [
        lambda: local_entropy.backward(weights, z, state, chosen, elsewhere),
        lambda: divergence.backward(weights, z, ref, state, "reverse", elsewhere),
        lambda: cross_entropy.backward(weights, z, labels, state, -100, elsewhere),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"out has strides \(102, 1\)"):
            call()


# the first row's S ends 4 lanes before a block does, and where it does; the second's, which starts
# at lane 4, where it does, and 4 lanes after it
@pytest.mark.parametrize(
    "k", [4092, 4096, *(pytest.param(k, marks=pytest.mark.slow) for k in (4095, 4097, 8192))]
)
def test_ties_that_end_where_a_slice_does(k):
    """A level reference whose rows start at other lanes than those of the logits."""
    z = normal(2, 20_001, dtype=torch.bfloat16)
    ref = torch.zeros(2, 20_004, dtype=torch.bfloat16, device=DEVICE)[:, :-3]
    kw = {"top_k": k, "center": "local_mean", "reduction": "none"}
    expected = local_entropy_loss(z, ref, backend="torch", **kw)
    torch.testing.assert_close(local_entropy_loss(z, ref, backend="triton", **kw), expected)


class TestBackend:
    def test_auto_is_torch_on_the_cpu_and_for_float64(self):
        assert resolve("auto", torch.device("cpu"), torch.float32) == "torch"
        assert resolve("auto", DEVICE, torch.float64) == "torch"

    def test_triton_where_it_cannot_run(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("PALU_TRITON_CPU", raising=False)
        assert not triton_runs_on("cpu")
        with pytest.raises(ValueError, match="backend is 'triton', which cannot run on cpu"):
            kl_loss(torch.randn(2, 9), torch.randn(2, 9), backend="triton")
        monkeypatch.setenv("PALU_BACKEND", "triton")
        with pytest.raises(ValueError, match="PALU_BACKEND is 'triton', which cannot run on cpu"):
            kl_loss(torch.randn(2, 9), torch.randn(2, 9))
        assert kl_loss(torch.randn(2, 9), torch.randn(2, 9), backend="torch").isfinite()

    def test_stand_ins_for_a_gpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for name in ("TRITON_INTERPRET", "PALU_TRITON_CPU"):
            monkeypatch.setenv(name, "1")
            assert triton_runs_on("cpu")
            monkeypatch.delenv(name)

    def test_a_call_looks_for_no_module(self, monkeypatch):
        """`torch.compile` of torch 2.11 cannot trace that."""
        monkeypatch.delattr("importlib.util.find_spec")
        assert resolve("triton", DEVICE, torch.float32) == "triton"

    def test_environment_sets_the_default(self, monkeypatch):
        monkeypatch.setenv("PALU_BACKEND", "torch")
        assert resolve("auto", DEVICE, torch.float32) == "torch"
        monkeypatch.setenv("PALU_BACKEND", "tensorflow")
        with pytest.raises(ValueError, match="PALU_BACKEND is 'tensorflow'"):
            kl_loss(torch.randn(2, 9), torch.randn(2, 9))

    def test_float64_has_no_kernel(self):
        z = normal(2, 9, dtype=torch.float64)
        with pytest.raises(ValueError, match="float64"):
            kl_loss(z, z, backend="triton")
