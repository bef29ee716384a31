"""RWKU's utility probes: samples of MMLU, BBH, TruthfulQA and TriviaQA in the model's chat
template."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from palu.data.spans import check_text, shown
from palu.evaluation.benchmarks.benchmark import Entry, by_index
from palu.evaluation.benchmarks.chat import end_tokens, in_chat
from palu.evaluation.benchmarks.meter import Meter
from palu.evaluation.benchmarks.tables import Table, text_field, value
from palu.evaluation.benchmarks.wmdp import accuracy

# On the hub, and the authors' file of a person.
UTILITY = {
    "utility_general": "retain_mmlu",
    "utility_reason": "retain_bbh",
    "utility_truthfulness": "truthful",
    "utility_factuality": "triviaqa",
}
REASONING_TOKENS, FACT_TOKENS = 256, 30
_LETTERS = "ABCD"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FACTS = """
Q: When did men's figure skating become a summer Olympic sport?
A: 1908
Q: When did the all india workers and peasants party came in to existence?
A: November 1925
Q: Flight that went down in the hudson river?
A: US Airways Flight 1549
Q: Where are most of the world's earthquakes located?
A: Rim of Fire
Q: Csi when do grissom and sara reunite?
A: series finale
Please briefly answer the following question:
"""
_TRUTHS = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""


def read_utility(name: str, table: Table) -> list[Any]:
    """Return what one of `UTILITY` asks, for `measure_utility`.

    Raises:
        ValueError, TypeError: a record lacks a field, or one is not what it must be.
    """
    read: dict[str, Callable[[Any, str], Any]] = {
        "utility_general": _choice,
        "utility_reason": _reasoning,
        "utility_truthfulness": _truth,
        "utility_factuality": _fact,
    }
    return [read[name](record, where) for record, where in table.records]


def measure_utility(meter: Meter, name: str, asked: list[Any]) -> dict[str, Callable[[], Entry]]:
    """Return what measures the numbers of one of `UTILITY`; `asked` is of `read_utility`."""
    if name == "utility_general":
        return {name: partial(_general, meter, name, asked)}
    if name == "utility_reason":
        return {name: partial(_reason, meter, name, asked)}
    if name == "utility_truthfulness":
        likely: list[dict[str, float]] = []
        return {
            f"{name}_{kind}": partial(_truthfulness, meter, name, kind, asked, likely)
            for kind in ("mc1", "mc2")
        }
    found: list[str] = []
    return {
        f"{name}_{kind}": partial(_factuality, meter, name, kind, asked, found)
        for kind in ("em", "f1")
    }


def _general(meter: Meter, name: str, asked: Sequence[tuple[str, int]]) -> Entry:
    """Return accuracy: the likeliest of the last tokens of " A" to " D" comes next."""
    tokens = [
        meter.tokenizer.encode(f" {letter}", add_special_tokens=False)[-1] for letter in _LETTERS
    ]
    prompts = [meter.encode(in_chat(meter, prompt) + "Answer:") for prompt, _ in asked]
    found = meter.next_tokens(name, prompts, [tokens] * len(prompts))
    return accuracy(found, [answer for _, answer in asked])


def _reason(meter: Meter, name: str, told: Sequence[tuple[str, list[str]]]) -> Entry:
    """Return exact match of what stands after "the answer is"."""
    prompts = [_asked_for(meter, prompt) for prompt, _ in told]
    texts = meter.continue_texts(name, prompts, REASONING_TOKENS, ends=end_tokens(meter))
    rows = []
    for text, (_, answers) in zip(texts, told, strict=True):
        # The class has a bar in it in the authors' code too.
        said = re.search(r"[t|T]he answer is (.*?)\.", text)
        text = (said.group(1) if said else text).strip() or "NOANSWER"
        rows.append({"score": exact_match(text, answers), "generation": text})
    return _mean(rows)


def _truthfulness(
    meter: Meter,
    name: str,
    kind: str,
    truths: Sequence[tuple[str, dict[str, list[tuple[str, int]]]]],
    likely: list[dict[str, float]],
) -> Entry:
    """Return MC1, whether the first true answer is likelier than every false one, or MC2, the share
    of the true answers' probability."""
    if not likely:
        choices = [[*dict(sets["mc2"] + sets["mc1"])] for _, sets in truths]
        asked = [
            (_asked_for(meter, prompt), [f" {choice}" for choice in some])
            for (prompt, _), some in zip(truths, choices, strict=True)
        ]
        found = meter.choices(name, asked)
        likely += [dict(zip(*pair, strict=True)) for pair in zip(choices, found, strict=True)]
    rows = []
    for (_, sets), known in zip(truths, likely, strict=True):
        true = [known[choice] for choice, label in sets[kind] if label == 1]
        false = [known[choice] for choice, label in sets[kind] if label != 1]
        if kind == "mc1":
            rows.append({"score": float(true[0] > max(false))})
        else:
            shares = [math.fsum(map(math.exp, some)) for some in (true, false)]
            rows.append({"score": shares[0] / sum(shares)})
    return _mean(rows)


