"""Latents to look at: how far they move apart in time, as colours beside their frames, and as paths through a plane."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import to_pixels
from longtake.training.metrics.distance import Moments, gathered_moments, merge, moments
from longtake.training.metrics.latents import components, distances, draw_trajectories, pca_pictures, temporal_distance
from longtake.training.metrics.share import place, united

Points = list[tuple[int, float]]  # of a curve

_SHOWN = 4  # videos of a kind in the picture
_PATHS = 32  # and as paths
_CELL, _GAP = 80, 2  # pixels


class _Video(NamedTuple):
    """One video's `distances` (T + 1) and mean latents (T, C); to be shown, also its latents and the frames at them."""

    distances: Tensor | None
    pooled: Tensor | None
    latent: Tensor | None
    frames: np.ndarray[Any, Any] | None


class Latents:
    """Latents of one kind of videos, taken in one by one."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._videos: dict[int, _Video] = {}

    def add(self, number: int, latent: Tensor, video: Callable[[], Tensor]) -> None:
        """Video `number`: its latent (1, C, T, h, w); `video` gives (1, 3, 1 + r (T - 1), H, W) in [-1, 1] if it is shown."""
        part = moments(latent.movedim(1, -1).flatten(0, -2).cpu())
        self._moments = part if self._moments is None else merge([self._moments, part])
        count, has_path = latent.shape[2], number < _PATHS and latent.shape[2] > 1
        shown = video() if number < _SHOWN else None
        self._videos[number] = _Video(
            distances(latent)[0] if count > 1 else None,
            latent[0].double().mean((2, 3)).T.cpu() if has_path else None,
            None if shown is None else latent.float().cpu(),
            None if shown is None else _frames_at_latents(shown, count),
        )

    def of_all_ranks(self) -> "Latents":
        """The latents of all ranks; a rank may have none. Every rank must call it."""
        total = Latents()
        total._moments, total._videos = gathered_moments(self._moments), united(self._videos)
        return total

    def temporal_distance(self) -> dict[str, Any] | None:
        """LTD of the videos; None where they have a single latent."""
        rows = [video.distances for video in self._videos.values() if video.distances is not None]
        return temporal_distance(torch.stack(rows)) if rows else None


def _frames_at_latents(video: Tensor, count: int) -> np.ndarray[Any, Any]:
    """The last frame (H, W, 3) of each of `count` latents, uint8 `(T, H, W, 3)`."""
    stride = (video.shape[2] - 1) // (count - 1) if count > 1 else 1
    return to_pixels(video[0, :, ::stride].permute(1, 2, 3, 0)).cpu().numpy()


def looked_at(kinds: Mapping[str, Latents], folder: Path) -> dict[str, Any]:
    """LTD and paths of each kind, for JSON, and `latents.png` and `paths.png` in `folder`. Every rank must call it.

    Components and plane are those of the first kind, so that all kinds compare.

    Returns:
        `ltd`, by kind as `latent_temporal_distance` gives it, and `paths`, by kind (V, T, 2); both empty where the
        videos have a single latent.
    """
    total = {kind: latents.of_all_ranks() for kind, latents in kinds.items()}
    ltd = {kind: distance for kind, latents in total.items() if (distance := latents.temporal_distance())}
    paths = _paths(total)
    if place()[0] == 0:
        _draw(total, folder / "latents.png")
        if paths:
            draw_trajectories(torch.cat(list(paths.values())), folder / "paths.png")
    return {"ltd": ltd, "paths": {kind: path.tolist() for kind, path in paths.items()}}


def series(results: Mapping[str, Any]) -> dict[str, Points]:
    """The curves of `looked_at` by interval, by the names of metrics; those of the kinds after the first with its name."""
    curves = dict[str, Points]()
    for number, (kind, ltd) in enumerate(results["ltd"].items()):
        for name in ("raw", "normalised"):
            curves[f"ltd_{name}" + (f"_{kind}" if number else "")] = list(enumerate(ltd[name], 1))
    return curves


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `looked_at`, by the names of metrics."""
    names = ("rising", "spearman", "curve_roughness", "path_roughness")
    return {
        f"ltd_{name}" + (f"_{kind}" if number else ""): ltd[name]
        for number, (kind, ltd) in enumerate(results["ltd"].items())
        for name in names
    }


def _paths(kinds: Mapping[str, Latents]) -> dict[str, Tensor]:
    """(V, T, 2) of each kind, in the plane of the first one's two strongest components."""
    pooled = {
        kind: [v.pooled for v in latents._videos.values() if v.pooled is not None] for kind, latents in kinds.items()
    }
    first = next(iter(pooled.values()))
    if not first or first[0].shape[1] < 2:
        return {}
    plane = components(moments(torch.cat(first)), 2)
    return {kind: torch.stack([plane.project(row) for row in rows]) for kind, rows in pooled.items() if rows}


def _draw(kinds: Mapping[str, Latents], file: Path) -> None:
    """A picture with two rows for each of some videos of a kind: the frames at the latents, and the latents as colours."""
    from PIL import Image

    first = next(iter(kinds.values()))
    assert first._moments
    if len(first._moments.mean) < 3 or first._moments.count < 2:
        return
    pca = components(first._moments, 3)
    rows: list[Sequence[np.ndarray[Any, Any]]] = []
    for latents in kinds.values():
        for video in latents._videos.values():
            if video.latent is not None and video.frames is not None:
                rows += [list(video.frames), list(pca_pictures(video.latent, pca)[0].numpy())]
    height, width = rows[0][0].shape[:2]
    cell = (round(_CELL * width / height), _CELL)
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (cell[0] + _GAP) - _GAP, len(rows) * (cell[1] + _GAP) - _GAP), "#ffffff")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            resampling = Image.Resampling.NEAREST if y % 2 else Image.Resampling.BICUBIC
            sheet.paste(Image.fromarray(picture).resize(cell, resampling), (x * (cell[0] + _GAP), y * (cell[1] + _GAP)))
    sheet.save(file)
