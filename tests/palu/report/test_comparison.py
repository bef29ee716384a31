"""What the page of a comparison says: the numbers of the files, and no secret."""

import html
import json
import re

import pytest

from palu.comparison.tables import write_tables
from palu.report.compared import differences, letter, methods_of, places, sentences
from palu.report.compared_runs import attack_rows, curve_ends, geometric_mean, hide
from palu.report.compared_text import broken, text_rows
from palu.report.comparison import write_page
from palu.report.comparison_charts import Frontiers, thinned
from palu.report.examples import Secrets
from palu.report.inputs import Node
from tests.support import compared, erasure

SAID = [word for pair in erasure.SECRETS for word in pair]


def text_of(path):
    """The page's text, without tags and style."""
    page = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", page).split()))


def written(folder, **how):
    content = compared.write(folder / "cmp", **how)
    return write_page(folder / "cmp", content, forget=folder / "forget.jsonl")


def ranked(content, limit=0.05):
    node = Node(content, "comparison.json")
    rows = places(methods_of(node), differences(node), limit)
    return rows, " ".join(sentences(rows, limit))


def test_it_says_what_was_found(tmp_path):
    said = text_of(written(tmp_path))
    for words in (
        "PALU has the largest number, 0.750 (0.720 to 0.780), but the difference to NPO is within "
        "the noise: these 2 cannot be told apart.",
        "Behind it, by more than the noise: SimNPO with 0.726 (between 0.004 and 0.044 less).",
        "read on the one left out, PALU has 0.740, at a loss of 4.6%.",
        "A model retrained without the records has 0.920, at a loss of 1.0%",
        "3 of 27 runs diverged or failed.",
        "diverged : the loss at step 12 is not finite",
        "It rests on 6 records to forget with 12 secrets, and on these examples of utility: 2 of "
        "general. One secret more or less is 8.3% of a leak rate.",
        "Each setting was run with 2 seeds.",
        # The original, the retrained model, and 3 of 12 secrets of each of two seeds.
        "first 3 tokens given away 100% 12 of 12 8.3% 1 of 12 25% 6 of 24",
        # Of NPO 2 of 6.
        "NPO: 33% of the answers to the records to forget fell apart (original 0%, retrained 0%).",
        "or the same again and again 0.000 0.000 0.000 0.333 0.000",
        "Answers fell apart in 1 place:",
        "Probability of a token: to forget 0.075, the rest 0.907.",
    ):
        assert words in said, words


def test_the_page_of_what_the_tables_have(tmp_path):
    """`palu compare` ranks the run files, and the page says the same numbers."""
    compared.write(tmp_path / "cmp", methods=("NPO", "PALU"))
    content = write_tables(tmp_path / "cmp")
    said = text_of(write_page(tmp_path / "cmp", content, forget=tmp_path / "forget.jsonl"))
    for method in content["methods"]:
        (at_five,) = (one for one in method["within"] if one["limit"] == 0.05)
        one = at_five["forgetting"]
        assert f"{one['value']:.3f} {one['low']:.3f} to {one['high']:.3f}" in said
    # Of 12 secrets 3 are said within 5%: 1 - 3/12; two methods with the same runs do not differ.
    assert at_five["forgetting"]["value"] == pytest.approx(0.75)
    assert "cannot be told apart" in said and content["forgetting"]["title"] in said


def test_a_limit_of_answers_that_fell_apart_is_said(tmp_path):
    content = compared.write(tmp_path / "cmp")
    why = "37.5% of its answers to the forget file fell apart, more than 10.0%"
    content["not_ranked"].append({"method": "NPO", "setting": "learning_rate=2", "why": why})
    said = text_of(write_page(tmp_path / "cmp", content))
    assert why in said and "Settings of which more than" not in said
    content["max_fell_apart"] = 0.1
    said = text_of(write_page(tmp_path / "cmp", content))
    assert "Settings of which more than 10% of the answers to the records to forget" in said
    content["max_fell_apart"] = 3
    with pytest.raises(ValueError, match="max_fell_apart is 3; it must be a number between 0 and"):
        write_page(tmp_path / "cmp", content)


