"""Checkpoints: written under a temporary name, synced, renamed, then `latest` is flipped. A kill costs nothing older.

A checkpoint is a folder: one DeepSpeed checkpoint an engine, `ema.safetensors`, `meta.json` (step, loader state).
DeepSpeed's files are pickles: they are read back only from the stage's own folder, never from a registry.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError


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
                (scratch / "meta.json").write_bytes(storage.canonical_json(dict(meta)))
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


def load(folder: Path, engines: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Put the latest checkpoint into the engines; returns (meta, ema), or None where there is none yet.

    Raises:
        Failure: the checkpoint that `latest` names is damaged.
    """
    latest = folder / "latest"
    if not latest.exists():
        return None
    path = folder / latest.read_text()
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        ema = load_file(path / "ema.safetensors")
        for name, engine in engines.items():
            loaded, _ = engine.load_checkpoint(str(path), tag=name)
            if loaded is None:
                raise FileNotFoundError(f"no state of {name}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise Failure(
            f"{path}: damaged checkpoint ({str(e).splitlines()[0]}); write an older step's name into {latest}, or delete it to start anew"
        ) from e
    return meta, ema
