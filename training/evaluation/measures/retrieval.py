"""What a memory keeps of a video, by how long ago it was (arXiv 2512.23851)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.means import Curve
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite
from longtake.training.metrics.reconstruction import psnr, psnr_by_frame, ssim


def run(subject: Subject, material: Material) -> Result:
    """PSNR and SSIM of retrieved frames and, with `_bound`, of those that the autoencoder alone keeps.

    `psnr_copy_last` is that of the last frame, repeated, which a memory that holds anything must beat. The curves are by age:
    seconds to the end of what is remembered.
    """
    rows, curves = dict[tuple[Unit, str], dict[str, float]](), {"psnr_retrieved": Curve(), "psnr_bound": Curve()}
    for clip, source, made, bound in material.retrieved(subject):
        true, *found = (to_model(video) for video in (source, made, bound))
        row = {"psnr_copy_last": psnr(true[:, :, -1:].expand_as(true), true).item()}
        ages = [n / clip.fps for n in reversed(range(true.shape[2]))]
        for name, video in zip(("retrieved", "bound"), found, strict=True):
            row |= {f"psnr_{name}": psnr(video, true).item(), f"ssim_{name}": ssim(video, true).item()}
            by_frame = psnr_by_frame(video, true)[0].tolist()
            curves[f"psnr_{name}"].add(clip.unit, dict(zip(ages, by_frame, strict=True)))
        rows[clip.unit, clip.key] = row
    return Result(rows, curves={name: curve.by_unit() for name, curve in curves.items()})


def _conditions(suite: Suite) -> Mapping[str, Any]:
    return {"seconds": suite.seconds}


MEASURE = Measure(
    what="PSNR and SSIM of frames retrieved from a memory, by age (arXiv 2512.23851), and the autoencoder's own bound",
    version=1,
    of="retrieves",
    figures={
        "psnr_retrieved": "higher",
        "ssim_retrieved": "higher",
        "psnr_bound": "higher",
        "ssim_bound": "higher",
        "psnr_copy_last": "higher",
    },
    networks=(),
    conditions=_conditions,
    run=run,
)
