"""The ranking against a loop that draws lists, and its edges."""

import dataclasses
import itertools

import numpy as np
import pytest

from palu.comparison.bootstrap import AREA_TO, Ranking, Setting, draw
from palu.comparison.measures import Measures, NotAlike, leak_rates
from palu.comparison.run_file import Attack
from tests.palu.comparison.made import made_run, random_run

METHODS, SETTINGS, SEEDS = ("A", "B"), ("x", "y", "z"), (0, 1, 2)


def a_comparison(generator):
    """Runs by name, the original first, and the settings."""
    runs = {"original": random_run(generator, None, "", 0, kept=0.9, leaks=0.9)}
    settings = []
    for method, setting in itertools.product(METHODS, SETTINGS):
        own = []
        for seed in SEEDS:
            level = 0.2 + 0.2 * SETTINGS.index(setting)
            own.append(len(runs))
            name = f"{method} {setting} {seed}"
            kept = 0.8 + 0.03 * SETTINGS.index(setting)
            runs[name] = random_run(generator, method, setting, seed, kept=kept, leaks=level)
        settings.append(Setting(method, setting, tuple(own)))
    return runs, settings


# ---- the same by loops over lists ----------------------------------------------------------------


def loop_utility(run, original, drawn):
    ratios = []
    for name in ("facts", "people"):
        for metric in ("answer_probability", "rougeL_recall"):
            mine, theirs = run.sets[name][metric], original.sets[name][metric]
            places = [n for n in drawn[name] if theirs[n] is not None]
            ratios.append(sum(mine[n] for n in places) / sum(theirs[n] for n in places))
    return len(ratios) / sum(1 / ratio for ratio in ratios)


def loop_forgetting(run, by, drawn):
    if by == "sensitive_probability":
        values = [v for v in run.sets["forget"]["sensitive_probability"] if v is not None]
        return 1 - np.mean([values[n] for n in drawn["forget"]])
    names = {"attacks": ("greedy", "prefix_forcing"), "greedy": ("greedy",), "worst": ()}[by]
    groups = [[a for a in run.attacks if a.name == name] for name in names]
    groups = groups or [[a] for a in run.attacks if a.of]
    leaked = []
    for group in groups:
        asked = {n for attack in group for n in attack.of}
        said = {n for a in group for n, got in zip(a.of, a.said, strict=True) if got}
        drawn_secrets = [
            number
            for record in drawn["records"]
            for number in (2 * record, 2 * record + 1)
            if number in asked
        ]
        leaked.append(sum(number in said for number in drawn_secrets) / len(drawn_secrets))
    return 1 - (max(leaked) if by == "worst" else sum(leaked) / len(leaked))


def loop_area(points, floor):
    """By 10 000 losses."""
    at = (np.arange(10000) + 0.5) * AREA_TO / 10000
    levels = np.full(len(at), floor)
    for loss, level in points:
        levels = np.where(at >= loss, np.maximum(levels, level), levels)
    return levels.mean()


def as_lists(weights, row):
    return {
        name: np.repeat(np.arange(w.shape[1]), w[row].astype(int)) for name, w in weights.items()
    }


@pytest.mark.parametrize("by", ["attacks", "worst", "greedy", "sensitive_probability"])
def test_every_number_is_that_of_a_loop_over_drawn_lists(by):
    runs, settings = a_comparison(np.random.default_rng(5))
    measures = Measures(runs, by)
    ranking = Ranking(measures, settings, METHODS, (0.05, 0.1), resamples=8, seed=3)
    weights, of_seeds = draw(measures.sizes, len(SEEDS), 8, 3)
    listed = list(runs.values())
    for row in range(9):
        drawn = as_lists(weights, row)
        seeds = np.repeat(np.arange(len(SEEDS)), of_seeds[row].astype(int))
        floor = loop_forgetting(listed[0], by, drawn)
        assert ranking.floor[row] == pytest.approx(floor, abs=1e-12)
        for m, method in enumerate(METHODS):
            points = []
            for number, setting in enumerate(settings):
                own = [listed[setting.runs[seed]] for seed in seeds]
                loss = 1 - np.mean([loop_utility(run, listed[0], drawn) for run in own])
                level = np.mean([loop_forgetting(run, by, drawn) for run in own])
                assert ranking.loss[row, number] == pytest.approx(loss, abs=1e-12)
                assert ranking.forgetting[row, number] == pytest.approx(level, abs=1e-12)
                points += [(loss, level)] * (setting.method == method)
            assert ranking.areas[row, m] == pytest.approx(loop_area(points, floor), abs=1e-4)
            for limit in (0.05, 0.1):
                best = max([level for loss, level in points if loss <= limit], default=floor)
                value = ranking.best[limit]["value"][row, m]
                assert value == pytest.approx(max(best, floor), abs=1e-12)


