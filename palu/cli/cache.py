"""`palu cache`: build, describe and check a reference cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palu.cli.options import (
    BF16,
    AllowMissing,
    Backend,
    ChatTemplateKwargs,
    DateString,
    Device,
    DropOverlap,
    Dtype,
    ForceTemplate,
    ForgetFile,
    MaxLength,
    ModelFolder,
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

cache = typer.Typer(
    help="What the losses need of the original model, computed once instead of in every step.",
    no_args_is_help=True,
)

# What `palu cache info` tells first.
FIRST = ("path", "bytes", "rows", "examples", "top_k", "prefix_length", "preserve", "select_from")

CacheFolder = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a reference cache.")]
BatchSize = Annotated[int, typer.Option(help="Rows a forward pass.")]


@cache.command()
def build(
    context: typer.Context,
    model: ModelFolder,
    forget: ForgetFile,
    output: Annotated[Path, typer.Option(help="Folder for the cache.")],
    retain: RetainFile = None,
    drop_overlap: DropOverlap = False,
    top_k: TopK = 50,
    prefix_length: PrefixLength = 3,
    preserve: Preserve = "reverse_kl",
    retain_loss: RetainLoss = None,
    select_from: SelectFrom = "reference",
    train_head: Annotated[
        bool,
        typer.Option(
            help="Whether training may change the output head, as palu unlearn does: a copy of it "
            "is stored."
        ),
    ] = True,
    batch_size: BatchSize = 8,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    bf16: BF16 = False,
    device: Device = "auto",
    allow_missing: AllowMissing = None,
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
    overwrite: Overwrite = False,
) -> None:
    """Run the original model over the data once and store what `palu unlearn` will ask of it.

    Give it the options of the run, which reads it with `--reference cached --reference-cache PATH`
    (and builds it itself where there is none). A build that was interrupted goes on where it was
    when it is started again.
    """
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.data.files import split_slice
        from palu.run_record import choose_template
        from palu.storage.output import claim_output

        files = [split_slice(path)[0] for path in (forget, retain) if path is not None]
        context.with_resource(claim_output(output, overwrite=overwrite, inputs=(model, *files)))
        import torch

        from palu.loss import PALULoss
        from palu.models.checks import check_causal, first_texts
        from palu.models.loading import (
            check_precision,
            check_token_ids,
            load_to_train,
            load_tokenizer,
            model_folder,
            resolve_device,
        )
        from palu.models.wrappers import eos_token_ids
        from palu.progress import bar
        from palu.reference.cache import CacheError, CacheWriteError, ReferenceCache
        from palu.unlearn import make_config

        quiet()
        check_precision(dtype, bf16)
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
        if retain is None and config.retain_loss == "kl":
            raise ValueError("--retain-loss kl needs a --retain file")
        if retain is not None and config.retain_loss == "nll":
            warn("--retain is not used: --retain-loss nll asks the original model nothing")
            retain = None
        template = choose_template(
            model,
            system_prompt=system_prompt,
            date_string=date_string,
            chat_template_kwargs=chat_template_kwargs,
            force=force_template,
        )
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        tokenizer = load_tokenizer(model)
        read = {"repair": repair.value, "max_length": max_length}
        rows = read_rows(forget, tokenizer, template, require_spans=True, **read)
        retain_rows = None
        if retain is not None:
            both = {"forget": forget, "drop_overlap": drop_overlap}
            retain_rows = read_rows(
                retain, tokenizer, template, require_spans=False, **both, **read
            )
        loaded, _ = load_to_train(model, dtype, device, bf16=bf16, allow_missing=allow_missing)
        check_token_ids(loaded, tokenizer, [*rows, *(retain_rows or ())])
        check_causal(loaded, first_texts(rows))
        eos = eos_token_ids(loaded, tokenizer)
        loss = PALULoss(**config.loss_options(), eos_token_id=eos)
    notes = {"model": str(model), "forget": forget, "retain": retain, **read}
    notes["drop_overlap"] = drop_overlap
    with bar(bars, "Building the cache") as report, user_errors(CacheError, CacheWriteError):
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
            autocast_dtype=torch.bfloat16 if bf16 else None,
            overwrite=overwrite,
            notes={**notes, "template": template.to_dict()},
            report=report,
        )
    out.print(f"Written to {output}: {_summary(made.info())}", soft_wrap=True)


@cache.command()
def info(path: CacheFolder) -> None:
    """Print what a cache holds and what it was built from."""
    with user_errors():
        from palu.reference.cache import cache_info

        found = cache_info(path)
    found["bytes"] = f"{found['bytes']:,}"
    found["notes"].pop("template", None)  # said above
    files = {record["file"]: f"{record['bytes']:,} bytes" for record in found.pop("files")}
    shown = [name for name in FIRST if name in found]
    shown += [name for name in found if name not in FIRST]
    for name, value in [*((name, found[name]) for name in shown), *files.items()]:
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        out.print(f"{name:26} {value}", soft_wrap=True, highlight=False)


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
    allow_missing: AllowMissing = None,
) -> None:
    """Check every byte of a cache and, if they are given, the model, the data and the numbers.

    Data are read with the template, the length and the repair that the cache remembers.
    """
    if model is None and (forget is not None or retain is not None):
        raise UserError("--forget and --retain need a --model folder, which has the tokenizer")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        import torch

        from palu.data.template import Template
        from palu.models.loading import check_token_ids, load_model, load_tokenizer
        from palu.progress import bar
        from palu.reference.cache import CacheError, cache_info
        from palu.reference.verify import verify_cache
        from palu.run_record import choose_template

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
            dropped = notes.get("drop_overlap", False)
            if forget is not None:
                given["dataset"] = read_rows(
                    forget, tokenizer, template, require_spans=True, **read
                )
            if retain is not None:
                if dropped and forget is None:
                    raise ValueError("the cache was built with --drop-overlap: add --forget FILE")
                read |= {"forget": forget if dropped else None, "drop_overlap": dropped}
                given["retain_dataset"] = read_rows(
                    retain, tokenizer, template, require_spans=False, **read
                )
            given["model"] = load_model(
                model, getattr(torch, found["dtype"]), device, allow_missing=allow_missing
            )
            read_again = [*given.get("dataset", ()), *given.get("retain_dataset", ())]
            check_token_ids(given["model"], tokenizer, read_again)
    again = forget is not None
    shown: Any = bar(bars, "Computing again") if again else bars.status("Reading every byte")
    with shown as report, user_errors(CacheError):
        worst = verify_cache(path, report=report if again else None, **given)
    said = [f"Every byte of {path} is as it was written"]
    same = [n for n, x in (("model", model), ("forget data", forget), ("retain data", retain)) if x]
    if same:
        said.append(f"it was built from this {' and this '.join(same)}")
    if "hidden" in worst:
        said.append(f"hidden states computed again differ by {worst['hidden']:.2g} (relative)")
    if "indices" in worst:
        said.append(f"{worst['indices']:.2%} of the top-k indices are others")
    out.print("; ".join(said), soft_wrap=True, highlight=False)


def _summary(found: dict[str, Any]) -> str:
    rows = ", ".join(f"{count} {name} rows" for name, count in found["rows"].items() if count)
    head = "with a frozen head" if found["head"]["stored"] else "without a frozen head"
    return f"{rows} {head}, {found['bytes']:,} bytes"
