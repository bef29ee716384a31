"""What the public operators accept: every message names the argument, what it was and what it
must be."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Objective = Literal["flatten", "entropy"]
Center = Literal["global_mean", "local_mean"]
Direction = Literal["reverse", "forward"]
Reduction = Literal["mean", "sum", "none"]
SLICES = (
    " (logits of a sharded vocabulary must be DTensors: ColwiseParallel(use_local_output=False))"
)
OBJECTIVES, CENTERS = get_args(Objective), get_args(Center)
DIRECTIONS, REDUCTIONS = get_args(Direction), get_args(Reduction)


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}); it must be an int of at least 1"
        )
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def dense(name: str, value: object) -> None:
    """A tensor whose entries lie in memory by strides: not sparse, nested or packed otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    masked = isinstance(value, torch.masked.MaskedTensor)
    if value.layout != torch.strided or value.is_nested or masked:
        kind = "nested" if value.is_nested else f"of layout {value.layout}"
        kind = "a MaskedTensor" if masked else kind
        raise TypeError(f"{name} is {kind}; it must be a dense tensor (torch.strided)")


def floats(name: str, value: object) -> None:
    dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {value.dtype}; it must be float32, bfloat16, float16 or float64"
        )


def scores(name: str, value: object) -> None:
    """Floating-point `[N, V]` or `[B, T, V]` with at least one column."""
    floats(name, value)
    if value.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [N, V] or [B, T, V]")
    if value.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; its last dimension, V, must be at least 1"
        )


def matrix(name: str, value: object, shape: str) -> None:
    """Floating-point, two dimensions, neither of them empty; `shape` is how the message calls
    them."""
    floats(name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must be {shape} with neither of them 0"
        )


def slice_of_head(weight: object, start: object) -> None:
    """Rows `[start, start + len(weight))` of a head, maybe none."""
    floats("weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [rows, D]")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(
            f"vocab_start is {start!r}; with a process_group it must be the index in the whole "
            "vocabulary of this rank's first row"
        )


def reference(name: str, value: object, logits: Tensor) -> None:
    """A frozen second row for every row of `logits`: same shape and device, no gradient."""
    scores(name, value)
    if value.shape != logits.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must have the shape of logits, "
            f"{list(logits.shape)}{SLICES if value.shape[-1] > logits.shape[-1] else ''}"
        )
    same_device(name, value, logits)
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad; it must be frozen (no gradient reaches it): compute it under "
            "torch.no_grad() or pass .detach()"
        )


def same_device(name: str, value: Tensor, rows: Tensor, rows_name: str = "logits") -> None:
    if value.device != rows.device:
        raise ValueError(
            f"{name} is on {value.device}; it must be on the device of {rows_name}, {rows.device}"
        )


def integers(
    name: str, value: object, shape: list[int], rows: Tensor, rows_name: str = "logits"
) -> None:
    dense(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {value.dtype}; it must be int64 or int32")
    if list(value.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must be {shape} beside {rows_name} "
            f"{list(rows.shape)}"
        )
    same_device(name, value, rows, rows_name)


def indices(
    value: object,
    top_k: int,
    rows: Tensor,
    columns: int,
    rows_name: str = "logits",
    name: str = "indices",
) -> None:
    """S as integers `[..., min(top_k, columns)]` beside rows `[..., anything]`."""
    dense(name, value)
    if value.dim() == rows.dim():
        given, expected = value.shape[-1], min(top_k, columns)
        if given != expected:
            raise ValueError(
                f"top_k is {top_k} and {name} holds {given} a row; of V = {columns} it must hold "
                f"{expected}"
            )
    shape = [*rows.shape[:-1], min(top_k, columns)]
    integers(name, value, shape, rows, rows_name)


def center(value: object) -> tuple[str, float]:
    """-> (kind, number), kind one of global_mean, local_mean, number."""
    if isinstance(value, str):
        if value not in CENTERS:
            raise ValueError(
                f"center is {value!r}; it must be 'global_mean', 'local_mean' or a number"
            )
        return value, 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"center is {value!r} ({type(value).__name__}); it must be 'global_mean', "
            "'local_mean' or a number"
        )
    if not -math.inf < value < math.inf:  # math.isfinite breaks a graph whose numbers are symbols
        raise ValueError(f"center is {value}; it must be a finite number")
    return "number", float(value)


def number(name: str, value: object, *, above_zero: bool | None = None) -> None:
    """A finite number; with `above_zero` above 0, or if it is False of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
    must, inside = "finite", True
    if above_zero is not None:
        must = f"a finite number {'above 0' if above_zero else 'of at least 0'}"
        inside = value > 0 if above_zero else value >= 0
    if not (math.isfinite(value) and inside):
        raise ValueError(f"{name} is {value}; it must be {must}")


def an_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be an int")


def no_transforms(name: str, **inputs: Tensor | None) -> None:
    """A fused loss has a backward pass and nothing else: forward-mode tangents would be dropped
    without a word, and torch.func's tensors have no entries that a kernel could read."""
    if torch.compiler.is_compiling():
        return
    for argument, t in inputs.items():
        if not isinstance(t, Tensor):
            continue
        if torch._C._functorch.is_batchedtensor(t):
            raise RuntimeError(
                f"palu_kernels: {name} does not support vmap ({argument} is batched by it); pass "
                "the batch as [B, T, V] (or [B, T, D])"
            )
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise RuntimeError(
                f"palu_kernels: {name} does not support torch.func's transforms, forward-mode "
                f"differentiation among them ({argument} is in one: grad, vjp, jvp, jacrev, ...); "
                "use torch.autograd.grad or backward()"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"palu_kernels: {name} does not support forward-mode differentiation ({argument} "
                "has a tangent)"
            )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"palu_kernels: {name} does not support torch.func's transforms and is called in one; "
            "use torch.autograd.grad or backward()"
        )


def label_values(labels: Tensor, ignore_index: int, columns: int) -> None:
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= columns))
    if bool(bad.any()):
        worst = labels[bad].flatten()[0]
        raise ValueError(
            f"labels holds {int(worst)}; a label must be {ignore_index} (ignore_index) "
            f"or in 0..{columns - 1}{SLICES if worst >= columns else ''}"
        )


def index_values(values: Tensor, columns: int) -> None:
    """Indices in range and unique along each row of `[N, k]`."""
    if values.numel() == 0:
        return
    bad = (values < 0) | (values >= columns)
    if bool(bad.any()):
        worst = values[bad].flatten()[0]
        raise ValueError(f"indices holds {int(worst)}; an index must be in 0..{columns - 1}")
    ordered = values.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(
            "indices holds the same index twice in a row; they must be unique along a row"
        )
