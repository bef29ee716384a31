"""`palu cache`: build, describe and check a reference cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from palu.cli_options import (
    Backend,
    DateString,
    Device,
    Dtype,
    ForceTemplate,
    ForgetFile,
    MaxLength,
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
)
from palu.errors import UserError, user_errors

cache = typer.Typer(
    help="What the losses need of the original model, computed once instead of in every step.",
    no_args_is_help=True,
)

CacheFolder = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a reference cache.")]
BatchSize = Annotated[int, typer.Option(help="Rows a forward pass.")]


@cache.command()
def build(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Hugging Face folder of the original model.")
    ],
    forget: ForgetFile,
    output: Annotated[Path, typer.Option("--out", "--output", help="Folder for the cache.")],
    retain: RetainFile = None,
    top_k: TopK = 50,
    prefix_length: PrefixLength = 3,
    preserve: Preserve = "reverse_kl",
    retain_loss: RetainLoss = "nll",
    select_from: SelectFrom = "reference",
    train_head: Annotated[
        bool,
        typer.Option(help="Whether training may change the output head: a copy of it is stored."),
    ] = True,
    batch_size: BatchSize = 8,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
    overwrite: Overwrite = False,
) -> None:
    """Run the original model over the data once and store what `palu unlearn` will ask of it.

    A build that was interrupted goes on where it was when it is started again.
    """
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.data import split_slice
        from palu.runs import check_output, choose_template

        data = [split_slice(path)[0] for path in (forget, retain) if path is not None]
        check_output(output, overwrite=overwrite, inputs=(model, *data))
        from palu.cache import ReferenceCache
        from palu.loading import load_model, load_tokenizer, model_folder, resolve_device
        from palu.loss import PALULoss
        from palu.progress import bar
        from palu.trainer import _end_tokens
        from palu.unlearn import make_config

        quiet()
        model_folder(model)
        where = resolve_device(device)
        if batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {batch_size}")
        config = make_config(
            where,
            top_k=top_k,
            prefix_length=prefix_length,
            preserve=preserve,
            retain_loss=retain_loss,
            select_from=select_from,
            backend=backend,
        )
        if retain is not None and retain_loss != "kl":
            raise ValueError(
                "--retain is only needed for --retain-loss kl: nll asks the original model nothing"
            )
        if retain is None and retain_loss == "kl":
            raise ValueError("--retain-loss kl needs a --retain file")
        template = choose_template(
            model, system_prompt=system_prompt, date_string=date_string, force=force_template
        )
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        tokenizer = load_tokenizer(model)
        read = {"repair": repair.value, "max_length": max_length}
        rows = _rows(forget, tokenizer, template, require_spans=True, **read)
        retain_rows = None
        if retain is not None:
            retain_rows = _rows(retain, tokenizer, template, require_spans=False, **read)
        loaded = load_model(model, dtype, device)
        eos = _end_tokens(loaded, tokenizer)
        loss = PALULoss(**config.loss_options(), eos_token_id=eos)
    sources = {"model": str(model), "forget": forget, "retain": retain}
    with bar(bars, "Building the cache") as report, _cache_errors():
        made = ReferenceCache.build(
            loaded,
            rows,
            output,
            loss=loss,
            retain_dataset=retain_rows,
            tokenizer=tokenizer,
            template=template,
            batch_size=batch_size,
            train_head=train_head,
            overwrite=overwrite,
            notes={**sources, **read, "template": template.to_dict()},
            report=report,
        )
    out.print(f"Written to {output}: {_summary(made.info())}", soft_wrap=True, markup=False)


@cache.command()
def info(path: CacheFolder) -> None:
    """Print what a cache holds and what it was built from."""
    with user_errors():
        from palu.cache import cache_info

        found = cache_info(path)
    files = found.pop("files")
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        out.print(f"{name:14} {value}", soft_wrap=True, markup=False, highlight=False)
    for record in files:
        out.print(f"{record['file']:26} {record['bytes']} bytes", markup=False, highlight=False)


@cache.command()
def verify(
    path: CacheFolder,
    model: Annotated[
        Path | None, typer.Option("--model", help="Compare with this model's weights too.")
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option("--forget", help="Compare with this file; with --model, compute again."),
    ] = None,
    retain: RetainFile = None,
    device: Device = "auto",
) -> None:
    """Check every byte of a cache and, if they are given, the model, the data and the numbers.

    Data are read with the template, the length and the repair that the cache remembers.
    """
    if model is None and (forget is not None or retain is not None):
        raise UserError("--forget and --retain need --model, which has the tokenizer")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.cache import cache_info
        from palu.cache_verify import verify_cache
        from palu.labels import Template
        from palu.loading import load_model, load_tokenizer
        from palu.progress import bar
        from palu.runs import choose_template

        quiet()
        found = cache_info(path)
    given: dict[str, Any] = {}
    if model is not None:
        with user_errors(), plain_warnings(), bars.status("Reading model and data"):
            notes = found["notes"]
            tokenizer = given["tokenizer"] = load_tokenizer(model)
            template = choose_template(model)
            if "template" in notes:
                template = Template.from_dict(notes["template"])
            read = {"repair": notes.get("repair", "none")}
            read["max_length"] = notes.get("max_length", 512)
            for name, file in (("dataset", forget), ("retain_dataset", retain)):
                if file is not None:
                    spans = name == "dataset"
                    given[name] = _rows(file, tokenizer, template, require_spans=spans, **read)
            given["model"] = load_model(model, found["dtype"], device)
    with bar(bars, "Checking the cache") as report, _cache_errors():
        worst = verify_cache(path, report=report, **given)
    said = [f"every byte of {path} is as it was written"]
    if model is not None:
        said.append("the model is the one it was built from")
    said += [f"{kind} computed again: off by {error:.2g}" for kind, error in worst.items()]
    out.print("; ".join(said), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _cache_errors() -> Iterator[None]:
    """What a user can put right in the middle of the work: a full disk, another cache's model."""
    from palu.cache import CacheError, CacheWriteError

    try:
        yield
    except (CacheError, CacheWriteError) as error:
        raise UserError(str(error)) from error


def _rows(
    path: str,
    tokenizer: Any,
    template: Any,
    *,
    require_spans: bool,
    repair: Any,
    max_length: int,
) -> list[dict]:
    from palu.data import load_examples, tokenize_examples

    examples = load_examples(path, require_spans=require_spans, repair=repair)
    return tokenize_examples(examples, tokenizer, max_length=max_length, template=template)


def _summary(found: dict[str, Any]) -> str:
    rows = ", ".join(f"{count} {name} rows" for name, count in found["rows"].items() if count)
    head = "with a frozen head" if found["head"]["stored"] else "without a frozen head"
    return f"{rows} {head}, {found['bytes']:,} bytes"
