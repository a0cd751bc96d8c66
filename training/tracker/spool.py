"""Records and files on disk that wait to be sent: nothing is lost by a kill, and sent records are deleted.

Records are lines of JSON in numbered segments, `00000001.jsonl`; `sent.json` has the place of the last one sent. Files are
in `files/` under their names as artifacts. Only a power cut can cost a line, since lines are not synced.
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
        self.trouble = ""  # why records are only in memory

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
        """The records that were not sent, each with the place where it ends."""
        number, offset = self.place
        while True:
            # listed before it is read: a segment that has a successor is whole
            segments = [n for n in self._segments() if n >= number]
            if segments and segments[0] > number:
                number, offset = segments[0], 0
            if segments:
                with self._path(number).open("rb") as f:
                    f.seek(offset)
                    for line in f:
                        if not line.endswith(b"\n"):
                            break
                        offset += len(line)
                        with suppress(ValueError):
                            # the disk may return another line than was written
                            yield (number, offset), json.loads(line)
            if len(segments) < 2:
                return
            number, offset = segments[1], 0

    def sent(self, place: Place) -> None:
        """Note that all records up to a place were sent: the next `waiting`, also of another process, begins there."""
        # in memory first: with a full disk no record must be sent again and again
        self.place = place
        storage.write(str(self.folder / "sent.json"), json.dumps(place).encode())
        for number in self._segments():
            if number < place[0]:
                self._path(number).unlink()

    def files(self) -> list[tuple[Path, Path]]:
        """Each waiting file, and its name below `files`; the reader deletes a file once it is sent."""
        paths = (p for p in sorted(self.files_folder.rglob("*")) if p.is_file())
        return [(p, p.relative_to(self.files_folder)) for p in paths]

    def left(self) -> int:
        """The number of records that were not sent."""
        return sum(1 for _ in self.waiting()) + self._unwritten.count(b"\n")

    def remove(self) -> None:
        """Delete the spool, once all is sent."""
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
        """The place of the last record sent, or the start where unknown, since sending twice does no harm."""
        try:
            number, offset = json.loads((self.folder / "sent.json").read_bytes())
            return int(number), int(offset)
        except (OSError, ValueError, TypeError):
            return 0, 0
