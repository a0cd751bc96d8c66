"""The settings of `pretrain_tats`, and their agreement with the stages before it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from longtake.datasets.stage import DatasetInput, Input, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import data
from longtake.training.config import ModelName, TrainConfig
from longtake.training.models.common.guidance import GuidanceSetting
from longtake.training.models.common.text import check_settings
from longtake.training.models.generator import Settings
from longtake.training.models.tats.gpt_config import Mode, TATSConfig, config_from_preset

# fields of TATSConfig that `model` must not have
_FROM_DATA = ("codes", "shape", "mode", "every", "classes", "words", "audio_codes", "audio_tokens")
_PRESET = {"preset": "tats_paper"}
_WORDS = 1024


class Config(TrainConfig):
    """Train a transformer on a dataset's tokens, and register it.

    A hierarchy is two trainings: `mode: anchors` on windows of many latent frames, then `mode: interpolate` on windows of
    `every` + 1 with the first as its `anchors`. Defaults are TATS's [paper], or its code's where noted; "assumption" marks
    those that neither gives.

    dataset        to train on
    tokens         of the dataset, windows of which are learned
    captions       learn their words, as tokens in front of the video's
    text           of the dataset's captions, to learn what they say, in place of their words
    audio_tokens   of the dataset's sound, of the same windows, to learn to hear
    view           which clips to use; null uses all
    base           the TATS to continue from, with its words; null begins with random weights
    anchors        the model that makes the anchors, for mode interpolate, with its words
    model          a preset with fields of TATSConfig to change: `{preset: tats_paper}`; with a base, fields alone
    mode           base: all latent frames; anchors: every `every`-th; interpolate: those between two anchors
    every          latent frames from an anchor to the next [paper: 4]
    classes        learn the dataset's labels
    words          most tokens in the vocabulary of `captions`; null is 1024 [MUGEN's code; paper: CLIP's 49,408]
    loss_chunk     windows' tokens whose logits there are at once; null: those of all. With fewer the backward pass makes
                   them again: less memory, more time
    steps          of training [paper: 500,000; 30,000 for interpolate]
    batch          windows in a step [paper: 24]
    lr             learning rate [code: 1.08e-4]
    warmup_steps   of a linear warm-up [paper: none]
    schedule       of the learning rate [code: constant]
    betas          of Adam [code]
    weight_decay   of linear weights [code: 0.01]
    ema_half_lives half-lives of weight averages, in steps [code: none]
    temperature    of samples; those of a hierarchy's anchors have the settings of their own training
    top_k          samples are drawn among so many likeliest tokens; 0 is all [code: 2048]
    top_p          and among the likeliest that reach this probability together [code: 0.8]
    keep           latent frames of the past that each further window has; 0 is all but one [paper; its code has 1]
    guidance       of samples with a class, a text or a sound; 1 is none [paper: none]. {classes: 2, audio: 3} sets each
    eval_clips     held-out windows, at most
    eval_videos    videos generated at the end, of one window each, and one more that is longer
    eval_frames    frames of the longer video; null is four windows [paper: 1024]
    features       a feature network (see training.metrics.features) for the Fréchet and kernel distances of generated videos
                   to held-out ones, chunk by chunk; null measures none
    classifier     a TorchScript classifier of clips (see training.metrics.classifier) for the inception score, and for
                   whether later chunks keep the first one's class; null measures none
    eval_chunk     frames of a chunk [paper: 16]. With either network all `eval_videos` have `eval_frames`
    eval_splits    parts of the videos whose inception scores are averaged [StyleGAN-V: 10]
    """

    SHARED: ClassVar[bool] = True
    LATER: ClassVar = {"loss_chunk": None}

    kind: Literal["pretrain_tats"]
    dataset: DatasetInput
    tokens: Annotated[str, Input("tokens")]
    captions: Annotated[str, Input("captions")] | None = None
    text: Annotated[str, Input("text")] | None = None
    audio_tokens: Annotated[str, Input("tokens")] | None = None
    view: ViewInput | None = None
    base: ModelInput | None = None
    anchors: ModelInput | None = None
    name: ModelName = "tats"
    model: dict[str, Any] | None = None
    mode: Mode = "base"
    every: int = Field(4, ge=2)
    classes: bool = False
    words: int | None = Field(None, ge=2)
    loss_chunk: int | None = Field(None, ge=1)
    steps: int = Field(500_000, ge=1)
    batch: int = Field(24, ge=1)
    lr: float = Field(1.08e-4, gt=0)
    warmup_steps: int | None = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    ema_half_lives: tuple[float, ...] = ()
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(2048, ge=0)
    top_p: float = Field(0.8, gt=0, le=1)
    keep: int = Field(0, ge=0)
    guidance: GuidanceSetting = 1.0
    eval_clips: Annotated[int, Measuring()] = Field(512, ge=1)
    eval_videos: Annotated[int, Measuring()] = Field(8, ge=1)
    eval_frames: Annotated[int | None, Measuring()] = Field(None, ge=1)
    features: Annotated[str | None, Measuring()] = None
    classifier: Annotated[str | None, Measuring()] = None
    eval_chunk: Annotated[int, Measuring()] = Field(16, ge=1)
    eval_splits: Annotated[int, Measuring()] = Field(10, ge=1)

    @field_validator("model")
    @classmethod
    def _known_fields(cls, model: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if derived := [name for name in _FROM_DATA if name in (model or {})]:
            raise ValueError(f"{derived[0]} follows from the stage's other settings; leave it out")
        if info.data.get("base") is None:
            text = {"text_width": 1, "text_empty": 1} if info.data.get("text") else {}
            config_from_preset(**_PRESET | (model or {}) | {"codes": 1, "shape": (1, 1, 1)} | text)
        return model

    @model_validator(mode="after")
    def _valid_model(self) -> "Config":
        model = self.model or {}
        # words are hidden as texts are
        check_settings({name: v for name, v in model.items() if name != "text_dropout" or not self.captions}, self.text)
        if "audio_dropout" in model and not self.audio_tokens:
            raise ValueError(
                "model: audio_dropout: has no effect without sound; name its tokens in audio_tokens, or leave it out"
            )
        if self.base is None:
            if self.lora is not None:
                raise ValueError("lora: without a base all else would stay random; name one, or leave it out")
        elif "preset" in model:
            raise ValueError("model: preset: the base has its own; leave it out, or the base")
        elif unknown := model.keys() - TATSConfig.model_fields.keys():
            raise ValueError(f"model: unknown {min(unknown)}; there are {', '.join(TATSConfig.model_fields)}")
        return self

    @model_validator(mode="after")
    def _valid_measures(self) -> "Config":
        for name in ("features", "classifier"):
            if self.mode == "anchors" and getattr(self, name):
                raise ValueError(
                    f"{name}: mode anchors makes no whole videos; name it in the stage of mode interpolate"
                )
        of_videos = ("eval_videos", "eval_frames", "eval_chunk", "eval_splits")
        for name in of_videos if self.mode == "anchors" else ():
            # a config that went through JSON names all fields
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: mode anchors makes no whole videos; leave it out")
        if self.features and self.eval_videos < 2:
            raise ValueError("eval_videos: 1; a distance needs 2 or more")
        if self.classifier and self.eval_videos < 2 * self.eval_splits:
            raise ValueError(
                f"eval_splits: {self.eval_splits} parts need {2 * self.eval_splits} videos or more; raise eval_videos, which is"
                f" {self.eval_videos}, or lower it"
            )
        if self.eval_frames and (self.features or self.classifier) and self.eval_frames < self.eval_chunk:
            raise ValueError(
                f"eval_frames: {self.eval_frames} are less than a chunk, {self.eval_chunk}; raise it, or lower eval_chunk"
            )
        return self

    @model_validator(mode="after")
    def _valid_inputs(self) -> "Config":
        if (self.mode == "interpolate") != (self.anchors is not None):
            raise ValueError("anchors: mode interpolate needs the model that makes its anchors, and no other mode does")
        if self.keep and self.mode == "interpolate":
            raise ValueError("keep: is of the windows of anchors; set it in their stage")
        if self.captions and self.text:
            raise ValueError("text: a model learns the words of captions or their states; leave one out")
        if self.words is not None and (not self.captions or self.base or self.anchors):
            raise ValueError(
                "words: is the size of the vocabulary of `captions` where no base or anchors have one; leave it out"
            )
        return self

    def tats(self, from_data: Mapping[str, Any]) -> TATSConfig:
        """The config of a model that is trained from scratch."""
        return config_from_preset(**_PRESET | (self.model or {}) | dict(from_data))

    def settings(self) -> Settings:
        return Settings(
            guidance=self.guidance, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, keep=self.keep
        )

    @property
    def vocabulary(self) -> int:
        """The most tokens in the vocabulary of captions."""
        return self.words or _WORDS


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse tokens, captions and texts of another dataset, and a base or anchors of another kind."""
    data.check_recipe(config, inputs, ("tokens", "captions", "text", "audio_tokens"), 1)
    for field, mode in (("base", config.mode), ("anchors", "anchors")):
        stage: Any = inputs.get(field)
        if stage is None:
            continue
        if stage.kind != config.kind:
            raise ValueError(f"{field}: a {stage.kind} stage makes no TATS; name a {config.kind} stage, or a model")
        if stage.mode != mode:
            raise ValueError(f"{field}: is of mode {stage.mode}; name one of mode {mode}")
        theirs, ours = ((each.classes, bool(each.captions), bool(each.audio_tokens)) for each in (stage, config))
        if theirs != ours:
            raise ValueError(
                f"{field}: learns other conditions; give both `classes`, `captions` and `audio_tokens`, or neither"
            )
