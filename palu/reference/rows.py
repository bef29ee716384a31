"""What the frozen starting model says of a batch: the rows that a reference cache stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

import palu_kernels
from palu.data.roles import FORGET, IGNORE, PRESERVE
from palu.loss import PALULoss
from palu.models.forward import model_hidden_states, shift_to_logits
from palu.models.head_check import check_head
from palu.models.inputs import is_default, more_inputs
from palu.models.lm_head import LMHead
from palu.models.wrappers import UnsupportedHead, is_sharded, unwrap
from palu.reference.store import CacheError
from palu_kernels import topk_indices

# Size of the chunks of logits that the top k are chosen from.
LOGITS_BYTES = 32 * 2**20


def reference_head(model: nn.Module, batch: Mapping[str, Tensor]) -> LMHead:
    """Return the model's output head, tried out on a few tokens of a batch.

    Raises:
        CacheError: the model is sharded, or computes its logits in a way that an `LMHead` does not.
    """
    if is_sharded(model):
        raise CacheError(
            "the model is sharded by FSDP, and a cache is of the whole model: build it before (in "
            "one process, which the others wait for)"
        )
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
) -> dict[str, Tensor]:
    """Run the model on a batch and keep what the loss will ask for; call it in `eval_mode`.

    Args:
        batch: `input_ids`, `labels`, `attention_mask`, `[B, T]` each.
        ids: the names of its examples.
        source: `forget`: indices of forget rows and hidden states of preserve rows; `retain`:
            hidden states of all answer rows.

    Returns:
        the tensors of a shard, on the CPU: int64 `[B]` `example_ids`, `index_rows` and
        `hidden_rows` (rows of either kind that an example has), and as wanted int32 `indices`
        `[rows, k]` and `hidden` `[rows, D]`, one example after the other.

    Raises:
        FloatingPointError: a hidden state is infinite or NaN.
    """
    labels = batch["labels"]
    positions: dict[str, Tensor] = {}
    if source == "retain":
        positions["hidden"] = shift_to_logits(labels != IGNORE)
    else:
        roles = loss.roles(labels)
        if loss.select_from == "reference":
            positions["indices"] = shift_to_logits(roles == FORGET)
        if loss.preserve is not None:
            positions["hidden"] = shift_to_logits(roles == PRESERVE)
    device = next(model.parameters()).device
    mask = batch.get("attention_mask")
    refuse_unknown_inputs(batch)
    hidden = model_hidden_states(
        model,
        batch["input_ids"].to(device),
        None if mask is None else mask.to(device),
        **more_inputs(batch, device),
    )
    rows = {"example_ids": torch.tensor(ids, dtype=torch.int64)}
    for kind, counts in (("indices", "index_rows"), ("hidden", "hidden_rows")):
        if kind not in positions:
            rows[counts] = torch.zeros(len(ids), dtype=torch.int64)
            continue
        chosen = _as_head_takes(hidden[positions[kind].to(hidden.device)])
        if not bool(chosen.isfinite().all()):
            raise FloatingPointError(
                f"the model's last hidden states are not finite in the {source} set (a batch of "
                f"{len(ids)} examples, {dtype_name(chosen.dtype)}): nothing can be held to them"
            )
        rows[counts] = positions[kind].sum(1).cpu()
        rows[kind] = chosen.cpu() if kind == "hidden" else _topk(head, chosen, loss)
    return rows


def refuse_unknown_inputs(batch: Mapping[str, Tensor]) -> None:
    """Raise CacheError where the model is told more of an example than its tokens and labels, by
    which a cache knows it."""
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
    """Return whether the output head's weight (or the embedding's tied to it) or bias trains."""
    return any(p.requires_grad for p in unwrap(model).get_output_embeddings().parameters())


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return `float32`, ...; `none` for None."""
    return "none" if dtype is None else str(dtype).removeprefix("torch.")


def _as_head_takes(hidden: Tensor) -> Tensor:
    """Cast as autocast does what enters a matrix product (all but float64): casting now changes
    nothing and halves what is stored."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


def _topk(head: palu_kernels.LMHead, hidden: Tensor, loss: PALULoss) -> Tensor:
    """int32 `[rows, min(k, V)]` on the CPU; the logits live a chunk of rows at a time. They are
    ranked before the softcap, as a live reference's are: in half precision it makes ties."""
    head = replace(head, softcap=None)
    step = max(LOGITS_BYTES // (head.vocab_size * hidden.element_size()), 1)
    chunks = [
        topk_indices(head.logits(chunk), loss.top_k, backend=loss.backend).cpu()
        for chunk in hidden.split(step)
    ]
    return torch.cat(chunks)
