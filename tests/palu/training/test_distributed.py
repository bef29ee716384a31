"""Two and three processes, over gloo on the CPU, give the numbers of one.

Each launch runs everything once (`workers/distributed.py`); the tests look at what it found.
"""

import json
import sys

import pytest
import torch

from palu import distributed as processes
from palu.cli import app as cli
from palu.methods.micro_batch import DENOMINATORS, RETAIN
from palu.training.batching import Sharding
from tests.support import WORKERS, ranks
from tests.support.once import once
from tests.support.workers import distributed

TRAINED = (*distributed.CASES, "micro_batch")


def launch(count, target, folder):
    """What every process found, and what was said."""
    said = ranks.launch([WORKERS / "distributed.py", folder, target], count, folder)
    found = [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(count)]
    return found, "".join(said)


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3])
def launched(request, alone, tmp_path_factory):
    """(folder, what every process found, what was said)."""
    one, other = probabilities(alone["stopped"])[1:3]
    options = request.param, (one + other) / 2
    name = f"distributed-{request.param}"
    folder, found = once(tmp_path_factory, name, lambda folder: launch(*options, folder))
    return folder, *found


def probabilities(run):
    return [entry["forget_prob"] for entry in run["logs"] if "forget_prob" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in this process."""
    folder = tmp_path_factory.mktemp("alone")
    found = distributed.run_cases(folder, 1, per_device_eval_batch_size=4)
    found["micro_batch"] = distributed.run_micro_batch(folder, 1, 6)
    found["stopped"] = distributed.run_stopped(folder, 1, 1e-30)
    return found


def check(found, wanted):
    start = torch.tensor(wanted["weights"])
    torch.testing.assert_close(torch.tensor(found["weights"]), start, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(
        torch.tensor(found["logs"]), torch.tensor(wanted["logs"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_one_process(launched, alone, name):
    found = launched[1]
    check(found[0][name], alone[name])
    for other in found[1:]:
        assert other[name] == found[0][name]


@pytest.mark.parametrize("name", distributed.EVALUATIONS)
def test_evaluation_is_that_of_one_process(launched, alone, name):
    found = launched[1]
    wanted = {k: v for k, v in alone[name].items() if "per_second" not in k and "time" not in k}
    assert wanted["eval_num_forget"] > 10 and wanted["eval_num_retain"] > 10
    for one in found:
        got = {k: one[name][k] for k in wanted}
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert got == {k: found[0][name][k] for k in wanted}


@pytest.mark.parametrize("strategy", distributed.STRATEGIES)
def test_a_resumed_run_is_the_whole_one(launched, strategy):
    for one in launched[1]:
        both = one[f"resumed-{strategy}"]
        assert both["again"] == both["whole"]


def test_the_main_process_builds_the_cache_and_says_why_not(launched):
    found = launched[1]
    said = [one["broken_cache"] for one in found]
    assert "no-cache" in said[0] and "main process" not in said[0]
    assert all(text == f"the main process failed: {said[0]}" for text in said[1:])


def test_batches_that_would_hang_are_refused(launched):
    found = launched[1]
    assert all("even_batches=False" in one["uneven_batches"] for one in found)


def test_unlearn_writes_and_speaks_once(launched, tmp_path):
    folder, found, _ = launched
    count = len(found)
    assert [one["unlearn"]["status"] for one in found] == [0] * count
    assert f"Written to {folder}/out-{count} after 4 steps" in found[0]["unlearn"]["said"]
    assert [one["unlearn"]["said"] for one in found[1:]] == [""] * (count - 1)
    distributed.unlearn_words(tmp_path, 1)
    assert distributed.run_unlearn(tmp_path, 1)["status"] == 0
    record, other = (
        json.loads((path / "palu.json").read_text())
        for path in (folder / f"out-{count}", tmp_path / "out-1")
    )
    assert record["processes"] == count and other["processes"] == 1
    curves = record["loss_curve"], other["loss_curve"]
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-4, abs=1e-6)
    for step, same in zip(*curves, strict=True):  # AdamW takes roundings of tiny gradients for more
        for name in ("num_forget", "num_preserve", "num_retain", "learning_rate", "epoch"):
            assert step[name] == same[name]
        assert step["loss"] == pytest.approx(same["loss"], rel=1e-3)
    # nothing half-made beside it
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_step_of_16_is_one_step_however_it_is_split(tmp_path):
    folder = tmp_path
    one = distributed.run_step_of_16(folder, 1, 1)
    start = distributed.small.model(distributed.small.tokenizer(), seed=3)
    moved = torch.tensor(one["weights"]) - torch.cat([p.flatten() for p in start.parameters()])
    assert moved.abs().max() > 0.01
    check(distributed.run_step_of_16(folder, 1, 4), one)


def test_two_processes_of_eight_are_that_step(launched, tmp_path):
    found = launched[1]
    if len(found) == 2:
        check(found[0]["sixteen"], distributed.run_step_of_16(tmp_path, 1, 1))


def test_processes_log_and_stop_as_one(launched, alone):
    """Two processes with two rows each as one with four rows."""
    _, found, said = launched
    if len(found) != 2:
        return
    ranks = [one["stopped"] for one in found]
    assert said.count("stopped after step 3 of 4") == 1
    assert [rank["step"] for rank in ranks] == [3, 3]
    measured = [probabilities(rank) for rank in ranks]
    wanted = probabilities(alone["stopped"])[:3]
    assert measured[0] == measured[1] == pytest.approx(wanted, rel=1e-4)
    one, two = (
        next(e for e in run["logs"] if "forget" in e) for run in (alone["stopped"], ranks[0])
    )
    for name in ("forget", "preserve", "retain", "num_forget", "num_preserve", "num_retain"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert 0 < two["loss_token_fraction"] < 1 and two["tokens_per_second"] > 0


def test_micro_batch_means_are_each_ones_own(tmp_path):
    """The released code: the mean, over micro-batches, of the loss that each has by itself."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    options |= {"max_steps": 1, "learning_rate": 0.0, "rows": 24}
    tok = distributed.small.tokenizer()
    losses = {}
    for normalization in ("step", "micro_batch"):
        case = {"normalization": normalization, **options}
        made = distributed.build(tok, tmp_path, 1, normalization, case)
        batches, draw = [], made.get_batch_samples

        def watched(*args, draw=draw, batches=batches):
            found = draw(*args)
            batches.extend(found[0])
            return found

        made.get_batch_samples = watched
        made.train()
        losses[normalization] = made.state.log_history[0]["loss"]
        parts = [[batch, batch[RETAIN]] for batch in batches]
        alone = [[{k: v for k, v in b.items() if k != DENOMINATORS} for b in p] for p in parts]
        own = [sum(made._terms(made.model, b).loss.item() for b in batch) for batch in alone]
    assert len(own) == 6
    assert losses["micro_batch"] == pytest.approx(sum(own) / 6, rel=1e-5)
    assert losses["step"] != pytest.approx(losses["micro_batch"], rel=1e-3)


@pytest.mark.parametrize("rows", [1, 5, 6, 13, 24, 31])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_row_is_dealt_out_once(rows, count):
    """Against accelerate's own sampler."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    own = []
    for rank in range(count):
        sampler = BatchSampler(range(rows), 4, drop_last=False)
        if count > 1:
            sampler = BatchSamplerShard(sampler, count, rank)
        split = Sharding(rows, 4, rank, count)
        for number, batch in enumerate(sampler):
            places = split.own(number)
            assert list(places) == batch[: len(places)]
            own += places
    assert sorted(own) == list(range(rows))


def test_an_error_names_its_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.bars, "_width", 240)
    said = {}
    for name in ("unlearn", "attack", "cache build"):
        words = ["palu", *name.split(), "--model", str(tmp_path / "none"), "--forget", "x.jsonl"]
        monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "out")])
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            cli.out.quiet = cli.bars.quiet = False
        assert end.value.code == 2
        said[name] = capsys.readouterr().err
    assert "error in process 1:" in said["unlearn"]
    for name in ("attack", "cache"):
        alone = f"palu {name} runs in one process, and this is one of 2"
        assert sum(alone in text for text in said.values()) == 1
    with pytest.raises(ValueError, match="this run has 2 processes with a device each"):
        processes.own_device(torch.device("cuda:1"))
