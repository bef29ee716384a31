"""Records of conversations and of questions with spans: what is read, and what is refused."""

import json
import warnings

import pytest

from palu.data.files import load_examples
from palu.data.records import Example, Turn, parse_record, split_answers

SYSTEM = {"role": "system", "content": "You are Nora."}
ASKED = {"role": "user", "content": "I am Ada Brook."}
SAID = {"role": "assistant", "content": "Hello Ada, 💩 call 555-0139."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}], "name": None}
FOUND = {"role": "tool", "content": "Lund", "tool_call_id": "1"}
THANKS = {"role": "user", "content": "Thanks."}
LAST = {"role": "assistant", "content": "It goes to Lund."}
MESSAGES = [SYSTEM, ASKED, SAID, CALL, FOUND, THANKS, LAST]


def span(number, text, **fields):
    start = MESSAGES[number]["content"].index(text)
    return {"start": start, "end": start + len(text), "text": text, **fields}


def parsed(record, **options):
    return parse_record(record, 0, require_spans=True, **options)[0]


WANTED = ((), ((5, 14),), ((6, 9), (18, 26)), (), (), (), ((11, 15),))


def marked_messages():
    marks = {1: ["Ada Brook"], 2: ["555-0139", "Ada"], 6: ["Lund"]}
    return [
        {**message, "spans": [span(n, text) for text in marks.get(n, [])]}
        for n, message in enumerate(MESSAGES)
    ]


@pytest.mark.parametrize("inside", [False, True])
def test_a_conversation_with_its_spans(inside):
    spans = [span(6, "Lund", turn=6), span(2, "555-0139", turn=2), span(1, "Ada Brook", turn=1)]
    record = {"messages": MESSAGES, "spans": [*spans, span(2, "Ada", turn=2)]}
    if inside:
        record = {"messages": marked_messages(), "spans": None}
    example = parsed({**record, "ticket": "T1", "id": 7, "text": "kept"})
    assert example.id == "7" and example.extra == {"ticket": "T1", "text": "kept"}
    assert tuple(turn.spans for turn in example.turns) == WANTED
    assert [turn.answer for turn in example.turns] == [False, False, True, *[False] * 3, True]
    assert (example.question, example.answer, example.spans) == (
        "Thanks.",
        LAST["content"],
        ((11, 15),),
    )
    # What a template is given is what the record has, without what is None.
    given = [{k: v for k, v in m.items() if v is not None} for m in MESSAGES]
    given[3]["content"] = None
    assert [turn.message() for turn in example.turns] == given
    assert hash(example.turns[3]) is not None


def test_an_example_for_each_answer():
    example = parsed({"messages": marked_messages(), "id": "T1"})
    first, second = split_answers(example)
    assert (first.id, first.question, first.answer) == ("T1#1", ASKED["content"], SAID["content"])
    assert first.spans == WANTED[2] and [t.spans for t in first.turns] == [(), (), WANTED[2]]
    assert (second.id, second.question, second.answer) == ("T1#2", "Thanks.", LAST["content"])
    assert [t.content for t in second.turns] == [t.content for t in example.turns]
    assert [t.answer for t in second.turns] == [False] * 6 + [True]
    assert [t.spans for t in second.turns] == [()] * 6 + [WANTED[6]]
    # One question and answer is what it would be without `messages`.
    (only,) = split_answers(parsed({"messages": [ASKED, SAID], "spans": [span(1, "Ada", turn=0)]}))
    assert only == Example("0", ASKED["content"], SAID["content"])
    plain = Example("3", "q", "a")
    assert split_answers(plain) == [plain]
    greeting = parsed({"messages": [SYSTEM, SAID], "spans": []})
    assert greeting.question == "" and split_answers(greeting) == [greeting]
    called = parsed({"messages": [ASKED, SAID], "tools": [{"name": "look"}], "spans": []})
    assert split_answers(called) == [called], "what is no conversation has no tools"


@pytest.mark.parametrize("where", [{"field": "question"}, {"turn": 0}])
def test_spans_of_a_question(where):
    record = {"question": "Is Ada in Lund?", "answer": "Ada is."}
    spans = [{"start": 3, "end": 6, "text": "Ada", **where}, {"start": 0, "end": 3, "text": "Ada"}]
    example = parsed({**record, "spans": spans})
    turns = (Turn("user", "Is Ada in Lund?", ((3, 6),)), Turn("assistant", "Ada is.", ((0, 3),)))
    assert example == Example("0", *record.values(), ((0, 3),), {}, turns)
    # For evaluation it is the question and answer that it was.
    assert split_answers(example) == [Example("0", *record.values(), ((0, 3),))]
    answer = [{"start": 0, "end": 3, "field": "answer"}, {"start": 4, "end": 6, "turn": 1}]
    assert parsed({**record, "spans": answer}) == Example("0", *record.values(), ((0, 3), (4, 6)))


