"""From a request to erase to a model that one can hand over: find what to forget, unlearn it,
measure, attack, report; in one run that is gone on with where it was stopped.

Beside the output lie, until it is whole, `OUTPUT-unfinished` (the model, and what was measured) and
`OUTPUT-work` (the records with their spans, which is the data that is to be erased: only its owner
may read it, and it is removed at the end).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
    versions,
)

if TYPE_CHECKING:
    from palu.data.records import Example
    from palu.evaluation.attacks.settings import AttackSettings

STATE, STATE_FORMAT = "erase.json", "palu-erase/1"
FORGET, RETAIN = "forget.jsonl", "retain.jsonl"
ANNOTATION, EVALUATION, ATTACK = "annotation.json", "evaluation.json", "attack.json"
REPORT, REPORT_JSON = "report.html", "report.json"
STAGES = {
    "annotate": "Finding what to forget",
    "unlearn": "Unlearning",
    "evaluate": "Evaluating",
    "attack": "Attacking",
    "report": "Writing the report",
}
KEPT = 200  # retain records that are measured and attacked at most, drawn by the seed

Report = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is erased, out of what, and how.

    Attributes:
        model: folder of the model, or its id on the hub.
        records: the data that the model was tuned on, or as much of it as there is: a file, folder
            or id on the hub that `palu.load_examples` reads. The records in which a term is found
            are forgotten.
        output: folder for the result.
        terms: files of values to erase, or values; none: the spans that the records have already.
        columns, retain_columns: of `records` and `retain`, see `palu.load_examples`.
        retain: what to keep; None: the other records of `records`.
        retrained: folder of a model that never saw what is erased, for comparison.
        options: more words of `palu unlearn`'s command line: `("--lora-rank", "16")`.
        quick: a first look with few attacks.
        seed: of training, attacks, and the choice of what is measured.
        dtype, device: of the weights.
        keep_work: leave `OUTPUT-work` where it is.
    """

    model: str | Path
    records: str
    output: str | Path
    terms: str | Sequence[str] = ()
    columns: str | None = None
    retain: str | None = None
    retain_columns: str | None = None
    retrained: str | Path | None = None
    options: Sequence[str] = ()
    quick: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    keep_work: bool = False

    @property
    def inputs(self) -> list[Path]:
        """Return the files and folders that are read."""
        from palu.data.files import local_path

        named = [self.records, self.retain, *(term for term in self.terms if os.path.exists(term))]
        places = [local_path(one) for one in named if one is not None]
        return [Path(one) for one in (*places, self.model, self.retrained) if one is not None]


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


class _State:
    """What was done in a work folder, and of what inputs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        # A run that was killed with its first file has left a part of that alone.
        begun = f".{STATE}.*.partial"
        there = folder.is_dir() and not all(path.match(begun) for path in folder.iterdir())
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is in the way of the work of this run; move it away")
        content = read_object(self.path) if self.path.is_file() else {}
        if there and content.get("format") != STATE_FORMAT:
            raise ValueError(
                f"{str(folder)!r} is in the way of the work of this run, and palu erase did not "
                "write it; move it away"
            )
        self.stages: dict[str, str] = dict(content.get("stages", {}))
        self.begun: str | None = content.get("begun")  # the key of a stage that was not ended

    def has(self, stage: str, key: str) -> bool:
        """Return whether a stage was done with these inputs."""
        return self.stages.get(stage) == key

    def begin(self, stage: str, key: str) -> None:
        """Note that a stage is begun, and that what comes after it is not done."""
        names = list(STAGES)
        done = {
            name: self.stages[name] for name in names[: names.index(stage)] if name in self.stages
        }
        self.stages, self.begun = done, key
        if self.path.parent.is_dir():
            self.write()

    def add(self, stage: str, key: str) -> None:
        """Note that a stage is done."""
        self.stages[stage], self.begun = key, None
        self.write()

    def write(self) -> None:
        """Write the state, into a folder that only its owner may read."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.path, {"format": STATE_FORMAT, "stages": self.stages, "begun": self.begun})


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
        self.state = _State(self.work)
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
        key = _data_key(request)
        if self.state.has("annotate", key) and self.forget.is_file():
            return
        with self.doing("annotate", key) as report:
            records = load_records(request.records, request.columns)
            done, terms = _annotated(records, request.terms, report)
            marked = [record for record in done.records if record["spans"]]
            if not marked:
                what = "has no spans" if terms is None else "has none of the terms"
                raise ValueError(f"{request.records} {what}: there is nothing to forget")
            _warn_of_terms(terms)
            rest = [record for record in done.records if not record["spans"]]
            if request.retain is not None:
                rest = _without_terms(request, terms)
            self.state.write()
            _write_private(self.forget, marked)
            _write_private(self.retain, rest)
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
        more = [_source_digest(word) for word in request.options]  # one is a --config file
        key = _key(words, data, more, model_digests(self.models["original"]))
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
        key = _key(self.state.stages["unlearn"], made)
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
                with _private(path):
                    write_json(path, {"format": "palu-evaluation/1", "key": key, "models": known})

    def attack(self) -> None:
        """Attack every model; what was done before a stop is not done again."""
        from palu.evaluation.attacks.probes import NothingToAsk
        from palu.evaluation.attacks.run import run_attacks
        from palu.models.loading import load_tokenizer

        settings = self._attack_settings()
        key = _key(self.state.stages["evaluate"], settings.to_dict())  # of the same models
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

        with self.doing("report", _request_key(self.request)) as tell:
            self._note_request()
            write_json(self.folder / ANNOTATION, read_object(self.work / ANNOTATION))
            evaluation = read_object(self.work / EVALUATION)
            evaluation.pop("key")
            # The page needs the answers, to judge and to mask them; the folder may not keep them.
            with _private(self.folder / EVALUATION):
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


