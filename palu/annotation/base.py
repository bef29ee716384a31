"""What an annotator is: texts in, spans with scores out."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from palu.data.records import Example


class Text(NamedTuple):
    """One text of an example that spans may stand in: a turn, a question, an answer, a document.

    Attributes:
        role: "system", "user", "assistant", "tool"; "document" for a plain text.
        content: the text that offsets count in.
        answer: whether a run learns from it (assistant turns, answers and plain texts).
    """

    role: str
    content: str
    answer: bool


class Found(NamedTuple):
    """A span that an annotator found.

    Attributes:
        text: which of `texts_of(example)`, from 0 on.
        start, end: characters of its content, end exclusive.
        score: how sure the annotator is, above 0 up to 1.
        kind: of what it is, where that is known: "phone", "PERSON"; never the value.
    """

    text: int
    start: int
    end: int
    score: float = 1.0
    kind: str = ""


class Annotator(Protocol):
    """Finds spans in examples.

    Attributes:
        name: what spans say of where they come from, and the option of `palu annotate`: "terms".
        settings: what the summary keeps of it, JSON; never a value that was searched for.
    """

    name: str
    settings: dict[str, Any]

    def find(self, examples: Sequence[Example]) -> Iterable[list[Found]]:
        """Yield the spans of each example, in the order of `examples`; an annotator may compute
        several at once."""
        ...


def texts_of(example: Example) -> list[Text]:
    """Return the texts of an example in their order: of a conversation its turns, else question and
    answer, or the document alone."""
    if example.turns:
        return [Text(turn.role, turn.content, bool(turn.answer)) for turn in example.turns]
    if example.question is None:
        return [Text("document", example.answer, True)]
    return [Text("user", example.question, False), Text("assistant", example.answer, True)]
