"""Adapters for the tests: LoRA on the small model, and kinds that cannot be used."""

from __future__ import annotations

import pytest
import torch

from palu.data.collator import Collator
from palu.models.lora import LoRASettings, add_lora
from tests.support import small

peft = pytest.importorskip("peft")

LORA = LoRASettings(rank=4, alpha=8, dropout=0.0, target="all-linear")

PROMPTS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8
    ),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1
    ),
}


def adapted(tok, *, settings=LORA, fresh=False, **config):
    """A model with an adapter that does something, unless it is to be fresh."""
    model = add_lora(small.model(tok, **config), settings, seed=1)
    if not fresh:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3, generator=generator)
    return model


def inputs(tok):
    batch = Collator(tok)(small.rows(tok))
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
