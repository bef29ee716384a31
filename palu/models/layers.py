"""The decoder layers of a Hugging Face model, and the output of one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from palu.models.in_head import LossInHead, Result
from palu.models.wrappers import incompatible_wrapper, is_compiled, text_only_inputs, unwrap


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a causal language model, first to last: the one list of modules inside
    it that has as many entries as its config says.

    Raises:
        ValueError: there is no such list, or more than one; names the model's class.
    """
    inner = unwrap(model)
    count = layer_count(getattr(inner, "config", None))
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    matches = {
        name: module
        for name, module in lists.items()
        if len(module) == count and not any(name.startswith(f"{other}.") for other in lists)
    }
    if len(matches) != 1:
        raise ValueError(
            f"the decoder layers of a {type(inner).__name__} were not found: its config has "
            f"num_hidden_layers={count}, and the lists of so many modules in it are "
            f"{', '.join(matches) or 'none'}"
        )
    return next(iter(matches.values()))


def layer_count(config: Any) -> int | None:
    """Return how many decoder layers a model's config has; None where it does not tell."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)


def layer_output(
    model: nn.Module,
    layer_id: int,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **model_inputs: Any,
) -> Tensor:
    """Return the output of one decoder layer (the residual stream after it), `[B, T, D]`.

    The module that the caller holds is the one that is called, so hooks of DDP and PEFT run and
    gradients flow. For the time of the call the layers after this one repeat its output, so that
    they cost nothing, and the head sees one position of each row (all of them in a model whose
    `forward` has no `logits_to_keep`).

    Args:
        layer_id: from 0.
        model, input_ids, attention_mask, **model_inputs: as for `palu.models.forward.logits_at`.

    Raises:
        ValueError: the model is compiled, does not call the layer exactly once with `[B, T, D]`
            coming out, or switches gradients on or off before it does; or gradients are on and a
            wrapper waits for them at the model's outputs (FSDP, DDP with `static_graph`):
            `loss_at_layer`.
    """
    layers, inner = _layers_seen(model, layer_id), unwrap(model)
    reason = incompatible_wrapper(model) if torch.is_grad_enabled() else None
    if reason is not None:
        raise _unseen(layer_id, reason)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    inputs |= text_only_inputs(model, input_ids) | model_inputs | _no_router_loss(inner)
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = 1
    with _ending_at(layers, layer_id) as taken:
        model(**inputs)
    return taken.output(input_ids)


def loss_at_layer(
    model: nn.Module,
    layer_id: int,
    loss: Callable[[Tensor], Result],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **model_inputs: Any,
) -> Result:
    """Return `loss` of `layer_output`, for models whose wrapper waits for gradients at the model's
    outputs: it is computed where the head would be called (see `palu.loss_in_head`), which may be
    of any kind."""
    with _ending_at(_layers_seen(model, layer_id), layer_id) as taken:
        in_head = LossInHead(model, takes_head=False)

        def inside(hidden: Tensor, head: None) -> Result:
            return loss(taken.output(input_ids))

        inputs = model_inputs | _no_router_loss(unwrap(model))
        return in_head(inside, input_ids, attention_mask, **inputs)


def _no_router_loss(inner: nn.Module) -> dict[str, bool]:
    """Return what tells a mixture of experts to compute no router loss: it fails where none of the
    layers up to this one is a mixture, as the first ones of Jamba."""
    takes = "output_router_logits" in inspect.signature(inner.forward).parameters
    return {"output_router_logits": False} if takes else {}


def _layers_seen(model: nn.Module, layer_id: int) -> nn.ModuleList:
    layers = decoder_layers(model)
    if is_compiled(model, layers[layer_id]):
        raise _unseen(layer_id, "the model is compiled, and compiled code does not see a hook")
    return layers


class _Taken:
    """The outputs of a layer, each with whether gradients were on."""

    def __init__(self, layer_id: int) -> None:
        self.layer_id, self.with_grad = layer_id, torch.is_grad_enabled()
        self.calls: list[tuple[Any, bool]] = []

    def take(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.calls.append((output, torch.is_grad_enabled()))

    def repeat(self, *args: Any, **kwargs: Any) -> Any:
        return self.calls[-1][0]

    def output(self, input_ids: Tensor) -> Tensor:
        """Return the one output; raise ValueError where it is none of `layer_output`."""
        if len(self.calls) != 1:
            raise _unseen(self.layer_id, f"the model calls it {len(self.calls)} times, not once")
        output, had_grad = self.calls[0]
        hidden = output if isinstance(output, Tensor) else output[0]
        if had_grad != self.with_grad:
            raise _unseen(
                self.layer_id,
                "the model switches gradients on or off before it (gradient checkpointing needs "
                "gradient_checkpointing_kwargs={'use_reentrant': False})",
            )
        if hidden.dim() != 3 or hidden.shape[:2] != input_ids.shape:
            shapes = f"{list(hidden.shape)} for input_ids of shape {list(input_ids.shape)}"
            raise _unseen(self.layer_id, f"it puts out a tensor of shape {shapes}")
        return hidden


@contextmanager
def _ending_at(layers: nn.ModuleList, layer_id: int) -> Iterator[_Taken]:
    """Take the output of a layer; inside, the layers after it repeat it."""
    taken = _Taken(layer_id)
    later: Sequence[nn.Module] = layers[layer_id + 1 :]
    # accelerate's dispatch and offloading put a forward of their own into a module.
    forwards = [vars(layer).get("forward") for layer in later]
    handle = layers[layer_id].register_forward_hook(taken.take)
    try:
        for layer in later:
            layer.forward = taken.repeat
        yield taken
    finally:
        handle.remove()
        for layer, forward in zip(later, forwards, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _unseen(layer_id: int, reason: str) -> ValueError:
    return ValueError(f"the output of decoder layer {layer_id} cannot be taken: {reason}")
