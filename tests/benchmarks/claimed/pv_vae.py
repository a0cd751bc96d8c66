"""PV-VAE (arXiv 2605.02134) on bodies that move by a law (`infra/worlds/physics.py`), with tiny models, in memory.

Autoencoders learn from 17 frames of 16 x 16 pixels, each arm for equal steps; then a tiny Latte learns from their latents.
What is measured is of held-out colours, directions and speeds, and of videos that the prior makes from noise, by a reader
that knows the law.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from toys import Rows

from claimed import Claim, Shown, digest
from longtake.datasets.loader import to_model, to_pixels
from longtake.infra.worlds import physics
from longtake.training import checkpoint, engines
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.loop import train
from longtake.training.metrics.latents import latent_temporal_distance
from longtake.training.metrics.reconstruction import psnr
from longtake.training.models.common import flow
from longtake.training.models.common.adversarial import state_of
from longtake.training.models.generator import Settings
from longtake.training.models.latte import model as latte
from longtake.training.models.latte.sample import generate
from longtake.training.models.pv_vae import pretrain
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.objective import Objective, Turn

LAW, RADIUS, FRAMES, SIZE = "bounce", 0.18, 17, 16
SEEN, AHEAD = 5, 8  # frames that are seen where the others are predicted; how far ahead a probe looks
VAE = {
    "preset": "pv_vae_tiny",
    "encoder_width": 16,
    "decoder_width": 16,
    "multipliers": (1, 2, 2),
    "latent_channels": 16,
}
PRIOR = {"preset": "latte_tiny", "width": 64}
LEARNING: dict[str, Any] = {
    "batch": 16, "lr": 2e-3, "betas": (0.9, 0.99), "gradient_clip": 0.1, "warmup_steps": 20, "ema_half_lives": (20,),
    "lambda_gan": 0.0,
}  # fmt: skip
LEARNING_PRIOR: dict[str, Any] = {"batch": 32, "lr": 1e-3, "warmup_steps": 20, "ema_half_lives": (50,)}
ARMS: dict[str, dict[str, Any]] = {
    "base": {"max_drop": 0.0, "lambda_motion": 0.0},
    "base, decoder": {"phase": "decoder", "lambda_motion": 0.0},
    "+ predictive": {"max_drop": 1.0, "lambda_motion": 0.0},
    "+ motion": {"max_drop": 1.0, "lambda_motion": 1.0},
    "+ decoder": {"phase": "decoder", "lambda_motion": 1.0},
    "50 %": {"max_drop": 0.5, "lambda_motion": 1.0},
    "75 %": {"max_drop": 0.75, "lambda_motion": 1.0},
}
TUNED = {"base, decoder": "base", "+ decoder": "+ motion"}  # whose decoder an arm tunes
SAME = {"100 %": "+ motion"}  # an arm of another claim


class Sizes(NamedTuple):
    """How much is done.

    videos   to train on, and to fit probes to
    heldout  videos that are measured
    steps    of an autoencoder; of its decoder alone, half as many more
    prior    steps of the prior, after which its videos are judged
    made     videos of the prior
    """

    videos: int = 4000
    heldout: int = 256
    steps: int = 3000
    prior: tuple[int, ...] = (300, 1200)
    made: int = 256


SHORT = Sizes(200, 16, 20, (10, 20), 4)


def settings(short: bool) -> dict[str, Any]:
    """All that results depend on, beside the arms."""
    world = {"law": LAW, "radius": RADIUS, "frames": FRAMES, "size": SIZE, "seen": SEEN, "ahead": AHEAD}
    models = {"vae": VAE, "learning": LEARNING, "prior": PRIOR, "learning_prior": LEARNING_PRIOR}
    return {"world": "physics", **world, **models, "sizes": (SHORT if short else Sizes())._asdict()}


class Clips(NamedTuple):
    """Videos (N, 3, T, H, W) uint8, places and velocities (N, T, 2) in pixels."""

    video: Tensor
    places: Tensor
    velocities: Tensor


def clips(count: int, seed: int, heldout: bool) -> Clips:
    options: dict[str, Any] = {"law": LAW, "radius": RADIUS, "frames": FRAMES, "size": SIZE}
    made = [physics.render(seed * 1_000_000 + n, heldout, **options) for n in range(count)]
    video = np.stack([np.stack(list(one.frames)) for one in made])
    truth = [torch.tensor([one.truth[name] for one in made]) for name in ("places", "velocities")]
    return Clips(torch.from_numpy(video).permute(0, 4, 1, 2, 3).contiguous(), *truth)


def autoencoder(arm: str, seed: int, folder: Path, sizes: Sizes, videos: Tensor) -> tuple[PVVAE, Path]:
    """The arm's autoencoder, trained where it is not there yet, and a folder for what learns from its latents.

    Where only the decoder is tuned, the latents are those of the arm before, and so is the folder.
    """
    before, steps = TUNED.get(arm), sizes.steps
    config = pretrain.Config(
        kind="pretrain_vae", dataset="in memory", model=VAE, frames=FRAMES, sizes=((SIZE, SIZE),), seed=seed,
        steps=steps // 2 if before else steps, run=RunConfig(checkpoint_every=200, sample_every=0, workers=0, keep_checkpoints=1),
        **LEARNING, **ARMS[arm],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = PVVAE(config.vae())
    place = folder / f"{arm.strip('+ ').replace(', ', '-')}-{seed}-{digest([ARMS[arm], ARMS.get(before or '')])}"
    latents = place
    if before:
        parent, latents = autoencoder(before, seed, folder, sizes, videos)
        model.load_state_dict(parent.state_dict())
    loss = partial(pretrain._loss, config, model.config, None, state_of(0))
    stream: Any = Rows("video", videos, config.batch, seed)
    train(Objective({"generator": model}, loss, "generator"), stream, config, place)
    model.load_state_dict(checkpoint.trained(place, config))
    return model.eval(), latents


@torch.no_grad()
def encoded(model: PVVAE, videos: Tensor) -> Tensor:
    return torch.cat([model.encode(to_model(part)).mode() for part in videos.split(32)])


def priors(latents: Tensor, seed: int, folder: Path, steps: Sequence[int]) -> Iterator[tuple[int, latte.Latte]]:
    """Tiny Lattes that have learned for so many steps each."""
    shape = latte.config_from_preset(**PRIOR, channels=latents.shape[1], shape=tuple(latents.shape[2:]))

    def loss(turn: Turn) -> Any:
        clean = turn.engines[turn.name].module.normalise(turn.batch["latent"])
        value = flow.training_loss(turn.engines[turn.name], clean, turn.rng).mean()
        return value, {"loss": value.detach()}

    for many in steps:
        torch.manual_seed(seed)
        model = latte.Latte(shape)
        model.set_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)).clamp_min(1e-6))
        run = RunConfig(checkpoint_every=200, sample_every=0, keep_checkpoints=1)
        config = TrainConfig(steps=many, seed=seed, run=run, **LEARNING_PRIOR)
        stream: Any = Rows("latent", latents, config.batch, seed)
        place = folder / f"prior-{many}"
        train(Objective({"model": model}, loss), stream, config, place)
        learned = latte.Latte(shape)
        learned.load_state_dict(checkpoint.trained(place, config))
        yield many, learned.eval()


def probed(features: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], ridge: float = 1e-3) -> float:
    """R² of held-out targets (N, K) by ridge regression on the features (N, F); each a pair of training and held-out rows."""
    (x, x_out), (y, y_out) = ([part.double().flatten(1) for part in pair] for pair in (features, targets))
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_out = (x - mean) / scale, (x_out - mean) / scale
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    guess = x_out @ torch.linalg.solve(gram, x.T @ (y - y.mean(0))) + y.mean(0)
    return 1 - float((guess - y_out).square().sum() / (y_out - y.mean(0)).square().sum())


def judged(videos: Tensor) -> dict[str, float]:
    """Means of what the reader finds in videos (N, 3, T, H, W) in [-1, 1]."""
    pixels = to_pixels(videos.permute(0, 2, 3, 4, 1)).numpy()
    rows = [physics.read(video, {"law": LAW, "radius": RADIUS}, 8) for video in pixels]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def off_truth(videos: Tensor, truth: Clips) -> float:
    """Mean distance, in sides, of the bodies in predicted frames to where they truly are; 1 where there is none."""
    pixels = to_pixels(videos.permute(0, 2, 3, 4, 1)).numpy()
    apart = [
        np.hypot(*(physics.find(video, RADIUS).places - places.numpy()).T)[SEEN:]
        for video, places in zip(pixels, truth.places, strict=True)
    ]
    return float(np.nan_to_num(np.stack(apart) / SIZE, nan=1.0).mean())


def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    sizes, arm = SHORT if short else Sizes(), SAME.get(arm, arm)
    known, heldout = clips(sizes.videos, seed, heldout=False), clips(sizes.heldout, 999, heldout=True)
    with engines.process_group():
        # claims share it
        common = folder.parent / f"autoencoders-{digest(settings(short))}"
        model, place = autoencoder(arm, seed, common, sizes, known.video)
        return dict(figures(model, place, seed, sizes, known, heldout))


def figures(
    model: PVVAE, folder: Path, seed: int, sizes: Sizes, known: Clips, heldout: Clips
) -> Iterator[tuple[str, float]]:
    videos = to_model(heldout.video)
    with torch.no_grad():
        yield "psnr", float(psnr(model.reconstruct(videos), videos).mean())
        yield "off", off_truth(model.reconstruct(videos, SEEN), heldout)
    latents, apart = encoded(model, known.video), encoded(model, heldout.video)
    distance = latent_temporal_distance([apart])
    yield "curve", distance["curve_roughness"]
    yield "roughness", distance["path_roughness"]
    yield "spearman", distance["spearman"]
    last, then = (SEEN - 1) // model.config.temporal_stride, SEEN - 1 + AHEAD
    pair = latents[:, :, last], apart[:, :, last]
    yield "velocity", probed(pair, (known.velocities[:, SEEN - 1], heldout.velocities[:, SEEN - 1]))
    yield "ahead", probed(pair, (known.places[:, then], heldout.places[:, then]))
    for many, learned in priors(latents, seed, folder, sizes.prior):
        early = "early_" if many != sizes.prior[-1] else ""
        with torch.no_grad():
            drawn = torch.cat(
                list(generate(learned, latents.shape[2], range(sizes.made), settings=Settings(steps=25))), 2
            )
            made = judged(torch.cat([model.decode(part).clamp(-1, 1) for part in drawn.split(16)]))
        for name, value in made.items():
            yield early + name, value


_LAST, _EARLY, _LATE = "linear probe of the last latent seen", "prior, few steps", "prior"
FIGURES = {
    "psnr": Shown("PSNR of reconstructions", "higher", "rFVD ↓ 3.03, 5.66, 5.79, 3.45"),
    "off": Shown(f"predicted from {SEEN} of {FRAMES} frames: error of the place, sides", "lower"),
    "curve": Shown("LTD: bends of its curve, over its steps", "lower", "smoother, in a figure"),
    "spearman": Shown("LTD: rank correlation with time", "higher", "more monotonic, in a figure"),
    "roughness": Shown("bends of the path of latents, over its steps", "lower"),
    "velocity": Shown(f"{_LAST}: velocity, R²", "higher", "better for flow and tracks"),
    "ahead": Shown(f"{_LAST}: place {AHEAD} frames on, R²", "higher", "better for the next frame"),
    "early_one": Shown(f"{_EARLY}: frames with one body", "higher"),
    "early_moved": Shown(f"{_EARLY}: sides that the body moves in a frame, real 0.039", "higher"),
    "early_off_law": Shown(f"{_EARLY}: distance to the law's path, sides", "lower", "52 % faster"),
    "early_follows": Shown(f"{_EARLY}: videos that follow the law", "higher"),
    "one": Shown(f"{_LATE}: frames with one body", "higher"),
    "moved": Shown(f"{_LATE}: sides that the body moves in a frame, real 0.039", "higher"),
    "off_law": Shown(f"{_LATE}: distance to the law's path, sides", "lower", "gFVD ↓ 174.81, 156.33, 150.10, 146.37"),
    "follows": Shown(f"{_LATE}: videos that follow the law", "higher"),
}
DROPPED = {"off_law": FIGURES["off_law"]._replace(paper="gFVD ↓ 159.82, 154.06, 146.37")}
BLANK = {name: shown._replace(paper="") for name, shown in FIGURES.items()}

CLAIMS: Sequence[Claim] = (
    Claim(
        "pv_vae",
        "components",
        "Latents that must hold what comes next change more smoothly, tell more of motion, and are easier to generate; a loss"
        " on motion helps further, and tuning the decoder brings back what reconstruction has lost.",
        {arm: ARMS[arm] for arm in ("base", "+ predictive", "+ motion", "+ decoder", "base, decoder")},
        FIGURES,
        (
            ("+ predictive", "base", "curve"),
            ("+ predictive", "base", "spearman"),
            ("+ predictive", "base", "velocity"),
            ("+ predictive", "base", "ahead"),
            ("+ predictive", "base", "early_off_law"),
            ("+ predictive", "base", "off_law"),
            ("+ motion", "+ predictive", "off"),
            ("+ motion", "+ predictive", "off_law"),
            ("+ decoder", "+ motion", "psnr"),
            ("+ decoder", "base, decoder", "off_law"),
            ("+ decoder", "base, decoder", "follows"),
        ),
        run,
        settings,
    ),
    Claim(
        "pv_vae",
        "drop",
        "The more of the latents may be dropped, the easier those that are left are to generate; with the motion loss.",
        {arm: ARMS[SAME.get(arm, arm)] for arm in ("50 %", "75 %", "100 %")},
        BLANK | DROPPED,
        (("100 %", "50 %", "off_law"), ("100 %", "50 %", "velocity"), ("100 %", "75 %", "off_law")),
        run,
        settings,
    ),
)
