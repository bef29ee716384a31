"""`palu unlearn`: check, load, train, write."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

from palu import distributed
from palu.cli.config_file import (
    ConfigOptions,
    as_config,
    blamed_on,
    changed_data,
    config_text,
    given_trainer_options,
    trainer_options,
)
from palu.cli.data import (
    data_notes,
    digests_of,
    find_models,
    load_for_training,
    plain_warnings,
    quiet,
    read_both,
    template_of,
    without_slices,
)
from palu.cli.options import DataOptions, OutputOptions, TextOptions, WeightOptions, with_options
from palu.cli.retain import FILE, NONE, SELF, RetainOptions, chosen, own_answers, warn_of_nothing
from palu.errors import failed_to_write, user_errors
from palu.terminal import bars, out, say, warn
from palu.training.options import (
    LoRAOptions,
    LossOptions,
    MethodOptions,
    RunOptions,
    TrainingOptions,
    check_read,
    option,
)

_output = partial(option, panel="Output")


@dataclass(kw_only=True)
class PlaceOptions:
    """Where a run writes."""

    output: Path = _output(MISSING, "Folder for the new model.")
    rescue: Path | None = _output(None, "Folder for the model if it cannot be written to --output.")
    resume: bool = _output(
        False,
        "Go on from the last checkpoint of an interrupted run with the same settings, data and "
        "model; from the beginning where there is none.",
    )
    keep_cache: bool = _output(
        False,
        "Keep the reference cache that the run builds in OUTPUT-reference-cache: it holds data "
        "derived from what is erased, and is removed at the end without this.",
    )


SOURCES = (
    DataOptions,
    RetainOptions,
    TextOptions,
    PlaceOptions,
    OutputOptions,
    RunOptions,
    LossOptions,
    MethodOptions,
    LoRAOptions,
    TrainingOptions,
    WeightOptions,
    ConfigOptions,
)


@with_options(*SOURCES)
def unlearn(context: typer.Context, options: SimpleNamespace) -> None:
    """Make a model forget the marked spans (or, by other methods, the answers) of one file and keep
    the answers of another."""
    with user_errors():
        options.set = given_trainer_options(context, options.set)
        if options.print_config:
            out.print(config_text(options), end="", soft_wrap=True, highlight=False)
            return
    find_models(options, "model")
    with user_errors(), bars.status("Loading PyTorch and transformers"):
        run = Run(context, options)
        run.check_places()
        run.check_settings()
    if run.done:
        run.report()
        return
    with user_errors(), plain_warnings(), bars.status("Reading model and data"):
        run.load()
        run.check_room()
    run.announce()
    with user_errors(), plain_warnings():
        run.make_retain()
    run.train_and_write()
    run.report()


def command_of(body: Callable[..., None] = unlearn) -> Any:
    """Return a command of its own with the options of `palu unlearn`."""
    command = typer.Typer(pretty_exceptions_enable=False)
    command.command()(body)
    return typer.main.get_command(command)


def run_unlearn(words: Sequence[str]) -> int:
    """Run `palu unlearn` in this process as the command line does: `words` without `palu`. Return
    its exit status."""
    status = command_of()(list(words[1:]), standalone_mode=False, prog_name="palu unlearn") or 0
    if status == 128 + signal.SIGINT:  # typer's, of Ctrl-C, which stops the caller too
        raise KeyboardInterrupt
    return status


def check_unlearn(words: Sequence[str]) -> Run:
    """Return a run whose settings are checked. Raise what `palu unlearn` would refuse these words
    with before it reads any data."""
    checked = []

    @with_options(*SOURCES)
    def check(context: typer.Context, options: SimpleNamespace) -> None:
        """Check."""
        options.set = given_trainer_options(context, options.set)
        checked.append(run := Run(context, options))
        run.check_places()
        run.check_settings()

    command_of(check)(list(words[1:]), standalone_mode=False, prog_name="palu unlearn")
    return checked[0]


class Run:
    """One `palu unlearn`, whose steps are called in the order in which they stand here."""

    def __init__(self, context: typer.Context, options: SimpleNamespace) -> None:
        self.context, self.asked = context, options
        self.options, self.kept = chosen(options)  # a file, the model's own answers or nothing
        self.is_main = distributed.rank() == 0  # the others write nothing
        self.schedule: dict[str, Any] = {}  # of the learning rate, where the user left it open
        self.done = False  # an earlier start has written the output
        self.chosen: dict[str, dict[str, Any]] = {}  # settings that the user left open

    def check_places(self) -> None:
        """Refuse an output that may not be written, and keep it from other runs."""
        from palu.models.lora import lora_settings, reference_kind, refuse_adapter
        from palu.storage.output import cache_place, check_output, claim_output

        options = self.options
        if options.drop_overlap and options.retain is None:
            raise ValueError("--drop-overlap leaves out retain examples: it needs a --retain file")
        files = without_slices(options.forget, options.retain)
        self.done = options.resume and self._is_done()
        wanted = {"overwrite": options.overwrite or self.done, "inputs": (options.model, *files)}
        check_output(options.output, **wanted)
        if options.rescue is not None:
            check_output(options.rescue, overwrite=False)
            if options.rescue.resolve().is_relative_to(options.output.resolve()):
                raise ValueError(
                    f"--rescue {str(options.rescue)!r} lies in --output {str(options.output)!r}; "
                    "name another place"
                )
        if self.is_main:
            self.claim = self.context.with_resource(claim_output(options.output, **wanted))
        refuse_adapter(options.model)
        self.lora = lora_settings(
            options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_target
        )
        cache = None if options.reference_cache is None else Path(options.reference_cache)
        asked = options.reference if "reference" in options.given else None
        self.reference = reference_kind(asked, self.lora, cache)
        if options.keep_cache and self.reference != "cached":
            raise ValueError("--keep-cache: this run has no cache (it needs --reference cached)")
        self.cache = cache_place(self.reference, cache, options.output)

    def _is_done(self) -> bool:
        """Return whether the output is what this run has written, before it was stopped while it
        removed what is of no more use."""
        from palu.storage.fingerprint import model_digests
        from palu.storage.output import read_record, versions
        from palu.training import auto

        output, options = self.options.output, self._options_to_keep()
        record = read_record(output)
        if record is None or not {"options", "chosen", "digests"} <= record.keys():
            return False
        for name, choice in record["chosen"].items():
            if getattr(options, name) is None:
                setattr(options, name, choice["value"])
                options.set = (auto.SCHEDULE if name == "epochs" else {}) | options.set
        mine = json.loads(json.dumps(as_config(options, of_one_run=False)))
        if record["options"] != mine or record["versions"] != versions():
            return False
        return record["digests"] == digests_of(self.options) | {"output": model_digests(output)}

    def check_settings(self) -> None:
        """Refuse settings that no run can have, and make its `PALUConfig`."""
        import torch

        from palu import unlearn as run
        from palu.models.loading import check_precision, model_folder, resolve_device
        from palu.reference.cache import cache_info
        from palu.training import auto, checkpoints
        from palu.training.sharding import check_launch
        from palu_kernels.backend import resolve as resolve_backend

        quiet()
        options = self.options
        check_precision(options.dtype, options.bf16)
        model_folder(options.model)
        self.device = distributed.own_device(resolve_device(options.device))
        resolve_backend(options.backend, self.device, torch.float32)
        self.checkpoints = checkpoints.folder_beside(
            options.output,
            save_steps=options.save_steps,
            resume=options.resume,
            overwrite=options.overwrite,
        )
        if not 0 <= options.seed < 2**32:
            raise ValueError(f"--seed is {options.seed}; it must be 0 to 2**32 - 1")
        self._choose(
            auto.simple_choices(
                options,
                hidden_size=run.hidden_size(options.model),
                lora=self.lora is not None,
                own_answers=self.kept == SELF,
            )
        )
        settings = self._settings()
        with blamed_on(options.set, ImportError):  # deepspeed
            self.config = run.make_config(self.device, **settings)
        check_launch(self.config)
        check_read(options, options.given)  # defaults too, where they were given
        run.check_method(self.config, options.model, retain=self.kept != NONE)
        _check_reports(self.config, options.output)
        self.resume_from = checkpoints.last_checkpoint(self.checkpoints) if options.resume else None
        self.template = template_of(options)
        self.had_cache = (
            self.cache is not None and self.cache.is_dir() and any(self.cache.iterdir())
        )
        if self.had_cache:
            cache_info(self.cache)  # what is no cache is found out before the model is loaded

    def _choose(self, choices: dict[str, Any]) -> None:
        """Take the settings that were chosen, where the user has given none."""
        for name, choice in choices.items():
            if getattr(self.options, name) is None:
                setattr(self.options, name, choice.value)
                self.chosen[name] = choice._asdict()

    def _choose_by_data(self, model: Any) -> None:
        """Choose what depends on the data: how long to train, and the weight of the forget term."""
        from palu.training import auto

        options, config = self.options, self.config
        step = options.batch_size * options.gradient_accumulation * distributed.count()
        choices = {"epochs": auto.epochs(len(self.rows), step)}
        if options.forget_weight is None:
            loss = config.make_loss().palu_loss
            choices["forget_weight"] = auto.forget_weight(
                model, self.tokenizer, self.rows, loss, options.batch_size
            )
        self._choose(choices)
        config.num_train_epochs, config.forget_weight = options.epochs, options.forget_weight

    def _settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `make_config`."""
        from palu.training import auto

        settings = {
            one.metadata["help"].trainer or one.name: getattr(self.options, one.name)
            for kind in (RunOptions, LossOptions, MethodOptions, TrainingOptions)
            for one in fields(kind)
        }
        if settings["num_train_epochs"] is None:  # by the data, which is not read yet
            del settings["num_train_epochs"]
            # The rate may not fall to 0 before it is known where the run ends.
            self.schedule = auto.SCHEDULE
        settings["reference"] = self.reference
        settings["reference_cache"] = None if self.cache is None else str(self.cache)
        settings["report_to"] = [name.strip() for name in settings["report_to"].split(",")]
        return settings | self.schedule | trainer_options(self.options.set)

    def load(self) -> None:
        """Read the data, load the model and put what trains on it."""
        import torch

        from palu import unlearn as run
        from palu.methods import METHODS
        from palu.models.loading import freeze_other_towers, load_tokenizer
        from palu.models.lora import add_lora
        from palu.training.inputs import second_answers
        from palu.training.trainer_checks import check_marks

        options, config = self.options, self.config
        self.tokenizer = load_tokenizer(options.model)
        self.by_span = METHODS[options.method].by_span
        self.rows, self.retain_rows = read_both(
            options,
            self.tokenizer,
            self.template,
            require_spans=self.by_span,
            second_answers=second_answers(config),
        )
        check_marks(self.rows, config.make_loss(self.tokenizer.eos_token_id), options.forget)
        self.digests = digests_of(options) if self.is_main else {}  # of what was read, not later
        for path in changed_data(options, self.digests.get("data", {})):
            warn(f"{path} holds something else than in the run of {options.config}")
        model, self.saved = load_for_training(
            options, str(config.device), self.tokenizer, self.rows, self.retain_rows or []
        )
        self.compute_dtype = torch.bfloat16 if options.bf16 else model.dtype
        if self.lora is not None:
            model, self.saved = add_lora(model, self.lora, options.seed), None  # stays float32
        self._choose_by_data(model)
        freeze_other_towers(model)
        run.prepare_model(config, model)
        self.model = model

    def check_room(self) -> None:
        """Refuse to begin where the disk has no room for what is written at the end."""
        from palu.training.room import check_room, checkpoint_bytes, model_bytes, small_files
        from palu.training.sharding import asked_by

        options = self.options
        self.size = model_bytes(self.model, self.saved) + small_files(options.model)
        needs = {"the model": (options.output, self.size)}
        if self.config.save_strategy != "no":
            sharded = asked_by(self.config) is not None
            one = checkpoint_bytes(self.model, adapter=self.lora is not None, sharded=sharded)
            needs["checkpoints"] = (self.checkpoints, one * (self.config.save_total_limit + 1))
        if self.is_main:
            check_room(needs)
            if options.rescue is not None:  # instead of the other, not beside it
                check_room({"the rescued model": (options.rescue, self.size)})

    def announce(self) -> None:
        """Say what holds the model in place and where a resumed run begins."""
        from palu.training import checkpoints

        for name, choice in self.chosen.items():
            line = f"--{name.replace('_', '-')} {choice['value']}: {choice['why']}"
            bars.print(line, style="dim", soft_wrap=True, highlight=False)
        if self.kept == NONE:
            warn_of_nothing(self.by_span)
        if self.options.resume:
            text = f"Resuming from {self.resume_from}"
            if self.resume_from is None:
                text = f"Nothing to resume from in {self.checkpoints}: starting from the beginning"
            out.print(text, soft_wrap=True)
        elif self.checkpoints is not None and self.is_main:
            checkpoints.remove_all(self.checkpoints)

    def make_retain(self) -> None:
        """Let the original model answer what it is to go on answering, where there is no file."""
        self.data = data_notes(self.options)
        if self.kept == SELF:
            about, self.retain_rows = own_answers(
                self.options,
                self.model,
                self.tokenizer,
                self.template,
                self.checkpoints,
                resumed=self.resume_from is not None,
            )
            self.data |= {"retain": SELF, "self_retain": about}

    def train_and_write(self) -> None:
        """Train, and write the model; keep it somewhere else where it cannot be written."""
        from palu.storage.output import output_folder
        from palu.training import checkpoints
        from palu.training.room import keep

        def write_whole(path: Path) -> None:
            with output_folder(path) as folder:
                self._write(folder)

        self.outcome = None
        try:
            with output_folder(self.claim) if self.is_main else nullcontext() as folder:
                self._train()
                if self.is_main:
                    with bars.status("Writing the model"):
                        self._write(folder)
        except Exception as error:
            if self.outcome is None or not failed_to_write(error):
                raise
            kept = self.checkpoints
            raise keep(
                error,
                self.options.output,
                write_whole,
                rescue=self.options.rescue,
                checkpoint=None if kept is None else checkpoints.last_checkpoint(kept),
                size=self.size,
            ) from error

    def _train(self) -> None:
        from palu import unlearn as run
        from palu.models.hub import shown_model
        from palu.progress import bar
        from palu.reference.cache import CacheError, CacheWriteError
        from palu.training.checkpoints import CheckpointError
        from palu.training.ranks import ProcessesDiffer

        notes = {"model": shown_model(self.options.model), **self.data}
        notes["template"] = self.template.to_dict()
        mistakes = user_errors(CacheError, CacheWriteError, CheckpointError, ProcessesDiffer)
        trainer = blamed_on(self.options.set, ImportError, TypeError, ValueError)
        with trainer, mistakes, plain_warnings("default"), bar(bars, "Unlearning") as report:
            self.outcome = run.unlearn(
                self.model,
                self.tokenizer,
                self.rows,
                self.retain_rows,
                self.config,
                report,
                cache_options={"template": self.template, "notes": notes},
                checkpoints=self.checkpoints,
                resume=self.resume_from,
                saved=self.saved,
            )
        self.model = self.outcome.model

    def _write(self, folder: Path) -> None:
        from palu import unlearn as run
        from palu.models.folders import named_from
        from palu.reference.rows import dtype_name

        options, saved = self.options, self.saved
        run.save_model(
            folder,
            self.model,
            self.tokenizer,
            self.template,
            saved=saved,
            source=options.model,
            made_by="palu unlearn",
            seed=options.seed,
            base_model=named_from(folder, options.model),
            data=self.data,
            digests=self.digests,
            dtype=dtype_name(next(iter(saved.values())) if saved else self.model.dtype),
            compute_dtype=dtype_name(self.compute_dtype),
            master_weights=self.outcome.master_weights,
            rounded_back=self.outcome.rounded_back,
            device=str(self.device),
            processes=distributed.count(),
            settings=run.settings_of(self.config),
            options=as_config(self._options_to_keep(), of_one_run=False),
            chosen=self.chosen,
            outcome=self._outcome(),
            lora=None if self.lora is None else vars(self.lora),
            loss_curve=self.outcome.curve,
        )

    def _options_to_keep(self) -> SimpleNamespace:
        """Return the options with what was chosen, and `retain` as it was asked for."""
        own = {"retain": self.asked.retain, "set": self.schedule | self.options.set}
        return SimpleNamespace(**vars(self.options) | own)

    def _say_outcome(self, known: dict[str, Any]) -> None:
        """Say what is known and kept, and what to change. Exit with 3 where it is not good."""
        for line in known["reasons"]:
            out.print(f"  {line}", soft_wrap=True, highlight=False)
        if known["status"] == "forgotten":
            measured = known["after"]["retain_probability"] is not None  # not --retain-weight 0
            text = "Forgotten, and kept." if self.kept == FILE and measured else "Forgotten."
            out.print(text, style="green")
            return
        names = {"known": "the secrets are still known", "harmed": "the retain set is harmed"}
        text = " and ".join(names.get(name, name) for name in known["status"].split(" and "))
        say("not good", "bold red", text)
        for line in known["advice"]:
            say("try", "red", line)
        raise typer.Exit(3)

    def _reasons(self) -> list[str]:
        """Return what was measured, and what that does not tell."""
        reasons = self.outcome.known.reasons()
        if self.kept == SELF:
            reasons.append(
                "the retain probability is of the model's own answers, which do not ask for all "
                "that it was taught: only a file of real ones tells (palu evaluate --retain)"
            )
        return reasons

    def _outcome(self) -> dict[str, Any] | None:
        known = self.outcome.known
        if known is None:
            return None
        return known.to_dict(self.config) | {"reasons": self._reasons(), "retain": self.kept}

    def report(self) -> None:
        """Remove the checkpoints, which are of no more use, and say what `palu.json` has of the
        run."""
        from palu.storage.output import read_record
        from palu.training import checkpoints

        if not self.is_main:
            return
        record = read_record(self.options.output)
        if self.checkpoints is not None:
            checkpoints.remove_all(self.checkpoints)
        curve = record["loss_curve"]
        last = {name: round(curve[-1][name], 4) for name in ("forget", "preserve", "retain")}
        place = f"{self.options.output}{' by an earlier start' if self.done else ''}"
        written = f"Written to {place} after {len(curve)} steps. Last terms: {last}"
        out.print(written, soft_wrap=True)
        if self.cache is not None:
            out.print(self._settle_cache(record["settings"]["reference_cache"]), soft_wrap=True)
        if record["outcome"] is not None:
            self._say_outcome(record["outcome"])

    def _settle_cache(self, used: str | None) -> str:
        """Remove a cache that this run built for itself, which holds data derived from what was
        erased, and return what became of it."""
        from palu.storage.output import remove_cache

        if used is None:
            return "No reference cache: these settings ask the original model nothing"
        derived = "it holds data derived from what was erased"
        if self.had_cache and not (self.options.resume and self.options.reference_cache is None):
            return f"The reference cache was read from {self.cache}, and is kept: {derived}"
        if self.options.keep_cache or self.options.reference_cache is not None:
            return f"The reference cache is kept in {self.cache}: {derived}"
        remove_cache(self.cache)
        return f"The reference cache was removed: {derived} (--keep-cache keeps it)"


def _check_reports(config: Any, output: Path) -> None:
    """Refuse a log that cannot be written to, and say where TensorBoard's files go and what a run
    is called: the Trainer's own folder is a temporary one."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for kind in get_reporting_integration_callbacks(config.report_to):
            kind()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--report-to {','.join(config.report_to)}: {error}") from None
    if "tensorboard" in config.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{output}-logs")
    if config.run_name is None:
        config.run_name = output.name
