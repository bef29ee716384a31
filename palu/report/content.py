"""What a report says: numbers of the inputs, and sentences about them."""

from __future__ import annotations

from typing import Any

from palu.report.attacked import above, attacks_of
from palu.report.examples import Secrets, attacked_others, masked, spans_of
from palu.report.inputs import (
    ANNOTATION,
    ANNOTATION_FORMAT,
    ATTACK,
    EVALUATION,
    Inputs,
    Node,
)
from palu.report.integrity import integrity_checks
from palu.report.limits import limits_of
from palu.report.measures import (
    Row,
    evaluated,
    fallen_apart,
    kept_share,
    measure_rows,
    ordered,
    plain_leak,
)
from palu.storage.output import RECORD

LEAK_LIMIT, KEPT_LIMIT = 0.05, 0.95  # where `palu.json` names none
STATUS = ("forgotten", "known", "harmed", "known and harmed", "not measured")
# Annotator -> what found a span, in words.
FINDERS = {
    "terms": "a list of values to erase",
    "pii": "a recogniser of personal data",
    "contrast": "comparison with another model",
    "all": "whole answers were taken",
    "given": "marked by hand before",
}
_CHECKS = ("epoch", "sensitive_probability", "past_prefix_probability", "recited", "spans")
_CHECKS += ("leaked", "asked", "retain_probability")


def content_of(inputs: Inputs, secrets: Secrets | None) -> dict[str, Any]:
    """Return all numbers and sentences of a report but its example answers, as JSON values without
    secrets.

    Raises:
        ValueError: a file that is damaged or something else; names file and field.
    """
    rows = measure_rows(inputs)
    attacks = attacks_of(inputs)
    if attacks is not None:
        attacks["of_others"] = attacked_others(inputs, secrets)
    models = _models(inputs)
    checked = integrity_checks(inputs)
    request = _request(inputs, secrets)
    aside = bool(request["records_aside"])
    verdict = _verdict(inputs[RECORD]["outcome"], attacks, rows, aside=aside)
    if not all(one["holds"] for one in checked):
        verdict |= {"level": "bad", "headline": "These numbers are not of the model in this folder"}
    content = {
        "verdict": verdict,
        "integrity": checked,
        "request": request,
        "models": models,
        "run": _run(inputs[RECORD]),
        "columns": ordered([*(name for row in rows for name in row["values"]), *models]),
        "measures": rows,
        "kept": kept_share(rows, own_answers=request["own_answers"] is not None),
        "checks": _checks(inputs[RECORD]["outcome"]),
        "attacks": attacks,
        "missing": _missing(inputs),
    }
    content["limits"] = limits_of(content)
    # Names of files and values of settings are the user's: a secret may stand in them.
    names = [(content["request"], ("forget", "retain")), (content["run"], ("settings", "chosen"))]
    names += [(model, ("path",)) for model in content["models"].values()]
    for part, keys in names:
        part |= {key: masked(part[key], secrets) for key in keys}
    return content


