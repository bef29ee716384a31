"""Put question and answer together: by a chat template, or a line of text for models that have
none."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from palu.data.bounded import OutOfBounds, bounded
from palu.data.records import ASSISTANT, SYSTEM, USER, Turn
from palu.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACE = "{question}"
_DATE = "10 Apr 2025"
_DATE_FORMS = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y", "%Y/%m/%d", "%d.%m.%Y")
_DATE_FORMS += ("%A, %B %d, %Y", "%A, %d %B %Y", "%d-%b-%Y", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M")
# Variables that `apply_chat_template` or palu sets.
_TAKEN = ("conversation", "conversations", "messages", "chat_template", "add_generation_prompt")
_TAKEN += ("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation")
_TAKEN += ("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask")
_TAKEN += ("tokenizer_kwargs", "self", "date_string", "strftime_now", "raise_exception")


class Rendered(NamedTuple):
    """A rendered example. `text[start:end]` is the answer from its character `dropped` on
    (templates trim).
    """

    text: str
    start: int
    end: int
    dropped: int
    chat: bool
    add_special_tokens: bool


class Place(NamedTuple):
    """Where a turn's content is in a rendered text: `text[start:end]` is the content from its
    character `dropped` on (templates trim)."""

    start: int
    end: int
    dropped: int


class RenderedTurns(NamedTuple):
    """A rendered conversation. `places` has one for each turn; None where the template writes no
    content or, of context without spans, another one."""

    text: str
    places: tuple[Place | None, ...]
    chat: bool
    add_special_tokens: bool


@dataclasses.dataclass(frozen=True)
class Template:
    """How a question and its answer, or a conversation, become text.

    With a chat template the question is the user's turn and the answer the assistant's; `question`
    is not used. Without one, the text is `question` with the question filled in, a space (unless
    there is white space already), and the answer. A plain document (no question) is the answer
    alone.

    Attributes:
        system_prompt: the system turn of the chat template; an error where there is no chat
            template or it refuses one. A conversation's own system turn stands instead.
        date_string: handed to the chat template (Llama 3 writes it into the system turn and would
            otherwise write today's date), None to leave it out. It is also the day, at midnight,
            that `strftime_now` tells the template: 10 Apr 2025 where it is None.
        question: what a model without chat template reads; holds `{question}`.
        chat: whether to use the tokenizer's chat template; None uses it when there is one.
        chat_template_kwargs: more variables of the chat template, as a JSON object:
            `{"enable_thinking": False}`; an error where it has no such variable.
    """

    system_prompt: str | None = None
    date_string: str | None = _DATE
    question: str = "Question: {question}\nAnswer:"
    chat: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        for name in ("system_prompt", "date_string"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a str or None, got {value!r}")
        if not isinstance(self.question, str):
            raise TypeError(f"question must be a str, got {self.question!r}")
        if self.question.count(_PLACE) != 1:
            raise ValueError(f"question must hold {_PLACE} once, got {self.question!r}")
        if self.chat is not None and not isinstance(self.chat, bool):
            raise TypeError(f"chat must be True, False or None, got {self.chat!r}")
        object.__setattr__(self, "chat_template_kwargs", _variables(self.chat_template_kwargs))

    def __repr__(self) -> str:
        # Reference caches store this text: those made before chat_template_kwargs must still match.
        names = [field.name for field in dataclasses.fields(self)]
        shown = [n for n in names if n != "chat_template_kwargs" or self.chat_template_kwargs]
        return f"Template({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Template":
        """Invert `to_dict`. Missing settings take their default, unknown ones are a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"a template has no setting {unknown[0]!r}, only {', '.join(known)}")
        return cls(**settings)

    def prompt(self, tokenizer: "PreTrainedTokenizerBase", question: str | None) -> str:
        """Return the text before the answer, without the spaces that belong to the answer's
        first token.

        It is what a person reads or sends to a server. For the very tokens that an example was
        trained with, take those before `LabeledExample.answer_start`. Tokenise it with
        `add_special_tokens=False` where a chat template made it.
        """
        if question is None:
            return ""
        if self._uses_chat(tokenizer):
            return self._around(tokenizer, question)[0].rstrip(" ")
        return self._plain(question).rstrip(" ")

    def render(
        self, tokenizer: "PreTrainedTokenizerBase", question: str | None, answer: str
    ) -> Rendered:
        """Render a whole example and find the answer in it.

        Raises:
            ValueError: the chat template is missing, refuses the turns, leaves out the system
                prompt or the question, or changes the answer by more than trimming it.
        """
        if question is None:
            return Rendered(answer, 0, len(answer), 0, False, _needs_bos(tokenizer, answer))
        if not self._uses_chat(tokenizer):
            before = self._plain(question)
            if not (before[-1:].isspace() or answer[:1].isspace()):
                before += " "
            text = before + answer
            return Rendered(text, len(before), len(text), 0, False, _needs_bos(tokenizer, text))

        before, after = self._around(tokenizer, question)
        messages = self._messages(question, answer)
        text = self._chat(tokenizer, messages)
        place = _placed(text, before, answer, after)
        if place is None:
            if text != self._chat(tokenizer, messages):
                raise ValueError("the chat template writes another text each time")
            kept = text[len(before) : max(len(before), len(text) - len(after))]
            raise ValueError(
                "the chat template changes the answer, so its spans cannot be placed: "
                f"{_shown(answer)} became {_shown(kept)}"
            )
        return Rendered(text, *place, True, False)

    def render_turns(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        turns: Sequence[Turn],
        *,
        names: Sequence[str] | None = None,
    ) -> RenderedTurns:
        """Render a conversation as `apply_chat_template` does, and find its turns in the text.

        Args:
            names: what messages call the turns; `messages[0] (user)`, ... when None.

        Raises:
            ValueError: there is no chat template, and the turns are no question with its answer;
                it refuses a turn, leaves out one, or changes one that is an answer, has spans or is
                the user's by more than trimming it. Names the turn.
        """
        names = names or [f"messages[{n}] ({turn.role})" for n, turn in enumerate(turns)]
        if not self._uses_chat(tokenizer):
            return self._plain_turns(tokenizer, turns)
        messages = [turn.message() for turn in turns]
        added = self.system_prompt is not None and not any(t.role in SYSTEM for t in turns)
        if added:
            turns = [Turn(SYSTEM[0], self.system_prompt or ""), *turns]
            messages.insert(0, turns[0].message())
            names = ["system_prompt", *names]
        text = self._conversation(tokenizer, messages, names)
        stand_in = "palu-turn"
        while stand_in in text:
            stand_in += "-x"
        places = self._places(tokenizer, messages, turns, text, stand_in) or [
            self._place_of(tokenizer, messages, number, turn, names[number], text, stand_in)
            for number, turn in enumerate(turns)
        ]
        return RenderedTurns(text, tuple(places[added:]), True, False)

    def _plain_turns(
        self, tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn]
    ) -> RenderedTurns:
        roles = [turn.role for turn in turns]
        if roles != [USER, ASSISTANT]:
            raise ValueError(
                f"a conversation ({', '.join(roles)}) needs a chat template, which this tokenizer "
                "lacks or chat=False leaves aside; without one there can be one question and its "
                "answer"
            )
        question, answer = (turn.content for turn in turns)
        text, start, end, *_, special = self.render(tokenizer, question, answer)
        asked = self.question.index(_PLACE)
        places = (Place(asked, asked + len(question), 0), Place(start, end, 0))
        return RenderedTurns(text, places, False, special)

    def _conversation(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        names: Sequence[str],
    ) -> str:
        """Return the text of a conversation; name the turn that the chat template refuses."""
        try:
            return self._chat(tokenizer, messages, "a conversation")
        except ValueError as error:
            if error.__cause__ is None:  # it is not the template that refuses
                raise
            first = len(messages) - 1  # the last one of those without which it is not refused
            while first:
                try:
                    self._chat(tokenizer, messages[:first], "")
                    break
                except ValueError:
                    first -= 1
            why = one_line(error.__cause__)
            raise ValueError(f"the chat template refuses {names[first]}: {why}") from error

    def _places(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        turns: Sequence[Turn],
        text: str,
        stand_in: str,
    ) -> list[Place | None] | None:
        """Return where all turns are. None unless the template writes around stand-ins for all of
        them what it writes around their contents (or those without outer white space), as most do:
        then every turn takes a rendering of its own."""
        marks = {n: f"{stand_in}-{n:09}-" for n, turn in enumerate(turns) if turn.content.strip()}
        others = [{**m, "content": marks[n]} if n in marks else m for n, m in enumerate(messages)]
        try:
            other = self._chat(tokenizer, others, "a conversation")
        except ValueError:
            return None
        if any(other.count(mark) != 1 for mark in marks.values()):
            return None
        order = sorted(marks, key=lambda number: other.index(marks[number]))
        between = re.split("|".join(map(re.escape, marks.values())), other) if marks else [other]
        for change in (str, str.strip):
            contents = [change(turns[number].content) for number in order]
            pieces = [between[0]]
            for content, behind in zip(contents, between[1:], strict=True):
                pieces += [content, behind]
            if "".join(pieces) != text:
                continue
            places: list[Place | None] = [None] * len(turns)
            ends = list(itertools.accumulate(map(len, pieces)))
            for number, content, end in zip(order, contents, ends[1::2], strict=True):
                dropped = _leading_space(turns[number].content) if change is str.strip else 0
                places[number] = Place(end - len(content), end, dropped)
            return places
        return None

    def _place_of(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        number: int,
        turn: Turn,
        name: str,
        text: str,
        stand_in: str,
    ) -> Place | None:
        """Return where a turn is in the text of a conversation: a stand-in is rendered in its
        place and looked for, for the reason that `_around` gives."""
        if not turn.content.strip():
            return None
        others = [*messages]
        others[number] = {**messages[number], "content": stand_in}
        other = self._chat(tokenizer, others, "a conversation")
        place = None
        if other.count(stand_in) == 1:
            before, after = other.split(stand_in)
            place = _placed(text, before, turn.content, after)
        needed = turn.answer or turn.spans
        if place is not None or (not needed and self._is_there(turn, text, other, stand_in)):
            return place
        context_of_system = not needed and turn.role in SYSTEM
        if context_of_system and self._is_a_switch(tokenizer, messages, number, text):
            return None
        if text != self._chat(tokenizer, messages, "a conversation"):
            raise ValueError("the chat template writes another text each time")
        hint = ""
        if turn.role == ASSISTANT and "</think>" in turn.content:
            hint = " (it keeps no thoughts there: leave them out of the record)"
        raise ValueError(
            f"the chat template leaves out or changes {name}, so it cannot be labelled: "
            f"{_shown(turn.content)}{hint}"
        )

    @staticmethod
    def _is_there(turn: Turn, text: str, other: str, stand_in: str) -> bool:
        """Return whether the template writes a turn of context. What others than user and system
        say it may change (a tool's result becomes JSON, earlier thoughts go)."""
        changeable = turn.role not in (USER, *SYSTEM)
        return stand_in in other and (changeable or turn.content.strip() in text)

    def _day(self) -> datetime | None:
        """Return the day that `strftime_now` tells; None where `date_string` names none."""
        if self.date_string is None:
            return _DAY
        for form in _DATE_FORMS:
            try:
                return datetime.strptime(self.date_string.strip(), form)
            except ValueError:
                continue
        return None

    def _plain(self, question: str) -> str:
        for name in ("system_prompt", "chat_template_kwargs"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} needs a chat template, which this tokenizer lacks or chat=False "
                    "leaves aside; write what it should say into the template's question instead"
                )
        return self.question.replace(_PLACE, question)

    def _uses_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        has_one = bool(getattr(tokenizer, "chat_template", None))
        if self.chat and not has_one:
            raise ValueError("chat=True, but this tokenizer has no chat template")
        return has_one if self.chat is None else self.chat

    def _around(self, tokenizer: "PreTrainedTokenizerBase", question: str) -> tuple[str, str]:
        """Return what the chat template writes before and after the answer.

        A stand-in is rendered in the answer's place and looked for. Looking for the answer itself
        would go wrong where it is short and the template writes text of its own in front of it (an
        empty thinking block, say).
        """
        stand_in = "palu-answer"
        while stand_in in question or stand_in in (self.system_prompt or ""):
            stand_in += "-x"
        messages = self._messages(question, stand_in)
        text = self._chat(tokenizer, messages)
        if text.count(stand_in) != 1:
            raise ValueError(
                f"the chat template writes the answer {text.count(stand_in)} times, not once: "
                f"{_shown(text)}"
            )
        before, after = text.split(stand_in)
        for name, content in (("system_prompt", self.system_prompt), ("question", question)):
            if content is None or content.strip() in before:
                continue
            if name == "system_prompt" and self._is_a_switch(tokenizer, messages, 0, text):
                continue
            raise ValueError(
                f"the chat template leaves out or changes the {name} {_shown(content)}: it wrote "
                f"{_shown(before)}"
            )
        return before, after

    def _is_a_switch(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        number: int,
        text: str,
    ) -> bool:
        """Return whether the chat template obeys a system turn instead of writing it
        (`/no_think`): it writes other text than without one, and than with another one that it
        leaves out too."""
        other = {"role": messages[number]["role"], "content": "palu-system"}
        for turn in ([], [other]):
            try:
                changed = [*messages[:number], *turn, *messages[number + 1 :]]
                if self._chat(tokenizer, changed) == text:
                    return False
            except ValueError:
                if turn:
                    return False
        return True

    def _messages(self, question: str, answer: str) -> list[dict[str, Any]]:
        turns = [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": SYSTEM[0], "content": self.system_prompt})
        return turns

    def _chat(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: list[dict[str, Any]],
        what: str | None = None,
    ) -> str:
        if what is None:
            has = "with" if messages[0]["role"] in SYSTEM else "without"
            what = f"a question and answer {has} a system prompt"
        variables = dict(self.chat_template_kwargs or {})
        if self.date_string is not None:
            variables["date_string"] = self.date_string
        day = self._day()
        text = _rendered(tokenizer, messages, day or _DAY, variables, what)
        if day is None and text != _rendered(tokenizer, messages, _OTHER_DAY, variables, what):
            raise ValueError(
                f"the chat template writes a date, and date_string {self.date_string!r} is none "
                f"that can be read; write it like {_DATE!r}"
            )
        return text


def _rendered(
    tokenizer: "PreTrainedTokenizerBase",
    turns: list[dict[str, Any]],
    day: datetime,
    variables: dict[str, Any],
    what: str,
) -> str:
    try:
        source = tokenizer.get_chat_template(tools=variables.get("tools"))
        unknown = [
            name
            for name in variables
            if name != "date_string" and not re.search(rf"\b{re.escape(name)}\b", source)
        ]
        if not unknown:
            clock = _clock(day) if "strftime_now" in source else ""
            with bounded():
                return tokenizer.apply_chat_template(
                    turns, chat_template=clock + source, tokenize=False, **variables
                )
    except (Exception, OutOfBounds) as error:  # a template is a program and may raise anything
        raise ValueError(f"the chat template refuses {what}: {one_line(error)}") from error
    where = (
        "the record or chat_template_kwargs" if unknown[0] == "tools" else "chat_template_kwargs"
    )
    raise ValueError(
        f"{where} has {unknown[0]!r}, and this tokenizer's chat template no such variable"
    )


def _variables(given: Any) -> dict[str, Any] | None:
    """Check `chat_template_kwargs`; return a copy, as JSON reads it back."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(
            f"chat_template_kwargs must be a JSON object of names and values, got {given!r}"
        )
    for name in given:
        if name in _TAKEN:
            raise ValueError(f"chat_template_kwargs must not have {name!r}: palu sets it itself")
    try:
        copy = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"chat_template_kwargs must hold JSON values: {error}") from None
    return copy or None


_DAY = datetime(2025, 4, 10)
_OTHER_DAY = datetime(2001, 12, 31, 23, 59, 59)


@functools.lru_cache
def _clock(day: datetime) -> str:
    """Return a `strftime_now` in Jinja that always tells `day`.

    transformers gives templates one that tells the time; newer versions let no function of ours
    through, and its table of compiled templates is shared by all threads.
    """
    codes = [
        flag + letter for letter in "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZ" for flag in _FLAGS
    ]
    told = {"%" + code: day.strftime("%" + code) for code in codes}
    table = json.dumps({code: text for code, text in told.items() if text != code})
    # `trim_blocks` drops the final line feed: the template still starts at a line beginning.
    return (
        "{%- macro strftime_now(format) %}{%- for part in format.split('%%') %}"
        "{%- set told = namespace(text=part) %}"
        f"{{%- for code, text in {table}.items() %}}"
        "{%- set told.text = told.text.replace(code, text) %}{%- endfor %}"
        "{{- told.text }}{{- '' if loop.last else '%' }}{%- endfor %}{%- endmacro %}\n"
    )


_FLAGS = ("", "-", "_", "0", "^", "#")


def _placed(text: str, before: str, content: str, after: str) -> Place | None:
    """Return where a content is in a text, which has `before` and `after` around a stand-in for it;
    None where it is not there or changed by more than trimming it."""
    kept = text[len(before) : max(len(before), len(text) - len(after))]
    # Templates trim: what is kept begins at this character of the content.
    dropped = _leading_space(content) - _leading_space(kept)
    same = dropped >= 0 and kept.strip() == content.strip() and content[dropped:].startswith(kept)
    if same and text == before + kept + after:
        return Place(len(before), len(before) + len(kept), dropped)
    # The template leaves out the end of what it writes before others: the content brings its own
    # (`<think>...</think>`, Qwen3).
    bare = content.strip()
    start = len(text) - len(after) - len(bare)
    if start >= 0 and text[start:] == bare + after and before.startswith(text[:start]):
        return Place(start, start + len(bare), _leading_space(content))
    return None


def _shown(text: str) -> str:
    return one_line(repr(text))


def _leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())


def _needs_bos(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Return whether the tokenizer should add its special tokens: not when the text has the
    first of them already."""
    bos = getattr(tokenizer, "bos_token", None)
    return not (bos and text.startswith(bos))
