"""What the page of a comparison says of methods: the order at each loss of utility, and which
differences are within the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palu.report.inputs import Node
from palu.report.page import percent

COMPARISON = "comparison.json"
COMPARISON_FORMAT = "palu-comparison/1"
_COLORS, _DASHES = 7, 4  # without a common divisor: 28 lines look different

_NAMED = 3  # methods that a sentence tells the numbers of

Row = dict[str, Any]


def letter(number: int) -> str:
    """Return A, B, ..., Z, AA, AB, ... for 0, 1, ..."""
    name = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        name = chr(ord("A") + rest) + name
    return name


def methods_of(content: Node) -> list[Row]:
    """Return the methods, the one with the largest area under its frontier first.

    Returns:
        `[{"name", "letter", "kind", "area", "settings", "frontier", "within", "chosen"}]`. `kind`
        are classes of colour and dash; `settings` are `{"setting", "loss", "forgetting",
        "on_frontier", "within"}`, the last the limits at which it is the best; `frontier` are
        `(loss, forgetting)`; `within` is as in `comparison.json`, by limit; `chosen` is the setting
        whose attacks and answers are shown, and its limit.
    """
    settings: dict[str, list[Node]] = {}
    for one in content["settings"].each():
        settings.setdefault(one["method"].text(), []).append(one)
    found = list(content["methods"].each())
    found.sort(key=lambda one: -amount(one["area"]["value"]))
    methods = []
    for number, one in enumerate(found):
        name = one["method"].text()
        corners = list(one["frontier"].each())
        on = {corner["setting"].value for corner in corners}
        within = {amount(best["limit"]): _within(best) for best in one["within"].each()}
        own = [
            {
                "setting": setting["setting"].text(""),
                "loss": estimate(setting["loss"]),
                "forgetting": estimate(setting["forgetting"]),
                "on_frontier": setting["setting"].text("") in on,
                "best": [
                    limit
                    for limit, best in within.items()
                    if best["setting"] == setting["setting"].text("")
                ],
            }
            for setting in settings.get(name, ())
        ]
        methods.append(
            {
                "name": name,
                "letter": letter(number),
                "kind": f"c{number % _COLORS} d{number % _DASHES}",
                "area": estimate(one["area"]) | {"left_out": optional(one["area"]["left_out"])},
                "settings": own,
                "frontier": [(amount(c["loss"]), amount(c["forgetting"])) for c in corners],
                "within": within,
                "chosen": _chosen(within, own),
            }
        )
    return methods


def _within(best: Node) -> Row:
    left_out = best["left_out"]
    return {
        "setting": best["setting"].value and best["setting"].text(),
        "forgetting": estimate(best["forgetting"]),
        "loss": estimate(best["loss"]),
        "left_out": optional(left_out["forgetting"]) if left_out else None,
        "left_out_loss": optional(left_out["loss"]) if left_out else None,
    }


def _chosen(within: Mapping[float, Row], settings: Sequence[Row]) -> Row | None:
    """Return the best setting within the middle loss, else within the next larger one, else the one
    that loses least: `{"setting", "limit"}`, the limit None in the last case."""
    limits = sorted(within)
    middle = limits[len(limits) // 2]
    for limit in (one for one in limits if one >= middle):
        if within[limit]["setting"] is not None:
            return {"setting": within[limit]["setting"], "limit": limit}
    if not settings:
        return None
    least = min(settings, key=lambda one: one["loss"]["value"])
    return {"setting": least["setting"], "limit": None}


def differences(content: Node) -> dict[tuple[str, str, float], Row]:
    """Return (a method, another, limit) -> the interval of the first's forgetting minus the
    second's, in both orders."""
    found = {}
    for pair in content["pairs"].each():
        first, second = pair["first"].text(), pair["second"].text()
        for one in pair["within"].each():
            apart = estimate(one)
            found[first, second, amount(one["limit"])] = apart
            found[second, first, amount(one["limit"])] = {
                "value": -apart["value"],
                "low": None if apart["high"] is None else -apart["high"],
                "high": None if apart["low"] is None else -apart["low"],
            }
    return found


