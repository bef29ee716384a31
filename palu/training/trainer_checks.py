"""What a `PALUTrainer` cannot be made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.utils.data import IterableDataset

from palu.data.roles import FORGET, IGNORE, token_roles
from palu.methods import PDU, Method
from palu.training.config import PALUConfig
from palu.training.sharding import check_launch


def check_arguments(args: Any, forget: Any, retain: Any, evaluation: Any, kwargs: dict) -> None:
    """Raise TypeError or ValueError, before any work.

    Args:
        args, forget, retain, evaluation: the trainer's arguments.
        kwargs: what else it was given for `transformers.Trainer`.
    """
    if not isinstance(args, PALUConfig):
        raise TypeError(f"args must be a PALUConfig, not {type(args).__name__}")
    check_launch(args)
    unused = ("compute_loss_func", "compute_metrics", "model_init", "preprocess_logits_for_metrics")
    for name in unused:
        if kwargs.get(name) is not None:
            raise TypeError(f"{name} is not supported: the loss and its terms are PALU's own")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor must be 0: PALU's terms have no smoothed form")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 is True and the device is a CPU, where bf16 must be taken instead")
    _check_dealing(args, forget, evaluation)
    _check_data(forget, retain)
    several = isinstance(evaluation, Mapping)
    for rows in evaluation.values() if several else [evaluation]:
        _check_rows("eval_dataset", rows)
    args.check_retain(given=retain is not None)
    loss = args.make_loss()
    if args.remove_unused_columns and loss.needs_alternates:
        raise ValueError(
            "remove_unused_columns is True; it must be False with method "
            f"{args.method!r}: the model's forward does not name the second answers"
        )
    short = args.max_steps <= 0 and isinstance(loss, PDU)
    if short and args.num_train_epochs <= loss.dual_warmup_epochs:
        warnings.warn(
            f"num_train_epochs is {args.num_train_epochs:g} and dual_warmup_epochs "
            f"{loss.dual_warmup_epochs:g}: the retain weight of method 'pdu' never moves",
            stacklevel=3,
        )


def _check_data(forget: Any, retain: Any) -> None:
    if forget is None or (hasattr(forget, "__len__") and len(forget) == 0):
        raise ValueError("train_dataset (the forget set) must have at least one row")
    _check_rows("train_dataset", forget)
    if retain is not None and not hasattr(retain, "__len__"):
        raise TypeError(
            f"retain_dataset is a {type(retain).__name__} without a length; its rows are taken by "
            "their numbers, so it must have one (a list, or a data set that is no stream)"
        )
    _check_rows("retain_dataset", retain)
    if retain is not None and len(retain) == 0:
        raise ValueError("retain_dataset must have at least one row, or be None")
    for name, data in (("train_dataset", forget), ("retain_dataset", retain)):
        if isinstance(data, Mapping):
            raise TypeError(
                f"{name} is a {type(data).__name__} with {', '.join(map(repr, data))}; it must be "
                "rows, such as one split of it"
            )


def _check_rows(name: str, data: Any) -> None:
    """Raise TypeError for what a `DataLoader` cannot draw from: it would say so in the first step,
    or after an epoch, and not of which argument."""
    if isinstance(data, (IterableDataset, os.PathLike, type(None))):
        return
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"{name} is a {type(data).__name__}; it must have a length and rows by their numbers "
            "(a list, a datasets.Dataset), or be a torch.utils.data.IterableDataset"
        )


def _check_dealing(args: PALUConfig, *datasets: Any) -> None:
    """Raise ValueError where accelerate would not deal batches out to processes as `Sharding`
    counts them, or could not."""
    dealing = args.accelerator_config
    if args.world_size == 1:
        return
    if not dealing.even_batches or dealing.dispatch_batches:
        raise ValueError(
            f"accelerator_config has even_batches={dealing.even_batches} and dispatch_batches="
            f"{dealing.dispatch_batches}; with several processes they must be True and not True: "
            "processes with fewer batches would be waited for (repeated rows do not count anyway)"
        )
    streams = any(isinstance(rows, IterableDataset) for rows in datasets)
    if streams and dealing.dispatch_batches is None:  # of a stream None means True
        raise ValueError(
            "a data set is a stream, which the main process of several would read and deal out; "
            "each must read it: accelerator_config={'dispatch_batches': False} (rows that are "
            "repeated at its end count then), or a data set with a length"
        )


def refuse_cached(accelerator: Accelerator) -> None:
    """Raise ValueError where accelerate is going to make of the model what cannot train without
    logits, which `reference="cached"` needs: before a cache is built for nothing."""
    state = accelerator.state
    deepspeed = getattr(state, "deepspeed_plugin", None)
    what = None
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        what = "torch_compile is set, and compiled code has the output embedding's forward in it"
    elif deepspeed is not None and deepspeed.zero_stage == 3:
        what = "DeepSpeed keeps parts of the output embedding in other processes (ZeRO 3)"
    if what is not None:
        raise ValueError(
            f"reference='cached' needs losses from hidden rows, but {what}: use reference='live'"
        )


def marks_something(
    rows: Iterable[Mapping[str, Any]], eos_token_id: int | Iterable[int] | None
) -> bool:
    """Return whether any row has a token to forget."""
    return _any_row(rows, lambda labels: token_roles(labels, 0, eos_token_id) == FORGET)


def _any_row(rows: Iterable[Mapping[str, Any]], wanted: Callable[[Tensor], Tensor]) -> bool:
    """Return whether any row has a wanted place among its labels [1, T]. Rows are read up to the
    first that has one; one without labels, which a collator may make, counts as one."""
    return any(
        "labels" not in row or bool(wanted(torch.as_tensor(row["labels"]).reshape(1, -1)).any())
        for row in rows
    )


def check_marks(dataset: Sequence[Mapping[str, Any]], method: Method, name: str) -> None:
    """Raise ValueError where no row of a data set has a token that the method forgets.

    Args:
        name: of the data set, for the message.
    """
    rows = (dataset[i] for i in range(len(dataset)))
    if _any_row(rows, lambda labels: method.roles(labels) == FORGET):
        return
    own = ", ".join(f"{option}={getattr(method, option)}" for option in method.option_names())
    why = f"method {method.name!r}{own and f' ({own})'} acts on no token of any answer"
    if method.by_span:
        why = "no span is left (no label is a token id other than EOS after a row's first place)"
    raise ValueError(f"{name} has no token to forget: {why}")


def check_kept(dataset: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where no row of a retain set has a token to keep: its term would be 0."""
    # the first place of a row is never predicted
    if not _any_row((dataset[i] for i in range(len(dataset))), lambda one: one[:, 1:] != IGNORE):
        raise ValueError(
            "retain_dataset has no token to keep: every label after the first place of a row is "
            f"{IGNORE}"
        )
