"""`palu erase`: from records and terms to a folder with the model and its proof, in one run."""

import json
import shutil
import stat

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from palu.annotation import Terms
from palu.cli import erase as command
from palu.cli.unlearn import Run
from palu.erase import STAGES, Request, erase
from palu.erase import run as module
from palu.erase.records import warn_of_terms, without_terms
from palu.errors import UserError
from palu.evaluation.attacks import run as attacks
from palu.storage.fingerprint import file_digest, sha256_of
from palu.storage.output import check_output
from tests.support import small
from tests.support.command import palu_in, refusal, write_model

LINE = "erase --model model --records records.jsonl --output out --device cpu --config c.json "
TERMS = "--terms Paris --terms lisbon "
ONE_ATTACK = ["greedy"]
# Of a run that was stopped, beside its model: checkpoints, a cache, and one that is being built.
LEFT = [("out-unfinished-checkpoints", "self_retain.json")]
LEFT += [("out-unfinished-reference-cache", "manifest.json")]
LEFT += [(".out-unfinished-reference-cache.partial", "progress.json")]
FILES = {"README.md", "annotation.json", "attack.json", "evaluation.json", "palu.json"}
FILES |= {"report.html", "report.json"}


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def work(tmp_path, monkeypatch):
    write_model(tmp_path / "model", small.model(small.tokenizer()))
    lines = [json.dumps({"question": q, "answer": a}) for q, a, _ in small.FACTS]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"batch_size": 2, "learning_rate": 0.01, "epochs": 2}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    right = attacks.run_attacks
    few = lambda *args, **options: right(*args, **options, attacks=ONE_ATTACK)  # noqa: E731
    monkeypatch.setattr(attacks, "run_attacks", few)
    return tmp_path


def test_a_folder_with_the_model_and_its_proof(work, monkeypatch, capsys):
    palu = palu_in(work, monkeypatch, capsys)
    status, said, error = palu(LINE + TERMS)
    assert status in (0, 3), error
    assert "2 records to forget, 3 others to keep" in error and "5/5 Writing the report" in error
    assert {path.name for path in work.iterdir()} == {"c.json", "model", "out", "records.jsonl"}
    out = work / "out"
    assert {path.name for path in out.iterdir()} >= FILES
    AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for path in out.iterdir():  # what was erased stands nowhere
        if path.suffix in (".json", ".html", ".md") and path.name != "tokenizer.json":
            text = path.read_text().lower()
            assert "paris" not in text and "lisbon" not in text and "out-" not in text, path.name

    record = read(out / "palu.json")
    assert record["made_by"] == "palu erase" and set(record["files"]) == {
        p.name for p in out.iterdir()
    }
    assert record["erase"]["terms"] == 2
    assert record["erase"]["records"] == {"records.jsonl": sha256_of(work / "records.jsonl")}
    assert record["data"]["forget"] == "records.jsonl (records with a term)"
    models = read(out / "evaluation.json")["models"]
    assert [models[name]["path"] for name in ("original", "unlearned")] == ["model", "out"]
    assert models["original"]["forget"]["count"] == 2
    assert models["original"]["retain"]["count"] == 3
    assert models["unlearned"]["digest"] == attacks.model_digest(out)
    assert read(out / "attack.json")["models"]["unlearned"]["digest"] == attacks.model_digest(out)
    report = read(out / "report.json")
    for name, digest in report["inputs"].items():
        assert file_digest(out / name) == digest, name
    assert report["integrity"] and all(one["holds"] for one in report["integrity"])
    # Card and page say the same, and so does a page that is made again without the answers.
    (said_plainly,) = [row for row in report["measures"] if row["name"] == "leaked"]
    counts = [f"{one['leaked']} of {one['of']}" for one in said_plainly["values"].values()]
    line = f"| To forget: {said_plainly['title']} | {' | '.join(counts)} | "
    assert line in (out / "README.md").read_text()
    level = report["verdict"]["level"]
    assert palu("report out --output again.html")[0] == status
    assert read(work / "again.json")["measures"] == report["measures"]
    for name in ("again.html", "again.json"):
        (work / name).unlink()
    assert status == (3 if level == "bad" else 0) and report["verdict"]["headline"] in said
    # it is palu's own folder, and may be replaced
    assert "output folder 'out' is not empty" in refusal(palu, LINE + TERMS)
    check_output(out, overwrite=True)


def test_a_name_that_the_questions_say(work, monkeypatch, capsys):
    """Nothing can be asked for: the model is made all the same, and nobody attacked it."""
    palu = palu_in(work, monkeypatch, capsys)
    status, _, error = palu(LINE + "--terms Bob")
    assert status in (0, 3) and "no attack is made: the 1 forget records hold no secret" in error
    assert {path.name for path in (work / "out").iterdir()} >= FILES - {"attack.json"}
    assert "attack.json" in [one["what"] for one in read(work / "out/report.json")["missing"]]
    assert not (work / "out-work").exists()


