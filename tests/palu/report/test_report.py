"""What a report says: its numbers are those of the files, and no secret is in it."""

import hashlib
import json
import re

import pytest

from palu.data.files import load_examples
from palu.data.records import data_digest
from palu.evaluation.attacks.run import model_digest
from palu.evaluation.leaks import leaks
from palu.report import build_report, write_card
from tests.support import erasure
from tests.support.command import palu_in, refusal

SAID = [word for pair in erasure.SECRETS for word in pair]


@pytest.fixture
def palu(tmp_path, monkeypatch, capsys):
    return palu_in(tmp_path, monkeypatch, capsys)


def text_of(path):
    """The page's text, without tags and style."""
    page = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def outcome(**changed):
    record = erasure.record()
    record["outcome"] |= changed
    return record


def leaking(unlearned, retrained=None):
    """An attack file with one attack."""
    attack = erasure.attack()
    attack["attacks"] = attack["attacks"][:1]
    results = attack["attacks"][0]["results"]
    results["unlearned"] = erasure.leaked(unlearned, 12)
    results.pop("retrained")
    if retrained is not None:
        results["retrained"] = erasure.leaked(retrained, 12)
    return attack


def answered(folder, number, **row):
    """The page's text where the unlearned model gives another answer to one record."""
    evaluation = erasure.evaluation()
    evaluation["models"]["unlearned"]["forget"]["examples"][number] |= row
    model = erasure.write(folder, evaluation=evaluation)
    build_report(model)
    return text_of(model / "report.html")


def test_it_says_what_was_measured(tmp_path):
    model = erasure.write(tmp_path)
    report = build_report(model)
    assert json.loads((model / "report.json").read_text()) == report
    request = report["request"]
    assert [request[name] for name in ("records", "records_with_spans", "spans")] == [6, 6, 12]
    assert {one["annotator"]: one["spans"] for one in request["found_by"]} == {
        "terms": 8,
        "pii": 1,
        "terms+pii": 3,
    }
    assert (request["terms"], request["terms_not_found"]) == (13, 1)
    rows = {(r["set"], r["name"], r["source"]): r["values"] for r in report["measures"]}
    assert rows["forget", "sensitive_probability", "evaluation"] == {
        "original": 0.98,
        "unlearned": 0.02,
        "retrained": 0.015,
    }
    # All answers of the original say both secrets, none of the others'.
    counts = {"original": 12, "unlearned": 0, "retrained": 0}
    assert rows["forget", "leaked", "evaluation"] == {
        name: {"leaked": n, "of": 12} for name, n in counts.items()
    }
    assert ("forget", "sensitive_probability", "run") not in rows  # measured again, of more models
    # What the run counts is another number: it goes on in every turn, after the true text.
    assert rows["forget", "continued", "run"] == {
        "original": {"leaked": 12, "of": 12},
        "unlearned": {"leaked": 0, "of": 12},
    }
    assert rows["retain", "retain_probability", "run"] == {"original": 0.972, "unlearned": 0.958}
    assert report["columns"] == ["original", "unlearned", "retrained"]
    original = {"path": "../chat-model", "digest": "1" * 64, "files": {}}
    assert report["models"]["original"] == original and report["integrity"] == []
    assert report["attacks"]["attacks"][0]["title"] == "first 3 tokens given away"
    assert report["attacks"]["worst"]["results"]["unlearned"]["leaked"] == 3
    assert report["missing"] == []
    said = text_of(model / "report.html")
    for words in (
        "The worst leak: first 3 tokens given away. It brought out 3 of 12 secrets (25%;",
        "between 9% and 53%). The original model gives away 12 of 12. A model that never saw the "
        "records gives away 1 of 12.",
        "12 passages in 6 of 6 records",
        "1 of them found in no record",
        "palu 0.2.0",
        "2026-11-28T09:00:00+00:00",
        "98.6%",
        "bitsandbytes: the package is not installed",
        "learning_rate 2e-05 0.06 / hidden size 3000",
    ):
        assert words in said, words


