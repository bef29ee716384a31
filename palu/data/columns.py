"""Which columns of a record mean what: the layouts that data come in, made one.

Whatever a record has besides stays in it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from palu.data.records import SYSTEM
from palu.data.spans import as_objects, check_text, integer, shown
from palu.storage.json_files import NotJSON, parse

QUESTION, ANSWER, TEXT, MESSAGES, SPANS = "question", "answer", "text", "messages", "spans"
_CONTENT = (QUESTION, ANSWER, TEXT, MESSAGES)
FIELDS = (*_CONTENT, "id", SPANS, "target_words", "paraphrased_answer", "perturbed_answer")
FIELDS += ("alternate_answer",)


class Layout(NamedTuple):
    """Columns that belong together, the answer (or the whole) last."""

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(self.columns)


# In the order in which they are looked for.
QA = Layout((QUESTION, ANSWER))
DOCUMENT = Layout((TEXT,))
CHAT = Layout((MESSAGES,))
SHAREGPT = Layout(("conversations",))
COMPLETION = Layout(("prompt", "completion"))
ALPACA = Layout(("instruction", "output"), ("input",))
MUSE = Layout(("prompt", "gt"))
RWKU = Layout(("query", ANSWER))
LAYOUTS = (QA, CHAT, SHAREGPT, COMPLETION, ALPACA, MUSE, RWKU, DOCUMENT)

_ROLES = {
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "function_call"),
    "tool": ("tool", "function", "function_response", "observation", "ipython"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}


def parse_columns(columns: Mapping[str, str] | str | None) -> dict[str, str] | None:
    """Return which column each field stands in; None where nothing was said.

    Args:
        columns: field -> column, or text as the command line has it: `question=q,answer=a`.

    Raises:
        ValueError, TypeError: it is neither, or names a field that there is not.
    """
    if columns is None or isinstance(columns, Mapping):
        named = None if columns is None else dict(columns)
    elif isinstance(columns, str):
        pairs = [part.partition("=") for part in columns.split(",")]
        if not all(field.strip() and column.strip() for field, _, column in pairs):
            raise ValueError(
                "columns must be FIELD=COLUMN with commas between them, such as "
                f"question=prompt,answer=reply, got {shown(columns)}"
            )
        named = {field.strip(): column.strip() for field, _, column in pairs}
        if len(named) < len(pairs):
            raise ValueError(f"columns names a field twice: {shown(columns)}")
    else:
        raise TypeError(f"columns must be field -> column, got {shown(columns)}")
    for field, column in (named or {}).items():
        if field not in FIELDS:
            raise ValueError(
                f"columns has no field {shown(field)}; it must be one of {', '.join(FIELDS)}"
            )
        if not isinstance(column, str):
            raise TypeError(f"columns: {field} must be the name of a column, got {shown(column)}")
    kinds = [[f for f in part if f in (named or {})] for part in ((QUESTION, ANSWER), *_ALONE)]
    if len([kind for kind in kinds if kind]) > 1:
        raise ValueError(
            f"columns names {', '.join(f for kind in kinds for f in kind)}; a record is a question "
            "and an answer, or messages, or a text"
        )
    return named or None


_ALONE = ((MESSAGES,), (TEXT,))


def canonical(
    record: Any, columns: Mapping[str, str] | None = None, found: str = "record"
) -> tuple[dict[str, Any], Layout | None]:
    """Return a record with the fields that `palu.data.records.parse_record` reads (`question` and
    `answer`, `messages`, or `text`) and the layout that it had (None: none that is known).

    Args:
        columns: field -> column, for layouts that are not known.
        found: the format that it was read from, for messages.

    Raises:
        ValueError, TypeError: a column that is named is not there, two layouts say different
            things, or a conversation is none; names the field.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be an object with fields, got {type(record).__name__}")
    record = dict(record)
    if columns is not None:
        record, layout = _renamed(record, columns, found)
    else:
        layout = _layout_of(record, found)
    for name in (SPANS, "perturbed_answer"):
        if isinstance(record.get(name), str) and record[name].lstrip().startswith(("[", "{")):
            record[name] = _json(name, record[name])  # of a CSV
    fields = {} if layout is None else {name: record.pop(name) for name in layout.columns}
    if layout is ALPACA:
        below = record.pop("input", None)
        fields = {QUESTION: _joined(fields["instruction"], below), ANSWER: fields["output"]}
    elif layout is COMPLETION and isinstance(fields["completion"], list):
        fields = {MESSAGES: [t for name in layout.columns for t in _as_turns(name, fields[name])]}
    elif layout in (COMPLETION, MUSE, RWKU):
        fields = dict(zip(QA.columns, fields.values(), strict=True))
    elif layout in (CHAT, SHAREGPT):
        ((name, value),) = fields.items()
        fields = {MESSAGES: _as_turns(name, value)}
        _put_system_first(fields[MESSAGES], record)
    # What is left under such a name is none of the record's content.
    aside = {n for n in _CONTENT if layout and n not in fields and record.get(n) is not None}
    if layout is not None and (ANSWER in fields or MESSAGES in fields):
        aside.discard(TEXT)
    rest = {f"original_{name}" if name in aside else name: v for name, v in record.items()}
    return fields | rest, layout


