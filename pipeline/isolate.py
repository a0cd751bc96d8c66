"""A separate process that decodes untrusted videos, so that a crash, a hang or a bomb costs one source.

`Worker` is the parent's side; run as a module, this file is the child: it reads a job a line and answers a line.
The child is recycled after some jobs, since decoders leak, and dies with its parent.
"""

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

_JOBS_A_PROCESS = 64


class Worker:
    """Runs jobs of `source.process` one at a time in a child process that it replaces when needed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._jobs = 0

    def run(self, job: dict[str, Any], timeout: float, memory: int) -> dict[str, Any]:
        """The result of `source.process(**job)`; a crash or a time-out is a rejected source. Raises OSError of the child's disk."""
        child = self._ready(memory)
        assert child.stdin and child.stdout
        answer: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda: answer.put(child.stdout.readline()), daemon=True)  # type: ignore[union-attr]
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        reader.start()
        try:
            line = answer.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return _rejected("timed_out", f"not done after {timeout:g} s (limits.timeout_seconds)")
        if not line:
            code = child.wait()
            self._child = None
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return _rejected("crashed", f"the decoder process ended with {what}")
        self._jobs += 1
        if self._jobs >= _JOBS_A_PROCESS:
            self.close()
        result = json.loads(line)
        if "os_error" in result:
            raise OSError(*result["os_error"])
        return result

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _ready(self, memory: int) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._jobs = 0
            # -P: the working folder stays off sys.path
            command = [sys.executable, "-P", "-m", "longtake.pipeline.isolate", str(memory)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        return self._child


def _rejected(reason: str, detail: str) -> dict[str, Any]:
    return {"account": {"status": "rejected", "reason": reason, "detail": detail}, "clips": []}


def _serve(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # C libraries print to the descriptor itself: keep our answers apart from their noise
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from longtake.pipeline.config import ClipConfig, FrameDiffConfig, LimitsConfig
    from longtake.pipeline.source import process

    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the parent is gone, even if it left in the middle of a job

    threading.Thread(target=read, daemon=True).start()
    while True:
        job = json.loads(lines.get())
        try:
            result = process(
                job["path"],
                job["source"],
                job["folder"],
                ClipConfig(**job["clip"]),
                LimitsConfig(**job["limits"]),
                FrameDiffConfig(**job["diff"]),
                job["decoder"],
                job["extra"],
            )
        except MemoryError:
            result = _rejected("too_large", f"needs more than limits.memory_bytes {memory}")
        except OSError as e:
            result = {"os_error": [e.errno, e.strerror or str(e), e.filename]}
        except Exception as e:
            # one strange file must not stop a job of millions: it is rejected, with the place where it tripped us
            at = traceback.extract_tb(e.__traceback__)[-1]
            result = _rejected("crashed", f"{type(e).__name__}: {e} ({Path(at.filename).name}:{at.lineno})")
        out.write(json.dumps(result) + "\n")
        out.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
