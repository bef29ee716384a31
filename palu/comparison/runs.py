"""The folder of a comparison, and the runs in it: each once, whoever does it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from palu.comparison.claims import Claim, Claims
from palu.comparison.config import Comparison, Task
from palu.comparison.perform import MODEL, RUN_FILE, Job, commit, run_of
from palu.comparison.pool import Died, Worker
from palu.comparison.run_file import FAILED, ORIGINAL, RETRAINED, Run, read_run, write_run
from palu.storage.files import publish

LOG = "log.txt"

Tell = Callable[[int, int, str], None]


@dataclass
class Active:
    """A run that is being done."""

    task: Task
    claim: Claim
    job: Job
    worker: Worker
    slot: int


class Runs:
    """Do runs, several at a time, beside other processes that do the same.

    Args:
        folder: of the comparison.
        work: of a module; does a `Job` in a process of its own.
        words: the words of `palu unlearn` for a task and the folder of its model.
        jobs: runs at a time.
        threads: of each.
        environments: variables of each of the jobs.
    """

    def __init__(
        self,
        folder: Path,
        comparison: Comparison,
        work: Callable[[Job], None],
        words: Callable[[Task, Path], list[str]],
        *,
        jobs: int,
        threads: int,
        environments: Sequence[Mapping[str, str]] = (),
        claims: Claims | None = None,
    ) -> None:
        self.folder, self.comparison, self.work, self.words = folder, comparison, work, words
        self.jobs, self.threads = jobs, threads
        self.environments = [dict(one) for one in environments] or [{}]
        self.claims = claims or Claims(folder / "claims")
        self.commit = commit()
        self.active: list[Active] = []
        self.done = self.total = 0

    def file(self, task: Task) -> Path:
        """Return the place of a run file."""
        if task.method is None:
            return self.folder / f"{task.id}.json"
        return self.folder / "runs" / task.id / RUN_FILE

    def forget_failed(self, tasks: Sequence[Task]) -> None:
        """Remove the run files of runs that failed, so that they are done again."""
        for task in tasks:
            if self.file(task).is_file() and read_run(self.file(task)).status == FAILED:
                self.file(task).unlink()

    def run(self, tasks: Sequence[Task], tell: Tell, ended: Callable[[Task, Run], None]) -> None:
        """Do the runs that are not there, and return when all are, by whomever.

        Args:
            tell: called with (runs there, of how many, what is being done).
            ended: called with each run that this process has done.
        """
        waiting, self.total = list(tasks), len(tasks)
        original = self._original()
        try:
            while True:
                waiting = [task for task in waiting if not self.file(task).is_file()]
                self.done = self.total - len(waiting)
                for task in waiting:
                    if len(self.active) >= self.jobs:
                        break
                    if all(one.task != task for one in self.active):
                        self._begin(task, original)
                if not waiting:
                    break
                names = ", ".join(one.task.id for one in self.active)
                tell(self.done, self.total, names or "waiting for runs of other processes")
                for one in self._ready():
                    self._end(one, ended)
                self._beat()
        finally:
            for one in self.active:
                one.worker.stop()
                self._drop(one)
        for task in tasks:  # what a process has left that was stopped when it was just done
            self.claims.clear(task.id)
        self._sweep()
        tell(self.total, self.total, "")

    def _original(self) -> Sequence[Mapping[str, Any]] | None:
        path = self.folder / f"{ORIGINAL}.json"
        return read_run(path).answers if path.is_file() else None

    def _begin(self, task: Task, original: Any) -> None:
        claim = self.claims.take(task.id)
        if claim is None:
            return
        if self.file(task).is_file():  # it was done since we looked
            self.claims.release(claim)
            return
        self._clean(task)
        work = self.folder / "work" / f"{task.id}@{claim.token}"
        work.mkdir(parents=True)
        measured, words = work / MODEL, []
        if task.method is None:
            measured = Path(getattr(self.comparison, _MODELS[task.id]))
        else:
            words = self.words(task, measured)
        job = Job(self.comparison, task, words, measured, work, self.threads, self.commit, original)
        used = [one.slot for one in self.active]
        slot = next(number for number in range(self.jobs) if number not in used)
        environment = self.environments[slot % len(self.environments)]
        worker = Worker(self.work, job, log=work / LOG, environment=environment)
        self.active.append(Active(task, claim, job, worker, slot))

    def _clean(self, task: Task) -> None:
        """Remove what processes that are gone have left of a run."""
        for left in (self.folder / "work").glob(f"{task.id}@*"):
            shutil.rmtree(left, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what gone processes have left, also of runs that are asked for no more: it may
        hold weights."""
        for left in (self.folder / "work").glob("*@*"):
            if claim := self.claims.take(left.name.rpartition("@")[0]):
                shutil.rmtree(left, ignore_errors=True)
                self.claims.release(claim)

    def _ready(self) -> list[Active]:
        """Wait a little. Return the runs that have ended."""
        sentinels = {one.worker.sentinel: one for one in self.active}
        if not sentinels:
            time.sleep(self.claims.every / 4)
            return []
        return [sentinels[one] for one in wait(list(sentinels), timeout=self.claims.every)]

    def _end(self, one: Active, ended: Callable[[Task, Run], None]) -> None:
        """Put what a run has left in its place."""
        work = one.job.folder
        try:
            one.worker.result()
        except Exception as error:
            reason = str(error) if isinstance(error, Died) else f"{type(error).__name__}: {error}"
            shutil.rmtree(work / MODEL, ignore_errors=True)
            write_run(work / RUN_FILE, run_of(one.job, status=FAILED, reason=reason))
        run = read_run(work / RUN_FILE)
        for path in work.iterdir():
            if path.name.startswith(f"{MODEL}-") or path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
        if self.claims.holds(one.claim):
            self._publish(one.task, work)
            ended(one.task, run)
        self.active.remove(one)
        self._drop(one)

    def _publish(self, task: Task, work: Path) -> None:
        if self.file(task).is_file():  # of who took it over, and has the same numbers
            return
        place = self.folder / task.id if task.method is None else self.file(task).parent
        shutil.rmtree(place, ignore_errors=True)  # of a run that failed, or half of one
        place.parent.mkdir(exist_ok=True)
        publish(work, place)
        if task.method is None:
            publish(place / RUN_FILE, self.file(task))

    def _drop(self, one: Active) -> None:
        shutil.rmtree(one.job.folder, ignore_errors=True)
        self.claims.release(one.claim)

    def _beat(self) -> None:
        """Touch the claims; give up a run that another process has taken over."""
        for one in list(self.active):
            if not self.claims.beat(one.claim):
                one.worker.stop()
                self.active.remove(one)
                shutil.rmtree(one.job.folder, ignore_errors=True)


_MODELS = {ORIGINAL: "model", RETRAINED: "retrained"}
