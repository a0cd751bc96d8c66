"""What killed processes have left in a workspace, in MLflow and in a user's cache, and how old and large files are."""

import contextlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.training.registry import store as model_store

_FOREIGN_SECONDS = 24 * 3600.0  # for debris of other machines, whose processes cannot be asked
_OUTPUT = re.compile(r"[0-9a-f]{12}(-[0-9a-f]{8})?")
SPOOL = re.compile(r"\..+~(?P<host>[^~]+)@(?P<pid>\d+)~[0-9a-f]+\.tmp")
_SCRATCH = re.compile(r"\.(step-\d+|universal)\.tmp")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Item:
    """Something that may go: `paths` of files and folders, in the order in which they go."""

    what: str
    where: str
    bytes: int
    reason: str
    paths: tuple[str, ...]
    model: str = ""  # id of the half model in MLflow that goes with it


class Kept(NamedTuple):
    """Something that looks old and stays."""

    where: str
    reason: str


Found = Iterator[Item | Kept]


# Debris.


def find(recipe: Recipe, store: Runs, past: Iterable[tuple[str, str]], older: float) -> Found:
    """Debris of a workspace.

    Args:
        past: (id, output) of the runs that the store knows.
        older: seconds for which it must have lain still.
    """
    local = storage.is_local(recipe.workspace)
    # a remote workspace's spools lie in this machine's temporary folder
    yield from _spools(Path(recipe.workspace) if local else Path(tempfile.gettempdir()), older, deep=local)
    yield from _orphans(recipe, store, dict(past), older)
    yield from _half_models(store, older)


def _spools(root: Path, older: float, deep: bool) -> Found:
    for folder, below, files in os.walk(root):
        here = [n for n in (*below, *files) if SPOOL.fullmatch(n) or (deep and _SCRATCH.fullmatch(n))]
        below[:] = [name for name in below if name not in here] if deep else []
        for name in here:
            path = Path(folder) / name
            still = time.time() - newest(str(path))
            if match := SPOOL.fullmatch(name):
                foreign = match["host"] != socket.gethostname()
                if not foreign and storage.alive(match["pid"]):
                    continue
                if still > max(older, _FOREIGN_SECONDS if foreign else 0):
                    reason = f"left by process {match['pid']} of {match['host']}, {_ago(still)}"
                    yield Item("debris", str(path), size(str(path)), reason, (str(path),))
            elif still > older:
                owner = path.parent if name.startswith(".step") else path.parent.parent
                with locked(owner) as free:
                    if free:
                        reason = f"half a checkpoint of a killed training, {_ago(still)}"
                        yield Item("debris", str(path), size(str(path)), reason, (str(path),))


def _orphans(recipe: Recipe, store: Runs, past: dict[str, str], older: float) -> Found:
    """Outputs that no run names, of stages that hold nothing which cannot be made again."""
    known, runs = set(past.values()), set(past)
    outputs = [
        storage.join(recipe.workspace, stage, name)
        for stage in storage.names(recipe.workspace)
        if not stage.startswith(".") and not is_link(Path(storage.join(recipe.workspace, stage)))
        for name in storage.names(storage.join(recipe.workspace, stage))
        if _OUTPUT.fullmatch(name)
    ]
    for output in outputs:
        inside = set(storage.names(output))
        if output in known or not inside or (storage.is_local(output) and is_link(Path(output))):
            continue
        if not known:
            yield Kept(output, "this tracking store knows no run of this workspace; is MLFLOW_TRACKING_URI right?")
        elif inside - {"checkpoints", "latents.json"}:
            yield Kept(output, "no run names it, but it may hold what cannot be made again; delete it yourself")
        elif _named_elsewhere(output, store):
            yield Kept(output, "a run names it by the path that the workspace had before it was moved")
        elif (still := time.time() - newest(output)) > older and _is_free(output, runs):
            yield Item("output", output, size(output), f"no run in MLflow names it, {_ago(still)}", (output,))


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


def _half_models(store: Runs, older: float) -> Found:
    """Models that killed runs have logged by half; a run that goes on logs them anew."""
    client = store.client
    for model in pages(lambda t: client.search_logged_models([store.experiment], page_token=t)):
        still = time.time() - model.last_updated_timestamp / 1000
        if model.status == "READY" or "sha256" not in model.tags or still < older:
            continue
        where = f"MLflow: model {model.model_id} of run {model.source_run_id}"
        if model.source_run_id and client.get_run(model.source_run_id).info.status in ("RUNNING", "SCHEDULED"):
            yield Kept(where, "its run is RUNNING in MLflow; if it is dead, run it again or end it")
        else:
            bytes_ = _artifact_bytes(model.artifact_location)
            yield Item(
                "half model", where, bytes_, f"its run was killed while it logged it, {_ago(still)}", (), model.model_id
            )


def _artifact_bytes(location: str) -> int:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    def below(path: str | None) -> int:
        return sum(below(f.path) if f.is_dir else f.file_size or 0 for f in repository.list_artifacts(path))

    repository = get_artifact_repository(location)
    return below(None)


def remove_model(item: Item, store: Runs) -> Kept | None:
    """Delete half a model; what is returned says why it stays."""
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


def cached_models(older: float) -> Found:
    """Models in this user's cache that no ref names any more."""
    root = Path(os.environ.get("LONGTAKE_CACHE") or Path.home() / ".cache" / "longtake")
    refs = "".join(path.read_text(errors="replace") for path in root.glob("refs/**/*") if path.is_file())
    for path in sorted(root.glob("models/*")):
        if not _SHA256.fullmatch(path.name) or path.is_symlink() or not path.is_dir() or path.name in refs:
            continue
        if (still := time.time() - newest(str(path))) > older:
            reason = f"no URI that was pulled names it any more, {_ago(still)}"
            yield Item("cached model", str(path), size(str(path)), reason, (str(path),))


# Files.


def is_link(path: Path) -> bool:
    """Whether the folder, or the one of its stage above it, leads elsewhere."""
    return path.is_symlink() or path.parent.is_symlink()


def files(url: str) -> Iterator[tuple[str, int]]:
    """Files below a URL, or itself, with their bytes; links are not followed."""
    for path, count, _ in _stats(url):
        yield path, count


def size(url: str) -> int:
    """Bytes below a URL."""
    return sum(count for _, count in files(url))


def newest(url: str) -> float:
    """When anything below a URL was written last, in seconds since 1970; now, where the store does not say."""
    return max((when for _, _, when in _stats(url)), default=time.time())


def _stats(url: str) -> Iterator[tuple[str, int, float]]:
    if not storage.is_local(url):
        fs, path = storage.filesystem(url)
        fs.invalidate_cache(path)
        for name, facts in storage.retrying(url, lambda: fs.find(path, detail=True)).items():
            when = facts.get("LastModified") or facts.get("mtime") or facts.get("updated") or time.time()
            yield fs.unstrip_protocol(name), int(facts.get("size") or 0), getattr(when, "timestamp", lambda w=when: w)()
        return
    for folder, _, names in [*os.walk(url), (str(Path(url).parent), [], [Path(url).name])]:
        for here in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):
                told = here.lstat()
                yield str(here), 0 if stat.S_ISDIR(told.st_mode) else told.st_size, told.st_mtime


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours ago" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days ago"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder against a training that would begin; False where one is at work."""
    from longtake.training.checkpoint import locked

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except UserError:
            yield False
            return
        yield True


def run_of(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(json.loads((path / "meta.json").read_bytes()).get("run"))
    return ""


def pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return
