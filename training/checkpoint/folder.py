"""The folder of checkpoints: where it is, who may train into it, which checkpoint is the latest."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Busy, Failure, UserError
from longtake.training.checkpoint.weights import damaged
from longtake.training.config import TrainConfig


def folder_of(config: TrainConfig, output: str) -> Path:
    """The folder of a stage's checkpoints: `checkpoints`, if it is named, else one in the stage's output.

    An output OUTPUT-SUFFIX, of a run that starts from nothing, has its own folder in `checkpoints` too.

    Raises:
        UserError: the output is remote and no folder is named.
    """
    if config.run.checkpoints is None and not storage.is_local(output):
        raise UserError(
            f"checkpoints: {output} is remote; name a local folder that all processes share, and upload: to keep a copy"
        )
    if config.run.checkpoints is None:
        return Path(storage.join(output, "checkpoints"))
    suffix = output.rstrip("/").rpartition("/")[2].partition("-")[2]
    return Path(config.run.checkpoints) / suffix


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training into the same folder; a killed owner's lock is free. Raises Busy."""
    with storage.failing_clearly(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            handle.seek(0)
            raise Busy(
                f"{folder}: process {handle.read().strip()} is training here already; wait for it or stop it"
            ) from e
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. Raises Failure where it is damaged."""
    try:
        return dict(json.loads((path / "meta.json").read_bytes()))
    except (OSError, ValueError) as e:
        raise damaged(path, e) from e


def latest(folder: Path) -> Path | None:
    """The folder of the latest checkpoint, None where there is none.

    Raises:
        Failure: the file `latest` names no checkpoint that is here, as after a full disk or an interrupted copy.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name) or not (folder / name).is_dir():
        complete = sorted((path for path in folder.glob("step-*") if (path / "meta.json").is_file()), key=step_of)
        remedy = (
            f"write {complete[-1].name} into it, the newest that is whole" if complete else "delete it to start anew"
        )
        raise Failure(f"{pointer}: names no checkpoint that is here ({name[:40]!r}); {remedy}")
    return folder / name


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