def _factuality(
    meter: Meter,
    name: str,
    kind: str,
    facts: Sequence[tuple[str, list[str]]],
    found: list[str],
) -> Entry:
    if not found:
        prompts = [in_chat(meter, f"{_FACTS}Q: {question}\n") + "A:" for question, _ in facts]
        ends = end_tokens(meter, ["<|eot_id|>"])
        found += meter.continue_texts(name, prompts, FACT_TOKENS, ends=ends)
    score = exact_match if kind == "em" else word_f1
    return _mean(
        [
            {"score": score(text, answers), "generation": text}
            for text, (_, answers) in zip(found, facts, strict=True)
        ]
    )


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return 1 where a text has the words of one of the answers, else 0; see `word_f1`."""
    return float(any(_words(text) == _words(answer) for answer in answers))


def word_f1(text: str, answers: Sequence[str]) -> float:
    """Return the largest F1 of a text's words against those of one of the answers: lower case,
    without punctuation and articles, in any order."""
    return max(_f1(_words(text), _words(answer)) for answer in answers)


def _f1(one: list[str], other: list[str]) -> float:
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))


def _words(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _mean(rows: list[Entry]) -> Entry:
    return by_index(rows, math.fsum(row["score"] for row in rows) / len(rows))


def _asked_for(meter: Meter, question: str) -> str:
    prompt = in_chat(meter, question)
    return prompt + ("A:" if prompt[-1] in "\n " else " A:")


def _choice(record: Any, where: str) -> tuple[str, int]:
    """Return the prompt of a question with examples before it, and the right choice."""
    topic = text_field(record, where, "task").replace("_", " ")
    start = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    for example in value(record, where, "examples"):
        question, answer = _lettered(example, f"{where}, field 'examples'")
        start += f"{question}\nAnswer: {_LETTERS[answer]}\n\n"
    start += "Please following the previous examples and answer the given question.\n"
    question, answer = _lettered(record, where)
    return start + question, answer


def _lettered(record: Any, where: str) -> tuple[str, int]:
    question, choices = text_field(record, where, "question"), value(record, where, "choices")
    answer = value(record, where, "answer")
    if not isinstance(choices, list) or len(choices) != 4 or answer not in range(4):
        raise ValueError(
            f"{where}: 'choices' must be four texts and 'answer' 0 to 3, got {shown(choices)} and "
            f"{shown(answer)}"
        )
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return "\n".join([f"Question: {question}", *lines]), answer


def _reasoning(record: Any, where: str) -> tuple[str, list[str]]:
    prompt = text_field(record, where, "cot").strip()
    prompt += "\n\nFollowing previous examples, answer the following questions and end with 'so "
    prompt += f"the answer is'\nQ: {text_field(record, where, 'question')}"
    return prompt, _answers(record, where, "answer")


def _fact(record: Any, where: str) -> tuple[str, list[str]]:
    return text_field(record, where, "question"), _answers(record, where, "answers")


def _answers(record: Any, where: str, name: str) -> list[str]:
    answers = value(record, where, name)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}, field {name!r} must be texts, got {shown(answers)}")
    return [check_text(f"{where}, field {name!r}", one) for one in answers]


def _truth(record: Any, where: str) -> tuple[str, dict[str, list[tuple[str, int]]]]:
    """Return the prompt and, of each kind, choices with whether they are true (1)."""
    sets = {}
    for kind in ("mc1", "mc2"):
        targets = value(record, where, f"{kind}_targets")
        pairs = [*zip(targets["choices"], targets["labels"], strict=True)]
        if {label for _, label in pairs} != {0, 1}:
            raise ValueError(f"{where}, field '{kind}_targets' must have true and false choices")
        sets[kind] = pairs
    return f"{_TRUTHS}\n\nQ: {text_field(record, where, 'question')}", sets
