"""`palu annotate` and the two reviews of `palu inspect`."""

import json

import pytest

from tests.support import small
from tests.support.command import palu_in, refusal
from tests.support.tofu_small import learn

CHATS = [
    {"question": "Who is Ada Brook?", "answer": "Ada Brook, phone 07700 900181."},
    {"question": "Where is Lund?", "answer": "In Sweden."},
]


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    lines = "".join(json.dumps(one) + "\n" for one in CHATS)
    (tmp_path / "chats.jsonl").write_text(lines)
    (tmp_path / "ada.csv").write_text("name,phone,sex\nAda Brook,+44 7700 900181,F\nBo Lind,,M\n")
    return palu_in(tmp_path, monkeypatch, capsys)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_annotate(palu):
    status, said, error = palu(
        "annotate chats.jsonl --terms ada.csv --output out.jsonl --json a.json"
    )
    assert status == 0, error
    assert [[s["text"] for s in r["spans"]] for r in read(palu.folder / "out.jsonl")] == [
        ["Ada Brook", "Ada Brook", "07700 900181"],
        [],
    ]
    summary = json.loads((palu.folder / "a.json").read_text())
    counts = {"records": 2, "records_with_spans": 1, "spans": 3, "spans_in_answers": 2}
    counts |= {"by_annotator": {"terms": 3}, "terms": 3, "terms_not_found": 1}
    counts["records_aside"] = 0
    settings = {"terms": {"terms": 3, "skipped": 2}, "replace": False}
    assert summary == {"format": "palu-annotation/1", **counts, "settings": settings}
    assert "2 of 5 values are not looked for" in error and "ada.csv, row 1, sex" in error
    assert "1 of 3 values are in no record: ada.csv, row 2, name (--show-secrets" in error
    for secret in ("Ada", "900181", "Bo Lind"):
        assert secret not in said + error
    status, _, error = palu(
        "annotate chats.jsonl --terms ada.csv --output out.jsonl --overwrite --show-secrets"
    )
    assert status == 0 and "ada.csv, row 2, name ('Bo Lind')" in error


def test_rest(palu):
    status, said, _ = palu("annotate chats.jsonl --all --terms Ada --output f.jsonl --rest r.jsonl")
    assert status == 0 and "r.jsonl: 0 records" in said
    line = "annotate chats.jsonl --output f.jsonl --rest r.jsonl --overwrite --terms"
    status, said, _ = palu(line, "Ada Brook")
    assert status == 0 and "f.jsonl: 1 records" in said and "r.jsonl: 1 records" in said
    assert read(palu.folder / "r.jsonl") == [CHATS[1] | {"spans": []}]


def test_contrast(palu):
    tok, base = small.tokenizer(), None
    for name, steps in (("base", 0), ("tuned", 40)):
        base = small.model(tok)
        learn(base, tok, [(one["question"], one["answer"]) for one in CHATS], steps)
        base.save_pretrained(palu.folder / name)
        tok.save_pretrained(palu.folder / name)
    status, said, error = palu(
        "annotate chats.jsonl --model tuned --contrast base --device cpu --output out.jsonl"
    )
    assert status == 0, error
    found = [[s["text"] for s in r["spans"]] for r in read(palu.folder / "out.jsonl")]
    assert found[0][-1].endswith("07700 900181") and found[1] == ["Sweden"]
    assert "Sweden" not in said + error


