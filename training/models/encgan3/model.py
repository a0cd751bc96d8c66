"""EncGAN3 (arXiv 2512.21776): what a clip shows and how it moves, encoded apart, and a generator of its frames.

A content encoder sees one frame, the reference; a movement encoder sees the differences of neighbouring frames. Of both the
generator, three streams as in G3AN (arXiv 1912.05523), makes the signed differences v of a clip, which are added up from the
reference, forward and backward. No public code exists; where the paper leaves something open, `config` says what is assumed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtake.training.models.common.codec import Posterior
from longtake.training.models.common.recompute import chosen
from longtake.training.models.encgan3.blocks import FactorisedAttention, ThreeStreams, Trunk, trunk_widths
from longtake.training.models.encgan3.config import EncGAN3Config
from longtake.training.models.encgan3.recursion import clip_around, clip_of, merged

_LEAST_SPREAD = 0.01  # of random latents that is scaled to 1: where clips are hardly different, others may be
NOISES = 4  # vectors of noise that a clip's training takes


class Drawn(NamedTuple):
    """What a training step compares: K clips of each window, 2 with recall, else 1. N frames of a window, K = 1: N = T.

    A tuple, because ZeRO-3's hooks look for tensors in tuples.

    clips     reconstructed, `(B, K, T, 3, H, W)`
    joined    the same, merged: `(B, N, 3, H, W)`
    sampled   as many frames from noise alone, `(B, N, 3, H, W)`; none, `(0, N, 3, H, W)`, if not asked for
    frame     the reference, as the head for the first frame makes it of its content, `(B, 3, H, W)`
    content   posterior of z_x, `(B, K, D_x)`
    movement  posterior of z_v, `(B, K, D_v)`
    """

    clips: Tensor
    joined: Tensor
    sampled: Tensor
    frame: Tensor
    content: Posterior
    movement: Posterior


class Generator(nn.Module):
    """z_x `(B, D_x)` and z_v `(B, k, D_v)` -> differences `(B, 3, 12 + 4k, H, W)` in [-2, 2].

    `place`, where in the clip the reference is, from 0 to 1, goes with the movement [assumption]: without it z_v would have
    to say so. `maps` are those of the reference, for a config with `skips`.
    """

    def __init__(self, config: EncGAN3Config) -> None:
        super().__init__()
        count = int(math.log2(config.size)) - 1
        widths = [config.width * min(8, 2 ** (count - 1 - n)) for n in range(count)]
        ins = (config.content, config.movement + 1, config.content + config.movement + 1)
        blocks = list[ThreeStreams]()
        for number, width in enumerate(widths):
            time = ("begin", "double", "double")[number] if number < 3 else "keep"
            blocks.append(ThreeStreams(ins, width, time, number == 0, config.groups))  # type: ignore[arg-type]
            ins = (width, width, 2 * width)
        self.blocks = nn.ModuleList(blocks)
        self.attended = int(math.log2(config.attention)) - 2 if config.attention else None
        self.attention = nn.Identity() if self.attended is None else FactorisedAttention(2 * widths[self.attended])
        self.of_reference = nn.ModuleList()
        if config.skips:
            seen = [3, *trunk_widths(config.size, config.width)][::-1]
            self.of_reference.extend(nn.Conv3d(a, b, 1) for a, b in zip(seen, widths, strict=True))
        self.to_differences = nn.Conv3d(2 * widths[-1], 3, (1, 3, 3), padding=(0, 1, 1))
        self.to_frame = nn.Conv3d(widths[-1], 3, (1, 3, 3), padding=(0, 1, 1))
        # a clip begins as a copy of its reference, nearly: differences are added up
        nn.init.zeros_(self.to_differences.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.to_differences.weight /= config.frames if config.recursion == "previous" else 1

    def forward(self, content: Tensor, movement: Tensor, place: float, maps: list[Tensor] | None = None) -> Tensor:
        dtype = self.to_frame.weight.dtype
        content = content.to(dtype)[:, :, None, None, None]
        movement = movement.to(dtype).transpose(1, 2)[..., None, None]
        movement = torch.cat([movement, torch.full_like(movement[:, :1], place)], dim=1)
        video = torch.cat([content.expand(-1, -1, movement.shape[2], -1, -1), movement], dim=1)
        for number, block in enumerate(self.blocks):
            reference = self.of_reference[number](maps[-1 - number]) if maps else None
            content, movement, video = block(content, movement, video, reference)
            if number == self.attended:
                video = self.attention(video)
        return 2 * torch.tanh(0.5 * self.to_differences(video).float())

    def frame(self, content: Tensor) -> Tensor:
        """A frame `(B, 3, H, W)` in [-1, 1] of the content stream alone."""
        content = content.to(self.to_frame.weight.dtype)[:, :, None, None, None]
        for block in self.blocks:
            content = block.content(content)  # type: ignore[operator]
        return torch.tanh(self.to_frame(content).float())[:, :, 0]


class EncGAN3(nn.Module):
    """Encoders of content and movement, and the generator. Frames are `(B, 3, H, W)`, clips `(B, T, 3, H, W)`, in [-1, 1].

    The clips of the generator are about in that range, not clamped: a clamp would give no gradient.
    """

    def __init__(self, config: EncGAN3Config) -> None:
        super().__init__()
        self.config = config
        self.content = Trunk(config.size, config.width, 2 * config.content, False, "group", config.groups)
        self.movement = Trunk(
            config.size, config.width, 2 * config.movement, True, "group", config.groups, config.pooled
        )
        self.generator = Generator(config)
        blocks: list[Any] = self.blocks()
        for number, block in enumerate(blocks):
            block.checkpointing = chosen(config.activation_checkpointing, number, len(blocks))

    def blocks(self) -> list[nn.Module]:
        """The parts that are compiled, or recomputed, one by one: the encoders, then the generator's."""
        return [self.content, self.movement, *self.generator.blocks]

    @torch.no_grad()
    def scale_latents(self, video: Tensor) -> None:
        """Scale random encoders so that over these clips, `(B, T, 3, H, W)`, z_x and z_v have mean 0 and variance 1.

        Without it clips differ in z_v by some hundredths of what they have in common; the generator then hears its noise
        alone, learns to do without, and the divergence takes away the rest. (Data-dependent initialisation, arXiv
        1602.07868, section 3, of the encoders' last layers.) Each log-variance begins at -4, the same for all [assumption].
        """
        for trunk, encode in (
            (self.content, lambda: self.encode_content(video[:, 0]).mean),
            (self.movement, lambda: self.encode_movement(self.differences_of(video)).mean),
        ):
            last: Any = trunk.steps[-1]
            weight, bias = (each.chunk(2)[0] for each in (last.weight, last.bias))  # views: of the means
            spread = encode().std(0, correction=0)
            weight /= spread.clamp_min(_LEAST_SPREAD)[:, None, None, None, None]
            bias -= encode().mean(0)
            last.weight.chunk(2)[1].zero_()
            last.bias.chunk(2)[1].fill_(-4)

    def encode_content(self, frames: Tensor) -> Posterior:
        """Mean and log-variance of z_x, `(B, D_x)` each, of frames `(B, 3, H, W)`. ValueError for frames of another size."""
        self._check_size(frames)
        return _posterior(self.content(frames.unsqueeze(2))[..., 0])

    def encode_movement(self, differences: Tensor) -> Posterior:
        """Mean and log-variance of z_v, `(B, D_v)` each, of differences `(B, T-1, 3, H, W)`, T at least 16.

        They are those of `differences_of`. A longer clip has one z_v, too: the mean over its time.
        ValueError for frames of another size.
        """
        self._check_size(differences)
        padded = torch.cat([torch.zeros_like(differences[:, :1]), differences], dim=1)
        return _posterior(self.movement(padded.transpose(1, 2)).mean(2))

    def differences_of(self, video: Tensor) -> Tensor:
        """What the movement encoder sees of a clip `(B, T, 3, H, W)`: `(B, T-1, 3, H, W)`, signed or not by the config."""
        differences = video.diff(dim=1)
        return differences if self.config.differences == "signed" else differences.abs()

    def generate(
        self, z_x: Tensor, z_v: Tensor, reference: Tensor, index: int = 0, frames: int | None = None
    ) -> Tensor:
        """A clip `(B, T, 3, H, W)` whose frame `index` is exactly the reference `(B, 3, H, W)`.

        Args:
            z_x: `(B, D_x)`.
            z_v: `(B, D_v)`, or `(B, k, D_v)`, another one for each step of 12 + 4k frames.
            frames: 12 + 4k; None is the config's. A longer clip takes more steps of z_v, and memory in proportion.

        Raises:
            ValueError: the frames are none that it makes, or the index none of them.
        """
        frames = frames or self.config.frames
        if frames % 4 or frames < 16:
            raise ValueError(f"frames is {frames}; this model makes clips of 12 + 4k frames, such as 16 or 20")
        if not 0 <= index < frames:
            raise ValueError(f"index is {index}; a clip has frames 0 to {frames - 1}")
        return self._clip(z_x, z_v, reference, index, frames)

    def first_frame(self, z_x: Tensor) -> Tensor:
        """A frame `(B, 3, H, W)` in [-1, 1] of its content `(B, D_x)`, so that sampling needs no real one [assumption]."""
        return self.generator.frame(z_x)

    def forward(self, video: Tensor, differences: Tensor, noise: Tensor, index: int = 0, sample: bool = True) -> Drawn:
        """Reconstruct windows, and generate as many from noise. With recall both clips of each are made in one pass.

        Args:
            video: `(B, N, 3, H, W)`, of T frames or, for recall, of two clips that overlap.
            differences: of its frames, `(B, N-1, 3, H, W)`, see `differences_of`.
            noise: standard normal, `(B, 4, D_x + D_v)`: of the posterior and the prior of either clip.
            index: of the first clip's reference; that of the second is where the first has its frame `joint`.
            sample: also generate from noise alone.
        """
        config, count, samples = self.config, len(video), len(video) if sample else 0
        recalls = video.shape[1] > config.frames
        starts = [0, config.frames - config.overlap][: 1 + recalls]
        noise_x, noise_v = noise.split([config.content, config.movement], dim=2)

        # movement of all clips in one pass, content of the first
        pieces = [differences[:, start : start + config.frames - 1] for start in starts]
        movement = self.encode_movement(torch.cat(pieces))
        movements = [
            Posterior(*pair)
            for pair in zip(movement.mean.chunk(len(starts)), movement.logvar.chunk(len(starts)), strict=True)
        ]
        contents = [self.encode_content(video[:, index])]

        # the first clip: reconstructed from its real frame, sampled from one that the generator makes itself
        z_x = torch.cat([_draw(contents[0], noise_x[:, 0]), noise_x[:samples, 1]])
        z_v = torch.cat([_draw(movements[0], noise_v[:, 0]), noise_v[:samples, 1]])
        frame = self.first_frame(z_x)
        first = whole = self._clip(z_x, z_v, torch.cat([video[:, index].float(), frame[count:]]), index, config.frames)
        clips = [first[:count]]

        # the second clip starts from a frame of the first as it has been generated, through which gradients flow
        if recalls:
            reference = first[:, config.joint]
            again = self.encode_content(reference)
            contents.append(Posterior(again.mean[:count], again.logvar[:count]))
            z_x = _draw(again, torch.cat([noise_x[:, 2], noise_x[:samples, 3]]))
            z_v = torch.cat([_draw(movements[1], noise_v[:, 2]), noise_v[:samples, 3]])
            second = self._clip(z_x, z_v, reference, config.index, config.frames)
            whole = merged(first, second, config.overlap, config.joint, config.merge)
            clips.append(second[:count])

        stacked = [
            Posterior(*(torch.stack(part, 1) for part in zip(*each, strict=True))) for each in (contents, movements)
        ]
        return Drawn(torch.stack(clips, 1), whole[:count], whole[count:], frame[:count], *stacked)

    def _clip(self, z_x: Tensor, z_v: Tensor, reference: Tensor, index: int, frames: int) -> Tensor:
        """The clip of the generator's differences. See `generate`."""
        steps = frames // 4 - 3
        if z_v.dim() == 2:
            z_v = z_v.unsqueeze(1).expand(-1, steps, -1)
        assert z_v.shape[1] == steps, f"{z_v.shape[1]} steps of z_v; {frames} frames need {steps}"
        maps = self.content.maps(reference.unsqueeze(2)) if self.config.skips else None
        differences = self.generator(z_x, z_v, index / (frames - 1), maps).transpose(1, 2)
        if self.config.recursion == "reference":
            return clip_around(differences, reference.float(), index)
        # the first has no frame before it
        return clip_of(differences[:, 1:], reference.float(), index)

    def _check_size(self, frames: Tensor) -> None:
        size, (height, width) = self.config.size, frames.shape[-2:]
        if (height, width) != (size, size):
            raise ValueError(f"frames are {height}x{width}; this model needs {size}x{size}")


def _posterior(numbers: Tensor) -> Posterior:
    mean, logvar = numbers.float().chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30, 20))


def _draw(posterior: Posterior, noise: Tensor) -> Tensor:
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
