"""`palu compare`: which method forgets more for the same harm."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer

from palu.cli.data import plain_warnings, quiet, without_slices
from palu.cli.options import with_options
from palu.errors import user_errors
from palu.terminal import bars, out, say, warn
from palu.training.options import RunOptions, choices, option

if TYPE_CHECKING:
    from palu.comparison.config import Comparison, Task
    from palu.comparison.perform import Job

_output = partial(option, panel="Output")
_machine = partial(option, panel="Machine")

FAILED_STATUS = 3


@dataclass(kw_only=True)
class CompareOptions:
    """What is compared, where, and how much of it at once."""

    config: list[Path] = option(
        MISSING,
        "The comparison, YAML or JSON; docs/comparison.md has its keys. With --logs: logs.",
        argument=True,
    )
    logs: bool = option(
        False,
        "Compare evaluation logs that are there, palu's and open-unlearning's: TOFU_EVAL.json, "
        "--json files or their folders, or NAME=PATH.",
        panel="Compared with",
    )
    retain_log: Path | None = option(
        None,
        "With --logs: log of the retrained model; forget quality and privleak are made anew.",
        panel="Compared with",
    )
    output: Path | None = _output(
        None,
        "Folder for the runs and the tables; the same command goes on with what is in it, on "
        "several machines too. With --logs: for a CSV and plots.",
        shown="CONFIG without its ending; with --logs none",
    )
    plan: bool = _output(
        False,
        "Print runs, time and memory, and do nothing: time from the runs that are there, or from a "
        "short probe of a method.",
    )
    retry: bool = _output(False, "Do runs again that failed.")
    show_secrets: bool = _output(
        False, "Show sensitive words in report.html instead of black boxes."
    )
    jobs: int | None = _machine(
        None, "Runs at a time on this machine.", least=1, shown="of the configuration, or 1"
    )


@with_options(CompareOptions)
def compare(context: typer.Context, options: SimpleNamespace) -> None:
    """Compare methods of unlearning: every method's settings and seeds on one model, each run
    trained, evaluated and attacked, ranked by what is forgotten at the same loss of utility.

    The same command goes on with a comparison that was stopped. A run that diverges or fails is a
    row that says so. Exit status 3: a run failed.
    """
    if options.logs:
        _compare_logs(options)
        return
    with user_errors():
        options.config = _only(options)
        comparison = _read(options)
    with user_errors(), bars.status("Checking the configuration, models and data"):
        from palu.comparison.folder import check_folder, open_folder
        from palu.comparison.pool import call
        from palu.comparison.run_file import RunFileError
        from palu.comparison.tables import main_settings, notes, ranking_table, write_tables
        from palu.report.comparison import write_page

        facts = call(check, comparison, options.plan)
        for line in facts["notes"]:
            warn(line)
        jobs = options.jobs or comparison.jobs
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = comparison.threads or max(1, (cores or 1) // jobs)
        output = options.output or options.config.with_suffix("")
        if options.plan:
            threads = check_folder(output, comparison, facts["digests"]) or threads
    if options.plan:
        with user_errors(RunFileError):
            print_plan(output, comparison, facts, jobs=jobs, threads=threads)
        return
    with user_errors():
        threads = open_folder(output, comparison, facts["digests"], threads=threads)
    if jobs * threads > (cores or 1) and not facts["cards"]:
        warn(
            f"{jobs} runs at a time with {threads} threads each are more than {cores} cores"
            " (threads are those of the first start, or of the configuration)"
        )
    with user_errors(RunFileError):
        failed = _run(output, comparison, facts, jobs=jobs, threads=threads, retry=options.retry)
    with user_errors(ValueError, FileExistsError), bars.status("Ranking"):
        content = write_tables(output)
        columns = comparison.common.get("columns")
        write_page(
            output,
            content,
            forget=comparison.forget,
            columns=columns,
            show_secrets=options.show_secrets,
        )
    out.print(ranking_table(content))
    for line in (*main_settings(content), *notes(content)):
        out.print(line, soft_wrap=True)
    out.print(f"Written to {output}: see report.html there", soft_wrap=True)
    if failed:
        say(
            "failed",
            "red",
            f"{failed} runs failed (their run.json says why; --retry does them again)",
        )
        raise typer.Exit(FAILED_STATUS)


def _compare_logs(options: SimpleNamespace) -> None:
    """Print the table of some logs, and write it and its plots into `--output`."""
    from palu.comparison.logs import compare_logs

    with user_errors(), plain_warnings():
        if given := {"plan", "retry", "show_secrets", "jobs"} & options.given:
            name = min(given).replace("_", "-")
            raise ValueError(f"--{name} is for runs, and --logs makes none; leave it out")
        out.print(compare_logs(options.config, options.output, retain_log=options.retain_log))
    if options.output is not None:
        out.print(f"Written to {options.output}", soft_wrap=True)


def _only(options: SimpleNamespace) -> Path:
    """Return the one configuration."""
    if options.retain_log is not None:
        raise ValueError("--retain-log is for --logs; a comparison has its retrained model")
    if len(options.config) > 1:
        raise ValueError(
            f"give one configuration, not {len(options.config)} (--logs compares evaluation logs)"
        )
    return options.config[0]


def _read(options: SimpleNamespace) -> Comparison:
    """Return the configuration, with its models found."""
    from palu.models.hub import located

    comparison = configuration(options.config)
    retrained = comparison.retrained
    return replace(
        comparison,
        model=str(located(comparison.model)),
        retrained=None if retrained is None else str(located(retrained)),
    )


def configuration(path: str) -> Comparison:
    """Return what a file says, with the names of its methods and options checked."""
    from palu.cli.config_file import check_trainer_names
    from palu.comparison.config import ConfigError, check_names, comparison_options, read_config

    comparison = read_config(path)
    known = _known()
    try:
        comparison = check_names(comparison, choices(RunOptions, "method"))
        for where, given in comparison_options(comparison):
            try:
                check_trainer_names([name for name in given if name not in known], known)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from None
            for name, value in given.items():
                values = value if isinstance(value, list) else [value]
                if None in values and known.get(name) is not None:
                    must = "it must have a value, or be left out"
                    raise ConfigError(f"{where}.{name} is null; {must}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return comparison


def _known() -> dict[str, Any]:
    """Return the options of `palu unlearn` with their defaults."""
    from palu.cli.unlearn import command_of

    return {one.name: one.default for one in command_of().params}


def words_of(comparison: Comparison, task: Task, model: Path) -> list[str]:
    """Return the words of `palu unlearn` that make a run's model, in a folder `model`."""
    known = _known()
    words = ["unlearn", "--model", comparison.model, "--forget", comparison.forget]
    options = dict(task.options)
    if options.get("epochs") is not None:  # the comparison measures, and nothing is chosen by it
        options.setdefault("checks", "none")
    retain = options.pop("retain", comparison.retain)
    words += [] if retain is None else ["--retain", retain]
    for name, value in options.items():
        if value is None or (value is False and name in known):  # the Trainer's may be True
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            text = json.dumps(value)
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name not in known:
            words += ["--set", f"{name}={text}"]
        else:
            words += [flag] if value is True else [flag, text]
    return [*words, "--seed", str(task.seed), "--output", str(model)]


