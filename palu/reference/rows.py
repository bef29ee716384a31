"""What the frozen starting model says of a batch: the rows that a reference cache stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import palu_kernels
from palu.data.roles import FORGET, IGNORE, PRESERVE
from palu.loss import PALULoss
from palu.models.forward import model_hidden_states, shift_to_logits
from palu.models.inputs import is_default, more_inputs
from palu.models.lm_head import LMHead, check_head
from palu.models.wrappers import UnsupportedHead, unwrap
from palu.reference.store import CacheError
from palu_kernels import topk_indices

# Logits computed at a time to choose the top k: the only logits of a build.
LOGITS_BYTES = 32 * 2**20


@dataclass
class Rows:
    """What the reference gave for B examples: the rows of one after the other, on the CPU.

    Attributes:
        example_ids: B of them.
        index_rows, hidden_rows: how many rows of each kind an example has, B integers each.
        indices: int32 `[sum(index_rows), k]`, or None where none are wanted.
        hidden: `[sum(hidden_rows), D]`, or None where none are wanted.
    """

    example_ids: list[int]
    index_rows: list[int]
    hidden_rows: list[int]
    indices: Tensor | None
    hidden: Tensor | None


def reference_head(model: nn.Module, batch: Mapping[str, Tensor]) -> LMHead:
    """The output head of the model, tried out on a few tokens of a batch.

    Raises:
        CacheError: the model computes its logits in a way that an `LMHead` does not.
    """
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch.get("attention_mask")
    try:
        head = LMHead.from_model(model)
        more = more_inputs(batch, device)
        check_head(model, head, ids, None if mask is None else mask.to(device), **more)
    except UnsupportedHead as refusal:
        raise CacheError(
            f"this model's reference cannot be cached, use reference='live': {refusal}"
        ) from refusal
    return head


def reference_rows(
    model: nn.Module,
    head: palu_kernels.LMHead,
    batch: Mapping[str, Tensor],
    ids: list[int],
    source: str,
    loss: PALULoss,
) -> Rows:
    """Runs the model on a batch and keeps what the loss will ask for; call it in
    `eval_mode`.

    Args:
        model: the frozen starting model.
        head: its output head.
        batch: `input_ids`, `labels`, `attention_mask`, `[B, T]` each.
        ids: the names of its examples.
        source: `forget`: indices of forget rows and hidden states of preserve rows; `retain`:
            hidden states of all answer rows.

    Raises:
        FloatingPointError: a hidden state is infinite or NaN.
    """
    labels = batch["labels"]
    indexed = kept = None
    if source == "retain":
        kept = shift_to_logits(labels != IGNORE)
    else:
        roles = loss.roles(labels)
        if loss.select_from == "reference":
            indexed = shift_to_logits(roles == FORGET)
        if loss.preserve is not None:
            kept = shift_to_logits(roles == PRESERVE)
    device = next(model.parameters()).device
    mask = batch.get("attention_mask")
    refuse_unknown_inputs(batch)
    hidden = model_hidden_states(
        model,
        batch["input_ids"].to(device),
        None if mask is None else mask.to(device),
        **more_inputs(batch, device),
    )

    def rows(chosen: Tensor | None) -> tuple[list[int], Tensor | None]:
        if chosen is None:
            return [0] * len(ids), None
        found = _as_head_takes(hidden[chosen.to(hidden.device)])
        if not bool(found.isfinite().all()):
            raise FloatingPointError(
                f"the model's last hidden states are not finite in the {source} set (a batch of "
                f"{len(ids)} examples, {dtype_name(found.dtype)}): nothing can be held to them"
            )
        return chosen.sum(1).tolist(), found

    index_rows, to_index = rows(indexed)
    hidden_rows, to_keep = rows(kept)
    return Rows(
        ids,
        index_rows,
        hidden_rows,
        None if to_index is None else _topk(head, to_index, loss),
        None if to_keep is None else to_keep.cpu(),
    )


def refuse_unknown_inputs(batch: Mapping[str, Tensor]) -> None:
    """A cache knows an example by its tokens and labels alone.

    Raises:
        CacheError: the model is told more of it than they tell.
    """
    odd = [n for n, value in more_inputs(batch).items() if not is_default(n, value, batch)]
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != batch["input_ids"].shape:
        odd.append(f"attention_mask of shape {list(mask.shape)}")
    if odd:
        raise CacheError(
            f"the collator gives the model {', '.join(odd)}, and a reference cache knows examples "
            "by input_ids and labels alone: leave it out, or use reference='live'"
        )


def head_may_train(model: nn.Module) -> bool:
    """Whether training changes the output head: its weight, which may be the input embedding's, or
    its bias wants a gradient."""
    return any(p.requires_grad for p in unwrap(model).get_output_embeddings().parameters())


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def dtype_name(dtype: torch.dtype | None) -> str:
    """`float32`, ...; `none` for None."""
    return "none" if dtype is None else str(dtype).removeprefix("torch.")


def _as_head_takes(hidden: Tensor) -> Tensor:
    """Autocast casts what enters a matrix product; float64 it leaves alone. Casting now changes
    nothing and halves what is stored."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


def _topk(head: palu_kernels.LMHead, hidden: Tensor, loss: PALULoss) -> Tensor:
    """int32 `[rows, min(k, V)]` on the CPU; the logits live a chunk of rows at a time."""
    step = max(LOGITS_BYTES // (head.vocab_size * hidden.element_size()), 1)
    found = [
        topk_indices(head.logits(chunk), loss.top_k, backend=loss.backend).cpu()
        for chunk in hidden.split(step)
    ]
    return torch.cat(found)
