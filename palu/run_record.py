"""`palu.json`: how a model was made, and the template it was trained with."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from palu.data.template import Template
from palu.storage.files import write_json
from palu.storage.output import RECORD, read_record, versions

__all__ = ["RECORD", "choose_template", "read_record", "versions", "write_record"]


def write_record(folder: Path, *, template: Template, **content: Any) -> None:
    """Write `palu.json`: the template, the versions and the time, and whatever else is given.

    Args:
        folder: the model folder.
        template: what the model was trained with; `palu evaluate` insists on it.
        **content: settings, seed, loss curve and so on, as JSON values.
    """
    record = {"template": template.to_dict(), **content, "versions": versions()}
    record["written"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(folder / RECORD, record)


def choose_template(
    folder: str | Path,
    *,
    system_prompt: str | None = None,
    date_string: str | None = None,
    chat_template_kwargs: str | None = None,
    force: bool = False,
) -> Template:
    """Return the template to use with a model: the one in its `palu.json`, or one made from what
    the user asked for.

    Args:
        folder: the model folder.
        system_prompt, date_string, chat_template_kwargs: what the user asked for (the last a JSON
            object, as text); None where nothing was said.
        force: take what was asked for even where it differs from `palu.json`.

    Raises:
        ValueError: what was asked for differs from `palu.json` and `force` is false.
        TypeError, ValueError: `chat_template_kwargs` is no JSON object.
    """
    asked: dict[str, Any] = {"system_prompt": system_prompt, "date_string": date_string}
    if chat_template_kwargs is not None:
        try:
            asked["chat_template_kwargs"] = json.loads(chat_template_kwargs)
        except (ValueError, RecursionError):
            asked["chat_template_kwargs"] = chat_template_kwargs  # Template reports what is wrong
        if asked["chat_template_kwargs"] is None:
            asked["chat_template_kwargs"] = "null"
    asked = {name: value for name, value in asked.items() if value is not None}
    record = read_record(folder)
    if record is None or "template" not in record:
        return Template(**asked)
    try:
        known = Template.from_dict(record["template"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder) / RECORD} has a template that cannot be used: {error}"
        ) from error
    wanted = Template.from_dict({**known.to_dict(), **asked})
    for name in asked:
        was, now = getattr(known, name), getattr(wanted, name)
        if was != now and not force:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} {now!r} differs from {was!r}, which {Path(folder) / RECORD} says this "
                f"model was trained with. "
                f"Leave {option} out, or add --force-template to use yours."
            )
    return wanted
