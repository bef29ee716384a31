"""Label the tokens of a question and its answer from the answer's sensitive character spans."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from palu.data.roles import IGNORE, KEEP, eos_ids
from palu.data.spans import Span, check_spans, check_text, integer
from palu.data.template import Place, Rendered, Template
from palu.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabeledExample(dict):
    """The tokens of one example: a dict of `input_ids`, `labels` and `attention_mask` (lists of
    int, one length).

    It also unpacks into those three values, in that order: iterating gives the values; `keys()`,
    `items()`, `in`, `dict(example)` and `**example` are those of a dict.

    Attributes:
        lost_spans: spans of which at least one token was cut off by `max_length`.
        lost_tokens: tokens that were cut off; at least so many where the text was `too_long`.
        too_long: the text is much longer than `max_length` keeps, and only its beginning was
            tokenised.
        answer_start: index of the first answer token; the tokens before it are the exact prompt to
            generate from. The number of tokens when no answer token is left.
        left_out: turns of context in front that are left out since they do not fit.
        closed: whether the last token is the token that ends the answer (EOS or the template's end
            of turn).
    """

    def __init__(
        self,
        input_ids: list[int],
        labels: list[int],
        attention_mask: list[int],
        *,
        lost_spans: int = 0,
        lost_tokens: int = 0,
        too_long: bool = False,
        answer_start: int | None = None,
        closed: bool = False,
        left_out: int = 0,
    ):
        super().__init__(input_ids=input_ids, labels=labels, attention_mask=attention_mask)
        self.lost_spans = lost_spans
        self.lost_tokens = lost_tokens
        self.too_long = too_long
        self.answer_start = len(input_ids) if answer_start is None else answer_start
        self.closed = closed
        self.left_out = left_out

    def __iter__(self):
        return iter(self.values())

    def __reduce__(self):
        return type(self), tuple(self.values()), vars(self)


def label_example(
    tokenizer: "PreTrainedTokenizerBase",
    question: str | None,
    answer: str,
    spans: Sequence[Mapping[str, int] | Sequence[int]],
    *,
    max_length: int,
    template: Template | None = None,
) -> LabeledExample:
    """Tokenise one example and label its tokens.

    The text is rendered whole and tokenised once. A token is an answer token when it shares a
    character with the answer, and sensitive when it shares one with a span. Labels: prompt
    `IGNORE`; answer tokens `KEEP`, or their own id when sensitive; the token that ends the answer
    `KEEP`. EOS is never sensitive. What the template puts after that token is dropped. Without an
    end token in the template or the tokenizer the answer just ends.

    The first token of an example is never predicted. Where a span begins with it (a document, under
    a tokenizer that adds no BOS), BOS, or EOS where there is none, is put in front as prompt.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed).
        question: None for a plain document, which is `answer` alone, without template.
        answer: not empty.
        spans: `{"start": s, "end": e}` or `(s, e)`: character offsets into `answer`, end exclusive;
            any order, overlaps allowed.
        max_length: at most so many tokens, 2 or more; the rest is cut off, counted in `lost_tokens`
            and `lost_spans` and warned of.
        template: how question and answer are put together; `Template()` when None.

    Raises:
        TypeError: a slow tokenizer, or an argument of another type.
        ValueError: an empty answer; a span that is empty, outside the answer, only white space,
            without any token or at the first token under a tokenizer without BOS and EOS; a chat
            template that refuses or loses the system prompt, the question or the answer.
    """
    example = label_without_warning(
        tokenizer, question, answer, spans, max_length, template or Template()
    )
    if example.lost_tokens:
        at_least = "at least " if example.too_long else ""
        said = f"the example is cut at max_length={max_length}: {at_least}{example.lost_tokens} "
        said += "tokens are left out"
        if example.lost_spans:
            said += f"; {example.lost_spans} of {len(spans)} spans lost tokens to "
            said += f"max_length={max_length}"
        warnings.warn(said, stacklevel=2)
    return example


def label_without_warning(
    tokenizer: "PreTrainedTokenizerBase",
    question: str | None,
    answer: str,
    spans: Sequence[Mapping[str, int] | Sequence[int]],
    max_length: int,
    template: Template,
) -> LabeledExample:
    """`label_example` without its warning: who labels many examples warns once."""
    checked = _check_arguments(tokenizer, question, answer, spans, max_length, template)
    rendered = template.render(tokenizer, question, answer)
    added = (
        tokenizer.added_tokens_decoder
    )  # a property that builds thousands of objects in some tokenizers
    tokens, too_long = _first_tokens(tokenizer, added, rendered, max_length)
    ids, starts, ends = tokens
    # No kept token reaches beyond this character.
    seen = int(ends[:max_length].max()) if too_long else None
    placed = shift_spans(rendered, checked)
    if ids.size and any(overlapping(starts[:1], ends[:1], *span)[0] for span in placed):
        ids, starts, ends = led_by_special(tokenizer, ids, starts, ends)
    answer_tokens = np.flatnonzero(overlapping(starts, ends, rendered.start, rendered.end))
    if answer_tokens.size:
        first, after = int(answer_tokens[0]), int(answer_tokens[-1]) + 1
    elif too_long:
        first = after = len(ids)
    else:
        raise ValueError(f"the tokenizer makes no token of the answer {one_line(repr(answer))}")
    # A chat template says how a turn ends. In plain text only EOS ends an answer, whatever the
    # tokenizer adds by itself.
    rest = ids[after:]
    if rendered.chat and too_long:
        rest = encoded(tokenizer, added, rendered.text[rendered.end :], False)[0]
    closing = _closing_tokens(tokenizer, added, rest if rendered.chat else ids[:0])
    end_token = closing[-1:]
    if end_token and ids[after - 1] == end_token[0]:
        closing = []  # the answer's own text ends with it
    starts, ends = starts[:after], ends[:after]
    sensitive, lost_spans = place_spans(rendered.text, starts, ends, placed, max_length, seen=seen)

    ids = np.append(ids[:after], closing).astype(np.int64)
    sensitive = np.append(sensitive, np.zeros(len(closing), dtype=bool))
    sensitive &= ~np.isin(ids, [*eos_ids(tokenizer.eos_token_id), *end_token])
    labels = np.where(sensitive, ids, KEEP)
    labels[:first] = IGNORE
    full_length = len(ids)
    ids, labels = ids[:max_length].tolist(), labels[:max_length].tolist()
    return LabeledExample(
        ids,
        labels,
        [1] * len(ids),
        lost_spans=lost_spans,
        lost_tokens=max(0, full_length - max_length),
        too_long=too_long,
        answer_start=min(first, len(ids)),
        closed=bool(end_token) and full_length <= max_length,
    )


def _check_arguments(
    tokenizer: Any, question: Any, answer: Any, spans: Any, max_length: Any, template: Any
) -> list[Span]:
    """Return the checked spans; see `label_example` for what is raised."""
    check_fast(tokenizer)
    if question is not None:
        check_text("question", question)
    check_text("answer", answer)
    if not answer.strip():
        raise ValueError(f"answer must not be empty, got {answer!r}")
    check_limits(max_length, template)
    return check_spans(answer, spans)


def check_fast(tokenizer: Any) -> None:
    """Raise TypeError for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer must be a fast tokenizer, {type(tokenizer).__name__} is not one: placing "
            "spans takes the character offsets of its tokens, which slow tokenizers do not give"
        )


