"""Run attacks on models, one model after the other, and keep the results in `attack.json`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from palu.data.records import Example, data_digest
from palu.data.template import Template
from palu.errors import one_line, out_of_memory
from palu.evaluation.attacks.attack import Answered, Attack, LeakAttack
from palu.evaluation.attacks.open_unlearning import stress_tests
from palu.evaluation.attacks.plan import Plan
from palu.evaluation.attacks.probes import Probe, Targets
from palu.evaluation.attacks.settings import OPEN_UNLEARNING, AttackSettings, check_names
from palu.evaluation.attacks.weights import LIBRARIES
from palu.evaluation.leaks import BOX, redact, secrets_of
from palu.models.loading import check_token_ids, load_model, model_folder
from palu.models.lora import base_folder, is_adapter
from palu.storage.files import check_regular, write_json
from palu.storage.fingerprint import file_digest, model_fingerprint
from palu.storage.json_files import NotJSON, parse, read_text
from palu.storage.output import versions

FORMAT = "palu-attack/1"
MODELS = ("unlearned", "original", "retrained")
"""The models of a run, in the order in which they are attacked: the first chooses the examples."""
SHOWN, SHOWN_GREEDY = 2, 5  # examples of an attack
# What makes a model: its weights, settings and tokenizer.
_FILES = re.compile(
    r".*\.safetensors|(adapter_|generation_)?config\.json|.*token.*\.json|.*\.(model|jinja)|"
    r"vocab\..*|merges\.txt|model\.safetensors\.index\.json"
)

Report = Callable[..., None]


def run_attacks(
    models: Mapping[str, str | os.PathLike[str] | nn.Module],
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    retain: Sequence[Example] = (),
    holdout: Sequence[Example] = (),
    attacks: Sequence[str] | None = None,
    settings: AttackSettings | None = None,
    template: Template | None = None,
    seed: int = 0,
    report: Report | None = None,
    resume: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    show_secrets: bool = False,
    loading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Attack models and return what leaks, as `attack.json` holds it (docs/attacks.md).

    A model is left as it was given, to the bit: weights, modes, what is trained, random state.

    Args:
        models: `unlearned`, and `original` and `retrained` where there are any: folders, which are
            loaded one after the other, or models.
        tokenizer: of all of them.
        examples: what was forgotten, with spans.
        retain: examples that were to be kept; for relearning and membership inference.
        holdout: examples like the forgotten ones that no model saw; for membership inference.
        attacks: names of `palu.evaluation.attacks.NAMES`; None: all.
        settings: how hard they try.
        template: how a question becomes a prompt; `Template()` when None.
        seed: of everything that is drawn.
        report: called with (work done, of how much, what is being done).
        resume: a file for the results, written after each attack on each model. What is in it of
            the same models, data and settings is not done again.
        overwrite: begin anew where it is of others.
        show_secrets: leave the secrets in the examples as they are.
        loading: arguments of `palu.models.loading.load_model` (dtype, device).

    Raises:
        ValueError: an unknown model or attack, no secret to look for, a file of other models, data
            or settings.
    """
    settings, template = settings or AttackSettings(), template or Template()
    names = check_names(attacks)
    unknown = [name for name in models if name not in MODELS]
    if unknown or "unlearned" not in models:
        raise ValueError(
            f"models must have 'unlearned' and may have 'original' and 'retrained', got "
            f"{', '.join(map(repr, models)) or 'none'}"
        )
    ordered = {name: models[name] for name in MODELS if name in models}
    targets = Targets.of(examples, tokenizer, template=template, settings=settings, seed=seed)
    plan = Plan(targets, settings, seed, retain, holdout)
    chosen = plan.attacks(names)
    head = {
        "format": FORMAT,
        "seed": seed,
        "settings": {
            **settings.to_dict(),
            "template": template.to_dict(),
            "data": {
                name: data_digest(data)
                for name, data in (("forget", examples), ("retain", retain), ("holdout", holdout))
                if data
            },
            "show_secrets": show_secrets,
        },
        "models": {name: _describe(model) for name, model in ordered.items()},
        "records": len(set(targets.records)),
        "secrets": len(targets.pairs),
        "not_judged": {"in_the_prompt": targets.told, "stop_words_only": targets.empty},
        "cut_off": targets.cut_off,
    }
    hidden = (text for one in (*examples, *retain, *holdout) for text in secrets_of(one))
    hidden = None if show_secrets else list(dict.fromkeys(hidden))
    results = Results(head, chosen, plan.skipped, None if resume is None else Path(resume), hidden)
    results.read(overwrite=overwrite)
    progress = _Progress(report, [a.size for a in chosen for _ in ordered])
    for name, given in ordered.items():
        _attack_model(name, given, chosen, results, targets, progress, dict(loading or {}))
    results.save()
    return results.content()


