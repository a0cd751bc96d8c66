"""The settings of `finetune_latte`, and their agreement with the stages before it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longtake.datasets.stage import DatasetInput, Input, Measuring, ModelInput, StageConfig, ViewInput
from longtake.datasets.text import Text
from longtake.training import data
from longtake.training.config import EvaluatedConfig, ModelName
from longtake.training.live.config import LIVE, LatentsInput, LiveConfig, check_live
from longtake.training.models.common.guidance import GuidanceSetting
from longtake.training.models.common.text import check_settings, fields_of
from longtake.training.models.generator import Settings
from longtake.training.models.latte.model import LatteConfig, config_from_preset

_FROM_DATA = ("channels", "classes", "shape", "conditioning")  # fields of LatteConfig that `model` must not have
_PRESET = {"preset": "latte_xl"}
_PIXEL_PATCH = 16


class Config(EvaluatedConfig):
    """Train Latte on a dataset's latents, or pixels, and register it.

    With a `base` training continues that model (see `training.models.latte.base`). Defaults are PV-VAE's [paper], or
    Latte's or DiT's where noted; "assumption" marks those that no paper gives.

    dataset        to train on
    latents        of the dataset, to train on; `live` encodes while training goes on; null trains on pixels
    encoder        of `latents: live`: the model that encodes
    live           of `latents: live`: how it encodes
    text           of the dataset's captions, to learn what they say; null learns none
    view           which clips to use; null uses all
    vae            decodes samples; null is the model that has encoded the latents
    base           the Latte to continue from; null begins with random weights
    model          a preset with fields of LatteConfig to change: `{preset: latte_xl}`; with a base, fields alone
    classes        learn the dataset's labels
    frames         of a window; 1 + 4n for latents [paper: 17]
    stride         take every n-th frame; latents always use all
    size           height and width of pixels; latents have their own
    clip_starts    share of windows that start their clip, as generated videos do: their first latent stands for one frame.
                   Pixels look the same anywhere, so windows of pixels are only marked [paper: all; assumption]
    posterior      what is learned of each latent: a sample, drawn anew each step, or the mean [assumption]
    conditioning   probability that a window has clean leading frames [assumption]
    time_mean      mean of the logit-normal times (arXiv 2403.03206, rf/lognorm(0, 1))
    time_std       standard deviation of the logit-normal times
    shift          of times towards noise, in training and sampling (2403.03206, eq. 23); 1 is none
    steps          of training [paper: 250,000]
    batch          windows in a step [paper: 64]
    lr             learning rate [paper: 1e-4]
    warmup_steps   of a linear warm-up [Latte: none, since adaLN-Zero starts as the identity]
    schedule       of the learning rate [Latte, DiT: constant]
    weight_decay   of linear weights [Latte, DiT: 0]
    ema_half_lives half-lives of weight averages, in steps [DiT: a decay of 0.9999]
    sample_steps   Euler steps of a sample [paper: 100]
    guidance       of samples with a class or a text; 1 is none. `{classes: 2, text: 6}` gives each its own [assumption]
    overlap        clean latents at the start of each further window of a longer video [assumption]
    eval_videos    videos generated at the end; with `features` compared with as many held-out and training clips
    """

    SHARED: ClassVar[bool] = True
    LATER: ClassVar = {"encoder": None, "live": None}

    kind: Literal["finetune_latte"]
    dataset: DatasetInput
    latents: LatentsInput | None = None
    encoder: ModelInput | None = None
    live: LiveConfig | None = None
    text: Annotated[str, Input("text")] | None = None
    view: ViewInput | None = None
    vae: ModelInput | None = None
    base: ModelInput | None = None
    name: ModelName = "latte"
    model: dict[str, Any] | None = None
    classes: bool = False
    frames: int = Field(17, ge=1)
    stride: int = Field(1, ge=1)
    size: tuple[int, int] | None = None
    clip_starts: float = Field(0.5, ge=0, le=1)
    posterior: Literal["sample", "mean"] = "sample"
    conditioning: float = Field(0.3, ge=0, le=1)
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)
    steps: int = Field(250_000, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int | None = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    ema_half_lives: tuple[float, ...] = (6931.0,)
    sample_steps: int = Field(100, ge=1)
    guidance: GuidanceSetting = 1.0
    overlap: int = Field(2, ge=1)
    eval_videos: Annotated[int, Measuring()] = Field(16, ge=1)

    @field_validator("model")
    @classmethod
    def _without_data(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if derived := [name for name in _FROM_DATA if name in (model or {})]:
            raise ValueError(f"{derived[0]} follows from the stage's other settings; leave it out")
        return model

    @model_validator(mode="after")
    def _valid_model(self) -> "Config":
        model = self.model or {}
        check_settings(model, self.text)
        if self.base is None:
            if self.lora is not None:
                raise ValueError("lora: without a base all else would stay random; name one, or leave it out")
            config_from_preset(**_PRESET | model)
        elif "preset" in model:
            raise ValueError("model: preset: the base has its own; leave it out, or the base")
        elif unknown := model.keys() - LatteConfig.model_fields.keys():
            raise ValueError(f"model: unknown {min(unknown)}; there are {', '.join(LatteConfig.model_fields)}")
        return self

    @model_validator(mode="after")
    def _valid_windows(self) -> "Config":
        check_live(self)
        # one frame is one latent, and more are more than one
        self.check_probes(self.frames)
        if self.latents is None:
            if self.size is None:
                raise ValueError("size: training on pixels needs (height, width); or name latents")
            if self.vae is not None:
                raise ValueError("vae: a prior of pixels has none; leave it out, or name latents")
            if self.base is None:
                self.latte(3, (self.frames, *self.size))
        elif self.size is not None:
            instead = "set live.size" if self.latents == LIVE else "leave it out"
            raise ValueError(f"size: latents have the size that they were made with; {instead}")
        elif self.stride != 1:
            raise ValueError("stride: latents are of every frame; leave it out")
        return self

    def latte(
        self, channels: int, shape: tuple[int, int, int], classes: int = 0, text: Text | None = None
    ) -> LatteConfig:
        """The config of a model for this data that is trained from scratch."""
        patch = {} if self.latents else {"patch": _PIXEL_PATCH}
        from_data = {"channels": channels, "classes": classes, "shape": shape, "conditioning": self.conditioning}
        return config_from_preset(**_PRESET | patch | (self.model or {}) | from_data | fields_of(text))

    def settings(self) -> Settings:
        return Settings(self.sample_steps, self.guidance, self.shift, self.overlap)


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse latents and texts of another dataset, windows that they do not have, and a base of another kind."""
    data.check_recipe(config, inputs, ("latents", "text"), (config.frames - 1) * config.stride + 1)
    base: Any = inputs.get("base")
    if base is not None and base.kind != config.kind:
        raise ValueError(f"base: a {base.kind} stage makes no Latte; name a {config.kind} stage, or a model")
    if base is not None and (base.latents is None) != (config.latents is None):
        raise ValueError("base: one of the two learns latents, the other pixels; name a base of the same")
