"""Nothing on the way of a loss waits for the device, so that a CUDA graph can hold it.

The kernels' way runs under the interpreter as if all tensors but those that are named lay on an
accelerator. `Waits` writes down what would make the host wait for it: operators whose result has a
size that only the device knows, numbers that the host reads, blocking copies.
"""

import sys

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import palu_kernels as pk
from palu import PALULoss
from palu.data import roles as data_roles
from palu_kernels import logits_op
from palu_kernels.linear import chunked
from palu_kernels.linear import op as linear_op
from palu_kernels.roles import linear_role_losses
from palu_kernels.row_loss import KL, CrossEntropy, LocalEntropy, ReferenceArgmaxNLL

WAITS = ("nonzero", "masked_select", "_local_scalar_dense", "item", "is_nonzero", "equal", "unique")
WAITS += ("_unique", "unique_", "bincount", "repeat_interleave.Tensor")
READS = ("cpu", "tolist", "numpy", "__array__")
MAKES = ("tensor", "new_tensor", "as_tensor")


def in_kernel():
    """Whether Triton's interpreter is at work, which reads what a kernel would."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            return True
        frame = frame.f_back
    return False


class Waits:
    """Inside `with`: `found` is what waits; `host` are tensors on the host, and what is made of
    them alone is too."""

    def __init__(self, *host):
        self.found = []
        self._host = {id(t): t for t in host}
        self.modes = _Functions(self), _Operators(self)

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def on_host(self, value):
        return id(value) in self._host

    def leaves(self, value):
        self._host.pop(id(value), None)

    def stays(self, *values):
        self._host |= {id(t): t for t in tree_iter(values) if isinstance(t, torch.Tensor)}


class _Functions(TorchFunctionMode):
    """What no operator shows where all memory is the host's: reads and copies."""

    def __init__(self, waits):
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if in_kernel():
            return func(*args, **kwargs)
        if name in READS and not self.waits.on_host(first):
            self.waits.found.append(name)
        if name in MAKES and not isinstance(args[name == "new_tensor"], torch.Tensor):
            self.waits.found.append(name)
        result = func(*args, **kwargs)
        places = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, (torch.device, str))]
        if name == "to" and self.waits.on_host(first) and places:
            if not kwargs.get("non_blocking"):
                self.waits.found.append("blocking copy")
            result = result.clone()
            self.waits.leaves(result)
        return result