@pytest.mark.parametrize(
    ("status", "leaked", "retrained", "level", "words"),
    [
        ("forgotten", 0, None, "good", "Erased, as far as was measured"),
        ("forgotten", 1, None, "bad", "an attack still brings secrets out"),  # 8%, the limit is 5%
        ("forgotten", 1, 1, "good", "Erased"),  # no more than a model that never saw them
        ("forgotten", 2, 1, "bad", "an attack still"),
        ("forgotten", None, None, "caution", "nobody attacked"),
        ("known", 0, None, "bad", "still knows"),
        ("harmed", 0, None, "bad", "Erased, but the rest of the model was harmed"),
        ("harmed", 5, None, "bad", "an attack still brings secrets out, and the rest was harmed"),
        ("known and harmed", None, None, "bad", "Not erased, and the rest"),
        (None, 0, None, "caution", "Not judged"),
        (None, 5, None, "bad", "an attack still brings secrets out"),
    ],
)
def test_the_verdict(tmp_path, status, leaked, retrained, level, words):
    record = outcome(status=status)
    if status is None:
        del record["outcome"]
    attack = None if leaked is None else leaking(leaked, retrained)
    model = erasure.write(tmp_path, palu=record, attack=attack)
    verdict = build_report(model)["verdict"]
    assert verdict["level"] == level and words in verdict["headline"]
    assert words in text_of(model / "report.html")


@pytest.mark.parametrize(("retrained", "level"), [(0, "bad"), (1, "good")])
def test_what_plain_answers_say_counts(tmp_path, retrained, level):
    """Whatever the run itself found: 2 of 12 secrets are 17%."""
    evaluation = erasure.evaluation()
    evaluation["models"]["unlearned"]["forget"] = erasure.result(0.02, 1)
    evaluation["models"]["retrained"]["forget"] = erasure.result(0.02, retrained)
    model = erasure.write(tmp_path, evaluation=evaluation, attack=leaking(0))
    assert build_report(model)["verdict"]["level"] == level
    said = text_of(model / "report.html")
    assert ("Asked plainly, it says 2 of 12 secrets." in said) == (level == "bad")


@pytest.mark.parametrize(
    ("data", "unlearned", "others", "level", "words"),
    [
        (
            "retain",
            {"fell_apart": 0.4},
            {},
            "bad",
            "40% of its answers to what was to be kept",
        ),
        (
            "forget",
            {"fell_apart": 0.4},
            {},
            "caution",
            "40% of its answers to what was to be",
        ),
        ("retain", {"fell_apart": 0.4}, {"fell_apart": 0.35}, "good", ""),  # cut off everywhere
        ("forget", {"fell_apart": 0.05}, {}, "good", ""),
        ("retain", {"fluency": 0.4}, {"fluency": 0.9}, "bad", "hardly text"),
        ("forget", {"fluency": 0.1}, {"fluency": 0.3}, "caution", "as likely as 0.1, and one of a"),
        ("forget", {"fluency": 0.2}, {"fluency": 0.3}, "good", ""),
    ],
)
def test_answers_that_fell_apart_are_said(tmp_path, data, unlearned, others, level, words):
    """Whatever the run found, and however little is leaked."""
    evaluation = erasure.evaluation()
    for name, models in (("unlearned", unlearned), ("retrained", others), ("original", others)):
        part = evaluation["models"][name][data] = json.loads(
            json.dumps(evaluation["models"][name][data])
        )
        part["mean"] |= {"fell_apart": 0.0} | models
    if data == "forget" and "fluency" in others:  # its own answers hold the secrets
        evaluation["models"]["original"][data]["mean"]["fluency"] = 0.99
    model = erasure.write(tmp_path, evaluation=evaluation, attack=leaking(0))
    report = build_report(model)
    assert report["verdict"]["level"] == level
    assert len(report["verdict"]["fallen_apart"]) == bool(words)
    said = text_of(model / "report.html")
    assert words in said and "Answers that fell apart" in said
    assert ("Erased, but" in report["verdict"]["headline"]) == bool(words)
    if words:
        write_card(model, content=report)
        assert words in (model / "README.md").read_text()


def test_what_to_change_is_said(tmp_path):
    reasons, advice = ["7 of 12 are still said."], ["Give it more --epochs."]
    record = outcome(status="known", reasons=reasons, advice=advice)
    model = erasure.write(tmp_path, palu=record)
    build_report(model)
    said = text_of(model / "report.html")
    assert reasons[0] in said and f"What to change {advice[0]}" in said


