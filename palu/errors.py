"""Tell a user's mistake from a bug: one clear line for the first, a traceback for the second."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# What palu imports of the extra "train" of pyproject.toml.
TRAIN = ("accelerate", "jinja2", "matplotlib", "peft", "phonenumbers", "rich", "rouge_score")
TRAIN += ("scipy", "typer")
# Not every system has all of them.
_FULL = {getattr(errno, name, 0) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG")} - {0}
# What `torch.save` says where a disk is full: its last error alone, by how much was written.
_TORCH_SAVE = ("PytorchStreamWriter", "iostream error", "unexpected pos")


class UserError(Exception):
    """Something the user can put right. The command line prints its message and exits with status
    2."""


def one_line(error: object, limit: int = 400) -> str:
    """Return what an error of a library says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    # The text of a KeyError is the key alone.
    text = f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text
    return text if len(text) <= limit else text[:limit] + "..."


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a machine or its accelerator has no memory left."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    # torch.OutOfMemoryError, without importing torch; the CPU has no class of its own.
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError)
        and ("DefaultCPUAllocator" in text or "out of memory" in text)
    )


class WriteError(Exception):
    """What was computed cannot be written where it belongs; the message says where it is now. The
    command line exits with status 3."""


def failed_to_write(error: BaseException) -> bool:
    """Return whether an error is of a file system, by whichever library it comes."""
    text, kind = str(error), type(error).__name__  # without importing torch or safetensors
    return (
        isinstance(error, OSError)
        or (kind == "SafetensorError" and ("I/O error" in text or "os error" in text))
        or (isinstance(error, RuntimeError) and any(one in text for one in _TORCH_SAVE))
    )


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn ValueError, TypeError and OSError, or only the errors that are named, into `UserError`:
    inside, bad values and files are the user's.

    Wrap reading of input and settings in it; around the work itself name what a user can cause
    there.
    """
    kinds = kinds or (ValueError, TypeError, OSError)
    try:
        yield
    except BrokenPipeError:
        raise  # who read what we print has seen enough
    except kinds as error:
        raise UserError(str(error)) from error


def not_installed() -> str:
    """Return what to say of the packages of the extra "train" that are not there, if any."""
    missing = ", ".join(name for name in TRAIN if find_spec(name) is None)
    return missing and f"not installed: {missing}; pip install 'palu-unlearning[train]'"


def exit_status(error: Exception) -> tuple[int, str]:
    """Return the exit status of an error that is no bug, and what to say of it; 0 for a bug."""
    if isinstance(error, UserError | FloatingPointError):
        return 2 if isinstance(error, UserError) else 1, str(error)
    if isinstance(error, WriteError):
        return 3, str(error)
    # Transformers' own error does not say which it misses.
    if isinstance(error, ModuleNotFoundError) and (missing := not_installed()):
        return 2, missing
    # Another OSError may be a bug of ours.
    if failed_to_write(error) and not (isinstance(error, OSError) and error.errno not in _FULL):
        return 3, f"writing failed: {one_line(error)}"
    if out_of_memory(error):
        return 2, (
            f"out of memory: {one_line(error, 200)}; lower --batch-size or --max-length, or take "
            "--dtype bfloat16 or a smaller model (palu plan says what a step takes)"
        )
    if hasattr(error, "format_message"):  # typer's, of the command line
        if not error.format_message():  # of a command without arguments: its help has been printed
            return error.exit_code, ""
        context = getattr(error, "ctx", None)
        hint = "" if context is None else f" ({context.command_path} --help lists the options)"
        return error.exit_code, one_line(error.format_message()) + hint
    return 0, ""
