"""Answers of a captioner whose shard is not committed yet, in small files, so that no clip is asked about twice.

DATASET/answers/SPLIT-NAME.COLUMN.ID.json has a few answers each: beside the clips, whatever else the dataset gets meanwhile.
Files are written whole, never changed, and deleted once their shard is committed.
"""

import json
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from longtake.datasets import storage
from longtake.datasets.errors import Failure
from longtake.pipeline.captioner.reply import Answer

FOLDER = "answers"


class Answers:
    """The answers of one shard. `flush` keeps what was added."""

    def __init__(self, dataset: str, column: str, split: str, name: str) -> None:
        self._folder, self._prefix = storage.join(dataset, FOLDER), f"{split}-{name}.{column}."
        self._waiting: list[Answer] = []

    def read(self) -> dict[str, Answer]:
        """The answers that were kept, by key. Raises Failure where a file is damaged."""
        with ThreadPoolExecutor(16) as pool:
            return {answer.key: answer for found in pool.map(_read, self._urls()) for answer in found}

    def add(self, answer: Answer) -> None:
        self._waiting.append(answer)

    def flush(self) -> None:
        if self._waiting:
            url = storage.join(self._folder, f"{self._prefix}{secrets.token_hex(8)}.json")
            storage.write(url, json.dumps([asdict(answer) for answer in self._waiting]).encode())
            self._waiting = []

    def delete(self) -> None:
        _delete(self._urls())

    def _urls(self) -> list[str]:
        return _urls(self._folder, lambda name: name.startswith(self._prefix))


def _urls(folder: str, is_ours: Callable[[str], bool]) -> list[str]:
    # hidden ones are a writer's at work
    return [storage.join(folder, name) for name in storage.names(folder) if not name.startswith(".") and is_ours(name)]


def _read(url: str) -> list[Answer]:
    try:
        return [Answer(**each) for each in json.loads(storage.read(url))]
    except (ValueError, TypeError) as e:
        raise Failure(f"{url}: damaged ({e}); delete it and run the same command again") from e


def _delete(urls: Iterable[str]) -> None:
    def delete(url: str) -> None:
        fs, path = storage.filesystem(url)
        with suppress(FileNotFoundError):
            storage.retrying(path, partial(fs.rm_file, path))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(delete, urls))


def are_kept(dataset: str, column: str) -> bool:
    """Whether there are answers of a column."""
    return bool(_urls(storage.join(dataset, FOLDER), lambda name: f".{column}." in name))


def sweep(dataset: str, column: str) -> None:
    """Delete all answers of a column, once every shard is committed; a stopped run may have left some."""
    folder = storage.join(dataset, FOLDER)
    storage.sweep(folder)
    _delete(_urls(folder, lambda name: f".{column}." in name))
