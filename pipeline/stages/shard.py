"""`shard`: raw videos to a dataset of clips. Plan the groups, make the missing ones, account for every source.

Each source is decoded once, in sequence; the driver holds references only.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longtake.datasets import audio, index, later, schema, storage
from longtake.datasets.errors import UserError
from longtake.datasets.stage import StageConfig
from longtake.pipeline import retry
from longtake.pipeline.cluster import TaskConfig
from longtake.pipeline.commit import group_name, make_group
from longtake.pipeline.config import AudioConfig, ClipConfig, CutConfig, FrameDiffConfig, LimitsConfig
from longtake.pipeline.groups import run as run_groups
from longtake.pipeline.groups import tasks
from longtake.pipeline.listed import listing_digest
from longtake.pipeline.plan import groups as groups_of
from longtake.pipeline.plan import plan, sources_of
from longtake.pipeline.seen import planned_again

VERSION = 5
PRODUCES = "dataset"
retried = retry.retried


class Config(StageConfig):
    """Cut videos into shards of H.264 clips, their frame differences and their sound.

    sources         folders, files, globs or manifests, by any fsspec URL
    clip            what a clip is
    frame_diff      the column of frame differences
    audio           the column of sound; null: none
    limits          what one source may cost
    decoder         decord rejects what it would show wrongly (see second_opinion.py)
    val_fraction    share of the sources that is held out, by their content
    group_bytes     most bytes of the sources of one group, and so of one shard
    group_sources   most sources of one group
    run             what a task asks of Ray
    """

    MOVED: ClassVar = {"task": "is now run"}
    LATER: ClassVar = {"audio": None}

    kind: Literal["shard"]
    sources: tuple[str, ...] = Field(min_length=1)
    clip: ClipConfig = ClipConfig()
    frame_diff: FrameDiffConfig = FrameDiffConfig()
    audio: AudioConfig | None = AudioConfig()
    limits: LimitsConfig = LimitsConfig()
    decoder: Literal["pyav", "decord"] = "pyav"
    val_fraction: float = Field(0.05, ge=0, lt=1)
    group_bytes: int = Field(1 << 30, gt=0)
    group_sources: int = Field(1024, gt=0)
    run: TaskConfig = TaskConfig()

    @property
    def cut(self) -> CutConfig:
        return CutConfig(**{name: getattr(self, name) for name in CutConfig.model_fields})

    @field_validator("sources")
    @classmethod
    def _absolute(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        if "" in (s.strip() for s in sources):
            raise ValueError("a source is empty; name a folder, a file, a glob or a manifest")
        return tuple(
            storage.named(storage.absolute(s)) if storage.is_local(s) else storage.absolute(s) for s in sources
        )

    @model_validator(mode="after")
    def _patient(self) -> "Config":
        self.limits.check_patience(self.run.stall_seconds)
        return self


def outside(config: Config) -> str:
    """A digest of the listing of the sources."""
    return listing_digest(config.sources)


def complete(uri: str) -> bool:
    """Whether every planned group is committed and unreachable sources are recorded. A deleted shard is made again."""
    groups = groups_of(uri)
    return bool(groups) and retry.read_record(uri) is not None and not missing_groups(uri, groups)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Make the missing groups of the dataset at `output`. Safe to run again, and to run twice at once.

    Raises:
        UserError: no source, no clip in any source, or another dataset in the way.
        Failure: some groups could not be written.
    """
    describe(config, output)
    groups = plan(output, config.sources, config.val_fraction, config.group_bytes, config.group_sources)
    swept = _sweep(output)
    if missing := missing_groups(output, groups):
        try:
            _make(config, output, missing)
        finally:
            swept += _sweep(output)  # what workers that died have left
    retry.record(output)

    # another driver may have planned more by now, and committed some of it
    shards = index.committed(output)
    totals, committed = index.summary(output, shards), {*shards}
    made = [group for group in groups_of(output) if _shard(group) in committed]
    assert committed.issuperset(map(_shard, groups))
    if not totals["clips"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in totals["rejected_by_reason"].items())
        raise UserError(
            f"sources: none of {totals['sources']} sources gave a clip ({reasons}); see `longtake dataset sources {output}`"
        )
    assert totals["sources"] == totals["sources_good"] + totals["sources_rejected"]
    assert totals["sources"] + totals["sources_tried_again"] == sum(group["sources"] for group in made)
    assert totals["clips"] == totals["clips_cut"]
    metrics = {name: float(value) for name, value in totals.items() if isinstance(value, int | float)}
    if sound := audio.count(output):
        metrics["clips_with_sound"] = float(sound.with_sound)
    return {
        "uri": output,
        "metrics": metrics | {"debris_swept": float(swept)},
        "rejected_by_reason": totals["rejected_by_reason"],
    }


def _sweep(output: str) -> int:
    """Delete the temporary files of workers that died; returns their number."""
    folders = ("", "plan", "sources", later.FOLDER, *schema.SPLITS)
    return sum(storage.sweep(storage.join(output, folder)) for folder in folders)


def describe(config: Config, output: str) -> None:
    """Write dataset.json. Raises UserError where another one is in the way, or workers could not see the dataset."""
    if storage.is_memory(output):
        raise UserError(
            f"workspace: {output}: Ray workers cannot see this process's memory; use a folder or an object store"
        )
    settings = config.model_dump(mode="json", include={"clip", "frame_diff", "decoder", "val_fraction"})
    if config.audio:
        settings["audio"] = config.audio.model_dump(mode="json")
    record = storage.canonical_json({"format": schema.FORMAT_VERSION, **settings})
    url = storage.join(output, "dataset.json")
    if not storage.write_if_absent(url, record) and storage.read(url) != record:
        raise UserError(
            f"{url}: this dataset was made with other settings of clips; choose another output, or delete it"
        )


def missing_groups(output: str, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups that have no committed shard."""
    committed = {*index.committed(output)}
    return [group for group in groups if _shard(group) not in committed]


def _shard(group: Mapping[str, Any]) -> tuple[str, str]:
    """Split and name of the shard of a group."""
    return group["split"], group_name(group["group"])


def _make(config: Config, output: str, missing: list[dict[str, Any]]) -> None:
    memory = {}  # sources that only this process can see
    if any(storage.is_memory(pattern) for pattern in config.sources):
        uris = (source["uri"] for group in missing for source in sources_of(output, group))
        memory = {uri: storage.read(uri) for uri in uris if storage.is_memory(uri)}
    again = planned_again(output, missing)
    jobs = [group | {"again": again.get((group["split"], group["group"]), {})} for group in missing]

    def start(ray: Any, board: Any) -> Any:
        shared = (ray.put(memory), config.cut, board)
        return tasks(ray, _make_group, jobs, config.run.options(), output, *shared)

    run_groups("shard", jobs, config.run, start, unit="source", total=sum(group["sources"] for group in jobs))


def _make_group(group: dict[str, Any], output: str, memory: Mapping[str, bytes], cut: CutConfig, board: Any) -> Any:
    return make_group(group, sources_of(output, group), output, cut, memory, board)
