"""What a comparison cannot show, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palu.comparison.run_file import FORGET
from palu.report.inputs import Node

_ONE = (
    "It is one model, one set of records and one choice of utility. Another model, other records "
    "or another way of asking may change the order."
)
_TUNED = (
    "The settings that were tried decide where a frontier lies. A method that stands behind may "
    "have a better setting that nobody tried; one that stands in front was perhaps tried more "
    "carefully. The table of settings says how many each had."
)
_MEASURED = (
    "Forgetting and utility are what was measured, and no more: an attack that was not made may "
    "bring out what these did not, and an ability that nobody asked for may be lost."
)


def comparison_limits(
    models: Mapping[str, Node],
    shown: Mapping[str, Sequence[Node]],
    methods: Sequence[Mapping[str, Any]],
    content: Node,
) -> list[str]:
    """Return the limits of a comparison, of what it has and what it lacks."""
    limits = []
    if (original := models.get("original")) is not None:
        secrets = len(list(original["secrets"].each()))
        sets = {name: _size(one) for name, one in original["sets"].named()}
        records = sets.pop(FORGET, 0)
        utility = ", ".join(f"{size} of {name}" for name, size in sets.items()) or "none"
        limits.append(
            f"It rests on {records} record{_s(records)} to forget with {secrets} secret"
            f"{_s(secrets)}, and on these examples of utility: {utility}. One secret more or less "
            f"is {100 / secrets:.1f}% of a leak rate."
            if secrets
            else f"It rests on {records} record{_s(records)} to forget, and on these examples of "
            f"utility: {utility}. No secret was attacked."
        )
    seeds = sorted({len(runs) for runs in shown.values()})
    if seeds:
        said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        limits.append(
            "Each setting was run once: how much a result changes with the seed is not known, and "
            "no interval here has it in it."
            if seeds == [1]
            else f"Each setting was run with {said} seeds. So few say little of how much a result "
            "changes with the seed; the intervals draw these same runs again."
        )
    counts = sorted({len(method["settings"]) for method in methods})
    if counts and counts[0] != counts[-1]:
        limits.append(
            f"The methods did not have equally many settings that could be compared: "
            f"{counts[0]} to {counts[-1]}. The more a method has, the better its best one looks."
        )
    if "retrained" not in models:
        limits.append(
            "No retrained model stands beside them. How much a model forgets that never saw the "
            "records is not known, and so neither is how much is enough."
        )
    comparisons = len(methods) * (len(methods) - 1) // 2
    if comparisons > 1:
        limits.append(
            f"There are {comparisons} pairs of methods, and each interval is of one pair: by "
            "chance alone one in twenty of such differences looks larger than the noise."
        )
    return [*limits, _TUNED, _MEASURED, _ONE]


def _size(one: Node) -> int:
    return len(list(one["ids"].each()))


def _s(count: int) -> str:
    return "" if count == 1 else "s"
