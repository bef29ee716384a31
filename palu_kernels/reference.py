"""Every operator in plain PyTorch: the definition, checked by eye against the method's formulas.

Row functions: logits `[N, V]` in, one loss a row `[N]` out, differentiable by autograd. Half
precision is computed in float32; float32 and float64 stay what they are. Everything else in this
package is compared with these functions and their autograd gradients in float64. The
`*_gradient` functions are the method's own gradient formulas, tested against autograd like a
kernel; `torch_backend.py` takes them for rows that are not finite.

Sources: S, flatten, entropy and preserve are arXiv 2601.03190 and the code its authors released.
A masked entry (-inf) takes no part in any mean, sum or count. A NaN in either row makes that
row's loss and gradient NaN. A sum over nothing is 0, and so is its gradient: the local entropy of
an S that is masked as a whole, a KL whose first distribution is. (Cross-entropy of a row that is
masked as a whole is NaN, loss and gradient, as PyTorch's.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palu_kernels.backend import accum_dtype

NEG_INF = float("-inf")


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """cap(scale * (h W^T + b)), cap(x) = softcap * tanh(x / softcap); `[..., D]` -> `[..., V]`
    in the dtype of `hidden`."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries of each row, ascending; ties go to the lowest index. NaN
    ranks above +inf.

    `scores [N, V]` -> int32 `[N, min(k, V)]`.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=-1).values.to(torch.int32)


def local_entropy_loss(
    logits: Tensor,
    ref_logits: Tensor | None = None,
    *,
    top_k: int,
    indices: Tensor | None = None,
    objective: str = "flatten",
    center: str | float = "global_mean",
) -> Tensor:
    """The forget loss of each row; S is chosen by `ref_logits`, by `indices`, or else by
    `logits` themselves."""
    z, s = choose(logits, ref_logits, top_k, indices)
    return flatten(z, s, center) if objective == "flatten" else entropy(z, s)


