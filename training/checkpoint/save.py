"""Writing checkpoints: all ranks write their files, rank 0 renames the folder once they are on the disk."""

import contextlib
import itertools
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from longtake.datasets import storage
from longtake.datasets.errors import Failure
from longtake.training.checkpoint import weights
from longtake.training.checkpoint.folder import latest, step_of
from longtake.training.checkpoint.upload import Copies
from longtake.training.engines import alone, store
from longtake.training.engines.ema import Averages

_LAST_PATIENCE = 60.0  # seconds, where the training has ended with an error
_PUBLISHED = "done"
_numbers, _trainings = itertools.count(), itertools.count()


class Checkpoints:
    """The checkpoints of a training, a context. Every rank must make the same calls.

    Args:
        keep: how many of the latest checkpoints stay.
        keep_every: checkpoints of steps divisible by it stay as well.
        upload: URL that checkpoints are copied to.
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
        self._uploads, self._training = upload is not None, next(_trainings)
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self._rank == 0:
            # the debris of a killed process
            for scratch in folder.glob(".step-*.tmp"):
                shutil.rmtree(scratch, ignore_errors=True)
            storage.sweep(str(folder))
            if upload:
                self._copies = Copies(folder, upload, lambda name: folder / name in self._kept() or self._lasts(name))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until the last checkpoint is safe, and copied to `upload`.

        Raises:
            Failure: it could not be; not where the training ends with an error of its own.
        """
        if kind:
            # another rank may be gone, and the launcher waits for this one
            self._patience = min(self._patience, _LAST_PATIENCE)
        with contextlib.suppress(*((Exception,) if kind else ())):
            if self._rank or not self._uploads:
                self.wait()
            if self._uploads and not (self._rank and kind):
                alone(f"copies/{self._training}", self._settle)
        self._thread.shutdown(wait=False)

    def save(self, engines: Mapping[str, Any], lead: str, averages: Averages, meta: Mapping[str, Any]) -> None:
        """Write the state of all ranks to the operating system. It is safe on the disk once `wait` returns.

        `averages` are those of the engine `lead`.

        Raises:
            Failure: this checkpoint or the one before could not be written.
        """
        self.wait()
        final = self._folder / f"step-{meta['step']:08d}"
        scratch = self._folder / f".{final.name}.tmp"
        try:
            with _errors_of_writing(final):
                if self._rank == 0:
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir(parents=True)
                torch.distributed.barrier()
                for name, engine in engines.items():
                    engine.save_checkpoint(str(scratch), tag=name, save_latest=False)
                for name, engine in engines.items():
                    leads = name == lead
                    weights.write(scratch if leads else scratch / name, self._rank, engine, averages if leads else {})
                if self._rank == 0:
                    (scratch / "meta.json").write_bytes(storage.canonical_json({**meta, "world": self._world}))
        except BaseException:
            if self._rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._pending = self._thread.submit(self._commit, scratch, final, next(_numbers))

    def wait(self) -> None:
        """Wait until the last checkpoint is safe on the disk. Raises Failure if it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _settle(self) -> None:
        self.wait()
        assert self._copies
        self._copies.finish()

    def _commit(self, scratch: Path, final: Path, number: int) -> None:
        """Rename a checkpoint once the files of all ranks are on their disks; runs in the thread of each rank."""
        parts = _Parts(final, number, lambda: self._patience)  # `__exit__` shortens it
        trouble = parts.do(str(self._rank), lambda: _sync_own(scratch, self._rank))
        if self._rank != 0:
            parts.wait_for(_PUBLISHED)
            return

        trouble = parts.do(_PUBLISHED, lambda: self._publish(scratch, final, parts)) or trouble
        if trouble:
            shutil.rmtree(scratch, ignore_errors=True)
            raise trouble
        if self._copies:
            self._copies.begin(final)

    def _publish(self, scratch: Path, final: Path, parts: "_Parts") -> None:
        for rank in range(self._world):
            parts.wait_for(str(rank))
        for folder in [*(path for path in scratch.rglob("*") if path.is_dir()), scratch]:
            storage.sync(folder)
        _remove(final)
        scratch.rename(final)
        storage.sync(self._folder)
        storage.write(str(self._folder / "latest"), final.name.encode())
        self._prune()

    def _kept(self) -> list[Path]:
        """The checkpoints that stay: the latest ones, and those of `keep_every`."""
        paths = sorted(self._folder.glob("step-*"), key=step_of)
        lasting = [path for path in paths if self._lasts(path.name)]
        newest = [path for path in [latest(self._folder)] if path]
        return sorted({*paths[-self._keep :], *lasting, *newest})

    def _lasts(self, name: str) -> bool:
        """Whether a checkpoint is one of `keep_every`, here or in a store that others have copied to."""
        return self._keep_every is not None and step_of(Path(name)) % self._keep_every == 0

    def _prune(self) -> None:
        kept = self._kept()
        for path in self._folder.glob("step-*"):
            if path not in kept and (self._copies is None or path != self._copies.source):
                _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint, if it is there, so that nobody who reads it sees a part of it as the whole."""
    debris = path.with_name(f".{path.name}.gone.tmp")
    shutil.rmtree(debris, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(debris)
    shutil.rmtree(debris, ignore_errors=True)


class _Parts:
    """The parts of a commit, by rank and at last "done": each ends well or with an error, which all ranks learn.

    The outcome of a part is in the store that ranks share, empty where it ended well. The outcomes of the commit before
    are deleted: every rank has read them, since `save` has a barrier.
    """

    def __init__(self, final: Path, number: int, patience: Callable[[], float]) -> None:
        self._final, self._number, self._patience = final, number, patience
        self._store = store()

    def _key(self, name: str, number: int) -> str:
        return f"longtake/checkpoint/{number}/{name}"

    def do(self, name: str, action: Callable[[], None]) -> Exception | None:
        """Do this rank's part `name`; returns its error."""
        error: Exception | None = None
        self._store.delete_key(self._key(name, self._number - 1))
        try:
            with _errors_of_writing(self._final):
                action()
        except Exception as e:
            error = e
        self._store.set(self._key(name, self._number), "" if error is None else str(error) or type(error).__name__)
        return error

    def wait_for(self, name: str) -> None:
        """Wait until a part has ended. Raises Failure where it ended with an error, or not in time."""
        key, began = self._key(name, self._number), time.monotonic()
        # polled, since waiting would keep the store from all other threads
        while not self._store.check([key]):
            if time.monotonic() > began + self._patience():
                raise Failure(f"{self._final}: rank {name} did not write its part within {self._patience():g} s")
            time.sleep(0.02)
        if error := self._store.get(key).decode():
            raise Failure(error)


@contextlib.contextmanager
def _errors_of_writing(final: Path) -> Iterator[None]:
    """Turn the errors of a write that failed into a Failure."""
    try:
        with storage.failing_clearly(str(final)):
            yield
    except (RuntimeError, SafetensorError) as e:
        # as torch and safetensors report it
        cause = str(e).splitlines()[0]
        raise Failure(
            f"{final}: could not be written; free some space, then run the same command again ({cause})"
        ) from e


def _sync_own(folder: Path, rank: int) -> None:
    """Sync the files that this rank has written, while others may still write theirs."""
    for path in folder.rglob("*"):
        owner = re.search(r"zero_pp_rank_(\d+)_|weights-(\d+)\.", path.name)
        if rank == (int(owner[1] or owner[2]) if owner else 0) and not path.name.startswith(".") and path.is_file():
            storage.sync(path)
