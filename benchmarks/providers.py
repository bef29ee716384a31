"""Other libraries' losses as providers of ``logits_ops`` and ``scaling``: same task, same inputs,
same dtype. All of them are in the optional extra ``bench``.

Each call was looked up in the installed package: torch 2.13, liger-kernel 0.8.5, cut-cross-entropy
25.1.1, flash-linear-attention 0.6.0. What a table here does not name, the library does not have.
Where an operation differs from ours in what it is given, what is missing is made inside the call:

* liger's divergences on logits take log-probabilities: a float32 log-softmax of both rows.
* ``liger kl`` takes the reference's probabilities ``[rows, V]``: a softmax of its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.definitions import differentiated, gradients
from benchmarks.suite import Call, Case, Provider

Providers = dict[str, Provider]
LIGER, CCE, FLA = "liger-kernel", "cut-cross-entropy", "flash-linear-attention"
# Generalized JSD is KL(reference || current) for beta = 0, KL(current || reference) for 1.
BETA = {"kl_forward": 0.0, "kl_reverse": 1.0}


def needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a GPU"


def old_torch(device: torch.device) -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy"


def peer(package: str, loss: Callable[[Case, Any], Tensor]) -> Provider:
    """A loss of an installed package that runs on a GPU."""
    return Provider(partial(differentiated, loss), package=package, lacks=needs_gpu)


# ---- on logits -----------------------------------------------------------------------------------


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


# ---- on hidden rows ------------------------------------------------------------------------------


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
