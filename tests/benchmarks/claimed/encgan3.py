"""REncGAN3 (arXiv 2512.21776) in the world of endless textures: clips in a chain, and the recall that trains their joints.

Tiny models of signed differences; one continues without recall, the other with it, for as many steps. Videos of 208 frames
go on from held-out first frames. Independent clips all begin from the same frame.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ablation_encgan3
import numpy as np
import torch
from ablation_encgan3 import FRAMES, rolled, trained
from torch import Tensor

from claimed import Claim, Shown
from claimed._moving import Stream, drawn, frames_of
from longtake.datasets.loader import to_model
from longtake.infra.worlds import endless
from longtake.training import engines
from longtake.training.metrics.distance import frechet_distance, moments
from longtake.training.metrics.seams import around, bends, between, changes, seams
from longtake.training.models.common.video import write_panels

ARMS = {"independent clips": "independent", "chained": "chained", "chained, recall": "recall"}
FPS, PACE = 12, 0.02  # frames a second, and sides that the texture moves in one
LENGTH = FRAMES - 4  # frames of a window; one inside of a clip has no joint
TRAINING = {"lr": 2e-3, "lambda_gan": 0.3}


class Scale(NamedTuple):
    """How much is done: videos to learn from, steps of the first training (of what continues it a third), held-out videos."""

    known: int = 600
    steps: int = 1500
    heldout: int = 24


WHOLE, SHORT = Scale(), Scale(32, 30, 4)


def settings(short: bool) -> dict[str, Any]:
    """All that results depend on."""
    videos = {"fps": FPS, "pace": PACE, "frames": 60}
    training = TRAINING | {"model": ablation_encgan3.MODEL, "variants": ablation_encgan3.VARIANTS}
    scale = (SHORT if short else WHOLE)._asdict()
    return {"world": "endless", **videos, "training": training, "length": ablation_encgan3.LONG, "scale": scale}


def features(windows: Tensor) -> Tensor:
    """What the world's reader sees in windows `(N, 3, T, H, W)`, `(N, 10)`: colours, contrast, and how they move.

    Figures are in units in which real windows spread alike, roughly.
    """
    rows = []
    for window in windows:
        frames = frames_of(window)
        seen, grey = endless.look_at(frames), frames.astype(float).mean(-1)
        mean, spread = seen.moved.mean(0) / PACE, seen.moved.std(0) / PACE
        spreads = grey.std((1, 2)).mean() / 50, np.abs(np.diff(grey, axis=0)).mean() / 10
        rows.append([*(10 * stain for stain in seen.stains.values()), *mean, *spread, *spreads])
    return torch.tensor(np.array(rows))


def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    """Figures of an arm; see `FIGURES`."""
    scale, size = SHORT if short else WHOLE, ablation_encgan3.SIZE
    # the dataset is not read: what is learned from lies in memory
    options = argparse.Namespace(out=folder.absolute(), dataset="endless", steps=scale.steps, **TRAINING)
    known = drawn("endless", scale.known, 1 + seed, False, size, frames=60, fps=FPS, pace=PACE).video
    with engines.process_group(), torch.no_grad():
        real = drawn("endless", scale.heldout, 900 + seed, True, size, frames=60, fps=FPS, pace=PACE)
        with torch.enable_grad():
            name = "recall" if arm == "chained, recall" else "single"
            model = trained(options, name, seed, lambda frames, batch: Stream(known, frames, batch, seed))
        starts = to_model(real.video[:, :, :FRAMES])
        again = ablation_encgan3.made_of(model, starts, starts)
        found = {"error": float((again - starts).abs().mean()) / 2}
        found["copying"] = float((starts[:, :, :1] - starts).abs().mean()) / 2
        video, joints = rolled(model, None, ARMS[arm], seed, starts[:, :, 0])
        write_panels(folder / f"{arm.replace(' ', '-')}-{seed}.mp4", list(video[:4].clamp(-1, 1).split(1)), FPS)
        return found | measured(to_model(real.video), video.clamp(-1, 1), joints)


def measured(real: Tensor, video: Tensor, joints: Sequence[int]) -> dict[str, float]:
    """Figures of the joints of videos `(N, 3, T, H, W)` in [-1, 1], beside what is between them and real ones."""
    seen = seams(changes(video), bends(video), joints)
    truth = moments(features(torch.cat(real.split(LENGTH, dim=2)[: real.shape[2] // LENGTH])))
    windows = {"at joints": around(video, joints, LENGTH), "inside": between(video, joints, LENGTH)}
    looks = {name: features(each) for name, each in windows.items()}

    def apart(ratio: float | None) -> float:
        return abs(math.log(max(ratio or 0.0, 1e-6)))

    return {
        "seam": apart(seen.ratio),
        "turn": apart(seen.bend_ratio),
        "distance at joints": frechet_distance(truth, moments(looks["at joints"])),
        "distance inside": frechet_distance(truth, moments(looks["inside"])),
        "change": apart(seen.change / float(changes(real).mean())),
        "contrast": statistics.mean(
            float(one[:, -FRAMES:].mean(0).std((1, 2)).mean() / one[:, 0].mean(0).std()) for one in video
        ),
    }


FIGURES = {
    "seam": Shown("change at joints beside that elsewhere, absolute log", "lower"),
    "turn": Shown("turns at joints beside those elsewhere, absolute log", "lower"),
    "distance at joints": Shown("Fréchet distance of windows over joints, by the reader", "lower"),
    "distance inside": Shown("the same between joints", "lower"),
    # a still video has no joints that show
    "change": Shown("change from frame to frame beside real, absolute log", "lower"),
    "contrast": Shown("contrast of the last 16 frames beside the first frame, real about 1", "higher"),
    "error": Shown("error of held-out clips, L1", "lower"),
    "copying": Shown("that of repeating the first frame", "lower"),
}
CLAIMS: Sequence[Any] = [
    Claim(
        "encgan3",
        "joints",
        "Clips in a chain join where independent ones jump, and recall, which shows joints to the discriminator, makes them "
        "smoother (§4.2 of the paper).",
        ARMS,
        FIGURES,
        [
            ("chained, recall", "independent clips", "seam"),
            ("chained, recall", "independent clips", "distance at joints"),
            ("chained, recall", "chained", "seam"),
            ("chained, recall", "chained", "turn"),
            ("chained, recall", "chained", "distance at joints"),
        ],
        run,
        settings,
    )
]
