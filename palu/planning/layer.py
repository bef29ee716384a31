"""Bytes of a decoder layer: activations that its forward saves, gradients, transient memory.

The formulas say what PyTorch's autograd saves for the operators that transformers' modules run;
`benchmarks/memory/model.py` checks them on small models. Examples of a batch differ in length, so
attention gets a mask. What is less than a hundredth of a layer is left out.
"""

from __future__ import annotations

from typing import NamedTuple

from palu.planning.model import ModelSizes


class Precision(NamedTuple):
    """Bytes of an element."""

    weights: int  # and of the residual stream
    products: int  # of inputs and outputs of matrix products

    @property
    def casts(self) -> bool:
        """Whether autocast copies the inputs of matrix products."""
        return self.products != self.weights

    @property
    def copy(self) -> int:
        """Of a copy of a float32 tensor in the products' dtype: none where that is float32."""
        return self.products if self.products != 4 else 0


PRECISIONS = {
    "float32": Precision(4, 4),
    "bfloat16": Precision(2, 2),
    "autocast": Precision(4, 2),  # float32 weights under bfloat16 autocast
}
ADAPTERS = 4  # bytes of an element: PEFT keeps adapters in float32


class Layer(NamedTuple):
    """A decoder layer and a batch; `adapters`: LoRA on all linear layers, the rest frozen."""

    sizes: ModelSizes
    precision: Precision
    batch_size: int
    length: int
    adapters: bool
    adapter_entry: int = ADAPTERS  # bytes

    @property
    def positions(self) -> int:
        return self.batch_size * self.length

    @property
    def residual(self) -> int:
        """The layer's input."""
        return self.positions * self.sizes.hidden * self.precision.weights

    @property
    def norm(self) -> int:
        """A norm's input in float32; the gradient of its weight needs the normed input too."""
        normed = 4 if self.sizes.family.float32_norms else self.precision.weights
        return self.positions * self.sizes.hidden * (4 + (0 if self.adapters else normed))

    @property
    def kept(self) -> dict[str, int]:
        """Activations saved for backward, by kind."""
        sizes, entry = self.sizes, self.precision.products
        # Queries, and keys and values repeated for every query head; sdpa's result too.
        tensors, squares = (3, "attention scores") if sizes.family.eager else (4, "attention masks")
        return {
            "norms": sizes.family.norms * self.norm,
            "attention": self.positions * entry * tensors * sizes.queries,
            squares: self._squares,
            # Into and out of the activation, and the other factor.
            "mlp": self.positions * entry * 3 * sizes.intermediate,
            "linear inputs": self._linear_inputs,
            "weight copies": entry * sizes.linear_weights if self.precision.casts else 0,
        }

    @property
    def _squares(self) -> int:
        """Eager: every head's softmax output in float32, its copy in the values' dtype and the tanh
        of a softcap. sdpa: the mask as numbers, which every layer makes for itself."""
        p, squares = self.precision, self.positions * self.length
        if not self.sizes.family.eager:
            return squares * p.products
        capped = p.products if self.sizes.attention_softcap else 0
        return squares * self.sizes.heads * (4 + p.copy + capped)

    @property
    def _linear_inputs(self) -> int:
        """Inputs of linear layers, for the gradients of weights or adapters. Autocast makes a copy
        for every layer that reads float32, PEFT one in float32 for every one that reads
        bfloat16."""
        sizes, p = self.sizes, self.precision
        copied = p.casts or (self.adapters and p.weights != self.adapter_entry)
        entry = self.adapter_entry if self.adapters and not p.casts else p.products
        width = (5 if copied else 2) * sizes.hidden + sizes.intermediate
        if sizes.family.eager or (self.adapters and copied):  # else sdpa keeps it anyway
            width += sizes.queries
        return self.positions * entry * width

    @property
    def gradients(self) -> int:
        """Peak of the gradients in the layer's backward, less what is freed of `kept` by then: at
        the product of the MLP's two factors, or at the softmax of eager attention."""
        sizes, p = self.sizes, self.precision
        largest = self.positions * 2 * p.products * sizes.intermediate
        if self.adapters and self.adapter_entry != p.products:  # that return from PEFT's copies
            largest += self.positions * sizes.hidden * (2 * self.adapter_entry + p.copy)
        if sizes.family.eager:
            scores = self.positions * self.length * sizes.heads * (8 - p.copy)
            freed = sum(self.kept[name] for name in ("norms", "mlp", "linear inputs"))
            largest = max(largest, scores - freed)
        return self.residual + largest

    @property
    def passing(self) -> int:
        """Peak transient memory of a no-grad forward: the largest of the MLP's factors and product,
        PEFT's copies, and softmax input plus output."""
        sizes, p = self.sizes, self.precision
        entry = p.products
        if self.adapters:
            entry = 2 * (p.products if p.casts else self.adapter_entry)
        largest = self.positions * (2 * p.products + entry) * sizes.intermediate
        if sizes.family.eager:
            scores = self.positions * self.length * sizes.heads
            largest = max(largest, scores * (p.weights + (4 if p.weights != 4 else 0) + 4))
        return 2 * self.residual + largest
