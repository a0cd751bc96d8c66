"""The sqlite store of runs inside a workspace: opened by one process at a time, moved with its workspace, and looked into.

A look confirms what has finished and is still there, since MLflow takes longer to import than that takes. Whatever it
does not find, or does not know, is for MLflow's own client to say.
"""

import contextlib
import fcntl
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets.errors import Failure
from longtake.training.registry.uri import parse

PATIENCE = 60.0  # seconds to wait for a store that another program has locked

# of the tables that a look reads, by MLflow's migrations; a store of another state is left to its client
SCHEMA = "dc11669786a5"
# settings by which MLflow would answer from elsewhere
_ELSEWHERE = ("MLFLOW_REGISTRY_URI", "MLFLOW_ENABLE_WORKSPACES")

_SCHEME = "sqlite:///"
# columns with paths: MLflow's, and the tags of our runs
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
def opened_alone(uri: str) -> Iterator[None]:
    """Let one process at a time open an sqlite store, since processes that create its tables at once collide.

    Raises:
        Failure: another program holds the store's own lock for PATIENCE seconds.
    """
    path = path_of(uri)
    with contextlib.ExitStack() as files:
        if path and path.parent.is_dir() and not path.is_dir():
            # if no lock can be written, MLflow cannot write the store either and reports it
            with contextlib.suppress(OSError):
                handle = files.enter_context(path.with_name(f"{path.name}.lock").open("a"))
                fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists():
                _wait_until_readable(path)
        yield


def _wait_until_readable(path: Path) -> None:
    """Wait longer than MLflow itself, which fails after some seconds with a stack trace."""
    deadline, announced = time.monotonic() + PATIENCE, False
    url = f"{path.absolute().as_uri()}?mode=ro"
    while True:
        try:
            with contextlib.closing(sqlite3.connect(url, uri=True, timeout=1.0)) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return
        except sqlite3.OperationalError as e:
            if "locked" not in str(e):
                # MLflow runs into the same error and reports it
                return
            if not announced:
                print(f"{path}: locked by another program; waiting up to {PATIENCE:g} s", file=sys.stderr)
                announced = True
            if time.monotonic() > deadline:
                raise Failure(
                    f"{path}: another program has kept this store of runs locked for {PATIENCE:g} s (a backup, a viewer"
                    " of sqlite files); end it, then run the same command again"
                ) from e


def update_places(uri: str, workspace: str, artifacts: str) -> None:
    """Make the records of a moved workspace name its new path.

    Args:
        artifacts: the folder of an experiment's artifacts in the store's records.
    """
    path, old = path_of(uri), artifacts.removeprefix("file://").removesuffix("/artifacts")
    moved, inside = old != workspace and artifacts.endswith("/artifacts"), Path(workspace) / "mlflow.db"
    # the URI may be relative
    if path is None or not moved or not (path.exists() and inside.exists() and path.samefile(inside)):
        return
    if Path(old).exists() and Path(old).samefile(workspace):
        # the old path is a link to the new one
        return
    with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE)) as db, db:
        for table, column in _PLACES:
            for prefix in (old, f"file://{old}"):
                db.execute(
                    # the names are from _PLACES
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                    (workspace, len(prefix) + 1, len(prefix) + 1, f"{prefix}/"),
                )
    print(f"workspace: was at {old} before; its records now name {workspace}", file=sys.stderr)


def products(path: Path) -> dict[str, tuple[str, str]]:
    """The stage and the recipe that made each product in a store, by its URI; of several runs the latest counts.

    It is a look at the file that changes nothing; empty where that is no store, or is locked.
    """
    question = (
        "SELECT made.value, stage.value, experiments.name FROM runs"
        " JOIN experiments ON experiments.experiment_id = runs.experiment_id"
        " JOIN tags AS made ON made.run_uuid = runs.run_uuid AND made.key = 'longtake.uri'"
        " JOIN tags AS stage ON stage.run_uuid = runs.run_uuid AND stage.key = 'longtake.stage'"
        " ORDER BY runs.start_time"
    )
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)) as db:
            return {uri: (stage, recipe) for uri, stage, recipe in db.execute(question)}
    except sqlite3.Error:
        return {}


class Experiment(NamedTuple):
    """An active experiment."""

    id: str
    artifacts: str


class Finished(NamedTuple):
    """A finished run; times in milliseconds."""

    id: str
    start: int
    end: int
    tags: dict[str, str]


def experiment(uri: str, name: str) -> Experiment | None:
    """The experiment of a name; None where a look does not tell."""
    rows = _look(
        uri,
        "SELECT experiment_id, artifact_location FROM experiments"
        " WHERE name = ? AND lifecycle_stage = 'active' AND workspace = 'default'",
        (name,),
    )
    return Experiment(str(rows[0][0]), rows[0][1]) if len(rows) == 1 else None


def finished(uri: str, experiment: str, tag: str, value: str) -> Finished | None:
    """The latest finished run with a tag; None where a look does not tell."""
    rows = _look(
        uri,
        "SELECT runs.run_uuid, start_time, end_time FROM runs"
        " JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = ? AND tags.value = ?"
        " WHERE experiment_id = ? AND lifecycle_stage = 'active' AND status = 'FINISHED' AND end_time IS NOT NULL"
        " ORDER BY start_time DESC LIMIT 1",
        (tag, value, experiment),
    )
    if not rows:
        return None
    run, start, end = rows[0]
    return Finished(run, start, end, dict(_look(uri, "SELECT key, value FROM tags WHERE run_uuid = ?", (run,))))


def has_model(uri: str, model: str) -> bool:
    """Whether a version, `models:/NAME/NUMBER`, is registered and its folder is there; False where a look does not tell."""
    name, number, _ = parse(model) if model.startswith("models:/") else ("", "", "")
    if not name or not number.isdecimal():
        return False
    rows = _look(
        uri,
        "SELECT coalesce(nullif(storage_location, ''), source) FROM model_versions"
        " WHERE name = ? AND version = ? AND current_stage <> 'Deleted_Internal' AND workspace = 'default'",
        (name, int(number)),
    )
    location = str(rows[0][0]) if len(rows) == 1 else ""
    return bool(location) and "://" not in location and Path(location).is_dir()


def _look(uri: str, question: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
    """The rows that a question finds in a store of the known schema; none elsewhere. It changes nothing."""
    path = path_of(uri)
    if path is None or not path.is_file() or any(os.environ.get(name) for name in _ELSEWHERE):
        return []
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)) as db:
            if db.execute("SELECT version_num FROM alembic_version").fetchall() != [(SCHEMA,)]:
                return []
            return db.execute(question, values).fetchall()
    except sqlite3.Error:
        return []
