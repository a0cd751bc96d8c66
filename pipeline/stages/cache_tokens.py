"""`cache_tokens`: encode windows of a dataset's clips, or their sound, once by a VQGAN, as a cache column of code ids.

A token depends on the frames around it and on where its clip ends, so each window is encoded by itself, just as a
transformer sees it; another length, stride or hop makes another column. Each actor of a Ray pool holds the encoder and
takes shard after shard. What it gives up: windows that overlap are encoded once for each.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from longtake.datasets import audio, index, schema, storage
from longtake.datasets import tokens as records
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import DatasetInput, Input, StageConfig, ViewInput
from longtake.datasets.tokens import Tokens, read_tokens
from longtake.pipeline import column as columns
from longtake.pipeline import windows
from longtake.pipeline.column import WorkerConfig
from longtake.pipeline.exact import be_exact

VERSION = 1
PRODUCES = "tokens"


class EncodeConfig(WorkerConfig):
    """How the workers encode.

    batch   windows that are encoded together
    """

    COSTLY = WorkerConfig.COSTLY | {"batch"}

    batch: int = Field(8, ge=1)


class Config(StageConfig):
    """Encode a dataset by a model of the registry ("models:/vqgan@champion"), a stage that trains one, or a model folder.

    A clip has a window at every `hop` frames that it fills. A model of sound encodes the sound of the windows: give it the
    settings of the video's tokens. The same weights, settings and kind of machine give the same bytes in every run.

    dataset   to encode
    encoder   a model that makes tokens, of videos or of sound
    view      encode its kept clips only; loaders then leave the others out
    frames    of a window; a multiple of the frames in a latent
    stride    take every `stride`-th frame of the clip
    hop       frames of the clip from a window's first to the next one's; null: frames * stride, so that none overlap
    size      height and width, as the loader's; for sound it says which clips are large enough
    run       the workers that encode
    """

    kind: Literal["cache_tokens"]
    dataset: DatasetInput
    encoder: Annotated[str, Input("model")]
    view: ViewInput | None = None
    frames: PositiveInt = 16
    stride: PositiveInt = 1
    hop: PositiveInt | None = None
    size: tuple[PositiveInt, PositiveInt]
    run: EncodeConfig = EncodeConfig()

    def settings(self) -> windows.Settings:
        hop = self.hop or self.frames * self.stride
        threads = max(1, int(self.run.cpus))
        return windows.Settings(self.frames, self.stride, hop, self.size, self.run.batch, threads)


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse windows that the dataset's clips cannot fill. Raises ValueError."""
    clip = getattr(inputs.get("dataset"), "clip", None)
    if clip is None:
        return
    if clip.short_side < min(config.size):
        raise ValueError(f"size: {min(config.size)} is larger than clip.short_side {clip.short_side} of the dataset")
    if clip.max_frames < (span := config.settings().span):
        raise ValueError(
            f"frames: a window spans {span} frames, the dataset's clips have at most {clip.max_frames}; raise clip.max_seconds"
        )


