"""Greedy answers from exact prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from palu.evaluation.batches import ALONE, Processes, in_batches
from palu.models.wrappers import unwrap


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    processes: Processes = ALONE,
    report: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continues each prompt with the likeliest token until an end token or `max_new_tokens`.

    Prompts of a batch are padded on the left under a mask that comes from their lengths, so a
    padding token that is also an end token harms nothing, and positions are counted from the first
    real token. Sampling settings stored with the model have no effect.

    Args:
        prompts: token ids, each at least one token long.
        eos_token_ids: ids that end an answer.
        processes, report: see `in_batches`.

    Returns:
        the new text of each prompt, special tokens and outer white space removed.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos_token_ids[0] if eos_token_ids else 0

    def work(chosen: list[int]) -> list[str]:
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            length = len(prompts[i])
            ids[row, width - length :] = torch.tensor(prompts[i], dtype=torch.long)
            mask[row, width - length :] = 1
        new = _continue(model, ids.to(device), mask.to(device), set(eos_token_ids), max_new_tokens)
        answers = []
        for tokens in new.tolist():
            ends = [n for n, token in enumerate(tokens) if token in eos_token_ids]
            tokens = tokens[: ends[0]] if ends else tokens
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return answers

    lengths = [len(prompt) for prompt in prompts]
    return in_batches(lengths, batch_size, work, processes=processes, report=report)


def _continue(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, eos: set[int], limit: int
) -> torch.Tensor:
    """int64 `[B, new]`: the likeliest continuation, by `generate` with every stored sampling
    setting overruled."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        eos_token_id=sorted(eos) or None,
        # The mask says what is padding; rows that ended are cut at their end token.
        pad_token_id=min(eos) if eos else 0,
        use_cache=True,
    )
    # An adapter's wrapper hands its inner model's settings back to it: they are changed in there.
    inner = unwrap(model)
    stored = inner.generation_config
    try:
        # `generate` fills settings that are left out from the stored ones (temperature, penalties):
        # none of them here.
        inner.generation_config = GenerationConfig()
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    finally:
        inner.generation_config = stored
    return out[:, ids.shape[1] :]
