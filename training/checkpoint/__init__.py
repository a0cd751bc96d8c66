"""Checkpoints: written under a temporary name, synced, renamed, then `latest` is flipped. A kill costs nothing older.

A checkpoint is a folder: one DeepSpeed checkpoint an engine, `weights-RANK.safetensors` (the lead module's weights in fp32
and their averages, as fragments; other modules' weights lie in a folder of their name), `meta.json` (step, loader state,
seeds, run, recipe, settings, the objective's state). DeepSpeed's files are pickles: they are read back only from the
stage's own folder or its own copies, never from a registry. Nobody else may write there.

Training stands still while the state is written to the operating system; syncing, renaming, pruning and uploading go on
beside it, in a thread of each rank.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training.checkpoint import weights
from longtake.training.checkpoint.upload import Copies
from longtake.training.checkpoint.weights import RAW, Weights, damaged
from longtake.training.config import TrainConfig
from longtake.training.engines import lora, store
from longtake.training.engines.ema import Averages, label

__all__ = ["RAW", "Checkpoints", "Weights", "folder_of", "for_world", "latest", "load", "locked", "meta", "trained"]
_UNIVERSAL = "universal"
_LAST_PATIENCE = 60.0  # seconds, where the training has ended by an error
_numbers = itertools.count()


def folder_of(config: TrainConfig, output: str) -> Path:
    """Where the checkpoints of a stage lie: `checkpoints`, if it is named, else in its output.

    An output OUTPUT-SUFFIX, of a run that starts from nothing, has a folder of its own in `checkpoints` too.

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


class Checkpoints:
    """The checkpoints of a training, a context. Every rank must make the same calls.

    Args:
        keep: how many of the latest stay.
        keep_every: those of steps divisible by it stay as well.
        upload: URL that they are copied to.
        patience: seconds that ranks wait for each other's files.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None = None,
        upload: str | None = None,
        patience: float = 1800.0,
    ) -> None:
        self._folder, self._keep, self._keep_every, self._patience = folder, keep, keep_every, patience
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._copies: Copies | None = None
        if torch.distributed.get_rank() == 0:
            # what a kill has left
            for scratch in folder.glob(".step-*.tmp"):
                shutil.rmtree(scratch, ignore_errors=True)
            storage.sweep(str(folder))
            if upload:
                self._copies = Copies(folder, upload, lambda: {path.name for path in self._kept()})

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until the last checkpoint is safe, and copied where it is to be.

        Raises:
            Failure: it could not be; where the training ends by an error, that alone is told.
        """
        if kind:
            # another rank may be gone, and the launcher waits for this one
            self._patience = min(self._patience, _LAST_PATIENCE)
        with contextlib.suppress(*((Exception,) if kind else ())):
            self.wait()
            if self._copies:
                self._copies.finish()
        self._thread.shutdown(wait=False)

    def save(self, engines: Mapping[str, Any], lead: str, averages: Averages, meta: Mapping[str, Any]) -> None:
        """Write the state of all ranks; returns when it is with the operating system, `wait` when it is safe.

        `averages` are those of the engine `lead`.

        Raises:
            Failure: it could not be written, or the one before it could not.
        """
        self.wait()
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        final = self._folder / f"step-{meta['step']:08d}"
        scratch = self._folder / f".{final.name}.tmp"
        try:
            with _clearly(final):
                if rank == 0:
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir(parents=True)
                torch.distributed.barrier()
                for name, engine in engines.items():
                    engine.save_checkpoint(str(scratch), tag=name, save_latest=False)
                for name, engine in engines.items():
                    leads = name == lead
                    weights.write(scratch if leads else scratch / name, rank, engine, averages if leads else {})
                if rank == 0:
                    (scratch / "meta.json").write_bytes(storage.canonical_json({**meta, "world": world}))
        except BaseException:
            if rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._pending = self._thread.submit(self._commit, scratch, final, rank, world, next(_numbers))

    def wait(self) -> None:
        """Until the last checkpoint is safe here. Raises Failure if it could not be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(self, scratch: Path, final: Path, rank: int, world: int, number: int) -> None:
        shared, key = store(), f"longtake/checkpoint/{number}"

        def told(action: Callable[[], None], name: str) -> Exception | None:
            try:
                with _clearly(final):
                    action()
            except Exception as e:
                shared.set(f"{key}/{name}", str(e) or type(e).__name__)
                return e
            shared.set(f"{key}/{name}", "")
            return None

        def heard(names: Sequence[str]) -> None:
            began = time.monotonic()
            for name in names:
                # asked again and again, since waiting would keep the store from all other threads
                while not shared.check([f"{key}/{name}"]):
                    if time.monotonic() > began + self._patience:
                        raise Failure(f"{final}: rank {name} did not write its part within {self._patience:g} s")
                    time.sleep(0.02)
                if why := shared.get(f"{key}/{name}").decode():
                    raise Failure(why)

        def publish() -> None:
            heard([str(r) for r in range(world)])
            for place in [*(path for path in scratch.rglob("*") if path.is_dir()), scratch]:
                storage.sync(place)
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
            storage.sync(self._folder)
            storage.write(str(self._folder / "latest"), final.name.encode())
            self._prune()

        # all have heard what was said about the one before: `save` has met since
        for name in (str(rank), *(["done"] if rank == 0 else [])):
            shared.delete_key(f"longtake/checkpoint/{number - 1}/{name}")
        trouble = told(lambda: _sync_own(scratch, rank), str(rank))
        if rank == 0:
            trouble = told(publish, "done") or trouble
            if trouble:
                shutil.rmtree(scratch, ignore_errors=True)
                raise trouble
            if self._copies:
                self._copies.begin(final)
        else:
            heard(["done"])

    def _kept(self) -> list[Path]:
        found = sorted(self._folder.glob("step-*"), key=_step)
        lasting = [path for path in found if self._keep_every and _step(path) % self._keep_every == 0]
        newest = [path for path in [latest(self._folder)] if path]
        return sorted({*found[-self._keep :], *lasting, *newest})

    def _prune(self) -> None:
        kept = self._kept()
        for path in self._folder.glob("step-*"):
            if path not in kept and (self._copies is None or path != self._copies.source):
                shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


@contextlib.contextmanager
def _clearly(final: Path) -> Iterator[None]:
    try:
        with storage.failing_clearly(str(final)):
            yield
    except (RuntimeError, SafetensorError) as e:
        # how torch and safetensors report a write that failed
        cause = str(e).splitlines()[0]
        raise Failure(
            f"{final}: could not be written; free some space, then run the same command again ({cause})"
        ) from e


def _sync_own(folder: Path, rank: int) -> None:
    """Bring to the disk the files that this rank has written, while others may still write theirs."""
    for path in folder.rglob("*"):
        owner = re.search(r"zero_pp_rank_(\d+)_|weights-(\d+)\.", path.name)
        if rank == (int(owner[1] or owner[2]) if owner else 0) and not path.name.startswith(".") and path.is_file():
            storage.sync(path)


def for_world(folder: Path, names: Sequence[str], zero_stage: int) -> bool:
    """Make the latest checkpoint fit for this number of processes; returns whether engines must load it as universal.

    ZeRO shards the optimizer by process, so a checkpoint of another number of them is converted first, once, beside
    itself. Every rank must call it.

    Raises:
        Failure: on every rank, where DeepSpeed could not convert it.
    """
    path, world = latest(folder), torch.distributed.get_world_size()
    if path is None or zero_stage == 0 or meta(path)["world"] == world:
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
        command += ["--input_folder", str(path / _tag(path, name)), "--output_folder", str(scratch / _tag(path, name))]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        command += ["--inject_missing_state"] if zero_stage < 3 else []
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, check=False, text=True, env=environment)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    scratch.rename(path / _UNIVERSAL)
    return ""


def meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint. Raises Failure where it is damaged."""
    try:
        return dict(json.loads((path / "meta.json").read_bytes()))
    except (OSError, ValueError) as e:
        raise damaged(path, e) from e


