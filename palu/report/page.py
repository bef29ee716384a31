"""Pages of HTML, the report among them: each asks for nothing from elsewhere and runs no script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from palu.report.charts import checks_chart
from palu.terminal import visible

if TYPE_CHECKING:
    from markupsafe import Markup

GENERATOR = '<meta name="generator" content="palu report">'
NAMES = {
    "original": "Original",
    "unlearned": "Unlearned",
    "retrained": "Retrained",
}
SETS = {"forget": "To forget", "retain": "To keep"}
SOURCES = {"run": "checked by the run", "evaluation": "palu evaluate"}
_BOX = '<span class="box" role="img" aria-label="masked"></span>'


def render_page(
    report: Mapping[str, Any],
    *,
    answers: list[dict[str, Any]],
    attack_answers: list[dict[str, Any]],
    no_answers: str | None,
    show_secrets: bool,
) -> str:
    """Return the page.

    Args:
        report: the content of the JSON file.
        answers, attack_answers: example answers, masked already where they are to be.
        no_answers: why there are none; None where there are.
        show_secrets: whether the page says that it shows secrets.
    """
    return page(
        "report.html.j2",
        GENERATOR,
        report=report,
        answers=answers,
        attack_answers=attack_answers,
        no_answers=no_answers,
        show_secrets=show_secrets,
        chart=checks_chart(report["checks"]),
        names=NAMES,
        sets=SETS,
        sources=SOURCES,
    )


def page(template: str, generator: str, **content: Any) -> str:
    """Return a page from a template that extends `base.html.j2`; `generator` is the line by which
    palu knows it again."""
    from markupsafe import Markup

    # What steers a terminal or turns the direction of the text is spelled out.
    jinja = environment(visible, autoescape=True)
    jinja.filters |= {
        "boxes": boxes,
        "number": number,
        "percent": percent,
        "setting": setting,
        "words": lambda name: str(name).replace("_", " "),
    }
    style = jinja.loader.get_source(jinja, "report.css")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return jinja.get_template(template).render(
        **content,
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
        generator=Markup(generator),
    )


def environment(shown: Callable[[str], str], **options: Any) -> Any:
    """Return Jinja's environment of the templates here; every plain text passes `shown`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("palu.report"),
        finalize=lambda value: shown(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def boxes(text: str) -> Markup:
    """Return a text with its black boxes as pictures that have a name."""
    from markupsafe import Markup, escape

    from palu.evaluation.leaks import BOX

    return Markup(_BOX).join(escape(visible(part)) for part in text.split(BOX))


def number(value: float | None) -> str:
    """Return a probability with three places; "not measured" where there is none."""
    if value is None:
        return "not measured"
    return "<0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Return a share in percent, with a place after the point where it is small."""
    if value is None:
        return "not measured"
    exact = 0 < value < 0.0995 or 0.9 < value < 1
    return (f"{value:.1%}" if exact else f"{value:.0%}").replace(".0%", "%")


def setting(value: Any) -> str:
    """Return a setting as it stands in `palu.json`, a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
