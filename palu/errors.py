"""Telling a user's mistake from a bug: one clear line for the first, a traceback for the second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. The command line prints its message and exits with status
    2."""


def one_line(error: object, limit: int = 400) -> str:
    """What an error of a library says, in one line that is not too long."""
    said = " ".join(str(error).split()) or type(error).__name__
    # The text of a KeyError is the key alone.
    said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said
    return said if len(said) <= limit else said[:limit] + "..."


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its accelerator is used up."""
    if isinstance(error, MemoryError):
        return True
    said = str(error)
    # torch.OutOfMemoryError, without importing torch; the CPU has no class of its own.
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError)
        and ("DefaultCPUAllocator" in said or "out of memory" in said)
    )


class WriteError(Exception):
    """What was computed cannot be written where it belongs; the message says where it is now. The
    command line exits with status 3."""


def failed_to_write(error: BaseException) -> bool:
    """Whether an error is of a file system, by whichever library it comes."""
    said, kind = str(error), type(error).__name__  # without importing torch or safetensors
    return (
        isinstance(error, OSError)
        or (kind == "SafetensorError" and ("I/O error" in said or "os error" in said))
        or (isinstance(error, RuntimeError) and "PytorchStreamWriter" in said)
    )


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Inside, bad values and files are the user's: ValueError, TypeError and OSError, or only the
    errors that are named, become `UserError`.

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
