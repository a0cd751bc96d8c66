"""`pretrain_vqgan`: the autoencoder of TATS (arXiv 2204.03638), which makes tokens of videos.

The reconstruction is held by absolute errors, a perceptual loss and, from a step on, two discriminators and their features.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, to_model, to_pixels
from longtake.datasets.stage import DatasetInput, StageConfig, ViewInput
from longtake.training import data, stage
from longtake.training.config import EvaluatedConfig, ModelName
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, networks, untraced, video_batch
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.perceptual import Perceptual, load_perceptual, perceptual_loss
from longtake.training.models.common import patchgan
from longtake.training.models.common.codec import nearest_lengths
from longtake.training.models.tats.vqgan import VQGAN, VQGANConfig, config_from_preset
from longtake.training.models.tats.vqgan_evaluate import evaluate as measure
from longtake.training.models.tats.vqgan_losses import Discriminators, frame_numbers, frames_at, judging, pleasing
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

VERSION = 1
PRODUCES = "model"
MODEL = "vqgan"
SUMMARY = "reconstructed.json"

_WARM_STEPS = {"vqgan_tiny": 200}  # by preset; a short training does not get over an early collapse of the codes


class Config(EvaluatedConfig):
    """Train the VQGAN of TATS on a dataset and register it.

    Defaults are those of the paper's code, whose rate is for the whole batch. Its averages of the codes are of passes, so
    they follow faster where a step has several. `ema_half_lives` would average all but the codes, which follow the encoder
    as it is.

    dataset             to train on
    view                which clips to use; null uses all
    model               a preset with fields of VQGANConfig to change: `{preset: vqgan_paper}`
    frames              of a window, in multiples of the model's temporal stride [paper: 16]
    stride              take every n-th frame [paper: 1]
    size                height and width of windows [paper: 128, 128]
    warm_steps          steps without the codebook, which is then seeded by the latents [paper: 0; vqgan_tiny: 200]
    lambda_l1           weight of the absolute error of pixels, in units of the range 0..1 [paper's code: 4]
    lambda_perceptual   weight of the perceptual loss of a random frame of each clip; without effect if `perceptual` is null
                        [paper's code: 4]
    perceptual          a feature network (see training.metrics.features) for the perceptual loss; null has no such loss
    perceptual_linear   LPIPS's weights for the network's channels
    lambda_gan          weight of the loss of either discriminator; 0 trains none [paper's code: 1]
    lambda_features     weight of the feature matching, times lambda_gan [paper's code: 4]
    discriminator       a preset with fields of PatchGANConfig to change, for frames and clips alike
    gan_start           step from which the discriminators learn and are heard [paper's code: 10000]
    """

    kind: Literal["pretrain_vqgan"]
    dataset: DatasetInput
    view: ViewInput | None = None
    name: ModelName = "vqgan"
    model: dict[str, Any] = Field(default_factory=lambda: {"preset": "vqgan_paper"})
    frames: int = Field(16, ge=1)
    stride: int = Field(1, ge=1)
    size: tuple[int, int] = (128, 128)
    warm_steps: int = Field(0, ge=0)
    lambda_l1: float = Field(4.0, ge=0)
    lambda_perceptual: float = Field(4.0, ge=0)
    perceptual: str | None = None
    perceptual_linear: str | None = None
    lambda_gan: float = Field(1.0, ge=0)
    lambda_features: float = Field(4.0, ge=0)
    discriminator: dict[str, Any] = Field(default_factory=lambda: {"preset": "patchgan"})
    gan_start: int = Field(10_000, ge=0)
    steps: int = Field(30_000, ge=1)
    batch: int = Field(96, ge=1)
    lr: float = Field(9e-5, gt=0)
    warmup_steps: int | None = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0)
    ema_half_lives: tuple[float, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_preset(cls, fields: Any) -> Any:
        model = fields.get("model") if isinstance(fields, dict) else None
        preset = model.get("preset") if isinstance(model, dict) else None
        return {"warm_steps": _WARM_STEPS[preset]} | fields if preset in _WARM_STEPS else fields

    @field_validator("model")
    @classmethod
    def _valid_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        _model_config(model)
        return model

    @field_validator("discriminator")
    @classmethod
    def _valid_discriminator(cls, model: dict[str, Any]) -> dict[str, Any]:
        _discriminator_config(model)
        return model

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        model = self.vae()
        low, high = nearest_lengths(self.frames, model.temporal_stride, model.first_frames)
        if self.frames != low:
            raise ValueError(
                f"frames {self.frames}: the model needs {model.temporal_stride}n frames, such as {low} or {high}"
            )
        if any(side % model.spatial_stride for side in self.size):
            raise ValueError(f"size {self.size[0]}x{self.size[1]}: the model needs multiples of {model.spatial_stride}")
        self.check_probes(self.frames // model.temporal_stride)
        if self.warm_steps >= self.steps:
            raise ValueError(
                f"warm_steps {self.warm_steps}: leave none of {self.steps} steps to the codebook; lower them"
            )
        if self.lora is not None:
            raise ValueError("lora: all else would stay random; leave it out")
        return self

    def vae(self) -> VQGANConfig:
        """The config of `model`."""
        return _model_config(self.model)


def _model_config(model: Mapping[str, Any]) -> VQGANConfig:
    return config_from_preset(**({"preset": "vqgan_paper"} | dict(model)))


def _discriminator_config(model: Mapping[str, Any]) -> patchgan.PatchGANConfig:
    return patchgan.config_from_preset(**({"preset": "patchgan"} | dict(model)))


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a window that does not fit into the clips of a `shard` stage."""
    data.check_recipe(config, inputs, (), (config.frames - 1) * config.stride + 1)
    clip = getattr(inputs.get("dataset"), "clip", None)
    if clip is not None and clip.short_side < min(config.size):
        raise ValueError(f"size: {min(config.size)} is larger than clip.short_side {clip.short_side} of the dataset")


def warnings(config: Config) -> list[str]:
    """Lines to print before the first step."""
    lines = []
    if config.perceptual and not config.lambda_perceptual:
        lines.append("lambda_perceptual: is 0, so the network in `perceptual` measures, and teaches nothing; raise it")
    if config.lambda_gan and config.steps <= config.gan_start:
        lines.append(
            f"lambda_gan: training ends at step {config.steps}, before the discriminators begin (gan_start:"
            f" {config.gan_start}); lower that, or set lambda_gan: 0"
        )
    elif config.lambda_gan and not (config.perceptual and config.lambda_perceptual):
        lines.append(
            "lambda_gan: without a perceptual loss nothing but absolute errors holds the discriminators' detail to what was"
            " there; name a feature network in `perceptual`, or set lambda_gan: 0"
        )
    return lines


def outside(config: Config) -> str:
    """Changes with the files of the perceptual loss, and with the feature network."""
    return digest_of(config.perceptual, config.perceptual_linear, config.features)


class Setup(NamedTuple):
    """All that the stage works with."""

    inputs: Mapping[str, str]
    model: VQGAN


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """The model with random weights."""
    return Setup(inputs, VQGAN(config.vae()).to(device()))


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's batches of random windows."""
    return _loader(config, setup, "train", **data.share_of(config, rank, world), crop="random")


def _loader(config: Config, setup: Setup, split: str, **options: Any) -> Loader:
    window: dict[str, Any] = {"columns": ("video",), "size": config.size}
    return data.loader(config, setup.inputs, split, **window | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The generator and, unless `lambda_gan` is 0, its discriminators.

    Raises:
        UserError: the network `features` does not take such videos; a network cannot be found.
    """
    checked_network(config.features, config.frames, config.size)
    model, heldout = setup.model, _loader(config, setup, "val", **HELDOUT)
    modules: dict[str, nn.Module] = {"generator": model}
    if config.lambda_gan:
        modules["discriminator"] = Discriminators(_discriminator_config(config.discriminator)).to(device())
    perceptual = load_perceptual(config.perceptual, config.perceptual_linear, device=device())
    return Objective(
        modules,
        partial(_loss, config, perceptual),
        lead="generator",
        sample=partial(_sample, heldout),
        fps=6,
        tokens=partial(_tokens, model.config),
        blocks=list(model.blocks()),
        heldout=heldout,
        starts={"discriminator": config.gan_start},
    )


def _loss(config: Config, perceptual: Perceptual | None, turn: Turn) -> tuple[Tensor, Terms]:
    """The loss of the engine whose turn it is, and its terms."""
    video, engine = to_model(turn.batch["video"]), turn.engines[turn.name]
    if turn.name == "discriminator":
        loss, terms = judging(engine, turn.carry["made"], video, turn.carry["numbers"])
        return config.lambda_gan * loss, terms

    made, _, commitment, usage = engine(video, quantise=turn.step >= config.warm_steps)
    made, numbers = made.float(), frame_numbers(video, turn.rng)
    turn.carry.update(made=made.detach(), numbers=numbers)
    # pixels in [-1, 1] differ by twice as much as those in 0..1
    terms = {"l1": (made - video).abs().mean() / 2, "commitment": commitment}
    loss = config.lambda_l1 * terms["l1"] + config.vae().commitment * commitment
    if perceptual:
        terms["perceptual"] = perceptual_loss(perceptual, frames_at(made, numbers), frames_at(video, numbers))
        loss = loss + config.lambda_perceptual * terms["perceptual"]
    discriminator = turn.engines.get("discriminator")
    if discriminator is not None and turn.step >= config.gan_start:
        terms["gan"], terms["features"] = pleasing(discriminator.module, made, video, numbers)
        loss = loss + config.lambda_gan * (terms["gan"] + config.lambda_features * terms["features"])
    terms |= {"loss": loss, "usage": usage.share, "perplexity": usage.perplexity}
    return loss, {name: value.detach() for name, value in terms.items()}


def model_of(config: Config, inputs: Mapping[str, Source]) -> VQGANConfig:
    """See `training.fit`."""
    return config.vae()


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`."""
    with untraced():
        perceptual = load_perceptual(config.perceptual, config.perceptual_linear, device=device())
    modules: dict[str, nn.Module] = {"generator": VQGAN(config.vae())}
    if config.lambda_gan:
        modules["discriminator"] = Discriminators(_discriminator_config(config.discriminator))
    starts, loss = {"discriminator": config.gan_start}, partial(_loss, config, perceptual)
    batch = video_batch(count, config.frames, *config.size)
    return Largest(Objective(modules, loss, "generator", starts=starts), batch, networks(perceptual))


def _sample(heldout: Loader, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """The first held-out clip and, beside it, its reconstruction."""
    video = to_model(next(heldout.at([0]))["video"].to(device()))
    made, *_ = engines["generator"](video)
    panels = torch.cat([video, made.float().clamp(-1, 1)], dim=4)[0].permute(1, 2, 3, 0)
    return {"reconstructed": to_pixels(panels).cpu().numpy()}


def _tokens(model: VQGANConfig, batch: Batch) -> int:
    """Tokens of a batch."""
    count, _, frames, height, width = batch["video"].shape
    return int(count * frames * height * width // (model.temporal_stride * model.spatial_stride**2))


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Measure reconstructions and tokens of held-out clips, each rank its share."""
    measure(
        setup.model,
        _loader(config, setup, "val", **HELDOUT),
        folder,
        config.seed,
        config.eval_clips,
        load_perceptual(config.perceptual, config.perceptual_linear, device=device()),
        shifted=_shifted(config, setup),
        network=checked_network(config.features, config.frames, config.size),
        latents=config.eval_latents,
        probed=_loader(config, setup, "train", batch=1, seed=config.seed) if config.eval_probes else None,
        probe_clips=config.eval_probes,
    )


def _shifted(config: Config, setup: Setup) -> Loader | None:
    """Held-out clips that are longer than a window by a latent frame; None where there are none."""
    frames = config.vae().temporal_stride
    if config.frames == frames:
        return None
    try:
        return _loader(config, setup, "val", **HELDOUT, frames=config.frames + frames)
    except UserError:
        # the windows themselves have been found
        return None


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The field of config.json: the window of training."""
    return {"window": {"frames": config.frames, "stride": config.stride, "size": list(config.size)}}


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, and too small."""
    clips = _loader(config, setup, "train", batch=1)
    return data.clip_counts(clips, too_small=clips.samples_small)
