"""Records and files on disk that wait to be sent: nothing is lost by a kill, and what was sent is let go.

Records are lines of JSON in numbered segments, `00000001.jsonl`; `sent.json` says up to where they were sent. Files lie
in `files/` under the names that they shall have. Only the power going can cost a line, since lines are not synced.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from longtake.datasets import storage

Place = tuple[int, int]  # a segment and an offset in it

_SEGMENT = 4 << 20  # bytes; one that has been sent is deleted


class Spool:
    """Any thread of one process appends; one thread reads `waiting` and `files` and says what was `sent`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files_folder = folder, folder / "files"
        with storage.failing_clearly(str(folder)):
            self.files_folder.mkdir(parents=True, exist_ok=True)
            storage.sweep(str(folder))
            self.place = self._read_place()
            # a new one, since a killed process may have left half a line at the end of its last
            self._number = max(self.place[0], *self._segments(), 0) + 1
            self._handle = self._open(self._number)
        self._lock, self._unwritten = threading.Lock(), b""
        self.trouble = ""  # why records are in memory alone

    def append(self, record: Any) -> None:
        """Add a record; where the disk takes none it stays in memory until the next one comes."""
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            at_a_line = not self._unwritten
            self._unwritten += line
            try:
                if at_a_line and os.fstat(self._handle).st_size > _SEGMENT:
                    old, self._handle = self._handle, self._open(self._number + 1)
                    self._number += 1
                    os.close(old)
                while self._unwritten:
                    self._unwritten = self._unwritten[os.write(self._handle, self._unwritten) :]
                self.trouble = ""
            except OSError as e:
                if not self.trouble:
                    print(f"tracking: {self.folder}: {e.strerror}; metrics are kept in memory", flush=True)
                self.trouble = f"{self.folder}: {e.strerror}"

    def waiting(self) -> Iterator[tuple[Place, Any]]:
        """What was not sent, and for each record the place where it ends."""
        number, offset = self.place
        while True:
            # listed before it is read: a segment that has a successor is whole
            there = [n for n in self._segments() if n >= number]
            if there and there[0] > number:
                number, offset = there[0], 0
            if there:
                with self._path(number).open("rb") as f:
                    f.seek(offset)
                    for line in f:
                        if not line.endswith(b"\n"):
                            break
                        offset += len(line)
                        with suppress(ValueError):
                            # a disk that gives back another line than was written
                            yield (number, offset), json.loads(line)
            if len(there) < 2:
                return
            number, offset = there[1], 0

    def sent(self, place: Place) -> None:
        """All up to a place was sent: the next `waiting`, also of another process, begins there."""
        # in memory first: a full disk shall not send a record again and again
        self.place = place
        storage.write(str(self.folder / "sent.json"), json.dumps(place).encode())
        for number in self._segments():
            if number < place[0]:
                self._path(number).unlink()

    def files(self) -> list[tuple[Path, Path]]:
        """Each file that waits, and its name below `files`; the reader deletes what it has sent."""
        paths = (p for p in sorted(self.files_folder.rglob("*")) if p.is_file())
        return [(p, p.relative_to(self.files_folder)) for p in paths]

    def left(self) -> int:
        """Records that were not sent."""
        return sum(1 for _ in self.waiting()) + self._unwritten.count(b"\n")

    def remove(self) -> None:
        """The end, when all was sent."""
        with self._lock:
            handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, number: int) -> int:
        return os.open(self._path(number), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"

    def _segments(self) -> list[int]:
        return sorted(int(p.stem) for p in self.folder.glob("*.jsonl"))

    def _read_place(self) -> Place:
        """Where `sent` came to; the start where that is not known, since the same twice does no harm."""
        try:
            number, offset = json.loads((self.folder / "sent.json").read_bytes())
            return int(number), int(offset)
        except (OSError, ValueError, TypeError):
            return 0, 0
