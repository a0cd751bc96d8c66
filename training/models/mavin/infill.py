"""Gaps between clips filled by a MAVIN (arXiv 2405.18003): noise in the gap, and the clean latents beside it put back each step.

A gap is solved alone. At each step the velocity sees it between the latents of its sides, which so stay as they are to the
bit. What is drawn depends on the seed and on the number of the gap, not on the others that are filled at once.

The clips on both sides are encoded apart, so that neither knows of the gap (see `encode`). What is made goes on from the
clip before: its latents have `temporal_stride` frames each, and are decoded after those of that clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.models.common import flow, parts
from longtake.training.models.common.codec import Codec, frames_of, nearest_lengths, to_array
from longtake.training.models.common.prompts import States
from longtake.training.models.generator import Gap, InfillSettings
from longtake.training.models.mavin.config import check_hidden
from longtake.training.models.mavin.encode import gap_latents
from longtake.training.models.mavin.mixer import Mixer, initial

# (latents, times (B, T), length (B,), text, text mask, image) -> velocity; see `Mavin.forward`
GapVelocity = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
CleanTime = Literal["zero", "same"]

_WINDOWS = 16  # training windows that a gap is as long as, at most: it is made in one piece, and none has learned more


class Hints(NamedTuple):
    """What leads a batch of gaps; None is none.

    text, mask          states `(B, N, W)` of prompts, and which of them count, `(B, N)`
    negative, unwanted  the same of texts that guidance leads away from
    image               features `(B, 2, K, E)` of the frames beside the gaps
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    negative: Tensor | None = None
    unwanted: Tensor | None = None
    image: Tensor | None = None


