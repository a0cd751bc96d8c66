"""Copies of checkpoints in a store: sent while the training runs, fetched where a machine starts empty.

A store that fails does not end the training: the next checkpoint is tried, and only the last one counts.
"""

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure
from longtake.datasets.masking import shown
from longtake.training.engines import alone

_numbers = itertools.count()


class Copies:
    """Keeps the latest checkpoint of `folder` at `url` as well, one copy at a time; for the first rank only.

    `kept(name)` says whether a checkpoint is to stay there.
    """

    def __init__(self, folder: Path, url: str, kept: Callable[[str], bool]) -> None:
        self._folder, self._url, self._kept = folder, url, kept
        self._thread = ThreadPoolExecutor(1, "copies")
        self._pending: Future[None] | None = None
        self.source: Path | None = None  # is being read, so must not be deleted

    def begin(self, path: Path) -> None:
        """Start to copy a checkpoint, unless one is still under way: then the next will be copied instead."""
        if self._pending is None or self._pending.done():
            self.source = path
            self._pending = self._thread.submit(self._copy, path)

    def finish(self) -> None:
        """Wait, and try once more where the latest has no copy. Raises Failure if it cannot be copied."""
        if self._pending is not None:
            self._pending.result()
        latest = self._folder / "latest"
        if latest.exists():
            try:
                if _latest(self._url) != latest.read_text().strip():
                    _upload(self._folder / latest.read_text().strip(), self._url, self._kept)
            except Exception as e:
                raise Failure(
                    f"{self._url}: the last checkpoint could not be copied there ({_line(e)}); the one in {self._folder}"
                    " is whole: run the same command again"
                ) from e

    def _copy(self, path: Path) -> None:
        try:
            _upload(path, self._url, self._kept)
        except Exception as e:  # whatever a store's client raises: the training must not end by it
            print(
                f"warning: {shown(self._url)}: {path.name} could not be copied there ({_line(e)}); training goes on, the next"
                " checkpoint is tried again",
                file=sys.stderr,
            )
        finally:
            self.source = None


def _line(e: Exception) -> str:
    return shown((str(e) or type(e).__name__).splitlines()[0])


def _upload(final: Path, url: str, kept: Callable[[str], bool]) -> None:
    """Copy a checkpoint to a store and flip its `latest`; then remove there what is not `kept` here."""
    fs, root = storage.filesystem(url)
    copy = storage.join(root, final.name)
    # an attempt that was cut short, or one by another number of processes
    if storage.retrying(f"{url}: look", partial(fs.exists, copy)):
        storage.retrying(f"{url}: clear", partial(fs.rm, copy, recursive=True))
    # meta.json last: a copy without it is not whole
    for path in sorted((p for p in final.rglob("*") if p.is_file()), key=lambda p: (p.name == "meta.json", p)):
        target = storage.join(copy, path.relative_to(final).as_posix())
        storage.retrying(f"{url}: upload", partial(_put, fs, path, target))
    storage.write(storage.join(url, "latest"), final.name.encode())
    for name in storage.names(url):
        if re.fullmatch(r"step-\d+", name) and name != final.name and not kept(name):
            storage.retrying(f"{url}: {name}", partial(fs.rm, storage.join(root, name), recursive=True))


def _put(fs: Any, path: Path, target: str) -> None:
    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(path), target)


def _latest(url: str) -> str | None:
    """The name of the latest checkpoint in a store. Raises Failure for a name that is none."""
    if not storage.exists(storage.join(url, "latest")):
        return None
    name = storage.read(storage.join(url, "latest")).decode(errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name):
        raise Failure(f"{url}/latest: {name!r} is no checkpoint's name")
    return name


def fetch(folder: Path, url: str) -> None:
    """Get the latest checkpoint that was uploaded to `url` where there is none here. Every rank must call it."""
    alone(f"fetch/{next(_numbers)}", partial(fetch_alone, folder, url))


def fetch_alone(folder: Path, url: str) -> None:
    """`fetch` of one process, before there are ranks."""
    if not (folder / "latest").exists():
        try:
            _download(folder, url)
        except Exception as e:  # whatever a store's client raises
            raise Failure(f"{shown(url)}: could not be fetched ({_line(e)})") from e


def maker(url: str) -> str | None:
    """The run of MLflow that made the latest checkpoint at `url`; None where there is none. Raises Failure."""
    try:
        name = _latest(url)
        return None if name is None else str(json.loads(storage.read(storage.join(url, name, "meta.json"))).get("run"))
    except Exception as e:  # likewise
        raise Failure(f"{shown(url)}: could not be read ({_line(e)})") from e


def _download(folder: Path, url: str) -> None:
    name = _latest(url)
    if name is None:
        return
    fs, root = storage.filesystem(url)
    scratch = (folder / f".{name}.tmp").resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    start = storage.join(root, name)
    for remote in storage.retrying(f"{url}: look", partial(fs.find, start)):
        target = scratch / remote.rpartition(f"{name}/")[2]
        if scratch not in target.resolve().parents:
            raise Failure(f"{remote}: leads out of the checkpoint")
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.retrying(remote, partial(fs.get_file, remote, str(target)))
    if not (scratch / "meta.json").exists():
        raise Failure(f"{url}/{name}: is no whole checkpoint; write an older one's name into {url}/latest")
    for path in [*scratch.rglob("*"), scratch]:
        storage.sync(path)
    shutil.rmtree(folder / name, ignore_errors=True)
    scratch.rename(folder / name)
    storage.write(str(folder / "latest"), name.encode())
