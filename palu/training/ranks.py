"""Find processes of one run that would compute different things, before they wait for one another.

Ranks with other settings, rows or weights train something that nobody asked for, or wait for ever:
each takes the others to do what it does itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from palu.distributed import everyone
from palu.errors import one_line
from palu.models.checks import is_whole
from palu.storage.fingerprint import tensor_fingerprint
from palu.storage.output import versions
from palu.training.checkpoints import data_fingerprint

if TYPE_CHECKING:
    from palu.training.trainer import PALUTrainer

# Settings that each process may have of its own.
_OWN = {"disable_tqdm", "local_rank", "log_level", "log_level_replica", "log_on_each_node"}
_OWN |= {"logging_dir", "output_dir", "project", "reference_cache", "report_to", "run_name"}
_OWN |= {"resume_from_checkpoint", "trackio_space_id"}
_SAMPLE = 1024  # entries of a weight that are compared
_SHOWN = 5  # differences that a message names
_EMPTY = (
    "the weights of {} are others, as they are where one process alone loads them (load in all, "
    "with FSDP_CPU_RAM_EFFICIENT_LOADING=false) or where each draws its own (set one seed first)"
)


class ProcessesDiffer(ValueError):
    """The processes of one run have other settings, data, models or versions."""


def compare_processes(trainer: PALUTrainer) -> None:
    """Compare what the processes of a run are about to do; all of them must call. Not so in the
    midst of training.

    Raises:
        ProcessesDiffer: in every process; names those that differ from process 0, and in what.
    """
    if trainer.args.world_size == 1 or trainer.is_in_train:
        return
    found = everyone(_facts(trainer))
    unlike = [n for n, facts in enumerate(found) if facts != found[0]]
    if not unlike:
        return
    # All processes have seen that there is a difference: now by its name.
    parts = everyone(_parts(trainer))
    said = []
    for number in unlike:
        lines = _differences(found[0], found[number])
        lines += _of_models(parts[0], parts[number])
        more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        said.append(f"process {number}: {'; '.join(lines[:_SHOWN])}{more}")
    raise ProcessesDiffer(f"the processes of this run differ from process 0. {'. '.join(said)}")


def _facts(trainer: PALUTrainer) -> dict[str, Any]:
    """Return what has to be the same, by name. What is long stands by its digest."""
    args: TrainingArguments = trainer.args
    settings = {name: value for name, value in args.to_dict().items() if name not in _OWN}
    settings |= {"processes": args.world_size, "sharding": trainer.sharding}
    settings["eos_token_id"] = getattr(trainer.method, "eos_token_id", None)
    kinds = {"forget": trainer.train_dataset, "retain": trainer.retain_dataset}
    kinds["evaluation"] = trainer.eval_dataset
    rows = {f"the {kind} data": _data(rows) for kind, rows in kinds.items()}
    used = ("palu", "torch", "transformers", "accelerate")
    facts = {name: _plain(value) for name, value in settings.items()} | rows
    facts |= {f"the version of {name}": versions().get(name) for name in used}
    facts["the model"] = type(trainer.model).__name__
    parts = repr(sorted(_parts(trainer).items()))
    facts["its parameters"] = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    return facts


def _plain(value: Any) -> str:
    """Return a setting in words that do not depend on the process."""
    if isinstance(value, Mapping):
        return str({str(key): _plain(value[key]) for key in sorted(value, key=str)})
    if isinstance(value, list | tuple):
        return str([_plain(one) for one in value])
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else type(value).__name__


def _data(rows: Any) -> str:
    if isinstance(rows, Mapping):
        return str({name: _data(one) for name, one in rows.items()})
    known = None if rows is None else data_fingerprint(rows)
    if known is None:
        return "none" if rows is None else "a stream"
    return f"{known['rows']} rows with the fingerprint {known['fingerprint'][:12]}"


def _parts(trainer: PALUTrainer) -> dict[str, tuple[str, str]]:
    """Return, of each parameter, what it is and a digest of a sample of it; nothing of a model that
    is sharded already."""
    model = trainer.model
    if not is_whole(model):
        return {}
    # DDP gives all processes what the main one drew for a new adapter.
    drawn = hasattr(model, "peft_config") and trainer.sharding is None
    parts = {}
    for name, parameter in model.named_parameters():
        train = "trains" if parameter.requires_grad else "frozen"
        what = f"{tuple(parameter.shape)}, {parameter.dtype}, {train}"
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        sample = "" if drawn and parameter.requires_grad else tensor_fingerprint(flat[::step])
        parts[name] = what, sample
    return parts


def _differences(zero: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {one_line(other.get(name), 80)} and {one_line(zero.get(name), 80)} in process 0"
        for name in sorted({*zero, *other} - {"its parameters"})
        if zero.get(name) != other.get(name)
    ]


def _of_models(zero: Mapping[str, tuple], other: Mapping[str, tuple]) -> list[str]:
    """Return the first difference between two models, of shapes if there is one."""
    names = [*zero, *(name for name in other if name not in zero)]
    missing = ("missing", "")
    both = [(name, zero.get(name, missing), other.get(name, missing)) for name in names]
    for name, one, two in both:
        if one[0] != two[0]:
            return [f"the parameter {name} is {two[0]} and {one[0]} in process 0"]
    return [_EMPTY.format(name) for name, one, two in both if one != two][:1]
