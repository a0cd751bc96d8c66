"""The body of MAVIN as the paper has it: ModelScope's 3D U-Net, laid out as `UNet3DConditionModel` of diffusers.

Parameters have that class's names, so that its weights can be taken as they are. Frames go through the convolutions over
space one by one; between those, a convolution over time follows each residual block and attention over time each one over
space. What is not in that class: each latent may have its own time, and the length of the gap goes the way of the time, by
`time_embedding.cond_proj`, which the class has for other purposes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError
from longtake.training.models.common.dit import attention, sincos
from longtake.training.models.common.recompute import called, chosen
from longtake.training.models.mavin.config import MavinConfig

_FIELDS = {  # of MavinConfig, as a public config.json names them
    "layers": "layers_per_block",
    "cross_width": "cross_attention_dim",
    "head_width": "attention_head_dim",
    "groups": "norm_num_groups",
    "channels": "in_channels",
}
_STEPS = 1000  # times of the base go from 0 to 999
_HEADS_IN = 8  # of the first attention over time
NEW = ("time_embedding.cond_proj.weight",)  # tensors that a base may lack
_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Attention(nn.Module):
    """Attention of rows `(R, N, D)` to themselves or to others `(R, M, cross)`, of which `seen` `(R, M)` are."""

    def __init__(self, width: int, heads: int, head_width: int, cross: int | None = None) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(cross or width, inner, bias=False)
        self.to_v = nn.Linear(cross or width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, other: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(other), self.to_v(other))
        )
        if seen is None:
            mixed = attention(query, key, value)
        else:
            # a softmax over nothing is NaN: who sees nothing sees all, and then gets zero
            some = seen.any(-1)[:, None, None, None]
            mask = seen[:, None, None] | ~some
            mixed = torch.where(some, F.scaled_dot_product_attention(query, key, value, mask), 0.0)
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    """A linear map whose one half gates the other."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Up to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class TransformerBlock(nn.Module):
    """Attention to themselves, attention to others or once more to themselves, and a feed-forward map, of rows `(R, N, D)`."""

    def __init__(self, width: int, heads: int, head_width: int, cross: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, head_width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, head_width, cross)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, other: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), other, seen)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class _Transformer(nn.Module):
    def __init__(self, channels: int, heads: int, head_width: int, groups: int, cross: int | None) -> None:
        super().__init__()
        inner = heads * head_width
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, head_width, cross)])
        self.proj_out = nn.Linear(inner, channels)


class SpatialTransformer(_Transformer):
    """Attention among the positions of each frame, and of these to tokens: `(B, C, T, h, w)`."""

    def forward(self, x: Tensor, tokens: Tensor, seen: Tensor | None) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        rows = self.proj_in(self.norm(frames).flatten(2).transpose(1, 2))
        count = x.shape[2]
        tokens = tokens.repeat_interleave(count, dim=0)
        seen = None if seen is None else seen.repeat_interleave(count, dim=0)
        rows = self.proj_out(self.transformer_blocks[0](rows, tokens, seen)).transpose(1, 2)
        return x + rows.unflatten(2, x.shape[3:]).unflatten(0, (-1, count)).transpose(1, 2)


class TemporalTransformer(_Transformer):
    """Attention among the frames of each position, twice: `(B, C, T, h, w)`. It knows no order of frames."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        rows = self.norm(x).permute(0, 3, 4, 2, 1).reshape(batch * height * width, frames, -1)
        rows = self.proj_out(self.transformer_blocks[0](self.proj_in(rows)))
        return x + rows.view(batch, height, width, frames, -1).permute(0, 4, 3, 1, 2)


class ResnetBlock(nn.Module):
    """Two convolutions of each frame, between which the time is added: `(B, C, T, h, w)`, `(B, T, D)`."""

    def __init__(self, ins: int, outs: int, control: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, ins, eps=1e-5)
        self.conv1 = nn.Conv2d(ins, outs, 3, padding=1)
        self.time_emb_proj = nn.Linear(control, outs)
        self.norm2 = nn.GroupNorm(groups, outs, eps=1e-5)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(ins, outs, 1) if ins != outs else None

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        count, x = x.shape[2], _frames(x)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(control)).flatten(0, 1)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return _video(hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x)), count)


class TemporalConv(nn.Module):
    """Four convolutions over time; starts as the identity. `(B, C, T, h, w)`."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        for number in range(1, 5):
            dropout = [] if number == 1 else [nn.Dropout(0.1)]
            conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
            self.add_module(f"conv{number}", nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), *dropout, conv))
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for conv in self.children():
            hidden = conv(hidden)
        return x + hidden


