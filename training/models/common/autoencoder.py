"""What video autoencoders share that encode a prefix of 1 + f n frames: checks, streams, tiles, and prediction by padding.

In predictive reconstruction (PV-VAE, arXiv 2605.02134) the encoder sees the first latent groups of a clip; padding takes
the place of the others, and the decoder has to predict their frames.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from longtake.training.models.common.codec import Posterior, frames_of, latent_groups
from longtake.training.models.common.streaming import regroup


class LatentPadding(nn.Module):
    """Appends latents in place of those that the encoder has not seen. A module, so that ZeRO-3 gathers its token."""

    def __init__(self, channels: int, kind: Literal["token", "noise"]) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, channels, 1, 1, 1)) if kind == "token" else None

    def forward(self, latent: Tensor, count: int, rng: torch.Generator | None = None) -> Tensor:
        """`(B, C, t, h, w)` -> `(B, C, t + count, h, w)`. Noise is drawn on the device of `rng`.

        With a count of 0 the token still gets a (zero) gradient, so that all ranks reduce the same parameters.
        """
        batch, channels, _, height, width = latent.shape
        shape = (batch, channels, count, height, width)
        if self.token is None:
            tail = torch.randn(shape, generator=rng, device=latent.device if rng is None else rng.device).to(latent)
        else:
            tail = self.token.to(latent.dtype).expand(shape)
        return torch.cat([latent, tail], dim=2)


class VideoAutoencoder(nn.Module):
    """Video `(B, 3, T, H, W)` in [-1, 1], T = 1 + f n, H and W multiples of s <-> latent `(B, C, 1 + n, H/s, W/s)`.

    A subclass has `encode`, `decode` and `dtype` (see `codec.Codec`), and sets `what`, its name in messages, `kind`, that in
    `models.KINDS`, `config`, and `padding`; None for one that does not predict.
    Training calls the module itself (`forward`), never `encode` or `decode`, so that engine hooks fire.
    """

    what: str
    kind: str
    config: Any
    padding: LatentPadding | None

    @abstractmethod
    def encode(self, video: Tensor, tile: int | None = None, overlap: int = 64) -> Posterior: ...

    @abstractmethod
    def decode(self, latent: Tensor, tile: int | None = None, overlap: int = 64) -> Tensor: ...

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]: ...

    @abstractmethod
    def freeze_encoder(self) -> None:
        """Let nothing learn that latents depend on."""

    def changed(self, **fields: Any) -> Self:
        """The same weights with some fields of the config replaced, and the padding's own weights new where it gets one."""
        model = type(self)(self.config.model_copy(update=fields))
        state = {name: value for name, value in model.state_dict().items() if name.startswith("padding.")}
        model.load_state_dict(state | self.state_dict())
        return model

    def pad(self, latent: Tensor, count: int, rng: torch.Generator | None = None) -> Tensor:
        """Append `count` padding latents in time. ValueError for a model that does not predict, unless `count` is 0."""
        if self.padding is not None:
            padded: Tensor = self.padding(latent, count, rng)
            return padded
        if count:
            raise ValueError(f"this {self.what} does not predict: show it all frames")
        return latent

    def shown_frames(self, frames: int) -> int:
        """Of a clip of `frames`, those from which it is predicted in evaluation: of half of its latents, rounded up.

        All of them where the model does not predict.
        """
        groups = latent_groups(frames, self.config.temporal_stride)
        return frames if self.padding is None else frames_of((groups + 1) // 2, self.config.temporal_stride)

    def forward(
        self, video: Tensor, visible: int | None = None, rng: torch.Generator | None = None
    ) -> tuple[Tensor, Posterior]:
        """Predictive reconstruction (paper, method): encode the first `visible` latent groups, decode all frames.

        Returns the video, with unseen frames predicted, and the posterior of the visible groups. ValueError if `visible`
        is not in 1..groups; None shows everything.
        """
        self._check(video)
        stride = self.config.temporal_stride
        groups = latent_groups(video.shape[2], stride)
        visible = groups if visible is None else visible
        if not 1 <= visible <= groups:
            raise ValueError(f"visible is {visible}; a clip of {video.shape[2]} frames has latent groups 1 to {groups}")
        posterior = self.encode(video[:, :, : frames_of(visible, stride)])
        latent = self.pad(posterior.sample(rng), groups - visible, rng)
        return self.decode(latent), posterior

    @torch.no_grad()
    def reconstruct(
        self,
        video: Tensor,
        visible_frames: int | None = None,
        rng: torch.Generator | None = None,
        tile: int | None = None,
        overlap: int = 64,
    ) -> Tensor:
        """Decode all frames, in [-1, 1], from the most likely latent of the first `visible_frames` (1 + f n); for evaluation.

        `rng` draws the padding of a model that pads with noise.
        """
        self._check(video)
        latent = self.encode(video[:, :, :visible_frames], tile, overlap).mode()
        unseen = latent_groups(video.shape[2], self.config.temporal_stride) - latent.shape[2]
        return self.decode(self.pad(latent, unseen, rng), tile, overlap).clamp(-1.0, 1.0)

    @property
    def _down(self) -> tuple[int, int]:
        """Sides of a frame and of its latent in the unit that tiles are counted in."""
        return self.config.spatial_stride, 1

    def _whole_groups(self, chunks: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
        """One frame, then the frames of `chunk` latents at once, without a tail that fills no latent."""
        stride, total = self.config.temporal_stride, 0
        for piece in regroup(chunks, 1, positive("chunk", chunk) * stride):
            self._check_size(piece)
            total += piece.shape[2]
            frames = piece.shape[2] - (total - 1) % stride
            if frames > 0:
                yield piece[:, :, :frames]
        self._check_frames(total)

    def _tiling(self, tile: int | None, overlap: int) -> tuple[int | None, int]:
        """Tile and overlap, from pixels to latent positions."""
        space = self.config.spatial_stride
        if tile is None:
            return None, 0
        if tile % space or overlap % space or not 0 <= overlap < tile:
            raise ValueError(f"tile {tile} with overlap {overlap}; need multiples of {space} with 0 <= overlap < tile")
        return tile // space, overlap // space

    def _check(self, video: Tensor) -> None:
        self._check_frames(video.shape[2])
        self._check_size(video)

    def _check_frames(self, frames: int) -> None:
        time = self.config.temporal_stride
        below = frames_of(latent_groups(max(frames, 1), time), time)
        if frames != below:
            raise ValueError(f"video has {frames} frames; {self.what} needs 1+{time}n (e.g. {below} or {below + time})")

    def _check_size(self, video: Tensor) -> None:
        height, width, space = *video.shape[3:], self.config.spatial_stride
        if height % space or width % space or not height * width:
            raise ValueError(f"video is {height}x{width}; {self.what} needs height and width in multiples of {space}")


def positive(name: str, value: int) -> int:
    """The value. ValueError if it is less than 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}; needs to be at least 1")
    return value
