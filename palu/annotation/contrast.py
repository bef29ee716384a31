"""Find what a model learned from an answer: words that it expects and that a model which never saw
the answer does not.

For each word of an answer the log-probabilities of its tokens under both models are summed; the
difference is by how many nats the model to be changed knows the word better. A word's log-odds of
being part of a fact are those of its form and place (`palu.annotation.words`) and a share of its
nats; words above even odds that stand side by side make a run. Runs of which the model knows a word
better by the threshold are the spans. Texts are compared by characters, so the two models need not
have one tokenizer.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from palu.annotation.base import Found, texts_of
from palu.annotation.words import GAP, words
from palu.data.conversations import with_tools
from palu.data.labels import LabeledExample, check_fast, encoded, led_by_special, overlapping
from palu.data.records import Example, split_answers
from palu.data.roles import IGNORE, KEEP
from palu.data.spans import integer, shown
from palu.data.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"
"""Stands for the same model, without the record's context."""
THRESHOLD = 0.5
"""Nats by which a run must be known better: `docs/annotation.md` has the measurement."""
# Each nat of a word adds so much to its log-odds of being part of a fact, up to so many nats.
_EVIDENCE, _MOST = 0.15, 8.0

# What the answer follows where the record's context is left out.
_NO_CONTEXT = "..."
# Longest text in one forward pass, where the model takes longer ones.
_LONGEST = 2048

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


