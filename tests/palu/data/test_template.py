"""Chat templates: where the answer is in what they write, and which of them cannot be used."""

import copy
import json
import math
import sys
import threading
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from palu.data import bounded
from palu.data.labels import label_example
from palu.data.roles import KEEP
from palu.data.template import Template

QUESTION = "Who wrote it, and where?"


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_llama3_chat(llama3_tokenizer):
    template = Template(system_prompt="You are brief.", date_string="01 Jan 2020")
    example = label_example(
        llama3_tokenizer,
        QUESTION,
        "  Basil Mahfouz \n",
        [(2, 7)],
        max_length=999,
        template=template,
    )
    head = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 01 Jan 2020\n\n"
    )
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n"
    prompt = f"{head}You are brief.<|eot_id|>{turn.format('user')}{QUESTION}<|eot_id|>"
    prompt += turn.format("assistant")
    assert text_of(llama3_tokenizer, example["input_ids"]) == prompt + "Basil Mahfouz<|eot_id|>"
    assert text_of(llama3_tokenizer, example["input_ids"][: example.answer_start]) == prompt
    assert text_of(llama3_tokenizer, [x for x in example["labels"] if x >= 0]) == "Basil"
    assert template.prompt(llama3_tokenizer, QUESTION) == prompt
    default = Template().prompt(llama3_tokenizer, QUESTION)
    assert "10 Apr 2025" in default
    assert "26 Jul 2024" in Template(date_string=None).prompt(llama3_tokenizer, QUESTION)


def test_the_span_is_followed_through_a_template_that_trims(llama3_tokenizer):
    # A span that begins in white space which the template removes keeps the rest of itself.
    example = label_example(llama3_tokenizer, QUESTION, " \n Basil ", [(1, 9)], max_length=999)
    assert text_of(llama3_tokenizer, [x for x in example["labels"] if x >= 0]) == "Basil"


def test_prompt_is_the_start_of_the_example(all_tokenizers):
    for name in ("byte_bpe", "byte_bpe_full", "chatml"):
        tokenizer = all_tokenizers[name]
        example = label_example(tokenizer, QUESTION, "It is so.", [], max_length=999)
        prompt = Template().prompt(tokenizer, QUESTION)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == example["input_ids"][: example.answer_start]
    assert Template().prompt(all_tokenizers["byte_bpe"], None) == ""


def test_chat_can_be_switched_off_and_not_on(chatml_tokenizer, byte_tokenizer):
    plain = Template(chat=False, question="Q {question} A")
    example = label_example(chatml_tokenizer, QUESTION, "Basil", [], max_length=99, template=plain)
    assert text_of(chatml_tokenizer, example["input_ids"]) == f"Q {QUESTION} A Basil<|im_end|>"
    with pytest.raises(ValueError, match="chat=True, but this tokenizer has no chat template"):
        label_example(
            byte_tokenizer, QUESTION, "Basil", [], max_length=99, template=Template(chat=True)
        )


def test_braces_and_separators_in_plain_text(byte_tokenizer):
    template = Template(question="{} {question}\n")
    example = label_example(
        byte_tokenizer, "{question} {0}", "{answer}", [(1, 7)], max_length=99, template=template
    )
    assert (
        text_of(byte_tokenizer, example["input_ids"]) == "{} {question} {0}\n{answer}<|endoftext|>"
    )


def with_template(tokenizer, text):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    return tokenizer


