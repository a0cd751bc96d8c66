"""Checkpoints: written under a temporary name, synced, renamed, then `latest` is flipped. A kill costs nothing older.

A checkpoint is a folder: one DeepSpeed checkpoint an engine, `ema.safetensors`, `meta.json` (step, loader state).
DeepSpeed's files are pickles: they are read back only from the stage's own folder, never from a registry.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError

_UNIVERSAL = "universal"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training into the same folder; a killed owner's lock is free. Raises UserError."""
    with storage.failing_clearly(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            handle.seek(0)
            raise UserError(
                f"{folder}: process {handle.read().strip()} is training here already; wait for it or stop it"
            ) from e
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def save(
    folder: Path, engines: Mapping[str, Any], ema: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int
) -> Path:
    """Save the state of all ranks; every rank must call it with the same `meta`. Returns the checkpoint's folder."""
    rank = torch.distributed.get_rank()
    name = f"step-{meta['step']:08d}"
    scratch, final = folder / f".{name}.tmp", folder / name
    try:
        with storage.failing_clearly(str(final)):
            if rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            torch.distributed.barrier()
            for engine_name, engine in engines.items():
                engine.save_checkpoint(str(scratch), tag=engine_name, save_latest=False)
            if rank == 0:
                save_file(dict(ema), scratch / "ema.safetensors")
                world = torch.distributed.get_world_size()
                (scratch / "meta.json").write_bytes(storage.canonical_json({**meta, "world": world}))
                for path in [*scratch.rglob("*"), scratch]:
                    storage.sync(path)
                shutil.rmtree(final, ignore_errors=True)
                scratch.rename(final)
                storage.sync(folder)
                storage.write(str(folder / "latest"), name.encode())
                for old in sorted(folder.glob("step-*"))[:-keep]:
                    if old != final:
                        shutil.rmtree(old)
            torch.distributed.barrier()
    except (RuntimeError, SafetensorError) as e:
        # how torch and safetensors report a write that failed
        cause = str(e).splitlines()[0]
        raise Failure(
            f"{final}: could not be written; free some space, then run the same command again ({cause})"
        ) from e
    finally:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


def for_world(folder: Path, names: Sequence[str], zero_stage: int) -> bool:
    """Make the latest checkpoint fit for this number of processes; returns whether engines must load it as universal.

    ZeRO shards the optimizer by process, so a checkpoint of another number of them is converted first, once, beside
    itself. Every rank must call it.

    Raises:
        Failure: on every rank, where DeepSpeed could not convert it.
    """
    path, world = _latest(folder), torch.distributed.get_world_size()
    if path is None or zero_stage == 0 or _meta(path)["world"] == world:
        return False
    why = [""]
    if torch.distributed.get_rank() == 0 and not (path / _UNIVERSAL).exists():
        why = [_convert(path, names, zero_stage)]
    # also the barrier that all wait at
    torch.distributed.broadcast_object_list(why, src=0)
    if why[0]:
        raise Failure(f"{path}: could not be converted for {world} processes ({why[0]}); go on with as many as before")
    return True


def _convert(path: Path, names: Sequence[str], zero_stage: int) -> str:
    """Write `path/universal`; returns why not, or nothing."""
    scratch = path / f".{_UNIVERSAL}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    for name in names:
        command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(path / name), "--output_folder", str(scratch / name)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        command += ["--inject_missing_state"] if zero_stage < 3 else []
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, check=False, text=True, env=environment)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    scratch.rename(path / _UNIVERSAL)
    return ""


def _meta(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "meta.json").read_bytes()))
    except (OSError, ValueError) as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, why: Exception) -> Failure:
    latest = path.parent / "latest"
    return Failure(
        f"{path}: damaged checkpoint ({str(why).splitlines()[0]}); write an older step's name into {latest},"
        " or delete it to start anew"
    )


def _latest(folder: Path) -> Path | None:
    latest = folder / "latest"
    return folder / latest.read_text() if latest.exists() else None


def load(
    folder: Path, engines: Mapping[str, Any], universal: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Put the latest checkpoint into the engines; returns (meta, ema), or None where there is none yet.

    Raises:
        Failure: the checkpoint that `latest` names is damaged.
    """
    path = _latest(folder)
    if path is None:
        return None
    meta = _meta(path)
    try:
        ema = load_file(path / "ema.safetensors")
        for name, engine in engines.items():
            loaded, _ = engine.load_checkpoint(str(path / _UNIVERSAL if universal else path), tag=name)
            if loaded is None:
                raise FileNotFoundError(f"no state of {name}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise _damaged(path, e) from e
    return meta, ema
