"""`palu cache` and `palu unlearn --reference cached`: the reference cache on the command line."""

import errno
import json
import os
from functools import partial

import pytest
import torch
import typer

from palu.cli.app import app
from palu.data.template import Template
from palu.reference.cache import ReferenceCache
from palu.storage.output import remove_cache
from palu.unlearn import make_config, unlearn
from tests.support import small
from tests.support.caches import files
from tests.support.command import UNLEARN, record, refusal

BUILD = "cache build --model model --forget forget.jsonl --device cpu "
CACHED = UNLEARN + "--learning-rate 0.001 --epochs 3 --reference cached "


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_build_info_verify(palu, work):
    options = "--retain retain.jsonl --retain-loss kl --top-k 5 --prefix-length 2 --output kl"
    status, said, _ = palu(BUILD + options)
    assert status == 0 and "Written to kl: " in said and "with a frozen head" in said
    cache = ReferenceCache.open(work / "kl")
    assert cache.manifest["top_k"] == 5 and cache.manifest["prefix_length"] == 2
    assert cache.manifest["notes"]["max_length"] == 512
    assert set(cache.manifest["data"]) == {"forget", "retain"}
    status, said, _ = palu("cache info kl")
    rows = cache.info()["rows"]
    assert status == 0 and f"forget {rows['forget']}, preserve {rows['preserve']}" in said
    assert cache.starting_model in said and "shard-00001.safetensors" in said

    assert palu("cache verify kl")[0] == 0
    line = "cache verify kl --model model --device cpu"
    status, said, _ = palu(line)
    assert status == 0 and "built from this model" in said and "data" not in said
    status, said, _ = palu(f"{line} --forget forget.jsonl --retain retain.jsonl")
    assert status == 0 and "this model and this forget data and this retain data" in said
    assert "hidden states computed again differ by 0 (rel" in said and "0.00% of the top-k" in said


@pytest.fixture(scope="module")
def caches(work):
    """Makes the caches that the refusals below look at, once."""
    made = []

    def make(palu):
        if not made:
            for line in ("here", "headless --no-train-head", "torn"):
                assert palu(f"{BUILD} --top-k 5 --output {line}")[0] == 0
            shard = work / "torn" / "shard-00000.safetensors"
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
            made.append(True)

    return make


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cache verify here --model other", "'here' does not fit: model is"),
        ("cache verify here --model model --forget forget.jsonl[:2]", "forget data is"),
        ("cache verify here --model model --retain retain.jsonl", "built without a retain set"),
        ("cache verify here --forget forget.jsonl", "--forget and --retain need a --model folder"),
        ("cache verify nowhere", "nowhere/manifest.json' does not exist"),
        ("cache info model", "model/manifest.json' does not exist"),
        (BUILD + "--output here", "output folder 'here' is not empty"),
        (BUILD + "--output model --overwrite", "--overwrite would delete 'model'"),
        (BUILD + "--output x --top-k 0", "top_k"),
        (BUILD + "--output x --batch-size 0", "--batch-size is 0; it must be at least 1"),
        (BUILD + "--output x --retain-loss kl", "needs a --retain file"),
        (BUILD + "--output x --select-from current --preserve none", "nothing to store"),
        (BUILD + "--output x --model nowhere", "model folder 'nowhere' does not exist"),
    ],
)
def test_mistakes_are_one_line_and_status_2(palu, caches, line, message):
    caches(palu)
    assert message in refusal(palu, line)


def test_damage_and_a_full_disk(palu, work, monkeypatch):
    assert palu(BUILD + "--output hurt --no-train-head")[0] == 0
    assert json.loads((work / "hurt" / "manifest.json").read_text())["head_file"] is None
    shard = work / "hurt" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    line = "cache verify hurt"
    assert "hurt/shard-00000.safetensors' is damaged: it has" in refusal(palu, line)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, error = palu(BUILD + "--output hurt --overwrite")
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert shard.exists()  # what was there stays until there is something to put in its place
    assert palu(BUILD + "--output hurt --overwrite")[0] == 0
    assert palu(line)[0] == 0


def test_options_are_those_of_unlearn():
    commands = typer.main.get_command(app).commands
    unlearn = {p.name: p for p in commands["unlearn"].params}
    build = {p.name: p for p in commands["cache"].commands["build"].params}
    assert set(build) - set(unlearn) == {"train_head"}
    for name in set(build) & set(unlearn):
        assert build[name].opts == unlearn[name].opts, name
        assert build[name].default == unlearn[name].default, name


# ---- palu unlearn --reference cached -------------------------------------------------------------


def test_unlearn_from_a_cache_cold_and_warm(palu, work):
    assert palu(CACHED + "--reference live --output live")[0] == 0
    options = "--output new --max-length 100 --repair snap "
    status, said, _ = palu(CACHED + options + "--keep-cache")
    assert status == 0 and "The reference cache is kept in new-reference-cache" in said
    place = work / "new-reference-cache"
    cold, built = record(work / "new"), files(place)
    assert cold["settings"]["reference"] == "cached"
    assert cold["settings"]["reference_cache"] == "new-reference-cache"
    status, said, _ = palu(CACHED + options + "--overwrite")
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
    data = "--model model --forget forget.jsonl --device cpu"
    status, said, _ = palu(f"cache verify new-reference-cache {data}")
    assert status == 0 and "built from this model and this forget data" in said
    manifest = ReferenceCache.open(place).manifest
    assert manifest["template"] == repr(Template()) and manifest["notes"]["repair"] == "snap"


