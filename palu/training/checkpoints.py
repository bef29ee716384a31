"""Checkpoints that are whole or absent, and know which run they belong to.

The Trainer writes the files of a checkpoint one by one. Here they are written into a folder aside,
with a record of their sizes and of the run as the last one, and the folder is renamed then: a kill
at any moment leaves no `checkpoint-N` that is half there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from palu.distributed import agree
from palu.errors import WriteError, failed_to_write, one_line, out_of_memory
from palu.models.folders import load_renamed
from palu.models.lora import check_adapter_names
from palu.storage.files import MARK, put, remove_aside, settle, write_json
from palu.storage.fingerprint import (
    example_bytes,
    file_digest,
    model_fingerprint,
    tensor_fingerprint,
)
from palu.training.sharding import ShardingTrainer

logger = logging.getLogger(__name__)

RECORD = "palu_run.json"
STATE = "palu_objective.json"  # what the objective is to go on with, where it has a state
BEST = "palu-best.safetensors"  # weights of the best check so far
SELF_RETAIN = "self_retain.json"  # of `palu unlearn`: the answers that the run holds in place
ASIDE = ".partial"  # where a checkpoint is written, in the folder it is for
FORMAT = 1

# Settings that leave the numbers of a training run as they are.
_FREE = {
    "backend",
    "checks",
    "debug",
    "disable_tqdm",
    "do_eval",
    "do_predict",
    "do_train",
    "enable_jit_checkpoint",
    "greater_is_better",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "load_best_model_at_end",
    "local_rank",
    "metric_for_best_model",
    "output_dir",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "reference_cache",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "stop_at_forget_prob",
    "torch_empty_cache_steps",
}
_FREE_PREFIXES = ("batch_eval_", "ddp_", "eval_", "hub_", "log_", "logging_", "push_to_", "save_")
_FREE_PREFIXES += ("trackio_", "dataloader_")
_DATA_ORDER = {"dataloader_drop_last"}
# Newer names of `gradient_checkpointing` and its kwargs; transformers sets both.
_ALIASES = {"activation_checkpointing", "activation_checkpointing_kwargs"}
# How the rows of a step are dealt out: to processes, and to micro-batches one after the other.
_SPLIT = {"processes", "per_device_train_batch_size", "gradient_accumulation_steps"}
_SPLIT |= {"retain_batch_size"}


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from: it is not whole, or is of another run."""


def folder_beside(
    output: Path, *, save_steps: int | None, resume: bool, overwrite: bool
) -> Path | None:
    """Where `palu unlearn` keeps its checkpoints: beside the output, which is written as a whole at
    the end. None where it has none.

    Args:
        output: the output folder.
        save_steps: steps between checkpoints, None for none.
        resume: whether the run goes on from a checkpoint.
        overwrite: whether those of an interrupted run may be given up.

    Raises:
        ValueError: `save_steps` is below 1, or the place is a file.
        FileExistsError: an interrupted run left checkpoints there.
    """
    place = Path(f"{output}-checkpoints")
    if save_steps is not None and save_steps < 1:
        raise ValueError(f"--save-steps must be at least 1, not {save_steps}")
    if save_steps is None and not resume:
        return None
    if place.exists() and not place.is_dir():
        raise ValueError(f"checkpoints go to {str(place)!r}, which is a file; move it away")
    if place.is_symlink():
        raise ValueError(f"checkpoints go to {str(place)!r}, which is a link; move it away")
    check_home(place)
    if not resume and not overwrite and place.is_dir() and _checkpoints(place):
        raise FileExistsError(
            f"{str(place)!r} holds checkpoints of an interrupted run: add --resume to go on from "
            "the last one, or --overwrite to give them up and begin anew"
        )
    return place


def check_home(folder: Path) -> None:
    """Check that checkpoints can go to a folder: what palu did not write is never replaced.

    Raises:
        CheckpointError: something is there under a name that they need.
    """
    foreign = [p for p in _checkpoints(folder).values() if not (p / RECORD).is_file()]
    aside = folder / ASIDE
    if os.path.lexists(aside) and not _is_aside(aside):
        foreign.append(aside)
    if foreign:
        raise CheckpointError(
            f"{str(foreign[0])!r} is in the way of checkpoints, and palu did not write it: move "
            "it away, or name another output folder"
        )


