"""What tests of pages ask of the browser: it must see the faults that they look for."""

PAGE = """<!doctype html><html lang="en"><title>t</title><body style="margin:0">
<table><caption>Numbers</caption><tr><th scope="col">One</table>
<p style="width:900px">wide<img src="http://example.invalid/x.png" alt="a picture">
<p id="seen">light<style>@media (prefers-color-scheme: dark) { #seen { color: #ffffff } }</style>"""


def test_it_sees_what_tests_look_for(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    browser.open(path, width=400)
    assert browser.overflow() == 500
    assert browser.requests == [path.as_uri(), "http://example.invalid/x.png"]
    assert {("table", "Numbers"), ("columnheader", "One"), ("image", "a picture")} <= set(
        browser.accessible()
    )
    browser.resize(1000)
    assert browser.overflow() == 0
    color = "getComputedStyle(document.getElementById('seen')).color"
    assert browser.js(color) == "rgb(0, 0, 0)"
    browser.emulate(dark=True)
    assert browser.js(color) == "rgb(255, 255, 255)"
    browser.screenshot(tmp_path / "page.png")
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
