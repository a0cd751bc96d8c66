"""A separate process that decodes untrusted videos, so that a crash, a hang or a bomb costs one source.

`Worker` is the parent's side. Run as a module, this file is the child: it reads jobs and writes results, one JSON line
each. The child is recycled after some jobs, since decoders leak, and dies with its parent.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

from longtake.datasets.audio import without_sound
from longtake.pipeline.config import CutConfig

_JOBS_A_PROCESS = 64
_KILLED = signal.SIGKILL.name


class Worker:
    """Runs jobs one at a time in a child process that it replaces when needed."""

    def __init__(self) -> None:
        self._child: Popen[str] | None = None
        self._jobs = 0

    def run(self, path: str, source: str, folder: str, cut: CutConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The result of `source.process`. A crash or a time-out rejects the source.

        Raises:
            OSError: the child's disk is full or fails.
        """
        result = self._result("cut", cut, {"path": path, "source": source, "folder": folder, "extra": extra})
        return _rejected(*result["failed"]) if "failed" in result else result

    def keep_sound(
        self, path: str, clips: Sequence[Mapping[str, Any]], folder: str, cut: CutConfig, **known: Any
    ) -> dict[str, Any]:
        """The result of `audio.keep`. A crash or a time-out leaves the clips without sound.

        Args:
            known: `clocks` or `source`.

        Raises:
            OSError: the child's disk is full or fails.
        """
        names = ("key", "start_seconds", "frame_count", "fps")
        rows = [{name: row[name] for name in names} for row in clips]
        result = self._result("keep_sound", cut, {"path": path, "clips": rows, "folder": folder} | known)
        if "failed" not in result:
            return result
        assert cut.audio
        reason, detail = result["failed"]
        silent = [without_sound(cut.audio.model_dump(), reason) for _ in clips]
        return {"clips": silent, "detail": f"its sound: {detail}"}

    def _result(self, work: str, cut: CutConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the child's work gives, or `{"failed": [reason, detail]}`."""
        job = {"work": work, "cut": cut.model_dump(mode="json"), **arguments}
        timeout = cut.limits.timeout_seconds
        line, ending = self._answer(job, cut.limits.memory_bytes, timeout)
        if ending == _KILLED:
            # from outside, such as for another's memory: no fault of the source, unless it happens again
            line, ending = self._answer(job, cut.limits.memory_bytes, timeout)
        if line is None:
            return {"failed": ["timed_out", f"not done after {timeout:g} s (limits.timeout_seconds)"]}
        if not line:
            return {"failed": ["crashed", f"the decoder process ended with {ending}"]}

        self._jobs += 1
        if self._jobs >= _JOBS_A_PROCESS:
            self.close()
        result: dict[str, Any] = json.loads(line)
        if "os_error" in result:
            raise OSError(*result["os_error"])
        return result

    def _answer(self, job: Mapping[str, Any], memory: int, timeout: float) -> tuple[str | None, str]:
        """The child's line, None if it takes too long, empty if it has ended; and how it has ended."""
        child = self._ready(memory)
        assert child.stdin and child.stdout
        answer: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: answer.put(child.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
        try:
            line = answer.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return None, ""
        if line:
            return line, ""
        code = child.wait()
        self._child = None
        return "", signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Kill the child; the next job starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _ready(self, memory: int) -> Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._jobs = 0
            # -P keeps the working folder off sys.path
            command = [sys.executable, "-P", "-m", "longtake.pipeline.isolate", str(memory)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=environment)
        return self._child


def _rejected(reason: str, detail: str) -> dict[str, Any]:
    return {"account": {"status": "rejected", "reason": reason, "detail": detail}, "clips": []}


def _serve(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # C libraries print to the descriptor itself: keep results apart from their noise
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import av

    from longtake.pipeline import audio, source

    works: dict[str, Any] = {"cut": source.process, "keep_sound": audio.keep}
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the parent is gone, perhaps in the middle of a job

    threading.Thread(target=read, daemon=True).start()
    while True:
        job = json.loads(lines.get())
        try:
            cut = CutConfig(**job.pop("cut"))
            result = works[job.pop("work")](**job, cut=cut)
        except MemoryError:
            result = {"failed": ["too_large", f"needs more than limits.memory_bytes {memory}"]}
        except av.error.FFmpegError as e:
            # some are OSError, but none is of this disk: FFmpeg gets bytes and gives bytes
            result = {"failed": ["unreadable", e.strerror or str(e)]}
        except OSError as e:
            result = {"os_error": [e.errno, e.strerror or str(e), e.filename]}
        except Exception as e:
            # one strange file must not stop a job of millions: it is rejected, with the line that failed
            place = traceback.extract_tb(e.__traceback__)[-1]
            detail = f"{type(e).__name__}: {e} ({Path(place.filename).name}:{place.lineno})"
            result = {"failed": ["crashed", detail]}
        out.write(json.dumps(result) + "\n")
        out.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
