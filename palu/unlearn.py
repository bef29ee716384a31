"""Unlearning from beginning to end: what `palu unlearn` and `palu demo` both run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from palu.data.template import Template
from palu.models.layers import layer_count
from palu.models.writing import write_model
from palu.reference.cached import CachedReference
from palu.run_record import write_record
from palu.storage.fingerprint import model_digests
from palu.training.callbacks import FORGET_PROB
from palu.training.config import PALUConfig
from palu.training.master_weights import round_into, warn_rounded_back
from palu.training.nonfinite import check_weights
from palu.training.outcome import RunOutcome
from palu.training.sharding import skeleton
from palu.training.trainer import TERMS, PALUTrainer

# What the Trainer logs for each step and `palu.json` keeps.
CURVE = (
    "step",
    "epoch",
    "loss",
    *TERMS,
    *(f"num_{t}" for t in TERMS),
    "learning_rate",
    "grad_norm",
    "dual",
    FORGET_PROB,
)


# What `palu.json` tells of the Trainer's settings.
TRAINER_SETTINGS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size")
TRAINER_SETTINGS += ("gradient_accumulation_steps", "gradient_checkpointing")
TRAINER_SETTINGS += ("lr_scheduler_type", "weight_decay", "max_grad_norm")

# Newer versions of transformers warn of the first name.
_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PALUConfig, "activation_checkpointing")
    else "gradient_checkpointing"
)


class Outcome(NamedTuple):
    """What a run leaves."""

    model: PreTrainedModel  # trained; where FSDP shards it, whole in the main process alone
    curve: list[dict[str, float]]  # one dict a step with the names in `CURVE`
    master_weights: bool  # whether float32 masters were trained (`palu.training.master_weights`)
    rounded_back: float  # share of the change that rounding takes back
    known: RunOutcome | None = None  # where `PALUConfig.checks` asks for it


def make_config(
    device: torch.device,
    *,
    gradient_checkpointing: bool = False,
    save_steps: int | None = None,
    **options: Any,
) -> PALUConfig:
    """Return a `PALUConfig` that logs every step and trains on `device`.

    Args:
        save_steps: steps between checkpoints, of which the last one is kept; None: nothing is
            saved.

    Raises:
        ValueError, TypeError: an option is out of its range, naming it.
    """
    if device.type != "cpu" and device.index is not None:
        # accelerate, which places the model, reads the choice of one device among several here.
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    options[_CHECKPOINTING] = gradient_checkpointing
    options["save_strategy"] = "no" if save_steps is None else "steps"
    if save_steps is not None:
        options |= {"save_steps": save_steps, "save_total_limit": 1}
    defaults = {"report_to": "none", "dataloader_pin_memory": device.type != "cpu"}
    return PALUConfig(
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        **defaults | options,
    )


def check_method(config: PALUConfig, model: Path, *, retain: bool) -> None:
    """Raise ValueError where the method or a setting lacks something, before anything is loaded:
    see `Method.check_run`, `Method.check_layers` and `PALUConfig.check_retain`.

    Args:
        model: its folder.
        retain: whether there is a retain set.
    """
    method, kept = config.make_loss(), retain and config.retain_weight > 0
    needed = method.needs_reference or (kept and config.retain_loss != "nll")
    method.check_run(retain=kept, reference=config.reference, reference_needed=needed)
    config.check_retain(given=retain)
    count = layer_count(_model_config(model))
    if count is not None:
        method.check_layers(count)


def hidden_size(model: Path) -> int | None:
    """Return the width of the model in a folder; None where its configuration does not tell."""
    config = _model_config(model)
    text = config.get_text_config(decoder=True) if config is not None else None
    return getattr(text, "hidden_size", None)


def _model_config(model: Path) -> Any:
    with suppress(Exception):  # `load_model` will say what is wrong with the folder
        options = {"local_files_only": True, "trust_remote_code": False}
        return AutoConfig.from_pretrained(model, **options)


def prepare_model(config: PALUConfig, model: nn.Module) -> None:
    """Let the method choose what it trains of a model, and set `config.layer_id`; `PALUTrainer`
    does the first again, to no effect.

    Raises:
        ValueError: the model will not do: see `Method.prepare`.
    """
    method = config.make_loss()
    method.prepare(model)
    config.layer_id = getattr(method, "layer_id", None)


def unlearn(
    model: PreTrainedModel,
    tokenizer: Any,
    forget_rows: Sequence[dict],
    retain_rows: Sequence[dict] | None,
    config: PALUConfig,
    report: Callable[..., None] | None = None,
    *,
    cache_options: Mapping[str, Any] | None = None,
    checkpoints: Path | None = None,
    resume: str | None = None,
    saved: Mapping[str, torch.dtype] | None = None,
) -> Outcome:
    """Train `model` to forget the sensitive tokens (or the answers, see `PALUConfig.method`) of
    `forget_rows`: in place, unless FSDP shards it (see `Outcome`).

    Args:
        forget_rows, retain_rows: as `palu.data.examples.tokenize_examples` makes them.
        config: `output_dir` is not used: a reference cache is kept where `reference_cache` says, or
            for this run alone. `reference_cache` is None afterwards where none was needed.
        report: called with (step, steps, a line with the last terms), and before with (examples,
            of how many, ...) while a reference cache is built.
        cache_options: `template` and `notes` of `ReferenceCache.build`.
        checkpoints: where the Trainer saves what `config` has it save; None: a temporary folder.
        resume: the checkpoint to go on from.
        saved: the dtypes of parameters in which `save_model` will write them (see
            `palu.models.loading.load_to_train`); None: as they are.

    Raises:
        FloatingPointError: the loss is not finite (names the step, the term and the examples), or
            the weights after the last step are not.
        CacheError, CacheWriteError: the reference cache cannot be used or built.
        CheckpointError: `resume` is not whole, or of a run with other settings, data or model.
    """
    use_cache = getattr(model.config, "use_cache", None)
    with tempfile.TemporaryDirectory(prefix="palu-") as scratch:
        config.output_dir = scratch if checkpoints is None else str(checkpoints)
        trainer = PALUTrainer(
            model,
            config,
            train_dataset=forget_rows,
            retain_dataset=retain_rows,
            processing_class=tokenizer,
        )
        trainer.texts_compared = True  # by palu.cli.data.read_rows
        trainer.remove_callback(PrinterCallback)
        if report is not None:
            trainer.add_callback(TrainingBar(report))
        bare = skeleton(model) if trainer.is_fsdp_enabled else None
        building = None if report is None else partial(report, note="building the reference cache")
        trainer.train(resume, cache_options={"report": building, **(cache_options or {})})
        if not isinstance(trainer.reference, CachedReference):
            config.reference_cache = None
    check_weights(trainer.model, trainer.state.global_step)
    if bare is not None:
        model = trainer.gather_into(bare)
    kinds = {saved[n] for n, p in model.named_parameters() if p.dtype != saved[n]} if saved else ()
    kind = next(iter(kinds), None)  # one: a checkpoint's
    share = trainer.rounded_back(kind)
    if kind is not None:
        warn_rounded_back(share, kind)
    # The Trainer turns the cache off for training and would leave it so in the saved folder; the
    # config of a checkpoint with images, whose text part has it, got it of the Trainer alone.
    if use_cache is None:
        vars(model.config).pop("use_cache", None)
    else:
        model.config.use_cache = use_cache
    model.eval()
    curve = _curve(trainer.state.log_history)
    return Outcome(model, curve, trainer.has_masters, share, trainer.outcome)


def _curve(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the entries of `CURVE` of every step; an epoch's measurement goes to its last step."""
    measured = {e["step"]: {FORGET_PROB: e[FORGET_PROB]} for e in history if FORGET_PROB in e}
    steps = [entry | measured.get(entry["step"], {}) for entry in history if "forget" in entry]
    return [{name: entry[name] for name in CURVE if name in entry} for entry in steps]


