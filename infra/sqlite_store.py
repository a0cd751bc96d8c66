"""The sqlite store of runs inside a workspace: opened by one process at a time, waited for, and moved with its workspace."""

import contextlib
import fcntl
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from longtake.datasets.errors import Failure

PATIENCE = 60.0  # seconds that a store which another program has locked is waited for

_SCHEME = "sqlite:///"
# where MLflow keeps places, and we in the tags of runs
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("tags", "value"),
)


def path_of(uri: str) -> Path | None:
    """The file of an sqlite store; None for others."""
    return Path(uri.removeprefix(_SCHEME).partition("?")[0]) if uri.startswith(_SCHEME) else None


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Let one process at a time open an sqlite store: several that make its tables at once break each other's.

    Raises:
        Failure: another program holds the store's own lock for PATIENCE seconds.
    """
    path = path_of(uri)
    with contextlib.ExitStack() as held:
        if path and path.parent.is_dir() and not path.is_dir():
            # where no lock can be written no store can be made either, and MLflow says so
            with contextlib.suppress(OSError):
                handle = held.enter_context(path.with_name(f"{path.name}.lock").open("a"))
                fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists():
                _wait(path)
        yield


def _wait(path: Path) -> None:
    """Until the store can be read: MLflow's own patience is some seconds, and ends in a stack trace."""
    until, said = time.monotonic() + PATIENCE, False
    while True:
        try:
            with contextlib.closing(
                sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
            ) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return
        except sqlite3.OperationalError as e:
            if "locked" not in str(e):
                # MLflow meets it too, and tells what it is
                return
            if not said:
                print(f"{path}: locked by another program; waiting up to {PATIENCE:g} s", file=sys.stderr)
                said = True
            if time.monotonic() > until:
                raise Failure(
                    f"{path}: another program has kept this store of runs locked for {PATIENCE:g} s (a backup, a viewer"
                    " of sqlite files); end it, then run the same command again"
                ) from e


def bring_along(uri: str, workspace: str, artifacts: str) -> None:
    """Make the store's records name places in `workspace`, where they were written when it had another path.

    Args:
        artifacts: where the store says that an experiment of this workspace keeps its artifacts.
    """
    path, old = path_of(uri), artifacts.removeprefix("file://").removesuffix("/artifacts")
    if (
        path is None
        or path != Path(workspace) / "mlflow.db"
        or old == workspace
        or not artifacts.endswith("/artifacts")
    ):
        return
    if Path(old).exists() and Path(old).samefile(workspace):
        # a link to it
        return
    with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE)) as db, db:
        for table, column in _PLACES:
            for prefix in (old, f"file://{old}"):
                db.execute(
                    # the names are those above
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                    (workspace, len(prefix) + 1, len(prefix) + 1, f"{prefix}/"),
                )
    print(f"workspace: was at {old} before; its records now name {workspace}", file=sys.stderr)
