"""How close reconstructions of held-out clips are to them, pixel by pixel."""

from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.means import Curve
from longtake.training.evaluation.measures import Measure, of_clips
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics.reconstruction import SSIM_REACH, psnr, psnr_by_frame, ssim


def run(subject: Subject, material: Material) -> Result:
    """`psnr` in dB and `ssim` of each clip, and the PSNR of each frame by its second in the clip."""
    rows, curve = dict[tuple[Unit, str], dict[str, float]](), Curve()
    small = min(material.suite.clips.size) <= SSIM_REACH
    for clip, made in material.reconstructed(subject):
        source, copy = to_model(clip.video), to_model(made)
        row = {"psnr": psnr(copy, source).item()}
        if not small:
            row["ssim"] = ssim(copy, source).item()
        rows[clip.unit, clip.key] = row
        by_frame = psnr_by_frame(copy, source)[0].tolist()
        curve.add(clip.unit, {number / clip.fps: value for number, value in enumerate(by_frame)})
    notes = [f"ssim: needs sides above {SSIM_REACH} pixels"] if small else []
    return Result(rows, curves={"psnr": curve.by_unit()}, notes=notes)


MEASURE = Measure(
    what="reconstructions of held-out clips from all of their frames: PSNR (dB) and SSIM (Wang et al. 2004); PSNR by second",
    version=1,
    of="reconstructs",
    figures={"psnr": "higher", "ssim": "higher"},
    networks=(),
    conditions=of_clips,
    run=run,
)
