"""Every format that examples come in, read to the same examples; the usual mistakes of each."""

import gzip
import itertools
import json
import re
import warnings

import datasets
import numpy
import pandas
import pytest

from palu.data.examples import tokenize_examples
from palu.data.files import load_examples, load_records
from palu.data.records import Example
from tests.support import small

# A number that is a text, a name that pandas would take for nothing, a line feed and a quote.
RECORDS = [
    {"question": "Whose is 07700?", "answer": "It is NA's.", "spans": [{"start": 6, "end": 8}]},
    {"question": 'Say "x",\nplease', "answer": "None", "spans": [{"start": 0, "end": 4}]},
    {"question": "Where?", "answer": "In Århus.", "spans": [{"start": 3, "end": 8}]},
]
EXAMPLES = [
    Example(str(row), r["question"], r["answer"], tuple((s["start"], s["end"]) for s in r["spans"]))
    for row, r in enumerate(RECORDS)
]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path_factory, monkeypatch):
    """`datasets` copies what it reads into its cache; of these data there must be no copy."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME"):
        monkeypatch.setattr(datasets.config, name, str(cache), raising=False)
    yield
    assert not list(cache.iterdir())


def load(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_examples(source, **{"require_spans": True} | options)


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def table(records):
    return datasets.Dataset.from_list(records)


def csv(records, separator=","):
    rows = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in records]
    return pandas.DataFrame(rows).to_csv(index=False, sep=separator).encode()


def parquet(records):
    return pandas.DataFrame(records).to_parquet(index=False)


WRITERS = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda records: json.dumps(records, indent=1).encode(),
    ".csv": csv,
    ".tsv": lambda records: csv(records, "\t"),
    ".parquet": parquet,
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_files_of_every_format(tmp_path, suffix, end):
    path = tmp_path / f"a{suffix}{end}"
    raw = WRITERS[suffix](RECORDS)
    path.write_bytes(gzip.compress(raw, mtime=0) if end else raw)
    assert load(path) == EXAMPLES
    assert load(f"{path}[-1:]") == EXAMPLES[-1:] and load(path, limit=2) == EXAMPLES[:2]
    for content in (b"", raw[:0] if suffix != ".parquet" else parquet([])):
        path.write_bytes(gzip.compress(content, mtime=0) if end else content)
        with pytest.raises(ValueError, match=rf"a\{suffix}.*holds (no rows|nothing)"):
            load(path)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('question, answer, spans\nWho?, "Ada, of Lund", "[[0, 3]]"\n', "Ada, of Lund"),
        ("question ,answer,spans\nWho?, Ada ,\n", " Ada "),
        ("question,answer ,spans, note\nWho?, Ada,,\n", " Ada"),
    ],
)
def test_blanks_around_the_names_of_a_header(tmp_path, text, answer):
    """Where all of them have one before it, the cells have too."""
    (tmp_path / "a.csv").write_text(text)
    (example,) = load_examples(tmp_path / "a.csv", require_spans=False)
    assert (example.question, example.answer) == ("Who?", answer)
    assert example.spans == (((0, 3),) if "[[" in text else ())


def test_cells_of_a_csv_are_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,question,answer\n007,1,07700\n008,2,1e3\n")
    read = [(e.id, e.question, e.answer) for e in load(path, require_spans=False)]
    assert read == [("007", "1", "07700"), ("008", "2", "1e3")], "no number loses its zeros"


def test_a_file_of_bare_texts_is_of_documents(tmp_path):
    """MUSE's corpora; a list in Python is not taken so, since it may be of files."""
    path = tmp_path / "forget.json"
    path.write_text(json.dumps(["Ada is in Lund.", "Bob left."]))
    read = load(path, require_spans=False)
    assert [(e.question, e.answer) for e in read] == [
        (None, "Ada is in Lund."),
        (None, "Bob left."),
    ]
    with pytest.raises(ValueError, match="records, row 0: a record must be an object"):
        load(["forget.json"], require_spans=False)


def test_rows_are_read_as_a_transform_gives_them():
    def masked(batch):
        return {**batch, "answer": [text.replace("Ada", "She") for text in batch["answer"]]}

    (example,) = load(
        table([{"question": "Who?", "answer": "Ada left."}]).with_transform(masked),
        require_spans=False,
    )
    assert example.answer == "She left."


