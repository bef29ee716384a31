"""The folder an evaluation is written to: `TOFU_EVAL.json` and `TOFU_SUMMARY.json` as
open-unlearning writes them, and `palu_evaluate.json` that tells what they were measured with."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palu.evaluation.datasets import EvalSet
from palu.evaluation.eval_log import Log, LogError
from palu.storage.files import write_json
from palu.storage.output import EVALUATION_FILES, versions

EVAL, SUMMARY, RECORD = EVALUATION_FILES
FILES = {*EVALUATION_FILES}


class Store:
    """What is in the folder is taken up, so that a run that was stopped goes on, and metrics that
    open-unlearning measured are kept.

    Args:
        folder: made where it is not there.
        settings: what the numbers depend on, as JSON values. Those that the record in the folder
            names too must be the same.
        overwrite: start anew.

    Attributes:
        log: metric -> entry.

    Raises:
        LogError: what is there was measured with other settings, or is no log.
        ValueError: `folder` is a file.
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.overwrite = overwrite
        self.log: dict[str, Any] = {}
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {str(folder)!r} is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite and (folder / EVAL).exists() and not (folder / RECORD).exists():
            raise LogError(
                f"--overwrite: {self.place} was not written by palu, and is left as it is; name "
                "another --output"
            )
        if overwrite or not (folder / EVAL).exists():
            return
        self.log = dict(Log.read(folder / EVAL, EVAL).metrics)
        for metric, entry in self.log.items():
            try:
                json.dumps(entry, allow_nan=False, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise LogError(f"{self.place}: metric {metric!r} is not valid Unicode") from None
            except ValueError:
                raise LogError(
                    f"{self.place}: metric {metric!r} holds a number that is not finite; name "
                    "another --output or add --overwrite"
                ) from None
        if not (folder / RECORD).exists():
            warnings.warn(
                f"{folder / EVAL} was not written by palu: its metrics are kept as they are, "
                "trusting that they are of this model and these data",
                stacklevel=2,
            )
            return
        before = Log.read(folder / RECORD, RECORD).entry("settings")
        if "model" in settings and "model" not in before:
            raise LogError(
                f"{folder / RECORD} does not say of which model {EVAL} is; name another --output "
                "or add --overwrite"
            )
        for name, value in before.items():
            if self.settings.setdefault(name, value) != value:
                raise LogError(
                    f"{folder / EVAL} was measured with {name} = {value!r}, this run has "
                    f"{settings[name]!r}; name another --output or add --overwrite"
                )

    @property
    def place(self) -> str:
        """What messages call the log."""
        return str(self.folder / EVAL)

    def begin(self) -> None:
        """Removes the values of an evaluation that is measured anew, and then what they were
        measured with: a run that is interrupted must not be resumed with them. Call it in one
        process, when all have made theirs."""
        stopped = (self.folder / RECORD).exists() and not (self.folder / EVAL).exists()
        if self.overwrite or stopped:
            for name in (EVAL, SUMMARY, RECORD):
                (self.folder / name).unlink(missing_ok=True)

    def save(self, log: Mapping[str, Any]) -> None:
        """Writes all three files, each whole or not at all."""
        write_json(self.folder / RECORD, {"settings": self.settings, "versions": versions()})
        write_json(self.folder / EVAL, dict(sorted(log.items())))
        write_json(self.folder / SUMMARY, summary(log))


def summary(log: Mapping[str, Any]) -> dict[str, float]:
    """metric -> aggregate, of the metrics that have one, by name."""
    values = {
        name: entry.get("agg_value") for name, entry in log.items() if isinstance(entry, Mapping)
    }
    return {name: value for name, value in sorted(values.items()) if value is not None}


def data_digest(data: EvalSet) -> str:
    """A name for the examples of a set by what is asked and answered, in order."""
    digest = hashlib.blake2b(digest_size=16, person=b"palu.evaluate")
    for example in data.examples:
        answers = [example.answer, *(example.extra.get(field) for field in sorted(data.rows))]
        digest.update(json.dumps([example.question, answers]).encode())
    return digest.hexdigest()
