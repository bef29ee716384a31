"""`palu evaluate` on TOFU's files and the user's own: a tiny model, every number against the
definition on plain logits, stopped and shared runs."""

import json
import math
import zlib

import pytest
import torch

from palu.data.labels import label_example
from palu.demo.people import write_jsonl
from palu.evaluation import metrics as m
from palu.evaluation.evaluator import Evaluator
from palu.evaluation.tofu import UTILITY, summarize
from palu.models.loading import load_model, load_tokenizer
from tests.support import ranks
from tests.support.tofu_small import SMALL, records

ALL = SMALL + "--holdout holdout.json "


def load(folder, name="TOFU_EVAL.json"):
    return json.loads((folder / name).read_text())


def aggregates(log, but=None):
    """metric -> aggregate, where there is one."""
    values = {k: v["agg_value"] for k, v in log.items() if k != but}
    return {k: v for k, v in values.items() if v is not None}


@pytest.fixture
def log(palu, work):
    """The whole evaluation, made once."""
    if not (work / "whole").exists():
        assert palu(ALL + "--output whole --reference-model model")[0] == 0
    return load(work / "whole")


class Plain:
    """Numbers of unpadded answers in float64."""

    def __init__(self, folder):
        self.model, self.tok = load_model(folder, "float32", "cpu"), load_tokenizer(folder)

    def __call__(self, question, answer):
        """Log-probabilities [T, V] of an answer and its tokens, end token included."""
        row = label_example(self.tok, question, answer, (), max_length=64)
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logits = self.model(input_ids=ids[None]).logits[0]
        return logits[row.answer_start - 1 : -1].double().log_softmax(-1), ids[row.answer_start :]

    def loss(self, record, text):
        log_p, ids = self(record["question"], text)
        return -log_p.gather(-1, ids[:, None]).mean().item()


def near(value, rel=1e-5):
    return pytest.approx(value, rel=rel)


def test_probabilities_and_truth_ratios_are_their_definitions(work, log):
    plain = Plain(work / "model")
    for name, start in {"forget": "Where", "retain": "Who", "ra": "What", "wf": "Why"}.items():
        paraphrased = name in ("forget", "retain")
        assert (f"{name}_Q_A_PARA_Prob" in log) == paraphrased
        for i, record in enumerate(records(start)[: 3 if name == "wf" else 4]):
            right = plain.loss(record, record["answer"])
            rows = {"": right, "PERT_": [plain.loss(record, t) for t in record["perturbed_answer"]]}
            if paraphrased:
                right = rows["PARA_"] = plain.loss(record, record["paraphrased_answer"])
            for kind, loss in rows.items():
                probs = [math.exp(-x) for x in loss] if kind == "PERT_" else math.exp(-loss)
                row = log[f"{name}_Q_A_{kind}Prob"]["value_by_index"][str(i)]
                assert row == {"avg_loss": near(loss), "prob": near(probs)}
            metric = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
            score = log[metric]["value_by_index"][str(i)]["score"]
            assert score == near(m.truth_ratio(rows["PERT_"], right), 1e-4)


def test_memorization_and_attacks_are_their_definitions(work, log):
    plain, known = Plain(work / "model"), []
    for name, start, count in (("forget", "Where", 4), ("holdout", "When", 3)):
        for i, record in enumerate(records(start)[:count]):
            log_p, ids = plain(record["question"], record["answer"])
            token = log_p.gather(-1, ids[:, None])[:, 0]
            mean = (log_p.exp() * log_p).sum(-1)
            deviation = ((log_p.exp() * log_p**2).sum(-1) - mean**2).sqrt()
            correct = (log_p.argmax(-1) == ids)[:-1].tolist()
            lowest = max(1, int(0.4 * len(correct)))
            text = plain.tok.decode(ids, skip_special_tokens=True)
            loss = -token.mean().item()
            wanted = {
                "mia_loss": loss,
                "mia_zlib": loss / len(zlib.compress(text.encode())),
                "mia_min_k": -token[:-1].sort().values[:lowest].mean().item(),
                "mia_min_k_plus_plus": -((token - mean) / deviation)[:-1]
                .sort()
                .values[:lowest]
                .mean()
                .item(),
                "mia_reference": 0.0,
            }
            for metric, value in wanted.items():
                score = log[metric][name]["value_by_index"][str(i)]["score"]
                assert score == near(value, 1e-4), metric
            if name == "forget":
                known += correct
                for metric in ("exact_memorization", "extraction_strength"):
                    score = log[metric]["value_by_index"][str(i)]["score"]
                    assert score == near(getattr(m, metric)(correct))
    assert 0 < sum(known) < len(known)  # or the two say nothing
    assert log["mia_loss"]["agg_value"] == log["mia_loss"]["auc"] > 0.5