# ---- records -------------------------------------------------------------------------------------


def _annotated(records: Any, terms: Sequence[str], report: Report | None) -> tuple[Any, Any]:
    """Return the records with spans, and the annotator of the terms, None without terms."""
    from palu.annotation import Terms, annotate, read_terms

    found = Terms(read_terms(list(terms))) if terms else None
    given = SimpleNamespace(name="given", settings={}, find=lambda examples: [()] * len(examples))
    return annotate(records, annotators=[found or given], report=report), found


def _warn_of_terms(terms: Any) -> None:
    """Warn, by where they stand, of terms that were not found, not looked for, or everywhere."""
    if terms is None:
        return
    kinds = {
        "are in no record": [term.where for term in terms.not_found],
        "are too short or too common to be looked for": [term.where for term in terms.skipped],
        "are in most records, and may be common words": [term.where for term, _ in terms.frequent],
    }
    for said, places in kinds.items():
        if places:
            more = f"; and {len(places) - 5} more" if len(places) > 5 else ""
            count = f"{len(places)} of {len(terms.terms) + len(terms.skipped)} terms"
            warnings.warn(f"{count} {said}: {'; '.join(places[:5])}{more}", stacklevel=2)
    if terms.warning:
        warnings.warn(terms.warning, stacklevel=2)


def _without_terms(request: Request, terms: Any) -> list[dict[str, Any]]:
    """Return the records of `--retain`. Raises ValueError where one has a term: it would hold in
    place what is to be erased."""
    from palu.annotation import annotate
    from palu.data.files import load_records

    records = load_records(request.retain, request.retain_columns)
    if terms is not None:
        done = annotate(records, annotators=[terms], replace=True).records
        rows = {row for row, one in enumerate(done) if one["spans"]} | {*terms.aside}
        if has := [where for row, (_, where) in enumerate(records) if row in rows]:
            more = f" and {len(has) - 3} more" if len(has) > 3 else ""
            raise ValueError(
                f"--retain has terms to erase, and would hold them in place: {', '.join(has[:3])}"
                f"{more}; move these records to --records"
            )
    return [record for record, _ in records]


def _is_done(request: Request) -> bool:
    """Return whether the output is what this request has made, and only its work is left."""
    from palu.models.loading import model_folder

    output = request.output.resolve()
    record = read_record(output)
    if request.keep_work or record is None or _beside(output, "unfinished").exists():
        return False
    if not _State(_beside(output, "work")).has("report", _request_key(request)):
        return False
    return record.get("digests", {}).get("model") == model_digests(model_folder(request.model))


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}-{what}")


def _request_key(request: Request) -> str:
    """Return what tells whether a request is another one, but for the content of its models."""
    own = {**vars(request), "output": None, "keep_work": None}
    more = [_source_digest(word) for word in request.options]
    return _key(_data_key(request), own, more, versions())


def _data_key(request: Request) -> str:
    sources = (request.records, request.retain, *request.terms)
    return _key(request.columns, request.retain_columns, *map(_source_digest, sources))


def _source_digest(source: str | None) -> Any:
    """Return what tells whether a file, or what is none, is another one."""
    from palu.data.files import local_path

    place = None
    with suppress(ValueError):  # a term may be no file at all
        place = local_path(source)
    return source, None if place is None else data_digests(place)


def _key(*parts: Any) -> str:
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()


# ---- files ---------------------------------------------------------------------------------------


def _write_private(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    from palu.annotation.output import write_records

    with _private(path):
        write_records(path, records)


@contextmanager
def _private(path: Path) -> Iterator[None]:
    """Let nobody but its owner read what is written in the block."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


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


# ---- progress ------------------------------------------------------------------------------------


def _part(report: Report | None, number: int, of: Any, note: str = "") -> Report | None:
    """Return the report of one of several equal parts of some work."""
    if report is None:
        return None

    def tell(done: int, total: int, more: str = "") -> None:
        report(100 * number + 100 * done // max(total, 1), 100 * len(of), note or more)

    return tell
