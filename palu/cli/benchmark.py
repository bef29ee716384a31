"""`palu evaluate --benchmark` and `--lm-eval`: benchmarks of the field on their own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from palu.cli.data import plain_warnings, quiet
from palu.errors import user_errors
from palu.terminal import bars, out

_TAKEN = {
    "model",
    "benchmark",
    "data",
    "split",
    "retain_log",
    "output",
    "overwrite",
    "json",
    "plots",
}
_TAKEN |= {"batch_size", "dtype", "device", "allow_missing"}
_TAKEN |= {"lm_eval", "lm_eval_tasks", "lm_eval_options"}


def as_tofu(options: SimpleNamespace) -> None:
    """Turn `--benchmark tofu --data DIR` into `--tofu DIR`.

    Raises:
        ValueError: `--data` without a benchmark, or a benchmark without data.
    """
    if options.benchmark is None:
        if options.data is not None:
            raise ValueError(f"--data {options.data!r} is of a benchmark: add --benchmark NAME")
        return
    if options.data is None:
        raise ValueError(f"--benchmark {options.benchmark} needs --data: a folder or an id")
    if options.benchmark == "tofu":
        if options.tofu is not None:
            raise ValueError("--tofu DIR is --benchmark tofu --data DIR: give one of them")
        options.tofu, options.benchmark, options.data = Path(options.data), None, None


def without_files(options: SimpleNamespace) -> bool:
    """Return whether a benchmark or `--lm-eval` is asked for, and no file of the user's or
    TOFU's."""
    alone = options.forget is None and options.tofu is None
    return options.benchmark is not None or (options.lm_eval is not None and alone)


def check_places(options: SimpleNamespace, inputs: Callable[[], list[str]]) -> None:
    """Check that `--json` and `--plots` may be written, before any work.

    Args:
        inputs: gives the paths of data, beside `--retain-log`, which must not be replaced.

    Raises:
        ValueError, FileExistsError: one of them may not.
    """
    from palu.storage.output import check_json

    json, plots = options.json, options.plots
    if json is not None:
        if not json.resolve().parent.is_dir():
            raise ValueError(f"--json: the folder {str(json.resolve().parent)!r} does not exist")
        check_json(json, inputs=(*inputs(), options.retain_log))
    if plots is not None and plots.exists() and not plots.is_dir():
        raise ValueError(f"--plots {str(plots)!r} is a file; name a folder")


def write_plots(log: dict[str, Any], model: str, folder: Path) -> None:
    """Write a log's numbers as CSV and as a picture."""
    from palu.comparison.logs import logs_frame, take_log, write_logs
    from palu.evaluation.eval_log import Log

    logs = [take_log(Log(log, "log"), model)]
    write_logs(logs, logs_frame(logs), folder)
    out.print(f"Plots written to {folder}", soft_wrap=True)


def claim_files(run: Any, title: str) -> None:
    """Keep other runs from what a run writes, and all but the main process from saying anything.

    Args:
        run: with `context`, `options` and `is_main`.
        title: of the benchmark, as its files are named.
    """
    from palu.storage.files import locked
    from palu.storage.output import evaluation_files

    bars.quiet = out.quiet = not run.is_main
    json, output = run.options.json, run.options.output
    if not run.is_main:
        return
    written = [] if output is None else [output / name for name in evaluation_files(title)]
    if json is not None and json.resolve() in {path.resolve() for path in written}:
        raise ValueError(f"--json {str(json)!r} is a file of --output; name another")
    for path in (json, output):
        if path is not None:
            run.context.with_resource(locked(path))


def measure_tasks(run: Any, save: Callable[[dict[str, Any]], None]) -> None:
    """Add to a run's log what its `harness` measures on its model.

    Args:
        run: with `harness`, `model`, `tokenizer`, `options`, `processes` and `log`.
        save: called after each task.
    """
    from palu.evaluation.benchmarks import Meter
    from palu.models.wrappers import eval_mode

    size = run.options.batch_size
    meter = Meter(run.model, run.tokenizer, batch_size=size, processes=run.processes)
    with user_errors(), plain_warnings(), eval_mode(run.model):
        run.harness.run(meter, run.log, save)


