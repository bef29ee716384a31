"""Utility and forgetting of runs, for any weights of examples and records: plain, or resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palu.comparison.run_file import FORGET, MEMBERSHIP, Attack, Run
from palu.evaluation.attacks.settings import NAMES

Floats = NDArray[np.float64]
Weights = Mapping[str, Floats]
"""Set of examples, or `RECORDS` -> [resamples, examples]: how often each of them was drawn."""

UTILITY = ("answer_probability", "rougeL_recall")
ATTACKS, WORST, SENSITIVE = "attacks", "worst", "sensitive_probability"
RECORDS = "records"
TITLES = {
    ATTACKS: "1 - the share of secrets that an attack gets, mean over the attacks",
    WORST: "1 - the share of secrets that the worst line of attack gets",
    SENSITIVE: "1 - mean probability of the sensitive tokens",
}


class NotAlike(ValueError):
    """Runs that cannot be compared; the message names what differs."""


def check_alike(runs: Mapping[str, Run]) -> None:
    """Check that runs are of the same examples, secrets and attacks.

    Args:
        runs: name in messages -> a run that is done.

    Raises:
        NotAlike: names two runs, and what is not the same in them.
    """
    (first, wanted), *others = runs.items()
    for name, run in others:
        for what, one, other in _parts(wanted, run):
            if one != other:
                raise NotAlike(
                    f"{name} cannot be compared with {first}: {what} {_apart(one, other)}"
                )


def _parts(one: Run, other: Run):
    yield "its sets are", sorted(one.sets), sorted(other.sets)
    for name in one.sets:
        yield f"the ids of its set {name!r} are", one.sets[name]["ids"], other.sets[name]["ids"]
    yield "its secrets are", list(one.secrets), list(other.secrets)
    titles = [[attack.title for attack in run.attacks] for run in (one, other)]
    yield "its attacks are", *titles
    for a, b in zip(one.attacks, other.attacks, strict=True):
        yield f"what the attack {a.title!r} asks for is", a.of, b.of


def _apart(one: Sequence, other: Sequence) -> str:
    """Return what two lists do not have in common."""
    if len(one) != len(other):
        return f"{len(other)} and not {len(one)}"
    a, b = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    return f"not the same ({b!r} for {a!r})"


@dataclass(frozen=True)
class UtilityPart:
    """One number of utility: a metric on a set.

    Attributes:
        original: its mean under the original model.
        examples: how many have it.
        values: [examples of the set, runs]; 0 where an example does not have it.
        base: [examples of the set] of the original.
        there: [examples of the set], 1 where an example has it.
    """

    set: str
    metric: str
    original: float
    examples: int
    values: Floats
    base: Floats
    there: Floats


class Measures:
    """Utility and forgetting of several runs.

    Args:
        runs: those that are done, by name; the original model is the first.
        forgetting: `ATTACKS`, `WORST`, `SENSITIVE` or the name of an attack.
        metrics: of utility; a set that has none of their values (no answers, say) is without them.

    Attributes:
        parts: of utility.
        names: of the attacks that forgetting counts; empty for `SENSITIVE`.
        sizes: name of a set (or `RECORDS`) that counts -> number of examples.

    Raises:
        NotAlike: runs of other examples, secrets or attacks.
        ValueError: a measure that they do not have, or that is 0 in the original.
    """

    def __init__(
        self, runs: Mapping[str, Run], forgetting: str = ATTACKS, metrics: Sequence[str] = UTILITY
    ) -> None:
        check_alike(runs)
        self.runs, self.forgetting_by = dict(runs), forgetting
        self.parts = self._utility_parts(metrics)
        self.sizes = {part.set: len(part.base) for part in self.parts}
        self.names: list[str] = []
        if forgetting == SENSITIVE:
            found = _values(self.runs, FORGET, SENSITIVE)
            if found is None:
                raise ValueError(f"forgetting by {SENSITIVE}: no run has it on its forget set")
            self._sensitive = found[0][found[1] > 0]
            self.sizes[FORGET] = len(self._sensitive)
        else:
            self._records, self._lines = self._attack_lines()
            self.sizes[RECORDS] = len(self._records)

    def _utility_parts(self, metrics: Sequence[str]) -> list[UtilityPart]:
        first = next(iter(self.runs.values()))
        parts = []
        for name in first.sets:
            for metric in metrics if name != FORGET else ():
                found = _values(self.runs, name, metric)
                if found is None:
                    continue
                values, there = found
                original = float(values[:, 0].sum() / there.sum())
                if original <= 0:
                    raise ValueError(
                        f"utility: {metric} of set {name!r} is {original:g} in the original model, "
                        "and nothing can be measured against it; leave it out"
                    )
                count = int(there.sum())
                base = values[:, 0].copy()
                parts.append(UtilityPart(name, metric, original, count, values, base, there))
        if not parts:
            raise ValueError(
                f"utility: no set but {FORGET!r} has {' or '.join(metrics)} in the original model"
            )
        return parts

    def _attack_lines(self) -> tuple[list[int], list[tuple[Floats, Floats]]]:
        """Return the records that are asked about, and for each share that is measured how many
        secrets of each record are asked for [records], and how many said [records, runs]."""
        lines = list(zip(*(run.attacks for run in self.runs.values()), strict=True))
        lines = [line for line in lines if line[0].name != MEMBERSHIP and line[0].of]
        if self.forgetting_by not in (ATTACKS, WORST):
            lines = [line for line in lines if line[0].name == self.forgetting_by]
        if not lines:
            raise ValueError(
                f"forgetting by {self.forgetting_by!r}: the runs have no such attack; it must be "
                f"{ATTACKS}, {WORST}, {SENSITIVE} or one of "
                f"{', '.join(name for name in NAMES if name != MEMBERSHIP)}"
            )
        self.names = list(dict.fromkeys(line[0].name for line in lines))
        secrets = next(iter(self.runs.values())).secrets
        records = sorted({secrets[number][0] for line in lines for number in line[0].of})
        place = np.searchsorted(records, [record for record, _ in secrets])
        groups = [[line] for line in lines]
        if self.forgetting_by != WORST:
            groups = [[line for line in lines if line[0].name == name] for name in self.names]
        return records, [_by_record(group, place, len(records)) for group in groups]

    def utility(self, weights: Weights) -> Floats:
        """Return [resamples, runs] the harmonic mean of the ratios to the original model.

        A part that is 0 in the original in a resample is left out of it.
        """
        inverse, count = 0.0, 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            for part in self.parts:
                drawn = weights[part.set]
                base = (drawn @ part.base)[:, None]  # both means have the same denominator
                there = base > 0
                inverse = inverse + np.where(there, base / (drawn @ part.values), 0.0)
                count = count + there
            return count / inverse

    def ratios(self) -> Floats:
        """Return [parts, runs] the mean of each part over the original's."""
        return np.stack([part.values.sum(0) / part.base.sum() for part in self.parts])

    def forgetting(self, weights: Weights) -> Floats:
        """Return [resamples, runs]. A share of no secret in a resample is left out of it."""
        if self.forgetting_by == SENSITIVE:
            drawn = weights[FORGET]
            return 1 - (drawn @ self._sensitive) / drawn.sum(axis=1)[:, None]
        drawn = weights[RECORDS]
        shares = []
        with np.errstate(invalid="ignore"):
            for asked, said in self._lines:
                shares.append((drawn @ said) / (drawn @ asked)[:, None])  # 0 / 0 is NaN
        # Every record is asked about by some line, so that one has a share.
        together = np.nanmax if self.forgetting_by == WORST else np.nanmean
        return 1 - together(shares, axis=0)

    def plain(self) -> Weights:
        """Return weights of one "resample" that has everything once."""
        return {name: np.ones((1, size)) for name, size in self.sizes.items()}


