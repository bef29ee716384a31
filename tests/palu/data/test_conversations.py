"""Whole conversations: every answer and every span at its place, whatever the chat template."""

import copy
import dataclasses
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palu.data.conversations import label_conversation, label_record
from palu.data.examples import tokenize_examples
from palu.data.labels import label_example
from palu.data.pairs import add_alternates, own_alternates
from palu.data.records import Example, Turn, parse_record, split_answers
from palu.data.roles import IGNORE, KEEP
from palu.data.template import Template

# Gemma's: no system turn, `model` for the assistant, turns that alternate and are trimmed.
GEMMA = """
{{- bos_token }}{%- if messages[0].role == 'system' %}
{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant') }}{%- endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim
+ '<|im_end|>\\n' }}{%- endfor %}
"""
# Mistral's: the system turn stands in the user's last turn, and an answer ends with EOS alone.
MISTRAL = """
{%- set ns = namespace(system='') %}{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}
{{- '[INST] ' + (ns.system if messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list
| length == 1 else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}
"""
# Without any special token between turns.
BARE = """
{%- for m in messages %}{{- m.role | upper + ': ' + m.content + '\\n' }}{%- endfor %}
"""
# Qwen3's: thoughts are kept in the last answer alone.
QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and '</think>' in m.content and loop.index0 < ns.last %}
{{- m.content.split('</think>')[-1].lstrip('\\n') }}{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
"""
# Llama 3.1's tools: definitions in front, results as JSON, calls instead of contents.
TOOLS = """
{%- if tools %}{{- '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.tool_calls %}{{- m.content if m.content else '' }}{{- m.tool_calls | tojson }}
{%- elif m.role == 'tool' %}{{- m.content | tojson }}{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
"""


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    if tokenizer.bos_token is None:
        tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turn(role, content, *words, **extra):
    spans = tuple(sorted((content.index(w), content.index(w) + len(w)) for w in words))
    return Turn(role, content, spans, extra=extra)


def by_hand(tokenizer, turns, **variables):
    """The ids and labels of a conversation, found by looking for one content after the other in
    what `apply_chat_template` writes, and by the tokenizer's own offsets."""
    text = tokenizer.apply_chat_template(
        [t.message() for t in turns], tokenize=False, date_string="10 Apr 2025", **variables
    )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels, at, kept = [IGNORE] * len(ids), 0, 0
    ends = ["<|im_end|>", "<|eot_id|>", tokenizer.eos_token]
    enders = [n for n in map(tokenizer.convert_tokens_to_ids, ends) if n is not None]
    order = sorted(turns, key=lambda t: t.role == "system") if "INST" in text else turns
    for one in order:
        hoisted = one.role == "system"
        content = one.content.strip() if "| trim" in tokenizer.chat_template else one.content
        start = text.index(content, 0 if hoisted else at)
        at = at if hoisted else start + len(content)
        dropped = one.content.index(content)
        own = [n for n, (s, e) in enumerate(offsets) if s < start + len(content) and e > start]
        if one.answer:
            end = next(n for n in range(own[-1], len(ids)) if ids[n] in enders)
            labels[own[0] : end + 1] = [KEEP] * (end + 1 - own[0])
            kept = max(kept, end + 1)
        for s, e in one.spans:
            for n, (a, b) in enumerate(offsets):
                s_in, e_in = max(s - dropped, 0), min(e - dropped, len(content))
                if a < start + e_in and b > start + s_in and ids[n] not in enders:
                    labels[n] = ids[n]
                    kept = max(kept, n + 1)
    return ids[:kept], labels[:kept]


def labelled(tokenizer, turns, template=None, **options):
    (row,) = label_conversation(
        tokenizer, turns, max_length=options.pop("max_length", 4096), template=template, **options
    )
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    return row


CHAT = [
    turn("system", "You are Nora of Fjord & Field."),
    turn("user", "Hi, I am Ada Brook of Kuwait City.", "Ada Brook"),
    turn("assistant", "Hello Ada! Is 555-0139 your number?", "Ada", "555-0139"),
    turn("user", "Yes, 555-0139.", "555-0139"),
    turn("assistant", "Zoë will call 555-0139, near L'Été.", "555-0139", "L'Été"),
]


def templates(chatml, llama3):
    return {
        "chatml": chatml,
        "llama3": llama3,
        "gemma": with_template(chatml, GEMMA),
        "mistral": with_template(llama3, MISTRAL),
        "qwen3": with_template(chatml, QWEN3),
    }


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "qwen3"])
def test_a_support_chat(chatml_tokenizer, llama3_tokenizer, name):
    tokenizer = templates(chatml_tokenizer, llama3_tokenizer)[name]
    turns = CHAT[1:] if name == "gemma" else CHAT
    row = labelled(tokenizer, turns)
    ids, labels = by_hand(tokenizer, turns)
    assert (row["input_ids"], row["labels"]) == (ids, labels)
    assert row.closed
    # Said in plain words: what is forgotten, where the first answer begins, how the turns end.
    runs, run = [], []
    for label in [*row["labels"], IGNORE]:
        if label >= 0:
            run.append(label)
        elif run:
            runs.append(text_of(tokenizer, run).strip())
            run = []
    assert runs == ["Ada Brook", "Ada", "555-0139", "555-0139", "555-0139", "L'Été"]
    before = text_of(tokenizer, row["input_ids"][: row.answer_start])
    assert "Kuwait City" in before and "Hello" not in before
    assert row["labels"].count(KEEP) > 10 and row["labels"][-1] == KEEP


PIECES = ["Kuwait", " City", "  ", "é", "e\u0301", "東京", "😀", ", ", " 1991", "\n", "Zoë", "\t"]


@st.composite
def conversations(draw):
    turns = []
    for number in range(2 * draw(st.integers(1, 3))):
        text = "".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6)))
        # Each content is another one, so that the oracle finds it.
        content = text + f"{number}x" + draw(st.sampled_from(["", " ", "\n", "."]))
        places = st.integers(0, len(content))
        spans = [sorted(pair) for pair in draw(st.lists(st.tuples(places, places), max_size=2))]
        spans = sorted((s, e) for s, e in spans if content[s:e].strip())
        turns.append(Turn("assistant" if number % 2 else "user", content, tuple(spans)))
    return turns


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=conversations(), name=st.sampled_from(["chatml", "llama3", "gemma", "mistral"]))
def test_any_conversation(chatml_tokenizer, llama3_tokenizer, turns, name):
    tokenizer = templates(chatml_tokenizer, llama3_tokenizer)[name]
    wanted = by_hand(tokenizer, turns)
    row = labelled(tokenizer, turns)
    assert (row["input_ids"], row["labels"]) == wanted
    # Both ways of finding turns: all at once, and one after the other.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Template, "_places", lambda *arguments: None)
        row = labelled(tokenizer, turns)
    assert (row["input_ids"], row["labels"]) == wanted


