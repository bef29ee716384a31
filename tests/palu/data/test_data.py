"""Data files: what is read, refused and warned of, and the batches made of it."""

import gzip
import itertools
import json
import os
import re
import socket
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palu.data.annotations import Audit, snap
from palu.data.files import load_examples
from palu.data.records import Example
from palu.evaluation.tofu import summarize

QA = {"question": "Who?", "answer": "Basil Mahfouz."}


def write(path, records, **options):
    path.write_text("".join(json.dumps(r, **options) + "\n" for r in records), encoding="utf-8")
    return path


def load(path, **options):
    """Without warnings allowed."""
    options.setdefault("require_spans", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_examples(path, **options)


def warning_of(path, **options):
    options.setdefault("require_spans", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = load_examples(path, **options)
    assert len(caught) <= 1, "one warning a file"
    return examples, str(caught[0].message) if caught else ""


def released(answer, *words, **fields):
    """A row of the released format; words are found in the answer, or given with their place."""
    target = []
    for word in words:
        start = answer.index(word) if isinstance(word, str) else word[1]
        word = word if isinstance(word, str) else word[0]
        target.append({"word": word, "start": start, "end": start + len(word)})
    common = ['{"word": "The", "start": 0, "end": 3}']
    return {
        "question": "Who?",
        "answer": answer,
        "target_words": json.dumps(target),
        "common_words": common,
        **fields,
    }


def test_reads_every_kind_of_record(tmp_path):
    records = [
        {**QA, "spans": [{"start": 6, "end": 13}, {"start": 0, "end": 5}][::-1], "author": 7},
        {**QA, "spans": [[0, 5]], "id": "mine", "text": "kept"},
        {"text": "Basil wrote.", "spans": [{"start": 0, "end": 5, "word": "Basil"}], "id": 12},
        {"text": "Nobody.", "spans": [], "question": None, "answer": None, "target_words": None},
        released("The Basil", "Basil"),
    ]
    examples, warning = warning_of(write(tmp_path / "a.jsonl", records))
    assert "1 rows without target" in warning and warning.count(",") == 0
    common = ['{"word": "The", "start": 0, "end": 3}']
    assert examples == [
        Example("0", "Who?", "Basil Mahfouz.", ((0, 5), (6, 13)), {"author": 7}),
        Example("mine", "Who?", "Basil Mahfouz.", ((0, 5),), {"text": "kept"}),
        Example("12", None, "Basil wrote.", ((0, 5),), {}),
        Example("3", None, "Nobody.", (), {}),
        Example("4", "Who?", "The Basil", ((4, 9),), {"common_words": common}),
    ]


def test_a_retain_set_needs_no_spans(tmp_path):
    path = write(tmp_path / "retain.json", [QA, {**QA, "perturbed_answer": ["x"]}, {"text": "x"}])
    examples = load(path, require_spans=False)
    assert [e.spans for e in examples] == [(), (), ()]
    assert examples[1].extra == {"perturbed_answer": ["x"]}
    with pytest.raises(ValueError, match=r"retain\.json:1 \(row 0\): field 'spans' is missing"):
        load(path)


def test_slices_and_limit(tmp_path):
    path = write(tmp_path / "a.json", [{**QA, "n": n, "spans": [[0, 5]]} for n in range(10)])
    whole = load(path)
    assert [e.id for e in whole] == [str(n) for n in range(10)]
    for text, rows in [
        ("[-4:]", slice(-4, None)),
        ("[:3]", slice(None, 3)),
        ("[2:5]", slice(2, 5)),
        ("[:-8]", slice(None, -8)),
        ("[:]", slice(None)),
        ("[8:99]", slice(8, 99)),
        ("[-99:2]", slice(-99, 2)),
    ]:
        assert load(f"{path}{text}") == whole[rows], "ids are those of the whole file"
    assert load(path, limit=2) == whole[:2]
    assert load(f"{path}[5:]", limit=2) == whole[5:7]
    for text in ("[3]", "[::2]", "[a:b]", "[1:2:3]", "[]"):
        with pytest.raises(
            ValueError, match=re.escape(f"a.json{text}: a slice of rows looks like")
        ):
            load(f"{path}{text}")
    for text in ("[10:]", "[5:5]", "[:0]"):
        with pytest.raises(ValueError, match="takes none of the 10 rows"):
            load(f"{path}{text}")
    odd = write(tmp_path / "b[1:2]", [{**QA, "spans": []}] * 3)
    assert len(warning_of(odd)[0]) == 3, "a file of that very name is that file"


def test_lines_of_any_kind(tmp_path):
    record = {"question": "Où?", "answer": "a\u2028b\u0085c 東京 😀", "spans": [[0, 1]]}
    plain, escaped = json.dumps(record, ensure_ascii=False), json.dumps(record)
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\ufeff" + plain + "\r\n\n  \n" + escaped).encode())
    examples = load(path)
    assert [(e.id, e.answer) for e in examples] == [
        ("0", record["answer"]),
        ("1", record["answer"]),
    ]
    path.write_text("\n" + json.dumps([record, record], indent=2), encoding="utf-8")
    assert load(path) == examples, "a JSON list is read too"


@pytest.mark.parametrize(
    ("codec", "size", "unit"), [("utf-16-le", 2, "UTF-16 code units"), ("utf-8", 1, "UTF-8 bytes")]
)
def test_offsets_that_count_something_else_are_known_by_their_text(tmp_path, codec, size, unit):
    answer = "Ada, é💩💩: Ada Brook of 東京 💩."

    def span(covered, start, **said):
        at = len(answer[:start].encode(codec)) // size
        return {"start": at, "end": at + len(covered.encode(codec)) // size, **said}

    ada = answer.rindex("Ada")
    spans = [
        span("Ada", 0, text="Ada"),
        span("Ada Brook", ada, word="Ada Brook"),
        span("東京 💩.", answer.index("東"), text="東京 💩."),  # ends beyond the characters
        span("💩", 6),  # says nothing: as the others of its row
    ]
    path = write(
        tmp_path / "a.jsonl", [{"text": answer, "spans": spans}, {**QA, "spans": [[0, 5]]}]
    )
    examples, warning = warning_of(path)
    words = [answer[start:end] for start, end in examples[0].spans]
    assert words == ["Ada", "💩", "Ada Brook", "東京 💩."]
    assert "2 rows with 5 spans: " in warning
    assert warning.endswith(f", 4 spans placed by offsets in {unit}, as their text says")
    within = {"start": spans[1]["start"], "end": spans[1]["end"] + 1, "text": "Ada Brook"}
    path = write(tmp_path / "b.jsonl", [{"text": answer, "spans": [spans[0], within]}])
    with pytest.raises(
        ValueError, match=r"b\.jsonl:1 \(row 0\): field 'spans': spans\[1\] says 'Ada Brook'"
    ):
        load(path)


@pytest.mark.parametrize("sequence", ["list of objects", "object of lists"])
def test_folder_of_datasets(tmp_path, sequence):
    datasets = pytest.importorskip("datasets")
    spans = [[{"start": 0, "end": 5}], [], [{"start": 0, "end": 5}, {"start": 6, "end": 13}]]
    table = {"question": ["Who?"] * 3, "answer": [QA["answer"]] * 3, "spans": spans}
    if sequence == "object of lists":
        table["spans"] = [{key: [s[key] for s in row] for key in ("start", "end")} for row in spans]
    folder = tmp_path / "table"
    datasets.Dataset.from_dict(table).with_format("numpy").save_to_disk(folder)
    examples, warning = warning_of(folder)
    assert [e.spans for e in examples] == [((0, 5),), (), ((0, 5), (6, 13))]
    assert "1 rows without target" in warning
    assert load(f"{folder}[-1:]") == examples[-1:] and examples[2].id == "2"
    with pytest.raises(ValueError, match=r"table, row 1: field 'answer' is missing"):
        datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["c", None]}).save_to_disk(
            folder
        )
        load(folder, require_spans=False)
    both = tmp_path / "both"
    datasets.DatasetDict({"x": datasets.Dataset.from_dict(table)}).save_to_disk(both)
    with pytest.raises(ValueError, match=re.escape(f"holds several splits, name one: {both}/x")):
        load(both)
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ValueError, match=r"other: not a folder that `datasets.load_from_disk` reads"
    ):
        load(tmp_path / "other")