def choose(
    logits: Tensor, ref_logits: Tensor | None, top_k: int, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows in the dtype they are worked in, and S as int64 `[N, k]`. A row that holds a NaN
    becomes NaN as a whole."""
    z = logits.to(accum_dtype(logits.dtype))
    has_nan = z.isnan().any(-1)
    if indices is None:
        scores = logits.detach() if ref_logits is None else ref_logits
        has_nan = has_nan | scores.isnan().any(-1)
        indices = topk_indices(scores, top_k)
    return z * torch.where(has_nan, torch.nan, 1.0).to(z.dtype)[:, None], indices.long()


def flatten(z: Tensor, s: Tensor, center: str | float) -> Tensor:
    """(1/k) * sum over S of (z_i - c)^2; the gradient passes through a mean."""
    deviation, k = deviations(z, s, center)
    return deviation.square().sum(-1) / k


def deviations(z: Tensor, s: Tensor, center: str | float) -> tuple[Tensor, Tensor]:
    """z_i - c for i in S (0 where masked), and k."""
    z_s = z.gather(-1, s)
    in_s = z_s != NEG_INF
    k = in_s.sum(-1).clamp(min=1)
    if center in ("global_mean", "local_mean"):
        near, c = mean_in_two(z if center == "global_mean" else z_s)
        deviation = (z_s - near) - c
    else:
        deviation = z_s - float(center)
    return torch.where(in_s, deviation, 0), k


def mean_in_two(z: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every row's entries that are not masked as a number near it, a constant, and what
    is missing, `[N, 1]` each: entries far from 0 lie nearer to their mean than it can be told in
    one number."""
    live = z != NEG_INF
    count = live.sum(-1, keepdim=True).clamp(min=1)
    near = (torch.where(live, z, 0).sum(-1, keepdim=True) / count).detach()
    near = torch.where(near.isfinite(), near, 0)  # +inf less itself would be NaN
    return near, torch.where(live, z - near, 0).sum(-1, keepdim=True) / count


def entropy(z: Tensor, s: Tensor) -> Tensor:
    """log k - H(softmax(z_S)), 0 when the entries of S are level."""
    log_q, q, k = local_distribution(z, s)
    return k.to(z.dtype).log() + (q * log_q).sum(-1)


def local_distribution(z: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q and q = softmax(z_S) (both 0 where masked), and k."""
    z_s = z.gather(-1, s)
    in_s = z_s != NEG_INF
    empty = ~in_s.any(-1, keepdim=True)
    log_q = torch.where(empty, 0, z_s).log_softmax(-1).masked_fill(~in_s, 0)
    return log_q, torch.where(in_s, log_q.exp(), 0), in_s.sum(-1).clamp(min=1)


def local_entropy_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    weights: Tensor,
    *,
    top_k: int,
    indices: Tensor | None,
    objective: str,
    center: str | float,
) -> Tensor:
    """d(sum of weights * rows)/d logits by METHOD's formulas, `[N, V]` in the dtype of the
    logits; `weights [N]`."""
    z, s = choose(logits, ref_logits, top_k, indices)
    live = z != NEG_INF
    off_s = torch.zeros_like(z[:, :1])
    if objective == "flatten":
        # (2/k) * ([j in S](z_j - c) - (1/V) * sum_S(z_i - c)); without the last term where c is
        # not the row's mean
        deviation, k = deviations(z, s, center)
        on_s = deviation * (2 / k.to(z.dtype))[:, None]
        if center == "global_mean":
            off_s = -on_s.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    else:
        # q_j (log q_j + H) on S
        log_q, q, _ = local_distribution(z, s)
        on_s = q * (log_q - (q * log_q).sum(-1, keepdim=True))
    grad = torch.zeros_like(z).scatter(-1, s, on_s) + off_s
    grad = torch.where(z.isnan(), torch.nan, torch.where(live, grad, 0))
    return (grad * weights[:, None]).to(logits.dtype)


def kl_loss(logits: Tensor, ref_logits: Tensor, *, direction: str = "reverse") -> Tensor:
    """`reverse`: KL(p_current || p_reference); `forward`: KL(p_reference || p_current).

    +inf where the second distribution lacks an entry that the first one has (the gradient is then
    not finite either).
    """
    z, r = both_rows(logits, ref_logits)
    a, b = (z, r) if direction == "reverse" else (r, z)
    in_a = a != NEG_INF
    lacking = in_a & (b == NEG_INF)
    log_a = log_softmax(a).masked_fill(~in_a, 0)
    log_b = log_softmax(b).masked_fill(~in_a | lacking, 0)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    infinite = lacking.any(-1)
    # Of a number above 0 that every logit has a part in: none has a finite gradient.
    kl = torch.where(infinite, 1 + z.sigmoid().sum(-1), kl)
    return kl * torch.where(infinite, torch.inf, 1.0).to(kl.dtype)


def both_rows(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a KL in the dtype they are worked in. Where either holds a NaN or +inf, of which
    there is no softmax, both become NaN as a whole."""
    z, r = (t.to(accum_dtype(logits.dtype)) for t in (logits, ref_logits))
    has_softmax = torch.maximum(z, r).amax(-1, keepdim=True) < torch.inf
    factor = torch.where(has_softmax, 1.0, torch.nan).to(z.dtype)
    return z * factor, r * factor


def log_softmax(x: Tensor) -> Tensor:
    """Over the last dimension; a row with nothing but masked entries gives no NaN."""
    return torch.where((x == NEG_INF).all(-1, keepdim=True), 0, x).log_softmax(-1)


def kl_gradient(logits: Tensor, ref_logits: Tensor, weights: Tensor, *, direction: str) -> Tensor:
    """d(sum of weights * rows)/d logits, `[N, V]` in the dtype of the logits.

    Reverse: p_j (log p_j - log q_j - KL); forward: p_j - q_j (0 without a q).
    """
    z, r = both_rows(logits, ref_logits)
    log_p, log_q = log_softmax(z), log_softmax(r)
    kl = kl_loss(z, r, direction=direction)[:, None]
    if direction == "reverse":
        grad = log_p.exp() * (log_p - log_q - kl)
    else:
        grad = torch.where((r != NEG_INF).any(-1, keepdim=True), log_p.exp() - log_q.exp(), 0)
    grad = torch.where(z == NEG_INF, 0, grad)
    grad = torch.where(kl.isfinite(), grad, torch.nan)
    return (grad * weights[:, None]).to(logits.dtype)


def cross_entropy_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """logsumexp(z) - z[label]; 0 for an ignored row."""
    z = logits.to(accum_dtype(logits.dtype))
    return F.cross_entropy(z, labels.long(), ignore_index=ignore_index, reduction="none")


def cross_entropy_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """d(sum of weights * rows)/d logits = softmax(z) - onehot(label), 0 for an ignored row."""
    grad = logits.to(accum_dtype(logits.dtype)).softmax(-1)
    counted = labels != ignore_index
    target = torch.where(counted, labels, 0).long()[:, None]
    grad.scatter_add_(-1, target, torch.full_like(grad[:, :1], -1.0))
    return torch.where(counted[:, None], grad * weights[:, None], 0).to(logits.dtype)


def reduce_rows(rows: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    """`mean` divides by `count` (the rows that carry a loss) and is 0 without any; so it does of
    its gradient, one number."""
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    return total / max(count, 1) if isinstance(count, int) else total / count.clamp(min=1)
