"""What `palu attack` found, in the order of a report: the worst leak first."""

from __future__ import annotations

import math
from typing import Any

from palu.report.inputs import ATTACK, ATTACK_FORMAT, Inputs, Node
from palu.report.measures import ordered

Attack = dict[str, Any]


def attacks_of(inputs: Inputs) -> dict[str, Any] | None:
    """Return the attacks of `attack.json`; None where there is none.

    Returns:
        `{"models", "records", "secrets", "not_judged", "cut_off", "seed", "attacks", "membership",
        "worst", "skipped"}`:
        `attacks` are those that ask for secrets, the worst for the unlearned model first, with
        `results`: model -> `{"leaked", "of", "rate", "low", "high"}`; `membership` those that give
        an AUC.

    Raises:
        ValueError: a field that is not what it must be, or numbers that contradict each other.
    """
    content = inputs[ATTACK]
    if not content:
        return None
    content.format(ATTACK_FORMAT)
    found = [_attack(one) for one in content["attacks"].each()]
    asking = [one for one in found if not _gives_auc(one)]
    asking.sort(key=lambda one: -_rate(one, "unlearned"))
    worst = asking[0] if asking and _rate(asking[0], "unlearned") >= 0 else None
    untold = {name: node.count() for name, node in content["not_judged"].named()}
    return {
        "models": ordered(name for one in found for name in one["results"]),
        "records": content["records"].count() if content["records"] else None,
        "secrets": content["secrets"].count() if content["secrets"] else None,
        "not_judged": untold,
        "cut_off": _cut_off(content),
        "seed": content["seed"].count() if content["seed"] else None,
        "attacks": asking,
        "membership": [one for one in found if _gives_auc(one)],
        "worst": worst,
        "skipped": [
            {"name": one["name"].text(), "why": one["why"].text("")}
            for one in content["skipped"].each()
        ],
    }


def _cut_off(content: Node) -> str:
    """Return in words which secrets stand behind the largest length of a record, "" for none."""
    if content["cut_off"]:
        count, length = content["cut_off"].count(), content["settings"]["max_length"].count()
        return f"{count} secrets that max_length={length} cuts off" if count else ""
    # Older files say it of an attack alone.
    whys = (one["why"].text("") for one in content["skipped"].each())
    return next((why for why in whys if "secrets that max_length=" in why), "")


def above(attack: Attack, limit: float) -> bool:
    """Return whether an attack gets more out of the unlearned model than the limit, and more than
    out of a retrained one, where there is one."""
    rate = _rate(attack, "unlearned")
    return rate > limit and rate > _rate(attack, "retrained")


def _rate(attack: Attack, model: str) -> float:
    """Return an attack's leak rate, or -1 where it has none."""
    rate = attack["results"].get(model, {}).get("rate")
    return -1.0 if rate is None else rate


def _gives_auc(attack: Attack) -> bool:
    return any("auc" in result for result in attack["results"].values())


def _attack(node: Node) -> Attack:
    name = node["name"].text()
    results = {model: _result(result) for model, result in node["results"].named()}
    return {
        "name": name,
        "title": node["title"].text(name.replace("_", " ")),
        "description": node["description"].text(""),
        "results": {model: results[model] for model in ordered(results)},
    }


def _result(node: Node) -> dict[str, Any]:
    if node["auc"]:
        names = ("auc", "low", "high")
        return {name: node[name].share() for name in names if node[name]}
    leaked, of = node["leaked"].count(), node["of"].count()
    if leaked > of:
        raise node["leaked"].fail(f"at most {of}, the number that was asked for")
    rate = leaked / of if of else None
    if rate is not None and node["rate"]:
        said = node["rate"].share()
        if not math.isclose(said, rate, abs_tol=0.006):  # it may be rounded
            raise node["rate"].fail(f"leaked / of, {leaked} / {of}")
    from palu.evaluation.leaks import leak_rate

    return leak_rate(leaked, of)
