"""The folder of checkpoints: where it is, who may train into it, which checkpoint is the latest."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Busy, Failure, UserError
from longtake.datasets.stage import content
from longtake.training.checkpoint.weights import damaged
from longtake.training.config import RunConfig, TrainConfig


class Place(NamedTuple):
    """Where a stage keeps its checkpoints.

    folder   on a disk that all its processes share
    upload   URL of the copies; None where there are none
    """

    folder: Path
    upload: str | None


def copies_of(run: RunConfig, output: str) -> str | None:
    """The URL of the copies of a stage that works in `output`; None where there are none."""
    return storage.join(run.upload, _part(output)) if run.upload else None


def _part(output: str) -> str:
    return output.rstrip("/").rpartition("/")[2]


def place_of(run: RunConfig, output: str) -> Place:
    """The place of the checkpoints of a stage that works in `output`.

    Named `checkpoints` and `upload` have a part for each output, which has its name: DIGEST, or DIGEST-SUFFIX of a run that
    starts from nothing. Without them checkpoints are in the output.

    Raises:
        UserError: the output is remote and no folder is named.
    """
    upload = copies_of(run, output)
    if run.checkpoints is not None:
        return Place(Path(run.checkpoints) / _part(output), upload)
    if not storage.is_local(output):
        raise UserError(
            f"checkpoints: {output} is remote; name a local folder that all processes share, and upload: to keep a copy"
        )
    return Place(Path(storage.join(output, "checkpoints")), upload)


def former_place(run: RunConfig, output: str) -> Place:
    """The place by versions whose named folders and URLs had no parts, but for one named SUFFIX in a folder."""
    suffix = _part(output).partition("-")[2]
    folder = place_of(run, output).folder if run.checkpoints is None else Path(run.checkpoints) / suffix
    return Place(folder, run.upload)


def differences(config: TrainConfig, saved: Mapping[str, Any]) -> list[str]:
    """The settings that are others than those of a checkpoint, but for those that may change: `KEY: OLD there, NEW here`."""
    now = content(config)
    names = sorted((now.keys() | saved.keys()) - set(config.MAY_CHANGE))
    return [f"{k}: {saved.get(k)} there, {now.get(k)} here" for k in names if now.get(k) != saved.get(k)]


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
