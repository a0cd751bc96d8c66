"""The two errors that end a command with one line instead of a stack trace."""

import difflib
from collections.abc import Collection

_NEAR = 3  # names that are suggested


class UserError(ValueError):
    """A mistake that the user can put right: names the file or key and the remedy. Exit code 2."""


class Failure(RuntimeError):
    """A fault during the work: names the file and how to continue. Exit code 1."""


class Interrupted(Exception):
    """Work was stopped from outside after saving its state. Exit code 130 after Ctrl-C, else 0."""


def near(name: str, there: Collection[str]) -> str:
    """A remark for such a line: the names that are like one that is not there, else all."""
    close = difflib.get_close_matches(name, there, _NEAR)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(there) or 'none'}"
