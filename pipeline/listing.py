"""List folders and globs, on this machine and in stores. A path that exists is never a glob.

On this machine links are followed, each real folder is entered once, and a folder that may not be read is listed as an
entry. Workspaces below a listed folder are skipped: their clips would be cut again.
"""

import fnmatch
import glob
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.pipeline.manifest import KINDS, is_other_list, suffix

_SUFFIXES = """3g2 3gp asf avi av1 f4v flv gif h264 h265 hevc ivf m2ts m4v mjpeg mkv mov mp4 mpeg mpg mts mxf nut obu
ogm ogv rm rmvb ts vob webm wmv y4m"""
VIDEO_SUFFIXES = frozenset(_SUFFIXES.split())
# the recipes in a workspace, by which it is recognized
_RESOLVED = re.compile(r"(?:(.*)/)?recipes/[0-9a-f]{12}\.yaml", re.DOTALL)
# stores that list all keys below a prefix at once
_FLAT = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "az", "oss", "memory"))


class Entry(NamedTuple):
    """A source as its store lists it: `bytes` None where unknown, `etag` only where it depends on the content."""

    uri: str
    bytes: int | None
    etag: str | None = None


def expand(pattern: str) -> list[Entry]:
    """The sources that a file, folder or glob names, sorted. A folder that may not be read is an entry too.

    Raises:
        UserError: nothing has that name, no video is in it, or it may not be read.
    """
    try:
        entries, others = _local(pattern) if storage.is_local(pattern) else _remote(pattern)
    except PermissionError as e:
        raise UserError(f"sources: {pattern}: may not be read ({e.strerror or e})") from e
    except ValueError as e:
        # a store's client about a name that is none, for example `s3://` alone
        raise e if isinstance(e, UserError) else UserError(f"sources: {pattern}: {e}") from e
    if not entries:
        suffixes = ", ".join(f"{n} {s or 'without suffix'}" for s, n in others.most_common(3))
        only = f" (only {suffixes})" if suffixes else ""
        raise UserError(f"sources: {pattern}: no video there{only}; name a folder or glob that holds videos")
    return sorted(entries, key=lambda entry: entry.uri)


def matching(pattern: str) -> list[str]:
    """The URIs of all files and folders that match a glob, sorted. Raises UserError: nothing matches."""
    fs, path = storage.filesystem(pattern)
    if storage.is_local(pattern):
        shut = dict[str, None]()
        uris = [storage.named(p) for p in dict.fromkeys(_matches("/", path.strip("/").split("/"), shut))]
        if shut:
            raise UserError(f"sources: {pattern}: {next(iter(shut))} may not be read")
    else:
        escaped = _escaped(fs, pattern, path)
        uris = [fs.unstrip_protocol(p) for p in storage.retrying(pattern, lambda: fs.glob(escaped))]
    if not uris:
        raise UserError(f"sources: {pattern}: no manifest there")
    return sorted(uris)


def is_glob(pattern: str) -> bool:
    """Whether a pattern has characters of a glob and nothing has that very name."""
    fs, path = storage.filesystem(pattern)
    if not _has_magic(path):
        return False
    if not storage.is_local(pattern):
        return not storage.retrying(pattern, partial(fs.exists, path))
    try:
        return not _local_exists(path)
    except PermissionError:
        return True


def _has_magic(path: str) -> bool:
    if re.match("https?://", path):
        # `?` begins the query of an address
        return any(c in path.split("/", 3)[-1] for c in "*[")
    return any(c in path for c in "*?[")


def _local_exists(path: str) -> bool:
    """Whether anything has that name, even a broken link. Raises PermissionError where that is unknown."""
    try:
        os.lstat(path)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False
    return True


def _local(pattern: str) -> tuple[list[Entry], Counter[str]]:
    """The entries, and counts of the suffixes of other files."""
    path = storage.filesystem(pattern)[1]
    shut = dict[str, None]()
    if not _local_exists(path):
        if not _has_magic(path):
            raise UserError(f"sources: {pattern}: no such file or folder")
        paths = dict.fromkeys(p for p in _matches("/", path.strip("/").split("/"), shut) if not Path(p).is_dir())
        if shut and not paths:
            raise UserError(f"sources: {pattern}: {next(iter(shut))} may not be read")
        return [_entry(p) for p in paths | shut], Counter()
    if not Path(path).is_dir():
        _check_kind(pattern, path)
        return [_entry(path)], Counter()
    # raises PermissionError where the folder itself may not be read
    os.scandir(path).close()
    below = [file for _, files in _folders(path, shut) for file in files]
    videos = [file for file in below if suffix(file) in VIDEO_SUFFIXES]
    return [_entry(p) for p in [*videos, *shut]], Counter(map(suffix, below)) - Counter(map(suffix, videos))


def _check_kind(pattern: str, path: str) -> None:
    if is_other_list(path):
        raise UserError(f"sources: {pattern}: neither a video nor a manifest that is read; manifests are {KINDS}")


def _entry(path: str) -> Entry:
    try:
        status = Path(path).stat()
        return Entry(storage.named(path), status.st_size if stat.S_ISREG(status.st_mode) else None)
    except OSError:
        return Entry(storage.named(path), None)


