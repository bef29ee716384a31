"""Whether the numbers of a report are of the model that lies in the folder."""

from __future__ import annotations

from typing import Any

from palu.report.inputs import ATTACK, Inputs
from palu.report.measures import evaluated
from palu.storage.output import RECORD

Check = dict[str, Any]  # what: a sentence; holds: whether it is as it must be


def integrity_checks(inputs: Inputs) -> list[Check]:
    """Return what the digests in the files say when they are compared with the model's own files,
    and with one another; nothing of what has no digest.

    Digests of a model in `attack.json` and `evaluation.json` are those of
    `palu.evaluation.attacks.run.model_digest`.
    """
    checks = [*_written(inputs)]
    measured = {
        "attacked": inputs[ATTACK]["models"],
        "evaluated": {name: node for name, node in evaluated(inputs).items() if node["digest"]},
    }
    own = _own_digest(inputs) if any(measured.values()) else None
    for verb, models in measured.items():
        models = dict(models.named()) if hasattr(models, "named") else models
        if own is not None and "unlearned" in models and models["unlearned"]["digest"]:
            holds = models["unlearned"]["digest"].text() == own
            is_it = "is" if holds else "is not"
            text = f"The model that was {verb} {is_it} the one in this folder."
            checks.append({"what": text, "holds": holds})
        measured[verb] = models
    for name in ("original", "retrained"):
        digests = {m[name]["digest"].value for m in measured.values() if name in m} - {None}
        if len(digests) > 1:
            text = f"The {name} model that was attacked is not the one that was evaluated."
            checks.append({"what": text, "holds": False})
    return checks


def _written(inputs: Inputs) -> list[Check]:
    """Compare the model's files with the digests that the run wrote into `palu.json`."""
    from palu.storage.fingerprint import model_digests

    known = {name: node.text() for name, node in inputs[RECORD]["digests"]["output"].named()}
    if not known:
        return []
    now = model_digests(inputs.folder)
    changed = sorted(name for name in {*known, *now} if known.get(name) != now.get(name))
    text = "The model's files are those that the run wrote."
    if changed:
        text = f"These files of the model are not those that the run wrote: {', '.join(changed)}."
    return [{"what": text, "holds": not changed}]


def _own_digest(inputs: Inputs) -> str | None:
    """Return the digest of the model in the folder; None where there is none, or no base model."""
    from palu.evaluation.attacks.run import model_digest

    try:
        return model_digest(inputs.folder)
    except (ValueError, OSError):
        return None
