"""When numbers are no longer finite: which examples, and which checkpoint was still good."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from palu.distributed import everyone
from palu.methods.micro_batch import ROLES
from palu.models.wrappers import is_sharded
from palu.storage.fingerprint import example_ids
from palu.training.checkpoints import CheckpointError, read_record

ADVICE = (
    "A lower learning_rate, a smaller forget_weight or bfloat16 instead of float16 usually helps."
)
SHOWN = 8  # examples that a message names


def bad_examples(
    examples: Sequence[dict[str, Any]],
    loss_of: Callable[[dict], Tensor] | None,
    datasets: Mapping[str, Any],
    collate: Callable[[list], Mapping[str, Any]],
) -> dict[str, list[str]]:
    """Return names of the examples whose loss is not finite by itself, by data set.

    Args:
        examples: micro-batches of one example.
        loss_of: the loss of such a one; None where it cannot be had, and all are named.
        datasets: `forget` and `retain`, where the examples come from.
        collate: makes a batch of a list of their rows.
    """
    bad: dict[str, list] = {"forget": [], "retain": []}
    with torch.no_grad():
        for one in examples:
            if loss_of is None or not loss_of(one).isfinite():
                bad["retain" if one[ROLES].retain else "forget"].append(one)
    return {kind: example_names(datasets[kind], collate, bad[kind]) for kind in bad}


def example_names(
    dataset: Any, collate: Callable[[list], Mapping[str, Any]], examples: Sequence[dict]
) -> list[str]:
    """What examples of batches are called in the data set they come from: their index, and their
    own `example_id` or `id` where it is another.

    They are looked up by their tokens and labels, each row of the data set collated alone: batches
    need not carry ids, and a collator may be of any kind.

    Args:
        dataset: with a length and an index.
        collate: makes a batch of a list of its rows.
        examples: batches of one.

    Returns:
        as many names as were found: none where the data set has no length, or its collator gives
        something else each time.
    """
    wanted = {int(example_ids(one)) for one in examples}
    found: dict[int, str] = {}
    try:
        for index in range(len(dataset)):
            if len(found) == len(wanted):
                break
            key = int(example_ids(collate([dataset[index]])))
            if key in wanted and key not in found:
                found[key] = _name(index, dataset[index])
    except Exception:
        # Data sets and collators are the user's and of any kind: the error that is being reported
        # matters more than theirs.
        return []
    return list(found.values())


def error(
    where: str, terms: Mapping[str, float], examples: Mapping[str, Sequence[str]], checkpoint: str
) -> FloatingPointError:
    """The error that ends a run.

    Args:
        where: `at step 3`.
        terms: the values that are not finite, by name.
        examples: names by data set.
        checkpoint: as `last_checkpoint` says it.
    """
    message = f"the loss is not finite {where}: {', '.join(f'{n} = {v}' for n, v in terms.items())}"
    named = [f"{kind} {_list(names)}" for kind, names in examples.items() if names]
    if named:
        message += f", in the examples {' and '.join(named)}"
    return FloatingPointError(f"{message}.{checkpoint} {ADVICE}")


def check_weights(model: nn.Module, step: int, checkpoint: Callable[[], str] = lambda: "") -> None:
    """Before weights are written: a step may spoil them though its loss was finite, and a good
    checkpoint must not make room for such ones.

    Args:
        model: its trainable parameters are looked at; of a sharded one by all processes together.
        step: optimizer steps done.
        checkpoint: gives what `last_checkpoint` says.

    Raises:
        FloatingPointError: a parameter has an infinity or a NaN; names it.
    """
    found = _not_finite(model)
    if is_sharded(model):  # each process sees its own part
        found = next(filter(None, everyone(found)), None)
    if found is not None:
        raise FloatingPointError(
            f"the weights are not finite after step {step}: {found[0]} holds {found[1]}; they are "
            f"not saved.{checkpoint()} {ADVICE}"
        )


def _not_finite(model: nn.Module) -> tuple[str, float] | None:
    """Return the name of the first parameter that is not finite here, and what it holds."""
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        values = values.to_local() if hasattr(values, "to_local") else values
        if not parameter.requires_grad or values.numel() == 0:
            continue
        # The largest absolute value: NaN where there is one, and no second tensor of that size.
        largest = torch.linalg.vector_norm(values, math.inf).item()
        if not math.isfinite(largest):
            return name, largest
    return None


def last_checkpoint(output_dir: str, step: int, run: Mapping[str, Any] | None) -> str:
    """A sentence that names the newest whole checkpoint of at most `step` steps; empty without one.

    Args:
        output_dir: where checkpoints are.
        step: optimizer steps done.
        run: `palu.training.checkpoints.run_identity`, since others may have left theirs there;
            None where this run writes none.
    """
    for number in range(step if run is not None else 0, 0, -1):
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{number}")
        if folder.is_dir():
            with suppress(CheckpointError):
                if read_record(folder)["run"] == run:
                    return f" The last good checkpoint is {folder}."
    return ""


def _name(index: int, row: Any) -> str:
    own = next((row[key] for key in ("example_id", "id") if key in row), index)
    return str(index) if str(own) == str(index) else f"{index} (id {own!r})"


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
