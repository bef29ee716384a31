"""A vocabulary whose rows are spread over the ranks of a process group: who has which, what they
exchange, and whether they agree.

No collective here depends on what a rank's own tensors hold. What a rank finds wrong with its
arguments is gathered before anybody raises, so that none waits for one that is gone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from palu_kernels.backend import check_values

FACT_BYTES = 4096  # of what a rank says of itself, as JSON
# Of what this rank has handed to collectives over a vocabulary: calls, and bytes by purpose.
traffic: Counter[str] = Counter()
_called: set[str] = set()  # groups whose ranks have compared a call


class Disagreement(ValueError):
    """What one rank of a group, or the ranks together, got wrong; raised on all of them."""

    def __init__(self, message: str, errors: tuple[str | None, ...] = ()) -> None:
        super().__init__(message)
        self.errors = errors  # of every rank, in its own words


@dataclass(frozen=True)
class Vocabulary:
    """Rows `[start, start + rows)` of a head, or entries of every row of logits, lie here."""

    group: str  # name of the process group: a custom op takes no objects
    rank: int  # in the group
    starts: tuple[int, ...]  # of every rank of the group
    counts: tuple[int, ...]  # rows of every rank

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    @property
    def rows(self) -> int:
        return self.counts[self.rank]

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def largest(self) -> int:
        """The most rows of a rank: what is decided alike everywhere is decided by it."""
        return max(self.counts)

    @property
    def order(self) -> list[int]:
        """Ranks of the group as their rows follow one another."""
        return sorted(range(len(self.counts)), key=lambda r: (self.starts[r], self.counts[r]))

    @property
    def place(self) -> int:
        """Where this rank stands in `order`."""
        return self.order.index(self.rank)

    def encode(self) -> str:
        return json.dumps([self.group, self.rank, self.starts, self.counts])

    def gather(self, t: Tensor, purpose: str) -> Tensor:
        """Return every rank's `t`, of one shape and dtype, as `[ranks, ...]` in `order`."""
        out = t.new_empty((len(self.counts), *t.shape))
        if t.numel():
            _count(t, purpose)
            _all_gather(out.flatten(0, 1), t.contiguous(), resolve_group(self.group))
        if self.order == list(range(len(self.counts))):
            return out
        return torch.stack([out[rank] for rank in self.order])

    def sum(self, t: Tensor, purpose: str) -> Tensor:
        """Return the sum of every rank's `t`; a contiguous one is overwritten."""
        from torch import distributed

        t = t.contiguous()
        if t.numel():
            _count(t, purpose)
            distributed.all_reduce(t, group=resolve_group(self.group))
        return t

    def of_rank(self, t: Tensor) -> Tensor:
        """Return this rank's rows of a whole `t [size, ...]`, a view."""
        return t[self.start : self.start + self.rows]

    def of_columns(self, t: Tensor) -> Tensor:
        """Return this rank's slice of whole rows `[..., size]`, a view."""
        return t[..., self.start : self.start + self.rows]


@lru_cache
def decode(text: str) -> Vocabulary | None:
    """Return the vocabulary that `encode` was called on; None for an empty text."""
    if not text:
        return None
    group, rank, starts, counts = json.loads(text)
    return Vocabulary(group, rank, tuple(starts), tuple(counts))


def resolve_group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def _all_gather(out: Tensor, own: Tensor, group: Any) -> None:
    from torch import distributed

    # PyTorch 2.13 calls it `all_gather_single`, and warns of the name that 2.12 knows
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(out, own, group=group)


def _count(t: Tensor, purpose: str) -> None:
    traffic["calls"] += 1
    traffic[purpose] += t.numel() * t.element_size()