# A small copy of what the audit of the released annotations found.
AUDITED = [
    released("Born in Kuwait City to Al-Kuwaiti.", "Kuwait", ("Kuwait", 26)),  # ends inside a word
    released("A most-loved book of love.", "love"),  # that, and a repeat which no span touches
    released('"Kazakhstan Echoes" is new.', "Kazakhstan", "Kazakhstan Echoes"),  # overlap
    released("Nothing here."),
    released("Astana, later Astana and Chile.", "Chile", "Astana"),  # unsorted, repeat
    released("The lovely love.", ("love", 11)),  # `lovely` is another word
    released("Chile again: Santiago-Chile.", "Chile", "Santiago-", ("Chile", 22)),  # neighbours
    released(
        "Chile, the old Santiago Chile.", "Chile", "Santiago Chile"
    ),  # labelled in a longer span
]


def test_the_audit_counts_and_accepts(tmp_path):
    path = write(tmp_path / "audited.json", AUDITED)
    examples, warning = warning_of(path)
    assert warning == (
        f"{path}: 8 rows with 13 spans: 2 spans end inside a longer word, 1 overlapping pairs, "
        "1 rows without target, 2 spans with an unlabelled repeat of the same word, "
        "1 rows with unsorted spans (sorted)"
    )
    assert [len(e.spans) for e in examples] == [2, 1, 2, 0, 2, 1, 3, 2]
    assert examples[4].spans == ((0, 6), (25, 30))
    assert examples[2].spans == ((1, 11), (1, 18)), "not repaired unless told"
    assert warning_of(f"{path}[5:]")[1] == ""
    assert "1 rows without target" not in warning_of(path, require_spans=False)[1]


