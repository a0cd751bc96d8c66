"""Answers of a captioner whose shard is not committed yet, in small files, so that no clip is asked about twice.

OUTPUT/answers/COLUMN/SPLIT-NAME/ID.json has a few answers each. Files are written whole, never changed, and deleted once
their shard is committed.
"""

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from time import monotonic

from longtake.datasets import storage
from longtake.datasets.errors import Failure
from longtake.pipeline.captioner.reply import Answer

FOLDER = "answers"
_A_FILE, _SECONDS = 8, 0.5  # answers in a file at most, and for how long one gathers them


class Answers:
    """The answers of one shard. `add` keeps them, `flush` before the end."""

    def __init__(self, output: str, column: str, split: str, name: str) -> None:
        self._folder = storage.join(output, FOLDER, column, f"{split}-{name}")
        self._waiting: list[Answer] = []
        self._flushed = 0.0

    def read(self) -> dict[str, Answer]:
        """The answers that were kept, by key. Raises Failure where a file is damaged."""
        found = {}
        for name in storage.names(self._folder):
            if name.startswith(".") or not name.endswith(".json"):
                continue
            url = storage.join(self._folder, name)
            try:
                found.update(
                    {answer.key: answer for answer in (Answer(**each) for each in json.loads(storage.read(url)))}
                )
            except (ValueError, TypeError) as e:
                raise Failure(f"{url}: damaged ({e}); delete it and run the same command again") from e
        return found

    def add(self, answer: Answer) -> None:
        self._waiting.append(answer)
        if len(self._waiting) >= _A_FILE or monotonic() - self._flushed > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last file."""
        if self._waiting:
            _write(storage.join(self._folder, f"{secrets.token_hex(8)}.json"), self._waiting)
            self._waiting, self._flushed = [], monotonic()

    def delete(self) -> None:
        delete(self._folder)


def _write(url: str, answers: Sequence[Answer]) -> None:
    storage.write(url, json.dumps([asdict(answer) for answer in answers]).encode())


def delete(folder: str) -> None:
    """Delete a folder of answers, if there is one."""
    fs, path = storage.filesystem(folder)
    with suppress(FileNotFoundError):
        storage.retrying(path, partial(fs.rm, path, recursive=True))


def sweep(output: str) -> None:
    """Delete all answers, once every shard is committed; a stopped run may have left some."""
    delete(storage.join(output, FOLDER))
