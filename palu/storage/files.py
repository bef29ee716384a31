"""The only place that renames: files and folders are written aside, under names that nobody can
guess, and put in their place when they are whole and on the disk. Nothing else is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: two runs with one output are not told apart there
    fcntl = None

MARK = "palu-aside"  # the file in an aside folder that says which output it is for
LOCK_TEXT = "palu: a run holds {}. Left by a killed run it does no harm and may be deleted.\n"
_EXCLUSIVE = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class InUse(ValueError):
    """Another process writes the same output."""


class NotWritable(PermissionError):
    """Nothing can be written where an output is to be."""


class Changed(OSError):
    """What is at an output's place is not what was there when the run began."""


def beside(path: Path, ending: str) -> Path:
    """Return a hidden name beside `path`, always the same; short where the name is long."""
    name = path.name
    if len(os.fsencode(name)) > 180:
        name = f"{name[:30]}-{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}"
    return path.with_name(f".{name}.{ending}")


@contextmanager
def new_file(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file to write into, renamed to `path` when the block ends without an error. Where
    `path` is a link the file it names is replaced.

    Args:
        mode: "w" (UTF-8, newlines as they are written) or "wb".

    Raises:
        OSError: `path` is there and no regular file, or the file system refused.
    """
    path = Path(os.path.realpath(path))
    check_regular(path)
    aside = beside(path, f"{secrets.token_hex(8)}.partial")
    # The mode is the umask's, as that of any new file is; `tempfile` would make it 0600.
    number = os.open(aside, os.O_WRONLY | _EXCLUSIVE, 0o666)
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(number, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(number)
        check_regular(path)
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def check_regular(path: Path) -> None:
    """Raise FileExistsError where `path` is a folder, device, FIFO or socket, or a link to one."""
    with suppress(FileNotFoundError):  # a link to nowhere too
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileExistsError(
                errno.EEXIST, "is no regular file and cannot be replaced", str(path)
            )


def check_json(path: Path, keys: set[str], writer: str) -> None:
    """Check that a JSON file may be written: there is none, or an empty one, or one with these
    `keys`. Raises FileExistsError, with what messages call the `writer`."""
    try:
        path.lstat()  # unlike `lexists`, raises where the name is too long
    except FileNotFoundError:
        return
    check_regular(path)
    ours = False
    with suppress(ValueError, TypeError, RecursionError):
        ours = path.stat().st_size == 0 or keys <= set(json.loads(path.read_text("utf-8")))
    if not ours:
        raise FileExistsError(
            f"{str(path)!r} exists and {writer} did not write it; name another file"
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is whole or absent. Raises ValueError where a number is not finite."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with new_file(path) as file:
        file.write(text + "\n")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def settle(folder: Path) -> list[Path]:
    """Give the files below `folder` the mode of new ones (safetensors writes 0600), flush all of it
    to the disk, and return the files, sorted."""
    mode = folder.stat().st_mode & 0o666  # of a folder that was made under this umask
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    for path in files:
        with suppress(PermissionError):  # a file system without modes
            path.chmod(mode)
        sync(path)
    for path in [*(path for path in paths if path.is_dir()), folder]:
        sync(path)
    return files


def new_aside(path: Path) -> Path:
    """Make a folder beside `path` with a mark that it is palu's. Call it, and `remove_abandoned`,
    with `path` locked or from the only process that writes it."""
    aside = beside(path, f"partial-{secrets.token_hex(8)}")
    aside.mkdir()
    (aside / MARK).write_bytes(os.fsencode(path.name))
    return aside


def remove_abandoned(path: Path) -> None:
    """Remove the folders that killed runs left of `new_aside`; what such a run was about to replace
    goes back to its place."""
    hidden = beside(path, "partial-").name
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        token = left.name.removeprefix(hidden)
        if token == left.name or len(token) != 16 or left.is_symlink() or not left.is_dir():
            continue
        if not (left / MARK).is_file():
            with suppress(OSError):
                left.rmdir()  # killed before the mark was there
            continue
        if (left / "old").exists() and not path.exists():
            os.replace(left / "old", path)
        remove_aside(left)


def new_of(aside: Path) -> Path:
    """Return where the folder of an aside is written: beside its final place, so that relative
    paths in it are right."""
    start, _, token = aside.name.rpartition("partial-")
    return aside.with_name(f"{start}new-{token}")


def remove_aside(aside: Path) -> None:
    """Remove a folder of `new_aside` and what is at `new_of` it; the mark goes last, so that half
    of it is still known."""
    if "partial-" in aside.name:
        shutil.rmtree(new_of(aside), ignore_errors=True)
    for path in aside.iterdir() if aside.is_dir() else ():
        if path.name != MARK:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def put(new: Path, path: Path, aside: Path) -> None:
    """Rename a folder to `path`. What is there goes into `aside` first, and back after an error;
    the caller removes `aside`.

    Raises:
        OSError: the file system refused.
    """
    old = aside / "old"
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    with suppress(OSError):  # the rename is done
        sync(path.parent)


def publish(new: Path, path: Path) -> None:
    """Rename a file or folder that is whole to a place where no other folder is, at once.

    Raises:
        OSError: the file system refused.
    """
    os.replace(new, path)
    with suppress(OSError):  # the rename is done
        sync(path.parent)


@contextmanager
def aside_of(path: Path) -> Iterator[Path]:
    """Make a `new_aside` for the block, after `remove_abandoned`."""
    remove_abandoned(path)
    aside = new_aside(path)
    try:
        yield aside
    finally:
        remove_aside(aside)


@contextmanager
def replace_folder(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Make a folder to write into, renamed to `path` when the block ends without an error; what was
    there stays until then.

    Args:
        check: called before the rename; an error of it leaves `path` as it is.
    """
    with aside_of(path) as aside:
        new = new_of(aside)
        new.mkdir()
        yield new
        settle(new)
        check()
        put(new, path, aside)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock an output for this process until the block ends, or the process, be it by a kill.

    The lock is on a file beside it, which goes away at the end. File systems without locks have
    none.

    Raises:
        InUse: another process holds it.
        NotWritable: nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    lock, text = beside(path, "palu-lock"), os.fsencode(LOCK_TEXT.format(path.name))
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(lock, flags, 0o666)
        except OSError as error:
            raise NotWritable(
                f"nothing can be written beside {str(path)!r}: {error.strerror or error}"
            ) from error
        try:
            regular = stat.S_ISREG(os.fstat(number).st_mode)
            if not regular or not text.startswith(os.read(number, len(text) + 1)):
                raise FileExistsError(errno.EEXIST, "is in the place of palu's lock", str(lock))
            _hold(number, path)
            # The holder may have removed the lock file since it was opened.
            if lock.exists() and os.path.samestat(os.fstat(number), lock.stat()):
                os.lseek(number, 0, os.SEEK_SET)
                os.write(number, text)
                break
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(number)


def _hold(number: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(
            f"another palu process is writing {str(path)!r}: wait for it, or name another output"
        ) from None
    except OSError:
        pass  # a file system without locks
