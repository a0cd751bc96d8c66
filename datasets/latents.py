"""The record of a column of latents: of which dataset, by which encoder, and its statistics.

latents.json, the indexes and their notes call the latents of a clip `steps`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.datasets import index, record, storage
from longtake.datasets.errors import Failure

if TYPE_CHECKING:
    from torch import Tensor

_HEADER = 128  # bytes before the data in a .npy of these shapes


@dataclass(frozen=True)
class Latents:
    """A column of latents. `mean` and `std` (C,) are those of the posterior means over the train split.

    A draw from the posteriors has a standard deviation of sqrt(std² + posterior_std²).
    """

    dataset: str  # URL
    column: str  # for `Loader(columns=...)`: "latent-DIGEST"
    encoder: Mapping[str, Any]  # `uri` of a version; `digest` of its encoder; `model` and its `config`
    channels: int
    factor: int  # frames in a latent after the first
    stride: int  # pixels in a position, in height and width
    size: tuple[int, int] | None  # (height, width) that was encoded; None: each clip's own, cut to whole positions
    precision: str
    dtype: str
    count: int  # positions that the statistics are over
    mean: tuple[float, ...]
    std: tuple[float, ...]
    posterior_std: tuple[float, ...]  # root of the mean posterior variance
    view: str | None  # URL; only the clips that it keeps have latents
    digests: Mapping[str, str]  # of the splits' base shards when this was written (see `compact.Rows`)
    shrink: tuple[int, int] = (1, 1)  # (height, width) factors that the video was scaled down by (see `shrunk`)
    join_seconds: float = 0.0  # longest stream of several clips; 0: every clip is encoded by itself
    live: Mapping[str, Any] | None = None  # how it is encoded while training goes on; None: it is on disk


def write_latents(uri: str, latents: Latents) -> None:
    # without it where there is nothing to say, as ever
    fields = {name: value for name, value in asdict(latents).items() if name != "live" or value is not None}
    record.write(uri, "latents", fields)


def read_latents(uri: str) -> Latents:
    """The record that a `cache_latents` stage has written. Raises UserError, Failure: see `record.read`."""
    return record.read(uri, "latents", "cache_latents", Latents)


def shrunk(video: "Tensor", shrink: tuple[int, int], stride: int) -> "Tensor":
    """(B, C, T, H, W) as it is encoded for a column with this `shrink`: means over boxes of (height, width) pixels.

    Only the top left of the frame that makes whole positions of `stride` pixels is used: where H x W pixels make h x w
    positions, the result makes h // height x w // width, and its position (i, j) has the pixels of those from
    (height * i, width * j) on. Raises ValueError where none is left.
    """
    from torch.nn.functional import avg_pool3d

    if shrink == (1, 1):
        return video
    height, width = (side // (stride * by) * stride * by for side, by in zip(video.shape[-2:], shrink, strict=True))
    if not height or not width:
        raise ValueError(
            f"shrink: {shrink[0]}x{shrink[1]} leaves nothing of {video.shape[-2]}x{video.shape[-1]} pixels"
        )
    return avg_pool3d(video[..., :height, :width], (1, *shrink))


def encoder_digest(model: Any) -> str:
    """A digest of a torch module's encoder. Training only the decoder keeps it, as it keeps the latents."""
    return state_digest(type(model).__name__, model.encoder)


def state_digest(name: str, module: Any) -> str:
    """A digest of a name and of the parameters and buffers of a torch module."""
    import torch

    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Moments:
    """Statistics of `count` values a channel, each (C,)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray  # sum of squared deviations from the mean
    variance: np.ndarray  # mean posterior variance

    def plain(self) -> dict[str, Any]:
        """JSON values, for notes."""
        return {"count": self.count} | {name: getattr(self, name).tolist() for name in ("mean", "m2", "variance")}


def moments(latents: np.ndarray) -> list[Moments]:
    """The statistics of each latent of (L, 2, C, h, w), mean and log-variance, by itself; in float64."""
    wide = latents.astype(np.float64).reshape(*latents.shape[:3], -1)
    mean = wide[:, 0].mean(-1)
    m2 = np.square(wide[:, 0] - mean[..., None]).sum(-1)
    variance = np.exp(wide[:, 1]).mean(-1)
    return [Moments(wide.shape[-1], *row) for row in zip(mean, m2, variance, strict=True)]


def merged(parts: Iterable[Moments]) -> Moments:
    """The statistics of all values. The order of the parts decides the last bits. Raises ValueError where there are none."""
    filled = [part for part in parts if part.count]
    if not filled:
        raise ValueError("no values")
    counts = np.array([part.count for part in filled], np.float64)[:, None]
    total = counts.sum()
    means = np.stack([part.mean for part in filled])
    mean = (counts * means).sum(0) / total
    m2 = np.stack([part.m2 for part in filled]).sum(0) + (counts * np.square(means - mean)).sum(0)
    variance = (counts * np.stack([part.variance for part in filled])).sum(0) / total
    return Moments(int(total), mean, m2, variance)


def read_moments(dataset: str, shard: index.Shard) -> Moments:
    """The statistics in the notes of a shard of latents. Raises Failure where they are damaged."""
    notes = index.read_notes(dataset, shard)
    return Moments(notes["count"], *(np.array(notes[name], np.float64) for name in ("mean", "m2", "variance")))


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for each contradiction in the index of a shard of latents."""
    url = storage.join(dataset, shard.split, f"{shard.name}.parquet")
    remedy = "delete it and run its `cache_latents` stage again"
    try:
        read_moments(dataset, shard)
        for row in shard.table.to_pylist():
            values = row["steps"] * 2 * row["channels"] * row["height"] * row["width"]
            if row["size"] != _HEADER + 2 * values or len(row["step_crc32"]) != 4 * row["steps"]:
                yield f"{url}: {row['key']}: its size is not that of its steps; {remedy}"
                return
    except (Failure, KeyError, TypeError) as e:
        yield str(e) if isinstance(e, Failure) else f"{url}: not an index of latents ({e}); {remedy}"
