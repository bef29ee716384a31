"""Where Triton can run, and which backend serves a call."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
BACKENDS = get_args(Backend)
# Devices whose Triton driver comes with the usual wheels; anything else takes the PyTorch backend.
_TRITON_DEVICES = ("cuda", "xpu")
# asked once: `torch.compile` of torch 2.11 refuses to trace `find_spec`
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_sources: list[Tensor] = []  # of copies in CUDA graphs, which read them again


def triton_runs_on(device: torch.device | str) -> bool:
    """Whether Triton can serve tensors on `device`; the one place that decides it.

    True for an accelerator with a driver, and for the CPU under `TRITON_INTERPRET=1` (the
    interpreter) or `PALU_TRITON_CPU=1` (something stands in for the GPU and runs the compiled
    kernels on CPU tensors).
    """
    if not _TRITON_INSTALLED:
        return False
    kind = torch.device(device).type
    if kind == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("PALU_TRITON_CPU") == "1"
    return kind in _TRITON_DEVICES


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """`"triton"` or `"torch"` for a call with tensors of `dtype` on `device`.

    `auto` first takes the environment variable `PALU_BACKEND`; without it, Triton for
    accelerator tensors and PyTorch for CPU tensors and float64. A `backend` that was asked for
    and cannot serve raises `ValueError`.
    """
    source = "backend"
    if backend == "auto":
        source, backend = "PALU_BACKEND", os.environ.get("PALU_BACKEND", "auto") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        fit = device.type != "cpu" and dtype != torch.float64 and triton_runs_on(device)
        return "triton" if fit else "torch"
    if backend == "triton":
        if dtype == torch.float64:
            raise ValueError(
                f"{source} is 'triton' and the logits are float64, which only the PyTorch path "
                "serves; use backend='auto' or 'torch'"
            )
        if not triton_runs_on(device):
            raise ValueError(
                f"{source} is 'triton', which cannot run on {device} here: it needs an accelerator "
                "with a Triton driver (or TRITON_INTERPRET=1 for CPU tensors); "
                "use backend='auto' or 'torch'"
            )
    return backend


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a loss is computed and returned in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_values(device: torch.device) -> bool:
    """Whether values inside tensors are checked: always on the CPU, elsewhere only under
    `PALU_CHECK=1` (it synchronises). While `torch.compile` traces, and on
    meta, there are no values."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    return device.type == "cpu" or os.environ.get("PALU_CHECK") == "1"


def moved(t: Tensor, device: torch.device) -> Tensor:
    """Copy what is on the host to `device` without a wait for the device: a copy from memory that
    is not pinned may wait for all that the device has to do."""
    if t.device.type == "cpu" and device.type == "cuda":
        t = t.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _sources.append(t)
    return t.to(device, non_blocking=True)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device, not the tensors'."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)