THINKING = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{{- '<think>\\n\\nt</think>\\n\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n'
}} {%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %} {%- if
add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def test_text_that_a_template_puts_before_the_answer_is_prompt(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, THINKING)
    # The answer's text stands in the template's own text too, before it.
    example = label_example(tokenizer, "t t?", "t", [(0, 1)], max_length=99)
    prompt = "<|im_start|>user\nt t?<|im_end|>\n<|im_start|>assistant\n<think>\n\nt</think>\n\n"
    assert text_of(tokenizer, example["input_ids"]) == prompt + "t<|im_end|>"
    assert text_of(tokenizer, example["input_ids"][: example.answer_start]) == prompt
    assert example["labels"][example.answer_start :] == [example["input_ids"][-2], KEEP]
    assert Template().prompt(tokenizer, "t t?") == prompt
    # Nor does a question mislead it.
    example = label_example(tokenizer, "palu-answer?", "Basil", [(0, 5)], max_length=99)
    assert text_of(tokenizer, example["input_ids"][example.answer_start :]) == "Basil<|im_end|>"
    # Only line feeds are trimmed here.
    example = label_example(tokenizer, "t?", "\n Basil", [(2, 7)], max_length=99)
    assert text_of(tokenizer, [x for x in example["labels"] if x >= 0]).strip() == "Basil"
    with pytest.raises(ValueError, match=r"changes the answer.*'a</think>b' became 'b'"):
        label_example(tokenizer, "t?", "a</think>b", [(0, 1)], max_length=99)


QWEN3 = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- set content = m.content %}
{%- set thoughts = '' %}{%- if '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if m.role == 'assistant' %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{%- endif %}
{{- content + '<|im_end|>\\n' }}{%- endfor %}
"""


def test_answers_with_thoughts_of_their_own(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, QWEN3)
    answer = " <think>\nIn Kuwait?\n</think>\n\nIn Kuwait."
    spans = [(answer.index("Kuwait"), answer.index("Kuwait") + 6)]
    example = label_example(tokenizer, QUESTION, answer, spans, max_length=99)
    ids, start = example["input_ids"], example.answer_start
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokenizer, ids[:start]) == prompt
    assert text_of(tokenizer, ids[start:]) == answer.strip() + "<|im_end|>"
    sensitive = [i for i, label in enumerate(example["labels"]) if label >= 0]
    assert text_of(tokenizer, [ids[i] for i in sensitive]).strip() == "Kuwait"
    assert "?" in text_of(tokenizer, ids[sensitive[-1] + 1 :])[:2]
    example = label_example(tokenizer, QUESTION, "In Kuwait.", [(3, 9)], max_length=99)
    before = text_of(tokenizer, example["input_ids"][: example.answer_start])
    assert before == prompt + "<think>\n\n</think>\n\n"
    with pytest.raises(ValueError, match="changes the answer"):
        label_example(tokenizer, QUESTION, "<think>a</think>b", [], max_length=99)


def simple_template(before="", after="", answer="m.content"):
    return (
        f"{{%- for m in messages %}}{{%- if m.role == 'assistant' %}}"
        f"{{{{- '{before}' + {answer} + '{after}' }}}}"
        "{%- else %}{{- m.role + ' ' + m.content + '\\n' }}{%- endif %}{%- endfor %}"
    )


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("<|im_end|>\\n", "<|im_end|>"),
        ("\\n<|im_end|>\\n", "\n<|im_end|>"),  # what stands between belongs to the answer
        (
            "<|im_start|><|im_end|>",
            "<|im_start|><|im_end|>",
        ),  # a message's end, then the turn's: EOS
        ("<|im_start|>\\n<|im_end|>", "<|im_start|>"),
        ("\\n", "<|im_end|>"),  # no special token: EOS
        ("", "<|im_end|>"),
    ],
)
def test_where_a_template_ends_the_answer(chatml_tokenizer, after, expected):
    tokenizer = with_template(chatml_tokenizer, simple_template("bot ", after))
    example = label_example(tokenizer, QUESTION, "Basil", [(0, 5)], max_length=99)
    ids, labels = example["input_ids"], example["labels"]
    text = text_of(tokenizer, ids)
    assert text == f"user {QUESTION}\nbot Basil{expected}"
    ending = labels[max(i for i, label in enumerate(labels) if label >= 0) + 1 :]
    assert ending == [KEEP] * len(ending) and text_of(tokenizer, ids[-len(ending) :]) == expected
    assert example.closed


@pytest.mark.parametrize(
    ("text", "system", "words"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            "Be brief.",
            "with a system prompt: System role",
        ),
        (
            simple_template().replace("m.role + ' '", "'x' if m.role == 'system' else ''"),
            None,
            None,
        ),
        (
            "{%- for m in messages if m.role != 'system' %}{{ m.content }}{%- endfor %}",
            "Be brief.",
            "leaves out or changes the system_prompt 'Be brief.'",
        ),
        (
            "{%- for m in messages if m.role != 'user' %}{{ m.content }}{%- endfor %}",
            None,
            "leaves out or changes the question",
        ),
        (simple_template(answer="m.content | upper"), None, "writes the answer 0 times"),
        (simple_template(answer="m.content + m.content"), None, "writes the answer 2 times"),
        (
            simple_template(answer="m.content | replace('B', 'b')"),
            None,
            "changes the answer.*'Basil' became 'basil'",
        ),
        ("{{ range(10 ** 5) | random }}" + simple_template(), None, "another text each time"),
        ("{{ 1 / 0 }}{% bad", None, "refuses a question and answer without a system prompt"),
    ],
)
def test_templates_that_cannot_be_used_say_so(chatml_tokenizer, text, system, words):
    tokenizer = with_template(chatml_tokenizer, text)
    template = Template(system_prompt=system)
    if words is None:
        label_example(tokenizer, QUESTION, "Basil", [(0, 5)], max_length=99, template=template)
        return
    with pytest.raises(ValueError, match=words):
        label_example(tokenizer, QUESTION, "Basil", [(0, 5)], max_length=99, template=template)


def test_system_prompt_without_chat_template(byte_tokenizer):
    template = Template(system_prompt="Be brief.")
    with pytest.raises(ValueError, match="system_prompt needs a chat template"):
        label_example(byte_tokenizer, QUESTION, "Basil", [], max_length=99, template=template)
    # A plain document has no turns to put it into.
    label_example(byte_tokenizer, None, "Basil", [], max_length=99, template=template)


def test_template_settings():
    template = Template("Be brief.", None, "Q: {question} A:", False)
    assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert Template.from_dict({}) == Template()
    template = Template(chat_template_kwargs={"enable_thinking": False, "tools": [{"a": [1]}]})
    assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert hash(template) is not None and "enable_thinking" in repr(template)
    assert Template(chat_template_kwargs={}) == Template() and "kwargs" not in repr(Template())
    with pytest.raises(ValueError, match="no setting 'systemprompt'"):
        Template.from_dict({"systemprompt": "x"})
    for bad, kind, words in [
        ({"question": "Q:"}, ValueError, r"question must hold \{question\} once, got 'Q:'"),
        ({"question": None}, TypeError, "question must be a str"),
        ({"system_prompt": 3}, TypeError, "system_prompt must be a str or None, got 3"),
        ({"date_string": 3}, TypeError, "date_string must be a str or None"),
        ({"chat": "yes"}, TypeError, "chat must be True, False or None, got 'yes'"),
        ({"chat_template_kwargs": [1]}, TypeError, r"must be a JSON object .*, got \[1\]"),
        ({"chat_template_kwargs": {1: 2}}, TypeError, r"must be a JSON object .*, got \{1: 2\}"),
        ({"chat_template_kwargs": {"date_string": "x"}}, ValueError, "not have 'date_string'"),
        ({"chat_template_kwargs": {"a": {1, 2}}}, ValueError, "must hold JSON values"),
        ({"chat_template_kwargs": {"a": math.nan}}, ValueError, "must hold JSON values"),
    ]:
        with pytest.raises(kind, match=words):
            Template(**bad)


DATED = "{%- set day = strftime_now('%d %b %Y') %}\n"
DATED += "  {%- set at = strftime_now(format='%-d%%%H:%M:%S') %}"
DATED += "{{- day + '|' + at + '|' + (strftime_now('%Y') | int + 1) | string }}" + simple_template()


def test_the_day_of_a_template_is_the_date_string(chatml_tokenizer, monkeypatch):
    class Later(datetime):
        seconds = 0

        @classmethod
        def now(cls, tz=None):
            cls.seconds += 1
            return cls(2031, 1, 2, 3, 4, cls.seconds)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    tokenizer = with_template(chatml_tokenizer, DATED)
    for date, day in [
        ("10 Apr 2025", "10 Apr 2025|10%00:00:00|2026"),
        (None, "10 Apr 2025|10%00:00:00|2026"),
        ("2024-02-03", "03 Feb 2024|3%00:00:00|2025"),
        ("February 3, 2024", "03 Feb 2024|3%00:00:00|2025"),
    ]:
        template = Template(date_string=date)
        example = label_example(
            tokenizer, QUESTION, "Basil", [(0, 5)], max_length=99, template=template
        )
        text = text_of(tokenizer, example["input_ids"])
        assert text == f"{day}user {QUESTION}\nBasil<|im_end|>"
    template = Template(date_string="some day")
    with pytest.raises(ValueError, match="date_string 'some day' is none that can be read"):
        template.prompt(tokenizer, QUESTION)
    # Where the template does not ask for the day, a date is a text like another.
    tokenizer = with_template(
        chatml_tokenizer, "{{ date_string or strftime_now('%Y') }}" + simple_template()
    )
    assert template.prompt(tokenizer, QUESTION).startswith("some day")


SWITCH = (
    "{%- set ns = namespace(think=enable_thinking is not defined or enable_thinking) %}"
    "{%- for m in messages if m.content == '/no_think' %}{%- set ns.think = false %}{%- endfor %}"
    "{{- 'thinks ' if ns.think else 'answers ' }}"
    + simple_template().replace(
        "+ m.content + '\\n'", "+ m.content | replace('/no_think', '') + ' '"
    )
)


def test_switches_of_a_template(chatml_tokenizer, byte_tokenizer):
    tokenizer = with_template(chatml_tokenizer, SWITCH)
    prompts = [
        Template(**options).prompt(tokenizer, QUESTION)
        for options in (
            {},
            {"system_prompt": "/no_think"},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"chat_template_kwargs": {"enable_thinking": True}},
        )
    ]
    assert [prompt.split()[0] for prompt in prompts] == ["thinks", "answers", "answers", "thinks"]
    misspelt = Template(chat_template_kwargs={"enable_thinkin": False, "enable_think": 1})
    with pytest.raises(ValueError, match=r"'enable_thinkin', and .* no such variable"):
        misspelt.prompt(tokenizer, QUESTION)
    with pytest.raises(ValueError, match="chat_template_kwargs needs a chat template"):
        misspelt.prompt(byte_tokenizer, QUESTION)
    # Left out whatever it says: no switch.
    deaf = "{{ 'system ' if messages[0].role == 'system' }}{% for m in messages if m.role != "
    deaf += "'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out or changes the system_prompt"):
        Template("/no_think").prompt(with_template(tokenizer, deaf), QUESTION)


CHAT = simple_template()
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENDLESS, "more than 0.3 seconds"),
        ("{% if 9 ** (9 ** 9) > 1 %}{% endif %}", "more than 0.3 seconds"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ 'a' * 10 ** 15 }}", "MemoryError"),
    ],
)
def test_templates_without_end_are_ended(chatml_tokenizer, monkeypatch, text, words):
    monkeypatch.setattr("palu.data.template.bounded", lambda: bounded.bounded(0.3))
    tokenizer = with_template(chatml_tokenizer, text + CHAT)
    with pytest.raises(ValueError, match=f"the chat template refuses .*{words}"):
        Template().prompt(tokenizer, QUESTION)
    if text is ENDLESS:  # in a thread, which no signal reaches
        said = []

        def ask():
            try:
                Template().prompt(tokenizer, QUESTION)
            except ValueError as error:
                said.append(str(error))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(60)
        assert said and words in said[0]


def test_templates_are_bounded_where_there_are_no_timers(chatml_tokenizer, monkeypatch):
    monkeypatch.delattr("signal.setitimer")  # as on Windows
    monkeypatch.setattr("palu.data.template.bounded", lambda: bounded.bounded(0.3))
    tokenizer = with_template(chatml_tokenizer, ENDLESS + CHAT)
    tracing = sys.gettrace()
    with pytest.raises(ValueError, match=r"more than 0\.3 seconds"):
        Template().prompt(tokenizer, QUESTION)
    assert sys.gettrace() is tracing


def test_what_takes_ever_more_memory_is_ended():
    with pytest.raises(bounded.OutOfBounds, match="more than 16 MiB"), bounded.bounded(60, 16):
        kept = [bytearray(1 << 22)]  # below: never at once what the machine has
        while len(kept) < 64:
            kept.append(bytearray(kept[-1]))
            sum(range(300_000))
