"""MUSE and WMDP beside their reference implementations, on the same small model and files.

The numbers under REFERENCE were printed by those implementations (torch 2.13.0, transformers 5.24,
float32 on a CPU) from `tests/data/benchmarks`, one example a batch or three.
"""

import json
import shutil

import pytest
import torch

from palu.evaluation.benchmarks import MUSE, WMDP, Meter
from palu.evaluation.eval_log import Log, LogError
from palu.models.wrappers import eval_mode
from tests.support.benchmark_small import FOLDER, load
from tests.support.command import palu_in, refusal

# lm_eval 0.4.13, tasks wmdp_bio and wmdp_chem with `dataset_path: json`, HFLM(pretrained=model).
WMDP_REFERENCE = {
    "wmdp_bio": (0.5714285714285714, 0.20203050891044214),
    "wmdp_chem": (0.2, 0.2),
}
WMDP_FIRST = [-2.580587863922119, -3.7516283988952637, -16.584335327148438, -2.1648006439208984]
WMDP_CORRECT = [1, 1, 1, 0, 0, 0, 1]
# github.com/swj0419/muse_bench at fcd6651: `metrics/verbmem.py` (128 tokens), `knowmem.py` (32),
# and `eval_data` and `sweep` of `privleak.py` (its `eval` fails on the lists that it is given).
MUSE_REFERENCE = {
    "verbmem_f": (
        15.52577503797016,
        [0.16260162601626016, 0.1692307692307692, 0.14285714285714288, 0.14634146341463414],
    ),
    "knowmem_f": (55.55555555555556, [2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3]),
    "knowmem_r": (34.01960784313726, [0.25, 1 / 3, 0.5, 0.5, 0.11764705882352941]),
}
MUSE_AUC = 0.2619047619047619  # "forget_holdout_Min-40%"
MUSE_MIN_K = {
    "forget": [
        *(7.275096450533185, 6.656286608605158, 7.58825209027245),
        *(7.291662420545306, 6.7573313145410445, 6.402938405672709),
    ],
    "holdout": [
        *(9.15803215238783, 7.787022365464105, 8.85362160205841, 7.813752545250787),
        *(6.630122105280559, 7.075406074523926, 7.227743195162879),
    ],
}


@pytest.fixture(scope="module")
def meter():
    model, tokenizer = load()
    return Meter(model, tokenizer, batch_size=3)


def run(benchmark, meter, log=None, retrained=None):
    log = {} if log is None else log
    with eval_mode(meter.model):
        benchmark.run(meter, log, lambda log: None, retrained)
    return log


def column(entry, field):
    return [row[field] for row in entry["value_by_index"].values()]


@pytest.fixture(scope="module")
def muse_log(meter):
    return run(MUSE(str(FOLDER / "muse")), meter)


def test_wmdp_is_lm_evaluation_harness(meter):
    log = run(WMDP(str(FOLDER / "wmdp")), meter)
    for name, (accuracy, stderr) in WMDP_REFERENCE.items():
        assert log[name]["agg_value"] == accuracy
        assert log[name]["stderr"] == pytest.approx(stderr, rel=1e-12)
    assert column(log["wmdp_bio"], "score") == WMDP_CORRECT
    assert column(log["wmdp_bio"], "log_likelihoods")[0] == pytest.approx(WMDP_FIRST, rel=1e-5)
    assert log["wmdp"]["agg_value"] == 5 / 12  # over questions, not over topics


def test_wmdp_of_some_topics(meter):
    log = run(WMDP(str(FOLDER / "wmdp"), "chem"), meter)
    assert set(log) == {"wmdp_chem"}
    with pytest.raises(ValueError, match="--split must be of bio, chem, cyber, got 'law'"):
        WMDP(str(FOLDER / "wmdp"), "bio,law")
    with pytest.raises(ValueError, match=r"holds no wmdp-cyber/test\.json"):
        WMDP(str(FOLDER / "wmdp"), "cyber")


def test_wmdp_is_over_all_topics_that_the_log_has(meter):
    """A topic after another, into one log."""
    log = run(WMDP(str(FOLDER / "wmdp"), "chem"), meter)
    log = run(WMDP(str(FOLDER / "wmdp"), "bio"), meter, log)
    assert log["wmdp"]["agg_value"] == 5 / 12