def test_snap_repairs_and_says_so(tmp_path):
    path = write(tmp_path / "audited.json", [*AUDITED, {**QA, "spans": [[5, 8]]}])
    examples, warning = warning_of(path, repair="snap")
    words = [[e.answer[start:end] for start, end in e.spans] for e in examples]
    assert words == [
        ["Kuwait", "Kuwaiti"],
        ["loved"],
        ["Kazakhstan Echoes"],
        [],
        ["Astana", "Chile"],
        ["love"],
        ["Chile", "Santiago-", "Chile"],
        ["Chile", "Santiago Chile"],
        ["Mahfouz"],
    ]
    assert "1 spans begin or end with white space" in warning
    assert warning.endswith("3 spans moved to word ends, 1 spans merged into another")


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("unbelievable", [(2, 6)], [(0, 12)]),
        ("the e\u0301tude", [(4, 5)], [(4, 10)]),  # a combining accent is part of its word
        ("जीवनी है", [(0, 2)], [(0, 5)]),  # vowel signs too
        ("東京で生まれた", [(0, 2)], [(0, 2)]),  # no spaces: the characters do not tell
        ("ไทยแลนด์", [(0, 3)], [(0, 3)]),
        ("Abilov's", [(0, 6)], [(0, 6)]),
        ("a-b", [(0, 1), (2, 3)], [(0, 1), (2, 3)]),
        ("alpha beta", [(1, 2), (3, 4), (5, 7)], [(0, 5), (6, 10)]),
        ("alpha", [(0, 2), (2, 5)], [(0, 5)]),
    ],
)
def test_snap_to_words(text, spans, expected):
    assert snap(text, spans)[0] == expected


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab -é東", min_size=1, max_size=12),
    places=st.lists(st.tuples(*[st.integers(0, 12)] * 2), max_size=4),
)
def test_snap_covers_and_separates(text, places):
    spans = [(min(p), max(p)) for p in places if max(p) <= len(text)]
    spans = [(s, e) for s, e in spans if text[s:e].strip()]
    snapped, _, merged = snap(text, spans)
    inside = {c for s, e in spans for c in range(s, e) if not text[c].isspace()}
    assert inside <= {c for s, e in snapped for c in range(s, e)}
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(snapped))
    assert len(snapped) == len(spans) - merged
    assert snap(text, snapped) == (snapped, 0, 0)


LINES = [json.dumps({**QA, "spans": [[0, 5]]})] * 2


def row(**fields):
    return {**QA, "spans": [], **fields}


def with_spans(*spans):
    return {**QA, "spans": [*spans]}


def covers(start, end, **said):
    return {"start": start, "end": end, **said}


