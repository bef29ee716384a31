"""Restore what the checkout, written for transformers 4, expects of transformers 5."""

from __future__ import annotations

import functools
import inspect
import os
from types import ModuleType

from transformers import PreTrainedTokenizerBase, TrainingArguments


def restore_defaults(trainer: ModuleType) -> None:
    """Restore in this process what version 5 removed; with version 4 nothing happens.

    Args:
        trainer: the checkout's package of that name.
    """
    apply = PreTrainedTokenizerBase.apply_chat_template
    if inspect.signature(apply).parameters["return_dict"].default:
        PreTrainedTokenizerBase.apply_chat_template = _with_lists(apply)
    if "logging_dir" not in inspect.signature(TrainingArguments).parameters:
        trainer.TrainingArguments = _with_logging_dir


def _with_lists(apply):
    """Version 5 returns a dict unless told otherwise, version 4 a list of ids."""

    @functools.wraps(apply)
    def with_lists(self, *arguments, **options):
        return apply(self, *arguments, **{"return_dict": False, **options})

    return with_lists


def _with_logging_dir(*, logging_dir: str | None = None, **options) -> TrainingArguments:
    """Version 5 takes the folder of TensorBoard's logs from the environment."""
    if logging_dir is not None:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", logging_dir)
    return TrainingArguments(**options)
