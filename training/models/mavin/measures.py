"""The settings of how gaps are filled by default, and of how a trained MAVIN is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longtake.datasets.stage import Measuring
from longtake.training.config import TrainConfig
from longtake.training.models.mavin.mixer import Mixer

_MIXER = ("noise", "cutoff", "fall")  # settings that need one


class MeasuredConfig(TrainConfig):
    """How gaps are filled, by default and when the model is measured, and what measures them. "Assumption" marks our choices.

    sample_steps       Euler steps of a filled gap [paper: 50 of another solver]
    guidance           towards the text; 1 is none [paper: 9; 1 is an assumption]
    image_guidance     towards the frames beside the gap; 1 is none, as in the paper
    mixer              what a gap begins from (see `mixer`): none, noise alone; paper or per_frame, low frequencies of the
                       frames beside it [paper: paper; none is an assumption]
    noise              of the high frequencies, with a mixer: the same, or fresh [released code: same]
    cutoff             of the low frequencies beside the gap, with a mixer [released configs: 0.6, and 0.4]
    fall               by how much it is lower for each latent further in [released configs: 0.1, and 0.05]
    eval_clips         held-out windows that losses are measured on, at most; with other settings from here on the model of the
                       last checkpoint is measured again, and nothing is trained
    eval_videos        held-out windows whose gap is filled, with each of the lengths that are measured
    eval_draws         times that each gap is filled, for their diversity; 1 measures none
    embedder           what CLIP-RS compares frames by: own, CLIP's model of pictures [paper], in a folder or registered, or a
                       feature network's file, as in `image`; null is what `image` names
    perceptual         a network of images for LPIPS; null measures none
    perceptual_linear  its linear weights; null weighs all channels alike
    features           a feature network (see training.metrics.features) for Fréchet and kernel distances of windows that reach
                       over both joints; null measures none
    """

    sample_steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0, allow_inf_nan=False)
    image_guidance: float = Field(1.0, ge=0, allow_inf_nan=False)
    mixer: Literal["none", "paper", "per_frame"] = "none"
    noise: Literal["same", "fresh"] = "same"
    cutoff: float = Field(0.6, allow_inf_nan=False)
    fall: float = Field(0.1, allow_inf_nan=False)
    eval_clips: Annotated[int, Measuring()] = Field(64, ge=1)
    eval_videos: Annotated[int, Measuring()] = Field(4, ge=1)
    eval_draws: Annotated[int, Measuring()] = Field(2, ge=1)
    embedder: Annotated[str | None, Measuring()] = None
    perceptual: Annotated[str | None, Measuring()] = None
    perceptual_linear: Annotated[str | None, Measuring()] = None
    features: Annotated[str | None, Measuring()] = None

    @model_validator(mode="after")
    def _valid_measures(self) -> MeasuredConfig:
        Mixer(self.mixer, self.noise, self.cutoff, self.fall)
        usual = type(self).model_fields
        if self.mixer == "none" and (idle := [name for name in _MIXER if getattr(self, name) != usual[name].default]):
            raise ValueError(f"{idle[0]}: has no effect without a mixer; set mixer, or leave it out")
        if self.perceptual_linear and not self.perceptual:
            raise ValueError("perceptual_linear: belongs to a network; name it in perceptual, or leave it out")
        if self.features and self.eval_videos < 2:
            raise ValueError("eval_videos: 1; a distance needs 2 or more")
        return self
