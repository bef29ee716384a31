"""A cache that was hurt, and a build that was: a clear error or a clean resume."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

import palu.reference.manifest
from palu.data.template import Template
from palu.reference.cache import (
    CacheDamaged,
    CacheError,
    CacheMismatch,
    CacheWriteError,
    ReferenceCache,
)
from palu.reference.verify import verify_cache
from palu.storage.fingerprint import model_fingerprint
from tests.support import ROOT, small
from tests.support.caches import files, loss_of


def test_every_flipped_bit_is_seen(build, tok, rows):
    cache = build(small.model(tok), retain_dataset=rows[3:])
    names = sorted(files(cache.path))
    assert names[:2] == ["head.safetensors", "manifest.json"] and len(names) == 5
    for name in names:
        path = cache.path / name
        good = path.read_bytes()
        places = range(0, len(good), 101 if name.endswith("json") else len(good) // 7)
        for place in [*places, len(good) - 1]:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(CacheError, match=name):
                ReferenceCache.open(cache.path)
        for length in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:length])
            with pytest.raises(CacheError, match=name):
                ReferenceCache.open(cache.path)
        path.write_bytes(good + b"\n")
        with pytest.raises(CacheDamaged, match=name):
            ReferenceCache.open(cache.path)
        path.unlink()
        with pytest.raises(CacheDamaged, match=f"{name}' (is missing|does not exist)"):
            ReferenceCache.open(cache.path)
        path.write_bytes(good)
    assert ReferenceCache.open(cache.path).manifest == cache.manifest


def test_two_shards_that_changed_places(build, tok):
    cache = build(small.model(tok), batch_size=1, data=None)
    first, second = (cache.path / f"shard-0000{n}.safetensors" for n in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CacheDamaged, match=r"shard-00000\.safetensors"):
        ReferenceCache.open(cache.path)


def test_a_newer_version(build, tok):
    cache = build(small.model(tok))
    path = cache.path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(CacheMismatch, match="format version is 2, this palu reads 1"):
        ReferenceCache.open(cache.path)
    path.write_text(json.dumps({"some": "json"}))
    with pytest.raises(CacheMismatch, match=r"manifest\.json' is not the manifest"):
        ReferenceCache.open(cache.path)
    with pytest.raises(CacheDamaged, match=r"nowhere.* does not exist"):
        ReferenceCache.open(cache.path / "nowhere")


def test_a_full_disk_then_room(build, tok, tmp_path, monkeypatch):
    model = small.model(tok)
    whole = build(model, "whole")
    real, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) > 8:  # the head, the first shard, and the record of each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheWriteError, match=r"No space left on device.*goes on") as caught:
            build(model)
    assert caught.value.errno == errno.ENOSPC and ".cache.partial" in caught.value.filename
    assert not (tmp_path / "cache").exists()
    left = {p.name for p in (tmp_path / ".cache.partial").iterdir()}
    assert "shard-00000.safetensors" in left and not any(n.endswith(".partial") for n in left)
    seen = []
    again = build(model, report=lambda done, total: seen.append(done))
    assert seen == [4]  # the first batch was there
    assert files(again.path) == files(whole.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "whole"]


class Killed(BaseException):
    """Ends a build wherever it is."""


FAULTY = (OSError(errno.ENOSPC, "full"), Killed())


@pytest.mark.parametrize(
    ("call", "first"),
    [
        ("replace", 0),
        ("replace", 1),
        ("fsync", 0),
        pytest.param("fsync", 1, marks=pytest.mark.slow),
    ],
)
def test_a_fault_at_every_step(build, tok, tmp_path, monkeypatch, call, first):
    """Of a build that replaces a cache there is the old one or the new one, nothing between.

    A full disk and a kill take turns, one way round and the other.
    """
    model, real, count = small.model(tok), getattr(os, call), 0
    monkeypatch.setattr("palu.reference.cache.check_causal", lambda *_: None)  # half of the time
    whole = files(build(model, "whole").path)
    old = build(model, "old", loss=loss_of(tok, top_k=3)).path
    before, place = files(old), tmp_path / "cache"
    for step in range(50):
        fault, count = FAULTY[(step + first) % 2], 0
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, place)

        def faulty(*arguments, step=step, fault=fault):
            nonlocal count
            count += 1
            if count == step + 1:
                raise fault
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            with suppress(CacheWriteError, Killed):
                build(model, overwrite=True)
        if isinstance(fault, OSError) or place.exists():
            assert files(place) in (before, whole)
        else:  # killed between the two renames
            assert call == "replace"
        assert files(build(model, overwrite=True).path) == whole
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "old", "whole"]
        if count <= step:
            break
    assert step >= 8  # so many there are


def test_what_an_interrupted_build_left(build, tok, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("palu.reference.cache.check_causal", lambda *_: None)
    model = small.model(tok)

    class Stop(Exception):
        pass

    def interrupted(at, path="cache", **changes):
        def report(done, total):
            if done == at:
                raise Stop

        with pytest.raises(Stop):
            build(model, path, batch_size=1, report=report, **changes)

    def resumed(path="cache", **changes):
        seen = []
        made = build(model, path, batch_size=1, report=lambda d, t: seen.append(d), **changes)
        return seen, files(made.path)

    _, whole = resumed("whole")
    interrupted(3)
    partial = tmp_path / ".cache.partial"
    shard = partial / "shard-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    (partial / "shard-00003.safetensors.partial").write_bytes(b"half")
    seen, made = resumed()
    assert seen == [2, 3, 4] and made == whole  # from the damaged one on

    for path, changes in [
        ("k", {"loss": loss_of(tok, top_k=8)}),
        ("data", {"data": rows}),
        ("head", {"train_head": False}),
        ("template", {"template": Template(date_string="x")}),
        ("shards", {"shard_bytes": 10**6}),
    ]:
        interrupted(3, path)
        seen, made = resumed(path, **changes)
        assert seen[0] == 1, path  # from the beginning
        assert made == resumed(path, **changes, overwrite=True)[1]
    interrupted(3, "weights")
    model = small.model(tok, seed=1)
    assert resumed("weights")[0][0] == 1


def test_two_builders_of_one_cache(build, tok):
    model = small.model(tok)

    def second(done, total):
        with pytest.raises(CacheError, match="another process is building"):
            build(model)

    assert build(model, report=second).forget_indices([]).shape == (0, 7)


FAULTS = """
    import os, resource, signal, sys
    from palu.reference.cache import CacheWriteError, ReferenceCache
    from palu.loss import PALULoss
    from tests.support import small

    tok = small.tokenizer()
    model, rows = small.model(tok), small.rows(tok)
    loss = PALULoss(top_k=7, prefix_length=2, eos_token_id=tok.eos_token_id)

    def build(path, report=None):
        options = dict(loss=loss, batch_size=1, shard_bytes=1, report=report)
        ReferenceCache.build(model, rows, path, **options)

    def kill(done, total):
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        build(sys.argv[1], kill)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    # Bytes that a file may have: enough for every shard, too few for the head.
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))
    try:
        build(sys.argv[2])
    except CacheWriteError as error:
        print(error)
