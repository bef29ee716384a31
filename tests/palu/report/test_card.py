"""The model card: what it says, that it can be read as a card, and whose README it replaces."""

import json

import pytest

from palu.report import build_report, write_card
from tests.support import erasure


def front_matter(text):
    """The card's YAML, of the few forms that it has."""
    _, head, _ = text.split("---\n", 2)
    found, key = {}, None
    for line in head.splitlines():
        if line.startswith("- "):
            found[key].append(line[2:])
        else:
            key, value = line.split(":", 1)
            found[key] = json.loads(value) if value.startswith(' "') else value.strip() or []
    return found


def test_a_whole_model(tmp_path):
    model = erasure.write(tmp_path)
    text = write_card(model).read_text()
    head = front_matter(text)
    assert head["base_model"] == "chat-model" and head["library_name"] == "transformers"
    assert "unlearning" in head["tags"] and "lora" not in head["tags"]
    assert "made to forget 12 marked passages in 6 of 6 records" in text
    assert "**Not erased: an attack still brings secrets out.**" in text
    assert "| To forget: Probability of the sensitive words | 0.980 | 0.020 | 0.015 |" in text
    # Of the page's content where there is one: whatever the folder has by now.
    report = build_report(model)
    (model / "evaluation.json").unlink()
    assert write_card(model, content=report).read_text() == text != write_card(model).read_text()
    assert "AutoModelForCausalLM" in text and "peft" not in text and "vllm serve FOLDER" in text
    assert "reference cache" in text and "derived from what was erased" in text
    assert "| torch | 2.13.0 |" in text and "1" * 64 in text
    assert "forget.jsonl" not in text and "retain.jsonl" not in text  # no file of the data


def test_an_adapter(tmp_path):
    record = erasure.record() | {"lora": {"rank": 16}, "base_model": "org/base"}
    model = erasure.write(tmp_path, palu=record)
    (model / "adapter_config.json").write_text("{}")
    (model / "README.md").write_text("# Model Card\n[More Information Needed]")  # PEFT's
    text = write_card(model).read_text()
    head = front_matter(text)
    assert head["base_model"] == "org/base" and head["library_name"] == "peft"
    assert "switch the adapter off" in text and "AutoPeftModelForCausalLM" in text
    assert "--lora-modules" in text and "`palu merge`" in text and "Information Needed" not in text
    write_card(model)  # its own is written anew


def test_names_are_no_markup(tmp_path):
    record = erasure.record() | {"base_model": "a: b\n- [x](y) <script> `|"}
    text = write_card(erasure.write(tmp_path, palu=record)).read_text()
    assert front_matter(text)["base_model"] == record["base_model"]
    assert "<script>" not in text.split("---\n", 2)[2] and "[x](y)" not in text.split("---\n", 2)[2]


def test_what_is_refused(tmp_path):
    model = erasure.write(tmp_path)
    (model / "README.md").write_text("# My notes")
    with pytest.raises(FileExistsError, match=r"README[.]md was not written by palu"):
        write_card(model)
    (model / "README.md").unlink()
    (model / "palu.json").unlink()
    with pytest.raises(ValueError, match=r"has no palu[.]json"):
        write_card(model)
