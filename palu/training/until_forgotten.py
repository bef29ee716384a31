"""Check what the model knows after each epoch, stop when it is forgotten, keep the best weights."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from palu.errors import failed_to_write, one_line
from palu.models.checks import is_whole
from palu.training.checkpoints import BEST, CheckpointError, fingerprint_of
from palu.training.knowledge import Knowledge, KnowledgeMeter
from palu.training.outcome import NEVER_KNOWN, Limits, RunOutcome, is_known, kept
from palu.training.sharding import gather, reshard, spread

if TYPE_CHECKING:
    from palu.training.trainer import PALUTrainer

logger = logging.getLogger(__name__)

KNOWN = "sensitive_probability"  # in a log: the entry is a check
# A run stops where probability and harm are well within their limits, not at them: samples say what
# a greedy answer does not, and the retain examples are those that were trained on.
LIKELY, HARM = 0.3, 0.4
# Weights are kept from here on: what is far from good is no better than the last.
WORTH_KEEPING = 3.0
# Of a data set of few steps an epoch, several epochs lie between two checks.
STEPS_BETWEEN = 5


class KnowledgeChecks(TrainerCallback):
    """Measure before the first and after the last step; with `stop`, also after each epoch, and end
    the training where all is forgotten. The weights of the best check are those that stay.

    Args:
        trainer: it takes this callback.
        stop: check on the way.

    Attributes:
        outcome: what came of the run, after it.
    """

    def __init__(self, trainer: PALUTrainer, *, stop: bool) -> None:
        self.trainer, self.stop = trainer, stop
        self.limits = Limits()
        self.meter = KnowledgeMeter(trainer)
        self.before: Knowledge | None = None
        self.best: tuple[float, int] | None = None  # badness and step
        self.outcome: RunOutcome | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure the original, or read what a resumed run had measured."""
        self.checks = [e for e in state.log_history if KNOWN in e]
        if not self.checks or self.checks[0]["step"] != 0:
            if state.global_step:
                raise CheckpointError(
                    "the checkpoint was made without checks, and checks need what the original "
                    f"knew; checks is {args.checks!r}, it must be 'none'"
                )
            self._measure(greedy=True)
        self.before = _knowledge(self.checks[0])
        known = is_known(self.before, _leaked(self.checks[0]), self.limits)
        if self.before.spans and not known and state.is_world_process_zero:
            logger.warning("%s", NEVER_KNOWN)
        self.best = self._kept_before(state.global_step)
        if self.checks[-1].get("stopped"):  # and the checkpoint has the weights of that check
            self.best = 0.0, state.global_step
            control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if not self.stop or not self.before.spans:  # without secrets there is nothing to wait for
            return
        steps = state.global_step - self.checks[-1]["step"]
        last = state.global_step >= state.max_steps
        if not last and (state.epoch != int(state.epoch) or steps < STEPS_BETWEEN):
            return
        now = _knowledge(self._measure())
        likely, recited, harm = self.limits.badness(now, self.before)
        bad = max(likely, recited, harm)
        if bad <= WORTH_KEEPING and (self.best is None or bad <= self.best[0]):
            self._keep(bad)
        if likely <= LIKELY and harm <= HARM and recited <= 1 and self._says_little():
            self.best = 0.0, state.global_step
            self.checks[-1]["stopped"] = control.should_training_stop = True
            control.should_log = True
            control.should_save |= args.save_strategy == "steps"
            if state.is_world_process_zero:
                logger.info(
                    "forgotten after step %d of at most %d", state.global_step, state.max_steps
                )

    def on_train_end(self, args, state, control, **kwargs):
        """Put the best weights back and measure what they know."""
        step = state.global_step
        if self.best is not None and self.best[1] != step:
            step = self.best[1]
            self._put_back()
        chosen = next((e for e in self.checks if e["step"] == step), None)
        if chosen is None:
            chosen = self._measure(greedy=True)
        elif "leaked" not in chosen:
            self._ask(chosen)
        self.outcome = RunOutcome(
            self.before,
            _knowledge(chosen),
            _leaked(self.checks[0]),
            _leaked(chosen),
            [{k: v for k, v in e.items() if k != "stopped"} for e in self.checks],
            chosen["epoch"],
            self.limits,
        )
        (Path(args.output_dir) / BEST).unlink(missing_ok=True)

    # ---- measuring -------------------------------------------------------------------------------

    def _measure(self, *, greedy: bool = False) -> dict[str, Any]:
        """Log what the model knows, and return the entry."""
        trainer = self.trainer
        with trainer.step_log.paused():
            now = self.meter.measure()
        entry: dict[str, Any] = {n: v for n, v in now._asdict().items() if v is not None}
        if self.before is not None and now.retain_probability is not None:
            entry["retain_kept"] = kept(now, self.before)
        if greedy:
            self._ask(entry)
        should_log = trainer.control.should_log  # a log puts it out, also the one that follows
        trainer.log(entry)
        trainer.control.should_log = should_log
        self.checks.append(trainer.state.log_history[-1])
        return self.checks[-1]

    def _ask(self, entry: dict[str, Any]) -> None:
        """Add to what was measured how many secrets greedy answers say: an answer that goes another
        way than the true one may come to them again."""
        with self.trainer.step_log.paused():
            leaked = self.meter.leaked()
        if leaked is not None:
            entry["leaked"], entry["asked"] = leaked

    def _says_little(self) -> bool:
        """Return whether greedy answers say few enough secrets."""
        entry = self.checks[-1]
        self._ask(entry)
        return entry.get("leaked", 0) <= self.limits.leak_rate * entry.get("asked", 0)

    # ---- weights ---------------------------------------------------------------------------------

    def _file(self) -> Path:
        return Path(self.trainer.args.output_dir) / BEST

    def _tensors(self) -> dict[str, Tensor]:
        """Return what trains, by name; the float32 masters of 16-bit weights beside them."""
        trainer = self.trainer
        masters = trainer.masters
        reshard(trainer.model)
        tensors = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                tensors[name] = parameter.data
                if parameter in masters:
                    tensors[f"master:{name}"] = masters[parameter].data
        return tensors

    def _keep(self, bad: float) -> None:
        trainer, step = self.trainer, self.trainer.state.global_step
        if not is_whole(trainer.model) and not getattr(trainer.accelerator, "is_fsdp2", False):
            return  # a process has a part of the weights: the last ones stay
        written = torch.tensor([1], device=trainer.args.device)
        main, tensors = trainer.is_world_process_zero(), {}
        for name, tensor in self._tensors().items():
            whole = gather(tensor)  # by all processes
            if main:
                tensors[name] = whole.detach().cpu().contiguous().clone()
        if main:
            try:
                self._write(tensors, {"step": str(step), "badness": repr(bad)})
            except Exception as error:
                if not failed_to_write(error):
                    raise
                written.zero_()
                logger.warning(
                    "the weights of step %d could not be kept in %s (%s): training goes on, and "
                    "later weights may stay though they are worse",
                    step,
                    trainer.args.output_dir,
                    one_line(error),
                )
        if trainer.accelerator.gather(written).all():  # in one process, or in all
            self.best = bad, step

    def _write(self, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        """Write the weights aside, and rename the file."""
        file = self._file()
        about["digest"] = fingerprint_of(sorted(tensors.items()))
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".partial")
        try:
            save_file(tensors, aside, metadata=about)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def _kept_before(self, step: int) -> tuple[float, int] | None:
        """Return badness and step of the weights that a resumed run has kept. A run from the
        beginning removes those of another one, which it would go on with after a kill."""
        if not step and self.trainer.is_world_process_zero():
            self._file().unlink(missing_ok=True)
        if not step or not self._file().is_file():
            return None
        try:
            with safe_open(self._file(), "pt") as file:
                known = file.metadata() or {}
                found = fingerprint_of((n, file.get_tensor(n)) for n in sorted(file.keys()))
            if known.get("digest", found) != found:  # older ones have none
                raise SafetensorError("its content is not what was written")
        except SafetensorError as error:
            raise CheckpointError(
                f"the best weights so far, {str(self._file())!r}, are damaged "
                f"({one_line(error)}): remove the file to go on without them, or begin anew"
            ) from error
        found = float(known.get("badness", "inf")), int(known.get("step", step + 1))
        return found if found[1] <= step else None

    @torch.no_grad()
    def _put_back(self) -> None:
        main = self.trainer.is_world_process_zero()
        with safe_open(self._file(), "pt") if main else nullcontext() as file:
            for name, tensor in self._tensors().items():
                spread(tensor, file.get_tensor(name) if main else None)


def _leaked(entry: dict[str, Any]) -> tuple[int, int] | None:
    return (entry["leaked"], entry["asked"]) if "leaked" in entry else None


def _knowledge(entry: dict[str, Any]) -> Knowledge:
    return Knowledge(*(entry.get(name) for name in Knowledge._fields))
