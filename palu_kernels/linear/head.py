"""The output head of a language model: what turns a hidden row into logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from palu_kernels import reference, validation
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

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    _made: dict[str, tuple[list, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        validation.matrix("weight", self.weight, "[V, D]")
        if self.bias is not None:
            validation.dense("bias", self.bias)
            if list(self.bias.shape) != [self.vocab_size]:
                raise ValueError(
                    f"bias has shape {list(self.bias.shape)}; it must be [{self.vocab_size}] "
                    f"beside weight {list(self.weight.shape)}"
                )
            if self.bias.dtype != self.weight.dtype or self.bias.device != self.weight.device:
                raise ValueError(
                    f"bias is {self.bias.dtype} on {self.bias.device}; it must be as weight, "
                    f"{self.weight.dtype} on {self.weight.device}"
                )
        _number("logit_scale", self.logit_scale)
        if self.logit_scale == 0:
            raise ValueError("logit_scale is 0; it must not be (every logit would be 0)")
        if self.softcap is not None:
            _number("softcap", self.softcap)
            if self.softcap <= 0:
                raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None")

    def __repr__(self) -> str:
        bias = None if self.bias is None else list(self.bias.shape)
        return (
            f"{type(self).__name__}(weight={list(self.weight.shape)} {self.weight.dtype}, "
            f"bias={bias}, logit_scale={self.logit_scale}, softcap={self.softcap})"
        )

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

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
        return LMHead(self.weight.detach(), bias, self.logit_scale, self.softcap)

    def mean_row(self) -> tuple[Tensor, Tensor]:
        """Return the means of the weight's rows `[D]` and of the bias (`sparse.mean_row`)."""
        head = self.detach()
        return self._once("mean row", lambda: sparse.mean_row(head.weight, head.bias))

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in `dtype`, detached."""
        head = self.detach()
        if dtype == head.weight.dtype:
            return head.weight, head.bias
        bias = None if head.bias is None else head.bias.to(dtype)
        return self._once(str(dtype), lambda: (head.weight.to(dtype), bias))

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
        operators compute without holding it."""
        return reference.head_logits(hidden, self.weight, self.bias, self.logit_scale, self.softcap)


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


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
    no_transforms(name, hidden, head, ref_hidden, ref_head, **integers)
    if ref_hidden is not None:
        check_hidden("ref_hidden", ref_hidden, head if ref_head is None else ref_head)
        _frozen("ref_hidden", ref_hidden, hidden)
        frozen_head(head, ref_head)
    return compute_dtype(hidden, head, ref_hidden, ref_head)


def no_transforms(
    name: str,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor | None,
    ref_head: LMHead | None,
    **more: Tensor | None,
) -> None:
    heads = {
        f"{kind}.{part}": getattr(own, part)
        for kind, own in (("head", head), ("ref_head", ref_head))
        if own is not None
        for part in ("weight", "bias")
    }
    validation.no_transforms(name, hidden=hidden, ref_hidden=ref_hidden, **heads, **more)


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


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
