"""`pretrain_encgan3`: EncGAN3, and with `recall` REncGAN3 (arXiv 2512.21776), whose generator learns to join its clips.

With recall a window holds two clips that overlap. The second is generated from a frame of the first as that has been
generated, both in one forward of one module; they are merged, and the discriminator of clips judges windows across the
joint, beside real windows of the same time.
"""

import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, to_model, to_pixels
from longtake.training import checkpoint, data, registry, stage
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, made_by, video_batch
from longtake.training.metrics.classifier import load_classifier
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.perceptual import load_perceptual
from longtake.training.metrics.share import batches, place
from longtake.training.models.common.draws import rng_of
from longtake.training.models.encgan3 import losses
from longtake.training.models.encgan3.config import Config, EncGAN3Config, check, check_differences, span_of, warnings
from longtake.training.models.encgan3.discriminators import Discriminators
from longtake.training.models.encgan3.evaluate import SUMMARY
from longtake.training.models.encgan3.evaluate import evaluate as measure
from longtake.training.models.encgan3.generated import Judges, VideoPlan
from longtake.training.models.encgan3.model import NOISES, EncGAN3
from longtake.training.models.encgan3.rollout import Rollout
from longtake.training.models.encgan3.sample import SETTINGS
from longtake.training.models.generator import Settings, plain
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

__all__ = ["SUMMARY", "Config", "check", "warnings"]  # the stage's parts from another file

VERSION = 2
PRODUCES = "model"
MODEL = "encgan3"

SCALED_BY = 32  # windows by which the latents of a random model are scaled


def outside(config: Config) -> str:
    """Changes with the networks that measure."""
    return digest_of(config.features, config.classifier, config.perceptual, config.perceptual_linear)


class Setup(NamedTuple):
    """All that the stage works with; `fps` is that of windows."""

    inputs: Mapping[str, str]
    model: EncGAN3
    fps: float


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """The model before its first step: the parent's, or a random one, its latents scaled by some windows.

    Raises:
        UserError: the parent is no EncGAN3, or differs from `model`; no clip is as long as a window.
    """
    model = begin(config, inputs)
    clips = f"two clips of {model.config.frames} frames overlap by {model.config.overlap}" if config.recall else ""
    remedy = f"{clips}; leave out recall, or cut longer clips" if clips else "lower model.frames, or cut longer clips"
    span = (span_of(config, model.config) - 1) * config.stride + 1
    fps = data.frame_rate(inputs["dataset"], span, remedy)
    setup = Setup(inputs, model, fps / config.stride)
    if config.parent is None and checkpoint.latest(folder) is None:
        windows = loader_of(config, setup, "train", batch=SCALED_BY, last="pad", seed=config.seed, columns=("video",))
        model.scale_latents(to_model(next(windows.at([0]))["video"]).transpose(1, 2)[:, : model.config.frames])
    model.to(device())
    return setup


def begin(config: Config, inputs: Mapping[str, str]) -> EncGAN3:
    """The model before its first step, on the CPU. Raises as `prepare`."""
    if config.parent is None:
        return EncGAN3(config.encgan3())
    uri = inputs["parent"]
    model = registry.load(uri)
    if not isinstance(model, EncGAN3):
        raise UserError(f"parent: {uri} is a {type(model).__name__}, not an EncGAN3")
    if config.model is not None and config.encgan3() != model.config:
        raise UserError(f"model: is not that of the parent {uri}; leave it out")
    try:
        check_differences(config, model.config)
    except ValueError as e:
        raise UserError(str(e)) from e
    return model.train()


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's batches of random windows."""
    return loader_of(config, setup, "train", **data.share_of(config, rank, world), crop="random")


