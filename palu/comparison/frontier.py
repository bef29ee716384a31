"""The frontier of a method: how much it forgets at most for a loss of utility of at most L.

All functions work on many resamples at once: `loss` and `forgetting` are [resamples, settings], of
a setting that a resample does not have `loss` is inf. `floor` is [resamples]: the forgetting of the
original model, which loses nothing, so that every method has at least it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NONE = -1
"""In the place of a setting: none forgets more than the original model."""
# 1 - 0.98 is above 0.02 by a rounding.
_ROUNDING = 1e-9

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


def area(loss: Floats, forgetting: Floats, floor: Floats, limit: float) -> Floats:
    """Return [resamples] the mean of the frontier over losses from 0 to `limit`: its area, divided
    by `limit`.

    The frontier is a step function, so this is exact. A loss below 0 counts as 0.
    """
    order = np.argsort(loss, axis=1, kind="stable")
    at = np.clip(np.take_along_axis(loss, order, axis=1), 0.0, limit)
    level = np.take_along_axis(np.where(np.isinf(loss), -np.inf, forgetting), order, axis=1)
    level = np.maximum.accumulate(np.concatenate([floor[:, None], level], axis=1), axis=1)
    edge = np.ones((len(loss), 1))
    edges = np.concatenate([0.0 * edge, at, limit * edge], axis=1)
    return (level * np.diff(edges, axis=1)).sum(axis=1) / limit


def best_within(
    loss: Floats, forgetting: Floats, floor: Floats, limit: float
) -> tuple[Ints, Floats]:
    """Return [resamples] the setting that forgets most among those that lose at most `limit`, and
    the frontier there.

    Of settings that forget alike the one that loses less is taken, then the first. `NONE` where
    none forgets more than the original model.
    """
    if not loss.shape[1]:
        return np.full(len(floor), NONE), floor
    level = np.where(loss <= limit + _ROUNDING, forgetting, -np.inf)
    top = level.max(axis=1)
    alike = level >= top[:, None] - _ROUNDING
    chosen = np.where(alike, loss, np.inf).argmin(axis=1)
    found = top > floor + _ROUNDING
    return np.where(found, chosen, NONE), np.where(found, top, floor)


def steps(loss: Floats, forgetting: Floats, floor: float) -> list[tuple[float, float, int]]:
    """Return the corners of one frontier: (loss from which it holds, forgetting, setting), from
    (0, floor, NONE) on. `loss` and `forgetting` are [settings]."""
    corners = [(0.0, floor, NONE)]
    for setting in np.lexsort((-forgetting, np.maximum(loss, 0.0))):
        at = float(max(loss[setting], 0.0))
        if np.isinf(at) or forgetting[setting] <= corners[-1][1] + _ROUNDING:
            continue
        if at <= corners[-1][0]:
            corners.pop()
        corners.append((at, float(forgetting[setting]), int(setting)))
    return corners
