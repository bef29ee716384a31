"""Tiny random models of many families, their logits large enough for a cap to show.

`make(name)` gives one; `FAMILIES` lists the names that the installed transformers knows.
"""

from __future__ import annotations

import copy
import functools

import torch
import transformers
from torch import nn

from palu.models.head_check import why_not_fusable
from palu.models.lm_head import LMHead
from palu_kernels.reference import head_logits

VOCAB = 101  # odd
PEAK = 30.0  # the largest logit on its way into the cap; the caps below are smaller

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {k: v for k, v in _SMALL.items() if k != "head_dim"} | {"n_inner": 24, "rotary_dim": 4}
_MLA = {k: v for k, v in _SMALL.items() if k != "head_dim"} | {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_TIED = {"tie_word_embeddings": True}

# name -> prefix of the classes, settings
_MAKERS = {
    "llama": ("Llama", _SMALL),
    "llama_tied": ("Llama", _SMALL | _TIED),
    "qwen2": ("Qwen2", _SMALL),
    "qwen3": ("Qwen3", _SMALL | _TIED),
    "mistral": ("Mistral", _SMALL),
    "gemma2": ("Gemma2", _SMALL | _TIED | {"final_logit_softcapping": 12.0}),
    "gemma3": ("Gemma3", _SMALL | _TIED | {"final_logit_softcapping": 9.0}),
    "cohere": ("Cohere", _SMALL | _TIED | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", _SMALL | _TIED | {"logit_scale": 0.3}),
    "granite": ("Granite", _SMALL | {"logits_scaling": 6.0}),
    "phi": ("Phi", _SMALL),
    "gptj": ("GPTJ", _GPT),
    "gpt2": ("GPT2", _GPT | _TIED),
    "gpt_neox": ("GPTNeoX", _SMALL),
    "phi3": ("Phi3", _SMALL),
    "recurrent_gemma": (
        "RecurrentGemma",
        _SMALL | _TIED | {"logits_soft_cap": 11.0, "num_hidden_layers": 3},
    ),
    "nanochat": ("NanoChat", _SMALL),
    "hyperclovax": ("HyperCLOVAX", _SMALL | {"logits_scaling": 0.25}),
    "minicpm3": ("MiniCPM3", _MLA | {"dim_model_base": 8}),
}
CAPPED = ("gemma2", "gemma3", "recurrent_gemma", "nanochat")
SCALED = ("cohere", "cohere2", "granite", "hyperclovax")
BIASED = ("phi", "gptj")


def _config_class(name: str) -> str:
    return "Gemma3TextConfig" if name == "gemma3" else f"{_MAKERS[name][0]}Config"


FAMILIES = [name for name in _MAKERS if hasattr(transformers, _config_class(name))]


def make(name: str) -> nn.Module:
    """In float32 and evaluation mode, no parameter zero or one everywhere."""
    return copy.deepcopy(_made(name))


@functools.cache
def _made(name: str) -> nn.Module:
    kind, settings = _MAKERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, _config_class(name))(**settings)
    model_class = "GPT2LMHeadModel" if name == "gpt2" else f"{kind}ForCausalLM"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        _raise_logits(model)
    return model


def batch(left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[3, 9]`, one row padded on the right or left."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    padding = slice(0, 4) if left else slice(5, 9)
    mask[1, padding] = 0
    ids[1, padding] = 0
    return ids, mask


class Wrapper(nn.Module):
    """Calls its module and counts."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def fusable_head(model: nn.Module, *batch: torch.Tensor, **more: torch.Tensor) -> LMHead | None:
    """The head, where losses may be computed from the rows that enter it."""
    return LMHead.from_model(model) if why_not_fusable(model, *batch, **more) is None else None


def hooks_of(model: nn.Module) -> int:
    """Forward hooks on the output embedding."""
    module = model.get_output_embeddings()
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def _raise_logits(model: nn.Module) -> None:
    """Scales the head until the largest product with it is PEAK, and gives it a bias that shows.

    A tied head changes the rows that enter it, so in a few rounds.
    """
    module = model.get_output_embeddings()
    entered = []
    handle = module.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    for _ in range(4):
        model(batch()[0])
        product = head_logits(entered.pop(), module.weight)
        module.weight.mul_(PEAK / product.abs().max())
    handle.remove()
    if module.bias is not None:
        module.bias.copy_(torch.randn_like(module.bias) * 3)
