"""How well a predictive autoencoder foretells the second half of a clip from the first (PV-VAE, arXiv 2605.02134)."""

from __future__ import annotations

import torch

from longtake.datasets.errors import UserError
from longtake.training.evaluation import coded
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.means import Curve
from longtake.training.evaluation.measures import Measure, of_clips
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics.reconstruction import psnr, psnr_by_frame
from longtake.training.models.common.draws import rng_of


@torch.inference_mode()
def run(subject: Subject, material: Material) -> Result:
    """Figures of the frames that the encoder has not seen, and by how far they are from the last that it has.

    `psnr_copy_last` is that of the last frame seen, repeated, which a model that predicts anything must beat. UserError
    where clips are too short to hide any frame.
    """
    model = subject.module
    rows, curve, notes = dict[tuple[Unit, str], dict[str, float]](), Curve(), list[str]()
    for number, clip in enumerate(material.clips()):
        video = coded.whole(subject, clip.video)
        seen = model.shown_frames(video.shape[2])
        if seen == video.shape[2]:
            raise UserError(f"clips: frames: {seen} are too few to predict any; give more")
        # some models predict from noise
        made = model.reconstruct(video, seen, rng_of(material.suite.seed, number)).float()[:, :, seen:]
        hidden = video[:, :, seen:]
        copy = video[:, :, seen - 1 : seen].expand_as(hidden)
        rows[clip.unit, clip.key] = {
            "psnr_predicted": psnr(made, hidden).item(),
            "psnr_copy_last": psnr(copy, hidden).item(),
        }
        by_frame = psnr_by_frame(made, hidden)[0].tolist()
        curve.add(clip.unit, {frame / clip.fps: value for frame, value in enumerate(by_frame, 1)})
        notes = [f"{seen} of {video.shape[2]} frames are seen", *coded.left_over(subject, clip.video.shape[2])]
    return Result(rows, curves={"psnr_predicted": curve.by_unit()}, notes=notes)


MEASURE = Measure(
    what="PSNR of the frames that the encoder has not seen, the second half of a clip, in dB (arXiv 2605.02134)",
    version=2,
    of="reconstructs",
    figures={"psnr_predicted": "higher", "psnr_copy_last": "higher"},
    networks=(),
    conditions=of_clips,
    run=run,
    own=True,
)
