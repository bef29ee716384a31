"""What annotators find comes into the records, and nothing else changes."""

import pytest

from palu.annotation import Found, Terms, Whole, annotate, texts_of
from palu.data.records import parse_record


class Fixed:
    """Finds a word wherever it stands."""

    def __init__(self, name, word, score=1.0):
        self.name, self.word, self.score, self.settings = name, word, score, {}

    def find(self, examples):
        for example in examples:
            yield [
                Found(number, at, at + len(self.word), self.score)
                for number, text in enumerate(texts_of(example))
                if (at := text.content.find(self.word)) >= 0 and text.answer
            ]


DOCUMENT = {"text": "Ada Brook lives in Lund.", "source": {"page": 3}}
QUESTION = {"id": 7, "question": "Where?", "answer": " Ada Brook lives in Lund. "}


def test_whole_answers():
    done = annotate([DOCUMENT, QUESTION], annotators=[Whole()])
    by = {"annotator": "all", "score": 1.0}
    whole = {"start": 0, "end": 24, "text": DOCUMENT["text"]} | by
    assert done.records[0] == DOCUMENT | {"spans": [whole]}
    assert done.records[1] == QUESTION | {"spans": [whole | {"start": 1, "end": 25}]}
    assert done.summary == {
        "format": "palu-annotation/1",
        "records": 2,
        "records_with_spans": 2,
        "spans": 2,
        "spans_in_answers": 2,
        "by_annotator": {"all": 2},
        "terms": 0,
        "terms_not_found": 0,
        "records_aside": 0,
        "settings": {"all": {}, "replace": False},
    }


def test_overlaps_become_one_span():
    records = [DOCUMENT | {"spans": [{"start": 19, "end": 23, "why": "town"}]}]
    finders = [Fixed("a", "Ada Brook", 0.5), Fixed("b", "Brook lives", 0.8), Fixed("c", "Lund.")]
    done = annotate(records, annotators=finders)
    assert done.records[0]["spans"] == [
        {"start": 0, "end": 15, "text": "Ada Brook lives", "annotator": "a+b", "score": 0.8},
        {
            "start": 19,
            "end": 24,
            "text": "Lund.",
            "why": "town",
            "annotator": "given+c",
            "score": 1.0,
        },
    ]
    assert done.summary["by_annotator"] == {"a": 1, "b": 1, "c": 1, "given": 1}
    again = annotate(done.records, annotators=finders)
    assert again.records == done.records
    replaced = annotate(records, annotators=[Fixed("b", "nowhere")], replace=True)
    assert replaced.records == [DOCUMENT | {"spans": []}]


CHAT = {
    "ticket": "T1",
    "messages": [
        {"role": "system", "content": "You are Nora."},
        {"role": "user", "content": "I am Mira Okonjo.", "name": "x"},
        {"role": "assistant", "content": "Hello Mira Okonjo of Cork, Mira Okonjo."},
    ],
}


def placed(record):
    """Where a reader of the record finds spans: the text and what is in each of its spans."""
    example, _ = parse_record(record, 0, require_spans=True)
    return [[text[start:end] for start, end in spans] for text, spans in example.texts]


def test_a_span_that_grew_is_to_be_reviewed_again():
    kept = {"start": 0, "end": 9, "reviewed": True}
    for finder, reviewed in ((Fixed("a", "Brook"), True), (Fixed("a", "Brook lives"), None)):
        (record,) = annotate([DOCUMENT | {"spans": [kept]}], annotators=[finder]).records
        (span,) = record["spans"]
        assert span["annotator"] == "given+a" and span.get("reviewed") is reviewed


@pytest.mark.parametrize("inside", [False, True])
def test_spans_as_tables_have_them_keep_what_they_say(inside):
    spans = {"start": [0, 19], "end": [9, 23], "annotator": ["pii", "b"], "score": [0.5, None]}
    spans["kind"] = ["PERSON", None]
    record = DOCUMENT | {"spans": spans}
    if inside:
        message = {"role": "assistant", "content": DOCUMENT["text"], "spans": spans}
        record = {"messages": [{"role": "user", "content": "Who?"}, message]}
    (record,) = annotate([record], annotators=[Fixed("none", "nothing")]).records
    said = [{**span, "turn": 0} for span in record["spans"]]
    assert said == [
        {
            "start": 0,
            "end": 9,
            "text": "Ada Brook",
            "turn": 0,
            "kind": "PERSON",
            "annotator": "pii",
            "score": 0.5,
        },
        {"start": 19, "end": 23, "text": "Lund", "turn": 0, "annotator": "b"},
    ]


def test_spans_of_conversations_and_questions():
    asked = {"question": "Is Mira Okonjo there?", "answer": "No, Mira Okonjo left."}
    chat, pair = annotate([CHAT, asked], annotators=[Terms(["Mira Okonjo"])]).records
    assert {k: v for k, v in chat.items() if k != "spans"} == CHAT
    assert placed(chat) == [[], ["Mira Okonjo"], ["Mira Okonjo"] * 2]
    assert placed(pair) == [["Mira Okonjo"], ["Mira Okonjo"]]
    assert [span.get("field") for span in pair["spans"]] == ["question", None]


def test_spans_that_messages_have_stay():
    inside = CHAT["messages"][2] | {"spans": [{"start": 21, "end": 25, "annotator": "me"}]}
    record = CHAT | {"messages": [*CHAT["messages"][:2], inside]}
    (done,) = annotate([record], annotators=[Terms(["Mira Okonjo of"])]).records
    assert placed(done) == [[], [], ["Mira Okonjo of", "Cork"]]
    assert done["messages"] == CHAT["messages"]
    assert [span["annotator"] for span in done["spans"]] == ["terms", "me"]
    asked = {
        "question": "Mira?",
        "answer": "\U0001f600 Mira in Cork",
        "spans": [
            {"field": "question", "start": 0, "end": 4, "annotator": "a"},
            {"start": 3, "end": 7, "text": "Mira", "annotator": "b"},  # in UTF-16
        ],
    }
    (done,) = annotate([asked], annotators=[Terms(["Cork"])]).records
    assert placed(done) == [["Mira"], ["Mira", "Cork"]]
    assert [span["annotator"] for span in done["spans"]] == ["a", "b", "terms"]


def test_released_annotations_stay():
    record = {"question": "Q", "answer": "In Lund.", "target_words": [{"word": "Lund"}]}
    record["target_words"][0] |= {"start": 3, "end": 7}
    (done,) = annotate([record], annotators=[Terms(["nowhere"])]).records
    assert placed(done) == [[], ["Lund"]] and "target_words" not in done


def test_refused():
    with pytest.raises(ValueError, match="one or more"):
        annotate([DOCUMENT], annotators=[])
    with pytest.raises(ValueError, match="of another name"):
        annotate([DOCUMENT], annotators=[Whole(), Whole()])
    with pytest.raises(ValueError, match="f:2: field 'answer' is missing"):
        annotate([({"question": "Q"}, "f:2")], annotators=[Whole()])
    with pytest.raises(ValueError, match="annotator 'a' gave"):
        annotate([{"text": "ab  c"}], annotators=[Fixed("a", "  ")])