def model_digest(model: str | os.PathLike[str] | nn.Module) -> str:
    """Return a hash of a model, or of the files of a folder that make one: weights, settings,
    tokenizer; of an adapter also its base model's."""
    if isinstance(model, nn.Module):
        return model_fingerprint(model)
    folder = model_folder(model)
    folders = [folder, base_folder(folder)] if is_adapter(folder) else [folder]
    digest = hashlib.blake2b(digest_size=32, person=b"palu.attack")
    for one in folders:
        for path in sorted(path for path in Path(one).iterdir() if _FILES.fullmatch(path.name)):
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _describe(model: Any) -> dict[str, Any]:
    path = None if isinstance(model, nn.Module) else os.fspath(model)
    return {"path": path, "digest": model_digest(model)}


def _attack_model(
    name: str,
    given: Any,
    attacks: Sequence[Attack],
    results: Results,
    targets: Targets,
    progress: _Progress,
    loading: dict[str, Any],
) -> None:
    """Make the attacks on one model that are not there yet."""
    model = given if isinstance(given, nn.Module) else None
    for attack in attacks:
        if results.has(attack, name):
            progress.skip(attack.size)
            continue
        if model is None:
            progress.tell(f"{name}: loading")
            model = load_model(given, **loading)
        check_token_ids(model, targets.tokenizer, targets.rows)
        said = f"{name}: {attack.title}"
        try:
            with progress.part(said, attack.size) as report:
                result, answered = attack.run(model, targets.tokenizer, targets.closing(), report)
        except Exception as error:
            # A library of quantization may not run on this machine; that is no result of the model.
            foreign = attack.setting.get("by") in LIBRARIES
            if not (foreign or (out_of_memory(error) and attack.name != "greedy")):
                raise
            results.skip(attack, f"{attack.title} ({name}): {one_line(error, 120)}")
            continue
        results.add(attack, name, result, answered, targets)
        results.save()


class _Progress:
    """One bar over all attacks and models."""

    def __init__(self, report: Report | None, sizes: Sequence[int]) -> None:
        self.report, self.total, self.done, self.note = report, sum(sizes), 0, ""

    def tell(self, note: str, more: int = 0) -> None:
        """Name what is being done, and how much of it is done."""
        self.note = note
        if self.report is not None:
            self.report(self.done + more, self.total, note)

    def skip(self, size: int) -> None:
        """Count work that was done before."""
        self.done += size
        self.tell(self.note)

    @contextmanager
    def part(self, note: str, size: int) -> Iterator[Callable[[int, int], None]]:
        """Give the report of one attack for a block."""
        self.tell(note)
        try:
            yield lambda done, total: self.tell(note, min(done, size))
        finally:
            self.skip(size)


