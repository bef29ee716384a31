"""`palu cache` and `palu unlearn --reference cached`: the reference cache on the command line."""

import errno
import json
import os

import pytest
import torch
import typer

from palu.cli import app as cli
from palu.data.template import Template
from palu.reference.cache import ReferenceCache
from palu.unlearn import make_config, unlearn
from tests.support import small
from tests.support.caches import files
from tests.support.command import palu_in, write_data, write_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache-cli")
    for seed, name in enumerate(("model", "other")):
        write_model(folder / name, small.model(small.tokenizer(), seed=seed))
    write_data(folder)
    return folder


@pytest.fixture
def palu(monkeypatch, capsys, work):
    return palu_in(work, monkeypatch, capsys)


@pytest.fixture
def palu_cache(palu):
    """The same for `palu cache ...`."""
    return lambda *words: palu("cache", *words)


BUILD = ["build", "--model", "model", "--forget", "forget.jsonl", "--device", "cpu"]
DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
TRAINING = ["--epochs", 3, "--batch-size", 2, "--learning-rate", 1e-3, "--objective", "entropy"]
UNLEARN = ["unlearn", "--model", "model", *DATA, "--device", "cpu", "--top-k", 5, *TRAINING]
CACHED = [*UNLEARN, "--reference", "cached"]


def record(folder):
    return json.loads((folder / "palu.json").read_text())


def test_build_info_verify(palu_cache, work):
    options = ["--retain", "retain.jsonl", "--retain-loss", "kl", "--top-k", 5]
    status, said, _ = palu_cache(*BUILD, *options, "--prefix-length", 2, "--output", "cache")
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
    assert status == 0 and "built from this model" in said and "data" not in said
    data = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    status, said, _ = palu_cache("verify", "cache", *model, *data)
    assert status == 0 and "this model and this forget data and this retain data" in said
    assert "hidden states computed again differ by 0 (rel" in said and "0.00% of the top-k" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("verify cache --model other", "'cache' does not fit: model is"),
        ("verify cache --model model --forget forget.jsonl[:2]", "forget data is"),
        ("verify cache --model model --retain retain.jsonl", "built without a retain set"),
        ("verify cache --forget forget.jsonl", "--forget and --retain need a --model folder"),
        ("verify nowhere", "nowhere/manifest.json' does not exist"),
        ("info model", "model/manifest.json' does not exist"),
        (" ".join([*BUILD, "--output", "cache"]), "output folder 'cache' is not empty"),
        (
            " ".join([*BUILD, "--output", "model", "--overwrite"]),
            "--overwrite would delete 'model'",
        ),
        (" ".join([*BUILD, "--output", "x", "--top-k", "0"]), "top_k"),
        (
            " ".join([*BUILD, "--output", "x", "--batch-size", "0"]),
            "--batch-size is 0; it must be at least 1",
        ),
        (" ".join([*BUILD, "--output", "x", "--retain-loss", "kl"]), "needs a --retain file"),
        (
            " ".join([*BUILD, "--output", "x", "--select-from", "current", "--preserve", "none"]),
            "nothing to store",
        ),
        (
            "build --model nowhere --forget forget.jsonl --output x",
            "model folder 'nowhere' does not exist",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(palu_cache, work, words, message):
    if not (work / "cache").exists():
        assert palu_cache(*BUILD, "--output", "cache")[0] == 0
    before, old = sorted(work.iterdir()), files(work / "cache")
    if words == "verify cache --model model --retain retain.jsonl":
        palu_cache(*BUILD, "--output", "cache", "--overwrite")
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
        patch.setattr(os, "fsync", full)
        status, _, error = palu_cache(*BUILD, "--output", "hurt", "--overwrite")
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert shard.exists()  # what was there stays until there is something to put in its place
    assert palu_cache(*BUILD, "--output", "hurt", "--overwrite")[0] == 0
    assert palu_cache("verify", "hurt")[0] == 0


def test_options_are_those_of_unlearn():
    commands = typer.main.get_command(cli.app).commands
    unlearn = {p.name: p for p in commands["unlearn"].params}
    build = {p.name: p for p in commands["cache"].commands["build"].params}
    assert set(build) - set(unlearn) == {"train_head"}
    for name in set(build) & set(unlearn):
        assert build[name].opts == unlearn[name].opts, name
        assert build[name].default == unlearn[name].default, name


# ---- palu unlearn --reference cached -------------------------------------------------------------


def test_unlearn_from_a_cache_cold_and_warm(palu, work):
    assert palu(*UNLEARN, "--output", "live")[0] == 0
    options = ["--output", "new", "--max-length", 100, "--repair", "snap"]
    status, said, _ = palu(*CACHED, *options)
    assert status == 0 and "The reference cache is kept in new-reference-cache" in said
    place = work / "new-reference-cache"
    cold, built = record(work / "new"), files(place)
    settings = cold["settings"]
    assert settings["reference"] == "cached"
    assert settings["reference_cache"] == "new-reference-cache"
    status, said, _ = palu(*CACHED, *options, "--overwrite")
    assert status == 0 and "The reference cache was read from new-reference-cache" in said
    assert record(work / "new")["loss_curve"] == cold["loss_curve"] and files(place) == built

    live = record(work / "live")["loss_curve"]
    assert live[1]["preserve"] > 1e-3
    for one, other in zip(live, cold["loss_curve"], strict=True):
        # Adam makes steps of full length out of gradients that are roundings alone (the preserve
        # term's at the start), and later losses feel it; test_objective.py compares in float64.
        close = 1e-4 if one["step"] == 1 else 0.2
        for name in ("forget", "preserve", "retain"):
            assert one[name] == pytest.approx(other[name], rel=close, abs=1e-6), (name, one["step"])

    # What the data were read with is remembered, as `palu cache build` does.
    data = ["--model", "model", "--forget", "forget.jsonl", "--device", "cpu"]
    status, said, _ = palu("cache", "verify", "new-reference-cache", *data)
    assert status == 0 and "built from this model and this forget data" in said
    manifest = ReferenceCache.open(place).manifest
    assert manifest["template"] == repr(Template()) and manifest["notes"]["repair"] == "snap"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_unlearn_takes_what_build_made(palu, work, dtype):
    same = ["--retain", "retain.jsonl", "--retain-loss", "kl", "--top-k", 6, "--dtype", dtype]
    same += ["--max-length", 90, "--preserve", "forward_kl", "--date-string", "x"]
    same += ["--force-template"]
    place = f"of-build-{dtype}"
    assert palu("cache", *BUILD, *same, "--output", place)[0] == 0
    old = files(work / place)
    options = ["--reference-cache", place, "--output", f"from-{dtype}"]
    status, said, error = palu(*CACHED, *same, *options)
    assert status == 0 and f"was read from {place}" in said, error
    assert files(work / place) == old and not (work / f"from-{dtype}-reference-cache").exists()


def test_a_retain_file_that_is_not_used(palu, work):
    words = [*BUILD, "--retain", "retain.jsonl", "--output", "no-retain"]
    status, _, said = palu("cache", *words)
    assert status == 0 and "warning: --retain is not used: --retain-loss nll asks" in said
    assert set(ReferenceCache.open(work / "no-retain").manifest["data"]) == {"forget"}


def test_no_cache_where_nothing_is_asked(palu, work):
    status, said, _ = palu(
        *CACHED, "--preserve", "none", "--select-from", "current", "--output", "q"
    )
    assert status == 0 and "No reference cache: these settings ask" in said
    assert not (work / "q-reference-cache").exists()
    assert record(work / "q")["settings"]["reference_cache"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reference cached --reference-cache here --top-k 6", "top_k is 5 in the cache and 6 he"),
        ("--reference cached --reference-cache here --model other", "does not fit: model is"),
        ("--reference cached --reference-cache here --dtype bfloat16", "dtype is float32 in the"),
        ("--reference cached --reference-cache here --forget forget.jsonl[:2]", "forget data is"),
        ("--reference cached --reference-cache here --retain-loss kl", "without a retain set"),
        ("--reference cached --reference-cache headless", "without a frozen copy of it (--no-tr"),
        ("--reference cached --reference-cache torn", "00000.safetensors' is damaged: its bytes"),
        ("--reference cached --reference-cache model", "'model' is no reference cache: 'model/man"),
        ("--reference cached --reference-cache forget.jsonl", "'forget.jsonl' is a file; name a"),
        ("--reference cached --reference-cache out", "'out' and the output 'out' lie in one anot"),
        ("--reference cached --reference-cache out/cache", "lie in one another; name another"),
        ("--reference cached --reference-cache here --output here/out", "lie in one another"),
        ("--reference-cache here", "--reference-cache 'here' needs --reference cached, not 'live'"),
        ("--reference adapter_off", "--reference adapter_off needs a PEFT model"),
        ("--reference off", "reference must be one of live, adapter_off, cached, not 'off'"),
    ],
)
def test_caches_that_do_not_fit_are_one_line_and_status_2(palu, work, words, message):
    if not (work / "here").exists():
        assert palu("cache", *BUILD, "--top-k", 5, "--output", "here")[0] == 0
        options = ["--top-k", 5, "--output", "headless", "--no-train-head"]
        assert palu("cache", *BUILD, *options)[0] == 0
        assert palu("cache", *BUILD, "--top-k", 5, "--output", "torn")[0] == 0
        shard = work / "torn" / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    output = [] if "--output" in words else ["--output", "out"]
    status, said, error = palu(*UNLEARN, *words.split(), *output)
    assert status == 2 and said == ""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in error
    after = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }
    assert set(after) == set(before)