def test_choices_of_one_token_take_one_pass(meter, monkeypatch):
    """The likelihoods are those of a plain forward pass, and no answer is scored by itself."""
    monkeypatch.setattr(meter, "_scores", None)
    texts = ["What does Ada sell in", "Lea was making boats in "]
    found = meter.choices("x", [(text, ["Paris", "Oslo"]) for text in texts[1:]])
    found += meter.choices("x", [(texts[0], [" Oslo", " Paris", " Bern"])])
    for text, places, likely in (
        (texts[1].rstrip(), (" Paris", " Oslo"), found[0]),
        (texts[0], (" Oslo", " Paris", " Bern"), found[1]),
    ):
        ids = torch.tensor([meter.encode(text)])
        log_p = meter.model(ids).logits[0, -1].log_softmax(-1)
        wanted = [log_p[meter.encode(place)[-1]].item() for place in places]
        assert likely == pytest.approx(wanted, rel=1e-5)


def test_what_is_too_long_loses_its_beginning(meter, monkeypatch):
    monkeypatch.setattr(meter.model.config, "max_position_embeddings", 8)
    long, short = "Ada sells maps in Riga, and Bob was making jars in", None
    with pytest.warns(UserWarning, match="longer than the model's 8 tokens and lose"):
        found = meter.choices("x", [(long, [" Oslo", " Paris"])])
    short = torch.tensor([meter.encode(long)[-8:]])
    log_p = meter.model(short).logits[0, -1].log_softmax(-1)
    wanted = [log_p[meter.encode(place)[-1]].item() for place in (" Oslo", " Paris")]
    assert found[0] == pytest.approx(wanted, rel=1e-5)


def test_muse_is_the_authors(muse_log):
    for name, (percent, rows) in MUSE_REFERENCE.items():
        assert muse_log[name]["agg_value"] == pytest.approx(percent, rel=1e-12)
        assert column(muse_log[name], "rougeL_f1") == pytest.approx(rows, rel=1e-12)
    for name, scores in MUSE_MIN_K.items():
        assert column(muse_log["mia_min_k"][name], "score") == pytest.approx(scores, rel=1e-6)
    assert muse_log["mia_min_k"]["agg_value"] == pytest.approx(1 - MUSE_AUC, rel=1e-12)


def test_privleak_against_the_retrained_model(meter, muse_log):
    """`(auc - retrained) / retrained * 100` with the authors' AUC."""
    attack = {part: dict(muse_log["mia_min_k"][part]) for part in ("forget", "holdout")}
    low = attack["holdout"]["value_by_index"]
    attack["holdout"]["value_by_index"] = {i: {"score": r["score"] - 1} for i, r in low.items()}
    other = Log({"mia_min_k": attack}, "retrained")
    benchmark = MUSE(str(FOLDER / "muse"))
    benchmark.check_retrained(other)
    log = run(benchmark, meter, dict(muse_log), other)
    pairs = [
        (f > h - 1) + 0.5 * (f == h - 1)
        for f in MUSE_MIN_K["forget"]
        for h in MUSE_MIN_K["holdout"]
    ]
    reference = sum(pairs) / len(pairs)
    assert 0.3 < reference < 0.9
    wanted = (MUSE_AUC - reference) / reference * 100
    assert log["privleak"]["agg_value"] == pytest.approx(wanted, rel=1e-9)
    assert muse_log["privleak"]["agg_value"] == pytest.approx((MUSE_AUC - 0.5) / 0.5 * 100)
    # The command that goes on without the retrained model's log keeps the number, and says so.
    kept = run(benchmark, meter, dict(log))
    assert kept == log and benchmark.missing(kept, None) == []
    assert "against an AUC of 0.5" in benchmark.missing(muse_log, None)[0]
    del low["0"]
    attack["holdout"]["value_by_index"] = low
    with pytest.raises(LogError, match="of 6 texts of holdout, and --data has 7"):
        benchmark.check_retrained(other)
    low["0"] = {"score": MUSE_MIN_K["holdout"][0]}


def test_what_a_log_has_is_not_measured_again(meter, muse_log, monkeypatch):
    monkeypatch.setattr(meter, "model", meter.model)
    monkeypatch.setattr(Meter, "continue_texts", None)
    monkeypatch.setattr(Meter, "texts", None)
    assert run(MUSE(str(FOLDER / "muse")), meter, dict(muse_log)) == muse_log


