"""A tokenizer, a model and a few examples that take milliseconds, for the tests of training."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palu.data.examples import tokenize_examples
from palu.data.records import Example
from palu.demo.models import build_tokenizer

FACTS = [
    ("Where is Ada?", "Ada is in Paris now.", ((10, 15),)),
    ("Where is Bob?", "Bob is in Lisbon.", ((10, 16),)),
    ("What is it?", "It is a red fox, and a blue hen.", ((8, 15), (23, 31))),
    ("Who came?", "Nobody came.", ()),
    ("Who sang?", "Eva Long Name sang all day.", ((0, 13),)),
]


def examples(count: int = len(FACTS)) -> list[Example]:
    return [Example(str(i), q, a, spans, {}) for i, (q, a, spans) in enumerate(FACTS[:count])]


def tokenizer():
    texts = [f"Question: {q}\nAnswer: {a}" for q, a, _ in FACTS]
    return build_tokenizer(texts, vocab_size=330)


def rows(tok, count: int = len(FACTS)) -> list[dict]:
    return tokenize_examples(examples(count), tok, max_length=64)


def model(tok, seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tok),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        # Large weights: logits far enough apart that a wrong row or mask shows.
        "initializer_range": 0.3,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()
