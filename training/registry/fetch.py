"""A model's files in a store: found among the artifacts, checked, fetched from where an earlier attempt stopped.

Only config.json and the weights that it names are ever fetched, so a pickle never is.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from tqdm import tqdm

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.registry import disk, store
from longtake.training.registry.foreign import REFERENCE

_CHUNK = 4 << 20
_MOST_FOLDERS = 100  # of artifacts, in which config.json is looked for
SHA256 = re.compile(r"[0-9a-f]{64}")

_LINK = -1
# names in a folder -> bytes of a file, None for a folder, _LINK
Listing = Mapping[str, int | None]


class Artifacts(NamedTuple):
    """One folder of artifacts, and the URI that it belongs to, for messages."""

    uri: str
    location: str
    folder: str
    sizes: Listing

    def size(self, name: str) -> int:
        """Bytes of a file. Raises Failure for a link, a missing file, or one that is too large."""
        size = self.sizes.get(name)
        if size == _LINK:
            raise Failure(f"{self.uri}: {name} is a symbolic link in the store, and none is followed")
        if size is None:
            raise Failure(
                f"{self.uri}: {name} is named in config.json, but it is not in the store; register the model again"
            )
        if size > disk.MOST_JSON.get(name, size):
            raise Failure(f"{self.uri}: {name}: is larger than {disk.MOST_JSON[name]} bytes")
        return size

    def fetch(self, name: str, to: Path, bar: Any = None) -> None:
        """Fetch a file; `to` may have its first bytes already."""
        with tqdm(disable=True) if bar is None else contextlib.nullcontext(bar) as progress:
            path = _inside(self.folder, name)
            _grow(f"{self.uri}: {name}", self.location, path, to, self.size(name), progress)

    def config(self) -> bytes:
        """config.json, as it is in the store."""
        with tempfile.TemporaryDirectory() as scratch:
            self.fetch("config.json", Path(scratch) / "config.json")
            return (Path(scratch) / "config.json").read_bytes()


def offline() -> bool:
    """Whether LONGTAKE_OFFLINE forbids to ask a store."""
    return os.environ.get("LONGTAKE_OFFLINE", "0") not in ("", "0")


def model_folder(uri: str, location: str) -> Artifacts:
    """The first folder of the artifacts that has a config.json. Raises UserError where there is none."""
    folders = [""]
    for folder in folders:
        sizes = _listing(uri, location, folder)
        if sizes.get("config.json") is not None:
            # a foreign model has its files in folders below
            below = {
                f"{inner}/{name}": size
                for inner in (name for name, size in sizes.items() if size is None)
                for name, size in _listing(uri, location, _inside(folder, inner)).items()
            }
            return Artifacts(uri, location, folder, {**sizes, **below})
        if folder.count("/") < 2 and len(folders) < _MOST_FOLDERS:
            folders += [_inside(folder, name) for name, size in sorted(sizes.items()) if size is None]
    if not store.is_served(location) and storage.is_local(location) and not storage.exists(location):
        raise UserError(
            f"{uri}: its files are not in {location} any more; where a workspace was moved, `longtake status RECIPE`"
            " with its new path brings its records along"
        )
    raise UserError(f"{uri}: not a longtake model (no config.json in {shown(location)})")


def describe(uri: str) -> dict[str, Any]:
    """The config.json of a model, the `bytes` of its weights, which are not fetched, and the `location` of its files.

    Raises:
        As `cache.pull`.
    """
    named = store.locate(uri)
    artifacts = model_folder(uri, named.location)
    content = checked_config(uri, artifacts.config(), named.sha256)
    stored = sum(artifacts.sizes.get(name) or 0 for name in content["sha256"])
    # one that is registered by reference lies elsewhere
    there = {"location": content["config"].get("folder"), "bytes": content["config"].get("bytes")}
    here = {"location": storage.join(artifacts.location, artifacts.folder).rstrip("/"), "bytes": stored}
    return {**content, **(there if REFERENCE in content["sha256"] else here)}


def beside(uri: str, path: str, to: Path, most: int) -> None:
    """Fetch one file of the run that made a model. It is not cached.

    Raises:
        UserError: there is no such model, or its run has no such file.
        Failure: the store cannot be reached, or LONGTAKE_OFFLINE is set; the file is larger than `most` bytes.
    """
    if offline():
        raise Failure(f"{uri}: LONGTAKE_OFFLINE is set")
    location = store.artifacts_of(uri)
    folder, _, name = path.rpartition("/")
    artifacts = Artifacts(uri, location, folder, _listing(uri, location, folder))
    if artifacts.sizes.get(name) is None:
        raise UserError(f"{uri}: its run has left no {name}")
    if artifacts.size(name) > most:
        raise Failure(f"{uri}: {name}: is larger than {most} bytes")
    artifacts.fetch(name, to)


def checked_config(uri: str, data: bytes, registered: str | None) -> dict[str, Any]:
    """The content of config.json, checked before any file that it names is fetched."""
    content = disk.checked_config(uri, disk.parsed(f"{uri}: config.json", data))
    wrong = [name for name, sha256 in content["sha256"].items() if not SHA256.fullmatch(str(sha256))]
    if wrong or not content["sha256"]:
        raise Failure(f"{uri}: config.json: sha256: needs the digest of each weights file")
    if uri.startswith("models:/") and disk.digest(content) != registered:
        tag = f"says {registered[:12]}..." if registered else "is missing"
        raise Failure(
            f"{uri}: its config.json names weights {disk.digest(content)[:12]}..., but the version's tag sha256 {tag};"
            " they are not what was registered: register the model again"
        )
    return content


def _listing(uri: str, location: str, folder: str) -> Listing:
    if store.is_served(location):
        sizes: Listing = store.list_served(location, folder)
    else:
        url = storage.join(location, folder) if folder else location
        fs, path = _filesystem(url)
        with _of_store(uri):
            try:
                entries = storage.retrying(url, lambda: fs.ls(path, detail=True))
            except (FileNotFoundError, NotADirectoryError):
                entries = []
        kinds = {"directory": None, "link": _LINK}
        sizes = {
            entry["name"].rstrip("/").rsplit("/", 1)[-1]: _LINK
            if entry.get("islink")
            else kinds.get(entry["type"], entry.get("size") or 0)
            for entry in entries
        }
    return {name: size for name, size in sizes.items() if name not in ("", ".", "..") and "\\" not in name}


def _opened(location: str, path: str, start: int) -> tuple[int, Iterator[bytes]]:
    """The file from byte `start` on, or from 0: the first byte's number, and the bytes."""
    if store.is_served(location):
        return store.read_served(location, path, start)
    fs, name = _filesystem(storage.join(location, path))

    def chunks() -> Iterator[bytes]:
        local = "file" in storage.protocols(fs)
        # the file may have become a link after the folder was listed
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW), "rb") if local else fs.open(name, "rb") as f:
            f.seek(start)
            while chunk := f.read(_CHUNK):
                yield chunk

    return start, chunks()


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, with the S3 server of MLflow's own variable."""
    address = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if address and url.startswith("s3://") and find_spec("s3fs"):
        return fsspec.core.url_to_fs(url, endpoint_url=address)
    return storage.filesystem(url)


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _grow(what: str, location: str, path: str, part: Path, size: int, bar: Any) -> None:
    """Fetch the rest of a file, until it has `size` bytes."""
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as f:
        furthest = f.seek(0, os.SEEK_END)
        if furthest > size:
            furthest = f.seek(0)
            f.truncate()
        bar.update(furthest)
        while f.tell() < size:
            with _of_store(what):
                storage.retrying(what, partial(_append, what, location, path, f, size, furthest, bar))
            furthest = max(furthest, f.tell())


def _append(what: str, location: str, path: str, f: BinaryIO, size: int, furthest: int, bar: Any) -> None:
    """Append bytes until the connection ends. An attempt that gets further than any before is no failed one."""
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


@contextlib.contextmanager
def _of_store(what: str) -> Iterator[None]:
    """Turn errors that no further attempt would cure into one line."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as e:
        raise Failure(f"{what}: cannot be read in the store ({shown(' '.join(str(e).split()))[:200]})") from e
