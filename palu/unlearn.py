"""Unlearning from beginning to end: what `palu unlearn` and `palu demo` both run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from palu.config import PALUConfig
from palu.labels import Template
from palu.progress import TrainingBar
from palu.runs import write_record
from palu.trainer import TERMS, PALUTrainer

# What the Trainer logs for each step and `palu.json` keeps.
CURVE = (
    "step",
    "epoch",
    "loss",
    *TERMS,
    *(f"num_{t}" for t in TERMS),
    "learning_rate",
    "grad_norm",
)


def make_config(device: torch.device, **options: Any) -> PALUConfig:
    """A `PALUConfig` that logs every step, saves nothing by itself and trains on `device`.

    Raises:
        ValueError, TypeError: an option is out of its range, naming it.
    """
    if device.type != "cpu" and device.index is not None:
        # accelerate, which places the model, reads the choice of one device among several here.
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    return PALUConfig(
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        **options,
    )


def unlearn(
    model: PreTrainedModel,
    tokenizer: Any,
    forget_rows: Sequence[dict],
    retain_rows: Sequence[dict] | None,
    config: PALUConfig,
    report: Callable[..., None] | None = None,
    *,
    cache_options: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place to forget the sensitive tokens of `forget_rows`.

    Args:
        forget_rows, retain_rows: as `palu.data.tokenize_examples` makes them.
        config: `output_dir` is not used: a reference cache is kept where `reference_cache` says, or
            for this run alone. `reference_cache` is None afterwards where none was needed.
        report: called with (step, steps, a line with the last terms), and before with (examples,
            of how many, ...) while a reference cache is built.
        cache_options: `template` and `notes` of `ReferenceCache.build`.

    Returns:
        the loss curve: one dict a step with the names in `CURVE`.

    Raises:
        FloatingPointError: the loss is not finite; names the step and the term.
        CacheError, CacheWriteError: the reference cache cannot be used or built.
    """
    use_cache = model.config.use_cache
    with tempfile.TemporaryDirectory(prefix="palu-") as scratch:
        config.output_dir = scratch
        trainer = PALUTrainer(
            model,
            config,
            train_dataset=forget_rows,
            retain_dataset=retain_rows,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        if report is not None:
            trainer.add_callback(TrainingBar(report))
        building = None if report is None else partial(report, note="building the reference cache")
        cache = trainer.open_cache(report=building, **(cache_options or {}))
        if cache is None:
            config.reference_cache = None
        trainer.train()
    # The Trainer turns the cache off for training and would leave it so in the saved folder.
    model.config.use_cache = use_cache
    model.eval()
    return [
        {name: entry[name] for name in CURVE if name in entry}
        for entry in trainer.state.log_history
        if "forget" in entry
    ]


def settings_of(config: PALUConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, for `palu.json`: PALU's own and the main ones
    of the Trainer."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field.name for field in fields(PALUConfig) if field.name not in inherited]
    trainer = ["learning_rate", "num_train_epochs", "per_device_train_batch_size"]
    trainer += ["gradient_accumulation_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm"]
    values = {name: getattr(config, name) for name in [*own, *trainer]}
    return {k: getattr(v, "value", v) for k, v in values.items()}


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: Any, template: Template, **record: Any
) -> None:
    """Writes a Hugging Face folder (safetensors, tokenizer) and its `palu.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, template=template, **record)