def check(comparison: Comparison, plan: bool = False) -> dict[str, Any]:
    """Refuse what some run would refuse, before any is done; return what is to be known of models
    and data. For a process of its own.

    Args:
        plan: return what each setting takes, too.

    Raises:
        ConfigError: settings that `palu unlearn` refuses; names them.
        ValueError: models or data that cannot be read or do not go together.
    """
    import torch

    from palu.cli.unlearn import check_unlearn
    from palu.comparison.config import ConfigError
    from palu.comparison.measure import Measuring, check_measure
    from palu.comparison.planning import key_of, setup_of, tried
    from palu.comparison.search import check_optuna
    from palu.models.loading import load_tokenizer, model_folder

    quiet()
    model_folder(comparison.model)
    if any(method.search for method in comparison.methods.values()):
        check_optuna()
    with tempfile.TemporaryDirectory(prefix="palu-") as folder, plain_warnings():
        checked: dict[str, Any] = {}
        for task in tried(comparison):
            if (key := key_of(task)) in checked:
                continue
            try:
                checked[key] = check_unlearn(words_of(comparison, task, Path(folder) / "model"))
            except Exception as error:
                text = error.format_message() if hasattr(error, "format_message") else error
                where = f"methods.{task.method}, {task.setting or 'options'}"
                raise ConfigError(f"{where}: {text}") from None
        measuring = Measuring(comparison)
        check_measure(comparison.forgetting, measuring.attacks)
    if comparison.retrained is not None:
        model_folder(comparison.retrained)
        vocabularies = [
            load_tokenizer(Path(one)).get_vocab()
            for one in (comparison.model, comparison.retrained)
        ]
        if vocabularies[0] != vocabularies[1]:
            raise ConfigError(
                f"retrained {comparison.retrained!r} has another tokenizer than model: their "
                "answers are of different tokens"
            )
    facts = {"digests": _digests(comparison), "cards": torch.cuda.device_count()}
    facts["notes"] = measuring.shared()
    if plan:
        count, longest = measuring.training_size()
        model = comparison.model
        facts["setups"] = {k: setup_of(run, model, count, longest) for k, run in checked.items()}
    return facts


