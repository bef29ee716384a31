"""What the providers of ``logits_ops`` and ``scaling`` compute, by ``palu_kernels.reference``: in
the inputs' own dtype it is the provider ``eager``, in float64 it is the truth. Beside it, how a
loss becomes a provider's call, and random inputs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite import Call, Case, Outputs
from palu_kernels import reference

Loss = Callable[[Case, Any], Tensor]  # 0-dim, of a script's inputs

# kernel -> options of `reference.local_entropy_loss`
FORGET = {
    "flatten": {"objective": "flatten", "center": "global_mean"},
    "flatten_local": {"objective": "flatten", "center": "local_mean"},
    "entropy": {"objective": "entropy"},
}
KL = {"kl_reverse": "reverse", "kl_forward": "forward"}
CROSS_ENTROPY = "cross_entropy"


def row_losses(
    kernel: str,
    logits: Tensor,
    *,
    k: int | None = None,
    ref_logits: Tensor | None = None,
    indices: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``[rows, V]`` -> ``[rows]``. Without ``indices``, S is taken by `torch.topk`: `untied`
    reference rows have the same S by any method, and it is the fastest that PyTorch has."""
    if kernel in FORGET:
        if indices is None:
            indices = ref_logits.topk(k, dim=-1).indices
        return reference.local_entropy_loss(logits, top_k=k, indices=indices, **FORGET[kernel])
    if kernel in KL:
        return reference.kl_loss(logits, ref_logits, direction=KL[kernel])
    return reference.cross_entropy_loss(logits, labels)


def differentiated(loss: Loss, case: Case, given: Any) -> Call:
    """Forward plus backward: the loss and the gradients of ``given.leaves``, by their names."""
    return Call(lambda: gradients(loss, case, given))


def gradients(loss: Loss, case: Case, given: Any) -> Outputs:
    """``.grad`` stays as it was."""
    total = loss(case, given)
    found = torch.autograd.grad(total, list(given.leaves.values()))
    return {"loss": total.detach(), **dict(zip(given.leaves, found, strict=True))}


def compiled(loss: Loss, case: Case, given: Any) -> Call:
    function = torch.compile(partial(loss, case), fullgraph=True, dynamic=False)
    return differentiated(lambda case, given: function(given), case, given)


def no_compiler(device: torch.device) -> str | None:
    """Why `torch.compile` cannot run."""
    if device.type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    ):
        return "no C++ compiler"
    return None


def untied(ref_logits: Tensor, k: int | None) -> Tensor:
    """The rows with their k largest entries (ties: lowest index first) raised by 1, so that no
    other entry equals one of them."""
    if k is None:
        return ref_logits
    chosen = reference.topk_indices(ref_logits, k).long()
    return ref_logits.scatter(-1, chosen, ref_logits.gather(-1, chosen) + 1)


def normal(generator: torch.Generator, size: float, *shape: int, dtype: torch.dtype) -> Tensor:
    """Made piece by piece, so that no float32 copy of a whole weight is ever there."""
    out = torch.empty(shape, dtype=dtype, device=generator.device)
    for piece in out.split(4096):
        noise = torch.randn(piece.shape, generator=generator, device=generator.device)
        piece.copy_(noise * size)
    return out
