"""The `palu` command: demo and unlearn; the others have files of their own."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from palu import distributed as processes
from palu.cli.cache import cache
from palu.cli.evaluate import evaluate
from palu.cli.inspect import inspect
from palu.cli.merge import merge
from palu.cli.options import (
    BF16,
    SPAN_OPTIONS,
    AllowMissing,
    Backend,
    Beta,
    Beta1,
    Beta2,
    ChatTemplateKwargs,
    DateString,
    Delta,
    Device,
    DropOverlap,
    Dtype,
    DualStepSize,
    DualWarmupEpochs,
    ForceTemplate,
    ForgetFile,
    GradientCheckpointing,
    IgnoreFirst,
    LayerId,
    LearningRate,
    LoraAlpha,
    LoraDropout,
    LoraRank,
    LoraTarget,
    MaxLength,
    Method,
    ModelFolder,
    Normalization,
    Objective,
    Overwrite,
    PrefixLength,
    Preserve,
    Reference,
    ReferenceCacheFolder,
    Repair,
    RepairSpans,
    Resume,
    RetainFile,
    RetainLoss,
    RetainLossEps,
    SaveSteps,
    SelectFrom,
    SteeringCoeff,
    StopAtForgetProb,
    SystemPrompt,
    TopK,
    TrainableParamsRegex,
    bars,
    check_training,
    out,
    plain_warnings,
    quiet,
    read_rows,
    warn,
)
from palu.cli.plan import plan
from palu.errors import (
    UserError,
    WriteError,
    failed_to_write,
    one_line,
    out_of_memory,
    user_errors,
)
from palu.terminal import WarningLines, say

# Read when torch loads its OpenMP runtime, which none of the imports above does. Threads that spin
# while they wait make a machine that does anything else many times slower (`palu demo` beside one
# busy process: over 10 minutes instead of one).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 128 + signal.SIGINT

app = typer.Typer(
    help="Make a language model forget chosen spans and keep the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("palu-demo"),
    seed: Annotated[int, typer.Option(help="Of the people, the weights and the batches.")] = 0,
    people: Annotated[int, typer.Option(help="How many people are invented.")] = 40,
    forget_people: Annotated[int, typer.Option(help="How many of them are to be forgotten.")] = 5,
    train_steps: Annotated[int, typer.Option(help="Steps to learn the answers by heart.")] = 300,
    unlearn_epochs: Annotated[int, typer.Option(help="Passes over the forget set.")] = 30,
    overwrite: Overwrite = False,
) -> None:
    """A model made on the spot learns about invented people, then forgets some of them."""
    from palu.storage.output import claim_output, output_folder

    with user_errors():
        claim = context.with_resource(claim_output(output, overwrite=overwrite))
    with bars.status("Loading PyTorch and transformers"):
        from palu.demo.run import DemoSettings, run_demo

        quiet()
    with user_errors():
        settings = DemoSettings(
            seed=seed,
            people=people,
            forget_people=forget_people,
            train_steps=train_steps,
            unlearn_epochs=unlearn_epochs,
        )
    with output_folder(claim) as folder:
        metrics = run_demo(folder, settings, console=out, bars=bars, shown_as=output)
    if not all(metrics["checks"].values()):
        raise typer.Exit(1)


@app.command()
def unlearn(
    context: typer.Context,
    model: ModelFolder,
    forget: ForgetFile,
    output: Annotated[Path, typer.Option(help="Folder for the new model.")],
    retain: RetainFile = None,
    drop_overlap: DropOverlap = False,
    method: Method = "palu",
    beta: Beta = None,
    beta1: Beta1 = None,
    beta2: Beta2 = None,
    delta: Delta = None,
    ignore_first: IgnoreFirst = None,
    retain_loss_eps: RetainLossEps = None,
    dual_step_size: DualStepSize = None,
    dual_warmup_epochs: DualWarmupEpochs = None,
    layer_id: LayerId = None,
    steering_coeff: SteeringCoeff = None,
    trainable_params_regex: TrainableParamsRegex = None,
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
    retain_loss: RetainLoss = None,
    retain_batch_size: Annotated[
        int | None, typer.Option(help="Retain rows beside a forget batch; default: as many.")
    ] = None,
    select_from: SelectFrom = "reference",
    normalization: Normalization = "step",
    reference: Reference = "live",
    reference_cache: ReferenceCacheFolder = None,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = 0.0,
    lora_target: LoraTarget = "all-linear",
    backend: Backend = "auto",
    learning_rate: LearningRate = 1e-5,
    epochs: Annotated[float, typer.Option(help="Passes over the forget set.")] = 10.0,
    stop_at_forget_prob: StopAtForgetProb = None,
    batch_size: Annotated[int, typer.Option(help="Forget rows a micro-batch.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    gradient_checkpointing: GradientCheckpointing = False,
    save_steps: SaveSteps = None,
    rescue: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the model if it cannot be written to --output.", show_default=False
        ),
    ] = None,
    resume: Resume = False,
    dtype: Dtype = "auto",
    bf16: BF16 = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the batches.")] = 0,
    allow_missing: AllowMissing = None,
    max_length: MaxLength = 512,
    system_prompt: SystemPrompt = None,
    date_string: DateString = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    force_template: ForceTemplate = False,
    repair: RepairSpans = Repair.none,
    overwrite: Overwrite = False,
) -> None:
    """Make a model forget the marked spans (or, by other methods, the answers) of one file and keep
    the answers of another."""
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        from palu.data.files import split_slice
        from palu.models.folders import named_from
        from palu.models.lora import add_lora, lora_settings, reference_kind, refuse_adapter
        from palu.run_record import choose_template
        from palu.storage.output import cache_place, check_output, claim_output, output_folder

        if drop_overlap and retain is None:
            raise ValueError("--drop-overlap leaves out retain rows: it needs a --retain file")
        files = [split_slice(path)[0] for path in (forget, retain) if path is not None]
        wanted = {"overwrite": overwrite, "inputs": (model, *files)}
        check_output(output, **wanted)
        if rescue is not None:
            check_output(rescue, overwrite=False)
            if rescue.resolve().is_relative_to(output.resolve()):
                raise ValueError(
                    f"--rescue {str(rescue)!r} lies in --output {str(output)!r}; name another place"
                )
        if processes.rank() == 0:  # the others write nothing
            claim = context.with_resource(claim_output(output, **wanted))
        refuse_adapter(model)
        lora = lora_settings(lora_rank, lora_alpha, lora_dropout, lora_target)
        asked = context.get_parameter_source("reference").name != "DEFAULT"
        reference = reference_kind(reference if asked else None, lora, reference_cache)
        place = None
        place = cache_place(reference, reference_cache, output)
        import torch

        from palu import unlearn as run
        from palu.models.checks import check_causal, first_texts
        from palu.models.loading import (
            check_precision,
            check_token_ids,
            freeze_other_towers,
            load_to_train,
            load_tokenizer,
            model_folder,
            resolve_device,
        )
        from palu.progress import bar
        from palu.reference.cache import CacheError, CacheWriteError, cache_info
        from palu.reference.rows import dtype_name
        from palu.training import checkpoints
        from palu.training.room import check_room, checkpoint_bytes, keep, model_bytes, small_files
        from palu.training.trainer_checks import marks_something
        from palu_kernels.backend import resolve as resolve_backend

        quiet()
        check_precision(dtype, bf16)
        model_folder(model)
        where = processes.own_device(resolve_device(device))
        resolve_backend(backend, where, torch.float32)
        kept = checkpoints.folder_beside(
            output, save_steps=save_steps, resume=resume, overwrite=overwrite
        )
        if method != "palu":
            given = [n for n in SPAN_OPTIONS if context.get_parameter_source(n).name != "DEFAULT"]
            if given:
                raise ValueError(
                    f"--{given[0].replace('_', '-')} is of --method palu and does nothing with "
                    f"--method {method}; leave it out"
                )
        check_training(
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            seed=seed,
        )
        config = run.make_config(
            where,
            method=method,
            beta=beta,
            beta1=beta1,
            beta2=beta2,
            delta=delta,
            ignore_first=ignore_first,
            retain_loss_eps=retain_loss_eps,
            dual_step_size=dual_step_size,
            dual_warmup_epochs=dual_warmup_epochs,
            layer_id=layer_id,
            steering_coeff=steering_coeff,
            trainable_params_regex=trainable_params_regex,
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
            normalization=normalization,
            reference=reference,
            reference_cache=None if place is None else str(place),
            backend=backend,
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            stop_at_forget_prob=stop_at_forget_prob,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
            save_steps=save_steps,
            bf16=bf16,
            seed=seed,
        )
        run.check_method(config, model, retain=retain is not None)
        is_main = config.process_index == 0
        checkpoint = checkpoints.last_checkpoint(kept) if resume else None
        template = choose_template(
            model,
            system_prompt=system_prompt,
            date_string=date_string,
            chat_template_kwargs=chat_template_kwargs,
            force=force_template,
        )
        has_cache = place is not None and place.is_dir() and any(place.iterdir())
        if has_cache:
            cache_info(place)  # what is no cache is found out before the model is loaded
    read = {"repair": repair.value, "max_length": max_length}
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        tokenizer = load_tokenizer(model)
        by_span, second = method == "palu", run.second_answers(config)
        marked = {"require_spans": by_span, "second_answers": second}
        rows = read_rows(forget, tokenizer, template, **marked, **read)
        retain_rows = None
        if retain is not None:
            both = {"forget": forget, "drop_overlap": drop_overlap}
            retain_rows = read_rows(
                retain, tokenizer, template, require_spans=False, **both, **read
            )
        if by_span and not marks_something(rows, tokenizer.eos_token_id):
            raise ValueError(f"{forget} marks nothing to forget: no span is left in any row")
        loaded, saved = load_to_train(
            model, dtype, str(config.device), bf16=bf16, allow_missing=allow_missing
        )
        computed = torch.bfloat16 if bf16 else loaded.dtype
        check_token_ids(loaded, tokenizer, [*rows, *(retain_rows or ())])
        check_causal(loaded, first_texts(rows))
        if lora is not None:
            loaded, saved = add_lora(loaded, lora, seed), None  # adapters stay float32
        freeze_other_towers(loaded)
        run.prepare_model(config, loaded)
        size = model_bytes(loaded, saved) + small_files(model)
        needs = {"the model": (output, size)}
        if config.save_strategy != "no":
            one = checkpoint_bytes(loaded, adapter=lora is not None)
            needs["checkpoints"] = (kept, one * (config.save_total_limit + 1))
        if is_main:
            check_room(needs)
            if rescue is not None:  # instead of the other, not beside it
                check_room({"the rescued model": (rescue, size)})
    if retain_rows is None:
        hold = "only the other words of the forget answers hold" if by_span else "nothing holds"
        warn(f"no --retain file: {hold} the model in place")
    if resume:
        found = f"Resuming from {checkpoint}"
        if checkpoint is None:
            found = f"Nothing to resume from in {kept}: starting from the beginning"
        out.print(found, soft_wrap=True)
    elif kept is not None and is_main:
        checkpoints.remove_all(kept)
    data = {"forget": forget, "retain": retain, "drop_overlap": drop_overlap, **read}
    notes = {"model": str(model), **data, "template": template.to_dict()}
    outcome = None

    def write(folder: Path) -> None:
        run.save_model(
            folder,
            loaded,
            tokenizer,
            template,
            saved=saved,
            made_by="palu unlearn",
            seed=seed,
            base_model=named_from(folder, model),
            data=data,
            dtype=dtype_name(next(iter(saved.values())) if saved else loaded.dtype),
            compute_dtype=dtype_name(computed),
            master_weights=outcome.master_weights,
            rounded_back=outcome.rounded_back,
            device=str(where),
            processes=processes.count(),
            settings=run.settings_of(config),
            lora=None if lora is None else vars(lora),
            loss_curve=outcome.curve,
        )

    def write_whole(place: Path) -> None:
        with output_folder(place) as folder:
            write(folder)

    try:
        with output_folder(claim) if is_main else nullcontext() as folder:
            mistakes = user_errors(CacheError, CacheWriteError, checkpoints.CheckpointError)
            with mistakes, plain_warnings("default"), bar(bars, "Unlearning") as report:
                outcome = run.unlearn(
                    loaded,
                    tokenizer,
                    rows,
                    retain_rows,
                    config,
                    report,
                    cache_options={"template": template, "notes": notes},
                    checkpoints=kept,
                    resume=checkpoint,
                    saved=saved,
                )
            if not is_main:
                return
            with bars.status("Writing the model"):
                write(folder)
    except Exception as error:
        if outcome is None or not failed_to_write(error):
            raise
        whole = None if kept is None else checkpoints.last_checkpoint(kept)
        raise keep(
            error, output, write_whole, rescue=rescue, checkpoint=whole, size=size
        ) from error
    curve = outcome.curve
    if kept is not None:
        checkpoints.remove_all(kept)
    last = {name: round(curve[-1][name], 4) for name in ("forget", "preserve", "retain")}
    out.print(
        f"Written to {output} after {len(curve)} steps. Last terms: {last}",
        soft_wrap=True,
    )
    if place is not None:
        said = f"The reference cache {'was read from' if has_cache else 'is kept in'} {place}"
        if config.reference_cache is None:
            said = "No reference cache: these settings ask the original model nothing"
        out.print(said, soft_wrap=True)


app.command()(inspect)
app.command()(evaluate)
app.command()(merge)
app.command()(plan)
app.add_typer(cache, name="cache")


def main() -> None:
    """Entry point: a user's mistake is one line and status 2, a diverged run one line and status
    1, what cannot be written one line and status 3, Ctrl-C one line and status 130."""
    # Forked workers after the tokenizer was used would make it print a warning of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A run that is told to stop leaves through its cleanup: no half-written folder stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    out.quiet = bars.quiet = processes.rank() > 0
    lines = WarningLines()
    logging.getLogger("palu").addHandler(lines)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *args, **kwargs: warn(str(message))
            status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        status, said = _mistake(error)
        if not status:
            raise
        bars.quiet = False  # another process may not come to say anything
        who = f" in process {processes.rank()}" if processes.count() > 1 else ""
        say(f"error{who}", "red", said)
    finally:
        logging.getLogger("palu").removeHandler(lines)
    if status == INTERRUPTED:
        say("interrupted", "red", "stopped by Ctrl-C")
    if status:
        sys.exit(status)


# Not every system has all of them.
_FULL = {getattr(errno, name, 0) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG")} - {0}


def _mistake(error: Exception) -> tuple[int, str]:
    """The exit status of an error that is no bug, and what to say of it; 0 for a bug."""
    if isinstance(error, UserError | FloatingPointError):
        return 2 if isinstance(error, UserError) else 1, str(error)
    if isinstance(error, WriteError):
        return 3, str(error)
    # Another OSError may be a bug of ours.
    if failed_to_write(error) and not (isinstance(error, OSError) and error.errno not in _FULL):
        return 3, f"writing failed: {one_line(error)}"
    if out_of_memory(error):
        return 2, (
            f"out of memory: {one_line(error, 200)}; lower --batch-size or --max-length, or take "
            "--dtype bfloat16 or a smaller model (palu plan says what a step takes)"
        )
    if hasattr(error, "format_message"):  # typer's, of the command line
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f" ({context.command_path} --help lists the options)"
        return error.exit_code, one_line(error.format_message()) + hint
    return 0, ""
