"""What a run file says of a model: its numbers on every set, and what each attack gets of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from palu.comparison.answers import token_answers
from palu.comparison.config import Comparison
from palu.comparison.measures import ATTACKS, SENSITIVE, WORST
from palu.comparison.run_file import FORGET, MEMBERSHIP, Attack
from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.records import Example
from palu.data.template import Template
from palu.evaluation.attacks.run import run_attacks
from palu.evaluation.attacks.settings import NAMES, AttackSettings, check_names
from palu.evaluation.evaluator import evaluate_examples
from palu.models.loading import load_model, load_tokenizer
from palu.run_record import choose_template
from palu.storage.files import write_json

EVALUATION, ATTACK = "evaluation.json", "attack.json"
EVALUATION_FORMAT = "palu-evaluation/1"
NEW_TOKENS = 128  # not the 200 of `palu evaluate`: runs of a folder that was begun have it
SHOWN = 3
"""Examples of each set whose answers are shown, the same in every run."""


class Measuring:
    """The data of a comparison, and how models are measured on it.

    Raises:
        ValueError: a file that cannot be read, or settings of attacks that cannot be.
    """

    def __init__(self, comparison: Comparison) -> None:
        common = comparison.common
        self.comparison = comparison
        self.max_length = common.get("max_length", 512)
        self.loading = {n: common[n] for n in ("dtype", "device", "allow_missing") if n in common}
        self.attack_seed, self.attacks, self.settings = attack_settings(comparison)
        self.tokenizer = load_tokenizer(Path(comparison.model))
        self.template = template_of(comparison)
        files = {FORGET: comparison.forget, **comparison.utility}
        self.sets = {name: self._read(name, file) for name, file in files.items()}
        self.retain = [] if comparison.retain is None else self._read("retain", comparison.retain)
        self.holdout = (
            [] if comparison.holdout is None else self._read("holdout", comparison.holdout)
        )

    def _read(self, name: str, file: str) -> list[Example]:
        common = self.comparison.common
        columns = common.get("columns")
        return load_examples(
            file,
            require_spans=name == FORGET,
            repair=common.get("repair", "none"),
            columns=(name == "retain" and common.get("retain_columns")) or columns,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
        )

    def shared(self) -> list[str]:
        """Return a line for each utility set that has examples which runs train on to keep.

        Raises:
            ValueError: a utility set has examples of the forget file.
        """
        forget, retain = (
            {(one.question, one.answer) for one in some}
            for some in (self.sets[FORGET], self.retain)
        )
        lines = []
        for name in self.comparison.utility:
            own = [(one.question, one.answer) for one in self.sets[name]]
            if lost := sum(one in forget for one in own):
                raise ValueError(
                    f"utility.{name}: {lost} of its {len(own)} examples are in the forget file "
                    "too, where they are to be lost"
                )
            if kept := sum(one in retain for one in own):
                lines.append(
                    f"utility.{name}: {kept} of its {len(own)} examples are in the retain file too;"
                    " what runs train on is kept better than the rest"
                )
        return lines

    def training_size(self) -> tuple[int, int]:
        """Return how many forget examples a run trains on, and the tokens of the longest example
        of the forget and retain files."""
        how = {"max_length": self.max_length, "template": self.template}
        rows = [
            tokenize_examples(some, self.tokenizer, source=name, **how) if some else []
            for name, some in (("forget", self.sets[FORGET]), ("retain", self.retain))
        ]
        return len(rows[0]), max(len(row["input_ids"]) for some in rows for row in some)

    def shown(self) -> dict[str, list[Example]]:
        """Return the examples whose answers are shown: a few of each set, spread over it."""
        return {
            name: [some[n * len(some) // SHOWN] for n in range(SHOWN)]
            if len(some) > SHOWN
            else some
            for name, some in self.sets.items()
        }

    def answers(self, model: Any, original: Any) -> list[dict[str, Any]]:
        """Return the answers that are shown, see `token_answers`."""
        evaluate = self.comparison.evaluate
        return token_answers(
            original,
            model,
            self.tokenizer,
            self.shown(),
            template=self.template,
            max_length=self.max_length,
            max_new_tokens=evaluate.get("max_new_tokens", NEW_TOKENS),
        )

    def measure(
        self, folder: Path, output: Path, original: Sequence[Mapping[str, Any]] | None
    ) -> dict[str, Any]:
        """Evaluate and attack the model in a folder, and write `evaluation.json` and `attack.json`.

        Args:
            output: folder for these.
            original: the answers of the original model that are shown; None: it is this one.

        Returns:
            the fields of a run file that say what was found.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "evaluate"):
            model = load_model(folder, **self.loading)
            before = model if original is None else self._load_original()
            results = {n: self._evaluate(model, some, before) for n, some in self.sets.items()}
            del before
            write_json(output / EVALUATION, {"format": EVALUATION_FORMAT, **_bare(results)})
            answers = self.answers(model, model if original is None else original)
        with timed(seconds, "attack"):
            found = run_attacks(
                {"unlearned": model},
                self.tokenizer,
                self.sets[FORGET],
                retain=self.retain,
                holdout=self.holdout,
                attacks=self.attacks,
                settings=self.settings,
                template=self.template,
                seed=self.attack_seed,
            )
            write_json(output / ATTACK, found)
        secrets, attacks = _attacks(found)
        return {
            "seconds": seconds,
            "sets": {name: _columns(result["examples"]) for name, result in results.items()},
            "numbers": {
                f"{name}.{key}": value
                for name, result in results.items()
                for key, value in result["numbers"].items()
            },
            "secrets": secrets,
            "attacks": attacks,
            "answers": answers,
        }

    def _load_original(self) -> Any:
        return load_model(self.comparison.model, **self.loading)

    def _evaluate(self, model: Any, examples: Sequence[Example], original: Any) -> dict[str, Any]:
        return evaluate_examples(
            model,
            self.tokenizer,
            examples,
            template=self.template,
            max_length=self.max_length,
            original=original,
            seed=self.attack_seed,
            **{"max_new_tokens": NEW_TOKENS, **self.comparison.evaluate},
        )


