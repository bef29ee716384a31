"""Changes of a model's weights that end with the block they are made in.

A parameter is given other numbers to hold; afterwards it holds its own tensor again, which nothing
has written to. So the model that was given is the same to the bit, whatever happens.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from palu.data.collator import Collator
from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE
from palu.models.wrappers import unwrap

GROUP = 128
"""Weights of a row that share a scale."""
LIBRARIES = ("bitsandbytes", "torchao")
BATCH = 4
"""Examples in a step of relearning."""
Report = Callable[[int, int], None]


@contextmanager
def replaced(model: nn.Module, new: Callable[[str, Tensor], Tensor | None]) -> Iterator[nn.Module]:
    """Let parameters hold what `new(name, own)` returns; None leaves one as it is."""
    kept = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            tensor = new(name, parameter.data)
            if tensor is not None:
                parameter.grad = None
                parameter.data = tensor
        yield model
    finally:
        for parameter, own, grad, requires_grad in kept:
            parameter.grad = None
            parameter.data = own
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Fold adapters into the weights that they change, as who hands the model on would; call it
    inside `replaced`, since unfolding them again rounds."""
    merged_before = any(getattr(module, "merged", False) is True for module in model.modules())
    folds = hasattr(model, "merge_adapter") and not merged_before
    try:
        if folds:
            model.merge_adapter()
        yield model
    finally:
        if folds:
            model.unmerge_adapter()


def matrices(model: nn.Module, *, embeddings: bool) -> set[str]:
    """Return the names of a model's weight matrices, those of adapters left out.

    Args:
        embeddings: whether those of the input and output embedding are among them.
    """
    head = unwrap(model).get_output_embeddings()
    left_out = (nn.Conv1d, nn.Conv2d, nn.Conv3d) + ((nn.Embedding,) if not embeddings else ())
    names, seen = set(), set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{prefix}.{name}" if prefix else name
            if parameter in seen:
                continue
            seen.add(parameter)
            skipped = isinstance(module, left_out) or (module is head and not embeddings)
            fits = parameter.ndim in (2, 3) and parameter.is_floating_point()
            if fits and not skipped and "lora_" not in whole:
                names.add(whole)
    return names


@contextmanager
def quantized(model: nn.Module, bits: int) -> Iterator[nn.Module]:
    """Round the weights of linear layers to the nearest of `2^bits - 1` levels, evenly spaced
    around 0 up to the largest magnitude in each group of 128; embeddings and output head stay."""
    names = matrices(model, embeddings=False)
    with (
        replaced(model, lambda name, own: own.clone() if name in names else None),
        merged(model),
    ):
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data = rounded(parameter.data, bits)
        yield model


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight `[..., D]` rounded to nearest in groups of `GROUP` along D, in its dtype."""
    size, top = weight.shape[-1], 2 ** (bits - 1) - 1
    padded = nn.functional.pad(weight.float(), (0, -size % GROUP))
    groups = padded.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
    levels = (groups / scale).round().clamp(-top, top)
    return (levels * scale).flatten(-2)[..., :size].to(weight.dtype)


@contextmanager
def noisy(model: nn.Module, strength: float, seed: int) -> Iterator[nn.Module]:
    """Add Gaussian noise to every weight matrix, `strength` standard deviations of its own."""
    names = matrices(model, embeddings=True)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def add(name: str, own: Tensor) -> Tensor | None:
        if name not in names:
            return None
        noise = torch.randn(own.shape, generator=generator, device=own.device)
        return (own.float() + strength * own.float().std() * noise).to(own.dtype)

    with replaced(model, add):
        yield model


@contextmanager
def relearned(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[LabeledExample],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    report: Report | None = None,
) -> Iterator[nn.Module]:
    """Train all weights a few steps on answers, in float32, with AdamW (the next-token loss of a
    usual fine-tuning run, clipped at 1, without dropout and decay)."""

    def own_copy(name: str, own: Tensor) -> Tensor | None:
        return own.float().clone() if own.is_floating_point() else None

    collate, device = Collator(tokenizer), next(model.parameters()).device
    shuffle, order = random.Random(seed), []
    with replaced(model, own_copy):
        trained = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        for step in range(steps):
            while len(order) < min(BATCH, len(rows)):
                order += shuffle.sample(range(len(rows)), len(rows))
            chosen, order = order[:BATCH], order[BATCH:]
            batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            targets = batch["input_ids"].masked_fill(batch["labels"] == IGNORE, -100)
            with torch.enable_grad():
                model(**inputs, labels=targets, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if report is not None:
                report(step + 1, steps)
        yield model


def missing_library(name: str) -> str | None:
    """Return why a library of quantization cannot be used here, else None."""
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


@contextmanager
def quantized_by(model: nn.Module, library: str, bits: int) -> Iterator[nn.Module]:
    """Give a copy of the model with the linear layers of `bitsandbytes` (8 bits LLM.int8(), 4 bits
    NF4) or `torchao` (weights only, in groups of 128). Adapters are merged first; the output head
    stays.

    Raises:
        RuntimeError: the library leaves layers as they are.
    """
    other = copy.deepcopy(model)
    if hasattr(other, "merge_and_unload"):
        other = other.merge_and_unload()
    head = unwrap(other).get_output_embeddings()
    linear = [
        (parent, name)
        for parent in list(other.modules())
        for name, module in parent.named_children()
        if type(module) is nn.Linear and module is not head
    ]
    with _without_notes(library):
        (_by_torchao if library == "torchao" else _by_bitsandbytes)(other, linear, bits)
        plain = [name for parent, name in linear if type(getattr(parent, name).weight) is Parameter]
        if plain:
            raise RuntimeError(
                f"{library} leaves {len(plain)} of {len(linear)} linear layers as they are"
            )
        yield other.eval()


@contextmanager
def _without_notes(library: str) -> Iterator[None]:
    """Silence what a library says at every layer."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


_Layers = list[tuple[nn.Module, str]]


def _by_torchao(model: nn.Module, linear: _Layers, bits: int) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    kind = torch.int8 if bits == 8 else torch.int4
    chosen = {getattr(parent, name) for parent, name in linear}
    config = IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(GROUP))
    quantize_(model, config, lambda module, name: module in chosen)


def _by_bitsandbytes(model: nn.Module, linear: _Layers, bits: int) -> None:
    import bitsandbytes as bnb

    for parent, name in linear:
        old = getattr(parent, name)
        options: dict[str, Any] = {"bias": old.bias is not None}
        weight = old.weight.data.cpu()  # it is quantized on its way back to the device
        if bits == 8:
            new = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, has_fp16_weights=False, **options
            )
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            options |= {"quant_type": "nf4", "compute_dtype": old.weight.dtype}
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, **options)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        new.bias = old.bias
        setattr(parent, name, new.to(old.weight.device))
