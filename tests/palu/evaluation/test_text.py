"""Metrics of answers as text, of spans and of samples, against plain loops and by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from palu.data.labels import label_example
from palu.data.records import Example
from palu.demo.people import write_jsonl
from palu.evaluation import evaluate_examples, passes
from palu.evaluation.eval_log import Log, LogError
from palu.evaluation.inference import Continuation
from palu.evaluation.names import CORPUS, PER_EXAMPLE
from palu.evaluation.own_metrics import own_aggregate, own_entries
from palu.evaluation.report import text_table
from palu.evaluation.text import sample_numbers
from palu.evaluation.tofu import summarize
from tests.support import planted, small
from tests.support.tofu_small import SMALL, learn, records


def losses(model, ids, start):
    """-log p of each token from `start` on, unpadded, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    return [-logp[t - 1, ids[t]].item() for t in range(start, len(ids))]


def test_fluency_is_the_originals_probability_of_what_was_said(tok):
    """Of ended answers with the end token, of others without."""
    model, original = small.model(tok), small.model(tok, seed=1)
    examples = small.examples()
    learn(model, tok, [("Who came?", "Nobody came.")], 40)
    result = evaluate_examples(model, tok, examples, max_new_tokens=5, original=original)
    for example, got in zip(examples, result["examples"], strict=True):
        row = label_example(tok, example.question, example.answer, (), max_length=64)
        ids = row["input_ids"][: row.answer_start]
        start = len(ids)
        for _ in range(5):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tok.eos_token_id:
                break
        nll = losses(original, ids, start)
        assert got["fluency"] == pytest.approx(math.exp(-sum(nll) / len(nll)), rel=1e-4)
        assert got["ended"] == float(ids[-1] == tok.eos_token_id)
        assert got["answer_tokens"] == len(ids) - start - int(got["ended"])
    assert 0 < result["mean"]["ended"] < 1  # or one of the two is not looked at
    values = [row["fluency"] for row in result["examples"]]
    assert result["mean"]["fluency"] == pytest.approx(sum(values) / len(values))
    own = evaluate_examples(model, tok, examples, max_new_tokens=5, original=model)
    assert own["mean"]["fluency"] > 3 * result["mean"]["fluency"]
    without = evaluate_examples(model, tok, examples, max_new_tokens=5)
    assert without["mean"]["fluency"] is None
    assert without["mean"]["repetition"] == result["mean"]["repetition"]


def test_every_name_is_there(tok):
    result = evaluate_examples(small.model(tok), tok, small.examples(), max_new_tokens=4, samples=2)
    assert {*result["mean"]} == {*PER_EXAMPLE} and {*result["numbers"]} == {*CORPUS}
    assert all({*PER_EXAMPLE} <= {*row} for row in result["examples"])


def test_spans_have_their_own_probabilities(tok):
    """Spans that touch are two; one that is cut off keeps its place."""
    model = small.model(tok)
    question, answer = "Where is Ada?", "Ada is in Paris now."
    spans = ((7, 9), (10, 15), (15, 19))
    example = Example("a", question, answer, spans)
    row = label_example(tok, question, answer, (), max_length=64)
    nll = losses(model, row["input_ids"], row.answer_start)
    places = []
    for span in spans:
        labels = label_example(tok, question, answer, [span], max_length=64)["labels"]
        places.append([t - row.answer_start for t, label in enumerate(labels) if label >= 0])
    assert places[1][-1] + 1 == places[2][0] and len(places[1]) > 1
    result = evaluate_examples(model, tok, [example], max_new_tokens=0)["examples"][0]
    for at, got in zip(places, result["spans"], strict=True):
        own = [nll[t] for t in at]
        assert got["tokens"] == len(at)
        assert got["first"] == pytest.approx(math.exp(-own[0]), rel=1e-4)
        assert got["joint"] == pytest.approx(math.exp(-sum(own)), rel=1e-4)
        assert got["mean"] == pytest.approx(math.exp(-sum(own) / len(own)), rel=1e-4)
    mean = sum(one["joint"] for one in result["spans"]) / 3
    assert result["span_joint_probability"] == pytest.approx(mean)
    short = row.answer_start + places[1][0]
    with pytest.warns(UserWarning, match="cut at max_length"):
        cut = evaluate_examples(model, tok, [example], max_new_tokens=0, max_length=short)
    first, *others = cut["examples"][0]["spans"]
    assert first["joint"] == pytest.approx(result["spans"][0]["joint"], rel=1e-4)
    assert others == [None, None]