def _folders(root: str, shut: dict[str, None]) -> Iterator[tuple[str, list[str]]]:
    """(folder, paths of its files) for a folder and all below it: each real folder once, linked folders last.

    Hidden folders, workspaces and links that lead upwards are left out; `shut` gets folders that may not be read.
    """
    above = os.path.realpath(root)
    entered = set[tuple[int, int]]()
    folders, links = deque([root]), deque[str]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            shut[folder] = None
            continue
        if any(e.name == "recipes" for e in entries) and _is_workspace(folder):
            if folder == root:
                raise UserError(
                    f"sources: {root}: is a workspace, whose videos are no sources; name a folder of videos"
                )
            continue
        files = []
        for entry in entries:
            if not _is_folder(entry):
                files.append(entry.path)
            elif not entry.is_symlink():
                folders.append(entry.path)
            elif not (above + "/").startswith(os.path.realpath(entry.path).rstrip("/") + "/"):
                links.append(entry.path)
        yield folder, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_workspace(folder: str) -> bool:
    try:
        return any(_RESOLVED.fullmatch(f"recipes/{p.name}") for p in Path(folder, "recipes").iterdir())
    except OSError:
        return False


def _matches(folder: str, segments: Sequence[str], shut: dict[str, None]) -> Iterator[str]:
    """Paths that match a glob as in a shell, segment by segment. A segment that exists as it is written is no glob."""
    first, *rest = segments
    path = f"{folder.rstrip('/')}/{first}"
    try:
        exists = _local_exists(path)
    except PermissionError:
        shut[folder] = None
        return
    if exists or not _has_magic(first):
        paths = [path] if exists else []
    elif first == "**":
        if not rest:
            yield from (file for _, files in _folders(folder, shut) for file in files)
            return
        for below, _ in _folders(folder, shut):
            yield from _matches(below, rest, shut)
        return
    else:
        try:
            names = [p.name for p in Path(folder).iterdir() if first.startswith(".") or not p.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            shut[folder] = None
            return
        paths = [f"{folder.rstrip('/')}/{name}" for name in sorted(fnmatch.filter(names, first))]
        paths = [path for path in paths if not _is_workspace(path)]
    for path in paths:
        if not rest:
            yield path
        elif Path(path).is_dir():
            yield from _matches(path, rest, shut)


def _remote(pattern: str) -> tuple[list[Entry], Counter[str]]:
    """The entries, and counts of the suffixes of other files."""
    fs, path = storage.filesystem(pattern)
    http = bool({"http", "https"} & set(storage.protocols(fs)))
    if http and not _has_magic(path) and not path.endswith("/"):
        _check_kind(pattern, path)
        # whether it exists shows when it is fetched
        return [Entry(path, None)], Counter()
    try:
        info = None if http and path.endswith("/") else storage.retrying(pattern, partial(fs.info, path))
    except FileNotFoundError:
        if not _has_magic(path):
            raise UserError(f"sources: {pattern}: no such file or folder") from None
        return _remote_matches(fs, pattern, _escaped(fs, pattern, path)), Counter()
    if info and info["type"] != "directory":
        _check_kind(pattern, path)
        return [_remote_entry(fs, info)], Counter()
    files, shut = _below(fs, pattern, path)
    files = [e for e in files if not any(p.startswith(".") for p in e["name"].removeprefix(path).split("/"))]
    videos = [e for e in files if suffix(e["name"]) in VIDEO_SUFFIXES]
    others = Counter(suffix(e["name"]) for e in files) - Counter(suffix(e["name"]) for e in videos)
    return [*(_remote_entry(fs, e) for e in videos), *shut], others


def _remote_matches(fs: Any, pattern: str, path: str) -> list[Entry]:
    if "**" not in path:
        matches = storage.retrying(pattern, lambda: fs.glob(path, detail=True)).values()
        return [_remote_entry(fs, e) for e in matches if e["type"] != "directory"]
    root = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
    files, shut = _below(fs, pattern, root)
    matches = re.compile(glob_translate(path)).match
    return [*(_remote_entry(fs, e) for e in files if matches(e["name"])), *shut]


def _below(fs: Any, pattern: str, root: str) -> tuple[list[dict[str, Any]], list[Entry]]:
    """The files below a folder without those of workspaces, and the folders that may not be listed."""
    files, shut = list[dict[str, Any]](), list[Entry]()
    if _FLAT & set(storage.protocols(fs)):
        files += storage.retrying(pattern, lambda: fs.find(root, detail=True)).values()
    else:
        # `fs.find` would skip folders that may not be listed
        folders, entered = deque([root]), set[str]()
        while folders:
            folder = folders.popleft()
            entered.add(folder)
            try:
                entries = storage.retrying(pattern, partial(fs.ls, folder, detail=True))
            except (FileNotFoundError, PermissionError):
                if folder == root:
                    raise
                shut.append(Entry(fs.unstrip_protocol(folder), None))
                continue
            files += [e for e in entries if e["type"] != "directory"]
            folders += [e["name"] for e in entries if e["type"] == "directory" and e["name"] not in entered]
    homes = {match[1] for e in files if (match := _RESOLVED.fullmatch(e["name"]))}
    return [e for e in files if not any(e["name"].startswith(f"{home}/") for home in homes)], shut


def _escaped(fs: Any, pattern: str, path: str) -> str:
    """A glob where the leading folders that exist as they are written, brackets or not, are escaped."""
    parts = path.split("/")
    for end in range(len(parts) - 1, 0, -1):
        head = "/".join(parts[:end])
        if _has_magic(head) and storage.retrying(pattern, partial(fs.exists, head)):
            return "/".join([glob.escape(head), *parts[end:]])
    return path


def _remote_entry(fs: Any, entry: dict[str, Any]) -> Entry:
    # other stores' tags do not depend on the content, or change when a file moves
    tag = str(entry.get("ETag") or "").strip('"') if "s3" in storage.protocols(fs) else ""
    return Entry(fs.unstrip_protocol(entry["name"]), entry.get("size"), tag or None)