def loader_of(config: Config, setup: Setup, split: str, **options: Any) -> Loader:
    """Windows of one clip, or of two that overlap."""
    model = setup.model.config
    columns = ("video", "frame_diff") if config.differences == "column" else ("video",)
    window = {"columns": columns, "frames": span_of(config, model), "size": (model.size, model.size)}
    return data.loader(config, setup.inputs, split, **window | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The generator with its encoders and, unless `lambda_gan` is 0, the discriminators.

    Raises:
        UserError: the column of differences has other sizes; a network that measures does not take such videos, or has too
            few.
    """
    model, heldout = setup.model, loader_of(config, setup, "val", **HELDOUT)
    plan_of(config, setup)
    if config.differences == "column":
        _check_column(next(heldout.at([0])))
    modules: dict[str, nn.Module] = {"generator": model}
    if config.lambda_gan:
        modules["discriminator"] = _judges(config, model.config).to(device())
    return Objective(
        modules,
        partial(_loss, config, model),
        lead="generator",
        sample=partial(_sample, config, model, heldout),
        fps=max(1, round(setup.fps)),
        tokens=_frames,
        blocks=list(model.blocks()),
        heldout=heldout,
        starts={"discriminator": config.gan_start},
        settings={"discriminator": _discriminator_settings(config)},
    )


def _judges(config: Config, model: EncGAN3Config) -> Discriminators:
    width, norm = config.discriminator_width or model.width, "spectral" if config.spectral else "group"
    return Discriminators(model.size, width, norm, model.groups)  # type: ignore[arg-type]


def model_of(config: Config, inputs: Mapping[str, Source]) -> EncGAN3Config:
    """See `training.fit`."""
    model: EncGAN3Config = (
        config.encgan3() if config.model is not None or "parent" not in inputs else made_by(inputs["parent"])
    )
    return model


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: windows, with the column of differences where that is read."""
    model = EncGAN3(model_of(config, inputs))
    modules: dict[str, nn.Module] = {"generator": model}
    if config.lambda_gan:
        modules["discriminator"] = _judges(config, model.config)
    batch = video_batch(count, span_of(config, model.config), model.config.size, model.config.size)
    if config.differences == "column":
        batch["frame_diff"] = batch["video"][:, :, 1:]
    starts = {"discriminator": config.gan_start}
    return Largest(Objective(modules, partial(_loss, config, model), "generator", starts=starts), batch)


def _discriminator_settings(config: Config) -> Config:
    changes = {"lr": config.discriminator_lr or config.lr, "steps": max(1, config.steps - config.gan_start)}
    return config.model_copy(update=changes)


def _check_column(batch: Batch) -> None:
    ours, theirs = ("x".join(map(str, batch[name].shape[3:])) for name in ("video", "frame_diff"))
    if ours != theirs:
        raise UserError(
            f"differences: column: the dataset's frame_diff is {theirs}, frames are {ours}; choose differences: computed"
        )


def differences(config: Config, model: EncGAN3, batch: Batch, video: Tensor) -> Tensor:
    """What the movement encoder sees of windows `(B, N, 3, H, W)`, `(B, N-1, 3, H, W)`: computed, or read.

    The column has |x_i - x_{i-1}| of the decoded clip in 0..255; pixels of the model have 2 for those 255.
    """
    if config.differences == "column":
        return batch["frame_diff"].transpose(1, 2) / 127.5
    return model.differences_of(video)


def _loss(config: Config, encgan3: EncGAN3, turn: Turn) -> tuple[Tensor, Terms]:
    """The loss of the engine whose turn it is, and its terms."""
    if turn.name == "discriminator":
        loss, terms = losses.judging(turn.engines[turn.name], turn.carry["seen"], config.adversarial)
        return config.lambda_gan * loss, terms

    # the generator: reconstructions and, where discriminators are heard, as many samples
    model, video = encgan3.config, to_model(turn.batch["video"]).transpose(1, 2)
    engine, discriminator = turn.engines[turn.name], turn.engines.get("discriminator")
    heard = discriminator is not None and turn.step >= config.gan_start
    draws = np.random.default_rng(turn.seed)
    index = int(draws.integers(model.frames)) if draws.random() < config.anywhere else 0
    moved = differences(config, encgan3, turn.batch, video)
    drawn = engine(video, moved, _noise(model, turn, len(video)), index, heard)

    # equation 4, with its divergences rising from 0
    starts = [0, model.frames - model.overlap][: drawn.clips.shape[1]]
    clips = torch.stack([video[:, start : start + model.frames] for start in starts], 1)
    terms = losses.evidence(drawn, clips, index)
    rise = min(1.0, (turn.step + 1) / max(1.0, config.kl_warmup * config.steps))
    terms["range"] = losses.out_of_range(torch.cat([drawn.joined, drawn.sampled]))
    loss = config.lambda_l1 * terms["l1"] + config.lambda_l2 * terms["l2"]
    loss = loss + rise * config.lambda_kl * terms["kl"] + config.lambda_frame * terms["frame"]
    loss = loss + config.lambda_range * terms["range"]

    # equation 8, of reconstructions and samples
    if discriminator is not None and heard:
        total = video.shape[1]
        places = losses.straddling(model.frames, total, model.joint) if config.recall else range(1)
        start, frames = places[int(draws.integers(len(places)))], draws.integers(total, size=2).tolist()
        shown = losses.seen(drawn, video, model.frames, start, *frames)
        turn.carry["seen"] = losses.Seen(*(each.detach() for each in shown))
        terms |= losses.pleasing(discriminator.module, shown, config.adversarial)
        terms["drift"] = losses.drift(drawn.sampled)
        loss = (
            loss + config.lambda_gan * (terms["gan_clip"] + terms["gan_frame"]) + config.lambda_drift * terms["drift"]
        )
    return loss, {name: value.detach() for name, value in (terms | {"loss": loss}).items()}


def _noise(model: EncGAN3Config, turn: Turn, count: int) -> Tensor:
    """A rank's share of the noise of a global batch, which is the same for any number of ranks; a held-out clip has its own."""
    rank, world = place() if torch.is_grad_enabled() else (0, 1)
    noise = torch.randn(world, count, NOISES, model.content + model.movement, generator=rng_of(turn.seed))
    return noise[rank].to(device(), non_blocking=True)


def _sample(
    config: Config, model: EncGAN3, heldout: Loader, engines: Engines, rng: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """The first held-out window, beside it its reconstruction, and a video made of noise."""
    batch = data.on_device(next(heldout.at([0])))
    video = to_model(batch["video"]).transpose(1, 2)
    shape = (1, NOISES, model.config.content + model.config.movement)
    noise = torch.randn(shape, generator=rng, device=video.device)
    noise[:, ::2] = 0  # the posteriors' means
    drawn = engines["generator"](video, differences(config, model, batch, video), noise)
    panels = torch.cat([video, drawn.joined, drawn.sampled], dim=4)[0].permute(0, 2, 3, 1)
    return {"reconstructed": to_pixels(panels).cpu().numpy()}


def _frames(batch: Batch) -> int:
    """Frames of a batch, which stand for its tokens."""
    return int(batch["video"].shape[0] * batch["video"].shape[2])


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> dict[str, Any]:
    """Measure what has been trained, each rank its share."""
    heldout, plan = loader_of(config, setup, "val", **HELDOUT), plan_of(config, setup)
    options = {"seed": config.seed, "clips": config.eval_clips, "swaps": config.eval_swaps}
    return measure(setup.model, heldout, folder, plan=plan, **options)


def plan_of(config: Config, setup: Setup) -> VideoPlan:
    """The videos to generate, and what measures them.

    Raises:
        UserError: a network does not take such videos; there are too few held-out ones.
    """
    model, side = setup.model, (setup.model.config.size,) * 2
    perceptual = load_perceptual(config.perceptual, config.perceptual_linear, device=device())
    plan = VideoPlan(
        lambda seeds: Rollout(model, seeds, config.content),
        config.eval_videos,
        config.video_frames,
        config.eval_bin,
        config.seed,
        setup.fps,
        config.run.eval_batch,
        Judges(perceptual=perceptual),
    )
    network = checked_network(config.features, plan.window, side)
    classifier = None
    if config.classifier:
        classifier = load_classifier(config.classifier, model.config.frames, side, device=device())
    real = _real(config, setup, plan.window) if network else ()
    return plan._replace(judges=Judges(network, real, classifier, config.eval_splits, perceptual))


def _real(config: Config, setup: Setup, frames: int) -> Iterable[Tensor]:
    """Held-out windows of so many frames."""
    heldout = loader_of(config, setup, "val", **HELDOUT, columns=("video",), frames=frames)
    if heldout.samples < 2:
        raise UserError(f"features: {heldout.samples} clip is held out; a distance needs 2: raise val_fraction")
    count = min(config.eval_clips, heldout.samples)
    return (to_model(batch["video"].to(device())) for _, batch in batches(heldout, count, "compare"))


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json: the window of training, and how clips began and were joined in it."""
    model = setup.model.config
    window = {"frames": span_of(config, model), "stride": config.stride, "size": [model.size] * 2, "fps": setup.fps}
    sampling = plain(Settings(content=config.content), SETTINGS)
    return {"window": window, "recall": config.recall, "anywhere": config.anywhere, "classes": [], "sampling": sampling}


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, and too small."""
    clips = loader_of(config, setup, "train", batch=1)
    return data.clip_counts(clips, too_small=clips.samples_small)
