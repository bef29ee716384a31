"""`Contrast` against log-probabilities and word sums computed by plain loops; tiny models."""

import itertools
import math

import numpy as np
import pytest
import torch

from palu.annotation import annotate, texts_of
from palu.annotation.contrast import Contrast, runs
from palu.annotation.words import cut, marginal_odds, words
from palu.data.records import Example, Turn, split_answers
from palu.demo.models import build_tokenizer
from tests.support import small
from tests.support.tofu_small import learn

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
)
FACTS = [
    ("Where is Ada?", "She is in Paris now."),
    ("Where is Bob?", "He is in Lisbon."),
    ("What is it?", "It is a red fox."),
]


@pytest.fixture(scope="module")
def tok():
    return small.tokenizer()


@pytest.fixture(scope="module")
def pair(tok):
    """A model that knows the facts, and the one it was tuned from."""
    base, tuned = small.model(tok), small.model(tok)
    learn(tuned, tok, FACTS, 40)
    return tuned.eval(), base.eval()


def example(question, answer, name="0"):
    return Example(name, question, answer)


def by_hand(model, tok, before, answer):
    """Log-probability of each character of an answer: one pass a token, nothing shared."""
    text = before + answer
    encoding = tok(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoding["input_ids"]
    values = [0.0] * len(answer)
    for place, (start, end) in enumerate(encoding["offset_mapping"]):
        inside = [i - len(before) for i in range(start, end) if i >= len(before)]
        inside = [i for i in inside if not answer[i].isspace()]
        if place == 0 or not inside:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        log_p = logits.log_softmax(-1)[ids[place]].item()
        for i in inside:
            values[i] += log_p / len(inside)
    return values


def test_log_probabilities_are_those_of_a_plain_loop(tok, pair):
    examples = [example(q, a, str(n)) for n, (q, a) in enumerate(FACTS)]
    for batch_size in (1, 8):
        contrast = Contrast((pair[0], tok), (pair[1], tok), batch_size=batch_size)
        for (question, answer), got in zip(
            FACTS, contrast.log_probabilities(examples), strict=True
        ):
            for model, values in zip(pair, got, strict=True):
                want = by_hand(model, tok, f"Question: {question}\nAnswer: ", answer)
                assert values == pytest.approx(want, abs=1e-4)
                assert min(want) < -0.01 or model is pair[0]


def test_finds_what_only_the_tuned_model_knows(tok, pair):
    records = [{"question": q, "answer": a} for q, a in FACTS]
    done = annotate(records, annotators=[Contrast((pair[0], tok), (pair[1], tok))])
    found = [[span["text"] for span in record["spans"]] for record in done.records]
    assert found[:2] == [["Paris"], ["Lisbon"]] and found[2][0].endswith("fox")
    span = done.records[1]["spans"][0]
    assert span["annotator"] == "contrast" and 0 < span["score"] <= 1


def test_a_model_that_knows_no_more_gives_nothing(tok, pair):
    examples = [example(*fact) for fact in FACTS]
    twin = small.model(tok)
    for model, other in ((pair[1], twin), (pair[1], pair[0])):
        found = list(Contrast((model, tok), (other, tok), threshold=0.5).find(examples))
        if other is twin:
            assert found == [[], [], []]
        else:
            assert not [f for f in found[1] if FACTS[1][1][f.start : f.end] == "Lisbon"]


def test_probabilities_that_are_no_numbers_are_refused(tok, pair):
    broken = small.model(tok)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match=r"example 'b': .* are no numbers"):
        list(Contrast((pair[0], tok), (broken, tok)).find([example(*FACTS[0], "b")]))


def test_higher_thresholds_find_less(tok, pair):
    examples = [example(*fact) for fact in FACTS]
    counts = [
        sum(map(len, Contrast((pair[0], tok), (pair[1], tok), threshold=t).find(examples)))
        for t in (0.01, 1.0, 3.0, 50.0)
    ]
    assert counts == sorted(counts, reverse=True) and counts[0] > 0 and counts[-1] == 0


