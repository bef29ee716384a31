"""One run: unlearn, evaluate, attack. It is done in a process of its own."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palu.comparison.config import Comparison, Task
from palu.comparison.run_file import DIVERGED, FAILED, Run, write_run
from palu.errors import one_line
from palu.storage.json_files import read_object
from palu.storage.output import RECORD, versions

RUN_FILE, MODEL = "run.json", "model"
NUMBERS = ("rounded_back",)
"""What `palu.json` says of a run that stands among its numbers."""


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        words: of `palu unlearn`; none where the model is measured as it is.
        measured: folder of the model that is measured.
        folder: for all that the run leaves.
        commit: of palu's source, when the comparison was started.
        original: the shown answers of the original model; None: they are made here.
    """

    comparison: Comparison
    task: Task
    words: Sequence[str]
    measured: Path
    folder: Path
    threads: int
    commit: str | None = None
    original: Sequence[Mapping[str, Any]] | None = None


def perform(job: Job, unlearn: Callable[[list[str]], int]) -> None:
    """Do a run and write its run file; one that diverges or fails has one that says so.

    Args:
        unlearn: runs `palu unlearn` with these words.
    """
    import torch

    torch.set_num_threads(job.threads)
    found: dict[str, Any] = {}
    try:
        found = _found(job, unlearn)
    except FloatingPointError as error:
        found = {"status": DIVERGED, "reason": one_line(error)}
    except Exception as error:
        traceback.print_exc()  # into the log of the run
        found = {"status": FAILED, "reason": f"{type(error).__name__}: {one_line(error)}"}
    if not job.comparison.keep_models:
        shutil.rmtree(job.folder / MODEL, ignore_errors=True)
    write_run(job.folder / RUN_FILE, run_of(job, **found))


def _found(job: Job, unlearn: Callable[[list[str]], int]) -> dict[str, Any]:
    from palu.comparison.measure import Measuring, timed

    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}
    if job.words:
        with timed(seconds, "unlearn"):
            unlearn([*job.words])
        shutil.copyfile(job.measured / RECORD, job.folder / RECORD)
        record = read_object(job.folder / RECORD)
        curve = record.get("loss_curve", [])
        numbers = {"steps": len(curve)} | {name: record.get(name) for name in NUMBERS}
        found = {"curve": curve, "numbers": numbers}
    measured = Measuring(job.comparison).measure(job.measured, job.folder, job.original)
    for key, own in (("seconds", seconds), ("numbers", found.get("numbers", {}))):
        measured[key] = own | measured[key]
    return found | measured


def run_of(job: Job, **found: Any) -> Run:
    """Return the content of a run file."""
    task = job.task
    head: dict[str, Any] = {"environment": environment(job)}
    if task.method is not None:
        head |= {"method": task.method, "setting": task.setting, "seed": task.seed}
        words = ["OUT" if word == str(job.measured) else word for word in job.words]
        head |= {"options": dict(task.options), "command": shlex.join(("palu", *words))}
    return Run(**head, **found)


def environment(job: Job) -> dict[str, Any]:
    """Return what a run's numbers may depend on besides its settings."""
    found = {"processor": processor(), "threads": job.threads, "versions": versions()}
    return found if job.commit is None else {**found, "commit": job.commit}


def commit() -> str | None:
    """Return the commit of palu's source, with a `+` where it was changed; None where it is
    installed and no checkout."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")
        return _git("rev-parse", "HEAD").strip() + "+" * bool(changed.strip())
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
