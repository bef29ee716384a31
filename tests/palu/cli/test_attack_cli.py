"""`palu attack` as a user meets it: tables, files, exit statuses, refusals."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.unlearn import save_model
from tests.support import planted
from tests.support.command import palu_in, refusal

LINE = "attack --model known --forget forget.jsonl --device cpu --quick --max-new-tokens 24 "


def record(example):
    spans = [{"start": start, "end": end} for start, end in example.spans]
    return {
        "id": example.id,
        "question": example.question,
        "answer": example.answer,
        "spans": spans,
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    for name, model in {"known": planted.knows_all(), "never": planted.never_saw()}.items():
        save_model(folder / name, model, planted.tokenizer(), Template(), made_by="test")
    write_jsonl(folder / "forget.jsonl", [record(e) for e in planted.FORGET])
    write_jsonl(folder / "retain.jsonl", [record(e) for e in planted.RETAIN])
    return folder


@pytest.fixture
def palu(work, monkeypatch, capsys):
    return palu_in(work, monkeypatch, capsys)


def test_table_and_file(palu, work, monkeypatch):
    monkeypatch.setattr("palu.terminal.out._width", 80)
    status, said, _ = palu(
        LINE + "--attacks greedy,sampling,membership_inference --retain retain.jsonl "
        "--original known --retrained never --output out.json --model never"
    )
    assert status == 0
    lines = said.splitlines()
    table = [line for line in lines if line.startswith(("│", "┃", "┏"))]
    assert table and max(map(len, table)) <= 80
    assert "8/8 100%" in said and "0/8 0% (0-32%)" in said and "AUC" in said
    assert "Worst leak: no attack: greedy answers: 0 of 8 secrets" in said
    content = json.loads((work / "out.json").read_text())
    assert content["format"] == "palu-attack/1" and [*content["models"]] == [
        "unlearned",
        "original",
        "retrained",
    ]
    assert "Lund" not in said + json.dumps(content)


def test_worst_leak_above_the_limit(palu, work):
    line = LINE + "--attacks greedy --seed 1 "
    status, said, error = palu(line + "--max-leak 0.5")
    assert status == 3 and "leak: no attack: greedy answers: 8 of 8 secrets (100.0%)" in error
    assert (work / "known" / "attack.json").is_file() and "8/8 100%" in said
    assert palu(line + "--max-leak 1")[0] == 0  # goes on, and is not above
    assert palu(LINE + "--attacks greedy --overwrite --show-secrets")[0] == 0
    assert "Lund" in (work / "known" / "attack.json").read_text()


def test_an_adapter(palu, work):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True)
    model = planted.knows_all()
    model.name_or_path = str(work / "known")
    adapter = get_peft_model(model, config)
    adapter.peft_config["default"].base_model_name_or_path = str(work / "known")
    adapter.save_pretrained(work / "adapter")
    line = LINE.replace("--model known", "--model adapter")
    status, said, error = palu(line + "--attacks greedy,quantization --original known")
    assert status == 0, error
    assert said.count("8/8 100%") >= 3 and (work / "adapter" / "attack.json").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--attacks greedy,guess", "--attacks has 'guess'; it must be of greedy, prefix_forcing"),
        ("--max-leak 5", "--max-leak is 5.0; it must be between 0 and 1"),
        ("--samples 0", "--samples is 0; it must be at least 1"),
        ("--temperatures 0.5,hot", "--temperatures '0.5,hot' must be numbers with commas"),
        ("--relearning-rates 0", "--relearning-rates must be finite and above 0, got 0.0"),
        ("--original nowhere", "model folder 'nowhere' does not exist"),
        ("--output known", "--output 'known' is a folder; name a file in it"),
        ("--output forget.jsonl", "palu attack did not write it"),
        ("--output known/config.json", "palu attack did not write it"),
        ("--holdout nothing.jsonl", "nothing.jsonl: no such file"),
        ("--device abacus", "device must be auto, cpu"),
    ],
)
def test_refusals(palu, more, said):
    assert said in refusal(palu, LINE + more)