def test_a_documents_first_token_counts_where_it_can_be_predicted(tok):
    model, text = small.model(tok), "Ada is in Paris now."
    inside = Example("d", None, text, ((10, 15),))
    both = replace(inside, spans=((0, 3), (10, 15)))
    alone, first = (evaluate_examples(model, tok, [e])["examples"][0] for e in (inside, both))
    plain = tok(text)["input_ids"]
    led = [tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id, *plain]
    nll, led_nll = losses(model, plain, 1), losses(model, led, 1)
    at = [
        t
        for t, label in enumerate(
            label_example(tok, None, text, [(10, 15)], max_length=64)["labels"]
        )
        if label >= 0
    ]
    assert alone["spans"][0]["first"] == pytest.approx(math.exp(-nll[at[0] - 1]), rel=1e-4)
    assert first["spans"][0]["first"] == pytest.approx(math.exp(-led_nll[0]), rel=1e-4)
    assert first["spans"][1]["first"] == pytest.approx(math.exp(-led_nll[at[0]]), rel=1e-4)
    # The token that BOS pushes over the limit has no score, though it has one without BOS.
    with pytest.warns(UserWarning, match="cut at max_length"):
        cut = evaluate_examples(model, tok, [both], max_length=at[0] + 1)["examples"][0]
    assert cut["spans"][0] is not None and cut["spans"][1] is None


def test_samples_by_hand():
    got = sample_numbers(["Lund", "07700 900 181"], ["in lund", "lund, 07700900181", "no", "no"])
    assert got == {"leaked_in_samples": 2, "sample_leak_rate": 3 / 8}
    assert sample_numbers([], ["x"]) == {"leaked_in_samples": 0, "sample_leak_rate": None}
    assert sample_numbers(["Lund"], None) == {"leaked_in_samples": None, "sample_leak_rate": None}


