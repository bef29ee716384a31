"""What people watch: the logs and TensorBoard, the stop at a forget probability, a loss that is not
finite, the bar."""

import copy
import io
import json
import math
import resource
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from palu import progress
from palu.data.collator import Collator
from palu.evaluation import evaluate_examples
from palu.training import step_log
from palu.training.nonfinite import example_names
from palu.training.step_log import StepLog, peak_memory_mib
from palu.unlearn import TrainingBar
from tests.support import small, training
from tests.support.command import palu_in, write_data, write_model
from tests.support.training import logged, sure_model, trainer, weights

NEW = ("loss_token_fraction", "head_rows_share", "tokens_per_second", "peak_memory_mib")
TERMS = ("forget", "preserve", "retain")


config = partial(training.config, per_device_train_batch_size=3, num_train_epochs=2)


# ---- logs ----------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(tok, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = config(tmp_path, report_to="tensorboard", stop_at_forget_prob=1e-9)
    made = trainer(tok, args)
    made.train()
    (file,) = Path(args.output_dir).rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in (*TERMS, *(f"num_{t}" for t in TERMS), *NEW, "loss", "forget_prob"):
        entries = logged(made, name)
        seen = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert len(entries) == 2, name
        assert [step for step, _ in seen] == [entry["step"] for entry in entries], name
        assert [v for _, v in seen] == pytest.approx([e[name] for e in entries], rel=1e-6), name


@pytest.mark.parametrize("preserve", ["reverse_kl", "none"])
def test_loss_token_fraction(tok, tmp_path, preserve):
    rows = small.rows(tok)
    made = trainer(tok, config(tmp_path, preserve=preserve, num_train_epochs=1), retain=rows[3:4])
    made.train()
    (entry,) = logged(made)
    forget, retain = Collator(tok)(rows[:3]), Collator(tok)([rows[3]] * 3)
    roles = made.method.roles(forget["labels"])
    need = (roles == 1).sum() + (retain["labels"] != -100).sum()
    need += (roles == 2).sum() if preserve != "none" else 0
    positions = forget["labels"].numel() + retain["labels"].numel()
    assert entry["loss_token_fraction"] == pytest.approx(int(need) / positions, rel=1e-6)


