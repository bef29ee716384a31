"""`palu erase`: from a request to erase to a model that one can hand over, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from palu.cli.data import find_models, plain_warnings, quiet
from palu.cli.options import OutputOptions, WeightOptions, with_options
from palu.cli.report import NOT_GOOD, print_verdict
from palu.cli.unlearn import run_unlearn
from palu.errors import user_errors
from palu.terminal import bars, out, say
from palu.training.options import option

_data = partial(option, panel="Data")
_compared = partial(option, panel="Compared with")
_output = partial(option, panel="Output")
_training = partial(option, panel="Training")
# Other errors of the file system may be a full disk, which has a status of its own.
_MISTAKES = (ValueError, TypeError, FileExistsError, FileNotFoundError, PermissionError)


@dataclass(kw_only=True)
class EraseOptions:
    """What is erased out of what, and what is done with it."""

    model: Path = option(MISSING, "Model folder, or a model on the hub (org/name).", panel="Model")
    records: str = _data(
        MISSING,
        "The data that the model was tuned on, or as much of it as there is: any format that palu "
        "reads. Records with a term are forgotten.",
    )
    terms: list[str] | None = _data(
        None,
        "Values to erase: a CSV, JSON or text file of them, or one value. Found however they are "
        "written. Can be given several times.",
        shown="the spans that the records have",
        metavar="FILE|TEXT",
    )
    columns: str | None = _data(
        None, "Columns of other names: question=..,answer=.. (or text=.., messages=..)."
    )
    retain: str | None = _data(
        None, "What to keep, same formats.", shown="the records without a term"
    )
    retain_columns: str | None = _data(None, "Columns of --retain.")
    retrained: Path | None = _compared(
        None, "Model folder of a model that never saw the forget set."
    )
    output: Path = _output(
        MISSING, "Folder for the model (or adapter), report.html, model card and measurements."
    )
    keep_cache: bool = _output(
        False, "Keep the reference cache, which holds data derived from what is erased."
    )
    keep_work: bool = _output(
        False, "Keep OUTPUT-work: the records with their spans, and what the models said."
    )
    config: Path | None = _training(None, "Options of palu unlearn, YAML or JSON.")
    lora_rank: int | None = _training(
        None, "Train a LoRA adapter of this rank instead of the model's weights."
    )
    save_steps: int | None = _training(
        None, "Steps between checkpoints, from which a run that was stopped goes on."
    )
    quick: bool = option(False, "Fewer attacks, for a first look.", panel="Attacks")
    seed: int = option(0, "Of everything that is drawn.", panel="Machine", least=0)


@with_options(EraseOptions, OutputOptions, (WeightOptions, "dtype", "device"))
def erase(context: typer.Context, options: SimpleNamespace) -> None:
    """Erase values from a model: find them in the records, unlearn these, measure, attack, report.

    The same command goes on with a run that was stopped. Exit status 3: the model still knows what
    was to be erased, an attack brings it out, or the rest of the model was harmed.
    """
    find_models(options, "model", "retrained")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.erase import erase as run
        from palu.erase.state import STATE

        quiet()
        request = _request(options)
    begun = []  # the stages; a run that is refused before the first has no work to go on with

    def stage(number: int, title: str) -> Any:
        begun.append(title)
        return _stage(number, title)

    try:
        with user_errors(*_MISTAKES), plain_warnings():
            report = run(request, overwrite=options.overwrite, unlearn=run_unlearn, stage=stage)
    except BaseException:
        work = Path(f"{request.output}-work")
        if begun and (work / STATE).is_file():
            say("stopped", "red", f"the same command goes on; until then {work} has data")
        raise
    print_verdict(report["verdict"])
    out.print(f"Written to {options.output}: see report.html there", soft_wrap=True)
    if report["verdict"]["level"] == "bad":
        raise typer.Exit(NOT_GOOD)


def _request(options: SimpleNamespace) -> Any:
    from palu.erase import Request
    from palu.models.loading import model_folder, resolve_device, resolve_dtype
    from palu.models.lora import refuse_adapter

    for folder in (options.model, options.retrained):
        if folder is not None:
            model_folder(folder)
    refuse_adapter(options.model)
    if options.retain_columns is not None and options.retain is None:
        raise ValueError("--retain-columns is of --retain: add --retain FILE")
    if options.keep_cache and options.config is None:
        raise ValueError(
            "--keep-cache: add --config FILE that says reference: cached; by default "
            "there is no cache"
        )
    resolve_device(options.device)
    resolve_dtype(options.dtype)
    words: list[str] = []
    for name in ("config", "lora_rank", "save_steps"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return Request(
        model=options.model,
        records=options.records,
        output=options.output,
        terms=options.terms or (),
        columns=options.columns,
        retain=options.retain,
        retain_columns=options.retain_columns,
        retrained=options.retrained,
        options=[*words, *(["--keep-cache"] if options.keep_cache else [])],
        quick=options.quick,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
        keep_work=options.keep_work,
    )


@contextmanager
def _stage(number: int, title: str) -> Iterator[Any]:
    """Show one stage: a bar, or for unlearning, which has bars of its own, a line."""
    from palu.erase import STAGES
    from palu.progress import bar

    title = f"{number}/{len(STAGES)} {title}"
    if title.endswith(STAGES["unlearn"]):
        bars.print(title)
        yield None
        return
    with bar(bars, title) as report:
        yield report