def test_the_log_is_open_unlearnings(work, log):
    assert [*log] == sorted(log) and set(UTILITY) < set(log)
    prob = log["forget_Q_A_Prob"]
    assert [*prob] == ["agg_value", "value_by_index"] and [*prob["value_by_index"]] == [*"0123"]
    assert set(log["mia_min_k"]) == {"agg_value", "auc", "forget", "holdout"}
    row = log["wf_Q_A_ROUGE"]["value_by_index"]["2"]
    rouges = {"rouge1_recall", "rougeL_f1", "rougeL_recall"}
    assert {*row} == {*rouges, "input", "ground_truth", "generation"}
    assert row["ground_truth"] == records("Why")[2]["answer"]
    assert row["input"] == "Question: Why is Eva?\nAnswer:"
    assert log["forget_quality"] == {"agg_value": None}
    assert load(work / "whole", "TOFU_SUMMARY.json") == aggregates(log)
    again = summarize(log)
    assert again.pop("forget_quality") is None and again == near(aggregates(log), 1e-12)


def test_batches_do_not_matter(palu, work, log):
    status, said, _ = palu(ALL + "--batch-size 16 --output batches")
    assert status == 0 and "Not measured: forget quality (no --retain-log)" in said
    assert aggregates(load(work / "batches")) == near(aggregates(log, but="mia_reference"))