class TrainingBar(TrainerCallback):
    """Show a Trainer's steps and the last logged terms through `report`."""

    SHOWN = ("forget", "preserve", "retain", FORGET_PROB, "sensitive_probability", "retain_kept")

    def __init__(self, report: Callable[..., None]) -> None:
        self.report = report
        self.values: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Show a new total, and where a resumed run goes on from."""
        self._show(state)

    on_step_end = on_train_begin

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the last terms."""
        self.values |= {n: logs[n] for n in self.SHOWN if n in (logs or {})}
        self._show(state)

    def _show(self, state) -> None:
        note = "  ".join(f"{n} {self.values[n]:.3g}" for n in self.SHOWN if n in self.values)
        self.report(state.global_step, state.max_steps, note)


def settings_of(config: PALUConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes, for `palu.json`: PALU's own and the main
    ones of the Trainer."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field.name for field in fields(PALUConfig) if field.name not in inherited]
    values = {name: getattr(config, name) for name in (*own, *TRAINER_SETTINGS)}
    if config.method != "palu":
        loss = config.make_loss()  # its options, where the config leaves them to it
        values |= {name: getattr(loss, name) for name in loss.option_names()}
    return {k: getattr(v, "value", v) for k, v in values.items()}


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    template: Template,
    *,
    saved: Mapping[str, torch.dtype] | None = None,
    source: str | Path | None = None,
    **record: Any,
) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer), of a PEFT model its adapter alone, and
    `palu.json`, with digests of what was written. `source` is the folder that the model was loaded
    from (see `palu.models.writing.write_model`)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(model.device).manual_seed(0)
    for name, parameter in model.named_parameters() if saved else ():
        if parameter.dtype != saved[name]:
            rounded = torch.empty_like(parameter, dtype=saved[name])
            round_into(rounded, parameter.data, generator)
            parameter.data = rounded
    write_model(folder, model, tokenizer, source)
    record["digests"] = {**record.get("digests", {}), "output": model_digests(folder)}
    write_record(folder, template=template, **record)