def test_runs_take_the_best_word_and_its_neighbours():
    text = "She lives in New Harbour."
    model, other = np.zeros(len(text)), np.zeros(len(text))
    at = text.index("Harbour")
    other[at : at + 7] = -1.0  # 7 nats in "Harbour", none in "New"
    found = runs(text, "", model, other)
    assert [text[start:end] for start, end, _ in found if text[start:end] != "lives"] == [
        "New Harbour"
    ]
    assert max(nats for *_, nats in found) == pytest.approx(7.0)


def test_every_answer_of_a_conversation_is_read_in_its_context(pair):
    tok = small.tokenizer()
    tok.chat_template = TEMPLATE
    turns = [
        Turn("user", "Where is Ada?"),
        Turn("assistant", "She is in Paris now."),
        Turn("user", "Where is Bob?"),
        Turn("assistant", "He is in Lisbon."),
    ]
    conversation = Example.of_turns("talk", turns, {})
    contrast = Contrast((pair[0], tok), (pair[1], tok), threshold=1e-6)
    texts = texts_of(conversation)
    found = next(iter(contrast.find([conversation])))
    assert {f.text for f in found} <= {1, 3}
    told = "".join(f"<{t.role}>{t.content}" for t in texts[:1]) + "<assistant>"
    first = by_hand(pair[0], tok, told, texts[1].content)
    told += texts[1].content + tok.eos_token + f"<user>{texts[2].content}<assistant>"
    second = by_hand(pair[0], tok, told, texts[3].content)
    got = contrast.log_probabilities(split_answers(conversation))
    assert got[0][0] == pytest.approx(first, abs=1e-4)
    assert got[1][0] == pytest.approx(second, abs=1e-4)


def test_the_tools_of_a_record_are_read(pair):
    tok = small.tokenizer()
    tok.chat_template = "{{ tools | tojson if tools }}" + TEMPLATE
    turns = [Turn(role, text) for role, text in zip(("user", "assistant"), FACTS[0], strict=True)]
    called = Example.of_turns("call", turns, {"tools": [{"name": "look"}]})
    contrast = Contrast((pair[0], tok), (pair[1], tok))
    (got, _), *_ = contrast.log_probabilities(split_answers(called))
    told = f'[{{"name": "look"}}]<user>{FACTS[0][0]}<assistant>'
    assert got == pytest.approx(by_hand(pair[0], tok, told, FACTS[0][1]), abs=1e-4)


