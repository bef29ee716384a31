"""Label the tokens of whole conversations: every answer of one, and the spans of any turn."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from palu.data.labels import (
    LabeledExample,
    Tokens,
    check_fast,
    check_limits,
    closing_count,
    encoded,
    label_without_warning,
    led_by_special,
    overlapping,
    place_spans,
    shift_spans,
    special_ids,
)
from palu.data.records import SYSTEM, USER, Example, Turn
from palu.data.roles import IGNORE, KEEP, eos_ids
from palu.data.spans import shown
from palu.data.template import Place, RenderedTurns, Template
from palu.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def label_record(
    tokenizer: "PreTrainedTokenizerBase", example: Example, max_length: int, template: Template
) -> list[LabeledExample]:
    """Label an example of any kind, without warnings: one row, or several of a conversation that is
    longer than `max_length`.

    Raises:
        TypeError, ValueError: as `palu.label_example` and `label_conversation`.
    """
    if not example.turns:
        question, answer, spans = example.question, example.answer, example.spans
        return [label_without_warning(tokenizer, question, answer, spans, max_length, template)]
    return label_conversation(
        tokenizer,
        example.turns,
        max_length=max_length,
        template=template,
        tools=example.extra.get("tools"),
    )


def label_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    *,
    max_length: int,
    template: Template | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[LabeledExample]:
    """Tokenise a conversation and label its tokens, as `palu.label_example` does.

    The text is what `apply_chat_template` makes of all turns; it is tokenised once. Labels: `KEEP`
    for the tokens of every answer and those that end it; a token's own id where it shares a
    character with a span of any turn; `IGNORE` for the rest. What follows the last answer, or the
    last span, is dropped.

    A conversation of more than `max_length` tokens becomes several rows, in order, so that every
    answer and span is in one of them. Each row is a shorter conversation: the system turn, and the
    last exchanges (a user's turn and what follows it) that fit. Answers in the first half of such a
    row are context there, since an earlier row has more of what was said before them. Only within
    an exchange that is longer than `max_length` by itself tokens are lost: first the system turn is
    left out, then the end is cut off, counted in `lost_tokens` and `lost_spans`.

    Args:
        tokenizer: a fast tokenizer.
        turns: at least one of them an answer.
        max_length: at most so many tokens a row, 2 or more.
        template: `Template()` when None.
        tools: what the assistant may call, for the chat template.

    Raises:
        TypeError, ValueError: as `palu.label_example`, and as `Template.render_turns`; names the
            turn.
    """
    template = template or Template()
    check_fast(tokenizer)
    check_limits(max_length, template)
    template = with_tools(template, tools)
    names = [f"messages[{number}] ({turn.role})" for number, turn in enumerate(turns)]
    labeler = _Labeler(tokenizer, template, max_length)
    rows: list[LabeledExample] = []
    remaining = list(turns)
    while remaining:
        row, first = labeler.end_of(remaining, names[: len(remaining)])
        rows.insert(0, row)
        head = _head(remaining)
        wanted = [n for n in range(head, first) if remaining[n].answer or remaining[n].spans]
        remaining = remaining[: wanted[-1] + 1] if wanted else []
    return rows


def with_tools(template: Template, tools: Any) -> Template:
    """Return a template that hands the tools of a record to the chat template; itself where there
    are none. Raises TypeError for what is no list."""
    if tools is None:
        return template
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise TypeError(f"field 'tools' must be a list of tools, got {shown(tools)}")
    if not tools:
        return template
    variables = {**(template.chat_template_kwargs or {}), "tools": list(tools)}
    return dataclasses.replace(template, chat_template_kwargs=variables)


def _head(turns: Sequence[Turn]) -> int:
    """Return how many system turns a conversation begins with."""
    return next((n for n, turn in enumerate(turns) if turn.role not in SYSTEM), len(turns))


def _exchanges(turns: Sequence[Turn]) -> list[int]:
    """Return where exchanges begin: behind the system turns, and at each user's turn that follows
    another's."""
    head = _head(turns)
    later = range(head + 1, len(turns))
    own = [n for n in later if turns[n].role == USER and turns[n - 1].role != USER]
    return [head, *own]


class _Labeler:
    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, max_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        # A property that builds thousands of objects in some tokenizers.
        self.added = tokenizer.added_tokens_decoder
        self.special = special_ids(tokenizer, self.added)
        self.eos = eos_ids(tokenizer.eos_token_id)

    def end_of(self, turns: Sequence[Turn], names: Sequence[str]) -> tuple[LabeledExample, int]:
        """Return the last row of a conversation, and the first turn that is labelled in it."""
        row, length, begins = self.label(turns, names)
        if length <= self.max_length:
            return row, 0
        head = _head(turns)
        starts = [n for n in _exchanges(turns) if any(t.answer or t.spans for t in turns[n:])]
        # What is left is rendered anew and may take a few tokens more or less.
        guess = length - self.max_length + begins[head]
        for start in [n for n in starts if begins[n] >= guess] or starts[-1:]:
            chosen = [*range(head), *range(start, len(turns))]
            row, length, begins = self._label_some(turns, names, chosen)
            if length <= self.max_length:
                break
        lost_spans = 0
        if length > self.max_length and head:
            lost_spans = sum(len(turn.spans) for turn in turns[:head])
            chosen = chosen[head:]
            row, _, begins = self._label_some(turns, names, chosen)
        place = dict(zip(chosen, begins, strict=True))
        late = [n for n in starts if n in place and place[n] >= self.max_length // 2]
        first = min(late, default=starts[-1])
        context = [
            dataclasses.replace(turn, spans=(), answer=False) if head <= n < first else turn
            for n, turn in enumerate(turns)
        ]
        if any(turns[n] != context[n] for n in chosen):
            row, *_ = self._label_some(context, names, chosen)
        row.lost_spans += lost_spans
        row.left_out = len(turns) - len(chosen)
        return row, first

    def _label_some(
        self, turns: Sequence[Turn], names: Sequence[str], chosen: Sequence[int]
    ) -> tuple[LabeledExample, int, list[int]]:
        return self.label([turns[n] for n in chosen], [names[n] for n in chosen])

    def label(
        self, turns: Sequence[Turn], names: Sequence[str]
    ) -> tuple[LabeledExample, int, list[int]]:
        """Label a conversation.

        Returns:
            its first `max_length` tokens; how many there are; and the first token of each turn's
            content.
        """
        rendered = self.template.render_turns(self.tokenizer, turns, names=names)
        tokens = encoded(self.tokenizer, self.added, rendered.text, rendered.add_special_tokens)
        spans = [
            shift_spans(place, turn.spans) if place else []
            for place, turn in zip(rendered.places, turns, strict=True)
        ]
        if any(overlapping(*(x[:1] for x in tokens[1:]), *s).any() for some in spans for s in some):
            tokens = led_by_special(self.tokenizer, *tokens)
        ids, starts, ends = tokens

        sensitive, lost_spans = np.zeros(len(ids), dtype=bool), 0
        for name, some in zip(names, spans, strict=True):
            try:
                covered, lost = place_spans(rendered.text, starts, ends, some, self.max_length)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            sensitive |= covered
            lost_spans += lost
        labels = np.full(len(ids), IGNORE)
        stops = {*self.eos}
        kept, first, closed, appended = 0, len(ids), False, []
        for turn, name, place in zip(turns, names, rendered.places, strict=True):
            if not turn.answer:
                continue
            answer = self._answer(name, place, rendered, tokens)
            stops.update(answer.closing[-1:])
            labels[answer.first : answer.end] = KEEP
            first = min(first, answer.first)
            if answer.end >= kept:
                kept, closed, appended = answer.end, bool(answer.closing), answer.appended
        if sensitive[kept:].any():
            kept, closed, appended = int(np.flatnonzero(sensitive)[-1]) + 1, False, []
        labels = np.where(sensitive & ~np.isin(ids, list(stops)), ids, labels)
        ids = [*ids[:kept].tolist(), *appended]
        labels = [*labels[:kept].tolist(), *(KEEP for _ in appended)]
        row = LabeledExample(
            ids[: self.max_length],
            labels[: self.max_length],
            [1] * min(len(ids), self.max_length),
            lost_spans=lost_spans,
            lost_tokens=max(0, len(ids) - self.max_length),
            answer_start=min(first, len(ids), self.max_length),
            closed=closed and len(ids) <= self.max_length,
        )
        return row, len(ids), _begins(rendered, ends)

    def _answer(
        self, name: str, place: Place, rendered: RenderedTurns, tokens: Tokens
    ) -> "_Answer":
        ids, starts, ends = tokens
        own = np.flatnonzero(overlapping(starts, ends, place.start, place.end))
        if not own.size:
            text = rendered.text[place.start : place.end]
            raise ValueError(f"the tokenizer makes no token of {name}, {one_line(repr(text))}")
        first, after = int(own[0]), int(own[-1]) + 1
        # What ends an answer stands before the next turn's content.
        later = [p.start for p in rendered.places if p is not None and p.start >= place.end]
        bound = int(_first(ends[after:] > min(later))) + after if later else len(ids)
        rest = ids[after:bound] if rendered.chat else ids[:0]
        count = closing_count(rest, self.special, self.eos)
        closing = rest[:count].tolist()
        if not count and not later:  # no special token: EOS, as after a single answer
            closing = [*self.eos]
        if closing and ids[after - 1] == closing[-1]:  # the answer's own text ends with it
            return _Answer(first, after, closing, [])
        return _Answer(first, after + count, closing, [] if count else closing)


class _Answer(NamedTuple):
    """The tokens of an answer, from `first` to before `end`, with those of the text that end it.
    `closing` are the ones that end it, `appended` those of them that the text lacks."""

    first: int
    end: int
    closing: list[int]
    appended: list[int]


def _first(true: np.ndarray) -> int:
    return int(true.argmax()) if true.any() else len(true)


def _begins(rendered: RenderedTurns, ends: np.ndarray) -> list[int]:
    """Return the first token of each turn's content; of one whose place is not known, that of
    the next."""
    begins, following = [], len(ends)
    for place in reversed(rendered.places):
        following = following if place is None else _first(ends > place.start)
        begins.append(following)
    return begins[::-1]
