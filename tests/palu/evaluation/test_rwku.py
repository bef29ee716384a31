"""RWKU beside its authors' code, on the same small model and files.

REFERENCE was returned by `LLaMA-Factory/src/llmtuner/eval` of github.com/jinzhuoran/RWKU at b8a03b3
(torch 2.13.0, transformers 5.24, rouge 1.0.1, float32 on a CPU, one example a batch) from
`tests/data/benchmarks/rwku`.
"""

import json
import shutil

import pytest

from palu.evaluation.benchmarks import RWKU, Meter
from palu.evaluation.benchmarks.rwku import rouge_l_recall
from palu.evaluation.benchmarks.rwku_utility import _general, _reason, exact_match, word_f1
from palu.models.wrappers import eval_mode
from tests.support.benchmark_small import FOLDER, load

REFERENCE = {
    "forget_level1": 0.21666666666666665,
    "forget_level2": 0.5833333333333333,
    "forget_level3": 0.34375,
    "neighbor_level1": 0.375,
    "neighbor_level2": 0.375,
    "forget_mia_loss": -4.459062337875366,
    "forget_mia_zlib": -0.0456304239648575,
    "forget_mia_min_k_plus_plus": -10.67064619064331,
    "retain_mia_loss": -5.472147107124329,
    "retain_mia_zlib": -0.056904049717877415,
    "retain_mia_min_k_plus_plus": -12.28019905090332,
    "utility_general": 0.6666666666666666,
    "utility_reason": 0.0,
    "utility_truthfulness_mc1": 0.25,
    "utility_truthfulness_mc2": 0.2892382582001456,
    "utility_factuality_em": 0.0,
    "utility_factuality_f1": 0.05981384307846077,
}


@pytest.fixture(scope="module")
def meter():
    return Meter(*load(), batch_size=3)


def run(meter, folder, split=None):
    log = {}
    with eval_mode(meter.model):
        RWKU(str(folder), split).run(meter, log, lambda log: None)
    return log


def test_every_number_is_the_authors(meter):
    log = run(meter, FOLDER / "rwku")
    assert {name: entry["agg_value"] for name, entry in log.items()} == pytest.approx(
        REFERENCE, rel=1e-6
    )


# What `rouge.Rouge().get_scores(text, answer)[0]["rouge-l"]["r"]` gave.
@pytest.mark.parametrize(
    ("answer", "text", "recall"),
    [
        ("Ada sells boats. Ada sells maps.", "Ada sells. maps Ada boats", 1.0),
        ("a b c d", "d c b a. a c", 0.75),
        ("Paris, France", "paris france", 0.0),
        ("one two", "two one. x", 0.5),
        ("A. A B. B C", "B A. C B", 1.0),
        ("Sold. .", "NOANSWER", 0.0),
        ("x y x y z", " y x. z.y", 1.0),
    ],
)
def test_rouge_is_that_of_the_package(answer, text, recall):
    assert rouge_l_recall(answer, text) == recall


def test_a_text_of_full_stops_has_no_word():
    assert rouge_l_recall("Ada", "...") == 0.0


def test_words_of_facts():
    """By hand: articles, case and punctuation do not count, the best of the answers does."""
    assert exact_match("The  Orient-Express!", ["a boat", "orientexpress"]) == 1.0
    assert exact_match("an orient", ["orient express"]) == 0.0
    # two of three words, two of two
    assert word_f1("the red old fox", ["fox red", "hen"]) == pytest.approx(2 * 2 / 5)
    assert word_f1("The", ["a"]) == 1.0 and word_f1("The", ["hen"]) == 0.0


def test_what_stands_after_the_answer_is(meter, monkeypatch):
    said = ["So the answer is  Yes. No.", "The answer is no", "no ", " "]
    monkeypatch.setattr(meter, "continue_texts", lambda *a, **k: said)
    told = [("q", [answer]) for answer in ("yes", "no", "no", "noanswer")]
    rows = _reason(meter, "x", told)["value_by_index"].values()
    # the second has no full stop after it, so all of it counts
    assert [row["score"] for row in rows] == [1.0, 0.0, 1.0, 1.0]


def test_letters_are_the_last_tokens_after_a_space(meter, monkeypatch):
    """In the tests' tokenizer a letter is a token of its own, with a space before it or not."""
    ids = {f" {letter}": [9, n] for n, letter in enumerate("ABCD")}
    monkeypatch.setattr(meter.tokenizer, "encode", lambda text, add_special_tokens: ids[text])
    asked = []

    def next_tokens(title, prompts, candidates):
        asked.append(candidates)
        return [[-1.0, -2.0, -0.5, -0.5]] * len(prompts)

    monkeypatch.setattr(meter, "next_tokens", next_tokens)
    entry = _general(meter, "x", [("q", 2), ("q", 3)])
    assert asked == [[[0, 1, 2, 3]] * 2] and entry["agg_value"] == 0.5  # of equal ones the first


def test_one_person_in_the_authors_files(meter, tmp_path):
    """The authors' folder of a person has other names, and what is not there is named."""
    names = {"mia_forget": "forget_mia", "utility_truthfulness": "truthful"}
    for path in (FOLDER / "rwku").glob("*.json"):
        if path.stem not in ("utility_general", "mia_retain"):
            shutil.copy(path, tmp_path / f"{names.get(path.stem, path.stem)}.json")
    benchmark = RWKU(str(tmp_path), "Ada")
    probes = json.loads((FOLDER / "rwku/forget_level2.json").read_text())
    assert len(benchmark.probes["forget_level2"]) == sum(p["subject"] == "Ada" for p in probes)
    assert benchmark.missing({}, None) == [
        "mia_retain (no such file in --data)",
        "utility_general (no such file in --data)",
        "fluency (its definition needs NLTK's punkt)",
    ]
    made = set(benchmark.metrics(meter))
    assert made == {n for n in REFERENCE if not n.startswith(("utility_general", "retain_mia"))}
    with pytest.raises(ValueError, match=r"forget_level1.* has no such subject, but Ada, Bob"):
        RWKU(str(tmp_path), "Eva")


def test_what_cannot_be_measured(meter, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds no forget_level1/test\.json"):
        RWKU(str(tmp_path))
    monkeypatch.setattr(meter.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="the tokenizer has none"):
        RWKU(str(FOLDER / "rwku")).check_tokenizer(meter.tokenizer)


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("forget_level1", {"answer": ". ."}, "field 'answer' must hold a word"),
        ("forget_level3", {"type": None}, "field 'type' is missing"),
        ("utility_general", {"answer": 4}, "'answer' 0 to 3"),
        ("utility_factuality", {"answers": []}, "field 'answers' must be texts"),
        (
            "utility_truthfulness",
            {"mc1_targets": {"choices": ["a"], "labels": [1]}},
            "field 'mc1_targets' must have true and false choices",
        ),
    ],
)
def test_a_record_that_is_wrong(tmp_path, table, change, said):
    folder = shutil.copytree(FOLDER / "rwku", tmp_path / "rwku")
    records = json.loads((folder / f"{table}.json").read_text())
    records[1] |= change
    (folder / f"{table}.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=rf"{table}\.json, row 1") as error:
        RWKU(str(folder))
    assert said in str(error.value)
