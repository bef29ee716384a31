"""The moments of a step under FSDP2 that can be its peak, of one of the devices.

`fully_shard` is called on every decoder layer and on the model, whose group is what remains: the
embedding, the last norm and the head. A layer is whole while it runs; the root group from the
beginning of a forward to the end of its backward, its gradients too. Gathering takes a flat buffer
beside the parameters that are copied out of it, reducing one beside the gradients; while a layer
runs backward, that of the layer before it is gathered already.

The loss is computed in the head's forward, after that of the reference, whose groups are resharded
after use; of its head there is a copy (`palu.whole_head`).
"""

from __future__ import annotations

from collections.abc import Iterator

from palu.planning.layer import ADAPTERS, PRECISIONS, Layer
from palu.planning.model import ModelSizes
from palu.planning.one_device import Step
from palu.planning.setup import Items, Setup


class ShardedStep(Step):
    """The moments of a step of which `setup.data_parallel` devices hold a share each."""

    has_masters = False  # FSDP shards what the optimizer steps on
    keeps_copies = False  # parameters are gathered in the dtype of products

    def __init__(self, sizes: ModelSizes, setup: Setup) -> None:
        super().__init__(sizes, setup)
        stored = self.precision
        self.casts, self.stored = stored.casts, stored.weights
        self.precision = PRECISIONS["bfloat16"] if stored.casts else stored
        entry = self.precision.products
        adapter = entry if stored.casts else ADAPTERS
        shape = setup.batch_size, setup.length, not self.full
        self.layer = Layer(sizes, self.precision, *shape, adapter)
        adapters = sizes.lora_parameters(setup.lora_rank) * adapter
        self.whole_layer = sizes.layer_parameters * entry + adapters // sizes.layers
        self.whole_root = sizes.root_parameters * entry
        self.layer_gradient = self.whole_layer if self.full else adapters // sizes.layers
        self.root_gradient = self.whole_root if self.full else 0
        self.head_gradient = sizes.head_parameters * entry if self.full else 0
        # A head that a cache brings is a plain tensor, whole on every device.
        cached_head = self.base["reference"] if setup.reference == "cached" else 0
        self.base = {
            name: size if name == "reference" and cached_head else size // setup.data_parallel
            for name, size in self.base.items()
        }
        if self.full:
            self.gradients = sizes.parameters * stored.weights
        self.gradients //= setup.data_parallel

    def moments(self) -> Iterator[tuple[str, Items]]:
        """Yield the name of each moment and the tensors alive beside `base`."""
        kept, layer, root = self.activations(), self.whole_layer, self.whole_root
        live = self.setup.reference == "live"
        waiting = {"gradients": self.gradients}
        if live or self.setup.reference == "adapter_off":
            whole = {"whole root": root, "whole layers": 2 * layer, "passing": self.layer.passing}
            yield "forward of the reference", whole
        entry = self.precision.products
        compared = {
            "reference head": live * self.sizes.head_parameters * entry,
            "reference rows": live * self.layer.residual,
        }
        yield "gathering of the root", {"whole root": 2 * root, **compared}
        # The last layer's buffer is given back with the root.
        there = {**kept, "whole layers": layer}
        there["whole root"] = root
        loss = self._loss(with_reference=True)
        yield "loss of the forget rows", {**there, **compared, **loss}
        there |= waiting
        loss = self._loss(with_reference=False)
        yield "loss of the retain rows", {**there, **loss}
        backward = {**waiting, "whole root": root, "head gradient": self.head_gradient}
        left = loss["chunk buffers"] if self._keeps_logits else 0
        made = {"head gradient": self.head_gradient + loss["head gradient"], "chunk buffers": left}
        yield "backward of the loss", {**backward, **kept, **made, "whole layers": layer}
        yield "backward of a layer", {**backward, **self.backward_of_layer(), **self._in_backward}
        yield "reduction of a layer", {**backward, **self._reducing}
        if self.full:
            there = {"whole root": root, "embedding gradient": self.embedding_gradient}
            there["head gradient"] = 0 if self.sizes.tied else self.head_gradient
            if self.setup.tensor_parallel > 1:  # this rank's rows of it, made of the whole
                there["embedding gradient"] += self.head_gradient
            there["reductions"] = self.layer_gradient
            yield "backward of the embedding", {**waiting, **there}
        yield "reduction of the root", {**waiting, "reductions": self._root_reduction}

    @property
    def _root_reduction(self) -> int:
        """The root's gradients and the buffer that they are copied into; or that buffer, the head's
        gradient, which autograd holds until backward ends, and the share that comes out, also in
        the dtype of the weights."""
        share = self.root_gradient // self.setup.data_parallel
        copied = share * self.stored // self.precision.weights if self.casts else 0
        after = self.root_gradient + self.head_gradient + share + copied
        return max(2 * self.root_gradient, after)

    @property
    def _in_backward(self) -> Items:
        """The layer and the one before it, which is gathered while this one runs."""
        return {"whole layers": 2 * self.whole_layer}

    @property
    def _reducing(self) -> Items:
        """After the last layer's backward: its activations are gone, its gradients are there
        twice."""
        kept, gone = self.activations(), self.layer.kept
        if self.setup.checkpointing:
            gone = {"layer inputs": self.layer.residual}
        left = {name: size - gone.get(name, 0) for name, size in kept.items()}
        return {
            **left,
            "layer gradients": self.layer.residual,
            "whole layers": self.whole_layer,
            "reductions": 2 * self.layer_gradient,
        }