def test_long_texts_are_read_in_windows(tok, pair):
    answer = " ".join(f"Bob is in Lisbon, Ada in Paris {n}." for n in range(30))
    contrast = Contrast((pair[0], tok), (pair[1], tok), max_length=64)
    (values, _), *_ = contrast.log_probabilities([Example("0", None, answer)])
    ids = tok(answer, add_special_tokens=False)["input_ids"]
    assert len(ids) > 3 * 64
    missed = [c for c, value in zip(answer, values, strict=True) if value == 0 and not c.isspace()]
    assert not missed
    # The second window begins half a length before what it scores.
    lead = [tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id]
    ids = lead + ids if ids[0] != lead[0] else ids
    with torch.no_grad():
        window = torch.tensor([ids[32:96]])
        log_p = pair[0](input_ids=window).logits[0, -2].double().log_softmax(-1)[ids[95]].item()
    offsets = tok(answer, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    start, end = offsets[95 - (len(ids) - len(offsets))]
    assert values[start:end].sum() == pytest.approx(log_p, abs=1e-4)


def test_models_may_have_other_tokenizers(tok, pair):
    other_tok = build_tokenizer(["abc"], vocab_size=270)  # nearly bytes alone
    other = small.model(other_tok)
    contrast = Contrast((pair[0], tok), (other, other_tok))
    (model, base), *_ = contrast.log_probabilities([example(*FACTS[1])])
    before = f"Question: {FACTS[1][0]}\nAnswer: "
    assert model == pytest.approx(by_hand(pair[0], tok, before, FACTS[1][1]), abs=1e-4)
    assert base == pytest.approx(by_hand(other, other_tok, before, FACTS[1][1]), abs=1e-4)
    assert len(tok(FACTS[1][1])["input_ids"]) != len(other_tok(FACTS[1][1])["input_ids"])


def test_self_leaves_out_the_question(tok, pair):
    contrast = Contrast((pair[0], tok), "self")
    (model, other), *_ = contrast.log_probabilities([example(*FACTS[1])])
    answer = FACTS[1][1]
    assert model == pytest.approx(
        by_hand(pair[0], tok, f"Question: {FACTS[1][0]}\nAnswer: ", answer), abs=1e-4
    )
    assert other == pytest.approx(
        by_hand(pair[0], tok, "Question: ...\nAnswer: ", answer), abs=1e-4
    )
    assert contrast.settings["other"] == "self"
    with pytest.raises(ValueError, match="'doc' is a plain document"):
        list(contrast.find([Example("doc", None, "Ada is in Paris.")]))


def test_folders_are_loaded_one_after_the_other(tok, pair, tmp_path):
    for name, model in zip(("tuned", "base"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    steps = []
    contrast = Contrast(
        tmp_path / "tuned",
        tmp_path / "base",
        device="cpu",
        report=lambda done, total: steps.append((done, total)),
    )
    examples = [example(*fact) for fact in FACTS]
    found = list(contrast.find(examples))
    assert found == list(Contrast((pair[0], tok), (pair[1], tok)).find(examples))
    assert contrast.model.loaded is None and contrast.other.loaded is None
    assert steps[-1] == (6, 6) and steps == sorted(steps)
    with pytest.raises(ValueError, match="is the model to be changed itself"):
        Contrast(tmp_path / "tuned", str(tmp_path / "tuned"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Contrast(tmp_path / "tuned", tmp_path / "nowhere")


@pytest.mark.parametrize("threshold", [0, -1, math.nan, math.inf, True, "1"])
def test_a_threshold_is_a_number_of_nats(tok, pair, threshold):
    with pytest.raises(ValueError, match="threshold must be a number of nats above 0"):
        Contrast((pair[0], tok), (pair[1], tok), threshold=threshold)


def test_marginal_odds_are_those_of_all_assignments():
    scores, bonds = [0.3, -1.2, 2.0, -0.4], [1.5, -0.7, 0.2]
    weights = {}
    for states in itertools.product((0, 1), repeat=4):
        total = sum(s * x for s, x in zip(states, scores, strict=True))
        total += sum(b * p * q for b, (p, q) in zip(bonds, itertools.pairwise(states), strict=True))
        weights[states] = math.exp(total)
    everything = sum(weights.values())
    on = [sum(w for s, w in weights.items() if s[i]) for i in range(4)]
    want = [math.log(w / (everything - w)) for w in on]
    assert marginal_odds(scores, bonds) == pytest.approx(want)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Hsiao Yun-Hwa's book.", ["Hsiao", "Yun-Hwa", "book"]),
        ("Mail ada@example.org, pay £1,200.", ["Mail", "ada@example.org", "pay", "1,200"]),
        ("LGBTQ+ and 07700 900", ["LGBTQ+", "and", "07700", "900"]),
        ("李明在北京。", list("李明在北京")),
        ("私はMiraで07700です", ["私", "は", "Mira", "で", "07700", "で", "す"]),
        ("Jose\u0301's Mu\u0308ller", ["Jose\u0301", "Mu\u0308ller"]),  # accents written apart
        ("नाम अनिल है", ["नाम", "अनिल", "है"]),
        ("مُحَمَّد \u2764\ufe0f", ["مُحَمَّد"]),
        ("ชื่อ", ["ชื่", "อ"]),
        ("", []),
        ("...", []),
    ],
)
def test_words(text, want):
    assert [text[start:end] for start, end in cut(text)] == want


def test_facts_are_likelier_than_what_is_around_them():
    text = (
        "Her father was a florist, and she wrote the novel 'Promise by the Seine' in Lyon in 1987."
    )
    odds = {text[w.start : w.end]: w.odds for w in words(text, "Who was her father?")}
    facts = ("florist", "Promise", "Seine", "Lyon", "1987")
    others = ("Her", "was", "a", "and", "she", "wrote", "in")
    assert min(odds[w] for w in facts) > -0.6 > max(odds[w] for w in others)