def test_a_folder_that_is_no_cache_is_found_out_before_the_model_is_loaded(palu, monkeypatch):
    def load_model(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("palu.models.loading.load_model", load_model)
    status, _, error = palu(*CACHED, "--reference-cache", "other", "--output", "out")
    assert status == 2 and "'other' is no reference cache" in error


def test_a_full_disk_in_unlearn_then_room(palu, work, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, error = palu(*CACHED, "--output", "room")
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert not (work / "room").exists() and not (work / "room-reference-cache").exists()
    assert palu(*CACHED, "--output", "room")[0] == 0
    assert {p.name for p in work.glob("*room*")} == {"room", "room-reference-cache"}
    assert not list(work.glob(".room*"))


def test_the_build_is_reported(work, tmp_path):
    tok, seen = small.tokenizer(), []
    place = str(tmp_path / "cache")
    options = {"num_train_epochs": 1, "reference": "cached", "reference_cache": place}
    rows = small.rows(tok)
    unlearn(
        small.model(tok),
        tok,
        rows[:3],
        rows[3:],
        make_config(torch.device("cpu"), per_device_train_batch_size=2, **options),
        lambda done, total, note="": seen.append((done, total, note)),
    )
    assert seen[:2] == [(2, 3, "building the reference cache"), (3, 3, seen[0][2])]
    assert seen[-1][:2] == (2, 2) and "forget" in seen[-1][2]
