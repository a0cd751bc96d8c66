"""What both memory stages learn from: segments of streams of latents, with the history that comes before them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents
from longtake.datasets.loader import Loader
from longtake.datasets.loader.streams import Lengths
from longtake.training import data as common
from longtake.training.data import HELDOUT
from longtake.training.models.memory.config import MemoryConfig
from longtake.training.models.memory.dit_config import MemoryDiTConfig


class Data(NamedTuple):
    """The records of the columns, the shape (T, H, W) of a segment in latents, frames a second, steps of history."""

    made: Latents
    low: Latents | None
    shape: tuple[int, int, int]
    fps: float
    history: int

    def size(self) -> tuple[int, int]:
        """Pixels of a video, height and width."""
        return self.shape[1] * self.made.stride, self.shape[2] * self.made.stride

    def steps_in(self, seconds: float) -> int:
        """As the loader counts them."""
        return round(seconds * self.fps / self.made.factor)

    def reach(self, config: MemoryConfig, step: int) -> int:
        """How many steps of history a training step is given, at most."""
        seconds = [s for begins, s in config.reaches if begins <= step]
        return max(1, min(self.history, self.steps_in(seconds[-1])))

    def histories(self, config: MemoryConfig, dit: MemoryDiTConfig) -> Lengths:
        """What each batch of the training draws from."""
        lengths = config.histories(dit, self.steps_in(config.least_seconds))
        reaches = tuple((begins * config.accumulate, self.reach(config, begins)) for begins, _ in config.reaches)
        return replace(lengths, reaches=reaches if min(reach for _, reach in reaches) < lengths.most else ())


def data_of(config: MemoryConfig, inputs: Mapping[str, str]) -> Data:
    """What there is to learn, checked.

    Raises:
        UserError: latents of another dataset, of what it was before, or the two of different encoders; no clip is as
            long as a segment.
        Failure: damaged files.
    """
    dataset = inputs["dataset"]
    fps = common.frame_rate(dataset, config.frames)
    made = common.column_of(dataset, inputs["latents"], config.frames)
    low = None
    if "low_latents" in inputs:
        low = common.column_of(dataset, inputs["low_latents"], config.frames, "low_latents")
        if low.encoder["digest"] != made.encoder["digest"]:
            raise UserError(
                f"low_latents: {inputs['low_latents']} are of another encoder than latents, {low.encoder['uri']};"
                f" encode them by {made.encoder['uri']}"
            )
        if low.size != made.size:
            raise UserError(
                f"low_latents: {inputs['low_latents']} were made with size {low.size}, latents with {made.size}"
            )
        if low.join_seconds != made.join_seconds:
            raise UserError(
                f"low_latents: {inputs['low_latents']} were made with join_seconds {low.join_seconds:g}, latents with"
                f" {made.join_seconds:g}"
            )
    steps = 1 + (config.frames - 1) // made.factor
    shape = (steps, *common.commonest_size(dataset, made))
    return Data(made, low, shape, fps, round(config.history_seconds * fps / made.factor))


def loader_of(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    data: Data,
    dit: MemoryDiTConfig,
    split: str,
    histories: Lengths | None = None,
    **options: Any,
) -> Loader:
    """Segments with the history that their streams have, of the columns that this learns, and labels where it does.

    `histories` are by default the config's.
    """
    columns = {"latent": data.made.column} | ({"label": "label"} if config.classes else {})
    if data.low and data.low.column != data.made.column:
        columns["low"] = data.low.column
    histories = histories or data.histories(config, dit)
    return common.loader(config, inputs, split, columns=columns, histories=histories, **options)


def heldout_of(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    data: Data,
    dit: MemoryDiTConfig,
    begin: int | None = None,
    least: int = 0,
) -> Loader:
    """A segment of each held-out stream, as late as generation comes to; or at step `begin`, of those that have it.

    With `least` of streams alone that have room for so many steps before a segment, wherever it begins.
    """
    histories = data.histories(config, dit)
    if begin is not None:
        histories = replace(histories, some=(begin,), least=max(begin, least))
    return loader_of(config, inputs, data, dit, "val", histories, **HELDOUT)


def videos_of(config: MemoryConfig, inputs: Mapping[str, str], data: Data) -> Loader:
    """The pixels of held-out segments and what came before them."""
    columns = ("video", *(("label",) if config.classes else ()))
    history = {"history_seconds": config.history_seconds, "history_least": config.least_seconds}
    return common.loader(config, inputs, "val", columns=columns, size=data.size(), **HELDOUT, **history)


def told(dit: MemoryDiTConfig, data: Data) -> str:
    """How many tokens stand for how much history."""
    height, width, steps = *data.shape[1:], data.history
    count, seconds = dit.tokens((steps // dit.group * dit.group, height, width)), steps * data.made.factor / data.fps
    how = ", ".join(dit.rates) if dit.variant.rated else dit.memory
    return (
        f"memory ({how}): {seconds:.4g} s of history, {steps} steps of {height}x{width} latents, are {count} tokens,"
        f" {count / seconds:.4g} a second"
    )


def expected(config: MemoryConfig, data: Data, loader: Loader) -> str:
    """How much history a sample has on the average, and which clips' streams are too short for it."""
    parts = list[str]()
    for begins, most in ((begins, data.reach(config, begins)) for begins, _ in config.reaches):
        mean = loader.history_mean(most)
        part = f"{mean:.1f} steps on the average, {mean * data.made.factor / data.fps:.3g} s, of {most} at most"
        parts.append(f"from step {begins} on {part}" if len(config.reaches) > 1 else part)
    line = f"history: {'; '.join(parts)}"
    if loader.samples_without_history:
        line += f"; {loader.samples_without_history} clips are of streams too short for history_least, and left out"
    if loader.samples_of_mixed_streams:
        line += (
            f"; {loader.samples_of_mixed_streams} clips are left out beside clips that the view leaves out: encode latents"
            " with this view"
        )
    return line