def template_of(comparison: Comparison) -> Template:
    """Return the template with which all models are asked."""
    common = comparison.common
    names = ("system_prompt", "date_string", "chat_template_kwargs")
    asked = {name: common[name] for name in names if name in common}
    return choose_template(
        comparison.model, **asked, force=bool(common.get("force_template", False))
    )


def attack_settings(comparison: Comparison) -> tuple[int, list[str], AttackSettings]:
    """Return seed, names and settings of the attacks. Raises ValueError, which names the key."""
    given = dict(comparison.attacks)
    names, quick = given.pop("names", None), given.pop("quick", False)
    seed = given.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"attacks.seed must be a whole number of 0 or more, not {seed!r}")
    if not isinstance(quick, bool):
        raise ValueError(f"attacks.quick must be true or false, not {quick!r}")
    if names is not None and not isinstance(names, list):
        raise ValueError(f"attacks.names must be a list, not {names!r}")
    known = [one.name for one in fields(AttackSettings) if one.name != "max_length"]
    for name in given:
        if name not in known:
            allowed = ", ".join(("names", "quick", "seed", *known))
            raise ValueError(f"attacks: unknown key {name!r}; it must be of {allowed}")
    try:
        names = check_names(names)
        if other := [name for name in names if name not in NAMES]:
            raise ValueError(
                f"names has {other[0]!r}, which asks for no secret and counts in no ranking: keep "
                "the models, and run palu attack on them"
            )
        length = comparison.common.get("max_length", 512)
        settings = AttackSettings(**given, max_length=length)
    except (TypeError, ValueError) as error:
        raise ValueError(f"attacks: {error}") from None
    return seed, names, settings.quick() if quick else settings


def check_measure(forgetting: str, attacks: Sequence[str]) -> None:
    """Raise ValueError where forgetting cannot be measured in a way by these attacks."""
    known = [ATTACKS, WORST, SENSITIVE, *(name for name in attacks if name != MEMBERSHIP)]
    if forgetting not in known:
        raise ValueError(f"forgetting must be one of {', '.join(known)}, not {forgetting!r}")


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Any:
    """Note how long the block took."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - began, 3)


def _bare(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return evaluations without what the model said."""
    return {
        name: {
            **result,
            "examples": [
                {key: value for key, value in one.items() if key != "generated"}
                for one in result["examples"]
            ],
        }
        for name, result in results.items()
    }


def _columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Return one list a metric, of all examples in their order."""
    names = [
        key
        for key in examples[0]
        if key not in ("id", "generated", "spans")
        and all(isinstance(one[key], int | float | None) for one in examples)
    ]
    columns = {key: [one[key] for one in examples] for key in names}
    return {"ids": [one["id"] for one in examples], **columns}


def _attacks(found: Mapping[str, Any]) -> tuple[list[tuple[int, int]], list[Attack]]:
    """Return the secrets that any attack asks for, by number, and what came of each attack."""
    lines = [(entry, entry["results"]["unlearned"]) for entry in found["attacks"]]
    asked = {(r, s) for _, result in lines for r, s, _ in result.get("secrets", ())}
    secrets = sorted(asked)
    numbers = {secret: number for number, secret in enumerate(secrets)}
    attacks = []
    for entry, result in lines:
        head = {"name": entry["name"], "title": entry["title"]}
        if entry["name"] == MEMBERSHIP:
            attacks.append(Attack(**head, **{key: result[key] for key in ("auc", "low", "high")}))
            continue
        of = [numbers[record, secret] for record, secret, _ in result["secrets"]]
        attacks.append(Attack(**head, of=of, said=[said for *_, said in result["secrets"]]))
    return secrets, attacks
