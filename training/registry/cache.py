"""Registered models on this machine: fetched once, checked, and there when the store is not.

In `LONGTAKE_CACHE`, else `~/.cache/longtake`:

    models/SHA256/          a model folder, named by the sha256 of its config.json, which has those of its weights
    models/SHA256.partial/  a model that is being fetched, or was when its process ended: the next pull continues it
    refs/SHA256.json        the version that a URI of a store named at its last pull
    locks/SHA256            locked while a model is fetched
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.registry import disk, store
from longtake.training.registry.fetch import SHA256, Artifacts, checked_config, model_folder, offline
from longtake.training.registry.foreign import concerns
from longtake.training.registry.uri import parse


def pull(uri: str, parts: Collection[str] | None = None) -> Path:
    """The local folder of the model that a `models:/` or `runs:/` URI names. Nobody may change its files.

    The store says what the URI names; a model that was pulled before is not fetched again. Where the store does not answer,
    or LONGTAKE_OFFLINE=1 forbids to ask it, the model is the one of the last pull. All files are compared with their digests
    each time; of a pipeline of another library, which may be large, those of these parts, or of all for None.

    Raises:
        UserError: there is no such model, version or alias, or it is none of ours.
        Failure: the store cannot be reached and the model was never pulled; it is damaged; the disk is full.
    """
    before = _last_pull(uri)
    if offline():
        return _offline(uri, before, "LONGTAKE_OFFLINE is set", parts)
    try:
        named = store.locate(uri)
    except store.Unreachable as e:
        if before is None:
            raise store.Unreachable(f"{e}; it was never pulled to {cache()}") from e
        offline_folder, last = _offline(uri, before, "", parts), before["named"]
        model = f"{last['name']} version {last['version']}" if last["version"] else last["uri"]
        day = before["pulled"][:10]
        print(f"tracking store {_store()} cannot be reached: using {model}, pulled {day}", file=sys.stderr)
        return offline_folder

    # take the version from the cache, unless a run is named, whose artifacts may change
    identity, last_pull = _identity(named), _last_pull(named.uri)
    cached = named.version and last_pull and last_pull["named"] == identity
    folder = _folder(last_pull["model"]) if cached and last_pull else None
    if folder is None or _damaged(folder, parts):
        folder = _fetched(uri, named, parts)

    # note what the URI, and the version itself, name now
    for each in {uri, named.uri}:
        last_pull = _last_pull(each)
        if last_pull is None or (last_pull["named"], last_pull["model"]) != (identity, folder.name):
            _note_pull(each, identity, folder.name)
    return folder


def copy(folder: Path, to: Path) -> None:
    """Copy a pulled model into a folder outside the cache, whole or not at all.

    Raises:
        UserError: something else is there.
        Failure: the disk is full.
    """
    config = to / "config.json"
    if config.is_file() and config.read_bytes() == (folder / "config.json").read_bytes() and not _damaged(to):
        return
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to}: is there already; name another folder")
    with _errors_of_disk(to):
        to.absolute().parent.mkdir(parents=True, exist_ok=True)
        with storage.spool_folder(str(to.absolute().parent)) as spool:
            shutil.copytree(folder, spool / "model")
            for path in [*(spool / "model").rglob("*"), spool / "model"]:
                storage.sync(path)
            (spool / "model").rename(to)


def version_of(uri: str) -> str:
    """The version that a URI named when it was pulled last, which must have been."""
    note = _last_pull(uri)
    assert note
    return str(note["named"]["uri"])


def last_config(uri: str) -> dict[str, Any] | None:
    """The config.json of the model of a URI's last pull; None where it was never pulled, or is gone."""
    note = _last_pull(uri)
    folder = _folder(note["model"]) if note else None
    return disk.read_config(folder) if folder and (folder / "config.json").is_file() else None


