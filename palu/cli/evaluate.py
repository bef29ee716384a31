"""`palu evaluate`: TOFU's metrics on TOFU's files, and what the user's own allow of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palu.cli.options import (
    AllowMissing,
    ChatTemplateKwargs,
    DateString,
    Device,
    Dtype,
    ForceTemplate,
    MaxLength,
    ModelFolder,
    Repair,
    RepairSpans,
    RetainFile,
    SystemPrompt,
    bars,
    out,
    plain_warnings,
    quiet,
)
from palu.errors import user_errors


def evaluate(
    context: typer.Context,
    model: ModelFolder,
    forget: Annotated[
        str | None,
        typer.Option(help="What was forgotten: JSON lines or a datasets folder; takes a slice."),
    ] = None,
    retain: RetainFile = None,
    tofu: Annotated[
        Path | None, typer.Option(help="Folder with TOFU's files, instead of --forget.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of TOFU: forget01, forget10, ...")] = None,
    holdout: Annotated[
        str | None,
        typer.Option(
            help="Rows like those to forget that no model saw: membership inference. Default with "
            "--tofu: its holdoutNN.json for forgetNN, if there."
        ),
    ] = None,
    retain_log: Annotated[
        Path | None,
        typer.Option(help="TOFU_EVAL.json of the retrained model: forget quality, privleak."),
    ] = None,
    reference_model: Annotated[
        Path | None, typer.Option(help="Model folder that mia_reference compares with.")
    ] = None,
    fluency_classifier: Annotated[
        Path | None, typer.Option(help="Classifier folder whose class 0 is fluent text.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for TOFU_EVAL.json and TOFU_SUMMARY.json; a run that was stopped goes on "
            "from it. Default with --tofu: MODEL/evals_SPLIT; else none."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure anew what --output holds.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of a greedy answer; 0: none.")] = 200,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_missing: AllowMissing = None,
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
    json: Annotated[Path | None, typer.Option(help="Write every number to this file.")] = None,
) -> None:
    """Measure what a model still knows of a forget and a retain file, or TOFU's metrics."""
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.evaluation.batches import Processes
        from palu.evaluation.fluency import FluencyClassifier
        from palu.evaluation.logs import Log, LogError
        from palu.evaluation.report import metrics_table, missing_inputs, summary_table
        from palu.evaluation.runner import Evaluation, check_retrained
        from palu.evaluation.sets import ANSWER
        from palu.evaluation.store import FILES, Store, data_digest, summary
        from palu.evaluation.tofu_data import read_sets, tofu_files
        from palu.models.checks import check_causal, first_texts
        from palu.models.loading import (
            check_token_ids,
            folder_with,
            load_model,
            load_tokenizer,
            model_folder,
            resolve_device,
        )
        from palu.progress import bar
        from palu.run_record import RECORD, choose_template
        from palu.storage.files import locked, write_json
        from palu.storage.fingerprint import folder_digest, model_fingerprint, tokenizer_fingerprint
        from palu.storage.output import check_json, versions

        quiet()
        for folder in (model, reference_model, fluency_classifier):
            if folder is not None:
                model_folder(folder)
        if batch_size < 1 or max_new_tokens < 0 or max_length < 2:
            raise ValueError(
                "--batch-size must be at least 1, --max-new-tokens at least 0, "
                "--max-length at least 2"
            )
        if json is not None and not json.resolve().parent.is_dir():
            raise ValueError(f"--json: the folder {str(json.resolve().parent)!r} does not exist")
        if json is not None:
            check_json(json, inputs=(*_without_slices(forget, retain, holdout), retain_log))
        files = _own_files(forget, retain, tofu, split)
        if tofu is not None:
            files = tofu_files(tofu, split)
            output = model / f"evals_{split}" if output is None else output
        if holdout is not None:
            files["holdout"] = holdout
        if reference_model is not None and "holdout" not in files:
            raise ValueError("--reference-model is for membership inference: add --holdout FILE")
        template = choose_template(
            folder_with(RECORD, model),
            system_prompt=system_prompt,
            date_string=date_string,
            chat_template_kwargs=chat_template_kwargs,
            force=force_template,
        )
        where = resolve_device(device)
    processes = Processes.launched(cpu=where.type == "cpu")
    bars.quiet = out.quiet = processes.rank > 0
    if processes.rank == 0:  # the others write nothing
        with user_errors():
            written = [] if output is None else [output / name for name in sorted(FILES)]
            if json is not None and json.resolve() in {path.resolve() for path in written}:
                raise ValueError(f"--json {str(json)!r} is a file of --output; name another")
            for place in (json, output):
                if place is not None:
                    context.with_resource(locked(place))
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        tokenizer = load_tokenizer(model)
        sets = read_sets(
            files, tokenizer, template=template, max_length=max_length, repair=repair.value
        )
        retrained = None if retain_log is None else Log.read(retain_log, "--retain-log")
        check_retrained(retrained, sets)
        if reference_model is not None:
            _check_reference(tokenizer, load_tokenizer(reference_model), reference_model)
        classifier = None
        if fluency_classifier is not None:
            classifier = FluencyClassifier(fluency_classifier, where)
        loaded = load_model(model, dtype, device, allow_missing=allow_missing)
        answers = [row for data in sets.values() for row in data.every_row()]
        check_token_ids(loaded, tokenizer, answers)
        check_causal(loaded, first_texts([row for row, *_ in sets["forget"].rows[ANSWER][:2]]))
        store = None
        if output is not None:
            settings = {
                "model": model_fingerprint(loaded),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "template": template.to_dict(),
                "max_length": max_length,
                "max_new_tokens": max_new_tokens,
                **{f"data_{name}": data_digest(data) for name, data in sets.items()},
            }
            for name, path in (
                ("reference_model", reference_model),
                ("fluency_classifier", fluency_classifier),
            ):
                if path is not None:
                    settings[name] = str(path.resolve())
                    settings[f"{name}_files"] = folder_digest(path)  # it may be replaced there
            store = Store(output, settings, overwrite=overwrite)

    def load_reference() -> Any:
        with user_errors():
            other = load_model(reference_model, dtype, device, allow_missing=allow_missing)
            check_token_ids(other, tokenizer, answers)
            return other

    evaluation = Evaluation(
        loaded,
        tokenizer,
        sets,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        processes=processes,
        bar=lambda title: bar(bars, title),
        reference=reference_model and load_reference,
        classifier=classifier,
    )
    # One process writes, and what it found is what all of them start from.
    log: dict[str, Any] = processes.gather({} if store is None else store.log)[0]
    writes = store is not None and processes.rank == 0
    if writes:
        with user_errors():
            store.begin()
    with user_errors(LogError), plain_warnings():
        evaluation.run(
            log,
            retrained,
            store.save if writes else lambda log: None,
            "log" if store is None else store.place,
        )
    shown = [name for name in ("forget", "retain") if name in sets]
    shown = shown if json is not None or tofu is None else []
    results = {name: evaluation.results(name) for name in shown}
    if processes.rank == 0:
        if tofu is None:
            lines = [(model.name, name, result) for name, result in results.items()]
            out.print(metrics_table(str(model), lines))
        out.print(summary_table(str(model), summary(log)))
        for note in missing_inputs(log, sets, retrained, tofu=tofu is not None):
            out.print(f"Not measured: {note}", soft_wrap=True)
        if store is not None:
            out.print(f"Written to {store.folder}", soft_wrap=True)
        if json is not None:
            content = {"model": str(model), "template": template.to_dict(), "versions": versions()}
            check_json(json)
            write_json(json, {**content, **results, "summary": summary(log)})
    processes.leave()


def _without_slices(*files: str | None) -> list[str]:
    """The paths of data as a user names them, without their slices."""
    from palu.data.files import split_slice

    return [split_slice(file)[0] for file in files if file is not None]


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


def _check_reference(tokenizer: Any, other: Any, folder: Path) -> None:
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"--reference-model {str(folder)!r} has another tokenizer than the model: their "
            "losses are of different tokens"
        )
