"""Videos on their way to the tracker: frames go to the spool as they are, and a thread encodes them.

What waits is on disk, so that a kill loses nothing: the next process of the run encodes it.
"""

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets import clip

_MOST = 32  # videos that wait; the next one has to wait itself
_WAITING = re.compile(r"(?P<name>.+)@(?P<fps>\d+)\.npy")  # of a video NAME.mp4

Queue = Callable[[Path, Callable[[Path], Any]], None]


class Videos:
    """Encodes the videos that wait in a spool's folder `frames`, oldest first, in a thread.

    Args:
        spool: folder of the spool.
        queue: `queue(place, write)` lets `write` make a file that becomes the artifact `place`.
    """

    def __init__(self, spool: Path, queue: Queue) -> None:
        self._spool, self._folder, self._queue = spool, spool / "frames", queue
        self._waiting = sorted((p for p in self._folder.rglob("*.npy") if p.is_file()), key=lambda p: p.stat().st_mtime)
        self._change, self._ending, self._leaving = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._keep_encoding, name="videos", daemon=True)
        self._thread.start()

    def add(self, place: Path, frames: np.ndarray, fps: int) -> None:
        """Let the thread encode a video as the artifact `place`; waits where as many as may wait already.

        Raises:
            OSError: the disk does not take the frames.
        """
        with self._change:
            self._change.wait_for(lambda: len(self._waiting) < _MOST)
        path, scratch = self._folder / place.with_name(f"{place.stem}@{fps}.npy"), self._spool / "frames.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.save(scratch, frames)
            scratch.replace(path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        with self._change:
            self._waiting = [*(p for p in self._waiting if p != path), path]
            self._change.notify_all()

    def finish(self) -> None:
        """Encode all that waits, and end the thread."""
        self._end()

    def leave(self, seconds: float) -> None:
        """Encode for some seconds, and end the thread after the video that it is at; the next process encodes the others."""
        self._end(seconds)

    def _end(self, patience: float | None = None) -> None:
        with self._change:
            self._ending = True
            self._change.notify_all()
        self._thread.join(patience)
        self._leaving = True
        self._thread.join()

    def _keep_encoding(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._ending)
                if self._leaving or not self._waiting:
                    return
                path = self._waiting[0]
            self._encode(path)
            with self._change:
                self._waiting = [p for p in self._waiting if p != path]
                self._change.notify_all()

    def _encode(self, path: Path) -> None:
        """Make an artifact of frames, and delete them; say so where that is not possible, and leave it out."""
        try:
            parts = _WAITING.fullmatch(path.name)
            assert parts
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
            place = path.relative_to(self._folder).with_name(f"{parts['name']}.mp4")
            self._queue(place, lambda scratch: clip.write(scratch, frames, int(parts["fps"])))
        except Exception as e:
            # an encoder fails in many ways; none may end the thread, which others wait for
            print(f"tracking: {path}: cannot be encoded ({e}); it is left out", flush=True)
        with suppress(OSError):
            path.unlink()
