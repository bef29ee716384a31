"""What is measured beside this library, and what all providers share.

* `eager`: the formula as one writes it in PyTorch for speed (`plain_loss`), under autograd.
  `compile`: the same under `torch.compile`. The truth is `palu_kernels.reference` in float64.
* `released`: PALU's loss in the way of the released code, written from the method's formulas. Every
  position has logits, of both models; top-k, mean, log-softmax, exponential and products are taken
  over all of them in float32, for prompts and padding too; a mask at the end decides which rows
  count.
* Peers, other libraries' losses: same task, same inputs, same dtype; all of them are in the
  optional extra `bench`. Each call was looked up in the installed package: torch 2.13, liger-kernel
  0.8.5, cut-cross-entropy 25.1.1, flash-linear-attention 0.6.0. What a table here does not name,
  the library does not have. Where an operation differs from ours in what it is given, what is
  missing is made inside the call: liger's divergences on logits take log-probabilities (a float32
  log-softmax of both rows), `liger kl` takes the reference's probabilities `[rows, V]`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.declare import NO_OPERATION, Call, Case, Outputs, Provider
from palu import token_roles
from palu_kernels import reference

Loss = Callable[[Case, Any], Tensor]  # 0-dim, of a script's inputs
Providers = dict[str, Provider]

# Labels and roles as DESIGN.md fixes them, here because the modules that name them differ between
# the checkouts that can be measured.
IGNORE, KEEP = -100, -200
NONE, FORGET_ROLE, PRESERVE_ROLE = 0, 1, 2
PREFIX = 3  # tokens of a sensitive run that are to be forgotten

# kernel -> options of `reference.local_entropy_loss`
FORGET = {
    "flatten": {"objective": "flatten", "center": "global_mean"},
    "flatten_local": {"objective": "flatten", "center": "local_mean"},
    "entropy": {"objective": "entropy"},
}
KL = {"kl_reverse": "reverse", "kl_forward": "forward"}
CROSS_ENTROPY = "cross_entropy"
LIGER, CCE, FLA = "liger-kernel", "cut-cross-entropy", "flash-linear-attention"
# Generalized JSD is KL(reference || current) for beta = 0, KL(current || reference) for 1.
BETA = {"kl_forward": 0.0, "kl_reverse": 1.0}
ALL_ROWS = 2**28  # entries of logits up to which every row is compared with the truth, else three
TRUTH_ROWS = 32  # at once, in float64


# ---- the definitions -----------------------------------------------------------------------------


def row_losses(
    kernel: str,
    logits: Tensor,
    *,
    k: int | None = None,
    ref_logits: Tensor | None = None,
    indices: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the losses `[rows]` of logits `[rows, V]`. Without `indices`, S is taken by
    `torch.topk`: `untied` reference rows have the same S by any method, and it is the fastest that
    PyTorch has."""
    if kernel in FORGET:
        if indices is None:
            indices = ref_logits.topk(k, dim=-1).indices
        return reference.local_entropy_loss(logits, top_k=k, indices=indices, **FORGET[kernel])
    if kernel in KL:
        return reference.kl_loss(logits, ref_logits, direction=KL[kernel])
    return reference.cross_entropy_loss(logits, labels)