def test_without_a_retrained_model(tmp_path):
    compared.write(tmp_path / "cmp", methods=("NPO", "PALU"))
    (tmp_path / "cmp" / "retrained.json").unlink()
    content = write_tables(tmp_path / "cmp")
    said = text_of(write_page(tmp_path / "cmp", content, forget=tmp_path / "forget.jsonl"))
    assert "No retrained model stands beside them." in said
    assert "A model retrained without the records has" not in said


def test_runs_of_other_seeds_are_left_out(tmp_path):
    """As the ranking leaves them out: attacks and curves are of the same runs as the frontier."""
    content = compared.write(tmp_path / "cmp")
    content["seeds"] = [1]
    said = text_of(write_page(tmp_path / "cmp", content))
    assert "first 3 tokens given away 100% 12 of 12 8.3% 1 of 12 25% 3 of 12" in said
    assert "Each setting was run once" in said


def test_the_smallest_comparison(tmp_path):
    path = written(tmp_path, methods=("PALU",), settings=1, seeds=1, failed=False)
    said = text_of(path)
    assert "PALU forgets 0.600 (0.570 to 0.630)." in said
    assert "None: all 1 run came to the end." in said
    assert "Each setting was run once" in said and "pairs of methods" not in said
    assert "Each method alone" not in said


def test_nothing_to_compare(tmp_path):
    content = compared.write(tmp_path / "cmp", methods=(), failed=False)
    path = write_page(tmp_path / "cmp", content, forget=tmp_path / "forget.jsonl")
    assert "There is no method to compare." in text_of(path)


def test_secrets_are_masked(tmp_path):
    content = compared.write(tmp_path / "cmp")
    # A method that says another record's secret, in a reason too.
    for path in (tmp_path / "cmp" / "runs").glob("0-*/run.json"):
        run = json.loads(path.read_text())
        run["reason"] = f"NaN after {SAID[4]}" if run["status"] != "done" else None
        run["answers"][0]["answer"] = f"It is {SAID[8]}, on {SAID[5]}, or 0171 555 01234."
        path.write_text(json.dumps(run))
    page = write_page(tmp_path / "cmp", content, forget=tmp_path / "forget.jsonl")
    whole = page.read_text()
    for secret in [*SAID, "0171", "Eve Hill"]:
        assert secret not in whole, secret
    for word in {part for secret in SAID for part in secret.split()}:
        assert not re.search(rf"(?<![\w.,-]){word}(?![\w.,-])", text_of(page)), word
    assert 'class="box"' in whole

    page = write_page(
        tmp_path / "cmp", content, forget=tmp_path / "forget.jsonl", show_secrets=True
    )
    said = text_of(page)
    assert "This page shows the secrets." in said and "Eve" in said and "0171 555 01234" in said
    assert all(word in said for word in SAID[0].split())
    # "says" before it would give every answer its direction.
    assert re.search(r"<p [^>]*><small>says</small> <bdi>It is ", page.read_text())


def test_tokens_that_are_masked():
    """Marked ones, and those with a part of what would be masked in the whole text."""
    secrets = Secrets("", [], {}, ["Ann Bell", "31 May"])
    texts = ["It", " is", " An", "n", " Be", "ll", " on", " 31", " May", ", or 0", "1234 567", " x"]
    tokens = [{"text": text, "sensitive": text == " x"} for text in texts]
    hide(tokens, secrets)
    hidden = [text for text, token in zip(texts, tokens, strict=True) if token["text"] is None]
    assert hidden == [" An", "n", " Be", "ll", " 31", " May", ", or 0", "1234 567", " x"]
    secrets.shown = True
    tokens = [{"text": text, "sensitive": True} for text in texts]
    hide(tokens, secrets)
    assert [token["text"] for token in tokens] == texts


def test_without_the_forget_file_no_answer_is_shown(tmp_path):
    content = compared.write(tmp_path / "cmp")
    folder = tmp_path / "cmp"
    path = write_page(folder, content)
    assert "No answers are shown: the file that was to be forgotten was not named." in text_of(path)
    other = tmp_path / "other.jsonl"
    record = {"id": "x", "question": "Who?", "answer": "Eva.", "spans": [[0, 3]]}
    other.write_text(json.dumps(record) + "\n")
    path = write_page(folder, content, forget=other)
    assert "is not the file that was measured" in text_of(path)
    assert "belongs to" not in text_of(path)
    with pytest.raises(ValueError, match=r"--show-secrets: .*other records"):
        write_page(folder, content, forget=other, show_secrets=True)
    with pytest.raises(ValueError, match=r"--show-secrets: .*not named"):
        write_page(folder, content, show_secrets=True)


