"""Errors that a user can mend: the exception classes, and the only place that prints them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn

EXIT_STATUS, STOPPED_STATUS = 2, 1


class UserError(ValueError):
    """An error in what the user gave: a flag, a config, a file, a checkpoint or data.

    The message says what was given, what is accepted and what to do. Commands print it without a traceback and exit
    with status 2. Callers of the library can catch it as a `ValueError`.
    """


class RunStopped(RuntimeError):
    """A run that could not continue although its settings are valid: it diverged, or its disk is full.

    The message says what happened, which checkpoint is the last good one, and what to do. Commands print it without a
    traceback and exit with status 1.
    """


class RunInterrupted(RuntimeError):
    """A run that was asked to stop, by a signal or by its time limit; its progress is saved.

    Attributes:
      status: the exit status; for a signal, 128 plus the signal's number.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def fail(message: str) -> NoReturn:
    """Prints `message` as an error and exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(EXIT_STATUS)


def reports_user_errors(command: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command: `UserError` becomes a short message and exit status 2, `RunStopped` exit status 1."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            fail(str(error))
        except RunStopped as error:
            print(f"error: {error}", file=sys.stderr)
            return STOPPED_STATUS
        except RunInterrupted as error:
            print(error, file=sys.stderr)
            return error.status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, at most 300 characters; its type if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def suggestion(given: str, accepted: Iterable[str]) -> str:
    """Returns " (did you mean X?)" if `given` is close to one of `accepted`, or else an empty string."""
    close = get_close_matches(given, list(accepted), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