def test_a_stopped_run_goes_on(palu, work, log, monkeypatch):
    """Stopped after some metrics; what is there is not measured again, and the end is the same."""
    answers, scores, asked = Evaluator.answers, Evaluator.scores, []

    def stops(self, name):
        if name == "ra":
            raise RuntimeError("stopped")
        return answers(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answers", stops)
        with pytest.raises(RuntimeError, match="stopped"):
            palu(ALL + "--output stopped")
    there = load(work / "stopped")
    assert "retain_Q_A_ROUGE" in there and "ra_Q_A_ROUGE" not in there
    monkeypatch.setattr(Evaluator, "scores", lambda self, *a: asked.append(a) or scores(self, *a))
    assert palu(ALL + "--output stopped")[0] == 0 and not asked
    assert load(work / "stopped") == {k: v for k, v in log.items() if k != "mia_reference"}


def test_a_retrained_log_gives_forget_quality_and_stays(palu, work, log):
    other = json.loads(json.dumps(log))
    for row in other["forget_truth_ratio"]["value_by_index"].values():
        row["score"] += 1e6
    (work / "retrained.json").write_text(json.dumps(other))
    line = ALL + "--output quality "
    status, said, _ = palu(line + "--retain-log retrained.json")
    assert status == 0 and "Forget quality 0.0286 is of 4 questions; of 4 others" in said
    got = load(work / "quality")
    assert got["forget_ks_statistic"]["agg_value"] == 1
    assert got["forget_quality"]["agg_value"] == near(2 / 70)  # 4 against 4, all apart
    assert got["privleak"]["agg_value"] == 0
    assert palu(line)[0] == 0  # again, without it
    assert load(work / "quality") == got
    for metric in ("forget_truth_ratio", "mia_min_k"):
        lacking = {k: v for k, v in other.items() if k != metric}
        (work / "lacking.json").write_text(json.dumps(lacking))
        status, _, error = palu(line + "--retain-log lacking.json --overwrite")
        assert status == 2 and f"lacking.json: has no metric '{metric}', which" in error
    assert load(work / "quality") == got


def test_other_settings_are_not_mixed(palu, work, log):
    line = "--tofu tofu --split forget01 --output whole "
    status, _, error = palu(line + "--max-new-tokens 5")
    assert status == 2 and "was measured with max_new_tokens = 6, this run has 5" in error
    status, _, error = palu(line + "--max-new-tokens 6 --dtype bfloat16")
    assert status == 2 and "was measured with model = " in error
    # Other files in the place of the reference model.
    (work / "model" / "README.md").write_text("new")
    status, _, error = palu(ALL + "--output whole --reference-model model")
    (work / "model" / "README.md").unlink()
    assert status == 2 and "was measured with reference_model_files = " in error
    assert load(work / "whole") == log


def test_a_log_of_open_unlearning_is_taken_up(palu, work, log):
    (work / "mixed").mkdir()
    kept = json.loads(json.dumps(log["forget_Q_A_Prob"]))
    kept["value_by_index"]["0"]["prob"] = 0.123
    there = {"forget_Q_A_Prob": kept, "their_own": {"agg_value": 3.0}, "ra_Q_A_Prob": {}}

    def run():
        (work / "mixed" / "TOFU_EVAL.json").write_text(json.dumps(there))
        return palu(SMALL + "--output mixed")

    status, _, said = run()
    assert status == 0 and "was not written by palu" in said
    got = load(work / "mixed")
    assert got["forget_Q_A_Prob"] == kept and got["their_own"] == {"agg_value": 3.0}
    assert got["ra_Q_A_Prob"] == log["ra_Q_A_Prob"]
    there["forget_Q_A_Prob"]["value_by_index"].pop("3")
    status, _, error = run()
    assert status == 2 and "'forget_Q_A_Prob' has 3 rows and is not of the 4 rows of tofu/" in error
    there["their_own"]["agg_value"] = float("nan")
    status, _, error = run()
    assert status == 2 and "metric 'their_own' holds a number that is not finite" in error


def test_two_processes_give_the_same(work, log):
    words = ["-m", "palu.cli", "evaluate", "--model", "model"]
    words += (ALL + "--output shared --device cpu").split()
    said = ranks.launch(words, 2, work, ACCELERATE_USE_CPU="true")
    assert "Written to shared" in said[0] and "Written to shared" not in said[1]
    got = load(work / "shared")
    assert aggregates(got) == near(aggregates(log, but="mia_reference"))
    for metric, entry in got.items():
        assert repr(entry).count("score") == repr(log[metric]).count("score")


def test_own_files_need_no_tofu(palu, work, log):
    rows = records("Where", para=False, pert=False)
    rows[0]["spans"] = [{"start": 10, "end": 15}]
    write_jsonl(work / "own.jsonl", [*rows, {"text": "Ada is in Paris now, and Bob came."}])
    write_jsonl(work / "keep.jsonl", records("Who", para=False, pert=False))
    line = "--forget own.jsonl --retain keep.jsonl --max-new-tokens 5 --json own.json "
    status, said, _ = palu(line + "--holdout holdout.json")
    assert status == 0 and "mia_min_k" in said and "no paraphrased_answer and perturbed" in said
    got = load(work, "own.json")
    assert {"privleak", "extraction_strength", "retain_Q_A_ROUGE"} <= set(got["summary"])
    assert not {"forget_truth_ratio", "model_utility"} & set(got["summary"])
    forget = got["forget"]["mean"]
    assert forget["answer_probability"] == near(got["summary"]["forget_Q_A_Prob"])
    assert forget["rougeL_recall"] == near(got["summary"]["forget_Q_A_ROUGE"])
    assert forget["extraction_strength"] == got["summary"]["extraction_strength"]
    assert 0 < forget["sensitive_probability"] < 1
    assert got["forget"]["examples"][4]["generated"] is None
    # with wrong answers: the truth ratio too, the same as TOFU's
    write_jsonl(work / "own.jsonl", records("Where"))
    assert palu("--forget own.jsonl --max-new-tokens 0 --json own.json")[0] == 0
    summary = load(work, "own.json")["summary"]
    assert summary["forget_truth_ratio"] == near(log["forget_truth_ratio"]["agg_value"])
    assert "forget_Q_A_ROUGE" not in summary


def test_fluency_is_a_classifiers_class_0(palu, work, log):
    from transformers import BertConfig, BertForSequenceClassification

    tok = load_tokenizer(work / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(vocab_size=len(tok), intermediate_size=8, num_labels=3, **sizes)
    classifier = BertForSequenceClassification(config).eval()
    classifier.classifier.weight.data.normal_()
    classifier.save_pretrained(work / "judge")
    tok.save_pretrained(work / "judge")
    line = SMALL + "--output fluent --fluency-classifier "
    status, _, error = palu(line + "model")
    assert status == 2 and "is no trained classifier: its weights lack" in error
    assert palu(line + "judge")[0] == 0
    for i, row in load(work / "fluent")["forget_Q_A_gibberish"]["value_by_index"].items():
        text = log["forget_Q_A_ROUGE"]["value_by_index"][i]["generation"]
        inputs = tok(text, return_tensors="pt", truncation=True, max_length=32)
        wanted = classifier(**inputs).logits.softmax(-1)[0, 0].item()
        assert row == {"score": near(wanted), "generation": text}
