"""A training step of PV-VAE beside diffusers' AutoencoderKLWan at equal widths: CPU seconds and peak memory.

    python tests/benchmarks/bench_vae_peer.py [--width 16] [--frames 17] [--size 128] [--turns 3]

`--peer-python` names the Python of another environment with diffusers.

Both have random weights, patches of 2x2 pixels, multipliers 1, 2, 4, 4, two res blocks a stage in the encoder and three
in the decoder, 64 latent channels, time halved first, single-head attention in the middle, and the same clip and loss
(MSE and KL; forward and backward, no optimizer). What differs: the peer widens inside the first res block of a stage
and samples by 3x3 convolutions where ours uses linear maps (parameters are printed), runs a clip through itself in
pieces of four frames also in training, and has no padding token.

Each measurement is a process of its own, in turns, with one thread. Seconds are CPU time (the machine may be busy), the median of a process's steps after
the first; memory is the first step's peak above what was resident before it, after a step on a tiny clip has loaded
all kernels. Printed are medians over the turns. The targets are 0.8 times the peer's seconds and memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import figures
import torch

MULTIPLIERS, LATENT, PATCH, BLOCKS = (1, 2, 4, 4), 64, 2, 2


def ours(width: int) -> Any:
    from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig

    model = PVVAE(
        PVVAEConfig(
            patch=PATCH,
            encoder_width=width,
            decoder_width=width,
            multipliers=MULTIPLIERS,
            encoder_blocks=BLOCKS,
            decoder_blocks=BLOCKS + 1,
            latent_channels=LATENT,
        )
    ).train()

    def loss(video: torch.Tensor) -> torch.Tensor:
        made, posterior = model(video)
        return (made - video).square().mean() + 1e-6 * posterior.kl().mean()

    return model, loss


def peer(width: int) -> Any:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=width,
        decoder_base_dim=width,
        z_dim=LATENT,
        dim_mult=list(MULTIPLIERS),
        num_res_blocks=BLOCKS,
        temperal_downsample=[True, True, False],
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=16,
    ).train()

    def loss(video: torch.Tensor) -> torch.Tensor:
        posterior = model.encode(video).latent_dist
        made = model.decode(posterior.sample()).sample
        return (made - video).square().mean() + 1e-6 * posterior.kl().mean() / posterior.mean[0].numel()

    return model, loss


def resident(key: str) -> float:
    """This process's VmRSS or VmHWM in MB."""
    with open("/proc/self/status") as lines:  # noqa: PTH123
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def measure(side: str, width: int, batch: int, frames: int, size: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, loss = {"ours": ours, "peer": peer}[side](width)
    loss(torch.rand(batch, 3, 5, 32, 32)).backward()
    model.zero_grad()
    video = torch.rand(batch, 3, frames, size, size) * 2 - 1
    base, seconds, peak = resident("VmRSS"), [], 0.0
    for step in range(steps + 1):
        begun = time.process_time()
        loss(video).backward()
        seconds.append(time.process_time() - begun)
        peak = peak if step else resident("VmHWM") - base
        model.zero_grad()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return {"seconds": statistics.median(seconds[1:]), "MB": peak, "parameters, M": parameters}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="the python of an environment with diffusers")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    figures.add_option(parser)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.width, given.batch, given.frames, given.size, given.steps)))
        sys.exit()
    results: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    pythons = {"ours": sys.executable, "peer": given.peer_python}
    for _ in range(given.turns):
        for side, python in pythons.items():
            command = [python, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
            )
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr}")
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{given.batch}x3x{given.frames}x{given.size}x{given.size}, width {given.width}, medians of {given.turns}, in turns"
    )
    ratios = dict[str, list[float]]()
    for name in ("seconds", "MB", "parameters, M"):
        mine, theirs = (statistics.median(r[name] for r in results[side]) for side in ("ours", "peer"))
        ratios[name] = [m[name] / t[name] for m, t in zip(results["ours"], results["peer"], strict=True)]
        print(f"{name:>14}: ours {mine:8.2f}   AutoencoderKLWan {theirs:8.2f}   ratio {mine / theirs:.2f}")
    figures.write(given.figures, {"seconds": ratios["seconds"], "memory": ratios["MB"]})