def test_own_answers_are_no_file_of_what_to_keep(tmp_path):
    """A file that was evaluated afterwards tells more of what was kept."""
    record = erasure.record()
    record["data"] |= {"retain": "self", "self_retain": {"examples": 575}}
    model = erasure.write(tmp_path, palu=record)
    report = build_report(model)
    said = text_of(model / "report.html")
    assert "To keep 575 answers that the original model itself gave; no file was given" in said
    assert report["kept"] == 1.0  # of evaluation.json, which has the same numbers for both


def test_no_secret_is_in_it(tmp_path):
    """Neither in page, numbers nor card, not even where a file or a setting is named after one."""
    record = erasure.record()
    record["data"]["retain"] = "without-anna-bell.jsonl"
    record["settings"]["run_name"] = "for Omar Haddad"
    record["chosen"]["run_name"] = {"value": "Per Lund", "why": "07700 900 181"}
    record["base_model"] = "../models-of-liu-wen"
    model = erasure.write(tmp_path, palu=record)
    build_report(model)
    write_card(model)
    page, numbers = (model / name for name in ("report.html", "report.json"))
    for secret in SAID:
        assert not leaks(secret, text_of(page)) and not leaks(secret, numbers.read_text()), secret
    assert not re.search("anna|haddad|liu|07700|900", text_of(page) + numbers.read_text(), re.I)
    assert not any(leaks(secret, (model / "README.md").read_text()) for secret in SAID)
    assert 'role="img" aria-label="masked"' in page.read_text()


def test_other_people_are_masked_too(tmp_path):
    text = "Write to jo.doe@example.org or call +44 (0) 20 7946 0999."
    said = answered(tmp_path, 0, generated=text)
    assert "Write to" in said and "example.org" not in said and "7946" not in said


def test_secrets_are_shown_when_asked(tmp_path):
    model = erasure.write(tmp_path)
    build_report(model, show_secrets=True)
    said = text_of(model / "report.html")
    assert "This page shows the secrets." in said and "True answer" in said
    assert all(leaks(secret, said) for secret in SAID)
    assert not any(leaks(secret, (model / "report.json").read_text()) for secret in SAID)


@pytest.mark.parametrize("name", ["palu", "annotation", "evaluation", "attack"])
def test_what_is_missing_is_said(tmp_path, name):
    model = erasure.write(tmp_path, **{name: None})
    report = build_report(model, forget=tmp_path / "forget.jsonl")
    assert f"{name}.json" in [one["what"] for one in report["missing"]]
    said = text_of(model / "report.html")
    assert "What is missing in this report" in said and f"{name}.json :" in said
    assert report["request"]["spans"] == 12


@pytest.mark.parametrize("name", ["annotation", "evaluation"])
def test_the_command_for_what_is_missing_writes_it(tmp_path, name):
    """Without `--json` neither `palu annotate` nor `palu evaluate` leaves the file."""
    model = erasure.write(tmp_path, **{name: None})
    report = build_report(model, forget=tmp_path / "forget.jsonl")
    (command,) = [m["command"] for m in report["missing"] if m["what"] == f"{name}.json"]
    assert command.endswith(f"--json {model.name}/{name}.json")


def test_one_model_alone(tmp_path):
    """What `palu evaluate --json` writes is of the unlearned model."""
    alone = {"model": "unlearned", "template": {}, "versions": {}, "summary": {}}
    alone |= {"forget": erasure.result(0.02, 1), "retain": erasure.result(0.96, 0)}
    model = erasure.write(tmp_path, palu=None, annotation=None, attack=None, evaluation=alone)
    report = build_report(model, forget=tmp_path / "forget.jsonl")
    rows = {(r["set"], r["name"]): r["values"] for r in report["measures"]}
    assert rows["forget", "leaked"] == {"unlearned": {"leaked": 2, "of": 12}}
    assert "a retrained model" in [one["what"] for one in report["missing"]]


def test_answers_that_leak_come_first(tmp_path):
    said = answered(tmp_path, 4, generated="That is Per Lund.", leaked=1)
    assert said.index("Record 5") < said.index("Record 1")
    assert "says 1 of 2 secrets That is" in said


