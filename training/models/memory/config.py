"""The settings of `pretrain_memory` and `finetune_memory_prior`, and their agreement with the stages before them."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longtake.datasets.errors import UserError
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.stage import DatasetInput, Input, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import data
from longtake.training.config import LoraConfig, ModelName, Pattern, TrainConfig
from longtake.training.live.config import LIVE, LatentsInput, LiveConfig, check_live, live_of
from longtake.training.models.common.text import check_settings
from longtake.training.models.memory.dit_config import MemoryDiTConfig, config_from_preset
from longtake.training.models.memory.history import history_lengths
from longtake.training.models.memory.model_config import MemoryModelConfig

# fields of MemoryDiTConfig that follow from other settings, so that `model` must not have them
_FROM_DATA = ("channels", "classes", "shape", "history", "history_noise")


class MemoryLora(LoraConfig):
    """Low-rank changes of some layers, which learn while all else but `full` is frozen (arXiv 2106.09685).

    Parameters that the model has and its base has not learn in full too.

    rank      of a change
    alpha     a change counts alpha / rank; null is the rank, so that it counts 1
    targets   regular expressions of the names of linear and convolution layers; none: all, or of a base of another library
              those of its blocks' attention and MLP
    full      regular expressions: parameters whose names begin with a match learn as they are
    """

    targets: tuple[Pattern, ...] = ()


class MemoryConfig(TrainConfig):
    """The settings that both stages share. "Assumption" marks what the paper (arXiv 2512.23851) does not give.

    dataset           to train on
    latents           of the dataset, with `join_seconds`; `live` encodes while training goes on
    low_latents       with the `shrink` of the rates, for the low-res branch; `live` where latents are
    encoder           of `latents: live`: the model that encodes
    live              of `latents: live`: how it encodes, with `join_seconds`
    view              which clips to use; null uses all
    pooled            for a base that takes a vector of each text (HunyuanVideo): of the captions of `text` by the pipeline's
                      second text encoder
    vae               decodes samples; null is the model that encoded the latents
    base              the memory_dit to continue from, or a transformer of another library: a folder in the layout of diffusers,
                      a registered pipeline or backbone; null begins with random weights
    model             a preset with fields of MemoryDiTConfig to change: `{preset: memory_dit_xl}`; with a base, fields alone;
                      with one of another library, those of MemoryModelConfig
    lora              null: of a base of another library that of the paper, {rank: 128, full: ["memory", "cross"]}, and else
                      none; with none everything learns
    classes           learn the dataset's labels
    frames            of a segment, 1 + 4n [assumption]
    history_seconds   of history before the segment, at most [paper: 5 to over 20]
    history_least     seconds of history that a stream of latents must have room for; null is `history_seconds`
    posterior         what of each latent is learned: a sample, drawn anew each step, or the mean [assumption]
    time_mean         of the flow's logit-normal times: the masks' mean [assumption]
    time_std          of the flow's logit-normal times [assumption]
    fps               frames a second of the clips; null: those that a base of another library makes, if it makes only such
    shift             of times towards noise, in training and sampling, 1 is none; null: of a base of another library that of
                      its pipeline for a segment, and else 1 [assumption]
    lr                learning rate [assumption]
    sample_steps      solver steps (Euler) of a sample [assumption]
    eval_clips        held-out clips to measure, at most, over all processes
    """

    SHARED: ClassVar[bool] = True
    LATER: ClassVar = {"fps": None, "pooled": None, "encoder": None, "live": None}

    dataset: DatasetInput
    latents: LatentsInput
    low_latents: LatentsInput | None = None
    encoder: ModelInput | None = None
    live: LiveConfig | None = None
    view: ViewInput | None = None
    pooled: Annotated[str, Input("text")] | None = None
    vae: ModelInput | None = None
    base: ModelInput | None = None
    name: ModelName = "memory-dit"
    model: dict[str, Any] | None = None
    classes: bool = False
    frames: int = Field(21, ge=1)
    history_seconds: float = Field(20.0, gt=0)
    history_least: float | None = Field(None, ge=0)
    posterior: Literal["sample", "mean"] = "sample"
    time_mean: float = 0.2
    time_std: float = Field(1.0, gt=0)
    fps: float | None = Field(None, gt=0)
    shift: float | None = Field(None, gt=0)
    lora: MemoryLora | Literal["none"] | None = None  # type: ignore[assignment]  # without `none` past `with_lora`
    lr: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    sample_steps: int = Field(50, ge=1)
    eval_clips: Annotated[int, Measuring()] = Field(64, ge=1)

    @field_validator("model")
    @classmethod
    def _without_data(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if forbidden := [name for name in _FROM_DATA if name in (model or {})]:
            raise ValueError(f"{forbidden[0]} follows from the stage's other settings; leave it out")
        return model

    @model_validator(mode="after")
    def _check_model(self) -> "MemoryConfig":
        check_live(self)
        model = self.model or {}
        check_settings(model, getattr(self, "text", None))
        if self.base is None:
            if isinstance(self.lora, LoraConfig):
                raise ValueError("lora: without a base all else would stay random; name one, or leave it out")
            self.dit()
        elif "preset" in model:
            raise ValueError("model: preset: the base has its own; leave it out, or the base")
        elif unknown := model.keys() - MemoryDiTConfig.model_fields.keys():
            raise ValueError(f"model: unknown {min(unknown)}; there are {', '.join(MemoryDiTConfig.model_fields)}")
        if self.pooled is not None and (self.base is None or getattr(self, "text", None) is None):
            raise ValueError("pooled: is beside text, for a base of another library; name both, or leave it out")
        if self.history_least is not None and self.history_least > self.history_seconds:
            raise ValueError(f"history_least: {self.history_least:g} s are more than history_seconds; lower it")
        return self

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As of recipes before `shift` could be null, which left it out for 1."""
        settings = super().decisive(settings)
        if self.shift is None:
            return settings | {"shift": 1.0}
        # a base may ask for another than 1
        return settings | {"shift": "1"} if self.shift == 1.0 and self.base else settings

    @property
    def listens(self) -> bool:
        """Whether segments are given their texts, if there are any."""
        return False

    @property
    def noise(self) -> float:
        """The most noise of a history in training, as a time of the flow."""
        return 0.0

    @property
    def reaches(self) -> tuple[tuple[int, float], ...]:
        """(optimizer step, seconds): the most history from each step on."""
        return ((0, self.history_seconds),)

    @property
    def least_seconds(self) -> float:
        """Seconds of history that a stream must have room for."""
        return self.history_seconds if self.history_least is None else self.history_least

    def fewest(self, dit: MemoryModelConfig) -> int:
        """The latents of history without which a segment is neither learned nor measured."""
        return 0

    def histories(self, dit: MemoryModelConfig, least: int) -> Lengths:
        """The lengths of history of a segment, in latents. A stream must have room for `least` of them."""
        return history_lengths(dit, 0.0, least)

    def dit(self, **overrides: Any) -> MemoryDiTConfig:
        """The config of a model trained from scratch."""
        return config_from_preset(**{"preset": "memory_dit_xl"} | (self.model or {}) | overrides)


