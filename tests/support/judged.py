"""What the tests of evaluations share: a dataset of small moving squares, and tiny models of several families in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tats_stages
from priors import awake, save_vae
from shards import make_dataset

from longtake.datasets.latents import encoder_digest
from longtake.training.evaluation.suite import Suite
from longtake.training.models.common.video import video_file
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.models.mavin.model import Mavin, MavinConfig
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.registry import disk

FRAMES, SIZE, FPS = 36, 32, 12
NAMES = ("vae", "latte", "vqgan", "tats", "mavin", "holder")


def dataset(folder: Path, videos: int = 10, frames: int = FRAMES) -> str:
    """Videos with a square in each, of another colour and direction; with `videos` of 10, three are held out."""
    source = folder / "videos"
    source.mkdir(parents=True)
    for number in range(videos):
        rng = np.random.default_rng(number)
        video = np.full((frames, SIZE, SIZE, 3), 40, np.uint8)
        colour, step = rng.integers(60, 256, 3), np.cos([number, number + 1.5]) * 0.6
        for frame in range(frames):
            y, x = (np.array([11, 11]) + step * (frame - frames / 2)).round().astype(int).clip(0, SIZE - 10)
            video[frame, y : y + 10, x : x + 10] = colour
        with video_file(source / f"{number:02d}.mp4", FPS) as write:
            write(video)
    return make_dataset(folder / "dataset", sorted(source.glob("*.mp4")))


def models(folder: Path) -> Path:
    """Folders `vae`, a `latte` of its latents, a `vqgan`, a `tats` of its tokens, a `mavin` of pixels, and a `holder`.

    All have random weights, and frames of 32 x 32 at 12 a second; TATS has 16 x 16, MAVIN 8 frames a second. The holder is a
    model with a memory, which retrieves.
    """
    vae = save_vae(folder / "vae")
    needed = {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)}
    facts: dict[str, Any] = {
        "lineage": {},
        "classes": ["cat", "dog"],
        "window": {"frames": 9, "steps": 3, "factor": 4, "fps": 12.0, "size": [32, 32]},
        "sampling": {"steps": 2, "guidance": 1.0, "shift": 1.0, "overlap": 1},
        "vae": needed,
    }
    latte = LatteConfig(depth=2, width=32, heads=2, channels=8, classes=2, shape=(3, 2, 2))
    disk.save(folder / "latte", "latte", latte.model_dump(mode="json"), awake(Latte(latte)).state_dict(), facts)
    small: dict[str, Any] = {"depth": 2, "width": 24, "heads": 2, "channels": 8, "classes": 2, "rates": ("2x2x2",)}
    small |= {"memory_widths": (4, 8), "memory_heads": 2, "history": 6, "shape": (3, 2, 2), "window": 2}
    holder = awake(MemoryDiT(MemoryDiTConfig(**small)))
    held = facts | {
        "stage": "retrieval",
        "rates": ["2x2x2"],
        "low_latents": {"uri": "", "digest": "0", "shrink": [2, 2]},
        "history": {"seconds": 2.0, "steps": 6},
    }
    disk.save(folder / "holder", "memory_dit", holder.config.model_dump(mode="json"), holder.state_dict(), held)
    vqgan = tats_stages.saved(tats_stages.vqgan(), folder / "vqgan")
    tats_stages.save_tats(folder / "tats", vqgan)
    mavin = awake(Mavin(MavinConfig(depth=2, width=16, heads=2, image_width=64, channels=3)))
    fills = {
        "lineage": {},
        "classes": [],
        "vae": None,
        "text": None,
        "image": {"encoder": "own", "digest": "own-2"},
        "window": {"frames": 12, "stride": 1, "size": [32, 32], "fps": 8.0},
        "context": [1, 8],
        "gap": [2, 8],
        "sampling": {"steps": 2, "shift": 1.0},
    }
    disk.save(folder / "mavin", "mavin", mavin.config.model_dump(mode="json"), mavin.state_dict(), fills)
    return folder


def suite(**changes: Any) -> Suite:
    """A small one: clips of 9 frames of 32 x 32, three generated videos, gaps of 4 frames."""
    small: dict[str, Any] = {
        "clips": {"frames": 9, "size": (SIZE, SIZE), "most": 4},
        "videos": [{"frames": 9, "seeds": (0, 1, 2)}],
        "gaps": {"frames": 4, "context": 4, "draws": 2},
        "seconds": 1.0,
        "chunk": 4,
        "resamples": 100,
    }
    return Suite.model_validate(small | changes)