def test_an_answer_has_the_number_of_its_record(tmp_path):
    evaluation = erasure.evaluation()
    for one in evaluation["models"].values():
        for row, name in zip(one["forget"]["examples"], ("0#1", "0#2"), strict=False):
            row["id"] = name
        one["forget"]["examples"][2]["id"] = "1"
        del one["forget"]["examples"][3:]
    model = erasure.write(tmp_path, evaluation=evaluation)
    turns = [
        {"role": role, "content": one[key]}
        for one in erasure.forget_records()
        for role, key in (("user", "question"), ("assistant", "answer"))
    ]
    lines = [{"messages": turns[:4]}, {"messages": turns[4:6]}]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build_report(model, forget=tmp_path / "forget.jsonl")
    shown = re.findall(r"Record (\d+) Question (.*?\?)", text_of(model / "report.html"))
    assert [number for number, _ in shown] == ["1", "1", "2"]


def test_documents_are_not_asked(tmp_path):
    """What the answers of the other records say counts all the same."""
    evaluation = erasure.evaluation()
    for model in evaluation["models"].values():
        model["forget"]["examples"][0] |= {"generated": None, "leaked": None}
    evaluation["models"]["unlearned"]["forget"]["examples"][4] |= {"leaked": 1}
    report = build_report(erasure.write(tmp_path, evaluation=evaluation))
    (values,) = [one["values"] for one in report["measures"] if one["name"] == "leaked"]
    assert values["original"] == {"leaked": 10, "of": 10}
    assert values["unlearned"] == {"leaked": 1, "of": 10}
    assert report["verdict"]["plain_leak"] == "Asked plainly, it says 1 of 10 secrets."


def test_attacks_that_succeed_are_shown_first(tmp_path):
    attack = erasure.attack()
    one = attack["examples"][0]
    attack["examples"] = [
        one | {"prompt": f"prompt {number}", "leaks": {"unlearned": number == 9}}
        for number in range(10)
    ]
    model = erasure.write(tmp_path, attack=attack)
    build_report(model)
    said = text_of(model / "report.html")
    assert said.index("prompt 9") < said.index("prompt 0") and "prompt 5" not in said


def test_without_the_file_nothing_can_be_masked(tmp_path):
    """So no answer is shown; those of the attacks are where palu attack has masked them."""
    attack = erasure.attack()
    attack["examples"][0]["prompt"] = "A prompt without secrets"
    for shown in (None, True, False):
        attack["settings"] = {} if shown is None else {"show_secrets": shown}
        (tmp_path / str(shown)).mkdir()
        model = erasure.write(tmp_path / str(shown), attack=attack)
        (model.parent / "forget.jsonl").unlink()
        build_report(model)
        said = text_of(model / "report.html")
        assert "name it with --forget" in said and "Who owns account" not in said
        assert ("A prompt without secrets" in said) == (shown is False)
    with pytest.raises(ValueError, match="--show-secrets: the file that was forgotten"):
        build_report(model, show_secrets=True)


def test_another_file_by_the_same_name(tmp_path):
    model = erasure.write(tmp_path)
    (tmp_path / "forget.jsonl").write_text('{"id": "x", "question": "q", "answer": "Anna Bell"}\n')
    report = build_report(model)
    assert report["measures"] and "is not what was measured" in text_of(model / "report.html")
    with pytest.raises(ValueError, match=r"models.original.forget.examples\[0\].id"):
        build_report(model, forget=tmp_path / "forget.jsonl")


def test_an_attack_on_a_part_of_the_records(tmp_path):
    model = erasure.write(tmp_path, attack=erasure.attack() | {"records": 2})
    build_report(model)
    assert "Only 2 of the 6 records to forget were attacked" in text_of(model / "report.html")
    (whole := tmp_path / "whole").mkdir()
    assert not any("were attacked" in one for one in build_report(erasure.write(whole))["limits"])


