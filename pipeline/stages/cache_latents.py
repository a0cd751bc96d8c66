"""`cache_latents`: encode a dataset's clips once by a video autoencoder, as a cache column beside the shards.

Each actor of a Ray pool holds the encoder and takes shard after shard; rows carry names of shards, not bytes. The name
of the column depends on all that decides its values, the encoder's weights first: another encoder makes another column,
and nothing else in the dataset is touched. What it gives up: a view in the config is part of that name, so that latents
of one view are not reused for the next; without a view all clips are encoded, and every later view can use them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from longtake.datasets import encoding, index, storage
from longtake.datasets import latents as records
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import Latents, Moments, read_latents
from longtake.datasets.stage import DatasetInput, Input, StageConfig, ViewInput
from longtake.pipeline import column as columns
from longtake.pipeline.column import WorkerConfig
from longtake.pipeline.exact import be_exact

VERSION = 1
PRODUCES = "latents"

_RECORDED = {"size", "shrink", "join_seconds", "precision", "dtype"}


class EncodeConfig(WorkerConfig):
    """How the workers encode.

    batch   clips of one shape that are encoded together
    chunk   latents of each clip that are encoded at once
    """

    COSTLY = WorkerConfig.COSTLY | {"batch", "chunk"}

    batch: int = Field(8, ge=1)
    chunk: int = Field(4, ge=1)


class Config(StageConfig):
    """Encode a dataset by a model of the registry ("models:/pv-vae@champion"), a stage that trains one, or a model folder.

    It may be a pipeline of another library, registered or a folder in the layout of diffusers, for its autoencoder.

    Clips are encoded whole, whatever their length, but for the last frames that make no whole latent. With
    `join_seconds` clips that follow each other without a hole are encoded as one video, as a film is generated: a model
    with a memory learns from such streams, and its history is within one. With `shrink` the video is scaled down before
    it is encoded: the column has as many latents, of h // height x w // width positions instead of h x w. The same
    weights, settings and kind of machine give the same bytes in every run.

    dataset        to encode
    encoder        a model with an encoder
    view           encode its kept clips only; loaders then leave the others out
    size           height and width, as the loader's; null: each clip's own, to whole positions
    shrink         scale down by (height, width) before encoding; to whole positions
    join_seconds   longest stream of clips that are encoded as one video; 0: each clip by itself
    precision      of the encoder; fp32 is without TF32
    dtype          of the stored latents
    tile           pixels a side; encode larger frames in overlapping tiles
    overlap        of tiles, in pixels
    run            the workers that encode
    """

    MOVED: ClassVar = {"steps": "is now run.chunk", "task": "is now run"}

    kind: Literal["cache_latents"]
    dataset: DatasetInput
    encoder: Annotated[str, Input("model")]
    view: ViewInput | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None
    shrink: tuple[PositiveInt, PositiveInt] = (1, 1)
    join_seconds: float = Field(0.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    dtype: Literal["float16", "bfloat16"] = "float16"
    tile: PositiveInt | None = None
    overlap: int = Field(64, ge=0)
    run: EncodeConfig = EncodeConfig()


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a size that the stages it reads from cannot give. Raises ValueError."""
    if config.size is None:
        return
    if hasattr(encoder := inputs.get("encoder"), "encoder") and (known := encoder.encoder()):  # type: ignore[union-attr]
        stride = known.spatial_stride
        if any(side % stride for side in config.size):
            raise ValueError(f"size: {config.size[0]}x{config.size[1]} is not in multiples of the encoder's {stride}")
        if any(side < stride * by for side, by in zip(config.size, config.shrink, strict=True)):
            (height, width), (rows, columns) = config.size, config.shrink
            raise ValueError(f"shrink: {rows}x{columns} leaves no whole position of size {height}x{width}; lower it")
    clip = getattr(inputs.get("dataset"), "clip", None)
    if clip is not None and clip.short_side < min(config.size):
        raise ValueError(f"size: {min(config.size)} is larger than clip.short_side {clip.short_side} of the dataset")


