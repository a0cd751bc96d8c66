"""A model whose tokens are known: brightness in boxes, against the mean of the whole window. Also a kind of model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn
from torch.nn.functional import avg_pool3d

from longtake.datasets import clip, compact, index, schema, storage, view
from longtake.datasets import tokens as records
from longtake.datasets.loader import to_model
from longtake.pipeline import windows
from longtake.pipeline.column import by_shard
from longtake.pipeline.tokens import make_tokens
from longtake.training import models
from longtake.training.models.kind import Kind
from longtake.training.registry import disk

models.KINDS["tiny_codes"] = "tiny_codes"


class CodesConfig(BaseModel):
    codes: int = 64
    temporal_stride: int = 4
    spatial_stride: int = 8


class Codes(nn.Module):
    """Codes count brightness, so that any pixel and any frame changes all tokens of its window."""

    def __init__(self, config: CodesConfig) -> None:
        super().__init__()
        self.config = config
        self.contrast = nn.Parameter(torch.tensor(3.0))
        self.batches: list[int] = []

    def tokens(self, video: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(video))
        stride = (self.config.temporal_stride, self.config.spatial_stride, self.config.spatial_stride)
        boxes = avg_pool3d(video.double().mean(1), stride)
        boxes = (boxes - boxes.mean((1, 2, 3), keepdim=True)) * self.contrast
        codes = self.config.codes
        return ((boxes.clamp(-1, 1) + 1) / 2 * codes).long().clamp(0, codes - 1)


def kind(facts: Mapping[str, Any]) -> Kind:
    return Kind("Codes", CodesConfig, Codes, "tiny_codes")


def codes(contrast: float = 3.0, **config: int) -> Codes:
    model = Codes(CodesConfig(**config)).eval()
    nn.init.constant_(model.contrast, contrast)
    return model


def saved(model: Codes, path: Path) -> str:
    """The model as a model folder."""
    disk.save(path, "tiny_codes", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return str(path)


def settings(**changed: Any) -> windows.Settings:
    usual = {"frames": 4, "stride": 1, "hop": 4, "size": (16, 16), "batch": 3, "threads": 2}
    return windows.Settings(**usual | changed)


def cache(root: str, model: Codes, chosen: windows.Settings, kept: str | None = None) -> tuple[str, dict[str, int]]:
    """What the stage does, in this process and in turn. Returns the column's name, and what was counted."""
    coding = windows.coding_of(model, "here", chosen)
    name = windows.column_name(records.model_digest(model), chosen, kept or "")
    totals: dict[str, int] = {}
    for split in schema.SPLITS:
        base, _ = compact.open_split(root, split)
        for shard, keep in by_shard(base, view.kept(base, kept)[0]).items():
            counts = make_tokens(model, coding, chosen, root, split, shard, name, keep)
            totals = {key: totals.get(key, 0) + value for key, value in counts.items()}
    return name, totals


def record(folder: Path, root: str, model: Codes, chosen: windows.Settings, uri: str = "here") -> str:
    """A column, and the output of the stage that has made it."""
    name, _ = cache(root, model, chosen)
    coding = windows.coding_of(model, uri, chosen)
    counts = sum(records.read_counts(root, shard) for shard in index.read_shards(root, "train", name))
    usage, entropy = records.statistics(np.asarray(counts))
    records.write_tokens(
        str(folder),
        records.Tokens(
            dataset=root,
            column=name,
            model={"uri": uri, "digest": records.model_digest(model), "config": model.config.model_dump()},
            codes=coding.codes,
            frames=chosen.frames,
            stride=chosen.stride,
            hop=chosen.hop,
            size=chosen.size,
            shape=coding.shape,
            view=None,
            digests={split: compact.open_split(root, split)[0].digest for split in schema.SPLITS},
            usage=usage,
            entropy=entropy,
            of=coding.of,
        ),
    )
    return str(folder)


def clips(root: str, size: tuple[int, int], split: str = "train") -> Iterator[tuple[str, np.ndarray]]:
    """All clips as large as `size`: keys and all frames (T, H, W, 3), scaled and cropped."""
    for row in index.read_all(root, split).to_pylist():
        if row["height"] >= size[0] and row["width"] >= size[1]:
            tar = storage.join(root, split, f"{row['shard']}.tar")
            mp4 = storage.read_range(tar, row["mp4_offset"], row["mp4_size"])
            numbers = range(row["frame_count"])
            frames = clip.fitted(mp4, (row["height"], row["width"]), numbers, size, row["key"])
            yield row["key"], np.stack(list(frames))


def at_once(model: Codes, video: np.ndarray, start: int, chosen: windows.Settings) -> np.ndarray:
    """The tokens (t, h, w) of the window that begins at frame `start` of (T, H, W, 3)."""
    window = video[start : start + chosen.span : chosen.stride]
    assert len(window) == chosen.frames
    with torch.no_grad():
        return model.tokens(to_model(torch.from_numpy(window).permute(3, 0, 1, 2)[None]))[0].numpy()