def _layout_of(record: Mapping[str, Any], found_in: str) -> Layout | None:
    # Tables fill absent fields with None, so None means absent.
    has = {name for name, value in record.items() if value is not None}
    found = [layout for layout in LAYOUTS if has.issuperset(layout.columns)]
    others = [one for one in found[1:] if one.columns[-1] not in (TEXT, found[0].columns[-1])]
    if others:
        raise ValueError(
            f"there are both {found[0]} and {others[0]}: name what holds, such as "
            f"--columns {_naming(found[0])}"
        )
    if found and not (found[0] is DOCUMENT and QUESTION in has):
        return found[0]
    if has & {QUESTION, ANSWER, TEXT} or not has - {"id", SPANS, "target_words"}:
        return None  # `parse_record` says what is missing
    for layout in LAYOUTS:
        missing = [name for name in layout.columns if name not in has]
        if len(missing) < len(layout.columns):
            there = "/".join(name for name in layout.columns if name in has)
            raise ValueError(f"field {missing[0]!r} is missing beside {there!r}")
    raise ValueError(
        f"{found_in} with the columns {_listed(record)}, and question/answer, messages or text was "
        f"expected (also {', '.join(str(one) for one in LAYOUTS[2:-1])}); name them with "
        "--columns question=...,answer=..."
    )


def _naming(layout: Layout) -> str:
    targets = (QUESTION, ANSWER) if len(layout.columns) > 1 else (MESSAGES,)
    return ",".join(f"{field}={name}" for field, name in zip(targets, layout.columns, strict=True))


def _listed(record: Mapping[str, Any]) -> str:
    names = [shown(name) for name in record]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _renamed(
    record: dict[str, Any], columns: Mapping[str, str], found: str
) -> tuple[dict[str, Any], Layout | None]:
    """Return the record with the columns under the names of their fields; what had these names
    before has `original_` before it."""
    for field, column in columns.items():
        if column not in record:
            raise ValueError(
                f"there is no column {column!r} for the field {field!r}; the columns are "
                f"{_listed(record)}"
            )
    taken = {*columns.values()}
    fields = {field: record[column] for field, column in columns.items()}
    rest = {name: value for name, value in record.items() if name not in taken}
    rest = {f"original_{n}" if n in fields else n: value for n, value in rest.items()}
    if not fields.keys() & {*_CONTENT}:
        return fields | rest, _layout_of(fields | rest, found)
    kinds = ((CHAT, {MESSAGES}), (DOCUMENT, {TEXT}), (QA, {QUESTION, ANSWER}))
    layout = next(one for one, names in kinds if fields.keys() & names)
    merged = fields | rest
    absent = any(merged.get(name) is None for name in layout.columns)
    return merged, None if absent else layout


def _joined(instruction: Any, below: Any) -> Any:
    """Return the instruction with its input under it; what is no text stays, for messages."""
    if below is None or below == "":
        return instruction
    return check_text("field 'instruction'", instruction) + "\n\n" + check_text("'input'", below)


# ---- conversations -------------------------------------------------------------------------------


def _json(name: str, text: str) -> Any:
    try:
        return parse(text)
    except NotJSON as error:
        raise ValueError(f"field {name!r} is not JSON: {error}") from None


def _as_turns(name: str, value: Any) -> list[dict[str, Any]]:
    """Return a conversation as a list of `{"role", "content", ...}` with texts as contents."""
    if isinstance(value, str):
        value = _json(name, value)
    value = as_objects(name, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"field {name!r} must be a list of messages, got {shown(value)}")
    return [_turn(f"field {name!r}: {name}[{n}]", message) for n, message in enumerate(value)]


def _turn(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{name} must be an object with 'role' and 'content', got {shown(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "role" not in given:  # ShareGPT
        role, content = given.pop("from"), given.pop("value", None)
        if not isinstance(role, str) or role.lower() not in _ROLE_OF:
            raise ValueError(
                f"{name}: 'from' must be one of {', '.join(_ROLE_OF)}, got {shown(role)}"
            )
        if content is None:
            raise ValueError(f"{name} has no 'value': {shown(dict(message))}")
        given = {"role": _ROLE_OF[role.lower()], "content": content, **given}
    if isinstance(given.get("content"), list):
        given["content"] = _joined_parts(f"{name}: content", given["content"])
    return given


def _joined_parts(name: str, parts: list[Any]) -> str:
    """Return the text of a message whose parts stand apart."""
    texts = []
    for part in parts:
        text = part
        if isinstance(part, Mapping):
            if part.get("type", "text") not in (None, "text"):
                raise ValueError(
                    f"{name} has a part of type {shown(part['type'])}, and only text is read"
                )
            text = part.get("text")
        texts.append(check_text(name, text))
    return "".join(texts)


def _put_system_first(turns: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Move the system prompt that some files have beside the conversation into it."""
    system = record.get("system")
    begun = bool(turns) and turns[0].get("role") in SYSTEM
    if not isinstance(system, str) or not system.strip() or begun:
        return
    turns.insert(0, {"role": "system", "content": record.pop("system")})
    spans = as_objects(SPANS, record.get(SPANS))
    if isinstance(spans, Sequence):
        record[SPANS] = [_one_later(span) for span in spans]


def _one_later(span: Any) -> Any:
    """Return a span of the turn after; one that is wrong stays, for messages."""
    try:
        return {**span, "turn": integer("'turn'", span["turn"]) + 1}
    except (TypeError, KeyError):
        return span