def complete(uri: str) -> bool:
    """Whether all shards that the dataset has now are encoded, and have not changed since."""
    try:
        record = read_latents(uri)
    except (UserError, Failure):
        return False
    return columns.complete(record.dataset, record.column, record.digests)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Encode what is missing of the column, and write its statistics to `output`. Safe to run again, and twice at once.

    Raises:
        UserError: no dataset, no video autoencoder, or a size that does not fit; no clip to encode.
        Failure: some shards could not be encoded.
    """
    # What to encode, and by what.
    dataset = storage.absolute(inputs["dataset"])
    base = columns.open_base(dataset, inputs.get("view"))
    uri, model = columns.load_model(inputs["encoder"], "vae")
    strides = encoding.strides_of(model, uri)
    settings = encoding.Settings(
        **config.model_dump(include=_RECORDED | {"tile", "overlap"}),
        batch=config.run.batch,
        chunk=config.run.chunk,
        threads=max(1, int(config.run.cpus)),
    )
    encoding.check(settings, strides.stride)
    digest = records.encoder_digest(model)
    column = encoding.column_name(digest, settings, base.view)

    # What is missing.
    with columns.sweeping(dataset) as totals:
        jobs = [job for split, keeps in base.keeps.items() for job in columns.missing(dataset, split, column, keeps)]
        arguments = {"strides": strides, "settings": settings, "dataset": dataset, "column": column}
        totals.update(columns.make("cache_latents", jobs, config.run, _load, [model], arguments))

    # The record, with the statistics of all shards.
    shards = columns.shards_of(dataset, column, base)
    moments = _moments(config, dataset, [shard for shard in shards if shard.split == "train"])
    encoder = {"uri": uri, "digest": digest, "model": type(model).__name__}
    record = Latents(
        dataset=dataset,
        column=column,
        encoder=encoder | {"config": dict(model.config.model_dump(mode="json"))},
        **asdict(strides),
        **config.model_dump(include=_RECORDED),
        count=moments.count,
        mean=tuple(moments.mean.tolist()),
        std=tuple(np.sqrt(moments.m2 / moments.count).tolist()),
        posterior_std=tuple(np.sqrt(moments.variance).tolist()),
        view=inputs.get("view"),
        digests={split: rows.digest for split, rows in base.rows.items()},
    )
    records.write_latents(output, record)
    return {"uri": output, "metrics": _metrics(shards, jobs, totals), "column": column}


def _load(
    device: str, model: Any, *, strides: encoding.Strides, settings: encoding.Settings, dataset: str, column: str
) -> columns.Make:
    """The function that encodes a shard, loaded in an actor."""
    import torch

    from longtake.pipeline.latents import make_latents

    be_exact(settings.threads)
    precision = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    encoder = model.eval().requires_grad_(False).to(device, precision)
    return partial(make_latents, encoder, strides, settings=settings, dataset=dataset, column=column)


def _moments(config: Config, dataset: str, shards: list[index.Shard]) -> Moments:
    """The statistics of a split's shards. Raises UserError where they have no latent."""
    parts = [records.read_moments(dataset, shard) for shard in shards]
    if not any(part.count for part in parts):
        remedy = "`size`; lower it" if config.shrink == (1, 1) else "`size` and `shrink`; lower them"
        raise UserError(f"dataset: {dataset}: no clip of the train split is large enough for {remedy}")
    return records.merged(parts)


def _metrics(shards: list[index.Shard], jobs: list[columns.Job], totals: Counter[str]) -> dict[str, float]:
    latents = np.concatenate([shard.table["steps"].to_numpy() for shard in shards])
    return {
        "clips": float((latents > 0).sum()),
        "clips_left_out": float((latents == 0).sum()),  # not in the view, or too small for `size` or `shrink`
        "steps": float(latents.sum()),  # the name of latents on disk and in the tracker
        "bytes": float(sum(shard.tar_bytes for shard in shards)),
        "shards": float(len(shards)),
        "encoded_shards": float(len(jobs)),  # in this run
        "encoded_frames": float(totals["frames"]),
        "encoded_frames_cut": float(totals["frames_cut"]),  # tails that make no whole latent
        "debris_swept": float(totals["swept"]),
    }