class BenchmarkRun:
    """One `palu evaluate --benchmark`, or `--lm-eval` alone, whose steps are called in the order in
    which they stand here."""

    def __init__(self, context: typer.Context, options: SimpleNamespace) -> None:
        self.context, self.options = context, options

    def check(self) -> None:
        """Refuse options that do not go together."""
        from palu.distributed import Processes
        from palu.evaluation.benchmarks import BENCHMARKS
        from palu.evaluation.benchmarks.harness import Harness, wanted
        from palu.models.hub import place_beside
        from palu.models.loading import model_folder, resolve_device

        quiet()
        options = self.options
        self.kind = Harness if options.benchmark is None else BENCHMARKS[options.benchmark]
        self._refuse_others()
        self.harness = wanted(options.lm_eval, options.lm_eval_tasks, options.lm_eval_options)
        model_folder(options.model)
        check_places(options, list)
        if options.output is None:
            options.output = place_beside(options.model, f"evals_{self.kind.name}", "--output")
        self.device = resolve_device(options.device)
        self.processes = Processes.launched(cpu=self.device.type == "cpu")
        self.is_main = self.processes.rank == 0  # the others write nothing

    def _refuse_others(self) -> None:
        """Refuse what a benchmark decides by itself, or does not have."""
        options = self.options
        asked = "--lm-eval" if options.benchmark is None else f"--benchmark {options.benchmark}"
        if others := sorted(options.given - _TAKEN):
            raise ValueError(
                f"--{others[0].replace('_', '-')} is not for {asked}, which decides by itself "
                "what is asked and how"
            )
        if options.split is not None and options.benchmark is None:
            raise ValueError(f"--split {options.split!r} is of a benchmark: add --benchmark NAME")
        if options.retain_log is not None and not self.kind.uses_retrained:
            raise ValueError(
                f"--retain-log is not for {asked}: no number of it is against a retrained model"
            )

    def claim_places(self) -> None:
        """Keep other runs from what this one writes."""
        claim_files(self, self.kind.title)

    def load(self) -> None:
        """Read the data, the model and what an earlier run left."""
        from palu.evaluation.eval_log import Log
        from palu.models.checks import check_causal
        from palu.models.loading import check_token_ids, load_model, load_tokenizer

        options = self.options
        log = options.retain_log
        self.retrained = None if log is None else Log.read(log, "--retain-log")
        self.benchmark = None
        if options.benchmark is not None:
            self.benchmark = self.kind(options.data, options.split)
            self.benchmark.check_retrained(self.retrained)
        self.tokenizer = load_tokenizer(options.model)
        if self.benchmark is not None:
            self.benchmark.check_tokenizer(self.tokenizer)
        self.model = load_model(
            options.model, options.dtype, options.device, allow_missing=options.allow_missing
        )
        text = self.tokenizer("A text of several words.", return_tensors="pt")["input_ids"][0]
        check_token_ids(self.model, self.tokenizer, [{"input_ids": text.tolist()}])
        check_causal(self.model, [text])
        self.store = self._open_store()

    def _open_store(self) -> Any:
        from palu.evaluation.eval_log import LogFolder
        from palu.storage.fingerprint import model_fingerprint, tokenizer_fingerprint

        options = self.options
        settings = {
            "model": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        for one in (self.benchmark, self.harness):
            settings |= {} if one is None else one.settings()
        return LogFolder(
            options.output, settings, overwrite=options.overwrite, name=self.kind.title
        )

    def measure(self) -> None:
        """Measure what the log does not have yet."""
        from palu.evaluation.benchmarks import Meter
        from palu.evaluation.eval_log import LogError
        from palu.models.wrappers import eval_mode
        from palu.progress import bar

        meter = Meter(
            self.model,
            self.tokenizer,
            batch_size=self.options.batch_size,
            processes=self.processes,
            bar=lambda title: bar(bars, title),
        )
        # One process writes, and what it has is what all of them start from.
        self.log: dict[str, Any] = self.processes.gather(self.store.log)[0]
        if self.is_main:
            with user_errors():
                self.store.begin()
        save = self.store.save if self.is_main else lambda log: None
        if self.benchmark is not None:
            with user_errors(LogError), plain_warnings(), eval_mode(self.model):
                self.benchmark.run(meter, self.log, save, self.retrained, self.store.source)
        if self.harness is not None:
            measure_tasks(self, save)

    def write(self) -> None:
        """Print the table and write `--json`."""
        from palu.evaluation.eval_log import summary
        from palu.evaluation.report import summary_table
        from palu.models.hub import shown_model
        from palu.storage.files import write_json
        from palu.storage.output import check_json, versions

        if not self.is_main:
            return
        model, json = shown_model(self.options.model), self.options.json
        out.print(summary_table(model, summary(self.log)))
        notes = [] if self.benchmark is None else self.benchmark.missing(self.log, self.retrained)
        for note in notes:
            out.print(f"Not measured: {note}", soft_wrap=True)
        out.print(f"Written to {self.store.folder}", soft_wrap=True)
        if json is not None:
            check_json(json)
            content = {"model": model, "template": None, "versions": versions()}
            write_json(json, {**content, "summary": summary(self.log)})
        if self.options.plots is not None:
            write_plots(self.log, Path(model).name, self.options.plots)
