"""`cache_latents`: a dataset's clips through a video autoencoder, once, as a cache column beside the shards.

A pool of Ray actors, each with the encoder, takes shard after shard; rows carry their names, not their bytes. The
column is named by all that decides its values, the encoder's weights first: another encoder makes another column, and
nothing else in the dataset is touched. What it gives up: a view in the config is part of that name, so that latents of
one view are not taken over by the next; without a view all clips are encoded, and every later view can use them.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt
from tqdm import tqdm

from longtake.datasets import compact, index, schema, storage, view
from longtake.datasets import latents as columns
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.datasets.latents import Latents, read_latents
from longtake.datasets.masking import shown
from longtake.datasets.stage import DatasetInput, Input, Scheduling, StageConfig, ViewInput
from longtake.pipeline.board import Board, watched
from longtake.pipeline.cluster import TaskConfig, connected

if TYPE_CHECKING:
    from longtake.pipeline.latents import Geometry, Settings

VERSION = 1
PRODUCES = "latents"

_TELL_SECONDS = 1.0
_SETTINGS = {"size", "shrink", "join_seconds", "precision", "dtype", "tile", "overlap", "batch", "steps"}


class WorkerConfig(TaskConfig):
    """What one worker asks of Ray. `gpus` may be a part of one; None is 1 where the cluster has any, else 0."""

    gpus: float | None = Field(None, ge=0)

    def options(self) -> dict[str, Any]:
        return super().options() | {"num_gpus": self.gpus or 0}


class Config(StageConfig):
    """Encode a dataset by a model of the registry ("models:/pv-vae@champion"), a stage that trains one, or a model folder.

    Clips are encoded whole, whatever their length; of their frames the last ones that make no whole step are left out.
    With `join_seconds` clips that follow each other without a hole are encoded as one video of so many seconds at most,
    as a film is generated: a model with a memory learns of such streams, and its history lies within one.
    With `shrink` the column is of the video scaled down: as many steps, h // height x w // width positions of h x w.
    With the same weights, settings and kind of machine every run writes the same bytes.
    """

    kind: Literal["cache_latents"]
    dataset: DatasetInput
    encoder: Annotated[str, Input("model")]
    view: ViewInput | None = None  # encode its kept clips only; loaders then leave the others out
    size: tuple[PositiveInt, PositiveInt] | None = None  # as the loader's; None: each clip's own, to whole positions
    shrink: tuple[PositiveInt, PositiveInt] = (1, 1)  # of (height, width), before it is encoded; to whole positions
    join_seconds: float = Field(0.0, ge=0)  # of clips encoded in one stream, at most; 0: each by itself
    precision: Literal["fp32", "bf16"] = "fp32"  # of the encoder; fp32 is without TF32
    dtype: Literal["float16", "bfloat16"] = "float16"  # as stored
    tile: PositiveInt | None = None  # pixels of a side; encode larger frames in overlapping tiles
    overlap: int = Field(64, ge=0)  # of tiles, in pixels
    batch: Annotated[int, Scheduling()] = Field(8, ge=1)  # clips of one shape that are encoded together
    steps: Annotated[int, Scheduling()] = Field(4, ge=1)  # latent steps of each that are encoded at once
    workers: Annotated[int | None, Scheduling()] = Field(None, ge=1)  # None: as many as the cluster has room for
    task: Annotated[WorkerConfig, Scheduling()] = WorkerConfig()  # of each worker


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a size that the stages it reads from cannot serve."""
    if config.size is None:
        return
    if hasattr(encoder := inputs.get("encoder"), "vae"):
        stride = encoder.vae().spatial_stride  # type: ignore[union-attr]
        if any(side % stride for side in config.size):
            raise ValueError(f"size: {config.size[0]}x{config.size[1]} is not in multiples of the encoder's {stride}")
        if any(side < stride * by for side, by in zip(config.size, config.shrink, strict=True)):
            (height, width), (rows, columns) = config.size, config.shrink
            raise ValueError(f"shrink: {rows}x{columns} leaves no whole position of size {height}x{width}; lower it")
    geometry = getattr(inputs.get("dataset"), "clip", None)
    if geometry is not None and geometry.short_side < min(config.size):
        raise ValueError(
            f"size: {min(config.size)} is larger than clip.short_side {geometry.short_side} of the dataset"
        )


