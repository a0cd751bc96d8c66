"""`pretrain_vae`: PV-VAE in the three phases of its paper (arXiv 2605.02134): images, predictive reconstruction, decoder.

A `parent` may be a video autoencoder of diffusers: its decoder can be fine-tuned, and it can be taught to predict.

In the predictive phase the encoder sees the first frames of a clip, the decoder reconstructs them and predicts the rest.
A loss on differences of neighbouring frames makes copying the last frame a bad prediction. In the last phase the encoder is
frozen, and the decoder learns to reconstruct from the latents.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, Mixture, to_model, to_pixels
from longtake.datasets.loader.whole import longest
from longtake.datasets.stage import DatasetInput, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import checkpoint, data, stage
from longtake.training.config import EvaluatedConfig, ModelName
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, module_of, networks, untraced, video_batch
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.perceptual import Perceptual, load_perceptual, perceptual_loss
from longtake.training.models.common import adversarial
from longtake.training.models.common.adversarial import GANConfig
from longtake.training.models.common.autoencoder import VideoAutoencoder
from longtake.training.models.common.codec import latent_groups, load_codec, nearest_lengths
from longtake.training.models.common.patchgan import PatchGAN
from longtake.training.models.common.recompute import Share
from longtake.training.models.pv_vae.evaluate import Frames
from longtake.training.models.pv_vae.evaluate import evaluate as measure
from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig, config_from_preset
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

VERSION = 4
PRODUCES = "model"
MODEL = "pv_vae"
SUMMARY = "heldout.json"

# defaults by phase; a recipe may change each
PHASES: dict[str, dict[str, Any]] = {
    "image": {"frames": 1, "sizes": [[256, 256], [384, 384], [512, 512]], "steps": 300_000, "max_drop": 0.0},
    "predictive": {"frames": 17, "sizes": [[256, 256], [512, 512]], "steps": 50_000, "max_drop": 1.0},
    "decoder": {
        "frames": 17, "sizes": [[256, 256], [512, 512]], "steps": 50_000, "max_drop": 0.0, "freeze": ["encoder"], "gan_start": 0,
    },
}  # fmt: skip


class Config(GANConfig, EvaluatedConfig):
    """Train PV-VAE on a dataset and register it.

    Weights of losses are assumptions from the nearest public code, except where a source is noted.

    phase                   of the paper's schedule; sets the defaults in PHASES
    dataset                 to train on
    view                    which clips to use; null uses all
    parent                  the model to continue from: also a folder or registered pipeline of diffusers, whose VAE is
                            taken; null begins with random weights
    model                   a preset with fields of PVVAEConfig to change: `{preset: pv_vae}`; null is the parent's
    padding                 what a parent that does not predict yet gets in place of unseen latents; without effect if nothing
                            is dropped
    recompute               share of a parent's res blocks that the backward pass recomputes, true is all: less memory, more time;
                            null: as its config says
    frames                  of a window, 1 + 4n
    stride                  take every n-th frame
    sizes                   height and width of windows; batches of each in turn
    max_drop                largest share of the latents after the first that is dropped [paper: r]
    lambda_reconstruction   weight of the reconstruction
    lambda_motion           weight of the differences of frames, inside the reconstruction term [paper]
    lambda_kl               weight of the KL divergence
    lambda_perceptual       weight of the perceptual loss; without effect if `perceptual` is null
    perceptual              a feature network (see training.metrics.features) for the perceptual loss; null has no such loss
    perceptual_linear       LPIPS's weights for the network's channels
    perceptual_frames       random frames of a clip that it sees; null takes all
    eval_long               number of longest held-out clips whose PSNR by position is measured, whole and in windows, which
                            takes two passes a frame; not for single frames
    """

    LATER: ClassVar = {"padding": "token", "recompute": None}

    kind: Literal["pretrain_vae"]
    phase: Literal["image", "predictive", "decoder"] = "predictive"
    dataset: DatasetInput
    view: ViewInput | None = None
    parent: ModelInput | None = None
    name: ModelName = "pv-vae"
    model: dict[str, Any] | None = None
    padding: Literal["token", "noise"] = "token"
    recompute: Share | None = None
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
    def _defaults_of_phase(cls, fields: Any) -> Any:
        return PHASES.get(fields.get("phase", "predictive"), {}) | fields if isinstance(fields, dict) else fields

    @field_validator("model")
    @classmethod
    def _valid_model(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if model is not None:
            config_from_preset(**({"preset": "pv_vae"} | model))
        return model

    @model_validator(mode="after")
    def _valid_windows(self) -> "Config":
        # one frame is one latent, and more are more than one
        self.check_probes(self.frames)
        if known := self.encoder():
            check_windows(self, known)
        if self.lora is not None and self.parent is None:
            raise ValueError("lora: without a parent all else would stay random; name one, or leave it out")
        if self.recompute is not None and self.parent is None:
            raise ValueError("recompute: is of a parent; set model.activation_checkpointing of a new model")
        return self

    def vae(self) -> PVVAEConfig:
        """The config of `model`, or of the full size if that is null."""
        return config_from_preset(**({"preset": "pv_vae"} | (self.model or {})))

    def encoder(self) -> PVVAEConfig | None:
        """The config of the model, as far as its strides go; None where only the parent's files would say."""
        return self.vae() if self.model is not None or self.parent is None else None


