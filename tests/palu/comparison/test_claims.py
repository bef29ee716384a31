"""Claims: one holder, taken over when it is gone."""

from __future__ import annotations

import json
import os
import threading

from palu.comparison import claims as module
from palu.comparison.claims import Claims


def test_one_of_many_gets_a_claim(tmp_path):
    """All see that nobody has it before any takes it: the file system decides."""
    got, barrier = [], threading.Barrier(8)

    class Together(Claims):
        waits = True

        def _last(self, name):
            found = super()._last(name)
            if self.waits:
                self.waits = False
                barrier.wait()
            return found

    threads = [
        threading.Thread(target=lambda: got.append(Together(tmp_path).take("run")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in got) == 1 and len(got) == 8


def test_a_claim_that_is_given_up_can_be_taken(tmp_path):
    one, other = Claims(tmp_path), Claims(tmp_path)
    claim = one.take("run")
    assert other.take("run") is None
    assert other.take("run.more") is not None  # a name that begins in the same way
    one.release(claim)
    assert other.take("run") is not None


class Watch:
    """Another machine, whose clock is moved by hand."""

    def __init__(self, folder, monkeypatch):
        self.now = 0.0
        self.claims = Claims(folder, stale=60, clock=lambda: self.now)

    def take(self, after):
        self.now += after
        return self.claims.take("run")


def other_machine(path):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "machine": "another"}))


def test_who_is_gone_on_another_machine_is_replaced_after_a_while(tmp_path, monkeypatch):
    holder, watch = Claims(tmp_path), Watch(tmp_path, monkeypatch)
    claim = holder.take("run")
    other_machine(claim.path)
    assert watch.take(0) is None and watch.take(59) is None
    # It beats once more: the watch begins anew.
    os.utime(claim.path, ns=(1, 1))
    assert watch.take(30) is None and watch.take(59) is None
    second = watch.take(2)
    assert second is not None and watch.claims.holds(second)
    # Who was only slow notices, and takes nothing away from the new holder.
    assert not holder.beat(claim)
    holder.release(claim)
    assert watch.claims.holds(second) and Claims(tmp_path).take("run") is None
    watch.claims.release(second)
    assert list(tmp_path.iterdir()) == []


def test_who_is_gone_on_this_machine_is_replaced_at_once(tmp_path, monkeypatch):
    one = Claims(tmp_path)
    claim = one.take("run")
    content = json.loads(claim.path.read_text())
    if content["machine"] is None:
        return  # the system does not tell
    assert Claims(tmp_path).take("run") is None  # this process is there
    number, start = content["process"]
    claim.path.write_text(json.dumps({**content, "process": [number, start - 1]}))
    assert Claims(tmp_path).take("run") is not None


def test_a_claim_that_was_just_being_written_is_not_taken(tmp_path):
    (tmp_path / "run.0").write_text("")
    assert Claims(tmp_path).take("run") is None


def test_a_process_that_is_no_more_has_no_start():
    assert module.process(2**22 + 7) is None
