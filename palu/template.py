"""How question and answer are put together: a chat template, or a line of text for models that have
none.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from palu.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "Template"]

_PLACE = "{question}"


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


@dataclasses.dataclass(frozen=True)
class Template:
    """How a question and its answer become text.

    With a chat template the question is the user's turn and the answer the assistant's; `question`
    is not used. Without one, the text is `question` with the question filled in, a space (unless
    there is white space already), and the answer. A plain document (no question) is the answer
    alone.

    Attributes:
        system_prompt: the system turn of the chat template; an error where there is no chat
            template or it refuses one.
        date_string: handed to the chat template (Llama 3 writes it into the system turn and would
            otherwise write today's date), None to leave it out.
        question: what a model without chat template reads; holds `{question}`.
        chat: whether to use the tokenizer's chat template; None uses it when there is one.
    """

    system_prompt: str | None = None
    date_string: str | None = "10 Apr 2025"
    question: str = "Question: {question}\nAnswer:"
    chat: bool | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Template":
        """The inverse of `to_dict`. Missing settings take their default, unknown ones are a
        ValueError.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"a template has no setting {unknown[0]!r}, only {', '.join(known)}")
        return cls(**settings)

    def prompt(self, tokenizer: "PreTrainedTokenizerBase", question: str | None) -> str:
        """The text that comes before the answer, without the spaces that belong to the answer's
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
        """The text of a whole example and where the answer is in it.

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
        text = self._chat(tokenizer, question, answer)
        kept = text[len(before) : max(len(before), len(text) - len(after))]
        # Templates trim: what is kept begins at this character of the answer.
        dropped = _leading_space(answer) - _leading_space(kept)
        same = dropped >= 0 and kept.strip() == answer.strip() and answer[dropped:].startswith(kept)
        if not same or text != before + kept + after:
            raise ValueError(
                f"the chat template changes the answer, so its spans cannot be placed: {answer!r} "
                f"became {kept!r}"
            )
        return Rendered(text, len(before), len(before) + len(kept), dropped, True, False)

    def _plain(self, question: str) -> str:
        if self.system_prompt is not None:
            raise ValueError(
                "system_prompt needs a chat template, which this tokenizer lacks or chat=False "
                "leaves aside; write it into the template's question instead"
            )
        return self.question.replace(_PLACE, question)

    def _uses_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        has_one = bool(getattr(tokenizer, "chat_template", None))
        if self.chat and not has_one:
            raise ValueError("chat=True, but this tokenizer has no chat template")
        return has_one if self.chat is None else self.chat

    def _around(self, tokenizer: "PreTrainedTokenizerBase", question: str) -> tuple[str, str]:
        """What the chat template writes before and after the answer.

        A stand-in is rendered in the answer's place and looked for. Looking for the answer itself
        would go wrong where it is short and the template writes text of its own in front of it (an
        empty thinking block, say).
        """
        stand_in = "palu-answer"
        while stand_in in question or stand_in in (self.system_prompt or ""):
            stand_in += "-x"
        text = self._chat(tokenizer, question, stand_in)
        if text.count(stand_in) != 1:
            raise ValueError(
                f"the chat template writes the answer {text.count(stand_in)} times, not once: "
                f"{text!r}"
            )
        before, after = text.split(stand_in)
        for name, content in (("system_prompt", self.system_prompt), ("question", question)):
            if content is not None and content.strip() not in before:
                raise ValueError(
                    f"the chat template leaves out or changes the {name} {content!r}: it wrote "
                    f"{before!r}"
                )
        return before, after

    def _chat(self, tokenizer: "PreTrainedTokenizerBase", question: str, answer: str) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if self.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        options = {} if self.date_string is None else {"date_string": self.date_string}
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except Exception as error:  # of any kind: the template is a program of the user's
            what = (
                "with a system prompt"
                if self.system_prompt is not None
                else "without a system prompt"
            )
            raise ValueError(
                f"the chat template refuses a question and answer {what}: {one_line(error)}"
            ) from error


def _leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())


def _needs_bos(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Whether the tokenizer should add its special tokens: not when the text has the first of them
    already.
    """
    bos = getattr(tokenizer, "bos_token", None)
    return not (bos and text.startswith(bos))
