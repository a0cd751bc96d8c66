"""The numbers of a MAVIN model, and the settings of `finetune_mavin`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from longtake.datasets.errors import UserError
from longtake.datasets.stage import DatasetInput, Input, ModelInput, StageConfig, ViewInput
from longtake.datasets.text import Text
from longtake.training import data
from longtake.training.config import ModelName
from longtake.training.models.common.recompute import Share
from longtake.training.models.common.text import check_fields, check_settings, fields_of
from longtake.training.models.generator import InfillSettings
from longtake.training.models.mavin.measures import MeasuredConfig
from longtake.training.models.mavin.spans import Spans, spans_of

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "mavin":           dict(body="dit", depth=28, width=1152, heads=16),  # as Latte-XL
    "mavin_small":     dict(body="dit", depth=12, width=384,  heads=6),
    "mavin_tiny":      dict(body="dit", depth=4,  width=128,  heads=4),
    "mavin_unet":      dict(body="unet", widths=(320, 640, 1280, 1280), cross_width=1024, head_width=64, groups=32),  # the paper's
    "mavin_unet_tiny": dict(body="unet", widths=(32, 64), cross_width=32, head_width=8, groups=8),
}
# fmt: on

_FROM_DATA = ("channels", "shape", "gap", "image_width")  # fields of MavinConfig that `model` must not have
_PRESET = {"preset": "mavin_small"}
_OF_BODY = {
    "dit": ("depth", "width", "heads", "patch", "mlp_ratio"),
    "unet": ("widths", "layers", "cross_width", "head_width", "groups"),
}

# by body and name, a regular expression of the parameters of a part: what `train` may name
PARTS: dict[str, dict[str, str]] = {
    "dit": {
        "temporal": r"body\.layers\.\d*[13579]\.",
        "attention": r"body\.layers\.\d+\.(qkv|out|cross)\.",
        "embedding": r"body\.(time_in\.|length_in\.|modulation_out\.|layers\.\d+\.modulation\.)",
        "guidance": r"guide\.",
    },
    "unet": {
        "temporal": r"body\..*temp_convs\.",
        "attention": r"body\..*\.attn[12]\.",
        "embedding": r"body\.(time_embedding\.|.*\.time_emb_proj\.)",
        "guidance": r"guide\.",
    },
}


class MavinConfig(BaseModel):
    """The numbers of one model. "Assumption" marks what the paper does not say.

    A window is A | M | B. A and B are encoded each as a clip of its own, so that neither has seen M; M goes on from A. Where
    the first latent of a clip stands for g frames and each further one for f, A and B of n latents are g + f (n - 1) frames,
    a gap of n latents is f n frames, and a window of T latents 2 g + f (T - 2) frames. Of PV-VAE that is 1, 5, 9, ..., then
    4, 8, 12, ..., and 6, 10, 14, ...; of pixels, and of an autoencoder of single frames, any number.

    body          unet, the paper's; or dit, blocks of a transformer over space and over time in turn [assumption]
    depth, width, heads, patch, mlp_ratio   of dit: blocks, channels of a token, heads, positions along a side of a token,
                  and hidden width of the MLPs over `width`
    widths        of unet, of each level; all but the last level have attention [paper: ModelScope's]
    layers        of unet, in a level
    cross_width   of unet, channels of what its spatial blocks attend to
    head_width    of unet, channels of a head
    groups        of unet, in each group norm
    channels      of the latents
    text_width, text_dropout, text_null, text_empty, text_padding, text_length   of text (see `common.text`)
    image_width   channels of the tokens of the two frames beside the gap; 0 is a model without
    image_dropout probability that training hides them [assumption: 0.1; paper: none]
    clean_time    what frames beside the gap have as their time: zero, or same, the gap's [paper: same]
    prediction    what the body gives: the velocity; or, as the paper's, the noise, of which the velocity follows (see
                  `schedule`). A public U-Net has learned the latter, so with `unet` it is noise unless you say otherwise
    mask_channel  a further channel says which latents are to be made, as other models of infilling have it; to compare with
                  [paper: none]
    shape         (latents, height, width) of training windows
    gap           the shortest and the longest gap of training, in latents
    activation_checkpointing   share of the blocks that the backward pass recomputes, true is all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    body: Literal["dit", "unet"] = "dit"
    depth: PositiveInt = 4
    width: PositiveInt = 128
    heads: PositiveInt = 4
    patch: PositiveInt = 1
    mlp_ratio: PositiveInt = 4
    widths: tuple[PositiveInt, ...] = Field((320, 640, 1280, 1280), min_length=1)
    layers: PositiveInt = 2
    cross_width: PositiveInt = 1024
    head_width: PositiveInt = 64
    groups: PositiveInt = 32
    channels: PositiveInt = 4
    text_width: NonNegativeInt = 0
    text_dropout: float = Field(0.1, ge=0, le=1)
    text_null: Literal["empty", "zeros", "learned"] = "empty"
    text_empty: NonNegativeInt = 0
    text_padding: Literal["mask", "zeros"] = "mask"
    text_length: PositiveInt = 512
    image_width: NonNegativeInt = 0
    image_dropout: float = Field(0.1, ge=0, le=1)
    clean_time: Literal["zero", "same"] = "zero"
    prediction: Literal["velocity", "noise"] = "velocity"
    mask_channel: bool = False
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    gap: tuple[PositiveInt, PositiveInt] | None = None
    activation_checkpointing: Share = False

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.body == "dit":
            if self.depth % 2:
                raise ValueError(f"depth is {self.depth}; blocks over space and time alternate, so it must be even")
            if self.width % self.heads or self.width % 4:
                raise ValueError(f"width is {self.width}; it must be a multiple of 4 and of heads, {self.heads}")
            if self.shape and (self.shape[1] % self.patch or self.shape[2] % self.patch):
                raise ValueError(f"shape: {self.shape[1]}x{self.shape[2]} is no multiple of patch {self.patch}")
        else:
            if odd := [width for width in self.widths if width % self.groups or width % self.head_width]:
                raise ValueError(
                    f"widths: {odd[0]} must be a multiple of groups, {self.groups}, and of head_width, {self.head_width}"
                )
            if self.widths[0] % 2:
                raise ValueError(f"widths: {self.widths[0]} must be even")
        if self.mask_channel and self.clean_time != "zero":
            raise ValueError("mask_channel: is read off the times, so clean_time must be zero")
        check_fields(self)
        return self

    @property
    def inputs(self) -> int:
        """Channels that the body sees."""
        return self.channels + self.mask_channel

    @property
    def cross(self) -> int:
        """Channels of the tokens that blocks attend to."""
        return self.width if self.body == "dit" else self.cross_width