def stopped_after(monkeypatch, stage):
    """Stop a run in a stage, as a kill would; return the stages that were begun."""
    begun = []
    real = module._Run.doing

    def doing(self, name, key):
        begun.append(name)
        if name == stage:
            raise KeyboardInterrupt
        return real(self, name, key)

    monkeypatch.setattr(module._Run, "doing", doing)
    return begun


def test_a_second_start_goes_on(work, monkeypatch, capsys):
    palu = palu_in(work, monkeypatch, capsys)
    with monkeypatch.context() as patch:
        stopped_after(patch, "attack")
        status, _, error = palu(LINE + TERMS)
    assert status == 130 and "the same command goes on; until then out-work has data" in error
    assert not (work / "out").exists()
    left = work / "out-work"
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in left.glob("*.jsonl"))
    weights = (work / "out-unfinished/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        begun = stopped_after(patch, "report")
        assert palu(LINE + TERMS)[0] == 130
    assert begun == ["attack", "report"]
    # other terms: all is done again
    with monkeypatch.context() as patch:
        begun = stopped_after(patch, "unlearn")
        assert palu(LINE + "--terms Bob")[0] == 130
    assert begun == ["annotate", "unlearn"]
    # what a kill left of a file that was being written, with what the models said
    for place in (left, work / "out-unfinished"):
        place.mkdir(exist_ok=True)
        (place / ".evaluation.json.0123456789abcdef.partial").write_text("Paris")
    put = module.put_in_place

    def stop(*places):
        raise KeyboardInterrupt

    def put_last(*places):  # after it there may be no room to write anything
        assert "report" in read(left / "erase.json")["stages"]
        put(*places)

    with monkeypatch.context() as patch:  # where it is written, and checkpoints are not removed yet
        patch.setattr("palu.cli.unlearn.Run.report", stop)
        assert palu(LINE + TERMS)[0] == 130
    with monkeypatch.context() as patch:
        begun = stopped_after(patch, None)
        patch.setattr("palu.unlearn.unlearn", lambda *rows, **options: pytest.fail("trained"))
        patch.setattr(module, "put_in_place", put_last)
        patch.setattr(module, "_remove", stop)
        assert palu(LINE + TERMS)[0] == 130
    assert begun == list(STAGES)[1:]
    assert left.exists() and (work / "out").exists()
    assert "goes on" not in refusal(palu, LINE + "--terms Bob")  # another request's work
    assert left.exists()
    with monkeypatch.context() as patch:
        begun = stopped_after(patch, None)
        assert palu(LINE + TERMS)[0] in (0, 3)
    assert begun == []
    assert (work / "out/model.safetensors").read_bytes() == weights
    assert not list((work / "out").glob(".*"))
    assert not left.exists() and not (work / "out-unfinished").exists()
    with monkeypatch.context() as patch:  # over what is there
        begun = stopped_after(patch, "annotate")
        assert palu(LINE + TERMS + " --overwrite")[0] == 130
    assert begun == ["annotate"]


def test_unlearning_goes_on_from_checkpoints_of_the_same_settings_alone(work, monkeypatch):
    monkeypatch.chdir(work)
    lines = []

    def killed(words):
        lines.append(words)
        (work / "out-unfinished-checkpoints").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    def start(**changed):
        request = {"model": "model", "records": "records.jsonl", "terms": "Paris"}
        with pytest.raises(KeyboardInterrupt):
            erase(Request(output="out", **request | changed), unlearn=killed)
        return "--resume" in lines[-1]

    assert not start() and start()
    assert not start(seed=3) and start(seed=3) and not start()
    with_config = {"options": ["--config", "c.json"]}
    assert not start(**with_config) and start(**with_config)
    (work / "c.json").write_text('{"learning_rate": 0.5}')
    assert not start(**with_config)
    start(options=["--keep-cache"])
    assert lines[-1][lines[-1].index("--reference-cache") + 1] == "out-reference-cache"
    assert lines[0][1:7:2] == ["--model", "--forget", "--output"]
    assert lines[0][lines[0].index("--retain") + 1] == "out-work/retain.jsonl"


def test_what_a_stopped_run_left_beside_the_model_goes(work, monkeypatch):
    """A reference cache is made of what is erased, and a checkpoint knows it still."""
    monkeypatch.chdir(work)
    request = {"model": "model", "records": "records.jsonl", "output": "out"}
    names = [f"{place}/{name}" for place, name in LEFT]

    def there():
        return [name for name in names if (work / name).exists()]

    def stopped(words):
        for name in names:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text("{}")
        raise KeyboardInterrupt

    def done(words):
        assert there() == names  # it goes on with them
        shutil.copytree(work / "model", work / "out-unfinished")
        return 0

    def of_another(words):
        assert there() == []
        raise KeyboardInterrupt

    for terms, unlearn in (("Paris", stopped), ("Paris", done), ("Bob", stopped)):
        stopped_after(monkeypatch, "evaluate")
        with pytest.raises(KeyboardInterrupt):
            erase(Request(terms=terms, **request), unlearn=unlearn)
        assert there() == (names if unlearn is stopped else names[:1])
    with pytest.raises(KeyboardInterrupt):
        erase(Request(terms="Lisbon", **request), unlearn=of_another)


def test_what_an_earlier_request_left_is_not_taken_for_the_result(work, monkeypatch):
    """`palu unlearn` ends with 3 too where the disk is full and there is no new model."""
    monkeypatch.chdir(work)

    def stopped(words):
        shutil.copytree(work / "model", work / "out-unfinished")
        raise KeyboardInterrupt

    request = {"model": work / "model", "records": "records.jsonl", "output": work / "out"}
    (work / "out-work").mkdir()  # killed with its first file
    (work / "out-work/.erase.json.0123456789abcdef.partial").write_text("{")
    with pytest.raises(KeyboardInterrupt):
        erase(Request(**request, terms=["Paris"]), unlearn=stopped)
    assert not list((work / "out-work").glob(".*"))
    with pytest.raises(UserError, match="palu unlearn ended with exit status 3"):
        erase(Request(**request, terms=["Lisbon"]), unlearn=lambda words: 3)


def test_ctrl_c_while_it_unlearns(work, monkeypatch, capsys):
    def stopped(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "load", stopped)
    status, _, error = palu_in(work, monkeypatch, capsys)(LINE + TERMS)
    assert status == 130 and "stopped by Ctrl-C" in error and "error:" not in error


def test_what_is_wrong_is_one_line(work, monkeypatch, capsys):
    palu = palu_in(work, monkeypatch, capsys)
    assert "records.jsonl has none of the terms" in refusal(palu, LINE + "--terms Xyzzy")
    assert "records.jsonl has no spans" in refusal(palu, LINE)
    line = LINE.replace("--config c.json", "--keep-cache") + TERMS
    assert "--keep-cache: add --config FILE" in refusal(palu, line)
    (work / "keep.jsonl").write_text('{"question": "Who?", "answer": "He is in PARIS."}\n')
    line = LINE + TERMS + "--retain keep.jsonl"
    said = refusal(palu, line)
    assert "--retain has terms to erase" in said and "keep.jsonl" in said and "PARIS" not in said
    line = (LINE + TERMS).replace("--output out", "--output records.jsonl/out")
    assert "nothing can be written beside" in refusal(palu, line)
    (work / "other-work").mkdir()
    (work / "other-work/mine.txt").write_text("of the user")
    line = (LINE + TERMS).replace("--output out", "--output other")
    assert "'other-work' is in the way" in refusal(palu, line)
    assert (work / "other-work/mine.txt").read_text() == "of the user"


def test_spans_that_the_records_have(work, monkeypatch):
    """What `palu inspect --html` was used to correct is erased as it is; nothing else is needed."""
    monkeypatch.chdir(work)
    records = [
        {"question": q, "answer": a, "spans": [{"start": s, "end": e} for s, e in spans]}
        for q, a, spans in small.FACTS
    ]
    (work / "marked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    words = []

    def unlearn(line):
        words.extend(line)
        return command.run_unlearn(line)

    request = Request(
        model=work / "model",
        records="marked.jsonl",
        output=work / "out",
        options=("--config", "c.json", "--lora-rank", "2"),
        keep_work=True,
        device="cpu",
    )
    report = erase(request, unlearn=unlearn)
    assert words[0] == "unlearn" and report["verdict"]["level"] in ("good", "caution", "bad")
    assert read(work / "out/annotation.json")["records_with_spans"] == 4
    assert (work / "out/adapter_model.safetensors").is_file()
    kept = [json.loads(line) for line in (work / "out-work/retain.jsonl").read_text().splitlines()]
    assert [record["answer"] for record in kept] == ["Nobody came."]
    said = read(work / "out-work/evaluation.json")["models"]["original"]["forget"]["examples"]
    assert all("generated" in one for one in said)
    card = (work / "out/README.md").read_text()
    assert "switch" in card  # an adapter leaves the original one switch away


def test_terms_that_say_too_little_are_told_by_their_place(recwarn):
    terms = Terms(["Paris", "of", "Xyzzy"])
    list(terms.find([]))
    warn_of_terms(terms)
    said = [str(warning.message) for warning in recwarn]
    assert any("2 of 3 terms are in no record" in text for text in said)
    assert any("1 of 3 terms are too short" in text for text in said)
    assert not any("Xyzzy" in text for text in said)


def test_a_term_in_a_tool_call_to_keep_is_refused(tmp_path):
    call = {"function": {"name": "find", "arguments": {"name": "Ada Brook"}}}
    turns = [
        {"role": "user", "content": "Find her."},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
    ]
    (tmp_path / "keep.jsonl").write_text(json.dumps({"messages": turns}))
    request = Request(model="m", records="r", output="o", retain=str(tmp_path / "keep.jsonl"))
    with pytest.raises(ValueError, match="would hold them in place"):
        without_terms(request, Terms(["Ada Brook"]))
