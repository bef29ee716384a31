"""A Trainer that evaluates the three terms, each over all its rows, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palu.methods.step_loss import RETAIN, in_turns
from palu.training.step_log import TERMS, row_means
from palu.training.step_trainer import StepTrainer, length_of


class EvaluationTrainer(StepTrainer):
    """A subclass has `check_model`, `open_cache`, `_terms` and `_raise_if_not_finite`."""

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
        self._eval_step = self.batches_of(length_of(dataloader.dataset), self.args.eval_batch_size)
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        means, rows = self._means(self._eval_totals)
        weights = (self.args.forget_weight, self.args.preserve_weight, self.objective.retain_weight)
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
        self.check_labels(inputs)
        inputs = self._eval_step.for_evaluation(inputs, self._eval_batches)
        inputs = self._prepare_inputs(inputs)
        loss = torch.zeros((), device=self.args.device)
        # In turns as in training, so that neither has to have the other's shapes.
        for part in [inputs] if inputs[RETAIN] is None else in_turns(inputs):
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
