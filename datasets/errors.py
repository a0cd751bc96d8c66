"""The two errors that end a command with one line instead of a stack trace."""


class UserError(ValueError):
    """A mistake that the user can put right: names the file or key and the remedy. Exit code 2."""


def not_installed(package: str, extra: str, key: str = "") -> UserError:
    """What to say where a package of an extra is missing, and perhaps the setting that asks for it."""
    return UserError(f"{key}{key and ': '}{package} is not installed; pip install 'longtake[{extra}]'")


class Failure(RuntimeError):
    """A fault during the work: names the file and how to continue. Exit code 1."""


class Interrupted(Exception):
    """Work was stopped from outside after saving its state. Exit code 130 after Ctrl-C, else 0."""
