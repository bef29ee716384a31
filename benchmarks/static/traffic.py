"""How many bytes does every operator move, in transfers of a row, and is that within its budget?

Bytes moved are the speed of these kernels, and they can be counted without a GPU: under Triton's
interpreter every load and store is one call, with its mask. `Traffic` adds up the lanes that are
live, a kernel launch at a time. Bytes that PyTorch moves beside the kernels are not counted.

    python -m benchmarks.static.traffic [--columns 128256] [--rows 2] [--dtype bfloat16]

One line an operator: forward plus backward in transfers of a row (V entries, read or written), and
the budget. The exit status is 1 if an operator is over it. What a program reads and writes beside
its row counts as nothing until it makes a tenth of one.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from palu_kernels import functional as operators

TOP_K = 50
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Launch:
    """One kernel launch, and the bytes that its live lanes moved."""

    kernel: str
    grid: tuple[int, ...]
    loaded: int = 0
    stored: int = 0
    atomic: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored + self.atomic

    @property
    def programs(self) -> int:
        return int(np.prod(self.grid))


class Traffic:
    """Counts what kernels move inside a `with` block: one entry of `launches` a launch.

    Works where kernels run under `TRITON_INTERPRET=1`; raises RuntimeError elsewhere.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._running: list[Launch] = []
        self._saved: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Traffic:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("traffic is counted under TRITON_INTERPRET=1, which is not set")
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        # unmasked loads and stores go through the masked ones
        self._count_in(builder, "create_masked_load", "loaded", 1)
        self._count_in(builder, "create_masked_store", "stored", 2)
        self._count_in(builder, "create_atomic_rmw", "atomic", 3)
        self._count_in(builder, "create_atomic_cas", "atomic", None)
        call = executor.__call__

        def counted_call(grid_executor: Any, *args: Any, **kwargs: Any) -> Any:
            fn, grid = grid_executor.fn, grid_executor.grid
            module = fn.__globals__["__name__"].rpartition(".")[2]
            launch = Launch(f"{module}.{fn.__name__}", () if callable(grid) else tuple(grid))
            self.launches.append(launch)
            self._running.append(launch)
            try:
                return call(grid_executor, *args, **kwargs)
            finally:
                self._running.pop()

        self._replace(executor, "__call__", counted_call)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._saved):
            setattr(owner, name, original)
        self._saved.clear()

    def total(self, *kernels: str) -> int:
        """Bytes of the launches of `kernels`, of all launches without any."""
        return sum(one.bytes for one in self.launches if not kernels or one.kernel in kernels)

    def _replace(self, owner: type, name: str, replacement: Any) -> None:
        self._saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)

    def _count_in(self, builder: type, name: str, kind: str, mask_at: int | None) -> None:
        """`mask_at`: where the mask stands among the arguments, after the builder itself."""
        original = getattr(builder, name)

        def counted(this: Any, *args: Any, **kwargs: Any) -> Any:
            if self._running:
                # the pointers are the first argument; an atomic's operation comes before them
                pointers = args[1] if name == "create_atomic_rmw" else args[0]
                mask = None if mask_at is None else args[mask_at]
                size = pointers.get_element_ty().primitive_bitwidth // 8
                shape = np.shape(pointers.data)
                live = np.ones(shape, bool) if mask is None else np.broadcast_to(mask.data, shape)
                launch = self._running[-1]
                setattr(launch, kind, getattr(launch, kind) + int(live.sum()) * size)
            return original(this, *args, **kwargs)

        self._replace(builder, name, counted)


@dataclass
class Measurement:
    """Transfers of a row, forward plus backward."""

    operator: str
    transfers: float
    budget: float | None  # None: the design sets none

    @property
    def over(self) -> bool:
        return self.budget is not None and round(self.transfers, 1) > self.budget


def count(call: Callable[[], Tensor]) -> Traffic:
    """The traffic of `call` and, where its result has a gradient, of its backward."""
    with warnings.catch_warnings(), Traffic() as traffic:
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about masked entries (-inf)
        out = call()
        if out.requires_grad:
            out.backward()
    return traffic


def measure(columns: int, rows: int, dtype: str) -> list[Measurement]:
    """Every operator on random rows, with each way of choosing S."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    logits = torch.randn(rows, columns).to(kind).requires_grad_()
    reference = torch.randn(rows, columns).to(kind)
    indices = operators.topk_indices(reference, TOP_K, backend="torch")
    labels = torch.randint(columns, (rows,))
    row_bytes = rows * columns * logits.element_size()
    found: list[Measurement] = []

    def add(name: str, budget: float, call: Callable[[], Tensor]) -> None:
        found.append(Measurement(name, count(call).total() / row_bytes, budget))

    add(
        "topk_indices",
        1.2,
        lambda: operators.topk_indices(reference, TOP_K, backend="triton"),
    )
    choosers = {"reference": {"ref_logits": reference}, "indices": {"indices": indices}}
    for objective in ("flatten", "entropy"):
        for name, chooser in (choosers | {"current": {}}).items():
            chooser = {"top_k": TOP_K, "objective": objective, "backend": "triton", **chooser}
            add(
                f"{objective}, S by {name}",
                2.1 if name == "indices" else 3.2,
                lambda chooser=chooser: operators.local_entropy_loss(logits, **chooser),
            )
    for direction in ("reverse", "forward"):
        kl = {"direction": direction, "backend": "triton"}
        add(f"{direction} kl", 5, lambda kl=kl: operators.kl_loss(logits, reference, **kl))
    add(
        "cross-entropy",
        3,
        lambda: operators.cross_entropy_loss(logits, labels, backend="triton"),
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=128256, help="entries of a row")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    given = parser.parse_args(arguments)
    if given.rows < 1 or given.columns < TOP_K:
        parser.error(f"--rows must be at least 1 and --columns at least {TOP_K}")
    found = measure(given.columns, given.rows, given.dtype)
    print(f"{given.rows} rows of {given.columns} {given.dtype}, forward plus backward")
    print(f"{'operator':<24}{'row transfers':>14}{'budget':>8}")
    for one in found:
        budget = "-" if one.budget is None else f"{one.budget:g}"
        print(f"{one.operator:<24}{one.transfers:>14.3f}{budget:>8}{'  over' if one.over else ''}")
    return int(any(one.over for one in found))


if __name__ == "__main__":
    sys.exit(main())