def check(config: MemoryConfig, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse latents of another dataset, encoder or scale, texts of another dataset, and histories and segments that the
    latents are too short for."""
    data.check_recipe(config, inputs, ("latents", "low_latents", "text", "pooled"), config.frames)
    live: Any = live_of(config)
    latents: Any = live or inputs.get("latents")
    low: Any = live if config.low_latents == LIVE else inputs.get("low_latents")
    if latents is not None and low is not None and not live:
        if latents.encoder != low.encoder:
            raise ValueError(f"low_latents: are of another encoder, {low.encoder}, than latents, {latents.encoder}")
        if latents.join_seconds != low.join_seconds:
            raise ValueError(
                f"low_latents: have join_seconds {low.join_seconds:g}, latents {latents.join_seconds:g}; set both alike"
            )
    clip = getattr(inputs.get("dataset"), "clip", None)
    if latents is not None and clip is not None:
        longest, needed = max(latents.join_seconds, clip.max_seconds), config.least_seconds + config.frames / clip.fps
        if longest < needed:
            raise ValueError(
                f"latents: streams of at most {longest:g} s have no room for {config.least_seconds:g} s of history and a"
                f" segment; set {'live.' if live else ''}join_seconds: {math.ceil(3 * needed)}{'' if live else ' in their stage'},"
                " or lower history_seconds"
            )
    if config.base is None and (low is not None or config.low_latents is None):
        try:
            check_low(config.dit(), None if low is None else low.shrink)
        except UserError as e:
            raise ValueError(str(e)) from e


def check_low(dit: MemoryModelConfig, shrink: tuple[int, int] | None) -> None:
    """Refuse a low-res column that the rates do not need, or the lack of one; `shrink` is the column's, None without."""
    if dit.shrink == shrink:
        return
    if dit.shrink is None:
        raise UserError("low_latents: this memory has no low-res branch that reads them; leave them out")
    needs = f"a `cache_latents` stage with shrink: [{dit.shrink[0]}, {dit.shrink[1]}]"
    if shrink is None:
        raise UserError(f"low_latents: rates {', '.join(dit.rates)} need {needs}; name it, or set branches: high")
    raise UserError(
        f"low_latents: are shrunk by {shrink[0]}x{shrink[1]}, rates {', '.join(dit.rates)} need {needs}; name that"
    )