def plain_loss(
    kernel: str,
    logits: Tensor,
    *,
    k: int | None = None,
    ref_logits: Tensor | None = None,
    indices: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return the mean loss of logits `[rows, V]`, in float32, in the fewest passes that plain
    operators of PyTorch make: no masks, S by `torch.topk` without an order."""
    if kernel == CROSS_ENTROPY:
        return F.cross_entropy(logits.float(), labels)
    if kernel in KL:
        p, q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
        if KL[kernel] == "forward":
            p, q = q, p
        return (p.exp() * (p - q)).sum(-1).mean()
    if indices is None:
        indices = ref_logits.topk(k, dim=-1, sorted=False).indices
    if kernel == "flatten":
        logits = logits.float()
        return (logits.gather(-1, indices) - logits.mean(-1, keepdim=True)).square().mean()
    chosen = logits.gather(-1, indices).float()
    if kernel == "entropy":
        log_q = chosen.log_softmax(-1)
        return math.log(k) + (log_q.exp() * log_q).sum(-1).mean()
    return (chosen - chosen.mean(-1, keepdim=True)).square().mean()


def differentiated(loss: Loss, case: Case, given: Any) -> Call:
    """Forward plus backward: the loss and the gradients of `given.leaves`, by their names."""
    return Call(lambda: gradients(loss, case, given))


def gradients(loss: Loss, case: Case, given: Any) -> Outputs:
    """`.grad` stays as it was."""
    total = loss(case, given)
    grads = torch.autograd.grad(total, list(given.leaves.values()))
    return {"loss": total.detach(), **dict(zip(given.leaves, grads, strict=True))}


def compiled(loss: Loss, case: Case, given: Any) -> Call:
    torch.compiler.reset()  # one process may measure more cases than are recompiled for
    function = torch.compile(partial(loss, case), fullgraph=True, dynamic=False)
    return differentiated(lambda case, given: function(given), case, given)


def float64_truth(loss: Loss, case: Case, given: Any) -> Outputs:
    """Return loss and gradients in float64, or, of many rows, the gradient of three.

    `given.exact()` returns a function that gives the inputs of some rows in float64.
    """
    exact = given.exact()
    every = case.rows * case.V <= ALL_ROWS
    rows = torch.arange(case.rows)
    if not every:
        rows = rows[[0, case.rows // 2, -1]]
    rows = rows.to(given.leaves["gradient"].device)
    total: Outputs = {}
    parts = []
    for piece in rows.split(TRUTH_ROWS):
        share = len(piece) / case.rows
        outputs = gradients(lambda c, g, share=share: loss(c, g) * share, case, exact(piece))
        parts.append(outputs.pop("gradient"))
        total = {name: total.get(name, 0) + t for name, t in outputs.items()}
    truth = {"gradient": torch.cat(parts)}
    return truth | (total if every else {"rows": rows})


def own_providers(palu: Loss, eager: Loss) -> Providers:
    """Return the three that every loss has."""
    return {
        "palu": Provider(partial(differentiated, palu)),
        "eager": Provider(partial(differentiated, eager)),
        "compile": Provider(partial(compiled, eager), lacks=no_compiler),
    }


def peers_of(kernel: str, libraries: dict[str, Providers]) -> dict[str, Provider | str]:
    return {name: them.get(kernel, NO_OPERATION) for name, them in libraries.items()}


def no_compiler(device: torch.device) -> str | None:
    """Why `torch.compile` cannot run."""
    if device.type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    ):
        return "no C++ compiler"
    return None


def untied(ref_logits: Tensor, k: int | None) -> Tensor:
    """Return the rows with their k largest entries (ties: lowest index first) raised by 1, so that
    no other entry equals one of them."""
    if k is None:
        return ref_logits
    chosen = reference.topk_indices(ref_logits, k).long()
    return ref_logits.scatter(-1, chosen, ref_logits.gather(-1, chosen) + 1)


def normal(generator: torch.Generator, size: float, *shape: int, dtype: torch.dtype) -> Tensor:
    """Made piece by piece, so that no float32 copy of a whole weight is ever there."""
    out = torch.empty(shape, dtype=dtype, device=generator.device)
    for piece in out.flatten(0, -2).split(4096):
        noise = torch.randn(piece.shape, generator=generator, device=generator.device)
        piece.copy_(noise * size)
    return out


# ---- released ------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """0-dim, differentiable; their sum is the loss."""

    forget: Tensor
    preserve: Tensor


def released_terms(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, *, top_k: int, prefix_length: int = PREFIX
) -> Terms:
    """Flatten to the global mean on the forget rows, reverse KL on the preserve rows.

    Args:
        logits, ref_logits: `[B, T, V]`; row t-1 predicts label t. The reference's are made without
            gradient.
        labels: `[B, T]` as `PALULoss` takes them.
    """
    roles = token_roles(labels, prefix_length)[:, 1:]
    z, r = logits[:, :-1].float(), ref_logits[:, :-1].float()
    chosen = r.topk(top_k, dim=-1).indices
    flatten = (z.gather(-1, chosen) - z.mean(-1, keepdim=True)).square().mean(-1)
    log_p, log_q = F.log_softmax(z, dim=-1), F.log_softmax(r, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Terms(_mean(flatten, roles == FORGET_ROLE), _mean(kl, roles == PRESERVE_ROLE))


def released_retain(logits: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the answer tokens (any label but -100), all rows computed."""
    targets = torch.where(labels == IGNORE, IGNORE, input_ids)[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    return (values * rows).sum() / rows.sum().clamp(min=1)


# ---- peers ---------------------------------------------------------------------------------------


def needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def old_torch(device: torch.device) -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy"


def peer(package: str, loss: Callable[[Case, Any], Tensor]) -> Provider:
    """A loss of an installed package that runs on a GPU."""
    return Provider(partial(differentiated, loss), package=package, lacks=needs_gpu)


def liger_divergence(case: Case, given: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_jsd

    log_p, log_q = (t.float().log_softmax(-1) for t in (given.logits, given.ref_logits))
    return liger_jsd(log_p, log_q, beta=BETA[case.kernel])


def liger_cross_entropy(case: Case, given: Any) -> Call:
    """It overwrites the logits with their gradient, so it gets new ones for every call."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    own = given._replace(logits=given.logits.detach().clone().requires_grad_())

    def reset() -> None:
        own.logits.data.copy_(given.logits.detach())

    def loss(case: Case, given: Any) -> Tensor:
        return liger_cross_entropy(given.logits, given.labels)

    return Call(lambda: gradients(loss, case, own), reset)


def fla_cross_entropy(case: Case, given: Any) -> Tensor:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    return cross_entropy_loss(given.logits, given.labels)[0].mean()


# library -> kernel -> provider
ON_LOGITS: dict[str, Providers] = {
    "liger": {
        "cross_entropy": Provider(liger_cross_entropy, package=LIGER, lacks=needs_gpu),
        **dict.fromkeys(BETA, peer(LIGER, liger_divergence)),
    },
    "fla": {"cross_entropy": peer(FLA, fla_cross_entropy)},
}


def torch_cross_entropy(case: Case, given: Any) -> Tensor:
    return F.linear_cross_entropy(given.hidden, given.head.weight, given.labels)


def torch_chunked(case: Case, given: Any) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(given.hidden, given.head.weight, given.labels, options=options)


def liger_linear_cross_entropy(case: Case, given: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(given.hidden, given.head.weight, given.labels)


def liger_linear_divergence(case: Case, given: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    weight, beta = given.head.weight, BETA[case.kernel.removeprefix("linear_")]
    return liger_fused_linear_jsd(given.hidden, weight, given.ref_hidden, weight, jsd_beta=beta)


def liger_linear_kl(case: Case, given: Any) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    target = given.head.logits(given.ref_hidden).softmax(-1)
    return liger_fused_linear_kl_div(given.hidden, given.head.weight, target)


def cce_cross_entropy(case: Case, given: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(given.hidden, given.head.weight, given.labels)


def fla_linear_cross_entropy(case: Case, given: Any) -> Tensor:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return fused_linear_cross_entropy_loss(given.hidden, given.labels, given.head.weight)


def fla_linear_kl(case: Case, given: Any) -> Tensor:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    weight = given.head.weight
    return fused_kl_div_loss(given.hidden, given.ref_hidden, weight, weight.detach())


def on_cross_entropy(provider: Provider) -> Providers:
    return dict.fromkeys(("linear_cross_entropy", "linear_cross_entropy_trained"), provider)


ON_HIDDEN: dict[str, Providers] = {
    "torch": on_cross_entropy(
        Provider(partial(differentiated, torch_cross_entropy), lacks=old_torch)
    ),
    # its loss is added up over the chunks in the dtype of the rows
    "torch chunked": on_cross_entropy(
        Provider(partial(differentiated, torch_chunked), lacks=old_torch, rough=("loss",))
    ),
    "liger": {
        **on_cross_entropy(peer(LIGER, liger_linear_cross_entropy)),
        **{f"linear_{kernel}": peer(LIGER, liger_linear_divergence) for kernel in BETA},
    },
    "liger kl": {"linear_kl_forward": peer(LIGER, liger_linear_kl)},
    "cce": on_cross_entropy(peer(CCE, cce_cross_entropy)),
    "fla": {
        **on_cross_entropy(peer(FLA, fla_linear_cross_entropy)),
        "linear_kl_forward": peer(FLA, fla_linear_kl),
    },
}
