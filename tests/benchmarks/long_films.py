"""Long videos of tiny models of two families, with the joints of the pieces that they are made of.

encgan3  clips of a REncGAN3, each from a frame of the one before; see `ablation_encgan3`, whose training this is
latte    windows of a Latte of pixels, each with the last frames of the one before

A prior with a memory learns latents of an autoencoder alone, none of which is one of pixels, and so is not among them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ablation_encgan3
import torch
from torch import Tensor
from toys import SIZE, Draw, Mixture

from longtake.datasets.loader import to_model
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.models.common.codec import Pixels
from longtake.training.models.encgan3.rollout import Rollout, Start
from longtake.training.models.generator import Settings
from longtake.training.models.latte import finetune
from longtake.training.models.latte.sample import generate_videos

WINDOW, OVERLAP = 16, 4  # of Latte, in frames; clips of the REncGAN3 have 12 new ones, too
FRAMES = WINDOW + 4 * (WINDOW - OVERLAP)  # of a film


class Source(NamedTuple):
    """What a family learns from, footage `films` and sprites, for so many steps, and the folder of its checkpoints."""

    out: Path
    dataset: str
    films: Tensor
    draw: Draw
    steps: int


def encgan3(source: Source, seed: int, starts: Tensor) -> tuple[Tensor, list[int]]:
    """Films `(N, 3, FRAMES, 16, 16)` in [-1, 1] that go on from frames `starts` `(N, 3, 16, 16)` uint8, and their joints."""
    source.out.mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(**source._asdict(), lr=2e-3, lambda_gan=0.3)
    model = ablation_encgan3.trained(options, "anew", seed)
    frames = to_model(starts.to(engines.device()))
    plans = [
        Rollout(model, [1000 * seed + number], start=Start(frame[None], frame[None]))
        for number, frame in enumerate(frames)
    ]
    with torch.no_grad():
        videos = [torch.cat(list(plan.pieces(FRAMES)), dim=1) for plan in plans]
    return torch.cat(videos).transpose(1, 2).clamp(-1, 1).cpu(), plans[0].joints(FRAMES)


def latte(source: Source, seed: int, starts: Tensor) -> tuple[Tensor, list[int]]:
    """As many films as there are `starts`, which a Latte does not look at, and their joints."""
    config = finetune.Config(
        kind="finetune_latte", dataset=source.dataset, frames=WINDOW, size=(SIZE, SIZE), overlap=OVERLAP, seed=seed,
        model={"preset": "latte_tiny", "width": 64, "heads": 2, "patch": 4}, steps=source.steps, batch=16, lr=2e-3,
        schedule="cosine", warmup_steps=20, ema_half_lives=(50,), sample_steps=25, conditioning=0.5,
        run={"workers": 0, "sample_every": 0, "heldout_every": 0, "checkpoint_every": 250, "keep_checkpoints": 1},
    )  # fmt: skip
    folder = source.out / f"T-{seed}"
    torch.manual_seed(seed)
    setup = finetune.prepare(config, {"dataset": source.dataset}, folder)
    stream: Any = Mixture(source.films, source.draw, WINDOW, config.batch, seed)
    train(finetune.objective(config, setup), stream, config, folder)
    setup.model.load_state_dict(checkpoint.trained(folder, config))
    seeds = [1000 * seed + number for number in range(len(starts))]
    settings = Settings(steps=config.sample_steps, overlap=OVERLAP)
    chunks = generate_videos(setup.model.eval(), Pixels(), FRAMES, seeds, settings=settings)
    video = torch.cat([torch.from_numpy(chunk) for chunk in chunks], dim=1).permute(0, 4, 1, 2, 3)
    return to_model(video), list(range(WINDOW, FRAMES, WINDOW - OVERLAP))


FAMILIES: dict[str, Callable[[Source, int, Tensor], tuple[Tensor, list[int]]]] = {"encgan3": encgan3, "latte": latte}
