"""`palu evaluate` on TOFU's files and the user's own: a tiny model, every number against the
definition on plain logits, stopped and shared runs."""

import json
import math
import os
import socket
import subprocess
import sys
import zlib

import pytest
import torch

from palu.data.labels import label_example
from palu.demo.people import write_jsonl
from palu.evaluation import metrics as d
from palu.evaluation.evaluator import Evaluator
from palu.evaluation.tofu import UTILITY, summarize
from tests.support import tofu_small
from tests.support.tofu_small import SMALL, records


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with all of it."""
    return tofu_small.build(tmp_path_factory.mktemp("tofu"))


@pytest.fixture
def palu(work, monkeypatch, capsys):
    """Runs `palu evaluate` there: (exit status, stdout, stderr)."""
    return tofu_small.evaluate_in(work, monkeypatch, capsys)


ALL = [*SMALL, "--holdout", "holdout.json"]


def load(folder, name="TOFU_EVAL.json"):
    return json.loads((folder / name).read_text())


def aggregates(log, but=None):
    """metric -> aggregate, where there is one."""
    values = {k: v["agg_value"] for k, v in log.items() if k != but}
    return {k: v for k, v in values.items() if v is not None}


@pytest.fixture(scope="module")
def log(work):
    """The whole evaluation, in a process like any other's."""
    words = [*ALL, "--output", "whole", "--reference-model", "model", "--device", "cpu"]
    command = [sys.executable, "-m", "palu.cli", "evaluate", "--model", "model"]
    subprocess.run([*command, *map(str, words)], cwd=work, check=True, capture_output=True)
    return load(work / "whole")