def complete(uri: str) -> bool:
    """Whether all shards that the dataset has now are encoded, and are those that were."""
    try:
        made = read_latents(uri)
    except (UserError, Failure):
        return False
    for split in schema.SPLITS:
        names = set(index.shard_names(made.dataset, split))
        if names - {n.partition(".")[0] for n in index.shard_names(made.dataset, split, made.column)}:
            return False
        if compact.open_split(made.dataset, split)[0].digest != made.digests[split]:
            return False
    return True


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Encode what is missing of the column, and write its statistics to `output`. Safe to run again, and twice at once.

    Raises:
        UserError: no dataset, no video autoencoder, or a size that does not fit; no clip to encode.
        Failure: some shards could not be encoded.
    """
    from longtake.pipeline import latents

    dataset = storage.absolute(inputs["dataset"])
    if storage.is_memory(dataset):
        raise UserError(
            f"dataset: {dataset}: Ray workers cannot see this process's memory; use a folder or an object store"
        )
    index.describe(dataset)
    uri, model = _encoder(inputs["encoder"])
    of = latents.geometry(model, uri)
    settings = latents.Settings(
        **config.model_dump(include=_SETTINGS),
        threads=max(1, int(config.task.cpus)),
    )
    latents.check(settings, of.stride)
    digest = columns.encoder_digest(model)
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    judged = {split: view.kept(base, inputs.get("view")) for split, base in bases.items()}
    column = latents.column_name(digest, settings, next(v for _, _, v in judged.values()))
    keeps = {split: _by_shard(bases[split], keep) for split, (keep, _, _) in judged.items()}
    if not any(keep.any() for shards in keeps.values() for keep in shards.values()):
        raise UserError(f"dataset: {dataset}: no clip to encode; run its `shard` stage, or name another view")
    swept = _sweep(dataset)
    if jobs := [job for split in schema.SPLITS for job in _missing(dataset, split, column, keeps[split])]:
        try:
            totals = _make(config, dataset, column, model, of, settings, jobs)
        finally:
            swept += _sweep(dataset)  # of workers that died on the way
    else:
        totals = Counter()
    read = {split: index.read_shards(dataset, split, column) for split in schema.SPLITS}
    shards = {split: [s for s in some if s.name.partition(".")[0] in keeps[split]] for split, some in read.items()}
    parts = [columns.read_moments(dataset, shard) for shard in shards["train"]]
    if not any(part.count for part in parts):
        what = "`size`; lower it" if config.shrink == (1, 1) else "`size` and `shrink`; lower them"
        raise UserError(f"dataset: {dataset}: no clip of the train split is large enough for {what}")
    found = columns.merged(parts)
    columns.write_latents(
        output,
        Latents(
            dataset=dataset,
            column=column,
            encoder={"uri": uri, "digest": digest, "model": type(model).__name__, "config": _plain(model)},
            channels=of.channels,
            factor=of.factor,
            stride=of.stride,
            size=config.size,
            precision=config.precision,
            dtype=config.dtype,
            count=found.count,
            mean=tuple(found.mean.tolist()),
            std=tuple(np.sqrt(found.m2 / found.count).tolist()),
            posterior_std=tuple(np.sqrt(found.variance).tolist()),
            view=inputs.get("view"),
            digests={split: base.digest for split, base in bases.items()},
            shrink=config.shrink,
            join_seconds=config.join_seconds,
        ),
    )
    steps = np.concatenate([shard.table["steps"].to_numpy() for some in shards.values() for shard in some])
    metrics = {
        "clips": float((steps > 0).sum()),
        "clips_left_out": float((steps == 0).sum()),  # not in the view, or too small for `size` or `shrink`
        "steps": float(steps.sum()),
        "bytes": float(sum(shard.tar_bytes for some in shards.values() for shard in some)),
        "shards": float(sum(len(some) for some in shards.values())),
        "encoded_shards": float(len(jobs)),  # the others were there
        "encoded_frames": float(totals["frames"]),
        "encoded_frames_cut": float(totals["frames_cut"]),  # from tails that make no whole step
        "debris_swept": float(swept),
    }
    return {"uri": output, "metrics": metrics, "column": column}


def _encoder(uri: str) -> tuple[str, Any]:
    """The model, and the URI of its version: an alias may point elsewhere before a stopped run goes on."""
    # the public door, as any other user's: training is no part of the pipeline
    longtake: Any = importlib.import_module("longtake")
    uri = longtake.resolve(uri) if uri.startswith(("models:/", "runs:/")) else storage.absolute(uri)
    return uri, longtake.load(uri)


def _plain(model: Any) -> dict[str, Any]:
    return dict(model.config.model_dump(mode="json"))


def _sweep(dataset: str) -> int:
    return sum(storage.sweep(storage.join(dataset, split)) for split in schema.SPLITS)


def _by_shard(base: compact.Rows, keep: np.ndarray) -> dict[str, np.ndarray]:
    names = base.shards["name"].to_pylist()
    return dict(zip(names, np.split(keep, base.starts[1:]) if names else [], strict=True))


class Job(NamedTuple):
    """A shard to encode, and which of its clips: a bit for each."""

    split: str
    name: str
    clips: int
    keep: bytes


def _missing(dataset: str, split: str, column: str, keeps: Mapping[str, np.ndarray]) -> Iterator[Job]:
    """The base shards that this column has not, or has of other clips."""
    from longtake.pipeline import latents

    there = set(index.shard_names(dataset, split, column))

    def is_there(name: str) -> bool:
        full = f"{name}.{column}"
        return full in there and latents.fits(
            index.read_shard(dataset, split, name), index.read_shard(dataset, split, full)
        )

    with ThreadPoolExecutor(16) as pool:
        for (name, keep), done in zip(keeps.items(), pool.map(is_there, keeps), strict=True):
            if not done:
                yield Job(split, name, len(keep), np.packbits(keep).tobytes())


class Worker:
    """An actor's side: holds the encoder on its device and makes one shard after the other."""

    def __init__(self, models: list[Any], board: Any, device: str, plain: Mapping[str, Any]) -> None:
        import ray
        import torch

        from longtake.pipeline.latents import Geometry, Settings, make_latents

        settings = Settings(**plain["settings"])
        arguments = {"dataset": plain["dataset"], "column": plain["column"]}
        self._board, self._broken = board, ""
        if device == "cuda" and not torch.cuda.is_available():
            # told by the jobs: Ray would start an actor that fails here again and again
            self._broken = "task.gpus: the torch of a worker cannot use its GPU; install a CUDA build, or set 0"
            return
        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        kind = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model = ray.get(models[0]).eval().requires_grad_(False).to(device, kind)
        self._make = partial(make_latents, model, Geometry(**plain["of"]), settings=settings, **arguments)

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        shard, last = f"{job['split']}/{job['name']}", 0.0

        def tell(clips: int, at: str) -> None:
            nonlocal last
            if monotonic() - last > _TELL_SECONDS:
                last = monotonic()
                self._board.begin.remote(shard, clips, at)

        result: dict[str, Any] = {"job_clips": job["clips"], "error": self._broken}
        if self._broken:
            return result
        tell(0, "its first clips")
        keep = np.unpackbits(np.frombuffer(job["keep"], np.uint8), count=job["clips"]).astype(bool)
        try:
            result |= self._make(split=job["split"], name=job["name"], keep=keep, tell=tell)
        except (Failure, OSError) as e:
            result["error"] = f"{shard}: {e}"
        self._board.finish.remote(shard, job["clips"])
        return result


