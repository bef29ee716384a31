"""Sizes of a decoder model, read from its config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from palu.models.loading import model_folder


class Family(NamedTuple):
    """How the models of one `model_type` differ from Llama."""

    qkv_bias: bool = False
    norms: int = 2  # of a layer
    float32_norms: bool = False  # the weight of a norm is multiplied in float32
    eager: bool = False  # attention that makes its scores


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "gemma2": Family(norms=4, float32_norms=True, eager=True),
}

# The sizes in the published configs of five models, for machines without access to the hub.
_FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_FIELDS += ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
_PUBLISHED = {
    "meta-llama/Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "meta-llama/Llama-3.1-70B": ("llama", 128256, 8192, 28672, 80, 64, 8, 128, False),
    "meta-llama/Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "google/gemma-2-9b": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(_FIELDS, values, strict=True)) for name, values in _PUBLISHED.items()
}
_SOFTCAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
KNOWN_MODELS["google/gemma-2-9b"] |= _SOFTCAPS


class Linear(NamedTuple):
    """A linear layer of a decoder layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class ModelSizes:
    """Widths and counts of a decoder model, and its family."""

    family: Family
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    queries: int  # width of all heads together
    tied: bool
    final_softcap: bool
    attention_softcap: bool
    linears: tuple[Linear, ...]  # of one layer

    @classmethod
    def from_config(cls, config: Any) -> ModelSizes:
        """Read a transformers config.

        Raises:
            ValueError: another `model_type` than those of FAMILIES, quantized weights, or a size
                is missing or none.
        """
        kind = getattr(config, "model_type", None)
        if kind not in FAMILIES:
            raise ValueError(
                f"model_type of the config is {kind!r}; it must be one of {', '.join(FAMILIES)}"
            )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("the config has a quantization_config; weights must not be quantized")
        family = FAMILIES[kind]
        vocab, hidden, wide = (
            _size(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")
        )
        layers, heads = (
            _size(config, name) for name in ("num_hidden_layers", "num_attention_heads")
        )
        head_dim = _size(config, "head_dim", hidden // heads)
        key_value_heads = _size(config, "num_key_value_heads", heads)
        q, kv = heads * head_dim, key_value_heads * head_dim
        bias, mlp = (bool(getattr(config, f"{n}_bias", False)) for n in ("attention", "mlp"))
        qkv = bias or family.qkv_bias
        return cls(
            family,
            vocab,
            hidden,
            wide,
            layers,
            heads,
            key_value_heads,
            q,
            bool(config.tie_word_embeddings),
            getattr(config, "final_logit_softcapping", None) is not None,
            getattr(config, "attn_logit_softcapping", None) is not None,
            (
                *(Linear(hidden, q, qkv), Linear(hidden, kv, qkv), Linear(hidden, kv, qkv)),
                Linear(q, hidden, bias and not family.qkv_bias),
                *(Linear(hidden, wide, mlp), Linear(hidden, wide, mlp), Linear(wide, hidden, mlp)),
            ),
        )

    @property
    def head_parameters(self) -> int:
        """Number of parameters of the output head, which may be the embedding too."""
        return self.vocab * self.hidden

    @property
    def linear_weights(self) -> int:
        """Number of parameters in the weights of one layer's linear layers."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def parameters(self) -> int:
        return self.root_parameters + self.layers * self.layer_parameters

    def tensor_parallel(self, ranks: int) -> ModelSizes:
        """Return the sizes of the largest part that a rank holds.

        The vocabulary (embedding and head) and the outputs of queries, keys, values and the MLP's
        first products are split, and the inputs of the products that follow them; the residual
        stream, norms, masks and the biases after a split input are whole on every rank.

        Raises:
            ValueError: a count that must be split evenly is not divisible by `ranks`.
        """
        for name, count in (
            ("attention heads", self.heads),
            ("key-value heads", self.key_value_heads),
            ("entries of the MLP", self.intermediate),
        ):
            if count % ranks:
                raise ValueError(
                    f"tensor_parallel is {ranks}; it must divide the model's {count} {name}"
                )
        if ranks > self.vocab:
            raise ValueError(
                f"tensor_parallel is {ranks}; it must be at most the vocabulary, {self.vocab}"
            )
        *columns, output, gate, up, down = self.linears
        by_output = [
            Linear(one.inputs, one.outputs // ranks, one.bias) for one in (*columns, gate, up)
        ]
        by_input = [Linear(one.inputs // ranks, one.outputs, one.bias) for one in (output, down)]
        return replace(
            self,
            vocab=-(-self.vocab // ranks),
            intermediate=self.intermediate // ranks,
            heads=self.heads // ranks,
            key_value_heads=self.key_value_heads // ranks,
            queries=self.queries // ranks,
            linears=(*by_output[:3], by_input[0], *by_output[3:], by_input[1]),
        )

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one decoder layer."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.linear_weights + biases + self.family.norms * self.hidden

    @property
    def root_parameters(self) -> int:
        """Number of parameters outside the decoder layers: embedding, last norm and head."""
        return self.head_parameters * (1 if self.tied else 2) + self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Return the number of parameters of adapters on every linear layer of the decoder."""
        return self.layers * rank * sum(one.inputs + one.outputs for one in self.linears)


def read_config(model: str) -> Any:
    """Return the config of a model folder, of a name in KNOWN_MODELS (with or without its owner;
    only what decides memory), or of a model on the hub or in its cache. Read no weights.

    Raises:
        FileNotFoundError: a folder without a `config.json`.
        ValueError: the config cannot be read, or there is none of that name.
    """
    if Path(model).is_dir():
        return _read(str(model_folder(model)), f"the config of {model!r} cannot be read")
    for name, values in KNOWN_MODELS.items():
        if model.lower() in (name.lower(), name.lower().partition("/")[2]):
            return SimpleNamespace(**values, dtype=None)
    known = ", ".join(KNOWN_MODELS)
    failed = f"{model!r} is no folder, none of {known}, and no model of the hub that can be read"
    return _read(model, failed)


def _read(source: str, failed: str) -> Any:
    from transformers import AutoConfig  # only here: the models named above wait for nothing

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of many kinds: the file is the user's, its readers are not ours
        raise ValueError(f"{failed}: {str(error).strip().splitlines()[0]}") from error


def _size(config: Any, name: str, default: int | None = None) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} of the config is {value!r}; it must be an integer of at least 1")
    return value