class Sampler(nn.Module):
    """Halve or, with `up`, double the sides of each frame."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        count, x = x.shape[2], _frames(x)
        if self.up:
            x = F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")
        return _video(self.conv(x), count)


class Level(nn.Module):
    """The layers of one level of the U-Net: residual block, convolution over time, attention over space and over time."""

    def __init__(
        self, config: MavinConfig, ins: list[int], outs: int, attends: bool, sampler: str = "", middle: bool = False
    ) -> None:
        super().__init__()
        control, groups = 4 * config.widths[0], config.groups
        self.middle = middle
        self.resnets = nn.ModuleList(ResnetBlock(each, outs, control, groups) for each in ins)
        self.temp_convs = nn.ModuleList(TemporalConv(outs, groups) for _ in ins)
        heads, count = outs // config.head_width, len(ins) - middle if attends else 0
        shape = (outs, heads, config.head_width, groups)
        self.attentions = nn.ModuleList(SpatialTransformer(*shape, config.cross_width) for _ in range(count))
        self.temp_attentions = nn.ModuleList(TemporalTransformer(*shape, None) for _ in range(count))
        self.sampler_name = sampler
        if sampler:
            self.add_module(sampler, nn.ModuleList([Sampler(outs, sampler == "upsamplers")]))

    def layer(self, number: int, x: Tensor, control: Tensor, tokens: Tensor, seen: Tensor | None) -> Tensor:
        """One layer. In the middle, attention comes between two residual blocks."""
        x = self.temp_convs[number](self.resnets[number](x, control))
        if number < len(self.attentions):
            x = self.temp_attentions[number](self.attentions[number](x, tokens, seen))
        return x

    def sampled(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The input of the next level."""
        out: Tensor = getattr(self, self.sampler_name)[0](x, size)
        return out