class Contrast:
    """An annotator: the words of answers that one model expects and another does not.

    The models are loaded one after the other, so that both need not fit in memory.

    Args:
        model: the model to be changed: a folder, or a model in eval mode with its tokenizer.
        other: a model that never saw the records, likewise: the base that `model` was tuned from;
            or "self": `model` without the record's context (the question, earlier turns).
        threshold: nats by which `model` must know a word of a run better.
        template: how questions and answers become text; what a folder's `palu.json` says, or
            `Template()`, when None.
        max_length: tokens in one forward pass, at least 16; longer texts are read in overlapping
            windows. What the model takes, 2,048 at the most, when None.
        batch_size: texts in a forward pass.
        dtype, device: as for `palu.models.loading.load_model`.
        report: called with (answers read, of how many); every answer is read twice.

    Raises:
        TypeError, ValueError, FileNotFoundError: an argument that cannot be used; names it.
    """

    name = "contrast"

    def __init__(
        self,
        model: str | Path | Loaded,
        other: str | Path | Loaded = SELF,
        *,
        threshold: float = THRESHOLD,
        template: Template | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        dtype: str | None = None,
        device: str | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < math.inf:
            raise ValueError(
                f"contrast threshold must be a number of nats above 0, got {shown(threshold)}"
            )
        if integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if max_length is not None and integer("max_length", max_length) < 16:
            raise ValueError(f"max_length must be 16 or more, got {max_length}")
        loading = {"template": template, "dtype": dtype, "device": device}
        self.model = _Reader(model, **loading)
        self.other = None if other == SELF else _Reader(other, **loading)
        if self.other is not None and self.other.same_as(self.model):
            raise ValueError(
                f"contrast: {self.other.label!r} is the model to be changed itself; name the model "
                f"that it was tuned from, or {SELF!r}"
            )
        self.threshold, self.report = float(threshold), report
        self.max_length, self.batch_size = max_length, batch_size
        self.settings = {
            "model": self.model.label,
            "other": SELF if self.other is None else self.other.label,
            "threshold": self.threshold,
        }

    def find(self, examples: Sequence[Example]) -> Iterable[list[Found]]:
        """Yield the spans in the answers of each example; see `Annotator`.

        Raises:
            ValueError: an example that a model's template cannot render, or, for "self", that has
                no context; names its id.
        """
        answers = [_answers(example) for example in examples]
        parts = [answer.part for some in answers for answer in some]
        numbers = iter(self.log_probabilities(parts))
        for some in answers:
            yield [
                Found(answer.text, start, end, -math.expm1(-ratio))
                for answer in some
                for start, end, ratio in runs(answer.part.answer, answer.context, *next(numbers))
                if ratio >= self.threshold
            ]

    def log_probabilities(self, parts: Sequence[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the log-probability of each character of each answer, under the model and under
        the other one: a token's, spread evenly over its characters that are no white space.

        Args:
            parts: examples of one answer each, see `palu.data.records.split_answers`.
        """
        contrasted = list(parts)
        if self.other is None:
            contrasted = [_without_context(part) for part in parts]
        total, done = len(parts) + len(contrasted), 0

        def report(read: int, _: int) -> None:
            if self.report is not None:
                self.report(done + read, total)

        other = self.other or self.model
        # Both are rendered before anything is computed.
        texts = self.model.texts(parts), other.texts(contrasted)
        model = self._read(self.model, parts, texts[0], report, keep=other is self.model)
        done = len(parts)
        contrast = self._read(other, contrasted, texts[1], report, keep=False)
        return list(zip(model, contrast, strict=True))

    def _read(
        self,
        reader: "_Reader",
        parts: Sequence[Example],
        texts: Sequence["_Text"],
        report: Callable[[int, int], None],
        *,
        keep: bool,
    ) -> list[np.ndarray]:
        """Return the log-probabilities of the characters of each answer under one model."""
        from palu.evaluation.inference import score_answers
        from palu.models.loading import check_token_ids

        if not texts:
            return []
        model = reader.load()
        longest = self.max_length or min(_LONGEST, _positions(model))
        windows = [(n, w) for n, text in enumerate(texts) for w in text.windows(longest)]
        rows = [window.row for _, window in windows]
        check_token_ids(model, reader.tokenizer, rows)

        def count(read: int, of: int) -> None:
            report(read * len(texts) // of, len(texts))

        scores = score_answers(
            model, reader.tokenizer, rows, batch_size=self.batch_size, report=count
        )
        values = [np.zeros(len(part.answer)) for part in parts]
        for (number, window), score in zip(windows, scores, strict=True):
            if not np.isfinite(score.nll).all():
                raise ValueError(
                    f"example {parts[number].id!r}: {reader.label!r} gives its answer "
                    "probabilities that are no numbers; try another dtype"
                )
            window.spread(-score.nll, parts[number].answer, values[number])
        del model
        if not keep:
            reader.free()
        return values


def runs(
    text: str, context: str, model: np.ndarray, other: np.ndarray
) -> list[tuple[int, int, float]]:
    """Return the runs of words in an answer that are likely to be part of a fact.

    Args:
        text: the answer.
        context: what was said before it.
        model, other: the log-probability of each character under both models.

    Returns:
        first and last-plus-one character of each run, and by how many nats the model knows its
        best word better than the other one.
    """
    known = np.concatenate([[0.0], np.cumsum(model - other)])
    found: list[tuple[int, int, float]] = []
    for word in words(text, context):
        nats = float(known[word.end] - known[word.start])
        if word.odds + _EVIDENCE * min(max(nats, 0.0), _MOST) < 0:
            continue
        if found and GAP.fullmatch(text, found[-1][1], word.start):
            start, _, best = found[-1]
            found[-1] = (start, word.end, max(best, nats))
        else:
            found.append((word.start, word.end, nats))
    return found


class _Answer(NamedTuple):
    """One answer of an example: the example that ends with it, the number of its text among
    `texts_of`, and what was said before."""

    part: Example
    text: int
    context: str


def _answers(example: Example) -> list[_Answer]:
    numbers = [n for n, text in enumerate(texts_of(example)) if text.answer]
    texts = [text.content for text in texts_of(example)]
    return [
        _Answer(part, number, "\n".join(texts[:number]))
        for part, number in zip(split_answers(example), numbers, strict=True)
    ]


def _without_context(part: Example) -> Example:
    if part.question is None:
        raise ValueError(
            f"example {part.id!r} is a plain document: contrast {SELF!r} compares an answer with "
            "and without its question, so name the model that this one was tuned from instead"
        )
    return dataclasses.replace(part, question=_NO_CONTEXT, turns=(), spans=())


class _Window(NamedTuple):
    """A stretch of a text that goes through a model at once.

    Attributes:
        row: its tokens; labels are -100 but for those that are scored.
        starts, ends: characters of the answer that each scored token covers.
    """

    row: LabeledExample
    starts: np.ndarray
    ends: np.ndarray

    def spread(self, values: np.ndarray, text: str, characters: np.ndarray) -> None:
        """Add the value of each scored token to its characters that are no white space."""
        for value, start, end in zip(values, self.starts, self.ends, strict=True):
            places = [at for at in range(start, end) if not text[at].isspace()]
            if places:
                characters[places] += value / len(places)


class _Text(NamedTuple):
    """The tokens of an answer and of what comes before it.

    Attributes:
        ids: int64.
        first: the first token of the answer.
        starts, ends: characters of the answer that each of its tokens covers.
    """

    ids: np.ndarray
    first: int
    starts: np.ndarray
    ends: np.ndarray

    def windows(self, longest: int) -> list[_Window]:
        """Return stretches of at most `longest` tokens that score each token of the answer once.

        All but the first one begin half a length, or more, before what they score.
        """
        count, found = len(self.ids), []
        at = max(1, self.first)  # the first token of a text is never predicted
        while at < count:
            end = min(count, max(at + longest // 2, longest))
            begin = max(0, end - longest)
            ids = self.ids[begin:end].tolist()
            labels = [IGNORE] * (at - begin) + [KEEP] * (end - at)
            scored = slice(at - self.first, end - self.first)
            row = LabeledExample(ids, labels, [1] * len(ids))
            found.append(_Window(row, self.starts[scored], self.ends[scored]))
            at = end
        return found


class _Reader:
    """A model that reads answers, loaded when it is needed."""

    def __init__(
        self,
        model: str | Path | Loaded,
        *,
        template: Template | None,
        dtype: str | None,
        device: str | None,
    ) -> None:
        from palu.models.loading import (
            folder_with,
            load_tokenizer,
            model_folder,
            resolve_device,
            resolve_dtype,
        )
        from palu.run_record import RECORD, choose_template

        resolve_dtype(dtype), resolve_device(device)
        self.dtype, self.device = dtype, device
        self.folder = self.loaded = None
        if isinstance(model, str | Path):
            self.folder = model_folder(model)
            self.label = str(model)
            self.tokenizer = load_tokenizer(model)
            template = template or choose_template(folder_with(RECORD, model))
        else:
            self.loaded, self.tokenizer = model
            self.label = type(self.loaded).__name__
        check_fast(self.tokenizer)
        self.template = template or Template()

    def same_as(self, other: "_Reader") -> bool:
        """Return whether both are one model."""
        if self.folder is None or other.folder is None:
            return self.loaded is other.loaded and self.loaded is not None
        return self.folder.resolve() == other.folder.resolve()

    def load(self) -> "PreTrainedModel":
        """Return the model."""
        from palu.models.loading import load_model

        if self.loaded is None:
            self.loaded = load_model(self.folder, self.dtype, self.device)
        return self.loaded

    def free(self) -> None:
        """Drop a model that can be loaded again."""
        if self.folder is not None:
            self.loaded = None
            gc.collect()

    def texts(self, parts: Iterable[Example]) -> list[_Text]:
        """Return the tokens of each answer. Raises ValueError with the id of the example."""
        found = []
        for part in parts:
            try:
                found.append(self._text(part))
            except (TypeError, ValueError) as error:
                raise ValueError(f"example {part.id!r}: {error}") from error
        return found

    def _text(self, part: Example) -> _Text:
        if part.turns:
            template = with_tools(self.template, part.extra.get("tools"))
            rendered = template.render_turns(self.tokenizer, part.turns)
            place = rendered.places[-1]
        else:
            rendered = place = self.template.render(self.tokenizer, part.question, part.answer)
        tokenizer, added = self.tokenizer, self.tokenizer.added_tokens_decoder
        ids, starts, ends = encoded(tokenizer, added, rendered.text, rendered.add_special_tokens)
        inside = overlapping(starts, ends, place.start, place.end)
        if inside[:1].any() and not (tokenizer.bos_token_id is None is tokenizer.eos_token_id):
            ids, starts, ends = led_by_special(tokenizer, ids, starts, ends)
            inside = overlapping(starts, ends, place.start, place.end)
        chosen = np.flatnonzero(inside)
        if not chosen.size:
            raise ValueError("the tokenizer makes no token of the answer")
        first, after = int(chosen[0]), int(chosen[-1]) + 1
        shift = place.dropped - place.start
        cut = [
            np.clip(side[first:after], place.start, place.end) + shift for side in (starts, ends)
        ]
        return _Text(ids[:after], first, *cut)


def _positions(model: Any) -> int:
    """Return how many tokens a model takes at once, as far as its config says."""
    config = model.config.get_text_config()
    said = getattr(config, "max_position_embeddings", None)
    return said if isinstance(said, int) and said >= 16 else _LONGEST
