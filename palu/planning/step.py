"""Predict the peak memory of an unlearning step from a model's config.

The prediction is the sum of the bytes of the tensors that are alive at each of the few moments of a
step that can be its peak. What an accelerator needs besides tensors (its context, workspaces of
libraries, the allocator's fragments) is not in it.

A step is one of `PALUTrainer`'s after the first, which makes the optimizer's state: a forget and a
retain micro-batch of as many examples, each with a forward and a backward, and a fused AdamW with
two float32 numbers a weight; float32 masters of bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from palu.planning.layer import ADAPTERS, PRECISIONS, Layer
from palu.planning.model import ModelSizes
from palu_kernels.roles import chunk_shape, is_kept

REFERENCES = ("live", "adapter_off", "cached")
# Share of all positions that carry a loss, and of the forget examples' that are preserved: TOFU's
# forget10 at `prefix_length` 3. They size the chunk buffers, which do not grow beyond 256 MiB.
ANSWER_SHARE, PRESERVE_SHARE = 0.33, 0.27
MASTER = 4  # bytes of an element: see `palu.training.master_weights`
GIB = 2**30
LARGEST_BATCH = 2**20  # that `largest_batch` tries

Items = dict[str, int]  # bytes by kind of tensor


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Args:
        batch_size: forget examples, and as many retain examples.
        length: tokens of a padded example.
        dtype: `float32`, `bfloat16` (weights and all), or `autocast` (bfloat16 autocast over
            float32 weights).
        lora_rank: 0 trains every weight; else of LoRA adapters on all linear layers of the decoder
            layers, everything else frozen.
        reference: `live` (a second model), `adapter_off` (LoRA) or `cached`.
        checkpointing: whether each decoder layer is computed again in backward.

    Raises:
        ValueError: an argument is not as above.
    """

    batch_size: int = 8
    length: int = 512
    dtype: str = "bfloat16"
    lora_rank: int = 0
    reference: str = "live"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("length", 2), ("lora_rank", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
        for name, choices in (("dtype", tuple(PRECISIONS)), ("reference", REFERENCES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        if self.reference == "adapter_off" and not self.lora_rank:
            raise ValueError("reference is 'adapter_off' and lora_rank 0; it must be at least 1")


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
    """Return the memory of a step."""
    step = Step(sizes, setup)
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


class Step:
    """The moments of a step that can be its peak."""

    has_masters = True
    keeps_copies = True  # of frozen heads, in the dtype of autocast

    def __init__(self, sizes: ModelSizes, setup: Setup) -> None:
        self.sizes, self.setup = sizes, setup
        self.precision = p = PRECISIONS[setup.dtype]
        self.full = not setup.lora_rank
        self.layer = Layer(sizes, p, setup.batch_size, setup.length, not self.full)
        adapters = sizes.lora_parameters(setup.lora_rank) * ADAPTERS
        weights = sizes.parameters * p.weights + adapters
        # 16-bit weights that train have float32 masters, gradients and optimizer state.
        masters = self.full and self.has_masters and p.weights < MASTER
        trained = MASTER * sizes.parameters if masters else weights
        self.gradients = trained if self.full else adapters
        # A cache is in host memory; without a second model a head that trains has a frozen copy.
        frozen_head = sizes.head_parameters * p.weights if self.full else 0
        self.base = {
            "weights": weights,
            "master weights": trained if masters else 0,
            "optimizer state": 2 * self.gradients,
            "reference": weights if setup.reference == "live" else frozen_head,
        }
        frozen = (self.full or setup.reference == "live") + (not self.full)
        if p.casts and self.keeps_copies:
            self.base["head copies"] = frozen * sizes.head_parameters * p.products

    def activations(self, batches: int = 1) -> Items:
        """Return the activations that `batches` forwards save before a backward."""
        layer, layers = self.layer, self.sizes.layers
        if self.setup.checkpointing:
            inputs = batches * layers * layer.residual
            return {"layer inputs": inputs, "norms": batches * layer.norm}
        kept = {name: batches * layers * size for name, size in layer.kept.items()}
        kept["norms"] += batches * layer.norm  # the last one, before the head
        if self.full:  # autocast makes one copy of a weight that trains
            kept["weight copies"] //= batches
        return kept

    def backward_of_layer(self, batches: int = 1) -> Items:
        """Return the activations and gradients in the backward of the last layer."""
        again = self.layer.kept if self.setup.checkpointing else {}
        return {**self.activations(batches), **again, "layer gradients": self.layer.gradients}

    @property
    def embedding_gradient(self) -> int:
        """The embedding's gradient; a tied head's beside it, and their sum."""
        one = self.sizes.head_parameters * self.precision.weights if self.full else 0
        return one * (3 if self.sizes.tied else 1)

    def moments(self) -> Iterator[tuple[str, Items]]:
        """Yield the name of each moment and the tensors alive beside `base`."""
        kept, head = self.activations(), self.sizes.head_parameters
        waiting = {"gradients": self.gradients}  # of the forget micro-batch
        if self.setup.reference != "cached":
            yield "forward of the reference", {**kept, "passing": self.layer.passing}
        yield "loss of the forget rows", {**kept, **self._loss(with_reference=True)}
        yield "loss of the retain rows", {**waiting, **kept, **self._loss(with_reference=False)}
        if self.full and self.precision.casts:
            # Autocast keeps its copies of weights that train until the forward ends.
            copies = self.sizes.layers * self.layer.kept["weight copies"]
            copies += head * self.precision.products
            yield "end of the forward", {**waiting, **kept, "weight copies": copies}
        if self.full:
            # Beside what forward left for it.
            loss = self._loss(with_reference=False)
            left = loss["chunk buffers"] if self._keeps_logits else 0
            made = loss["head gradient"] + self.precision.weights * head
            there = {**waiting, **kept, "head gradient": made, "chunk buffers": left}
            yield "backward of the loss", there
        yield "backward of a layer", {**waiting, **self.backward_of_layer()}
        yield (
            "backward of the embedding",
            {**waiting, "embedding gradient": self.embedding_gradient},
        )

    @property
    def _keeps_logits(self) -> bool:
        """Whether a head that trains gets its gradient from that of all logits, kept until
        backward, and not from float32 sums."""
        rows = round(ANSWER_SHARE * self.layer.positions)
        sizes = self.sizes.vocab, self.sizes.hidden, self.precision.products
        return self.full and is_kept(rows, *sizes)

    def _loss(self, with_reference: bool) -> Items:
        """Return the tensors of the chunk loop over logits of model and reference."""
        columns, entry = self.sizes.vocab, self.precision.products
        rows, preserved = (
            round(share * self.layer.positions) for share in (ANSWER_SHARE, PRESERVE_SHARE)
        )
        step, width = chunk_shape(rows, columns, entry) if rows else (0, 0)
        chunks = rows if self._keeps_logits else step
        chunks += min(step, preserved) * with_reference
        head = self.sizes.head_parameters
        own = head * entry if self.full and self.precision.casts else 0
        return {
            "head copies": self.base.get("head copies", 0) + own,
            "head gradient": 4 * head if self.full and not self._keeps_logits else 0,
            "chunk buffers": chunks * width * entry,
        }
