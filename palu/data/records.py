"""Parse one record of a data file, field by field, into an `Example`."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from palu.data.spans import (
    CHARACTERS,
    UNITS,
    Span,
    as_objects,
    check_list,
    check_spans,
    check_text,
    integer,
    recount,
    shown,
)
from palu.storage.json_files import NotJSON, parse

USER, ASSISTANT = "user", "assistant"
SYSTEM = ("system", "developer")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who speaks, as the chat template knows it: `system`, `user`, `assistant`, `tool`.
        content: what is said; empty where an assistant only calls tools.
        spans: sensitive `(start, end)` character ranges of `content`, sorted.
        answer: whether it is an answer to be learned, forgotten or measured; else it is context.
            None means: where the assistant says something.
        extra: the message's other fields (`tool_calls`, `name`), which chat templates read.
    """

    role: str
    content: str
    spans: tuple[Span, ...] = ()
    answer: bool | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.answer is None:
            said = self.role == ASSISTANT and bool(self.content.strip())
            object.__setattr__(self, "answer", said)

    def message(self) -> dict[str, Any]:
        """Return the message as `apply_chat_template` takes it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with its answer, a plain document or a conversation, and the sensitive parts.

    Attributes:
        id: stable name: the record's own, or its row number in the file.
        question: None for a plain document; of a conversation the user's last turn before `answer`,
            empty where there is none.
        answer: the answer; the text of a plain document; the last answer of a conversation.
        spans: sensitive `(start, end)` character ranges of `answer`, sorted.
        extra: the record's remaining fields, untouched.
        turns: all turns of a conversation, or of a question and an answer where the question has
            spans too; else empty.
    """

    id: str
    question: str | None
    answer: str
    spans: tuple[Span, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    @classmethod
    def of_turns(cls, id: str, turns: Sequence[Turn], extra: dict[str, Any]) -> "Example":
        """Return a conversation; `question`, `answer` and `spans` are those of its last answer.

        Raises:
            ValueError: no turn is an answer.
        """
        answers = [number for number, turn in enumerate(turns) if turn.answer]
        if not answers:
            raise ValueError(f"no message of the {ASSISTANT!r} says something")
        last = turns[answers[-1]]
        asked = [turn.content for turn in turns[: answers[-1]] if turn.role == USER]
        question = asked[-1] if asked else ""
        return cls(id, question, last.content, last.spans, extra, tuple(turns))

    @property
    def texts(self) -> list[tuple[str, tuple[Span, ...]]]:
        """Every text of the example with its spans: of each turn; of question and answer; of the
        document."""
        if self.turns:
            return [(turn.content, turn.spans) for turn in self.turns]
        before = [] if self.question is None else [(self.question, ())]
        return [*before, (self.answer, self.spans)]

    def with_spans(self, spans: Sequence[Sequence[Span]]) -> "Example":
        """Return the example with other spans: one sequence for each of `texts`."""
        sorted_spans = [tuple(sorted(some)) for some in spans]
        turns = self.turns
        if not turns:
            if len(sorted_spans) == 1 or not sorted_spans[0]:
                return dataclasses.replace(self, spans=sorted_spans[-1])
            turns = (Turn(USER, self.question or ""), Turn(ASSISTANT, self.answer))
        pairs = zip(turns, sorted_spans, strict=True)
        marked = [dataclasses.replace(turn, spans=some) for turn, some in pairs]
        return self.of_turns(self.id, marked, self.extra)


def split_answers(example: Example) -> list[Example]:
    """Return one example for each answer of a conversation, in order: it ends there, and the turns
    before it are context without spans. What is no conversation is returned as it is.

    The ids are `id#1`, `id#2`, ... where there are several answers.
    """
    ends = [number for number, turn in enumerate(example.turns) if turn.answer]
    parts = []
    for count, end in enumerate(ends, 1):
        before = [dataclasses.replace(t, spans=(), answer=False) for t in example.turns[:end]]
        last = example.turns[end]
        name = example.id if len(ends) == 1 else f"{example.id}#{count}"
        part = Example.of_turns(name, [*before, last], example.extra)
        more = any(t.extra for t in part.turns) or example.extra.get("tools")
        if [t.role for t in part.turns] == [USER, ASSISTANT] and not more:
            part = dataclasses.replace(part, turns=())
        parts.append(part)
    return parts or [example]


class Marked(NamedTuple):
    """A text of a record, its spans in the order they were given, and what their offsets count in
    the file (one of `palu.data.spans.UNITS`)."""

    text: str
    spans: list[Span]
    unit: str


def parse_record(record: Any, row: int, *, require_spans: bool) -> tuple[Example, list[Marked]]:
    """Parse row `row` of a file: the example, and its texts (`Example.texts`) as they were marked.

    Raises:
        TypeError, ValueError: what is wrong, with the name of the field. (The caller adds file and
        row.)
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be an object with fields, got {type(record).__name__}")
    # Tables fill absent fields with None, so None means absent.
    fields = {key: record.get(key) for key in _FIELDS}
    rest = {key: value for key, value in record.items() if key not in _FIELDS}
    id = _id(fields["id"], row)
    if fields["messages"] is not None:
        names = ("question", "answer", "text", "target_words")
        rest |= {name: fields[name] for name in names if fields[name] is not None}
        turns, inside = _messages(fields["messages"])
        try:
            example = Example.of_turns(id, turns, rest)
        except ValueError as error:
            raise ValueError(f"field 'messages': {error}") from None
        marked = _marked_turns(fields["spans"], turns, inside, require_spans)
    else:
        texts = _question_and_answer(fields)
        if "answer" in texts and fields["text"] is not None:
            rest["text"] = fields["text"]
        *question, answer = texts.values()
        example = Example(id, question[0] if question else None, answer, (), rest)
        marked = _marked_texts(fields, texts, require_spans)
    return example.with_spans([text.spans for text in marked]), marked


_FIELDS = ("id", "question", "answer", "text", "messages", "spans", "target_words")


def _question_and_answer(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts `question` and `answer`, or `text`, of a record by their fields."""
    if fields["answer"] is None and fields["text"] is not None:
        if fields["question"] is not None:
            raise ValueError(
                "field 'answer' is missing beside 'question' (a plain document has 'text' alone)"
            )
        names = ("text",)
    else:
        names = ("question", "answer")
        for name in names:
            if fields[name] is None:
                raise ValueError(f"field {name!r} is missing (or 'text' for a plain document)")
    texts = {name: _text(name, fields[name]) for name in names}
    if not texts[names[-1]].strip():
        raise ValueError(f"field {names[-1]!r} is empty")
    return texts


def _messages(value: Any) -> tuple[list[Turn], list[Any]]:
    """Return the turns of a record without spans, and what each message says of its spans."""
    messages = _as_list("messages", value)
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise TypeError(f"field 'messages' must be a list of messages, got {shown(value)}")
    turns, inside = [], []
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise TypeError(
                f"field 'messages': {name} must be an object with 'role' and 'content', "
                f"got {shown(message)}"
            )
        given = {key: value for key, value in message.items() if value is not None}
        inside.append(given.pop("spans", None))
        turns.append(_turn(name, given))
    return turns, inside


def _turn(name: str, given: dict[str, Any]) -> Turn:
    """Return a message, without its spans and without what is None, as a turn."""
    name = f"field 'messages': {name}"
    calls = any(given.get(key) for key in ("tool_calls", "function_call"))
    for key in ("role", "content"):
        if key not in given and not (key == "content" and calls):
            raise ValueError(f"{name} has no {key!r}, only {', '.join(map(repr, given)) or 'None'}")
    role = check_text(f"{name} 'role'", given.pop("role"))
    # An assistant that only calls tools says None; a chat template may tell that from "".
    content = given.pop("content", None)
    extra = given | ({"content": None} if content is None else {})
    parts = content if isinstance(content, list) else []
    if len(parts) == 1 and isinstance(parts[0], Mapping) and parts[0].get("type") == "text":
        content = parts[0].get("text")
    content = check_text(f"{name} 'content'", "" if extra.get("content", "") is None else content)
    if role == ASSISTANT and not content.strip() and not calls:
        raise ValueError(f"{name} is empty: the {ASSISTANT!r} says nothing")
    return Turn(role, content, extra=extra)


def _text(name: str, value: Any) -> str:
    return check_text(f"field {name!r}", value)


def _id(value: Any, row: int) -> str:
    if value is None:
        return str(row)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise TypeError(f"field 'id' must be a string or an integer, got {shown(value)}")
    return check_text("field 'id'", str(value))


def _marked_texts(fields: Mapping[str, Any], texts: dict[str, str], required: bool) -> list[Marked]:
    """Return the texts of question and answer, or of a document, as a record marks them."""
    given = [name for name in ("spans", "target_words") if fields[name] is not None]
    if not given:
        if required:
            raise ValueError("field 'spans' is missing (or 'target_words', the released format)")
        return [Marked(text, [], CHARACTERS) for text in texts.values()]
    if len(given) == 2:
        raise ValueError("fields 'spans' and 'target_words' are both given: which one holds?")
    name, value = given[0], _as_list(given[0], fields[given[0]])
    names = list(texts)
    groups = _grouped(f"field {name!r}", value, len(names), lambda span: _text_of(span, names))
    marked = [
        # A document's text is called its answer in messages, as everywhere.
        _marked(f"field {name!r}", f"the {'question' if key == 'question' else 'answer'}", *group)
        for key, *group in zip(names, texts.values(), groups, strict=True)
    ]
    for number, span in enumerate(value):
        if name == "target_words" and (not isinstance(span, Mapping) or span.get("word") is None):
            raise ValueError(f"field {name!r}: spans[{number}] has no 'word': {shown(span)}")
    return marked


def _marked_turns(
    spans: Any, turns: Sequence[Turn], inside: Sequence[Any], required: bool
) -> list[Marked]:
    """Return the turns as a record's `spans` mark them, or those of its messages (`inside`)."""
    within = [number for number, some in enumerate(inside) if some is not None]
    if spans is None and not within and required:
        raise ValueError(
            "field 'spans' is missing: of the record, with the number of a message in each "
            "('turn', from 0), or of its messages"
        )
    if spans and any(inside):
        raise ValueError("the record and its messages both have 'spans': which ones hold?")
    marked = []
    if spans:
        value = _as_list("spans", spans)
        groups = _grouped("field 'spans'", value, len(turns), lambda span: _turn_of(span, turns))
        for number, (turn, group) in enumerate(zip(turns, groups, strict=True)):
            marked.append(_marked("field 'spans'", f"messages[{number}]", turn.content, group))
        return marked
    for number, turn in enumerate(turns):
        where = f"field 'messages': messages[{number}], 'spans'"
        value = [] if inside[number] is None else _as_list("spans", inside[number])
        (group,) = _grouped(where, value, 1, lambda span: 0)
        marked.append(_marked(where, "its content", turn.content, group))
    return marked


# Spans of one text, each with its number in the list that it was given in.
_Numbered = list[tuple[int, Any]]


def _grouped(where: str, value: Any, count: int, text_of: Callable[[Any], int]) -> list[_Numbered]:
    """Return the spans of each of `count` texts; `text_of` says which text a span is of."""
    groups: list[_Numbered] = [[] for _ in range(count)]
    try:
        for number, span in enumerate(check_list(value)):
            try:
                groups[text_of(span)].append((number, span))
            except (TypeError, ValueError) as error:
                raise ValueError(f"spans[{number}] {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    return groups


def _text_of(span: Any, names: Sequence[str]) -> int:
    """Return which of a record's texts a span is of: the last one, if it does not say."""
    said = span if isinstance(span, Mapping) else {}
    if (field := said.get("field")) is not None:
        if field not in names:
            raise ValueError(f"has 'field' {shown(field)}; it must be one of {', '.join(names)}")
        return names.index(field)
    if said.get("turn") is not None:
        return _number(said["turn"], len(names))
    return len(names) - 1


def _turn_of(span: Any, turns: Sequence[Turn]) -> int:
    if not isinstance(span, Mapping) or span.get("turn") is None:
        raise ValueError(f"has no 'turn', the number of its message from 0: {shown(span)}")
    return _number(span["turn"], len(turns))


def _number(turn: Any, count: int) -> int:
    if not 0 <= integer("'turn'", turn) < count:
        raise ValueError(f"has 'turn' {shown(turn)}; it must be 0 to {count - 1}")
    return int(turn)


def _marked(where: str, of: str, text: str, group: _Numbered) -> Marked:
    """Check the spans of one text. `where` and `of` are what messages call field and text."""
    numbers, value = [number for number, _ in group], [span for _, span in group]
    try:
        unit, placed = _placed(text, value)
        spans = check_spans(text, placed, of=of, numbers=numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    for (number, span), (start, end) in zip(group, spans, strict=True):
        for said in _said(span):
            if not _stands(text, start, end, said):
                raise ValueError(
                    f"{where}: spans[{number}] says {shown(said)}, but [{start}, {end}) of "
                    f"{of} is {shown(text[start:end])}"
                )
    return Marked(text, spans, unit)


def _as_list(name: str, value: Any) -> Any:
    """Return the spans of a field as a list: the released format is JSON text."""
    if name == "target_words" and isinstance(value, str):
        try:
            value = parse(value)
        except NotJSON as error:
            raise ValueError(f"field 'target_words' is not JSON: {error}") from None
    return as_objects(name, value)


def _said(span: Any) -> list[Any]:
    """Return the texts that a span says it covers."""
    if not isinstance(span, Mapping):
        return []
    return [span[key] for key in ("word", "text") if span.get(key) is not None]


def _stands(answer: str, start: int, end: int, text: Any) -> bool:
    return isinstance(text, str) and len(text) == end - start and answer.startswith(text, start)


def _placed(answer: str, value: Any) -> tuple[str, Any]:
    """Return the unit in which every span of a row covers the text that it says, and the spans
    in characters. Characters where there is none: then `value` as it is, for messages."""
    if answer.isascii() or not isinstance(value, Sequence) or not any(map(_said, value)):
        return CHARACTERS, value
    for unit in UNITS:
        try:
            spans = recount(answer, value, unit)
        except (TypeError, ValueError):
            continue
        pairs = zip(value, spans, strict=True)
        if all(_stands(answer, *ends, text) for span, ends in pairs for text in _said(span)):
            return unit, spans
    return CHARACTERS, value


def data_digest(examples: Sequence[Example]) -> str:
    """Return a hash of examples in their order: texts, spans and given paraphrases."""
    digest = hashlib.blake2b(digest_size=16, person=b"palu.attack")
    for example in examples:
        texts = [[text, [list(span) for span in spans]] for text, spans in example.texts]
        digest.update(
            json.dumps([example.question is None, texts, example.extra], default=str).encode()
        )
    return digest.hexdigest()
