"""PDU's dual variable: moved as the paper writes it, the same however a run is split or resumed.
(Its loss is tested with the other methods', and on two processes, in test_methods.py.)"""

import json
import math

import pytest
import torch

from palu.training.checkpoints import STATE, CheckpointError
from tests.palu.methods.test_methods import (
    RUN,
    unmarked,  # noqa: F401
)
from tests.support import small
from tests.support.training import config, trainer, weights

OPTIONS = {"method": "pdu", "retain_loss_eps": 2.0, "dual_step_size": 0.25, "retain_weight": 3.0}


def made_by(tok, tmp_path, **options):
    """Three forget rows: two steps an epoch."""
    settings = {"dual_warmup_epochs": 1, "num_train_epochs": 3, "learning_rate": 1e-2}
    return trainer(tok, config(tmp_path, **{**OPTIONS, **settings, **options}))


def steps(run):
    return [entry for entry in run.state.log_history if "forget" in entry]


def test_it_moves_by_the_retain_loss_of_each_step(tok, tmp_path):
    run = made_by(tok, tmp_path)
    run.train()
    log, dual = steps(run), 3.0
    assert len(log) == 6
    for number, entry in enumerate(log):
        # the step was taken with the one before; the Trainer rounds its losses
        total = entry["forget"] + dual * entry["retain"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        if number >= 2:  # an epoch of warm-up
            dual = max(0.0, dual + 0.25 * (entry["retain"] - 2.0))
        assert entry["dual"] == pytest.approx(dual, rel=1e-5)
    assert abs(log[-1]["dual"] - 3.0) > 0.1
    found = run.evaluate()
    total = found["eval_forget"] + log[-1]["dual"] * found["eval_retain"]
    assert found["eval_loss"] == pytest.approx(total, rel=1e-5)
    run.train()  # anew
    assert steps(run)[0]["dual"] == 3.0


def test_it_is_never_below_zero(tok, tmp_path):
    run = made_by(tok, tmp_path, retain_loss_eps=1000.0, dual_warmup_epochs=0)
    run.train()
    assert [entry["dual"] for entry in steps(run)] == [0.0] * 6
    assert steps(run)[1]["loss"] == pytest.approx(steps(run)[1]["forget"], rel=1e-4)


def test_micro_batches_are_one_step(tok, tmp_path):
    """Retain rows of all of them count, each once, in float64."""
    found = []
    for batch, accumulation in ((3, 1), (1, 3)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        args = config(tmp_path, **OPTIONS, **split, dual_warmup_epochs=0, num_train_epochs=3)
        run = trainer(tok, args, model=small.model(tok).double())
        run.train()
        found.append([entry["dual"] for entry in steps(run)])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len({*found[0]}) == 3


def test_a_resumed_run_is_the_run(tok, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = made_by(tok, tmp_path, **saved, dual_warmup_epochs=0)
    whole.train()
    for step in (2, 4):
        place = tmp_path / "out" / f"checkpoint-{step}"
        kept = json.loads((place / STATE).read_text())
        assert kept == {"dual": steps(whole)[step - 1]["dual"]} != {"dual": 3.0}
        again = made_by(tok, tmp_path, **saved, dual_warmup_epochs=0)
        again.train(resume_from_checkpoint=str(place))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert [e["dual"] for e in steps(again)] == [e["dual"] for e in steps(whole)]
    (place / STATE).unlink()
    with pytest.raises(CheckpointError, match=f"damaged: {STATE} is missing"):
        made_by(tok, tmp_path, **saved).train(resume_from_checkpoint=str(place))


def test_other_methods_keep_no_state(tok, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run = trainer(tok, config(tmp_path, method="npo", **saved))
    run.train()
    assert not (tmp_path / "out" / "checkpoint-1" / STATE).exists()
    assert "dual" not in steps(run)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retain_loss_eps": -1.0}, r"retain_loss_eps is -1\.0; it must be .*at least 0"),
        ({"dual_step_size": 0.0}, r"dual_step_size is 0\.0; it must be .*above 0"),
        ({"dual_warmup_epochs": math.inf}, "dual_warmup_epochs is inf; it must be"),
        ({"method": "npo"}, r"retain_loss_eps is 2\.0 and method 'npo' has no such option"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **{**OPTIONS, **options})


def test_a_retain_set_is_needed(tok, tmp_path):
    with pytest.raises(ValueError, match="'pdu' needs a retain set"):
        trainer(tok, config(tmp_path, **OPTIONS | {"retain_weight": 1.0}), retain=None)


def test_the_command_line(palu, work, unmarked):  # noqa: F811
    files = "--forget", "unmarked.jsonl", "--retain", "retain.jsonl", "--method", "pdu"
    own = "--retain-weight", 4, "--retain-loss-eps", 0.5, "--dual-warmup-epochs", 0
    status, said, told = palu(*RUN, *files, "--output", "pdu", *own, "--dual-step-size", 0.1)
    assert status == 0 and "Written to pdu after 2 steps" in said, told
    record = json.loads((work / "pdu" / "palu.json").read_text())
    assert record["settings"]["retain_loss_eps"] == 0.5
    curve = record["loss_curve"]
    dual = 4 + 0.1 * (curve[0]["retain"] - 0.5)
    assert curve[0]["dual"] == pytest.approx(dual, rel=1e-5)
    _, _, told = palu(*RUN, *files, "--output", "still", "--epochs", 2)
    assert "num_train_epochs is 2 and dual_warmup_epochs 5: the retain weight" in told
    status, _, told = palu(*RUN, *files, "--output", "not", "--retain-weight", 0)
    assert status == 2 and "'pdu' needs a retain set, and its retain_weight must be above" in told
    status, _, told = palu(*RUN, *files, "--output", "not", "--dual-step-size", 0)
    assert status == 2 and "dual_step_size is 0.0; it must be a finite number above 0" in told
