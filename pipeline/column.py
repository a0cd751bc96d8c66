"""A column of a dataset, whatever it holds: find the shards that lack it, make them in a pool of actors, commit them.

A column's shard is beside the base shard of the same name. It is committed in the same way: its tar first, then its
index, by which readers find it. The column's name has a digest of all that decides its values, so that another setting
makes another column, and nothing else in the dataset is touched.
"""

import importlib
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from isal import isal_zlib
from pydantic import Field

from longtake.datasets import compact, index, schema, storage, view
from longtake.datasets.errors import Failure, UserError, in_short
from longtake.datasets.shard import sha256_of, write_tar
from longtake.pipeline import groups
from longtake.pipeline.cluster import TaskConfig, ray_data
from longtake.pipeline.commit import column_rows

Make = Callable[..., dict[str, int]]  # make(split=, name=, keep=, report=) makes and commits a shard; returns counts

_REPORT_SECONDS = 1.0


class WorkerConfig(TaskConfig):
    """What one worker asks of Ray, and the number of workers.

    gpus      GPUs of a worker, or a fraction of one; null: 1 if the cluster has any, else 0
    workers   number of workers; null: as many as the cluster has room for
    """

    COSTLY = TaskConfig.COSTLY | {"gpus", "workers"}

    gpus: float | None = Field(None, ge=0)
    workers: int | None = Field(None, ge=1)

    def options(self) -> dict[str, Any]:
        return super().options() | {"num_gpus": self.gpus or 0}


class Base(NamedTuple):
    """The base shards of a dataset, and which of their clips a column is made from."""

    rows: Mapping[str, compact.Rows]  # by split
    facts: Mapping[str, pa.Table]  # by split: `compact.FACTS` of all rows
    keeps: Mapping[str, Mapping[str, np.ndarray]]  # by split and shard: (N,) bool, a clip each
    view: str  # digest of the view that keeps them, "" without one


def open_base(dataset: str, view_uri: str | None) -> Base:
    """The base of a column of all clips, or of the clips that a view keeps.

    Raises:
        UserError: no dataset is here, or workers could not see it; no clip is kept.
    """
    if storage.is_memory(dataset):
        raise UserError(
            f"dataset: {dataset}: Ray workers cannot see this process's memory; use a folder or an object store"
        )
    index.describe(dataset)
    opened = {split: compact.open_split(dataset, split) for split in schema.SPLITS}
    rows = {split: one for split, (one, _) in opened.items()}
    facts = {split: table for split, (_, table) in opened.items()}
    kept = {split: view.kept(base, view_uri) for split, base in rows.items()}
    keeps = {split: by_shard(rows[split], keep) for split, (keep, _, _) in kept.items()}
    if not any(keep.any() for shards in keeps.values() for keep in shards.values()):
        raise UserError(f"dataset: {dataset}: no clip to encode; run its `shard` stage, or name another view")
    return Base(rows, facts, keeps, next(digest for _, _, digest in kept.values()))


def by_shard(base: compact.Rows, keep: np.ndarray) -> dict[str, np.ndarray]:
    """`keep` (N,) of a split's clips, split by shard."""
    names = base.shards["name"].to_pylist()
    return dict(zip(names, np.split(keep, base.starts[1:]) if names else [], strict=True))


class Job(NamedTuple):
    """A shard to make, and a bit for each of its clips: whether it is part of the column."""

    split: str
    name: str
    clips: int
    keep: bytes


def fits(base: index.Shard, shard: index.Shard) -> bool:
    """Whether a column's shard was made from just these clips."""
    return bool(
        base.table["key"].to_pylist() == shard.table["key"].to_pylist()
        and base.table["sha256"].to_pylist() == shard.table["base_sha256"].to_pylist()
    )


def missing(
    dataset: str,
    split: str,
    column: str,
    keeps: Mapping[str, np.ndarray],
    is_of: Callable[[index.Shard, index.Shard], bool] = fits,
) -> Iterator[Job]:
    """The base shards that a column lacks, or has from something else: `is_of(base, shard)` is false."""
    committed = set(index.shard_names(dataset, split, column))

    def is_missing(name: str) -> bool:
        full = f"{name}.{column}"
        if full not in committed:
            return True
        return not is_of(index.read_shard(dataset, split, name), index.read_shard(dataset, split, full))

    with ThreadPoolExecutor(16) as pool:
        for (name, keep), absent in zip(keeps.items(), pool.map(is_missing, keeps), strict=True):
            if absent:
                yield Job(split, name, len(keep), np.packbits(keep).tobytes())