def _digests(comparison: Comparison) -> dict[str, str]:
    """Return what tells whether models and data are the same, by name."""
    from palu.cli.retain import NONE, SELF
    from palu.comparison.config import comparison_options
    from palu.comparison.folder import OF_METHODS, digest
    from palu.storage.fingerprint import data_digests, model_digests

    digests = {}
    for name in ("model", "retrained"):
        if (path := getattr(comparison, name)) is not None:
            digests[name] = digest(model_digests(path))
    own = ("forget", "retain", "holdout")
    files = {name: getattr(comparison, name) for name in own}
    files |= {f"utility set {name}": file for name, file in comparison.utility.items()}
    for _, given in comparison_options(comparison):
        asked = given.get("retain")
        some = asked if isinstance(asked, list) else [asked]  # a list where it is sought
        files |= {f"{OF_METHODS}{file}": file for file in some if file not in (NONE, SELF)}
    for name, file in files.items():
        if file is None:
            continue
        here = without_slices(file)
        content = [*data_digests(here[0]).values()] if here else file
        ending = file[len(here[0]) :] if here and file.startswith(here[0]) else ""  # a slice
        digests[f"{name} file" if name in own else name] = digest([content, ending])
    return digests


def work(job: Job) -> None:
    """Do a run, in a process of its own."""
    from palu.cli.unlearn import run_unlearn
    from palu.comparison.perform import perform

    quiet()
    perform(job, run_unlearn)


def probe(comparison: Comparison, task: Task, steps: int, threads: int) -> float:
    """Return about how many seconds a run takes, in a process of its own."""
    from palu.cli.unlearn import run_unlearn
    from palu.comparison import planning

    quiet()
    with tempfile.TemporaryDirectory(prefix="palu-") as place:
        folder = Path(place) / "model"
        one = replace(task, options={**task.options, "checks": "none"})

        def words(count: int) -> list[str]:
            words = words_of(comparison, one, folder)
            return [*words, "--overwrite", "--set", f"max_steps={count}"]

        return planning.probe(comparison, steps, words, run_unlearn, folder, threads)


def print_plan(
    output: Path, comparison: Comparison, facts: dict[str, Any], *, jobs: int, threads: int
) -> None:
    """Print what the comparison takes."""
    from palu.comparison import planning
    from palu.comparison.pool import Worker
    from palu.comparison.run_file import DONE, read_run
    from palu.progress import bar

    tasks = planning.tried(comparison)
    runs = {path.parent.name: read_run(path) for path in output.glob("runs/*/run.json")}
    first = {task.method: task for task in reversed(tasks)}
    timed = {run.method for run in runs.values() if run.status == DONE}
    probed = {}
    with bar(bars, "Probing a few steps of each method") as report:
        for number, (name, task) in enumerate(first.items()):
            report(number, len(first), name)
            if name not in timed:
                steps = facts["setups"][planning.key_of(task)]["steps"]
                with tempfile.TemporaryDirectory(prefix="palu-") as folder:
                    log = Path(folder) / "log.txt"
                    worker = Worker(probe, comparison, task, steps, threads, log=log)
                    probed[name] = worker.result()
        report(len(first), len(first))
    rows = planning.rows(comparison, runs, facts["setups"], probed)
    _print_plan(rows, len(comparison.seeds), jobs, threads)