def config_from_preset(preset: str, **overrides: Any) -> MavinConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return MavinConfig(**PRESETS[preset] | overrides)


class SpansConfig(StageConfig):
    """Which latents of a training window are noised (see `spans`).

    kind     variable, the paper's; fixed, of one length; random, latents one by one, for pixels alone. The last two are there
             to compare with
    starts   first and last start of a span, in latents; null is the paper's, scaled to the window [paper: 5 to 15 of 32]
    ends     first and last end [paper: 17 to 27 of 32]
    length   of fixed spans; null is the mean of the variable ones
    """

    kind: Literal["variable", "fixed", "random"] = "variable"
    starts: tuple[int, int] | None = None
    ends: tuple[int, int] | None = None
    length: int | None = Field(None, ge=1)


class Config(MeasuredConfig):
    """Train a model that fills the gap between two clips, and register it. "Assumption" marks what no paper gives.

    How gaps are filled, and what measures them, is in `MeasuredConfig`.

    dataset           to train on: its videos
    text              of the dataset's captions, to learn what they say; null learns none
    view              which clips to use; null uses all
    vae               the autoencoder whose latents are learned, frozen; null learns pixels
    base              the MAVIN to continue from; null begins with random weights, or those of `unet`
    unet              a folder with a public U-Net in the layout of diffusers, whose weights body unet begins with; latents
                      of an autoencoder of diffusers, its own, are then learned as they are
    model             a preset with fields of MavinConfig to change: `{preset: mavin_small}`; with a base none
    image             what the frames beside the gap are seen by: own, the project's features; a folder with CLIP's model of
                      pictures [paper: ViT-L/14], or one that is registered: the version that it names when the training
                      begins; a feature network's file; or null, they are not seen
    frames            of a window; with a vae 2 + 4n, since both clips are encoded apart [paper: 32]
    stride            take every n-th frame
    fps               frames per second of a window in place of `stride`: the nearest that a stride gives [paper: 8]
    size              height and width of the video
    flip              share of windows that are flipped, left to right [paper: 0.5]
    least_similarity  windows with neighbouring frames of a lower SSIM have a cut, and do not count [paper: 0.1]
    spans             which latents are noised
    train             parts that learn, of `config.PARTS`; all is everything. What `unet` lacks learns with them
                      [paper: temporal, attention, embedding]
    time_mean         mean of the logit-normal times [assumption]
    time_std          standard deviation of the logit-normal times [assumption]
    shift             of times towards noise, in training and sampling; 1 is none
    steps             of training [paper: 40,000]
    batch             windows in a step [paper: 1]
    lr                learning rate [paper: 5e-6, from a base]
    schedule          of the learning rate [paper: constant]
    """

    kind: Literal["finetune_mavin"]
    dataset: DatasetInput
    text: Annotated[str, Input("text")] | None = None
    view: ViewInput | None = None
    vae: ModelInput | None = None
    base: ModelInput | None = None
    unet: str | None = Field(None, min_length=1)
    name: ModelName = "mavin"
    model: dict[str, Any] | None = None
    image: str | None = Field("own", min_length=1)
    frames: int = Field(34, ge=3)
    stride: int = Field(1, ge=1)
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    size: tuple[PositiveInt, PositiveInt] = (64, 64)
    flip: float = Field(0.5, ge=0, le=1)
    least_similarity: float = Field(0.1, ge=-1, le=1)
    spans: SpansConfig = SpansConfig()
    train: Literal["all"] | tuple[str, ...] = "all"
    time_mean: float = Field(0.0, allow_inf_nan=False)
    time_std: float = Field(1.0, gt=0, allow_inf_nan=False)
    shift: float = Field(1.0, gt=0, allow_inf_nan=False)
    steps: int = Field(40_000, ge=1)
    batch: int = Field(8, ge=1)
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int | None = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"

    @field_validator("model")
    @classmethod
    def _without_data(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if derived := [name for name in _FROM_DATA if name in (model or {})]:
            raise ValueError(f"{derived[0]} follows from the stage's other settings; leave it out")
        return model

    @field_validator("train", mode="before")
    @classmethod
    def _listed(cls, train: Any) -> Any:
        if train != "all" and not isinstance(train, list | tuple):
            raise ValueError("write all, or a list of parts, such as [temporal]")
        return train

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_settings(self.model or {}, self.text)
        if self.fps is not None and self.stride != 1:
            raise ValueError("fps: stride is given too; leave one of them out")
        if self.guidance != 1 and self.text is None:
            raise ValueError("guidance: leads to a text, and the stage has none; set text, or leave it out")
        if self.image_guidance != 1 and self.image is None:
            raise ValueError("image_guidance: leads to frames that the model does not see; set image, or leave it out")
        if self.spans.length is not None and self.spans.kind != "fixed":
            raise ValueError(f"spans.length: {self.spans.kind} spans have none; set spans.kind: fixed, or leave it out")
        if self.spans.kind == "random":
            if self.vae is not None:
                raise ValueError("spans: random latents have no clip on either side to encode apart; leave out vae")
            if self.image is not None:
                raise ValueError("spans: random latents have no two frames beside them; set image: null")
        if self.base is not None:
            if self.model is not None or self.unet is not None:
                raise ValueError("base: has its own numbers and weights; leave out model and unet")
            return self
        if self.lora is not None:
            raise ValueError("lora: without a base all else would stay random; name one, or leave it out")
        if self.train != "all" and self.unet is None:
            raise ValueError("train: without a base or unet all else would stay random; name one, or leave it out")
        chosen = self.numbers
        if self.unet is not None and chosen.body != "unet":
            raise ValueError("unet: is of body unet; set model.preset: mavin_unet")
        if self.unet is not None and chosen.mask_channel:
            raise ValueError("unet: a public U-Net sees no mask; leave out model.mask_channel")
        other = _OF_BODY["unet" if chosen.body == "dit" else "dit"]
        if idle := [name for name in other if name in (self.model or {})]:
            raise ValueError(f"model.{idle[0]}: has no effect with body {chosen.body}; leave it out")
        if self.image is None and "image_dropout" in (self.model or {}):
            raise ValueError("model.image_dropout: has no effect without image; leave it out")
        check_parts(self.train, chosen.body)
        check_hidden(chosen, self.guidance, self.image_guidance)
        if self.vae is None:
            check_size(self.size, 1, chosen)
            spans = self.spans_of(self.frames)
            self.mavin(3, (self.frames, *self.size), spans, None)
        return self

    @property
    def numbers(self) -> MavinConfig:
        """Those of a model without a base, but for the ones that follow from data."""
        return config_from_preset(**_PRESET | (self.model or {}))

    @property
    def sampling(self) -> InfillSettings:
        """How gaps are filled."""
        names = ("shift", "guidance", "image_guidance", "mixer", "noise", "cutoff", "fall")
        return InfillSettings(self.sample_steps, **{name: getattr(self, name) for name in names})

    def spans_of(self, latents: int) -> Spans:
        """The spans of windows of so many latents. ValueError where they do not fit."""
        return spans_of(self.spans.kind, latents, self.spans.starts, self.spans.ends, self.spans.length)

    def mavin(
        self,
        channels: int,
        shape: tuple[int, int, int],
        spans: Spans,
        image_width: int | None,
        text: Text | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> MavinConfig:
        """The config of a model for this data; `changes` are those of a public U-Net."""
        from_data = {"channels": channels, "shape": shape, "gap": spans.gap, "image_width": image_width or 0}
        learned = {"prediction": "noise"} if self.unet else {}
        chosen = _PRESET | learned | (self.model or {}) | dict(changes or {})
        return config_from_preset(**chosen | from_data | fields_of(text))


def check_size(size: tuple[int, int], side: int, model: MavinConfig) -> None:
    """ValueError for a size that a model of latents, each of `side` x `side` pixels, does not divide."""
    patch = model.patch if model.body == "dit" else 1
    if size[0] % (side * patch) or size[1] % (side * patch):
        whose = " and ".join([f"the autoencoder's {side}"] * (side > 1) + [f"model.patch {patch}"] * (patch > 1))
        raise ValueError(f"size: {size[0]}x{size[1]} must be multiples of {side * patch}, by {whose}")


def check_parts(train: Literal["all"] | tuple[str, ...], body: Literal["dit", "unet"]) -> None:
    """ValueError for parts that a body does not have."""
    if train == "all":
        return
    if unknown := [name for name in train if name not in PARTS[body]]:
        raise ValueError(f"train: unknown {unknown[0][:40]!r}; there are all, or {', '.join(PARTS[body])}")
    if not train:
        raise ValueError("train: names no part, and nothing would learn")


def check_hidden(model: MavinConfig, guidance: float, image_guidance: float) -> None:
    """ValueError where guidance leads away from what training never hid, which the model does not know how to do without."""
    for name, strength, field, dropout in (
        ("guidance", guidance, "text_dropout", model.text_dropout),
        ("image_guidance", image_guidance, "image_dropout", model.image_dropout),
    ):
        if strength != 1 and not dropout:
            raise ValueError(f"{name}: is {strength:g}, and the model learns with {field}: 0; leave {name} at 1")


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse texts of another dataset, windows that its clips do not have, and a base of another kind."""
    clip = getattr(inputs.get("dataset"), "clip", None)
    rate = getattr(clip, "fps", None)
    stride = stride_of(config, rate) if rate else config.stride
    data.check_recipe(config, inputs, ("text",), (config.frames - 1) * stride + 1)
    base: Any = inputs.get("base")
    if base is not None and base.kind != config.kind:
        raise ValueError(f"base: a {base.kind} stage makes no MAVIN; name a {config.kind} stage, or a model")


def stride_of(config: Config, rate: float) -> int:
    """Every how many frames of clips of this rate a window takes. UserError for a rate above theirs."""
    if config.fps is not None and config.fps > 1.01 * rate:
        raise UserError(f"fps: {config.fps:g}: the clips have {rate:g} frames a second; set that or less")
    return config.stride if config.fps is None else max(1, round(rate / config.fps))