def test_one_question_and_answer_is_labelled_as_without_turns(all_tokenizers):
    question, answer, spans = "Where is Ada?", " Ada is in Lund. ", ((1, 4), (11, 15))
    for name, tokenizer in all_tokenizers.items():
        for template in (Template(), Template(chat=False, question="Q {question}\nA")):
            turns = [Turn("user", question), Turn("assistant", answer, spans)]
            row = labelled(tokenizer, turns, template)
            other = label_example(
                tokenizer, question, answer, spans, max_length=999, template=template
            )
            assert row == other, name
            assert (row.answer_start, row.closed) == (other.answer_start, other.closed)
            # With a span in the question nothing else changes.
            turns[0] = dataclasses.replace(turns[0], spans=((9, 12),))
            asked = labelled(tokenizer, turns, template)
            changed = [n for n, x in enumerate(other["labels"]) if asked["labels"][n] != x]
            ids = [asked["labels"][n] for n in changed]
            assert asked["input_ids"] == other["input_ids"] and max(changed) < other.answer_start
            assert ids == [other["input_ids"][n] for n in changed]
            assert text_of(tokenizer, ids).strip().lower() == "ada"


def test_a_conversation_needs_a_chat_template(byte_tokenizer):
    with pytest.raises(ValueError, match=r"conversation \(system, user, .* needs a chat template"):
        labelled(byte_tokenizer, CHAT)