def agree(
    group: Any,
    facts: dict[str, Any],
    device: torch.device,
    own: tuple[str, ...] = (),
    near: Mapping[str, float] | None = None,
) -> list[dict]:
    """Return what every rank of `group` says of itself, once all say the same.

    Args:
        facts: names and values that JSON knows; `error` is what a rank found wrong.
        own: names whose values may differ.
        near: names of numbers, and by how much they may differ.

    Raises:
        Disagreement: on every rank, with the ranks and what differs.
    """
    from torch import distributed

    # all that is gathered here has one size, so that ranks at different calls meet too
    facts = {name: _short(value, 500 if name == "error" else 160) for name, value in facts.items()}
    text = json.dumps(facts).encode()
    said = torch.zeros(FACT_BYTES, dtype=torch.uint8)
    said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    ranks = distributed.get_process_group_ranks(group)
    gathered = torch.empty(len(ranks) * FACT_BYTES, dtype=torch.uint8, device=device)
    _all_gather(gathered, said.to(device), group)
    rows = gathered.cpu().view(len(ranks), FACT_BYTES)
    everyone = [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in rows]
    errors = tuple(one.get("error") for one in everyone)
    if any(errors):
        lines = [f"rank {r}: {error}" for r, error in zip(ranks, errors, strict=True) if error]
        raise Disagreement("; ".join(lines[:4]), errors)
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [one.get(name) for one in everyone]
        usual = values.index(max(values, key=values.count))
        room = (near or {}).get(name, 0.0)
        odd = [r for r, value in enumerate(values) if not _is_near(value, values[usual], room)]
        if name in own or not odd:
            continue
        pairs = [f"rank {ranks[r]} has {values[r]!r}" for r in sorted([usual, *odd[:7]])]
        raise Disagreement(
            f"the ranks that share a vocabulary differ in {name}: {', '.join(pairs)}; they must "
            "call with the same arguments, in the same order"
        )
    return everyone


def _is_near(one: Any, other: Any, room: float) -> bool:
    if room and one is not None and other is not None:
        return abs(one - other) <= room
    return one == other


def _short(value: Any, most: int) -> Any:
    """Keep what is gathered within its size; a long text is told apart by its hash."""
    text = str(value)
    if len(text) <= most:
        return value
    return f"{text[: most - 40]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def join(group: Any, start: int, rows: int, facts: dict[str, Any], device: torch.device) -> Any:
    """Return the `Vocabulary` that the ranks of `group` make together.

    Raises:
        Disagreement: on every rank, where facts differ, or rows overlap or are missing.
    """
    from torch import distributed

    version = sys.modules["palu_kernels"].__version__
    versions = {"the version of palu_kernels": version, "torch's version": torch.__version__}
    checks = {"PALU_CHECK": os.environ.get("PALU_CHECK", "")}
    facts = {"the call": "a head", "start": start, "rows": rows, **facts, **versions, **checks}
    everyone = agree(group, facts, device, ("start", "rows"))
    starts = tuple(one["start"] for one in everyone)
    counts = tuple(one["rows"] for one in everyone)
    made = Vocabulary(group.group_name, distributed.get_rank(group), starts, counts)
    ranks = distributed.get_process_group_ranks(group)
    end = 0
    for rank in made.order:
        if starts[rank] != end and counts[rank]:
            what = "are on no rank" if starts[rank] > end else "are on two ranks"
            low, high = sorted((starts[rank], end))
            have = [
                f"rank {ranks[r]} has [{starts[r]}, {starts[r] + counts[r]})" for r in made.order
            ]
            raise Disagreement(f"rows {low} to {high} of the head {what}: {', '.join(have)}")
        end = max(end, starts[rank] + counts[rank])
    if end == 0:
        raise Disagreement("no rank has a row of the head; one of them must")
    return made


def compares(vocabulary: Vocabulary, device: torch.device) -> bool:
    """Whether the ranks compare this call: every one on the CPU; elsewhere, where it waits for the
    device, the first one and those under `PALU_CHECK=1`."""
    return vocabulary.group not in _called or check_values(device)


def agree_on_call(
    vocabulary: Vocabulary,
    facts: dict[str, Any],
    rows: Tensor | None,
    device: torch.device,
    integers: Sequence[Tensor | None] = (),
) -> None:
    """Compare what every rank of a sharded vocabulary calls a loss with: `facts`, and the entries
    of hidden `rows` and `integers`.

    Raises:
        Disagreement: on every rank.
    """
    if torch.compiler.is_compiling() or not compares(vocabulary, device):
        return
    facts = {"the call": "a loss", **facts, "integers": [_fingerprint(t) for t in integers]}
    near = {}
    if rows is not None:  # not to the last bit: each rank may have added up its own rows
        facts["rows"] = _projection(rows.detach().flatten(0, -2).float())
        near["rows"] = 1e-3 + 8 * torch.finfo(rows.dtype).eps
    agree(resolve_group(vocabulary.group), facts, device, near=near)
    _called.add(vocabulary.group)