def test_secrets_that_were_cut_off_are_said(tmp_path):
    attack = erasure.attack()
    attack["skipped"].append(
        {"name": "prefix_forcing", "why": "2 secrets that max_length=512 cuts off"}
    )
    limits = build_report(erasure.write(tmp_path, attack=attack))["limits"]
    old = [one for one in limits if "There are 2 secrets that max_length=512 cuts off" in one]
    assert len(old) == 1
    # A field of its own since: an attack need not have been skipped for it.
    attack |= {"skipped": [], "cut_off": 2, "settings": {"max_length": 512}}
    (new := tmp_path / "new").mkdir()
    assert old[0] in build_report(erasure.write(new, attack=attack))["limits"]


@pytest.mark.parametrize(
    ("aside", "cut_off", "level", "words"),
    [
        (0, 0, "good", None),
        (3, 0, "caution", "3 records have a value to erase in a tool call"),
        (0, 2, "caution", "There are 2 secrets that max_length=96 cuts off"),
    ],
)
def test_nothing_is_well_where_secrets_stand_elsewhere(tmp_path, aside, cut_off, level, words):
    attack = leaking(0) | {"cut_off": cut_off, "settings": {"max_length": 96}}
    annotation = erasure.annotation() | {"records_aside": aside}
    report = build_report(erasure.write(tmp_path, attack=attack, annotation=annotation))
    assert report["verdict"]["level"] == level
    assert ("some of it is elsewhere" in report["verdict"]["headline"]) == (words is not None)
    assert words is None or any(words in one for one in report["limits"])


@pytest.mark.parametrize("others", [False, True])
def test_an_attack_on_other_records(tmp_path, others):
    model = erasure.write(tmp_path)
    digest = data_digest(load_examples(tmp_path / "forget.jsonl", require_spans=False)[others:])
    attack = erasure.attack() | {"settings": {"data": {"forget": digest}, "show_secrets": True}}
    (model / "attack.json").write_text(json.dumps(attack))
    limits = build_report(model)["limits"]
    assert others == any("were not of the records to forget" in one for one in limits)
    # Which secrets the answers to others give away is not known: they could not be masked.
    assert others != ("a, the office." in text_of(model / "report.html"))


def test_an_adapter(tmp_path):
    record = erasure.record() | {"lora": {"rank": 16, "alpha": 32}}
    model = erasure.write(tmp_path, palu=record)
    assert any("switch the adapter off" in limit for limit in build_report(model)["limits"])
    assert "adapter: rank 16" in text_of(model / "report.html")


