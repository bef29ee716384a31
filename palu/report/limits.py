"""What a report cannot say, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAPTER = (
    "The erasure is an adapter beside the original model, which is unchanged. Whoever has both can "
    "switch the adapter off, and everything is known again. Where that matters, hand over a merged "
    "model (`palu merge`) and not the adapter."
)
CACHE = (
    "Copies elsewhere are as they were: the original model, the training data, backups, logs, and "
    "a reference cache, if one was kept. The cache holds data derived from what was erased: delete "
    "it with the rest."
)
_MARKED = (
    "Only what was marked was erased and only what was marked was looked for. The same facts in "
    "other words, or in records that nobody marked, are not part of this."
)
_PROOF = (
    "This is a measurement and no proof. It says what came out in the ways that stand here; "
    "another way of asking may bring out more."
)
_AGAIN = (
    "It holds for the model with the digest that stands above. Training it further, merging or "
    "compressing it can bring back what was forgotten: measure again after every change."
)
_CHANCE = (
    "A model that never saw the records was not measured. So nobody knows how many of these "
    "secrets come out by chance, such as a common first name."
)


def limits_of(content: Mapping[str, Any]) -> list[str]:
    """Return the limits of a report, of what it has and what it lacks."""
    attacks, request = content["attacks"], content["request"]
    limits = [_PROOF, _MARKED]
    if lost := request["terms_not_found"]:
        limits.append(
            f"{lost} of {request['terms']} values to erase were found in no record. They may be "
            "written in a way that was not recognised; the model may still know them."
        )
    if aside := request["records_aside"]:
        limits.append(
            f"{aside} records have a value to erase in a tool call or another field of a message, "
            "where nothing can be marked: it was neither forgotten nor measured there. Take it out."
        )
    if content["run"]["adapter"]:
        limits.append(ADAPTER)
    if "retrained" not in content["columns"]:
        limits.append(_CHANCE)
    if attacks is None:
        limits.append(
            "Nobody attacked the model: its plain answers say nothing of what comes out when the "
            "beginning of a secret is given away, or when it is trained a little further."
        )
    else:
        made = {one["name"] for one in (*attacks["attacks"], *attacks["membership"])}
        skipped = dict.fromkeys(
            one["name"].replace("_", " ") for one in attacks["skipped"] if one["name"] not in made
        )
        if skipped:
            limits.append(f"These attacks were left out: {', '.join(skipped)}.")
        # What attacks of this length could not ask for, a run of this length could not train.
        if attacks["cut_off"]:
            limits.append(
                f"There are {attacks['cut_off']}: what stands behind that length of a record was "
                "neither forgotten nor measured. Cut the record, or give a larger --max-length."
            )
    tried, marked = attacks and attacks["records"], request["records_with_spans"]
    if attacks is not None and attacks["of_others"]:
        limits.append(
            "The attacks were not of the records to forget as their file has them now: of a part "
            "of them, of others, or of a file that has changed or was read in another way. Of the "
            "rest no secret was asked for."
        )
    elif tried is not None and marked is not None and tried < marked:
        limits.append(
            f"Only {tried} of the {marked} records to forget were attacked (palu attack --quick). "
            "Of the others no secret was asked for."
        )
    if attacks is not None and attacks["attacks"]:
        asked = [one["of"] for attack in attacks["attacks"] for one in attack["results"].values()]
        limits.append(
            f"An attack asked for {min(asked)} to {max(asked)} secrets. The fewer they are, the "
            "wider the interval in which the true rate may lie, and the more one of them weighs."
        )
    return [*limits, _AGAIN, CACHE]
