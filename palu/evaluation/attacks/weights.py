"""Changes of a model's weights that end with the block they are made in.

A parameter is given other numbers to hold; afterwards it holds its own tensor again, which nothing
has written to. So the model that was given is the same to the bit, whatever happens.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from palu.data.collator import Collator
from palu.data.labels import LabeledExample
from palu.data.roles import IGNORE
from palu.models.layers import decoder_layers
from palu.models.wrappers import unwrap

GROUP = 128
"""Weights of a row that share a scale."""
LIBRARIES = ("bitsandbytes", "torchao")
FP4 = tuple(value / 12 for value in (0, 0.0625, 2, 3, 4, 6, 8, 12))
"""Magnitudes of bitsandbytes' FP4: two bits of exponent, one of mantissa, over the largest."""
FP4_BLOCK = 64
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
def _rounding(model: nn.Module, how: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
    """Let the weights of linear layers hold what `how` makes of them, adapters folded in first;
    embeddings and output head stay."""
    names = matrices(model, embeddings=False)
    with (
        replaced(model, lambda name, own: own.clone() if name in names else None),
        merged(model),
    ):
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data = how(parameter.data)
        yield model


def quantized(model: nn.Module, bits: int) -> AbstractContextManager[nn.Module]:
    """Round the weights of linear layers to the nearest of `2^bits - 1` levels, evenly spaced
    around 0 up to the largest magnitude in each group of 128."""
    return _rounding(model, lambda weight: rounded(weight, bits))


def quantized_fp4(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Round the weights of linear layers as transformers' `load_in_4bit` does, by `fp4`."""
    return _rounding(model, fp4)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight `[..., D]` rounded to nearest in groups of `GROUP` along D, in its dtype."""
    size, top = weight.shape[-1], 2 ** (bits - 1) - 1
    padded = nn.functional.pad(weight.float(), (0, -size % GROUP))
    groups = padded.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
    levels = (groups / scale).round().clamp(-top, top)
    return (levels * scale).flatten(-2)[..., :size].to(weight.dtype)


def fp4(weight: Tensor) -> Tensor:
    """Return a weight rounded as by bitsandbytes with its default type: blocks of 64 entries in
    their order in memory, each scaled by its largest magnitude, to the nearest of FP4's values."""
    flat = weight.float().flatten()
    blocks = nn.functional.pad(flat, (0, -flat.numel() % FP4_BLOCK)).unflatten(0, (-1, FP4_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    values = torch.tensor(FP4, device=weight.device)
    scaled = blocks / scale
    nearest = values[torch.bucketize(scaled.abs(), (values[1:] + values[:-1]) / 2)]
    back = (nearest.copysign(scaled) * scale).flatten()[: flat.numel()]
    return back.view_as(weight).to(weight.dtype)


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
    batch: int = BATCH,
    accumulate: int = 1,
    decay: bool = False,
    report: Report | None = None,
) -> Iterator[nn.Module]:
    """Train all weights a few steps on answers, in float32 (see `_train`)."""

    def own_copy(name: str, own: Tensor) -> Tensor | None:
        return own.float().clone() if own.is_floating_point() else None

    with replaced(model, own_copy):
        trained = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
        how = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "report": report}
        how |= {"batch": batch, "accumulate": accumulate, "decay": decay}
        _train(model, trained, tokenizer, rows, **how)
        yield model


def _train(
    model: nn.Module,
    trained: list[Parameter],
    tokenizer: Any,
    rows: Sequence[LabeledExample],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch: int,
    accumulate: int,
    decay: bool,
    report: Report | None,
) -> None:
    """Train parameters on answers with AdamW (the next-token loss of a usual fine-tuning run,
    clipped at 1, without dropout and weight decay).

    Args:
        batch, accumulate: examples in a micro-batch, whose loss is a mean, and micro-batches in a
            step.
        decay: the learning rate falls in a line to 0, as the Trainer's does by default.
    """
    collate, device = Collator(tokenizer), next(model.parameters()).device
    shuffle, order = random.Random(seed), []
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps if decay else 1)
        for _ in range(accumulate):
            while len(order) < min(batch, len(rows)):
                order += shuffle.sample(range(len(rows)), len(rows))
            chosen, order = order[:batch], order[batch:]
            inputs = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
            labels = inputs.pop("labels")
            targets = inputs["input_ids"].masked_fill(labels == IGNORE, -100)
            inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            with torch.enable_grad():
                loss = model(**inputs, labels=targets, use_cache=False).loss
                (loss / accumulate).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if report is not None:
            report(step + 1, steps)


@contextmanager
def probed(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[LabeledExample],
    *,
    share: float,
    **training: Any,
) -> Iterator[nn.Module]:
    """Give a copy of the model that ends after `share` of its decoder layers (rounded up), with an
    output head of its own that was trained on answers while all else was frozen, from the model's
    on (open-unlearning's `ProbedLlamaForCausalLM`, for any decoder). `training`: as of `_train`."""
    other = _plain_copy(model).float().requires_grad_(False)
    inner, layers = unwrap(other), decoder_layers(other)
    config = inner.config.get_text_config(decoder=True)
    config.num_hidden_layers = math.ceil(share * len(layers))
    del layers[config.num_hidden_layers :]
    head = copy.deepcopy(inner.get_output_embeddings())  # which the input embedding may share
    head.weight = Parameter(head.weight.data.clone())
    inner.set_output_embeddings(head)
    _train(other, [head.weight], tokenizer, rows, **training)
    yield other.eval()


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy with adapters merged."""
    other = copy.deepcopy(model)
    return other.merge_and_unload() if hasattr(other, "merge_and_unload") else other


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
    other = _plain_copy(model)
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
