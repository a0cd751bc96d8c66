"""The sizes of what a training learns from, before it runs: of columns that are there, or that a recipe will make.

UserErrors say which stage must run first.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from longtake.datasets import compact, storage
from longtake.datasets.errors import UserError
from longtake.datasets.latents import read_latents
from longtake.datasets.loader.window import CHANCES
from longtake.datasets.text import Text, read_text
from longtake.datasets.tokens import read_tokens
from longtake.training import data
from longtake.training.fit import Source, made_by, module_of
from longtake.training.live.config import LiveConfig, live_of
from longtake.training.live.record import sides_of
from longtake.training.objective import Batch


class Window(NamedTuple):
    """A window of video or latents: channels and (T, H, W). `encoder` has made latents, with this `codec`; None for pixels."""

    channels: int
    shape: tuple[int, int, int]
    encoder: Source | None = None
    codec: Any = None

    def batch(self, count: int, column: str = "latent") -> Batch:
        """So many windows, as a loader gives them."""
        if self.encoder is None:
            return {"video": torch.zeros(count, 3, *self.shape, dtype=torch.uint8), "key": [""] * count}
        return {column: torch.zeros(count, 2, self.channels, *self.shape, dtype=torch.float16), "key": [""] * count}


def window_of(config: Any, inputs: Mapping[str, Source], field: str = "latents") -> Window:
    """The window of a prior with `frames`: of the latents that it names or makes live, or of pixels of its `size`."""
    if live := live_of(config):
        codec = made_by(inputs["encoder"])
        height, width = _live_positions(live, inputs["dataset"], codec.spatial_stride)
        frames = 1 + (config.frames - codec.first_frames) // codec.temporal_stride
        return Window(codec.latent_channels, (frames, height, width), inputs["encoder"], codec)
    if field not in inputs:
        return Window(3, (config.frames, *config.size))
    latents = inputs[field]
    encoder = encoder_of(latents, "latents")
    codec = made_by(encoder)
    height, width = _positions_of(latents, codec.spatial_stride)
    frames = 1 + (config.frames - codec.first_frames) // codec.temporal_stride
    return Window(codec.latent_channels, (frames, height, width), encoder, codec)


def encoder_of(column: Source, what: Literal["latents", "tokens"]) -> Source:
    """What makes, or has made, a column."""
    if column.config is not None:
        return column.inputs["encoder"]
    uri = read_latents(column.uri).encoder["uri"] if what == "latents" else read_tokens(column.uri).model["uri"]
    return Source(None, None, uri, {})


def _positions_of(latents: Source, stride: int) -> tuple[int, int]:
    """Height and width of the largest latents, in positions."""
    if storage.exists(storage.join(latents.uri, "latents.json")):
        record = read_latents(latents.uri)
        sides = sides_of(record)
        height, width = sides[sides.prod(1).argmax()].tolist()
        return height, width
    if latents.config.size is None:
        raise UserError("latents: their stage has no size, so they are as large as the clips; run it first")
    height, width = (side // (stride * by) for side, by in zip(latents.config.size, latents.config.shrink, strict=True))
    return height, width


def _live_positions(live: LiveConfig, dataset: Source, stride: int) -> tuple[int, int]:
    """Height and width of the largest live latents, in positions."""
    if live.size is not None:
        return live.size[0] // stride, live.size[1] // stride
    if not storage.exists(storage.join(dataset.uri, "dataset.json")):
        raise UserError("live.size: is that of the clips, which is known when the `shard` stage has run; run it first")
    clips = compact.open_split(dataset.uri, "train")[1]
    sides = np.stack([clips[name].to_numpy() // stride for name in ("height", "width")], 1)
    height, width = sides[sides.prod(1).argmax()].tolist()
    return height, width


def beside(config: Any, encoder: Source) -> tuple[nn.Module, ...]:
    """The models on the device beside one of latents: what decodes samples, and what encodes where latents are live."""
    return tuple(module_of(encoder) for _ in range(2 if live_of(config) else 1))


def frame_rate(dataset: Source) -> float:
    """Frames a second of a dataset's clips."""
    clip = getattr(dataset.config, "clip", None)
    return float(clip.fps) if clip is not None else data.frame_rate(dataset.uri, 1)


def text_of(inputs: Mapping[str, Source]) -> Text | None:
    """The record of the texts that a stage names, if it does."""
    if "text" not in inputs:
        return None
    if not storage.exists(storage.join(inputs["text"].uri, "text.json")):
        raise UserError("text: how wide its states are is known when its `cache_text` stage has run; run it first")
    return read_text(inputs["text"].uri)


def classes_of(config: Any, inputs: Mapping[str, Source]) -> int:
    """The number of labels that a stage learns."""
    if not config.classes:
        return 0
    dataset = inputs["dataset"].uri
    if not storage.exists(storage.join(dataset, "dataset.json")):
        raise UserError("classes: a dataset's labels are known when its `shard` stage has run; run it first")
    return len(data.loader(config, {"dataset": dataset}, "train", columns=("label",), batch=1).classes)


def said(model: Any, count: int) -> Batch:
    """What is said of a batch of a model with classes and texts, as long as they may be, as a loader gives it."""
    batch: Batch = {"chances": torch.rand(count, CHANCES, dtype=torch.float64)}
    if model.classes:
        batch["label"] = torch.zeros(count, dtype=torch.int64)
    if model.text_width:
        batch["text"] = torch.zeros(count, model.text_length, model.text_width, dtype=torch.bfloat16)
        batch["text_mask"] = torch.ones(count, model.text_length, dtype=torch.bool)
    return batch


class TokenWindow(NamedTuple):
    """A window of tokens: number of codes, and (T, H, W)."""

    codes: int
    shape: tuple[int, int, int]


def tokens_of(tokens: Source) -> TokenWindow:
    """The windows of a column of tokens."""
    if storage.exists(storage.join(tokens.uri, "tokens.json")):
        record = read_tokens(tokens.uri)
        return TokenWindow(record.codes, record.shape)
    vqgan = made_by(encoder_of(tokens, "tokens"))
    if not hasattr(vqgan, "spatial_stride"):
        raise UserError("audio_tokens: their shape is known when their `cache_tokens` stage has run; run it first")
    height, width = (side // vqgan.spatial_stride for side in tokens.config.size)
    return TokenWindow(vqgan.codes, (tokens.config.frames // vqgan.temporal_stride, height, width))