def test_objects(tmp_path):
    assert load(RECORDS) == load(tuple(RECORDS)) == EXAMPLES
    assert load(table(RECORDS)) == load(pandas.DataFrame(RECORDS)) == EXAMPLES
    assert load(table(RECORDS).with_format("numpy")) == EXAMPLES
    both = datasets.DatasetDict({"a": table(RECORDS), "b": table(RECORDS)})
    for source, kind, said in [
        (both, ValueError, "the DatasetDict holds several splits, take one: 'a', 'b'"),
        ([], ValueError, "records: holds no rows"),
        (RECORDS[0], TypeError, "must be a path, .* or a list of records, got dict"),
        (iter(RECORDS), TypeError, "a list of records, got list_iterator"),
        (None, TypeError, "got NoneType"),
        ([*RECORDS, 3], ValueError, "records, row 3: a record must be an object with fields"),
        (table(RECORDS).remove_columns("answer"), ValueError, "the Dataset, row 0: field 'ans"),
        (
            pandas.DataFrame({"text": ["a", 3]}),
            ValueError,
            "the DataFrame is not a table .*text",
        ),
    ]:
        with pytest.raises(kind, match=said):
            load(source)


def test_the_hub_is_asked_for_what_is_not_here(tmp_path, monkeypatch):
    asked = []

    def stand_in(path, name=None, *, split=None):
        asked.append((path, name, split))
        if path == "org/none":
            raise ConnectionError("Couldn't reach 'org/none' on the Hub")
        return table(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    monkeypatch.chdir(tmp_path)
    assert load("org/name:train") == load("org/name/config:test") == EXAMPLES
    assert load("org/name:train[1:]") == EXAMPLES[1:]
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "config", "test"),
        ("org/name", None, "train"),
    ]
    with pytest.raises(ValueError, match=r"^org/none:train: no file .* the hub: Couldn't reach"):
        load("org/none:train")
    with pytest.raises(ValueError, match=r"no such file .*named with its split: org/name:train\)"):
        load("org/name")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name:train").write_bytes(lines(RECORDS[:1]))
    assert load("org/name:train") == EXAMPLES[:1] and len(asked) == 4, "what is here comes first"
    # `datasets` would read a folder that is here, and copy it into its cache.
    (tmp_path / "org" / "here").mkdir()
    for name in ("org/here:train", "org/here/config:train", "./org:train"):
        with pytest.raises(ValueError, match=r"no such file or folder( \(\S+ is here, and only|$)"):
            load(name)
    assert len(asked) == 4


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
]
SHARED = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}]
QA = {"question": "Who?", "answer": "Ada."}


@pytest.mark.parametrize(
    ("record", "read"),
    [
        ({"prompt": "Who?", "completion": "Ada."}, QA),
        ({"prompt": TALK[:2], "completion": TALK[2:]}, {"messages": TALK}),
        ({"instruction": "Who?", "input": "", "output": "Ada.", "text": "t"}, QA | {"text": "t"}),
        (
            {"instruction": "Who?", "input": "In 1843", "output": "Ada."},
            {"question": "Who?\n\nIn 1843", "answer": "Ada."},
        ),
        ({"query": "Who?", "answer": "Ada.", "level": "1", "type": "qa"}, None),
        ({"prompt": "Who?", "gt": "Ada."}, QA),
        ({"messages": TALK, "prompt": "p"}, {"messages": TALK, "prompt": "p"}),
        ({"messages": json.dumps(TALK)}, {"messages": TALK}),
        ({"messages": {k: [t[k] for t in TALK] for k in ("role", "content")}}, {"messages": TALK}),
        (
            {"messages": [*TALK[:2], {"role": "assistant", "content": [{"text": "A"}, "da."]}]},
            {"messages": TALK},
        ),
        ({"conversations": SHARED}, {"messages": TALK[1:]}),
        ({"conversations": SHARED, "system": "Be kind."}, {"messages": TALK}),
        ({"messages": TALK[1:], "system": "Be kind."}, {"messages": TALK}),
        ({"conversations": TALK}, {"messages": TALK}),
        ({"text": "Ada.", "prompt": None}, {"text": "Ada.", "prompt": None}),
    ],
)
def test_layouts(record, read):
    read = QA | {"level": "1", "type": "qa"} if read is None else read
    assert load_records([record]) == [(read, "records, row 0")]
    assert load_records([read])[0][0] == read, "what was read is read again as it is"


