"""The VQGAN of TATS (arXiv 2204.03638): a video as tokens that do not know where in the video they are.

A clip of 4n frames becomes n x h x w tokens, numbers of codes. Convolutions replicate their borders, norms stay within a
position, and nothing attends: so a token depends on a bounded neighbourhood, windows of a long video look like clips of the
training, and videos of any length are encoded and decoded in chunks, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from longtake.training.models.common.causal import NormSiLU
from longtake.training.models.common.codec import Posterior, frames_of, latent_groups
from longtake.training.models.common.recompute import Share, called, chosen
from longtake.training.models.tats.codebook import Codebook, Usage
from longtake.training.models.tats.convolution import (
    Margins,
    Padding,
    SameConv3d,
    SameTransposed3d,
    Triple,
    layers_of,
    margins,
    stream,
    tiles,
    windows,
)

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "vqgan_paper": dict(width=32, codes=16384, code_width=256, downsample=(4, 8, 8)),
    "vqgan_small": dict(width=24, codes=4096,  code_width=128, downsample=(4, 8, 8)),
    "vqgan_tiny":  dict(width=8,  codes=256,   code_width=32,  downsample=(4, 4, 4), restart=0.1),
}
# fmt: on

_LEAST = {"replicate": 1, "zeros": 1, "reflect": 3, "circular": 2}  # latents along an axis
Norm = Literal["rms", "group"]


class VQGANConfig(BaseModel):
    """The numbers of one VQGAN. "Assumption" marks what the paper and its code do not say.

    width        channels after the first convolution, doubled by each level [paper's code: 32]
    codes        in the codebook [paper: 16384]
    code_width   channels of a code [paper: 256]
    downsample   frames, rows and columns to a token, powers of 2 [paper: 4, 8, 8]
    padding      of every convolution of the encoder [paper: replicate]; the decoder's is always replicate. The others are
                 for comparison: zeros and reflect tell a token how near an end is
    norm         rms: over the channels of each position [assumption; the paper has batch norm over all ranks, which by
                 its fixed statistics is as local]; group: over whole clips, for comparison: no token is then local
    commitment   weight of the distance of latents from their codes [paper's code: 0.25]
    decay        of the codes' moving averages, each pass [paper's code: 0.99]
    restart      share of the mean usage below which a code is replaced by a latent; 0 never [paper: none]
    activation_checkpointing   share of the res blocks that the backward pass recomputes, true is all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt
    codes: int = Field(ge=2)
    code_width: PositiveInt
    downsample: tuple[PositiveInt, PositiveInt, PositiveInt]
    padding: Padding = "replicate"
    norm: Norm = "rms"
    commitment: float = Field(0.25, ge=0)
    decay: float = Field(0.99, ge=0, lt=1)
    restart: float = Field(0.0, ge=0, lt=1)
    activation_checkpointing: Share = False

    @model_validator(mode="after")
    def _divides(self) -> VQGANConfig:
        if any(side & (side - 1) for side in self.downsample):
            raise ValueError(f"downsample: {list(self.downsample)} are no powers of 2")
        if self.downsample[1] != self.downsample[2]:
            raise ValueError(f"downsample: {list(self.downsample)}: give height and width the same")
        if max(self.downsample) < 2:
            raise ValueError("downsample: [1, 1, 1] makes nothing smaller; raise it")
        return self

    def strides(self) -> list[Triple]:
        """The strides of each level, in the order of encoder and decoder."""
        t, h, w = (int(math.log2(side)) for side in self.downsample)
        return [(1 + (n < t), 1 + (n < h), 1 + (n < w)) for n in range(max(t, h, w))]

    @property
    def channels(self) -> int:
        """Of a video's pictures."""
        return 3

    @property
    def temporal_stride(self) -> int:
        """Frames of a token."""
        return self.downsample[0]

    @property
    def first_frames(self) -> int:
        """Frames of the first token in time: as many as of any other."""
        return self.downsample[0]

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a token."""
        return self.downsample[1]

    @property
    def latent_channels(self) -> int:
        return self.code_width


def config_from_preset(preset: str, **overrides: Any) -> VQGANConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return VQGANConfig(**PRESETS[preset] | overrides)


class Activation(nn.Module):
    """`silu(norm(x))`, by position or by groups of channels of a whole clip."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.group = nn.GroupNorm(math.gcd(32, width // 2), width) if norm == "group" else None
        self.gain = nn.Parameter(torch.ones(width, 1, 1, 1)) if norm == "rms" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is not None:
            return F.silu(self.group(x))
        return NormSiLU.apply(x, self.gain, 1e-6)


class ResBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))` at constant width.

    With `checkpointing`, training keeps only the block's input and recomputes the rest in the backward pass.
    """

    def __init__(self, width: int, norm: Norm, padding: Padding) -> None:
        super().__init__()
        self.checkpointing = False
        self.branch = nn.Sequential(
            *(part for _ in range(2) for part in (Activation(width, norm), SameConv3d(width, width, padding=padding)))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + called(self.checkpointing and self.training, self.branch, x)
        return out


def _encoder(config: VQGANConfig) -> nn.Sequential:
    """Video `(B, channels, T, H, W)` in [-0.5, 0.5] -> latents `(B, code_width, t, h, w)`."""
    width, padding = config.width, config.padding
    parts: list[nn.Module] = [SameConv3d(config.channels, width, padding=padding)]
    for stride in config.strides():
        parts += [SameConv3d(width, 2 * width, 4, stride, padding), ResBlock(2 * width, config.norm, padding)]
        width *= 2
    return nn.Sequential(
        *parts, Activation(width, config.norm), SameConv3d(width, config.code_width, 1, padding=padding)
    )


def _decoder(config: VQGANConfig) -> nn.Sequential:
    """Codes `(B, code_width, t, h, w)` -> video `(B, channels, T, H, W)` in about [-0.5, 0.5]."""
    widths = [config.width << n for n in range(len(config.strides()), 0, -1)]
    parts: list[nn.Module] = [SameConv3d(config.code_width, widths[0], 1), Activation(widths[0], config.norm)]
    for before, width, stride in zip([widths[0], *widths], widths, config.strides(), strict=False):
        parts.append(SameTransposed3d(before, width, 4, stride))
        parts += [ResBlock(width, config.norm, "replicate") for _ in range(2)]
    return nn.Sequential(*parts, SameConv3d(widths[-1], config.channels))


class VQGAN(nn.Module):
    """Video `(B, channels, T, H, W)` in [-1, 1] <-> tokens `(B, t, h, w)`, with T = f t, H = s h, W = s w (f 4 and s 8 in
    the paper).

    Training calls the module itself (`forward`), so that engine hooks fire. Inputs are cast to the dtype of the weights;
    videos have it. It is a `Codec` too, whose latents are those before the codebook: `decode` takes the nearest codes.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.codebook = Codebook(config.codes, config.code_width, config.decay, config.restart)
        self.decoder = _decoder(config)
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        for number, block in enumerate(blocks):
            block.checkpointing = chosen(config.activation_checkpointing, number, len(blocks))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def encode(self, video: Tensor) -> Posterior:
        """Latents `(B, D, t, h, w)` before the codebook, which are certain. ValueError for a shape that does not divide."""
        self._check(video)
        return _certain(self._latents(video))

    def tokens(self, video: Tensor) -> Tensor:
        """The tokens of a clip, int64 `(B, t, h, w)`. ValueError for a shape that does not divide."""
        return self.codebook.tokens(self.encode(video).mode())

    def decode(self, z: Tensor) -> Tensor:
        """The video of the codes that are nearest to latents, not clamped to [-1, 1]."""
        return self.decode_tokens(self.codebook.tokens(z))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """The video of tokens `(B, t, h, w)`, not clamped to [-1, 1]."""
        return self._video(self.codebook.embed(tokens))

    def forward(self, video: Tensor, quantise: bool = True) -> tuple[Tensor, Tensor, Tensor, Usage]:
        """Reconstruct a clip: the video, its tokens, the commitment loss, and the batch's usage of the codes.

        In training mode it moves the codes. Without `quantise`, or while nothing has seeded the codes, the latents themselves
        are decoded, the codebook stays as it is, and tokens and loss are 0.
        """
        z = self.encode(video).mode()
        if not quantise or not (self.training or self.codebook.updates):
            zero = z.new_zeros((), dtype=torch.float32)
            return self._video(z), torch.zeros_like(z[:, 0], dtype=torch.int64), zero, Usage(zero, zero)
        code, tokens, usage = self.codebook(z)
        # both are the straight-through code's value, without its gradient
        commitment = F.mse_loss(z.float(), code.detach().float())
        return self._video(code), tokens, commitment, usage

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """The video of a clip's tokens, in [-1, 1]; for evaluation."""
        return self.decode_tokens(self.tokens(video)).clamp(-1.0, 1.0)

    def whole(self, video: Tensor) -> Tensor:
        """A clip as it is compared with its reconstruction."""
        return video

    def tokens_stream(self, chunks: Iterable[Tensor], chunk: int = 16, tile: int | None = None) -> Iterator[Tensor]:
        """`tokens` of a video of any length in constant memory, `chunk` latent frames at once, the same as at once.

        The chunks are `(B, 3, any, H, W)`, together f n frames. `tile` computes frames in squares of at most so many pixels
        a side. A chunk and a tile are computed with the margins that decide their values, so small ones cost more.
        No gradients.

        Raises:
            ValueError: a size that does not divide, and after all whole tokens a tail of fewer than f frames; a tile that
                is not larger than its margins; padding or a norm by which a token depends on the whole video.
        """
        for z in self._encoded(chunks, chunk, tile):
            yield self.codebook.tokens(z)

    def decode_tokens_stream(
        self, tokens: Iterable[Tensor], chunk: int = 16, tile: int | None = None
    ) -> Iterator[Tensor]:
        """`decode_tokens` of tokens `(B, any, h, w)` in constant memory, in videos of `chunk` latent frames; see `tokens_stream`."""
        s = self.config.spatial_stride
        around = self._margins(self.decoder)

        def run(x: Tensor) -> Tensor:
            return tiles(lambda part: self.decode_tokens(part[:, 0]), x, self._tile(tile), around[1:], (1, s))

        frames = (part[:, None] for part in tokens)
        yield from stream(run, frames, _positive(chunk), around[0], (1, self.config.temporal_stride))

    def encode_stream(self, chunks: Iterable[Tensor], chunk: int = 16, tile: int | None = None) -> Iterator[Posterior]:
        """`encode` as `tokens_stream` has it, of latents that are certain; see `Codec`."""
        for z in self._encoded(chunks, chunk, tile):
            yield _certain(z)

    def decode_stream(self, latents: Iterable[Tensor], chunk: int = 16, tile: int | None = None) -> Iterator[Tensor]:
        """`decode` of latents `(B, D, any, h, w)`, as `decode_tokens_stream` has it."""
        yield from self.decode_tokens_stream((self.codebook.tokens(z) for z in latents), chunk, tile)

    def blocks(self) -> Iterator[nn.Module]:
        """Res blocks, each once: the modules worth compiling in place with `nn.Module.compile`."""
        return (module for module in self.modules() if isinstance(module, ResBlock))

    def _latents(self, video: Tensor) -> Tensor:
        z: Tensor = self.encoder(video.to(self.dtype) / 2)
        return z

    def _video(self, code: Tensor) -> Tensor:
        video: Tensor = self.decoder(code.to(self.dtype)) * 2
        return video

    def _encoded(self, chunks: Iterable[Tensor], chunk: int, tile: int | None) -> Iterator[Tensor]:
        f, s = self.config.temporal_stride, self.config.spatial_stride
        around, most, total = self._margins(self.encoder), self._tile(tile), 0

        def whole() -> Iterator[Tensor]:
            """The frames, without a tail that fills no token."""
            nonlocal total
            rest: Tensor | None = None
            for part in chunks:
                self._check_size(part)
                total += part.shape[2]
                rest = part if rest is None else torch.cat([rest, part], dim=2)
                frames = rest.shape[2] // f * f
                yield rest[:, :, :frames]
                rest = rest[:, :, frames:]

        def run(x: Tensor) -> Tensor:
            return tiles(self._latents, x, most, around[1:], (s, 1))

        yield from stream(run, whole(), _positive(chunk), around[0], (f, 1))
        self._check_frames(total)

    def _margins(self, part: nn.Module) -> list[Margins]:
        """Latents around a window that decide its values, along time, height and width. ValueError where all do."""
        if self.config.norm == "group":
            raise ValueError("norm group: a token depends on the whole clip; encode and decode it at once")
        if self.config.padding == "circular" and part is self.encoder:
            raise ValueError("padding circular: the first token depends on the last frame; encode the video at once")
        return [margins(layers_of(part, axis)) for axis in range(3)]

    def _tile(self, tile: int | None) -> int | None:
        """A tile's side, from pixels to tokens. ValueError for one that does not divide."""
        s = self.config.spatial_stride
        if tile is not None and (tile < s or tile % s):
            raise ValueError(f"tile {tile}; needs a multiple of {s}")
        return None if tile is None else tile // s

    def check_tile(self, tile: int | None, latents: Sequence[int]) -> None:
        """ValueError where tokens of so many latents (h, w) cannot be decoded in tiles of so many pixels a side."""
        for side, around in zip(latents, self._margins(self.decoder)[1:], strict=True):
            windows(side, self._tile(tile), around, self.config.spatial_stride)

    def _check(self, video: Tensor) -> None:
        self._check_frames(video.shape[2])
        self._check_size(video)
        least = _LEAST[self.config.padding]
        if any(side // by < least for side, by in zip(video.shape[2:], self.config.downsample, strict=True)):
            t, h, w = (by * least for by in self.config.downsample)
            shape = "x".join(map(str, video.shape[2:]))
            raise ValueError(f"video is {shape}; padding {self.config.padding} needs {t}x{h}x{w} or more")

    def _check_frames(self, frames: int) -> None:
        f = self.config.temporal_stride
        if frames < 1 or frames % f:
            below = max(f, frames_of(latent_groups(frames, f, f), f, f))
            raise ValueError(f"video has {frames} frames; VQGAN needs {f}n (e.g. {below} or {below + f})")

    def _check_size(self, video: Tensor) -> None:
        if video.shape[1] != (channels := self.config.channels):
            raise ValueError(f"video has {video.shape[1]} channels; this model needs {channels}")
        height, width, space = *video.shape[3:], self.config.spatial_stride
        if height % space or width % space or not height * width:
            raise ValueError(f"video is {height}x{width}; VQGAN needs height and width in multiples of {space}")


def _certain(z: Tensor) -> Posterior:
    return Posterior(z, torch.full_like(z, -30.0))


def _positive(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; needs to be at least 1")
    return chunk
