"""Rows that are to be forgotten and kept at once, found by their texts or by their tokens."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from palu.data.files import local_path
from palu.data.records import ASSISTANT, SYSTEM, USER, Example
from palu.data.spans import shown


def without_overlap(
    retain: Sequence[Example], forget: Sequence[Example], *, files: tuple[str, str], drop: bool
) -> list[Example]:
    """Return the retain examples, with `drop` without those that the forget set has too.

    Questions and answers, or all turns of conversations, are compared without regard to case, white
    space and Unicode form. One warning tells how many are in both; `files` is what messages call
    retain and forget set.

    Raises:
        ValueError: all of them are.
    """
    name, other = files
    forgotten = {_key(example) for example in forget}
    both = [_key(example) in forgotten for example in retain]
    if all(both):
        paths = local_path(name), local_path(other)
        same = None not in paths and os.path.samefile(*paths)
        why = "it is the same file; " if same else ""
        raise ValueError(
            f"--retain {name}: every row is among the rows to forget of {other} ({why}questions "
            "and answers are compared), so nothing is left to keep"
        )
    if any(both):
        first = retain[both.index(True)].id
        done = "they are left out" if drop else "they are forgotten and kept at once"
        done += "" if drop else " (--drop-overlap leaves them out)"
        warnings.warn(
            f"{name}: {sum(both)} of {len(retain)} rows are among the rows to forget of {other}, "
            f"such as row {shown(first)}: {done}",
            stacklevel=2,
        )
    return [e for e, twice in zip(retain, both, strict=True) if not (drop and twice)]


def warn_of_overlap(retain: Any, forget: Any) -> None:
    """Warn once where rows of both sets of tokenised rows have the same `input_ids`.

    Rows that are all in both are no error here: someone who trains in Python may mean it.
    """
    forgotten = {_tokens(forget[number]) for number in range(len(forget))} - {None}
    both = [n for n in range(len(retain)) if _tokens(retain[n]) in forgotten]
    if both:
        warnings.warn(
            f"{len(both)} of {len(retain)} rows of retain_dataset have the input_ids of a row of "
            f"train_dataset, such as row {both[0]}: they are forgotten and kept at once",
            stacklevel=3,
        )


def _key(example: Example) -> tuple[tuple[str, str], ...]:
    """Return what is said and by whom, but for the system's turns, which are the operator's."""
    turns = [(turn.role, turn.content) for turn in example.turns if turn.role not in SYSTEM]
    if not turns:
        question = [] if example.question is None else [(USER, example.question)]
        turns = [*question, (ASSISTANT, example.answer)]
    return tuple((role, _normal(text)) for role, text in turns)


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _tokens(row: Any) -> bytes | None:
    """Return the tokens of a row without padding; None where a collator is to make them."""
    if "input_ids" not in row:
        return None
    ids = torch.as_tensor(row["input_ids"], dtype=torch.int64).flatten()
    if "attention_mask" in row:
        mask = torch.as_tensor(row["attention_mask"]).flatten().bool()
        ids = ids[mask] if mask.shape == ids.shape else ids
    return ids.cpu().numpy().tobytes()