def check_keep(dataset: str, base: index.Shard, keep: np.ndarray) -> None:
    """Raise Failure where `keep`, (N,) bool, is not of the clips of a base shard."""
    if len(keep) != len(base.table):
        raise Failure(
            f"{dataset} ({base.split}): {base.name} has {len(base.table)} clips, the view {len(keep)};"
            " run the same command again"
        )


def load_model(uri: str, part: str | None = None) -> tuple[str, Any]:
    """The URI of a model's version, and the model. An alias may name another version before a stopped run continues.

    `part`, such as "vae", is what a pipeline of another library is named for; without it, such a one is refused.
    """
    # through the public door, as any user: the pipeline does not import training
    longtake: Any = importlib.import_module("longtake")
    version = longtake.resolve(uri)
    return version, longtake.load(version, part)


class Worker:
    """An actor of the pool, which loads its models once and makes one shard after the other.

    Args:
        load: `load(device, *models, **arguments)` gives the `Make`.
        models: references to what all actors share.
        arguments: of `load`; small, and the same for all actors.
    """

    def __init__(
        self, load: Callable[..., Make], models: list[Any], arguments: Mapping[str, Any], device: str, board: Any
    ) -> None:
        import ray
        import torch

        self._board, self._broken = board, ""
        if device == "cuda" and not torch.cuda.is_available():
            # an error of the jobs: Ray would restart an actor that fails here again and again
            self._broken = "run.gpus: the torch of a worker cannot use its GPU; install a CUDA build, or set 0"
            return
        try:
            self._make = load(device, *ray.get(models), **arguments)
        except (UserError, Failure) as e:
            self._broken = str(e)
        except ray.exceptions.RayError:
            raise  # of a node that is gone: another start may do
        except Exception as e:
            # such as a package that does not fit: Ray would restart the actor again and again
            self._broken = (
                f"a worker on {socket.gethostname()} cannot load what it needs ({in_short(e)}); mend it there"
            )

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        shard, last = f"{job['split']}/{job['name']}", 0.0

        def report(clips: int, position: str) -> None:
            nonlocal last
            if monotonic() - last > _REPORT_SECONDS:
                last = monotonic()
                self._board.begin.remote(shard, clips, position)

        result: dict[str, Any] = {"units": job["clips"], "error": self._broken}
        if self._broken:
            return result
        report(0, "its first clips")
        keep = np.unpackbits(np.frombuffer(job["keep"], np.uint8), count=job["clips"]).astype(bool)
        try:
            result |= self._make(split=job["split"], name=job["name"], keep=keep, report=report)
        except (Failure, OSError) as e:
            result["error"] = f"{shard}: {e}"
        self._board.finish.remote(shard, job["clips"])
        return result


def make(
    stage: str,
    jobs: Sequence[Job],
    task: WorkerConfig,
    load: Callable[..., Make],
    models: Sequence[Any],
    arguments: Mapping[str, Any],
    share: Callable[[Any], Mapping[str, Any]] = lambda ray: {},
) -> Counter[str]:
    """Make the shards of a column in a pool of actors, if there are any to make; returns the sums of what `Make` counts.

    Args:
        load, models, arguments: see `Worker`; the models are put into Ray's store once.
        share: `share(ray)` gives further arguments that all actors share, such as another actor.

    Raises:
        UserError: no node has enough GPUs, or room for a task.
        Failure, Interrupted: as `groups.run`.
    """

    def start(ray: Any, board: Any) -> Any:
        data = ray_data()
        worker, room = _pool(stage, task, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        results = data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_kwargs={
                "load": load,
                "models": [ray.put(model) for model in models],
                "arguments": {**arguments, **share(ray)},
                "device": "cuda" if worker.gpus else "cpu",
                "board": board,
            },
            compute=data.ActorPoolStrategy(size=min(task.workers or room, len(jobs)), max_tasks_in_flight_per_actor=2),
            **worker.options(),
        )
        return results.iter_rows()

    if not jobs:
        return Counter()
    rows, clips = [job._asdict() for job in jobs], sum(job.clips for job in jobs)
    return groups.run(stage, rows, task, start, unit="clip", total=clips, failed="shards could not be made")


