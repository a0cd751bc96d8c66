"""Tokens of videos of any length: window by window, or first anchors and then all gaps between them at once.

base      each latent frame is drawn given the last `keep` before it, which stand at the window's beginning. Positions are
          learned, so a window that slides is read anew for each latent frame; within it keys and values are kept
anchors   the same for every 4th latent frame
interpolate   the frames between two anchors depend on these alone: the gaps of several pairs are one batch

Memory does not depend on the length: anchors are drawn a few gaps ahead. Each draw depends on the seed of its video, the
number of its latent frame and the place in it: not on the batch, the length, or where a stopped run went on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from longtake.training.models.common import parts
from longtake.training.models.common import story as scenes
from longtake.training.models.common.condition import Condition, check_classes
from longtake.training.models.common.draws import rng_of
from longtake.training.models.common.flow import guided
from longtake.training.models.common.guidance import Guidance, parts_of
from longtake.training.models.common.story import Story
from longtake.training.models.common.text import check_guidance
from longtake.training.models.generator import Settings
from longtake.training.models.tats import decode
from longtake.training.models.tats.gpt import TATS, Cache
from longtake.training.models.tats.gpt_config import TATSConfig
from longtake.training.models.tats.sound.hearing import Heard

_ROWS = 64  # gaps that are filled at once, over all videos: those of 1,024 frames, where 4 are in a latent frame
_NAME = "tokens"  # of the tensor in a kept part


@torch.no_grad()
def continued(
    model: TATS,
    given: Tensor,
    uniforms: Tensor,
    settings: Settings,
    condition: Condition | None = None,
    negative: Condition | None = None,
) -> Tensor:
    """Draw the tokens that follow: `(B, n)`.

    Args:
        given: `(B, m)`, from the beginning of the model's sequence, 0 of them at least.
        uniforms: a number from [0, 1) for each draw, `(B, n)`.
        condition: of the window (see `TATS.forward`).
        negative: guidance leads away from its text in place of no text.
    """
    count, device = uniforms.shape[1], given.device
    cache = Cache(model.config.conditions + given.shape[1] + count)

    def logits(x: Tensor, _: Tensor, now: Condition | None) -> Tensor:
        return model(x, now, last=1, cache=cache)[:, -1]

    predict, x, made = guided(logits, condition, settings.guidance, negative), given, []
    for uniform in uniforms.to(device).unbind(1):
        chances = decode.candidates(predict(x, x).float(), settings.temperature, settings.top_k, settings.top_p)
        x = decode.draw(*chances, uniform)[:, None]
        made.append(x)
    return torch.cat(made, dim=1)


def filled(
    model: TATS,
    ends: Tensor,
    uniforms: Tensor,
    settings: Settings,
    condition: Condition | None = None,
    negative: Condition | None = None,
) -> Tensor:
    """Draw the latent frames between pairs of anchors `(B, 2, n)`: `(B, every - 1, n)`; `uniforms` has as many."""
    made = continued(model, ends.flatten(1), uniforms.flatten(1), settings, condition, negative)
    return made.unflatten(1, (-1, model.config.cells))


def spans(frames: int, every: int = 1, goes_on: bool = False, videos: int = 1) -> Iterator[tuple[int, int]]:
    """The new latent frames, from one to before another, of each part of a video. The last may go on beyond `frames`.

    Args:
        every: latent frames from an anchor to the next; 1 for a model that makes them all one after the other.
        goes_on: whether the video begins after a start.
        videos: that are made together, with guidance as often as it needs each.
    """
    begin, length = 0, 1 if every == 1 else max(1, _ROWS // videos) * every
    if every > 1 and not goes_on:
        yield 0, 1
        begin = 1
    while begin < frames:
        end = begin + min(length, math.ceil((frames - begin) / every) * every)
        yield begin, end
        begin = end


@dataclass(frozen=True)
class Rollout:
    """Videos to make tokens of. Latent frames are numbered from the first new one, 0; those of `start` are below.

    model     of mode base or interpolate
    anchors   for interpolate, the model of its anchors
    seeds     of the videos
    leading   how anchors are drawn; None: as all else
    start     tokens `(1 or B, k, h, w)` of the latent frames before; None without any
    story     (latent frame, condition) in order: a scene holds for the frames that are drawn from it on
    negative  a text for each seed that guidance leads away from, in place of no text
    audio     the sounds of the videos from their first new latent frame on; None: there are none
    models    digests of the weights, which decide the tokens beside the other fields
    """

    model: TATS
    seeds: Sequence[int]
    settings: Settings
    anchors: TATS | None = None
    leading: Settings | None = None
    start: Tensor | None = None
    story: Story = ()
    negative: Condition | None = None
    audio: Heard | None = None
    models: str = ""
    each_step: Callable[[], object] | None = None

    def record(self) -> dict[str, Any]:
        """All that decides the tokens, but for their number."""
        return {
            "models": self.models,
            "precision": str(self.model.head.weight.dtype),
            "seeds": list(self.seeds),
            "start": _digest(self.start),
            "story": [[begin, condition.record()] for begin, condition in self.story],
            "negative": self.negative and self.negative.record(),
            "audio": self.audio and self.audio.digest(),
            "settings": [asdict(each) for each in (self.settings, self.leading) if each],
        }

    @property
    def leader(self) -> TATS:
        """The model that goes on in time."""
        return self.anchors or self.model

    @property
    def lead_settings(self) -> Settings:
        """How it draws."""
        return self.leading or self.settings

    @property
    def every(self) -> int:
        """Latent frames from one that the leader makes to the next."""
        return 1 if self.anchors is None else self.model.config.every

    @property
    def window(self) -> int:
        """Latent frames of a window of the leader."""
        return self.leader.config.shape[0]

    @property
    def keep(self) -> int:
        """Latent frames, or anchors, of the past that a window has."""
        return self.lead_settings.keep or len(self.leader.config.order) - 1

    def tokens(self, frames: int, folder: str | None = None) -> Iterator[Tensor]:
        """Tokens `(B, n, h, w)` of latent frames that follow each other, `frames` in all.

        Args:
            folder: a URL where finished parts are kept. The same call goes on after them, to the same tokens.

        Raises:
            UserError: the folder has parts of other settings.
            Failure: a kept part is damaged.
        """
        config, count = self.model.config, len(self.seeds)
        past = torch.zeros(count, 0, config.cells, dtype=torch.int64, device=self.model.places.device)
        if self.start is not None:
            past = self.start.to(past).flatten(2).expand(count, -1, -1)
        if folder:
            parts.open_folder(folder, self.record())
        for begin, end in spans(frames, self.every, self.start is not None, count * _copies(self.settings)):
            url = parts.url_of(folder, begin)
            part = parts.load(url, _NAME)
            # the last part of a shorter video may be shorter than the one that is needed here
            if part is None or part.shape != (count, end - begin, config.cells):
                part = self._made(past, begin, end)
                parts.save(url, _NAME, part.int().cpu())
            else:
                self._count(end - begin)
            part = part.to(past)
            past = torch.cat([past, part], dim=1)[:, -max(1, (self.keep - 1) * self.every + 1) :]
            yield part[:, : frames - begin].unflatten(2, config.shape[1:])

    def _made(self, past: Tensor, begin: int, end: int) -> Tensor:
        models = [model for model in (self.model, self.anchors) if model is not None]
        training = [model.training for model in models]
        for model in models:
            model.eval()
        try:
            return self._part(past, begin, end)
        finally:
            for model, was in zip(models, training, strict=True):
                model.train(was)

    def _part(self, past: Tensor, begin: int, end: int) -> Tensor:
        """The latent frames from `begin` to before `end`, `(B, n, h w)`."""
        every = self.every
        line = past[:, (past.shape[1] - 1) % every :: every]  # what the leader has made
        first = line.shape[1]
        for frame in range(begin + every - 1, end, every) if first else (begin,):
            line = torch.cat([line, self._next(line, frame)[:, None]], dim=1)
            self._count(1)
        if every == 1 or not first:
            return line[:, first:]
        gaps = self._gaps(line[:, first - 1 :], begin)
        self._count(end - begin - (line.shape[1] - first))
        return torch.cat([gaps, line[:, first:, None]], dim=2).flatten(1, 2)

    def _next(self, line: Tensor, frame: int) -> Tensor:
        """The leader's next latent frame, `(B, h w)`."""
        kept = line[:, max(0, line.shape[1] - self.keep) :]
        config = self.leader.config
        uniforms = self._uniforms([frame])[:, 0]
        scene = self._scene(frame, frame - kept.shape[1] * self.every, config)
        return continued(self.leader, kept.flatten(1), uniforms, self.lead_settings, scene, self.negative)

    def _gaps(self, line: Tensor, begin: int) -> Tensor:
        """What is between anchors `(B, g + 1, n)`, of which the first is frame `begin - 1`: `(B, g, every - 1, n)`."""
        config, count, every = self.model.config, len(self.seeds), self.every
        starts = range(begin, begin + (line.shape[1] - 1) * every, every)
        ends = torch.stack([line[:, :-1], line[:, 1:]], dim=2).transpose(0, 1).flatten(0, 1)
        uniforms = torch.cat([self._uniforms(range(start, start + every - 1)) for start in starts])
        condition = reduce(Condition.join, [self._scene(start, start - 1, config) for start in starts])
        negative = self.negative and reduce(Condition.join, [self.negative] * len(starts))
        made = filled(self.model, ends, uniforms, self.settings, condition, negative)
        return made.unflatten(0, (len(starts), count)).transpose(0, 1)

    def _uniforms(self, frames: Sequence[int]) -> Tensor:
        """The numbers that draw these latent frames, `(B, n, h w)`."""
        cells = self.model.config.cells
        rows = [[torch.rand(cells, generator=rng_of(seed, frame)) for frame in frames] for seed in self.seeds]
        return torch.stack([torch.stack(row) for row in rows])

    def _scene(self, frame: int, first: int, config: TATSConfig) -> Condition:
        """What a latent frame is to show, with the sound of its window, whose first latent frame is `first`."""
        now = self._shown(frame)
        return replace(now, classes=now.classes if config.classes else None, audio=self._sound(first, config.shape[0]))

    def _shown(self, frame: int) -> Condition:
        """What a latent frame is to show by the story."""
        if not self.story:
            return Condition()
        now = scenes.held(self.story, frame) or self.story[0][1].null
        if (
            now.text is None
            and (text := next((one.text for _, one in self.story if one.text is not None), None)) is not None
        ):
            # with the fields of the others, so that gaps of several scenes are a batch
            nothing = torch.zeros(len(text), 0, dtype=torch.bool, device=text.device)
            now = replace(now, text=text[:, :0], mask=nothing)
        return now

    def _sound(self, first: int, frames: int) -> Tensor | None:
        """The sound of a window whose first latent frame is `first`."""
        return None if self.audio is None else self.audio.window(first, frames).expand(len(self.seeds), -1, -1)

    def _count(self, steps: int) -> None:
        for _ in range(steps if self.each_step else 0):
            assert self.each_step
            self.each_step()

    def check(self) -> None:
        """Refuse what does not fit together: ValueError."""
        config, settings, seeds = self.leader.config, self.lead_settings, self.seeds
        for each in (settings, self.settings):
            decode.check(each.temperature, each.top_k, each.top_p)
        if (self.model.config.mode == "interpolate") != (
            self.anchors is not None
        ) or self.leader.config.mode == "interpolate":
            raise ValueError(f"a model of mode {self.model.config.mode} makes no whole videos by itself")
        room = len(config.order) - 1
        if not 0 <= settings.keep <= room:
            raise ValueError(f"keep is {settings.keep}; a window has room for 1 to {room}, and 0 is all of them")
        if not seeds:
            raise ValueError("seeds: there are none, so there is nothing to generate")
        shape = self.model.config.shape[1:]
        if self.start is not None and (
            self.start.ndim != 4 or self.start.shape[2:] != shape or not self.start.shape[1]
        ):
            raise ValueError(f"start has shape {tuple(self.start.shape)}; it needs (B, frames, {shape[0]}, {shape[1]})")
        if self.audio is not None and not config.audio_codes:
            raise ValueError("audio: this model takes none; leave it out")
        for begin, held in self.story:
            if held.classes is not None:
                if len(held.classes) != len(seeds):
                    raise ValueError(f"story: at {begin} are {len(held.classes)} classes for {len(seeds)} seeds")
                check_classes(held.classes.tolist(), config.classes)
        for model, each in ((self.leader, settings), (self.model, self.settings)):
            check_learned(model.config, each.guidance)


def _copies(settings: Settings) -> int:
    """Rows that guidance makes of one, at most."""
    parts = set(asdict(parts_of(settings.guidance)).values())
    return 1 if parts == {1.0} else 1 + len(parts)


def check_learned(config: TATSConfig, guidance: float | Guidance) -> None:
    """ValueError where guidance leads away from what training never hid; words are a text, too."""
    check_guidance(config.model_copy(update={"text_width": config.text_width or config.words}), guidance)


def _digest(values: Tensor | None) -> str | None:
    return None if values is None else hashlib.sha256(values.cpu().contiguous().numpy().tobytes()).hexdigest()
