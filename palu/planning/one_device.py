"""The moments of a step on one device that can be its peak."""

from __future__ import annotations

from collections.abc import Iterator

from palu.planning.layer import ADAPTERS, PRECISIONS, Layer
from palu.planning.model import ModelSizes
from palu.planning.setup import (
    ANSWER_SHARE,
    NO_REFERENCE,
    PRESERVE_SHARE,
    Items,
    Setup,
)
from palu_kernels.roles import chunk_shape, is_kept

MASTER = 4  # bytes of an element: see `palu.training.master_weights`


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
        references = {"live": weights, NO_REFERENCE: 0}
        # DTensor keeps the gradient of an embedding whose rows are split as a whole.
        self.embedding_rows = sizes.head_parameters * setup.tensor_parallel
        if self.full:
            entry = MASTER if masters else p.weights
            self.gradients += (self.embedding_rows - sizes.head_parameters) * entry
        self.base = {
            "weights": weights,
            "master weights": trained if masters else 0,
            "optimizer state": 2 * trained if self.full else 2 * adapters,
            "reference": references.get(setup.reference, frozen_head),
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
        one = self.embedding_rows * self.precision.weights if self.full else 0
        return one * (3 if self.sizes.tied else 1)

    def moments(self) -> Iterator[tuple[str, Items]]:
        """Yield the name of each moment and the tensors alive beside `base`."""
        kept, head = self.activations(), self.sizes.head_parameters
        waiting = {"gradients": self.gradients}  # of the forget micro-batch
        if self.setup.reference not in ("cached", NO_REFERENCE):
            yield "forward of the reference", {"passing": self.layer.passing}
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
        there = {**waiting, **self.backward_of_layer()}
        if self.full and self.sizes.tied:  # waits for the embedding's, to be added to it
            there["head gradient"] = self.precision.weights * head
        yield "backward of a layer", there
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
        if with_reference and self.setup.reference != NO_REFERENCE:
            chunks += min(step, preserved)
        head = self.sizes.head_parameters
        own = head * entry if self.full and self.precision.casts else 0
        return {
            "head copies": self.base.get("head copies", 0) + own,
            "head gradient": 4 * head if self.full and not self._keeps_logits else 0,
            "chunk buffers": chunks * width * entry,
            # Of the hidden rows, summed over the ranks that share the vocabulary.
            "exchange": 4 * rows * self.sizes.hidden * (self.setup.tensor_parallel > 1),
        }