def _pool(stage: str, task: WorkerConfig, nodes: list[dict[str, float]]) -> tuple[WorkerConfig, int]:
    """The needs of a worker, with its `gpus` resolved, and the number of workers that have room.

    Raises:
        UserError: no node has enough GPUs.
    """
    most = max((node.get("GPU", 0) for node in nodes), default=0)
    gpus = (1.0 if most else 0.0) if task.gpus is None else task.gpus
    if gpus > most:
        raise UserError(
            f"stage {stage}: run.gpus: a worker needs {gpus:g} GPU, no node of the Ray cluster has more than {most:g}"
        )
    room = [
        min(node.get("CPU", 0) // task.cpus, node.get("GPU", 0) // gpus if gpus else float("inf")) for node in nodes
    ]
    return task.model_copy(update={"gpus": gpus}), max(1, int(sum(room)))


def clip_bytes(tar: str, row: Mapping[str, Any]) -> bytes:
    """The mp4 of a clip by its row of the base. Raises Failure where it is missing or damaged."""
    try:
        data = storage.read_range(tar, row["mp4_offset"], row["mp4_size"])
    except FileNotFoundError as e:
        raise Failure(f"{tar}: is missing; run `longtake dataset verify`") from e
    if len(data) != row["mp4_size"] or isal_zlib.crc32(data) != row["mp4_crc32"]:
        raise Failure(f"{tar}: {row['key']}.mp4: is damaged; run `longtake dataset verify`")
    return data


def commit(
    dataset: str,
    base: index.Shard,
    column: str,
    members: Iterable[tuple[str, dict[str, bytes]]],
    row_of: Callable[[Mapping[str, Any]], dict[str, Any]],
    kind: pa.Schema,
    notes: Mapping[str, Any],
    is_of: Callable[[index.Shard, index.Shard], bool] = fits,
) -> int:
    """Write a column's shard for all clips of a base shard; returns the bytes of its tar.

    One that another worker has committed meanwhile stays, as readers may use it. The index of any other tar is deleted first:
    a reader must not find it beside the new one.

    Args:
        members: each clip's key and files, in the order of the base.
        row_of: `row_of(base_row)` gives the further columns of the index for a clip.
        kind: schema of the index.
        notes: metadata of the index, such as statistics.
        is_of: as for `missing`.
    """
    name = f"{base.name}.{column}"
    url = storage.join(dataset, base.split, name)
    try:
        with storage.staged(f"{url}.tar") as tar:
            stored = write_tar(tar, members)
            size, digest = tar.stat().st_size, sha256_of(tar)
            # asked as late as can be: the members may take an hour
            if name in index.shard_names(dataset, base.split, column):
                there = index.read_shard(dataset, base.split, name)
                if is_of(base, there):
                    raise _Committed(there.tar_bytes)
                if not fits(base, there) or there.tar_sha256 != digest:
                    fs, path = storage.filesystem(f"{url}.parquet")
                    with suppress(FileNotFoundError):
                        storage.retrying(path, lambda: fs.rm_file(path))
    except _Committed as e:
        return e.size
    base_rows = base.table.to_pylist()
    rows = [row | row_of(base_row) for row, base_row in zip(column_rows(stored, base_rows), base_rows, strict=True)]
    index.write_index(f"{url}.parquet", rows, kind, size, digest, notes)
    return size


class _Committed(Exception):
    """Another worker has committed the shard; what was made of it again is given up."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def shards_of(dataset: str, column: str, base: Base) -> list[index.Shard]:
    """The committed shards of a column, split by split, without those whose base shard is gone."""
    return [
        shard
        for split, keeps in base.keeps.items()
        for shard in index.read_shards(dataset, split, column)
        if shard.name.partition(".")[0] in keeps
    ]


@contextmanager
def sweeping(dataset: str, *others: str) -> Iterator[Counter[str]]:
    """Delete the temporary files of workers that died, before and after the block; after it `swept` is their number.

    They are beside the shards, and in other folders of the dataset.
    """
    folders = [storage.join(dataset, name) for name in (*schema.SPLITS, *others)]
    totals = Counter(swept=sum(map(storage.sweep, folders)))
    try:
        yield totals
    finally:
        totals["swept"] += sum(map(storage.sweep, folders))


def complete(dataset: str, columns: str | Sequence[str], digests: Mapping[str, str]) -> bool:
    """Whether a column, or each of several, has all shards of the dataset, whose digests by split are still those given."""
    for split in schema.SPLITS:
        stems = {name.removesuffix(".parquet") for name in index.table_names(storage.join(dataset, split))}
        names = {stem for stem in stems if "." not in stem}
        for column in [columns] if isinstance(columns, str) else columns:
            if not stems.issuperset(f"{name}.{column}" for name in names):
                return False
        if compact.open_split(dataset, split)[0].digest != digests[split]:
            return False
    return True