def complete(uri: str) -> bool:
    """Whether all shards that the dataset has now are encoded, and have not changed since."""
    try:
        record = read_tokens(uri)
    except (UserError, Failure):
        return False
    return columns.complete(record.dataset, record.column, record.digests)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Encode what is missing of the column, and write its statistics to `output`. Safe to run again, and twice at once.

    Raises:
        UserError: no dataset, no model that makes tokens, or windows that do not fit it; no clip that fills one.
        Failure: some shards could not be encoded.
    """
    # What to encode, and by what.
    dataset = storage.absolute(inputs["dataset"])
    settings = config.settings()
    base = columns.open_base(dataset, inputs.get("view"))
    _check_clips(dataset, base, settings)
    uri, model = columns.load_model(inputs["encoder"])
    coding = windows.coding_of(model, uri, settings)
    if coding.of == "audio":
        _check_sound(dataset, uri, model.config.spectrogram.rate)
    digest = records.model_digest(model)
    column = windows.column_name(digest, settings, base.view)

    # What is missing.
    with columns.sweeping(dataset) as totals:
        jobs = [job for split, keeps in base.keeps.items() for job in columns.missing(dataset, split, column, keeps)]
        arguments = {"coding": coding, "settings": settings, "dataset": dataset, "column": column}
        totals.update(columns.make("cache_tokens", jobs, config.run, _load, [model], arguments))

    # The record, with the statistics of the training shards.
    shards = columns.shards_of(dataset, column, base)
    counts = sum(
        (records.read_counts(dataset, shard) for shard in shards if shard.split == "train"),
        np.zeros(coding.codes, np.int64),
    )
    if coding.of == "audio" and not counts.any():
        raise UserError(
            f"dataset: {dataset}: no window of the train split has sound; use other sources, or another view"
        )
    usage, entropy = records.statistics(counts)
    record = Tokens(
        dataset=dataset,
        column=column,
        model={"uri": uri, "digest": digest, "config": dict(model.config.model_dump(mode="json"))},
        codes=coding.codes,
        frames=settings.frames,
        stride=settings.stride,
        hop=settings.hop,
        size=settings.size,
        shape=coding.shape,
        view=inputs.get("view"),
        digests={split: rows.digest for split, rows in base.rows.items()},
        usage=usage,
        entropy=entropy,
        of=coding.of,
    )
    records.write_tokens(output, record)
    return {"uri": output, "metrics": _metrics(record, shards, jobs, totals), "column": column}


def _check_clips(dataset: str, base: columns.Base, settings: windows.Settings) -> None:
    """Raise UserError where no clip of the train split that is kept fills a window."""
    keep = np.concatenate([*base.keeps["train"].values(), np.empty(0, bool)])
    frames, heights, widths = (base.facts["train"][name].to_numpy() for name in ("frame_count", "height", "width"))
    height, width = settings.size
    keep &= (heights >= height) & (widths >= width)
    if not keep.any():
        raise UserError(f"size: {dataset}: no clip of the train split is as large as {height}x{width}; lower it")
    if (longest := int(frames[keep].max())) < settings.span:
        raise UserError(
            f"frames: {dataset}: a window spans {settings.span} frames, and no clip of the train split has more than"
            f" {longest}; lower it, or `stride`"
        )


def _check_sound(dataset: str, uri: str, rate: int) -> None:
    """Raise UserError where a dataset has no sound, or sound of another rate than a model has learned."""
    rates = {
        row["rate"]
        for split in schema.SPLITS
        for shard in index.read_shards(dataset, split, audio.COLUMN)
        for row in shard.table.select(["rate"]).slice(0, 1).to_pylist()
    }
    if not rates:
        raise UserError(f"dataset: {dataset}: its clips were cut without sound; add it with a `cache_audio` stage")
    if rates != {rate}:
        raise UserError(
            f"encoder: {uri}: has learned sound of {rate} Hz, the dataset's has {min(rates - {rate})}; train one on this"
            " dataset's"
        )


def _load(
    device: str, model: Any, *, coding: windows.Coding, settings: windows.Settings, dataset: str, column: str
) -> columns.Make:
    """The function that encodes a shard, loaded in an actor."""
    from longtake.pipeline.tokens import make_tokens

    be_exact(settings.threads)
    encoder = model.eval().requires_grad_(False).to(device)
    return partial(make_tokens, encoder, coding, settings, dataset, column=column)


def _metrics(
    record: Tokens, shards: list[index.Shard], jobs: list[columns.Job], totals: Counter[str]
) -> dict[str, float]:
    counts = np.concatenate([shard.table["windows"].to_numpy() for shard in shards])
    return {
        "clips": float((counts > 0).sum()),
        "clips_left_out": float((counts == 0).sum()),  # not in the view, too short, or too small for `size`
        "windows": float(counts.sum()),
        **({"windows_without_sound": _silent(record, shards)} if record.of == "audio" else {}),
        "bytes": float(sum(shard.tar_bytes for shard in shards)),
        "shards": float(len(shards)),
        "codes_used": record.usage,
        "entropy_bits": record.entropy,
        "encoded_shards": float(len(jobs)),  # in this run
        "encoded_frames": float(totals["frames"]),
        "debris_swept": float(totals["swept"]),
    }


def _silent(record: Tokens, shards: list[index.Shard]) -> float:
    return sum(records.read_silent(record.dataset, shard) for shard in shards) / int(np.prod(record.shape))