def make_aside(aside: Path) -> None:
    """A folder with our mark for a checkpoint to be written into; what a killed run left there is
    removed. Raises CheckpointError where it is not ours."""
    check_home(aside.parent)
    remove_aside(aside)
    aside.mkdir(parents=True)
    (aside / MARK).touch(exist_ok=False)


def _is_aside(folder: Path) -> bool:
    ours = not folder.is_symlink() and folder.is_dir()
    return ours and ((folder / MARK).is_file() or not any(folder.iterdir()))


def run_identity(
    args: Any,
    *,
    settings: Mapping[str, Any],
    forget: Any,
    retain: Any,
    model: nn.Module | None,
    reference: nn.Module | None,
    weights_are_read: bool,
) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values.

    Args:
        args: the `PALUConfig`.
        settings: more settings than it holds.
        forget, retain: the data sets; their order counts. One without a length is not looked at.
        model: as it is before training; None where that is over, and it is not compared.
        reference: the live reference where its weights are not the model's.
        weights_are_read: whether the checkpoint replaces all weights of `model` that count, so that
            only those that do not train (a PEFT base model) are compared.
    """
    free = {name for name in vars(args) if name in _FREE or name.startswith(_FREE_PREFIXES)}
    values = {k: v for k, v in args.to_dict().items() if k not in free - _DATA_ORDER}
    values |= {"processes": args.world_size, **settings}
    of_model = _frozen if weights_are_read else model_fingerprint
    return {
        "settings": json.loads(json.dumps(values, default=str)),
        "data": {
            "forget": data_fingerprint(forget),
            "retain": None if retain is None else data_fingerprint(retain),
        },
        "model": None if model is None else of_model(model),
        "reference": None if reference is None else model_fingerprint(reference),
    }


def finish(
    aside: Path, place: Path, identity: Mapping[str, Any], *, step: int, resumable: bool
) -> None:
    """Write the record into a folder that has everything else, and put it in its place.

    Args:
        aside: the folder as it was written, in one of `make_aside`.
        place: where it belongs; what is there is replaced.
        identity: see `run_identity`.
        step: optimizer steps done.
        resumable: whether more than the weights is there.
    """
    files = settle(aside)
    names = {path.relative_to(aside).as_posix(): path for path in files}
    record = {
        "format": FORMAT,
        "step": step,
        "resumable": resumable,
        "files": {name: path.stat().st_size for name, path in names.items()},
        "digests": {name: file_digest(path) for name, path in names.items()},
    }
    write_json(aside / RECORD, {**record, "run": identity})
    put(aside, place, aside.parent)


def remove_all(folder: Path) -> None:
    """Remove the checkpoints that palu wrote, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in _checkpoints(folder).values():
        if (path / RECORD).is_file() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    if _is_aside(folder / ASIDE):
        remove_aside(folder / ASIDE)
    for name in (SELF_RETAIN, BEST):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def remove_older(folder: Path, newest: Path, best: str | None, limit: int | None) -> None:
    """Remove the checkpoints written longest ago until `limit` are left (None: none is removed).
    The newest and the best one stay."""
    if not limit or limit < 1:
        return
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    found = sorted(_checkpoints(folder).values(), key=lambda path: path.stat().st_mtime)
    others = [p for p in found if p.resolve() not in kept and (p / RECORD).is_file()]
    for path in others[: max(len(found) - max(limit, len(kept)), 0)]:
        shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The whole checkpoint of the most steps in a folder; None where there is none. One that is not
    whole is passed over with a warning."""
    for _, path in sorted(_checkpoints(Path(folder)).items(), reverse=True):
        try:
            read_record(path)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        return str(path)
    return None


def read_record(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        CheckpointError: it has none that can be read, or a file is missing or has another size.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {str(folder)!r} does not exist")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = dict(record["files"])
        run = {"settings", "data", "model", "reference"}
        if not {"step", "resumable"} <= set(record) or not run <= set(record["run"]):
            raise KeyError
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has no {RECORD} that can be read: it was not written to "
            "its end, or not by PALUTrainer"
        ) from None
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has format {record.get('format')!r}; this palu reads "
            f"{FORMAT}"
        )
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {str(folder)!r} is damaged: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} is damaged: {name} has {path.stat().st_size} bytes "
                f"instead of {size}"
            )
    return record


def check_digests(checkpoint: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Read all files of a checkpoint: a flipped bit would go on into the weights, unseen.

    Args:
        record: see `read_record`. A checkpoint of an older palu has no digests, and is taken as it
            is, with a warning.

    Raises:
        CheckpointError: a file is not what was written; names it.
    """
    digests = record.get("digests")
    if digests is None:
        logger.warning("checkpoint %s has no digests: damage in it would not be seen", checkpoint)
        return
    for name in record["files"]:
        if digests.get(name) != file_digest(Path(checkpoint, name)):
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} is damaged: the content of {name} is not what was "
                "written; go on from an older checkpoint, or begin anew"
            )