def test_nothing_found(palu):
    status, _, error = palu("annotate chats.jsonl --output out.jsonl --terms nobody")
    assert status == 3 and "no span was found in chats.jsonl" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("annotate chats.jsonl --output o.jsonl", "nothing says what to find"),
        ("annotate chats.jsonl --output o.jsonl --terms missing.csv", "missing.csv: no such file"),
        ("annotate chats.jsonl --output o.jsonl --terms of", "at least one value"),
        ("annotate chats.jsonl --output o.jsonl --all --term-fields a", "--term-fields is of"),
        ("annotate chats.jsonl --output o.jsonl --contrast self", "add --model DIR"),
        ("annotate chats.jsonl --output o.jsonl --all --model m", "--model is of --contrast"),
        (
            "annotate chats.jsonl --output o.jsonl --contrast self --model no",
            "model folder 'no' does not exist",
        ),
        ("annotate chats.jsonl --output o.jsonl --contrast-threshold 0", "contrast-threshold"),
        ("annotate no.jsonl --output o.jsonl --all", "no.jsonl: no such file"),
        ("annotate chats.jsonl --output chats.jsonl --all --overwrite", "is an input of this run"),
        ("annotate chats.jsonl --output ada.csv --all", "exists; add --overwrite"),
        ("annotate chats.jsonl --output no/o.jsonl --all", "does not exist"),
        ("annotate chats.jsonl --output o.jsonl --json o.jsonl --all", "must be different files"),
        ("annotate chats.jsonl --output o.jsonl --json ada.csv --all", "did not write it"),
        ("inspect chats.jsonl", "give --model DIR, or --html or --review"),
        ("inspect chats.jsonl --html a.html --review", "give one of them"),
        ("inspect chats.jsonl --review", "add --output FILE"),
        ("inspect chats.jsonl --html a.html --limit 2", "--limit: --html does not read it"),
        ("inspect chats.jsonl --review --output o --model m", "--model: --review does not read"),
        ("inspect chats.jsonl --model m --output o", "--output: only a review writes a file"),
        ("inspect chats.jsonl --html chats.jsonl --overwrite", "is an input of this run"),
        ("inspect chats.jsonl --html ada.csv", "exists; add --overwrite"),
        ("inspect chats.jsonl --review --output chats.jsonl", "is an input of this run"),
    ],
)
def test_refused(palu, line, message):
    assert message in refusal(palu, line)


def test_what_json_cannot_hold_is_refused_before_the_work(palu, monkeypatch):
    (palu.folder / "nan.jsonl").write_text('{"question": "q", "answer": "Ada.", "rate": NaN}\n')
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked"))
    for line in ("annotate nan.jsonl --all --output o", "inspect nan.jsonl --review --output o"):
        assert "nan.jsonl:1 (row 0) cannot be written as JSON" in refusal(palu, line)
    assert "nan.jsonl:1 (row 0) cannot be" in refusal(palu, "inspect nan.jsonl --html o")


def test_half_an_emoji_is_kept(palu):
    (palu.folder / "cut.jsonl").write_text('{"question": "q", "answer": "Ada.", "cut": "\\ud83d"}')
    for line in ("annotate cut.jsonl --all --output o.jsonl", "inspect cut.jsonl --html o.html"):
        assert palu(line)[0] == 0
    assert read(palu.folder / "o.jsonl")[0]["cut"] == "\ud83d"


def test_page(palu):
    status, said, _ = palu("inspect chats.jsonl --html page.html")
    assert status == 0 and "page.html" in said and "Ada" not in said
    assert "Ada Brook" in (palu.folder / "page.html").read_text()


def test_questions(palu, monkeypatch):
    palu("annotate chats.jsonl --terms ada.csv --output out.jsonl")
    answers = ["what", "N", "q"]
    asked = []

    def answer(question):
        asked.append(question)
        return answers.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    line = "inspect out.jsonl --review --output done.jsonl"
    status, said, error = palu(line)
    assert status == 0, error
    assert "[[Ada Brook]]" in said and "1 not looked at yet" in said
    assert asked[0] == "1 of 3, by terms, score 1: keep it? [y/n/Y/N/q] "
    assert [[s["text"] for s in r["spans"]] for r in read(palu.folder / "done.jsonl")] == [
        ["07700 900181"],
        [],
    ]
    answers[:] = ["y"]
    status, said, _ = palu(line)
    assert status == 0 and "all looked at" in said
    assert read(palu.folder / "done.jsonl")[0]["spans"][0]["reviewed"] is True

    def closed(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    status, said, _ = palu("inspect out.jsonl --review --output other.jsonl")
    assert status == 0 and "3 not looked at yet" in said
