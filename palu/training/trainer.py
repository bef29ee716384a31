"""`PALUTrainer`: Hugging Face's Trainer with PALU's three terms."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import Dataset

from palu.data.collator import Collator
from palu.data.overlap import warn_of_overlap
from palu.data.pairs import PairCollator
from palu.data.template import Template
from palu.methods.micro_batch import (
    COUNTS,
    DENOMINATORS,
    RETAIN,
    ROLES,
    examples,
    forget_roles,
    together,
)
from palu.methods.pdu import DualAscent, PDUStepLoss
from palu.models.checks import (
    check_adapter_off,
    check_causal,
    first_texts,
    is_whole,
    refuse_encoder,
    refuse_parts,
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
from palu.reference.model import AdapterOffReference, LiveReference
from palu.storage.fingerprint import adapter_settings
from palu.training import nonfinite as not_finite
from palu.training.batching import (
    BatchBuilder,
    EpochPosition,
    LengthGroups,
    RetainSampler,
    Sharding,
)
from palu.training.callbacks import StopAtForgetProb
from palu.training.checkpoints import (
    CheckpointTrainer,
    LogAtCheckpoints,
    read_state,
    run_identity,
    write_state,
)
from palu.training.collated import ExampleRows, try_out
from palu.training.config import PALUConfig
from palu.training.inputs import Tokenizing, load_named, reference_of, with_adapter
from palu.training.master_weights import (
    MasterWeights,
    StartingWeights,
    refuse_optimizer,
    trains_in_half,
    warn_rounded_back,
    warn_without_masters,
)
from palu.training.outcome import RunOutcome
from palu.training.ranks import compare_processes
from palu.training.step_log import TERMS, StepLog, row_means
from palu.training.trainer_checks import check_arguments, check_kept, check_marks, refuse_cached
from palu.training.until_forgotten import KnowledgeChecks
from palu_kernels.backend import resolve as resolve_backend

logger = logging.getLogger(__name__)

# Backends that allow one backward per micro-batch only: gradients are sharded, or backward calls
# are counted.
_ONE_BACKWARD = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


@dataclass
class _Terms:
    """What one batch gave. `means` and `rows` are float32 `[3]` in the order of TERMS, detached."""

    loss: Tensor
    means: Tensor  # each term's sum over this batch, divided by its denominator
    rows: Tensor  # rows of this batch
    denominators: Tensor  # rows the means were divided by (the whole step's), at least 1


class PALUTrainer(CheckpointTrainer):
    """Make a model forget the sensitive tokens of `train_dataset` and keep everything else.

    A step's loss is `forget_weight * forget + preserve_weight * preserve + retain_weight * retain`,
    each term a mean over all its tokens in the step: splitting the step into micro-batches
    (`gradient_accumulation_steps`) or processes changes nothing but a mixture's router loss. A
    forget and a retain micro-batch have a forward and a backward each, of the wrapper the Trainer
    holds, and losses are computed from hidden states, or from the logits of tokens that carry a
    loss. The logs carry each term unweighted (`forget`, `preserve`, `retain`: means over the tokens
    since the last log), the tokens per step (`num_forget`, ...), and what they cost:
    `loss_token_fraction`, `tokens_per_second` and `peak_memory_mib` (see
    `palu.training.step_log.StepLog.collect`).

    The retain examples of a step depend on the seed and the step alone: a resumed run sees the
    same ones. A checkpoint is whole or absent (`palu.training.checkpoints`). To resume, build the
    trainer as it was, with the original model, and call `train(resume_from_checkpoint=True)`: the
    reference is copied from the model given here, before the checkpoint's weights are loaded into
    it.

    Started by `torchrun` or `accelerate launch` it trains in all processes, to the numbers of one
    process with the same rows a step. Rows that are repeated to make the last step of an epoch even
    do not count, in evaluations neither; of a stream (`IterableDataset`) they do.

    Args:
        model: the model to change, or its folder or its id on the hub (`org/name`), which is then
            loaded as `palu unlearn` does, with its tokenizer where none is given. Method `rmu`
            turns off `requires_grad` of what it does not train (see `palu.methods.RMU`), and it
            stays off.
        args: a `PALUConfig`.
        train_dataset: the forget set: mappings with `input_ids`, `labels`, `attention_mask` (see
            `palu.data.examples.tokenize_examples`), or records, or whatever else
            `palu.load_examples` reads, to be tokenised with `processing_class`, `max_length` and
            `template`. With a `data_collator` of your own records are left to it.
        retain_dataset: rows of the same form whose answers are to be kept; None for no retain term.
        ref_model: the frozen original; a copy of `model` is made when it is None and one is needed.
        reference: where the original's numbers come from, instead of `args.reference`: `live`,
            `adapter_off` or `cached` (see `PALUConfig`).
        eval_dataset: forget rows to evaluate on; `evaluate()` takes `train_dataset` when there is
            none.
        processing_class: the tokenizer; tokenises records, and gives the padding and end tokens.
        data_collator: default `palu.data.collator.Collator`. Another one must keep the labels as
            they are; it may pad on any side or pack (examples are taken apart again:
            `palu.training.collated`), and give what else the model's forward takes.
        peft_config: of an adapter that is put on the model (by `args.seed`) and trained alone.
            `reference` is then `adapter_off` instead of `live`.
        max_length: tokens in an example made of a record; what is cut off is warned of.
        template: how records become text; the one in the `palu.json` of a model that was named, or
            `Template()`, when None.
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
    _begins_with: Mapping[str, float] = {}  # of the step loss, at every attempt at training
    _masters: MasterWeights | None = None
    _position: EpochPosition | None = None  # of an attempt at training
    _started: StartingWeights | None = None  # the weights before the first step

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: PALUConfig,
        *,
        train_dataset: Dataset | Sequence[dict],
        retain_dataset: Dataset | Sequence[dict] | None = None,
        ref_model: nn.Module | None = None,
        reference: str | None = None,
        eval_dataset: Dataset | Sequence[dict] | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        peft_config: Any = None,
        max_length: int = 512,
        template: Template | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(args, train_dataset, retain_dataset, eval_dataset, kwargs)
        loaded = load_named(model, args, processing_class, template)
        model = with_adapter(loaded.model, peft_config, args)
        processing_class = loaded.tokenizer
        refuse_prompt_learning(model)
        refuse_encoder(model)
        refuse_parts(model)
        eos = eos_token_ids(model, processing_class)
        self.method = args.make_loss(eos)
        if args.n_gpu > 1:
            # The Trainer would wrap the model in DataParallel, which cannot split a list of kept
            # rows.
            logger.warning(
                "PALUTrainer uses one of %d devices; start it with torchrun to use them all",
                args.n_gpu,
            )
            args._n_gpu = 1
        if data_collator is None:
            tokens = Tokenizing(loaded, args, self.method, max_length)
            train_dataset = tokens("train_dataset", train_dataset, forget=True)
            retain_dataset = tokens("retain_dataset", retain_dataset, forget=False)
            eval_dataset = tokens("eval_dataset", eval_dataset, forget=True)
            has_tokenizer = processing_class is not None
            data_collator = Collator(
                processing_class if has_tokenizer else _padding_token(model, eos)
            )
        self._pairs = self.method.needs_alternates
        # Second answers are collated apart; of several processes' rows the last may be repeats.
        ordered = self._pairs or args.world_size > 1
        # The roles of pairs are those of both answers, which are stacked later.
        roles = None if self._pairs else partial(forget_roles, self.method)
        rows = ExampleRows(data_collator, model, ordered=ordered, more=roles)
        self.retain_dataset = retain_dataset if args.retain_weight > 0 else None
        self._reference_kind = reference_of(reference, args, peft_config)
        kept = self.retain_dataset is not None and args.retain_loss != "nll"
        self._needs_reference = self.method.needs_reference or kept
        self.method.check_run(
            retain=self.retain_dataset is not None,
            reference=self._reference_kind,
            reference_needed=self._needs_reference,
        )
        self.method.prepare(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=PairCollator(rows) if self._pairs else rows,
            **kwargs,
        )
        self._set_up_losses(ref_model)
        self._retain_lengths = None
        if self.retain_dataset is not None and groups_by_length(args):
            self._retain_lengths = [len(row["input_ids"]) for row in self.retain_dataset]
        self.add_callback(LogAtCheckpoints())
        if isinstance(self.step_loss, PDUStepLoss):
            self.add_callback(DualAscent(self))
        if args.stop_at_forget_prob is not None:
            self.add_callback(StopAtForgetProb(self))
        self._checks = None
        if args.checks != "none":
            self._checks = KnowledgeChecks(self, stop=args.checks == "epochs")
            self.add_callback(self._checks)

    def _set_up_losses(self, ref_model: nn.Module | None) -> None:
        args = self.args
        # A backend that cannot serve is an error now and not in the first step.
        resolve_backend(args.backend, args.device, torch.float32)
        self.model_accepts_loss_kwargs = True
        self._retain_kl = self.retain_dataset is not None and args.retain_loss == "kl"
        self._has_ref_model = ref_model is not None
        self.step_loss = self.method.step_loss(
            self.method,
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
        self.step_log = StepLog(args.device, preserve=self.method.preserve is not None)

    # ---- reference -------------------------------------------------------------------------------

    @property
    def reference(self) -> Reference | None:
        """The frozen original as the losses see it; a cache is there once training has begun."""
        return self.step_loss.reference

    def check_model(self, *, resumed: bool = False) -> None:
        """Look once, before training or evaluation, whether the model is causal and, with
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
        if isinstance(reference, LiveReference) and self.is_fsdp_enabled and ref_model is None:
            reference.model = self.shard_frozen(reference.model)
        elif reference is not None and self.place_model_on_device:
            reference.to(self.args.device)
        return reference

    def open_cache(self, checkpoint: str | None = None, **options: Any) -> ReferenceCache | None:
        """Open the reference cache, or build it first from the model as it is now.

        `train` and `evaluate` do so by themselves; call it before them to give it more options.

        Args:
            checkpoint: the folder of a checkpoint: it remembers which model its run started from,
                and may go on with that model's cache.
            **options: of `ReferenceCache.build`: `template`, `notes`, `report`.

        Returns:
            the cache; None where the settings ask for none.

        Raises:
            CacheError, CacheWriteError, FloatingPointError: as `ReferenceCache.open_or_build`.
            ValueError: the model is going to be compiled, or sharded by DeepSpeed (ZeRO 3).
        """
        if self._reference_kind != "cached" or not self._needs_reference:
            return None
        if isinstance(self.reference, CachedReference):
            return self.reference.cache
        refuse_cached(self.accelerator)
        place = self.args.reference_cache or str(Path(self.args.output_dir) / "reference-cache")
        cache = open_run_cache(
            self.model,
            self.train_dataset,
            place,
            checkpoint,
            loss=self.method.palu_loss,
            collator=self.data_collator,
            retain_dataset=self.retain_dataset if self._retain_kl else None,
            tokenizer=self.processing_class,
            batch_size=self.args.per_device_train_batch_size,
            autocast_dtype=autocast_dtype(self.accelerator),
            **options,
        )
        self.step_loss.reference = CachedReference(cache.to(self.args.device))
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
            ProcessesDiffer: the processes have other settings, data, models or versions.
            RuntimeError: with `auto_find_batch_size`, memory ran out after a step was taken.
            ValueError: no row of `train_dataset` has a token that the method forgets, or no row of
                `retain_dataset` one to keep.

        A warning tells how many rows of `retain_dataset` have the `input_ids` of a row of
        `train_dataset`.
        """
        compare_processes(self)
        if _has_places(self.train_dataset):
            check_marks(self.train_dataset, self.method, "train_dataset")
        if self.retain_dataset is not None:
            check_kept(self.retain_dataset)
        compared = self.texts_compared or not _has_places(self.train_dataset)
        if self.retain_dataset is not None and not compared and self.is_world_process_zero():
            warn_of_overlap(self.retain_dataset, self.train_dataset)
        if self.args.eval_strategy != "no":  # the others meet the collator in the first step
            sets = self.eval_dataset
            try_out(self.data_collator, sets.values() if isinstance(sets, dict) else [sets])
        checkpoint = self.begin_run(resume_from_checkpoint)
        self._begins_with = read_state(checkpoint)
        self.check_model(resumed=checkpoint is not None)
        self.open_cache(checkpoint, **(cache_options or {}))
        if self._started is None:
            self._started = StartingWeights(self.model)
        self._position = None
        if self.is_fsdp_enabled:  # an evaluation before has seen the whole model
            self.step_loss.choose_path_again()
        result = super().train(checkpoint, *args, **kwargs)
        self._position = None
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
    def outcome(self) -> RunOutcome | None:
        """Return what a finished run knew and knows, where `args.checks` asks for it."""
        return None if self._checks is None else self._checks.outcome

    @property
    def masters(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """Return the float32 master of each parameter that has one."""
        return {} if self._masters is None else self._masters.of

    @property
    def has_masters(self) -> bool:
        """Return whether float32 masters are trained: see `palu.training.master_weights`."""
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
            warn_without_masters(self.accelerator)
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
                "sharding": self.sharding,
                "eos_token_id": getattr(self.method, "eos_token_id", None),
                **adapter_settings(self.model),
            },
            forget=self.train_dataset,
            retain=self.retain_dataset,
            model=self.model if is_whole(self.model) and not begun else None,
            reference=self.reference.model if live and self._has_ref_model else None,
            weights_are_read=kind == "cached" or (adapter and not live),
        )

    def fill_checkpoint(self, folder: Path) -> None:
        """Note the state of the objective, and the model that a reference cache is of."""
        write_state(folder, self.step_loss.state())
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
        """A forget and a retain micro-batch, each with its own forward and backward: the
        activations of only one of them are alive at a time, and neither is padded to the other's
        length. The gradient is that of both together."""
        inputs = dict(inputs)
        retain = inputs.pop(RETAIN, None)
        if retain is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if ROLES not in retain:  # not from `get_batch_samples`: the caller's own
            builder = self.batches_of(None, 1)
            inputs, retain = builder.forget(inputs), builder.retained(retain)
        if self.accelerator.distributed_type in _ONE_BACKWARD:
            both = together(self._prepare_inputs(inputs), self._prepare_inputs(retain))
            return super().training_step(model, both, num_items_in_batch)
        with self.accelerator.no_sync(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        return loss + super().training_step(model, retain, num_items_in_batch)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hugging Face's, which alone waits for the device at every tensor of a retain batch."""
        device = self.args.device
        return super()._prepare_inputs(
            {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
        )

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
            self.step_log.terms += torch.stack([terms.means * terms.denominators, terms.rows])
        # Gradients are averaged over processes, but the terms are divided by everyone's rows
        # already.
        loss = terms.loss * self.args.world_size if DENOMINATORS in inputs else terms.loss
        if not return_outputs:
            return loss
        return loss, {"loss": loss, **dict(zip(TERMS, terms.means, strict=True))}

    def _terms(self, model: nn.Module, batch: dict[str, Any]) -> _Terms:
        if ROLES not in batch:  # not from `get_batch_samples`: the caller's own
            batch = self.batches_of(None, 1).together(batch)
        counts = batch.get(COUNTS) or self.method.counts(batch[ROLES])
        rows = torch.tensor(counts, dtype=torch.float32).to(self.args.device, non_blocking=True)
        divisors = denominators = rows.clamp(min=1)
        if DENOMINATORS in batch:
            given = batch[DENOMINATORS].to(rows.device, non_blocking=True)
            rows, denominators = rows * (given > 0), given.clamp(min=1).float()
            divisors = torch.where(given > 0, denominators, math.inf)
        loss, means = self.step_loss(model, batch, divisors)
        return _Terms(loss, means, rows, denominators)

    def _raise_if_not_finite(self, terms: _Terms, batch: dict[str, Any]) -> None:
        # The one copy to the host of a micro-batch.
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
                [examples(batch, i, i + 1) for i in range(len(batch["input_ids"]))],
                (lambda one: self._terms(self.model, one).loss) if alone else None,
                {"forget": forget, "retain": self.retain_dataset},
                self.data_collator,
            ),
            self._last_checkpoint(),
        )

    def _last_checkpoint(self) -> str:
        step = self.state.global_step
        return not_finite.last_checkpoint(self.args.output_dir, step, self._identity)

    # ---- micro-batches ---------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one step, each with its retain batch and the step's row counts
        beside it."""
        if self.control.should_training_stop:
            return [], None  # resumed where the run had reached its end
        self.step_log.start_clock()
        first = self._position.follow(epoch_iterator, self.state.global_step)
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        self._position.drawn += len(samples)
        completed = self._builder.step(samples, first, self.state.global_step, self._over_ranks)
        retain = [batch[RETAIN] for batch in completed if batch[RETAIN] is not None]
        self.step_log.add_step([*completed, *retain])
        # Not None, so that older versions know the loss is scaled for the whole step already.
        return completed, sum(batch[DENOMINATORS].sum() for batch in completed)

    def get_train_dataloader(self) -> Any:
        """Hugging Face's, and with it how its rows make up the steps."""
        # An attempt at training begins: one that `auto_find_batch_size` gave up does not count.
        begun = None if self._position is None else self._position.begun
        again = self.args.auto_find_batch_size and begun is not None
        if again and self.state.global_step > begun:
            raise RuntimeError(
                f"auto_find_batch_size: out of memory after step {self.state.global_step}, and "
                "what was trained stays in weights and optimizer; begin again with the model as it "
                f"was and per_device_train_batch_size={self._train_batch_size}"
            )
        self.step_log.reset()
        self.step_loss.restore(self._begins_with)
        loader = super().get_train_dataloader()
        args = self.args
        self._position = EpochPosition(
            loader, args.gradient_accumulation_steps, not args.ignore_data_skip
        )
        # What balances batches itself deals out batches of any size.
        balanced = getattr(args, "train_sampling_strategy", None) == "batch_rebalance"
        rows = None if balanced else length_of(self.train_dataset)
        self._builder = self.batches_of(rows, self._train_batch_size)
        return loader

    def batches_of(self, rows: int | None, batch_size: int) -> BatchBuilder:
        """How steps are made up from a data set that is loaded in batches of `batch_size`.

        Args:
            rows: how many it has; None where that is not known, or accelerate does not deal them
                out.
            batch_size: as the Trainer's arguments have it.
        """
        args = self.args
        shares = args.world_size if self.accelerator.split_batches else 1
        sharding = Sharding(rows, batch_size // shares, args.process_index, args.world_size)
        if self.retain_dataset is None:
            return BatchBuilder(sharding, None, args.normalization, self.method)
        forget_batch = self._train_batch_size // shares
        retain_batch = args.retain_batch_size or forget_batch
        retain = RetainSampler(
            self.retain_dataset,
            self.data_collator,
            Fraction(retain_batch, forget_batch),
            retain_batch * args.gradient_accumulation_steps * args.world_size,
            args.data_seed if args.data_seed is not None else args.seed,
            self._retain_lengths,
        )
        return BatchBuilder(sharding, retain, args.normalization, self.method)

    def _over_ranks(self, counts: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return counts
        return self.accelerator.reduce(counts.to(self.args.device), "sum")

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not groups_by_length(self.args) or not hasattr(self.train_dataset, "__len__"):
            return super()._get_train_sampler(*args, **kwargs)
        step = self._train_batch_size * self.args.gradient_accumulation_steps
        step *= 1 if self.accelerator.split_batches else self.args.world_size
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return LengthGroups(step, lengths, seed)

    # ---- evaluation ------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The total and the three terms on forget rows, without training: `eval_loss`,
        `eval_forget`, ...

        Every term is a mean over all its rows. Without an `eval_dataset` here or in the constructor
        the training rows are taken. Retain rows come in the same order at every evaluation.
        """
        compare_processes(self)
        self.check_model()
        self.open_cache()
        if eval_dataset is None and self.eval_dataset is None:
            eval_dataset = self.train_dataset
        with self.step_log.paused():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Hugging Face's; `dataloader_drop_last` is for training alone."""
        args = self.args
        drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            args.dataloader_drop_last = drop_last

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Hugging Face's loop, with the metrics replaced by means over rows."""
        self._eval_totals, self._eval_batches = self._zeros(), 0
        self._evaluated = dataloader.dataset
        self._eval_builder = self.batches_of(
            length_of(dataloader.dataset), self.args.eval_batch_size
        )
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        means, rows = self._means(self._eval_totals)
        weights = (self.args.forget_weight, self.args.preserve_weight, self.step_loss.retain_weight)
        metrics = {"loss": sum(w * m for w, m in zip(weights, means, strict=True))}
        metrics |= dict(zip(TERMS, means, strict=True))
        metrics |= {f"num_{name}": count for name, count in zip(TERMS, rows, strict=True)}
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of one evaluation batch; predictions are not kept."""
        batch = self._eval_builder.evaluation(inputs, self._eval_batches)
        loss = torch.zeros((), device=self.args.device)
        # One after the other as in training, so that neither has to have the other's shapes.
        for part in (batch, batch.pop(RETAIN)):
            if part is None:
                continue
            part = self._prepare_inputs(part)
            with torch.no_grad(), self.compute_loss_context_manager():
                terms = self._terms(model, part)
            self._raise_if_not_finite(terms, part)
            self._eval_totals += torch.stack([terms.means * terms.denominators, terms.rows])
            loss = loss + terms.loss.detach()
        self._eval_batches += 1
        return loss, None, None

    def _means(self, totals: Tensor) -> tuple[list[float], list[float]]:
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        sums, rows = totals.tolist()
        return row_means(sums, rows), rows

    def _zeros(self) -> Tensor:
        return torch.zeros(2, 3, device=self.args.device)

    # ---- logs ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the numbers of the steps since the last log to the Trainer's own training logs: see
        `StepLog.collect`."""
        if "loss" in logs and self.step_log.steps > 0:
            logs |= self.step_log.collect(self.accelerator.gather)
            if self.method.per_example:
                for name in ("loss_token_fraction", "head_rows_share"):
                    del logs[name]  # it takes num_forget, which counts answers, for tokens
            router_loss = self.step_loss.router.take_mean()
            if router_loss is not None:
                logs["router_loss"] = self.accelerator.gather(router_loss).mean().item()
            logs |= self.step_loss.state()
        super().log(logs, start_time)


def _has_places(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _padding_token(model: nn.Module, eos: list[int]) -> int:
    pad = getattr(getattr(unwrap(model), "config", None), "pad_token_id", None)
    return pad if pad is not None else (eos[0] if eos else 0)


def groups_by_length(args: PALUConfig) -> bool:
    """Return whether the Trainer puts forget examples of like length together, so that retain
    examples should be too (the option had another name in transformers 5.0)."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy == "group_by_length" or bool(getattr(args, "group_by_length", False))


def length_of(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
