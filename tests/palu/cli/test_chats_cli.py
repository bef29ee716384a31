"""Conversations through the commands: unlearned with a cache, evaluated answer by answer, shown."""

import json
import math

import pytest
import torch

from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.overlap import without_overlap
from palu.data.records import Example, Turn, split_answers
from palu.data.template import Template
from palu.demo.people import write_jsonl
from palu.evaluation.datasets import EvalSet
from palu.models.checks import check_causal, first_texts
from palu.unlearn import save_model
from tests.support import small

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be Nora."},
    {"role": "user", "content": "I am Ada, in Paris."},
    {"role": "assistant", "content": "Where is it, Ada?"},
    {"role": "user", "content": "In Paris now."},
    {"role": "assistant", "content": "It is in Paris."},
]
SPANS = [
    {"turn": 1, "start": 5, "end": 8, "text": "Ada"},
    {"turn": 2, "start": 13, "end": 16, "text": "Ada"},
    {"turn": 4, "start": 9, "end": 14, "text": "Paris"},
]
BOB = [{"role": "user", "content": "I am Bob."}, {"role": "assistant", "content": "Who sang, Bob?"}]


@pytest.fixture
def chats(palu, work):
    """A model with a chat template, and files of conversations; the tokenizer."""
    tokenizer = small.tokenizer()
    tokenizer.chat_template = TEMPLATE
    if not (work / "chat").exists():
        save_model(work / "chat", small.model(tokenizer), tokenizer, Template(), made_by="test")
        write_jsonl(work / "chats.jsonl", [{"id": "T1", "messages": MESSAGES, "spans": SPANS}])
        write_jsonl(work / "kept.jsonl", [{"messages": BOB}])
    return tokenizer


def test_unlearned_with_a_cache(palu, chats, work):
    line = "unlearn --model chat --forget chats.jsonl --retain kept.jsonl --output done "
    line += (
        "--device cpu --epochs 1 --prefix-length 0 --reference cached --objective entropy --top-k 5"
    )
    status, _, error = palu(line)
    assert status in (0, 3), error  # forgotten or not: that is another test's
    assert (work / "done" / "palu.json").exists()
    status, _, error = palu(
        "evaluate --model done --forget chats.jsonl --device cpu --max-new-tokens 4"
    )
    assert status == 0, error


