"""`PALUTrainer`: Hugging Face's Trainer with PALU's three terms."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from palu.cache import ReferenceCache
from palu.config import REFERENCES, PALUConfig
from palu.data import Collator
from palu.loss import PALULoss, check_labels
from palu.modeling import end_tokens, unwrap
from palu.objective import RETAIN, Objective, in_turns
from palu.reference import (
    AdapterOffReference,
    CachedReference,
    LiveReference,
    Reference,
    vocabulary_size,
)
from palu.retain import retain_rows
from palu_kernels.backend import check_values
from palu_kernels.backend import resolve as resolve_backend

logger = logging.getLogger(__name__)

TERMS = ("forget", "preserve", "retain")
# Where a backward is more than that: gradients are sharded, or the engine counts its calls.
_ONE_BACKWARD = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
STARTING_MODEL = "palu_reference.json"  # in a checkpoint: which model its reference cache is of
# Travels beside a forget batch from `get_batch_samples` to `compute_loss`.
_DENOMINATORS = "palu_denominators"


@dataclass
class _Terms:
    """What one batch gave. `means` and `rows` are float32 `[3]` in the order of TERMS, detached."""

    loss: Tensor
    means: Tensor  # each term's sum over this batch, divided by its denominator
    rows: Tensor  # rows of this batch
    denominators: Tensor  # rows the means were divided by (the whole step's), at least 1


class PALUTrainer(Trainer):
    """Makes a model forget the sensitive tokens of `train_dataset` and keep everything else.

    A step's loss is `forget_weight * forget + preserve_weight * preserve + retain_weight * retain`,
    each term a mean over all its rows in the step: splitting the step into micro-batches
    (`gradient_accumulation_steps`) or processes changes nothing. Forget and retain rows take turns,
    each with a forward and a backward of the wrapper the Trainer holds, and losses are computed
    from hidden rows, or from the logits of rows that carry a loss. The logs carry each term
    unweighted (`forget`, `preserve`, `retain`: means over the rows since the last log) and the rows
    per step (`num_forget`, ...).

    The retain batch of a step depends on (seed, step, micro-step) only, so a resumed run sees the
    same one. To resume, build the trainer with the original model and call
    `train(resume_from_checkpoint=...)`: the reference is copied from the model given here, before
    the checkpoint's weights are loaded into it.

    Args:
        model: the model to change.
        args: a `PALUConfig`.
        train_dataset: the forget set: mappings with `input_ids`, `labels`, `attention_mask` (see
            `palu.data.tokenize_examples`).
        retain_dataset: rows of the same form whose answers are to be kept; None for no retain term.
        ref_model: the frozen original; a copy of `model` is made when it is None and one is needed.
        reference: where the original's numbers come from, instead of `args.reference`: `live`,
            `adapter_off` or `cached` (see `PALUConfig`).
        eval_dataset: forget rows to evaluate on; `evaluate()` takes `train_dataset` when there is
            none.
        processing_class: the tokenizer; gives the padding and end tokens.
        data_collator: default `palu.data.Collator`.
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
        _check(args, train_dataset, retain_dataset, kwargs)
        eos = end_tokens(model, processing_class)
        self.loss_fn = PALULoss(**args.loss_options(), eos_token_id=eos)
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
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **kwargs,
        )
        # A backend that cannot serve is an error now and not in the first step.
        resolve_backend(args.backend, args.device, torch.float32)
        self.model_accepts_loss_kwargs = True
        self.retain_dataset = retain_dataset if args.retain_weight > 0 else None
        self._retain_kl = self.retain_dataset is not None and args.retain_loss == "kl"
        self._reference_kind = args.reference if reference is None else reference
        self.objective = Objective(
            self.loss_fn,
            self._make_reference(ref_model),
            retain_loss=args.retain_loss,
            retain_weight=args.retain_weight,
            autocast=self.accelerator.autocast,
        )
        self._retain_lengths = None
        if self.retain_dataset is not None and _groups_by_length(args):
            self._retain_lengths = [len(row["input_ids"]) for row in self.retain_dataset]
        self._columns = vocabulary_size(unwrap(self.model))
        self._window = self._zeros()
        self._window_steps = 0
        self._eval_totals = self._zeros()
        self._eval_batches = 0

    # ---- reference -------------------------------------------------------------------------------

    @property
    def reference(self) -> Reference | None:
        """The frozen original as the losses see it; a cache is there once training has begun."""
        return self.objective.reference

    @property
    def _needs_reference(self) -> bool:
        return self.loss_fn.needs_reference or self._retain_kl

    def _make_reference(self, ref_model: nn.Module | None) -> Reference | None:
        kind = self._reference_kind
        if kind not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, not {kind!r}")
        if ref_model is not None and kind != "live":
            raise ValueError(
                f"ref_model is given and reference is {kind!r}; a ref_model must come with "
                "reference='live'"
            )
        if not self._needs_reference or kind == "cached":
            return None
        if kind == "adapter_off":
            return AdapterOffReference(self.model)
        reference = LiveReference(self.model, ref_model)
        return reference.to(self.args.device) if self.place_model_on_device else reference

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
        started = Path(checkpoint, STARTING_MODEL) if checkpoint else None
        starting_model = None
        if started is not None and started.is_file():
            starting_model = json.loads(started.read_text(encoding="utf-8"))["starting_model"]
        with self.args.main_process_first(local=False):
            cache = ReferenceCache.open_or_build(
                self.model,
                self.train_dataset,
                place,
                starting_model=starting_model,
                loss=self.loss_fn,
                collator=self.data_collator,
                retain_dataset=self.retain_dataset if self._retain_kl else None,
                tokenizer=self.processing_class,
                batch_size=self.args.per_device_train_batch_size,
                autocast_dtype=self._autocast_dtype(),
                **options,
            )
        self.objective.reference = CachedReference(
            cache.to(self.args.device),
            retain=self._retain_kl,
            indices=self.loss_fn.select_from == "reference",
            hidden=self.loss_fn.preserve is not None,
        )
        return cache

    def _autocast_dtype(self) -> torch.dtype | None:
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kw: Any) -> Any:
        """Hugging Face's training; a reference cache is opened or built before its first step."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self.open_cache(checkpoint or None)
        return super().train(resume_from_checkpoint, *args, **kw)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if isinstance(self.reference, CachedReference) and self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            content = json.dumps({"starting_model": self.reference.cache.starting_model})
            (folder / STARTING_MODEL).write_text(content, encoding="utf-8")

    # ---- batches ---------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one step, each with its retain batch and the step's row counts
        beside it."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window_steps += bool(samples)
        counts = torch.zeros(3, device=device)
        for micro_step, sample in enumerate(samples):
            sample[RETAIN] = self._retain_batch(
                self.state.global_step, micro_step, self._train_batch_size
            )
            self._check_labels(sample)
            counts += self.objective.count(sample).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        for sample in samples:
            sample[_DENOMINATORS] = counts
        # Not None, so that older versions know the loss is scaled for the whole step already.
        return samples, counts.sum()

    def _retain_batch(
        self, step: int, micro_step: int, batch_size: int
    ) -> dict[str, Tensor] | None:
        if self.retain_dataset is None:
            return None
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        rows = retain_rows(
            len(self.retain_dataset),
            self.args.retain_batch_size or batch_size,
            seed=seed,
            step=step,
            micro_step=micro_step,
            micro_steps=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            lengths=self._retain_lengths,
        )
        return self.data_collator([self.retain_dataset[i] for i in rows])

    def _check_labels(self, sample: dict) -> None:
        if self._columns is not None and check_values(sample["labels"].device):
            check_labels(sample["labels"], self._columns)

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
        self._raise_if_not_finite(terms)
        if model.training:
            self._window += torch.stack([terms.means * terms.denominators, terms.rows])
        # Gradients are averaged over processes, but the terms are divided by everyone's rows
        # already.
        loss = terms.loss * self.args.world_size if _DENOMINATORS in inputs else terms.loss
        if not return_outputs:
            return loss
        return loss, {"loss": loss, **dict(zip(TERMS, terms.means, strict=True))}

    def _terms(self, model: nn.Module, batch: dict[str, Any]) -> _Terms:
        rows = self.objective.count(batch)
        denominators = batch.get(_DENOMINATORS)
        denominators = (rows if denominators is None else denominators).clamp(min=1)
        loss, means = self.objective(model, batch, denominators)
        return _Terms(loss, means, rows, denominators)

    def _raise_if_not_finite(self, terms: _Terms) -> None:
        # One small copy to the host per micro-batch; the boolean masks above have waited for the
        # device already.
        total, *means = torch.cat([terms.loss.detach().float()[None], terms.means]).tolist()
        if total - total == 0:  # false for inf and NaN
            return
        bad = [f"{n} = {v}" for n, v in zip(TERMS, means, strict=True) if v - v != 0]
        where = f"at step {self.state.global_step + 1}" if self.model.training else "in evaluation"
        raise FloatingPointError(
            f"the loss is not finite {where}: {', '.join(bad) or f'total = {total}'}. A lower "
            "learning_rate, a smaller forget_weight or bfloat16 instead of float16 usually helps."
        )

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
        self.open_cache()
        if eval_dataset is None and self.eval_dataset is None:
            eval_dataset = self.train_dataset
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

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
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        means, rows = self._means(self._eval_totals)
        weights = (self.args.forget_weight, self.args.preserve_weight, self.args.retain_weight)
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
        inputs = dict(inputs)
        self._check_labels(inputs)
        inputs[RETAIN] = self._retain_batch(self._eval_batches, 0, self.args.eval_batch_size)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            terms = self._terms(model, inputs)
        self._raise_if_not_finite(terms)
        self._eval_totals += torch.stack([terms.means * terms.denominators, terms.rows])
        self._eval_batches += 1
        return terms.loss.detach(), None, None

    # ---- logs ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms and row counts of the window to the Trainer's own training logs."""
        steps = self._window_steps
        if "loss" in logs and steps > 0:
            means, rows = self._means(self._window)
            logs |= dict(zip(TERMS, means, strict=True))
            logs |= {f"num_{n}": count / steps for n, count in zip(TERMS, rows, strict=True)}
            self._window.zero_()
            self._window_steps = 0
        super().log(logs, start_time)

    def _means(self, totals: Tensor) -> tuple[list[float], list[float]]:
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        sums, rows = totals.tolist()
        return [s / max(r, 1.0) for s, r in zip(sums, rows, strict=True)], rows

    def _zeros(self) -> Tensor:
        return torch.zeros(2, 3, device=self.args.device)


def _check(args: Any, forget: Any, retain: Any, kwargs: dict) -> None:
    if not isinstance(args, PALUConfig):
        raise TypeError(f"args must be a PALUConfig, not {type(args).__name__}")
    for name in ("compute_loss_func", "compute_metrics", "model_init"):
        if kwargs.get(name) is not None:
            raise TypeError(f"{name} is not supported: the loss and its terms are PALU's own")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor must be 0: PALU's terms have no smoothed form")
    if forget is None or (hasattr(forget, "__len__") and len(forget) == 0):
        raise ValueError("train_dataset (the forget set) must have at least one row")
    if retain is not None and len(retain) == 0:
        raise ValueError("retain_dataset must have at least one row, or be None")


def _groups_by_length(args: PALUConfig) -> bool:
    """Whether the Trainer puts forget rows of like length together, so that retain rows should be
    too (the option had another name in transformers 5.0)."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy == "group_by_length" or bool(getattr(args, "group_by_length", False))


def _padding_token(model: nn.Module, eos: list[int]) -> int:
    pad = getattr(getattr(unwrap(model), "config", None), "pad_token_id", None)
    return pad if pad is not None else (eos[0] if eos else 0)
