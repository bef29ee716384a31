"""Predict the peak memory of an unlearning step from a model's config.

The prediction is the sum of the bytes of the tensors that are alive at each of the few moments of a
step that can be its peak. What an accelerator needs besides tensors (its context, workspaces of
libraries, the allocator's fragments) is not in it.

A step is one of `PALUTrainer`'s after the first, which makes the optimizer's state: a forget and a
retain micro-batch of as many examples, each with a forward and a backward, and a fused AdamW with
two float32 numbers a weight; float32 masters of bfloat16 weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from palu.planning.model import ModelSizes
from palu.planning.one_device import Step
from palu.planning.setup import ANSWER_SHARE, GIB, PRESERVE_SHARE, REFERENCES, Items, Setup
from palu.planning.sharded import ShardedStep

__all__ = [
    "ANSWER_SHARE",
    "GIB",
    "PRESERVE_SHARE",
    "REFERENCES",
    "Items",
    "Prediction",
    "Setup",
    "Step",
    "largest_batch",
    "predict",
]

LARGEST_BATCH = 2**20  # that `largest_batch` tries


@dataclass(frozen=True)
class Prediction:
    """Bytes of every kind of tensor at the moments of a step that can be its largest."""

    moments: dict[str, Items]

    @property
    def moment(self) -> str:
        """Name of the largest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def items(self) -> Items:
        """Bytes by kind of tensor at that moment."""
        return {name: size for name, size in self.moments[self.moment].items() if size}

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return sum(self.items.values())


def predict(sizes: ModelSizes, setup: Setup) -> Prediction:
    """Return the memory of a step; of several devices that of the one which holds most.

    Raises:
        ValueError: `setup.tensor_parallel` does not divide the model's heads or the MLP's width.
    """
    own = sizes.tensor_parallel(setup.tensor_parallel)
    step = (ShardedStep if setup.data_parallel > 1 else Step)(own, setup)
    return Prediction({name: {**step.base, **items} for name, items in step.moments()})


def largest_batch(sizes: ModelSizes, setup: Setup, limit: float) -> int:
    """Return the largest `batch_size` whose predicted peak is at most `limit` bytes, 0 if none
    fits. That of the setup is not used."""

    def fits(batch_size: int) -> bool:
        return predict(sizes, replace(setup, batch_size=batch_size)).peak <= limit

    low, high = 0, 1
    while high <= LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