def is_noise(apart: Mapping[str, float | None]) -> bool:
    """Return whether a difference is within the noise: its interval holds 0, or it has none."""
    low, high = apart["low"], apart["high"]
    return low is None or high is None or low <= 0 <= high


def places(
    methods: Sequence[Row], apart: Mapping[tuple[str, str, float], Row], limit: float
) -> list[Row]:
    """Return the methods in order of their forgetting within a loss.

    Returns:
        `[{"method", "place", "best", "to_first", "noise"}]`; `to_first` is the first's forgetting
        minus this one's; methods whose difference to the first is within the noise share its
        place; None is the place of a method without a setting within the loss.
    """
    ranked = sorted(methods, key=lambda one: -one["within"][limit]["forgetting"]["value"])
    rows: list[Row] = []
    for number, method in enumerate(ranked):
        best = method["within"][limit]
        row = {"method": method, "best": best, "place": number + 1, "to_first": None}
        row["noise"] = False
        if best["setting"] is None:
            row["place"] = None
        elif number:
            to_first = apart.get((ranked[0]["name"], method["name"], limit))
            row["to_first"] = to_first
            row["noise"] = to_first is None or is_noise(to_first)
        rows.append(row)
    return rows


def sentences(rows: Sequence[Row], limit: float) -> list[str]:
    """Return what `places` says in plain words."""
    told = [row for row in rows if row["place"] is not None]
    none = [row["method"]["name"] for row in rows if row["place"] is None]
    said = []
    if told:
        first = told[0]
        name, value = first["method"]["name"], _value(first["best"]["forgetting"])
        alike = [row["method"]["name"] for row in told[1:] if row["noise"]]
        behind = [row for row in told[1:] if not row["noise"]]
        if len(told) == 1:
            said.append(f"{name} forgets {value}.")
        elif alike:
            said.append(
                f"{name} has the largest number, {value}, but the difference to "
                f"{listed(alike)} is within the noise: these {len(alike) + 1} cannot be told apart."
            )
        else:
            said.append(f"{name} forgets most, {value}, and by more than the noise.")
        if behind:
            named = [_behind(row) for row in behind[:_NAMED]]
            if rest := len(behind) - len(named):
                named.append(f"{rest} other{'s' if rest > 1 else ''} with less")
            said.append(f"Behind it, by more than the noise: {listed(named)}.")
        if first["best"]["left_out"] is not None:
            said.append(
                f"With the setting chosen on the other seeds and read on the one left out, {name} "
                f"has {first['best']['left_out']:.3f}, at a loss of "
                f"{percent_of(first['best']['left_out_loss'])}."
            )
    if none:
        said.append(
            f"No ranked setting of {listed(none)} forgets anything within a loss of "
            f"{percent(limit)}."
        )
    return said


def _behind(row: Row) -> str:
    apart = row["to_first"]
    between = f"between {apart['low']:.3f} and {apart['high']:.3f} less"
    return f"{row['method']['name']} with {row['best']['forgetting']['value']:.3f} ({between})"


def _value(one: Row) -> str:
    if one["low"] is None:
        return f"{one['value']:.3f}"
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def listed(words: Any) -> str:
    """Return words as English lists them."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def percent_of(value: float | None) -> str:
    """Return a loss of utility, which may be below 0 (utility was gained) or above 1."""
    return "not measured" if value is None else f"{100 * value:.1f}%"


def amount(node: Node) -> float:
    """Return a finite number. Raises ValueError for anything else."""
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
        raise node.fail("a finite number")
    return float(value)


def optional(node: Node) -> float | None:
    """Return a finite number, or None where there is none."""
    return amount(node) if node else None


def estimate(node: Node) -> Row:
    """Return `{"value", "low", "high"}`; the interval is None where nothing was drawn."""
    ends = {name: optional(node[name]) for name in ("low", "high")}
    return {"value": amount(node["value"]), **ends}
