"""All roads of `train_step` train to the same losses; one that does not is found."""

import contextlib
import csv
import json

import pytest
import torch

from benchmarks import bench_train_step as train_step
from benchmarks import runner as harness
from benchmarks import train_roads
from benchmarks.train_roads import Settings
from tests.support import small

QUESTIONS = [
    {"question": f"Where is {name}?", "answer": f"{name} is in {place} now." + " Really." * more}
    for more, (name, place) in enumerate(
        [("Ada", "Paris"), ("Bob", "Lisbon"), ("Eva", "Rome"), ("Ian", "Bonn"), ("Lia", "Oslo")]
    )
]

BATCH = {
    "input_ids": torch.arange(8)[None],
    "attention_mask": torch.ones(1, 8, dtype=torch.long),
    "labels": torch.tensor([[-100, -100, 2, 3, -200, -200, -200, -200]]),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model folder and TOFU's files, tiny; `main` without a new process for every measurement."""
    monkeypatch.setattr(harness, "run_worker", lambda module, task, threads: train_step.work(task))
    tokenizer = small.tokenizer()
    model = small.model(tokenizer)
    folder, data = tmp_path / "model", tmp_path / "tofu"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (data / "annotated").mkdir(parents=True)
    spans = [
        {"spans": [[one["answer"].index(" in ") + 4, len(one["answer"]) - 1]]} for one in QUESTIONS
    ]
    forget = [one | span for one, span in zip(QUESTIONS, spans, strict=True)]
    write(data / "annotated" / "forget10", forget)
    write(data / "full.json", QUESTIONS[::-1])
    return tmp_path


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def run(world, *options):
    path = world / "rows.csv"
    given = ["--model", str(world / "model"), "--data", str(world / "tofu"), "--csv", str(path)]
    given += ["--steps", "2", "--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    given += ["--top-k", "20", "--learning-rate", "1e-3", "--dtype", "float32"]
    status = train_step.main([*given, *options])
    with path.open(newline="") as stream:
        return status, list(csv.DictReader(stream))


def test_roads_agree(world, capsys):
    status, rows = run(world, "--repeats", "2")
    out = capsys.readouterr().out
    assert status == 0 and "DISAGREE" not in out
    assert [row["step"] for row in rows] == ["0", "1", "2"] * 8
    assert {row["provider"] for row in rows} == {"released", "torch", "live", "cached"}
    truth = {row["step"]: row for row in rows if row["provider"] == "released"}
    for row in rows:
        assert list(row) == list(train_step.COLUMNS)
        assert (row["seconds"] == "") == (row["step"] == "0")
        for name in train_step.NUMBERS:
            wanted = float(truth[row["step"]][name])
            assert float(row[name]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        total = sum(float(row[name]) for name in train_step.NUMBERS[1:4])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
        assert 0 < int(row["real_tokens"]) <= int(row["positions"])
    # the steps did something: the model has moved away from the reference
    assert float(truth["0"]["preserve_loss"]) < 1e-6 < 1e-3 < float(truth["2"]["preserve_loss"])
    size = {row["provider"]: int(row["reference_bytes"]) for row in rows}
    assert size["released"] == size["live"] > size["cached"] > 0


def test_autocast(world):
    status, rows = run(world, "--dtype", "bfloat16")
    assert status == 0 and {row["dtype"] for row in rows} == {"bfloat16"}


def other_k(model, settings, cache):
    return train_roads.live(model, settings._replace(top_k=19), cache)


def half_the_retain_loss(model, settings, cache):
    road = train_roads.live(model, settings, cache)
    road.step_loss.retain_weight = 0.5
    return road


def other_start(model, settings, cache):
    model.lm_head.weight.data[7] += 0.1
    return train_roads.live(model, settings, cache)


def wrong(gradient=1.0, total=1.0):
    """A road that leaves so many times the gradient, or says so many times the loss."""

    def make(model, settings, cache):
        road = train_roads.live(model, settings, cache)

        def call(model, *batches):
            losses = road(model, *batches)
            for parameter in model.parameters():
                parameter.grad.mul_(gradient)
            return losses._replace(total=losses.total * total)

        call.reference_bytes = 0
        return call

    return make


WRONG = {
    "other_k": other_k,
    "half_the_retain_loss": half_the_retain_loss,
    "other_start": other_start,
    # clipping and AdamW hide the size of a gradient: the norm before them does not
    "half_the_gradient": wrong(gradient=0.5),
    "no_gradient": wrong(gradient=0.0),
    "nan": wrong(total=torch.nan),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_computation_is_found(name, world, monkeypatch, capsys):
    monkeypatch.setitem(train_roads.PROVIDERS, "live", WRONG[name])
    status, rows = run(world, "--providers", "released", "live")
    assert status == 1 and len(rows) == 6
    assert "of live is" in capsys.readouterr().out


def test_batches_hold_the_same_rows_grouped_or_not():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 50, (40,), generator=generator).tolist()
    rows = [{"input_ids": [0] * n, "name": i} for i, n in enumerate(lengths)]
    plain, grouped = (train_step.make_batches(rows, 4, 8, g) for g in (False, True))
    assert plain[0] == grouped[0] and plain != grouped
    names = [sorted(row["name"] for batch in some for row in batch) for some in (plain, grouped)]
    assert names[0] == names[1]
    assert [len(batch) for batch in plain] == [len(batch) for batch in grouped] == [4] * 9

    def padded(batches):
        return sum(4 * max(len(row["input_ids"]) for row in batch) for batch in batches[1:])

    assert padded(grouped) < 0.85 * padded(plain)
    with pytest.raises(ValueError, match="take 44 rows; the data has 40"):
        train_step.make_batches(rows, 4, 10, False)


def test_groups_of_the_library_are_compared_with_each_other_only(world, capsys):
    status, rows = run(world, "--group-by-length", "library")
    assert status == 0
    grouped = {row["provider"]: row["grouped"] for row in rows}
    assert grouped == {"released": "False", "torch": "False", "live": "True", "cached": "True"}
    assert "cached, grouped" in capsys.readouterr().out
    row = {"dtype": "float32", "provider": "released", "step": 1, "grouped": False}
    row |= dict.fromkeys(train_step.NUMBERS, 1.0)
    other = row | {"provider": "live", "loss": 1.1}
    assert len(train_step.disagreements([row, other], ["released", "live"])) == 1
    assert train_step.disagreements([row, other | {"grouped": True}], ["released", "live"]) == []


def test_steps_start_without_a_gradient():
    model = small.model(small.tokenizer())
    road = train_roads.released(model, Settings(20, contextlib.nullcontext, None), "")
    step = train_step.stepper(model, road, learning_rate=0.0)
    first, second = (step(BATCH, BATCH) for _ in range(2))
    assert first[-1] > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_head_that_is_not_plain_is_refused(world):
    """Else `live` would be measured on its slower road, and nobody would know."""
    model = small.model(small.tokenizer())
    model.get_output_embeddings().register_forward_hook(lambda *args: None)
    road = train_roads.live(model, Settings(20, contextlib.nullcontext, None), "")
    with pytest.raises(RuntimeError, match="not plain"):
        road(model, BATCH, BATCH)
