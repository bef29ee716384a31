"""The `palu` command: demo, unlearn, evaluate, inspect; `cache` is in `cli_cache.py`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from palu.cli_cache import cache
from palu.cli_options import (
    Backend,
    DateString,
    Device,
    Dtype,
    ForceTemplate,
    ForgetFile,
    MaxLength,
    ModelFolder,
    Objective,
    Overwrite,
    PrefixLength,
    Preserve,
    Repair,
    RepairSpans,
    RetainFile,
    RetainLoss,
    SelectFrom,
    SystemPrompt,
    TopK,
    bars,
    out,
    plain_warnings,
    quiet,
    read_rows,
    warn,
)
from palu.errors import UserError, user_errors

# Read when torch loads its OpenMP runtime, which none of the imports above does. Threads that spin
# while they wait make a machine that does anything else many times slower (`palu demo` beside one
# busy process: over 10 minutes instead of one).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Make a language model forget chosen spans and keep the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache, name="cache")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("palu-demo"),
    seed: Annotated[int, typer.Option(help="Of the people, the weights and the batches.")] = 0,
    people: Annotated[int, typer.Option(help="How many people are invented.")] = 40,
    forget_people: Annotated[int, typer.Option(help="How many of them are to be forgotten.")] = 5,
    train_steps: Annotated[int, typer.Option(help="Steps to learn the answers by heart.")] = 300,
    unlearn_epochs: Annotated[int, typer.Option(help="Passes over the forget set.")] = 30,
    overwrite: Overwrite = False,
) -> None:
    """A model made on the spot learns about invented people, then forgets some of them."""
    from palu.runs import check_output, output_folder

    with user_errors():
        check_output(output, overwrite=overwrite)
    with bars.status("Loading PyTorch and transformers"):
        from palu.demo import DemoSettings, run_demo

        quiet()
    with user_errors():
        settings = DemoSettings(
            seed=seed,
            people=people,
            forget_people=forget_people,
            train_steps=train_steps,
            unlearn_epochs=unlearn_epochs,
        )
    with output_folder(output) as folder:
        metrics = run_demo(folder, settings, console=out, bars=bars, shown_as=output)
    if not all(metrics["checks"].values()):
        raise typer.Exit(1)


@app.command()
def unlearn(
    model: ModelFolder,
    forget: ForgetFile,
    output: Annotated[Path, typer.Option(help="Folder for the new model.")],
    retain: RetainFile = None,
    top_k: TopK = 50,
    prefix_length: PrefixLength = 3,
    objective: Annotated[Objective, typer.Option(help="What levels them.")] = Objective.flatten,
    center: Annotated[
        str, typer.Option(help="Of flatten: global_mean, local_mean or a number.")
    ] = "global_mean",
    preserve: Preserve = "reverse_kl",
    forget_weight: Annotated[float, typer.Option(help="Weight of the forget term.")] = 1.0,
    preserve_weight: Annotated[float, typer.Option(help="Weight of the preserve term.")] = 1.0,
    retain_weight: Annotated[float, typer.Option(help="Weight of the retain term.")] = 1.0,
    retain_loss: RetainLoss = "nll",
    retain_batch_size: Annotated[
        int | None, typer.Option(help="Retain rows beside a forget batch; default: as many.")
    ] = None,
    select_from: SelectFrom = "reference",
    reference: Annotated[
        str,
        typer.Option(
            help="Where the original model's numbers come from: live (a frozen copy runs beside "
            "it) or cached (computed once, before training); adapter_off is for PEFT models, in "
            "Python."
        ),
    ] = "live",
    reference_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the cache, built if it is not there; default: OUTPUT-reference-cache."
        ),
    ] = None,
    backend: Backend = "auto",
    learning_rate: Annotated[float, typer.Option(help="Peak, then linear to 0.")] = 1e-5,
    epochs: Annotated[float, typer.Option(help="Passes over the forget set.")] = 10.0,
    batch_size: Annotated[int, typer.Option(help="Forget rows a micro-batch.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the batches.")] = 0,
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
    overwrite: Overwrite = False,
) -> None:
    """Make a model forget the marked spans of one file and keep the answers of another."""
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.data import split_slice
        from palu.runs import cache_place, check_output, choose_template, output_folder

        files = [split_slice(path)[0] for path in (forget, retain) if path is not None]
        check_output(output, overwrite=overwrite, inputs=(model, *files))
        place = cache_place(reference, reference_cache, output)
        import torch

        from palu import unlearn as run
        from palu.cache import CacheError, CacheWriteError, cache_info
        from palu.loading import load_model, load_tokenizer, model_folder, resolve_device
        from palu.progress import bar
        from palu_kernels.backend import resolve as resolve_backend

        quiet()
        model_folder(model)
        where = resolve_device(device)
        resolve_backend(backend, where, torch.float32)
        if epochs <= 0 or batch_size < 1 or gradient_accumulation < 1 or learning_rate <= 0:
            raise ValueError(
                "--epochs and --learning-rate must be above 0, "
                "--batch-size and --gradient-accumulation at least 1"
            )
        config = run.make_config(
            where,
            top_k=top_k,
            prefix_length=prefix_length,
            objective=objective.value,
            center=center,
            preserve=preserve,
            forget_weight=forget_weight,
            preserve_weight=preserve_weight,
            retain_weight=retain_weight,
            retain_loss=retain_loss,
            retain_batch_size=retain_batch_size,
            select_from=select_from,
            reference=reference,
            reference_cache=None if place is None else str(place),
            backend=backend,
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            seed=seed,
        )
        template = choose_template(
            model, system_prompt=system_prompt, date_string=date_string, force=force_template
        )
        has_cache = place is not None and place.is_dir() and any(place.iterdir())
        if has_cache:
            cache_info(place)  # what is no cache is found out before the model is loaded
    read = {"repair": repair.value, "max_length": max_length}
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        tokenizer = load_tokenizer(model)
        rows = read_rows(forget, tokenizer, template, require_spans=True, **read)
        retain_rows = None
        if retain is not None:
            retain_rows = read_rows(retain, tokenizer, template, require_spans=False, **read)
        if not any(label >= 0 for row in rows for label in row["labels"]):
            raise ValueError(f"{forget} marks nothing to forget: no span is left in any row")
        loaded = load_model(model, dtype, device)
    if retain_rows is None:
        warn("no --retain file: only the other words of the forget answers hold the model in place")
    data = {"forget": forget, "retain": retain, **read}
    notes = {"model": str(model), **data, "template": template.to_dict()}
    with output_folder(output) as folder:
        with user_errors(CacheError, CacheWriteError), bar(bars, "Unlearning") as report:
            curve = run.unlearn(
                loaded,
                tokenizer,
                rows,
                retain_rows,
                config,
                report,
                cache_options={"template": template, "notes": notes},
            )
        with bars.status("Writing the model"):
            run.save_model(
                folder,
                loaded,
                tokenizer,
                template,
                made_by="palu unlearn",
                seed=seed,
                base_model=str(model),
                data=data,
                dtype=str(loaded.dtype).removeprefix("torch."),
                device=str(where),
                settings=run.settings_of(config),
                loss_curve=curve,
            )
    last = {name: round(curve[-1][name], 4) for name in ("forget", "preserve", "retain")}
    out.print(
        f"Written to {output} after {len(curve)} steps. Last terms: {last}",
        soft_wrap=True,
        markup=False,
    )
    if place is not None:
        said = f"The reference cache {'was read from' if has_cache else 'is kept in'} {place}"
        if config.reference_cache is None:
            said = "No reference cache: these settings ask the original model nothing"
        out.print(said, soft_wrap=True, markup=False)


@app.command()
def evaluate(
    model: ModelFolder,
    forget: ForgetFile,
    retain: RetainFile = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of a greedy answer; 0: none.")] = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
    json: Annotated[Path | None, typer.Option(help="Write every number to this file.")] = None,
) -> None:
    """Measure what a model still knows of a forget and a retain file."""
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.data import load_examples
        from palu.evaluation import evaluate_examples, metrics_table
        from palu.loading import load_model, load_tokenizer, model_folder
        from palu.progress import bar
        from palu.runs import choose_template, versions, write_json

        quiet()
        model_folder(model)
        if batch_size < 1 or max_new_tokens < 0 or max_length < 2:
            raise ValueError(
                "--batch-size must be at least 1, --max-new-tokens at least 0, "
                "--max-length at least 2"
            )
        if json is not None and not json.resolve().parent.is_dir():
            raise ValueError(f"--json: the folder {str(json.resolve().parent)!r} does not exist")
        template = choose_template(
            model, system_prompt=system_prompt, date_string=date_string, force=force_template
        )
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        sets = {
            name: load_examples(path, require_spans=False, repair=repair.value)
            for name, path in (("forget", forget), ("retain", retain))
            if path is not None
        }
        tokenizer = load_tokenizer(model)
        _check_examples(sets, tokenizer, max_length, template)
        loaded = load_model(model, dtype, device)
    results: dict[str, Any] = {}
    for name, examples in sets.items():
        with bar(bars, f"Evaluating {name}") as report, plain_warnings():
            results[name] = evaluate_examples(
                loaded,
                tokenizer,
                examples,
                template=template,
                max_length=max_length,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=report,
            )
    out.print(metrics_table(escape(str(model)), [(model.name, n, r) for n, r in results.items()]))
    if json is not None:
        content = {"model": str(model), "template": template.to_dict(), "versions": versions()}
        write_json(json, {**content, **results})


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(help="JSON lines or a datasets folder; PATH[-40:] takes a slice.")
    ],
    model: ModelFolder,
    limit: Annotated[int, typer.Option(help="How many examples; 0: all.")] = 5,
    prefix_length: PrefixLength = 3,
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
) -> None:
    """Print examples with their tokens coloured by what a run would do to them."""
    with user_errors(), plain_warnings():
        with bars.status("Loading the tokenizer"):
            from palu.inspect import inspect_file
            from palu.loading import load_tokenizer
            from palu.runs import choose_template

            if limit < 0:
                raise ValueError(f"--limit must be at least 0, not {limit}")
            tokenizer = load_tokenizer(model)
            template = choose_template(
                model, system_prompt=system_prompt, date_string=date_string, force=force_template
            )
        inspect_file(
            file,
            tokenizer,
            limit=limit or None,
            prefix_length=prefix_length,
            max_length=max_length,
            template=template,
            repair=repair.value,
            console=out,
        )


def _check_examples(sets: dict, tokenizer: Any, max_length: int, template: Any) -> None:
    """Examples that cannot be tokenised are the user's to put right: found before the model is
    loaded."""
    from palu.data import tokenize_examples

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # evaluate_examples gives the same ones
        for examples in sets.values():
            tokenize_examples(examples, tokenizer, max_length=max_length, template=template)


def main() -> None:
    """Entry point: a user's mistake is one line and status 2, a diverged run one line and status
    1."""
    # Forked workers after the tokenizer was used would make it print a warning of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A run that is told to stop leaves through its cleanup: no half-written folder stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except UserError as error:
        bars.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except FloatingPointError as error:
        bars.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