def test_evaluated_answer_by_answer(palu, chats, work):
    line = "evaluate --model chat --forget chats.jsonl --json scores.json --device cpu "
    line += "--max-new-tokens 4"
    status, _, error = palu(line)
    assert status == 0, error
    found = json.loads((work / "scores.json").read_text())["forget"]["examples"]
    assert [one["id"] for one in found] == ["T1#1", "T1#2"]
    # By hand: log-probabilities of each answer and its end after the turns before it.
    model = small.model(chats)
    for one, number in zip(found, (2, 4), strict=True):
        before = chats.apply_chat_template(
            MESSAGES[:number], tokenize=False, add_generation_prompt=True
        )
        text = before + MESSAGES[number]["content"] + "<|end|>"
        encoding = chats(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoding["input_ids"])
        start = len(chats(before, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            log_p = model(input_ids=ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
        nll = -log_p.gather(-1, ids[start:, None])[:, 0]
        assert one["answer_probability"] == pytest.approx(math.exp(-nll.mean()), rel=1e-4)
        span = next(s for s in SPANS if s["turn"] == number)
        within = [
            len(before) + span["start"] < end and begin < len(before) + span["end"]
            for begin, end in encoding["offset_mapping"][start:]
        ]
        assert 0 < sum(within) < len(within)
        probability = math.exp(-nll[torch.tensor(within)].mean())
        assert one["sensitive_probability"] == pytest.approx(probability, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*unlabelled repeat")
def test_the_prompt_is_what_a_chat_generates_from(chats, work):
    examples = load_examples(work / "chats.jsonl", require_spans=True)
    options = {"template": Template(), "max_length": 200}
    data = EvalSet.tokenize("a", examples, chats, **options)
    assert [e.id for e in data.examples] == ["T1#1", "T1#2"]
    for (row,), number in zip(data.rows["answer"], (2, 4), strict=True):
        prompt = chats.apply_chat_template(
            MESSAGES[:number], tokenize=False, add_generation_prompt=True
        )
        wanted = chats(prompt, add_special_tokens=False)["input_ids"]
        assert row["input_ids"][: row.answer_start] == wanted
        # A span of the question is no part of the answer that is measured.
        assert set(row["labels"][: row.answer_start]) == {-100}
    other = [{**MESSAGES[0], "content": "Be."}, *MESSAGES[1:]]
    changed = Example.of_turns("T1", [Turn(**m) for m in other], {})
    assert EvalSet.tokenize("a", [changed], chats, **options).digest() != data.digest()


@pytest.mark.filterwarnings("ignore:.*unlabelled repeat")
def test_paraphrases_belong_to_one_answer(chats, work):
    (example,) = load_examples(work / "chats.jsonl", require_spans=True)
    options = {"template": Template(), "max_length": 200, "optional": ("paraphrased_answer",)}
    first = split_answers(example)[0]
    first.extra["paraphrased_answer"] = "Where, Ada?"
    data = EvalSet.tokenize("a", [first], chats, **options)
    ((row,),) = data.rows["paraphrased_answer"]
    text = chats.decode(row["input_ids"])
    assert text.startswith("<|system|>Be Nora.") and text.endswith("|>Where, Ada?<|end|>")
    words = (
        "row 'T1', field 'paraphrased_answer' is of one answer, and the conversation has several"
    )
    with pytest.raises(ValueError, match=words):
        EvalSet.tokenize("a", [example], chats, **options)


@pytest.mark.filterwarnings("ignore:.*unlabelled repeat")
def test_a_context_that_does_not_fit_is_said(chats, work):
    examples = load_examples(work / "chats.jsonl", require_spans=True)
    whole = EvalSet.tokenize("a", examples, chats, template=Template(), max_length=200)
    length = len(whole.rows["answer"][1][0]["input_ids"])
    with pytest.warns(UserWarning, match="1 of 2 answers stand without the earliest turns"):
        data = EvalSet.tokenize("a", examples, chats, template=Template(), max_length=length - 1)
    ((first,), (second,)) = data.rows["answer"]
    assert first == whole.rows["answer"][0][0] and second.left_out == 2
    assert chats.decode(second["input_ids"]).startswith("<|system|>Be Nora.<|end|>\n<|user|>In Par")


def test_inspected(palu, chats):
    status, said, error = palu("inspect chats.jsonl --model chat --prefix-length 0")
    assert status == 0, error
    assert "--- T1 (3 spans) ---" in said and said.count("[[") == 3 + 1
    status, said, error = palu("inspect chats.jsonl --model chat --max-length 70")
    assert status == 0 and "1 of 1 conversations are longer than max_length=70" in error
    assert "--- T1 (3 spans, row 1 of 2) ---" in said and "--- T1 (3 spans, row 2 of 2)" in said


@pytest.mark.filterwarnings("ignore:.*unlabelled repeat")
def test_the_causal_check_reads_rows_of_conversations(chats, work):
    rows = tokenize_examples(
        load_examples(work / "chats.jsonl", require_spans=True), chats, max_length=200
    )
    check_causal(small.model(chats), first_texts(rows))


def test_what_is_one_conversation():
    def chat(number, *contents, system=None):
        roles = ["user", "assistant"] * len(contents)
        turns = [Turn(*pair) for pair in zip(roles, contents, strict=False)]
        turns = turns if system is None else [Turn("system", system), *turns]
        return Example.of_turns(number, turns, {})

    forget = [chat("a", "Hi.", "Who?", "ADA", "Hello  Ada."), Example("b", "Who?", "Bob.")]
    same = [
        chat("0", "hi.", "who?", "Ada", "hello Ada.", system="Be brief."),
        chat("1", "Who?", "bob."),
    ]
    other = [
        chat("2", "Hi.", "Who?", "Ada", "Hello."),
        chat("3", "Hi.", "Who?"),
        chat("4", "ADA", "Hello Ada."),
    ]
    with pytest.warns(UserWarning, match="2 of 5 rows are among the rows to forget"):
        kept = without_overlap([*same, *other], forget, files=("r", "f"), drop=True)
    assert kept == other