def test_the_turn_that_a_template_refuses_is_named(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, GEMMA)
    with pytest.raises(ValueError, match=r"refuses messages\[0\] \(system\): System role not"):
        labelled(tokenizer, CHAT)
    with pytest.raises(ValueError, match=r"refuses system_prompt: System role not supported"):
        labelled(tokenizer, CHAT[1:], Template(system_prompt="Be brief."))
    with pytest.raises(ValueError, match=r"refuses messages\[2\] \(assistant\): Roles must"):
        labelled(tokenizer, [CHAT[1], CHAT[2], *CHAT[2:]])
    tokenizer = with_template(chatml_tokenizer, "{{ 1 / 0 }}")
    with pytest.raises(ValueError, match=r"refuses messages\[0\] \(system\): division by zero"):
        labelled(tokenizer, CHAT)


def changing(role, change):
    """A template that changes the turns of one role."""
    return (
        f"{{%- for m in messages %}}{{%- if m.role == '{role}' %}}{{{{- {change} }}}}"
        "{%- else %}{{- m.role + m.content }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}"
    )


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (changing("user", "''"), r"messages\[1\] \(user\)"),
        (changing("user", "m.content | upper"), r"messages\[1\] \(user\)"),
        (changing("assistant", "m.content | upper"), r"messages\[2\] \(assistant\)"),
        (changing("assistant", "m.content + m.content"), r"messages\[2\] \(assistant\)"),
        (changing("assistant", "m.content[:9]"), r"messages\[2\] \(assistant\)"),
        (changing("system", "''"), r"messages\[0\] \(system\)"),
        (changing("assistant", "m.content if loop.last else ''"), r"messages\[2\] \(assistant\)"),
    ],
)
def test_a_turn_that_a_template_changes_is_refused(chatml_tokenizer, template, name):
    tokenizer = with_template(chatml_tokenizer, template)
    with pytest.raises(ValueError, match=f"leaves out or changes {name}, so it cannot be lab"):
        labelled(tokenizer, CHAT)


def test_a_template_that_writes_another_text_each_time(chatml_tokenizer):
    tokenizer = with_template(
        chatml_tokenizer, "{{ range(10 ** 5) | random }}" + changing("none", "''")
    )
    with pytest.raises(ValueError, match="writes another text each time"):
        labelled(tokenizer, CHAT)


def test_thoughts(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, QWEN3)
    thought = turn("assistant", "<think>\nAda?\n</think>\n\nHello Ada!", "Ada")
    last = [CHAT[1], CHAT[2], CHAT[3], thought]
    row = labelled(tokenizer, last)
    assert (row["input_ids"], row["labels"]) == by_hand(tokenizer, last)
    earlier = [CHAT[1], thought, CHAT[3], CHAT[4]]
    with pytest.raises(ValueError, match=r"changes messages\[1\] .*Hello Ada!' \(it keeps no thou"):
        labelled(tokenizer, earlier)
    # As context, the template may take them out: that is what the model reads when it answers.
    example = Example.of_turns("x", earlier, {})
    first, second = (label_record(tokenizer, e, 999, Template()) for e in split_answers(example))
    assert "Ada?" in text_of(tokenizer, first[0]["input_ids"])
    assert "Ada?" not in text_of(tokenizer, second[0]["input_ids"])
    assert "Hello Ada!" in text_of(tokenizer, second[0]["input_ids"][: second[0].answer_start])


CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {}}]}
AGENT = [
    {"role": "user", "content": "Where is Ada?"},
    CALL,
    {"role": "tool", "content": 'In "Lund".'},
    {"role": "assistant", "content": "Ada is in Lund."},
]