def check_same_run(checkpoint: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to a run.

    Raises:
        CheckpointError: it is not whole, or something differs; names all that does.
    """
    record = read_record(checkpoint)
    if not record["resumable"]:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} holds the weights alone, without the optimizer: it "
            "was saved with save_only_model=True"
        )
    run = record["run"]
    there, here = run["settings"], identity["settings"]
    same = _SPLIT if _rows_of_a_step(there) == _rows_of_a_step(here) is not None else set()
    found = [
        f"{name} is {there.get(name)!r} in the checkpoint and {here.get(name)!r} here"
        for name in sorted({*there, *here} - _ALIASES - same)
        if there.get(name) != here.get(name)
    ]
    for name, rows in identity["data"].items():
        if rows != run["data"][name]:
            found.append(f"the {name} data is {_said(run['data'][name])} there, {_said(rows)} here")
    if run["model"] is not None and run["model"] != identity["model"]:
        found.append("the model is not the one that the run started from")
    if run["reference"] != identity["reference"]:
        found.append("the reference model is another one")
    if found:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} belongs to another run: {'; '.join(found)}. Resume "
            "with what the run began with, or begin anew in another folder"
        )
    if any(there.get(name) != here.get(name) for name in same):
        logger.warning(
            "the rows of a step are dealt out to processes and micro-batches otherwise than in the "
            "checkpoint: the numbers are the same up to rounding, but for dropout's draws"
        )


def _rows_of_a_step(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the forget and retain rows of a step; None where more depends on how they are dealt
    out."""
    dealing = settings.get("accelerator_config") or {}
    if (
        settings.get("normalization") != "step"
        or settings.get("dataloader_drop_last")
        or settings.get("auto_find_batch_size")
        or settings.get("train_sampling_strategy") == "batch_rebalance"
        or dealing.get("split_batches")
    ):
        return None
    names = ("processes", "gradient_accumulation_steps", "per_device_train_batch_size")
    processes, steps, rows = (settings.get(name) or 1 for name in names)
    return processes * steps * rows, processes * steps * (settings.get("retain_batch_size") or rows)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Put the state of an objective into a checkpoint that is being written, if it has one."""
    if state:
        write_json(folder / STATE, state)


def read_state(checkpoint: str | None) -> dict[str, Any]:
    """What `write_state` wrote; empty where there was nothing, or no checkpoint."""
    path = None if checkpoint is None else Path(checkpoint, STATE)
    if path is None or not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


class LogAtCheckpoints(TrainerCallback):
    """Close the logging window at every checkpoint: a resumed run starts a new one there, and its
    log is to be that of the whole run."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class CheckpointTrainer(ShardingTrainer):
    """A Trainer whose checkpoints are whole or absent, and are resumed from by the run they are of.
    A subclass says what its run is made of, and calls `begin_run` before it trains."""

    _aside: Path | None = None  # while a checkpoint is being written
    _identity: Mapping[str, Any] | None = None

    def identity(self, *, begun: bool) -> dict[str, Any]:
        """`palu.training.checkpoints.run_identity` of this run, before its first step or after."""
        raise NotImplementedError

    def fill_checkpoint(self, folder: Path) -> None:
        """Called in the main process, to write more files into a checkpoint."""

    def begin_run(self, resume: str | bool | None) -> str | None:
        """The checkpoint to go on from, None for a run from the beginning.

        Args:
            resume: as `Trainer.train` takes it: a folder; True for the last whole checkpoint in
                `output_dir`; None or False.

        Raises:
            CheckpointError: there is none, or it is not whole, or is of another run; in every
                process where one finds it so.
        """
        try:
            checkpoint, problem = self._checked(resume), None
        except CheckpointError as error:
            problem = str(error)
        agree(problem, CheckpointError)
        return checkpoint

    def _checked(self, resume: str | bool | None) -> str | None:
        checkpoint = resume or None
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise CheckpointError(
                    "resume_from_checkpoint is True, and there is no whole checkpoint in "
                    f"output_dir {self.args.output_dir!r}"
                )
        if checkpoint is not None:
            check_digests(checkpoint, read_record(checkpoint))
        elif self.args.save_strategy == "no":
            self._identity = None
            return None
        if self.args.save_strategy != "no":
            check_home(Path(self.args.output_dir))
        self._identity = self.identity(begun=False)
        if checkpoint is not None:
            check_same_run(checkpoint, self._identity)
        return checkpoint

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's, which in older versions (5.0) takes a resumed run's batch size from the
        checkpoint, where the rows of a step may have been dealt out to other processes."""
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None):
        with _whole_weights(resume_from_checkpoint):
            check_adapter_names(self.model, Path(resume_from_checkpoint))
            if not load_renamed(self.model, Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with _whole_weights(self.state.best_model_checkpoint):
            check_adapter_names(self.model, Path(self.state.best_model_checkpoint))
            if not load_renamed(self.model, Path(self.state.best_model_checkpoint)):
                super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that were not loaded would go on as they are: no matter for a warning."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        there = {id(p) for name, p in parameters.items() if name not in load_result.missing_keys}
        # Tied ones are written once.
        missing = [n for n in load_result.missing_keys if id(parameters.get(n)) not in there]
        for said, names in (("lack", missing), ("hold besides", load_result.unexpected_keys)):
            if names:
                shown = ", ".join(list(names)[:3])
                raise ValueError(f"its weights {said} {shown} ({len(names)} tensors in all)")

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            self._write_checkpoint(model, trial)
        except Exception as error:
            if not failed_to_write(error):
                raise
            last = last_checkpoint(self.args.output_dir)
            kept = f"{last} is kept" if last else "there is none before it"
            raise WriteError(
                f"the checkpoint of step {self.state.global_step} could not be written ({kept}): "
                f"{one_line(error, 200)}"
            ) from error

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = home / ASIDE
        if self.args.should_save:
            make_aside(aside)
        self.accelerator.wait_for_everyone()
        unseen = self.sharding is not None and not aside.is_dir()
        agree(
            f"does not see {str(aside)!r}: shards go to a folder that all processes share"
            if unseen
            else None,
            CheckpointError,
        )
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        if self.state.best_model_checkpoint == str(aside / name):
            self.state.best_model_checkpoint = str(home / name)
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
            self.fill_checkpoint(aside / name)
            identity = self._identity or self.identity(begun=True)  # a callback asked for it
            only_model = self.args.save_only_model
            step = self.state.global_step
            finish(aside / name, home / name, identity, step=step, resumable=not only_model)
            remove_aside(aside)
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            remove_older(home, home / name, best, limit)
        self.accelerator.wait_for_everyone()


@contextmanager
def _whole_weights(checkpoint: str) -> Iterator[None]:
    """The weights of a checkpoint are loaded as a whole, or it is a `CheckpointError`."""
    try:
        yield
    except (RuntimeError, SafetensorError, ValueError, OSError) as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded: {one_line(error)}"
        ) from error


def _checkpoints(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return found


def data_fingerprint(rows: Any) -> dict[str, Any] | None:
    """Return the number of rows and a digest over them in their order; None of a stream."""
    if not hasattr(rows, "__len__"):
        return None
    digest = hashlib.blake2b(digest_size=32, person=b"palu.order")
    for i in range(len(rows)):
        row = rows[i]
        # A collator of the user's may be the one who makes tokens and labels, of rows of any kind.
        names = set(row) if isinstance(row, Mapping) else set()
        if {"input_ids", "labels"} <= names:
            content = example_bytes(row)
        else:  # where an object lies in memory is no content
            content = re.sub(r" at 0x[0-9a-f]+", "", repr(row)).encode()
        # the second answers of preference methods
        second = [(name, row[name]) for name in sorted(names) if name.startswith("alternate_")]
        content += repr(second).encode() if second else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return {"rows": len(rows), "fingerprint": digest.hexdigest()}


def _said(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return "none"
    return f"{data['fingerprint'][:12]} ({data['rows']} rows, whose order counts)"


def _frozen(model: nn.Module) -> str:
    """Of the parameters that do not train."""
    named = sorted(model.named_parameters())
    return fingerprint_of((name, one) for name, one in named if not one.requires_grad)


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash tensors with their names, in their order."""
    digest = hashlib.blake2b(digest_size=32, person=b"palu.frozen")
    for name, tensor in tensors:
        digest.update(f"{name} {tensor_fingerprint(tensor)}\n".encode())
    return digest.hexdigest()
