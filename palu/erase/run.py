"""The stages of an erasure, one after the other."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.erase.records import (
    annotated,
    private,
    warn_of_terms,
    without_terms,
    write_private,
)
from palu.erase.request import Request, data_key, key_of, request_key, source_digest
from palu.erase.state import STAGES, STATE, State
from palu.errors import UserError
from palu.storage.files import write_json
from palu.storage.fingerprint import data_digests, file_digest, model_digests
from palu.storage.json_files import read_object
from palu.storage.output import (
    RECORD,
    REPORT_FILES,
    Claim,
    check_output,
    claim_output,
    list_files,
    put_in_place,
    read_record,
    remove_cache,
)

if TYPE_CHECKING:
    from palu.data.records import Example
    from palu.evaluation.attacks.settings import AttackSettings

FORGET, RETAIN = "forget.jsonl", "retain.jsonl"
ANNOTATION, EVALUATION, ATTACK = "annotation.json", "evaluation.json", "attack.json"
REPORT, REPORT_JSON = "report.html", "report.json"
KEPT = 200  # retain records that are measured and attacked at most, drawn by the seed

Report = Callable[..., None]


def erase(
    request: Request,
    *,
    overwrite: bool = False,
    unlearn: Callable[[list[str]], int] | None = None,
    stage: Callable[[int, str], Any] | None = None,
) -> dict[str, Any]:
    """Erase what the terms say from a model, and write the folder with model (or adapter),
    `report.html`, model card and what was measured.

    A second start with the same request goes on after the last stage that was done; a stage whose
    inputs have changed is done again, and all after it.

    Args:
        overwrite: replace an output folder that palu wrote.
        unlearn: runs `palu unlearn` with these words and returns its exit status; a process of its
            own when None.
        stage: called with the number and the title of each stage that is done; returns a context
            that gives `report(done, total, note)`.

    Returns:
        the content of `report.json`; `verdict.level` is "good", "caution" or "bad".

    Raises:
        ValueError: a mistake of the request: no term is found, a retain record has one, another
            run's files are in the way.
        UserError: `palu unlearn` failed; it has said why.
    """
    from palu.models.hub import located

    retrained = None if request.retrained is None else located(request.retrained)
    terms = [request.terms] if isinstance(request.terms, str) else request.terms
    places = {"model": located(request.model), "output": Path(request.output)}
    request = replace(request, **places, retrained=retrained, terms=terms)
    done = not overwrite and _is_done(request)
    wanted = {"overwrite": overwrite or done, "inputs": tuple(request.inputs)}
    with claim_output(request.output, **wanted) as claim:
        if done:
            _remove(_beside(request.output.resolve(), "work"))
            return read_object(request.output / REPORT_JSON)
        run = _Run(request, claim, unlearn or _in_a_process, stage)
        run.annotate()
        run.unlearn()
        run.evaluate()
        run.attack()
        return run.report()


def _in_a_process(words: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "palu", *words], check=False).returncode


@dataclass
class _Run:
    """One run, whose stages are called in the order in which they stand here."""

    request: Request
    claim: Claim
    runs_unlearn: Callable[[list[str]], int]
    stage: Callable[[int, str], Any] | None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from palu.models.hub import shown_model
        from palu.models.loading import model_folder

        request, path = self.request, self.claim.path
        if path.parent == Path.cwd():  # named as the user would
            path = Path(path.name)
        self.work, self.folder = _beside(path, "work"), _beside(path, "unfinished")
        for place in (self.work, self.folder):
            for kept in request.inputs:
                if kept.resolve().is_relative_to(place.resolve()):
                    raise ValueError(f"{str(kept)!r} lies in {str(place)!r}, which this run writes")
        self.state = State(self.work)
        for place in (self.work, self.folder):
            for path in place.glob(".*.partial"):  # a run that was killed was just writing it
                path.unlink()
        given = {"original": request.model, "retrained": request.retrained}
        given = {name: folder for name, folder in given.items() if folder is not None}
        self.models = {name: model_folder(folder) for name, folder in given.items()}
        self.models["unlearned"] = self.folder
        # Where they lie when this is done.
        self.named = {name: shown_model(folder) for name, folder in given.items()}
        self.named["unlearned"] = str(request.output)
        self.forget, self.retain = self.work / FORGET, self.work / RETAIN

    @contextmanager
    def doing(self, name: str, key: str) -> Iterator[Report | None]:
        """Do a stage: tell of it, and note it when it is done."""
        self.state.begin(name, key)
        number = list(STAGES).index(name) + 1
        if self.stage is None:
            yield None
        else:
            with self.stage(number, STAGES[name]) as report:
                yield report
        self.state.add(name, key)

    # ---- the stages ------------------------------------------------------------------------------

    def annotate(self) -> None:
        """Find the terms; write the records that have them, and the others."""
        from palu.data.files import load_records

        request = self.request
        key = data_key(request)
        if self.state.has("annotate", key) and self.forget.is_file():
            return
        with self.doing("annotate", key) as report:
            records = load_records(request.records, request.columns)
            done, terms = annotated(records, request.terms, report)
            marked = [record for record in done.records if record["spans"]]
            if not marked:
                what = "has no spans" if terms is None else "has none of the terms"
                raise ValueError(f"{request.records} {what}: there is nothing to forget")
            warn_of_terms(terms)
            rest = [record for record in done.records if not record["spans"]]
            if request.retain is not None:
                rest = without_terms(request, terms)
            self.state.write()
            write_private(self.forget, marked)
            write_private(self.retain, rest)
            write_json(self.work / ANNOTATION, done.summary)
            if report is not None:
                kept = "others" if request.retain is None else "records of --retain"
                note = f"{len(marked)} records to forget, {len(rest)} {kept} to keep"
                report(len(records), len(records), note)

    def unlearn(self) -> None:
        """Run `palu unlearn`, which goes on from its own checkpoints."""
        from palu.training.checkpoints import remove_all

        request = self.request
        words = ["--model", request.model, "--forget", self.forget, "--output", self.folder]
        words += ["--retain", self.retain] if self.retain.stat().st_size else []
        words += ["--seed", request.seed, "--dtype", request.dtype, "--device", request.device]
        if "--keep-cache" in request.options:  # beside what will be the output
            cache = self.claim.path.name + "-reference-cache"
            words += ["--reference-cache", self.folder.with_name(cache)]
        words = [str(word) for word in (*words, *request.options)]
        data = [data_digests(path) for path in (self.forget, self.retain)]
        more = [source_digest(word) for word in request.options]  # one is a --config file
        key = key_of(words, data, more, model_digests(self.models["original"]))
        if self.state.has("unlearn", key) and (self.folder / RECORD).is_file():
            return
        again = self.state.begun == key  # with the same settings: its checkpoints are right
        checkpoints = self.folder.with_name(f"{self.folder.name}-checkpoints")
        cache = self.folder.with_name(f"{self.folder.name}-reference-cache")
        check_output(self.folder, overwrite=True)
        if not again:
            # Nobody may take the model of another request for what this one makes.
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_all(checkpoints)
            remove_cache(cache)
        with self.doing("unlearn", key):
            words.append("--overwrite")  # checkpoints that a run that was stopped has left
            if again and (checkpoints.is_dir() or self.folder.is_dir()):
                words.append("--resume")
            status = self.runs_unlearn(["unlearn", *words])
            # 3 is "done, but it is not good" where there is a model: the rest says how bad
            if status not in (0, 3) or not (self.folder / RECORD).is_file():
                raise UserError(f"palu unlearn ended with exit status {status}")
            remove_cache(cache)  # `palu unlearn` keeps one that it found, of a run that was stopped

    def evaluate(self) -> None:
        """Measure every model on what was forgotten and on what was to be kept."""
        # The key of unlearning has the digests of the original and the data.
        made = [model_digests(self.models[name]) for name in self.models if name != "original"]
        key = key_of(self.state.stages["unlearn"], made)
        path = self.work / EVALUATION
        if self.state.has("evaluate", key) and path.is_file():
            return
        with self.doing("evaluate", key) as report:
            sets = {name: data for name, data in self._examples().items() if data}
            known = read_object(path) if path.is_file() else {}
            known = known.get("models", {}) if known.get("key") == key else {}
            for number, (name, folder) in enumerate(self.models.items()):
                if name in known:
                    continue
                known[name] = self._measured(name, folder, sets, _part(report, number, self.models))
                with private(path):
                    write_json(path, {"format": "palu-evaluation/1", "key": key, "models": known})

    def attack(self) -> None:
        """Attack every model; what was done before a stop is not done again."""
        from palu.evaluation.attacks.probes import NothingToAsk
        from palu.evaluation.attacks.run import run_attacks
        from palu.models.loading import load_tokenizer

        settings = self._attack_settings()
        key = key_of(self.state.stages["evaluate"], settings.to_dict())  # of the same models
        path = self.folder / ATTACK
        if self.state.has("attack", key) and path.is_file():
            return
        with self.doing("attack", key) as report:
            sets = self._examples()
            try:
                found = run_attacks(
                    self.models,
                    load_tokenizer(self.folder),
                    sets["forget"],
                    retain=sets["retain"],
                    settings=settings,
                    template=self._template(),
                    seed=self.request.seed,
                    report=report,
                    resume=path,
                    overwrite=True,
                    loading=self._loading(),
                )
            except NothingToAsk as error:  # a name that every question says
                warnings.warn(f"no attack is made: {error}", stacklevel=2)
                return
            for name, place in self.named.items():
                found["models"][name]["path"] = place
            write_json(path, found)

    def report(self) -> dict[str, Any]:
        """Write page and card, put the folder in its place and remove the work."""
        from palu.report import build_report
        from palu.report.card import write_card

        with self.doing("report", request_key(self.request)) as tell:
            self._note_request()
            write_json(self.folder / ANNOTATION, read_object(self.work / ANNOTATION))
            evaluation = read_object(self.work / EVALUATION)
            evaluation.pop("key")
            # The page needs the answers, to judge and to mask them; the folder may not keep them.
            with private(self.folder / EVALUATION):
                write_json(self.folder / EVALUATION, evaluation)
            try:
                report = build_report(
                    self.folder,
                    output=self.folder / REPORT,
                    forget=str(self.forget),
                    name=self.request.output.name,
                )
            finally:
                write_json(self.folder / EVALUATION, _without_answers(evaluation))
            report["inputs"][EVALUATION] = file_digest(self.folder / EVALUATION)
            write_json(self.folder / REPORT_JSON, report)
            write_card(self.folder, content=report)
            if tell is not None:
                tell(1, 1)
        # Last: a full disk, or a kill, after it would leave the work of a run that is done.
        put_in_place(self.folder.resolve(), self.claim)
        if not self.request.keep_work:
            _remove(self.work)
        return report

    # ---- what they share -------------------------------------------------------------------------

    def _template(self) -> Any:
        from palu.run_record import choose_template

        return choose_template(self.folder)

    def _max_length(self) -> int:
        options = (read_record(self.folder) or {}).get("options") or {}
        return int(options.get("max_length", 512))

    def _attack_settings(self) -> AttackSettings:
        from palu.evaluation.attacks.settings import AttackSettings

        settings = AttackSettings(max_length=self._max_length())
        return settings.quick() if self.request.quick else settings

    def _loading(self) -> dict[str, Any]:
        return {"dtype": self.request.dtype, "device": self.request.device}

    def _examples(self) -> dict[str, list[Example]]:
        """Return the records to forget, and those to keep, or as many of them as are measured."""
        from palu.data.files import load_examples

        sets = {"forget": load_examples(self.forget, require_spans=True), "retain": []}
        if self.retain.stat().st_size:
            kept = load_examples(self.retain, require_spans=False)
            if len(kept) > KEPT:
                chosen = sorted(random.Random(self.request.seed).sample(range(len(kept)), KEPT))
                kept = [kept[number] for number in chosen]
            sets["retain"] = kept
        return sets

    def _measured(
        self, name: str, folder: Path, sets: Mapping[str, list[Example]], report: Report | None
    ) -> dict[str, Any]:
        from palu.evaluation.attacks.run import model_digest
        from palu.evaluation.evaluator import evaluate_examples
        from palu.models.loading import load_model, load_tokenizer

        model, tokenizer = load_model(folder, **self._loading()), load_tokenizer(folder)
        original = model  # which says how fluent the answers are
        if name != "original":
            original = load_model(self.models["original"], **self._loading())
        measured: dict[str, Any] = {"path": self.named[name], "digest": model_digest(folder)}
        for number, (data, examples) in enumerate(sets.items()):
            measured[data] = evaluate_examples(
                model,
                tokenizer,
                examples,
                template=self._template(),
                max_length=self._max_length(),
                original=original,
                progress=_part(report, number, sets, f"{name}: {data}"),
            )
        return measured

    def _note_request(self) -> None:
        """Write into `palu.json` what was asked, without what was to be erased, and the names of
        the data that stays."""
        request, record = self.request, read_record(self.folder) or {}
        what = "a term" if request.terms else "spans"
        others = f"{request.records} (records without {what})"
        data = {
            "forget": f"{request.records} (records with {what})",
            "retain": others if request.retain is None else request.retain,
        }
        record["made_by"] = "palu erase"
        record["data"] = {**record.get("data", {}), **data}
        kept = (record.get("options") or {}).items()
        record["options"] = {key: value for key, value in kept if key not in data}
        record["erase"] = {
            "records": data_digests(request.records),
            "terms": read_object(self.work / ANNOTATION)["terms"],
            "seed": request.seed,
            "options": list(request.options),
        }
        write_json(self.folder / RECORD, record)
        list_files(self.folder, REPORT_FILES)  # now, since the report names the digest of the list


def _is_done(request: Request) -> bool:
    """Return whether the output is what this request has made, and only its work is left."""
    from palu.models.loading import model_folder

    output = request.output.resolve()
    record = read_record(output)
    if request.keep_work or record is None or _beside(output, "unfinished").exists():
        return False
    if not State(_beside(output, "work")).has("report", request_key(request)):
        return False
    return record.get("digests", {}).get("model") == model_digests(model_folder(request.model))


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}-{what}")


def _without_answers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation without what the models said."""

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: bare(one) for key, one in value.items() if key != "generated"}
        return [bare(one) for one in value] if isinstance(value, list) else value

    return bare(evaluation)


def _remove(work: Path) -> None:
    for name in (FORGET, RETAIN, ANNOTATION, EVALUATION, STATE):
        (work / name).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it
        work.rmdir()


def _part(report: Report | None, number: int, of: Any, note: str = "") -> Report | None:
    """Return the report of one of several equal parts of some work."""
    if report is None:
        return None

    def tell(done: int, total: int, more: str = "") -> None:
        report(100 * number + 100 * done // max(total, 1), 100 * len(of), note or more)

    return tell