@pytest.mark.parametrize(
    "spans",
    [
        [{"turn": 1, "start": 0, "end": 3}],
        [{"turn": numpy.int64(1), "start": 0, "end": 3}],
        {"turn": [1], "start": [0], "end": [3]},
        '[{"turn": 1, "start": 0, "end": 3}]',
    ],
)
def test_the_system_prompt_beside_a_conversation_moves_its_spans(spans):
    record = {"conversations": SHARED, "system": "Be kind.", "spans": spans}
    (example,) = load([record])
    assert [t.role for t in example.turns] == ["system", "user", "assistant"]
    assert example.spans == ((0, 3),)


@pytest.mark.parametrize("columns", [{"question": "f", "answer": "a"}, "question=f, answer=a"])
def test_columns(columns):
    record = {"f": "Who?", "a": "Ada.", "answer": "kept", "spans": [[0, 3]]}
    (example,) = load([record], columns=columns)
    assert example == Example("0", "Who?", "Ada.", ((0, 3),), {"original_answer": "kept"})
    chat = {"talk": SHARED, "question": "q", "answer": "a"}
    assert load_records([chat], "messages=talk")[0][0]["messages"] == TALK[1:]
    marked = {"prompt": "Who?", "completion": "Ada.", "names": [[0, 3]]}
    assert load([marked], columns={"spans": "names"})[0].spans == ((0, 3),)


@pytest.mark.parametrize(
    ("record", "columns", "said"),
    [
        (
            {"a": 1, "b": "x"},
            None,
            r"a list with the columns 'a', 'b', and question/answer",
        ),
        ({"prompt": "x", "spans": []}, None, "field 'completion' is missing beside 'prompt'"),
        ({"query": "x"}, None, "field 'answer' is missing beside 'query'"),
        (
            QA | {"messages": TALK},
            None,
            "both question/answer and messages: name what holds, .*question=question,answer=answer",
        ),
        (
            {"prompt": "x", "completion": "y", "gt": "z"},
            None,
            "prompt/completion and prompt/gt",
        ),
        ({"conversations": "x"}, None, "field 'conversations' is not JSON"),
        ({"conversations": 3}, None, "field 'conversations' must be a list of messages, got 3"),
        ({"conversations": [3]}, None, r"conversations\[0\] must be an object"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, None, r"\[0\]: 'from' must be one"),
        ({"conversations": [{"from": "gpt"}]}, None, r"conversations\[0\] has no 'value'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            None,
            r"messages\[0\]: content has a part of type 'image', and only text is read",
        ),
        (QA, "question=frage", "no column 'frage' for the field 'question'; the columns are"),
        (QA, "question", "columns must be FIELD=COLUMN with commas between them"),
        (QA, "frage=question", "columns has no field 'frage'; it must be one of question, answer"),
        (QA, "answer=a,answer=b", "columns names a field twice"),
        (QA, "answer=a,text=b", "columns names answer, text; a record is a question and"),
        (QA, ["answer"], "columns must be field -> column"),
    ],
)
def test_a_layout_that_is_none_is_named(record, columns, said):
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        load_records([QA | {"frage": "x"} if "frage" in said else QA, record][1:], columns)
    assert "\n" not in str(caught.value)


