"""What is asked of a prediction: how a model is trained, and on how many devices."""

from __future__ import annotations

from dataclasses import dataclass

from palu.planning.layer import PRECISIONS

REFERENCES = ("live", "adapter_off", "cached")
NO_REFERENCE = "none"  # of a method that compares with no original
# Share of all positions that carry a loss, and of the forget examples' that are preserved: TOFU's
# forget10 at `prefix_length` 3. They size the chunk buffers, which do not grow beyond 256 MiB.
ANSWER_SHARE, PRESERVE_SHARE = 0.33, 0.27
GIB = 2**30

Items = dict[str, int]  # bytes by kind of tensor


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Args:
        batch_size: forget examples, and as many retain examples; of one data-parallel rank.
        length: tokens of a padded example.
        dtype: `float32`, `bfloat16` (weights and all), or `autocast` (bfloat16 autocast over
            float32 weights).
        lora_rank: 0 trains every weight; else of LoRA adapters on all linear layers of the decoder
            layers, everything else frozen.
        reference: `live` (a second model), `adapter_off` (LoRA), `cached`, or `none` where no term
            needs one.
        checkpointing: whether each decoder layer is computed again in backward.
        devices: of the run; more than one shard the model by FSDP2 (`fully_shard` of every decoder
            layer and of the model), and `autocast` is its policy of bfloat16 parameters and
            reductions over float32 shards.
        tensor_parallel: devices over which the vocabulary and every layer's matrices are split; the
            other factor of `devices` is the data-parallel dimension, over which FSDP2 shards.

    Raises:
        ValueError: an argument is not as above.
    """

    batch_size: int = 8
    length: int = 512
    dtype: str = "bfloat16"
    lora_rank: int = 0
    reference: str = "live"
    checkpointing: bool = False
    devices: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        counts = {"batch_size": 1, "length": 2, "lora_rank": 0, "devices": 1, "tensor_parallel": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
        references = (*REFERENCES, NO_REFERENCE)
        for name, choices in (("dtype", tuple(PRECISIONS)), ("reference", references)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        if self.reference == "adapter_off" and not self.lora_rank:
            raise ValueError("reference is 'adapter_off' and lora_rank 0; it must be at least 1")
        if self.devices % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}; it must divide devices, {self.devices}"
            )

    @property
    def data_parallel(self) -> int:
        """Number of ranks that share the weights, each with a batch of its own."""
        return self.devices // self.tensor_parallel
