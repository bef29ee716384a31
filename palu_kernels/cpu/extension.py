"""The loops of `rows.c` on tensors, once they are compiled and agree with the definition."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from palu_kernels.cpu import build, verify


class Args(ctypes.Structure):
    """`Args` of `rows.c`."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("logits", "ref_logits", "indices", "labels")]
        + [(name, ctypes.c_void_p) for name in ("grad", "weights", "losses", "state")]
        + [(name, ctypes.c_void_p) for name in ("chosen", "values", "bad")]
        + [(name, ctypes.c_int64) for name in ("rows", "columns", "k")]
        + [(name, ctypes.c_int64) for name in ("stride", "ref_stride", "grad_stride")]
        + [("ignore_index", ctypes.c_int64)]
        + [(name, ctypes.c_int32) for name in ("type", "wide_indices", "objective")]
        + [(name, ctypes.c_int32) for name in ("forward_kl", "select_by_current")]
        + [(name, ctypes.c_float) for name in ("softcap", "ref_softcap", "center")]
    )


OBJECTIVES = {"global_mean": 0, "local_mean": 1, "number": 2, "entropy": 3}


@dataclass(frozen=True)
class Loops:
    """The compiled library, and how its rows get threads."""

    library: ctypes.CDLL
    parallel: int | None  # the address of GOMP_parallel; None: one thread

    KINDS: ClassVar = {"cross_entropy": 0, "kl": 1, "topk": 2, "local_entropy": 3, "indices": 4}
    TYPES: ClassVar = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    STRIDES: ClassVar = {"logits": "stride", "ref_logits": "ref_stride", "grad": "grad_stride"}

    DTYPES: ClassVar = {
        "weights": torch.float32,
        "labels": torch.int64,
    }

    def __call__(self, kind: str, **values: Tensor | float | None) -> None:
        """Compute rows; `values` are fields of `Args`, None for what is absent.

        Weights and integers are made what the loops read; all else must be, and lie row by row.
        """
        kept, args = [], Args()
        if "logits" in values:
            args.rows, args.columns = values["logits"].shape
            args.type = self.TYPES[values["logits"].dtype]
        for name, value in values.items():
            if isinstance(value, Tensor):
                if name in self.STRIDES:
                    setattr(args, self.STRIDES[name], value.stride(0))
                elif name in ("weights", "labels", "indices"):
                    value = value.to(self.DTYPES.get(name, value.dtype)).contiguous()
                elif not value.is_contiguous():  # what is written to a copy would be lost
                    raise ValueError(f"{name} has strides {value.stride()}; it must be contiguous")
                if name == "indices":
                    args.wide_indices = int(value.dtype == torch.int64)
                kept.append(value)
                value = value.data_ptr()
            if value is not None:
                setattr(args, name, value)
        threads = torch.get_num_threads()
        parallel = ctypes.c_void_p(self.parallel)
        if self.library.palu_rows(ctypes.byref(args), self.KINDS[kind], parallel, threads):
            raise MemoryError(f"palu_kernels: no memory for rows of {args.columns} entries")


def loops_for(*tensors: Tensor | None) -> Loops | None:
    """Return the loops if they take such rows: of one dtype they know, entries side by side."""
    dtype, columns = tensors[0].dtype, tensors[0].shape[-1]
    # a float32 holds the number of live entries
    if dtype not in Loops.TYPES or not 0 < columns < 2**24 or not in_memory(*tensors):
        return None
    for t in tensors:
        if t is not None and (t.dtype != dtype or not (t.shape[-1] == 1 or t.stride(-1) == 1)):
            return None
    return _opened()[0]


def loops_for_indices(indices: Tensor) -> Loops | None:
    """Return the loops if they can check integers."""
    return _opened()[0] if in_memory(indices) else None


def in_memory(*tensors: Tensor | None) -> bool:
    """Whether tensors' entries can be read at their addresses: what is traced has none."""
    for t in tensors:
        plain = t is None or type(t) in (Tensor, torch.nn.Parameter)
        if not plain or (t is not None and t.device.type != "cpu"):
            return False
    return True


def served_by() -> str:
    """Return, in words, what computes losses on the CPU; the first call may compile it."""
    return _opened()[1]


_lock = threading.RLock()


def _opened() -> tuple[Loops | None, str]:
    with _lock:  # or two threads would compile
        return _open()


@lru_cache  # decided once: a backward reads what the same way's forward left
def _open() -> tuple[Loops | None, str]:
    """Return the loops, or None, and what to tell of it."""
    if os.environ.get("PALU_CPU_EXTENSION") == "0":
        return None, "plain PyTorch: PALU_CPU_EXTENSION is 0"
    try:
        library, compiler = build.library()
    except (build.BuildError, OSError) as error:
        return None, f"plain PyTorch: no compiled loops, {error}"
    parallel, threads = _openmp()
    loops = Loops(library, parallel)
    wrong = verify.differences(loops)
    if wrong:
        warnings.warn(
            f"palu_kernels: the compiled loops ({compiler}) differ from the definition in "
            f"{', '.join(wrong)}; plain PyTorch serves instead",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, f"plain PyTorch: the compiled loops ({compiler}) were wrong"
    return loops, f"compiled loops ({compiler}), {threads}"


def _openmp() -> tuple[int | None, str]:
    """Return the address of GOMP_parallel in the OpenMP runtime that PyTorch calls, and what to
    tell of it. Of a second runtime the threads would spin beside those of the first."""
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    # PyTorch's calls too find what was loaded for all (LD_PRELOAD) before what it came with
    for path in (None, str(library)):
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            address = ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        return address, "PyTorch's threads"
    return None, "one thread"