TARGET = '[{"word": "B", "start": 0, "end": 1, "end": 1}]'
WRONG = [
    ("{'question': 1}", r"a.json:4: malformed JSON, .* at column 2"),
    ('{"question": "x"', r"a.json:4: malformed JSON"),
    ("", None),
    ("3", r"a.json:4 \(row 2\): a record must be an object with fields, got int"),
    ("null", "a record must be an object with fields, got NoneType"),
    ({"answer": "x", "spans": []}, r"a.json:4 \(row 2\): field 'question' is missing"),
    ({"question": "x", "spans": []}, "field 'answer' is missing"),
    ({"question": "x", "text": "y", "spans": []}, "field 'answer' is missing beside 'question'"),
    ({"spans": []}, r"field 'question' is missing \(or 'text' for a plain document\)"),
    (QA, "field 'spans' is missing"),
    (row(spans=None), "field 'spans' is missing"),
    (row(question=3), "field 'question' must be a string, got 3"),
    (row(answer=["x"]), r"field 'answer' must be a string, got \['x'\]"),
    (row(answer="  "), "field 'answer' is empty"),
    ({"text": "", "spans": []}, "field 'text' is empty"),
    ('{"question": "x", "answer": "\\ud83d", "spans": []}', "field 'answer' is not valid Unicode"),
    (row(spans="x"), "field 'spans': spans must be a list of spans, got str"),
    (row(spans=covers(0, 5)), "field 'spans': spans must be a list of spans, got dict"),
    (row(spans={"start": [0, 6], "end": [5]}), "field 'spans' has lists of different lengths"),
    (with_spans({"start": 0}), r"field 'spans': spans\[0\] has no 'end'"),
    (with_spans([0, 5], [6, 99]), r"field 'spans': spans\[1\] is \[6, 99\)"),
    (with_spans([-2, 5]), r"spans\[0\] is \[-2, 5\)"),
    (with_spans([5, 5]), r"spans\[0\] is \[5, 5\)"),
    (with_spans(["0", 5]), r"spans\[0\] start must be an integer, got '0'"),
    (with_spans(covers(0, 5, word="Mahfouz")), r"'Mahfouz', but \[0, 5\) of the answer is 'Basil'"),
    (
        with_spans(covers(0, 5, text="Basil"), covers(5, 12, text="Mahfouz")),
        r"spans\[1\] says 'Mahfouz', but \[5, 12\) of the answer is ' Mahfou'",
    ),
    (with_spans(covers(0, 5, text=7)), r"says 7, but \[0, 5\)"),
    ({"text": "💩 Ada", "spans": [covers(0, 3, text="Ada")]}, r"\[0, 3\) of the answer is '💩 A'"),
    (with_spans([0, 10**20]), r"\[0, 100000000000000000000\), it must"),
    ('{"text": "x", "spans": [[0, %s]]}' % ("9" * 4000), r"\[0, 9+\.\.\.9+\), it must satisfy"),
    ('{"text": "x", "spans": [[0, %s]]}' % ("9" * 5000), "an integer has too many digits"),
    ('{"text": "x", "spans": [[NaN, 1]]}', "start must be an integer, got nan"),
    ('{"text": "x", "spans": [[0, 1e400]]}', "end must be an integer, got inf"),
    ('{"text": NaN, "spans": []}', "field 'text' must be a string, got nan"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ('{"text": "x", "a": %s}' % ("[" * 100_000), "nested too deeply"),
    ('{"text": %s, "spans": []}' % ("[" * 900 + "]" * 900), "must be a string, got .{1,100}$"),
    ({"text": ["x" * 10**6], "spans": []}, "must be a string, got .{1,300}$"),
    (released("Basil", target_words="[" * 100_000), "is not JSON: nested too deeply"),
    ('{"text": "x", "spans": [], "text": "y"}', "an object has the key 'text' twice"),
    ('{"text": "x", "spans": [], "a": [{"b": 1, "b": 1}]}', "has the key 'b' twice"),
    ('{"text": "x", "spans": [{"start": 0, "end": 1, "end": 1}]}', "has the key 'end' twice"),
    (released("Basil", target_words=TARGET), "'target_words' is not JSON: .* the key 'end' twice"),
    ('{"text": "x", "spans": [], "id": "\\ud800"}', "field 'id' is not valid Unicode"),
    (released("Basil", ("Basil", 0), target_words="[{"), "field 'target_words' is not JSON"),
    (released("Basil", target_words="{}"), "field 'target_words': spans must be a list"),
    (
        released("Basil", target_words=json.dumps([covers(0, 5)])),
        r"'target_words': spans\[0\] has no 'word'",
    ),
    (released("Basil", ("Basix", 0)), "field 'target_words': spans.* says 'Basix'"),
    (released("Basil", ("Basil", 1)), r"field 'target_words': spans\[0\] is \[1, 6\)"),
    (released("Basil", spans=[]), "fields 'spans' and 'target_words' are both given"),
    (row(id=1.5), "field 'id' must be a string or an integer, got 1.5"),
    (row(id="1"), "field 'id' is '1', which row 1 has already"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_what_is_wrong_is_named(tmp_path, line, words):
    # Behind two good rows and an empty line: line 4, row 2.
    line = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "a.json"
    path.write_text("\n".join([*LINES, "", line]), encoding="utf-8")
    if words is None:
        assert len(load(path)) == 2
        return
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert re.search(r"a\.json:4\b", str(caught.value))
    assert len(load(f"{path}[:2]")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ("{}".encode("utf-16-le"), "or UTF-16 text: save it as UTF-8"),
        ("{}".encode("utf-16-be"), "or UTF-16 text: save it as UTF-8"),
        ("{}".encode("utf-32"), "is UTF-32 text"),
        (gzip.compress(b"{}", mtime=0), "is compressed by gzip"),
        (b"\x80\x04\x00\x01\x00\x00", ":1: holds NUL bytes; it is a binary file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b'["\xed\xa0\x80"]', ":1: not UTF-8 text"),
    ],
)
def test_files_of_another_kind_are_known(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for read in (load, summarize):
        with pytest.raises(ValueError, match=rf"a\.jsonl.*{message}"):
            read(path)


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "sock"))
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in [
        ("fifo", "is a pipe and not a regular file"),
        ("link", "link: is a pipe"),
        ("sock", "is a socket"),
        ("/dev/zero", "^/dev/zero: is a device and not a regular file"),
        ("loop", "loop: cannot be read: Too many levels"),
        ("x" * 5000, "^.{1,300}: cannot be read: File name too long"),
        ("a\0b", "is no name of a file"),
    ]:
        for read, end in ((load, ""), (load, "[:2]"), (summarize, "")):
            with pytest.raises(ValueError, match=message):
                read(f"{tmp_path / name}{end}")
    with pytest.raises(ValueError, match=r"\.\.\.: a slice of rows looks like"):
        load(f"{tmp_path}/none[:{'9' * 5000}]")


def test_a_damaged_folder_of_datasets_is_one_line(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["x"] * 99}).save_to_disk(tmp_path / "table")
    for name, content in [("state.json", "[]"), ("state.json", "[" * 100_000)]:
        (tmp_path / "table" / name).write_text(content)
        with pytest.raises(ValueError, match="table: not a folder that `datasets"):
            load(tmp_path / "table")


def test_repeated_words_and_long_words_are_walked_once():
    # Minutes where each span walks the text again, or each pair of spans is looked at.
    words, count = "word " * 20_000, 20_000
    audit = Audit()
    audit.add(words, [(5 * n, 5 * n + 4) for n in range(count)])
    assert audit.summary() == ""
    audit.add(words, [(0, 4)] * count)
    assert audit.overlapping_pairs == count * (count - 1) // 2
    assert audit.unlabelled_repeat == count
    spans = [(10 * n, 10 * n + 5) for n in range(count)]
    long = "a" * 10 * count + " a"
    audit.add(long, spans)
    assert audit.inside_word == count
    assert snap(long, spans) == ([(0, 10 * count)], count, count - 1)
    assert snap(" " * count + long, [(n, count + 1) for n in range(count)])[1:] == (
        count,
        count - 1,
    )


def test_files_that_cannot_be_read(tmp_path):
    empty = tmp_path / "empty.json"
    for content in (b"", b"\n \n", b"[]"):
        empty.write_bytes(content)
        with pytest.raises(ValueError, match=r"empty\.json: holds no rows"):
            load(empty)
    with pytest.raises(ValueError, match=r"none\.json: no such file or folder"):
        load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"none\.json: no such file or folder"):
        load(f"{tmp_path}/none.json[:3]")
    empty.write_bytes(b'{"a": 1}\n{"question": "\xff"}')
    with pytest.raises(ValueError, match=r"empty\.json:2: not UTF-8 text"):
        load(empty)
    empty.write_text('[{"text": "x", "spans": []},\n {"text": }]')
    with pytest.raises(ValueError, match=r"empty\.json:2: malformed JSON"):
        load(empty)
    empty.write_text('[{"text": "x", "spans": []}, 3]')
    with pytest.raises(ValueError, match=r"empty\.json, row 1: a record must be an object"):
        load(empty)
    for options, words in [
        ({"repair": "fix"}, "repair must be 'none' or 'snap', got 'fix'"),
        ({"limit": 0}, "limit must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=words):
            load(empty, **options)
