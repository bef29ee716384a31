"""Claims: which of several processes, on one machine or more, does a run.

A claim is a file `NAME.0` in a folder that all of them see, made with O_EXCL: one of them makes it.
Its holder touches it every few seconds. Who finds that a claim is not touched for a while, by its
own watch (clocks of machines differ), makes `NAME.1`, again with O_EXCL, and holds the run; the
highest number counts. A claim of the same machine whose process is gone is taken over at once.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEAT, STALE = 10.0, 120.0  # seconds


@dataclass
class Claim:
    """A claim that this process holds."""

    name: str
    path: Path
    token: str


class Claims:
    """The claims in a folder.

    Args:
        folder: for the files.
        stale: seconds after which a claim that nobody touches is taken over.
        every: seconds between touches of its own claims, for who holds them.
        clock: of this process, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stale: float = STALE,
        every: float = BEAT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.stale, self.every, self.clock = folder, stale, every, clock
        # Of claims of others: what was seen, and since when it is the same.
        self.seen: dict[str, tuple[tuple, float]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> Claim | None:
        """Return a claim of `name`, or None while another process holds it."""
        number, path = self._last(name)
        if path is not None and not self._dead(name, path):
            return None
        token = secrets.token_hex(8)
        path = self.folder / f"{name}.{number + 1}"
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            json.dump({"token": token, "machine": machine(), "process": process()}, stream)
        self.seen.pop(name, None)
        claim = Claim(name, path, token)
        if self.holds(claim):
            return claim
        path.unlink(missing_ok=True)  # another one was faster, with a higher number
        return None

    def beat(self, claim: Claim) -> bool:
        """Touch a claim. Return whether it is still the one that counts."""
        with suppress(OSError):  # a network that is away for a moment
            os.utime(claim.path)
        return self.holds(claim)

    def holds(self, claim: Claim) -> bool:
        """Return whether no other process has taken a claim over."""
        return self._last(claim.name)[1] == claim.path

    def release(self, claim: Claim) -> None:
        """Give a claim up, and remove it and the dead ones before it."""
        if self.holds(claim):
            self.clear(claim.name)

    def clear(self, name: str) -> None:
        """Remove the claims of a run that is done."""
        for _, path in sorted(self._all(name)):
            path.unlink(missing_ok=True)

    def _all(self, name: str) -> list[tuple[int, Path]]:
        found = []
        for path in self.folder.glob(f"{_escaped(name)}.*"):
            number = path.name[len(name) + 1 :]
            if number.isdecimal():
                found.append((int(number), path))
        return found

    def _last(self, name: str) -> tuple[int, Path | None]:
        return max(self._all(name), default=(-1, None))

    def _dead(self, name: str, path: Path) -> bool:
        """Return whether the holder of a claim is gone, as far as this process can tell."""
        try:
            touched = path.stat().st_mtime_ns
            content = json.loads(path.read_text("utf-8") or "{}")
        except FileNotFoundError:
            return False  # released: look again later
        except (OSError, ValueError):
            content = {}
        if content.get("machine") == machine() and not _alive(content.get("process")):
            return True
        state, now = (path.name, touched), self.clock()
        known = self.seen.get(name)
        if known is None or known[0] != state:
            self.seen[name] = state, now
            return False
        return now - known[1] >= self.stale


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def machine() -> str | None:
    """Return a name of this start of this machine, and of the processes that this one can see: a
    container has others. None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process(number: int | None = None) -> list[int] | None:
    """Return number and start of a process: numbers are used again. None where there is none."""
    number = os.getpid() if number is None else number
    try:
        text = Path(f"/proc/{number}/stat").read_text("ascii", errors="replace")
    except OSError:
        return None
    after = text.rpartition(")")[2].split()
    if after[0] in "ZX":
        return None
    return [number, int(after[19])]


def _alive(known: list[int] | None) -> bool:
    return known is None or process(known[0]) == known
