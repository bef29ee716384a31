"""What a method sees of a batch: the rows that predict its answers' tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palu_kernels import LMHead, cross_entropy_loss, linear_cross_entropy_loss
from palu_kernels.backend import accum_dtype
from palu_kernels.roles import CHUNK_BYTES, chunk_shape


@dataclass(eq=False)
class Answers:
    """The answer tokens of a forget batch, one after the other: n tokens of E answers.

    Numbers are float32 (float64 for float64). Where the model's head is plain, no logits are kept
    for any of them: neither by `nll` nor by `map_logits`.

    Args:
        rows: `[n, D]`, hidden rows that enter `head`; or `[n, V]`, logits, where there is none.
        head: the model's output head, or None.
        targets: int64 `[n]`, the tokens.
        lengths: int64 `[E]`, tokens of each answer, at least 1; they sum to n.
        ref_rows, ref_head: the frozen original's, no gradient; None where there is none (a head of
            None beside rows is `head`, which does not train then).
        backend: of the operators.
    """

    rows: Tensor
    head: LMHead | None
    targets: Tensor
    lengths: Tensor
    ref_rows: Tensor | None
    ref_head: LMHead | None
    backend: str

    @cached_property
    def nll(self) -> Tensor:
        """Return `[n]`, -log p of each token, differentiable."""
        return self._nll(self.rows, self.head)

    @cached_property
    def ref_nll(self) -> Tensor:
        """Return `[n]`, the original model's."""
        with torch.no_grad():
            return self._nll(self.ref_rows, self._frozen_head)

    def sums(self, values: Tensor) -> Tensor:
        """Return `[n]` -> `[E]`: over the tokens of each answer."""
        answers = torch.arange(len(self.lengths), device=values.device)
        number = answers.repeat_interleave(self.lengths, output_size=len(values))
        return values.new_zeros(len(answers)).index_add(0, number, values)

    def map_logits(
        self, loss: Callable[[Tensor, Tensor, Tensor | None], Tensor], *, reference: bool = False
    ) -> Tensor:
        """A loss that no operator computes, from logits that are made, and made again in backward,
        a chunk of rows at a time.

        Args:
            loss: of logits `[m, V]`, targets `[m]` and the original's logits `[m, V]` (None
                without `reference`), -> `[m]`.
            reference: whether it needs the original's.

        Returns:
            `[n]`, differentiable.
        """

        def of(part: slice) -> Tensor:
            ref = None
            if reference:
                with torch.no_grad():
                    ref = _logits(self.ref_rows[part], self._frozen_head)
            return loss(_logits(self.rows[part], self.head), self.targets[part], ref)

        columns = self.rows.shape[1] if self.head is None else self.head.vocab_size
        count = len(self.targets)
        size = max(chunk_shape(count, columns, 4, CHUNK_BYTES)[0], 1)
        parts = [slice(start, start + size) for start in range(0, max(count, 1), size)]
        if not torch.is_grad_enabled():
            return torch.cat([of(part) for part in parts])
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(of, part, **options) for part in parts])

    @property
    def _frozen_head(self) -> LMHead | None:
        return self.head if self.ref_head is None else self.ref_head

    def _nll(self, rows: Tensor, head: LMHead | None) -> Tensor:
        options = {"reduction": "none", "backend": self.backend}
        if head is None:
            return cross_entropy_loss(rows, self.targets, **options)
        return linear_cross_entropy_loss(rows, head, self.targets, **options)


def _logits(rows: Tensor, head: LMHead | None) -> Tensor:
    logits = rows if head is None else head.logits(rows)
    return logits.to(accum_dtype(logits.dtype))