def test_a_cache_of_this_run_alone_is_removed(palu, work):
    """It holds data derived from what was erased; one that the user named is kept."""
    status, said, _ = palu(CACHED + "--output gone")
    assert status == 0 and "The reference cache was removed: it holds data derived" in said
    assert not (work / "gone-reference-cache").exists()
    assert "--keep-cache: this run has no cache" in refusal(
        palu, UNLEARN + "--keep-cache --output x"
    )
    status, said, _ = palu(CACHED + "--output named --reference-cache mine")
    assert status == 0 and "is kept in mine: it holds data derived from what was erased" in said
    (work / "mine" / "note.txt").write_text("of the user")
    remove_cache(work / "mine")
    assert [path.name for path in (work / "mine").iterdir()] == ["note.txt"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_unlearn_takes_what_build_made(palu, work, dtype):
    same = f"--retain retain.jsonl --retain-loss kl --top-k 6 --dtype {dtype} --max-length 90 "
    same += "--preserve forward_kl --date-string x --force-template "
    place = f"of-build-{dtype}"
    assert palu(BUILD + same, "--output", place)[0] == 0
    old = files(work / place)
    options = f"--reference-cache {place} --output from-{dtype}"
    status, said, error = palu(CACHED + same + options)
    assert status == 0 and f"was read from {place}" in said, error
    assert files(work / place) == old and not (work / f"from-{dtype}-reference-cache").exists()


def test_a_retain_file_that_is_not_used(palu, work):
    status, _, said = palu(BUILD + "--retain retain.jsonl --output no-retain")
    assert status == 0 and "warning: --retain is not used: --retain-loss nll asks" in said
    assert set(ReferenceCache.open(work / "no-retain").manifest["data"]) == {"forget"}


def test_no_cache_where_nothing_is_asked(palu, work):
    status, said, _ = palu(CACHED + "--preserve none --select-from current --output q")
    assert status == 0 and "No reference cache: these settings ask" in said
    assert not (work / "q-reference-cache").exists()
    assert record(work / "q")["settings"]["reference_cache"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reference-cache here --top-k 6", "top_k is 5 in the cache and 6 he"),
        ("--reference-cache here --model other", "does not fit: model is"),
        ("--reference-cache here --dtype bfloat16", "dtype is float32 in the"),
        ("--reference-cache here --forget forget.jsonl[:2]", "forget data is"),
        ("--reference-cache here --retain-loss kl", "without a retain set"),
        ("--reference-cache headless", "without a frozen copy of it (--no-tr"),
        ("--reference-cache torn", "00000.safetensors' is damaged: its bytes"),
        ("--reference-cache model", "'model' is no reference cache: 'model/man"),
        ("--reference-cache forget.jsonl", "'forget.jsonl' is a file; name a"),
        ("--reference-cache out", "'out' and the output 'out' lie in one anot"),
        ("--reference-cache out/cache", "lie in one another; name another"),
        ("--reference-cache here --output here/out", "lie in one another"),
        (
            "--reference-cache here --reference live",
            "--reference-cache 'here' needs --reference cached, not 'live'",
        ),
        ("--reference adapter_off", "--reference adapter_off needs a PEFT model"),
        ("--reference off", "reference must be one of live, adapter_off, cached, not 'off'"),
    ],
)
def test_caches_that_do_not_fit_are_one_line_and_status_2(palu, caches, words, message):
    caches(palu)
    assert message in refusal(palu, f"{CACHED} --output out {words}")


def test_a_folder_that_is_no_cache_is_found_out_before_the_model_is_loaded(palu, monkeypatch):
    monkeypatch.setattr("palu.models.loading.load_model", None)
    line = CACHED + "--reference-cache other --output out"
    assert "'other' is no reference cache" in refusal(palu, line)


def test_a_full_disk_in_unlearn_then_room(palu, work, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, error = palu(CACHED + "--output room")
    assert status == 2 and "No space left on device" in error and "Traceback" not in error
    assert not (work / "room").exists() and not (work / "room-reference-cache").exists()
    assert palu(CACHED + "--output room")[0] == 0
    assert {p.name for p in work.glob("*room*")} == {"room"}
    assert not list(work.glob(".room*"))


def test_the_build_is_reported(tmp_path):
    tok, seen = small.tokenizer(), []
    options = partial(make_config, torch.device("cpu"), per_device_train_batch_size=2)
    place = str(tmp_path / "cache")
    config = options(num_train_epochs=1, reference="cached", reference_cache=place)
    rows = small.rows(tok)
    unlearn(small.model(tok), tok, rows[:3], rows[3:], config, lambda *a, **k: seen.append((a, k)))
    note = {"note": "building the reference cache"}
    assert seen[:2] == [((2, 3), note), ((3, 3), note)]
    assert seen[-1][0][:2] == (2, 2) and "forget" in seen[-1][0][2]
