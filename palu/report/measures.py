"""What each model knows of the records to forget, and of those to keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from palu.report.inputs import EVALUATION, EVALUATION_FORMAT, MODELS, Inputs, Node
from palu.storage.output import RECORD

LEAKED = "leaked"
# Name of a row -> what it is, in words.
TITLES = {
    LEAKED: "Secrets said in plain answers",
    "continued": "Secrets said after the true text before them, in every turn",
    "sensitive_probability": "Probability of the sensitive words",
    "recited": "Passages of which every token is its first choice",
    "past_prefix_probability": "Probability of the rest of the sensitive passages, after the first "
    "tokens (those that were unlearned)",
    "span_first_probability": "Probability of the first token of a sensitive passage",
    "span_rest_probability": "Probability of its other tokens, after the true ones",
    "retain_probability": "Probability of the answers",
    "answer_probability": "Probability of the whole answers",
    "rougeL_recall": "Words of the true answer that are said (ROUGE-L recall)",
    "exact_memorization": "Tokens of the answer that are its first choice (exact memorization)",
    "extraction_strength": "Part of an answer that it finishes by itself (extraction strength)",
    "fell_apart": "Answers that fell apart: endless, empty, or the same again and again",
    "ended": "Answers that end by themselves",
    "repetition": "Part of an answer that repeats itself (4-grams of tokens)",
    "fluency": "Probability of its own answers under the original model (fluency)",
}
_OF_RUN = {"forget": ("sensitive_probability", "past_prefix_probability")}
_OF_RUN["retain"] = ("retain_probability",)
_OF_EVALUATION = ("sensitive_probability", "answer_probability", "rougeL_recall")
_OF_EVALUATION += ("exact_memorization", "extraction_strength")
_OF_EVALUATION += ("span_first_probability", "span_rest_probability")
_OF_EVALUATION += ("fell_apart", "ended", "repetition", "fluency")
# A model's answers have fallen apart where that many more of them have than of the models beside
# it, or where the original finds them less than so likely as theirs.
APART, FLUENT = 0.1, 0.5

Row = dict[str, Any]  # set, name, title, source, values: model -> number or {"leaked", "of"}


def ordered(names: Iterable[str]) -> list[str]:
    """Return names of models in the order of a report's columns."""
    names = list(dict.fromkeys(names))
    return [name for name in MODELS if name in names] + [n for n in names if n not in MODELS]


def evaluated(inputs: Inputs) -> dict[str, Node]:
    """Return the models of `evaluation.json`. What `palu evaluate --json` writes is of one model,
    the unlearned one."""
    content = inputs[EVALUATION]
    if not content:
        return {}
    if content["models"]:
        content.format(EVALUATION_FORMAT)
        return dict(content["models"].named())
    if not (content["model"] and content["forget"]):
        raise ValueError(
            f"{content.file}: has neither 'models' nor 'model' and 'forget'; it must be what palu "
            "erase or palu evaluate --json wrote"
        )
    return {"unlearned": content}


def measure_rows(inputs: Inputs) -> list[Row]:
    """Return what was measured without an attack, a row for each number: those of the run itself,
    unless `evaluation.json` has the same of the same models, then those."""
    later = _rows_of_evaluation(evaluated(inputs))
    of_run = _rows_of_run(inputs[RECORD]["outcome"])
    rows = [*(row for row in of_run if not _has(later, row)), *later]
    return sorted(rows, key=lambda row: [*TITLES].index(row["name"]))


def _has(rows: Iterable[Row], wanted: Row) -> bool:
    """Return whether a row with the wanted one's number is there, of all its models."""
    return any(
        (row["set"], row["name"]) == (wanted["set"], wanted["name"])
        and {*row["values"]} >= {*wanted["values"]}
        for row in rows
    )


def plain_leak(rows: Iterable[Row], limit: float) -> str | None:
    """Return a sentence where plain answers say more secrets than the limit, and than those of a
    retrained model, where there is one; None where they do not."""
    for row in rows:
        values = row["values"]
        if row["name"] != LEAKED or not values.get("unlearned", {}).get("of"):
            continue
        rates = {name: one["leaked"] / one["of"] for name, one in values.items() if one["of"]}
        if rates["unlearned"] > max(limit, rates.get("retrained", 0)):
            one = values["unlearned"]
            return f"Asked plainly, it says {one['leaked']} of {one['of']} secrets."
    return None


