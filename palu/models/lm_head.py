"""The output head of a Hugging Face model as an `LMHead`, and the hidden rows that enter it.

With both, losses are computed without logits (`palu_kernels.linear_*_loss`). That is right only if
the model's own logits are `cap(scale * (hidden @ weight.T + bias))` and nothing else, so the layer
is inspected (`LMHead.from_model`) and the numbers are compared (`check_head`). `fusable_head`
does both.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import palu_kernels
from palu.models.forward import model_hidden_states
from palu.models.wrappers import (
    FSDP2,
    UnsupportedHead,
    eval_mode,
    head_pre_hook,
    is_a,
    output_embedding,
    refuse_wrapper,
    unwrap,
)

logger = logging.getLogger(__name__)

# What the configs of transformers call the number that logits are multiplied with: Cohere,
# Falcon-H1, Muse. A factor on the hidden rows before the head (MiniCPM3, T5) is none of these: the
# rows are taken where they enter the head.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# Granite divides the logits by this one, HyperCLOVA X multiplies, MiniCPM3 divides the hidden rows.
_SCALING, _SCALING_MULTIPLIES, _SCALING_BEFORE = "logits_scaling", ("hyperclovax",), ("minicpm3",)
# The cap: Gemma and most others, RecurrentGemma, xLSTM.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# The self-check's rows: at most this many tokens, and logits of at least this size, beyond any cap
# in use (15 to 50).
_CHECK_TOKENS, _CHECK_PEAK = 8, 100.0


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
        cls, layer: nn.Linear, scale: float, cap: float | None, *, views: bool = False
    ) -> LMHead:
        """Return a head of a layer's parameters as they are now: FSDP makes them whole for the time
        of a forward.

        Args:
            views: whether views of a larger parameter, as FSDP1 makes them, will do.

        Raises:
            UnsupportedHead: they are not plain tensors of the layer's size.
        """
        reason = _why_not_whole(layer, views)
        if reason is not None:
            raise UnsupportedHead(reason)
        try:
            return cls(layer.weight, layer.bias, scale, cap)
        except (TypeError, ValueError) as error:
            raise UnsupportedHead(f"the output head is none of an LMHead: {error}") from error


def fusable_head(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **model_inputs: Any
) -> LMHead | None:
    """Return the head of `model` if losses may be computed from hidden states; else None, with a
    warning that says why. Runs the model twice on a few tokens: ask once, not in every step.

    Args:
        model: a causal language model, wrapped as it will be called.
        input_ids, attention_mask, **model_inputs: any batch for this model, as for
            `palu.models.forward.logits_at`.
    """
    try:
        head = LMHead.from_model(model)
        check_head(model, head, input_ids, attention_mask, **model_inputs)
    except UnsupportedHead as refusal:
        logger.warning("losses are computed from logits, not from hidden rows: %s", refusal)
        return None
    return head


def check_head(
    model: nn.Module,
    head: palu_kernels.LMHead,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **model_inputs: Any,
) -> None:
    """Compare the model's own logits with those of `head`, on a few tokens of the given batch.

    One row of the test enters the output embedding as it is, another one scaled until the largest
    logit is 100 or 4 times its own, so that a cap shows. Nothing of the model or of the random
    state is changed.

    With `u` the eps of the coarser dtype (64 times it in float32 and float64, where the order of
    sums shows): a row may differ by `u` in relative norm, an entry by 4 eps of itself plus `u / 2`
    of the row's largest.

    Raises:
        UnsupportedHead: they differ by more, the rows cannot be tested, or `model_hidden_states`
            does not work for this model.
    """
    ids, more = _few_tokens(input_ids, attention_mask, model_inputs)
    uncapped = replace(head, softcap=None)
    expected: list[Tensor] = []

    def amplify(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        peak = uncapped.logits(hidden).abs().max().item()
        if not 0 < peak < float("inf"):
            raise UnsupportedHead(f"the largest logit of a test row is {peak}")
        room = torch.finfo(hidden.dtype).max / 8 / hidden.abs().max().item()
        factor = min(max(_CHECK_PEAK / peak, 4.0), room)
        rows = torch.stack([hidden[0], hidden[1] * factor])
        # Inside the hook, where the model's own autocast is in force.
        expected.append(head.logits(rows))
        return rows, *args[1:]

    with eval_mode(model):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
        model_hidden_states(model, **inputs)
        with head_pre_hook(model, amplify):
            output = model(**inputs, use_cache=False)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UnsupportedHead("the output of the model has no logits to compare with")
    _compare(logits, *expected, head)


def _compare(logits: Tensor, expected: Tensor, head: palu_kernels.LMHead) -> None:
    if logits.shape != expected.shape:
        raise UnsupportedHead(
            f"the model gives logits of shape {list(logits.shape)}, its output embedding of shape "
            f"{list(expected.shape)}"
        )
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(expected.dtype).eps)
    of_row = eps if eps > 1e-6 else 64 * eps
    got, want = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, expected))
    error, size = (got - want).abs(), want.abs()
    entries = error <= 4 * eps * size + of_row / 2 * size.amax(-1, keepdim=True)
    rows = error.norm(dim=-1) <= of_row * size.norm(dim=-1)
    if not (entries.all() and rows.all()):  # a NaN is an error too
        raise UnsupportedHead(
            f"the logits of the model differ by up to {error.max().item():.3g} from cap(scale * "
            f"(hidden @ weight.T + bias)) with scale {head.logit_scale:g} and softcap "
            f"{head.softcap} of its config"
        )


def _few_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, model_inputs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same few real tokens twice, `[2, n]`, and the other inputs of theirs."""
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        real = attention_mask.bool()
    if not real.any():
        raise UnsupportedHead("the batch has no token to test the output head on")

    def few(values: Tensor) -> Tensor:
        return torch.stack([values[real][:_CHECK_TOKENS]] * 2)

    shape = input_ids.shape
    more = {
        n: few(v) for n, v in model_inputs.items() if isinstance(v, Tensor) and v.shape[:2] == shape
    }
    return few(input_ids), more


def refuse_not_linear(module: nn.Module) -> None:
    """Raise UnsupportedHead unless the output embedding is an `nn.Linear` and nothing more; that
    FSDP shards it is no matter."""
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
    """Return whether the module has such hooks, but for FSDP's."""
    origins = [getattr(hook, "__module__", None) or "" for hook in getattr(module, hooks).values()]
    return any(not origin.startswith("torch.distributed.fsdp") for origin in origins)


def _why_not_whole(layer: nn.Linear, views: bool) -> str | None:
    """Return why the parameters of a linear layer are not whole and plain, else None."""
    shapes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    kinds = (nn.Parameter, Tensor) if views else (nn.Parameter,)
    for name, shape in shapes.items():
        value = getattr(layer, name)
        if name == "bias" and value is None:
            continue
        if type(value) not in kinds:
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
