"""Evaluation logs in open-unlearning's format: read and checked, and written to a folder.

A log is `{metric: {"agg_value": number, "value_by_index": {"0": {field: value}}}}`; a value is a
number, a list of numbers (one for each perturbed answer) or a text. The entry of a membership
attack holds two such parts, `forget` and `holdout`, and the AUC. A folder has the log as
`TOFU_EVAL.json`, its aggregates as `TOFU_SUMMARY.json`, and in `palu_evaluate.json` what they were
measured with.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from palu.data.spans import shown
from palu.storage.files import write_json
from palu.storage.json_files import NotJSON, parse, read_text
from palu.storage.output import evaluation_files, versions

Value = float | list[float]


class LogError(ValueError):
    """A log that cannot be used; the message names log, metric, row and field."""


class Log(NamedTuple):
    """The content of a log and its name in messages."""

    metrics: Mapping[str, Any]
    source: str

    @classmethod
    def read(cls, log: Mapping[str, Any] | str | os.PathLike[str], name: str) -> Log:
        """Take a log that is in memory (called `name` in messages) or read a JSON file.

        Raises:
            LogError: the file cannot be read, or does not hold an object.
        """
        if isinstance(log, Mapping):
            return cls(log, name)
        source = os.fspath(log)
        try:
            metrics = parse(read_text(log))
        except NotJSON as error:
            line = "" if error.line is None else f":{error.line}"
            raise LogError(f"{source}{line}: not readable JSON: {error}") from None
        except ValueError as error:
            raise LogError(str(error)) from None
        if not isinstance(metrics, Mapping):
            raise LogError(f"{source}: a log must be an object, got {type(metrics).__name__}")
        return cls(metrics, source)

    def entry(self, metric: str, needed_by: str | None = None) -> Mapping[str, Any]:
        """Return the entry of a metric.

        Raises:
            LogError: there is none, or it is no object.
        """
        if metric not in self.metrics:
            why = f", which {needed_by} needs" if needed_by else ""
            raise LogError(f"{self.source}: has no metric {metric!r}{why}")
        entry = self.metrics[metric]
        if not isinstance(entry, Mapping):
            raise LogError(
                f"{self.source}: metric {metric!r} must be an object with 'value_by_index', got "
                f"{shown(entry)} (a summary holds aggregates only: give the TOFU_EVAL.json beside "
                "it)"
            )
        return entry

    def rows(
        self, metric: str, part: str | None = None, needed_by: str | None = None
    ) -> MetricRows:
        """Return the rows of a metric, or of one part of an attack.

        Raises:
            LogError: there are none.
        """
        entry, source = self.entry(metric, needed_by), f"{self.source}: metric {metric!r}"
        if part is not None:
            entry, source = entry.get(part), f"{source}, part {part!r}"
        rows = entry.get("value_by_index") if isinstance(entry, Mapping) else None
        if not isinstance(rows, Mapping):
            raise LogError(f"{source} has no 'value_by_index' (an object with a row an example)")
        if not rows:
            raise LogError(f"{source}: 'value_by_index' is empty")
        return MetricRows(rows, source)


class MetricRows(NamedTuple):
    """The per-example values of one metric and their name in messages."""

    rows: Mapping[str, Any]
    source: str

    def values(self, field: str) -> dict[str, Value]:
        """Return field `field` of every row that has a value there.

        A row that is None or whose field is None was not measured and is left out; so is a None
        in a list. Numbers that JSON writes as texts are no numbers.

        Raises:
            LogError: a row without the field, a value that is no finite number, or no row with
                a value.
        """
        values: dict[str, Value] = {}
        for index, row in self.rows.items():
            if row is None:
                continue
            if not isinstance(row, Mapping) or field not in row:
                raise LogError(f"{self.source}, row {index!r} has no field {field!r}")
            value = row[field]
            if isinstance(value, list):
                value = [self._number(v, index, field) for v in value if v is not None]
                if value:
                    values[index] = value
            elif value is not None:
                values[index] = self._number(value, index, field)
        if not values:
            raise LogError(f"{self.source}: no row has a value in field {field!r}")
        return values

    def numbers(self, field: str) -> dict[str, float]:
        """Return `values`, each list as its mean."""
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
        raise LogError(f"{self.source}, row {index!r}, field {field!r} {wrong}")


def mean(value: Value) -> float:
    """Return the mean of a list; a number is its own."""
    if not isinstance(value, list):
        return value
    try:
        return math.fsum(value) / len(value)
    except OverflowError:
        return math.fsum(part / len(value) for part in value)


class LogFolder:
    """The log in a folder. What is there is kept, so that a stopped run goes on and metrics that
    open-unlearning measured stay.

    Args:
        folder: made where it is not there.
        settings: what the numbers depend on, as JSON values. Those that the record in the folder
            names too must be the same.
        overwrite: start anew.
        name: the benchmark, as the files are named after it.

    Attributes:
        log: metric -> entry.

    Raises:
        LogError: what is there was measured with other settings, or is no log.
        ValueError: `folder` is a file.
        OSError: it cannot be made.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool, name: str = "TOFU"
    ) -> None:
        self.folder, self.settings = folder, dict(settings)
        self._eval, self._summary, self._record = (folder / one for one in evaluation_files(name))
        self.overwrite = overwrite
        self.log: dict[str, Any] = {}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {str(folder)!r} is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite and self._eval.exists() and not self._record.exists():
            raise LogError(
                f"--overwrite: {self.source} was not written by palu, and is left as it is; name "
                "another --output"
            )
        if overwrite or not self._eval.exists():
            return
        self.log = dict(Log.read(self._eval, self._eval.name).metrics)
        for metric, entry in self.log.items():
            self._check_writable(metric, entry)
        self._compare_settings()

    def _check_writable(self, metric: str, entry: Any) -> None:
        """Raise LogError for an entry that could not be written again as JSON."""
        try:
            json.dumps(entry, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise LogError(f"{self.source}: metric {metric!r} is not valid Unicode") from None
        except ValueError:
            raise LogError(
                f"{self.source}: metric {metric!r} holds a number that is not finite; name "
                "another --output or add --overwrite"
            ) from None

    def _compare_settings(self) -> None:
        """Raise LogError where the log was measured with other settings."""
        settings = self.settings
        if not self._record.exists():
            warnings.warn(
                f"{self._eval} was not written by palu: its metrics are kept as they are, "
                "trusting that they are of this model and these data",
                stacklevel=3,
            )
            return
        before = Log.read(self._record, self._record.name).entry("settings")
        if "model" in settings and "model" not in before:
            raise LogError(
                f"{self._record} does not say of which model {self._eval.name} is; name another "
                "--output or add --overwrite"
            )
        for name, value in before.items():
            if settings.setdefault(name, value) != value:
                raise LogError(
                    f"{self._eval} was measured with {name} = {value!r}, this run has "
                    f"{settings[name]!r}; name another --output or add --overwrite"
                )

    @property
    def source(self) -> str:
        """Name of the log in messages."""
        return str(self._eval)

    def begin(self) -> None:
        """Remove the values of an evaluation that is measured anew, and then what they were
        measured with: a run that is interrupted must not be resumed with them. Call it in one
        process, after every process has opened the folder."""
        stopped = self._record.exists() and not self._eval.exists()
        if self.overwrite or stopped:
            for path in (self._eval, self._summary, self._record):
                path.unlink(missing_ok=True)

    def save(self, log: Mapping[str, Any]) -> None:
        """Write all three files, each whole or not at all."""
        write_json(self._record, {"settings": self.settings, "versions": versions()})
        write_json(self._eval, dict(sorted(log.items())))
        write_json(self._summary, summary(log))


def summary(log: Mapping[str, Any]) -> dict[str, float]:
    """Return metric -> aggregate of the metrics that have one, sorted by name."""
    values = {
        name: entry.get("agg_value") for name, entry in log.items() if isinstance(entry, Mapping)
    }
    return {name: value for name, value in sorted(values.items()) if value is not None}
