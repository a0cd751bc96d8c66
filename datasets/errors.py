"""The two errors that end a command with one line instead of a stack trace, and the line of another."""


class UserError(ValueError):
    """A mistake that the user can put right: names the file or key and the remedy. Exit code 2."""


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
