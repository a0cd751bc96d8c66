"""A dataset whose clips are long enough for two of 16 frames that overlap, and more."""

from __future__ import annotations

import numpy as np
import pytest
from shards import make_dataset

from longtake.training.models.common.video import video_file

FRAMES, SIZE = 36, 32


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six videos of 3 seconds, in each a square of another colour that moves in another direction: read it, do not change it."""
    folder = tmp_path_factory.mktemp("squares")
    for number in range(6):
        rng = np.random.default_rng(number)
        video = np.full((FRAMES, SIZE, SIZE, 3), 40, np.uint8)
        square = rng.integers(60, 256, (10, 10, 3), np.uint8) // 2 + rng.integers(0, 128, 3, np.uint8)
        step = np.cos([number, number + 1.5]) * 0.6
        for frame in range(FRAMES):
            y, x = (np.array([11, 11]) + step * (frame - FRAMES / 2)).round().astype(int).clip(0, SIZE - 10)
            video[frame, y : y + 10, x : x + 10] = square
        with video_file(folder / f"{number}.mp4", 12) as write:
            write(video)
    return make_dataset(tmp_path_factory.mktemp("moving"), sorted(folder.glob("*.mp4")))
