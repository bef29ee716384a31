"""Compile `rows.c` once a machine, compiler and source, and keep the library in the user's cache.

It includes no header of PyTorch's or Python's, so a library outlives updates of both.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("rows.c")
FLAGS = "-std=gnu11 -O3 -fPIC -shared -fopenmp-simd -fno-math-errno -fno-trapping-math"
# what not every compiler knows: the first that works is taken
TUNING = ("-march=native -mprefer-vector-width=512", "-march=native", "-mcpu=native", "")
TIMEOUT = 300  # seconds a compiler may take


class BuildError(Exception):
    """There is no library, and why."""


def library() -> tuple[ctypes.CDLL, str]:
    """Return the compiled loops, and the compiler's first line of `--version`.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if platform.system() != "Linux":
        raise BuildError(f"on {platform.system()} there is none")
    compiler = _compiler()
    version = _output([*compiler, "--version"]).split("\n")[0]
    source = SOURCE.read_bytes()
    parts = [source, FLAGS, TUNING, compiler, version, _processor()]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    folder = _cache()
    if folder is not None:
        found = _load(folder, key)
        if found is None:
            # aside, under a name that is told from others': processes may build at the same time
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as aside:
                built = _compile(compiler, Path(aside))
                content = hashlib.sha256(built.read_bytes()).hexdigest()[:32]
                os.replace(built, folder / f"{key}-{content}.so")
            found = _load(folder, key)
        if found is not None:
            return found, version
    with tempfile.TemporaryDirectory(prefix="palu-kernels-") as aside:
        return ctypes.CDLL(str(_compile(compiler, Path(aside)))), version


def _compiler() -> list[str]:
    try:
        own = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BuildError(f"CC is {os.environ['CC']!r}: {error}") from error
    if own:
        return own
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C compiler was found")


def _compile(compiler: list[str], folder: Path) -> Path:
    out = folder / "rows.so"
    for tuning in TUNING:
        flags = shlex.split(f"{FLAGS} {tuning}")
        try:
            _output([*compiler, *flags, str(SOURCE), "-o", str(out), "-lm"])
        except BuildError as error:
            failure = error
        else:
            return out
    raise failure


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError, UnicodeError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines."""
    with contextlib.suppress(OSError, UnicodeError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split("\n")
        wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
        return "\n".join(line for line in lines if line.split("\t")[0].strip() in wanted)
    return platform.processor()


def _cache() -> Path | None:
    """Return the folder of compiled libraries, or None where none is safe to load from."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path("~/.cache")).expanduser() / "palu_kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):
        return None
    others_write = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    safe = about.st_uid == os.geteuid() and not others_write and os.access(folder, os.W_OK)
    return folder if safe else None


def _load(folder: Path, key: str) -> ctypes.CDLL | None:
    """Return a library that is whole: its name ends with the hash of its content."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        if path.name == f"{key}-{content}.so":
            return ctypes.CDLL(str(path))
        path.unlink()
    return None