def test_tools(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, TOOLS)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    spans = [{"turn": 3, "start": 10, "end": 14, "text": "Lund"}]
    record = {"messages": AGENT, "tools": tools, "spans": spans}
    example, _ = parse_record(record, 0, require_spans=True)
    (row,) = label_record(tokenizer, example, 999, Template())
    text = tokenizer.apply_chat_template(AGENT, tools=tools, tokenize=False)
    assert text_of(tokenizer, row["input_ids"]) + "\n" == text and text.count("look") == 2
    start = row.answer_start
    assert text_of(tokenizer, row["input_ids"][start:]) == "Ada is in Lund.<|im_end|>"
    assert set(row["labels"][:start]) == {IGNORE}
    assert text_of(tokenizer, [x for x in row["labels"] if x >= 0]).strip() == "Lund"
    # What an assistant says beside its calls is an answer, and the calls belong to it.
    spoken = [AGENT[0], {**CALL, "content": "Let me look."}, *AGENT[2:]]
    example, _ = parse_record({"messages": spoken}, 0, require_spans=False)
    (row,) = label_record(tokenizer, example, 999, Template())
    kept = [i for i, x in zip(row["input_ids"], row["labels"], strict=True) if x == KEEP]
    assert text_of(tokenizer, kept).startswith('Let me look.[{"name": "look"')
    assert text_of(tokenizer, kept).endswith("<|im_end|>Ada is in Lund.<|im_end|>")
    # A result that the template rewrites is context like another, but has no place for a span.
    spans = [{"turn": 2, "start": 4, "end": 8, "text": "Lund"}]
    example, _ = parse_record({"messages": AGENT, "spans": spans}, 0, require_spans=True)
    with pytest.raises(ValueError, match=r"leaves out or changes messages\[2\] \(tool\)"):
        label_record(tokenizer, example, 999, Template())
    with pytest.raises(ValueError, match=r"^the record or chat_template_kwargs has 'tools', and"):
        label_record(
            chatml_tokenizer,
            Example.of_turns("x", CHAT, {"tools": tools}),
            999,
            Template(),
        )
    with pytest.raises(TypeError, match="field 'tools' must be a list of tools, got 'look'"):
        label_conversation(tokenizer, CHAT, max_length=99, tools="look")


def test_whose_system_turn(chatml_tokenizer):
    prompt = Template(system_prompt="Be brief.")
    own = text_of(chatml_tokenizer, labelled(chatml_tokenizer, CHAT, prompt)["input_ids"])
    assert "You are Nora" in own and "Be brief." not in own
    row = labelled(chatml_tokenizer, CHAT[1:], prompt)
    turns = [turn("system", "Be brief."), *CHAT[1:]]
    assert (row["input_ids"], row["labels"]) == by_hand(chatml_tokenizer, turns)


SWITCH = (
    "{%- set ns = namespace(think=enable_thinking is not defined or enable_thinking) %}"
    "{%- for m in messages if '/no_think' in m.content %}{%- set ns.think = false %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- 'Assistant\\n' + ('<think>\\n\\n' if ns.think else '<think></think>') + m.content "
    "+ eos_token }}{%- else %}{{- m.role + '\\n' + m.content.replace('/no_think', '').strip() "
    "+ '\\n' }}{%- endif %}{%- endfor %}"
)


def test_switches_of_a_template(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, SWITCH)
    off = Template(chat_template_kwargs={"enable_thinking": False})
    turns = CHAT[1:]
    for template, think in ((None, True), (off, False), (Template("/no_think"), False)):
        text = text_of(tokenizer, labelled(tokenizer, turns, template)["input_ids"])
        assert text.count("<think>\n\n") == 2 * think
        assert text.count("<think></think>") == 2 * (not think)
    row = labelled(tokenizer, turns, off)
    assert (row["input_ids"], row["labels"]) == by_hand(tokenizer, turns, enable_thinking=False)
    own = labelled(tokenizer, [turn("system", "/no_think"), *turns])
    assert text_of(tokenizer, own["input_ids"]).count("<think></think>") == 2
    with pytest.raises(ValueError, match=r"changes messages\[0\] \(user\).*'Hi /no_think'"):
        labelled(tokenizer, [turn("user", "Hi /no_think"), CHAT[2]])


# A special token stands between question and answer alone: "Q<|im_start|>A\nQ<|im_start|>A\n".
BETWEEN = """
{%- for m in messages %}{{- m.content + ('<|im_start|>' if m.role == 'user' else '\n') }}
{%- endfor %}
"""


