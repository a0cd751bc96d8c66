"""The numbers of EncGAN3 (arXiv 2512.21776), its presets, and the settings of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

from longtake.datasets.stage import DatasetInput, ModelInput, StageConfig, ViewInput
from longtake.training.config import ModelName
from longtake.training.models.common.recompute import Share
from longtake.training.models.encgan3.blocks import LEAST_FRAMES
from longtake.training.models.encgan3.measures import MeasuredConfig
from longtake.training.models.encgan3.recursion import Merge

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "encgan3":      dict(size=64,  width=64, attention=32),
    "encgan3_128":  dict(size=128, width=64, attention=32),
    "encgan3_tiny": dict(size=32,  width=8,  attention=16, groups=2),
}
# fmt: on

# defaults by phase; a recipe may change each
_PHASES: dict[str, dict[str, Any]] = {
    "joint": {},
    "vae": {"lambda_gan": 0.0},
    "gan": {"freeze": ["content", "movement"]},
}

Differences = Literal["absolute", "signed"]
Adversarial = Literal["hinge", "log"]


class EncGAN3Config(BaseModel):
    """The numbers of one EncGAN3. "G3AN" marks those of the code that the paper builds on (arXiv 1912.05523).

    size            height and width of frames in pixels, a power of 2 [G3AN: 64]
    frames          T of a clip, 12 + 4k [paper: 16]
    overlap         frames that two clips in a row have in common [assumption: a quarter of T]
    reference       frame of a clip that the next one begins from, in the overlap; null is the last before its middle
                    [assumption]
    merge           cut: clips are joined at the reference; fade: one becomes the other over the overlap [assumption: cut]
    width           channels of the last block and of the first layer of each trunk; up to 8 times as many inside [G3AN: 64]
    content         numbers that say what is to be seen, z_x [G3AN: 128]
    movement        numbers that say how it moves, z_v, one vector a clip [G3AN: 10; the paper leaves open how many]
    differences     of frames, which the movement encoder sees: absolute [paper], or signed, which have a direction
    pooled          the movement encoder sees the mean over time and places of what its layers find, so that a movement is the
                    same wherever it is; else its last layers see where, as a discriminator's do [assumption: true]
    recursion       previous: x_j = x_{j-1} + v_j [paper]; reference: x_j = x_r + v_j [assumption, for comparison]
    skips           the generator also sees the content encoder's maps of the reference, at every size. Without them all that
                    it knows of the reference is z_x, as in the paper [assumption: true]
    attention       side of the frames in pixels at which factorised attention looks; null has none [G3AN: 32 of 64]
    groups          of channels that are normalised together, at most [assumption: 16]
    activation_checkpointing   share of the encoders and of the generator's blocks that the backward pass recomputes, true is
                    all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(64, ge=16)
    frames: int = Field(16, ge=LEAST_FRAMES)
    overlap: int = Field(4, ge=2)
    reference: int | None = Field(None, validate_default=True)
    merge: Merge = "cut"
    width: PositiveInt = 64
    content: PositiveInt = 128
    movement: PositiveInt = 10
    differences: Differences = "absolute"
    pooled: bool = True
    recursion: Literal["previous", "reference"] = "previous"
    skips: bool = True
    attention: PositiveInt | None = 32
    groups: PositiveInt = 16
    activation_checkpointing: Share = False

    @field_validator("reference")
    @classmethod
    def _last_before_the_middle(cls, reference: int | None, info: ValidationInfo) -> int | None:
        if reference is None and {"frames", "overlap"} <= info.data.keys():
            overlap: int = info.data["overlap"]
            return int(info.data["frames"] - overlap + (overlap + 1) // 2 - 1)
        return reference

    @model_validator(mode="after")
    def _fits(self) -> EncGAN3Config:
        if self.size & (self.size - 1):
            raise ValueError(f"size is {self.size}; it must be a power of 2, such as 64")
        if self.frames % 4:
            raise ValueError(
                f"frames is {self.frames}; it must be 12 + 4k, such as {self.frames // 4 * 4} or {self.frames // 4 * 4 + 4}"
            )
        if self.overlap >= self.frames:
            raise ValueError(f"overlap is {self.overlap}; it must be less than frames, {self.frames}")
        if not self.frames - self.overlap <= self.joint < self.frames:
            raise ValueError(
                f"reference is {self.joint}; it must be in the overlap, {self.frames - self.overlap} to {self.frames - 1}"
            )
        sides = [2**n for n in range(2, int(math.log2(self.size)) + 1)]
        if self.attention is not None and self.attention not in sides:
            raise ValueError(f"attention is {self.attention}; it must be null or one of {', '.join(map(str, sides))}")
        return self

    @property
    def joint(self) -> int:
        """Frame of a clip that the next one begins from."""
        assert self.reference is not None
        return self.reference

    @property
    def index(self) -> int:
        """Number that the frame `joint` of a clip has in the next one."""
        return self.joint - (self.frames - self.overlap)

    @property
    def span(self) -> int:
        """Frames of two clips that overlap."""
        return 2 * self.frames - self.overlap


def config_from_preset(preset: str, **overrides: Any) -> EncGAN3Config:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return EncGAN3Config(**PRESETS[preset] | overrides)


class Config(MeasuredConfig):
    """Train EncGAN3 on a dataset and register it.

    The paper gives no settings: those marked G3AN are of the code that it builds on, all others are assumptions.

    dataset               to train on
    view                  which clips to use; null uses all
    phase                 joint: encoders, generator and discriminators at once [paper, with recall]; vae: encoders and
                          generator alone; gan: generator and discriminators, the parent's encoders frozen [paper, without
                          recall: "separately"]. Sets defaults of `lambda_gan` and `freeze`
    parent                the model to continue from, which phase gan needs; null begins with random weights. Discriminators
                          always begin anew
    model                 a preset with fields of EncGAN3Config to change: `{preset: encgan3}`; null is the parent's
    recall                REncGAN3: two clips that overlap, the second generated from a frame of the first, judged across
                          their joint
    stride                take every n-th frame [G3AN: 2 or 3]
    differences           computed: of the frames of a window; column: read from the dataset's `frame_diff`, where that is
                          the same: absolute, of every frame, of clips as large as the model's frames
    anywhere              share of the steps whose first clip has its reference at any frame, not at its first. It makes the
                          task harder. Needed to generate backward, and without recall for long videos, whose clips
                          begin from frame `reference` - T + `overlap`, unless that is 0
    lambda_l1             weight of the absolute error of the clips [paper]
    lambda_l2             weight of their squared error. As long as it is not clear where something small moves to, the
                          absolute error is least where nothing moves, and nothing is learned; the squared one is not
    lambda_kl             weight of the KL divergences, each averaged over its numbers. Before the generator has learned to use
                          z_v a large one takes away what z_v says
    kl_warmup             share of the steps in which that weight rises from 0
    lambda_frame          weight of the absolute error of the frame that is generated from content alone
    lambda_gan            weight of the loss of either discriminator [G3AN: 1]; 0 trains none
    adversarial           hinge, or log: the losses of the paper, which are G3AN's
    lambda_range          weight of pixels beyond [-1, 1]
    lambda_drift          weight of the mean difference of samples, which would add up; without discriminators there are none
    gan_start             step from which the discriminators learn and are heard
    discriminator_width   channels of their first layer; null is the model's width [G3AN]
    discriminator_lr      their learning rate; null is `lr` [G3AN]
    spectral              norm of their weights [G3AN] in place of groups of channels; for ZeRO stages 0 to 2
    batch                 windows in a step [G3AN: 96]
    lr                    learning rate [G3AN: 2e-4]
    betas                 of Adam [G3AN]
    """

    kind: Literal["pretrain_encgan3"]
    dataset: DatasetInput
    view: ViewInput | None = None
    phase: Literal["joint", "vae", "gan"] = "joint"
    parent: ModelInput | None = None
    name: ModelName = "encgan3"
    model: dict[str, Any] | None = None
    recall: bool = False
    stride: int = Field(1, ge=1)
    differences: Literal["computed", "column"] = "computed"
    anywhere: float = Field(0.5, ge=0, le=1)
    lambda_l1: float = Field(10.0, ge=0, allow_inf_nan=False)
    lambda_l2: float = Field(50.0, ge=0, allow_inf_nan=False)
    lambda_kl: float = Field(0.0003, ge=0, allow_inf_nan=False)
    kl_warmup: float = Field(0.2, ge=0, le=1)
    lambda_frame: float = Field(1.0, ge=0, allow_inf_nan=False)
    lambda_gan: float = Field(1.0, ge=0, allow_inf_nan=False)
    adversarial: Adversarial = "hinge"
    lambda_range: float = Field(10.0, ge=0, allow_inf_nan=False)
    lambda_drift: float = Field(10.0, ge=0, allow_inf_nan=False)
    gan_start: int = Field(0, ge=0)
    discriminator_width: int | None = Field(None, ge=1)
    discriminator_lr: float | None = Field(None, gt=0)
    spectral: bool = False
    batch: int = Field(96, ge=1)
    lr: float = Field(2e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_phase(cls, fields: Any) -> Any:
        phase = fields.get("phase", "joint") if isinstance(fields, dict) else None
        return _PHASES.get(phase, {}) | fields if isinstance(phase, str) else fields

    @field_validator("model")
    @classmethod
    def _valid_model(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if model is not None:
            config_from_preset(**({"preset": "encgan3"} | model))
        return model

    @model_validator(mode="after")
    def _valid_phase(self) -> Config:
        if self.phase == "gan" and self.parent is None:
            raise ValueError("parent: phase gan needs a model with encoders, of phase vae; name one")
        if self.phase == "gan" and not self.lambda_gan:
            raise ValueError(
                "lambda_gan: is 0, and phase gan trains with discriminators; raise it, or choose another phase"
            )
        if self.phase == "vae" and self.lambda_gan:
            raise ValueError(
                f"lambda_gan: is {self.lambda_gan:g}, and phase vae has no discriminators; choose phase joint"
            )
        if self.spectral and self.zero_stage == 3:
            raise ValueError(
                "spectral: ZeRO stage 3 splits the weights whose norm it takes; set zero_stage to 2, or leave it out"
            )
        if self.lora is not None and self.parent is None:
            raise ValueError("lora: without a parent all else would stay random; name one, or leave it out")
        if self.model is not None or self.parent is None:
            check_differences(self, self.encgan3())
        return self

    def encgan3(self) -> EncGAN3Config:
        """The config of `model`, or of the full size if that is null."""
        return config_from_preset(**({"preset": "encgan3"} | (self.model or {})))


def span_of(config: Config, model: EncGAN3Config) -> int:
    """Frames of a window: a clip, or two that overlap."""
    return model.span if config.recall else model.frames


def check_differences(config: Config, model: EncGAN3Config) -> None:
    """Raise ValueError if the column of differences is not what the model sees."""
    if config.differences == "column" and (model.differences != "absolute" or config.stride != 1):
        why = (
            "has absolute ones, the model takes signed" if config.stride == 1 else "is of every frame, stride is not 1"
        )
        raise ValueError(f"differences: column: {why}; choose differences: computed")


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a window that does not fit into the clips of a `shard` stage, and a model other than the parent's."""
    parent: Any = inputs.get("parent")
    if parent is not None and not isinstance(parent, Config):
        raise ValueError(f"parent: a {parent.kind} stage makes no EncGAN3; name a {config.kind} stage, or a model")
    # a parent that is given by URI, or has the model of its own parent, has a size that `prepare` checks
    model, theirs = (each.encgan3() if each and (each.model or not each.parent) else None for each in (config, parent))
    if model and theirs and model != theirs:
        raise ValueError("model: is not that of the parent; leave it out")
    model = model or theirs
    clip: Any = getattr(inputs.get("dataset"), "clip", None)
    if model is None or clip is None:
        return
    check_differences(config, model)
    if clip.short_side < model.size:
        raise ValueError(f"model: size {model.size} is larger than clip.short_side {clip.short_side} of the dataset")
    if config.differences == "column" and clip.short_side != model.size:
        raise ValueError(
            f"differences: column: is of clips with short side {clip.short_side}, frames are {model.size}; choose computed"
        )
    diff: Any = getattr(inputs.get("dataset"), "frame_diff", None)
    if config.differences == "column" and diff and diff.factor(model.size, model.size) != 1:
        raise ValueError(
            f"differences: column: has pixels averaged to a short side of {diff.short_side}, frames are {model.size}; set"
            f" frame_diff.short_side of the dataset to {model.size}"
        )
    span = (span_of(config, model) - 1) * config.stride + 1
    if clip.max_frames < span:
        clips = f"two clips of {model.frames} frames that overlap by {model.overlap}" if config.recall else "its frames"
        raise ValueError(
            f"{'recall' if config.recall else 'model'}: {clips} span {span} frames, the dataset's clips have at most"
            f" {clip.max_frames}; raise clip.max_seconds"
        )


def warnings(config: Config) -> list[str]:
    """Lines to print before the first step."""
    lines = []
    if config.lambda_gan and config.steps <= config.gan_start:
        lines.append(
            f"lambda_gan: training ends at step {config.steps}, before the discriminators begin (gan_start:"
            f" {config.gan_start}); lower that, or set lambda_gan: 0"
        )
    if not config.recall and not config.anywhere and (config.parent is None or config.model) and config.encgan3().index:
        model = config.encgan3()
        lines.append(
            f"anywhere: 0, so no clip begins from its frame {model.index}, as those of long videos do; set model.reference to"
            f" {model.frames - model.overlap}, or anywhere above 0"
        )
    if config.recall and not config.lambda_gan:
        lines.append("recall: without discriminators only the absolute error sees the joint; set lambda_gan above 0")
    return lines