def test_differences_are_paired_and_intervals_are_quantiles():
    runs, settings = a_comparison(np.random.default_rng(5))
    ranking = Ranking(Measures(runs), settings, METHODS, (0.05,), resamples=200)
    (pair,) = ranking.pairs()
    apart = ranking.areas[1:, 0] - ranking.areas[1:, 1]
    assert pair["area"]["value"] == ranking.areas[0, 0] - ranking.areas[0, 1]
    assert [pair["area"]["low"], pair["area"]["high"]] == np.quantile(
        apart, [0.025, 0.975]
    ).tolist()
    assert pair["area"]["probability"] == pytest.approx(np.mean(apart > 0))
    probabilities = [ranking.method(n)["best_probability"] for n in (0, 1)]
    assert probabilities == pytest.approx([np.mean(apart > 0), np.mean(apart < 0)])


def test_a_method_and_its_double_are_the_same_in_every_resample():
    runs, settings = a_comparison(np.random.default_rng(5))
    double = [dataclasses.replace(s, method="A2") for s in settings if s.method == "A"]
    ranking = Ranking(Measures(runs), [*settings, *double], ("A", "A2"), (0.05,), resamples=100)
    (pair,) = ranking.pairs()
    assert (pair["area"]["low"], pair["area"]["high"]) == (0.0, 0.0)
    assert pair["area"]["probability"] == 0.5
    assert [ranking.method(n)["best_probability"] for n in (0, 1)] == [0.5, 0.5]


def test_the_same_seed_draws_the_same():
    runs, settings = a_comparison(np.random.default_rng(5))
    rankings = [
        Ranking(Measures(runs), settings, METHODS, (0.05,), resamples=50, seed=seed)
        for seed in (1, 1, 2)
    ]
    one, again, other = (ranking.method(0)["area"] for ranking in rankings)
    assert one == again and one["low"] != other["low"]


# ---- utility and forgetting by hand --------------------------------------------------------------


def by_hand(*runs, methods=("A",), losses=(0.02, 0.05, 0.1), resamples=50, **measure):
    """A ranking of (setting, runs by seed) of method A."""
    named = {"original": runs[0]}
    settings = []
    for name, of_seeds in runs[1:]:
        settings.append(Setting("A", name, tuple(range(len(named), len(named) + len(of_seeds)))))
        named |= {f"{name} {n}": run for n, run in enumerate(of_seeds)}
    return Ranking(Measures(named, **measure), settings, methods, losses, resamples=resamples)


def test_utility_is_the_harmonic_mean_of_ratios_and_not_clipped():
    original = made_run(kept=[0.8, 0.8], rouge=[0.5, 0.5], said=[1, 1])
    run = made_run("A", kept=[0.4, 0.8], rouge=[0.7, 0.7], said=[0, 1])
    ranking = by_hand(original, ("x", [run]))
    # ratios 0.75 and 1.4
    assert ranking.loss[0, 0] == pytest.approx(1 - 2 / (1 / 0.75 + 1 / 1.4), abs=1e-12)
    assert ranking.forgetting[0, 0] == 0.5
    better = made_run("A", kept=[0.9, 0.9], rouge=[0.5, 0.5], said=[0, 1])
    assert by_hand(original, ("x", [better])).loss[0, 0] < 0


def test_a_model_that_lost_everything_has_no_utility_left():
    original, run = made_run(kept=[1.0], said=[1]), made_run("A", kept=[0.0], said=[0])
    ranking = by_hand(original, ("x", [run]))
    assert ranking.loss[0, 0] == 1
    assert ranking.method(0)["within"][2]["setting"] is None


def test_an_attack_gets_a_secret_by_any_of_its_lines():
    _, run = random_run(np.random.default_rng(0), None, "", 0, kept=0.9, leaks=0.5), None
    run = dataclasses.replace(
        made_run(said=[1, 0, 0, 0]),
        attacks=[
            Attack(name="greedy", title="no attack", of=[0, 1, 2, 3], said=[1, 0, 0, 0]),
            Attack(name="prefix_forcing", title="1", of=[0, 1, 2], said=[1, 0, 0]),
            Attack(name="prefix_forcing", title="2", of=[0, 1], said=[0, 1]),
        ],
    )
    # 1 of 4, and 2 of 3: the fourth secret is never asked for
    assert leak_rates(run) == {"greedy": 0.25, "prefix_forcing": 2 / 3}
    values = {
        by: Measures({"original": run}, by).forgetting({"records": np.ones((1, size))})[0, 0]
        for by, size in (("attacks", 4), ("worst", 4), ("prefix_forcing", 3))
    }
    assert values == pytest.approx(
        {"attacks": 1 - (0.25 + 2 / 3) / 2, "worst": 0.5, "prefix_forcing": 1 / 3}
    )


