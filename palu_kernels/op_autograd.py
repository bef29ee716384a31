"""How a custom op and its backward op come together, and what neither of them can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def differentiable(
    name: str,
    op: Any,
    backward_op: Any,
    saved: Callable[..., tuple],
    arguments_of: Callable[..., tuple],
) -> None:
    """Wires ``op`` to ``backward_op``: ``saved`` names the tensors kept for it, ``arguments_of``
    the plain arguments passed on."""

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

    op.register_autograd(backward, setup_context=setup_context)
    refuse_higher_order(name, op, backward_op)


def refuse_higher_order(name: str, op: Any, backward_op: Any) -> None:
    """Second derivatives and vmap are not defined for a fused loss: each says so."""

    def no_second_derivative(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            f"palu_kernels: {name} has no second derivative (double backward is not supported)"
        )

    def no_vmap(*_: Any, **__: Any) -> tuple:
        raise RuntimeError(
            f"palu_kernels: {name} does not support vmap; pass the batch as [B, T, V]"
        )

    backward_op.register_autograd(no_second_derivative)
    op.register_vmap(no_vmap)
    backward_op.register_vmap(no_vmap)