class Clock:
    """Stands in for `time` in `palu.training.step_log`."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(step_log, "time", made)
    return made


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tokens_per_second_of_training_alone(tok, tmp_path, clock, accumulation):
    """2 s a step and half a second a batch, forget or retain, count; 50 s an evaluation and 70 s a
    checkpoint do not."""
    rows = [*small.rows(tok)[:3], small.rows(tok)[4]]
    args = config(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
    )
    made = trainer(tok, args, forget=rows, retain=small.rows(tok)[3:4], eval_dataset=rows[:1])

    class Passing(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.now += 2

        def on_prediction_step(self, *args, **kwargs):
            clock.now += 50

    made.add_callback(Passing())
    write, collate = made.fill_checkpoint, made.data_collator

    def slow_write(folder):
        clock.now += 70
        write(folder)

    def slow_collate(features):
        clock.now += 0.5
        return collate(features)

    made.fill_checkpoint, made.data_collator = slow_write, slow_collate
    made.train()
    # A window of two steps is a pass over the four forget rows for each micro-batch of a step.
    tokens = sum(len(row["input_ids"]) for row in rows) + 4 * len(small.rows(tok)[3]["input_ids"])
    assert len(logged(made)) == 2
    for entry in logged(made):
        want = accumulation * tokens / (2 * (2 + accumulation))
        assert entry["tokens_per_second"] == pytest.approx(want, rel=1e-5)


def test_a_window_begins_anew_after_each_log(tok, tmp_path):
    """Four steps logged one by one and two by two: rows and shares of the two windows agree."""
    runs = []
    for every in (1, 2):
        args = config(tmp_path, per_device_train_batch_size=1, max_steps=4, logging_steps=every)
        made = trainer(tok, args)
        made.train()
        runs.append(logged(made))
    one, two = runs
    assert len(one) == 4 and len(two) == 2
    for window, pair in zip(two, (one[:2], one[2:]), strict=True):
        for name in TERMS:
            rows = [e[f"num_{name}"] for e in pair]
            assert window[f"num_{name}"] == pytest.approx(sum(rows) / 2)
            mean = sum(e[name] * n for e, n in zip(pair, rows, strict=True)) / max(sum(rows), 1)
            assert window[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)
        shares = [e["loss_token_fraction"] for e in pair]
        assert min(shares) <= window["loss_token_fraction"] <= max(shares)


def test_a_second_training_does_not_see_the_first_one(tok, tmp_path):
    made = trainer(tok, config(tmp_path, logging_steps=2, max_steps=3, learning_rate=0.0))
    runs = []
    for _ in range(2):  # the third step of each is in no log
        made.train()
        assert made.step_log.steps == 1
        runs.append([{k: e[k] for k in (*TERMS, "num_forget")} for e in logged(made)])
    assert len(runs[0]) == 1 and runs[0] == runs[1]


def test_a_batch_that_did_not_fit_is_in_no_log(tok, tmp_path, monkeypatch):
    """`auto_find_batch_size` begins again with a smaller one."""
    logs = []
    for size, largest in ((1, 9), (2, 1)):
        args = config(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            auto_find_batch_size=True,
            num_train_epochs=1,
        )
        made = trainer(tok, args, retain=None)
        step = made.training_step

        def small_device(model, inputs, *rest, step=step, largest=largest):
            if len(inputs["input_ids"]) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(model, inputs, *rest)

        monkeypatch.setattr(made, "training_step", small_device)
        made.train()
        logs.append([{k: e[k] for k in (*TERMS, "num_forget", NEW[0])} for e in logged(made)])
    assert len(logs[0]) == 3 and logs[0] == logs[1]


def test_what_did_not_fit_after_a_step_is_not_begun_again(tok, tmp_path, monkeypatch):
    """The Trainer keeps the weights and the optimizer of what it gives up."""
    args = config(tmp_path, per_device_train_batch_size=2, auto_find_batch_size=True)
    made = trainer(tok, args, retain=None)
    step, calls = made.training_step, []

    def small_device(*inputs):
        calls.append(step(*inputs))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return calls[-1]

    monkeypatch.setattr(made, "training_step", small_device)
    with pytest.raises(RuntimeError, match=r"after step 1, .*per_device_train_batch_size=1"):
        made.train()
    monkeypatch.setattr(made, "training_step", step)
    made.train()
    assert len(made.get_train_dataloader()) > 0  # which is no attempt


def test_processes_are_summed_and_the_largest_memory_counts(clock):
    parts = []
    for terms, ids in (([4.0, 0.0, 1.0], (2, 5)), ([2.0, 3.0, 1.0], (3, 4))):
        log = StepLog(torch.device("cpu"), preserve=True)
        log.start_clock()
        batch = {"input_ids": torch.zeros(ids), "attention_mask": torch.ones(ids)}
        batch["attention_mask"][0, 3:] = 0
        log.add_step([batch, {"input_ids": torch.zeros(1, 7)}])
        log.terms += torch.stack([torch.tensor(terms), torch.tensor([2.0, 0.0, 1.0])])
        parts.append(log)
    clock.now += 4
    kept = []
    for log in parts:
        log.collect(lambda own: kept.append(own) or own)
    kept[1][0, -1] += 1000
    log = StepLog(torch.device("cpu"), preserve=True)
    log.start_clock()
    log.steps = 1
    clock.now += 4
    found = log.collect(lambda own: torch.cat(kept))
    assert found["forget"] == 1.5 and found["preserve"] == 3.0 and found["retain"] == 1.0
    assert found["num_forget"] == 4 and found["num_preserve"] == 0 and found["num_retain"] == 2
    assert found["loss_token_fraction"] == pytest.approx(6 / (10 + 12 + 14))
    assert found["tokens_per_second"] == pytest.approx((10 - 2 + 12 - 1 + 14) / 4)
    assert found["peak_memory_mib"] == pytest.approx(kept[1][0, -1].item())


def test_peak_memory_is_that_of_the_process():
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(int(before + 64) * 2**18)  # float32: more than was ever there
    after = peak_memory_mib(torch.device("cpu"))
    assert after >= before + 60 and held.sum() > 0
    scale = 2**20 if sys.platform == "darwin" else 2**10
    assert after == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


# ---- early stop ----------------------------------------------------------------------------------


def stopper(made):
    from palu.training.callbacks import StopAtForgetProb

    return next(c for c in made.callback_handler.callbacks if isinstance(c, StopAtForgetProb))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("road", ["hidden", "logits"])
def test_the_forget_probability(tok, tmp_path, prefix, road):
    rows = small.rows(tok)  # the fourth has nothing to forget
    options = {"prefix_length": prefix, "per_device_train_batch_size": 2}
    made = trainer(
        tok,
        config(tmp_path, stop_at_forget_prob=0.01, **options),
        model=sure_model(tok, attention_dropout=0.5),
        forget=rows,
        retain=rows[3:],
    )
    made.compute_loss(made.model, Collator(tok)(rows))
    assert made.step_loss.without_logits
    if road == "logits":
        made.step_loss.without_logits = False
    made.model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    got = stopper(made).forget_probability()
    assert made.model.training and torch.equal(torch.get_rng_state(), state)
    made.model.eval()
    if prefix == 0:  # the same number as in `palu evaluate`
        examples = small.examples()
        measured = evaluate_examples(made.model, tok, examples, max_length=64, max_new_tokens=0)
        assert got == pytest.approx(measured["mean"]["sensitive_probability"], rel=1e-5)
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        logp = made.model(ids).logits[0].log_softmax(-1)
        run, kept = 0, []
        for place, label in enumerate(labels):
            run = run + 1 if label >= 0 else 0
            if run and (prefix == 0 or run <= prefix):
                kept.append(logp[place - 1, label].item())
        if kept:
            found.append(math.exp(sum(kept) / len(kept)))
    assert len(found) == 4 and max(found) > 2 * min(found)
    assert got == pytest.approx(sum(found) / 4, rel=1e-5)


def test_it_stops_where_the_target_is_reached(tok, tmp_path, caplog):
    options = {"num_train_epochs": 9, "learning_rate": 1e-3}
    model = sure_model(tok)
    args = config(tmp_path, stop_at_forget_prob=1e-30, **options)
    whole = trainer(tok, args, model=copy.deepcopy(model))
    whole.train()
    values = [e["forget_prob"] for e in logged(whole, "forget_prob")]
    assert [e["step"] for e in logged(whole, "forget_prob")] == list(range(1, 10))
    assert "above stop_at_forget_prob=1e-30" in caplog.text
    caplog.clear()
    target = (values[3] + values[4]) / 2  # reached by the fifth epoch and by none before
    assert min(values[:4]) > target > values[4]

    args = config(tmp_path, stop_at_forget_prob=target, logging_steps=50, **options)
    made = trainer(tok, args, model=copy.deepcopy(model))
    made.train()
    assert made.state.global_step == 5
    assert [e["forget_prob"] for e in logged(made, "forget_prob")] == values[:5]
    assert [e["step"] for e in logged(made)] == [5]  # the last losses are not lost
    assert "stopped after step 5 of 9" in caplog.text and "above" not in caplog.text
    five = trainer(tok, config(tmp_path, **{**options, "num_train_epochs": 5}), model=model)
    five.train()
    assert torch.equal(weights(made.model), weights(five.model))


def test_every_eval_steps_where_they_are_set(tok, tmp_path):
    args = config(
        tmp_path,
        per_device_train_batch_size=1,
        num_train_epochs=2,
        eval_steps=2,
        stop_at_forget_prob=1e-30,
    )
    made = trainer(tok, args)
    made.train()
    assert [e["step"] for e in logged(made, "forget_prob")] == [2, 4, 6]
    assert [e["step"] for e in logged(made)] == list(range(1, 7))  # no loss is left out of the logs


def test_a_resumed_run_stops_at_the_same_step(tok, tmp_path, caplog):
    options = {"num_train_epochs": 9, "learning_rate": 1e-3}
    saving = {"save_strategy": "steps", "save_steps": 2}
    model = sure_model(tok)

    def run(folder, target, **more):
        args = config(folder, stop_at_forget_prob=target, **options, **more)
        return trainer(tok, args, model=copy.deepcopy(model))

    probe = run(tmp_path / "probe", 1e-30)
    probe.train()
    target = logged(probe, "forget_prob")[4]["forget_prob"]
    whole = run(tmp_path, target, **saving)
    whole.train()
    assert whole.state.global_step == 5
    assert (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").is_file()
    for step in (4, 5):
        caplog.clear()
        again = run(tmp_path, target, **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert again.state.global_step == 5
        assert caplog.text.count("stopped after step 5 of 9") == 1
        assert torch.equal(weights(again.model), weights(whole.model))
        values = [
            [(e["step"], e["forget_prob"]) for e in logged(made, "forget_prob")]
            for made in (again, whole)
        ]
        assert values[0] == values[1]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_a_target_outside_its_range(tmp_path, value):
    with pytest.raises(ValueError, match="stop_at_forget_prob must be a number above 0"):
        config(tmp_path, stop_at_forget_prob=value)


def test_nothing_to_measure(tok, tmp_path):
    with pytest.raises(ValueError, match="no row of train_dataset has one"):
        trainer(tok, config(tmp_path, stop_at_forget_prob=0.1), forget=small.rows(tok)[3:4])

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(small.rows(tok))

    with pytest.raises(ValueError, match="with a length, not a Stream"):
        args = config(tmp_path, stop_at_forget_prob=0.1, max_steps=2)
        trainer(tok, args, forget=Stream())


# ---- a loss that is not finite -------------------------------------------------------------------


def only_in(rows, number):
    """A token of one example that no other example has."""
    others = {t for i, row in enumerate(rows) if i != number for t in row["input_ids"]}
    return next(t for t in rows[number]["input_ids"] if t not in others)


class Spoil(TrainerCallback):
    """Makes the embedding of some tokens NaN when step `at` begins."""

    def __init__(self, tokens, at):
        self.tokens, self.at = tokens, at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.at:
            with torch.no_grad():
                model.get_input_embeddings().weight[self.tokens] = math.nan


def spoiled(tok, tmp_path, numbers, rows=None, **kwargs):
    """The message of a run in which some examples become NaN at its third step."""
    rows = small.rows(tok) if rows is None else rows
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    args = config(tmp_path, num_train_epochs=5, **options)
    spoil = Spoil([only_in(rows, n) for n in numbers], at=3)
    sets = {"forget": rows[:3], "retain": rows[3:]}
    made = trainer(tok, args, callbacks=[spoil], **sets, **kwargs)
    with pytest.raises(FloatingPointError) as caught:
        made.train()
    return str(caught.value)


def test_the_message_names_step_term_examples_and_checkpoint(tok, tmp_path):
    stale = tmp_path / "out" / "checkpoint-1000"
    stale.mkdir(parents=True)
    (stale / "palu_run.json").write_text("{}")  # palu's, of another run; a foreign one is refused
    message = spoiled(tok, tmp_path, [1])
    assert (
        "not finite at step 3: forget = nan, preserve = nan, in the examples forget 1." in message
    )
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert f"The last good checkpoint is {checkpoint}." in message
    from safetensors.torch import load_file

    kept = load_file(checkpoint / "model.safetensors")
    assert kept and all(t.isfinite().all() for t in kept.values())


def test_examples_of_both_sets_and_their_own_ids(tok, tmp_path):
    rows = [dict(row, example_id=f"q{i}") for i, row in enumerate(small.rows(tok))]
    message = spoiled(tok, tmp_path, [0, 2], rows=rows)
    assert "in the examples forget 0 (id 'q0'), 2 (id 'q2')." in message
    message = spoiled(tok, tmp_path / "retain", [4], rows=rows)
    assert "retain = nan, in the examples retain 1 (id 'q4')." in message


def test_a_collator_of_the_users_own(tok, tmp_path):
    """One that gives other tokens each time: names are left out, the rest of the message stays."""

    calls = []

    class Changing(Collator):
        def __call__(self, features):
            calls.append(0)
            batch = super().__call__(features)
            batch["input_ids"][:, 0] = len(calls) % 300
            return batch

    message = spoiled(tok, tmp_path, [1], data_collator=Changing(tok))
    assert "preserve = nan. The last good checkpoint" in message


def test_raw_rows_are_found_by_what_their_collator_makes_of_them(tok):
    rows = small.rows(tok)
    collate = Collator(tok, pad_to_multiple_of=8)
    raw = [{"number": i, "id": i} for i in range(5)]

    def of_numbers(features):
        return collate([rows[f["number"]] for f in features])

    batch = of_numbers(raw)
    examples = [{k: v[i : i + 1] for k, v in batch.items()} for i in (4, 2)]
    assert example_names(raw, of_numbers, examples) == ["2", "4"]
    assert example_names(iter(raw), of_numbers, examples) == []


def test_spoiled_weights_do_not_replace_a_good_checkpoint(tok, tmp_path):
    """The loss of step 3 is finite, its update is not."""

    class Blow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.grad[0, 0] = math.inf

    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    args = config(tmp_path, max_grad_norm=0.0, num_train_epochs=5, **options)
    made = trainer(tok, args, callbacks=[Blow()])
    with pytest.raises(FloatingPointError, match="not finite after step 3: lm_head") as e:
        made.train()
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}." in str(e.value)
    assert [p.name for p in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-2"]


def test_in_evaluation(tok, tmp_path):
    rows = small.rows(tok)
    made = trainer(tok, config(tmp_path), eval_dataset=rows[1:3])
    with torch.no_grad():
        made.model.get_input_embeddings().weight[only_in(rows, 2)] = math.nan
    with pytest.raises(FloatingPointError, match=r"in evaluation: .*in the examples forget 1 \(id"):
        made.evaluate()


# ---- the bar -------------------------------------------------------------------------------------


def test_the_bar_in_a_file_is_a_few_lines(tmp_path, monkeypatch):
    clock = Clock()
    clock.monotonic = clock.perf_counter
    monkeypatch.setattr(progress, "time", clock)
    with open(tmp_path / "log", "w+") as file:
        console = Console(file=file, width=120)
        with progress.bar(console, "Unlearning") as report:
            for step in range(1001):
                clock.now += 1
                report(step, 1000, f"forget {step / 1000}")
        file.seek(0)
        lines = file.read().splitlines()
    assert 5 < len(lines) <= 10
    assert lines[0].split()[:2] == ["Unlearning", "100/1000"] and "forget 0.1" in lines[0]
    assert " left" in lines[0] and "\x1b" not in lines[0]
    assert "1000/1000" in lines[-1] and "left" not in lines[-1]


def test_a_short_run_in_a_file_is_one_line(tmp_path):
    with open(tmp_path / "log", "w+") as file:
        with progress.bar(Console(file=file, width=120), "Unlearning") as report:
            for step in range(51):
                report(step, 60, "forget 1.5")
        file.seek(0)
        lines = file.read().splitlines()
    assert len(lines) == 1 and "50/60" in lines[0] and "forget 1.5" in lines[0]
    assert "left" not in lines[0]  # it has ended


def test_the_time_left_follows_the_pace():
    """A slow cache build first, then 10 s a step: 30 steps are left after ten, from any start."""
    clock = Clock()
    for first in (0, 500):
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        made = progress.Progress(console=console, speed_estimate_period=float("inf"))
        made.get_time = clock.perf_counter
        number = made.add_task("x", total=None)
        task = made.tasks[0]
        for done in range(5):
            clock.now += 100
            made.update(number, completed=done, total=5)
        for done in range(11):
            made.update(number, completed=first + done, total=first + 40)
            clock.now += 10
        assert progress.TimeLeft().render(task).plain == "0:05:00 left"


def test_the_bar_shows_steps_and_all_terms(tok, tmp_path):
    shown = []
    made = trainer(tok, config(tmp_path, stop_at_forget_prob=1e-30))
    made.add_callback(TrainingBar(lambda *words: shown.append(words)))
    made.train()
    assert shown[0] == (0, 2, "")
    assert shown[-1][:2] == (2, 2)
    last = logged(made)[-1]
    for name in TERMS:
        assert f"{name} {last[name]:.3g}" in shown[-1][2]
    assert f"forget_prob {logged(made, 'forget_prob')[-1]['forget_prob']:.3g}" in shown[-1][2]


# ---- the command ---------------------------------------------------------------------------------


def test_palu_unlearn_stops(tok, tmp_path, monkeypatch, capsys, caplog):
    write_model(tmp_path / "model", sure_model(tok))
    write_data(tmp_path)
    options = "unlearn --model model --forget forget.jsonl --retain none --output new --device cpu"
    options += " --overwrite"
    options += " --objective entropy --top-k 5 --learning-rate 0.001 --epochs 20 --batch-size 3"
    run = partial(palu_in(tmp_path, monkeypatch, capsys), *options.split())
    status, _, error = run("--stop-at-forget-prob", "1.5")
    assert status == 2 and "stop_at_forget_prob must be a number above 0 and below 1" in error
    status, said, error = run("--stop-at-forget-prob", "0.1")
    assert status == 0
    record = json.loads((tmp_path / "new" / "palu.json").read_text())
    values = [e["forget_prob"] for e in record["loss_curve"]]
    assert 1 < len(values) < 20 and values[-1] <= 0.1 < values[-2]
    assert record["settings"]["stop_at_forget_prob"] == 0.1
    assert f"after {len(values)} steps" in said
    assert len([line for line in error.splitlines() if "Unlearning" in line]) == 1
    assert f"stopped after step {len(values)} of 20" in caplog.text
