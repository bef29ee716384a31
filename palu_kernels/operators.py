"""The public operators on logits: check arguments, pick the backend, wire autograd.

Each operator is one ``torch.library`` custom op (so one node under ``torch.compile``) with a
backward op of its own. What a forward saves beside its inputs is 24 bytes a row. The PyTorch
backend runs ``reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from palu_kernels import arguments, backend, reference

STATE = 4  # float32 numbers a row that a forward leaves for its backward


def topk_indices(scores: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Exact indices of the k largest entries of every row.

    Args:
        scores: ``[N, V]`` or ``[B, T, V]``, float32, bfloat16, float16 or float64, any row stride.
        k: at least 1; more than V means V.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        int32 ``[..., min(k, V)]``, ascending along a row. Ties go to the lowest index; -0.0
        equals +0.0; NaN ranks above +inf.

    Raises:
        TypeError, ValueError: an argument is not as above, or the backend that was asked for
        cannot serve.
    """
    arguments.scores("scores", scores)
    arguments.positive_int("k", k)
    return _topk(scores.detach(), k, _resolve(backend, scores))


def local_entropy_loss(
    logits: Tensor,
    ref_logits: Tensor | None = None,
    *,
    top_k: int,
    indices: Tensor | None = None,
    objective: str = "flatten",
    center: str | float = "global_mean",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """PALU's forget loss: level the entries of S, the k entries that the chooser ranks highest
    (arXiv 2601.03190).

    ``flatten``: ``(1/k) * sum_{i in S} (z_i - c)^2``; ``entropy``: ``log k - H(softmax(z_S))``.

    Args:
        logits: the current model's rows, ``[N, V]`` or ``[B, T, V]``, float32, bfloat16, float16
            (or float64, PyTorch only), any row stride.
        ref_logits: the frozen reference's rows, same shape and dtype; its k largest entries are S
            (ties: lowest index first).
        top_k: k, at least 1; more than V means V.
        indices: S itself, int32 or int64 ``[..., min(k, V)]``, unique and in range along a row,
            any order. At most one of ``ref_logits`` and ``indices`` is given; with neither,
            ``logits`` choose S (no gradient through the choice).
        objective: ``flatten`` or ``entropy``.
        center: for ``flatten``, c: ``global_mean`` (mean of the row, gradient through it),
            ``local_mean`` (mean over S, likewise) or a number.
        reduction: ``mean`` over rows (0 without rows), ``sum`` or ``none``.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        float32 (float64 for float64 logits): 0-dim, or ``[N]`` / ``[B, T]`` with ``none``.
        Entries of -inf take no part (k is then the number that do); a NaN in a row spoils that
        row alone.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    arguments.scores("logits", logits)
    _no_forward_mode("local_entropy_loss", logits)
    arguments.positive_int("top_k", top_k)
    arguments.choice("objective", objective, arguments.OBJECTIVES)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    kind, number = arguments.center(center)
    if ref_logits is not None and indices is not None:
        raise ValueError("ref_logits and indices are both given; at most one of them may choose S")
    if ref_logits is not None:
        arguments.reference("ref_logits", ref_logits, logits)
    if indices is not None:
        arguments.indices(indices, top_k, logits)
    served_by = _resolve(backend, logits)
    return _local_entropy(
        logits, ref_logits, indices, top_k, objective, kind, number, reduction, served_by
    )[0]


def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: str = "reverse",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Kullback-Leibler divergence between the current rows and frozen reference rows, over the
    whole vocabulary.

    Args:
        logits: ``[N, V]`` or ``[B, T, V]``, float32, bfloat16, float16 (or float64, PyTorch
            only), any row stride.
        ref_logits: same shape and dtype, no gradient.
        direction: ``reverse`` is KL(p_current || p_reference), ``forward`` is KL(p_reference ||
            p_current).
        reduction: ``mean`` over rows (0 without rows), ``sum`` or ``none``.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        float32 (float64 for float64 logits): 0-dim, or ``[N]`` / ``[B, T]`` with ``none``. A row
        is +inf where the second distribution lacks an entry (-inf) that the first one has; its
        gradient is then not finite.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    arguments.scores("logits", logits)
    _no_forward_mode("kl_loss", logits)
    arguments.choice("direction", direction, arguments.DIRECTIONS)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.reference("ref_logits", ref_logits, logits)
    return _kl(logits, ref_logits, direction, reduction, _resolve(backend, logits))[0]


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy against class indices, as ``torch.nn.functional.cross_entropy``; rows are not
    shifted.

    Args:
        logits: ``[N, V]`` or ``[B, T, V]``, float32, bfloat16, float16 (or float64, PyTorch
            only), any row stride.
        labels: int64 or int32 ``[N]`` or ``[B, T]``: 0..V-1 or ``ignore_index``.
        ignore_index: rows with this label give 0 and no gradient.
        reduction: ``mean`` over the rows that are not ignored (0 without any, where PyTorch gives
            NaN), ``sum`` or ``none``.
        backend: ``auto``, ``triton`` or ``torch``.

    Returns:
        float32 (float64 for float64 logits): 0-dim, or the shape of ``labels`` with ``none``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    arguments.scores("logits", logits)
    _no_forward_mode("cross_entropy_loss", logits)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.integers("labels", labels, list(logits.shape[:-1]), logits)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            f"ignore_index is {ignore_index!r} ({type(ignore_index).__name__}); it must be an int"
        )
    served_by = _resolve(backend, logits)
    return _cross_entropy(logits, labels, ignore_index, reduction, served_by)[0]


# --- what the operators share --------------------------------------------------------------------


def _resolve(name: str, logits: Tensor) -> str:
    return backend.resolve(name, logits.device, logits.dtype)


def _no_forward_mode(name: str, logits: Tensor) -> None:
    """A custom op would drop a forward-mode tangent without a word."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError(f"palu_kernels: {name} does not support forward-mode differentiation")


def _flat(t: Tensor) -> Tensor:
    """``[B, T, ...]`` -> ``[N, ...]`` for the PyTorch backend (the kernels take three dimensions
    as they are)."""
    return t.reshape(-1, t.shape[-1])


def _reduced(rows: Tensor, reduction: str, count: Tensor | int, shape: torch.Size) -> Tensor:
    out = reference.reduce_rows(rows, reduction, count)
    # a custom op may not return one tensor twice, and the rows of a kernel are fresh: only the
    # shape is left to set
    return out.reshape(shape[:-1]) if reduction == "none" else out


def _row_weights(grad: Tensor, reduction: str, count: Tensor | int, rows: int) -> Tensor:
    """dL/d(row loss) for every row, contiguous ``[N]``."""
    if reduction == "none":
        return grad.reshape(-1).contiguous()
    if reduction == "mean":
        grad = grad / max(count, 1) if isinstance(count, int) else grad / count.clamp(min=1)
    return grad.expand(rows).contiguous()


def _empty_outputs(logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and state as the fake implementations see them."""
    dtype = reference.work_dtype(logits.dtype)
    shape = logits.shape[:-1] if reduction == "none" else ()
    rows = math.prod(logits.shape[:-1])
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(
        (rows, STATE), dtype=torch.float32
    )


def _no_state(logits: Tensor) -> Tensor:
    """The PyTorch backend leaves nothing behind, in the shape that the kernels do."""
    return logits.new_zeros((math.prod(logits.shape[:-1]), STATE), dtype=torch.float32)


def _gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _differentiable(
    name: str,
    op: Any,
    backward_op: Any,
    saved: Callable[..., tuple],
    arguments_of: Callable[..., tuple],
) -> None:
    """Wires ``op`` to ``backward_op``: ``saved`` names the tensors kept for it, ``arguments_of``
    the plain arguments passed on.

    Second derivatives, vmap and forward mode are not defined for a fused loss: each says so.
    """

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*saved(inputs, output))
        ctx.plain = arguments_of(inputs)
        ctx.inputs = len(inputs)

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        unused = (None,) * (ctx.inputs - 1)
        if grad is None or not ctx.needs_input_grad[0]:
            return (None, *unused)
        return (backward_op(grad, *ctx.saved_tensors, *ctx.plain), *unused)

    def no_second_derivative(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            f"palu_kernels: {name} has no second derivative (double backward is not supported)"
        )

    def no_vmap(*_: Any, **__: Any) -> tuple:
        raise RuntimeError(
            f"palu_kernels: {name} does not support vmap; pass the batch as [B, T, V]"
        )

    op.register_autograd(backward, setup_context=setup_context)
    backward_op.register_autograd(no_second_derivative)
    op.register_vmap(no_vmap)
    backward_op.register_vmap(no_vmap)


# --- topk_indices --------------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::topk", mutates_args=())
def _topk(scores: Tensor, k: int, served_by: str) -> Tensor:
    if served_by == "triton":
        from palu_kernels.triton import select

        return select.topk_indices(scores, k)
    chosen = reference.topk_indices(_flat(scores), k)
    return chosen.reshape(*scores.shape[:-1], chosen.shape[-1]).contiguous()


@_topk.register_fake
def _(scores: Tensor, k: int, served_by: str) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], min(k, scores.shape[-1])), dtype=torch.int32)


# --- local_entropy_loss --------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::local_entropy", mutates_args=())
def _local_entropy(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    reduction: str,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if indices is not None and backend.check_values(indices.device):
        arguments.index_values(_flat(indices), logits.shape[-1])
    if served_by == "triton":
        from palu_kernels.triton import local_entropy

        rows, state, chosen = local_entropy.forward(
            logits, ref_logits, indices, top_k, objective, center_kind, center_value
        )
    else:
        rows = reference.local_entropy_loss(
            _flat(logits),
            None if ref_logits is None else _flat(ref_logits),
            top_k=top_k,
            indices=None if indices is None else _flat(indices),
            objective=objective,
            center=center_value if center_kind == "number" else center_kind,
        )
        state = _no_state(logits)
        chosen = logits.new_zeros(_chosen_shape(logits, indices), dtype=torch.int32)
    return _reduced(rows, reduction, rows.shape[0], logits.shape), state, chosen


def _chosen_shape(logits: Tensor, indices: Tensor | None) -> tuple[int, int]:
    """S as the kernels keep it: (threshold key, tie cut) a row, or, where it was given as
    indices, one bit a column."""
    rows = math.prod(logits.shape[:-1])
    return (2, rows) if indices is None else (rows, (logits.shape[-1] + 31) // 32)


@_local_entropy.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    reduction: str,
    served_by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = logits.new_empty(_chosen_shape(logits, indices), dtype=torch.int32)
    return (*_empty_outputs(logits, reduction), chosen)


@torch.library.custom_op("palu_kernels::local_entropy_backward", mutates_args=())
def _local_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    state: Tensor,
    chosen: Tensor,
    top_k: int,
    objective: str,
    center_kind: str,
    center_value: float,
    reduction: str,
    served_by: str,
) -> Tensor:
    rows = math.prod(logits.shape[:-1])
    weights = _row_weights(grad, reduction, rows, rows)
    if served_by == "triton":
        from palu_kernels.triton import local_entropy

        return local_entropy.backward(
            weights,
            logits,
            ref_logits,
            indices is not None,
            state,
            chosen,
            objective,
            _gradient_like(logits),
        )
    return reference.local_entropy_gradient(
        _flat(logits),
        None if ref_logits is None else _flat(ref_logits),
        weights,
        top_k=top_k,
        indices=None if indices is None else _flat(indices),
        objective=objective,
        center=center_value if center_kind == "number" else center_kind,
    ).reshape(logits.shape)


@_local_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return _gradient_like(logits)


_differentiable(
    "local_entropy_loss",
    _local_entropy,
    _local_entropy_backward,
    saved=lambda inputs, output: (*inputs[:3], output[1], output[2]),
    arguments_of=lambda inputs: inputs[3:],
)


# --- kl_loss -------------------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::kl", mutates_args=())
def _kl(
    logits: Tensor, ref_logits: Tensor, direction: str, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    if served_by == "triton":
        from palu_kernels.triton import divergence

        rows, state = divergence.forward(logits, ref_logits, direction)
    else:
        rows = reference.kl_loss(_flat(logits), _flat(ref_logits), direction=direction)
        state = _no_state(logits)
    return _reduced(rows, reduction, rows.shape[0], logits.shape), state


@_kl.register_fake
def _(
    logits: Tensor, ref_logits: Tensor, direction: str, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(logits, reduction)


@torch.library.custom_op("palu_kernels::kl_backward", mutates_args=())
def _kl_backward(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    state: Tensor,
    direction: str,
    reduction: str,
    served_by: str,
) -> Tensor:
    rows = math.prod(logits.shape[:-1])
    weights = _row_weights(grad, reduction, rows, rows)
    if served_by == "triton":
        from palu_kernels.triton import divergence

        return divergence.backward(
            weights, logits, ref_logits, state, direction, _gradient_like(logits)
        )
    grad = reference.kl_gradient(_flat(logits), _flat(ref_logits), weights, direction=direction)
    return grad.reshape(logits.shape)


@_kl_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return _gradient_like(logits)


_differentiable(
    "kl_loss",
    _kl,
    _kl_backward,
    saved=lambda inputs, output: (*inputs[:2], output[1]),
    arguments_of=lambda inputs: inputs[2:],
)


# --- cross_entropy_loss --------------------------------------------------------------------------


@torch.library.custom_op("palu_kernels::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    if backend.check_values(labels.device):
        arguments.label_values(labels, ignore_index, logits.shape[-1])
    if served_by == "triton":
        from palu_kernels.triton import cross_entropy

        rows, state = cross_entropy.forward(logits, labels, ignore_index)
    else:
        rows = reference.cross_entropy_loss(
            _flat(logits), labels.reshape(-1), ignore_index=ignore_index
        )
        state = _no_state(logits)
    return _reduced(rows, reduction, (labels != ignore_index).sum(), logits.shape), state


@_cross_entropy.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, reduction: str, served_by: str
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(logits, reduction)


@torch.library.custom_op("palu_kernels::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    ignore_index: int,
    reduction: str,
    served_by: str,
) -> Tensor:
    weights = _row_weights(grad, reduction, (labels != ignore_index).sum(), labels.numel())
    if served_by == "triton":
        from palu_kernels.triton import cross_entropy

        return cross_entropy.backward(
            weights, logits, labels, state, ignore_index, _gradient_like(logits)
        )
    grad = reference.cross_entropy_gradient(
        _flat(logits), labels.reshape(-1), weights, ignore_index=ignore_index
    )
    return grad.reshape(logits.shape)


@_cross_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return _gradient_like(logits)


_differentiable(
    "cross_entropy_loss",
    _cross_entropy,
    _cross_entropy_backward,
    saved=lambda inputs, output: (*inputs[:2], output[1]),
    arguments_of=lambda inputs: inputs[2:],
)
