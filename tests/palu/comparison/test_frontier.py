"""Frontiers by hand."""

import numpy as np
import pytest

from palu.comparison.frontier import NONE, area, best_within, steps

LOSS = np.array([[0.04, 0.01, 0.2, 0.05]])
FORGETTING = np.array([[0.8, 0.5, 0.9, 0.6]])
FLOOR = np.array([0.2])


def test_the_area_is_that_of_the_steps():
    # 0.2 up to a loss of 0.01, 0.5 up to 0.04, 0.8 up to 0.1; 0.2 is too much, 0.05 under 0.04
    by_hand = (0.01 * 0.2 + 0.03 * 0.5 + 0.06 * 0.8) / 0.1
    assert area(LOSS, FORGETTING, FLOOR, 0.1)[0] == pytest.approx(by_hand, abs=1e-15)


@pytest.mark.parametrize(
    ("limit", "which", "value"), [(0.005, NONE, 0.2), (0.02, 1, 0.5), (0.05, 0, 0.8)]
)
def test_the_best_point_within_a_loss(limit, which, value):
    chosen, level = best_within(LOSS, FORGETTING, FLOOR, limit)
    assert (chosen[0], level[0]) == (which, value)


def test_the_corners_of_the_steps():
    assert steps(LOSS[0], FORGETTING[0], 0.2) == [
        (0.0, 0.2, NONE),
        (0.01, 0.5, 1),
        (0.04, 0.8, 0),
        (0.2, 0.9, 2),
    ]


def test_a_loss_of_two_percent_is_within_two_percent():
    loss = np.array([[1 - 0.98]])  # 0.020000000000000018
    assert best_within(loss, np.array([[0.9]]), FLOOR, 0.02)[0][0] == 0


def test_a_utility_above_that_of_the_original_counts_from_the_start():
    loss = np.array([[-0.03]])
    assert area(loss, np.array([[0.7]]), FLOOR, 0.1)[0] == pytest.approx(0.7)
    assert steps(loss[0], np.array([0.7]), 0.2) == [(0.0, 0.7, 0)]


def test_of_settings_that_forget_alike_the_one_that_loses_less_is_taken():
    loss, level = np.array([[0.04, 0.01, 0.01]]), np.array([[0.8, 0.8, 0.8]])
    assert best_within(loss, level, FLOOR, 0.05)[0][0] == 1
    assert steps(loss[0], level[0], 0.2) == [(0.0, 0.2, NONE), (0.01, 0.8, 1)]


def test_a_method_has_at_least_the_original():
    loss, worse = np.array([[0.0, 0.01]]), np.array([[0.1, 0.2]])
    assert best_within(loss, worse, FLOOR, 0.05) == (NONE, 0.2)
    assert area(loss, worse, FLOOR, 0.1)[0] == pytest.approx(0.2)


def test_a_setting_that_a_resample_does_not_have_is_not_there():
    loss, level = np.array([[0.01], [np.inf]]), np.array([[0.9], [np.nan]])
    floor = np.array([0.2, 0.3])
    assert best_within(loss, level, floor, 0.05)[0].tolist() == [0, NONE]
    assert area(loss, level, floor, 0.1).tolist() == pytest.approx([0.83, 0.3])


def test_a_method_without_settings_has_the_original():
    none = np.empty((2, 0))
    floor = np.array([0.2, 0.3])
    assert area(none, none, floor, 0.1).tolist() == pytest.approx([0.2, 0.3])
    assert best_within(none, none, floor, 0.1)[1].tolist() == [0.2, 0.3]
