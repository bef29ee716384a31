"""`torch.compile` with the loss inside the compiled region: no graph break, the same numbers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palu import LMHead, PALULoss, token_roles
from palu.data.roles import FORGET, PRESERVE
from palu_kernels import roles as role_op
from palu_kernels import topk_indices

V, D = 131, 24
# traces and differentiates as the default backend does, without its minute of C++
TRACED = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()


def labels_of(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (batch, length), generator=generator)
    labels[:, : length // 3] = -100
    keep = torch.rand(labels.shape, generator=generator) < 0.5
    return torch.where(keep & (labels >= 0), -200, labels)


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


OPTIONS = {
    "flatten": {},
    "entropy": {"objective": "entropy", "preserve": "forward_kl"},
    "local": {"center": "local_mean", "preserve": "nll", "preserve_weight": 0.5},
    "current": {"center": 0.5, "select_from": "current", "preserve": None, "forget_weight": 3.0},
}


HALF = ("entropy", "local")  # by default an option has one dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=[pytest.mark.slow] if (dtype == torch.bfloat16) != (name in HALF) else [],
        )
        for dtype in (torch.float32, torch.bfloat16)
        for name in OPTIONS
    ],
)
def test_on_logits(name, dtype):
    loss = PALULoss(top_k=9, prefix_length=2, **OPTIONS[name])
    compiled = torch.compile(lambda *args: loss(*args), **TRACED)
    for batch, length in ((2, 13), (3, 17)):  # the second one traces again, with dynamic shapes
        logits = normal(batch, length, V, seed=1, dtype=dtype).requires_grad_()
        ref = normal(batch, length, V, seed=2, dtype=dtype)
        labels = labels_of(batch, length)
        wanted, found = loss(logits, labels, ref), compiled(logits, labels, ref)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        right, grad = (torch.autograd.grad(3 * out.loss, logits)[0] for out in (wanted, found))
        assert right.any() and torch.equal(grad, right)
        without = token_roles(labels, 2)[:, 1:] == 0
        assert not grad[:, :-1][without].any() and not grad[:, -1].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["frozen", "trains", "cached"])
def test_on_hidden_rows(options, kind):
    loss = PALULoss(top_k=9, prefix_length=2, **options)
    if kind == "cached" and loss.select_from == "current":
        pytest.skip("its S cannot be cached")
    weight, bias = normal(V, D, seed=3), normal(V, seed=4)
    head = LMHead(weight, bias, 0.7, 5.0)
    ref_head = LMHead(weight + 0.1, None) if kind == "trains" else None
    leaves = [normal(2, 13, D, seed=5).requires_grad_()]
    if kind == "trains":
        leaves += [weight.requires_grad_(), bias.requires_grad_()]
    labels, ref_hidden, indices = labels_of(2, 13), normal(2, 13, D, seed=6), None
    if kind == "cached":
        roles = token_roles(labels, 2)[:, 1:]
        indices = topk_indices(head.logits(ref_hidden[:, :-1][roles == FORGET]), 9)
        ref_hidden = ref_hidden[:, :-1][roles == PRESERVE]

    def call(hidden, labels, ref_hidden, indices):
        return loss.from_hidden(
            hidden, head, labels, ref_hidden, ref_head, ref_indices=indices, num_forget=11
        )

    given = leaves[0], labels, ref_hidden, indices
    wanted, found = call(*given), torch.compile(call, **TRACED)(*given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    right, grads = (torch.autograd.grad(3 * out.loss, leaves) for out in (wanted, found))
    for a, b in zip(grads, right, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trains", [False, True])
def test_half_precision_rows_and_a_float32_head_under_autocast(trains):
    loss, labels = PALULoss(top_k=9, prefix_length=2), labels_of(2, 13)
    weight = normal(V, D, seed=3).requires_grad_(trains)
    head, ref_head = LMHead(weight), LMHead(weight.detach() + 0.1)
    hidden = normal(2, 13, D, seed=5, dtype=torch.bfloat16).requires_grad_()
    ref_hidden = normal(2, 13, D, seed=6, dtype=torch.bfloat16)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return loss.from_hidden(hidden, head, labels, ref_hidden, ref_head).loss

    leaves = [hidden, weight] if trains else [hidden]
    wanted, found = call(), torch.compile(call, **TRACED)()
    torch.testing.assert_close(found, wanted)
    pairs = zip(*(torch.autograd.grad(out, leaves) for out in (found, wanted)), strict=True)
    for a, b in pairs:
        # compiled, the head's gradient is added up: how many rows it has is not known there
        assert (a - b).norm() <= 2**-8 * b.norm() > 0


def test_denominators_that_change(monkeypatch):
    """As Python numbers, which Dynamo makes symbols of at the second one, and as tensors."""
    loss, labels = PALULoss(top_k=9, prefix_length=2), labels_of(2, 13)
    logits, ref = normal(2, 13, V, seed=1), normal(2, 13, V, seed=2)
    compiled = torch.compile(lambda n: loss(logits, labels, ref, num_forget=n), **TRACED)
    for given in (4, 9, 4.0, 9.5, torch.tensor(3.0)):
        found, wanted = compiled(given), loss(logits, labels, ref, num_forget=given)
        torch.testing.assert_close(found.loss, wanted.loss)


def test_no_graph_for_every_number():
    """Counts of a step and weights that are annealed: one graph for the first, one for others."""
    loss, labels = PALULoss(top_k=9, prefix_length=2), labels_of(2, 13)
    logits, ref = normal(2, 13, V, seed=1), normal(2, 13, V, seed=2)

    def step(n):
        return loss(logits, labels, ref, num_forget=n).loss

    compiled = torch.compile(step, **TRACED)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in (4.5, 9.5, 11.25, 3.0):
            loss.preserve_weight = number / 2
            torch.testing.assert_close(compiled(number), step(number))


def test_too_few_indices_are_found_out_when_it_runs():
    loss, labels = PALULoss(top_k=9, prefix_length=2), labels_of(2, 13)
    head = LMHead(normal(V, D, seed=3))
    hidden = normal(2, 13, D, seed=5).requires_grad_()
    call = torch.compile(
        lambda i, r: loss.from_hidden(hidden, head, labels, r, ref_indices=i), **TRACED
    )
    with pytest.raises(ValueError, match="ref_indices has shape"):
        call(torch.zeros(3, 9, dtype=torch.int32), normal(4, D, seed=6))


def tiny_model(layers=1):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("road", "dtype", "backend"),
    [
        ("logits and hidden", None, "inductor"),
        ("hidden", torch.bfloat16, "aot_eager"),
        ("logits", torch.float16, "aot_eager"),
        pytest.param("logits", None, "aot_eager", marks=pytest.mark.slow),
        pytest.param("hidden", None, "aot_eager", marks=pytest.mark.slow),
        pytest.param("logits", torch.bfloat16, "aot_eager", marks=pytest.mark.slow),
        pytest.param("hidden", torch.float16, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_a_compiled_model(road, dtype, backend):
    layers = 0 if backend == "inductor" else 1  # whose C++ takes longer than ours
    model, loss = tiny_model(layers), PALULoss(top_k=9, prefix_length=2)
    reference = tiny_model(layers).requires_grad_(False)
    for p in reference.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    head, ref_head = LMHead.from_model(model), LMHead.from_model(reference)
    labels = labels_of(2, 13)
    ids = labels.clamp(min=0)

    def step(ids, labels):
        outs = []  # one forward serves both roads: it is most of what there is to compile
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            with torch.no_grad():
                ref_hidden = reference.model(ids, use_cache=False).last_hidden_state
            hidden = model.model(ids, use_cache=False).last_hidden_state
            if "logits" in road:
                with torch.no_grad():
                    ref_logits = reference.lm_head(ref_hidden)
                outs.append(loss(model.lm_head(hidden), labels, ref_logits))
            if "hidden" in road:
                outs.append(loss.from_hidden(hidden, head, labels, ref_hidden, ref_head))
        return outs

    # small gradients of float16 live through the scale
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend=backend)):
        model.zero_grad()
        outs = call(ids, labels)
        scaler.scale(sum(out.loss for out in outs)).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert grads.isfinite().all() and grads.any()
        found.append(([term for out in outs for term in out], grads))
    (wanted, right), (terms, grads) = found
    bound = {None: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for a, b in zip(terms, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    assert (grads - right).norm() <= bound * right.norm()


def test_one_gradient_of_the_batch(monkeypatch):
    """Whatever the number of terms; and rows are copied out piece by piece."""
    monkeypatch.setattr(role_op, "PIECE_BYTES", 3 * V * 4)
    logits, ref = normal(2, 13, V, seed=1).requires_grad_(), normal(2, 13, V, seed=2)
    labels = labels_of(2, 13)
    whole = logits.numel()
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= whole and not func.is_view:
                made.append(func)
            return out

    loss = PALULoss(top_k=9, prefix_length=2)
    with Watch():
        out = loss(logits, labels, ref)
        assert made == []
        (grad,) = torch.autograd.grad(out.loss, logits)
    assert len({str(f) for f in made if "by_role" not in str(f)}) <= 2, made  # empty, zero_
    monkeypatch.undo()
    wanted = loss(logits, labels, ref)
    (right,) = torch.autograd.grad(wanted.loss, logits)
    torch.testing.assert_close(grad, right)
    for a, b in zip(out, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    logits, ref = normal(1, 6, 40, seed=1).requires_grad_(), normal(1, 6, 40, seed=2)
    roles = token_roles(labels_of(1, 6), 2)
    assert {FORGET, PRESERVE} < {*roles[0].tolist()}
    text = "LocalEntropy,9,'flatten','global_mean',0.0,'reference'\nKL,'reverse'"
    torch.library.opcheck(
        role_op.by_role, (logits, ref, roles, torch.tensor([0.5, 2.0]), text, backend)
    )
