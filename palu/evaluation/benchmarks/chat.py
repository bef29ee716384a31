"""Questions in a model's chat template, as benchmarks put them that were made for chat models."""

from __future__ import annotations

from collections.abc import Sequence

from palu.evaluation.benchmarks.meter import Meter


def in_chat(meter: Meter, question: str) -> str:
    """Return a question in the model's chat template, up to where the answer begins."""
    return meter.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def end_tokens(meter: Meter, names: Sequence[str] = ()) -> list[int]:
    """Return the ids of the tokenizer's EOS and of tokens that it may have."""
    tokenizer = meter.tokenizer
    ids = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, names)]
    return sorted({one for one in ids if one is not None})
