"""Dataset of annotated answers: the checkout's own tokens, with palu's labels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from palu.data.files import load_examples
from palu.data.labels import place_spans, shift_spans, token_places
from palu.data.records import Example
from palu.data.roles import IGNORE, KEEP
from palu.data.template import Rendered, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnnotatedQA(Dataset):
    """Questions, answers and the sensitive spans of the answers.

    An item has the `input_ids` that the checkout makes of question and answer (so that PALU is
    trained on what its other methods are trained on), `attention_mask`, `labels` (all int64 [T])
    and `index`, the row. Labels are a token's own id where it shares a character with a span, -200
    for the answer's other tokens and all that the checkout trains on after it, and -100 before it.

    Args:
        path: what `palu.load_examples` reads: JSON lines or a folder of `datasets`, with `spans` or
            the released `target_words`; may end in a slice, `PATH[-40:]`.
        template_args: the model config's.
        tokenizer: a fast one.
        max_length: as in the checkout's datasets (which leave chats uncut).
        repair: `snap` moves span ends to word ends and merges overlaps.

    Raises:
        ValueError: a record without annotation or with a bad one, named by file and row; an
            example whose tokens are not those of its text; a plain document without question.
        TypeError: a slow tokenizer.
    """

    preprocess: Any  # the checkout's function; `register` sets it

    def __init__(
        self,
        path: str | os.PathLike[str],
        template_args: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        repair: Literal["none", "snap"] = "none",
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"tokenizer is a {type(tokenizer).__name__}; it must be a fast tokenizer: placing "
                "spans takes the character offsets of tokens"
            )
        self.items: list[dict[str, Any]] = []
        lost, cut = [], []
        for row, example in enumerate(load_examples(path, require_spans=True, repair=repair)):
            try:
                item, lost_spans, cut_tokens = self._item(
                    example, template_args, tokenizer, max_length
                )
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, example {example.id!r}: {error}") from error
            self.items.append({**item, "index": row})
            lost.append(lost_spans)
            cut.append(cut_tokens)
        if any(cut):
            message = f"{os.fspath(path)}: {sum(map(bool, cut))} of {len(cut)} examples are cut at "
            message += f"max_length={max_length}: {sum(cut)} tokens are left out"
            if any(lost):
                message += f"; {sum(lost)} spans lost tokens to max_length={max_length}"
            warnings.warn(message, stacklevel=2)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.items[row]

    def _item(
        self,
        example: Example,
        template_args: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> tuple[dict[str, torch.Tensor], int, int]:
        """Return an item without its index, and how many spans lost tokens and tokens were cut."""
        if example.question is None:
            raise ValueError("field 'question' is missing; an annotated example must have one")
        if example.turns:
            raise ValueError(
                "it is a conversation, or has spans in its question; the checkout's datasets hold "
                "one question and one answer, with spans in the answer"
            )
        item = self.preprocess(
            tokenizer, template_args, [example.question], [example.answer], max_length
        )
        rendered = _render(tokenizer, template_args, example.question, example.answer)
        ids = item["input_ids"].numpy()
        starts, ends, kept = _place(tokenizer, rendered, ids)

        labels = np.where(item["labels"].numpy() == IGNORE, IGNORE, KEEP)
        # The checkout tokenises the prompt by itself and counts its tokens. In the whole text its
        # end may be one token with the answer's beginning, or be more tokens than by itself.
        in_answer = (starts < rendered.end) & (ends > rendered.start)
        labels[: min(kept, int(in_answer.argmax()))] = IGNORE
        labels[:kept][in_answer[:kept]] = KEEP
        placed = shift_spans(rendered, example.spans)
        sensitive, lost = place_spans(rendered.text, starts, ends, placed, kept)
        labels[:kept][sensitive[:kept]] = ids[:kept][sensitive[:kept]]
        labels[(ids == tokenizer.eos_token_id) & (labels >= 0)] = KEEP
        return {**item, "labels": torch.from_numpy(labels)}, lost, int(in_answer[kept:].sum())


class _OfToday(Template):
    """A template that writes today's date, as the checkout lets templates do."""

    def _day(self) -> datetime:
        return datetime.now()


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template_args: Mapping[str, Any],
    question: str,
    answer: str,
) -> Rendered:
    """Return the text that the checkout tokenizes, and where the answer is in it."""
    if template_args["apply_chat_template"]:
        template = _OfToday(
            system_prompt=template_args.get("system_prompt") or None,
            date_string=template_args.get("date_string"),
            chat=True,
        )
        return template.render(tokenizer, question, answer)
    before = (
        (template_args.get("system_prompt_with_special_tokens") or "")
        + template_args["user_start_tag"]
        + question
        + template_args["user_end_tag"]
        + template_args["asst_start_tag"]
    )
    return Rendered(before + answer, len(before), len(before) + len(answer), 0, False, True)


def _place(
    tokenizer: PreTrainedTokenizerBase, rendered: Rendered, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return first and last-plus-one character of every token of the text, and how many of its
    tokens `ids` begins with; an EOS may follow them.

    Raises:
        ValueError: anything else follows.
    """
    encoding = tokenizer(
        rendered.text,
        add_special_tokens=rendered.add_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    tokens = np.asarray(encoding["input_ids"])
    length = min(len(tokens), len(ids))
    different = np.flatnonzero(ids[:length] != tokens[:length])
    kept = int(different[0]) if different.size else length
    if ids[kept:].tolist() not in ([], [tokenizer.eos_token_id]):
        raise ValueError(
            f"the checkout's tokens are not those of the text {rendered.text!r}, so its spans "
            "cannot be placed"
        )
    starts, ends = token_places(
        tokenizer.added_tokens_decoder, rendered.text, tokens, encoding["offset_mapping"]
    )
    return starts, ends, kept