def _verdict(
    outcome: Node, attacks: dict[str, Any] | None, rows: list[Row], *, aside: bool
) -> dict[str, Any]:
    """Return whether the erasure held: a status, `good`, `caution` or `bad`, and sentences.

    Args:
        aside: whether values to erase stand where nothing can be marked.
    """
    status = outcome["status"].text() if outcome else None
    if status is not None and status not in STATUS:
        raise outcome["status"].fail(f"one of {', '.join(STATUS)}")
    limit = outcome["limits"]["leak_rate"].share() if outcome["limits"]["leak_rate"] else LEAK_LIMIT
    found = [] if attacks is None else [a for a in attacks["attacks"] if above(a, limit)]
    worst = None if attacks is None else attacks["worst"]
    plain, apart = plain_leak(rows, limit), fallen_apart(rows)
    known = status in ("known", "known and harmed") or plain is not None
    harmed = status in ("harmed", "known and harmed") or bool(apart.keys() - {"forget"})
    level, headline = "good", "Erased, as far as was measured"
    if known and harmed:
        level, headline = "bad", "Not erased, and the rest of the model was harmed"
    elif known:
        level, headline = "bad", "Not erased: the model still knows the secrets"
    elif found:
        level, headline = "bad", "Not erased: an attack still brings secrets out"
        if harmed:
            headline = "Not erased: an attack still brings secrets out, and the rest was harmed"
    elif harmed:
        level, headline = "bad", "Erased, but the rest of the model was harmed"
    elif status in (None, "not measured"):
        level, headline = "caution", "Not judged: the run did not measure its outcome"
    elif apart:
        level, headline = "caution", "Erased, but its answers to what was erased fell apart"
    elif worst is None:
        level, headline = "caution", "Forgotten when asked plainly, but nobody attacked it"
    elif aside or attacks["cut_off"]:
        level, headline = "caution", "Erased where it was looked for, but some of it is elsewhere"
    return {
        "status": status,
        "level": level,
        "headline": headline,
        "plain_leak": plain,
        "fallen_apart": [*apart.values()],
        "worst_leak": worst and _worst_sentence(worst, limit),
        "reasons": outcome["reasons"].texts(),
        "advice": outcome["advice"].texts(),
        "leak_limit": limit,
        "kept_limit": outcome["limits"]["retain_kept"].share()
        if outcome["limits"]["retain_kept"]
        else KEPT_LIMIT,
        "attacks_above_limit": [attack["title"] for attack in found],
    }


def _worst_sentence(worst: dict[str, Any], limit: float) -> str:
    """Return the worst leak in words, beside the original and a retrained model."""
    result = worst["results"]["unlearned"]
    if not result["leaked"]:
        return f"No attack brought a secret out: none of {result['of']} in the worst of them."
    text = (
        f"The worst leak: {worst['title']}. It brought out {result['leaked']} of {result['of']} "
        f"secrets ({result['rate']:.0%}; of more such secrets, with 95% confidence, between "
        f"{result['low']:.0%} and {result['high']:.0%})."
    )
    sides = {"original": "The original model", "retrained": "A model that never saw the records"}
    for name, who in sides.items():
        if (other := worst["results"].get(name)) and other["of"]:
            text += f" {who} gives away {other['leaked']} of {other['of']}."
    return f"{text} The limit is {limit:.0%}."


def _request(inputs: Inputs, secrets: Secrets | None) -> dict[str, Any]:
    """Return what was asked: files, how many records and spans, and what found them."""
    found, data = inputs[ANNOTATION], inputs[RECORD]["data"]
    if found:
        found.format(ANNOTATION_FORMAT)
    request: dict[str, Any] = {
        "forget": data["forget"].value and str(data["forget"].value),
        "retain": data["retain"].value and str(data["retain"].value),
        # How many answers the original itself gave, where there was no file of what to keep.
        "own_answers": data["self_retain"]["examples"].count() if data["self_retain"] else None,
        "files": _digests(inputs[RECORD]["digests"]["data"]),
        "records": None,
        "records_with_spans": None,
        "spans": None,
    }
    if found:
        for name in ("records", "records_with_spans", "spans"):
            request[name] = found[name].count()
        request["counted_by"] = "palu annotate"
    elif secrets is not None:
        records = secrets.records
        request["records"] = len(records)
        request["records_with_spans"] = sum(spans_of([one]) > 0 for one in records)
        request["spans"] = spans_of(records)
        request["counted_by"] = "the file itself"
    elif spans := inputs[RECORD]["outcome"]["before"]["spans"]:
        request["spans"], request["counted_by"] = spans.count(), "palu unlearn"
    request["found_by"] = [
        {
            "annotator": name,
            "what": " and ".join(FINDERS.get(part, part) for part in name.split("+")),
            "spans": node.count(),
        }
        for name, node in found["by_annotator"].named()
    ]
    for name in ("terms", "terms_not_found", "records_aside"):
        request[name] = found[name].count() if found[name] else None
    return request