def test_it_replaces_its_own_page_alone(tmp_path):
    path = written(tmp_path)
    content = compared.write(tmp_path / "more" / "cmp")
    write_page(tmp_path / "cmp", content)
    path.write_text("<p>mine</p>")
    with pytest.raises(FileExistsError, match="palu compare did not write it"):
        write_page(tmp_path / "cmp", content)
    assert path.read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c["methods"][0]["area"].update(value="x"), r"methods\[0\].area.value is a text"),
        (lambda c: c["methods"][1].pop("method"), r"methods\[1\].method is missing"),
        (lambda c: c["pairs"][0]["within"][0].update(limit=None), r"pairs\[0\].within\[0\].limit"),
        (lambda c: c["settings"][0]["loss"].update(value=float("nan")), r"settings\[0\].loss"),
    ],
)
def test_content_that_is_something_else(tmp_path, spoil, words):
    content = compared.write(tmp_path / "cmp")
    spoil(content)
    with pytest.raises(ValueError, match=words):
        write_page(tmp_path / "cmp", content)


def test_a_run_file_that_is_something_else(tmp_path):
    content = compared.write(tmp_path / "cmp")
    path = tmp_path / "cmp" / "runs" / "0-0-0" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "palu-attack/1"}))
    with pytest.raises(ValueError, match=r"0-0-0.run\.json: format"):
        write_page(tmp_path / "cmp", content)


def test_the_order_and_the_noise(tmp_path):
    content = compared.write(tmp_path / "cmp", methods=("A", "B", "C", "D", "E", "F", "G"))
    content["methods"][6]["within"][1] |= {"setting": None}
    rows, said = ranked(content)
    assert [row["method"]["name"] for row in rows] == [*"ABCDEFG"]
    assert [row["noise"] for row in rows] == [False, True, False, False, False, False, False]
    assert rows[6]["place"] is None and "No ranked setting of G forgets anything" in said
    assert "C with 0.726" in said and "E with" in said and "F with" not in said
    assert "and 1 other with less." in said
    # Turned round, the difference is the same one: what the second pair says of A stands.
    content["pairs"][0] |= {"first": "B", "second": "A"}
    rows, _ = ranked(content)
    assert rows[1]["to_first"]["value"] == pytest.approx(-0.012)
    assert rows[1]["to_first"]["low"] < rows[1]["to_first"]["high"]
    # Without resamples no difference is known to be more than noise.
    for pair in content["pairs"]:
        for one in pair["within"]:
            one |= {"low": None, "high": None}
    rows, said = ranked(content)
    assert all(row["noise"] for row in rows[1:6]) and "these 6 cannot be told apart" in said


def test_an_advantage_beyond_the_noise(tmp_path):
    content = compared.write(tmp_path / "cmp", methods=("A", "B"))
    content["pairs"][0]["within"][1] |= {"value": 0.012, "low": 0.001, "high": 0.02}
    assert (
        "A forgets most, 0.750 (0.720 to 0.780), and by more than the noise." in ranked(content)[1]
    )
    content["pairs"][0]["within"][1] |= {"low": 0.0}
    assert "within the noise" in ranked(content)[1]


def test_the_setting_that_is_shown(tmp_path):
    content = compared.write(tmp_path / "cmp", methods=("A",))
    within = content["methods"][0]["within"]
    chosen = [methods_of(Node(content, "c"))[0]["chosen"]]
    for one in within[1:]:
        one["setting"] = None
        chosen.append(methods_of(Node(content, "c"))[0]["chosen"])
    names = [compared.name_of(number) for number in range(4)]
    assert chosen == [
        {"setting": names[3], "limit": 0.05},
        {"setting": names[3], "limit": 0.1},
        {"setting": names[0], "limit": None},  # that of the least loss
    ]