def leak_rates(run: Run) -> dict[str, float]:
    """Return attack name -> the share of its secrets that any of its lines gets."""
    lines: dict[str, list[Attack]] = {}
    for attack in run.attacks:
        if attack.of:
            lines.setdefault(attack.name, []).append(attack)
    shares = {}
    for name, some in lines.items():
        asked = {number for attack in some for number in attack.of}
        said = {n for a in some for n, got in zip(a.of, a.said, strict=True) if got}
        shares[name] = len(said) / len(asked)
    return shares


def _values(runs: Mapping[str, Run], name: str, metric: str) -> tuple[Floats, Floats] | None:
    """Return [examples, runs] the values, 0 where there is none, and [examples] which are there.

    Raises:
        NotAlike: a run has the metric of other examples.
    """
    lists = {run: one.sets[name].get(metric) for run, one in runs.items()}
    (first, wanted), *others = lists.items()
    there = [value is not None for value in wanted or ()]
    for run, values in others:
        if [value is not None for value in values or ()] != there:
            raise NotAlike(f"{run} has {metric} of other examples of set {name!r} than {first}")
    if not any(there):
        return None
    columns = [[0.0 if value is None else value for value in values] for values in lists.values()]
    return np.array(columns, dtype=np.float64).T, np.array(there, dtype=np.float64)


def _by_record(
    lines: Sequence[Sequence[Attack]], place: NDArray[np.intp], records: int
) -> tuple[Floats, Floats]:
    """Return how many secrets of each record the lines of one name ask for [records], and how many
    any of them gets [records, runs]."""
    asked = np.zeros(len(place))
    said = np.zeros((len(place), len(lines[0])))
    for line in lines:
        asked[line[0].of] = 1
        for run, attack in enumerate(line):
            got = np.asarray(attack.of)[np.asarray(attack.said, dtype=bool)]
            said[got, run] = 1
    of_record = np.zeros((records, len(place)))
    used = np.flatnonzero(asked)
    of_record[place[used], used] = 1
    return of_record @ asked, of_record @ said