def _digests(node: Node) -> dict[str, dict[str, str]]:
    """Return name -> file -> SHA-256."""
    return {
        name: {file: digest.text() for file, digest in part.named()} for name, part in node.named()
    }


def _models(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Return name -> path and digest of each model that a file tells of."""
    record, models = inputs[RECORD], {}
    attacked = dict(inputs[ATTACK]["models"].named())
    measured = evaluated(inputs)
    for name in ordered([*("original", "unlearned"), *measured, *attacked]):
        sources = (attacked.get(name), measured.get(name))
        known: dict[str, Any] = {"path": None, "digest": None}
        for key in known:
            said = [node[key].text() for node in sources if node is not None and node[key]]
            known[key] = next(iter(said), None)
        if name == "original":
            known["path"] = record["base_model"].text("") or known["path"]
        if name == "unlearned":
            known["path"] = inputs.name
        field = {"original": "model", "unlearned": "output"}.get(name)
        files = record["digests"][field].named() if field is not None else ()
        known["files"] = {file: digest.text() for file, digest in files}
        models[name] = known
    return models


def _run(record: Node) -> dict[str, Any]:
    """Return how the model was made: settings, versions, date."""
    settings = {name: node.value for name, node in record["settings"].named()}
    lora = {name: node.value for name, node in record["lora"].named()}
    versions = {name: node.text() for name, node in record["versions"].named()}
    return {
        "made_by": record["made_by"].text("") or None,
        "written": record["written"].text("") or None,
        "seed": record["seed"].value,
        "device": record["device"].text("") or None,
        "dtype": record["dtype"].text("") or None,
        "method": settings.get("method"),
        "steps": len(list(record["loss_curve"].each())) or None,
        "chosen_epoch": record["outcome"]["chosen_epoch"].value,
        "settings": settings,
        "chosen": [
            {"name": name, "value": choice["value"].value, "why": choice["why"].text()}
            for name, choice in record["chosen"].named()
        ],
        "adapter": lora or None,
        "versions": versions,
    }


def _checks(outcome: Node) -> list[dict[str, Any]]:
    """Return what the run measured of itself while it went on."""
    checks = []
    for one in outcome["checks"].each():
        numbers = {name: one[name] for name in _CHECKS if one[name]}
        for name, node in numbers.items():
            if name.endswith("probability"):
                node.share()
            elif name != "epoch":
                node.count()
            elif isinstance(node.value, bool) or not isinstance(node.value, int | float):
                raise node.fail("a number")
        checks.append({name: node.value for name, node in numbers.items()})
    return checks


def _missing(inputs: Inputs) -> list[dict[str, str]]:
    """Return what a report lacks, and which command gives it."""
    folder = inputs.name
    missing = []
    if not inputs[RECORD]:
        missing.append((RECORD, "how the model was made: settings, versions", "palu unlearn"))
    elif not inputs[RECORD]["outcome"]:
        missing.append(
            (
                f"outcome in {RECORD}",
                "whether the run forgot and kept",
                "palu unlearn",
            )
        )
    if not inputs[ANNOTATION]:
        command = f"palu annotate FILE --output MARKED --json {folder}/{ANNOTATION}"
        missing.append((ANNOTATION, "what found the passages", command))
    models = evaluated(inputs)
    if not models:
        command = f"palu evaluate --model {folder} --forget FILE --json {folder}/{EVALUATION}"
        missing.append((EVALUATION, "what the models answer", command))
    if "retrained" not in models and "retrained" not in dict(inputs[ATTACK]["models"].named()):
        missing.append(
            (
                "a retrained model",
                "what a model that never saw them would say",
                "palu attack or palu erase with --retrained DIR",
            )
        )
    if not inputs[ATTACK]:
        command = f"palu attack --model {folder} --forget FILE"
        missing.append((ATTACK, "what an attacker gets out", command))
    return [dict(zip(("what", "tells", "command"), one, strict=True)) for one in missing]