def _make(
    config: Config,
    dataset: str,
    column: str,
    model: Any,
    of: "Geometry",
    settings: "Settings",
    jobs: list[Job],
) -> Counter[str]:
    """Encode shards; returns what `make_latents` counts, of all together."""
    errors: list[str] = []
    totals = Counter[str]()
    try:
        with (
            connected("cache_latents", config.task) as ray,
            tqdm(desc="cache_latents", total=sum(job.clips for job in jobs), unit="clip") as bar,
        ):
            task, workers = _pool(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
            device = "cuda" if task.gpus else "cpu"
            plain = {"of": asdict(of), "settings": asdict(settings), "dataset": dataset, "column": column}
            # one block a shard: a retry repeats no other
            rows = ray.data.from_items([job._asdict() for job in jobs], override_num_blocks=len(jobs))
            made = rows.map(
                Worker,
                fn_constructor_kwargs={"models": [ray.put(model)], "board": board, "device": device, "plain": plain},
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(jobs)), max_tasks_in_flight_per_actor=2),
                **task.options(),
            )

            def tell(done: int, line: str) -> None:
                bar.update(max(0, done - bar.n))
                if line:
                    bar.write(f"cache_latents: {shown(line)}", file=sys.stderr)

            done = 0
            for number, result in enumerate(
                watched(made.iter_rows(), ray, board, "cache_latents", config.task.stall_seconds, tell), 1
            ):
                done += result.pop("job_clips")
                if error := result.pop("error"):
                    errors.append(error)
                totals.update({name: int(value) for name, value in result.items() if value is not None})
                bar.set_postfix(shards=f"{number}/{len(jobs)}", refresh=False)
                tell(done, "")
    except KeyboardInterrupt as e:
        raise Interrupted("cache_latents: stopped; committed shards are kept") from e
    if errors:
        raise Failure(f"{len(errors)} of {len(jobs)} shards could not be encoded, the first: {errors[0]}")
    return totals


def _pool(config: Config, nodes: list[dict[str, float]]) -> tuple[WorkerConfig, int]:
    """What each worker gets, with `gpus` known, and how many there are.

    Raises:
        UserError: no node has so many GPUs.
    """
    most = max((node.get("GPU", 0) for node in nodes), default=0)
    gpus = (1.0 if most else 0.0) if config.task.gpus is None else config.task.gpus
    if gpus > most:
        raise UserError(
            f"stage cache_latents: task.gpus: a worker needs {gpus:g} GPU, no node of the Ray cluster has more than {most:g}"
        )
    task = config.task.model_copy(update={"gpus": gpus})
    room = [
        min(node.get("CPU", 0) // task.cpus, node.get("GPU", 0) // gpus if gpus else float("inf")) for node in nodes
    ]
    return task, config.workers or max(1, int(sum(room)))
