"""A bound on the time and memory of code that was not written by the user: chat templates."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECONDS = 5.0
MEBIBYTES = 1024
_EVERY = 0.1  # seconds between checks


class OutOfBounds(BaseException):
    """No Exception: Jinja, which catches those while it folds constants, would go on."""


@contextmanager
def bounded(seconds: float = SECONDS, mebibytes: float = MEBIBYTES) -> Iterator[None]:
    """Raise `OutOfBounds` inside after so much processor time or so much more memory.

    In the main thread a timer looks on; it ends loops and products of large numbers, not one
    operation that takes all memory at once. Elsewhere, or where another timer of the same kind
    runs, the thread is traced, and only what is written in Python is ended, by time; where a
    debugger traces it already, nothing is.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and _timer_is_free():
        with _timed(seconds, mebibytes):
            yield
    elif sys.gettrace() is None:
        with _traced(seconds):
            yield
    else:
        yield


def _timer_is_free() -> bool:
    if not hasattr(signal, "setitimer"):  # Windows
        return False
    taken = any(signal.getitimer(signal.ITIMER_PROF))
    return not taken and signal.getsignal(signal.SIGPROF) is not None


@contextmanager
def _timed(seconds: float, mebibytes: float) -> Iterator[None]:
    end, most = time.process_time() + seconds, _resident() + mebibytes * 2**20

    def look(number: int, frame: FrameType | None) -> None:
        if time.process_time() > end:
            raise OutOfBounds(f"it takes more than {seconds:g} seconds")
        if _resident() > most:
            raise OutOfBounds(f"it takes more than {mebibytes:g} MiB of memory")

    before = signal.signal(signal.SIGPROF, look)
    try:
        signal.setitimer(signal.ITIMER_PROF, _EVERY, _EVERY)
        yield
    finally:
        end = most = math.inf  # do not raise while the handler is restored
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _traced(seconds: float) -> Iterator[None]:
    end = time.thread_time() + seconds

    def look(frame: FrameType, event: str, arg: Any) -> Any:
        if time.thread_time() > end:
            raise OutOfBounds(f"it takes more than {seconds:g} seconds")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(None)


def _resident() -> int:
    """Return the memory that the process takes now, in bytes; 0 where Linux is not there to say
    it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