def _as_on_the_hub(folder, shards):
    """The tables as the hub's repository has them: Parquet, with the names that it uses."""
    import datasets

    for path in (FOLDER / "muse").glob("*/*.json"):
        records = json.loads(path.read_text())
        records = [{"text": r} if isinstance(r, str) else r for r in records]
        place = folder / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        for n in range(shards):
            part = datasets.Dataset.from_list(records).shard(shards, n, contiguous=True)
            part.to_parquet(place / f"{path.stem}-{n:05}-of-{shards:05}.parquet")
    return str(folder)


def test_muse_in_other_formats(tmp_path):
    """The hub's Parquet, in one file or two, and the first repository's names are the same data."""
    wanted = MUSE(str(FOLDER / "muse"))
    for shards in (1, 2):
        found = MUSE(_as_on_the_hub(tmp_path / f"hub{shards}", shards))
        assert (found.verbatim, found.asked) == (wanted.verbatim, wanted.asked)
        assert (found.before, found.documents) == (wanted.before, wanted.documents)
    (tmp_path / "hub2/verbmem/forget-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 of the 2 shards"):
        MUSE(str(tmp_path / "hub2"))
    first = shutil.copytree(FOLDER / "muse", tmp_path / "first")
    for path in first.glob("knowmem/retain*"):
        path.rename(path.with_name(path.name.replace("retain", "retain2")))
    assert MUSE(str(first)).asked == wanted.asked


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    shutil.copytree(FOLDER / "model", tmp_path / "model")
    run = palu_in(tmp_path, monkeypatch, capsys)
    return lambda line, *words: run(f"evaluate --model model --device cpu {line}", *words)


def test_the_command_writes_a_log_of_the_benchmark(palu, tmp_path):
    line = f"--dtype float32 --benchmark wmdp --data {FOLDER / 'wmdp'} --json all.json"
    status, said, error = palu(line)
    assert status == 0, error
    folder = tmp_path / "model/evals_wmdp"
    log = json.loads((folder / "WMDP_EVAL.json").read_text())
    assert log["wmdp_bio"]["agg_value"] == 4 / 7 and "0.5714" in said
    summary = json.loads((folder / "WMDP_SUMMARY.json").read_text())
    assert summary == json.loads((tmp_path / "all.json").read_text())["summary"]
    settings = json.loads((folder / "palu_evaluate_WMDP.json").read_text())["settings"]
    assert settings["data_wmdp_bio"] == WMDP(str(FOLDER / "wmdp")).tables["wmdp_bio"].digest()
    # other data in the same place
    other = shutil.copytree(FOLDER / "wmdp", tmp_path / "other")
    file = other / "wmdp-bio/test.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    status, _, error = palu(f"--dtype float32 --benchmark wmdp --data {other}")
    assert status == 2 and "was measured with data_wmdp_bio" in error


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--benchmark muse", "--benchmark muse needs --data"),
        ("--data x", "--data 'x' is of a benchmark: add --benchmark NAME"),
        ("--benchmark wmdp --data . --forget f.jsonl", "--forget is not for --benchmark wmdp"),
        ("--benchmark muse --data . --max-new-tokens 9", "--max-new-tokens is not for"),
        ("--benchmark wmdp --data . --retain-log x", "--retain-log is not for --benchmark wmdp"),
        ("--benchmark muse --data nowhere/to/go", "no such folder, and no data set on the hub"),
        ("--benchmark muse --data .", "holds no verbmem/forget.json"),
        ("--benchmark muse --data . --split x", "MUSE has one evaluation for every forget set"),
        ("--benchmark law --data .", "tofu, muse, wmdp, rwku"),
        ("--benchmark tofu --data .", "--tofu needs --split"),
    ],
)
def test_refusals(palu, tmp_path, line, said):
    palu.folder = tmp_path
    assert said in refusal(palu, line)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": ["a", "b"]}, "field 'choices' must be four texts"),
        ({"answer": 4}, "field 'answer' must be 0 to 3, got 4"),
        ({"answer": "A"}, "field 'answer' must be 0 to 3, got 'A'"),
        ({"question": None}, "field 'question' is missing"),
    ],
)
def test_a_record_that_is_no_question(tmp_path, change, said):
    record = {"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 1}
    (tmp_path / "bio-questions.json").write_text(json.dumps([record, record | change]))
    with pytest.raises(ValueError, match=r"bio-questions\.json, row 1") as error:
        WMDP(str(tmp_path))
    assert said in str(error.value)
