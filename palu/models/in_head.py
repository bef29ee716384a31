"""A loss that is computed where a model computes its logits: inside its output embedding's forward.

Wrappers that shard a model (FSDP), or reduce gradients when they reach its outputs (DDP with
`static_graph`), do their work in hooks around the forward of modules. There the head's parameters
are whole, and a gradient that comes in by the model's outputs finds every hook in its way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from palu.models.lm_head import LMHead, refuse_not_linear, scale_and_cap
from palu.models.wrappers import (
    FSDP1,
    FSDP2,
    UnsupportedHead,
    is_a,
    is_sharded,
    is_tensor_parallel,
    output_embedding,
    refuse_compiled,
    unwrap,
    wants_token_types,
)

Result = TypeVar("Result", Tensor, tuple)


def loss_in_head(
    model: nn.Module,
    loss: Callable[[Tensor, LMHead], Result],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **model_inputs: Any,
) -> Result:
    """Call a model and return `loss(hidden, head)` of the rows that enter its output embedding and
    of the head as it is there, without computing logits.

    For models in any wrapper: under FSDP the head's parameters are whole inside the forward alone,
    and gradients must come back through the model's outputs. The module that the caller holds is
    the one that is called. All processes have to call it, with a batch of no rows if need be; a
    loss that depends on no row then has a gradient of zeros. Of a model in no wrapper the results
    are those of `model_hidden_states` and `LMHead.from_model`, bit for bit.

    Args:
        model: a causal language model, wrapped or not; its layers may be compiled.
        loss: called once, with hidden rows `[B, T, D]` and the head, under the model's own autocast
            and whether or not gradients are on. Gives the loss, or a tuple that begins with it
            (`palu.PALUOutput`); tensors behind it come back detached.
        input_ids: int64 `[B, T]`.
        attention_mask: `[B, T]`, 1 for real tokens, or None when nothing is padded.
        **model_inputs: more arguments of the model's forward (`position_ids`, ...); no `labels`.

    Returns:
        what `loss` gave; backward of the loss runs the hooks of every wrapper.

    Raises:
        UnsupportedHead: the model is compiled as a whole; its output embedding is anything but an
            `nn.Linear` with plain parameters (but for FSDP's shards), is not called exactly once
            with `[B, T, D]`, or is not what its logits come from; the model switches gradients on
            or off before it, or fails when no logits leave it.
        TypeError: `loss` gives anything else.
    """
    return LossInHead(model)(loss, input_ids, attention_mask, **model_inputs)


class LossInHead:
    """`loss_in_head` of one model, whose modules are looked through once and not at every call.

    Args:
        model: as for `loss_in_head`.
        takes_head: whether the losses want the head. If not they are given None, and it may be of
            any kind.

    Raises:
        UnsupportedHead: as `loss_in_head`.
    """

    def __init__(self, model: nn.Module, *, takes_head: bool = True) -> None:
        self.model, self.inner = model, unwrap(model)
        self.layer = output_embedding(model)
        self.takes_head = takes_head
        refuse_compiled(model, self.layer)
        if takes_head:
            refuse_not_linear(self.layer)
            self.scale, self.cap = scale_and_cap(self.inner)
        self.wants_token_types = wants_token_types(model)
        self.tensor_parallel = is_tensor_parallel(self.layer)
        self.sharded = is_sharded(model) or self.tensor_parallel
        self._kept: LMHead | None = None

    def __call__(
        self,
        loss: Callable[[Tensor, LMHead], Result],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **model_inputs: Any,
    ) -> Result:
        """See `loss_in_head`."""
        if self.model._compiled_call_impl or self.inner._compiled_call_impl:  # since then
            refuse_compiled(self.model, self.layer)
        call = _Call(self, loss, list(input_ids.shape))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.wants_token_types and self.inner.training:
            inputs["token_type_ids"] = torch.zeros_like(input_ids)
        inputs |= model_inputs
        try:
            with _forward_replaced(self.layer, call):
                output = self.model(**inputs)
        except Exception as error:
            if not call.given or isinstance(error, (UnsupportedHead, torch.OutOfMemoryError)):
                raise  # the loss's own fault, or the model's
            line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise UnsupportedHead(
                f"the model fails when no logits leave its output embedding ({line})"
            ) from error
        if not call.given:
            raise UnsupportedHead("the model does not call its output embedding")
        return call.result(getattr(output, "logits", None))

    def head(self) -> LMHead:
        """Return the head; of a sharded model only in the layer's forward."""
        kept, layer = self._kept, self.layer
        # What a head keeps of itself (`LMHead`) goes by addresses, where shards come and go.
        if kept is None or kept.weight is not layer.weight or kept.bias is not layer.bias:
            head = LMHead.of_layer(layer, self.scale, self.cap, sharded=self.sharded)
            self._kept = None if self.sharded else head
            return head
        return kept


class _Call:
    """What stands in for the output embedding's forward in one call of a model."""

    def __init__(self, owner: LossInHead, loss: Callable, shape: list[int]) -> None:
        self.owner, self.loss, self.shape = owner, loss, shape
        self.with_grad = torch.is_grad_enabled()
        self.entered = False
        self.given: list[Any] = []  # what the loss gave
        self.gradient: list[Tensor] = []  # on its way from the anchor to the carrier

    def __call__(self, input: Tensor) -> Tensor:
        """Compute the loss of the rows, and hand on logits of no row, on which it depends."""
        if self.entered:
            raise UnsupportedHead("the model calls its output embedding more than once")
        self.entered = True
        # Under a checkpoint around the whole model the rows would come without a gradient.
        if torch.is_grad_enabled() != self.with_grad:
            raise UnsupportedHead("the model switches gradients on or off inside its forward")
        entered, input = input, _local_rows(input)
        if input.dim() != 3 or list(input.shape[:2]) != self.shape:
            raise UnsupportedHead(
                f"rows of shape {list(input.shape)} enter the output embedding for input_ids of "
                f"shape {self.shape}"
            )
        head = self.owner.head() if self.owner.takes_head else None
        result = self.loss(input, head)
        value = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(value, Tensor):
            raise TypeError(
                f"loss gave a {type(result).__name__}; it must give a tensor, or a tuple that "
                "begins with one"
            )
        if self.with_grad and not value.requires_grad:
            value = _with_zero_gradients(value, input, head)
        self.given = [result, value]
        columns = 1 if head is None else head.weight.shape[0]
        empty = _Carrier.apply(value, self.gradient, (input.shape[0], 0, columns), input)
        return _as_logits(empty, entered)

    def result(self, logits: Tensor | None) -> Any:
        """Return what the loss gave, so that its gradient comes in by the model's logits."""
        result, value = self.given
        if (
            not isinstance(logits, Tensor)
            or logits.numel()
            or (value.requires_grad and not logits.requires_grad)
        ):
            raise UnsupportedHead("the logits of the model are not made of its output embedding's")
        if value.requires_grad:
            value = _Anchor.apply(value.detach(), self.gradient, logits)
        if isinstance(result, Tensor):
            return value
        rest = [x.detach() if isinstance(x, Tensor) else x for x in result[1:]]
        return result._make([value, *rest]) if hasattr(result, "_make") else (value, *rest)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have `forward` run in the place of the module's own inside the block: after its pre-hooks and
    before its forward hooks, which is where FSDP has made its parameters whole."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:  # accelerate's dispatch and offloading
            module.forward = own


def _local_rows(rows: Tensor) -> Tensor:
    """Return hidden rows as a plain tensor: tensor parallelism hands all of them to each rank.

    Raises:
        UnsupportedHead: it hands on parts of them.
    """
    placements = getattr(rows, "placements", None)
    if placements is None:
        return rows
    if not all(placement.is_replicate() for placement in placements):
        raise UnsupportedHead(f"rows with placements {placements} enter the output embedding")
    return rows.to_local()


def _as_logits(empty: Tensor, rows: Tensor) -> Tensor:
    """Return the output of a tensor parallel layer: this rank's columns of the logits."""
    if not hasattr(rows, "device_mesh"):
        return empty
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(empty, rows.device_mesh, [Shard(-1)], run_check=False)


def _with_zero_gradients(loss: Tensor, hidden: Tensor, head: LMHead | None) -> Tensor:
    """Return the loss as one whose gradient is zero for all that trains: processes that reduce
    gradients together must all have some."""
    for tensor in (hidden, *(() if head is None else (head.weight, head.bias))):
        if tensor is not None and tensor.requires_grad:
            loss = loss + tensor[:0].sum().to(loss.dtype)
    return loss


class _Carrier(torch.autograd.Function):
    """An empty output of the head. Its backward gives the loss the gradient that `_Anchor` left."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradient: list[Tensor], shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return like.new_empty(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple:
        return ctx.gradient.pop() if ctx.gradient else None, None, None, None


class _Anchor(torch.autograd.Function):
    """The value of the loss, on the model's empty logits. Its backward leaves the gradient for
    `_Carrier` and sends an empty one through the model's outputs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: list[Tensor], logits: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.empty = gradient, logits.detach()
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple:
        if gradient is None:
            return None, None, None
        ctx.gradient[:] = [gradient]
        return None, None, torch.zeros_like(ctx.empty)


# ---- a frozen model ------------------------------------------------------------------------------


@contextmanager
def whole_head(model: nn.Module) -> Iterator[LMHead]:
    """Yield the head of a frozen model, detached. Where FSDP shards it, it is gathered and copied:
    `V * D` entries that live as long as the head does, which may be one step or all of them. All
    processes have to enter.

    Raises:
        UnsupportedHead: as `LMHead.from_model`.
    """
    layer = output_embedding(model)
    refuse_not_linear(layer)
    scale, cap = scale_and_cap(unwrap(model))
    with _gathered(model, layer) as gathered:
        sharded = gathered or is_tensor_parallel(layer)
        head = LMHead.of_layer(layer, scale, cap, sharded=sharded).detach()
        if gathered:  # whole for the time of this block alone, and a backward may come later
            head = _copied(head)
    yield head


def _copied(head: LMHead) -> LMHead:
    copied = copy.copy(head)
    for name in ("weight", "bias"):
        value = getattr(head, name)
        object.__setattr__(copied, name, None if value is None else value.clone())
    return copied


@contextmanager
def _gathered(model: nn.Module, layer: nn.Module) -> Iterator[bool]:
    """Have the parameters of a layer whole inside; yield whether FSDP shards them."""
    around = [m for m in model.modules() if is_a(m, FSDP1, FSDP2) and layer in set(m.modules())]
    if not around:
        yield False
    elif is_a(around[-1], FSDP2):  # the innermost one has them
        around[-1].unshard()
        try:
            yield True
        finally:
            around[-1].reshard()
    else:
        gather = type(around[-1]).summon_full_params
        with gather(around[-1], recurse=False, writeback=False):
            yield True