def check_limits(max_length: Any, template: Any) -> None:
    """Raise TypeError or ValueError for a wrong `max_length` or `template`."""
    if not isinstance(template, Template):
        raise TypeError(f"template must be a palu.Template, got {type(template).__name__}")
    if integer("max_length", max_length) < 2:
        raise ValueError(f"max_length must be 2 or more, got {max_length}")


def shift_spans(rendered: Rendered | Place, spans: Sequence[Span]) -> list[Span]:
    """Shift spans of a content to where it is in a rendered text."""
    shift = rendered.start - rendered.dropped
    return [
        (max(start + shift, rendered.start), min(end + shift, rendered.end)) for start, end in spans
    ]


def place_spans(
    text: str,
    starts: np.ndarray,
    ends: np.ndarray,
    spans: Sequence[Span],
    kept: int,
    *,
    seen: int | None = None,
) -> tuple[np.ndarray, int]:
    """Find the tokens that share a character with a span.

    Args:
        text: what the tokens were made of; `starts` and `ends` are their first and last-plus-one
            characters, `spans` count in it too.
        kept: how many tokens are kept.
        seen: a character from which on no token is kept or given; None where all are given.

    Returns:
        bool, a value a token; and how many spans lose tokens that are not kept.

    Raises:
        ValueError: a span has no token.
    """
    sensitive, lost = np.zeros(len(starts), dtype=bool), 0
    for number, (start, end) in enumerate(spans):
        if seen is not None and start >= seen:
            lost += 1
            continue
        covered = overlapping(starts, ends, start, end)
        if not covered.any():
            raise ValueError(
                f"spans[{number}], {text[start:end]!r}, cannot be forgotten: "
                "the tokenizer makes no token of it"
            )
        sensitive |= covered
        lost += bool(covered[kept:].any())
    return sensitive, lost


