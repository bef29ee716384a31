"""One benchmark: what it reads, what it measures, and the run that fills a log with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from palu.evaluation.benchmarks.meter import Meter
from palu.evaluation.benchmarks.tables import Table
from palu.evaluation.eval_log import Log, LogError

Entry = dict[str, Any]


class Benchmark:
    """A benchmark with its data.

    Attributes:
        name: as `--benchmark` has it.
        title: as its files are named.
        tables: name -> table; what the numbers depend on beside the model.
        uses_retrained: whether a number is against the log of a retrained model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    uses_retrained: ClassVar[bool] = False

    def __init__(self, data: str, split: str | None = None) -> None:
        self.tables: dict[str, Table] = {}

    def settings(self) -> dict[str, str]:
        """Return what a log must have been measured with to go on from."""
        return {f"data_{name}": table.digest() for name, table in self.tables.items()}

    def metrics(self, meter: Meter) -> dict[str, Callable[[], Entry]]:
        """Return what measures each entry of the log, in the order of the run."""
        raise NotImplementedError

    def derived(self, log: Log, retrained: Log | None) -> dict[str, Entry]:
        """Return the entries that follow from measured ones."""
        return {}

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError where a tokenizer lacks what the questions are put with."""

    def check_retrained(self, retrained: Log | None) -> None:
        """Raise LogError where the retrained model's log lacks what a number is compared with."""

    def missing(self, log: Mapping[str, Entry], retrained: Log | None) -> list[str]:
        """Return what the log lacks, each with the input that would give it."""
        return []

    def run(
        self,
        meter: Meter,
        log: dict[str, Entry],
        save: Callable[[dict[str, Entry]], None],
        retrained: Log | None = None,
        source: str = "log",
    ) -> None:
        """Add to `log` what it lacks, one entry after the other, and save it after each.

        Raises:
            LogError: an entry that is no object.
            FloatingPointError: a number that is not finite.
        """
        for metric, measure in self.metrics(meter).items():
            if not isinstance(log.get(metric, {}), Mapping):
                raise LogError(f"{source}: metric {metric!r} must be an object")
            if not log.get(metric):
                log[metric] = dict(sorted(measure().items()))
                save(log)
        log.update(self.derived(Log(log, source), retrained))
        save(log)


def by_index(rows: list[Entry], agg_value: float, **more: Any) -> Entry:
    """Return an entry of a log: its aggregate and one row an example."""
    return {
        "agg_value": agg_value,
        "value_by_index": {str(number): row for number, row in enumerate(rows)},
        **more,
    }