def guided(model: GapVelocity, hints: Hints, text: float, image: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The velocity of (latents, times, length) with guidance first to the frames beside the gap, then to the text:

    v(none) + image (v(frames) - v(none)) + text (v(frames, text) - v(frames)), fp32. With an image guidance of 1 that is
    the paper's, whose frames are in both branches. Each v with a weight is a call of its own.
    """
    image = image if hints.image is not None else 1.0
    text = text if hints.text is not None or hints.negative is not None else image
    branches = [
        (1 - image, (hints.negative, hints.unwanted, None)),
        (image - text, (hints.negative, hints.unwanted, hints.image)),
        (text, (hints.text, hints.mask, hints.image)),
    ]
    weighted = [(weight, hint) for weight, hint in branches if weight]

    def velocity(x: Tensor, times: Tensor, length: Tensor) -> Tensor:
        return sum((weight * model(x, times, length, *hint).float() for weight, hint in weighted), torch.zeros_like(x))

    return velocity


@torch.no_grad()
def sample(
    model: GapVelocity,
    before: Tensor,
    after: Tensor,
    noise: Tensor,
    hints: Hints,
    settings: InfillSettings,
    clean_time: CleanTime = "zero",
    each_step: Callable[[], object] | None = None,
    frames: int | None = None,
) -> Tensor:
    """Clips with their gaps filled, `(B, C, a + n + b, h, w)` fp32; what is beside the gap is `before` and `after` to the bit.

    Args:
        before, after: clean latents `(B, C, a, h, w)` and `(B, C, b, h, w)`, normalised.
        noise: that the gaps begin from, `(B, C, n, h, w)`; see `mixer.initial`.
        clean_time: of the clean latents: `zero`, or the `same` as that of the gap, as in the paper.
        frames: of a gap; None: one for each latent.

    Raises:
        ValueError: fewer than one step.
    """
    before, after = before.float(), after.float()
    sides, count = (before.shape[2], after.shape[2]), noise.shape[2]
    length = torch.full((len(noise),), frames or count, device=noise.device)
    whole = guided(model, hints, settings.guidance, settings.image_guidance)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        clean = t if clean_time == "same" else torch.zeros_like(t)
        times = [now[:, None].expand(-1, n) for now, n in ((clean, sides[0]), (t, count), (clean, sides[1]))]
        made = whole(torch.cat([before, x, after], dim=2), torch.cat(times, dim=1), length)
        return made[:, :, sides[0] : sides[0] + count]

    made = flow.euler(velocity, noise, settings.steps, settings.shift, each_step=each_step)
    return torch.cat([before, made, after], dim=2)


@torch.no_grad()
def fill(
    model: Any,
    codec: Codec,
    sides: tuple[Tensor, Tensor],
    frames: int,
    draws: Sequence[tuple[int, ...]],
    hints: Hints,
    settings: InfillSettings,
    clean_time: CleanTime = "zero",
    each_step: Callable[[], object] | None = None,
) -> Tensor:
    """The frames of gaps, `(B, 3, frames, H, W)`.

    Args:
        model: a velocity with `normalise` and `denormalise`, of latents.
        sides: latents of the clips before and after the gaps, as they have been encoded apart.
        draws: for each gap, the numbers that decide its noise, such as a seed and the number of the gap.

    Raises:
        ValueError: fewer than one step; a mixer that cannot be.
    """
    left, right = map(model.normalise, sides)
    mixer = _mixer(settings)
    count, given = gap_latents(codec, frames), left.shape[2]
    noise = [initial(mixer, a, b, count, numbers) for a, b, numbers in zip(left, right, draws, strict=True)]
    whole = sample(model, left, right, torch.stack(noise), hints, settings, clean_time, each_step, frames)
    # the last latent may reach into the clip after the gap
    return decoded(codec, sides[0], model.denormalise(whole[:, :, given : given + count]))[:, :, :frames]


@torch.no_grad()
def decoded(codec: Codec, before: Tensor, made: Tensor) -> Tensor:
    """The frames of gaps `(B, 3, n, H, W)` from their latents, which go on from those of the clips before them."""
    joined = torch.cat([before, made], dim=2).to(codec.dtype)
    pixels = torch.cat(list(codec.decode_stream([joined])), dim=2)
    return pixels[:, :, frames_of(before.shape[2], codec.config.temporal_stride, codec.config.first_frames) :]


@dataclass(frozen=True)
class Filler:
    """A registered MAVIN with its codec: an `Infiller`.

    model       also `normalise` and `denormalise`, of latents
    encode      `encode(codec, before, after)` -> latents of both, `(B, 3, t, H, W)` in [-1, 1] apart from each other
    window      frames of a training window, with its gap
    digest      of the weights
    prompts     None: the model knows no texts
    features    `(B, 2, 3, H, W)` in [-1, 1], the frames beside a gap -> `(B, 2, K, E)`; None: it sees none
    clean_time  as in training
    """

    model: Any
    codec: Any
    encode: Callable[[Codec, Tensor, Tensor], tuple[Tensor, Tensor]]
    fps: float
    size: tuple[int, int]
    settings: InfillSettings
    context: tuple[int, int]
    longest: int
    window: int
    digest: str
    device: torch.device
    prompts: States | None = None
    features: Callable[[Tensor], Tensor] | None = None
    clean_time: CleanTime = "zero"

    @property
    def takes_prompts(self) -> bool:
        return self.prompts is not None

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """UserError for prompts that it cannot encode, and for any where it knows no texts."""
        if self.prompts is None:
            raise UserError("prompt: this model takes none; leave it out")
        self.prompts.check(prompts)

    def fill(
        self,
        gaps: Sequence[Gap],
        seed: int,
        settings: InfillSettings,
        *,
        negative: str | None = None,
        first: int = 0,
        folder: str | None = None,
        batch: int = 1,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """See `Infiller.fill`. Finished gaps are parts of the folder."""
        for gap in gaps:
            self._check(gap)
        if settings.steps < 1:
            raise ValueError(f"steps is {settings.steps}; sampling needs at least 1")
        if settings.image_guidance != 1.0 and self.features is None:
            raise ValueError("image_guidance: this model does not see the frames beside a gap; leave it out")
        check_hidden(self.model.config, settings.guidance, settings.image_guidance)
        _mixer(settings)
        if negative is None and all(gap.prompt is None for gap in gaps):
            settings = replace(settings, guidance=1.0)  # between nothing and nothing there is no way
        if folder:
            parts.open_folder(folder, self._record(gaps, seed, first, settings, negative))
        cut = [self._cut(gap) for gap in gaps]
        return self._filled(cut, seed, first, settings, negative, folder, batch, each_step)

    def forget(self, folder: str) -> None:
        """See `parts.forget`."""
        parts.forget(folder)

    def _check(self, gap: Gap) -> None:
        if gap.frames < 1:
            raise ValueError(f"frames is {gap.frames}; a gap has at least 1")
        if gap.frames > (most := _WINDOWS * self.window):
            raise ValueError(
                f"frames is {gap.frames}; a gap has {most} at most, {_WINDOWS} windows of the model's training, since it is"
                " made in one piece"
            )
        for side in (gap.before, gap.after):
            if side.shape[1:] != (*self.size, 3):
                (height, width), (h, w) = side.shape[1:3], self.size
                raise ValueError(f"frames are {height}x{width}, and the model makes {h}x{w}; scale them first")
            if len(side) < self.context[0]:
                raise ValueError(f"a gap has {len(side)} frames on a side; the model needs {self.context[0]}")

    def _cut(self, gap: Gap) -> Gap:
        """A gap with as many frames on its sides as fit beside it in a training window, and can be encoded."""

        def length(frames: int, room: int) -> int:
            most = min(frames, max(room, self.context[0]), self.context[1])
            return nearest_lengths(most, self.codec.config.temporal_stride, self.codec.config.first_frames)[0]

        room = self.window - min(gap.frames, self.longest)  # beside a longer one as beside the longest
        before = length(len(gap.before), room - min(len(gap.after), room // 2))
        after = length(len(gap.after), room - before)
        return gap._replace(before=gap.before[len(gap.before) - before :], after=gap.after[:after])

    def _record(
        self, gaps: Sequence[Gap], seed: int, first: int, settings: InfillSettings, negative: str | None
    ) -> dict[str, Any]:
        """All that decides the frames."""
        return {
            "model": self.digest,
            "precision": str(next(self.model.parameters()).dtype),
            "seed": seed,
            "first": first,
            "settings": asdict(settings),
            "negative": negative,
            "gaps": [[gap.frames, gap.prompt, _digest(gap.before), _digest(gap.after)] for gap in gaps],
        }

    def _filled(
        self,
        gaps: Sequence[Gap],
        seed: int,
        first: int,
        settings: InfillSettings,
        negative: str | None,
        folder: str | None,
        batch: int,
        each_step: Callable[[], object] | None,
    ) -> Iterator[np.ndarray]:
        def step(times: int) -> None:
            for _ in range(times if each_step else 0):
                assert each_step
                each_step()

        kept = {number: parts.load(parts.url_of(folder, number), "frames") for number in range(len(gaps))}
        made = {number: part.numpy() for number, part in kept.items() if part is not None}
        step(settings.steps * len(made))
        for number, gap in enumerate(gaps):
            if number not in made:
                # with the next ones of its shape
                alike = (n for n in range(number, len(gaps)) if n not in made and _shape(gaps[n]) == _shape(gap))
                later = list(islice(alike, batch))
                some = [gaps[n] for n in later]
                numbers = [first + n for n in later]
                videos = self._batch(some, numbers, seed, settings, negative, partial(step, len(later)))
                for n, video in zip(later, videos, strict=True):
                    parts.save(parts.url_of(folder, n), "frames", torch.from_numpy(video))
                    made[n] = video
            yield made.pop(number)

    @torch.no_grad()
    def _batch(
        self,
        gaps: Sequence[Gap],
        numbers: Sequence[int],
        seed: int,
        settings: InfillSettings,
        negative: str | None,
        each_step: Callable[[], object],
    ) -> np.ndarray:
        """The frames of gaps of one shape: `(B, frames, H, W, 3)` uint8."""
        before = _video([gap.before for gap in gaps], self.device)
        after = _video([gap.after for gap in gaps], self.device)
        latents = self.encode(self.codec, before.to(self.codec.dtype), after.to(self.codec.dtype))
        hints = self._hints(gaps, negative, before, after)
        draws, frames = [(seed, number) for number in numbers], gaps[0].frames
        return to_array(
            fill(self.model, self.codec, latents, frames, draws, hints, settings, self.clean_time, each_step)
        )

    def _hints(self, gaps: Sequence[Gap], negative: str | None, before: Tensor, after: Tensor) -> Hints:
        text, mask, other, unwanted = None, None, None, None
        if self.prompts:
            text, mask = self.prompts.states([gap.prompt for gap in gaps], self.device)
            other, unwanted = self.prompts.states([negative] * len(gaps), self.device)
        image = None
        if self.features:
            image = self.features(torch.stack([before[:, :, -1], after[:, :, 0]], dim=1))
        return Hints(text, mask, other, unwanted, image)


def _mixer(settings: InfillSettings) -> Mixer:
    return Mixer(settings.mixer, settings.noise, settings.cutoff, settings.fall)


def _shape(gap: Gap) -> tuple[int, int, int]:
    return len(gap.before), gap.frames, len(gap.after)


def _video(clips: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Clips `(t, H, W, 3)` uint8 as `(B, 3, t, H, W)` in [-1, 1]."""
    return to_model(torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3))


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()
