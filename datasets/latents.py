"""What a stage that caches latents leaves behind: which column of which dataset, by which encoder, and its statistics."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.datasets import index, storage
from longtake.datasets.errors import Failure, UserError

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = 1
_FILE = "latents.json"
_HEADER = 128  # bytes that a .npy of these shapes has before its data


@dataclass(frozen=True)
class Latents:
    """A column of latents. `mean` and `std` (C,) are of the posterior means over the train split.

    A draw from the posteriors has a standard deviation of sqrt(std² + posterior_std²).
    """

    dataset: str  # URL
    column: str  # for `Loader(columns=...)`: "latent-DIGEST"
    encoder: Mapping[str, Any]  # `uri`, of a version; `digest`, of what encodes; `model` and its `config`
    channels: int
    factor: int  # frames in a step after the first
    stride: int  # pixels in a position, each way
    size: tuple[int, int] | None  # (height, width) that was encoded; None: each clip's own, to whole positions
    precision: str
    dtype: str
    count: int  # positions that the statistics are over
    mean: tuple[float, ...]
    std: tuple[float, ...]
    posterior_std: tuple[float, ...]  # root of the mean posterior variance
    view: str | None  # URL; its kept clips alone have latents
    digests: Mapping[str, str]  # of the splits' base shards when this was written (see `compact.Rows`)
    shrink: tuple[int, int] = (1, 1)  # (height, width) factors that the video was scaled down by (see `shrunk`)
    join_seconds: float = 0.0  # of one stream, at most; 0: every clip is encoded by itself


def write_latents(uri: str, latents: Latents) -> None:
    storage.write(storage.join(uri, _FILE), storage.canonical_json({"format": _FORMAT, **asdict(latents)}))


def read_latents(uri: str) -> Latents:
    """What a `cache_latents` stage has made.

    Raises:
        UserError: nothing such is here, or it is of another format.
        Failure: it is damaged.
    """
    url = storage.join(uri, _FILE)
    try:
        content = json.loads(storage.read(url))
        if (found := content.pop("format")) != _FORMAT:
            raise UserError(
                f"{url}: format {found}, this longtake reads {_FORMAT}; run its `cache_latents` stage again"
            )
        tuples = {name: tuple(content[name]) for name in ("mean", "std", "posterior_std")}
        tuples["shrink"] = tuple(content.get("shrink", (1, 1)))
        # both are outputs of stages, in one workspace perhaps, which may have been moved
        then, now = content["dataset"].rsplit("/", 2)[0], uri.rstrip("/").rsplit("/", 2)[0]
        content |= {name: content[name] and storage.placed(content[name], then, now) for name in ("dataset", "view")}
        return Latents(**content | tuples | {"size": content["size"] and tuple(content["size"])})
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{uri}: no latents here (no {_FILE}); name what a `cache_latents` stage has made") from e
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{url}: damaged ({e}); run its `cache_latents` stage again") from e


def shrunk(video: "Tensor", shrink: tuple[int, int], stride: int) -> "Tensor":
    """What is encoded of (B, C, T, H, W) where a column has this `shrink`: means over boxes of (height, width) pixels.

    The top left of the frame is taken that makes whole positions of `stride` pixels: where H x W pixels make h x w
    positions, these are h // height x w // width, and position (i, j) is of the pixels of the boxes' positions from
    (height * i, width * j) on. ValueError where none is left.
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
    """Of what encodes in a torch module: one whose decoder alone was trained on has the same, and so the same latents."""
    import torch

    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Moments:
    """Of `count` values a channel: their mean, the sum of squared deviations from it, and the mean posterior variance; (C,)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    variance: np.ndarray

    def plain(self) -> dict[str, Any]:
        return {
            "count": self.count,
            **{name: getattr(self, name).tolist() for name in ("mean", "m2", "variance")},
        }


def moments(steps: np.ndarray) -> list[Moments]:
    """Of each step of (steps, 2, C, h, w), mean and log-variance, by itself; in float64."""
    wide = steps.astype(np.float64).reshape(*steps.shape[:3], -1)
    mean = wide[:, 0].mean(-1)
    m2 = np.square(wide[:, 0] - mean[..., None]).sum(-1)
    variance = np.exp(wide[:, 1]).mean(-1)
    return [Moments(wide.shape[-1], *row) for row in zip(mean, m2, variance, strict=True)]


def merged(parts: Iterable[Moments]) -> Moments:
    """Of all values together. The order of the parts decides the last bits. Raises ValueError where there are none."""
    some = [part for part in parts if part.count]
    if not some:
        raise ValueError("no values")
    counts = np.array([part.count for part in some], np.float64)[:, None]
    total = counts.sum()
    means = np.stack([part.mean for part in some])
    mean = (counts * means).sum(0) / total
    m2 = np.stack([part.m2 for part in some]).sum(0) + (counts * np.square(means - mean)).sum(0)
    variance = (counts * np.stack([part.variance for part in some])).sum(0) / total
    return Moments(int(total), mean, m2, variance)


def read_moments(dataset: str, shard: index.Shard) -> Moments:
    """The statistics that were noted with a shard of latents. Raises Failure where they are damaged."""
    notes = index.read_notes(dataset, shard)
    return Moments(notes["count"], *(np.array(notes[name], np.float64) for name in ("mean", "m2", "variance")))


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for what a shard of latents says of itself that cannot be."""
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