def fallen_apart(rows: Iterable[Row]) -> dict[str, str]:
    """Return, for each set whose answers are no text any more, a sentence that says so.

    The share of answers that fell apart counts beside the larger one of the original and a
    retrained model; fluency beside the original's, of records to forget beside the retrained
    model's, since the original finds every other answer to them unlikely.
    """
    said = {}
    for row in rows:
        values, data = row["values"], row["set"]
        if "unlearned" not in values or data in said:
            continue
        after = values["unlearned"]
        others = {name: one for name, one in values.items() if name in ("original", "retrained")}
        about = "what was to be forgotten" if data == "forget" else "what was to be kept"
        if row["name"] == "fell_apart" and after > max(others.values(), default=0) + APART:
            said[data] = (
                f"{after:.0%} of its answers to {about} fell apart: they do not end, are empty, or "
                "say the same again and again."
            )
        beside = others.get("retrained" if data == "forget" else "original")
        if row["name"] == "fluency" and beside is not None and after < FLUENT * beside:
            said[data] = (
                f"Its answers to {about} are hardly text: the original model finds a token of them "
                f"as likely as {after:.2g}, and one of a sound model's as {beside:.2g}."
            )
    return said


def kept_share(rows: Iterable[Mapping[str, Any]], *, own_answers: bool) -> float | None:
    """Return what is left of the probability of the answers to keep, by what the run measured,
    else by `evaluation.json` (the other way round where the run had the model's own answers alone);
    None where neither has it of both models."""
    known = {row["name"]: row["values"] for row in rows if row["set"] == "retain"}
    names = ["retain_probability", "answer_probability"]
    for name in reversed(names) if own_answers else names:
        before, after = (known.get(name, {}).get(model) for model in MODELS[:2])
        if before and after is not None:
            return after / before
    return None


def _rows_of_run(outcome: Node) -> list[Row]:
    sides = {"original": outcome["before"], "unlearned": outcome["after"]}
    rows = []
    for name, said, of in (("continued", "leaked", "asked"), ("recited", "recited", "spans")):
        counts = {m: _count(side[said], side[of]) for m, side in sides.items() if side[said]}
        if counts:
            rows.append(_row("forget", name, "run", counts))
    for data, names in _OF_RUN.items():
        for name in names:
            values = {model: side[name].share() for model, side in sides.items() if side[name]}
            if values:
                rows.append(_row(data, name, "run", values))
    return rows


def _rows_of_evaluation(models: Mapping[str, Node]) -> list[Row]:
    sets = dict.fromkeys(
        data for node in models.values() for data, part in node.named() if _is_result(part)
    )
    leaked = {model: _leaked(node["forget"]) for model, node in models.items()}
    leaked = {model: count for model, count in leaked.items() if count is not None}
    rows = [_row("forget", LEAKED, "evaluation", leaked)] if leaked else []
    for data in sets:
        for name in _OF_EVALUATION:
            means = {model: node[data]["mean"][name] for model, node in models.items()}
            values = {model: mean.share() for model, mean in means.items() if mean}
            if values:
                rows.append(_row(data, name, "evaluation", values))
    return rows


def _leaked(result: Node) -> dict[str, int] | None:
    """Return how many secrets the answers say, and of how many; None where no answer was given.
    Plain documents are not asked."""
    rows = [row for row in result["examples"].each() if row["leaked"]]
    if not rows:
        return None
    counts = [_count(row["leaked"], row["asked"]) for row in rows]
    return {name: sum(one[name] for one in counts) for name in ("leaked", "of")}


def _is_result(part: Node) -> bool:
    return isinstance(part.value, Mapping) and "mean" in part.value


def _count(leaked: Node, of: Node) -> dict[str, int]:
    if leaked.count() > of.count():
        raise leaked.fail(f"at most {of.path}, {of.count()}")
    return {"leaked": leaked.count(), "of": of.count()}


def _row(data: str, name: str, source: str, values: Mapping[str, Any]) -> Row:
    ranked = {model: values[model] for model in ordered(values)}
    return {"set": data, "name": name, "title": TITLES[name], "source": source, "values": ranked}
