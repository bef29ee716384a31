"""The examples in README run as they stand there."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from palu.data import Collator, load_examples, tokenize_examples
from palu.demo_models import build_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
RECORDS = [json.loads(line) for line in re.findall(r'^\{"(?:question|text)".*\}$', README, re.M)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The names that the examples take for granted, small; README's own two records as data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    tokenizer = build_tokenizer([json.dumps(record) for record in RECORDS], vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = tokenize_examples(
        load_examples("forget.jsonl", require_spans=True), tokenizer, max_length=64
    )
    return {
        "tokenizer": tokenizer,
        "model": model,
        "torch": torch,
        "frozen_original": copy.deepcopy(model).eval(),
        "forget_loader": [Collator(tokenizer)(rows)] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


def test_there_are_three_examples_and_two_records():
    assert len(PYTHON) == 3 and len(RECORDS) == 2


@pytest.mark.parametrize("number", range(3))
def test_example_runs_and_trains(number, world, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = copy.deepcopy(world["model"].state_dict())
    exec(compile(PYTHON[number], f"README.md, example {number + 1}", "exec"), world)
    after = world["model"].state_dict()
    assert any(not torch.equal(before[name], after[name].cpu()) for name in before)
