"""The debris of killed processes in a workspace, in MLflow and in a user's cache; the age and size of files."""

import contextlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.training.registry import store as model_store

_FOREIGN_SECONDS = 24 * 3600.0  # for debris of other machines, whose processes cannot be looked up
_OUTPUT = re.compile(r"[0-9a-f]{12}(-[0-9a-f]{8})?")
SPOOL = re.compile(r"\..+~(?P<host>[^~]+)@(?P<pid>\d+)~[0-9a-f]+\.tmp")
# what outputs hold that can be made again
_REMADE = {"checkpoints", "empty.safetensors", "shared"} | {
    f"{record}.json" for record in ("captions", "clusters", "latents", "scores", "text", "tokens")
}
_SCRATCH = re.compile(r"\.(step-\d+|universal)\.tmp")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Item:
    """Something that may be deleted: `paths` of files and folders, in the order of their deletion."""

    kind: str
    where: str
    bytes: int
    reason: str
    paths: tuple[str, ...]
    model: str = ""  # id of the partly logged model in MLflow that is deleted with it


class Kept(NamedTuple):
    """Something that looks unused and stays."""

    where: str
    reason: str


Finds = Iterator[Item | Kept]


# Debris.


def find(
    recipe: Recipe, store: Runs, past: Iterable[tuple[str, str]], older: float, folders: Iterable[Path] = ()
) -> Finds:
    """Debris of a workspace.

    Args:
        past: (id, output) of the runs that the store knows.
        older: seconds since its last change, at least.
        folders: of checkpoints outside of the workspace.
    """
    local = storage.is_local(recipe.workspace)
    # spools of a remote workspace are in this machine's temporary folder
    yield from _spools(Path(recipe.workspace) if local else Path(tempfile.gettempdir()), older, deep=local)
    for folder in folders:
        if not is_link(folder) and not (local and folder.is_relative_to(recipe.workspace)):
            yield from _spools(folder, older, deep=True)
    yield from _orphans(recipe, store, dict(past), older)
    yield from _partial_models(store, older)


def _spools(root: Path, older: float, deep: bool) -> Finds:
    for folder, subfolders, files in os.walk(root):
        matching = [n for n in (*subfolders, *files) if SPOOL.fullmatch(n) or (deep and _SCRATCH.fullmatch(n))]
        subfolders[:] = [name for name in subfolders if name not in matching] if deep else []
        for name in matching:
            path = Path(folder) / name
            age = age_of(str(path))
            if match := SPOOL.fullmatch(name):
                foreign = match["host"] != socket.gethostname()
                if not foreign and storage.alive(match["pid"]):
                    continue
                if age > max(older, _FOREIGN_SECONDS if foreign else 0):
                    reason = f"left by process {match['pid']} of {match['host']}, {_ago(age)}"
                    yield Item("debris", str(path), size(str(path)), reason, (str(path),))
            elif age > older:
                owner = path.parent if name.startswith(".step") else path.parent.parent
                with locked(owner) as free:
                    if free:
                        reason = f"half a checkpoint of a killed training, {_ago(age)}"
                        yield Item("debris", str(path), size(str(path)), reason, (str(path),))


def _orphans(recipe: Recipe, store: Runs, past: dict[str, str], older: float) -> Finds:
    """Outputs that no run names, if all that they hold can be made again."""
    named, runs = set(past.values()), set(past)
    outputs = [
        storage.join(recipe.workspace, stage, name)
        for stage in storage.names(recipe.workspace)
        if not stage.startswith(".") and not is_link(Path(storage.join(recipe.workspace, stage)))
        for name in storage.names(storage.join(recipe.workspace, stage))
        if _OUTPUT.fullmatch(name)
    ]
    for output in outputs:
        content = set(storage.names(output))
        if output in named or not content or (storage.is_local(output) and is_link(Path(output))):
            continue
        if not named:
            yield Kept(output, "this tracking store knows no run of this workspace; is MLFLOW_TRACKING_URI right?")
        elif content - _REMADE:
            yield Kept(output, "no run names it, but it may hold what cannot be made again; delete it yourself")
        elif _named_elsewhere(output, store):
            yield Kept(output, "a run names it by the path that the workspace had before it was moved")
        elif (age := age_of(output)) > older and _is_free(output, runs):
            yield Item("output", output, size(output), f"no run in MLflow names it, {_ago(age)}", (output,))


def _named_elsewhere(output: str, store: Runs) -> bool:
    stage, name = output.rsplit("/", 2)[1:]
    condition = f"tags.`longtake.output` LIKE '%/{stage}/{name}'"
    return bool(store.client.search_runs([store.experiment], condition, max_results=1))