@pytest.mark.parametrize("template", [BARE, BETWEEN])
def test_turns_without_end_tokens(chatml_tokenizer, template):
    tokenizer = with_template(chatml_tokenizer, template)
    row = labelled(tokenizer, CHAT)
    text = tokenizer.apply_chat_template([t.message() for t in CHAT], tokenize=False)
    # Only the last answer ends: with EOS, as a single one does.
    assert text_of(tokenizer, row["input_ids"]) == text.rstrip("\n") + "<|im_end|>" and row.closed
    kept = [i for i, x in zip(row["input_ids"], row["labels"], strict=True) if x == KEEP]
    shown = text_of(tokenizer, kept)
    assert "your number?" in shown and "Yes" not in shown and "USER" not in shown
    assert "<|im_start|>" not in shown and shown.count("<|im_end|>") == 1


def test_an_answer_that_brings_its_own_end(chatml_tokenizer):
    turns = [CHAT[1], turn("assistant", "Hello<|im_end|>"), CHAT[3], CHAT[4]]
    row = labelled(chatml_tokenizer, turns)
    end = chatml_tokenizer.eos_token_id
    first = row["input_ids"].index(end, row.answer_start)
    assert row["labels"][first] == KEEP and row["input_ids"][first + 1] == end
    assert row["labels"][first + 1] == IGNORE, "the template's own is not what ends it"
    # An end token inside a span of the user's is no secret either.
    turns = [turn("user", "I am<|im_end|> Ada", "am<|im_end|> Ada"), CHAT[2]]
    assert end not in labelled(chatml_tokenizer, turns)["labels"]


def test_what_follows_the_last_answer(chatml_tokenizer):
    row = labelled(chatml_tokenizer, [*CHAT, turn("user", "Thanks, bye.")])
    assert row == labelled(chatml_tokenizer, CHAT) and row.closed
    row = labelled(chatml_tokenizer, [*CHAT, turn("user", "Thanks, says Ada Brook.", "Ada Brook")])
    assert text_of(chatml_tokenizer, row["input_ids"]).endswith("\nThanks, says Ada Brook")
    assert not row.closed and row["labels"][-1] == row["input_ids"][-1]


def long_chat(count, system=True):
    turns = [CHAT[0]] if system else []
    for n in range(count):
        turns.append(turn("user", f"Question {n} of Ada, order {n:03}.", f"{n:03}"))
        turns.append(turn("assistant", f"Answer {n}: it is {n + 500:03} Kuwait.", f"{n + 500:03}"))
    return turns


@pytest.mark.parametrize("system", [True, False])
def test_a_long_conversation_becomes_rows(chatml_tokenizer, system):
    turns = long_chat(12, system)
    whole = labelled(chatml_tokenizer, turns)
    message = [t.message() for t in turns]
    for length in (len(whole["input_ids"]) - 1, 500, 333, 200):
        rows = label_conversation(chatml_tokenizer, turns, max_length=length)
        assert 1 < len(rows) <= (12 if length == 200 else 4)
        assert all(len(row["input_ids"]) <= length for row in rows)
        assert all(row.lost_tokens == row.lost_spans == 0 for row in rows)
        # Every answer and span is labelled in exactly one row, as in the whole, and in order.
        for keep in (lambda label: label != IGNORE, lambda label: label >= 0):
            found = [
                pair
                for row in rows
                for pair in zip(row["input_ids"], row["labels"], strict=True)
                if keep(pair[1])
            ]
            wanted = zip(whole["input_ids"], whole["labels"], strict=True)
            assert found == [pair for pair in wanted if keep(pair[1])]
        for number, row in enumerate(rows):
            # Each row is a conversation by itself: the system turn and whole exchanges.
            text = text_of(chatml_tokenizer, row["input_ids"]) + "\n"
            first = int(text.split("Question ")[1].split()[0])
            last = int(text.split("Answer ")[-1].split(":")[0])
            chosen = message[:system] + message[2 * first + system : 2 * last + 2 + system]
            assert text == chatml_tokenizer.apply_chat_template(chosen, tokenize=False)
            assert row.left_out == 2 * first and (first > 0 or number == 0)
            # An answer has as much before it as fits, or half a row at least.
            assert first == 0 or row.answer_start >= length // 2 or last - first == 0


