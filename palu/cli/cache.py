"""`palu cache`: build, describe and check a reference cache."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from palu.cli.data import (
    data_notes,
    find_models,
    load_for_training,
    plain_warnings,
    quiet,
    read_both,
    read_rows,
    template_of,
    without_slices,
)
from palu.cli.options import DataOptions, OutputOptions, TextOptions, WeightOptions, with_options
from palu.errors import UserError, user_errors
from palu.terminal import bars, out, warn
from palu.training.options import LossOptions, RunOptions, TrainingOptions, option

cache = typer.Typer(
    help="What the losses need of the original model, computed once instead of in every step.",
    no_args_is_help=True,
)

# What `palu cache info` tells first.
FIRST = ("path", "bytes", "rows", "examples", "top_k", "prefix_length", "preserve", "select_from")


@dataclass(kw_only=True)
class BuildOptions:
    """What is built, and how."""

    output: Path = option(MISSING, "Folder for the cache.", panel="Output")
    train_head: bool = option(
        True,
        "Whether training may change the output head, as palu unlearn does: a copy of it is "
        "stored.",
        panel="Method",
    )
    batch_size: int = option(8, "Examples in a forward pass.", least=1, panel="Machine")


@dataclass(kw_only=True)
class FolderOptions:
    """Which cache is meant."""

    path: Path = option(MISSING, "Folder of a reference cache.", argument=True)


@dataclass(kw_only=True)
class VerifyOptions:
    """What a cache is compared with."""

    model: Path | None = option(None, "Compare with this model's weights too.")
    forget: str | None = option(None, "Compare with this file; with --model, compute again.")


# The settings that decide what is stored.
STORED = ("top_k", "prefix_length", "preserve", "select_from")


@cache.command()
@with_options(
    DataOptions,
    TextOptions,
    BuildOptions,
    OutputOptions,
    (LossOptions, *STORED),
    (RunOptions, "retain_loss", "backend"),
    (TrainingOptions, "bf16"),
    WeightOptions,
)
def build(context: typer.Context, options: SimpleNamespace) -> None:
    """Run the original model over the data once and store what `palu unlearn` will ask of it.

    Give it the options of the run, which reads it with `--reference cached --reference-cache PATH`
    (and builds it itself where there is none). A build that was interrupted goes on where it was
    when it is started again.
    """
    find_models(options, "model")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.models.hub import shown_model
        from palu.storage.output import claim_output

        files = without_slices(options.forget, options.retain)
        claim = claim_output(
            options.output, overwrite=options.overwrite, inputs=(options.model, *files)
        )
        context.with_resource(claim)
        config, template = _check_build(options)
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        given = _load_for_build(options, config, template)
    from palu.progress import bar
    from palu.reference.cache import CacheError, CacheWriteError, ReferenceCache

    notes = {
        "model": shown_model(options.model),
        **data_notes(options),
        "template": template.to_dict(),
    }
    with bar(bars, "Building the cache") as report, user_errors(CacheError, CacheWriteError):
        cache = ReferenceCache.build(
            **given,
            template=template,
            batch_size=options.batch_size,
            train_head=options.train_head,
            overwrite=options.overwrite,
            notes=notes,
            report=report,
        )
    out.print(f"Written to {options.output}: {_summary(cache.info())}", soft_wrap=True)


def _check_build(options: SimpleNamespace) -> tuple[Any, Any]:
    """Refuse what no cache can be built with. Returns a `PALUConfig` and the template."""
    from palu.models.loading import check_precision, model_folder, resolve_device
    from palu.unlearn import make_config

    quiet()
    check_precision(options.dtype, options.bf16)
    model_folder(options.model)
    options.prefix_length = options.prefix_length or 0  # as `palu unlearn` chooses
    names = (*STORED, "retain_loss", "backend")
    config = make_config(
        resolve_device(options.device), **{name: getattr(options, name) for name in names}
    )
    if options.retain is None and config.retain_loss == "kl":
        raise ValueError("--retain-loss kl needs a --retain file")
    if options.retain is not None and config.retain_loss == "nll":
        warn("--retain is not used: --retain-loss nll asks the original model nothing")
        options.retain = None
    return config, template_of(options)


def _load_for_build(options: SimpleNamespace, config: Any, template: Any) -> dict[str, Any]:
    """Return the model, the data and the loss as arguments of `ReferenceCache.build`."""
    import torch

    from palu.loss import PALULoss
    from palu.models.loading import load_tokenizer
    from palu.models.wrappers import eos_token_ids

    tokenizer = load_tokenizer(options.model)
    rows, retain_rows = read_both(options, tokenizer, template, require_spans=True)
    model, _ = load_for_training(options, options.device, tokenizer, rows, retain_rows or [])
    loss = PALULoss(**config.loss_options(), eos_token_id=eos_token_ids(model, tokenizer))
    return {
        "model": model,
        "dataset": rows,
        "path": options.output,
        "loss": loss,
        "retain_dataset": retain_rows,
        "tokenizer": tokenizer,
        "autocast_dtype": torch.bfloat16 if options.bf16 else None,
    }


@cache.command()
@with_options(FolderOptions)
def info(context: typer.Context, options: SimpleNamespace) -> None:
    """Print what a cache holds and what it was built from."""
    with user_errors():
        from palu.reference.cache import cache_info

        about = cache_info(options.path)
    about["bytes"] = f"{about['bytes']:,}"
    about["notes"].pop("template", None)  # said above
    files = {record["file"]: f"{record['bytes']:,} bytes" for record in about.pop("files")}
    first = {name: about[name] for name in FIRST if name in about}
    for name, value in (first | about | files).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        out.print(f"{name:26} {value}", soft_wrap=True, highlight=False)


@cache.command()
@with_options(
    FolderOptions,
    VerifyOptions,
    (DataOptions, "retain"),
    (WeightOptions, "device", "allow_missing"),
)
def verify(context: typer.Context, options: SimpleNamespace) -> None:
    """Check every byte of a cache and, if they are given, the model, the data and the numbers.

    Data are read with the template, the length, the columns and the repair that the cache
    remembers.
    """
    forget, retain = options.forget, options.retain
    if options.model is None and (forget is not None or retain is not None):
        raise UserError("--forget and --retain need a --model folder, which has the tokenizer")
    find_models(options, "model")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.progress import bar
        from palu.reference.cache import CacheError, cache_info
        from palu.reference.verify import verify_cache

        quiet()
        about = cache_info(options.path)
    given: dict[str, Any] = {}
    if options.model is not None:
        with user_errors(), plain_warnings(), bars.status("Reading model and data"):
            given = _load_for_verify(options, about)
    again = forget is not None
    shown: Any = bar(bars, "Computing again") if again else bars.status("Reading every byte")
    with shown as report, user_errors(CacheError):
        worst = verify_cache(options.path, report=report if again else None, **given)
    parts = [f"Every byte of {options.path} is as it was written"]
    compared = {"model": options.model, "forget data": forget, "retain data": retain}
    if same := [name for name, value in compared.items() if value]:
        parts.append(f"it was built from this {' and this '.join(same)}")
    if "hidden" in worst:
        parts.append(f"hidden states computed again differ by {worst['hidden']:.2g} (relative)")
    if "indices" in worst:
        parts.append(f"{worst['indices']:.2%} of the top-k indices are others")
    out.print("; ".join(parts), soft_wrap=True, highlight=False)


def _load_for_verify(options: SimpleNamespace, about: dict[str, Any]) -> dict[str, Any]:
    """Return the model and the data as arguments of `verify_cache`."""
    import torch

    from palu.data.template import Template
    from palu.models.loading import check_token_ids, load_model, load_tokenizer
    from palu.run_record import choose_template

    notes = about["notes"]
    tokenizer, template = load_tokenizer(options.model), choose_template(options.model)
    if "template" in notes:
        template = Template.from_dict(notes["template"])
    how: dict[str, Any] = {"repair": notes.get("repair", "none")}
    how["max_length"] = notes.get("max_length", 512)
    dropped, columns = notes.get("drop_overlap", False), notes.get("columns")
    given: dict[str, Any] = {"tokenizer": tokenizer}
    if options.forget is not None:
        data = read_rows(
            options.forget, tokenizer, template, require_spans=True, columns=columns, **how
        )
        given["dataset"] = data
    if options.retain is not None:
        if dropped and options.forget is None:
            raise ValueError("the cache was built with --drop-overlap: add --forget FILE")
        how |= {"forget": options.forget if dropped else None, "drop_overlap": dropped}
        how |= {"columns": notes.get("retain_columns") or columns, "forget_columns": columns}
        data = read_rows(options.retain, tokenizer, template, require_spans=False, **how)
        given["retain_dataset"] = data
    dtype = getattr(torch, about["dtype"])
    model = load_model(options.model, dtype, options.device, allow_missing=options.allow_missing)
    check_token_ids(model, tokenizer, [*given.get("dataset", ()), *given.get("retain_dataset", ())])
    return given | {"model": model}


def _summary(about: dict[str, Any]) -> str:
    rows = ", ".join(f"{count} {name} rows" for name, count in about["rows"].items() if count)
    head = "with a frozen head" if about["head"]["stored"] else "without a frozen head"
    return f"{rows} {head}, {about['bytes']:,} bytes"
