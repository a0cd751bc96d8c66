"""The data of both memory stages: segments of streams of latents, with the history that comes before them, and texts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents
from longtake.datasets.loader import Loader
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.text import Text
from longtake.training import data as common
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.models.common.codec import Codec
from longtake.training.models.memory.config import MemoryConfig
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.tokens import parse_rate
from longtake.training.models.memory.variants import VARIANTS


class Data(NamedTuple):
    """The records of the columns and the sizes that follow from them.

    latents  the column of the full video
    low      the column of the scaled-down video, for the low-res branch
    shape    (T, H, W) of a segment in latents
    fps      of the videos
    history  latents of `history_seconds`
    """

    latents: Latents
    low: Latents | None
    shape: tuple[int, int, int]
    fps: float
    history: int

    def size(self) -> tuple[int, int]:
        """Height and width of a video in pixels."""
        return self.shape[1] * self.latents.stride, self.shape[2] * self.latents.stride

    def latents_in(self, seconds: float) -> int:
        """The number of latents in a time, rounded as the loader does."""
        return round(seconds * self.fps / self.latents.factor)

    def seconds(self, latents: float) -> float:
        """The time that latents take."""
        return latents * self.latents.factor / self.fps

    def reach(self, config: MemoryConfig, step: int) -> int:
        """The most latents of history that a segment is given at an optimizer step."""
        seconds = [seconds for begin, seconds in config.reaches if begin <= step]
        return max(1, min(self.history, self.latents_in(seconds[-1])))

    def histories(self, config: MemoryConfig, dit: MemoryModelConfig) -> Lengths:
        """The lengths of history that each batch of the training draws from."""
        lengths = config.histories(dit, self.latents_in(config.least_seconds))
        reaches = tuple((begin * config.accumulate, self.reach(config, begin)) for begin, _ in config.reaches)
        return replace(lengths, reaches=reaches if min(reach for _, reach in reaches) < lengths.most else ())


class Setup(NamedTuple):
    """Everything that a stage works with; the model has its initial weights, `text` and `pooled` are None where none are learned."""

    inputs: Mapping[str, str]
    data: Data
    classes: Sequence[str]
    model: MemoryModel
    codec: Codec
    text: Text | None = None
    pooled: Text | None = None

    def said(self, config: MemoryConfig) -> dict[str, str]:
        """The columns of what is said of a clip: its label and its texts, where they are learned."""
        label = {"label": "label"} if config.classes else {}
        texts = {"text": self.text, "pooled": self.pooled} if config.listens else {}
        return label | {name: text.column for name, text in texts.items() if text}


def data_of(config: MemoryConfig, inputs: Mapping[str, str]) -> Data:
    """Read the columns to learn from and check that they fit each other.

    Raises:
        UserError: latents of another dataset or of an earlier state of it; the two columns are of different encoders; no
            clip is as long as a segment.
        Failure: damaged files.
    """
    dataset = inputs["dataset"]
    fps = common.frame_rate(dataset, config.frames)
    latents = common.column_of(dataset, inputs["latents"], config.frames)
    low = None
    if "low_latents" in inputs:
        low = common.column_of(dataset, inputs["low_latents"], config.frames, "low_latents")
        if low.encoder["digest"] != latents.encoder["digest"]:
            raise UserError(
                f"low_latents: {inputs['low_latents']} are of another encoder than latents, {low.encoder['uri']};"
                f" encode them by {latents.encoder['uri']}"
            )
        if low.size != latents.size:
            raise UserError(
                f"low_latents: {inputs['low_latents']} were made with size {low.size}, latents with {latents.size}"
            )
        if low.join_seconds != latents.join_seconds:
            raise UserError(
                f"low_latents: {inputs['low_latents']} were made with join_seconds {low.join_seconds:g}, latents with"
                f" {latents.join_seconds:g}"
            )
    shape = (1 + (config.frames - 1) // latents.factor, *common.commonest_size(dataset, latents))
    return Data(latents, low, shape, fps, round(config.history_seconds * fps / latents.factor))


def loader_of(
    config: MemoryConfig,
    setup: Setup,
    split: str,
    histories: Lengths | None = None,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> Loader:
    """Segments with the history that their streams have, and with labels and texts where they are learned.

    `histories` are the config's by default; `columns` are more to read.
    """
    data = setup.data
    columns = {"latent": data.latents.column} | setup.said(config) | dict(columns or {})
    if data.low and data.low.column != data.latents.column:
        columns["low"] = data.low.column
    histories = histories or data.histories(config, setup.model.config)
    return common.loader(config, setup.inputs, split, columns=columns, histories=histories, **options)


def heldout_of(
    config: MemoryConfig,
    setup: Setup,
    begin: int | None = None,
    least: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Loader:
    """A segment of each held-out stream, with as much history as occurs in generation.

    Args:
        begin: take the segments at this latent of their streams, from streams that have it.
        least: take only streams with room for this many latents before a segment, wherever that begins.
        columns: more to read.
    """
    histories = setup.data.histories(config, setup.model.config)
    if begin is not None:
        histories = replace(histories, some=(begin,), least=max(begin, least))
    return loader_of(config, setup, "val", histories, columns, **HELDOUT)


def captions_of(config: MemoryConfig, setup: Setup) -> dict[str, str]:
    """The column of captions that the texts are of, for people to read."""
    return {"caption": setup.text.captions} if setup.text and config.listens else {}


def videos_of(config: MemoryConfig, setup: Setup) -> Loader:
    """The pixels of held-out segments and of their history.

    Raises:
        UserError: no segment has the history that is asked for, or that the memory needs.
    """
    model, columns = setup.model.config, {"video": "video"} | setup.said(config) | captions_of(config, setup)
    least, fewest = config.least_seconds, setup.data.seconds(config.fewest(model))
    history = {"history_seconds": config.history_seconds, "history_least": max(least, fewest)}
    try:
        return common.loader(config, setup.inputs, "val", columns=columns, size=setup.data.size(), **HELDOUT, **history)
    except UserError as e:
        if fewest <= least:
            raise
        raise UserError(
            f"rates: a token stands for {model.group} steps, a segment has {setup.data.shape[0]}, so that {fewest:.3g} s must"
            f" come before it; choose rates of less time, or raise frames ({e})"
        ) from e


def describe_memory(dit: MemoryModelConfig, data: Data) -> str:
    """A line for the log: the number of tokens that stand for the longest history."""
    (height, width), latents = data.shape[1:], data.history
    tokens, seconds = dit.tokens((latents // dit.group * dit.group, height, width)), data.seconds(latents)
    kind = ", ".join(dit.rates) if dit.variant.rated else dit.memory
    return (
        f"memory ({kind}): {seconds:.4g} s of history, {latents} latents of {height}x{width}, are {tokens} tokens,"
        f" {tokens / seconds:.4g} a second"
    )


def describe_history(config: MemoryConfig, data: Data, loader: Loader) -> str:
    """A line for the log: the average length of a sample's history, and the clips whose streams are too short for it."""
    parts = list[str]()
    for begin, _ in config.reaches:
        most = data.reach(config, begin)
        mean = loader.history_mean(most)
        part = f"{mean:.1f} latents on the average, {data.seconds(mean):.3g} s, of {most} at most"
        parts.append(f"from step {begin} on {part}" if len(config.reaches) > 1 else part)
    line = f"history: {'; '.join(parts)}"
    if loader.samples_without_history:
        line += f"; {loader.samples_without_history} clips are of streams too short for history_least, and left out"
    if loader.samples_of_mixed_streams:
        line += (
            f"; {loader.samples_of_mixed_streams} clips are left out beside clips that the view leaves out: encode latents"
            " with this view"
        )
    return line