def plain(model, tok, question, answer):
    """float64 log-probabilities [T, V] of an unpadded answer and its tokens, end token included."""
    row = label_example(tok, question, answer, (), max_length=64)
    ids = torch.tensor(row["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    start = row.answer_start
    return logits[start - 1 : -1].double().log_softmax(-1), ids[start:]


def test_every_number_is_its_definition(work, log):
    from palu.models.loading import load_model, load_tokenizer

    model, tok = load_model(work / "model", "float32", "cpu"), load_tokenizer(work / "model")
    names = {"forget": "Where", "retain": "Who", "ra": "What", "wf": "Why"}
    losses = {}
    for name, start in names.items():
        rows = records(start)[: 3 if name == "wf" else 4]
        for i, record in enumerate(rows):
            for field, kind in (("answer", ""), ("paraphrased_answer", "PARA_")):
                if kind and name in ("ra", "wf"):
                    assert f"{name}_Q_A_PARA_Prob" not in log
                    continue
                log_p, ids = plain(model, tok, record["question"], record[field])
                loss = -log_p.gather(-1, ids[:, None]).mean().item()
                losses[name, kind, i] = loss
                got = log[f"{name}_Q_A_{kind}Prob"]["value_by_index"][str(i)]
                assert got["avg_loss"] == pytest.approx(loss, rel=1e-5)
                assert got["prob"] == pytest.approx(math.exp(-loss), rel=1e-5)
            wrong = []
            for text in record["perturbed_answer"]:
                log_p, ids = plain(model, tok, record["question"], text)
                wrong.append(-log_p.gather(-1, ids[:, None]).mean().item())
            got = log[f"{name}_Q_A_PERT_Prob"]["value_by_index"][str(i)]
            assert got["avg_loss"] == pytest.approx(wrong, rel=1e-5)
            assert got["prob"] == pytest.approx([math.exp(-w) for w in wrong], rel=1e-5)
            metric = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
            right = losses[name, "PARA_" if name in ("forget", "retain") else "", i]
            ratio = d.truth_ratio(wrong, right)
            got = log[metric]["value_by_index"][str(i)]["score"]
            assert got == pytest.approx(ratio, rel=1e-4)
    exact = []
    for name, start, count in (("forget", "Where", 4), ("holdout", "When", 3)):
        for i, record in enumerate(records(start)[:count]):
            log_p, ids = plain(model, tok, record["question"], record["answer"])
            token = log_p.gather(-1, ids[:, None])[:, 0]
            mean = (log_p.exp() * log_p).sum(-1)
            deviation = ((log_p.exp() * log_p**2).sum(-1) - mean**2).sqrt()
            hits = (log_p.argmax(-1) == ids)[:-1].tolist()
            lowest = max(1, int(0.4 * len(hits)))
            text = tok.decode(ids, skip_special_tokens=True)
            wanted = {
                "mia_loss": -token.mean(),
                "mia_zlib": -token.mean() / len(zlib.compress(text.encode())),
                "mia_min_k": -token[:-1].sort().values[:lowest].mean(),
                "mia_min_k_plus_plus": -(
                    ((token - mean) / deviation)[:-1].sort().values[:lowest].mean()
                ),
                "mia_reference": torch.tensor(0.0),
            }
            for metric, value in wanted.items():
                got = log[metric][name]["value_by_index"][str(i)]["score"]
                assert got == pytest.approx(value.item(), rel=1e-4), metric
            if name == "forget":
                exact += hits
                for metric in ("exact_memorization", "extraction_strength"):
                    got = log[metric]["value_by_index"][str(i)]["score"]
                    assert got == pytest.approx(getattr(d, metric)(hits))
    assert 0 < sum(exact) < len(exact)  # or the two say nothing
    assert log["mia_loss"]["agg_value"] == log["mia_loss"]["auc"] > 0.5


def test_the_log_is_open_unlearnings(work, log):
    assert [*log] == sorted(log) and set(UTILITY) < set(log)
    prob = log["forget_Q_A_Prob"]
    assert [*prob] == ["agg_value", "value_by_index"] and [*prob["value_by_index"]] == [*"0123"]
    assert set(log["mia_min_k"]) == {"agg_value", "auc", "forget", "holdout"}
    row = log["wf_Q_A_ROUGE"]["value_by_index"]["2"]
    assert {*row} == {
        *["rouge1_recall", "rougeL_f1", "rougeL_recall"],
        *["input", "ground_truth", "generation"],
    }
    assert row["ground_truth"] == records("Why")[2]["answer"]
    assert row["input"] == "Question: Why is Eva?\nAnswer:"
    assert log["forget_quality"] == {"agg_value": None}
    assert load(work / "whole", "TOFU_SUMMARY.json") == aggregates(log)
    again = summarize(log)
    assert again.pop("forget_quality") is None
    assert again == pytest.approx(aggregates(log), rel=1e-12)


def test_batches_do_not_matter(palu, work, log):
    words = [*SMALL[:-1], 16, "--output", "batches", "--holdout", "holdout.json"]
    status, said, _ = palu(*words)
    assert status == 0 and "Not measured: forget quality (no --retain-log)" in said
    assert aggregates(load(work / "batches")) == pytest.approx(
        aggregates(log, but="mia_reference"), rel=1e-5
    )


def test_a_stopped_run_goes_on(palu, work, log, monkeypatch):
    """Stopped after some metrics; what is there is not measured again, and the end is the same."""
    words = [*ALL, "--output", "stopped"]
    asked = []
    real = Evaluator.answers

    def stops(self, name):
        if name == "ra":
            raise RuntimeError("stopped")
        return real(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answers", stops)
        with pytest.raises(RuntimeError, match="stopped"):
            palu(*words)
    there = load(work / "stopped")
    assert "retain_Q_A_ROUGE" in there and "ra_Q_A_ROUGE" not in there
    scores = Evaluator.scores
    monkeypatch.setattr(Evaluator, "scores", lambda self, *a: asked.append(a) or scores(self, *a))
    assert palu(*words)[0] == 0 and not asked
    whole = {k: v for k, v in log.items() if k != "mia_reference"}
    assert load(work / "stopped") == whole


def test_a_retrained_log_gives_forget_quality_and_stays(palu, work, log):
    words = [*ALL, "--output", "quality"]
    other = json.loads(json.dumps(log))
    for row in other["forget_truth_ratio"]["value_by_index"].values():
        row["score"] += 1e6
    (work / "retrained.json").write_text(json.dumps(other))
    assert palu(*words, "--retain-log", "retrained.json")[0] == 0
    got = load(work / "quality")
    assert got["forget_quality"]["agg_value"] == pytest.approx(2 / 70)  # 4 against 4, all apart
    assert got["privleak"]["agg_value"] == 0
    assert palu(*words)[0] == 0  # again, without it
    assert load(work / "quality") == got
    for metric in ("forget_truth_ratio", "mia_min_k"):
        lacking = {k: v for k, v in other.items() if k != metric}
        (work / "lacking.json").write_text(json.dumps(lacking))
        status, _, error = palu(*words, "--retain-log", "lacking.json", "--overwrite")
        assert status == 2 and f"lacking.json: has no metric '{metric}', which" in error
    assert load(work / "quality") == got


def test_other_settings_are_not_mixed(palu, work, log):
    words = ["--tofu", "tofu", "--split", "forget01", "--output", "whole"]
    status, _, error = palu(*words, "--max-new-tokens", 5)
    assert status == 2 and "was measured with max_new_tokens = 6, this run has 5" in error
    status, _, error = palu(*words, "--max-new-tokens", 6, "--dtype", "bfloat16")
    assert status == 2 and "was measured with model = " in error
    # Other weights in the place of the reference model.
    with (work / "model" / "README.md").open("x") as file:
        file.write("new")
    status, _, error = palu(*ALL, "--output", "whole", "--reference-model", "model")
    (work / "model" / "README.md").unlink()
    assert status == 2 and "was measured with reference_model_files = " in error
    assert load(work / "whole") == log


def test_a_log_of_open_unlearning_is_taken_up(palu, work, log):
    (work / "mixed").mkdir()
    kept = json.loads(json.dumps(log["forget_Q_A_Prob"]))
    kept["value_by_index"]["0"]["prob"] = 0.123
    there = {"forget_Q_A_Prob": kept, "their_own": {"agg_value": 3.0}, "ra_Q_A_Prob": {}}
    (work / "mixed" / "TOFU_EVAL.json").write_text(json.dumps(there))
    status, _, said = palu(*SMALL, "--output", "mixed")
    assert status == 0 and "was not written by palu" in said
    got = load(work / "mixed")
    assert got["forget_Q_A_Prob"] == kept and got["their_own"] == {"agg_value": 3.0}
    assert got["ra_Q_A_Prob"] == log["ra_Q_A_Prob"]
    there["forget_Q_A_Prob"]["value_by_index"].pop("3")
    (work / "mixed" / "TOFU_EVAL.json").write_text(json.dumps(there))
    status, _, error = palu(*SMALL, "--output", "mixed")
    assert status == 2 and "'forget_Q_A_Prob' has 3 rows and is not of the 4 rows of tofu/" in error
    there["their_own"]["agg_value"] = float("nan")
    (work / "mixed" / "TOFU_EVAL.json").write_text(json.dumps(there))
    status, _, error = palu(*SMALL, "--output", "mixed")
    assert status == 2 and "metric 'their_own' holds a number that is not finite" in error


def test_two_processes_give_the_same(work, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*ALL, "--output", "shared", "--device", "cpu"]
    command = [sys.executable, "-m", "palu.cli", "evaluate", "--model", "model", *map(str, words)]
    running = []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        running.append(
            subprocess.Popen(
                command, cwd=work, env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    assert "Written to shared" in said[0] and "Written to shared" not in said[1]
    got = load(work / "shared")
    assert aggregates(got) == pytest.approx(aggregates(log, but="mia_reference"), rel=1e-5)
    for metric, entry in got.items():
        assert repr(entry).count("score") == repr(log[metric]).count("score")


def test_own_files_need_no_tofu(palu, work, log):
    spans = [{"start": 10, "end": 15}]
    rows = [{**r, "spans": spans} for r in records("Where", para=False, pert=False)[:1]]
    rows += records("Where", para=False, pert=False)[1:]
    rows.append({"text": "Ada is in Paris now, and Bob came."})
    write_jsonl(work / "own.jsonl", rows)
    write_jsonl(work / "keep.jsonl", records("Who", para=False, pert=False))
    words = ["--forget", "own.jsonl", "--retain", "keep.jsonl", "--max-new-tokens", 5]
    status, said, _ = palu(*words, "--json", "own.json", "--holdout", "holdout.json")
    assert status == 0 and "mia_min_k" in said and "no paraphrased_answer and perturbed" in said
    got = load(work, "own.json")
    assert {"privleak", "extraction_strength", "retain_Q_A_ROUGE"} <= set(got["summary"])
    assert not {"forget_truth_ratio", "model_utility"} & set(got["summary"])
    forget = got["forget"]["mean"]
    assert forget["answer_probability"] == pytest.approx(got["summary"]["forget_Q_A_Prob"])
    assert forget["rougeL_recall"] == pytest.approx(got["summary"]["forget_Q_A_ROUGE"])
    assert forget["extraction_strength"] == got["summary"]["extraction_strength"]
    assert 0 < forget["sensitive_probability"] < 1
    assert got["forget"]["examples"][4]["generated"] is None
    # with wrong answers: the truth ratio too, the same as TOFU's
    write_jsonl(work / "own.jsonl", records("Where"))
    status, said, _ = palu("--forget", "own.jsonl", "--max-new-tokens", 0, "--json", "own.json")
    summary = load(work, "own.json")["summary"]
    wanted = log["forget_truth_ratio"]["agg_value"]
    assert status == 0 and summary["forget_truth_ratio"] == pytest.approx(wanted, rel=1e-5)
    assert "forget_Q_A_ROUGE" not in summary


def test_fluency_is_a_classifiers_class_0(palu, work, log):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tok = AutoTokenizer.from_pretrained(work / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=len(tok), intermediate_size=8, num_labels=3, **sizes)
    classifier = BertForSequenceClassification(config).eval()
    classifier.classifier.weight.data.normal_()
    classifier.save_pretrained(work / "judge")
    tok.save_pretrained(work / "judge")
    words = [*SMALL, "--output", "fluent", "--fluency-classifier"]
    status, _, error = palu(*words, "model")
    assert status == 2 and "is no trained classifier: its weights lack" in error
    assert palu(*words, "judge")[0] == 0
    got = load(work / "fluent")["forget_Q_A_gibberish"]
    for i, row in got["value_by_index"].items():
        text = log["forget_Q_A_ROUGE"]["value_by_index"][i]["generation"]
        inputs = tok(text, return_tensors="pt", truncation=True, max_length=32)
        wanted = classifier(**inputs).logits.softmax(-1)[0, 0].item()
        assert row == {"score": pytest.approx(wanted, rel=1e-5), "generation": text}
