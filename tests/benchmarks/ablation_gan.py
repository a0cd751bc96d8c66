"""What a GAN term costs an autoencoder and what it gives: from one trained model on, with several weights of it and seeds.

    VIDEOS=FOLDER longtake run quickstart                                                     # prints DATASET, and MODEL of `images`
    export MLFLOW_TRACKING_URI=sqlite:///runs/quickstart/mlflow.db
    python tests/benchmarks/ablation_gan.py DATASET MODEL [--features squeezenet1_0.pth] [--seeds 0 1 2] [--steps 300]

The discriminator learns alone for --warmup steps, then the generator hears it for --steps; `none` trains as long without it.
On frames of held-out sources: PSNR in dB; sharpness, which is the power of the reconstructions in the upper half of the
frequencies over that of the frames (1 is as sharp); and with a feature network the perceptual distance. A line of JSON a
run, then a table of means and standard deviations over the seeds.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.loader import Loader, to_model
from longtake.training import checkpoint, engines, registry
from longtake.training.loop import train
from longtake.training.metrics.perceptual import load_perceptual, lpips
from longtake.training.models.pv_vae import pretrain as pretrain_vae
from longtake.training.models.pv_vae.model import PVVAE

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"lambda_gan": 0.0},
    "adaptive": {"lambda_gan": 0.5},
    "fixed": {"lambda_gan": 0.5, "gan_weight": "fixed"},
}


def window(options: argparse.Namespace) -> dict[str, Any]:
    return {"columns": ("video",), "frames": options.frames, "size": (options.size, options.size)}


def trained(options: argparse.Namespace, variant: str, seed: int, folder: Path) -> PVVAE:
    """The model after a variant's training."""
    settings: dict[str, Any] = {
        "kind": "pretrain_vae", "dataset": options.dataset, "parent": options.model, "seed": seed, "batch": 8,
        "frames": options.frames, "sizes": [[options.size, options.size]], "max_drop": 0.0,
        "steps": options.warmup + options.steps, "gan_start": 0, "gan_warmup": options.warmup, "lr": options.lr, "warmup_steps": 0,
        "ema_half_lives": [20], "run": {"checkpoint_every": 10**6, "sample_every": 0, "workers": 0}, "perceptual": options.perceptual,
        "discriminator": {"preset": "patchgan_tiny"},
    }  # fmt: skip
    config = pretrain_vae.Config(**settings | VARIANTS[variant] | json.loads(options.set))
    torch.manual_seed(seed)
    inputs = {"dataset": options.dataset, "parent": options.model}
    setup = pretrain_vae.prepare(config, inputs, folder)
    loader = Loader(options.dataset, "train", **window(options), batch=8, seed=seed, crop="random", last="pad")
    objective = replace(pretrain_vae.objective(config, setup._replace(parent=None)), heldout=())
    train(objective, loader, config, folder)
    setup.model.load_state_dict(checkpoint.trained(folder, config))
    return setup.model.eval()


def high_power(frames: Tensor) -> Tensor:
    """Mean power above half of the highest frequency, of `(N, C, H, W)`."""
    power = torch.fft.fft2(frames - frames.mean((2, 3), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(side).abs() for side in frames.shape[2:])
    return power[..., torch.maximum(rows[:, None], columns[None]) > 0.25].mean()


@torch.no_grad()
def measure(options: argparse.Namespace, model: PVVAE) -> dict[str, float]:
    loader = Loader(options.dataset, "val", **window(options), batch=1, seed=0, last="pad")
    real = torch.cat([to_model(batch["video"]) for batch in islice(loader, options.samples)])
    made = torch.cat([model.reconstruct(video).clamp(-1, 1) for video in real.split(1)])
    errors = (made - real).square().flatten(1).mean(1) / 4
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (made, real)]
    found = {
        "psnr": float((-10 * errors.log10()).mean()),
        "sharpness": float(high_power(flat[0]) / high_power(flat[1])),
    }
    if network := load_perceptual(options.features):
        found["perceptual"] = float(lpips(network, made, real).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("model", help="URI of the model to go on from.")
    parser.add_argument("--features", help="A feature network to measure with.")
    parser.add_argument("--perceptual", help="A feature network to train with.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128, help="Held-out windows.")
    parser.add_argument("--set", default="{}", help="More settings of the stage, as JSON.")
    options = parser.parse_args()
    begun = registry.load(options.model)
    assert isinstance(begun, PVVAE)
    start = measure(options, begun)
    print(json.dumps({"variant": "start"} | start), flush=True)
    rows: list[dict[str, Any]] = []
    with engines.process_group():
        for seed in options.seeds:
            for variant in options.variants:
                with tempfile.TemporaryDirectory() as folder:
                    model = trained(options, variant, seed, Path(folder))
                rows.append({"variant": variant, "seed": seed} | measure(options, model))
                print(json.dumps(rows[-1]), flush=True)
    print(f"{'':12}{'start':>9}" + "".join(f"{variant:>20}" for variant in options.variants))
    for name, value in start.items():
        cells = []
        for variant in options.variants:
            values = [row[name] for row in rows if row["variant"] == variant]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):12.3f} ±{spread:6.3f}")
        print(f"{name:12}{value:9.3f}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