def check_history(fields: Mapping[str, Any], patch: int, data: Data) -> None:
    """Refuse a history or latents that are too small for a model with these fields of `MemoryModelConfig`: UserError."""
    if data.history < fields["window"]:
        raise UserError(
            f"history_seconds: are {data.history} steps, fewer than the {fields['window']} of the window beside the memory;"
            " raise it"
        )
    for rate in fields["rates"] if VARIANTS[fields["memory"]].rated else ():
        height, width, time = parse_rate(rate)
        if time > data.history:
            raise UserError(
                f"rates: {rate}: a token stands for {time} steps, the history has {data.history}; raise history_seconds"
            )
        rows, columns = (side // patch for side in data.shape[1:])
        if height > rows or width > columns:
            raise UserError(f"rates: {rate}: the latents make a grid of {rows}x{columns} tokens; choose a lower rate")


def check_precision(config: MemoryConfig, dit: MemoryModelConfig) -> None:
    """Refuse to train convolutions that stride in space in bf16 on a CPU: UserError."""
    sides = [side for rate in map(parse_rate, dit.rates) for side in rate[:2]]
    strided = dit.variant.low and dit.branches != "low" and dit.patch * max(sides) > 1
    if config.precision == "bf16" and device().type == "cpu" and strided:
        raise UserError(
            "precision: bf16: torch's strided convolutions of small frames crash on a CPU; train this memory in fp32"
        )
