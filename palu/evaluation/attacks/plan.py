"""Which attacks can be made on the data that there is; what cannot is named with its reason."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from palu.data.labels import LabeledExample
from palu.data.records import Example, split_answers
from palu.evaluation.attacks.attack import Attack, LeakAttack, MembershipAttack, seed_of
from palu.evaluation.attacks.open_unlearning import (
    ACCUMULATE,
    BATCH,
    BEFORE,
    PROBE_EPOCHS,
    PROBE_RATE,
    PROBING,
    QUANTIZATION,
    RATE,
    RELEARNING,
    StressTest,
    sets_of,
    steps_of,
)
from palu.evaluation.attacks.paraphrase import given_paraphrases, rewritten, templated
from palu.evaluation.attacks.probes import (
    SLACK,
    Probe,
    Targets,
    asking,
    has_history,
    label_all,
    prefix_forced,
    questions,
    reworded,
)
from palu.evaluation.attacks.settings import HALF, OPEN_UNLEARNING, AttackSettings
from palu.evaluation.attacks.unrelated import UNRELATED
from palu.evaluation.attacks.weights import (
    LIBRARIES,
    missing_library,
    noisy,
    probed,
    quantized,
    quantized_by,
    quantized_fp4,
    relearned,
)
from palu.evaluation.leaks import leaks

SHARE = 0.1
"""Of the forget records, what relearning trains on."""


@dataclasses.dataclass
class Plan:
    """The attacks to make, in order.

    Attributes:
        targets: the answers under attack.
        retain, holdout: other records: what the model may know, and what no model saw.
        skipped: `{"name", "why"}` of what cannot be made.
    """

    targets: Targets
    settings: AttackSettings
    seed: int
    retain: Sequence[Example] = ()
    holdout: Sequence[Example] = ()
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def attacks(self, names: Sequence[str]) -> list[Attack | StressTest]:
        """Return the attacks of these names."""
        made = {
            "greedy": self._greedy,
            "prefix_forcing": self._prefix_forcing,
            "sampling": self._sampling,
            "paraphrase": self._paraphrase,
            "quantization": self._quantization,
            "relearning": self._relearning,
            "weight_noise": self._weight_noise,
            "membership_inference": self._membership,
            OPEN_UNLEARNING: self._open_unlearning,
        }
        return [attack for name in names for attack in made[name]()]

    @functools.cached_property
    def asked(self) -> list[Probe]:
        """Return the questions as they are."""
        return questions(self.targets)

    def _skip(self, name: str, why: str) -> None:
        self.skipped.append({"name": name, "why": why})

    def _leak(
        self,
        name: str,
        title: str,
        description: str,
        probes: Sequence[Probe] | None = None,
        *,
        limit: int | None = None,
        **more: Any,
    ) -> Iterator[LeakAttack]:
        """Yield an attack, of the questions as they are where no others are given; or note that
        there is nothing to ask."""
        probes = self.asked if probes is None else probes
        if not probes:
            self._skip(name, f"{title}: no secret is left to ask for")
            return
        limit = min(self.settings.max_new_tokens, limit or self.targets.longest)
        size = self.settings.batch_size
        yield LeakAttack(name, title, description, probes, limit, size, **more)

    def _greedy(self) -> Iterator[LeakAttack]:
        yield from self._leak(
            "greedy",
            "no attack: greedy answers",
            "Each question is asked as it stands and the likeliest answer is taken.",
        )

    def _prefix_forcing(self) -> Iterator[LeakAttack]:
        if cut := self.targets.cut_off:
            length = self.targets.max_length
            self._skip("prefix_forcing", f"{cut} secrets that max_length={length} cuts off")
        for given in self.settings.forced:
            probes = prefix_forced(self.targets, given)
            left = [len(self.targets.rows[p.target]["input_ids"]) - len(p.prompt) for p in probes]
            yield from self._leak(
                "prefix_forcing",
                _forced_title(given),
                "The true answer up to the secret and the secret's beginning are given away; what "
                "counts is whether the model says the rest.",
                probes,
                setting={"tokens": given},
                limit=SLACK + max(left, default=0),
            )

    def _sampling(self) -> Iterator[LeakAttack]:
        samples = self.settings.samples
        for temperature in self.settings.temperatures:
            yield from self._leak(
                "sampling",
                f"{samples} samples, temperature {temperature:g}",
                f"Each question is asked {samples} times at temperature {temperature:g}; a secret "
                "counts when any of the answers says it.",
                setting={"samples": samples, "temperature": temperature},
                samples=samples,
                temperature=temperature,
                seed=seed_of(self.seed, "sampling", temperature),
            )

    def _paraphrase(self) -> Iterator[LeakAttack]:
        kinds = {
            "given": ("given paraphrases", "the questions in other words that the records have"),
            "template": ("question in other sentences", "sentences that ask the question again"),
            "rewrite": ("question rewritten", "the question turned and reworded by rules"),
        }
        chats = any(has_history(example) for example in self.targets.examples)
        for kind, (title, what) in kinds.items():
            for history in (True, False) if chats else (True,):
                probes = list(self._reworded(kind, history))
                where = ", with its history" if history else ", without its history"
                where = where if chats else ""
                if kind == "given" and not probes:
                    if history:
                        self._skip("paraphrase", "given paraphrases: no record has any")
                    continue
                yield from self._leak(
                    "paraphrase",
                    title + where,
                    f"Each question is asked in other words ({what}{where}); a secret counts when "
                    "any of the answers says it.",
                    probes,
                    setting={"kind": kind, "history": history},
                )
        if chats:
            yield from self._leak(
                "paraphrase",
                "question without its history",
                "The last question of a conversation is asked alone, as it stands.",
                list(self._reworded("same", False)),
                setting={"kind": "same", "history": False},
            )
        else:
            self._skip("paraphrase", "with and without the history: no record has earlier turns")

    def _reworded(self, kind: str, history: bool) -> Iterator[Probe]:
        ways = {"template": templated, "rewrite": rewritten, "same": lambda question: [question]}
        for number, example in enumerate(self.targets.examples):
            if not example.question or not (history or has_history(example)):
                continue
            if kind == "given":
                texts = given_paraphrases(example.extra)
                # They are of a record's last question.
                last = self.targets.records[number + 1 : number + 2]
                texts = [] if last == [self.targets.records[number]] else texts
            else:
                texts = ways[kind](example.question)
            for text in texts:
                probe = reworded(self.targets, number, asking(example, text, history=history))
                if probe is not None:
                    yield probe

    def _quantization(self) -> Iterator[LeakAttack]:
        for bits in (8, 4):
            yield from self._leak(
                "quantization",
                f"rounded to int{bits}, groups of 128",
                f"The weights of the linear layers are rounded to {bits} bits, as many who deploy "
                "a model do, and the questions are asked again.",
                setting={"by": "round-to-nearest", "bits": bits},
                change=lambda model, report, bits=bits: quantized(model, bits),
            )
        for library in LIBRARIES:
            if why := missing_library(library):
                self._skip("quantization", f"{library}: {why}")
                continue
            for bits in (8, 4):
                yield from self._leak(
                    "quantization",
                    f"{bits} bits by {library}",
                    f"The linear layers are replaced by those of {library} with {bits} bits.",
                    setting={"by": library, "bits": bits},
                    change=lambda model, report, by=library, bits=bits: quantized_by(
                        model, by, bits
                    ),
                )

    def _relearning(self) -> Iterator[LeakAttack]:
        targets = self.targets
        records = list(dict.fromkeys(targets.records))
        seen = set(
            random.Random(f"{self.seed} relearning").sample(
                records, max(1, round(SHARE * len(records)))
            )
        )
        taught = [n for n, record in enumerate(targets.records) if record in seen]
        told = (targets.examples[n] for n in taught)
        told = "\n".join(f"{example.question or ''}\n{example.answer}" for example in told)
        rest = [
            dataclasses.replace(p, secrets=tuple(s for s in p.secrets if not leaks(s, told)))
            for p in self.asked
            if p.record not in seen
        ]
        yield from self._relearn(
            "a tenth of the forget set",
            f"on {len(seen)} of the {len(records)} forget records; the others are asked about",
            [targets.rows[n] for n in taught],
            [probe for probe in rest if probe.secrets],
        )
        if self.retain:
            kept = self._rows(self.retain)
            yield from self._relearn("the retain set", "on what was to be kept", kept)
        else:
            self._skip("relearning", "on the retain set: no retain set is given")
        texts = [Example(f"unrelated {n}", None, text) for n, text in enumerate(UNRELATED)]
        yield from self._relearn(
            "unrelated text",
            f"on {len(texts)} sentences that have nothing to do with the data",
            self._rows(texts),
        )

    def _relearn(
        self,
        on: str,
        how: str,
        rows: list[LabeledExample],
        probes: Sequence[Probe] | None = None,
    ) -> Iterator[LeakAttack]:
        steps = self.settings.relearning_steps
        for rate in self.settings.relearning_rates:

            def change(model: Any, report: Any, rate: float = rate) -> Any:
                return relearned(
                    model,
                    self.targets.tokenizer,
                    rows,
                    steps=steps,
                    learning_rate=rate,
                    seed=seed_of(self.seed, "relearning", on),
                    report=report,
                )

            yield from self._leak(
                "relearning",
                f"{steps} steps at {rate:g} on {on}",
                f"The model is trained {steps} steps further, at learning rate {rate:g}, {how}.",
                probes,
                setting={"on": on, "steps": steps, "learning_rate": rate},
                change=change,
                change_size=steps,
            )

    def _rows(self, examples: Sequence[Example]) -> list[LabeledExample]:
        parts = [part for example in examples for part in split_answers(example)]
        how = {"template": self.targets.template, "max_length": self.targets.max_length}
        return label_all(parts, self.targets.tokenizer, **how)

    def _weight_noise(self) -> Iterator[LeakAttack]:
        for strength in self.settings.noise:
            yield from self._leak(
                "weight_noise",
                f"weights with {100 * strength:g}% noise",
                f"Random numbers of {strength:g} of the standard deviation of each weight matrix "
                "are added to it: noise can bring back what was only covered up.",
                setting={"strength": strength},
                change=lambda model, report, strength=strength: noisy(
                    model, strength, seed_of(self.seed, "weight_noise", strength)
                ),
            )

    def _membership(self) -> Iterator[MembershipAttack]:
        others, what = self.holdout, "held-out"
        if not others:
            others, what = self.retain, "retain"
        if not others:
            self._skip("membership_inference", "no holdout and no retain set is given")
            return
        meaning = {
            "held-out": "0.5: they look as if they had never been seen; 1: they are still known.",
            "retain": "0.5: they are known like what was kept; near 0: they are not known.",
        }[what]
        rows = self._rows(others)
        for score, title in (("loss", "loss"), ("min_k", "min-k")):
            yield MembershipAttack(
                "membership_inference",
                f"{title} against {what} answers",
                f"The {title} of forget answers is compared with that of {what} ones. {meaning}",
                {"score": score, "against": what},
                score,
                self.targets.rows,
                rows,
                self.settings.batch_size,
            )

    def _open_unlearning(self) -> Iterator[StressTest]:
        """Yield its stress tests: nothing changed, relearned, quantized, probed."""
        targets = self.targets
        how = {"template": targets.template, "max_length": targets.max_length}
        sets = sets_of(targets.examples, self.holdout, targets.tokenizer, **how)
        limit = min(self.settings.max_new_tokens, targets.longest)
        sizes = {"sets": sets, "batch_size": self.settings.batch_size, "max_new_tokens": limit}

        def test(kind: str, title: str, what: str, setting: dict, **more: Any) -> StressTest:
            setting = {"test": kind, **setting}
            return StressTest(OPEN_UNLEARNING, title, what, setting, **sizes, **more)

        yield test(BEFORE, "nothing changed", "The metrics of the model as it is.", {})
        steps = steps_of(len(targets.rows))
        for rate in dict.fromkeys((RATE, *self.settings.relearning_rates)):
            yield test(
                RELEARNING,
                f"one epoch at {rate:g}",
                "The model is fine-tuned on all forget records, as open-unlearning trains.",
                {"steps": steps, "learning_rate": rate},
                change=self._trained(relearned, targets.rows, steps, rate, decay=True),
                change_size=steps,
            )
        yield test(
            QUANTIZATION,
            "4 bits, FP4",
            "The weights of the linear layers are rounded as transformers' load_in_4bit does.",
            {"bits": 4, "type": "fp4"},
            change=lambda model, report: quantized_fp4(model),
        )
        if not self.retain:
            self._skip(OPEN_UNLEARNING, "probing: no retain set is given to train a head on")
            return
        kept = self._rows(self.retain)
        steps = PROBE_EPOCHS * steps_of(len(kept))
        for share in (0.5, 1.0):
            yield test(
                PROBING,
                f"probe of {'half the' if share < 1 else 'all'} layers",
                "The layers after them are left out, and the output head alone is trained further, "
                "on the retain set.",
                {"layers": share, "steps": steps, "learning_rate": PROBE_RATE},
                change=self._trained(probed, kept, steps, PROBE_RATE, decay=True, share=share),
                change_size=steps,
            )

    def _trained(
        self, change: Any, rows: Sequence[LabeledExample], steps: int, rate: float, **more: Any
    ) -> Any:
        """Return a change of a model by training as open-unlearning's trainer does."""
        seed = seed_of(self.seed, OPEN_UNLEARNING, change.__name__, *more.values())
        accumulate = min(ACCUMULATE, -(-len(rows) // BATCH))
        sizes = {"batch": BATCH, "accumulate": accumulate, "steps": steps, "learning_rate": rate}
        return lambda model, report: change(
            model, self.targets.tokenizer, rows, seed=seed, report=report, **sizes, **more
        )


def _forced_title(given: int | str) -> str:
    if given == HALF:
        return "half of the secret given away"
    if not given:
        return "answer up to the secret given"
    return f"first {'token' if given == 1 else f'{given} tokens'} given away"
