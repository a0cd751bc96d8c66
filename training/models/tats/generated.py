"""Videos that a TATS generates when it is measured: some to look at, and all of them chunk by chunk beside real ones."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.engines import device
from longtake.training.metrics.classifier import Classifier, log_probabilities
from longtake.training.metrics.coherence import coherence, inception_score
from longtake.training.metrics.degradation import heldout_degradation
from longtake.training.metrics.distance import Sample
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.share import mine, united
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.streaming import regroup
from longtake.training.models.common.video import video_file
from longtake.training.models.common.wanted import Wanted
from longtake.training.models.tats.rollout import Rollout
from longtake.training.models.tats.sample import videos_of

_SHOWN = 12
_LONGER = 4  # windows in the longest video, where nothing else is said


class Judges(NamedTuple):
    """What measures chunks of `chunk` frames; all videos are then generated at full length.

    network     distances to the real videos, `(1, 3, chunk, H, W)` in [-1, 1], this rank's share
    classifier  inception score, over `splits` parts of the videos, and the coherence of classes
    """

    chunk: int
    network: FeatureNetwork | None = None
    real: Iterable[Tensor] = ()
    classifier: Classifier | None = None
    splits: int = 1


class VideoPlan(NamedTuple):
    """Videos to generate.

    rollout  of seeds and their condition
    vqgan    decodes their tokens
    videos   how many; without judges `_SHOWN` at most
    frames   of the longest; None is `_LONGER` windows
    seed     of the first
    batch    how many a rank generates at once
    judges   None: the videos are of one window and to be looked at, and one more is the longest
    """

    rollout: Callable[[Sequence[int], Condition | None], Rollout]
    vqgan: Any
    videos: int
    frames: int | None
    seed: int
    fps: float
    wanted: Wanted
    batch: int
    judges: Judges | None


class _Chunks:
    """This rank's videos, chunk by chunk: features of each, and logarithms of probabilities by video, (n, K)."""

    def __init__(self, judges: Judges, count: int) -> None:
        self.judges, self.rows = judges, dict[int, list[Tensor]]()
        self.samples = [Sample(f"chunk {n}", judges.network) for n in range(count)] if judges.network else []

    def add(self, number: int, numbers: Sequence[int], pixels: Tensor) -> None:
        """Chunk `number` of the videos `numbers`, `(B, 3, chunk, H, W)` uint8."""
        video = to_model(pixels.to(device()))
        if self.samples:
            self.samples[number].add(video)
        if self.judges.classifier:
            for which, row in zip(numbers, log_probabilities(self.judges.classifier, video).cpu(), strict=True):
                self.rows.setdefault(which, []).append(row)


def frames_of(plan: VideoPlan) -> tuple[int, int]:
    """The frames of a window, and of the longest video."""
    window = plan.rollout([plan.seed], None).window * plan.vqgan.config.temporal_stride
    return window, longest(window, plan.frames)


def longest(window: int, frames: int | None) -> int:
    """The frames of the longest video: those that are asked for, or four windows'."""
    return frames or _LONGER * window