def test_samples_say_what_a_model_knows():
    tok = planted.tokenizer()
    options = {"samples": 3, "max_new_tokens": 40, "seed": 1}
    known = evaluate_examples(planted.knows_all(), tok, planted.FORGET, **options)
    assert known["mean"]["sample_leak_rate"] > 0.8 and known["numbers"]["secrets_sampled"] == 1
    unseen = evaluate_examples(planted.never_saw(), tok, planted.FORGET, **options)
    assert unseen["mean"]["sample_leak_rate"] == unseen["numbers"]["secrets_sampled"] == 0
    assert evaluate_examples(planted.knows_all(), tok, planted.FORGET, **options) == known
    for wrong, said in (
        ({"samples": -1}, "samples must be at least 0, not -1"),
        ({"samples": 1, "temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"samples": 1, "max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_examples(planted.knows_all(), tok, planted.FORGET, **wrong)


def test_broken_answers_are_seen(monkeypatch):
    """One word again and again that never ends, beside what the model says."""
    tok, model = planted.tokenizer(), planted.knows_all()
    options = {"max_new_tokens": 40, "original": model}
    good = evaluate_examples(model, tok, planted.FORGET, **options)
    word = tok("lives")["input_ids"][0]

    def broken(model, tokenizer, prompts, **options):
        tokens = [word] * 40
        return [Continuation(tok.decode(tokens), tokens, None) for _ in prompts]

    monkeypatch.setattr(passes, "continuations", broken)
    bad = evaluate_examples(model, tok, planted.FORGET, **options)
    assert good["mean"]["ended"] == 1 and bad["mean"]["ended"] == 0
    assert good["mean"]["fell_apart"] == 0 and bad["mean"]["fell_apart"] == 1
    assert good["mean"]["longest_run"] < 3 and bad["mean"]["longest_run"] == 40
    assert good["mean"]["repetition"] < 0.05
    assert bad["mean"]["repetition"] == pytest.approx(1 - 1 / 37)
    assert bad["mean"]["fluency"] < 0.1 < good["mean"]["fluency"]
    assert bad["numbers"]["distinct_1"] == pytest.approx(1 / 160)
    assert good["numbers"]["distinct_1"] > 0.1


def test_the_logs_own_metrics_by_hand():
    log = {
        "forget_ended": {
            "value_by_index": {
                "0": {"score": 1.0, "tokens": [1, 2, 1, 2, 1, 2], "end": 9},
                "1": {"score": 0.0, "tokens": [3, 3], "end": None},
            }
        },
        "forget_span_probability": {
            "value_by_index": {
                "0": {
                    "score": 0.4,
                    "spans": [
                        {"tokens": 2, "mean": 0.5, "joint": 0.25, "first": 0.5, "rest": 0.5},
                        {"tokens": 1, "mean": 0.3, "joint": 0.3, "first": 0.3, "rest": None},
                    ],
                },
                "1": {"score": None, "spans": []},
            }
        },
        "forget_secrets_sampled": {
            "value_by_index": {"0": {"asked": 3, "leaked": 1, "score": 0.25}}
        },
        "forget_secrets_said": {
            "value_by_index": {"0": {"asked": 3, "leaked": 2}, "1": {"asked": 0, "leaked": 0}}
        },
    }
    log |= own_entries(Log(log, "by hand"))
    got = summarize(log)
    assert got == pytest.approx(
        {
            "forget_ended": 0.5,
            "forget_span_probability": 0.4,
            "forget_secrets_sampled": 1 / 3,
            "forget_secrets_said": 2 / 3,
            "forget_repetition": 1 / 3,  # 1212, 2121, 1212; the other has no 4-gram
            "forget_longest_run": 1.5,
            "forget_fell_apart": 1.0,  # a third is repeated; the other does not end
            "forget_answer_tokens": 4,
            "forget_distinct_1": 3 / 8,
            "forget_distinct_2": 3 / 8,
            "forget_distinct_3": 2 / 8,
            "forget_span_joint_probability": 0.275,
            "forget_span_first_probability": 0.4,
            "forget_span_rest_probability": 0.5,
            "forget_sample_leak_rate": 0.25,
        }
    )
    assert log["forget_repetition"]["value_by_index"]["1"] == {"score": None}
    del log["forget_ended"]["value_by_index"]["1"]["tokens"]
    with pytest.raises(LogError, match=r"'forget_ended', row '1' has no list in field 'tokens'"):
        own_aggregate(Log(log, "x"), "forget_distinct_1")


def test_the_table_fits_80_columns_and_shows_what_is_not_known_as_such():
    result = {"count": 400, "mean": dict.fromkeys(PER_EXAMPLE, 0.12345)}
    result["mean"] |= {"fluency": None, "answer_tokens": 187.25}
    result["numbers"] = dict.fromkeys(CORPUS, 0.5)
    console = Console(width=80)
    with console.capture() as said:
        console.print(text_table({"forget": result, "retain": result}))
    lines = {line[1:38].strip(): line for line in said.get().splitlines()}
    assert "…" not in said.get()
    assert lines["fluency under the original"].split("│")[2].strip() == "-"
    assert "187.250" in lines["tokens of an answer"] and "0.123" in lines["of the whole span"]
    assert "0.500" in lines["distinct-2"]


@pytest.fixture
def spanned(work):
    """Own records with spans, and another model with the same tokens."""
    rows = records("Where", para=False, pert=False)
    for row in rows:
        start = row["answer"].index(" in ") + 4
        row["spans"] = [{"start": start, "end": len(row["answer"]) - 1}]
    write_jsonl(work / "spanned.jsonl", rows)
    return "--forget spanned.jsonl --max-new-tokens 12 --original model --samples 2 --seed 3 "


def test_the_log_and_json_hold_the_same_and_go_on(palu, work, spanned, monkeypatch):
    status, _, error = palu(spanned + "--output own --json one.json")
    assert status == 0, error
    log = json.loads((work / "own" / "TOFU_EVAL.json").read_text())
    result = json.loads((work / "one.json").read_text())
    mean, numbers = result["forget"]["mean"], result["forget"]["numbers"]
    names = {**mean, **numbers}
    own = [name for name in names if f"forget_{name}" in log]
    assert {*own} >= {*PER_EXAMPLE[8:], *CORPUS}
    for name in own:
        assert log[f"forget_{name}"]["agg_value"] == pytest.approx(names[name]), name
        rows = log[f"forget_{name}"].get("value_by_index")
        if rows is not None and name in mean and name != "answer_tokens":
            scores = [rows[str(i)]["score"] for i in range(4)]
            assert scores == pytest.approx([row[name] for row in result["forget"]["examples"]])
    assert 0 < mean["fluency"] < 1 and mean["span_first_probability"] is not None
    # Again: nothing is generated or scored under the original, and all is the same.
    monkeypatch.setattr(passes, "continuations", None)
    assert palu(spanned + "--output own --json two.json")[0] == 0
    again = json.loads((work / "two.json").read_text())
    assert again == result
    assert json.loads((work / "own" / "TOFU_EVAL.json").read_text()) == log
    status, _, error = palu(spanned.replace("--samples 2", "--samples 3") + "--output own")
    assert status == 2 and "was measured with samples = 2, this run has 3" in error


def test_numbers_of_other_spans_are_not_kept(palu, work, spanned):
    line = "--forget spanned.jsonl --max-new-tokens 2 --output spans"
    assert palu(line)[0] == 0
    text = (work / "spanned.jsonl").read_text()
    (work / "spanned.jsonl").write_text(text.replace('"start": 10', '"start": 11', 1))
    status, _, error = palu(line)
    assert status == 2 and "was measured with spans_forget = " in error


def test_answers_of_a_log_that_are_not_the_models_are_told(palu, work):
    assert palu(SMALL + "--output told")[0] == 0
    path = work / "told" / "TOFU_EVAL.json"
    log = json.loads(path.read_text())
    log["forget_Q_A_ROUGE"]["value_by_index"]["2"]["generation"] = "something else"
    del log["forget_ended"]
    path.write_text(json.dumps(log))
    status, _, error = palu(SMALL + "--output told")
    assert status == 0
    assert "1 of the 4 answers of forget_Q_A_ROUGE in the log are not what the model" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--samples -1", "--samples"),
        ("--samples 2 --temperature 0", "--temperature must be above 0, not 0.0"),
        ("--original nowhere", "nowhere"),
        ("--original model --max-new-tokens 0", "--original judges the answers"),
    ],
)
def test_wrong_options_are_named(palu, work, options, said):
    status, _, error = palu(f"{SMALL}{options}")
    assert status == 2 and said in error
