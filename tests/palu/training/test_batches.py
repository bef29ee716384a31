"""Examples become tokens, and tokens become batches."""

import pytest
import torch

from palu.data.collator import Collator
from palu.data.examples import tokenize_examples
from palu.data.labels import label_example
from palu.data.records import Example
from palu.data.template import Template

EXAMPLES = [
    Example("a", "Who wrote it?", "Basil Mahfouz Al-Kuwaiti.", ((0, 5), (14, 24))),
    Example("b", None, "Astana is a city.", ((0, 6),)),
    Example("c", "Where?", "Chile.", ()),
]


def test_tokenize_examples(any_tokenizer):
    rows = tokenize_examples(EXAMPLES, any_tokenizer, max_length=200)
    assert [type(row) for row in rows] == [dict] * 3
    for example, row in zip(EXAMPLES, rows, strict=True):
        assert row.pop("example_id") == example.id
        arguments = (example.question, example.answer, example.spans)
        assert row == label_example(any_tokenizer, *arguments, max_length=200)


def test_tokenize_examples_warns_once_of_lost_spans(byte_tokenizer):
    whole = tokenize_examples(EXAMPLES, byte_tokenizer, max_length=200)
    first = next(i for i, label in enumerate(whole[0]["labels"]) if label >= 0)
    with pytest.warns(UserWarning) as caught:
        cut = tokenize_examples(EXAMPLES, byte_tokenizer, max_length=first + 1)
    assert len(caught) == 1
    assert f"2 of 3 spans, in 1 of 3 examples, lost tokens to max_length={first + 1}" in str(
        caught[0].message
    )
    lengths = [len(row["input_ids"]) for row in whole]
    left = sum(max(0, length - first - 1) for length in lengths)
    said = f"{sum(n > first + 1 for n in lengths)} of 3 examples are cut at max_length={first + 1}"
    assert f"{said}: {left} tokens are left out" in str(caught[0].message)
    assert len(cut[0]["input_ids"]) == first + 1
    with pytest.raises(
        ValueError,
        match=f"max_length={first - 1} leaves no token of the answer in 1 of 3 examples: 'a';",
    ):
        tokenize_examples(EXAMPLES, byte_tokenizer, max_length=first - 1)


def test_texts_without_spans_are_not_cut_in_silence(byte_tokenizer):
    texts = [Example("a", None, "Kuwait" + " Kuwait" * 40), Example("b", "Who?", "Basil.")]
    with pytest.warns(UserWarning) as caught:
        tokenize_examples(texts, byte_tokenizer, max_length=40, source="kept.jsonl")
    lost = len(byte_tokenizer(texts[0].answer)["input_ids"]) + 1 - 40
    said = f"kept.jsonl: 1 of 2 examples are cut at max_length=40: {lost} tokens are left out"
    assert [str(warning.message) for warning in caught] == [said] and lost > 0
    texts[0] = Example("a", None, "Kuwait " * 9_000)
    with pytest.warns(UserWarning, match=r"1 of 2 examples .*: at least \d\d+ tokens are left out"):
        tokenize_examples(texts, byte_tokenizer, max_length=40)


def test_tokenize_examples_names_the_example(byte_tokenizer, chatml_tokenizer):
    with pytest.raises(ValueError, match="examples must not be empty"):
        tokenize_examples([], byte_tokenizer, max_length=99)
    bad = Example("x7", "Who?", "Basil", ((0, 9),))
    with pytest.raises(ValueError, match=r"example 'x7': spans\[0\] is \[0, 9\)"):
        tokenize_examples([*EXAMPLES, bad], byte_tokenizer, max_length=99)
    with pytest.raises(TypeError, match="example 'a': tokenizer must be a fast tokenizer"):
        tokenize_examples(EXAMPLES, object(), max_length=99)
    rows = tokenize_examples(
        EXAMPLES, chatml_tokenizer, max_length=99, template=Template(chat=False)
    )
    assert chatml_tokenizer.decode(rows[2]["input_ids"]).startswith("Question: Where?")


def test_collator_masks_by_length(chatml_tokenizer):
    # The pad token is the end of turn, which stands inside the examples too.
    rows = tokenize_examples(EXAMPLES, chatml_tokenizer, max_length=99)
    batch = Collator(chatml_tokenizer)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    longest = max(len(row["input_ids"]) for row in rows)
    pad = chatml_tokenizer.pad_token_id
    for value in batch.values():
        assert value.shape == (3, longest) and value.dtype == torch.int64
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        padding = longest - length
        assert batch["input_ids"][number].tolist() == row["input_ids"] + [pad] * padding
        assert batch["labels"][number].tolist() == row["labels"] + [-100] * padding
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * padding
        assert pad in row["input_ids"]


def test_collator_options(byte_tokenizer, all_tokenizers):
    rows = tokenize_examples(EXAMPLES, byte_tokenizer, max_length=99)
    batch = Collator(byte_tokenizer, keep_ids=True, pad_to_multiple_of=16)(rows)
    assert batch["example_id"] == ["a", "b", "c"]
    assert batch["input_ids"].shape[1] % 16 == 0
    tensors = [{key: torch.tensor(row[key]) for key in ("input_ids", "labels")} for row in rows]
    for key, value in Collator(byte_tokenizer, pad_to_multiple_of=16)(tensors).items():
        assert torch.equal(value, batch[key])
    pads = {name: Collator(tokenizer).pad_id for name, tokenizer in all_tokenizers.items()}
    assert pads["byte_bpe"] == byte_tokenizer.eos_token_id
    assert pads["byte_bpe_full"] == all_tokenizers["byte_bpe_full"].pad_token_id
    assert pads["unigram"] == 0 and Collator(7).pad_id == 7


def test_collator_refuses(byte_tokenizer):
    collator = Collator(0, keep_ids=True)
    good = {"input_ids": [1, 2], "labels": [-100, 2], "example_id": "a"}
    for features, words in [
        ([], "a batch needs at least one example"),
        ([good, {"input_ids": [1], "example_id": "b"}], "example 1 of the batch has no 'labels'"),
        ([{"input_ids": [1], "labels": [1]}], "example 0 of the batch has no 'example_id'"),
        ([{**good, "labels": [1]}], "example 0 of the batch has 2 input_ids but 1 labels"),
    ]:
        with pytest.raises(ValueError, match=words):
            collator(features)
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer or the id to pad with, not"):
        Collator("left")
    with pytest.raises(ValueError, match="padding id must be 0 or more, got -1"):
        Collator(-1)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be 1 or more, got 0"):
        Collator(0, pad_to_multiple_of=0)
