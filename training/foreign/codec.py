"""A video autoencoder of diffusers as a codec of ours: `ForeignCodec`.

Its latents are in the space of its pipeline's transformer: `encode` normalises, `decode` takes that back. What differs
between the classes is in `codec_rows`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from torch import Tensor, nn

from longtake.training.foreign.codec_rows import ROWS, is_block
from longtake.training.foreign.library import class_of
from longtake.training.foreign.ways import Causal, Tiling, Way
from longtake.training.models.common.autoencoder import LatentPadding, VideoAutoencoder, positive
from longtake.training.models.common.codec import Posterior
from longtake.training.models.common.recompute import Share, called_as_marked, mark
from longtake.training.models.common.streaming import regroup

_DECODES = ("decoder.", "post_quant_conv.")  # names of what no latent depends on
_STATISTICS = ("latents_mean", "latents_std")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class CodecConfig(BaseModel):
    """A video autoencoder of diffusers.

    class_name                 AutoencoderKLWan, AutoencoderKLLTXVideo, AutoencoderKLHunyuanVideo, or AutoencoderKL, which
                               encodes frame by frame
    settings                   its config.json, without the names that begin with "_"
    activation_checkpointing   share of the res blocks that the backward pass recomputes, true is all: less memory, more time
    padding                    of one that was trained to predict, in place of unseen latents: a learned `token`, or `noise`
                               from N(0, 1); null: it does not predict
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_name: str
    settings: dict[str, Any]
    activation_checkpointing: Share = False
    padding: Literal["token", "noise"] | None = None

    @field_validator("class_name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ROWS:
            raise ValueError(f"{name[:80]} is no video autoencoder that longtake knows; it knows {', '.join(ROWS)}")
        return name

    @field_validator("settings")
    @classmethod
    def _plain(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            plain: dict[str, Any] = json.loads(json.dumps(settings))  # lists for tuples, as in a file
        except (TypeError, ValueError) as e:
            raise ValueError(f"settings: are not what a config.json can hold ({e})") from e
        return plain

    @model_validator(mode="after")
    def _strides_fit(self) -> CodecConfig:
        try:
            strides = self._strides
        except TypeError as e:
            raise ValueError(f"settings: not those of a {self.class_name} ({e})") from e
        if any(type(stride) is not int or stride < 1 for stride in strides):
            raise ValueError(f"settings: strides and channels of {self.class_name} would be {strides}")
        self._check_statistics()
        return self

    def _check_statistics(self) -> None:
        """ValueError for statistics by which latents cannot be normalised: a transformer would get others in silence."""
        for key in _STATISTICS:
            values = self.settings.get(key)
            required = key in self.settings and self.class_name == "AutoencoderKLWan"  # whose latents have them always
            if (required or values is not None) and not (
                isinstance(values, list)
                and len(values) == self.latent_channels
                and all(_finite(value) and (key == "latents_mean" or value > 0) for value in values)
            ):
                above = "" if key == "latents_mean" else " above 0"
                raise ValueError(f"settings: {key} must be a list of {self.latent_channels} finite numbers{above}")
        scale, shift = self.settings.get("scaling_factor", 1.0), self.settings.get("shift_factor") or 0.0
        if not _finite(scale) or scale <= 0 or not _finite(shift):
            raise ValueError("settings: scaling_factor must be a number above 0, and shift_factor finite")

    @property
    def _strides(self) -> tuple[int, int, int]:
        return ROWS[self.class_name].strides(self.settings)

    @property
    def temporal_stride(self) -> int:
        """Frames of one latent group after the first."""
        return self._strides[0]

    @property
    def first_frames(self) -> int:
        """Frames of the first latent group."""
        return 1

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a latent position."""
        return self._strides[1]

    @property
    def latent_channels(self) -> int:
        return self._strides[2]


class Encoder(NamedTuple):
    """What the latents of a codec depend on (see `datasets.latents.encoder_digest`)."""

    codec: ForeignCodec

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters and buffers but for the decoder's, fp32 however they are stored; the class and its settings as bytes."""
        config = self.codec.config
        named = json.dumps([config.class_name, config.settings], sort_keys=True).encode()
        tensors = self.codec.net.state_dict().items()
        state = {name: value.float() for name, value in tensors if not name.startswith(_DECODES)}
        return state | {"config.json": torch.frombuffer(bytearray(named), dtype=torch.uint8)}


class ForeignCodec(VideoAutoencoder):
    """Video `(B, 3, T, H, W)` in [-1, 1], T = 1 + f n <-> latent `(B, C, 1 + n, H/s, W/s)` of a transformer of its pipeline.

    Strides are those of its config. Inputs are cast to the dtype of the weights; outputs have it. None of the classes keeps
    a part of it in fp32; statistics of latents stay in it, and normalising is done in it.
    """

    kind = "foreign_vae"

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.what = config.class_name
        self.net: Any = class_of(config.class_name).from_config(config.settings)
        self.padding = LatentPadding(config.latent_channels, config.padding) if config.padding else None
        mark(config.activation_checkpointing, self.net.modules())
        if config.activation_checkpointing and self.net._supports_gradient_checkpointing:
            self.net.enable_gradient_checkpointing(called_as_marked)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.net.encoder.parameters()).dtype
        return dtype

    @property
    def encoder(self) -> Encoder:
        return Encoder(self)

    def encode(self, video: Tensor, tile: int | None = None, overlap: int = 64) -> Posterior:
        """The posterior of a clip or of any prefix of 1 + f n frames, normalised. ValueError for other shapes.

        `tile` encodes large frames in squares of `tile` pixels a side that share at least `overlap`, both multiples of the
        stride. That bounds memory; latents are the same away from the squares' borders and blended where they overlap.
        """
        self._check(video)
        tiling: Tiling = (*self._tiling(tile, overlap), self._down)
        if torch.is_grad_enabled():
            return self._posterior(self._ways[0].once(video.to(self.dtype), tiling))
        pieces = regroup([video], 1, self.config.temporal_stride)
        return self._posterior(torch.cat(list(self._ways[0].stream(map(self._cast, pieces), tiling)), dim=2))

    def decode(self, latent: Tensor, tile: int | None = None, overlap: int = 64) -> Tensor:
        """The video of a normalised latent, not clamped to [-1, 1]; `tile` and `overlap` in pixels as in `encode`."""
        tiling: Tiling = (*self._tiling(tile, overlap), self._down[::-1])
        if torch.is_grad_enabled():
            return self._ways[1].once(self._denormalised(latent), tiling)
        pieces = regroup([latent], 1, 1)
        return torch.cat(list(self._ways[1].stream(map(self._denormalised, pieces), tiling)), dim=2)

    def encode_stream(
        self, chunks: Iterable[Tensor], chunk: int = 4, tile: int | None = None, overlap: int = 64
    ) -> Iterator[Posterior]:
        """`encode` of a video of any length in pieces, equal to encoding it at once. No gradients.

        The chunks are `(B, 3, any, H, W)` in [-1, 1] and make 1 + f n frames. The first posterior has one latent, the next
        ones `chunk`, the last the rest. Memory is constant, but for an encoder of LTX that is not causal. ValueError for
        frames of a wrong size and, after all whole groups, for a tail that makes no latent.
        """
        pieces = map(self._cast, self._whole_groups(chunks, chunk))
        moments = self._ways[0].stream(pieces, (*self._tiling(tile, overlap), self._down))
        for part in regroup(moments, 1, chunk):
            yield self._posterior(part)

    def decode_stream(
        self, latents: Iterable[Tensor], chunk: int = 4, tile: int | None = None, overlap: int = 64
    ) -> Iterator[Tensor]:
        """`decode` of latents `(B, C, any, h, w)` of any length in pieces, equal to decoding them at once. No gradients.

        The first chunk is one frame, the next ones f times `chunk`, the last the rest. Memory is constant. The decoder of LTX
        looks ahead: its frames come as many latents later as that needs.
        """
        pieces = map(self._denormalised, regroup(latents, 1, positive("chunk", chunk)))
        frames = self._ways[1].stream(pieces, (*self._tiling(tile, overlap), self._down[::-1]))
        yield from regroup(frames, 1, chunk * self.config.temporal_stride)

    @property
    def immediate(self) -> bool:
        """Whether a stream gives what each piece stands for as soon as it has it."""
        return all(isinstance(way, Causal) for way in self._ways)

    def freeze_encoder(self) -> None:
        for name, parameter in self.net.named_parameters():
            if not name.startswith(_DECODES):
                parameter.requires_grad_(False)

    def blocks(self) -> Iterator[nn.Module]:
        """Res blocks and attentions, each once: the modules worth compiling in place with `nn.Module.compile`."""
        return filter(is_block, self.modules())

    @property
    def _ways(self) -> tuple[Way, Way]:
        return ROWS[self.config.class_name].ways(self.net)

    def _posterior(self, moments: Tensor) -> Posterior:
        mean, logvar = moments.float().chunk(2, dim=1)
        shift, factor = self._normalising(mean.device)
        mean, logvar = (mean - shift) * factor, logvar.clamp(-30.0, 20.0) + 2 * factor.log()
        return Posterior(mean.to(moments.dtype), logvar.to(moments.dtype))

    def _denormalised(self, latent: Tensor) -> Tensor:
        shift, factor = self._normalising(latent.device)
        return (latent.float() / factor + shift).to(self.dtype)

    def _normalising(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean of the class's latents, and the factor that gives what is left the variance that a transformer needs."""
        mean, std, scale = ROWS[self.config.class_name].statistics(self.net)
        shift, spread = (torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 1, 1) for x in (mean, std))
        return shift.to(device, non_blocking=True), (scale / spread).to(device, non_blocking=True)

    def _cast(self, video: Tensor) -> Tensor:
        return video.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # the statistics stay fp32 when the weights are cast, as those of a `common.statistics.Normalising`
        before = {name: value for name, value in self.net.named_buffers() if name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self.net, name)
            if now.dtype != value.dtype:
                setattr(self.net, name, value.to(now.device))
        return self