def generated(plan: VideoPlan, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Generate videos, each rank its share, some as NAME.mp4 in `folder`; their entries, and figures with their `series`.

    A network gives the curves `frechet_by_chunk` and `kernel_by_chunk`, by the first frame of each chunk; `frechet` and
    `kernel` are those of the first chunks, with all that makes them comparable in `distance`, and `..._rise` is that of
    the last above the first. A classifier gives the `inception_score` of the first chunks, the curves `ccs_by_chunk` and
    `ics_by_chunk`, and `ccs` and `ics`, their means over later chunks, with the conditions in `classified`. Every rank must
    call it.

    Raises:
        UserError: too few videos for a distance.
    """
    window, most = frames_of(plan)
    frames, judges = most if plan.judges else window, plan.judges
    count = plan.videos if judges else min(plan.videos, _SHOWN)
    chunks = _Chunks(judges, frames // judges.chunk) if judges else None
    shown = dict[int, dict[str, Any]]()
    blocks = math.ceil(count / plan.batch)
    # the longer one comes last, to a rank that has no more batches than the others
    for block in mine(blocks + (judges is None), "generate", "batch"):
        if block == blocks:
            for _ in _written(folder, ["longer"], plan.fps, _pieces(plan, [0], most, window)):
                pass
            shown[_SHOWN] = _entry(plan, 0, "longer", most)
            continue
        numbers = range(block * plan.batch, min(count, (block + 1) * plan.batch))
        names = {number: f"seed-{plan.seed + number}" for number in numbers if number < _SHOWN}
        pieces = _pieces(plan, numbers, frames, judges.chunk if judges else window)
        for n, piece in enumerate(_written(folder, list(names.values()), plan.fps, pieces)):
            if chunks and n < frames // chunks.judges.chunk:
                chunks.add(n, numbers, piece)
        shown |= {number: _entry(plan, number, name, frames) for number, name in names.items()}
    figures: dict[str, Any] = {"videos": count, "frames": frames, "distance": None, "series": {}}
    for more in (_distances(plan, chunks), _classified(plan, chunks)) if chunks else ():
        figures["series"] |= more.pop("series", {})
        figures |= more
    return list(united(shown).values()), figures


def _pieces(plan: VideoPlan, numbers: Sequence[int], frames: int, length: int) -> Iterator[Tensor]:
    """Videos by their numbers, in pieces of `length` frames, the last perhaps shorter: `(B, 3, t, H, W)` uint8."""
    rollout = plan.rollout([plan.seed + number for number in numbers], plan.wanted.condition(numbers))
    latents = math.ceil(frames / plan.vqgan.config.temporal_stride)
    videos = videos_of(rollout, plan.vqgan, latents)
    return regroup((torch.from_numpy(part).permute(0, 4, 1, 2, 3) for part in videos), length, length)


def _written(folder: Path, names: Sequence[str], fps: float, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces of some videos, while the first of them are written as NAME.mp4."""
    with ExitStack() as files:
        writers = [files.enter_context(video_file(folder / f"{name}.mp4", fps)) for name in names]
        for piece in pieces:
            for write, video in zip(writers, piece, strict=False):
                write(np.ascontiguousarray(video.permute(1, 2, 3, 0).numpy()))
            yield piece


def _entry(plan: VideoPlan, number: int, name: str, frames: int) -> dict[str, Any]:
    return {"file": f"{name}.mp4", "seed": plan.seed + number, "frames": frames} | plan.wanted.words(number)


def _distances(plan: VideoPlan, chunks: _Chunks) -> dict[str, Any]:
    """Distances of the chunks to the real videos, over all ranks."""
    judges = chunks.judges
    if judges.network is None:
        return {}
    truth = Sample("real", judges.network)
    for video in judges.real:
        truth.add(video)
    found = heldout_degradation(truth.of_all_ranks(), [each.of_all_ranks() for each in chunks.samples], plan.seed)
    names = ("frechet", "kernel")
    figures = {"distance": found["distance"]} | {name: found[name][0] for name in names}
    figures |= {f"{name}_rise": found[f"{name}_rise"] for name in names}
    return figures | {"series": {f"{name}_by_chunk": _by_frame(judges, found[name]) for name in names}}


def _classified(plan: VideoPlan, chunks: _Chunks) -> dict[str, Any]:
    """Inception score and coherence, over all ranks."""
    judges = chunks.judges
    if judges.classifier is None:
        return {}
    log_p = torch.stack([torch.stack(rows) for rows in united(chunks.rows).values()])
    score = inception_score(log_p[:, 0], judges.splits, plan.seed)
    conditions = {"splits": judges.splits, "seed": plan.seed, "videos": len(log_p), "frames": judges.chunk}
    figures: dict[str, Any] = {"inception_score": score.mean, "inception_score_std": score.std}
    figures |= {"classified": judges.classifier.record() | conditions}
    if log_p.shape[1] < 2:
        return figures
    kept = coherence(log_p)
    figures |= {"ccs": float(kept.ccs[1:].mean()), "ccs_chance": kept.chance, "ics": float(kept.ics[1:].mean())}
    curves = {"ccs_by_chunk": kept.ccs.tolist(), "ics_by_chunk": kept.ics.tolist()}
    return figures | {"series": {name: _by_frame(judges, curve) for name, curve in curves.items()}}


def _by_frame(judges: Judges, curve: Sequence[float]) -> list[tuple[int, float]]:
    """A curve over the first frames of its chunks."""
    return [(n * judges.chunk, value) for n, value in enumerate(curve)]
