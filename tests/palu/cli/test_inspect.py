"""What a person sees before a run: in colour, and the same without."""

import io
import json

import pytest
from rich.console import Console

from palu.cli.inspect import inspect_file, legend, render
from palu.data.labels import label_example
from palu.data.roles import KEEP

ANSWER = "It is Basil Mahfouz Al-Kuwaiti of 東京."
SPANS = [(6, 30), (34, 36)]


def styles(text):
    """Which style each character of a text has."""
    marks = [""] * len(text.plain)
    for span in text.spans:
        marks[span.start : span.end] = [span.style] * (span.end - span.start)
    return marks


def test_marks_and_colours_say_the_same(byte_tokenizer):
    example = label_example(byte_tokenizer, "Who?", ANSWER, SPANS, max_length=99)
    text = render(example, byte_tokenizer, 1, byte_tokenizer.eos_token_id)
    body, counts = text.plain.rsplit("\n", 1)
    assert body.startswith("Question: Who?\nAnswer: It is")
    unmarked = body
    for mark in ("[[", "]]", "((", "))", "|"):
        unmarked = unmarked.replace(mark, "")
    assert unmarked == byte_tokenizer.decode(example["input_ids"]).replace("|", "")
    assert body.count("[[") == body.count("((") == 2
    marks = styles(text)
    forget = {style for style, c in zip(marks, text.plain, strict=True) if "red" in style}
    assert len(forget) == 1 and len({style for style in marks if style}) == 5
    for character in range(body.index("[["), body.index("]]") + 2):
        assert "red" in marks[character]
    for character in range(body.index("(("), body.index("))") + 2):
        assert "yellow" in marks[character]
    sensitive = sum(label >= 0 for label in example["labels"])
    keep = example["labels"].count(KEEP)
    assert counts == (
        f"{len(example['input_ids'])} tokens: 2 forget, {sensitive - 2} past the prefix, "
        f"{keep} preserve, {example.answer_start} prompt"
    )


def test_prefix_length(byte_tokenizer):
    example = label_example(byte_tokenizer, "Who?", ANSWER, SPANS, max_length=99)
    whole = render(example, byte_tokenizer, 0, None).plain
    assert "((" not in whole and whole.count("[[") == 2
    assert " 0 past the prefix" in whole
    two = render(example, byte_tokenizer, 2, None).plain
    assert "4 forget" in two


def test_text_of_every_tokenizer_is_whole(any_tokenizer):
    example = label_example(any_tokenizer, "Who?", ANSWER, SPANS, max_length=200)
    body = render(example, any_tokenizer, 3, any_tokenizer.eos_token_id).plain.rsplit("\n", 1)[0]
    for mark in ("[[", "]]", "((", "))", "|"):
        body = body.replace(mark, "")
    decoded = any_tokenizer.decode(example["input_ids"], clean_up_tokenization_spaces=False)
    for mark in ("[[", "]]", "((", "))", "|"):
        decoded = decoded.replace(mark, "")
    assert body == decoded
    assert "\ufffd" not in body


def test_a_text_cut_within_a_character_is_shown(byte_tokenizer):
    example = label_example(byte_tokenizer, None, "a 東", [(2, 3)], max_length=99)
    cut = {key: value[:3] for key, value in example.items()}  # `a`, a space, one of three bytes
    body = render(cut, byte_tokenizer, 3).plain
    assert body.startswith("<<a>> ") and "[[\ufffd]]" in body


def test_control_characters_do_not_reach_the_terminal(byte_tokenizer):
    example = label_example(
        byte_tokenizer, None, "a\x1b[31mred\x07 [bold]b", [(0, 1)], max_length=99
    )
    body = render(example, byte_tokenizer, 3).plain
    assert "\\x1b[31mred\\x07 [bold]b" in body and "\x1b" not in body


def test_a_token_that_is_never_predicted(byte_tokenizer):
    example = label_example(byte_tokenizer, None, "Kuwait City", [(7, 11)], max_length=99)
    assert example["labels"][0] == KEEP
    text = render(example, byte_tokenizer, 0).plain
    assert text.startswith("<<") and text.endswith("0 prompt, 1 never predicted")
    example = label_example(byte_tokenizer, None, "Kuwait City", [(0, 6)], max_length=99)
    text = render(example, byte_tokenizer, 0).plain
    assert text.startswith("<|endoftext|>[[") and text.endswith(" 1 prompt")
    text = render({"input_ids": [40, 41], "labels": [40, 41]}, byte_tokenizer, 0).plain
    assert text.startswith("<<") and "1 forget, 0 past the prefix" in text


def test_lengths_must_agree(byte_tokenizer):
    with pytest.raises(ValueError, match="3 input_ids but 2 labels"):
        render({"input_ids": [1, 2, 3], "labels": [1, 2]}, byte_tokenizer, 3)


def piped(width=80):
    return Console(file=io.StringIO(), width=width, color_system=None)


def test_inspect_file(tmp_path, llama3_tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [
        {"question": f"Q{n}?", "answer": ANSWER, "spans": SPANS, "id": f"row-{n}"} for n in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = piped()
    inspect_file(path, llama3_tokenizer, console=console)
    shown = console.file.getvalue()
    assert "\x1b" not in shown and legend().plain.split("  ")[0] in shown
    assert [f"row-{n} (2 spans)" in shown for n in range(7)] == [True] * 5 + [False] * 2
    assert shown.count("[[") == 2 * 5 + 1 and "<|eot_id|>" in shown
    console = piped()
    inspect_file(f"{path}[-1:]", llama3_tokenizer, console=console, prefix_length=1, limit=None)
    assert "row-6" in console.file.getvalue() and "row-0" not in console.file.getvalue()
    assert "2 forget" in console.file.getvalue()


def test_inspect_file_of_rows_without_spans(tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "Nothing to forget."}))
    console = piped()
    inspect_file(path, byte_tokenizer, console=console)
    assert "--- 0 (0 spans) ---" in console.file.getvalue()
    assert "0 forget, 0 past the prefix" in console.file.getvalue()


def test_colour_on_a_terminal(byte_tokenizer):
    example = label_example(byte_tokenizer, "Who?", ANSWER, SPANS, max_length=99)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    console.print(render(example, byte_tokenizer, 1, None))
    assert "\x1b[" in console.file.getvalue()