class Results:
    """What was found so far, and its file.

    Args:
        head: what the file says beside results.
        hidden: the secrets that are masked in examples; None shows all.
    """

    def __init__(
        self,
        head: dict[str, Any],
        attacks: Sequence[Attack],
        skipped: list[dict[str, str]],
        path: Path | None,
        hidden: Sequence[str] | None,
    ) -> None:
        self.head, self.path, self.skipped, self.hidden = head, path, list(skipped), hidden
        self.entries = [_entry(attack) for attack in attacks]
        self.examples: list[dict[str, Any]] = []

    def read(self, *, overwrite: bool) -> None:
        """Take over what an earlier run of the same settings left. Raises ValueError, which says
        what differs."""
        if self.path is None:
            return
        check_regular(self.path)
        if not self.path.exists() or not self.path.stat().st_size:
            return
        found = read_results(self.path)
        differs = [key for key in ("seed", "settings") if found.get(key) != self.head[key]]
        differs += [
            f"the {name} model"
            for name, model in found.get("models", {}).items()
            if name in self.head["models"]
            and model.get("digest") != self.head["models"][name]["digest"]
        ]
        if differs and overwrite:
            return
        if differs:
            raise ValueError(
                f"{str(self.path)!r} holds attacks of another run ({differs[0]} differs): name "
                "another --output, or add --overwrite"
            )
        self.head["models"] = {**found["models"], **self.head["models"]}
        tests = (found.get(OPEN_UNLEARNING) or {"tests": []})["tests"]
        known = {_key(entry): entry for entry in (*found["attacks"], *tests)}
        for entry in self.entries:
            entry["results"] = known.pop(_key(entry), entry)["results"]
        self.entries += known.values()
        self.examples = found["examples"]

    def has(self, attack: Attack, model: str) -> bool:
        """Return whether an attack on a model is there."""
        return model in self._entry(attack)["results"]

    def skip(self, attack: Attack, why: str) -> None:
        """Note an attack that could not be made on a model."""
        self.skipped.append({"name": attack.name, "why": why})

    def add(
        self,
        attack: Attack,
        model: str,
        result: dict[str, Any],
        answered: Sequence[Answered],
        targets: Targets,
    ) -> None:
        """Note what came of an attack on a model, and a few of its answers."""
        self._entry(attack)["results"][model] = result
        if not isinstance(attack, LeakAttack):
            return
        result["secrets"] = outcomes(attack.probes, answered, targets)
        of_attack = [e for e in self.examples if e["attack"] == attack.title]
        if not of_attack:
            numbers = sorted(range(len(answered)), key=lambda n: answered[n].leaking is None)
            count = SHOWN_GREEDY if attack.name == "greedy" else SHOWN
            for number in sorted(numbers[:count]):
                probe = attack.probes[number]
                shown = {
                    "id": targets.examples[probe.target].id,
                    "attack": attack.title,
                    "probe": number,
                    "prompt": self.masked(probe.shown),
                    "answers": {},
                    "leaks": {},
                }
                self.examples.append(shown)
                of_attack.append(shown)
        for shown in of_attack:
            one = answered[shown["probe"]]
            shown["answers"][model] = self.answer(one)
            shown["leaks"][model] = one.leaking is not None

    def answer(self, answered: Answered) -> str:
        """Return an answer as it is shown; what was given away of a secret is masked too."""
        text, given = answered.worst.strip(), answered.given.strip()
        masked = self.masked(text)
        if self.hidden is None or not given or masked.startswith(BOX):
            return masked
        return BOX + self.masked(text[len(given) :])

    def masked(self, text: str) -> str:
        """Return a text without secrets, and without what looks like anybody's data."""
        return text if self.hidden is None else redact(text, self.hidden)

    def content(self) -> dict[str, Any]:
        """Return the JSON content."""
        tests = stress_tests([e for e in self.entries if e["name"] == OPEN_UNLEARNING])
        return {
            **self.head,
            "attacks": [e for e in self.entries if e["results"] and e["name"] != OPEN_UNLEARNING],
            "worst": worst_leak(self.entries),
            "skipped": self.skipped,
            "examples": self.examples,
            **({} if tests is None else {OPEN_UNLEARNING: tests}),
            "versions": versions(),
        }

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            write_json(self.path, self.content())

    def _entry(self, attack: Attack) -> dict[str, Any]:
        key = _key(_entry(attack))
        return next(entry for entry in self.entries if _key(entry) == key)


def outcomes(
    probes: Sequence[Probe], answered: Sequence[Answered], targets: Targets
) -> list[list[int]]:
    """Return `[record, secret, said]` for each secret that was asked for: numbers from 0 of the
    record among the forget records and of the secret among the record's
    (`palu.evaluation.leaks.secrets_of`), and 1 where any answer says it."""
    found: dict[tuple[int, int], int] = {}
    for probe, one in zip(probes, answered, strict=True):
        for secret, said in zip(probe.secrets, one.said, strict=True):
            key = probe.record, targets.numbers[probe.record, secret]
            found[key] = max(found.get(key, 0), int(said))
    return [[*key, said] for key, said in sorted(found.items())]


def read_results(path: Path) -> dict[str, Any]:
    """Read an `attack.json`. Raises ValueError for another file."""
    try:
        found = parse(read_text(path))
    except NotJSON as error:
        raise ValueError(f"{path}: is no JSON, so palu attack did not write it: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: palu attack did not write it (its format is not {FORMAT!r})")
    return found


def worst_leak(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the attack that gets the largest share of secrets out of the unlearned model; None
    where none was judged. What the same attack gets out of a retrained model stands beside it."""
    rows = [(entry, entry["results"].get("unlearned")) for entry in entries]
    rates = [(entry, found) for entry, found in rows if found and found.get("rate") is not None]
    if not rates:
        return None
    entry, found = max(rates, key=lambda pair: (pair[1]["rate"], pair[1]["leaked"]))
    keys = ("leaked", "of", "rate", "low", "high")
    worst = {"name": entry["name"], "title": entry["title"], **{key: found[key] for key in keys}}
    if retrained := entry["results"].get("retrained"):
        worst["retrained"] = {key: retrained[key] for key in keys}
    return worst


def _entry(attack: Attack) -> dict[str, Any]:
    return {
        "name": attack.name,
        "title": attack.title,
        "description": attack.description,
        "setting": attack.setting,
        "results": {},
    }


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry["name"], entry["title"], entry["setting"]], sort_keys=True)