def test_the_model_in_the_folder_is_the_one_that_was_measured(tmp_path):
    """By the digests of the run, of the evaluation and of the attacks."""
    model = erasure.write(tmp_path)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    forget = tmp_path / "forget.jsonl"
    sums = {
        name: hashlib.sha256((model / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    record, evaluation, attack = erasure.record(), erasure.evaluation(), erasure.attack()
    data = {"forget": {"old-name.jsonl": hashlib.sha256(forget.read_bytes()).hexdigest()}}
    record["digests"] = {"algorithm": "sha256", "model": {"a": "b"}, "output": sums, "data": data}
    for content in (evaluation, attack):
        content["models"]["unlearned"]["digest"] = model_digest(model)
    for name, content in (("palu", record), ("evaluation", evaluation), ("attack", attack)):
        (model / f"{name}.json").write_text(json.dumps(content))
    report = build_report(model)
    assert [one["holds"] for one in report["integrity"]] == [True] * 3
    assert report["models"]["unlearned"]["files"] == sums
    said = text_of(model / "report.html")
    assert sums["model.safetensors"] in said and data["forget"]["old-name.jsonl"] in said
    assert "The model that was attacked is the one in this folder." in said

    (model / "model.safetensors").write_bytes(b"others")
    report = build_report(model)
    assert not any(one["holds"] for one in report["integrity"])
    assert report["verdict"]["headline"] == "These numbers are not of the model in this folder"
    assert report["verdict"]["level"] == "bad"
    said = text_of(model / "report.html")
    assert "These files of the model are not those that the run wrote: model.safetensors." in said

    forget.write_text(forget.read_text() + "\n")
    build_report(model)
    assert "has changed since it was forgotten" in text_of(model / "report.html")


def test_evaluated_and_attacked_are_the_same_models(tmp_path):
    attack = erasure.attack()
    attack["models"]["original"]["digest"] = "9" * 64
    report = build_report(erasure.write(tmp_path, attack=attack))
    assert report["verdict"]["level"] == "bad"
    assert "The original model that was attacked is not" in report["integrity"][0]["what"]


def cut(name, *path, value):
    """A change of one field of a file."""
    content = getattr(erasure, {"palu": "record"}.get(name, name))()
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return {name: content}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (cut("palu", "outcome", "status", value="fine"), "palu.json: outcome.status is a text; it"),
        (
            cut("palu", "outcome", "after", "leaked", value=13),
            "outcome.after.leaked is 13; it must",
        ),
        (cut("palu", "outcome", "before", "leaked", value=True), "before.leaked is True; it must"),
        (cut("palu", "settings", value=[]), "palu.json: settings is a list; it must be an object"),
        (cut("palu", "chosen", "learning_rate", value=1), "chosen.learning_rate is 1; it must be"),
        (cut("annotation", "format", value="x/1"), "annotation.json: format is a text; it must be"),
        (cut("annotation", "spans", value=-1), "annotation.json: spans is -1; it must be a whole"),
        (cut("annotation", "spans", value="Anna Bell"), "spans is a text; it must be a whole"),
        (cut("attack", "format", value="palu-attack/2"), "'palu-attack/1': this is another file"),
        (
            cut("attack", "attacks", value={}),
            "attacks is an object; it must be a list",
        ),
        (
            cut("attack", "attacks", 1, "results", "unlearned", "leaked", value=13),
            "attacks[1].results.unlearned.leaked is 13; it must be at most 12",
        ),
        (
            cut("attack", "attacks", 1, "results", "unlearned", "rate", value=0.5),
            "attacks[1].results.unlearned.rate is 0.5; it must be leaked / of, 3 / 12",
        ),
        (
            cut(
                "evaluation", "models", "original", "forget", "mean", "answer_probability", value=2
            ),
            "models.original.forget.mean.answer_probability is 2; it must be a number between",
        ),
        (
            cut("evaluation", "models", value=None),
            "evaluation.json: has neither 'models' nor 'model' and 'forget'",
        ),
    ],
)
def test_a_damaged_file_is_one_line(palu, files, words):
    erasure.write(palu.folder, **files)
    assert words in refusal(palu, "report unlearned")


def test_files_that_are_no_json(palu):
    model = erasure.write(palu.folder)
    for content, words in (
        ('{"format": "palu-at', "attack.json is not readable JSON"),
        ("[]", "attack.json must hold a JSON object"),
        ("\x1f\x8b", "attack.json"),
        (
            json.dumps(leaking(1)).replace('"of": 12', '"of": NaN'),
            "results.original.of is nan; it must be a whole number",
        ),
    ):
        (model / "attack.json").write_text(content)
        assert words in refusal(palu, "report unlearned")


def test_places_that_are_refused(palu):
    erasure.write(palu.folder)
    (palu.folder / "mine.html").write_text("<p>mine")
    (palu.folder / "other.json").write_text('{"a": 1}')
    (palu.folder / "empty").mkdir()
    for line, words in (
        ("nowhere", "nowhere: no such file or folder"),
        ("mine.html", "mine.html: is a file; name the folder"),
        ("empty", "has none of palu.json, annotation.json, evaluation.json, attack.json"),
        ("unlearned --output mine.html", "exists and palu report did not write it"),
        ("unlearned --output other.html", "'other.json' exists and palu report did not write it"),
        ("unlearned --output report.pdf", "must end with .html"),
        ("unlearned --output no/report.html", "does not exist"),
        ("unlearned --output unlearned/palu.html", "is an input of the report"),
        ("unlearned --forget no.jsonl", "no.jsonl: no such file"),
    ):
        assert words in refusal(palu, f"report {line}"), line


def test_the_command(palu):
    erasure.write(palu.folder)
    for _ in range(2):  # its own files are written anew
        status, said, error = palu("report unlearned --output report.html")
        assert status == 3 and error == ""
        assert "Not erased: an attack still brings secrets out" in said
        assert "The worst leak: first 3 tokens given away." in said
        assert "Written to report.html and report.json" in said
        assert (palu.folder / "report.html").is_file() and (palu.folder / "report.json").is_file()
    (palu.folder / "unlearned" / "attack.json").unlink()  # a caution is no failure
    assert palu("report unlearned --output report.html")[0] == 0