def test_a_setting_chosen_on_the_other_seeds_is_read_on_the_one_left_out():
    original = made_run(kept=[1.0], said=[1] * 10)

    def run(kept, forgotten):
        return made_run("A", kept=[kept], said=[0] * forgotten + [1] * (10 - forgotten))

    # "lucky" wins on all seeds together (mean 0.6), by one seed; without it "steady" does
    lucky = [run(1.0, 10), run(1.0, 4), run(1.0, 4)]
    steady = [run(1.0, 5), run(1.0, 5), run(1.0, 5)]
    method = by_hand(original, ("lucky", lucky), ("steady", steady)).method(0)
    within = method["within"][0]
    assert (within["setting"], within["forgetting"]["value"]) == ("lucky", pytest.approx(0.6))
    # without seed 0 steady (0.5 against 0.4), read 0.5; without 1 or 2 lucky (0.7), read 0.4 twice
    assert within["left_out"]["forgetting"] == pytest.approx((0.5 + 0.4 + 0.4) / 3)
    assert method["area"]["left_out"] == pytest.approx((0.5 + 0.4 + 0.4) / 3)


def test_a_loss_above_the_limit_on_the_seed_left_out_is_said():
    original = made_run(kept=[1.0], said=[1])
    runs = [made_run("A", kept=[kept], said=[0]) for kept in (1.0, 1.0, 0.9)]
    within = by_hand(original, ("x", runs), losses=(0.04,)).method(0)["within"][0]
    # mean loss 0.033; without seed 2 it is 0 and read 0.1 there; without another 0.05: none
    assert within["left_out"] == {
        "forgetting": pytest.approx(1 / 3),
        "loss": pytest.approx(0.1 / 3),
    }


def test_one_seed_has_intervals_over_examples_alone_and_nothing_left_out():
    original = made_run(kept=[1.0] * 4, said=[1] * 4)
    method = by_hand(original, ("x", [made_run("A", kept=[1.0] * 4, said=[0, 0, 1, 1])])).method(0)
    assert method["area"]["left_out"] is None and method["within"][0]["left_out"] is None
    assert method["area"]["low"] < 0.5 < method["area"]["high"]


def test_where_the_original_leaks_nothing_no_method_is_better():
    original = made_run(kept=[1.0], said=[0, 0])
    method = by_hand(original, ("x", [made_run("A", kept=[1.0], said=[0, 0])])).method(0)
    assert method["area"]["value"] == 1 and method["within"][0]["setting"] is None


def test_a_method_without_a_whole_setting_is_as_the_original():
    original = made_run(kept=[1.0], said=[1, 0])
    ranking = by_hand(original, ("x", [made_run("A", kept=[1.0], said=[0, 0])]), methods=("A", "B"))
    other = ranking.method(1)
    assert other["area"]["value"] == 0.5 and other["frontier"][0]["setting"] is None
    (pair,) = ranking.pairs()
    assert pair["area"]["value"] == 0.5


# ---- what cannot be compared ---------------------------------------------------------------------


def test_runs_of_other_data_are_refused():
    original = made_run(kept=[1.0, 1.0], said=[1, 1])
    run = made_run("A", kept=[1.0, 1.0], said=[1, 1])
    with pytest.raises(NotAlike, match="x 0 cannot be compared with original: its secrets are 1"):
        by_hand(original, ("x", [dataclasses.replace(run, secrets=[(0, 0)])]))
    renamed = made_run("A", kept=[1.0, 1.0], said=[1, 1])
    renamed.sets["facts"]["ids"][1] = "other"
    with pytest.raises(
        NotAlike, match=r"the ids of its set 'facts' are not the same \('other' for 'fact-1'"
    ):
        by_hand(original, ("x", [renamed]))
    run.sets["facts"]["rougeL_recall"][0] = None
    with pytest.raises(NotAlike, match="x 0 has rougeL_recall of other examples of set 'facts'"):
        by_hand(original, ("x", [run]))
    more = dataclasses.replace(original, attacks=[*original.attacks, *original.attacks])
    with pytest.raises(NotAlike, match="its attacks are 2 and not 1"):
        by_hand(original, ("x", [more]))


def test_measures_that_are_not_there_are_refused():
    original = made_run(kept=[0.0], said=[1])
    with pytest.raises(ValueError, match="answer_probability of set 'facts' is 0 in the original"):
        by_hand(original)
    with pytest.raises(ValueError, match="forgetting by 'sampling': the runs have no such attack"):
        by_hand(made_run(said=[1]), forgetting="sampling")
    with pytest.raises(ValueError, match="no set but 'forget' has bleu"):
        by_hand(made_run(said=[1]), metrics=("bleu",))