def latest(folder: Path) -> Path | None:
    """The folder of the latest checkpoint, None where there is none.

    Raises:
        Failure: the file `latest` names no checkpoint that is here, as a full disk or a copy that was cut short leaves it.
    """
    names = folder / "latest"
    if not names.exists():
        return None
    name = names.read_text(errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name) or not (folder / name).is_dir():
        whole = sorted((path for path in folder.glob("step-*") if (path / "meta.json").is_file()), key=_step)
        remedy = f"write {whole[-1].name} into it, the newest that is whole" if whole else "delete it to start anew"
        raise Failure(f"{names}: names no checkpoint that is here ({name[:40]!r}); {remedy}")
    return folder / name


def _tag(path: Path, name: str) -> str:
    """The name that an engine has in a checkpoint: once the only one of a prior was called generator."""
    return "generator" if name == "model" and not (path / name).is_dir() else name


def load(path: Path, engines: Mapping[str, Any], universal: bool = False) -> None:
    """Put a checkpoint's state into the engines. Raises Failure where it is damaged."""
    try:
        for name, engine in engines.items():
            decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
            loaded, _ = engine.load_checkpoint(str(path / _UNIVERSAL if universal else path), tag=_tag(path, name))
            if loaded is None:
                raise FileNotFoundError(f"no state of {name}")
            # of a universal checkpoint ZeRO-3 gives all groups what the first one has, and one count of steps to share
            for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            for state in engine.basic_optimizer.state.values():
                state["step"] = state["step"].clone()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever an unpickler makes of damaged bytes
        raise damaged(path, e) from e


def trained(folder: Path, config: TrainConfig) -> dict[str, Tensor]:
    """What a finished training has made: the first average, or the raw weights where none is kept; LoRA's changes added.

    Raises:
        Failure: there is no checkpoint, or it is damaged.
    """
    found = latest(folder)
    if found is None:
        raise Failure(f"{folder}: holds no checkpoint; run the same command again")
    made = Weights(found, label(config.ema_half_lives[0]) if config.ema_half_lives else RAW)
    return dict(lora.merged(made, config.lora) if config.lora else made)


def beside(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a finished training has made of another module than the first, raw; and the state of its objective.

    Raises:
        Failure: there is no checkpoint, or it is damaged.
    """
    found = latest(folder)
    if found is None:
        raise Failure(f"{folder}: holds no checkpoint; run the same command again")
    return dict(Weights(found, RAW, name)), dict(meta(found)["state"])
