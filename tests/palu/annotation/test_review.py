"""The page and the questions that correct spans: what they write is what a reader reads."""

import json

import pytest

from palu.annotation.output import to_json
from palu.annotation.review import Review, review_page
from palu.data.records import parse_record

HOSTILE = (
    "<script>document.title='x'</script><!--</script> & \u2028 \u202eabc \x1b[31m " + "w" * 500
)
RECORDS = [
    {
        "ticket": 12345678901234567890,
        "messages": [
            {"role": "user", "content": "Call \U0001f600 Mira on 07700 900181."},
            {"role": "assistant", "content": "Mira Okonjo, 07700 900181."},
        ],
        "rate": 1.0,
        "spans": [
            {"turn": 0, "start": 7, "end": 11, "text": "Mira", "annotator": "terms", "score": 1.0},
            {
                "turn": 1,
                "start": 0,
                "end": 11,
                "annotator": "terms+pii",
                "score": 0.85,
                "note": 2.0,
            },
            {"turn": 1, "start": 13, "end": 25},
        ],
    },
    {"text": HOSTILE, "id": "<b>", "spans": []},
    {"question": "Is Mira in?", "answer": "Mira is.", "spans": [{"start": 0, "end": 4}]},
]
ROWS = [(record, f"row {number}") for number, record in enumerate(RECORDS)]


def texts(record):
    example, _ = parse_record(record, 0, require_spans=True)
    return [[text[start:end] for start, end in spans] for text, spans in example.texts]


@pytest.fixture
def page(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(review_page(ROWS, "dir/a <b>.jsonl"), encoding="utf-8")
    browser.open(path)
    yield browser
    browser.js("changed = false")  # else the next page asks whether to leave this one


def written(browser):
    return [json.loads(line) for line in browser.js("lines()")]


def test_page_writes_what_it_was_given(page):
    lines = page.js("lines().join('')").split("\n")
    assert lines.pop() == ""
    for line, record in zip(lines, RECORDS, strict=True):
        again = json.loads(line)
        assert texts(again) == texts(record)
        kept = {key: value for key, value in record.items() if key != "spans"}
        assert to_json({k: again[k] for k in kept}) == to_json(kept)
    first = json.loads(lines[0])["spans"]
    assert [span.get("note") for span in first] == [None, 2.0, None]
    assert '"note": 2.0' in lines[0] and '"ticket": 12345678901234567890' in lines[0]


def test_page_is_all_there_is(page):
    """Nothing is loaded, hostile text stays text, nothing is wider than the window."""
    assert [url for url in page.requests if not url.startswith("file:")] == [] and not page.said
    page.press("j")
    assert page.js("document.querySelector('.content').textContent") == HOSTILE
    assert page.js("document.querySelectorAll('script').length") == 2
    assert page.js("document.title") == "Review of spans"
    for width in (320, 400, 1600):
        page.resize(width)
        assert page.overflow() <= 0
    assert ("heading", "Review of spans: dir/a <b>.jsonl") in page.accessible()


def test_keys(page):
    for key in ("n", "n", " "):
        page.press(key)
    boxes = [name for role, name in page.accessible() if role == "checkbox"]
    assert boxes == ["Mira", "Mira Okonjo", "07700 900181"]
    focused = "document.activeElement.getAttribute('aria-checked')"
    assert page.js(focused) == "false"
    assert texts(written(page)[0]) == [["Mira"], ["07700 900181"]]
    page.press("n")  # 07700 900181
    page.press("n")  # past the record without spans
    assert page.js("document.activeElement.textContent") == "Mira"
    assert "Record 2" in page.js("document.getElementById('where').textContent")
    page.press("a")  # both that read Mira
    assert [texts(record) for record in written(page)] == [
        [[], ["07700 900181"]],
        [[]],
        [[], []],
    ]
    page.press("p")
    page.press("p")
    page.press("Enter", 13)
    assert texts(written(page)[0]) == [[], ["Mira Okonjo", "07700 900181"]]
    assert "not saved yet" in page.js("document.getElementById('counts').textContent")


def select(browser, text, start, end):
    browser.js(
        f"""(() => {{ const node = document.querySelector('[data-text="{text}"]').firstChild;
        getSelection().setBaseAndExtent(node, {start}, node, {end}); }})()"""
    )


def test_mark_what_is_selected(page):
    page.press("j")
    page.press("j")
    select(page, 0, 2, 8)  # of the question; with the space before it
    page.press("m")
    record = written(page)[2]
    assert texts(record) == [["Mira"], ["Mira"]]
    span = {"start": 3, "end": 7, "text": "Mira", "field": "question", "annotator": "review"}
    assert record["spans"][0] == span | {"score": 1.0}
    page.press("k")
    page.press("k")
    select(page, 0, 0, 8)  # "Call", the emoji of two UTF-16 units
    page.press("m")
    assert texts(written(page)[0])[0] == ["Call \U0001f600", "Mira"]
    page.js("getSelection().selectAllChildren(document.querySelector('[data-text=\"0\"]'))")
    page.press("m")  # over the spans there
    assert texts(written(page)[0])[0] == [RECORDS[0]["messages"][0]["content"]]


def test_three_clicks_select_a_turn(page):
    page.press("j")
    page.press("j")
    box = "document.querySelector('[data-text=\"0\"]').getBoundingClientRect()"
    x, y = page.js(f"(() => {{ const box = {box}; return [box.x + 12, box.y + 10]; }})()")
    for count in (1, 2, 3):
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x, "y": y, "button": "left", "clickCount": count}
            page._ask("Input.dispatchMouseEvent", type=kind, **where)
    page.press("m")
    assert texts(written(page)[2]) == [["Is Mira in?"], ["Mira"]]
    page.js(
        """(() => { const [a, b] = document.querySelectorAll('.content');
        getSelection().setBaseAndExtent(a, 0, b, 1); })()"""
    )
    page.press("m")  # over two turns: nothing
    assert texts(written(page)[2]) == [["Is Mira in?"], ["Mira"]]


def test_search(page):
    def search(text):
        page.js(
            f"""(() => {{ const box = document.getElementById('search'); box.value = '{text}';
            box.dispatchEvent(new Event('input')); }})()"""
        )
        return page.js("document.getElementById('where').textContent")

    assert search("is mira").startswith("Record 2")
    assert search("nobody") == "No record is like this."
    assert search("").startswith("Record 2")


def test_terminal_goes_on_where_it_stopped():
    review = Review(ROWS)
    example, text, mark = next(review.open())
    assert text.content[mark.start : mark.end] == "Mira"
    review.decide(example, mark, keep=False, every=True)
    example, text, mark = next(review.open())
    assert text.content[mark.start : mark.end] == "Mira Okonjo"
    review.decide(example, mark, keep=True)
    assert (review.kept, review.dropped) == (1, 2)
    done = review.records()
    assert [texts(r) for r in done] == [[[], ["Mira Okonjo", "07700 900181"]], [[]], [[], []]]
    again = Review(ROWS, [(record, "") for record in done], "out.jsonl")
    assert (review.absent, again.absent) == (0, 2)
    ((_, text, mark),) = again.open()
    assert text.content[mark.start : mark.end] == "07700 900181"
    other = [(RECORDS[2], "")]
    with pytest.raises(ValueError, match=r"out.jsonl: exists and is no review of these records"):
        Review(other, [(record, "") for record in done], "out.jsonl")
