"""Reading evaluation logs in open-unlearning's format, and saying what is wrong with one.

A log is `{metric: {"agg_value": number, "value_by_index": {"0": {field: value}}}}`; a value is a
number, a list of numbers (one for each perturbed answer) or a text. The entry of a membership
attack holds two such parts, `forget` and `holdout`, and the AUC.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from palu.data.spans import shown
from palu.storage.json_files import NotJSON, parse, read_text

Value = float | list[float]


class LogError(ValueError):
    """A log that cannot be used; the message names log, metric, row and field."""


class Log(NamedTuple):
    """The content of a log and what to call it in messages."""

    metrics: Mapping[str, Any]
    place: str

    @classmethod
    def read(cls, log: Mapping[str, Any] | str | os.PathLike[str], name: str) -> Log:
        """A log that is in memory (`name` is then what messages call it) or in a JSON file.

        Raises:
            LogError: the file cannot be read, or does not hold an object.
        """
        place = name if isinstance(log, Mapping) else os.fspath(log)
        if not isinstance(log, Mapping):
            try:
                text = read_text(log)
            except ValueError as error:
                raise LogError(str(error)) from None
            try:
                log = parse(text)
            except NotJSON as error:
                line = "" if error.line is None else f":{error.line}"
                raise LogError(f"{place}{line}: not readable JSON: {error}") from None
        if not isinstance(log, Mapping):
            raise LogError(f"{place}: a log must be an object, got {type(log).__name__}")
        return cls(log, place)

    def entry(self, metric: str, needed_by: str | None = None) -> Mapping[str, Any]:
        """The entry of a metric.

        Raises:
            LogError: there is none, or it is no object.
        """
        if metric not in self.metrics:
            why = f", which {needed_by} needs" if needed_by else ""
            raise LogError(f"{self.place}: has no metric {metric!r}{why}")
        entry = self.metrics[metric]
        if not isinstance(entry, Mapping):
            raise LogError(
                f"{self.place}: metric {metric!r} must be an object with 'value_by_index', got "
                f"{shown(entry)} (a summary holds aggregates only: give the TOFU_EVAL.json beside "
                "it)"
            )
        return entry

    def rows(self, metric: str, part: str | None = None, needed_by: str | None = None) -> Rows:
        """The rows of a metric, or of one part of an attack.

        Raises:
            LogError: there are none.
        """
        entry, place = self.entry(metric, needed_by), f"{self.place}: metric {metric!r}"
        if part is not None:
            entry, place = entry.get(part), f"{place}, part {part!r}"
        rows = entry.get("value_by_index") if isinstance(entry, Mapping) else None
        if not isinstance(rows, Mapping):
            raise LogError(f"{place} has no 'value_by_index' (an object with a row an example)")
        if not rows:
            raise LogError(f"{place}: 'value_by_index' is empty")
        return Rows(rows, place)


class Rows(NamedTuple):
    """The per-example values of one metric and what to call them in messages."""

    rows: Mapping[str, Any]
    place: str

    def values(self, field: str) -> dict[str, Value]:
        """Field `field` of every row that has a value there.

        A row that is None or whose field is None was not measured and is left out; so is a None
        in a list. Numbers that JSON writes as texts are no numbers.

        Raises:
            LogError: a row without the field, a value that is no finite number, or no row with
                a value.
        """
        found: dict[str, Value] = {}
        for index, row in self.rows.items():
            if row is None:
                continue
            if not isinstance(row, Mapping) or field not in row:
                raise LogError(f"{self.place}, row {index!r} has no field {field!r}")
            value = row[field]
            if isinstance(value, list):
                value = [self._number(v, index, field) for v in value if v is not None]
                if value:
                    found[index] = value
            elif value is not None:
                found[index] = self._number(value, index, field)
        if not found:
            raise LogError(f"{self.place}: no row has a value in field {field!r}")
        return found

    def numbers(self, field: str) -> dict[str, float]:
        """As `values`; a list becomes its mean."""
        return {index: mean(value) for index, value in self.values(field).items()}

    def _number(self, value: Any, index: str, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            wrong = f"must be a number, got {shown(value)}"
        else:
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
            wrong = f"is not finite: {shown(value)}"
        raise LogError(f"{self.place}, row {index!r}, field {field!r} {wrong}")


def mean(value: Value) -> float:
    """The mean of a list; a number is its own."""
    if not isinstance(value, list):
        return value
    try:
        return math.fsum(value) / len(value)
    except OverflowError:
        return math.fsum(part / len(value) for part in value)
