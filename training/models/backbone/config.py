"""The settings of `finetune_backbone`, and their agreement with the stages before it."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.stage import DatasetInput, Input, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import data
from longtake.training.config import EvaluatedConfig, LoraConfig, ModelName, Pattern
from longtake.training.foreign import load
from longtake.training.foreign.backbone import BackboneConfig
from longtake.training.foreign.folder import is_foreign
from longtake.training.live.config import LatentsInput, LiveConfig, check_live
from longtake.training.models.common.codec import nearest_lengths
from longtake.training.models.common.guidance import GuidanceSetting
from longtake.training.models.common.recompute import Share
from longtake.training.registry import pipelines
from longtake.training.registry.uri import in_store


class BackboneLora(LoraConfig):
    """Low-rank changes of some layers (arXiv 2106.09685), which other tools load as an adapter.

    rank      of a change
    alpha     a change counts alpha / rank; null is the rank, so that it counts 1
    targets   regular expressions of the names of linear layers; none: those of the blocks' attention and MLP
    full      is not for adapters, which have low-rank changes alone
    """

    targets: tuple[Pattern, ...] = ()

    @field_validator("full")
    @classmethod
    def _none_in_full(cls, full: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
        if full:
            raise ValueError("an adapter has low-rank changes alone; leave it out, or train without lora")
        return full


class Config(EvaluatedConfig):
    """Fine-tune a video transformer of another library on a dataset's latents, in full or by LoRA, and register it.

    "assumption" marks the defaults that no publication gives.

    dataset             to train on
    latents             of the dataset, encoded by the autoencoder of the base's pipeline; `live` encodes while training goes on
    encoder             of `latents: live`: the base's pipeline, whose autoencoder encodes
    live                of `latents: live`: how it encodes
    text                of the dataset's captions, encoded by the text encoder of the base's pipeline
    pooled              for a model that takes a vector for each text (HunyuanVideo): of the same captions by the pipeline's
                        second text encoder, of whose states the last is taken
    view                which clips to use; null uses all
    vae                 decodes samples; null is the model that has encoded the latents
    base                folder of a pipeline, or of its transformer alone; or a registered one, or what this stage has made
    expert              of a model with two: `high` noise or `low`; times are drawn in its range alone
    frames              of a window, or several lengths, of which a clip takes the longest that it fills
    fps                 of the clips; null is the model's own, at which the dataset has to be cut
    clip_starts         share of windows that start their clip, as the model's own videos do: their first latent stands for
                        one frame [assumption]
    posterior           what is learned of each latent: the mean, as the models have it, or a sample, drawn anew each step
    image_conditioning  share of windows that go on from their first latent, clean; null: all, for a model that needs a start
                        image, and none for others
    text_dropout        probability that training hides a text, for guidance [assumption]
    time_mean           mean of the logit-normal times (arXiv 2403.03206)
    time_std            standard deviation of the logit-normal times
    shift               of times towards noise, in training; null is that of the base's scheduler for the window
    activation_checkpointing   share of the blocks whose activations the backward pass computes again, true is all: less memory,
                        more time
    steps               of training
    batch               windows in a step, at most
    max_tokens          of a pass on a process: longer and larger windows share smaller batches, and another number of processes
                        does not go on with them; null does not bound them
    lr                  learning rate [assumption]
    warmup_steps        of a linear warm-up
    schedule            of the learning rate
    weight_decay        of linear weights [assumption]
    ema_half_lives      half-lives of weight averages, in steps; none registers the last weights
    sample_steps        of a sample
    guidance            of samples; 1 is none
    eval_videos         videos generated at the end; with `features` compared with as many held-out and training clips
    """

    LATER: ClassVar = {"encoder": None, "live": None}

    kind: Literal["finetune_backbone"]
    dataset: DatasetInput
    latents: LatentsInput
    encoder: ModelInput | None = None
    live: LiveConfig | None = None
    text: Annotated[str, Input("text")]
    pooled: Annotated[str, Input("text")] | None = None
    view: ViewInput | None = None
    vae: ModelInput | None = None
    base: ModelInput
    expert: Literal["high", "low"] | None = None
    name: ModelName = "backbone"
    frames: PositiveInt | tuple[PositiveInt, ...] = 17
    fps: float | None = Field(None, gt=0)
    clip_starts: float = Field(1.0, ge=0, le=1)
    posterior: Literal["sample", "mean"] = "mean"
    image_conditioning: float | None = Field(None, ge=0, le=1)
    text_dropout: float = Field(0.1, ge=0, le=1)
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    shift: float | None = Field(None, gt=0)
    activation_checkpointing: Share = False
    steps: int = Field(2000, ge=1)
    batch: int = Field(8, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int | None = Field(100, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    ema_half_lives: tuple[float, ...] = ()
    lora: BackboneLora | None = None
    sample_steps: int = Field(50, ge=1)
    guidance: GuidanceSetting = 5.0
    eval_videos: Annotated[int, Measuring()] = Field(4, ge=1)
    eval_clips: Annotated[int, Measuring()] = Field(64, ge=1)

    @field_validator("frames")
    @classmethod
    def _some(cls, frames: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if frames == ():
            raise ValueError("names no length; give one, or several")
        return frames

    @model_validator(mode="after")
    def _measured(self) -> "Config":
        check_live(self)
        if self.eval_probes:
            raise ValueError("eval_probes: a model of another library is not probed; leave it out")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of windows, longest first."""
        lengths = (self.frames,) if isinstance(self.frames, int) else self.frames
        return tuple(sorted(set(lengths), reverse=True))


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse latents and texts of another dataset, windows that they do not have, and clips of another frame rate.

    Of a base in a folder of this machine also lengths that its autoencoder does not make, and an expert that it is not.
    """
    data.check_recipe(config, inputs, ("latents", "text", "pooled"), config.lengths[-1])
    clip = getattr(inputs.get("dataset"), "clip", None)
    if clip is not None and config.fps is not None and clip.fps != config.fps:
        raise ValueError(
            f"fps: is {config.fps:g}, and the dataset is cut at clip.fps: {clip.fps:g}; give both the same"
        )
    if "base" not in inputs and (base := _in_folder(config)) is not None:
        factor = base.strides[0]
        for frames in config.lengths:
            low, high = nearest_lengths(frames, factor)
            if low != high:
                raise ValueError(f"frames: {frames}: {config.base} makes 1 + {factor}n frames, such as {low} or {high}")


def _in_folder(config: Config) -> BackboneConfig | None:
    """The config of a base in a folder of diffusers; None for another, or one that other machines alone may see."""
    if in_store(config.base) or not storage.is_local(config.base):
        return None
    folder = pipelines.local(config.base)
    try:
        if not folder.is_dir() or not is_foreign(folder):
            return None
        _, base = load.config_of(folder, "transformer", config.expert)
    except UserError as e:
        raise ValueError(f"base: {e}") from e
    assert isinstance(base, BackboneConfig)
    return base
