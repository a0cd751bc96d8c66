"""The most memory that a model takes, in a process of its own: `python -m longtake.training.evaluation.peak URI < suite`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from longtake.datasets.errors import Failure, UserError
from longtake.training.evaluation import work
from longtake.training.evaluation.subject import load
from longtake.training.evaluation.suite import Suite

_REFUSED = 2  # the exit code of what the user can put right
_STATUS = Path("/proc/self/status")


class Peak(NamedTuple):
    """Bytes: the most of all that the model does, and what the process had before it was loaded, 0 on a GPU.

    On a GPU they are of its memory, else of the process.
    """

    most: int
    before: int


def measured(uri: str, suite: Suite) -> Peak:
    """The peak of a model that does each thing of a suite once.

    Raises:
        UserError: the model does not take the suite; the memory is too small for it; no Linux.
        Failure: the process ended early.
    """
    if not torch.cuda.is_available() and not _STATUS.exists():
        raise UserError(f"memory: {_STATUS} says it, on Linux alone; leave this measure out")
    command = [sys.executable, "-P", "-m", "longtake.training.evaluation.peak", uri]
    done = subprocess.run(command, check=False, input=suite.model_dump_json(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        if done.returncode == _REFUSED:
            raise UserError(said)
        if done.returncode < 0:
            raise UserError(_too_small(uri, f"signal {-done.returncode} ended the process that measures it"))
        raise Failure(f"memory: {uri}: the process that measures it ended with {done.returncode}: {said}")
    return Peak(*json.loads(done.stdout.strip().splitlines()[-1]))


def _too_small(uri: str, what: str) -> str:
    return f"memory: {uri}: {what}, as where memory runs out; make suite.clips or suite.videos smaller"


def _now() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # the kernel's `ru_maxrss` would have that of the process which began this one
    return int(_STATUS.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def main() -> int:
    """Print the peak of the model that the command names."""
    try:
        suite, before = Suite.model_validate_json(sys.stdin.read()), _now()
        for each in work.of(load(sys.argv[1]), suite):
            each.run()
    except UserError as e:
        print(e, file=sys.stderr)
        return _REFUSED
    except (torch.OutOfMemoryError, MemoryError) as e:
        print(_too_small(sys.argv[1], type(e).__name__), file=sys.stderr)
        return _REFUSED
    print(json.dumps([_now(), before]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
