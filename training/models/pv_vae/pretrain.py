"""`pretrain_vae`: PV-VAE in the three phases of its paper (arXiv 2605.02134): images, predictive reconstruction, decoder.

In the predictive phase the encoder sees the first frames of a clip, the decoder reconstructs them and predicts the rest.
Beside the frames it must match the differences of neighbours, so that copying the last frame does not pay. In the last
phase the encoder stands still, and the decoder learns to show what the latents hold.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, Mixture, to_model, to_pixels
from longtake.datasets.loader.whole import longest
from longtake.datasets.stage import DatasetInput, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import checkpoint, data, registry, stage
from longtake.training.config import EvaluatedConfig, ModelName
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.perceptual import Perceptual, load_perceptual, perceptual_loss
from longtake.training.models.common import adversarial
from longtake.training.models.common.adversarial import GANConfig
from longtake.training.models.common.codec import frames_of, latent_groups
from longtake.training.models.pv_vae.evaluate import Frames
from longtake.training.models.pv_vae.evaluate import evaluate as measure
from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig, config_from_preset
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

VERSION = 4
PRODUCES = "model"
MODEL = "pv_vae"
SUMMARY = "heldout.json"

# what the phases differ in; a recipe may change each
PHASES: dict[str, dict[str, Any]] = {
    "image": {"frames": 1, "sizes": [[256, 256], [384, 384], [512, 512]], "steps": 300_000, "max_drop": 0.0},
    "predictive": {"frames": 17, "sizes": [[256, 256], [512, 512]], "steps": 50_000, "max_drop": 1.0},
    "decoder": {
        "frames": 17, "sizes": [[256, 256], [512, 512]], "steps": 50_000, "max_drop": 0.0, "freeze": ["encoder"], "gan_start": 0,
    },
}  # fmt: skip


class Config(GANConfig, EvaluatedConfig):
    """Train PV-VAE on a dataset and register it.

    No weight of a loss is published but where noted; they are assumptions, borrowed from the nearest public code.

    phase                   of the paper's schedule: the defaults that PHASES lists
    dataset                 to train on
    view                    which clips to use; null uses all
    parent                  the model to continue from; null begins with random weights
    model                   a preset with fields of PVVAEConfig to change: `{preset: pv_vae}`; null is the parent's
    frames                  of a window, 1 + 4n
    stride                  take every n-th frame
    sizes                   height and width of windows; batches of each in turn
    max_drop                r: at most this share of the latents after the first is dropped [paper]
    lambda_reconstruction   weight of the reconstruction
    lambda_motion           weight of the differences, inside the reconstruction term [paper]
    lambda_kl               weight of the KL divergence
    lambda_perceptual       weight of the perceptual loss; of no effect without `perceptual`
    perceptual              a feature network (see training.metrics.features) for the perceptual loss; null has no such loss
    perceptual_linear       LPIPS's weights of its channels
    perceptual_frames       frames of a clip that it sees, drawn each time; null takes all
    eval_long               the longest held-out clips, encoded whole and in pieces: PSNR by position, two passes a frame;
                            not for single frames
    """

    kind: Literal["pretrain_vae"]
    phase: Literal["image", "predictive", "decoder"] = "predictive"
    dataset: DatasetInput
    view: ViewInput | None = None
    parent: ModelInput | None = None
    name: ModelName = "pv-vae"
    model: dict[str, Any] | None = None
    frames: int = Field(17, ge=1)
    stride: int = Field(1, ge=1)
    sizes: tuple[tuple[int, int], ...] = Field(((256, 256),), min_length=1)
    max_drop: float = Field(1.0, ge=0, le=1)
    lambda_reconstruction: float = Field(1.0, ge=0)
    lambda_motion: float = Field(1.0, ge=0)
    lambda_kl: float = Field(1e-6, ge=0)
    lambda_perceptual: float = Field(1.0, ge=0)
    perceptual: str | None = None
    perceptual_linear: str | None = None
    perceptual_frames: int | None = Field(4, ge=1)
    eval_long: Annotated[int, Measuring()] = Field(8, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _phased(cls, given: Any) -> Any:
        return PHASES.get(given.get("phase", "predictive"), {}) | given if isinstance(given, dict) else given

    @field_validator("model")
    @classmethod
    def _known(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if model is not None:
            config_from_preset(**({"preset": "pv_vae"} | model))
        return model

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        if self.model is not None or self.parent is None:
            fits(self, self.vae())
        if self.lora is not None and self.parent is None:
            raise ValueError("lora: without a parent all else would stay random; name one, or leave it out")
        return self

    def vae(self) -> PVVAEConfig:
        """Of `model`, or the full size where that is not given."""
        return config_from_preset(**({"preset": "pv_vae"} | (self.model or {})))


def fits(config: Config, vae: PVVAEConfig) -> None:
    """ValueError where the model cannot divide the windows."""
    if (config.frames - 1) % vae.temporal_stride:
        near = frames_of(latent_groups(config.frames, vae.temporal_stride), vae.temporal_stride)
        raise ValueError(
            f"frames {config.frames}: the model needs 1 + {vae.temporal_stride}n frames, such as {near} or {near + vae.temporal_stride}"
        )
    for size in config.sizes:
        if any(side % vae.spatial_stride for side in size):
            raise ValueError(f"sizes {size[0]}x{size[1]}: the model needs multiples of {vae.spatial_stride}")


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a window that the clips of a `shard` stage cannot fill, and a model that is not the parent's."""
    parent = inputs.get("parent")
    if isinstance(parent, Config):
        if config.model is not None and config.vae() != parent.vae():
            raise ValueError("model: is not that of the parent; leave it out")
        fits(config, parent.vae())
    geometry = getattr(inputs.get("dataset"), "clip", None)
    if geometry is None:
        return
    if geometry.short_side < max(min(size) for size in config.sizes):
        raise ValueError(
            f"sizes: {max(min(size) for size in config.sizes)} is larger than clip.short_side {geometry.short_side} of the dataset"
        )
    span = (config.frames - 1) * config.stride + 1
    if geometry.max_frames < span:
        raise ValueError(
            f"frames: a window spans {span} frames, the dataset's clips have at most {geometry.max_frames}; raise clip.max_seconds"
        )


