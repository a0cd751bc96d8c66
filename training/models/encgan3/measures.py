"""The settings of how a trained EncGAN3 is measured, and how the videos go on that it generates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longtake.datasets.stage import Measuring
from longtake.training.config import TrainConfig


class MeasuredConfig(TrainConfig):
    """How the trained model is measured on held-out clips, over all processes of the training; all of it is our choice.

    Other settings measure the model of the last checkpoint again, and train nothing.

    eval_clips         held-out windows, at most; a few forward passes each
    eval_swaps         pairs of held-out clips of which one lends its content and the other its movement; 0 for none. Three
                       clips of each are matched block by block, about as long on a CPU as 100 passes of a tiny model
    eval_videos        videos generated at the end, from noise
    eval_frames        of each; null is four bins
    eval_bin           frames of a bin: how distances to real clips, and to the first frame, grow from bin to bin
    features           a feature network (see training.metrics.features) for Fréchet and kernel distances: at joints, inside
                       of clips, and by bins; null measures none
    classifier         a TorchScript classifier of clips (see training.metrics.classifier) for the inception score of first
                       clips; null measures none
    eval_splits        parts of the videos whose inception scores are averaged [StyleGAN-V: 10]
    perceptual         a network of images for LPIPS to the first frame, bin by bin; null measures none
    perceptual_linear  its linear weights; null weighs all channels alike
    content            of generated videos: encode what each frame shows that a clip begins from, or keep that of the first
    """

    eval_clips: Annotated[int, Measuring()] = Field(512, ge=1)
    eval_swaps: Annotated[int, Measuring()] = Field(32, ge=0)
    eval_videos: Annotated[int, Measuring()] = Field(8, ge=1)
    eval_frames: Annotated[int | None, Measuring()] = Field(None, ge=2)
    eval_bin: Annotated[int, Measuring()] = Field(50, ge=2)
    features: Annotated[str | None, Measuring()] = None
    classifier: Annotated[str | None, Measuring()] = None
    eval_splits: Annotated[int, Measuring()] = Field(10, ge=1)
    perceptual: Annotated[str | None, Measuring()] = None
    perceptual_linear: Annotated[str | None, Measuring()] = None
    content: Literal["encode", "keep"] = "encode"

    @model_validator(mode="after")
    def _valid_measures(self) -> MeasuredConfig:
        if self.features and self.eval_videos < 2:
            raise ValueError("eval_videos: 1; a distance needs 2 or more")
        if self.classifier and self.eval_videos < 2 * self.eval_splits:
            raise ValueError(
                f"eval_splits: {self.eval_splits} parts need {2 * self.eval_splits} videos or more; raise eval_videos, which is"
                f" {self.eval_videos}, or lower it"
            )
        if self.perceptual_linear and not self.perceptual:
            raise ValueError("perceptual_linear: belongs to a network; name it in perceptual, or leave it out")
        if self.video_frames < self.eval_bin:
            raise ValueError(
                f"eval_frames: {self.video_frames} are less than a bin, {self.eval_bin}; raise it, or lower eval_bin"
            )
        return self

    @property
    def video_frames(self) -> int:
        """The frames of a generated video."""
        return self.eval_frames or 4 * self.eval_bin