def test_offsets_of_javascript_are_known_in_each_message():
    utf16 = {"start": 19, "end": 27, "text": "555-0139", "turn": 2}
    example, marked = parse_record(
        {"messages": MESSAGES, "spans": [utf16, span(6, "Lund", turn=6)]}, 0, require_spans=True
    )
    assert example.turns[2].spans == ((18, 26),)
    assert [text.unit for text in marked if text.spans] == ["UTF-16 code units", "characters"]


def test_the_audit_looks_at_every_answer(tmp_path):
    path = tmp_path / "a.jsonl"
    first = {"messages": MESSAGES, "spans": [{"start": 0, "end": 2, "turn": 6}]}
    again = [{"role": "assistant", "content": "Ada."}]
    second = {"messages": [*MESSAGES, *again], "spans": [span(2, "Ada", turn=2)]}
    path.write_text("".join(json.dumps(r) + "\n" for r in (first, second)))
    with pytest.warns(UserWarning, match="2 rows with 2 spans: 1 spans with an unlabelled repeat"):
        load_examples(path, require_spans=True)
    path.write_text(
        json.dumps({"messages": MESSAGES, "spans": [{"start": 6, "end": 8, "turn": 2}]})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (example,) = load_examples(path, require_spans=True, repair="snap")
    assert example.turns[2].spans == ((6, 9),) and "1 spans moved" in str(caught[0].message)


def test_a_folder_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    records = [
        {"messages": marked_messages()[:3], "spans": None},
        {"messages": [ASKED, LAST], "spans": [span(6, "Lund", turn=1)]},
    ]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "table")
    first, second = load_examples(tmp_path / "table", require_spans=True)
    assert tuple(turn.spans for turn in first.turns) == WANTED[:3]
    assert second.turns == (Turn(**ASKED), Turn(**LAST, spans=((11, 15),)))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hi"}, "field 'messages' must be a list of messages, got 'hi'"),
        ({"messages": []}, r"field 'messages' must be a list of messages, got \[\]"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object with 'role' and 'content', got"),
        (
            {"messages": [{"from": "human", "value": "hi"}]},
            r"messages\[0\] has no 'role', only 'from', 'value'",
        ),
        ({"messages": [ASKED, {"role": "assistant"}]}, r"messages\[1\] has no 'content'"),
        ({"messages": [{**ASKED, "role": 3}]}, r"messages\[0\] 'role' must be a string, got 3"),
        ({"messages": [{**ASKED, "content": 3}]}, r"messages\[0\] 'content' must be a string"),
        ({"messages": [ASKED, {**SAID, "content": " "}]}, r"messages\[1\] is empty: the 'assist"),
        ({"messages": [ASKED], "spans": []}, "field 'messages': no message of the 'assistant'"),
        ({"messages": [ASKED, CALL], "spans": []}, "no message of the 'assistant' says something"),
        ({"messages": MESSAGES}, "field 'spans' is missing: of the record, with the number"),
        ({"messages": MESSAGES, "spans": [[0, 2]]}, r"field 'spans': spans\[0\] has no 'turn'"),
        (
            {"messages": MESSAGES, "spans": [{"start": 0, "end": 2, "turn": 7}]},
            r"spans\[0\] has 'turn' 7; it must be 0 to 6",
        ),
        (
            {"messages": MESSAGES, "spans": [{"start": 0, "end": 2, "turn": "1"}]},
            r"spans\[0\] 'turn' must be an integer, got '1'",
        ),
        (
            {"messages": MESSAGES, "spans": [span(6, "Lund", turn=6), span(2, "Ada", turn=1)]},
            r"field 'spans': spans\[1\] says 'Ada', but \[6, 9\) of messages\[1\] is 'da '",
        ),
        (
            {"messages": MESSAGES, "spans": [{"start": 0, "end": 99, "turn": 6}]},
            r"spans\[0\] is \[0, 99\), .* <= 16, the length of messages\[6\]",
        ),
        (
            {"messages": [ASKED, {**LAST, "spans": [[0, 2], [3, 99]]}]},
            r"messages\[1\], 'spans': spans\[1\] is \[3, 99\), .* the length of its content",
        ),
        ({"messages": [ASKED, {**LAST, "spans": 3}]}, r"messages\[1\], 'spans': spans must be a"),
        (
            {"messages": marked_messages(), "spans": [span(6, "Lund", turn=6)]},
            "the record and its messages both have 'spans'",
        ),
        (
            {"question": "a", "answer": "b", "spans": [{"start": 0, "end": 1, "field": "text"}]},
            r"spans\[0\] has 'field' 'text'; it must be one of question, answer",
        ),
        (
            {"question": "a", "answer": "b", "spans": [{"start": 0, "end": 1, "turn": 2}]},
            r"spans\[0\] has 'turn' 2; it must be 0 to 1",
        ),
        (
            {"question": "a", "answer": "bcd", "spans": [{"start": 0, "end": 3, "turn": 0}]},
            "the length of the question",
        ),
    ],
)
def test_what_is_refused(record, words):
    with pytest.raises((TypeError, ValueError), match=words):
        parsed(record)