def _print_plan(rows: list[Any], seeds: int, jobs: int, threads: int) -> None:
    from rich.table import Table

    from palu.comparison.planning import memory_here

    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for name in ("runs", "there", "s a run", "GiB a step"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}{'*' if row.probed else ''}"
        size = "-" if row.memory is None else f"{row.memory / 2**30:.2f}"
        table.add_row(row.method, str(row.runs), str(row.there), seconds, size)
    out.print(table)
    left = sum((row.runs - row.there) * (row.seconds or 0) for row in rows) / jobs
    runs, there = sum(row.runs for row in rows), sum(row.there for row in rows)
    minutes, second = divmod(round(left), 60)
    hours, minute = divmod(minutes, 60)
    out.print(
        f"{runs} runs ({seeds} seeds), {there} there. The others take about {hours}:{minute:02}:"
        f"{second:02} with {jobs} at a time and {threads} threads each."
    )
    sizes = [row.memory for row in rows if row.memory is not None]
    if sizes:
        here = memory_here()
        of = "" if here is None else f" of {here / 2**30:.1f} here (on a GPU: of its own)"
        out.print(
            f"Memory: at most {jobs * max(sizes) / 2**30:.2f} GiB of tensors in training steps at "
            f"once{of}, and what the libraries take."
        )
    if any(row.probed for row in rows):
        out.print("* from a probe: a few steps, and a few examples of each set, scaled up.")


def _cards(comparison: Comparison, count: int) -> list[dict[str, str]]:
    """Return variables that give each of several runs a CUDA device of its own, where the
    configuration names none."""
    if comparison.common.get("device", "auto") not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(count)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:count]]


def _run(
    output: Path,
    comparison: Comparison,
    facts: dict[str, Any],
    *,
    jobs: int,
    threads: int,
    retry: bool,
) -> int:
    """Do all runs; return how many failed."""
    from palu.comparison.config import Task
    from palu.comparison.measures import Measures
    from palu.comparison.run_file import DONE, FAILED, Run, read_run
    from palu.comparison.runs import ORIGINAL, RETRAINED, Runs
    from palu.comparison.search import Searches
    from palu.progress import bar

    models = [Task(ORIGINAL)] + ([Task(RETRAINED)] if comparison.retrained is not None else [])
    tasks = comparison.tasks()
    cards = _cards(comparison, facts["cards"]) if jobs > 1 else []
    words = partial(words_of, comparison)
    runs = Runs(output, comparison, work, words, jobs=jobs, threads=threads, environments=cards)
    if retry:
        runs.forget_failed([*models, *tasks])

    def ended(task: Task, run: Run) -> None:
        if run.status != DONE:
            say(run.status, "red" if run.status == FAILED else "yellow", f"{task.id}: {run.reason}")

    with bar(bars, "Measuring the models") as report:
        runs.run(models, report, ended)
    for task in models:
        run = read_run(runs.file(task))
        if run.status != DONE:
            with user_errors():
                raise ValueError(
                    f"the {task.id} model cannot be measured: {run.reason} (--retry tries again)"
                )
    with user_errors():  # what every ranking would refuse
        measured = {task.id: read_run(runs.file(task)) for task in models}
        Measures(measured, comparison.forgetting, comparison.utility_metrics)
    with bar(bars, "Runs") as report:
        runs.run(tasks, report, ended)
    searches = Searches(comparison, runs.file, measured[ORIGINAL])
    while more := searches.next():
        if retry:
            runs.forget_failed(more)
        with bar(bars, "Runs of a search") as report:
            runs.run(more, report, ended)
        tasks += more
    statuses = [read_run(runs.file(task)).status for task in tasks]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    out.print(", ".join(f"{count} runs {status}" for status, count in counts.items()))
    return counts.get(FAILED, 0)