def check_windows(config: Config, vae: Any) -> None:
    """Raise ValueError if the model cannot divide the windows."""
    stride = vae.temporal_stride
    low, high = nearest_lengths(config.frames, stride)
    if low != high:
        raise ValueError(f"frames {config.frames}: the model needs 1 + {stride}n frames, such as {low} or {high}")
    for size in config.sizes:
        if any(side % vae.spatial_stride for side in size):
            raise ValueError(f"sizes {size[0]}x{size[1]}: the model needs multiples of {vae.spatial_stride}")


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a window that does not fit into the clips of a `shard` stage, and a model other than the parent's."""
    parent = inputs.get("parent")
    if isinstance(parent, Config) and (known := parent.encoder()):
        if config.model is not None and config.vae() != known:
            raise ValueError("model: is not that of the parent; leave it out")
        check_windows(config, known)
    clip = getattr(inputs.get("dataset"), "clip", None)
    side = max(min(size) for size in config.sizes)
    if clip is not None and clip.short_side < side:
        raise ValueError(f"sizes: {side} is larger than clip.short_side {clip.short_side} of the dataset")
    data.check_recipe(config, inputs, (), (config.frames - 1) * config.stride + 1)


def warnings(config: Config) -> list[str]:
    """Lines to print before the first step."""
    lines, has_perceptual = [], bool(config.perceptual and config.lambda_perceptual)
    if config.perceptual and not has_perceptual:
        lines.append(
            "lambda_perceptual: is 0, so the network in `perceptual` measures, and teaches nothing; raise it, or leave out"
            " perceptual"
        )
    if config.lambda_gan and not has_perceptual:
        lines.append(
            "lambda_gan: without a perceptual loss nothing but squared errors holds the discriminator's detail to what was"
            " there; name a feature network in `perceptual`, or set lambda_gan: 0"
        )
    # a parent's discriminator needs no warm-up, but each learns one step before the generator's first GAN loss
    warmup = config.gan_warmup if config.parent is None else 0
    first = config.gan_start + max(1, warmup)
    if config.lambda_gan and config.steps <= first:
        lines.append(
            f"lambda_gan: training ends at step {config.steps}, and the generator would hear the discriminator from step"
            f" {first} on (gan_start: {config.gan_start}{f', gan_warmup: {warmup}' if warmup else ''}); lower that, or set"
            " lambda_gan: 0"
        )
    return lines


def outside(config: Config) -> str:
    """Changes with the files of the perceptual loss, and with the feature network."""
    return digest_of(config.perceptual, config.perceptual_linear, config.features)


class Setup(NamedTuple):
    """All that the stage works with.

    parent      the model whose discriminator a new training continues
    batches     of a training that goes on, the windows in a batch of each of its sizes
    """

    inputs: Mapping[str, str]
    model: VideoAutoencoder
    parent: str | None
    batches: tuple[int, ...] = ()


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """The model before its first step: the parent's, or a random one.

    Raises:
        UserError: the parent is no such autoencoder, differs from `model`, or cannot divide the windows.
    """
    path, model = checkpoint.latest(folder), begin(config, inputs).to(device())
    if path is None:
        return Setup(inputs, model, inputs.get("parent"))
    # a checkpoint has a discriminator of its own
    batches = checkpoint.meta(path)["loader"]["batch"]
    return Setup(inputs, model, None, tuple(batches) if isinstance(batches, list) else ())


