"""How latents follow time: temporal distance, LTD, with its curve (PV-VAE, arXiv 2605.02134, analysis)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longtake.datasets.errors import UserError
from longtake.training.evaluation import coded
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.means import Curve, Means, Vectors
from longtake.training.evaluation.measures import Measure, of_clips
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics.latents import distances, temporal_distance

_FIGURES = ("rising", "spearman", "curve_roughness", "path_roughness")
_LEAST = 3  # latents: of two the curve is a point


@torch.inference_mode()
def run(subject: Subject, material: Material) -> Result:
    """Figures of the curve of all clips (see `metrics.latents.latent_temporal_distance`), and the curve by seconds.

    The curve is divided by the mean norm of a latent, so that latents of any scale and size compare. UserError where a
    clip has fewer than three latents.
    """
    means, notes, step = Means(), list[str](), 0.0
    for clip in material.clips():
        latent = coded.latents(subject, coded.whole(subject, clip.video))
        if latent.shape[2] < _LEAST:
            raise UserError(
                f"clips: frames: {clip.video.shape[2]} are {latent.shape[2]} latents of {subject.uri}; LTD needs"
                f" {_LEAST}, give more"
            )
        means.add(clip.unit, distances(latent)[0].numpy())
        notes = coded.left_over(subject, clip.video.shape[2])
        step = subject.module.config.temporal_stride / clip.fps
    by_unit = means.by_unit()
    norm = np.mean([row[-2] for row in by_unit.values()])
    curve = Curve()
    for unit, row in by_unit.items():
        curve.add(unit, {n * step: value / norm for n, value in enumerate(row[:-2].tolist(), 1)})
    pooled = means.pooled(material.suite, {f"ltd_{name}": _of(name) for name in _FIGURES})
    return Result(pooled=pooled, curves={"ltd": curve.by_unit()}, notes=notes)


def _of(name: str) -> Any:
    def figure(rows: Vectors) -> Vectors:
        return np.array([temporal_distance(row[None])[name] for row in torch.from_numpy(rows)])

    return figure


MEASURE = Measure(
    what="how the distance of latents grows with time (LTD, arXiv 2605.02134): the share of the curve that rises, its rank"
    " correlation with time, and how rough the curve and the path of the latents are",
    version=1,
    of="reconstructs",
    figures={
        "ltd_rising": "higher",
        "ltd_spearman": "higher",
        "ltd_curve_roughness": "lower",
        "ltd_path_roughness": "lower",
    },
    networks=(),
    conditions=of_clips,
    run=run,
)
