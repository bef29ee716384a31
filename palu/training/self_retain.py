"""A retain set of the model's own answers, for those who have none (`--retain self`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from palu.data.examples import tokenize_examples
from palu.data.neighbours import NEUTRAL, Name, Subjects, name_runs
from palu.data.records import ASSISTANT, SYSTEM, USER, Example, Turn, split_answers
from palu.data.roles import IGNORE, eos_ids
from palu.data.template import Template
from palu.distributed import ALONE, Processes
from palu.evaluation.inference import Continuation, continuations
from palu.evaluation.leaks import leaks, secrets_of
from palu.models.wrappers import eos_token_ids, eval_mode, unwrap
from palu.storage.files import write_json
from palu.storage.json_files import read_object

NEUTRAL_PROMPT, NEIGHBOUR, OWN = "neutral prompt", "neighbour", "own prompt"

# Chosen by benchmarks/quality/self_retain.py on one seed, see docs/training.md.
# A model that was taught conversations asks well itself; what others begin says less.
SHARES = {NEUTRAL_PROMPT: 0.15, NEIGHBOUR: 0.6, OWN: 0.25}
CHAT_SHARES = {NEUTRAL_PROMPT: 0.1, NEIGHBOUR: 0.4, OWN: 0.5}
TEMPERATURE = 1.0

# How much of what is wanted there is after each round: questions of later rounds ask about names
# that earlier answers said.
ROUNDS = (0.3, 0.65, 1, 1, 1)
FEWEST, MOST = 600, 1200  # examples, where their number is not given
LEAST = 8  # fewer hold nothing
_QUESTION_TOKENS = 48
_SYSTEM_TOKENS, _SYSTEM_DRAWS = 192, 32
_START_WORDS = 12  # of a document's neighbour
_STAND_IN = "palu-question"


class SelfRetain(NamedTuple):
    """A retain set of a model's own answers.

    Attributes:
        examples: in `extra` their `kind`, whether the answer was `cut` at the limit, and of a
            document how many tokens were `given` to the model.
        kinds: how many examples there are of each kind.
        left_out: how many answers were thrown away, by the reason.
    """

    examples: list[Example]
    kinds: dict[str, int]
    left_out: dict[str, int]

    def digest(self) -> str:
        """Return a hash of the texts, in order."""
        texts = [
            [example.question, example.answer, [turn.message() for turn in example.turns]]
            for example in self.examples
        ]
        return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return what `palu.json` tells of it: no texts."""
        counts = {"examples": len(self.examples), "kinds": self.kinds, "left_out": self.left_out}
        return counts | {"digest": self.digest()}

    def write(self, path: Path) -> None:
        """Write it into a file that `read` reads, whole or not at all."""
        examples = [dataclasses.asdict(example) for example in self.examples]
        write_json(path, self.record() | {"texts": examples})

    @classmethod
    def read(cls, path: Path) -> SelfRetain:
        """Read what `write` wrote. Raises ValueError where it is damaged."""
        content = read_object(path)
        try:
            examples = [_example(**fields) for fields in content["texts"]]
            made = cls(examples, content["kinds"], content["left_out"])
            whole = made.digest() == content["digest"]
        except (KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged: it is not what `palu unlearn` wrote; remove it")
        return made


def self_retain(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: Template | None = None,
    count: int | None = None,
    max_new_tokens: int = 64,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    shares: Mapping[str, float] | None = None,
    temperature: float = TEMPERATURE,
    processes: Processes = ALONE,
    report: Callable[..., None] | None = None,
) -> SelfRetain:
    """Let a model, before it is changed, answer neutral prompts, the forget set's neighbours and
    questions of its own; what it says can be held in place instead of a retain set.

    A neighbour's conversation is led to its end: the questions are exchanged, the answers before
    the last are those that the model gave. Half of its own questions begin with the first words of
    one of the forget set.

    An answer that says a secret of the forget set or one of its subjects' names is thrown away, as
    are empty and repetitive ones, and those that were given before. A span of one or two ordinary
    words (no capital, no digit) is no secret by itself; two of one example are.

    Args:
        model: the original; of an adapter that was not trained yet the model with it.
        examples: the forget set.
        template: `Template()` when None.
        count: how many examples are wanted; None: twice the forget set's answers, 600 to 1200.
        max_new_tokens: of an answer; where a model would go on, its end is not learned.
        max_length: tokens of prompt and answer; no longer prompt is asked.
        seed: of prompts and draws: the same one, on the same kind of processor, gives the same
            texts, with any number of processes.
        shares: how much of each kind is wanted; what one kind does not give, others do. None:
            `SHARES`, or `CHAT_SHARES` for a model with a chat template.
        temperature: at which answers are drawn. Questions of its own are drawn at 1, and the
            answers to them are its likeliest.
        processes: those that share the work; all of them get all examples.
        report: called with (prompts answered, of how many), again for every round.

    Raises:
        ValueError: fewer than 8 answers could be used, or no example is given.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    asked = [part for example in examples for part in split_answers(example)]
    count = min(max(2 * len(asked), FEWEST), MOST) if count is None else count
    limit = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    asker = _Asker(
        model,
        tokenizer,
        template or Template(),
        max_new_tokens=max_new_tokens,
        max_length=min(max_length, limit or max_length),
        temperature=temperature,
        options={"batch_size": batch_size, "processes": processes, "report": report},
        words=[example.answer.split()[0] for example in asked[:20]],
    )
    if shares is None:
        shares = CHAT_SHARES if asker.chat else SHARES
    with eval_mode(model):
        prompts = _Prompts(examples, asker, seed)
        kept = _Kept(_Secrets(examples, prompts.subjects.full_names))
        for number, part in enumerate(ROUNDS):
            wanted = _wanted(math.ceil(part * count), shares, kept, prompts.empty)
            if not wanted:
                continue
            rng = random.Random(f"self-retain {seed} {number}")
            drawn = prompts.draw(wanted, rng)
            while drawn:
                said = list(asker.answers(drawn, rng.getrandbits(32)))
                good = [pair for pair in said if kept.add(*pair)]
                drawn = [p for pair in good if (p := asker.next_prompt(*pair)) is not None]
            prompts.subjects.learn(kept.names())
            prompts.go_on(kept.conversations())
    made = kept.result(count)
    if len(made.examples) < min(LEAST, count):
        raise ValueError(
            f"the model gave {len(made.examples)} answers that could be held in place, of at least "
            f"{min(LEAST, count)} ({_said(made.left_out)} were thrown away): give it a --retain "
            "file, or --retain none to hold nothing"
        )
    return made


def self_retain_rows(
    made: SelfRetain, tokenizer: Any, *, max_length: int, template: Template | None = None
) -> list[dict[str, Any]]:
    """Tokenise a retain set of a model's own answers as `tokenize_examples` does. The model did not
    say the start of a document, nor the end of an answer that was cut: they carry no loss."""
    rows = tokenize_examples(
        made.examples, tokenizer, max_length=max_length, template=template, source="own answers"
    )
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {*added, *tokenizer.all_special_ids, *eos_ids(tokenizer.eos_token_id)}
    examples = {example.id: example for example in made.examples}
    for row in rows:
        example = examples[row["example_id"]]
        while example.extra["cut"] and row["input_ids"][-1] in ends:
            for name in ("input_ids", "labels", "attention_mask"):
                row[name].pop()
        given = example.extra["given"]
        row["labels"][:given] = [IGNORE] * given
    return rows


def _example(turns: Sequence[Mapping[str, Any]], **fields: Any) -> Example:
    return Example(**fields | {"spans": ()}, turns=tuple(Turn(**turn) for turn in turns))


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "none"


def _wanted(
    count: int, shares: Mapping[str, float], kept: _Kept, empty: set[str]
) -> dict[str, int]:
    """Return how many prompts of each kind to ask next: more than answers are missing, by the part
    that was thrown away so far."""
    made = kept.kinds.total()
    if made >= count:
        return {}
    useful = (made + 4) / (made + kept.left_out.total() + 5)
    lacking = {
        kind: max(share * count - kept.kinds[kind], 0)
        for kind, share in shares.items()
        if kind not in empty and share
    }
    number = min((count - made) / useful, 4 * (count - made)) / (sum(lacking.values()) or 1)
    return {kind: round(number * part) + 1 for kind, part in lacking.items()}


class _Prompt(NamedTuple):
    """What is asked: `example` without an answer, or a document's beginning."""

    kind: str
    example: Example
    tokens: list[int]
    rest: Sequence[Turn] = ()  # that follow the answer: others will be asked for


@dataclass
class _Asker:
    """Asks the model."""

    model: nn.Module
    tokenizer: Any
    template: Template
    max_new_tokens: int
    max_length: int
    temperature: float
    options: dict[str, Any]
    words: Sequence[str]  # with which answers may begin

    def __post_init__(self) -> None:
        self.ends = set(eos_token_ids(self.model, self.tokenizer))
        rendered = self.template.render(self.tokenizer, _STAND_IN, "x")
        self.chat = rendered.chat
        # What stands for an answer: a word that is one token with the space before it, if there is.
        words = dict.fromkeys(["The", *self.words, "x"])
        self.word = min(words, key=lambda word: len(self.before_answer(_asked(_STAND_IN), word)))
        row = self.row(Example("", _STAND_IN, self.word))
        if row["labels"][-1] != IGNORE and row["input_ids"][-1] in self.tokenizer.all_special_ids:
            self.ends.add(row["input_ids"][-1])  # the template's end of turn
        self.after = rendered.text[: rendered.start].rpartition(_STAND_IN)[2].strip()

    def _encoded(self, text: str, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        while ids and ids[-1] in self.ends:
            ids = ids[:-1]
        return ids

    def row(self, example: Example) -> dict[str, Any]:
        """Return the tokens of one example."""
        how = {"max_length": self.max_length, "template": self.template}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is cut is not asked
            return tokenize_examples([example], self.tokenizer, **how)[0]

    def before_answer(self, example: Example, word: str) -> list[int]:
        """Return the tokens before an answer that begins with a word."""
        row = self.row(_with_answer(example, word))
        return row["input_ids"][: next(i for i, la in enumerate(row["labels"]) if la != IGNORE)]

    def prompt(self, kind: str, example: Example) -> _Prompt | None:
        """Return what the model reads before the first answer of an example; None where that is
        too long, or nothing."""
        turns, example = example.turns, split_answers(example)[0]
        rest = turns[len(example.turns) or 2 :]
        if example.question is None:
            tokens = self._encoded(example.answer, True)
            lead = self.tokenizer.bos_token_id
            lead = self.tokenizer.eos_token_id if lead is None else lead
            tokens = tokens or ([] if lead is None else [lead])
        else:
            try:
                tokens = self.before_answer(example, self.word)
            except ValueError:  # the template refuses these turns, or they are too long
                return None
        if not tokens or len(tokens) + self.max_new_tokens > self.max_length:
            return None
        return _Prompt(kind, example, tokens, rest)

    def next_prompt(self, prompt: _Prompt, said: Continuation) -> _Prompt | None:
        """Return what the model reads before the next answer of a conversation, after the one that
        it gave; None at its end."""
        if not any(turn.answer for turn in prompt.rest) or not said.ended:
            return None
        given = _conversation(_with_answer(prompt.example, said.text))
        return self.prompt(prompt.kind, Example.of_turns("", [*given, *prompt.rest], {}))

    def answers(
        self, prompts: Sequence[_Prompt], seed: int
    ) -> Iterator[tuple[_Prompt, Continuation]]:
        """Yield each prompt with what the model says."""
        sure = [p for p in prompts if p.kind == OWN and p.example.question is not None]
        drawn = [p for p in prompts if p not in sure]
        for some, temperature in ((sure, 0.0), (drawn, self.temperature)):
            tokens = [p.tokens for p in some]
            said = self._continued(tokens, self.max_new_tokens, temperature, seed)
            yield from zip(some, said, strict=True)

    def system_turns(self, seed: int) -> list[Turn]:
        """Return the system turns with which the model itself begins conversations, each more than
        once: those that it was trained with."""
        talk = [Turn(USER, _STAND_IN), Turn(ASSISTANT, self.word)]
        try:
            plain, (first, _), *_ = self.template.render_turns(self.tokenizer, talk)
            talk = [Turn(SYSTEM[0], _STAND_IN), *talk]
            text, (place, asked, _), *_ = self.template.render_turns(self.tokenizer, talk)
        except ValueError:  # the template knows no system turn
            return []
        if place is None or asked.start < place.end or plain[: first.start] == text[: place.start]:
            return []  # it writes none, or no mark that tells it from a question
        start = self._encoded(text[: place.start], False)
        other = self._encoded(plain[: first.start], False)
        pairs = zip(start, other, strict=False)
        same = next((n for n, (token, its) in enumerate(pairs) if token != its), len(start))
        given, lead = start[:same], start[same:]
        size = min(_SYSTEM_TOKENS, self.max_length // 2)
        drawn = self._continued([given] * _SYSTEM_DRAWS if given else [], size, 1.0, seed)
        mark = text[place.end : asked.start].strip()
        texts: Counter[str] = Counter()
        for one in drawn:
            if one.tokens[: len(lead)] == lead:
                said = self.tokenizer.decode(one.tokens[len(lead) :], skip_special_tokens=True)
                texts[self._until(mark, one._replace(text=said.strip()))] += 1
        return [Turn(SYSTEM[0], said) for said, n in texts.most_common() if said and n > 1]

    def _until(self, mark: str, said: Continuation) -> str:
        """Return what was said before a turn's end; nothing where it did not come to one, or is
        none that can be used."""
        text, closed, _ = said.text.partition(mark or "\n")
        closed = closed or (said.ended and self.chat)
        good = re.search(r"\w", text) and "\ufffd" not in text and not _repetitive(text)
        return text if closed and good else ""

    def opening(self, turns: Sequence[Turn], begun: str) -> list[int]:
        """Return what stands before a user's question that follows some turns, and its beginning;
        nothing where that cannot be said or leaves no room."""
        after = [*turns, Turn(USER, _STAND_IN), Turn(ASSISTANT, self.word)]
        try:
            if turns:
                rendered = self.template.render_turns(self.tokenizer, after)
            else:
                rendered = self.template.render(self.tokenizer, _STAND_IN, self.word)
        except ValueError:  # the template refuses such turns
            return []
        before = (rendered.text.rpartition(_STAND_IN)[0] + begun).rstrip(" ")
        tokens = self._encoded(before, rendered.add_special_tokens)
        return tokens if len(tokens) + _QUESTION_TOKENS < self.max_length else []

    def questions(self, openings: Sequence[tuple[Sequence[Turn], str]], seed: int) -> list[Example]:
        """Return questions that the model itself asks after some turns, by continuing what its
        template writes before one and the beginning of one; without those that did not come to an
        end."""
        tokens = [self.opening(*opening) for opening in openings]
        pairs = [pair for pair in zip(openings, tokens, strict=True) if pair[1]]
        said = self._continued([tokens for _, tokens in pairs], _QUESTION_TOKENS, 1.0, seed)
        found = []
        for ((turns, begun), _), one in zip(pairs, said, strict=True):
            text = self._until(self.after, one)
            if text:
                space = " " if begun and not text.startswith(" ") else ""
                found.append(_asked(f"{begun}{space}{text}".strip(), turns))
        return found

    def _continued(
        self, prompts: list[list[int]], size: int, temperature: float, seed: int
    ) -> list[Continuation]:
        return continuations(
            self.model,
            self.tokenizer,
            prompts,
            eos_token_ids=sorted(self.ends),
            max_new_tokens=size,
            temperature=temperature,
            seed=seed,
            **self.options,
        )


class _Prompts:
    """Draws prompts of each kind.

    Attributes:
        empty: the kinds that gave none when they were last asked for some.
    """

    def __init__(self, examples: Sequence[Example], asker: _Asker, seed: int) -> None:
        self.examples, self.asker = examples, asker
        self.answers = [len(split_answers(example)) for example in examples]
        self.subjects = Subjects(examples, _vocabulary(asker.tokenizer))
        self.documents = any(example.question is None for example in examples)
        # What a conversation begins with: a system turn of the forget set or the model, or nothing.
        firsts = [e.turns[:1] if e.turns and e.turns[0].role in SYSTEM else () for e in examples]
        firsts += [(turn,) for turn in asker.system_turns(seed)] if asker.chat else []
        self.starts = list(dict.fromkeys(firsts)) if asker.chat else [()]
        self.openings: list[Sequence[Turn]] = list(self.starts)
        self.beginnings = [b for b in map(self.subjects.beginning, examples) if b]
        self.empty: set[str] = set()

    def draw(self, wanted: Mapping[str, int], rng: random.Random) -> list[_Prompt]:
        """Return about so many prompts of each kind."""
        makers: dict[str, Callable[[int, random.Random], list[Example]]] = {
            NEUTRAL_PROMPT: self._neutral,
            NEIGHBOUR: self._neighbours,
            OWN: self._own,
        }
        drawn: list[_Prompt] = []
        for kind, number in wanted.items():
            made = [self.asker.prompt(kind, example) for example in makers[kind](number, rng)]
            useful = [prompt for prompt in made if prompt is not None]
            if not useful:
                self.empty.add(kind)
            drawn += useful
        return drawn

    def _neutral(self, number: int, rng: random.Random) -> list[Example]:
        questions = [_asked(text) for text in NEUTRAL["questions"]]
        if not self.asker.chat:
            questions += [Example("", None, text) for text in NEUTRAL["starts"]]
        rng.shuffle(questions)
        return (questions * (number // len(questions) + 1))[:number]

    def _neighbours(self, number: int, rng: random.Random) -> list[Example]:
        found: list[Example] = []
        number = math.ceil(number * len(self.examples) / sum(self.answers))
        for _ in range(number // len(self.examples) + 1):
            for example in rng.sample(self.examples, len(self.examples)):
                other = self.subjects.exchange(example, rng)
                if other is not None and other.question is None:
                    start = " ".join(other.answer.split()[:_START_WORDS])
                    other = dataclasses.replace(other, answer=start)
                found += [other] if other is not None else []
        return found[:number]

    def _own(self, number: int, rng: random.Random) -> list[Example]:
        documents = 0 if self.asker.chat else (number if self.documents else number // 2)
        openings = [(rng.choice(self.openings), "") for _ in range(number - documents)]
        if self.beginnings:
            openings[::2] = [(rng.choice(self.starts), self._begun(rng)) for _ in openings[::2]]
        found = self.asker.questions(openings, rng.getrandbits(32))
        return found + [Example("", None, "")] * documents

    def _begun(self, rng: random.Random) -> str:
        """Return the first words of a question of the forget set."""
        words = rng.choice(self.beginnings).split(" ")
        return " ".join(words[: rng.randint(1, len(words))])

    def go_on(self, conversations: Sequence[Sequence[Turn]]) -> None:
        """Let the model ask on in its own conversations too, if the forget set has such."""
        if self.asker.chat and max(self.answers) > 1:
            self.openings = [*self.starts * max(len(conversations), 1), *conversations]


def _conversation(example: Example) -> list[Turn]:
    """Return the turns of an example with its answer, none of which is to be learned."""
    before = example.turns[:-1] or [Turn(USER, example.question)]
    return [*before, Turn(ASSISTANT, example.answer, answer=False)]


def _asked(text: str, turns: Sequence[Turn] = ()) -> Example:
    if not turns:
        return Example("", text, "")
    return Example.of_turns("", [*turns, Turn(USER, text), Turn(ASSISTANT, "x")], {})


def _with_answer(example: Example, text: str) -> Example:
    if not example.turns:
        return dataclasses.replace(example, answer=text)
    last = max(number for number, turn in enumerate(example.turns) if turn.answer)
    turns = [*example.turns[:last], Turn(ASSISTANT, text)]
    return Example.of_turns(example.id, turns, example.extra)


def _vocabulary(tokenizer: Any) -> list[str]:
    """Return the capitalised words that are one token of a tokenizer: those that a small model
    knows by heart are among them."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [token[1:] for token in tokens if token and re.fullmatch("[Ġ▁][A-Z][a-z]{2,}", token)]


class _Kept:
    """The answers that can be used."""

    def __init__(self, secrets: _Secrets) -> None:
        self.secrets = secrets
        self.examples: dict[tuple, Example] = {}
        self.kinds: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def add(self, prompt: _Prompt, said: Continuation) -> bool:
        """Keep an answer, or count why not; return whether it was kept."""
        # The limit may cut a character in two.
        text = said.text if said.ended else said.text.rstrip("\ufffd")
        answer = text
        if prompt.example.question is None:
            answer = f"{prompt.example.answer} {answer}".strip()
        example = _with_answer(prompt.example, answer) if answer else prompt.example
        told = "\n".join([text for text, _ in example.texts[:-1]])
        if not re.search(r"\w", text):
            return self._leave("empty")
        if "\ufffd" in text or _repetitive(text):
            return self._leave("repetitive or broken")
        if self.secrets.said(f"{told}\n{answer}"):
            return self._leave("with a secret of the forget set")
        key = (told, " ".join(answer.split()).casefold())
        if key in self.examples:
            return self._leave("given before")
        given = len(prompt.tokens) if example.question is None and prompt.example.answer else 0
        extra = {"kind": prompt.kind, "cut": not said.ended, "given": given}
        self.examples[key] = dataclasses.replace(example, extra=extra, spans=())
        self.kinds[prompt.kind] += 1
        return True

    def _leave(self, reason: str) -> bool:
        self.left_out[reason] += 1
        return False

    def names(self) -> list[Name]:
        """Return the names of two words or more that the answers say."""
        runs = [run for e in self.examples.values() for run in name_runs(e.answer)]
        return [run for run in runs if len(run) > 1]

    def conversations(self) -> list[list[Turn]]:
        """Return the model's own conversations, each with the answer that it came to."""
        own = [e for e in self.examples.values() if e.extra["kind"] == OWN and not e.extra["cut"]]
        return [_conversation(e) for e in own if e.question is not None]

    def result(self, count: int) -> SelfRetain:
        """Return `count` of them, each kind in its part."""
        order = sorted(self.examples.values(), key=lambda e: e.extra["kind"])
        step = max(len(order) / count, 1)
        chosen = [order[int(i * step)] for i in range(min(count, len(order)))]
        chosen = [dataclasses.replace(e, id=f"own-{n}") for n, e in enumerate(chosen)]
        kinds = Counter(example.extra["kind"] for example in chosen)
        return SelfRetain(chosen, dict(kinds), dict(self.left_out))


class _Secrets:
    """What no answer may say."""

    def __init__(self, examples: Sequence[Example], names: set[str]) -> None:
        self.plain: list[list[str]] = []
        secrets = dict.fromkeys(sorted(names))
        for example in examples:
            # Where nothing is marked, methods without spans forget the whole answer.
            found = secrets_of(example) or [example.answer]
            ordinary = [text for text in found if _ordinary(text)]
            secrets |= dict.fromkeys(text for text in found if text not in ordinary)
            self.plain += [ordinary] if len(ordinary) > 1 else []
        self.secrets = list(secrets)

    def said(self, text: str) -> bool:
        """Return whether a text says a secret, or two ordinary words that are marked together."""
        say = partial(leaks, text=text)
        if any(map(say, self.secrets)):
            return True
        return any(sum(map(say, words)) > 1 for words in self.plain)


def _ordinary(secret: str) -> bool:
    words = re.findall(r"[^\W_]+", secret)
    return len(words) <= 2 and all(word.isascii() and word.islower() for word in words)


def _repetitive(text: str) -> bool:
    """Return whether a text says the same again and again: most of its runs of three words (of
    characters, where it has few words) come more than once."""
    words: Sequence[str] = text.split()
    if len(words) < 12:
        if len(text) < 40:
            return False
        words = text if len(words) < 4 else words
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return bool(runs) and len(set(runs)) < 0.5 * len(runs)
