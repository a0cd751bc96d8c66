"""Videos of any length from an EncGAN3: clip by clip, each from a frame of the one before (arXiv 2512.21776, equation 9).

A clip begins from that frame as it is shown, clamped to [-1, 1], so that what is out of range does not grow.

forward   a clip begins from frame `joint` of the one before, which is its own frame `index`
backward  the same in the other direction of time: a clip ends with frame `index` of the one after as its frame `joint`

Only one clip and the `overlap` frames of the one before are in memory, so that depends on the size of the frames and on
the number of videos, not on their length. What is drawn depends on the seed of a video and the number of the clip alone:
not on the batch, the length, or where a stopped run went on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import Failure
from longtake.datasets.loader import to_pixels
from longtake.training.models.common import parts
from longtake.training.models.common.draws import rng_of
from longtake.training.models.encgan3.config import EncGAN3Config
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.recursion import merged

Content = Literal["encode", "keep"]


class Start(NamedTuple):
    """What a video goes on from: the first and the last frames of another one, at most a clip's, `(t, 3, H, W)` in [-1, 1].

    A single frame, an image, is where it begins. Of a whole clip the movement goes on, too.
    """

    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Rollout:
    """Videos to generate.

    seeds      of the videos
    content    encode: each clip shows what the frame shows that it begins from, as in training with recall, and can follow a
               change of scene; keep: all show what the first clip does, so that they drift less [assumption: encode]
    backward   the clips are made from the last to the first; the video ends where the start begins
    start      None: the first frame is made of noise
    movement   for each video the z_v of its clips in order of time, `(n, D_v)`, which come again where there are more
               clips; None: that of the start for a clip, then of noise
    model_digest  of the weights, which decide the videos beside the other fields
    """

    model: EncGAN3
    seeds: Sequence[int]
    content: Content = "encode"
    backward: bool = False
    start: Start | None = None
    movement: Sequence[Tensor] | None = None
    model_digest: str = ""
    each_step: Callable[[], object] | None = None

    def record(self) -> dict[str, Any]:
        """All that decides the frames, but for their number."""
        return {
            "model": self.model_digest,
            "precision": str(self._like.dtype),
            "seeds": list(self.seeds),
            "content": self.content,
            "backward": self.backward,
            "start": self.start and [_digest(each) for each in self.start],
            "movement": self.movement and [_digest(each) for each in self.movement],
        }

    def check(self) -> None:
        """Refuse what does not fit together: ValueError."""
        config = self.model.config
        if not self.seeds:
            raise ValueError("seeds: there are none, so there is nothing to generate")
        if self.start and self.start.last.shape[1:] != (3, config.size, config.size):
            height, width = self.start.last.shape[2:]
            raise ValueError(f"start: frames are {height}x{width}, the model makes {config.size}x{config.size}")
        for each in self.movement or ():
            if each.ndim != 2 or not len(each) or each.shape[1] != config.movement:
                raise ValueError(f"movement has shape {tuple(each.shape)}; it needs (clips, {config.movement})")
        if self.movement and len(self.movement) != len(self.seeds):
            raise ValueError(f"movement: {len(self.movement)} for {len(self.seeds)} videos")

    def clips(self, frames: int) -> int:
        """The clips that a video of so many frames takes."""
        return -(-(frames + self._hidden) // (self._config.frames - self._config.overlap))

    def joints(self, frames: int) -> list[int]:
        """The numbers of the frames that follow one which two clips have in common."""
        config, hop = self._config, self._config.frames - self._config.overlap
        shared = config.frames - 1 - config.joint if self.backward else config.index
        after = [number * hop + shared + 1 - self._hidden for number in range(1, self.clips(frames) + 1)]
        return sorted(place for each in after if 1 <= (place := frames - each + 1 if self.backward else each) < frames)

    def pieces(self, frames: int) -> Iterator[Tensor]:
        """The frames in pieces `(B, t, 3, H, W)`, about in [-1, 1] and not clamped; of a backward one the last piece first."""
        edge: Tensor | None = None
        for number in range(self.clips(frames)):
            piece, edge = self._clip(number, edge)
            yield self._cut(piece, number, frames)

    def pixels(self, frames: int, folder: str | None = None) -> Iterator[np.ndarray]:
        """The videos as chunks `(B, t, H, W, 3)` uint8, `frames` in all.

        A backward one begins with the clip that is made last: without a folder its pixels wait in memory.

        Args:
            folder: a URL where finished clips are kept. The same call goes on after them, to the same frames.

        Raises:
            UserError: the folder has clips of other settings.
            Failure: a kept clip is damaged or gone, or a clip has values that are no numbers.
        """
        if folder:
            parts.open_folder(folder, self.record())
        chunks = self._chunks(frames, folder)
        if not self.backward:
            yield from chunks
        elif not folder:
            yield from reversed(list(chunks))
        else:
            for _ in chunks:
                pass
            for number in reversed(range(self.clips(frames))):
                kept = parts.load_all(parts.url_of(folder, number), ("frames", "edge"))
                if kept is None:
                    raise Failure(f"{folder}: another command has taken away clip {number}; give this one again")
                yield self._cut(kept["frames"], number, frames).numpy()

    def _chunks(self, frames: int, folder: str | None) -> Iterator[np.ndarray]:
        """`pixels` in order of generation."""
        edge: Tensor | None = None
        for number in range(self.clips(frames)):
            url = parts.url_of(folder, number)
            kept = parts.load_all(url, ("frames", "edge"))
            if kept is None:
                piece, edge = self._clip(number, edge)
                kept = {"frames": to_pixels(piece.movedim(2, -1)).cpu(), "edge": edge}
                parts.save_all(url, kept)
            elif self.each_step:
                self.each_step()
            edge = kept["edge"].to(self._like.device)
            yield self._cut(kept["frames"], number, frames).numpy()

    @torch.no_grad()
    def _clip(self, number: int, edge: Tensor | None) -> tuple[Tensor, Tensor]:
        """Clip `number`, joined with the frames that it has in common with the one before, and those with the next one.

        Both are `(B, t, 3, H, W)`; the first has what is not in the second.
        """
        config, overlap = self._config, self._config.overlap
        place = config.joint if self.backward else config.index
        if edge is not None:
            reference = edge[:, config.index].clamp(-1, 1)
        else:
            reference, place = self._first, place if self.start else self.backward * (config.frames - 1)
        z_x = self._z_x
        if edge is not None and self.content == "encode":
            z_x = self.model.encode_content(reference.to(self._like)).mean
        clip = self.model.generate(z_x, self._z_v(number), reference, place)
        if not clip[:, :: config.frames - 1].sum().isfinite():  # whatever is wrong within is added up to an end
            raise Failure(f"clip {number} has values that are no numbers: the model is damaged, or not trained")
        if edge is None:
            line = clip
        elif self.backward:
            line = merged(clip, edge, overlap, config.joint, config.merge)
        else:
            line = merged(edge, clip, overlap, config.index, config.merge)
        if self.each_step:
            self.each_step()
        if self.backward:
            return line[:, overlap:], line[:, :overlap]
        return line[:, : config.frames - overlap], line[:, config.frames - overlap :]

    def _cut(self, piece: Tensor, number: int, frames: int) -> Tensor:
        """The part of the piece of clip `number` that a video of so many frames has; frames are counted as they are made."""
        first = number * (self._config.frames - self._config.overlap) - self._hidden
        low, high = max(0, -first), min(piece.shape[1], frames - first)
        if self.backward:
            low, high = piece.shape[1] - high, piece.shape[1] - low
        return piece[:, low : max(low, high)]

    def _z_v(self, number: int) -> Tensor:
        """The movement of clip `number`, `(B, D_v)`."""
        if self.movement:
            which = -1 - number if self.backward else number
            return torch.stack([each[which % len(each)] for each in self.movement]).to(self._like)
        if number == 0 and self.start and len(self.start.last) == self._config.frames:
            video = (self.start.first if self.backward else self.start.last)[None].to(self._like)
            found = self.model.encode_movement(self.model.differences_of(video)).mean
            return found.expand(len(self.seeds), -1)
        return self._noise(number + 1, self._config.movement)

    @cached_property
    def _first(self) -> Tensor:
        """The frame that all begins from, `(B, 3, H, W)`."""
        if self.start is None:
            return self.model.first_frame(self._z_x)
        frame = self.start.first[0] if self.backward else self.start.last[-1]
        return frame.to(self._like).expand(len(self.seeds), -1, -1, -1)

    @cached_property
    def _z_x(self) -> Tensor:
        """What the first clip shows, `(B, D_x)`."""
        if self.start is None:
            return self._noise(0, self._config.content)
        return self.model.encode_content(self._first).mean

    def _noise(self, number: int, width: int) -> Tensor:
        """Standard normal numbers of place `number`, `(B, width)`: 0 is for content, n + 1 for the movement of clip n."""
        rows = [torch.randn(width, generator=rng_of(seed, number)) for seed in self.seeds]
        return torch.stack(rows).to(self._like)

    @property
    def _hidden(self) -> int:
        """Frames of the first clip that are no part of the video: up to the frame of the start, and that."""
        if self.start is None:
            return 0
        return self._config.frames - self._config.joint if self.backward else self._config.index + 1

    @property
    def _config(self) -> EncGAN3Config:
        return self.model.config

    @cached_property
    def _like(self) -> Tensor:
        """A weight, for the device and the precision of what goes in."""
        return next(self.model.parameters())


def movements(model: EncGAN3, frames: Iterable[Tensor]) -> Tensor:
    """z_v of the clips of a video, as far apart as those of a rollout: `(n, D_v)`, for at least a clip's number of frames.

    Args:
        frames: `(3, H, W)` in [-1, 1]; those after the last whole clip are left out.

    Raises:
        ValueError: too few frames, or frames of another size.
    """
    config, like = model.config, next(model.parameters())
    clip, found, count = list[Tensor](), list[Tensor](), 0
    for frame in frames:
        clip.append(frame)
        count += 1
        if len(clip) == config.frames:
            video = torch.stack(clip)[None].to(like)
            with torch.no_grad():
                found.append(model.encode_movement(model.differences_of(video)).mean)
            clip = clip[config.frames - config.overlap :]
    if not found:
        words = f"{count} frame{'s' * (count != 1)}"
        raise ValueError(f"has {words}; movement is read from clips of {config.frames}: name a longer video")
    return torch.cat(found)


def interpolated(first: Tensor, second: Tensor, clips: int) -> Tensor:
    """Movement `(clips, D_v)` that goes from that of one video to that of another, linearly in z_v (the paper's figure 8)."""
    share = torch.linspace(0, 1, clips).to(first)[:, None] if clips > 1 else first.new_zeros(1, 1)
    begin, end = (each[[n % len(each) for n in range(clips)]] for each in (first, second))
    return torch.lerp(begin, end, share)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.float().cpu().contiguous().numpy().tobytes()).hexdigest()
