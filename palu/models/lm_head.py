"""The output head of a Hugging Face model as an `LMHead`.

With it losses are computed from hidden rows, without logits (`palu_kernels.linear_*_loss`). That is
right only if the model's own logits are `cap(scale * (hidden @ weight.T + bias))` and nothing else,
so the layer is inspected here, and the numbers are compared in `palu.models.head_check`.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

import palu_kernels
from palu.models.wrappers import (
    FSDP2,
    SHARDING,
    UnsupportedHead,
    hook_origins,
    is_a,
    output_embedding,
    refuse_wrapper,
    unwrap,
)

# What the configs of transformers call the number that logits are multiplied with: Cohere,
# Falcon-H1, Muse. A factor on the hidden rows before the head (MiniCPM3, T5) is none of these: the
# rows are taken where they enter the head.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# Granite divides the logits by this one, HyperCLOVA X multiplies, MiniCPM3 divides the hidden rows.
_SCALING, _SCALING_MULTIPLIES, _SCALING_BEFORE = "logits_scaling", ("hyperclovax",), ("minicpm3",)
# The cap: Gemma and most others, RecurrentGemma, xLSTM.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class LMHead(palu_kernels.LMHead):
    """`palu_kernels.LMHead` that can be read from a Hugging Face model."""

    @classmethod
    def from_model(cls, model: nn.Module) -> LMHead:
        """Return the output embedding of `model` with the scale and the cap that its config names.

        The parameters are held, not copied: gradients reach them, and the head is to be read anew
        when the model gets another output embedding (`resize_token_embeddings`). What the model
        does to its logits is only looked up here; `check_head` tests it.

        Raises:
            UnsupportedHead: there is no output embedding, or it is anything but an `nn.Linear` with
                plain parameters: adapter, quantization, shards, parametrization, hooks, offloading.
        """
        module = output_embedding(model)
        refuse_wrapper(model)
        refuse_not_linear(module)
        return cls.of_layer(module, *scale_and_cap(unwrap(model)))

    @classmethod
    def of_layer(
        cls, layer: nn.Linear, scale: float, cap: float | None, *, sharded: bool = False
    ) -> LMHead:
        """Return a head of a layer's parameters as they are now: FSDP makes them whole for the time
        of a forward.

        Args:
            sharded: whether they may be views of a larger parameter, as FSDP1 makes them, or the
                rows of this rank, where the layer is tensor parallel.

        Raises:
            UnsupportedHead: they are not plain tensors of the layer's size.
        """
        reason = _why_not_whole(layer, sharded)
        if reason is not None:
            raise UnsupportedHead(reason)
        try:
            return cls(layer.weight, layer.bias, scale, cap)
        except (TypeError, ValueError) as error:
            raise UnsupportedHead(f"the output head is none of an LMHead: {error}") from error


def refuse_not_linear(module: nn.Module) -> None:
    """Raise UnsupportedHead unless the output embedding is an `nn.Linear` and nothing more; that
    FSDP or tensor parallelism shards it is no matter."""
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)
        raise UnsupportedHead(f"the output embedding has parametrizations ({names})")
    # FSDP2 puts a class of its own before a module's.
    kind = type(module).__mro__[2] if is_a(module, FSDP2) else type(module)
    if kind is not nn.Linear:
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise UnsupportedHead(f"the output embedding is a {name}, not a plain torch.nn.Linear")
    hooks = [name.strip("_").replace("_", " ") for name in _HOOKS if _foreign(module, name)]
    if hooks:
        raise UnsupportedHead(f"the output embedding has {' and '.join(hooks)}")
    if "forward" in vars(module):  # accelerate's dispatch and offloading
        raise UnsupportedHead("the forward of the output embedding was replaced")


def _foreign(module: nn.Module, hooks: str) -> bool:
    """Return whether the module has such hooks, but for those of wrappers that shard it."""
    return any(not origin.startswith(SHARDING) for origin in hook_origins(module, hooks))


def _why_not_whole(layer: nn.Linear, sharded: bool) -> str | None:
    """Return why the parameters of a linear layer are not whole and plain, else None."""
    shapes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    kinds = ("Parameter", "Tensor", "DTensor") if sharded else ("Parameter",)
    for name, shape in shapes.items():
        value = getattr(layer, name)
        if name == "bias" and value is None:
            continue
        if type(value).__name__ not in kinds:
            return f"the {name} of the output embedding is a {type(value).__name__}"
        if value.is_meta:
            return f"the {name} of the output embedding is offloaded (on the meta device)"
        if value.shape != shape:
            return (
                f"the {name} of the output embedding has shape {list(value.shape)}, not "
                f"{list(shape)}: it is sharded or was changed"
            )
    return None


def scale_and_cap(model: nn.Module) -> tuple[float, float | None]:
    """Return what the config says that logits are multiplied with, and their cap."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def number(name: str) -> float | None:
        for holder in (text, config):
            value = getattr(holder, name, None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UnsupportedHead(f"config.{name} is {value!r}, not a number")
            return value
        return None

    scale = 1.0
    for name in _MULTIPLIERS:
        factor = number(name)
        scale *= 1.0 if factor is None else factor
    scaling = number(_SCALING)
    if scaling and getattr(text, "model_type", None) in _SCALING_MULTIPLIES:
        scale *= scaling
    elif scaling and getattr(text, "model_type", None) not in _SCALING_BEFORE:
        scale /= scaling
    caps = [cap for cap in map(number, _CAPS) if cap is not None]
    return scale, caps[0] if caps else None
