"""`PALUTrainer`: Hugging Face's Trainer with PALU's three terms."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import Dataset

from palu.data.collator import Collator
from palu.data.overlap import warn_of_overlap
from palu.data.pairs import PairCollator
from palu.methods import Method
from palu.methods.dual import DualAscent, DualObjective
from palu.methods.objectives import objective_class
from palu.methods.step_loss import RETAIN, in_turns
from palu.models.checks import (
    check_adapter_off,
    check_causal,
    first_texts,
    is_whole,
    refuse_encoder,
)
from palu.models.lora import refuse_prompt_learning
from palu.models.router_loss import warn_if_left_out
from palu.models.wrappers import eos_token_ids, unwrap
from palu.reference.cache import ReferenceCache
from palu.reference.cached import (
    CachedReference,
    Reference,
    autocast_dtype,
    make_reference,
    open_run_cache,
    remember_starting_model,
)
from palu.reference.model import AdapterOffReference, LiveReference, vocabulary_size
from palu.storage.fingerprint import adapter_settings
from palu.training import nonfinite as not_finite
from palu.training.batching import DENOMINATORS
from palu.training.callbacks import StopAtForgetProb
from palu.training.checkpoints import LogAtCheckpoints, read_state, run_identity, write_state
from palu.training.collated import ExampleRows, try_out
from palu.training.config import PALUConfig
from palu.training.evaluation_trainer import EvaluationTrainer
from palu.training.master_weights import (
    MasterWeights,
    StartingWeights,
    refuse_optimizer,
    trains_in_half,
    warn_rounded_back,
)
from palu.training.step_log import TERMS, StepLog
from palu.training.step_trainer import groups_by_length
from palu.training.trainer_checks import check_arguments, marks_something
from palu_kernels.backend import resolve as resolve_backend

logger = logging.getLogger(__name__)

# Where a backward is more than that: gradients are sharded, or the engine counts its calls.
_ONE_BACKWARD = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


@dataclass
class _Terms:
    """What one batch gave. `means` and `rows` are float32 `[3]` in the order of TERMS, detached."""

    loss: Tensor
    means: Tensor  # each term's sum over this batch, divided by its denominator
    rows: Tensor  # rows of this batch
    denominators: Tensor  # rows the means were divided by (the whole step's), at least 1


class PALUTrainer(EvaluationTrainer):
    """Makes a model forget the sensitive tokens of `train_dataset` and keep everything else.

    A step's loss is `forget_weight * forget + preserve_weight * preserve + retain_weight * retain`,
    each term a mean over all its rows in the step: splitting the step into micro-batches
    (`gradient_accumulation_steps`) or processes changes nothing. Forget and retain rows take turns,
    each with a forward and a backward of the wrapper the Trainer holds, and losses are computed
    from hidden rows, or from the logits of rows that carry a loss. The logs carry each term
    unweighted (`forget`, `preserve`, `retain`: means over the rows since the last log), the rows
    per step (`num_forget`, ...), and what they cost: `head_rows_share`, `tokens_per_second` and
    `peak_memory_mib` (see `palu.training.step_log.StepLog.collect`).

    The retain rows of a step depend on the seed and the step alone: a resumed run sees the same
    ones. A checkpoint is whole or absent (`palu.training.checkpoints`). To resume, build the
    trainer as it was, with the original model, and call `train(resume_from_checkpoint=True)`: the
    reference is copied from the model given here, before the checkpoint's weights are loaded into
    it.

    Started by `torchrun` or `accelerate launch` it trains in all processes, to the numbers of one
    process with the same rows a step. Rows that are repeated to make the last step of an epoch even
    do not count, in evaluations neither.

    Args:
        model: the model to change. Method `rmu` turns off `requires_grad` of what it does not train
            (see `palu.methods.RMU`), and it stays off.
        args: a `PALUConfig`.
        train_dataset: the forget set: mappings with `input_ids`, `labels`, `attention_mask` (see
            `palu.data.examples.tokenize_examples`).
        retain_dataset: rows of the same form whose answers are to be kept; None for no retain term.
        ref_model: the frozen original; a copy of `model` is made when it is None and one is needed.
        reference: where the original's numbers come from, instead of `args.reference`: `live`,
            `adapter_off` or `cached` (see `PALUConfig`).
        eval_dataset: forget rows to evaluate on; `evaluate()` takes `train_dataset` when there is
            none.
        processing_class: the tokenizer; gives the padding and end tokens.
        data_collator: default `palu.data.collator.Collator`. Another one must keep the labels as
            they are; it may pad on any side or pack (examples are taken apart again:
            `palu.training.collated`), and give what else the model's forward takes.
        **kwargs: anything else `transformers.Trainer` takes.

    Raises:
        TypeError: `args` is not a `PALUConfig`, or a Trainer option is given that this loss cannot
            honour.
        ValueError: an empty data set, or settings that contradict each other.
    """

    # Our terms are divided by the rows of the whole step. Transformers versions that know this
    # attribute read it; in older ones `model_accepts_loss_kwargs` with a `num_items_in_batch` says
    # the same.
    loss_is_scaled_for_ga = True
    texts_compared = False  # whether the caller has looked for forget rows among the retain rows
    _masters: MasterWeights | None = None
    _started: StartingWeights | None = None  # the weights before the first step

    def __init__(
        self,
        model: nn.Module,
        args: PALUConfig,
        *,
        train_dataset: Dataset | Sequence[dict],
        retain_dataset: Dataset | Sequence[dict] | None = None,
        ref_model: nn.Module | None = None,
        reference: str | None = None,
        eval_dataset: Dataset | Sequence[dict] | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, train_dataset, retain_dataset, kwargs)
        refuse_prompt_learning(model)
        refuse_encoder(model)
        eos = eos_token_ids(model, processing_class)
        self.loss_fn = args.make_loss(eos)
        if args.n_gpu > 1:
            # The Trainer would wrap the model in DataParallel, which cannot split a list of kept
            # rows.
            logger.warning(
                "PALUTrainer uses one of %d devices; start it with torchrun to use them all",
                args.n_gpu,
            )
            args._n_gpu = 1
        if data_collator is None:
            data_collator = Collator(
                processing_class if processing_class is not None else _padding_token(model, eos)
            )
        self._by_method = isinstance(self.loss_fn, Method)
        self._pairs = self._by_method and self.loss_fn.needs_alternates
        # Second answers are collated apart; of several processes' rows the last may be repeats.
        ordered = self._pairs or args.world_size > 1
        rows = ExampleRows(data_collator, model, ordered=ordered)
        self.retain_dataset = retain_dataset if args.retain_weight > 0 else None
        self._reference_kind = args.reference if reference is None else reference
        kept = self.retain_dataset is not None and args.retain_loss != "nll"
        self._needs_reference = self.loss_fn.needs_reference or kept
        if self._by_method:
            self.loss_fn.check_run(
                retain=self.retain_dataset is not None,
                reference=self._reference_kind,
                reference_needed=self._needs_reference,
            )
            self.loss_fn.prepare(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=PairCollator(rows) if self._pairs else rows,
            **kwargs,
        )
        # A backend that cannot serve is an error now and not in the first step.
        resolve_backend(args.backend, args.device, torch.float32)
        self.model_accepts_loss_kwargs = True
        self._retain_kl = self.retain_dataset is not None and args.retain_loss == "kl"
        self._has_ref_model = ref_model is not None
        self.objective = objective_class(self.loss_fn)(
            self.loss_fn,
            self._make_reference(ref_model),
            retain_loss=args.retain_loss,
            retain_weight=args.retain_weight,
            autocast=self.accelerator.autocast,
        )
        self._model_checked = False
        # The model's own loss has it beside the cross-entropy of what is to be learned.
        place = None if self.retain_dataset is not None else "there is no retain term"
        if place is None and args.retain_loss != "nll":
            place = f"retain_loss is {args.retain_loss!r}, not 'nll'"
        warn_if_left_out(self.model, place)
        self._retain_lengths = None
        if self.retain_dataset is not None and groups_by_length(args):
            self._retain_lengths = [len(row["input_ids"]) for row in self.retain_dataset]
        self._columns = vocabulary_size(unwrap(self.model))
        self.step_log = StepLog(args.device, preserve=self.loss_fn.preserve is not None)
        self.add_callback(LogAtCheckpoints())
        if isinstance(self.objective, DualObjective):
            self.add_callback(DualAscent(self))
        if args.stop_at_forget_prob is not None:
            self.add_callback(StopAtForgetProb(self))

    # ---- reference -------------------------------------------------------------------------------

    @property
    def reference(self) -> Reference | None:
        """The frozen original as the losses see it; a cache is there once training has begun."""
        return self.objective.reference

    def check_model(self, *, resumed: bool = False) -> None:
        """Looks once, before training or evaluation, whether the model is causal and, with
        `adapter_off`, whether it is the original when its adapter is off.

        Args:
            resumed: training goes on from a checkpoint, whose run has begun with this.

        Raises:
            ValueError: see `palu.models.checks`.
        """
        # Of sharded weights a process has a part, and data without places cannot be read twice.
        if self._model_checked or not is_whole(self.model) or not _has_places(self.train_dataset):
            return
        texts = first_texts(self.train_dataset, self.data_collator)
        by_adapter = isinstance(self.reference, AdapterOffReference)
        with self.accelerator.autocast():  # norms may be float32 in a bfloat16 model
            check_causal(self.model, texts)
            if by_adapter and not resumed and not self.args.base_is_original:
                check_adapter_off(self.model, texts)
        self._model_checked = True

    def _make_reference(self, ref_model: nn.Module | None) -> Reference | None:
        kind, needed = self._reference_kind, self._needs_reference
        reference = make_reference(kind, self.model, ref_model, needed=needed)
        if reference is None or not self.place_model_on_device:
            return reference
        return reference.to(self.args.device)

    def open_cache(self, checkpoint: str | None = None, **options: Any) -> ReferenceCache | None:
        """Opens the reference cache, or builds it first from the model as it is now.

        `train` and `evaluate` do so by themselves; call it before them to give it more options.

        Args:
            checkpoint: the folder of a checkpoint: it remembers which model its run started from,
                and may go on with that model's cache.
            **options: of `ReferenceCache.build`: `template`, `notes`, `report`.

        Returns:
            the cache; None where the settings ask for none.

        Raises:
            CacheError, CacheWriteError, FloatingPointError: as `ReferenceCache.open_or_build`.
        """
        if self._reference_kind != "cached" or not self._needs_reference:
            return None
        if isinstance(self.reference, CachedReference):
            return self.reference.cache
        place = self.args.reference_cache or str(Path(self.args.output_dir) / "reference-cache")
        cache = open_run_cache(
            self.model,
            self.train_dataset,
            place,
            checkpoint,
            loss=self.loss_fn,
            collator=self.data_collator,
            retain_dataset=self.retain_dataset if self._retain_kl else None,
            tokenizer=self.processing_class,
            batch_size=self.args.per_device_train_batch_size,
            autocast_dtype=autocast_dtype(self.accelerator),
            **options,
        )
        self.objective.reference = CachedReference(
            cache.to(self.args.device),
            retain=self._retain_kl,
            indices=self.loss_fn.select_from == "reference",
            hidden=self.loss_fn.preserve is not None,
        )
        return cache

    # ---- training and its checkpoints ------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        cache_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's training; a reference cache is opened or built before its first step.

        Args:
            resume_from_checkpoint: a checkpoint; True for the last whole one in `output_dir`.
            cache_options: of `open_cache`.
            *args, **kwargs: as `transformers.Trainer.train`.

        Raises:
            CheckpointError: the checkpoint to resume from is not there, not whole, or belongs to a
                run with other settings, data or another model; names what differs.
            ValueError: method `palu`, and no row of `train_dataset` has a token to forget.

        A warning tells how many rows of `retain_dataset` have the `input_ids` of a row of
        `train_dataset`.
        """
        if not self._by_method and _has_places(self.train_dataset):
            rows = (self.train_dataset[i] for i in range(len(self.train_dataset)))
            if not marks_something(rows, self.loss_fn.eos_token_id):
                raise ValueError(
                    "train_dataset has no token to forget: no label is a token id other than EOS "
                    "after the first place of a row"
                )
        compared = self.texts_compared or not _has_places(self.train_dataset)
        if self.retain_dataset is not None and not compared and self.is_world_process_zero():
            warn_of_overlap(self.retain_dataset, self.train_dataset)
        if self.args.eval_strategy != "no":  # the others meet the collator in the first step
            sets = self.eval_dataset
            try_out(self.data_collator, sets.values() if isinstance(sets, dict) else [sets])
        checkpoint = self.begin_run(resume_from_checkpoint)
        self.objective.restore(read_state(checkpoint))
        self.check_model(resumed=checkpoint is not None)
        self.open_cache(checkpoint, **(cache_options or {}))
        if self._started is None:
            self._started = StartingWeights(self.model)
        result = super().train(checkpoint, *args, **kwargs)
        if half := trains_in_half(self.model):
            warn_rounded_back(self.rounded_back(), self.model.get_parameter(half[0]).dtype)
        return result

    def rounded_back(self, dtype: torch.dtype | None = None) -> float:
        """Of the change that training made, the share (0 to 1, of a sample of weights) that
        rounding has taken back.

        Args:
            dtype: as which the weights are going to be saved; None: as they are.
        """
        if self._started is None:
            return 0.0
        masters = None if self._masters is None else self._masters.of
        return self._started.rounded_back(self.model, dtype, masters)

    @property
    def has_masters(self) -> bool:
        """Whether float32 masters are trained: see `palu.training.master_weights`."""
        return self._masters is not None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Hugging Face's; weights of 16 bits that train get float32 masters (see
        `palu.training.master_weights`).

        Raises:
            ValueError: there are such weights, and an optimizer or a loss scale that cannot be used
                with masters.
        """
        if self._masters is not None or not trains_in_half(self.model):
            return super().create_optimizer(*args, **kwargs)
        if self.accelerator.distributed_type in _ONE_BACKWARD:
            # DeepSpeed makes its own where its config has bf16 or fp16.
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
                logger.warning(
                    "weights of 16 bits train under %s, without float32 masters: small steps are "
                    "rounded away; load the model with dtype float32 and set bf16=True",
                    self.accelerator.distributed_type.value,
                )
            return super().create_optimizer(*args, **kwargs)
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                "fp16 is True and weights of 16 bits train, such as "
                f"{trains_in_half(self.model)[0]}: a loss scale needs float32 weights; load the "
                "model with dtype float32"
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        refuse_optimizer(optimizer, self.args.optim)
        self._masters = MasterWeights(
            optimizer, sum_in_float32=self.args.world_size == 1, seed=self.args.seed
        )
        return optimizer

    def identity(self, *, begun: bool) -> dict[str, Any]:
        """What decides the numbers of this run; without the model when it has begun."""
        adapter = hasattr(self.model, "disable_adapter")
        live = isinstance(self.reference, LiveReference)
        kind = self._reference_kind if self._needs_reference else None
        return run_identity(
            self.args,
            settings={
                "reference": kind,
                "eos_token_id": self.loss_fn.eos_token_id,
                **adapter_settings(self.model),
            },
            forget=self.train_dataset,
            retain=self.retain_dataset,
            model=None if begun else self.model,
            reference=self.reference.model if live and self._has_ref_model else None,
            weights_are_read=kind == "cached" or (adapter and not live),
        )

    def fill_checkpoint(self, folder: Path) -> None:
        """Notes the state of the objective, and the model that a reference cache is of."""
        write_state(folder, self.objective.state())
        if isinstance(self.reference, CachedReference):
            remember_starting_model(folder, self.reference.cache)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.step_log.paused():
            not_finite.check_weights(self.model, self.state.global_step, self._last_checkpoint)
            super()._save_checkpoint(model, trial)

    # ---- loss ------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forget and retain rows in turns, each with its own backward: the activations of only one
        of them are alive at a time, and neither is padded to the other's length. The gradient is
        that of both together."""
        if inputs.get(RETAIN) is None or self.accelerator.distributed_type in _ONE_BACKWARD:
            return super().training_step(model, inputs, num_items_in_batch)
        forget, retain = in_turns(inputs)
        with self.accelerator.no_sync(model):
            loss = super().training_step(model, forget, num_items_in_batch)
        return loss + super().training_step(model, retain, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The weighted total of one micro-batch; `num_items_in_batch` is not used (see the
        class)."""
        terms = self._terms(model, inputs)
        self._raise_if_not_finite(terms, inputs)
        if model.training:
            self.step_log.add_terms(terms.means * terms.denominators, terms.rows)
        # Gradients are averaged over processes, but the terms are divided by everyone's rows
        # already.
        loss = terms.loss * self.args.world_size if DENOMINATORS in inputs else terms.loss
        if not return_outputs:
            return loss
        return loss, {"loss": loss, **dict(zip(TERMS, terms.means, strict=True))}

    def _terms(self, model: nn.Module, batch: dict[str, Any]) -> _Terms:
        rows = self.objective.count(batch)
        divisors = denominators = rows.clamp(min=1)
        if DENOMINATORS in batch:
            given = batch[DENOMINATORS].to(rows.device)
            rows, denominators = rows * (given > 0), given.clamp(min=1).float()
            divisors = torch.where(given > 0, denominators, math.inf)
        loss, means = self.objective(model, batch, divisors)
        return _Terms(loss, means, rows, denominators)

    def _raise_if_not_finite(self, terms: _Terms, batch: dict[str, Any]) -> None:
        # One small copy to the host per micro-batch; the boolean masks above have waited for the
        # device already.
        total, *means = torch.cat([terms.loss.detach().float()[None], terms.means]).tolist()
        if total - total == 0:  # false for inf and NaN
            return
        bad = {n: v for n, v in zip(TERMS, means, strict=True) if v - v != 0}
        step, training = self.state.global_step, self.model.training
        forget = self.train_dataset if training else self._evaluated
        # `self.model` is inside DDP, whose forward would wait for the other processes; a sharded
        # model cannot be called by one process alone; nor can an answer without its second one.
        alone = self.accelerator.distributed_type not in _ONE_BACKWARD and not self._pairs
        raise not_finite.error(
            f"at step {step + 1}" if training else "in evaluation",
            bad or {"total": total},
            not_finite.bad_examples(
                batch,
                (lambda one: self._terms(self.model, one).loss) if alone else None,
                {"forget": forget, "retain": self.retain_dataset},
                self.data_collator,
            ),
            self._last_checkpoint(),
        )

    def _last_checkpoint(self) -> str:
        step = self.state.global_step
        return not_finite.last_checkpoint(self.args.output_dir, step, self._identity)

    # ---- logs ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the numbers of the steps since the last log to the Trainer's own training logs: see
        `StepLog.collect`."""
        if "loss" in logs and self.step_log.steps > 0:
            logs |= self.step_log.collect(self.accelerator.gather)
            if self._by_method and self.loss_fn.per_example:
                del logs["head_rows_share"]  # it takes num_forget, which counts answers, for rows
            router_loss = self.objective.router.take_mean()
            if router_loss is not None:
                logs["router_loss"] = self.accelerator.gather(router_loss).mean().item()
            logs |= self.objective.state()
        super().log(logs, start_time)


def _has_places(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _padding_token(model: nn.Module, eos: list[int]) -> int:
    pad = getattr(getattr(unwrap(model), "config", None), "pad_token_id", None)
    return pad if pad is not None else (eos[0] if eos else 0)
