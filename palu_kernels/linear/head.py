"""The output head of a language model: what turns a hidden row into logits."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from palu_kernels import reference, validation
from palu_kernels.distributed import (
    Vocabulary,
    any_dtensor,
    compares,
    dtensor,
    join,
    local_rows,
    local_slice,
    raised_together,
    resolve_group,
)
from palu_kernels.linear import sparse


@dataclass(frozen=True, eq=False, repr=False)
class LMHead:
    """`logits = cap(logit_scale * (hidden @ weight.T + bias))`, `cap(x) = softcap * tanh(x /
    softcap)`.

    The tensors are held, not copied: a head may be tied to an embedding, trained or frozen. A
    frozen one keeps what is made of it (its mean row; under autocast its weight in that dtype, 2
    bytes an entry) while it lives, and makes it anew when a tensor of it is written to. After a
    write that PyTorch does not count (into `weight.data`, or by a raw pointer) take a new `LMHead`.

    Args:
        weight: `[V, D]`, float32, bfloat16, float16 or float64.
        bias: `[V]` of the same dtype and device, or None.
        logit_scale: finite, not 0. Cohere's `logit_scale`, one over Granite's
            `logits_scaling`.
        softcap: finite, above 0 (Gemma's `final_logit_softcapping`), or None for no cap.
        process_group: a `torch.distributed` group whose ranks have the rows of one head between
            them, every rank `weight` and `bias` of its own (none, or of different number); every
            rank makes the head and calls the losses, with the same hidden rows. None: the whole
            head is here. Weight and bias that are DTensors with placement `Shard(0)` bring theirs.
        vocab_start: the index in the whole vocabulary of this rank's first row.

    Raises:
        TypeError, ValueError: an argument is not as above; on every rank, where they disagree.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    process_group: Any = None
    vocab_start: int | None = None
    _made: dict[str, tuple[list, Any]] = field(default_factory=dict, init=False)
    vocabulary: Vocabulary | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if dtensor(self.weight) is not None or dtensor(self.bias) is not None:
            self._take_shards()
        if self.process_group is None:
            self._check()
            return
        device = self.weight.device if isinstance(self.weight, Tensor) else torch.device("cpu")
        with raised_together(self.process_group, device):
            self._check()
            facts = {
                "hidden size": self.hidden_size,
                "dtype": str(self.weight.dtype),
                "bias": self.bias is not None,
                "logit_scale": self.logit_scale,
                "softcap": self.softcap,
                "requires_grad": self.requires_grad,
            }
            rows = self.weight.shape[0]
            made = join(self.process_group, self.vocab_start, rows, facts, device)
        object.__setattr__(self, "vocabulary", made)

    def _take_shards(self) -> None:
        """Hold the local rows of DTensors, and their group."""
        if self.process_group is not None or self.vocab_start is not None:
            raise ValueError(
                "process_group or vocab_start is given and weight is a DTensor, which brings them; "
                "they must be None"
            )
        weight, group, start = local_slice("weight", self.weight, 0, False)
        bias, _, bias_start = local_slice("bias", self.bias, 0, False)
        # Meshes and not groups: equal meshes may have groups of their own.
        meshes = [t.device_mesh for t in (self.weight, self.bias) if dtensor(t) is not None]
        if self.bias is not None and (bias_start != start or meshes[0] != meshes[-1]):
            raise ValueError("bias is not sharded as weight is; it must have its placements")
        parts = {"weight": weight, "bias": bias, "process_group": group, "vocab_start": start}
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        if self.process_group is None:
            validation.matrix("weight", self.weight, "[V, D]")
            if self.vocab_start is not None:
                raise ValueError(
                    f"vocab_start is {self.vocab_start!r} and process_group is None; vocab_start "
                    "must be None where the whole head is here"
                )
        else:
            validation.slice_of_head(self.weight, self.vocab_start)
        if self.bias is not None:
            validation.dense("bias", self.bias)
            if list(self.bias.shape) != [self.weight.shape[0]]:
                raise ValueError(
                    f"bias has shape {list(self.bias.shape)}; it must be [{self.weight.shape[0]}] "
                    f"beside weight {list(self.weight.shape)}"
                )
            if self.bias.dtype != self.weight.dtype or self.bias.device != self.weight.device:
                raise ValueError(
                    f"bias is {self.bias.dtype} on {self.bias.device}; it must be as weight, "
                    f"{self.weight.dtype} on {self.weight.device}"
                )
        validation.number("logit_scale", self.logit_scale)
        if self.logit_scale == 0:
            raise ValueError("logit_scale is 0; it must not be (every logit would be 0)")
        if self.softcap is not None:
            validation.number("softcap", self.softcap)
            if self.softcap <= 0:
                raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None")

    def __repr__(self) -> str:
        bias = None if self.bias is None else list(self.bias.shape)
        return (
            f"{type(self).__name__}(weight={list(self.weight.shape)} {self.weight.dtype}, "
            f"bias={bias}, logit_scale={self.logit_scale}, softcap={self.softcap}"
            + (")" if self.vocabulary is None else f", {self.vocabulary})")
        )

    @property
    def vocab_size(self) -> int:
        """V, of the whole head."""
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary.size

    @property
    def most_rows(self) -> int:
        """The most rows of a rank, V where the whole head is here."""
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary.largest

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def requires_grad(self) -> bool:
        """Whether the head trains: its weight or its bias wants a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def detach(self) -> LMHead:
        """The same head without gradients; the tensors are shared."""
        bias = None if self.bias is None else self.bias.detach()
        if self.vocabulary is None:
            return LMHead(self.weight.detach(), bias, self.logit_scale, self.softcap)
        head = copy(self)  # not made anew: the ranks have agreed before
        for name, value in (("weight", self.weight.detach()), ("bias", bias), ("_made", {})):
            object.__setattr__(head, name, value)
        return head

    def mean_row(self) -> tuple[Tensor, Tensor]:
        """Return the means of the weight's rows `[D]` and of the bias (`sparse.mean_row`)."""
        if self.vocabulary is None:
            return self._once("mean row", lambda: sparse.mean_row(self.weight, self.bias))
        # what is kept may not decide whether a rank takes part in a sum
        sums = self._once("sums of rows", lambda: sparse.sums_of_rows(self.weight, self.bias))
        return sparse.mean_of_sums(sums, self.vocabulary)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in `dtype`, detached."""
        weight = self.weight.detach()
        bias = None if self.bias is None else self.bias.detach()
        if dtype == weight.dtype:
            return weight, bias
        bias = None if bias is None else bias.to(dtype)
        return self._once(str(dtype), lambda: (weight.to(dtype), bias))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, kept while the head is as it was.

        Not of a head that trains: some optimizers write where no version counts it. Not in a CUDA
        graph, which would go on reading what was kept when the head has changed.
        """
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        if self.requires_grad or _capturing(self.weight) or any(t.is_inference() for t in tensors):
            return make()
        stamps = [(t.data_ptr(), t._version) for t in tensors]
        if self._made.get(name, (None,))[0] != stamps:
            self._made.pop(name, None)  # before there are two of them
            self._made[name] = stamps, make()
        return self._made[name][1]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]` by the definition, differentiable: what the linear
        operators compute without holding it. Of a sharded head those of this rank's rows."""
        return reference.head_logits(hidden, self.weight, self.bias, self.logit_scale, self.softcap)


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


Args = ParamSpec("Args")  # of a decorated function, for type checkers
Result = TypeVar("Result")


def together(loss: Callable[Args, Result]) -> Callable[Args, Result]:
    """Make a function of an `LMHead` take DTensors of rows, and let every rank of a sharded head
    raise what one of them finds wrong."""

    @wraps(loss)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return loss(*args, **kwargs)
        vocabulary, given = None, [*args, *kwargs.values()]
        for value in given:
            if isinstance(value, LMHead):
                head, vocabulary = value, value.vocabulary
                break
        plain = not any_dtensor(given)
        if vocabulary is None or not compares(vocabulary, head.weight.device):
            return loss(*args, **kwargs) if plain else loss(**_local(loss, args, kwargs))
        with raised_together(resolve_group(vocabulary.group), head.weight.device):
            return loss(*args, **kwargs) if plain else loss(**_local(loss, args, kwargs))

    return call


def _local(loss: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, DTensors among them as what is here."""
    named = signature(loss).bind(*args, **kwargs).arguments
    head = named.get("head")
    for name, value in named.items():
        if dtensor(value) is None:
            continue
        named[name] = local_rows(name, value)
        if (
            isinstance(head, LMHead)
            and head.requires_grad
            and any(p.is_shard() for p in value.placements)
        ):
            raise ValueError(
                f"{name} is a DTensor with placements {tuple(value.placements)} and head trains; "
                f"{name} must be Replicate(), or a plain tensor ({name}.to_local()), and the "
                "gradients of the head be added up by what shards the rows"
            )
    return named


def check_hidden(name: str, value: object, head: object) -> None:
    """Floating-point `[N, D]` or `[B, T, D]` for a head `[V, D]` on the same device."""
    if not isinstance(head, LMHead):
        raise TypeError(
            f"the head beside {name} is a {type(head).__name__}; it must be a palu_kernels.LMHead"
        )
    validation.floats(name, value)
    if value.dim() not in (2, 3) or value.shape[-1] != head.hidden_size:
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must be [N, {head.hidden_size}] or "
            f"[B, T, {head.hidden_size}] beside a head whose weight is {list(head.weight.shape)}"
        )
    if value.device != head.weight.device:
        raise ValueError(
            f"{name} is on {value.device}; it must be on the device of its head, "
            f"{head.weight.device}"
        )


def prepare(
    name: str,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    **integers: Tensor | None,
) -> torch.dtype:
    """Check what the operator `name` is given, and return the dtype of its products."""
    check_hidden("hidden", hidden, head)
    given = {"hidden": hidden, "ref_hidden": ref_hidden, **integers}
    given |= {"head.weight": head.weight, "head.bias": head.bias}
    if ref_head is not None:
        given |= {"ref_head.weight": ref_head.weight, "ref_head.bias": ref_head.bias}
    validation.no_transforms(name, **given)
    if ref_hidden is not None:
        check_hidden("ref_hidden", ref_hidden, head if ref_head is None else ref_head)
        _frozen("ref_hidden", ref_hidden, hidden)
        frozen_head(head, ref_head)
    return compute_dtype(hidden, head, ref_hidden, ref_head)


def _frozen(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad; it must be frozen (no gradient reaches it): compute it under "
            "torch.no_grad() or pass .detach()"
        )
    validation.same_device(name, value, hidden, "hidden")


def frozen_head(head: LMHead, ref_head: LMHead | None) -> None:
    if ref_head is None:
        if head.requires_grad:
            raise ValueError(
                "ref_head is None and head requires grad; it must be the reference's own head, "
                "which stays as it was while head trains (head.detach() if this one is meant)"
            )
        return
    if ref_head.requires_grad:
        raise ValueError("ref_head requires grad; it must be frozen (pass ref_head.detach())")
    if ref_head.vocabulary is not None and ref_head.vocabulary != head.vocabulary:
        raise ValueError(
            f"ref_head is sharded as {ref_head.vocabulary} and head as {head.vocabulary}; it must "
            "be sharded as head is, or whole"
        )
    if ref_head.vocab_size != head.vocab_size:
        raise ValueError(
            f"ref_head has {ref_head.vocab_size} rows of weight; it must have those of head, "
            f"{head.vocab_size}"
        )


def compute_dtype(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor | None, ref_head: LMHead | None
) -> torch.dtype:
    """The dtype of the products: autocast's, as for `F.linear`, else the widest of all four."""
    if _autocasts(hidden):
        return product_dtype(hidden)
    if head.weight.dtype != hidden.dtype:
        raise TypeError(
            f"head.weight has dtype {head.weight.dtype}; it must have the dtype of hidden, "
            f"{hidden.dtype} (or run under torch.autocast)"
        )
    compute = hidden.dtype
    for t in (ref_hidden, None if ref_head is None else ref_head.weight):
        compute = compute if t is None else torch.promote_types(compute, t.dtype)
    return compute


def product_dtype(hidden: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype


def _autocasts(hidden: Tensor) -> bool:
    if hidden.is_meta or hidden.dtype == torch.float64:  # autocast knows no meta device
        return False
    return torch.is_autocast_enabled(hidden.device.type)