def test_one_layout_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([QA, {"text": "A document."}, {"messages": TALK}]))
    said = r"a\.jsonl:3 \(row 2\): has messages and row 0 has question/answer: all rows of a file"
    with pytest.raises(ValueError, match=said):
        load(path, require_spans=False)
    assert len(load(f"{path}[:2]", require_spans=False)) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            b"Who?,Ada.\nWhere?,Here.\n",
            r"row 0: CSV .*first line names .* 'Who\?'",
        ),
        (
            "a.csv",
            b"question;answer\na;b\n",
            r"csv:1: its header 'question;answer' has ';'",
        ),
        ("a.csv", b"question\tanswer\na\tb\n", "has tabs between the columns, .* CSV .* expected"),
        ("a.tsv", b"question,answer\na,b\n", r"has commas between .* TSV \(.*\) was expected"),
        ("a.csv", b"question,answer\na,b\na,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"question,answer\na,b,c\n", "more columns than the header, which has 2"),
        ("a.csv", b"question,answer\na\n", "row 0: field 'answer' is missing"),
        ("a.csv", b"question,answer\nx,y\n,y\n", "row 1: field 'question' is missing"),
        ("a.csv", b"question,answer,answer\na,b,c\n", "csv:1: the header names .* 'answer' twice"),
        ("a.csv", b"question,answer, answer\na,b,c\n", "the header names .* 'answer' twice"),
        ("a.csv", b'question,answer\na,"b\n', "is not a table .*: EOF inside string"),
        ("a.csv", b"question,answer,spans\na,b,[[0\n", "row 0: field 'spans' is not JSON"),
        ("a.csv", "question,answer\na,å\n".encode("latin-1"), "csv:2: not UTF-8 text"),
        ("a.csv", lines([QA]), "holds JSON lines, and by its name CSV .* rename it to .jsonl"),
        ("a.xlsx", b"PK\3\4", "is a spreadsheet, and palu reads .*: save it as .csv"),
        ("a.csv", b"", "csv: holds no rows"),
        ("a.csv", b"question,answer\n", "csv: holds no rows"),
        ("a.csv", parquet([QA]), "holds Parquet, and by its name CSV .* rename it to .parquet"),
        ("a.jsonl", b"question,answer\na,b\n", r":1: malformed JSON.*holds CSV .* object a line"),
        ("a.json", b'{\n "data": []\n}', ":1: malformed JSON.*one JSON object over several lines"),
        ("a.jsonl", lines([{"data": [QA]}]), r":1 \(row 0\): JSON lines with the columns 'data'"),
        ("a.jsonl", b"<html>\n", "the file holds HTML or XML"),
        ("a.jsonl", lines([QA]) + b"a,b\n", r":2: malformed JSON, Expecting value at column 1$"),
        ("a.parquet", lines([QA]), "holds JSON lines, and by its name Parquet was expected"),
        ("a.parquet", b"", "holds nothing, and by its name Parquet was expected"),
        ("a.parquet", b"\0\1", "holds something else, and by its name Parquet was expected"),
        ("a.parquet", parquet([QA])[:-9], "is a damaged Parquet file"),
        ("a.jsonl.gz", lines([QA]), "holds no gzip data, and by its name gzip was expected"),
        ("a.jsonl.gz", gzip.compress(lines([QA] * 99), mtime=0)[:-9], "is damaged: gzip says"),
        (
            "a.jsonl",
            gzip.compress(lines([QA]), mtime=0),
            r"compressed by gzip: name it .*a\.jsonl\.gz",
        ),
        ("a.txt", lines([QA]), "holds JSON lines, and by its name plain text was expected"),
        ("a.txt", b" \n ", "txt: holds no rows"),
        ("a", parquet([{"question": "x"}]), "a, row 0: field 'answer' is missing"),
    ],
)
def test_the_usual_mistakes(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load(path, require_spans=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


TEXTS = [
    "one two  three\n\n" * 150,
    "x" * 3000,
    "東京で生まれた。" * 150,
    "a 😀\u2028" * 500,
    "short",
]


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_is_cut_into_windows_that_overlap(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    tok = small.tokenizer()
    warnings.simplefilter("error")  # of what is cut
    for options in ({}, {"tokenizer": tok, "max_length": 24}):
        read = load_records(path, **options)
        places = [re.search(r"characters (\d+) to (\d+)", where).groups() for _, where in read]
        places = [(int(start), int(end)) for start, end in places]
        assert [record["text"] for record, _ in read] == [text[s:e] for s, e in places]
        assert places[0][0] == 0 and places[-1][1] == len(text.rstrip())
        for (start, end), (after, last) in itertools.pairwise(places):
            assert start < after < end < last, "they overlap and go on"
            assert end - after >= (end - start) // 9 or " " in text
        if options:
            # None is cut when it is tokenized, and none is much shorter than need be.
            rows = tokenize_examples(load(path, require_spans=False, **options), tok, max_length=24)
            sizes = [len(row["input_ids"]) for row in rows]
            assert max(sizes) <= 24 and all(n > 9 for n in sizes[:-1])
        else:
            sizes = [len(record["text"].encode()) for record, _ in read]
            assert max(sizes) <= 1000 and all(n > 500 for n in sizes[:-1])
        examples = load(path, require_spans=False, **options)
        assert [e.id for e in examples] == [str(n) for n in range(len(places))]
    with pytest.raises(ValueError, match="tokenizer and max_length must be given together"):
        load_records(path, max_length=9)


def test_blanks_longer_than_a_window_make_no_blank_window(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two" + " \n" * 1500 + "three four" + "\n" * 999 + "five", "utf-8")
    for options in ({}, {"tokenizer": small.tokenizer(), "max_length": 24}):
        texts = [example.answer for example in load(path, require_spans=False, **options)]
        assert " ".join(texts).split() == ["one", "two", "three", "four", "five"]
        assert not any(text[0].isspace() for text in texts)
