"""Which tensors are alive, and how many bytes they are at most: what `memory_model` is checked
with.

    with Ledger() as ledger:
        step()
        ledger.start()      # measure from here on
        step()
    print(ledger.peak, ledger.at_peak()[:5])

Every operator that is dispatched inside is seen: the storages of its results are counted when it
returns, those of its arguments when they are first met (a model that was made outside), and each
is taken off when the last tensor that uses it is gone. Views and in-place operators cost nothing.

Custom operators (`torch.library.custom_op`: all of `palu_kernels`) are looked into: their Python
implementation runs under the ledger, so that their buffers count while they exist, like anybody
else's. Of a DTensor its local tensor counts, and a storage that is freed and allocated again by
`resize_`, as FSDP does with its unsharded parameters, counts by its size of the moment.

Not seen is what never is a tensor: scratch space inside one operator of PyTorch or of a Triton
kernel, workspaces of BLAS libraries, what an allocator holds back, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type


class Entry(NamedTuple):
    """A storage: its size, and the operator and the tensor it was first seen with."""

    bytes: int
    operator: str  # "" where it was there before: an argument that was not known
    shape: tuple[int, ...]
    dtype: torch.dtype


class Ledger(TorchDispatchMode):
    """Sums the storages that are alive.

    Attributes:
        total: bytes now.
        peak: the most since `start`, or since the ledger was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._alive: dict[int, Entry] = {}
        self._references: dict[int, weakref.ref] = {}
        self._ignored: set[int] = set()
        self._depth = 0
        self.start()

    def __enter__(self) -> Ledger:
        if not self._depth:  # else inside an operator
            self._resize = torch.UntypedStorage.resize_
            torch.UntypedStorage.resize_ = self._resized
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._depth -= 1
        if not self._depth:
            torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*raised)

    @property
    def _resized(self) -> Callable:
        ledger, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            ledger._count(storage, "resize_", (), torch.uint8)
            return storage

        return resized

    def start(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.total
        self._first = dict(self._alive)
        self._changes: list[tuple[int, Entry | None]] = []

    def ignore(self, tensor: Tensor) -> None:
        """Never counts this tensor's storage: data that a training on a GPU leaves on the host."""
        key = tensor.untyped_storage()._cdata
        self._ignored.add(key)
        if key in self._alive:
            self._change(key, None)

    def at_peak(self) -> list[Entry]:
        """What was alive when `peak` was first reached, the largest first."""
        alive = dict(self._first)
        total = sum(entry.bytes for entry in alive.values())
        for key, entry in self._changes:
            if total == self.peak:
                break
            old = alive.pop(key, None)
            total -= 0 if old is None else old.bytes
            if entry is not None:
                alive[key] = entry
                total += entry.bytes
        return sorted(alive.values(), key=lambda entry: -entry.bytes)

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a DTensor: what it does with its local tensors comes back here
        kwargs = kwargs or {}
        name = func.name()
        self._see((args, kwargs), "")
        inside = _implementation(func)
        if inside is None:
            found = func(*args, **kwargs)
        else:
            with self:
                found = inside(*args, **kwargs)
        self._see(found, name)
        return found

    def _see(self, value: Any, operator: str) -> None:
        """Count the tensors in what an operator takes or gives: lists, tuples and keywords."""
        if isinstance(value, Tensor):
            if not value.is_meta and value.layout == torch.strided:
                self._count(value.untyped_storage(), operator, value.shape, value.dtype)
        elif isinstance(value, list | tuple):
            for one in value:
                self._see(one, operator)
        elif isinstance(value, dict):
            for one in value.values():
                self._see(one, operator)

    def _count(
        self,
        storage: torch.UntypedStorage,
        operator: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        known = self._alive.get(key)
        if known is not None and known.bytes == size:  # `out=` may resize
            return
        if known is None:
            self._references[key] = weakref.ref(storage, partial(self._gone, key))
        self._change(key, Entry(size, operator, tuple(shape), dtype))

    def _gone(self, key: int, _: weakref.ref) -> None:
        self._references.pop(key, None)
        self._ignored.discard(key)
        if key in self._alive:
            self._change(key, None)

    def _change(self, key: int, entry: Entry | None) -> None:
        old = self._alive.pop(key, None)
        self.total -= 0 if old is None else old.bytes
        if entry is not None:
            self._alive[key] = entry
            self.total += entry.bytes
        self.peak = max(self.peak, self.total)
        self._changes.append((key, entry))


def _implementation(operator: Any) -> Callable | None:
    """What an operator does in terms of others: a custom operator's Python function, or the
    decomposition that autograd would have run had it not been switched off here."""
    custom = OPDEFS.get(operator.name())
    if custom is not None:
        return custom._init_fn
    keys = torch._C.DispatchKey
    has = operator.has_kernel_for_dispatch_key
    if has(keys.CompositeImplicitAutograd) and not (has(keys.CPU) or has(keys.CUDA)):
        return operator.decompose
    return None