class TimeEmbedding(nn.Module):
    """The sines of a time, with the length's added in front, as a control of all residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width)
        self.cond_proj = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(4 * width, 4 * width)
        nn.init.zeros_(self.cond_proj.weight)  # so that a base begins as it was [assumption]

    def forward(self, times: Tensor, length: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(times + self.cond_proj(length))))
        return out


class UNet(nn.Module):
    """Output for inputs `(B, C, T, h, w)` at times `(B, T)`, given the length `(B,)` of the gap and tokens to attend to."""

    def __init__(self, config: MavinConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers, groups = config.widths, config.layers, config.groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.inputs, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.transformer_in = TemporalTransformer(widths[0], _HEADS_IN, config.head_width, groups, None)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for number, width in enumerate(widths):
            ins = [widths[max(0, number - 1)]] + [width] * (layers - 1)
            self.down_blocks.append(Level(config, ins, width, number < last, "downsamplers" if number < last else ""))
            skips += [width] * (layers + (number < last))

        self.mid_block = Level(config, [widths[-1]] * 2, widths[-1], True, middle=True)

        self.up_blocks = nn.ModuleList()
        before = widths[-1]
        for number, width in enumerate(reversed(widths)):
            ins = [(before if n == 0 else width) + skips.pop() for n in range(layers + 1)]
            self.up_blocks.append(Level(config, ins, width, number > 0, "upsamplers" if number < last else ""))
            before = width
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def blocks(self) -> Iterator[nn.Module]:
        """The parts of the levels in order. A level itself is never called, so that compiling it would do nothing."""
        for level in self._levels():
            yield from (*level.resnets, *level.temp_convs, *level.attentions, *level.temp_attentions)

    def _levels(self) -> list[Any]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def forward(
        self, x: Tensor, times: Tensor, length: Tensor, tokens: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        width, frames = self.config.widths[0], x.shape[2]
        # cosines first for the time, sines first for the length
        sines, cosines = sincos(_STEPS * times, width).chunk(2, dim=-1)
        time = torch.cat([cosines, sines], dim=-1).to(self.dtype)
        control = self.time_embedding(time, sincos(length, width).to(self.dtype)[:, None])
        if tokens is None:
            tokens = x.new_zeros(len(x), 1, self.config.cross_width, dtype=self.dtype)

        share = self.config.activation_checkpointing if self.training else 0.0
        count, places = sum(len(level.resnets) for level in self._levels()), itertools.count()

        def layer(level: Any, number: int, hidden: Tensor) -> Tensor:
            again = chosen(share, next(places), count)
            made: Tensor = called(again, level.layer, number, hidden, control, tokens, seen)
            return made

        x = self.transformer_in(_video(self.conv_in(_frames(x.to(self.dtype))), frames))
        skips = [x]
        for level in self.down_blocks:
            for number in range(len(level.resnets)):  # type: ignore[arg-type]
                x = layer(level, number, x)
                skips.append(x)
            if level.sampler_name:
                x = level.sampled(x)  # type: ignore[operator]
                skips.append(x)
        for number in range(len(self.mid_block.resnets)):
            x = layer(self.mid_block, number, x)
        for level in self.up_blocks:
            for number in range(len(level.resnets)):  # type: ignore[arg-type]
                x = layer(level, number, torch.cat([x, skips.pop()], dim=1))
            if level.sampler_name:
                x = level.sampled(x, skips[-1].shape[3:])  # type: ignore[operator]
        return _video(self.conv_out(F.silu(self.conv_norm_out(_frames(x)))), frames)


def _frames(x: Tensor) -> Tensor:
    """`(B, C, T, h, w)` -> `(B T, C, h, w)`."""
    return x.transpose(1, 2).flatten(0, 1)


def _video(x: Tensor, frames: int) -> Tensor:
    """The inverse of `_frames`."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def fields_of_folder(folder: str) -> dict[str, Any]:
    """The fields of MavinConfig that the config.json of a public U-Net gives.

    Raises:
        UserError: there is none, or it is another network than the ones that ours can be.
    """
    path = _inside(folder) / "config.json"
    try:
        described = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"unet: {folder}: has no readable config.json of a U-Net") from e
    if described.get("_class_name") != "UNet3DConditionModel":
        raise UserError(f"unet: {folder}: is a {str(described.get('_class_name'))[:40]}, not a UNet3DConditionModel")
    needed = ("block_out_channels", "down_block_types", "up_block_types", *_FIELDS.values())
    if absent := [name for name in needed if name not in described]:
        raise UserError(f"unet: {folder}: its config.json lacks {absent[0]}; copy the whole model there")
    widths = tuple(described["block_out_channels"])
    usual = {
        "down_block_types": ["CrossAttnDownBlock3D"] * (len(widths) - 1) + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * (len(widths) - 1),
    }
    for name, value in usual.items():
        if list(described[name]) != value:
            raise UserError(f"unet: {folder}: {name} is {described[name]}; this body has {value}")
    return {"body": "unet", "widths": widths} | {ours: described[theirs] for ours, theirs in _FIELDS.items()}


def load_folder(unet: UNet, folder: str) -> None:
    """Take the weights of a public U-Net, all of them; what of ours it lacks begins as nothing.

    Raises:
        UserError: no safetensors are there, or they are of another network.
        Failure: they are damaged.
    """
    path = _inside(folder) / _WEIGHTS
    if not path.is_file():
        raise UserError(f"unet: {folder}: has no {_WEIGHTS}; save it there with safetensors")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as e:
        raise Failure(f"unet: {path}: damaged ({e})") from e
    check_fits(unet.state_dict(), weights, folder)
    with torch.no_grad():
        unet.load_state_dict(weights, strict=False)


def check_fits(ours: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: str) -> None:
    """UserError where weights of a folder have other names or shapes than ours."""
    if unknown := sorted(weights.keys() - ours.keys()):
        raise UserError(f"unet: {folder}: has {unknown[0]}, which this body does not")
    if absent := sorted(ours.keys() - weights.keys() - set(NEW)):
        raise UserError(f"unet: {folder}: lacks {absent[0]}")
    if other := [name for name, value in weights.items() if value.shape != ours[name].shape]:
        has, needs = tuple(weights[other[0]].shape), tuple(ours[other[0]].shape)
        raise UserError(f"unet: {folder}: {other[0]} has shape {has}, this body needs {needs}")


def _inside(folder: str) -> Path:
    path = Path(folder).expanduser()
    return path / "unet" if (path / "unet" / "config.json").is_file() else path