def test_numbers_of_answers():
    def run(apart, **others):
        forget = {"ids": [*"abcd"], "fell_apart": apart, "unknown": [9.0] * 4}
        return Node({"sets": {"others": {"answer_probability": [0.5, 0.7]}, "forget": forget}}, "r")

    columns = {"original": [run([0.0, 1.0, None, 0.0])], "A": [run([1.0] * 4), run([0.0] * 4)]}
    rows = text_rows(columns)
    assert [(row["set"], row["name"]) for row in rows] == [
        ("forget", "fell_apart"),
        ("others", "answer_probability"),
    ]
    assert rows[0]["values"] == pytest.approx({"original": 1 / 3, "A": 0.5})
    assert rows[1]["values"] == pytest.approx({"original": 0.6, "A": 0.6})
    (sentence,) = broken(rows, [{"name": "NPO", "letter": "A"}])
    assert sentence.startswith(
        "NPO: 50% of the answers to the records to forget fell apart (original 33%)."
    )
    rows[0]["values"]["A"] = 0.43  # less than 10% more than the original's
    assert broken(rows, [{"name": "NPO", "letter": "A"}]) == []


def test_attacks_of_several_seeds():
    def run(*said):
        lines = [{"name": "greedy", "title": "asked plainly", "said": [*said]}]
        auc = {
            "name": "membership_inference",
            "title": "min-k",
            "auc": 0.5,
            "low": 0.4,
            "high": 0.6,
        }
        return Node({"attacks": [*lines, auc | {"auc": sum(said) / 4}]}, "run.json")

    plain, member = attack_rows({"original": [run(1, 1, 1, 1)], "A": [run(1, 0, 0, 0), run(1, 1)]})
    assert plain["results"]["original"] == {"said": 4, "of": 4, "rate": 1.0}
    # The mean of 1/4 and 2/2; together 3 of 6.
    assert plain["results"]["A"] == {"said": 3, "of": 6, "rate": 0.625}
    assert member["results"]["original"] == {"auc": 1.0, "low": 0.4, "high": 0.6}
    assert member["results"]["A"] == {"auc": 0.375, "low": None, "high": None}


def test_small_numbers():
    assert geometric_mean([0.5, 0.125]) == pytest.approx(0.25)
    assert geometric_mean([]) is None and geometric_mean([0.0, 1.0]) == 0.0
    assert [letter(n) for n in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    ends = curve_ends([steps, [{"step": 1, "loss": 5.0}]], ["loss", "forget"])
    assert ends == [{"part": "loss", "first": 4.0, "last": 3.0}]


def test_a_thinned_curve_keeps_its_peaks():
    points = [(step, 0.0) for step in range(1000)]
    points[437], points[438] = (437, 9.0), (438, -9.0)
    kept = thinned(points)
    assert len(kept) <= 82 and kept[0] == points[0] and kept[-1] == points[-1]
    assert points[437] in kept and points[438] in kept
    assert kept == sorted(kept)
    assert thinned(points[:50]) == points[:50]


def test_where_a_frontier_lies(tmp_path):
    """By hand: axes from -1% to 20% and from 0 to 1, in a picture of 400 x 290."""
    content = compared.write(tmp_path / "cmp", methods=("A",), settings=2)
    content["settings"][1]["loss"]["value"] = 0.3  # beyond the right edge
    content["methods"][0]["frontier"][1]["loss"] = 0.1
    models = {"original": {"loss": 0.0, "forgetting": 0.0}}
    picture = Frontiers(methods_of(Node(content, "c")), models, compared.LIMITS)
    assert picture.x == pytest.approx((-0.01, 0.2)) and picture.y == (0.0, 1.0)
    assert picture.beyond == 1
    svg = str(picture.all())
    x = {loss: 38 + (loss + 0.01) / 0.21 * (400 - 22 - 38) for loss in (0.0, 0.1, 0.2)}
    y = {level: 246 - level * 236 for level in (0.6, 0.65)}
    corners = [(0.0, 0.6), (0.1, 0.6), (0.1, 0.65), (0.2, 0.65)]
    path = " ".join(f"{x[loss]:.1f},{y[level]:.1f}" for loss, level in corners)
    assert f'<polyline class="front c0 d0" points="{path}"/>' in svg
    # The letter of the setting beyond stands at the edge, and the axis says so.
    assert f'class="badge c0 d0" cx="{x[0.2]:.1f}" cy="{y[0.65]:.1f}"' in svg and "20%+" in svg