def overlapping(starts: np.ndarray, ends: np.ndarray, start: int, end: int) -> np.ndarray:
    """Return which tokens share a character with `[start, end)`.

    A token without width (white space, where a tokenizer's offsets leave it out) counts when it
    lies strictly inside.
    """
    return (starts < end) & (ends > start)


Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, first characters, last-plus-one


def _first_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    added: Mapping[int, Any],
    rendered: Rendered,
    max_length: int,
) -> tuple[Tokens, bool]:
    """Tokenise a text; of a long one the beginning, and True. The first `max_length` tokens are
    those of the whole text.

    A tokenizer looks at what is near a token, so they are settled when there are twice as many and
    the text cut at three places gives the same ones. Two of the cuts are neighbours: groups counted
    from the end of a text (of digits, say) differ there.
    """
    size = max(16 * max_length, 4096)
    # Cut only before the end of the answer, so that what closes it is cut off too.
    while 4 * size < len(rendered.text) and 2 * size + 1 < rendered.end:
        cuts = [
            encoded(tokenizer, added, rendered.text[:length], rendered.add_special_tokens)
            for length in (2 * size, size, size + 1)
        ]
        kept = [[part[:max_length] for part in tokens] for tokens in cuts]
        enough = all(len(tokens[0]) >= 2 * max_length for tokens in cuts)
        if enough and all(np.array_equal(kept[0], other) for other in kept[1:]):
            return cuts[0], True
        size *= 4
    return encoded(tokenizer, added, rendered.text, rendered.add_special_tokens), False


def encoded(
    tokenizer: "PreTrainedTokenizerBase",
    added: Mapping[int, Any],
    text: str,
    add_special_tokens: bool,
) -> Tokens:
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids = np.asarray(encoding["input_ids"], dtype=np.int64)
    return ids, *token_places(added, text, ids, encoding["offset_mapping"])


def token_places(
    added: Mapping[int, Any], text: str, ids: np.ndarray, offsets: Sequence
) -> tuple[np.ndarray, np.ndarray]:
    """Return first and last-plus-one character of every token of `text`, from a tokenizer's
    offsets.

    Added tokens with `lstrip` or `rstrip` (the roles of Phi-3) swallow the white space beside them,
    the answer's too: their places are those of their own text. `added` is the tokenizer's
    `added_tokens_decoder`.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    greedy = {number: t.content for number, t in added.items() if t.lstrip or t.rstrip}
    for position in np.flatnonzero(np.isin(ids, list(greedy))) if greedy else ():
        start, content = int(starts[position]), greedy[int(ids[position])]
        at = text.find(content, start, int(ends[position]))
        if at >= 0:
            starts[position], ends[position] = at, at + len(content)
    return starts, ends


def led_by_special(
    tokenizer: "PreTrainedTokenizerBase", ids: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put BOS, or EOS where there is none, in front of the tokens, so that the first of them is
    predicted."""
    lead = tokenizer.bos_token_id
    if lead is None:
        lead = next(iter(eos_ids(tokenizer.eos_token_id)), None)
    if lead is None:
        raise ValueError(
            "a span begins at the first token of the text, which is never predicted, and the "
            "tokenizer has neither a BOS nor an EOS token to put in front of it"
        )
    if ids[0] == lead:
        return ids, starts, ends
    return np.append(lead, ids), np.append(0, starts), np.append(0, ends)


def _closing_tokens(
    tokenizer: "PreTrainedTokenizerBase", added: Mapping[int, Any], rest: np.ndarray
) -> list[int]:
    """Return the tokens that end an answer, out of those that the template writes after it, see
    `closing_count`. EOS when there is no special one."""
    count = closing_count(rest, special_ids(tokenizer, added), eos_ids(tokenizer.eos_token_id))
    return rest[:count].tolist() if count else list(eos_ids(tokenizer.eos_token_id))


def special_ids(tokenizer: "PreTrainedTokenizerBase", added: Mapping[int, Any]) -> list[int]:
    """Return the ids of a tokenizer's special tokens, EOS among them."""
    special = {*tokenizer.all_special_ids, *eos_ids(tokenizer.eos_token_id)}
    return [*special, *(number for number, token in added.items() if token.special)]


def closing_count(rest: np.ndarray, special: Sequence[int], eos: Sequence[int]) -> int:
    """Return how many of the tokens that a template writes after an answer end it: up to the
    first special token, and on to EOS when that follows at once (some templates end a message and
    a turn). 0 when there is no special one."""
    is_special = np.isin(rest, special)
    if not is_special.any():
        return 0
    first = int(is_special.argmax())
    stretch = 1
    while first + stretch < len(rest) and is_special[first + stretch]:
        stretch += 1
    to_eos = np.flatnonzero(np.isin(rest[first : first + stretch], eos))
    return first + (int(to_eos[0]) if to_eos.size else 0) + 1
