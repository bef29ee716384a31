"""All providers of `bench_train_step` train to the same losses; one that does not is found."""

import json

import pytest
import torch

from benchmarks import bench_train_step, tables
from benchmarks.bench_train_step import GROUPED, NUMBERS, TRAIN_STEP
from benchmarks.declare import Case
from tests.support import small

QUESTIONS = [
    {"question": f"Where is {name}?", "answer": f"{name} is in {place} now." + " Really." * more}
    for more, (name, place) in enumerate(
        [("Ada", "Paris"), ("Bob", "Lisbon"), ("Eva", "Rome"), ("Ian", "Bonn"), ("Lia", "Oslo")]
    )
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder and TOFU's files, tiny."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = small.tokenizer()
    small.model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "tofu" / "annotated").mkdir(parents=True)
    spans = [
        {"spans": [[one["answer"].index(" in ") + 4, len(one["answer"]) - 1]]} for one in QUESTIONS
    ]
    forget = [one | span for one, span in zip(QUESTIONS, spans, strict=True)]
    write(folder / "tofu" / "annotated" / "forget10", forget)
    write(folder / "tofu" / "full.json", QUESTIONS[::-1])
    return folder


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


@pytest.fixture
def run(world, tmp_path, in_process):
    """-> (exit status, rows by provider and metric)."""

    def run(*options):
        given = ["--model", str(world / "model"), "--data", str(world / "tofu"), "--steps", "2"]
        given += ["--batch-size", "1", "--repeats", "1", "--top-k", "20", "--learning-rate", "1e-3"]
        path = tmp_path / "rows.csv"
        status, rows = in_process(
            bench_train_step.BENCHMARK, path, *given, "--dtype", "float32", *options
        )
        assert not [row["status"] for row in rows if row["status"] != "ok"]
        return status, {(row["provider"], row["metric"]): row for row in rows}

    return run


def values(rows, provider, metric):
    return tables.by_process(rows[provider, metric])[0]


def test_providers_agree(run, capsys):
    status, rows = run()
    out = capsys.readouterr().out
    assert status == 0 and "DISAGREE" not in out and "loss, cached" in out
    providers = dict.fromkeys(provider for provider, _ in rows)
    assert list(providers) == ["released", "torch", "live", "cached"]
    for provider in providers:
        assert len(values(rows, provider, "seconds")) == 2
        for name in NUMBERS:
            wanted = pytest.approx(values(rows, "released", name), rel=1e-4, abs=1e-6)
            assert values(rows, provider, name) == wanted
        terms = zip(*(values(rows, provider, name) for name in NUMBERS[1:4]), strict=True)
        assert values(rows, provider, "loss") == pytest.approx(list(map(sum, terms)), rel=1e-5)
        tokens = (values(rows, provider, name) for name in ("real_tokens", "positions"))
        assert all(0 < real <= positions for real, positions in zip(*tokens, strict=True))
        assert rows[provider, "loss_error"]["p50"] < 1e-4
    # the steps did something: the model has moved away from the reference
    first, *_, last = values(rows, "released", "preserve_loss")
    assert first < 1e-6 < 1e-3 < last
    size = {provider: rows[provider, "reference_bytes"]["p50"] for provider in providers}
    assert size["released"] == size["live"] > size["cached"] > 0


def test_autocast_and_groups_of_the_library(run):
    options = ["--dtype", "bfloat16", "--group-by-length", "library", "--repeats", "2"]
    status, rows = run(*options, "--providers", "released", "live")
    assert status == 0 and {provider for provider, _ in rows} == {"released", f"live{GROUPED}"}
    assert rows["released", "loss"]["dtype"] == "bfloat16"
    assert [len(p) for p in tables.by_process(rows["released", "loss"])] == [3, 3]


def trainer_with(monkeypatch, **changes):
    """`live` with other settings of `PALUConfig`."""
    original = bench_train_step.PALUConfig
    monkeypatch.setattr(
        bench_train_step, "PALUConfig", lambda **given: original(**{**given, **changes})
    )


WRONG = {
    "other_k": {"top_k": 19},
    "other_prefix": {"prefix_length": 1},
    "half_the_retain_loss": {"retain_weight": 0.5},
    "other_optimizer": {"weight_decay": 0.5},
}


@pytest.mark.parametrize("name", WRONG)
def test_another_computation_is_found(name, run, monkeypatch, capsys):
    trainer_with(monkeypatch, **WRONG[name])
    status, _ = run("--providers", "released", "live")
    assert status == 1
    assert "of live is" in capsys.readouterr().out


def test_a_changed_gradient_is_found_by_its_norm(run, monkeypatch, capsys):
    """Clipping and AdamW hide the size of a gradient: the norm before them does not."""
    original = bench_train_step.Torch.__call__

    def half(self, *batches):
        losses = original(self, *batches)
        for parameter in self.session.model.parameters():
            parameter.grad.mul_(0.5)
        return losses

    monkeypatch.setattr(bench_train_step.Torch, "__call__", half)
    status, _ = run("--providers", "released", "torch")
    assert status == 1 and "the gradient_norm of torch is" in capsys.readouterr().out


CASE = Case(TRAIN_STEP, None, None, 1, 20, "float32")._asdict()


def rows_of(provider, **losses):
    numbers = {name: [[1.0, 1.0], [1.0, 1.0]] for name in NUMBERS} | losses
    return [tables.row(CASE, provider, name, two, "ok", {}) for name, two in numbers.items()]


@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_a_loss_of_a_later_process_is_compared(value):
    other = rows_of("live", loss=[[1.0, 1.0], [1.0, value]])
    rows = rows_of("released") + other
    assert bench_train_step.disagreements(rows) == [
        f"step 1: the loss of live is {value:.6g}, that of released 1"
    ]
    assert rows[-1]["metric"] == "loss_error"
    grouped = [row | {"provider": f"live{GROUPED}"} for row in rows_of("live", loss=[[2.0, 2.0]])]
    assert bench_train_step.disagreements(rows_of("released") + grouped) == []


def test_batches_hold_the_same_rows_grouped_or_not():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 50, (40,), generator=generator).tolist()
    rows = [{"input_ids": [0] * n, "name": i} for i, n in enumerate(lengths)]
    plain, grouped = (bench_train_step.make_batches(rows, 4, 8, g) for g in (False, True))
    assert plain[0] == grouped[0] and plain != grouped
    names = [sorted(row["name"] for batch in some for row in batch) for some in (plain, grouped)]
    assert names[0] == names[1]
    assert [len(batch) for batch in plain] == [len(batch) for batch in grouped] == [4] * 9

    def padded(batches):
        return sum(4 * max(len(row["input_ids"]) for row in batch) for batch in batches[1:])

    assert padded(grouped) < 0.85 * padded(plain)
    with pytest.raises(ValueError, match="take 44 rows; the data has 40"):
        bench_train_step.make_batches(rows, 4, 10, False)


def test_a_trainer_that_takes_other_rows_is_refused(run, monkeypatch):
    """Its numbers would be of other batches."""
    trainer_with(monkeypatch, retain_batch_size=2)
    with pytest.raises(AssertionError, match="takes more than the 3 examples"):
        run("--providers", "live")


def test_a_head_with_which_another_path_is_taken_is_refused(run, monkeypatch):
    original = bench_train_step.Session.__init__

    def with_hook(self, *given):
        original(self, *given)
        self.model.get_output_embeddings().register_forward_hook(lambda *args: None)

    monkeypatch.setattr(bench_train_step.Session, "__init__", with_hook)
    with pytest.raises(AssertionError, match="hook"):
        run("--providers", "live")
