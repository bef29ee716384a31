"""A question in other words, by rules: no other model, no translation and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

FIELDS = ("paraphrased_question", "paraphrased_questions")
"""Fields of a record that hold its question in other words: a text or a list of texts."""

TEMPLATES = (
    "I forgot this, please help me remember: {question}",
    "{question} Answer in one short sentence.",
    "Someone asked me this and I must answer correctly: {question}",
)

_SAME = [
    ("phone number", "telephone number"),
    ("telephone number", "phone number"),
    ("e-mail address", "email"),
    ("e-mail", "email address"),
    ("email address", "e-mail"),
    ("address", "place of residence"),
    ("birthday", "date of birth"),
    ("date of birth", "birthday"),
    ("born", "brought into the world"),
    ("live", "have their home"),
    ("full name", "name"),
    ("name of", "full name of"),
    ("father", "dad"),
    ("mother", "mum"),
    ("profession", "occupation"),
    ("occupation", "profession"),
    ("job", "profession"),
    ("work as", "do for a living"),
    ("author", "writer"),
    ("book", "published work"),
    ("wrote", "authored"),
    ("award", "prize"),
    ("prize", "award"),
    ("repeat", "tell me again"),
    ("tell me", "let me know"),
    ("what kind of", "which sort of"),
    ("which", "what"),
]
_BE = "is|are|was|were"
_AUX = rf"{_BE}|did|does|do|has|have|had|can|could|will|would|should"
_WH = r"what|who|whom|whose|where|when|which|why|how"
_COPULA = re.compile(rf"(?P<wh>what|who|where)(?P<be>'s| (?:{_BE})) (?P<rest>.+)", re.I)
_ASKED = re.compile(rf"(?P<wh>(?:{_WH})\b[^?,]*?) (?P<aux>{_AUX}) (?P<rest>.+)", re.I)
# A subject in front of its verb: a name, a pronoun, or "the author".
_SUBJECT = re.compile(
    r"(?P<subject>(?:[A-Z][\w.'\u2019-]*(?: (?:[A-Z][\w.'\u2019-]*|de|van|von|der|bin|al))*)"
    r"|(?:he|she|it|they|you|I|we)\b"
    r"|(?:the|a|an|his|her|their|this|that|your|my|our) [\w-]+)(?P<verb> .+)?"
)
_VERB = re.compile(r" (born|\w+ed|\w+ing|been|born|made|written|known|grown|won|read|sell|live)\b")


def given_paraphrases(extra: dict[str, Any]) -> list[str]:
    """Return the questions in other words that a record has itself."""
    texts: list[str] = []
    for field in FIELDS:
        value = extra.get(field)
        texts += [value] if isinstance(value, str) else list(value or ())
    return [text for text in texts if isinstance(text, str) and text.strip()]


def templated(question: str) -> list[str]:
    """Return the question within other sentences."""
    return [template.format(question=question.strip()) for template in TEMPLATES]


def rewritten(question: str) -> list[str]:
    """Return the question rewritten: as an indirect one, as a request, with the question word at
    the end, and with other words of the same meaning. Of what is no question the last sentence
    comes first.

    The last sentence of a text is rewritten; what stands before it stays.
    """
    text = question.strip()
    before, last = _last_sentence(text)
    texts = [before + other for other in _rewrites(last) if other != last]
    if not texts and text:
        texts = [f"{last} {before}".strip() if before else f"As I said: {text}"]
    if (other := _synonyms(text)) != text:
        texts.append(other)
    return list(dict.fromkeys(texts))


def _last_sentence(text: str) -> tuple[str, str]:
    ends = [match.end() for match in re.finditer(r"[.?!]\s+(?=[A-Z])", text)]
    return (text[: ends[-1]], text[ends[-1] :]) if ends else ("", text)


def _rewrites(question: str) -> Iterator[str]:
    core = question.rstrip("?.! ")
    if match := re.match(r"(can|could|would|will) you (?:please )?(?P<rest>.+)", core, re.I):
        yield f"Please {match['rest']}."
        yield f"I would like you to {match['rest']}."
    elif match := _ASKED.match(core):
        indirect, reversed_ = _turned(match["wh"], match["aux"], match["rest"])
        yield f"Do you know {indirect}?"
        yield f"Please tell me {indirect}."
        yield f"{reversed_[:1].upper()}{reversed_[1:]}?"
    elif match := _COPULA.match(core):  # "What's ..."
        indirect, _ = _turned(match["wh"], "is", match["rest"])
        yield f"Do you know {indirect}?"
    elif match := re.match(r"(please )?(tell me|give me|name|list|repeat|describe) ", core, re.I):
        rest = core[len(match[1] or "") :]
        yield f"Could you {rest[:1].lower()}{rest[1:]}?"


def _turned(wh: str, aux: str, rest: str) -> tuple[str, str]:
    """Return "where Ada was born" and "Ada was born where"."""
    wh, aux = wh[:1].lower() + wh[1:], aux.lower()
    subject, verb = rest, ""
    if match := _SUBJECT.match(rest):
        if aux in _BE.split("|"):
            at = _VERB.search(rest)
            subject, verb = (rest[: at.start()], rest[at.start() :]) if at else (rest, "")
        elif match["verb"]:
            subject, verb = match["subject"], match["verb"]
    return f"{wh} {subject} {aux}{verb}", f"{subject} {aux}{verb} {wh}"


def _synonyms(text: str) -> str:
    """Return the text with words of the same meaning, each replaced once."""
    known = dict(reversed(_SAME))
    words = "|".join(re.escape(word) for word, _ in sorted(_SAME, key=lambda pair: -len(pair[0])))
    return re.sub(
        rf"\b({words})\b",
        lambda match: _as_written(match[0], known[match[0].lower()]),
        text,
        flags=re.I,
    )


def _as_written(old: str, new: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new