def _is_free(output: str, runs: set[str]) -> bool:
    folder = Path(output) / "checkpoints"
    if not storage.is_local(output) or not folder.is_dir():
        return True
    if folder.is_symlink() or {run_of(path) for path in folder.glob("step-*")} & runs:
        return False
    with locked(folder) as free:
        return free


def _partial_models(store: Runs, older: float) -> Finds:
    """Models that killed runs have logged only in part; a resumed run logs them anew."""
    client = store.client
    for model in model_store.everything(client.search_logged_models, [store.experiment]):
        age = time.time() - model.last_updated_timestamp / 1000
        if model.status == "READY" or "sha256" not in model.tags or age < older:
            continue
        where = f"MLflow: model {model.model_id} of run {model.source_run_id}"
        if model.source_run_id and client.get_run(model.source_run_id).info.status in ("RUNNING", "SCHEDULED"):
            yield Kept(where, "its run is RUNNING in MLflow; if it is dead, run it again or end it")
        else:
            reason = f"its run was killed while it logged it, {_ago(age)}"
            yield Item("half model", where, _artifact_bytes(model.artifact_location), reason, (), model.model_id)


def _artifact_bytes(location: str) -> int:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    def below(path: str | None) -> int:
        return sum(below(f.path) if f.is_dir else f.file_size or 0 for f in repository.list_artifacts(path))

    repository = get_artifact_repository(location)
    return below(None)


def remove_model(item: Item, store: Runs) -> Kept | None:
    """Delete a partly logged model; returns the reason if it cannot be deleted."""
    from mlflow.exceptions import MlflowException

    try:
        location = store.client.get_logged_model(item.model).artifact_location
        if not model_store.delete_artifacts(location):
            return Kept(item.where, f"its store cannot delete {location}: delete that by hand")
        store.client.delete_logged_model(item.model)
        return None
    except MlflowException as e:
        raise Failure(f"{item.where}: {str(e).splitlines()[0]}") from e


# Pulled models.


def cached_models(older: float) -> Finds:
    """Models in this user's cache that no ref names any more."""
    root = Path(os.environ.get("LONGTAKE_CACHE") or Path.home() / ".cache" / "longtake")
    refs = "".join(path.read_text(errors="replace") for path in root.glob("refs/**/*") if path.is_file())
    for path in sorted(root.glob("models/*")):
        if not _SHA256.fullmatch(path.name) or path.is_symlink() or not path.is_dir() or path.name in refs:
            continue
        if (age := age_of(str(path))) > older:
            reason = f"no URI that was pulled names it any more, {_ago(age)}"
            yield Item("cached model", str(path), size(str(path)), reason, (str(path),))


# Files.


def is_link(path: Path) -> bool:
    """Whether the folder, or the folder of its stage above it, is a link."""
    return path.is_symlink() or path.parent.is_symlink()


def files(url: str) -> Iterator[tuple[str, int]]:
    """Files below a URL, or the URL's own file, with their bytes; links are not followed."""
    for path, count, _ in _stats(url):
        yield path, count


def size(url: str) -> int:
    """Bytes below a URL."""
    return sum(count for _, count in files(url))


def age_of(url: str) -> float:
    """Seconds since anything below a URL was written last; 0 where the store has no times."""
    return time.time() - max((when for _, _, when in _stats(url)), default=time.time())


def _stats(url: str) -> Iterator[tuple[str, int, float]]:
    """(path, bytes, time of the last change) of all below a URL, and of the URL itself."""
    if not storage.is_local(url):
        fs, path = storage.filesystem(url)
        fs.invalidate_cache(path)
        for name, facts in storage.retrying(url, lambda: fs.find(path, detail=True)).items():
            when = facts.get("LastModified") or facts.get("mtime") or facts.get("updated") or time.time()
            yield fs.unstrip_protocol(name), int(facts.get("size") or 0), getattr(when, "timestamp", lambda w=when: w)()
        return
    for folder, _, names in [*os.walk(url), (str(Path(url).parent), [], [Path(url).name])]:
        for file in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):
                status = file.lstat()
                yield str(file), 0 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours ago" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days ago"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep a training from starting in a folder of checkpoints; False if one is at work there."""
    from longtake.training.checkpoint import locked

    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(folder))
        except UserError:
            yield False
            return
        yield True


def run_of(path: Path) -> str:
    """The MLflow run that wrote a checkpoint; empty if its meta.json cannot be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(json.loads((path / "meta.json").read_bytes()).get("run"))
    return ""
