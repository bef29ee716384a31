"""The pages in a browser, the report's and the comparison's: each fits, asks for nothing, and what
models and files say stays text."""

import json
import re
from importlib.resources import files
from itertools import pairwise

import pytest

from palu.report import build_report
from palu.report.comparison import write_page
from tests.support import compared, erasure

SCRIPT = "<script>document.title = 'owned'; fetch('http://example.invalid')</script>"
LONG = "x" * 700
RIGHT_TO_LEFT = "\u05e9\u05dc\u05d5\u05dd \u202egnp.exe"
TERMINAL = "\x1b[31mred\x1b]0;title\x07"
HOSTILE = [
    SCRIPT,
    "<img src=http://example.invalid/x.png onerror=alert(1)>",
    "{{ 7 * 7 }}",
    LONG,
    RIGHT_TO_LEFT,
    TERMINAL,
    "</dd></article><style>body { display: none }</style>",
    "\"' onload='alert(1)",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """An erasure of which all is there."""
    model = erasure.write(tmp_path_factory.mktemp("page"))
    build_report(model)
    return model / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Texts that try to be more than text, wherever a file has a text."""
    text = "\n".join(HOSTILE)

    def spoil(value, keep=("format", "status", "id")):
        if isinstance(value, dict):
            return {k: v if k in keep else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(one) for one in value]
        return text if isinstance(value, str) else value

    files = {name: spoil(getattr(erasure, name)()) for name in ("annotation", "attack")}
    files |= {"palu": spoil(erasure.record()), "evaluation": spoil(erasure.evaluation())}
    files["attack"]["settings"] = {"show_secrets": False}
    files["evaluation"]["models"][text] = files["evaluation"]["models"]["retrained"]
    files["attack"]["attacks"][0]["results"][text] = erasure.leaked(1, 12)
    files["annotation"]["by_annotator"][text] = 1
    files["palu"]["settings"][text] = text
    model = erasure.write(tmp_path_factory.mktemp("hostile"), **files)
    forget = model.parent / "forget.jsonl"
    records = [json.loads(line) | {"question": text} for line in forget.read_text().splitlines()]
    forget.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_report(model, forget=forget)
    return model / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison of three methods."""
    return compare(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Many methods and settings, with names that cannot be broken at a space."""
    names = tuple(f"Method_{n}{'_of_a_long_name' * (n % 3)}" for n in range(14))
    return compare(tmp_path_factory.mktemp("large"), methods=names, settings=8, seeds=1)


@pytest.fixture(scope="module")
def hostile_comparison(tmp_path_factory):
    """A comparison of which every text tries to be more than text."""
    text = "\n".join(HOSTILE)
    keep = ("format", "status", "id", "ids", "set", "name")

    def spoil(value):
        if isinstance(value, dict):
            named = {f"{text} {k}" if k == "general" else k: v for k, v in value.items()}
            return {k: v if k in keep else spoil(v) for k, v in named.items()}
        if isinstance(value, list):
            return [spoil(one) for one in value]
        return f"{text} {value}" if isinstance(value, str) else value

    return compare(tmp_path_factory.mktemp("hostile"), spoil, settings=2, seeds=1)


def compare(folder, spoil=lambda content: content, **how):
    content = spoil(compared.write(folder / "cmp", **how))
    for path in [*(folder / "cmp").glob("*.json"), *(folder / "cmp" / "runs").glob("*/run.json")]:
        path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    return write_page(folder / "cmp", content, forget=folder / "forget.jsonl")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("which", ["page", "hostile", "comparison", "hostile_comparison", "large"])
def test_it_fits_and_asks_for_nothing(request, browser, which, width, dark):
    path = request.getfixturevalue(which)
    browser.open(path, width=width, dark=dark)
    assert browser.overflow() == 0
    # Nor is anything cut off: what an element holds is not wider than the element.
    cut = """[...document.querySelectorAll('body *:not(svg *)')].filter(e =>
        e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline' &&
        e.clientWidth > 0).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.js(cut) == []
    # And opened, the parts that one can fold away.
    browser.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.overflow() == 0 and browser.js(cut) == []
    assert browser.requests == [path.as_uri()] and browser.said == []


@pytest.mark.parametrize("which", ["hostile", "hostile_comparison"])
def test_hostile_text_stays_text(request, browser, which):
    browser.open(request.getfixturevalue(which))
    title = {"hostile": "Erasure report: ", "hostile_comparison": "Comparison: "}[which]
    assert browser.js("document.title").startswith(title)
    assert browser.js("document.querySelectorAll('script, img, iframe, link').length") == 0
    assert browser.js("document.querySelectorAll('style').length") == 1
    attributes = """[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())
        .filter(n => n.startsWith('on') || n == 'style' || n == 'src').length"""
    assert browser.js(attributes) == 0
    links = "[...document.querySelectorAll('a')].map(e => e.getAttribute('href'))"
    assert all(href.startswith("#") for href in browser.js(links))
    said = browser.js("document.querySelector('#answers').parentElement.textContent")
    for text in (SCRIPT, "{{ 7 * 7 }}", "onerror=alert(1)>", LONG, "<style>body { display: none }"):
        assert text in said, text
    # Characters that steer are spelled out, wherever they came from; letters are not.
    assert r"\x1b[31mred\x1b]0;title\x07" in said and r"\u202egnp.exe" in said
    assert "\u05e9\u05dc\u05d5\u05dd" in said
    whole = browser.js("document.documentElement.outerHTML")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", whole)
    # A text from right to left turns nothing outside itself.
    isolated = """[...document.querySelectorAll('dd[dir=auto]')]
        .every(e => getComputedStyle(e).unicodeBidi.includes('isolate'))"""
    assert browser.js(isolated)


def test_the_policy_stops_what_would_get_in(browser, page, tmp_path):
    """Should a text ever become markup, it could still neither run nor ask."""
    broken = tmp_path / "broken.html"
    picture = "<img src='http://example.invalid/x.png'><p style='color: red' id='red'>"
    broken.write_text(page.read_text().replace("<main>", f"<main>{SCRIPT}{picture}"))
    browser.open(broken)
    assert browser.js("document.title").startswith("Erasure report")
    assert browser.js("getComputedStyle(document.getElementById('red')).color") != "rgb(255, 0, 0)"
    assert {*browser.requests} - {*browser.blocked} == {broken.as_uri()}
    assert any("Content Security Policy" in line for line in browser.said)


@pytest.mark.parametrize("which", ["page", "comparison"])
def test_a_screen_reader_finds_its_way(request, browser, which):
    browser.open(request.getfixturevalue(which))
    browser.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    nodes = browser.accessible()
    tables = [name for role, name in nodes if role == "table"]
    assert len(tables) >= 6 and all(tables) and len({*tables}) == len(tables)
    unscoped = "[...document.querySelectorAll('th')].filter(e => !e.scope).length"
    assert browser.js(unscoped) == 0
    assert browser.js("[...document.querySelectorAll('tr')].every(e => e.querySelector('th'))")
    pictures = {"masked", "Probability after each epoch of the run"}
    if which == "comparison":
        names = {"A": "PALU", "B": "NPO", "C": "SimNPO"}.items()
        pictures = {"masked", "Forgetting over loss of utility, all methods"}
        pictures |= {f"{letter}: frontier of {name}" for letter, name in names}
        pictures |= {f"{letter}: loss of {name}, 2 runs" for letter, name in names}
        pictures.add("Colours from a probability of 0 to 1")
    assert {name for role, name in nodes if role == "image"} == pictures
    unnamed = """[...document.querySelectorAll('svg')].filter(e =>
        e.getAttribute('aria-hidden') != 'true' && !e.querySelector('title')).length"""
    assert browser.js(unnamed) == 0
    levels = browser.js(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = browser.js("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len({*ids}) == len(ids)
    named = """[...document.querySelectorAll('[aria-labelledby]')]
        .flatMap(e => e.getAttribute('aria-labelledby').split(' '))"""
    targets = "[...document.querySelectorAll('a')].map(e => e.getAttribute('href').slice(1))"
    assert {*browser.js(named), *browser.js(targets)} <= {*ids}
    assert browser.js("document.documentElement.lang") == "en"
    assert {"main", "navigation", "contentinfo", "banner"} <= {role for role, _ in nodes}


def test_it_goes_by_keyboard(browser, page):
    browser.open(page)
    focus = "document.activeElement.textContent"
    browser.press("Tab", 9)
    assert browser.js(focus) == "Skip to the result"
    shown = "document.activeElement.getBoundingClientRect().left >= 0"
    assert browser.js(shown)
    stops = []
    for _ in range(15):
        browser.press("Tab", 9)
        stops.append(browser.js(focus))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert stops[-1] == "" or browser.js(outline) != "none" or "Erasure" in stops[-1]
        if stops[-1] == "Every check of the run":
            browser.press("Enter", 13)
            assert browser.js("document.activeElement.parentElement.open")
    assert {"Result", "Limits", "Every check of the run", "Every setting"} <= {*stops}


def test_a_comparison_goes_by_keyboard(browser, comparison):
    browser.open(comparison)
    stops = []
    for _ in range(20):
        browser.press("Tab", 9)
        stops.append(browser.js("document.activeElement.textContent"))
        if stops[-1].startswith("Each token's probability"):
            browser.press("Enter", 13)
            assert browser.js("document.activeElement.parentElement.open")
            break
    assert stops[0] == "Skip to the result" and "Limits" in stops
    assert stops[-1].startswith("Each token's probability")
    # What colour says is there as a number, and which tokens are to be forgotten as a word.
    table = "document.activeElement.parentElement.querySelector('table')"
    cells = browser.js(
        f"[...{table}.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert cells[0] == ["Account", *["0.900"] * 5]
    forgotten = [row[1:] for row in cells if "to forget" in row[0]]
    assert forgotten == [["0.980", "0.020", "0.075", "0.075", "0.075"]] * 5


def test_colour_is_the_probability(browser, comparison):
    """Of the original the tokens of secrets are full, of a method they are nearly empty."""
    browser.open(comparison)
    strips = browser.js("""[...document.querySelector('.answer').querySelectorAll('.tokens')]
        .map(e => [...e.querySelectorAll('mark .t')].map(t => t.className))""")
    assert len(strips) == 5 and {*strips[0]} == {"t p10"} and {*strips[1]} == {"t p0"}
    assert all({*strip} == {"t p1"} for strip in strips[2:])
    grounds = browser.js("""[...document.querySelectorAll('.ramp .t')]
        .map(e => getComputedStyle(e).backgroundColor)""")
    assert len({*grounds}) == 11
    line = "getComputedStyle(document.querySelector('{}')).borderBottomWidth"
    assert browser.js(line.format("mark .t")) == "3px"
    assert browser.js(line.format(".tokens > .t")) == "0px"


@pytest.mark.parametrize("which", ["page", "comparison"])
def test_it_prints_light_and_whole(request, browser, which, tmp_path):
    browser.open(request.getfixturevalue(which), dark=True)
    background = "getComputedStyle(document.body).backgroundColor"
    assert browser.js(background) == "rgb(20, 23, 27)"
    browser.emulate(dark=True, media="print")
    assert browser.js(background) == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('details table')].every(e => e.offsetHeight > 0)"
    assert browser.js(hidden) and browser.js("document.querySelector('nav').offsetHeight") == 0
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000


def test_colours_can_be_read():
    """WCAG's contrast of text: 4.5 to 1 on every background that it stands on."""
    style = files("palu.report").joinpath("templates/report.css").read_text()
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    light, dark = (scheme for scheme in schemes if scheme)
    assert {*light} == {*dark}

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for scheme in (light, dark):
        pairs = [(t, b) for t in ("text", "soft") for b in ("page", "card")]
        pairs += [(name, "page") for name in ("link", "good", "caution", "bad")]
        pairs += [(name, f"{name}back") for name in ("good", "caution", "bad")]
        pairs += [("text", f"{name}back") for name in ("good", "caution", "bad")]
        pairs += [("text", "heat")]  # the fullest colour of a token; the others are between
        wanted = dict.fromkeys(pairs, 4.5)
        wanted |= {(f"c{number}", "page"): 3 for number in range(7)}  # lines of charts
        for (one, other), contrast in wanted.items():
            a, b = sorted(luminance(scheme[name]) for name in (one, other))
            assert (b + 0.05) / (a + 0.05) >= contrast, (one, other)
