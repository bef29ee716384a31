"""RMU: activations after one decoder layer, instead of probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palu.data.roles import FORGET
from palu.methods.base import Method, check_number
from palu.methods.micro_batch import (
    RETAINED,
    ROLES,
    RowRoles,
    model_inputs,
    part_for_reference,
)
from palu.methods.step_loss import StepLoss, Terms
from palu.models.layers import decoder_layers, layer_output, loss_at_layer
from palu.models.wrappers import incompatible_wrapper, unwrap
from palu_kernels.backend import accum_dtype

USUAL_LAYER = 7  # the default of the paper's code and of open-unlearning


class RMUStepLoss(StepLoss):
    """The terms of `RMU` in a micro-batch."""

    method: RMU

    def _choose_path(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """There is one: no head is needed."""

    def terms(self, model: nn.Module, batch: Mapping[str, Any], denominators: Tensor) -> Terms:
        """See `StepLoss`."""
        roles, original = batch[ROLES], None
        if roles.retain:
            part = part_for_reference(batch, forget=False, retain=True)
            with self.autocast():
                original = self.reference.of(model, lambda m: self._activations(m, part))

        def compute(rows: Tensor) -> Terms:
            own = roles.count(FORGET)
            forget = kept = rows.new_zeros((), dtype=denominators.dtype)
            # Without any rows too: DDP waits for a gradient.
            if roles.forget or not roles.retain:
                target = self.method.target(rows.shape[1]).to(rows.dtype)
                target = target.to(rows.device, non_blocking=True)
                forget = _sum_of_means(rows[:own] - target, roles.lengths(FORGET))
            if roles.retain:
                kept = _sum_of_means(rows[own:] - original.to(rows), roles.lengths(RETAINED))
            means = forget / denominators[0], kept / denominators[2]
            total = self.method.forget_weight * means[0] + self.retain_weight * means[1]
            return total, torch.stack([means[0], means[0] * 0, means[1]]).detach().float()

        if incompatible_wrapper(model) is None:
            return compute(self._activations(model, batch))
        call = partial(loss_at_layer, model, self.method.layer_id)
        return call(lambda output: compute(_picked(output, batch)), **model_inputs(batch))

    def _activations(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return `[answer tokens, D]`, at least float32: forget tokens, then retained ones."""
        output = layer_output(model, self.method.layer_id, **model_inputs(batch))
        return _picked(output, batch)


def _picked(output: Tensor, batch: Mapping[str, Any]) -> Tensor:
    # Roles are those of the rows before the tokens; here the tokens themselves count.
    order = torch.cat([batch[ROLES].order(role) for role in (FORGET, RETAINED)]) + 1
    rows = output.flatten(0, 1).index_select(0, order.to(output.device, non_blocking=True))
    return rows.to(accum_dtype(rows.dtype))


def _sum_of_means(difference: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum over answers of the mean square over the tokens of each.

    Args:
        difference: `[n, D]`, of the tokens one after the other.
        lengths: int64 `[E]` on the host: tokens of each answer.
    """
    share = (1 / lengths.to(difference.dtype)).repeat_interleave(lengths)
    return (difference.square().mean(1) * share.to(difference.device, non_blocking=True)).sum()


@dataclass(kw_only=True)
class RMU(Method):
    """Representation misdirection for unlearning (Li et al. 2024, WMDP, arXiv 2403.03218).

    `forget = mean over answers of the mean over its tokens of |h - steering_coeff * u|^2 / D` and
    `retain = mean over retain answers of the mean over its tokens of |h - h_original|^2 / D`, with
    `h` the residual stream after one decoder layer at the token's own position (D wide), and `u` a
    direction drawn once: entries uniform on [0, 1), then length 1. (The paper's formula does not
    divide by D; its code and open-unlearning do.) No logits are needed, and the layers after that
    one are not computed.

    Only the layers `layer_id - 2` to `layer_id` train, whole, as in the paper; every other
    parameter is frozen. (The paper's code trains the down projections there alone:
    `trainable_params_regex=r".*layers\\.(5|6|7)\\.mlp\\.down_proj\\.weight"`. open-unlearning's
    configuration trains everything, embeddings too, which never train here.)

    As is meant in open-unlearning, a mean over tokens is taken in each answer first (there the sums
    `[B]` meet the counts `[B, 1]`, so that every sum is divided by every count), and answer tokens
    alone count; the paper's code takes all positions. A token at position 0 does not count here.
    `u` depends on the run's seed and D alone, so it is the same in every process and after a
    resume; in open-unlearning it is what the process's random state gives.

    Args:
        layer_id: which decoder layer, from 0. None: 7, the default of the paper's code and of
            open-unlearning, or the last one of a model with fewer.
        steering_coeff: length of the vector that activations are pulled to, above 0. Published
            are 6.5 beside `retain_weight=1200` (the paper's Zephyr-7B); 2 beside 1, the default, is
            open-unlearning's configuration.
        trainable_params_regex: as of `Method`, within the layers 0 to `layer_id` and instead of
            those above.
        seed: of the direction.
    """

    name = "rmu"
    per_example = True
    step_loss: ClassVar[type[StepLoss]] = RMUStepLoss
    retain_losses: ClassVar[tuple[str, ...]] = ("embed_diff",)
    layer_id: int | None = None
    steering_coeff: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("steering_coeff", self.steering_coeff)
        layer = self.layer_id
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
            raise TypeError(f"layer_id is {layer!r}; it must be an integer")
        if layer is not None and layer < 0:
            raise ValueError(f"layer_id is {layer}; it must be at least 0, the first layer")

    def check_layers(self, count: int) -> None:
        """Raise ValueError where `layer_id` is none of so many layers."""
        if self.layer_id is not None and self.layer_id >= count:
            raise ValueError(
                f"layer_id is {self.layer_id} and the model has {count} decoder layers; it must be "
                f"0 to {count - 1}"
            )

    def prepare(self, model: nn.Module) -> None:
        """Settle `layer_id`, and turn off `requires_grad` of what does not train.

        Raises:
            ValueError: the model has no such layer, or nothing would train.
        """
        layers = decoder_layers(model)
        self.check_layers(len(layers))
        if self.layer_id is None:
            self.layer_id = min(USUAL_LAYER, len(layers) - 1)
        last = self.layer_id
        first = 0 if self.trainable_params_regex is not None else max(last - 2, 0)
        within = {id(p) for layer in layers[first : last + 1] for p in layer.parameters()}
        named = unwrap(model).named_parameters()
        could = [name for name, p in named if id(p) in within and p.requires_grad]
        self.train_only(model, could, f"the decoder layers {first} to {last}")

    def counts(self, roles: RowRoles) -> list[int]:
        """Answers to forget, 0, answers to retain."""
        return [roles.count(FORGET, answers=True), 0, roles.count(RETAINED, answers=True)]

    def target(self, size: int) -> Tensor:
        """Float64 `[size]` on the CPU: what the activations of forget answers are pulled to."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(size, generator=generator, dtype=torch.float64)
        return self.steering_coeff * drawn / drawn.norm()
