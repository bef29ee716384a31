"""`palu evaluate`: TOFU's metrics on TOFU's files, and what the user's own allow of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import typer

from palu.cli.benchmark import (
    BenchmarkRun,
    as_tofu,
    check_places,
    claim_files,
    measure_tasks,
    without_files,
    write_plots,
)
from palu.cli.data import find_models, plain_warnings, quiet, template_of, without_slices
from palu.cli.options import FILES, DataOptions, TextOptions, WeightOptions, with_options
from palu.errors import user_errors
from palu.terminal import bars, out
from palu.training.options import option

_data = partial(option, panel="Data")
_compared = partial(option, panel="Compared with")
_output = partial(option, panel="Output")
_sampling = partial(option, panel="Samples")

COMPARED = ("original", "reference_model")
SAMPLING = ("samples", "temperature", "seed")


@dataclass(kw_only=True)
class EvaluateOptions:
    """What is measured, with what, and where the numbers go."""

    forget: str | None = _data(
        None,
        f"What was forgotten: a file ({FILES}), a datasets folder, or a data set on the hub "
        "(org/name:split). Takes a slice.",
    )
    benchmark: Literal["tofu", "muse", "wmdp", "rwku"] | None = _data(
        None, "Instead of --forget: measure what a benchmark of the field measures, on --data."
    )
    data: str | None = _data(
        None,
        "Of --benchmark: a folder with its files, or its id on the hub (muse-bench/MUSE-News, "
        "cais/wmdp, jinzhuoran/RWKU).",
    )
    tofu: Path | None = _data(None, "Folder with TOFU's files: --benchmark tofu --data DIR.")
    split: str | None = _data(
        None,
        "Of TOFU: forget01, forget10, ...; of WMDP: topics, such as bio,cyber; of RWKU: a person.",
        shown="all",
    )
    lm_eval: str | None = _data(
        None, "Tasks of lm-evaluation-harness: mmlu,arc_easy. Alone, or with any other data."
    )
    lm_eval_tasks: Path | None = _data(None, "Of --lm-eval: a folder with task files of your own.")
    lm_eval_options: str | None = _data(
        None,
        'Of --lm-eval: a JSON object: \'{"limit": 100, "num_fewshot": 5, '
        '"apply_chat_template": true}\'.',
    )
    holdout: str | None = _data(
        None,
        "Examples like those to forget that no model saw: membership inference.",
        shown="with --tofu its holdoutNN.json for forgetNN, if there",
    )
    retain_log: Path | None = _compared(
        None, "TOFU_EVAL.json of the retrained model (MUSE_EVAL.json): forget quality, privleak."
    )
    original: Path | None = _compared(
        None, "Model folder before unlearning: how fluent it finds the answers."
    )
    reference_model: Path | None = _compared(None, "Model folder that mia_reference compares with.")
    fluency_classifier: Path | None = _compared(
        None, "Classifier folder whose class 0 is fluent text."
    )
    output: Path | None = _output(
        None,
        "Folder for TOFU_EVAL.json and TOFU_SUMMARY.json (MUSE_EVAL.json, ...); a run that was "
        "stopped goes on from it.",
        shown="with --tofu MODEL/evals_SPLIT, with --benchmark MODEL/evals_muse; else none",
    )
    overwrite: bool = _output(False, "Measure anew what --output holds.")
    json: Path | None = _output(None, "Write every number and answer to this file.")
    plots: Path | None = _output(
        None,
        "Folder for the numbers as logs.csv and as a picture, logs.png; `palu compare --logs` puts "
        "several models side by side.",
    )
    batch_size: int = option(16, "Examples in a forward pass.", least=1, panel="Machine")
    max_new_tokens: int = _data(200, "Limit of an answer; 0: none.", least=0)
    samples: int = _sampling(
        0, "Answers drawn for each forget question with a secret: how often one is said.", least=0
    )
    temperature: float = _sampling(1.0, "Of the samples.")
    seed: int = _sampling(0, "Of the samples.", least=0)


@with_options(
    EvaluateOptions,
    (DataOptions, "retain", "retain_columns"),
    TextOptions,
    WeightOptions,
)
def evaluate(context: typer.Context, options: SimpleNamespace) -> None:
    """Measure what a model still knows of a forget and a retain file, or the metrics of TOFU or
    another benchmark."""
    with user_errors():
        as_tofu(options)
    find_models(options, "model", "original", "reference_model", "fluency_classifier")
    run = (BenchmarkRun if without_files(options) else EvaluateRun)(context, options)
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        run.check()
    with user_errors():
        run.claim_places()
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        run.load()
    run.measure()
    run.write()
    run.processes.leave()


class EvaluateRun:
    """One `palu evaluate`, whose steps are called in the order in which they stand here."""

    def __init__(self, context: typer.Context, options: SimpleNamespace) -> None:
        self.context, self.options = context, options

    def check(self) -> None:
        """Refuse options that do not go together, and find the files."""
        from palu.distributed import Processes
        from palu.evaluation.benchmarks.harness import wanted
        from palu.evaluation.datasets import tofu_files
        from palu.models.hub import place_beside
        from palu.models.loading import folder_with, model_folder, resolve_device
        from palu.run_record import RECORD

        quiet()
        options = self.options
        _check_sampling(options)
        for name in ("model", "original", "reference_model", "fluency_classifier"):
            if getattr(options, name) is not None:
                model_folder(getattr(options, name))
        check_places(
            options, lambda: without_slices(options.forget, options.retain, options.holdout)
        )
        self.files = _own_files(options.forget, options.retain, options.tofu, options.split)
        self.columns = dict.fromkeys(("forget", "holdout"), options.columns)
        self.columns["retain"] = options.retain_columns or options.columns
        if options.tofu is not None and any(self.columns.values()):
            raise ValueError("--tofu's files have columns of known names: leave --columns")
        if options.tofu is not None:
            self.files = tofu_files(options.tofu, options.split)
            if options.output is None:
                options.output = place_beside(options.model, f"evals_{options.split}", "--output")
        if options.holdout is not None:
            self.files["holdout"] = options.holdout
        self.harness = wanted(options.lm_eval, options.lm_eval_tasks, options.lm_eval_options)
        if options.reference_model is not None and "holdout" not in self.files:
            raise ValueError("--reference-model is for membership inference: add --holdout FILE")
        self.template = template_of(options, folder_with(RECORD, options.model))
        self.device = resolve_device(options.device)
        self.processes = Processes.launched(cpu=self.device.type == "cpu")
        self.is_main = self.processes.rank == 0  # the others write nothing

    def claim_places(self) -> None:
        """Keep other runs from what this one writes."""
        claim_files(self, "TOFU")

    def load(self) -> None:
        """Read the data, the models and what an earlier run left."""
        from palu.evaluation.datasets import ANSWER, read_sets
        from palu.evaluation.eval_log import Log
        from palu.evaluation.evaluator import check_retrained
        from palu.evaluation.fluency import FluencyClassifier
        from palu.models.checks import check_causal, first_texts
        from palu.models.loading import check_token_ids, load_tokenizer

        options = self.options
        self.tokenizer = load_tokenizer(options.model)
        self.sets = read_sets(
            self.files,
            self.tokenizer,
            template=self.template,
            max_length=options.max_length,
            repair=options.repair,
            columns=self.columns,
        )
        log = options.retain_log
        self.retrained = None if log is None else Log.read(log, "--retain-log")
        check_retrained(self.retrained, self.sets)
        for name in COMPARED:
            if (folder := getattr(options, name)) is not None:
                _check_tokenizer(name, self.tokenizer, load_tokenizer(folder), folder)
        folder = options.fluency_classifier
        self.classifier = None if folder is None else FluencyClassifier(folder, self.device)
        self.model = self._load_model(options.model)
        self.answers = [row for data in self.sets.values() for row in data.every_row()]
        check_token_ids(self.model, self.tokenizer, self.answers)
        check_causal(
            self.model, first_texts([row for row, *_ in self.sets["forget"].rows[ANSWER][:2]])
        )
        self.store = None if options.output is None else self._open_store()

    def _load_model(self, folder: Path) -> Any:
        from palu.models.loading import load_model

        options = self.options
        return load_model(
            folder, options.dtype, options.device, allow_missing=options.allow_missing
        )

    def _loads(self, name: str) -> Callable[[], Any] | None:
        """Return what loads a model that is compared with, once; None where none is named."""
        from palu.models.loading import check_token_ids

        folder = getattr(self.options, name)

        @cache
        def load() -> Any:
            with user_errors():
                other = self._load_model(folder)
                check_token_ids(other, self.tokenizer, self.answers)
                return other

        return None if folder is None else load

    def _open_store(self) -> Any:
        """Return the numbers that an earlier run of the same settings left in `--output`."""
        from palu.evaluation.eval_log import LogFolder
        from palu.storage.fingerprint import folder_digest, model_fingerprint, tokenizer_fingerprint

        options = self.options
        settings = {
            "model": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "template": self.template.to_dict(),
            "max_length": options.max_length,
            "max_new_tokens": options.max_new_tokens,
            **{f"data_{name}": data.digest() for name, data in self.sets.items()},
            "spans_forget": self.sets["forget"].span_digest(),
        }
        if options.samples:
            settings |= {name: getattr(options, name) for name in SAMPLING}
        if self.harness is not None:
            settings |= self.harness.settings()
        for name in (*COMPARED, "fluency_classifier"):
            path = getattr(options, name)
            if path is not None:
                settings[name] = str(path.resolve())
                settings[f"{name}_files"] = folder_digest(path)  # it may be replaced there
        return LogFolder(options.output, settings, overwrite=options.overwrite)

    def measure(self) -> None:
        """Measure what the log does not have yet."""
        from palu.evaluation.eval_log import LogError
        from palu.evaluation.evaluator import Evaluator
        from palu.progress import bar

        options, store = self.options, self.store
        self.evaluator = Evaluator(
            self.model,
            self.tokenizer,
            self.sets,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            processes=self.processes,
            bar=lambda title: bar(bars, title),
            reference=self._loads("reference_model"),
            classifier=self.classifier,
            original=self._loads("original"),
            **{name: getattr(options, name) for name in SAMPLING},
        )
        # One process writes, and what it has is what all of them start from.
        self.log: dict[str, Any] = self.processes.gather({} if store is None else store.log)[0]
        writes = store is not None and self.is_main
        if writes:
            with user_errors():
                store.begin()
        save = store.save if writes else lambda log: None
        source = "log" if store is None else store.source
        with user_errors(LogError), plain_warnings():
            self.evaluator.run(self.log, self.retrained, save, source)
        if self.harness is not None:
            measure_tasks(self, save)

    def write(self) -> None:
        """Print the tables and write `--json`."""
        from palu.evaluation.eval_log import summary
        from palu.evaluation.quality_error import error_sentence
        from palu.evaluation.report import (
            metrics_table,
            missing_inputs,
            summary_table,
            text_table,
        )
        from palu.models.hub import shown_model
        from palu.storage.files import write_json
        from palu.storage.output import check_json, versions

        options, json = self.options, self.options.json
        by_tofu = options.tofu is not None
        shown = [name for name in ("forget", "retain") if name in self.sets]
        shown = shown if json is not None or not by_tofu else []
        results = {name: self.evaluator.results(name) for name in shown}
        if not self.is_main:
            return
        model = shown_model(options.model)
        if not by_tofu:
            lines = [(Path(model).name, name, result) for name, result in results.items()]
            out.print(metrics_table(model, lines))
            out.print(text_table(results))
        out.print(summary_table(model, summary(self.log)))
        if sentence := error_sentence(self.log):
            out.print(sentence, soft_wrap=True)
        for note in missing_inputs(self.log, self.sets, self.retrained, tofu=by_tofu):
            out.print(f"Not measured: {note}", soft_wrap=True)
        if self.store is not None:
            out.print(f"Written to {self.store.folder}", soft_wrap=True)
        if json is not None:
            content = {"model": model, "template": self.template.to_dict(), "versions": versions()}
            content["data"] = {name: data.digest() for name, data in self.sets.items()}
            check_json(json)
            write_json(json, {**content, **results, "summary": summary(self.log)})
        if options.plots is not None:
            write_plots(self.log, Path(model).name, options.plots)


def _own_files(
    forget: str | None, retain: str | None, tofu: Path | None, split: str | None
) -> dict[str, str]:
    """The user's own files; none where TOFU's are asked for."""
    if tofu is not None:
        if split is None:
            raise ValueError("--tofu needs --split, such as forget10")
        if forget is not None or retain is not None:
            raise ValueError("--tofu names its forget and retain files: leave --forget, --retain")
        return {}
    if split is not None:
        raise ValueError(f"--split {split!r} is TOFU's: add --tofu DIR")
    if forget is None:
        raise ValueError("nothing to evaluate: give --forget FILE, or --tofu DIR and --split NAME")
    return {"forget": forget} | ({} if retain is None else {"retain": retain})


def _check_sampling(options: SimpleNamespace) -> None:
    from palu.evaluation.passes import check_sampling

    try:
        check_sampling(options.samples, options.temperature, options.max_new_tokens)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name} {rest}") from None
    if options.original is not None and not options.max_new_tokens:
        raise ValueError("--original judges the answers: --max-new-tokens must be above 0, not 0")


def _check_tokenizer(name: str, tokenizer: Any, other: Any, folder: Path) -> None:
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"--{name.replace('_', '-')} {str(folder)!r} has another tokenizer than the model: "
            "their losses are of different tokens"
        )