def cache() -> Path:
    """The folder of the cache."""
    named = os.environ.get("LONGTAKE_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "longtake"


def _folder(key: str) -> Path:
    return cache() / "models" / key


def _store() -> str:
    return shown(store.store())


def _identity(named: store.Named) -> dict[str, Any]:
    """The facts that tell a version of a store from every other, deleted ones included."""
    name = parse(named.uri).name
    return {"name": name, "uri": named.uri, "version": named.version, "sha256": named.sha256, "created": named.created}


def _reference(uri: str) -> Path:
    return cache() / "refs" / (hashlib.sha256(f"{store.store()}\n{uri}".encode()).hexdigest() + ".json")


def _last_pull(uri: str) -> dict[str, Any] | None:
    """The note of a URI's last pull from this store; None where there is none, or it is damaged."""
    try:
        note = json.loads(_reference(uri).read_bytes())
        complete = isinstance(note["named"]["uri"], str) and isinstance(note["pulled"], str)
        return note if complete and SHA256.fullmatch(note["model"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _note_pull(uri: str, identity: Mapping[str, Any], key: str) -> None:
    pulled = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    note = {"uri": uri, "store": _store(), "named": dict(identity), "model": key, "pulled": pulled}
    with _errors_of_disk(cache()):
        storage.write(str(_reference(uri)), storage.canonical_json(note))


def _offline(uri: str, before: Mapping[str, Any] | None, why: str, parts: Collection[str] | None) -> Path:
    """The model of the last pull, where the store is not asked."""
    if before is None:
        raise Failure(f"{uri}: {why}, and it was never pulled from {_store()} to {cache()}")
    folder = _folder(str(before["model"]))
    if damaged := _damaged(folder, parts):
        raise Failure(f"{folder / damaged}: is damaged or gone; pull {uri} again when {_store()} can be reached")
    return folder


def _damaged(folder: Path, parts: Collection[str] | None = None) -> str:
    """The first file of a model folder that is missing or, of these parts, does not have its digest; empty where all are whole."""
    try:
        content = disk.read_config(folder)
        key = SHA256.fullmatch(folder.name)
        if (folder / "config.json").is_symlink() or (key and disk.file_digest(folder / "config.json") != folder.name):
            return "config.json"
    except (UserError, Failure, OSError):
        return "config.json"
    for name, sha256 in content["sha256"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return str(name)
        if concerns(name, parts) and disk.file_digest(path) != sha256:
            return str(name)
    return ""


def _fetched(uri: str, named: store.Named, parts: Collection[str] | None) -> Path:
    """Fetch a model into the cache, unless it is there."""
    artifacts = model_folder(uri, named.location)
    data = artifacts.config()
    digests: dict[str, str] = checked_config(uri, data, named.sha256)["sha256"]
    folder = _folder(hashlib.sha256(data).hexdigest())
    partial = folder.with_name(folder.name + ".partial")
    with _errors_of_disk(cache()), _locked(uri, folder.name):
        if not folder.is_symlink() and not _damaged(folder, parts):
            return folder

        # the files of an earlier attempt, or of a folder where one file is damaged, need not come again
        if folder.is_symlink():
            folder.unlink()
        if folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)
        if partial.is_symlink():
            partial.unlink()
        partial.mkdir(parents=True, exist_ok=True)
        expected = {"config.json", *digests, *(f"{name}.part" for name in digests)}
        expected |= {name.rpartition("/")[0] for name in digests}
        for path in sorted(partial.rglob("*"), reverse=True):  # what is in a folder before the folder
            if str(path.relative_to(partial)) not in expected or path.is_symlink():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

        (partial / "config.json").write_bytes(data)
        _fetch_weights(artifacts, digests, partial)
        for path in [*partial.rglob("*"), partial]:
            storage.sync(path)
        partial.rename(folder)
        storage.sync(folder.parent)
    return folder


def _fetch_weights(artifacts: Artifacts, digests: Mapping[str, str], folder: Path) -> None:
    # refuse at once where the disk is too small
    total = sum(artifacts.size(name) for name in digests)
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
    free = shutil.disk_usage(folder).free
    if total - present > free:
        raise Failure(
            f"{cache()}: {artifacts.uri} needs {total - present} bytes more, {free} are free; set LONGTAKE_CACHE elsewhere"
        )

    with tqdm(total=total, unit="B", unit_scale=True, desc=artifacts.uri, disable=None, leave=False) as bar:
        for name, sha256 in digests.items():
            path = folder / name
            if path.is_file() and disk.file_digest(path) == sha256:
                bar.update(path.stat().st_size)
                continue
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            part = folder / f"{name}.part"
            # the part of an earlier pull may belong to another file: then all of it comes again
            for resumed in [True, False] if part.exists() else [False]:
                artifacts.fetch(name, part, bar)
                digest = disk.file_digest(part)
                if digest == sha256:
                    part.rename(path)
                    break
                bar.update(-part.stat().st_size)
                part.unlink()
                if not resumed:
                    raise Failure(
                        f"{artifacts.uri}: {name}: its sha256 is {digest[:12]}..., config.json says {sha256[:12]}...;"
                        " it is damaged in the store; what was fetched is deleted"
                    )


@contextlib.contextmanager
def _locked(uri: str, key: str) -> Iterator[None]:
    """Let one process at a time fetch a model."""
    path = cache() / "locks" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{uri}: another process is fetching it; waiting", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _errors_of_disk(folder: Path) -> Iterator[None]:
    """Turn the errors of the disk into one line."""
    try:
        yield
    except OSError as e:
        raise Failure(f"{folder}: {e.strerror or e}; free some space or set LONGTAKE_CACHE to another folder") from e
