"""`cache_audio`: add the column of sound to a dataset that was made without it, from its sources.

Shard by shard, with the bytes that `shard` makes where it keeps the sound itself. A clip whose source is gone, or is another
file by now, is marked with the reason. The column has no digest in its name: all of it is made with one setting, which its
indexes tell.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from longtake.datasets import audio as sound
from longtake.datasets import compact, index, schema, storage
from longtake.datasets.audio import COLUMN
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import DatasetInput, StageConfig
from longtake.pipeline import column as columns
from longtake.pipeline.column import WorkerConfig
from longtake.pipeline.config import AudioConfig, CutConfig, LimitsConfig
from longtake.pipeline.sounds import is_whole, make_sounds

VERSION = 1
PRODUCES = "dataset"


class SoundConfig(WorkerConfig):
    """What one worker asks of Ray, and the number of workers.

    gpus      sound needs none
    """

    gpus: float | None = Field(0, ge=0)


class Config(StageConfig):
    """Keep the sound of the clips of a dataset, from the sources that they were cut from.

    dataset   made without sound
    audio     the column of sound
    limits    what one source may cost
    run       the workers
    """

    kind: Literal["cache_audio"]
    dataset: DatasetInput
    audio: AudioConfig = AudioConfig()
    limits: LimitsConfig = LimitsConfig()
    run: SoundConfig = SoundConfig()

    @model_validator(mode="after")
    def _patient(self) -> "Config":
        self.limits.check_patience(self.run.stall_seconds)
        return self


def complete(uri: str) -> bool:
    """Whether all shards that the dataset has now have the column."""
    try:
        for split in schema.SPLITS:
            shards = {shard.name: shard for shard in index.read_shards(uri, split, COLUMN)}
            for base in index.read_shards(uri, split):
                shard = shards.get(f"{base.name}.{COLUMN}")
                if shard is None or not columns.fits(base, shard):
                    return False
    except Failure:
        return False
    return True


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Make the shards that the column lacks. Safe to run again, and twice at once. The dataset is the output.

    Raises:
        UserError: no dataset of videos, or its sound was kept with other settings.
        Failure: some shards could not be made.
    """
    dataset = storage.absolute(inputs["dataset"])
    base = columns.open_base(dataset, None)
    description = index.describe(dataset)
    if description.get("kind") == "images":
        raise UserError(f"dataset: {dataset}: has images, which have no sound; name a dataset that `shard` made")
    cut = CutConfig(audio=config.audio, limits=config.limits, decoder=description.get("decoder", "pyav"))
    _check_settings(dataset, config.audio)

    with columns.sweeping(dataset) as totals:
        jobs = [
            job
            for split, keeps in base.keeps.items()
            for job in columns.missing(dataset, split, COLUMN, keeps, is_whole)
        ]
        for split in {job.split for job in jobs}:
            # before a shard changes: a compact index would go on giving the places of before
            compact.forget(dataset, split, COLUMN)
        columns.make("cache_audio", jobs, config.run, _load, [], {"dataset": dataset, "cut": cut})

    shards = columns.shards_of(dataset, COLUMN, base)
    reasons = Counter(reason for shard in shards for reason in shard.table["reason"].to_pylist())
    with_sound = reasons.pop(None, 0)
    metrics = {
        "clips": with_sound + reasons.total(),
        "clips_with_sound": with_sound,
        "bytes": sum(shard.tar_bytes for shard in shards),
        "shards": len(shards),
        "made_shards": len(jobs),  # in this run
        "debris_swept": totals["swept"],
    }
    by_reason = {f"clips_{reason}": reasons[reason] for reason in sound.REASONS if reasons[reason]}
    return {"uri": dataset, "metrics": {name: float(value) for name, value in (metrics | by_reason).items()}}


def _load(device: str, *, dataset: str, cut: CutConfig) -> columns.Make:
    """The function that makes a shard, loaded in an actor."""
    from longtake.pipeline.isolate import Worker

    return partial(make_sounds, Worker(), cut, dataset)


def _check_settings(dataset: str, settings: AudioConfig) -> None:
    """Raises UserError where the column was made with other settings."""
    asked = settings.model_dump(mode="json")
    for shard in _shards(dataset):
        if differences := {n: v for n, v in index.read_notes(dataset, shard).items() if asked.get(n) != v}:
            there = ", ".join(f"{name}: {value}" for name, value in differences.items())
            raise UserError(
                f"audio: {dataset} has sound with {there}; set the same, or delete */*.{COLUMN}.* there to make it anew"
            )


def _shards(dataset: str) -> Iterable[index.Shard]:
    for split in schema.SPLITS:
        yield from index.read_shards(dataset, split, COLUMN)