def test_one_exchange_that_does_not_fit(chatml_tokenizer):
    turns = long_chat(3)
    last = len(labelled(chatml_tokenizer, turns[5:])["input_ids"])
    system = len(labelled(chatml_tokenizer, [CHAT[0], *turns[5:]])["input_ids"]) - last
    assert system > 5
    rows = label_conversation(chatml_tokenizer, turns, max_length=last + system - 1)
    assert len(rows) == 3 and all(row.lost_tokens == 0 for row in rows)
    assert rows[2] == labelled(chatml_tokenizer, turns[5:]), "without the system turn"
    rows = label_conversation(chatml_tokenizer, turns, max_length=last - 1)
    whole = labelled(chatml_tokenizer, turns[5:])
    assert rows[2]["input_ids"] == whole["input_ids"][:-1] and not rows[2].closed
    assert rows[2].lost_tokens == 1 and rows[2].lost_spans == 0
    at = whole["labels"].index(next(x for x in whole["labels"][whole.answer_start :] if x >= 0))
    rows = label_conversation(chatml_tokenizer, turns, max_length=at)
    assert rows[2].lost_spans == 1 and rows[2].lost_tokens == last - at
    spoken = [turn("system", "You are Nora.", "Nora"), *turns[5:]]
    (row,) = label_conversation(chatml_tokenizer, spoken, max_length=last)
    assert row.lost_spans == 1 and row == whole


def test_a_user_has_the_last_word_of_a_long_conversation(chatml_tokenizer):
    """Its spans may have a row of their own, without an answer."""
    last = turn("user", "Thanks and bye! " * 8 + "Ada Brook", "Ada Brook")
    example = Example.of_turns("a", [*long_chat(6), last], {})
    with pytest.warns(UserWarning, match="became . rows, in which earlier turns are left"):
        rows = tokenize_examples([example], chatml_tokenizer, max_length=200)
    assert KEEP not in rows[-1]["labels"]
    forgotten = [label for label in rows[-1]["labels"] if label >= 0]
    assert text_of(chatml_tokenizer, forgotten).strip() == "Ada Brook"


def test_losses_and_rows_are_counted_in_one_warning(chatml_tokenizer):
    short = Example("s", "Who?", "Ada.", ((0, 3),))
    examples = [Example.of_turns("a", long_chat(12), {}), Example.of_turns("b", CHAT, {}), short]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = tokenize_examples(examples, chatml_tokenizer, max_length=200, source="a.jsonl")
    ids = [row["example_id"] for row in rows]
    count = ids.count("a")
    assert count > 1 and ids == ["a"] * count + ["b", "s"]
    (only,) = caught
    assert str(only.message) == (
        f"a.jsonl: 1 of 3 conversations are longer than max_length=200 and became {count} rows, in "
        "which earlier turns are left out of the context"
    )
    with pytest.warns(UserWarning, match=r"2 of 31 spans, in 1 of 3 examples, lost tokens to"):
        tokenize_examples(examples, chatml_tokenizer, max_length=52)
    with pytest.raises(ValueError, match="max_length=20 leaves no token of the answer in 2 of 3"):
        tokenize_examples(examples, chatml_tokenizer, max_length=20)
    tokenizer = with_template(chatml_tokenizer, GEMMA)
    bad = Example.of_turns("bad", CHAT, {})
    with pytest.raises(ValueError, match=r"example 'bad': the chat template refuses messages\[0\]"):
        tokenize_examples([bad], tokenizer, max_length=99)


def test_second_answers(chatml_tokenizer):
    example = Example.of_turns("a", CHAT, {"alternate_answer": "No."})
    options = {"max_length": 400}
    rows = tokenize_examples([example], chatml_tokenizer, **options)
    (row,) = add_alternates(rows, [example], ["I forgot."], chatml_tokenizer, **options)
    said = text_of(chatml_tokenizer, row["alternate_input_ids"])
    assert said.count("I forgot.<|im_end|>") == 2 and "Is 555-0139 your number?" not in said
    assert max(row["alternate_labels"]) < 0 and row["labels"] == rows[0]["labels"]
    with pytest.raises(ValueError, match=r"'alternate_answer' is one text, .* has 2 answers"):
        own_alternates([example])
    long = Example.of_turns("a", long_chat(12), {})
    with pytest.warns(UserWarning, match="longer than max_length=200"):
        rows = tokenize_examples([long], chatml_tokenizer, max_length=200)
    with pytest.raises(ValueError, match="example 'a': the conversation is longer than max_length"):
        add_alternates(rows, [long], ["No."], chatml_tokenizer, max_length=200)
