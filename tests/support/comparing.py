"""Runs of a comparison that take no time, for tests of who does them."""

from __future__ import annotations

import os
import signal
import time

from palu.comparison.config import from_dict
from palu.comparison.perform import RUN_FILE, run_of
from palu.comparison.run_file import write_run

LIST = "list.txt"


def comparison(*methods):
    return from_dict(
        {
            "model": "m",
            "forget": "f",
            "utility": {"u": "u"},
            "methods": {name: {} for name in methods},
            "seeds": [0, 1, 2],
        }
    )


def work(job):
    """Note that a run was done, and leave its file; by its method, be killed or raise."""
    place = job.folder.parent.parent / LIST
    number = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(number, f"{job.task.id} {os.environ.get('CARD', '-')}\n".encode())
    os.close(number)
    if job.task.method == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.task.method == "raises":
        raise RuntimeError("of its own")
    if job.task.method == "slow":
        time.sleep(600)
    sets = {"forget": {"ids": ["0"]}}
    write_run(job.folder / RUN_FILE, run_of(job, sets=sets))


def words(task, model):
    return ["unlearn", "--output", str(model)]
