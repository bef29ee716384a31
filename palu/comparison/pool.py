"""Processes for runs: each has its own, which begins as all others do.

They are forked from one process that has imported PyTorch and transformers and has done nothing
else, where the system has that: a run costs no import, and nothing of one is left for the next.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = (
    "palu.unlearn",
    "palu.models.checks",
    "palu.models.lora",
    "palu.models.writing",
    "palu.training.auto",
    "palu.training.room",
    "palu.training.sharding",
    "palu.evaluation.attacks.run",
    "palu.evaluation.evaluator",
    "palu.comparison.measure",
    "palu.cli.unlearn",
    "rouge_score.rouge_scorer",
    "rich.live",
)
"""Modules that every run imports."""


class Died(Exception):
    """A process ended without an answer."""


class Worker:
    """A process that computes one thing.

    Args:
        function: of a module, called with `arguments` in the process.
        log: file for what it prints; None: where this process prints.
        environment: variables of it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        context = _context()
        self._answer, sends = context.Pipe(duplex=False)
        variables = {**os.environ, **(environment or {})}
        where = {"folder": os.getcwd(), "log": log, "environment": variables}
        self._process = context.Process(
            target=_work, args=(sends, where, function, arguments), daemon=True
        )
        self._process.start()
        sends.close()

    @property
    def sentinel(self) -> Connection:
        """Return what becomes ready when there is an answer, or the process has ended."""
        return self._answer

    def result(self) -> Any:
        """Wait for the answer. Raises what the function raised, and `Died` where the process ended
        without any."""
        try:
            good, answer = self._answer.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            how = f"killed by signal {-code}" if code and code < 0 else f"exit status {code}"
            raise Died(f"the process of the run ended: {how}") from None
        self._process.join()
        if not good:
            raise answer
        return answer

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a process of its own."""
    worker = Worker(function, *arguments)
    try:
        return worker.result()
    except BaseException:
        worker.stop()
        raise


@functools.cache
def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver  # which Windows has not

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with _own_paths():
        forkserver.ensure_running()
    return context


@contextmanager
def _own_paths() -> Iterator[None]:
    """Let a process that is started in the block import what this one does: `python -c`, which the
    server is, looks in the current folder first, where another `palu` or a `torch.py` may lie."""
    folder, before = os.getcwd(), dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(path or folder for path in sys.path)
    os.chdir(os.path.dirname(os.__file__))
    try:
        yield
    finally:
        os.chdir(folder)
        _set_environment(before)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _work(
    sends: Connection, where: dict[str, Any], function: Callable[..., Any], arguments: tuple
) -> None:
    """Be the process of a `Worker`."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _set_environment(where["environment"])
    os.chdir(where["folder"])
    if where["log"] is not None:
        with open(where["log"], "a", encoding="utf-8", buffering=1) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    try:
        answer = True, function(*arguments)
    except Exception as error:
        answer = False, error
    try:
        sends.send(answer)
    except Exception:  # an error that cannot be sent
        sends.send((False, RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of it is needed any more


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
