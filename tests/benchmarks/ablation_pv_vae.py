"""The ablation of the PV-VAE paper (arXiv 2605.02134, table of its components) with tiny models and several seeds.

    VIDEOS=FOLDER longtake run quickstart --only shards --set stages.shards.clip.short_side=48     # prints DATASET
    python tests/benchmarks/ablation_pv_vae.py DATASET [--features squeezenet1_0.pth] [--seeds 3] [--steps 500]

base: every frame seen, no motion loss. +predictive: latent groups dropped. +motion: and differences of neighbours matched.
+decoder: the encoder frozen, no dropping, GAN, for half as many steps more. Each trains in the real loop; then, for each
and each seed, on held-out sources: PSNR with all frames seen, of visible and of predicted frames beside a copy of the last
visible one; how steadily latents move apart in time (LTD); and of a tiny Latte trained on the latents for equal steps the
held-out flow loss, and the Fréchet distance of what it generates, where a feature network is given. A line of JSON a run,
then a table of means and standard deviations over the seeds.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.loader import Loader, to_model
from longtake.training import checkpoint, engines
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.loop import train
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.features import load_network
from longtake.training.metrics.latents import latent_temporal_distance
from longtake.training.models.common import flow
from longtake.training.models.generator import Settings
from longtake.training.models.latte import model as latte
from longtake.training.models.latte.sample import generate
from longtake.training.models.pv_vae import pretrain as pretrain_vae
from longtake.training.models.pv_vae.evaluate import evaluate
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.objective import Objective, Turn

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"max_drop": 0.0, "lambda_motion": 0.0},
    "+predictive": {"max_drop": 1.0, "lambda_motion": 0.0},
    "+motion": {"max_drop": 1.0, "lambda_motion": 1.0},
    "+decoder": {"phase": "decoder", "lambda_motion": 1.0},
}
COLUMNS = (
    "psnr_all",
    "psnr_visible",
    "psnr_predicted",
    "psnr_copy_last",
    "ltd_spearman",
    "ltd_rising",
    "path_roughness",
    "prior_loss",
    "frechet",
)


class Latents:
    """A stream of random batches of latents that lie in memory."""

    def __init__(self, latents: Tensor, batch: int, seed: int) -> None:
        self._latents, self._batch, self._seed = latents, batch, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draw = torch.Generator().manual_seed(self._seed)
        while True:
            rows = torch.randint(len(self._latents), (self._batch,), generator=draw)
            yield {"latent": self._latents[rows], "key": [str(row) for row in rows.tolist()]}

    def state_dict(self) -> dict[str, Any]:
        return {}


def windows(options: argparse.Namespace, split: str, seed: int, count: int, **more: Any) -> list[Tensor]:
    """`count` windows of a split, (1, 3, T, H, W) in [-1, 1], each clip again and again where there are fewer."""
    loader = Loader(options.dataset, split, **window(options), batch=1, seed=seed, last="pad", **more)
    return [to_model(batch["video"]) for batch in islice(loader, count)]


def window(options: argparse.Namespace) -> dict[str, Any]:
    return {"columns": ("video",), "frames": options.frames, "size": (options.size, options.size)}


def vae(options: argparse.Namespace, variant: str, seed: int, folder: Path, parent: PVVAE | None) -> PVVAE:
    settings = {
        "kind": "pretrain_vae", "dataset": options.dataset, "model": {"preset": options.preset}, "seed": seed, "batch": options.batch,
        "frames": options.frames, "sizes": [[options.size, options.size]], "steps": options.steps // (2 if parent else 1),
        "lr": 1e-3, "betas": [0.9, 0.99], "gradient_clip": 0.1, "warmup_steps": 20, "ema_half_lives": [20],
        "run": {"checkpoint_every": options.steps, "sample_every": 0, "workers": 0},
        "lambda_gan": options.gan if parent else 0.0, "discriminator": {"preset": "patchgan_tiny"},
        "gan_weight": "fixed", "gan_warmup": 0, "discriminator_betas": [0.9, 0.99],
    }  # fmt: skip
    config = pretrain_vae.Config(**settings | VARIANTS[variant])
    torch.manual_seed(seed)
    model = PVVAE(config.vae())
    if parent:
        model.load_state_dict(parent.state_dict())
    loader = Loader(
        options.dataset, "train", **window(options), batch=config.batch, seed=seed, crop="random", last="pad"
    )
    setup = pretrain_vae.Setup({"dataset": options.dataset}, model, None)
    objective = replace(pretrain_vae.objective(config, setup), heldout=[])
    train(objective, loader, config, folder)
    trained = PVVAE(config.vae())
    trained.load_state_dict(checkpoint.trained(folder, config))
    return trained.eval()


@torch.no_grad()
def encoded(model: PVVAE, videos: list[Tensor]) -> Tensor:
    return torch.cat([model.encode(video).mode() for video in videos])


def prior(options: argparse.Namespace, latents: Tensor, seed: int, folder: Path) -> latte.Latte:
    shape = tuple(latents.shape[2:])
    torch.manual_seed(seed)
    model = latte.Latte(latte.config_from_preset("latte_tiny", channels=latents.shape[1], shape=shape))
    model.set_statistics(latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)).clamp_min(1e-6))

    def loss(turn: Turn) -> Any:
        clean = turn.engines[turn.name].module.normalise(turn.batch["latent"])
        value = flow.training_loss(turn.engines[turn.name], clean, turn.rng).mean()
        return value, {"loss": value.detach()}

    config = TrainConfig(
        steps=options.prior_steps,
        batch=16,
        lr=1e-3,
        ema_half_lives=(50,),
        seed=seed,
        run=RunConfig(checkpoint_every=options.prior_steps),
    )
    stream: Any = Latents(latents, 16, seed)
    train(Objective({"model": model}, loss), stream, config, folder)
    model.load_state_dict(checkpoint.trained(folder, config))
    return model.eval()


def measure(options: argparse.Namespace, variant: str, seed: int, model: PVVAE, folder: Path) -> dict[str, Any]:
    heldout = Loader(options.dataset, "val", **window(options), batch=1, last="pad", shuffle=False, epochs=1)
    pictures = folder / "heldout"
    pictures.mkdir()
    found = {"variant": variant, "seed": seed} | evaluate(model, heldout, pictures, seed, 512)
    real = windows(options, "val", 0, options.samples)
    held = encoded(model, real)
    apart = latent_temporal_distance([held])
    found |= {
        "ltd_spearman": apart["spearman"],
        "ltd_rising": apart["rising"],
        "path_roughness": apart["path_roughness"],
    }
    found["ltd_normalised"] = apart["normalised"]
    learned = prior(
        options, encoded(model, windows(options, "train", seed, 256, crop="random")), seed, folder / "prior"
    )
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(0)
        found["prior_loss"] = float(flow.training_loss(learned, learned.normalise(held), fixed).mean())
        if options.features:
            seeds = list(range(options.samples))
            made = [
                model.decode(z).clamp(-1, 1)
                for z in generate(learned, held.shape[2], seeds, settings=Settings(options.sample_steps))
            ]
            network = load_network(options.features)
            distance = video_distance(real, torch.cat(made, dim=2).split(8), network, split="val", seed=0, kernel=False)
            found |= {"frechet": distance["frechet"], "distance": distance}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--features", help="State dict or TorchScript of a feature network.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--prior-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--samples", type=int, default=64, help="Held-out windows, and generated clips.")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--gan", type=float, default=0.02, help="lambda_gan of +decoder.")
    parser.add_argument("--preset", default="pv_vae_tiny")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with engines.process_group():
        for seed in range(options.seeds):
            model = None
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as folder:
                    parent = model if variant == "+decoder" else None
                    model = vae(options, variant, seed, Path(folder) / "vae", parent)
                    rows.append(measure(options, variant, seed, model, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    for name in [c for c in COLUMNS if c in rows[0]]:
        cells = []
        for variant in VARIANTS:
            values = [row[name] for row in rows if row["variant"] == variant]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):9.3f} ±{spread:6.3f}")
        print(f"{name:16}" + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