@contextmanager
def raised_together(group: Any, device: torch.device) -> Iterator[None]:
    """Let every rank of `group` raise what one of them finds wrong in here; all of them `agree` at
    the end of it, or where it is left by an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, Disagreement) or getattr(error, "told", False):
            raise
        error.told = True  # where this is called within itself
        try:
            agree(group, {"error": f"{type(error).__name__}: {error}"}, device)
        except Disagreement as together:
            if len(set(together.errors)) > 1:
                raise together from error
        raise


def _projection(rows: Tensor) -> float | None:
    """Return of `[N, D]` a number about 1 in size, which other rows or another order have by chance
    alone; 0 for zeros, None where it is not finite."""
    by_row, by_column = (
        torch.arange(1, size + 1, device=rows.device, dtype=torch.float32).sin()
        for size in rows.shape
    )
    found = 2 * float(((rows @ by_column) @ by_row) / rows.norm().clamp(min=1e-30))
    return found if math.isfinite(found) else None


def _fingerprint(t: Tensor | None) -> str | None:
    """What tells integers apart that differ in an entry or in their order."""
    if t is None:
        return None
    flat = t.reshape(-1).long()
    weights = torch.arange(1, len(flat) + 1, device=t.device) * 2654435761 % 4294967291
    return f"{list(t.shape)}, sum {int((flat * weights).sum())}"


def any_dtensor(values: Iterable[Any]) -> bool:
    """Whether one of them is a DTensor: one look at all arguments of a call."""
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in map(type, values)


def dtensor(t: Any) -> Any:
    """Return `t` if it is a DTensor, else None."""
    return t if any_dtensor((t,)) else None


def local_slice(name: str, t: Any, dim: int | None, by_row: bool) -> tuple[Any, Any, int | None]:
    """Return what of `t` is here, and if it is spread along `dim`, over which group and from where;
    None and plain tensors as they are. What is computed from the local part has its gradient.

    Args:
        dim: the dimension of the vocabulary; None: it has none.
        by_row: whether `t` are rows, of which every rank may have its own.

    Raises:
        ValueError: the placements are none that a loss can be computed from.
    """
    if dtensor(t) is None:
        return t, None, None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    last = t.dim() - 1
    spread = [n for n, p in enumerate(t.placements) if type(p) is Shard and p.dim == dim]
    rows = [n for n, p in enumerate(t.placements) if type(p) is Shard and p.dim not in (dim, last)]
    served = len(spread) + len(rows) + sum(isinstance(p, Replicate) for p in t.placements)
    if served < len(t.placements) or len(spread) > 1 or (rows and not by_row):
        allowed = "" if dim is None else f"Shard({dim}) over one dimension of the mesh at most, or "
        allowed += "Replicate() or Shard() of rows" if by_row else "Replicate()"
        fsdp = " (FSDP's are whole inside the head's forward: palu.loss_in_head)"
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(t.placements)} over a mesh of shape "
            f"{tuple(t.device_mesh.shape)}; they must be {allowed}: call "
            f"{name}.redistribute(placements=...) before{fsdp if dim == 0 else ''}"
        )
    with torch.enable_grad():  # a view of a parameter, whatever a head is made under
        local = t.to_local()
    if not spread:
        return local, None, None
    _, offsets = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return local, t.device_mesh.get_group(spread[0]), offsets[dim]


def vocabulary_of(t: Any, dim: int) -> Vocabulary:
    """Return the vocabulary along `dim` of a DTensor that `local_slice` finds spread there."""
    from torch import distributed

    mesh = t.device_mesh
    along = next(n for n, p in enumerate(t.placements) if p.is_shard(dim))
    group = mesh.get_group(along)
    here = tuple(slice(None) if n == along else at for n, at in enumerate(mesh.get_coordinate()))
    places = mesh.mesh[here].tolist()  # ranks as their slices follow one another
    size = -(-t.shape[dim] // len(places))  # as torch.chunk: the last ones may be shorter
    starts, counts = [], []
    for rank in distributed.get_process_group_ranks(group):
        starts.append(min(places.index(rank) * size, t.shape[dim]))
        counts.append(min(size, t.shape[dim] - starts[-1]))
    own = distributed.get_rank(group)
    if counts[own] != t.to_local().shape[dim]:
        raise ValueError(
            f"a DTensor of shape {list(t.shape)} with placements {tuple(t.placements)} has "
            f"{t.to_local().shape[dim]} local entries in dimension {dim}; it must have "
            f"{counts[own]} (PyTorch's even split)"
        )
    return Vocabulary(group.group_name, own, tuple(starts), tuple(counts))


def local_rows(name: str, t: Any) -> Any:
    """Return what of rows `t` is here; a plain tensor and anything else as it is.

    Raises:
        ValueError: the placements are none that a loss can be computed from.
    """
    return local_slice(name, t, None, True)[0]
