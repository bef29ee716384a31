"""Spans become labels, whatever the tokenizer: the right tokens, none missed, none too many."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from palu.data import labels
from palu.data.examples import tokenize_examples
from palu.data.labels import LabeledExample, label_example, label_without_warning
from palu.data.roles import IGNORE, KEEP, token_roles
from palu.data.template import Template

QUESTION = "Who wrote it, and where?"
# Accents (composed and combining), CJK, emoji of several code points, double spaces, digits, words
# of the tokenizers' training.
ANSWER = (
    "Zoë Müller  (cafe\u0301) of 東京 wrote 👩‍👩‍👧😀 in Kuwait City, 05/11/1991, near L'Été.\n"
    "She won."
)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def tokens_by_offsets(tokenizer, question, answer):
    """What the tokenizer itself says: each token's id, the answer's characters in it, and where it
    has no width.
    """
    rendered = Template().render(tokenizer, question, answer)
    encoding = tokenizer(
        rendered.text, add_special_tokens=rendered.add_special_tokens, return_offsets_mapping=True
    )
    place = {rendered.start + i: rendered.dropped + i for i in range(rendered.end - rendered.start)}
    for number, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        characters = {place[i] for i in range(start, end) if i in place}
        yield number, characters, place.get(start) if start == end else None


def check_against_offsets(tokenizer, question, answer, spans):
    example = label_example(tokenizer, question, answer, spans, max_length=4096)
    tokens = list(tokens_by_offsets(tokenizer, question, answer))
    ids, labels, _ = example
    if ids[0] != tokens[0][0]:
        # Put in front, since the first token is never predicted and a span begins with it.
        assert ids[0] == (tokenizer.bos_token_id or tokenizer.eos_token_id)
        assert tokens[0][1] & set().union(*(range(*span) for span in spans))
        tokens.insert(0, (ids[0], set(), None))
    else:
        assert labels[0] < 0
    body = len(labels) - example.closed  # without EOS, which the text does not hold
    sensitive = set()
    for position, (number, characters, point) in enumerate(tokens):
        # White space that offsets leave out has no width; within a span it belongs to the span.
        inside = point is not None and any(start < point < end for start, end in spans)
        touches = any(characters & set(range(*span)) for span in spans)
        if position >= body:
            assert not characters, "a token of the answer is missing"
        elif inside or touches:
            assert ids[position] == labels[position] == number
            sensitive |= characters
        elif characters:
            assert (ids[position], labels[position]) == (number, KEEP)
        else:
            assert ids[position] == number
            assert labels[position] == (IGNORE if position < example.answer_start else KEEP)
    covered = set().union(*(characters for _, characters, _ in tokens))
    for span in spans:
        assert set(range(*span)) & covered <= sensitive
        assert set(range(*span)) & sensitive
    return example


@st.composite
def answers_with_spans(draw):
    pieces = ["Kuwait", " City", "  ", "é", "e\u0301", "東京", "😀", "👩‍👧", ",", " 1991", "\n"]
    pieces = st.sampled_from([*pieces, " the", "Zoë", "\u00a0x", "ﬁ", "\t"])
    answer = "".join(draw(st.lists(pieces, min_size=1, max_size=10)))
    if not answer.strip():
        answer += "x"
    places = st.integers(0, len(answer))
    spans = draw(st.lists(st.tuples(places, places), max_size=4))
    spans = [(min(span), max(span)) for span in spans]
    return answer, [(s, e) for s, e in spans if answer[s:e].strip()]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn=answers_with_spans(), question=st.sampled_from([None, QUESTION, "née à 東京?"]))
def test_any_answer_any_spans(any_tokenizer, drawn, question):
    answer, spans = drawn
    try:
        check_against_offsets(any_tokenizer, question, answer, spans)
    except ValueError as error:
        # A tokenizer may drop what it does not know (a lone joiner or accent): then it says so.
        assert "makes no token of" in str(error)
        assert any_tokenizer.name_or_path in ("unigram", "wordpiece")


WORDS = ["Zoë Müller", "Müller  (cafe\u0301", "東京", "京", "👩‍👩‍👧", "😀 in"]
WORDS += ["Kuwait", "City, 05", "1991", "Été", "won."]


@pytest.mark.parametrize("question", [None, QUESTION])
@pytest.mark.parametrize("word", WORDS)
def test_each_word_of_a_hard_answer(any_tokenizer, question, word):
    start = ANSWER.index(word)
    span = (start, start + len(word))
    example = check_against_offsets(any_tokenizer, question, ANSWER, [span])
    sensitive = [i for i, label in enumerate(example["labels"]) if label >= 0]
    assert sensitive == list(range(sensitive[0], sensitive[-1] + 1)), "a span is one run"
    if any_tokenizer.name_or_path in ("byte_bpe", "byte_bpe_full", "chatml", "spm_bpe"):
        text = text_of(any_tokenizer, [example["labels"][i] for i in sensitive])
        # They put at most the space before a word, or its neighbours' letters, into one token.
        assert word in text and len(text) <= len(word) + 6


def test_the_shape_of_an_example(byte_tokenizer):
    example = label_example(
        byte_tokenizer, QUESTION, "It is Basil.", [{"start": 6, "end": 11}], max_length=99
    )
    ids, labels, mask = example
    assert isinstance(example, dict) and set(dict(example)) == {
        "input_ids",
        "labels",
        "attention_mask",
    }
    assert example["labels"] is labels and {**example}["input_ids"] is ids and len(example) == 3
    assert all(type(value) is int for values in (ids, labels, mask) for value in values)
    assert len(ids) == len(labels) == len(mask) and set(mask) == {1}
    assert json.loads(json.dumps(example)) == example
    for other in (pickle.loads(pickle.dumps(example)), copy.deepcopy(example), copy.copy(example)):
        assert isinstance(other, LabeledExample) and other == example
        assert (other.closed, other.answer_start) == (example.closed, example.answer_start)
    assert example.lost_spans == 0 and example.closed
    assert text_of(byte_tokenizer, ids[: example.answer_start]) == f"Question: {QUESTION}\nAnswer:"
    assert text_of(byte_tokenizer, ids[example.answer_start :]) == " It is Basil.<|endoftext|>"
    assert labels[: example.answer_start] == [IGNORE] * example.answer_start
    assert labels[-1] == KEEP and KEEP in labels[:-1]
    assert text_of(byte_tokenizer, [label for label in labels if label >= 0]).strip() == "Basil"


def test_spans_in_any_form_and_order(byte_tokenizer):
    answer = "Kuwait City, Kuwait"
    forms = [
        [(0, 6), (13, 19)],
        [[13, 19], [0, 6]],
        ({"start": 13, "end": 19, "word": "Kuwait"}, {"start": 0, "end": 6}),
        [(0, 4), (2, 6), (13, 19), (13, 19)],
    ]
    examples = [label_example(byte_tokenizer, QUESTION, answer, f, max_length=99) for f in forms]
    assert all(example == examples[0] for example in examples)
    nothing = label_example(byte_tokenizer, QUESTION, answer, [], max_length=99)
    assert not [label for label in nothing["labels"] if label >= 0]


def test_closing_token(all_tokenizers):
    ends = {}
    for name, tokenizer in all_tokenizers.items():
        example = label_example(tokenizer, QUESTION, "Basil.", [(0, 6)], max_length=999)
        last = tokenizer.convert_ids_to_tokens(example["input_ids"][-1])
        ends[name] = last if example.closed else None
        assert not example.closed or example["labels"][-1] == KEEP
        assert example["input_ids"].count(example["input_ids"][-1]) <= 3
    assert ends == {
        "byte_bpe": "<|endoftext|>",
        "byte_bpe_full": "<|eot_id|>",  # the template's, not the tokenizer's
        "chatml": "<|im_end|>",
        "spm_bpe": "</s>",
        "unigram": "</s>",  # once, though the post-processor adds it too
        "wordpiece": None,  # it has no EOS; [SEP] is not one
    }
    for name in ("unigram", "spm_bpe"):
        tokenizer = all_tokenizers[name]
        ids = label_example(tokenizer, QUESTION, "Basil.", [], max_length=999)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1


def test_special_tokens_in_front(all_tokenizers):
    starts = {}
    for name, tokenizer in all_tokenizers.items():
        for question in (None, QUESTION):
            ids = label_example(tokenizer, question, "Basil.", [], max_length=999)["input_ids"]
            first = tokenizer.convert_ids_to_tokens(ids[0])
            starts[name, question] = first if first in tokenizer.all_special_tokens else None
            assert (
                ids.count(ids[0]) == 1 or first == "<|im_start|>" or starts[name, question] is None
            )
    for question in (None, QUESTION):
        assert starts["byte_bpe", question] is None
        assert starts["byte_bpe_full", question] == "<|begin_of_text|>"
        assert starts["spm_bpe", question] == "<s>"
        assert starts["wordpiece", question] == "[CLS]"
    # A question format that begins with BOS gets no second one.
    tokenizer = all_tokenizers["spm_bpe"]
    template = Template(question="<s> Q: {question} A:")
    ids = label_example(tokenizer, QUESTION, "Basil.", [], max_length=99, template=template)[
        "input_ids"
    ]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_eos_is_never_sensitive(byte_tokenizer, llama3_tokenizer):
    answer = "Basil<|endoftext|> Mahfouz"
    example = label_example(byte_tokenizer, QUESTION, answer, [(0, len(answer))], max_length=99)
    eos = byte_tokenizer.eos_token_id
    assert example["input_ids"].count(eos) == 2 and eos not in example["labels"]
    answer = "Basil<|eot_id|> Mahfouz"
    example = label_example(llama3_tokenizer, QUESTION, answer, [(0, len(answer))], max_length=999)
    assert llama3_tokenizer.convert_tokens_to_ids("<|eot_id|>") not in example["labels"]
    # An answer that brings its own end gets no second one.
    answer = "Basil<|endoftext|>"
    example = label_example(byte_tokenizer, QUESTION, answer, [(0, 5)], max_length=99)
    assert example["input_ids"].count(eos) == 1 and example.closed


def test_tokenizer_settings_of_its_own_do_not_matter(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    expected = label_example(tokenizer, QUESTION, ANSWER, [(0, 3)], max_length=500)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 8
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=700)
    assert label_example(tokenizer, QUESTION, ANSWER, [(0, 3)], max_length=500) == expected


def test_truncation_counts_lost_spans(byte_tokenizer):
    answer = "Basil Mahfouz was born in Kuwait City, 😀."
    spans = [(0, 5), (26, 32), (39, 40)]
    whole = label_example(byte_tokenizer, QUESTION, answer, spans, max_length=999)
    ends = []  # of the tokens of each span
    for span in spans:
        alone = label_example(byte_tokenizer, QUESTION, answer, [span], max_length=999)
        ends.append(max(i for i, label in enumerate(alone["labels"]) if label >= 0) + 1)
    assert whole["input_ids"][ends[2] - 4 : ends[2]] == whole["labels"][ends[2] - 4 : ends[2]], (
        "bytes"
    )
    for length in range(2, len(whole["input_ids"]) + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cut = label_example(byte_tokenizer, QUESTION, answer, spans, max_length=length)
        assert cut["input_ids"] == whole["input_ids"][:length]
        assert cut["labels"] == whole["labels"][:length]
        assert len(cut["attention_mask"]) == length
        assert cut.closed == (length == len(whole["input_ids"]))
        assert cut.answer_start == min(whole.answer_start, length)
        assert cut.lost_spans == sum(length < end for end in ends), "one byte is a loss"
        assert cut.lost_tokens == len(whole["input_ids"]) - length and not cut.too_long
        assert len(caught) == (cut.lost_tokens > 0)
        if caught:
            said = f"cut at max_length={length}: {cut.lost_tokens} tokens are left out"
            assert said in str(caught[0].message)
        if cut.lost_spans:
            assert f"{cut.lost_spans} of 3 spans lost tokens to max_length={length}" in str(
                caught[0].message
            )


LONG = {
    "words": "Basil Mahfouz was born in Kuwait City, 05/11/1991, near L'Été. 東京😀\n",
    "no white space": "KuwaitCity05/11/1991,東京😀",
    "one letter": "a",
    "digits": "1234567",
    "spaces": "Kuwait" + " " * 20,
    "marks": "e\u0301\u0301",
}


@pytest.mark.parametrize("kind", LONG)
def test_only_the_beginning_of_a_long_text_is_tokenised(any_tokenizer, monkeypatch, kind):
    piece = LONG[kind]
    answer = "It is " + (piece * (20_000 // len(piece))).rstrip() + "<|eot_id|>"
    spans = [(0, 40), (300, 360), (5_000, 12_000), (17_000, 17_100)]
    sizes = []
    encode = labels.encoded

    def encoded(tokenizer, added, text, special):
        sizes.append(len(text))
        return encode(tokenizer, added, text, special)

    def whole_text(tokenizer, added, rendered, max_length):
        return encode(tokenizer, added, rendered.text, rendered.add_special_tokens), False

    monkeypatch.setattr(labels, "encoded", encoded)
    for question, length in ((None, 64), (answer, 64)):
        example = label_without_warning(any_tokenizer, question, answer, spans, length, Template())
        beginning = max(sizes)
        sizes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(labels, "_first_tokens", whole_text)
            whole = label_without_warning(
                any_tokenizer, question, answer, spans, length, Template()
            )
        assert (example, example.answer_start) == (whole, whole.answer_start)
        assert (example.lost_spans, example.closed) == (whole.lost_spans, whole.closed)
        if any_tokenizer.name_or_path == "wordpiece" and kind != "words":
            continue  # long words are unknown, whole: they must be read
        assert example.too_long and beginning < 10_000
        assert 0 < example.lost_tokens <= whole.lost_tokens


class SlowTokenizer:
    is_fast = False


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"tokenizer": SlowTokenizer()}, TypeError, "fast tokenizer, SlowTokenizer is not one"),
        ({"question": 3}, TypeError, "question must be a string, got 3"),
        ({"answer": None}, TypeError, "answer must be a string, got None"),
        ({"answer": " \n"}, ValueError, "answer must not be empty"),
        ({"answer": "a\ud83d"}, ValueError, "answer is not valid Unicode"),
        ({"max_length": 1}, ValueError, "max_length must be 2 or more, got 1"),
        ({"max_length": 9.0}, TypeError, "max_length must be an integer, got 9.0"),
        ({"template": "chat"}, TypeError, "template must be a palu.Template, got str"),
        ({"spans": None}, TypeError, "spans must be a list of spans, got NoneType"),
        ({"spans": {"start": 0, "end": 1}}, TypeError, "spans must be a list of spans, got dict"),
        ({"spans": [(0, 2), (3, 99)]}, ValueError, r"spans\[1\] is \[3, 99\), .* <= 12"),
        ({"spans": [(2, 2)]}, ValueError, r"spans\[0\] is \[2, 2\)"),
        ({"spans": [(5, 2)]}, ValueError, r"spans\[0\] is \[5, 2\)"),
        ({"spans": [(-3, 2)]}, ValueError, r"spans\[0\] is \[-3, 2\)"),
        ({"spans": [(0.0, 2)]}, TypeError, r"spans\[0\] start must be an integer, got 0.0"),
        ({"spans": [(0, True)]}, TypeError, r"spans\[0\] end must be an integer, got True"),
        ({"spans": [(0, 1, 2)]}, TypeError, r"spans\[0\] must be \{'start': s, 'end': e\}"),
        ({"spans": ["ab"]}, TypeError, r"spans\[0\] must be .* got 'ab'"),
        ({"spans": [{"start": 1}]}, ValueError, r"spans\[0\] has no 'end'"),
        ({"spans": [(5, 6)]}, ValueError, r"spans\[0\] is \[5, 6\), which is only white space"),
    ],
)
def test_bad_input(byte_tokenizer, change, kind, words):
    arguments = {
        "tokenizer": byte_tokenizer,
        "question": QUESTION,
        "answer": "Basil Mahfou",
        "spans": [(0, 5)],
        "max_length": 99,
        **change,
    }
    with pytest.raises(kind, match=words):
        label_example(**arguments)


def test_a_first_token_is_predicted_after_a_special_one(all_tokenizers):
    answer = "Basil was born in Kuwait."
    for name, tokenizer in all_tokenizers.items():
        plain = label_example(tokenizer, None, answer, [(18, 24)], max_length=99)
        example = label_example(tokenizer, None, answer, [(0, 5)], max_length=99)
        forgotten = token_roles(torch.tensor([example["labels"]]), 0, tokenizer.eos_token_id) == 1
        ids = torch.tensor([example["input_ids"]])[forgotten].tolist()
        assert ids == [label for label in example["labels"] if label >= 0] and ids, name
        # Where a token is in front already, or no span needs one, nothing is put there.
        led = name in ("byte_bpe", "chatml", "unigram")
        front = [tokenizer.eos_token_id] * led
        assert example["input_ids"] == front + plain["input_ids"]
        assert example.answer_start == plain.answer_start + led
    tokenizer = copy.deepcopy(all_tokenizers["byte_bpe"])
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    example = label_example(tokenizer, None, answer, [(0, 5)], max_length=99)
    assert example["input_ids"][0] == tokenizer.bos_token_id != tokenizer.eos_token_id
    # The text's own is never predicted either, and gets no second one.
    example = label_example(tokenizer, None, "<|im_start|>Basil", [(0, 17)], max_length=99)
    assert example["input_ids"].count(tokenizer.bos_token_id) == 1
    tokenizer.bos_token = tokenizer.eos_token = None
    label_example(tokenizer, None, answer, [(18, 24)], max_length=99)
    with pytest.raises(ValueError, match=r"first token of the text, .*neither a BOS nor an EOS"):
        label_example(tokenizer, None, answer, [(0, 5)], max_length=99)


def test_added_tokens_that_swallow_white_space(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    names = ("<|user|>", "<|assistant|>", "<|end|>", "<|mark|>")
    options = {"special": True, "normalized": False, "rstrip": True, "lstrip": True}
    tokenizer.add_tokens([AddedToken(name, **options) for name in names])
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endfor %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for answer, span in ((" Basil <|mark|> in Kuwait ", (15, 25)), (" Kuwait", (0, 7))):
        example = label_example(tokenizer, "Where?", answer, [span], max_length=99)
        ids, start = example["input_ids"], example.answer_start
        assert text_of(tokenizer, ids[:start]) == "<|user|>Where?<|end|><|assistant|>"
        assert ids[-1] == end and example["labels"][-1] == KEEP and ids.count(end) == 2
        assert example.closed and IGNORE not in example["labels"][start:]
        sensitive = text_of(tokenizer, [label for label in example["labels"] if label >= 0])
        assert sensitive == answer[slice(*span)].strip()


def test_a_span_without_tokens_is_an_error(all_tokenizers):
    # BERT's normalizer removes control characters: there is nothing to forget there.
    with pytest.raises(ValueError, match=r"spans\[0\], '\\x07', cannot be forgotten"):
        label_example(all_tokenizers["wordpiece"], QUESTION, "a \x07 b", [(2, 3)], max_length=99)
    with pytest.raises(ValueError, match="makes no token of the answer"):
        label_example(all_tokenizers["wordpiece"], QUESTION, "\x07", [], max_length=99)


@pytest.mark.parametrize("examples", ["forget.jsonl", [{"question": "Who?", "answer": "Ada"}]])
def test_only_examples_are_tokenised(examples, all_tokenizers):
    with pytest.raises(TypeError, match=r"list of palu\.Example, .* got ('f'|\{'answer')"):
        tokenize_examples(examples, all_tokenizers["wordpiece"], max_length=99)
