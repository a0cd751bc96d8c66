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


class _Seen(NamedTuple):
    """Of one video: `distances` (T + 1), the mean latent (T, C) of each step; of some its latent and frames at its steps."""

    apart: Tensor | None
    pooled: Tensor | None
    latent: Tensor | None
    frames: np.ndarray[Any, Any] | None


class Latents:
    """Latents of one kind of videos, taken in one by one."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._seen: dict[int, _Seen] = {}

    def add(self, number: int, latent: Tensor, video: Callable[[], Tensor]) -> None:
        """Video `number`: its latent (1, C, T, h, w); `video` gives (1, 3, 1 + r (T - 1), H, W) in [-1, 1] if it is shown."""
        part = moments(latent.movedim(1, -1).flatten(0, -2).cpu())
        self._moments = part if self._moments is None else merge([self._moments, part])
        steps, followed = latent.shape[2], number < _PATHS and latent.shape[2] > 1
        shown = video() if number < _SHOWN else None
        self._seen[number] = _Seen(
            distances(latent)[0] if steps > 1 else None,
            latent[0].double().mean((2, 3)).T.cpu() if followed else None,
            None if shown is None else latent.float().cpu(),
            None if shown is None else _at_steps(shown, steps),
        )

    def of_all_ranks(self) -> "Latents":
        """Those of all ranks, of which some may have none. Every rank must call it."""
        whole = Latents()
        whole._moments, whole._seen = gathered_moments(self._moments), united(self._seen)
        return whole

    def temporal_distance(self) -> dict[str, Any] | None:
        """LTD of the videos; None where they have a single step."""
        rows = [seen.apart for seen in self._seen.values() if seen.apart is not None]
        return temporal_distance(torch.stack(rows)) if rows else None


def _at_steps(video: Tensor, steps: int) -> np.ndarray[Any, Any]:
    """The frames (T, H, W, 3) uint8 that latent steps end with."""
    stride = (video.shape[2] - 1) // (steps - 1) if steps > 1 else 1
    return to_pixels(video[0, :, ::stride].permute(1, 2, 3, 0)).cpu().numpy()


def looked_at(kinds: Mapping[str, Latents], folder: Path) -> dict[str, Any]:
    """LTD and paths of each kind, for JSON, and `latents.png` and `paths.png` in `folder`. Every rank must call it.

    Components and plane are those of the first kind, so that all kinds compare.

    Returns:
        `ltd`, by kind as `latent_temporal_distance` gives it, and `paths`, by kind (V, T, 2); both empty where the
        latents have a single step.
    """
    whole = {kind: latents.of_all_ranks() for kind, latents in kinds.items()}
    ltd = {kind: found for kind, some in whole.items() if (found := some.temporal_distance())}
    paths = _paths(whole)
    if place()[0] == 0:
        _draw(whole, folder / "latents.png")
        if paths:
            draw_trajectories(torch.cat(list(paths.values())), folder / "paths.png")
    return {"ltd": ltd, "paths": {kind: some.tolist() for kind, some in paths.items()}}


def series(found: Mapping[str, Any]) -> dict[str, Points]:
    """The curves of `looked_at` by interval, by the names of metrics; those of the kinds after the first with its name."""
    curves = dict[str, Points]()
    for number, (kind, ltd) in enumerate(found["ltd"].items()):
        for name in ("raw", "normalised"):
            curves[f"ltd_{name}" + (f"_{kind}" if number else "")] = list(enumerate(ltd[name], 1))
    return curves


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `looked_at`, by the names of metrics."""
    names = ("rising", "spearman", "curve_roughness", "path_roughness")
    return {
        f"ltd_{name}" + (f"_{kind}" if number else ""): ltd[name]
        for number, (kind, ltd) in enumerate(found["ltd"].items())
        for name in names
    }


def _paths(whole: Mapping[str, Latents]) -> dict[str, Tensor]:
    """(V, T, 2) of each kind, in the plane of the first one's two strongest components."""
    pooled = {kind: [s.pooled for s in some._seen.values() if s.pooled is not None] for kind, some in whole.items()}
    first = next(iter(pooled.values()))
    if not first or first[0].shape[1] < 2:
        return {}
    plane = components(moments(torch.cat(first)), 2)
    return {kind: torch.stack([plane.project(one) for one in some]) for kind, some in pooled.items() if some}


def _draw(whole: Mapping[str, Latents], file: Path) -> None:
    """For some videos of each kind two rows: the frames at the latent steps, and below them the latents as colours."""
    from PIL import Image

    first = next(iter(whole.values()))
    assert first._moments
    if len(first._moments.mean) < 3 or first._moments.count < 2:
        return
    pca = components(first._moments, 3)
    rows: list[Sequence[np.ndarray[Any, Any]]] = []
    for some in whole.values():
        for seen in some._seen.values():
            if seen.latent is not None and seen.frames is not None:
                rows += [list(seen.frames), list(pca_pictures(seen.latent, pca)[0].numpy())]
    height, width = rows[0][0].shape[:2]
    cell = (round(_CELL * width / height), _CELL)
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (cell[0] + _GAP) - _GAP, len(rows) * (cell[1] + _GAP) - _GAP), "#ffffff")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            how = Image.Resampling.NEAREST if y % 2 else Image.Resampling.BICUBIC
            sheet.paste(Image.fromarray(picture).resize(cell, how), (x * (cell[0] + _GAP), y * (cell[1] + _GAP)))
    sheet.save(file)
