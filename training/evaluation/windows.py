"""Windows of videos that measures look at, held-out and generated, and what networks say of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from longtake.datasets import dual
from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model, to_pixels
from longtake.datasets.pictures import opened
from longtake.training.engines import device
from longtake.training.evaluation.bootstrap import draws
from longtake.training.evaluation.material import Generated, Material
from longtake.training.evaluation.means import Curve
from longtake.training.evaluation.record import Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite, Videos
from longtake.training.metrics.features import FeatureNetwork, features
from longtake.training.metrics.resampled import Rows, times
from longtake.training.models.common.streaming import regroup

T = TypeVar("T")


def asked(suite: Suite) -> Videos:
    """The videos that a measure is run on. UserError: the suite has none."""
    if not suite.videos:
        raise UserError("videos: the suite makes none; give it some")
    return suite.videos[0]


def conditions(suite: Suite) -> dict[str, Any]:
    """What figures of generated videos depend on beside the clips."""
    prompts = None if suite.prompts is None else hashlib.sha256(json.dumps(suite.prompts).encode()).hexdigest()[:12]
    return {
        "videos": [videos.model_dump(mode="json") for videos in suite.videos[:1]],
        "generated": sum(suite.count(videos) for videos in suite.videos[:1]),
        "prompts": prompts,
    }


def conditions_by_chunk(suite: Suite) -> dict[str, Any]:
    """What figures of the chunks of generated videos depend on beside the clips."""
    return conditions(suite) | {"chunk": suite.chunk}


def length(suite: Suite, videos: Videos) -> int:
    """The frames that are compared of a clip and a generated video: a clip's, or all of a shorter video."""
    assert suite.clips.fps
    return min(suite.clips.frames, videos.frames or max(1, round((videos.seconds or 0) * suite.clips.fps)))


def openings(material: Material, subject: Subject) -> Iterator[tuple[Generated, Tensor]]:
    """The first frames of each of the videos, (1, 3, `length`, H, W) in [-1, 1]."""
    videos = asked(material.suite)
    count = length(material.suite, videos)
    for made in material.generated(subject, videos):
        yield made, next(windows(made, count))


def chunks(material: Material, subject: Subject) -> Iterator[tuple[Generated, Iterator[Tensor]]]:
    """The chunks of each of the videos one after the other, (1, 3, chunk, H, W) in [-1, 1], whole ones only."""
    for made in material.generated(subject, asked(material.suite)):
        yield made, windows(made, material.suite.chunk)


def seconds(suite: Suite, number: int) -> float:
    """The second at which a chunk begins."""
    assert suite.clips.fps
    return number * suite.chunk / suite.clips.fps


def clips(material: Material, frames: int) -> Iterator[tuple[Unit, Tensor]]:
    """The first frames of each held-out clip, (1, 3, frames, H, W) in [-1, 1], and its unit."""
    for clip in material.clips():
        yield clip.unit, to_model(clip.video[:, :, :frames])


def windows(made: Generated, frames: int, stride: int | None = None) -> Iterator[Tensor]:
    """Windows of a video, a new one every `stride` frames (None: `frames`), (1, 3, frames, H, W) in [-1, 1]; whole ones only."""
    step = stride or frames
    assert step >= frames
    for piece in regroup(made.frames(step), step, step):
        if piece.shape[2] >= frames:
            yield to_model(piece[:, :, :frames])


def windows_at(made: Generated, starts: Iterable[int], frames: int) -> Iterator[Tensor]:
    """The windows of a video that begin with these frames, (1, 3, frames, H, W) in [-1, 1], in order of time."""
    waiting, kept, first = sorted(starts), torch.empty(0), 0
    for piece in made.frames():
        kept = torch.cat([kept, piece], 2) if kept.numel() else piece
        while waiting and waiting[0] + frames <= first + kept.shape[2]:
            start = waiting.pop(0) - first
            yield to_model(kept[:, :, start : start + frames])
        gone = min(waiting[0] - first if waiting else kept.shape[2], kept.shape[2])
        kept, first = kept[:, :, gone:], first + gone


def embedded(network: FeatureNetwork, window: Tensor) -> Tensor:
    """The features of a window, a row for it or for each of its frames. UserError: the network does not take it."""
    return taken(f"features: {network.name}", window, partial(features, network, window))


def taken(name: str, window: Tensor, call: Callable[[], T]) -> T:
    """What a network gives a window; UserError, which begins with its name, where it does not take one of such a length."""
    try:
        return call()
    except (RuntimeError, ValueError, torch.jit.Error) as e:
        # left out, the figure would be there for other models alone; TorchScript makes another error of it
        if isinstance(e, torch.OutOfMemoryError) or "CUDA out of memory" in str(e):
            raise torch.OutOfMemoryError(str(e)) from e
        what = f"{window.shape[2]} frames of {window.shape[3]}x{window.shape[4]}"
        why = next(iter(str(e).strip().splitlines()[-1:]), type(e).__name__)[:120]
        raise UserError(f"{name}: takes no videos of {what} ({why}); change chunk or clips of the suite") from e


def dual_encoder(material: Material) -> dual.Dual:
    """The user's encoder of pictures and texts. UserError: its folder has none."""
    return dual.load(opened(material.folder("dual"), "dual"), str(device()))


def pictures(encoder: dual.Dual, window: Tensor) -> Tensor:
    """The vectors of a window's frames, (T, D) of length 1."""
    return torch.from_numpy(encoder.pictures(to_pixels(window[0].permute(1, 2, 3, 0)).cpu().numpy()))


class Side(NamedTuple):
    """Features of one kind of videos, for messages `what` they are: rows (N, D), and the unit of each."""

    what: str
    values: Tensor
    units: Sequence[Unit]
    videos: int

    def rows(self) -> Rows:
        """With units by number, in the order of their names."""
        return Rows(self.values, numbered(self.units))

    @property
    def drawn_from(self) -> int:
        """How many units there are."""
        return len(set(self.units))


def side(what: str, network: FeatureNetwork, videos: Iterable[tuple[Unit, Tensor]]) -> Side:
    """The features of windows, each with its unit."""
    values, units, count = list[Tensor](), list[Unit](), 0
    for unit, window in videos:
        rows = embedded(network, window).cpu()
        values.append(rows)
        units += [unit] * len(rows)
        count += 1
    return Side(what, torch.cat(values) if values else torch.empty(0, 0), units, count)


def joined(sides: Sequence[Side]) -> Side:
    """Some parts of a side as one."""
    values, units = torch.cat([each.values for each in sides]), [unit for each in sides for unit in each.units]
    return Side(sides[0].what, values, units, sum(each.videos for each in sides))


def curve(points: Iterable[tuple[float, Unit, float]]) -> dict[float, dict[Unit, float]]:
    """A curve from points (position, unit, value): the mean of each unit at each position."""
    found = Curve()
    for position, unit, value in points:
        found.add(unit, {position: value})
    return found.by_unit()


def numbered(units: Sequence[Unit]) -> Tensor:
    """The number of each unit, (N,), in the order of their sorted names."""
    order = {unit: number for number, unit in enumerate(sorted(set(units)))}
    return torch.tensor([order[unit] for unit in units], dtype=torch.long)


def drawn(units: int, resamples: int, seed: int) -> Tensor:
    """How often each resample has each unit, (R, units): the same for all models with these units."""
    return times(draws(units, resamples, seed), units)


def listed(replicates: Tensor) -> list[float]:
    """Replicates as plain data."""
    return [float(value) for value in np.asarray(replicates.double().cpu())]
