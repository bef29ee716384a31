"""Telling a user's mistake from a bug: one clear line for the first, a traceback for the second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. The command line prints its message and exits with status
    2."""


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
    except kinds as error:
        raise UserError(str(error)) from error
