"""The two errors that end a command with one line instead of a stack trace, and the line of another."""

import difflib
from collections.abc import Collection

_NEAR = 3  # names that are suggested


class UserError(ValueError):
    """A mistake that the user can put right: names the file or key and the remedy. Exit code 2."""


class Busy(UserError):
    """Another process is at this very work."""


def not_installed(package: str, extra: str, key: str = "") -> UserError:
    """What to say where a package of an extra is missing, and perhaps the setting that asks for it."""
    return UserError(f"{key}{key and ': '}{package} is not installed; pip install 'longtake[{extra}]'")


class Failure(RuntimeError):
    """A fault during the work: names the file and how to continue. Exit code 1."""


def in_short(error: BaseException) -> str:
    """What any other error says, with its type, as a part of such a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class Interrupted(Exception):
    """Work was stopped from outside after saving its state. Exit code 130 after Ctrl-C, else 0."""


def near(name: str, there: Collection[str]) -> str:
    """A remark for such a line: the names that are like one that is not there, else all."""
    close = difflib.get_close_matches(name, there, _NEAR)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(there) or 'none'}"