class _Operators(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (custom := OPDEFS.get(func.name())) is not None:
            with self.waits.modes[0], self:
                return custom._init_fn(*args, **kwargs)
        name = func.name().removeprefix("aten::")
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        hosts = [self.waits.on_host(t) for t in given]
        if given and all(hosts):
            result = func(*args, **kwargs)
            self.waits.stays(result)
            return result
        if not in_kernel():
            by = tree_iter(args[1]) if name.startswith("index") and len(args) > 1 else ()
            if name in WAITS or name.split(".")[0] in WAITS:
                self.waits.found.append(name)
            elif any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in by):
                self.waits.found.append(f"{name} by a mask")
            elif any(on and t.dim() for on, t in zip(hosts, given, strict=True)):
                self.waits.found.append(f"{name} of a tensor on the host")
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setenv("PALU_BACKEND", "triton")
    for module in (linear_op, logits_op):
        monkeypatch.setattr(module, "check_values", lambda _: False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(loss, *leaves):
    torch.autograd.grad(loss.sum(), [t for t in leaves if t.requires_grad])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_on_logits(reduction):
    z, r = normal(3, 40).requires_grad_(), normal(3, 40, seed=1)
    labels, s = torch.tensor([3, -100, 7]), pk.topk_indices(r, 5)
    options = {"reduction": reduction}
    with Waits() as found:
        pk.topk_indices(r, 5)
        for loss in (
            pk.kl_loss(z, r, **options),
            pk.kl_loss(z, r, direction="forward", **options),
            pk.cross_entropy_loss(z, labels, **options),
            pk.local_entropy_loss(z, r, top_k=5, **options),
            pk.local_entropy_loss(z, indices=s, top_k=5, **options),
            pk.local_entropy_loss(z, top_k=5, objective="entropy", **options),
        ):
            gradients(loss, z)
    assert not found


@pytest.mark.parametrize("rows", [3, 9])  # the head's gradient in one product, or added up
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_on_hidden_rows(reduction, trains, rows, monkeypatch):
    monkeypatch.setattr(chunked, "TILE_ROWS", 4)  # chunks of few rows: the interpreter is slow
    hidden, ref_hidden = normal(rows, 8).requires_grad_(), normal(rows, 8, seed=1)
    weight, bias = (t.requires_grad_(trains) for t in (normal(40, 8, seed=2), normal(40, seed=3)))
    head, ref = pk.LMHead(weight, bias), pk.LMHead(normal(40, 8, seed=4))
    labels = torch.arange(rows) % 40
    options = {"reduction": reduction, "chunk_bytes": 1}
    forget = {"top_k": 2, **options}
    with Waits() as found:
        losses = [
            pk.linear_cross_entropy_loss(hidden, head, labels, **options),
            pk.linear_local_entropy_loss(
                hidden, head, ref_hidden, ref, implementation="sparse", **forget
            ),
        ]
        if rows == 3:
            losses += [
                pk.linear_kl_loss(hidden, head, ref_hidden, ref, **options),
                pk.linear_local_entropy_loss(hidden, head, objective="entropy", **forget),
            ]
        for loss in losses:
            gradients(loss, hidden, weight, bias)
    assert not found


def test_the_trainers_loss_on_hidden_rows():
    """Roles on the host, and labels on the device."""
    hidden, ref_hidden = normal(2, 4, 8).requires_grad_(), normal(2, 4, 8, seed=1)
    weight = normal(40, 8, seed=2).requires_grad_()
    roles = torch.tensor([[1, 0, 2, 3], [2, 1, 4, 0]], dtype=torch.int8)
    losses = [
        LocalEntropy(5, "flatten", "global_mean", 0.0, "reference"),
        KL("reverse"),
        CrossEntropy(),
        ReferenceArgmaxNLL(),
    ]
    data = [None, None, torch.arange(8).view(2, 4), None]
    given = {"ref_hidden": ref_hidden, "ref_head": pk.LMHead(normal(40, 8, seed=3)), "data": data}
    weights = torch.ones(4)
    with Waits(roles) as found:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                head = pk.LMHead(weight)
                total, _ = linear_role_losses(hidden, head, roles, losses, weights, **given)
            gradients(total, hidden, weight)
    assert not found


@pytest.mark.parametrize("preserve", ["reverse_kl", "nll", None])
def test_palu_loss_with_roles_on_the_host(preserve):
    z, r = normal(6, 40).requires_grad_(), normal(6, 40, seed=1)
    kinds = data_roles.FORGET, data_roles.PRESERVE, data_roles.NONE
    roles = torch.tensor(kinds * 2, dtype=torch.int8)
    loss = PALULoss(top_k=5, preserve=preserve)
    with Waits(roles) as found:
        for counts in ({}, {"num_forget": 2, "num_preserve": 3.0}):
            gradients(loss.from_rows(z, roles, r, **counts).loss, z)
    assert not found


def test_what_waits_is_found():
    x, host = torch.arange(4.0), torch.tensor([0, 2])
    calls = {
        "nonzero": lambda: x.nonzero(),
        "index.Tensor by a mask": lambda: x[x > 1],
        "masked_select": lambda: x.masked_select(x > 1),
        "_local_scalar_dense": lambda: float(x[0]),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "equal": lambda: torch.equal(x, x + 0),
        "tensor": lambda: torch.tensor([1.0]),
        "new_tensor": lambda: x.new_tensor([1.0]),
        "blocking copy": lambda: host.to("cpu"),
        "index.Tensor of a tensor on the host": lambda: x[host],
    }
    for name, call in calls.items():
        with Waits(host) as found:
            call()
        assert name in found, (name, found)
    with Waits(host) as found:
        x[host[host > 0].to("cpu", non_blocking=True)]
        host.tolist(), float(host[0])
    assert not found
