"""Registered models on this machine: fetched once, checked, and there when the store is not.

In `LONGTAKE_CACHE`, else `~/.cache/longtake`:

    models/SHA256/          a model folder, named by the sha256 of its config.json, which has those of its weights
    models/SHA256.partial/  one that is being fetched, or was when it was stopped: it is taken up again
    refs/SHA256.json        what a URI of a store named when it was pulled
    locks/SHA256            held while a model is fetched

Of the artifacts of a model only config.json and the weights that it names are ever fetched, so a pickle never is.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from tqdm import tqdm

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.registry import disk, store
from longtake.training.registry.uri import parse

_CHUNK = 4 << 20
_LOOKED_AT = 100  # folders of artifacts in which config.json is looked for
_SHA256 = re.compile(r"[0-9a-f]{64}")

_LINK = -1
# names in a folder -> bytes of a file, None of a folder, _LINK
Listing = Mapping[str, int | None]


def pull(uri: str) -> Path:
    """A local folder with the model that a `models:/` or `runs:/` URI names; nobody may change what is in it.

    The store is asked what the URI names; what was pulled before is not fetched again. Where the store does not answer,
    or is not to be asked (LONGTAKE_OFFLINE=1), it is what the URI named when it was pulled. All of it is compared with
    its digests each time.

    Raises:
        UserError: there is no such model, version or alias, or it is none of ours.
        Failure: the store cannot be reached and the model was never pulled; it is damaged; the disk is full.
    """
    before = _recalled(uri)
    if os.environ.get("LONGTAKE_OFFLINE", "0") not in ("", "0"):
        return _offline(uri, before, "LONGTAKE_OFFLINE is set")
    try:
        found = store.locate(uri)
    except store.Unreachable as e:
        if before is None:
            raise store.Unreachable(f"{e}; it was never pulled to {cache()}") from e
        folder = _offline(uri, before, "")
        named = before["named"]
        what = f"{named['name']} version {named['version']}" if named["version"] else named["uri"]
        day = before["pulled"][:10]
        print(f"tracking store {_store()} cannot be reached: using {what}, pulled {day}", file=sys.stderr)
        return folder
    named = _named(found)
    known = _recalled(found.uri)
    # a run's artifacts may change
    if found.version and known and known["named"] == named and not _damaged(folder := _folder(known["model"])):
        key = str(known["model"])
    else:
        folder = _fetched(uri, found)
        key = folder.name
    for each in {uri, found.uri}:
        now = _recalled(each)
        if now is None or (now["named"], now["model"]) != (named, key):
            _remember(each, named, key)
    return folder


def describe(uri: str) -> dict[str, Any]:
    """What config.json says of the model that a URI names, and its `bytes`; its weights are not fetched. Raises as `pull`."""
    found = store.locate(uri)
    at, sizes = _model_folder(uri, found.location)
    content = _config(uri, _small(uri, found.location, at, sizes), found.sha256)
    return {**content, "bytes": sum(sizes.get(name) or 0 for name in content["sha256"])}


def beside(uri: str, path: str, to: Path, most: int) -> None:
    """Fetch one file that the run has left which made the model that a URI names. It is not kept.

    Raises:
        UserError: there is no such model, or its run has left no such file.
        Failure: the store cannot be reached, or is not to be asked; the file is larger than `most` bytes.
    """
    if os.environ.get("LONGTAKE_OFFLINE", "0") not in ("", "0"):
        raise Failure(f"{uri}: LONGTAKE_OFFLINE is set")
    location = store.artifacts_of(uri)
    at, _, name = path.rpartition("/")
    sizes = _listing(uri, location, at)
    if sizes.get(name) is None:
        raise UserError(f"{uri}: its run has left no {name}")
    size = _size(uri, sizes, name)
    if size > most:
        raise Failure(f"{uri}: {name}: is larger than {most} bytes")
    with tqdm(disable=True) as bar:
        _grow(f"{uri}: {name}", location, path, to, size, bar)


def copy(folder: Path, to: Path) -> None:
    """Write a pulled model into a folder of its own, whole or not at all.

    Raises:
        UserError: something else is there.
        Failure: the disk is full.
    """
    config = to / "config.json"
    if config.is_file() and config.read_bytes() == (folder / "config.json").read_bytes() and not _damaged(to):
        return
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to}: is there already; name another folder")
    with _of_disk(to):
        to.absolute().parent.mkdir(parents=True, exist_ok=True)
        with storage.spool_folder(str(to.absolute().parent)) as spool:
            shutil.copytree(folder, spool / "model")
            for path in [*(spool / "model").iterdir(), spool / "model"]:
                storage.sync(path)
            (spool / "model").rename(to)


def cache() -> Path:
    """Where pulled models are."""
    named = os.environ.get("LONGTAKE_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "longtake"


def _folder(key: str) -> Path:
    return cache() / "models" / key


def _store() -> str:
    return shown(store.store())


def _named(found: store.Named) -> dict[str, Any]:
    """What tells a version of a store from every other, one that has been deleted included."""
    name = parse(found.uri).name
    return {"name": name, "uri": found.uri, "version": found.version, "sha256": found.sha256, "created": found.created}


def _reference(uri: str) -> Path:
    return cache() / "refs" / (hashlib.sha256(f"{store.store()}\n{uri}".encode()).hexdigest() + ".json")


def _recalled(uri: str) -> dict[str, Any] | None:
    """What a URI named at its last pull from this store; None where it was never pulled or what is noted is damaged."""
    try:
        noted = json.loads(_reference(uri).read_bytes())
        whole = isinstance(noted["named"]["uri"], str) and isinstance(noted["pulled"], str)
        return noted if whole and _SHA256.fullmatch(noted["model"]) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _remember(uri: str, named: Mapping[str, Any], key: str) -> None:
    pulled = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    noted = {"uri": uri, "store": _store(), "named": dict(named), "model": key, "pulled": pulled}
    with _of_disk(cache()):
        storage.write(str(_reference(uri)), storage.canonical_json(noted))


def _offline(uri: str, before: Mapping[str, Any] | None, why: str) -> Path:
    if before is None:
        raise Failure(f"{uri}: {why}, and it was never pulled from {_store()} to {cache()}")
    folder = _folder(str(before["model"]))
    if damaged := _damaged(folder):
        raise Failure(f"{folder / damaged}: is damaged or gone; pull {uri} again when {_store()} can be reached")
    return folder


def _damaged(folder: Path) -> str:
    """The first file of a model folder that is not what it should be; empty where all are."""
    try:
        content = disk.read_config(folder)
        key = _SHA256.fullmatch(folder.name)
        if (folder / "config.json").is_symlink() or (key and disk.file_digest(folder / "config.json") != folder.name):
            return "config.json"
    except (UserError, Failure, OSError):
        return "config.json"
    for name, sha256 in content["sha256"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or disk.file_digest(path) != sha256:
            return str(name)
    return ""


def _fetched(uri: str, found: store.Named) -> Path:
    """Fetch a model into the cache, unless it is there."""
    at, sizes = _model_folder(uri, found.location)
    data = _small(uri, found.location, at, sizes)
    content = _config(uri, data, found.sha256)
    folder = _folder(hashlib.sha256(data).hexdigest())
    begun = folder.with_name(folder.name + ".partial")
    with _of_disk(cache()), _alone(uri, folder.name):
        if not folder.is_symlink() and not _damaged(folder):
            return folder
        if folder.is_symlink():
            folder.unlink()
        if folder.exists():
            # one file is damaged: the others need not come again
            shutil.rmtree(begun, ignore_errors=True)
            folder.rename(begun)
        if begun.is_symlink():
            begun.unlink()
        begun.mkdir(parents=True, exist_ok=True)
        wanted = {"config.json", *content["sha256"], *(f"{name}.part" for name in content["sha256"])}
        for path in begun.iterdir():
            if path.name not in wanted or path.is_symlink():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (begun / "config.json").write_bytes(data)
        _fetch_weights(uri, found.location, at, content["sha256"], sizes, begun)
        for path in [*begun.iterdir(), begun]:
            storage.sync(path)
        begun.rename(folder)
        storage.sync(folder.parent)
    return folder


def _fetch_weights(uri: str, location: str, at: str, digests: Mapping[str, str], sizes: Listing, begun: Path) -> None:
    total = sum(_size(uri, sizes, name) for name in digests)
    there = sum(path.stat().st_size for path in begun.iterdir() if path.name != "config.json")
    free = shutil.disk_usage(begun).free
    if total - there > free:
        raise Failure(
            f"{cache()}: {uri} needs {total - there} bytes more, {free} are free; set LONGTAKE_CACHE elsewhere"
        )
    with tqdm(total=total, unit="B", unit_scale=True, desc=uri, disable=None, leave=False) as bar:
        for name, sha256 in digests.items():
            path = begun / name
            if path.is_file() and disk.file_digest(path) == sha256:
                bar.update(path.stat().st_size)
                continue
            path.unlink(missing_ok=True)
            part = begun / f"{name}.part"
            # what an earlier pull has left may be of another file: then all of it comes again
            for resumed in [True, False] if part.exists() else [False]:
                _grow(f"{uri}: {name}", location, _inside(at, name), part, _size(uri, sizes, name), bar)
                got = disk.file_digest(part)
                if got == sha256:
                    part.rename(path)
                    break
                bar.update(-part.stat().st_size)
                part.unlink()
                if not resumed:
                    raise Failure(
                        f"{uri}: {name}: its sha256 is {got[:12]}..., config.json says {sha256[:12]}...;"
                        " it is damaged in the store; what was fetched is deleted"
                    )


def _grow(what: str, location: str, path: str, part: Path, size: int, bar: Any) -> None:
    """Fetch a file from where it stops on, until it has `size` bytes."""
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as f:
        furthest = f.seek(0, os.SEEK_END)
        if furthest > size:
            furthest = f.seek(0)
            f.truncate()
        bar.update(furthest)
        while f.tell() < size:
            with _of_store(what):
                storage.retrying(what, partial(_take, what, location, path, f, size, furthest, bar))
            furthest = max(furthest, f.tell())


def _take(what: str, location: str, path: str, f: BinaryIO, size: int, furthest: int, bar: Any) -> None:
    """Append what comes. It is no failed attempt when it breaks off further on than any before."""
    start, chunks = _opened(location, path, f.tell())
    bar.update(start - f.tell())
    f.seek(start)
    f.truncate()
    while True:
        try:
            chunk = next(chunks, b"")
        except OSError:
            if f.tell() > furthest:
                return
            raise
        if not chunk and f.tell() <= furthest:
            raise ConnectionError(f"ended after {f.tell()} of {size} bytes")
        if not chunk:
            return
        if f.tell() + len(chunk) > size:
            raise Failure(f"{what}: is larger than the {size} bytes that the store says")
        f.write(chunk)
        bar.update(len(chunk))


def _config(uri: str, data: bytes, registered: str | None) -> dict[str, Any]:
    """config.json, checked before any file that it names is fetched."""
    content = disk.checked_config(uri, disk.parsed(f"{uri}: config.json", data))
    wrong = [name for name, sha256 in content["sha256"].items() if not _SHA256.fullmatch(str(sha256))]
    if wrong or not content["sha256"]:
        raise Failure(f"{uri}: config.json: sha256: needs the digest of each weights file")
    if uri.startswith("models:/") and disk.digest(content) != registered:
        said = f"says {registered[:12]}..." if registered else "is missing"
        raise Failure(
            f"{uri}: its config.json names weights {disk.digest(content)[:12]}..., but the version's tag sha256 {said};"
            " they are not what was registered: register the model again"
        )
    return content


def _model_folder(uri: str, location: str) -> tuple[str, Listing]:
    """The first folder in the artifacts that has a config.json, and what is in it."""
    todo = [""]
    for at in todo:
        sizes = _listing(uri, location, at)
        if sizes.get("config.json") is not None:
            return at, sizes
        if at.count("/") < 2 and len(todo) < _LOOKED_AT:
            todo += [_inside(at, name) for name, size in sorted(sizes.items()) if size is None]
    if not store.is_served(location) and storage.is_local(location) and not storage.exists(location):
        raise UserError(
            f"{uri}: its files are not in {location} any more; where a workspace was moved, `longtake status RECIPE`"
            " with its new path brings its records along"
        )
    raise UserError(f"{uri}: not a longtake model (no config.json in {shown(location)})")


def _listing(uri: str, location: str, at: str) -> Listing:
    if store.is_served(location):
        found: Listing = store.list_served(location, at)
    else:
        url = storage.join(location, at) if at else location
        fs, path = _filesystem(url)
        with _of_store(uri):
            try:
                entries = storage.retrying(url, lambda: fs.ls(path, detail=True))
            except (FileNotFoundError, NotADirectoryError):
                entries = []
        kinds = {"directory": None, "link": _LINK}
        found = {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: _LINK
            if entry.get("islink")
            else kinds.get(entry["type"], entry.get("size") or 0)
            for entry in entries
        }
    return {name: size for name, size in found.items() if name not in ("", ".", "..") and "\\" not in name}


def _size(uri: str, sizes: Listing, name: str) -> int:
    size = sizes.get(name)
    if size == _LINK:
        raise Failure(f"{uri}: {name} is a symbolic link in the store, and none is followed")
    if size is None:
        raise Failure(f"{uri}: {name} is named in config.json, but it is not in the store; register the model again")
    if size > disk.MOST_JSON.get(name, size):
        raise Failure(f"{uri}: {name}: is larger than {disk.MOST_JSON[name]} bytes")
    return size


def _small(uri: str, location: str, at: str, sizes: Listing) -> bytes:
    """config.json of a store."""
    size = _size(uri, sizes, "config.json")
    with tempfile.TemporaryDirectory() as scratch, tqdm(disable=True) as bar:
        part = Path(scratch) / "config.json"
        _grow(f"{uri}: config.json", location, _inside(at, "config.json"), part, size, bar)
        return part.read_bytes() if size else b""


def _opened(location: str, path: str, start: int) -> tuple[int, Iterator[bytes]]:
    if store.is_served(location):
        return store.read_served(location, path, start)
    fs, name = _filesystem(storage.join(location, path))

    def chunks() -> Iterator[bytes]:
        local = "file" in storage.protocols(fs)
        # a link may have come after the folder was listed
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW), "rb") if local else fs.open(name, "rb") as f:
            f.seek(start)
            while chunk := f.read(_CHUNK):
                yield chunk

    return start, chunks()


def _filesystem(url: str) -> tuple[Any, str]:
    """As MLflow finds it, whose address of an S3 server has a name of its own."""
    address = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if address and url.startswith("s3://") and find_spec("s3fs"):
        return fsspec.core.url_to_fs(url, endpoint_url=address)
    return storage.filesystem(url)


def _inside(at: str, name: str) -> str:
    return f"{at}/{name}" if at else name


@contextlib.contextmanager
def _alone(uri: str, key: str) -> Iterator[None]:
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
def _of_disk(folder: Path) -> Iterator[None]:
    """Turn the errors of the disk into one line."""
    try:
        yield
    except OSError as e:
        raise Failure(f"{folder}: {e.strerror or e}; free some space or set LONGTAKE_CACHE to another folder") from e


@contextlib.contextmanager
def _of_store(what: str) -> Iterator[None]:
    """Turn what cannot pass into one line; other faults have been tried again."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as e:
        raise Failure(f"{what}: cannot be read in the store ({shown(' '.join(str(e).split()))[:200]})") from e