"""


@pytest.mark.slow  # faults in this process are above; a kill skips `finally` too
@pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
def test_a_kill_and_a_limit_in_a_process_of_their_own(build, tok, rows, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FAULTS), tmp_path / "killed", tmp_path / "limited"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    killed, said = ended.stdout.splitlines()
    assert int(killed) == -signal.SIGKILL
    assert said.startswith(f"[Errno {errno.EFBIG}] File too large; ") and "head.safet" in said
    assert not (tmp_path / "killed").exists() and not (tmp_path / "limited").exists()
    left = {".killed.partial", ".limited.partial"}
    lock = "..killed.partial.palu-lock"  # of the process that is dead: nobody holds it
    assert {p.name for p in tmp_path.iterdir()} == left | {lock}

    options = {"data": rows, "batch_size": 1, "tokenizer": None, "template": None}
    whole = build(small.model(tok), "whole", **options)
    for name, expected in (("killed", [4, 5]), ("limited", [1, 2, 3, 4, 5])):
        seen = []
        again = build(small.model(tok), name, **options, report=lambda d, t, s=seen: s.append(d))
        assert seen == expected
        # what the other process stored may be rounded otherwise: it had one thread
        for shard in sorted(whole.path.glob("*.safetensors")):
            torch.testing.assert_close(load_file(again.path / shard.name), load_file(shard))
        assert {p.name for p in again.path.iterdir()} == {p.name for p in whole.path.iterdir()}
    assert {p.name for p in tmp_path.iterdir()} == {"killed", "limited", "whole"}


# ---- checking ------------------------------------------------------------------------------------


def test_verify_computes_the_numbers_again(build, tok, rows):
    model = small.model(tok)
    cache = build(model, retain_dataset=rows[3:])
    assert verify_cache(cache.path) == {} == verify_cache(cache.path, model=model)
    given = {"dataset": rows[:4], "retain_dataset": rows[3:], "tokenizer": tok}
    assert verify_cache(cache.path, model=model, **given) == {"hidden": 0.0, "indices": 0.0}
    with pytest.raises(CacheMismatch, match="model is"):
        verify_cache(cache.path, model=small.model(tok, seed=1), **given)


def test_verify_sees_numbers_of_another_model(build, tok, rows, monkeypatch):
    # A cache that claims to be this model's and is not: only the numbers tell.
    model, other = small.model(tok), small.model(tok, seed=1)
    monkeypatch.setattr(
        palu.reference.manifest, "model_fingerprint", lambda _: model_fingerprint(model)
    )
    cache = build(other)
    with pytest.raises(CacheMismatch, match=r"differ from the model's: hidden by .*, indices by"):
        verify_cache(cache.path, model=model, dataset=rows[:4])