def warnings(config: Config) -> list[str]:
    """What to know before the first step."""
    said, taught = [], bool(config.perceptual and config.lambda_perceptual)
    if config.perceptual and not taught:
        said.append(
            "lambda_perceptual: is 0, so the network in `perceptual` measures, and teaches nothing; raise it, or leave out"
            " perceptual"
        )
    if config.lambda_gan and not taught:
        said.append(
            "lambda_gan: without a perceptual loss nothing but squared errors holds the discriminator's detail to what was"
            " there; name a feature network in `perceptual`, or set lambda_gan: 0"
        )
    # a parent's discriminator has learned alone before; either learns a step before it is heard
    alone = config.gan_warmup if config.parent is None else 0
    heard = config.gan_start + max(1, alone)
    if config.lambda_gan and config.steps <= heard:
        said.append(
            f"lambda_gan: training ends at step {config.steps}, and the generator would hear the discriminator from step"
            f" {heard} on (gan_start: {config.gan_start}{f', gan_warmup: {alone}' if alone else ''}); lower that, or set"
            " lambda_gan: 0"
        )
    return said


def outside(config: Config) -> str:
    """Changes with the files of the perceptual loss, and with the feature network."""
    return digest_of(config.perceptual, config.perceptual_linear, config.features)


class Setup(NamedTuple):
    """What the stage works with; `parent` has the discriminator that a new training continues, if any does."""

    inputs: Mapping[str, str]
    model: PVVAE
    parent: str | None


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """The model before its first step: the parent's, or a random one.

    Raises:
        UserError: the parent is no PV-VAE, or another than `model` says, or cannot divide the windows.
    """
    # a checkpoint has a discriminator of its own
    parent = None if checkpoint.latest(folder) else inputs.get("parent")
    return Setup(inputs, begin(config, inputs).to(device()), parent)


def begin(config: Config, inputs: Mapping[str, str]) -> PVVAE:
    """The model before its first step, on the CPU. Raises as `prepare`."""
    if config.parent is None:
        return PVVAE(config.vae())
    uri = inputs["parent"]
    model = registry.load(uri)
    if not isinstance(model, PVVAE):
        raise UserError(f"parent: {uri} is a {type(model).__name__}, not a PV-VAE")
    if config.model is not None and config.vae() != model.config:
        raise UserError(f"model: is not that of the parent {uri}; leave it out")
    try:
        fits(config, model.config)
    except ValueError as e:
        raise UserError(str(e)) from e
    return model.train()


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader | Mixture:
    """This rank's share of batches of each size in turn: `batch` clips of the first size, of others as many pixels."""
    share = data.share_of(config, rank, world) | {"crop": "random"}
    if len(config.sizes) == 1:
        return _loader(config, setup, "train", **share)
    first, batch, workers = config.sizes[0], share.pop("batch"), share.pop("workers")
    parts = {}
    for height, width in config.sizes:
        count = batch * first[0] * first[1] // (height * width) // world * world
        clips = _loader(config, setup, "train", size=(height, width), batch=max(world, count), **share)
        parts[f"{height}x{width}"] = (clips, 1.0)
    return Mixture(parts, seed=config.seed, workers=workers)


