"""`palu cache`: the command line of the reference cache."""

import errno
import json
import os
import sys

import pytest
import small
import typer
from caches import files

import palu.cache_files
from palu import cli
from palu.cache import ReferenceCache
from palu.demo_people import write_jsonl
from palu.labels import Template
from palu.unlearn import save_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache-cli")
    tok = small.tokenizer()
    save_model(folder / "model", small.model(tok), tok, Template(), made_by="test")
    save_model(folder / "other", small.model(tok, seed=1), tok, Template(), made_by="test")
    records = [
        {"question": q, "answer": a, "spans": [{"start": s, "end": e} for s, e in spans]}
        for q, a, spans in small.FACTS
    ]
    write_jsonl(folder / "forget.jsonl", records[:3])
    write_jsonl(folder / "retain.jsonl", records[3:])
    return folder


@pytest.fixture
def palu_cache(monkeypatch, capsys, work):
    """Runs `palu cache ...` in this process: (exit status, stdout, stderr)."""
    monkeypatch.chdir(work)
    for name in ("out", "bars"):
        monkeypatch.setattr(getattr(cli, name), "_width", 240)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["palu", "cache", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


BUILD = ["build", "model", "--forget", "forget.jsonl", "--device", "cpu"]


def test_build_info_verify(palu_cache, work):
    options = ["--retain", "retain.jsonl", "--retain-loss", "kl", "--top-k", 5]
    status, said, _ = palu_cache(*BUILD, *options, "--prefix-length", 2, "--out", "cache")
    assert status == 0 and "Written to cache: " in said and "with a frozen head" in said
    cache = ReferenceCache.open(work / "cache")
    assert cache.manifest["top_k"] == 5 and cache.manifest["prefix_length"] == 2
    assert cache.manifest["notes"]["max_length"] == 512 and set(cache.manifest["data"]) == {
        "forget",
        "retain",
    }
    status, said, _ = palu_cache("info", "cache")
    rows = cache.info()["rows"]
    assert status == 0 and f"forget {rows['forget']}, preserve {rows['preserve']}" in said
    assert cache.starting_model in said and "shard-00001.safetensors" in said

    assert palu_cache("verify", "cache")[0] == 0
    model = ["--model", "model", "--device", "cpu"]
    status, said, _ = palu_cache("verify", "cache", *model)
    assert status == 0 and "the model is the one it was built from" in said
    data = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    status, said, _ = palu_cache("verify", "cache", *model, *data)
    assert status == 0 and "hidden computed again: off by 0" in said and "indices" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("verify cache --model other", "'cache' does not fit: model is"),
        ("verify cache --model model --forget forget.jsonl[:2]", "forget data is"),
        ("verify cache --model model --retain retain.jsonl", "built without a retain set"),
        ("verify cache --forget forget.jsonl", "--forget and --retain need --model"),
        ("verify nowhere", "nowhere/manifest.json' does not exist"),
        ("info model", "model/manifest.json' does not exist"),
        (" ".join([*BUILD, "--out", "cache"]), "output folder 'cache' is not empty"),
        (" ".join([*BUILD, "--out", "model", "--overwrite"]), "--overwrite would delete 'model'"),
        (" ".join([*BUILD, "--out", "x", "--top-k", "0"]), "top_k"),
        (" ".join([*BUILD, "--out", "x", "--batch-size", "0"]), "--batch-size must be at least 1"),
        (" ".join([*BUILD, "--out", "x", "--retain-loss", "kl"]), "needs a --retain file"),
        (" ".join([*BUILD, "--out", "x", "--retain", "retain.jsonl"]), "for --retain-loss kl"),
        (
            " ".join([*BUILD, "--out", "x", "--select-from", "current", "--preserve", "none"]),
            "nothing to store",
        ),
        ("build nowhere --forget forget.jsonl --out x", "model folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line_and_status_2(palu_cache, work, words, message):
    if not (work / "cache").exists():
        assert palu_cache(*BUILD, "--out", "cache")[0] == 0
    before, old = sorted(work.iterdir()), files(work / "cache")
    if words == "verify cache --model model --retain retain.jsonl":
        palu_cache(*BUILD, "--out", "cache", "--overwrite")
        old = files(work / "cache")
    status, said, error = palu_cache(*words.split())
    assert status == 2 and said == ""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in error
    assert sorted(work.iterdir()) == before and files(work / "cache") == old


def test_damage_and_a_full_disk(palu_cache, work, monkeypatch):
    assert palu_cache(*BUILD, "--output", "hurt", "--no-train-head")[0] == 0
    assert json.loads((work / "hurt" / "manifest.json").read_text())["head_file"] is None
    shard = work / "hurt" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    status, _, error = palu_cache("verify", "hurt")
    assert status == 2 and "hurt/shard-00000.safetensors' is damaged: it has" in error

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(palu.cache_files.os, "fsync", full)
        status, _, error = palu_cache(*BUILD, "--out", "hurt", "--overwrite")
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert shard.exists()  # what was there stays until there is something to put in its place
    assert palu_cache(*BUILD, "--out", "hurt", "--overwrite")[0] == 0
    assert palu_cache("verify", "hurt")[0] == 0


def test_options_are_those_of_unlearn():
    commands = typer.main.get_command(cli.app).commands
    unlearn = {p.name: p for p in commands["unlearn"].params}
    build = {p.name: p for p in commands["cache"].commands["build"].params}
    own = {"train_head"}
    assert set(build) - set(unlearn) == own
    for name in set(build) - own - {"model", "output", "help"}:
        assert build[name].opts == unlearn[name].opts, name
        assert build[name].default == unlearn[name].default, name
