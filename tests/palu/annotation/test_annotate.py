"""What annotators find comes into the records, and nothing else changes."""

from palu.annotation import Found, Whole, annotate, texts_of


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
