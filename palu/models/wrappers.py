"""What a Hugging Face model may be wrapped in (DDP, FSDP, `torch.compile`, PEFT), and how to look
inside and switch modes without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# By name: importing them takes a second.
FSDP1, FSDP2 = "FullyShardedDataParallel", "FSDPModule"
# Where the hooks of what shards a module are defined: FSDP and `parallelize_module`.
SHARDING = ("torch.distributed.fsdp", "torch.distributed.tensor")

_OWN_LOGITS = "the logits of the model itself have to be used"
_IN_HEAD = (
    "use palu.loss_in_head(model, loss, ...) to train it, and palu.whole_head(model) for the head "
    "of a frozen one"
)


class UnsupportedHead(ValueError):
    """The logits of a model cannot be computed from its hidden states and output embedding."""

    def __init__(self, reason: str, instead: str = _OWN_LOGITS) -> None:
        super().__init__(f"{reason}: {instead}")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside DDP, `torch.compile` and PEFT wrappers: to look at,
    never to call."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def peft_model(model: nn.Module) -> nn.Module:
    """Return the `PeftModel` inside the trainer's wrappers."""
    return next(module for module in model.modules() if hasattr(module, "disable_adapter"))


@contextmanager
def eval_mode(
    model: nn.Module, *, autocast: torch.dtype | bool | None = None, keep_rng: bool = True
) -> Iterator[None]:
    """Put every module into eval mode, without gradients; restore each module's own mode after.

    Args:
        autocast: a dtype to run under; False for none; None leaves the caller's as it is.
        keep_rng: whether the random state is restored too.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    kind = device.type if devices else "cuda"
    cast: Any = nullcontext()
    if autocast is not None:
        # No autocast cache: casts made without gradients must not meet a training step outside.
        dtype = autocast or None
        cast = torch.autocast(device.type, dtype, enabled=bool(dtype), cache_enabled=False)
    with torch.random.fork_rng(devices, enabled=keep_rng, device_type=kind), torch.no_grad(), cast:
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch PEFT's adapters off, in `eval_mode`; restore what trains (PEFT turns the gradients of
    all adapters on)."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with eval_mode(model, keep_rng=False), peft_model(model).disable_adapter():
            yield
    finally:
        for parameter, train in trains:
            parameter.requires_grad_(train)


def eos_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every id that ends an answer, ascending: the tokenizer's, and those of the model's
    generation settings and config.

    Args:
        model: wrapped or not.
        tokenizer: or None, where there is none.
    """
    inner = unwrap(model)
    ids: set[int] = set()
    for holder in (getattr(inner, "generation_config", None), getattr(inner, "config", None)):
        ids |= _eos_of(holder)
    return sorted(ids | _eos_of(tokenizer))


def _eos_of(holder: Any) -> set[int]:
    ids = getattr(holder, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def text_only_inputs(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Return the `token_type_ids` that Gemma 3 asks for in training: no token is an image's."""
    if unwrap(model).training and wants_token_types(model):
        return {"token_type_ids": torch.zeros_like(input_ids)}
    return {}


def wants_token_types(model: nn.Module) -> bool:
    """Return whether the model asks for `token_type_ids` in training."""
    return getattr(getattr(unwrap(model), "config", None), "model_type", None) == "gemma3"


def incompatible_wrapper(model: nn.Module) -> str | None:
    """Return why a wrapper (FSDP, DDP with `static_graph`) would skip gradient reduction when the
    loss uses hidden states instead of the model's outputs, else None."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.static_graph:
            return "the model is wrapped in DistributedDataParallel with static_graph=True"
    return "the model is sharded by FSDP" if is_sharded(model) else None


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP shards the model, or a part of it: all processes have to call it, equally
    often."""
    # A model has thousands of modules, of few kinds.
    return any(is_a(m, FSDP1, FSDP2) for m in {type(m): m for m in model.modules()}.values())


def is_tensor_parallel(module: nn.Module) -> bool:
    """Return whether `parallelize_module` has shared out the module's parameters."""
    return any(origin.startswith(SHARDING[1]) for origin in hook_origins(module, "_forward_hooks"))


def hook_origins(module: nn.Module, hooks: str) -> list[str]:
    """Return where each hook is defined; of a method, where its object's class is."""
    made = getattr(module, hooks).values()
    owners = [type(hook.__self__) if hasattr(hook, "__self__") else hook for hook in made]
    return [getattr(owner, "__module__", None) or "" for owner in owners]


def refuse_wrapper(model: nn.Module) -> None:
    """Raise UnsupportedHead for a model of which `incompatible_wrapper` has something to say."""
    reason = incompatible_wrapper(model)
    if reason is not None:
        raise UnsupportedHead(reason, _IN_HEAD)


def is_a(module: nn.Module, *names: str) -> bool:
    """Return whether a class of the module has one of these names."""
    return any(base.__name__ in names for base in type(module).__mro__)


def is_compiled(model: nn.Module, inner: nn.Module) -> bool:
    """Return whether `inner` runs inside code of `torch.compile`: of `module.compile()`, or of a
    forward that is a compiled one (`torch.compile(module)` too has such)."""
    return any(
        inner is part
        for module in model.modules()
        if module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for part in module.modules()
    )


def output_embedding(model: nn.Module) -> nn.Module:
    """Return the module that makes logits, inside FSDP's wrapper where it has one of its own.
    Raises UnsupportedHead where the model names none."""
    inner = unwrap(model)
    getter = getattr(inner, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    while isinstance(module, nn.Module) and is_a(module, FSDP1):
        module = module.module
    if not isinstance(module, nn.Module):
        raise UnsupportedHead(f"{type(inner).__name__} names no output embedding")
    return module


def refuse_compiled(model: nn.Module, module: nn.Module) -> None:
    """Raise UnsupportedHead if `module` is in compiled code: what was compiled before does not run
    a hook, and what is compiled now may keep it."""
    if is_compiled(model, module):
        raise UnsupportedHead("the model is compiled, and compiled code does not see a hook")