def begin(config: Config, inputs: Mapping[str, str]) -> VideoAutoencoder:
    """The model before its first step, on the CPU. Raises as `prepare`."""
    if config.parent is None:
        return PVVAE(config.vae())
    uri = inputs["parent"]
    model = load_codec(uri)
    if not isinstance(model, VideoAutoencoder):
        raise UserError(f"parent: {uri} is a {type(model).__name__}, which `pretrain_vae` cannot go on with")
    if config.model is not None and config.vae() != model.config:
        raise UserError(f"model: is not that of the parent {uri}; leave it out")
    try:
        check_windows(config, model.config)
    except ValueError as e:
        raise UserError(str(e)) from e
    # a folder of another library may be in half precision
    model = _with(config, model.float()).train()
    if "encoder" in config.freeze:
        model.freeze_encoder()
    return model


def _with(config: Config, model: VideoAutoencoder) -> VideoAutoencoder:
    """The parent as it is trained: with padding where it shall predict, and recomputed blocks where that is asked for."""
    changed: dict[str, Any] = {} if config.recompute is None else {"activation_checkpointing": config.recompute}
    if model.padding is None and config.max_drop:
        changed["padding"] = config.padding
    return model.changed(**changed) if changed else model


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader | Mixture:
    """This rank's batches of each size in turn: `batch` clips of the first size, about as many pixels of the others.

    They divide among the processes that a training begins with, and stay as they are on others.

    Raises:
        UserError: they do not divide among the others.
    """
    share = data.share_of(config, rank, world) | {"crop": "random"}
    if len(config.sizes) == 1:
        return _loader(config, setup, "train", **share)
    first, batch, workers = config.sizes[0], share.pop("batch"), share.pop("workers")
    counts = [max(world, batch * first[0] * first[1] // (h * w) // world * world) for h, w in config.sizes]
    if len(setup.batches) == len(counts):
        counts = list(setup.batches)
    if math.gcd(*counts) % world:
        raise UserError(
            f"sizes: this training has batches of {', '.join(map(str, counts))} windows, which do not divide among {world}"
            f" processes; go on with a number of them that divides {math.gcd(*counts)}"
        )
    parts = {}
    for (height, width), count in zip(config.sizes, counts, strict=True):
        windows = _loader(config, setup, "train", size=(height, width), batch=count, **share)
        parts[f"{height}x{width}"] = (windows, 1.0)
    return Mixture(parts, seed=config.seed, workers=workers)


def _loader(config: Config, setup: Setup, split: str, **options: Any) -> Loader:
    window: dict[str, Any] = {"columns": ("video",), "size": config.sizes[0]}
    return data.loader(config, setup.inputs, split, **window | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The generator and, unless `lambda_gan` is 0, a discriminator, the parent's if it fits.

    Raises:
        UserError: the network `features` does not take such videos; a network cannot be found.
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
        sample=partial(_sample, model, heldout),
        fps=6,
        tokens=partial(_tokens, model.config),
        blocks=list(model.blocks()),
        heldout=heldout,
        starts={"discriminator": config.gan_start},
        settings={"discriminator": adversarial.settings(config)},
        state=state,
    )


def _loss(
    config: Config, vae: Any, perceptual: Perceptual | None, state: Mapping[str, Tensor], turn: Turn
) -> tuple[Tensor, Terms]:
    """The loss of the engine whose turn it is, and its terms."""
    video, engine = to_model(turn.batch["video"]), turn.engines[turn.name]
    if turn.name == "discriminator":
        return adversarial.discriminator_loss(config, state, engine, video, turn.carry["generated"])

    # drop k ~ U{0..floor((G-1) r)} latent groups, the same k on each rank; the first frame always stays
    groups = latent_groups(video.shape[2], vae.temporal_stride)
    max_dropped = int((groups - 1) * config.max_drop)
    dropped = int(np.random.default_rng(turn.seed).integers(max_dropped + 1))
    generated, posterior = engine(video, visible=groups - dropped, rng=turn.rng)
    generated = generated.float()
    turn.carry["generated"] = generated.detach()

    reconstruction = partial(_reconstruction_loss, config, perceptual, turn.rng, video)
    discriminator = turn.engines.get("discriminator")
    if discriminator is not None and adversarial.trains_generator(config, state, turn.step):
        loss, terms = adversarial.generator_loss(config, state, generated, reconstruction, discriminator.module)
    else:
        loss, terms = reconstruction(generated)
    kl = posterior.kl().mean()
    loss = loss + config.lambda_kl * kl
    return loss, {"loss": loss.detach(), "kl": kl.detach()} | terms


def model_of(config: Config, inputs: Mapping[str, Source]) -> Any:
    """See `training.fit`."""
    return _planned(config, inputs).config


def _planned(config: Config, inputs: Mapping[str, Source]) -> VideoAutoencoder:
    """The model as it is trained, within a trace."""
    if "parent" not in inputs:
        return PVVAE(config.vae())
    parent: Any = module_of(inputs["parent"])
    return _with(config, parent)


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: batches of each size have about as many pixels, and an encoder that sees all frames takes most."""
    model, (height, width) = _planned(config, inputs), config.sizes[0]
    batches = [(max(1, count * height * width // (h * w)), h, w) for h, w in config.sizes]
    count, height, width = max(batches, key=math.prod)
    with untraced():
        perceptual = load_perceptual(config.perceptual, config.perceptual_linear, device=device())
    modules: dict[str, nn.Module] = {"generator": model}
    if config.lambda_gan:
        modules["discriminator"] = PatchGAN(adversarial.model_config_of(config.discriminator))
    whole = config.model_copy(update={"max_drop": 0.0})
    loss = partial(_loss, whole, model.config, perceptual, adversarial.state_of(0))
    starts = {"discriminator": config.gan_start}
    batch = video_batch(count, config.frames, height, width)
    return Largest(Objective(modules, loss, "generator", starts=starts), batch, networks(perceptual))


def _reconstruction_loss(
    config: Config, perceptual: Perceptual | None, rng: torch.Generator, video: Tensor, output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of a reconstruction: of its frames, of their differences, and the perceptual loss."""
    frames = (output - video).square().mean()
    motion = (output.diff(dim=2) - video.diff(dim=2)).square().mean() if video.shape[2] > 1 else output.new_zeros(())
    terms = {"reconstruction": frames, "motion": motion}
    loss = config.lambda_reconstruction * (frames + config.lambda_motion * motion)
    if perceptual:
        terms["perceptual"] = perceptual_loss(perceptual, output, video, frames=config.perceptual_frames, rng=rng)
        loss = loss + config.lambda_perceptual * terms["perceptual"]
    return loss, {term: value.detach() for term, value in terms.items()}


def _sample(
    model: VideoAutoencoder, heldout: Loader, engines: Engines, rng: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """The first held-out clip and, beside it, its prediction from the first half; its reconstruction without a prediction."""
    video = to_model(next(heldout.at([0]))["video"].to(device()))
    visible = latent_groups(model.shown_frames(video.shape[2]), model.config.temporal_stride)
    predicted, _ = engines["generator"](video, visible=visible, rng=rng)
    panels = torch.cat([video, predicted.float().clamp(-1, 1)], dim=4)[0].permute(1, 2, 3, 0)
    return {"predicted": to_pixels(panels).cpu().numpy()}


def _tokens(vae: Any, batch: Batch) -> int:
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
        long_clips=_long_clips(config, setup.inputs),
        probed=_loader(config, setup, "train", batch=1, seed=config.seed) if config.eval_probes else None,
        probe_clips=config.eval_probes,
    )


def _long_clips(config: Config, inputs: Mapping[str, str]) -> list[Frames]:
    """The longest held-out clips that are longer than a window."""
    min_frames = config.frames * config.stride + 1
    count = config.eval_long if config.frames > 1 else 0
    clips = longest(
        inputs["dataset"], "val", inputs.get("view"), config.sizes[0], count, min_frames, data.cache_of(config)
    )
    return [partial(clip.frames, config.sizes[0], config.stride) for clip in clips]


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The field of config.json: the window of training."""
    return {"window": {"frames": config.frames, "stride": config.stride, "size": list(config.sizes[0])}}


def kind(setup: Setup) -> str:
    """A PV-VAE, or a foreign model as its parent is."""
    return setup.model.kind


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, and too small."""
    clips = _loader(config, setup, "train", batch=1)
    return data.clip_counts(clips, too_small=clips.samples_small)


def keep(config: Config, folder: Path, scratch: Path) -> None:
    """Save the discriminator, if there is one, with the run."""
    if config.lambda_gan:
        weights, state = checkpoint.beside(folder, "discriminator")
        adversarial.save(scratch / adversarial.FILE, config, weights, state)
