"""A Trainer whose checkpoints are whole or absent, and are resumed from by the run they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from palu.errors import WriteError, failed_to_write, one_line, out_of_memory
from palu.models.lora import check_adapter_names
from palu.storage.files import remove_aside
from palu.training.checkpoints import (
    ASIDE,
    CheckpointError,
    check_digests,
    check_home,
    check_same_run,
    finish,
    last_checkpoint,
    make_aside,
    read_record,
    remove_older,
)


class CheckpointTrainer(Trainer):
    """See `palu.training.checkpoints`. A subclass says what its run is made of, and calls
    `begin_run` before it trains."""

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
            CheckpointError: there is none, or it is not whole, or is of another run.
        """
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None):
        with _whole_weights(resume_from_checkpoint):
            check_adapter_names(self.model, Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with _whole_weights(self.state.best_model_checkpoint):
            check_adapter_names(self.model, Path(self.state.best_model_checkpoint))
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
                f"the checkpoint of step {self.state.global_step} ({kept}): {one_line(error, 200)}"
            ) from error

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        home = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = home / ASIDE
        if self.args.should_save:
            make_aside(aside)
        self.accelerator.wait_for_everyone()
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
