"""Videos of any length from a registered EncGAN3, clip by clip (see `rollout`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.engines import device
from longtake.training.models.common import parts
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.rollout import Rollout, Start, interpolated, movements
from longtake.training.models.generator import Request, Settings, fields_of
from longtake.training.registry import disk

SETTINGS = ("content", "backward")  # those that have an effect
ACCEPTS = frozenset({"start", "movement", *SETTINGS})


@dataclass(frozen=True)
class Sampler:
    """A registered EncGAN3: a `Generator` whose `frames` are those of a training window.

    fps, size  of its training videos
    digest     of its weights
    """

    model: EncGAN3
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    digest: str
    classes: Sequence[str] = ()
    accepts: frozenset[str] = ACCEPTS

    def check_prompts(self, prompts: Sequence[str]) -> None:
        raise UserError("an EncGAN3 takes no prompts; leave them out")

    def begin(self, frames: Iterator[np.ndarray]) -> Start:
        """The frames of a video that others go on from; see `Start`. UserError for none, or frames of another size."""
        first = list(islice(frames, self.model.config.frames))
        if not first:
            raise UserError("has no frame; the model goes on from one or more")
        last = deque(first, maxlen=self.model.config.frames)
        last.extend(frames)
        return Start(*(torch.stack([self._frame(each) for each in part]) for part in (first, last)))

    def movement(self, frames: Iterator[np.ndarray]) -> Tensor:
        """The movement of a video, `(clips, D_v)`. UserError where it has too few frames, or of another size."""
        try:
            return movements(self.model, map(self._frame, frames))
        except ValueError as e:
            raise UserError(str(e)) from e

    def _frame(self, frame: np.ndarray) -> Tensor:
        """A frame `(H, W, 3)` uint8 as `(3, H, W)` in [-1, 1]."""
        if frame.shape != (*self.size, 3):
            (height, width), (h, w) = frame.shape[:2], self.size
            raise UserError(f"frames are {height}x{width}, and the model makes {h}x{w}; scale them first")
        return to_model(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)).to(device())

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        return max(1, math.ceil(seconds * fps - 1e-6))

    def rounds(self, frames: int, settings: Settings, start: Start | None = None) -> int:
        """The clips that are made."""
        if frames < 1:
            raise ValueError(f"frames is {frames}; there is nothing to generate")
        return self._rollout([], settings, start).clips(frames)

    def joints(self, frames: int, settings: Settings, start: Start | None = None) -> list[int]:
        """See `Rollout.joints`."""
        return self._rollout([], settings, start).joints(frames)

    def videos(
        self,
        requests: Sequence[Request],
        frames: int,
        settings: Settings,
        *,
        fps: float | None = None,
        start: Start | None = None,
        folder: str | None = None,
        tile: int | None = None,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """See `Generator.videos`, and `Rollout`. Movement of two videos goes from that of the first to that of the second."""
        if tile is not None:
            raise ValueError("tile: an EncGAN3 makes whole frames; leave it out")
        rollout = self._rollout(requests, settings, start, each_step)
        moves = [request.movement for request in requests]
        if any(moves):
            rollout = self._rollout(
                requests, settings, start, each_step, [_moves(each, rollout.clips(frames)) for each in moves]
            )
        rollout.check()
        return rollout.pixels(frames, folder)

    def _rollout(
        self,
        requests: Sequence[Request],
        settings: Settings,
        start: Start | None,
        each_step: Callable[[], object] | None = None,
        moves: Sequence[Tensor] | None = None,
    ) -> Rollout:
        return Rollout(
            self.model,
            [request.seed for request in requests],
            settings.content,
            settings.backward,
            start,
            moves,
            self.digest,
            each_step,
        )

    def forget(self, folder: str) -> None:
        """See `parts.forget`."""
        parts.forget(folder)


def _moves(moves: Sequence[Tensor], clips: int) -> Tensor:
    """The movement of a video of so many clips, of that of one or of two others. ValueError for more, or none."""
    if not 1 <= len(moves) <= 2:
        raise ValueError(f"movement: of {len(moves)} videos; each request has that of one, or of two to go between")
    return moves[0] if len(moves) == 1 else interpolated(moves[0], moves[1], clips)


def sampler_of(uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Sampler:
    """The sampler of a loaded model, on the GPU where there is one. UserError for another model, and for an autoencoder."""
    if not isinstance(model, EncGAN3):
        raise UserError(f"{uri}: is a {type(model).__name__}; name a `pretrain_encgan3` model")
    if vae is not None:
        raise UserError(f"{uri}: makes pixels and needs no autoencoder; leave it out")
    # a model whose clips always began from their first frame knows nothing of what comes before a frame
    accepts = ACCEPTS - {"backward"} if facts.get("anywhere") == 0 else ACCEPTS
    return Sampler(model.to(device(), dtype), digest=disk.digest(facts), accepts=accepts, **fields_of(facts))