def _loader(config: Config, setup: Setup, split: str, **options: Any) -> Loader:
    window: dict[str, Any] = {"columns": ("video",), "size": config.sizes[0]}
    return data.loader(config, setup.inputs, split, **window | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The generator and, where `lambda_gan` asks for one, its discriminator, that of the parent if it fits.

    Raises:
        UserError: `features` takes no such videos, which would be seen at the end; no such network.
    """
    checked_network(config.features, config.frames, config.sizes[0])
    model, heldout = setup.model, _loader(config, setup, "val", **HELDOUT)
    modules: dict[str, nn.Module] = {"generator": model}
    state: dict[str, Tensor] = {}
    if config.lambda_gan:
        modules["discriminator"], state = adversarial.begin(config, setup.parent)
    perceptual = load_perceptual(config.perceptual, config.perceptual_linear, device=device())
    return Objective(
        modules,
        partial(_loss, config, model.config, perceptual, state),
        lead="generator",
        sample=partial(_sample, model.config, heldout),
        fps=6,
        tokens=partial(_tokens, model.config),
        blocks=list(model.blocks()),
        heldout=heldout,
        starts={"discriminator": config.gan_start},
        settings={"discriminator": adversarial.settings(config)},
        state=state,
    )


def _loss(
    config: Config, vae: PVVAEConfig, perceptual: Perceptual | None, state: Mapping[str, Tensor], turn: Turn
) -> tuple[Tensor, Terms]:
    video, engine = to_model(turn.batch["video"]), turn.engines[turn.name]
    if turn.name == "discriminator":
        return adversarial.discriminator_loss(config, state, engine, video, turn.carry["generated"])
    groups = latent_groups(video.shape[2], vae.temporal_stride)
    # k ~ U{0..floor((G-1) r)} groups are dropped, as many on each rank; the first frame always stays
    most = int((groups - 1) * config.max_drop)
    dropped = int(np.random.default_rng(turn.seed).integers(most + 1))
    generated, posterior = engine(video, visible=groups - dropped, rng=turn.rng)
    generated = generated.float()
    turn.carry["generated"] = generated.detach()
    reconstruction = partial(_reconstruction, config, perceptual, turn.rng, video)
    judge = turn.engines.get("discriminator")
    if judge is not None and adversarial.heard(config, state, turn.step):
        loss, terms = adversarial.generator_loss(config, state, generated, reconstruction, judge.module)
    else:
        loss, terms = reconstruction(generated)
    kl = posterior.kl().mean()
    loss = loss + config.lambda_kl * kl
    return loss, {"loss": loss.detach(), "kl": kl.detach()} | terms


def _reconstruction(
    config: Config, perceptual: Perceptual | None, rng: torch.Generator, video: Tensor, made: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of what was made of a video: of the frames, of their differences, of how alike they look."""
    frames = (made - video).square().mean()
    motion = (made.diff(dim=2) - video.diff(dim=2)).square().mean() if video.shape[2] > 1 else made.new_zeros(())
    terms = {"reconstruction": frames, "motion": motion}
    loss = config.lambda_reconstruction * (frames + config.lambda_motion * motion)
    if perceptual:
        terms["perceptual"] = perceptual_loss(perceptual, made, video, frames=config.perceptual_frames, rng=rng)
        loss = loss + config.lambda_perceptual * terms["perceptual"]
    return loss, {term: value.detach() for term, value in terms.items()}


def _sample(
    vae: PVVAEConfig, heldout: Loader, engines: Engines, rng: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """The first held-out clip and, beside it, its prediction from the first half."""
    video = to_model(next(heldout.at([0]))["video"].to(device()))
    visible = (latent_groups(video.shape[2], vae.temporal_stride) + 1) // 2
    predicted, _ = engines["generator"](video, visible=visible, rng=rng)
    both = torch.cat([video, predicted.float().clamp(-1, 1)], dim=4)[0].permute(1, 2, 3, 0)
    return {"predicted": to_pixels(both).cpu().numpy()}


def _tokens(vae: PVVAEConfig, batch: Batch) -> int:
    """Latent positions of a batch."""
    count, _, frames, height, width = batch["video"].shape
    return int(count * latent_groups(frames, vae.temporal_stride) * height * width // vae.spatial_stride**2)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Measure reconstructions and predictions of held-out clips, each rank its share."""
    measure(
        setup.model,
        _loader(config, setup, "val", **HELDOUT),
        folder,
        config.seed,
        config.eval_clips,
        load_perceptual(config.perceptual, config.perceptual_linear, device=device()),
        network=checked_network(config.features, config.frames, config.sizes[0]),
        latents=config.eval_latents,
        whole=_long(config, setup.inputs),
        probed=_loader(config, setup, "train", batch=1, seed=config.seed) if config.eval_probes else None,
        probe_clips=config.eval_probes,
    )


def _long(config: Config, inputs: Mapping[str, str]) -> list[Frames]:
    """The longest held-out clips that are longer than a window."""
    least = config.frames * config.stride + 1
    count = config.eval_long if config.frames > 1 else 0
    clips = longest(inputs["dataset"], "val", inputs.get("view"), config.sizes[0], count, least, data.cache_of(config))
    return [partial(clip.frames, config.sizes[0], config.stride) for clip in clips]


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says: the window that it has learned."""
    return {"window": {"frames": config.frames, "stride": config.stride, "size": list(config.sizes[0])}}


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split that were used, and that were not."""
    clips = _loader(config, setup, "train", batch=1)
    return {
        "train_clips": float(clips.samples),
        "train_clips_too_short": float(clips.samples_short),
        "train_clips_too_small": float(clips.samples_small),
    }


def keep(config: Config, folder: Path, scratch: Path) -> None:
    """Leave the discriminator with the run, where there is one."""
    if config.lambda_gan:
        weights, state = checkpoint.beside(folder, "discriminator")
        adversarial.save(scratch / adversarial.FILE, config, weights, state)
