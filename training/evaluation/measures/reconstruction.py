"""How close reconstructions of held-out clips are to them, pixel by pixel."""

from collections.abc import Mapping
from typing import Any

import torch

from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite
from longtake.training.metrics.reconstruction import SSIM_REACH, psnr, ssim


def conditions(suite: Suite) -> Mapping[str, Any]:
    """Nothing beside the clips."""
    return {}


def run(subject: Subject, material: Material) -> Result:
    """`psnr` in dB and `ssim` of each clip, and the PSNR of each frame by its second in the clip."""
    rows, by_frame = dict[tuple[Unit, str], dict[str, float]](), dict[float, dict[Unit, list[float]]]()
    small = min(material.suite.clips.size) <= SSIM_REACH
    for clip, made in material.reconstructed(subject):
        source, copy = to_model(clip.video), to_model(made)
        row = {"psnr": psnr(copy, source).item()}
        if not small:
            row["ssim"] = ssim(copy, source).item()
        rows[clip.unit, clip.key] = row
        each = psnr(*(video[0].transpose(0, 1)[:, :, None] for video in (copy, source)))
        for number, value in enumerate(each.tolist()):
            by_frame.setdefault(number / clip.fps, {}).setdefault(clip.unit, []).append(value)
    curve = {
        at: {unit: float(torch.tensor(values).mean()) for unit, values in units.items()}
        for at, units in by_frame.items()
    }
    notes = [f"ssim: needs sides above {SSIM_REACH} pixels"] if small else []
    return Result(rows, curves={"psnr": curve}, notes=notes)


MEASURE = Measure(
    what="reconstructions of held-out clips from all of their frames: PSNR (dB) and SSIM (Wang et al. 2004); PSNR by second",
    version=1,
    of="reconstructs",
    figures={"psnr": "higher", "ssim": "higher"},
    networks=(),
    conditions=conditions,
    run=run,
)
