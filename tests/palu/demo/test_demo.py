"""A reduced demo: what it forgets, what it keeps, what it leaves behind. Not how long it takes."""

import json
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from palu.data.files import load_examples
from palu.demo.people import invent_people, records
from palu.demo.run import DemoSettings, run_demo
from palu.evaluation import METRICS, evaluate_examples


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads hardly help models this small, and they hurt where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SETTINGS = DemoSettings(people=4, forget_people=1, train_steps=80, unlearn_epochs=40)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    console = Console(width=100)
    with console.capture() as said:
        quiet = Console(quiet=True)
        metrics = run_demo(folder, SETTINGS, console=console, bars=quiet, shown_as=folder)
    return folder, metrics, said.get()


def test_it_forgets_and_keeps(demo):
    models = demo[1]["models"]

    def sensitive(model, data):
        return models[model][data]["sensitive_probability"]

    assert sensitive("original", "forget") > 0.9
    assert sensitive("unlearned", "forget") <= 0.1
    assert sensitive("unlearned", "retain") >= 0.95 * sensitive("original", "retain")
    assert sensitive("retrained", "retain") > 0.9
    assert sensitive("retrained", "forget") < 0.2
    assert models["unlearned"]["retain"]["rougeL_recall"] > 0.95
    assert models["unlearned"]["forget"]["exact_memorization"] < 0.95
    assert all(demo[1]["checks"].values())


def test_the_table_and_the_samples(demo):
    text = demo[2]
    for words in ("original", "unlearned", "retrained", "ROUGE-L", "before:", "after:"):
        assert words in text
    assert text.count("before:") == 2 and "palu unlearn --model" in text


def test_what_it_leaves_behind(demo):
    folder = demo[0]
    names = {p.name for p in folder.iterdir()}
    models = {"original", "unlearned", "retrained"}
    written = {"metrics.json", "forgetting.png", "report.html", "report.json"}
    assert names == models | written | {"forget.jsonl", "retain.jsonl"}
    assert json.loads((folder / "metrics.json").read_text()) == demo[1]
    assert (folder / "forgetting.png").read_bytes()[:4] == b"\x89PNG"
    assert len(load_examples(folder / "forget.jsonl", require_spans=True)) == 8
    assert len(load_examples(folder / "retain.jsonl", require_spans=True)) == 24
    for name in models:
        record = json.loads((folder / name / "palu.json").read_text())
        assert ("loss_curve" in record) == (name == "unlearned")


def test_it_ends_with_its_report(demo):
    folder, metrics, _ = demo
    report = json.loads((folder / "report.json").read_text())
    rows = {(row["set"], row["name"]): row["values"] for row in report["measures"]}
    for data in ("forget", "retain"):
        measured = {name: metrics["models"][name][data] for name in metrics["models"]}
        for metric in ("sensitive_probability", "rougeL_recall"):
            assert rows[data, metric] == {name: one[metric] for name, one in measured.items()}
    said = rows["forget", "leaked"]["unlearned"]
    level = "bad" if said["leaked"] / said["of"] > 0.05 else "caution"  # nobody attacked it
    assert (report["verdict"]["status"], report["verdict"]["level"]) == ("forgotten", level)
    assert report["integrity"] and all(one["holds"] for one in report["integrity"])
    assert report["request"]["records"] == 8
    assert rows["forget", "leaked"]["original"]["leaked"] > 8
    secret = load_examples(folder / "forget.jsonl", require_spans=True)[1]
    start, end = secret.spans[0]
    assert secret.answer[start:end] not in (folder / "report.html").read_text()


def test_a_saved_model_gives_the_numbers_of_the_table(demo):
    folder, metrics, _ = demo
    model = AutoModelForCausalLM.from_pretrained(folder / "unlearned")
    tokenizer = AutoTokenizer.from_pretrained(folder / "unlearned")
    examples = load_examples(folder / "forget.jsonl", require_spans=True)
    result = evaluate_examples(model, tokenizer, examples, batch_size=7, max_new_tokens=40)
    for name in METRICS:
        assert result["mean"][name] == pytest.approx(
            metrics["models"]["unlearned"]["forget"][name], abs=1e-3
        )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path):
    settings = DemoSettings(people=3, forget_people=1, train_steps=2, unlearn_epochs=1)
    quiet, runs = Console(quiet=True), []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        metrics = run_demo(folder, settings, console=quiet, bars=quiet, shown_as=folder)
        runs.append((metrics["models"], (folder / "unlearned/model.safetensors").read_bytes()))
    assert runs[0] == runs[1]


def test_people_are_different_and_their_spans_right():
    people = invent_people(48, seed=0)
    assert people == invent_people(48, seed=0) != invent_people(48, seed=1)
    for field in ("name", "town", "book", "prize"):
        assert len({getattr(p, field) for p in people}) == 48
    rows = records(people)
    assert len(rows) == 48 * 8 and len({r["id"] for r in rows}) == len(rows)
    for person, start in zip(people, range(0, len(rows), 8), strict=True):
        mine = rows[start : start + 8]
        marked = [[r["answer"][s["start"] : s["end"]] for s in r["spans"]] for r in mine]
        assert marked == [
            [person.town],
            [person.birthday],
            [person.mother, person.father],
            [person.craft],
            [person.book],
            [person.instrument, person.teacher],
            [person.animal, person.pet],
            [person.prize, person.year],
        ]
        assert all(person.name in r["question"] and person.name in r["answer"] for r in mine)
        for record, secrets in zip(mine, marked, strict=True):
            right, wrong = record["paraphrased_answer"], record["perturbed_answer"]
            assert right != record["answer"] and all(secret in right for secret in secrets)
            assert len(wrong) == 5
            for text in wrong:  # the same words around other facts
                assert person.name in text
                slots = re.fullmatch(_with_slots(right, secrets), text)
                assert slots and not any(map(str.__eq__, slots.groups(), secrets))


def _with_slots(text, secrets):
    pattern = re.escape(text)
    for secret in secrets:
        pattern = pattern.replace(re.escape(secret), "(.+)", 1)
    return pattern


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"people": 49}, "people must be between 2 and 48, not 49"),
        ({"forget_people": 40}, "forget_people must be between 1 and 39"),
        ({"train_steps": 0}, "train_steps must be at least 1, not 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**options)
