"""The scorer `cadence` on footage whose repeated frames are known, through H.264 as clips are."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.moving import film, scene
from tests.support.scored import coded, score_file, score_frames

RHYTHMS = {  # times that each picture is shown, over and over
    "full": [1],
    "doubled": [2],
    "tripled": [3],
    "telecine": [3, 2],
}
STEADY = {"24 to 30": [1, 1, 1, 2], "25 to 30": [1, 1, 1, 1, 2], "12.5 to 30": [2, 3, 2, 3, 2], "16 to 24": [1, 2]}


def _shown(times: list[int], count: int = 72, height: int = 96, width: int = 128, fps: float = 30.0) -> np.ndarray:
    pictures = film(scene(), np.arange(count) / fps, height, width, 0.3, 0.1)
    return pictures.repeat(np.resize(times, count), 0)[:count]


@pytest.mark.parametrize(("height", "width", "crf"), [(96, 128, 16), (360, 202, 23)])
@pytest.mark.parametrize(("name", "times"), [*RHYTHMS.items(), *STEADY.items()])
def test_rhythms_of_repeated_frames(name: str, times: list[int], height: int, width: int, crf: int) -> None:
    values = score_frames("cadence", {}, _shown(times, height=height, width=width), 30, crf=crf)
    assert values["cadence"] == (name if name in RHYTHMS else "telecine")
    assert values["true_fps"] == pytest.approx(30 * len(times) / sum(times), rel=0.06)
    assert values["duplicate"] == pytest.approx(1 - len(times) / sum(times), abs=0.04)
    assert values["frozen"] == values["longest"] == 0


@pytest.mark.parametrize("fps", [12, 30, 60])
def test_a_freeze_and_its_length(fps: int) -> None:
    frames = _shown([1], 3 * fps, fps=fps)
    frames[fps : 2 * fps + 1] = frames[fps]
    values = score_frames("cadence", {}, frames, fps)
    assert values["cadence"] == "frozen"
    assert values["longest"] == pytest.approx(1, abs=0.01) and values["frozen"] == pytest.approx(1 / 3, abs=0.03)
    assert values["duplicate"] == 0 and values["true_fps"] == fps

    frames = frames[fps // 2 : fps + 2]  # two frames alike are no freeze
    assert score_frames("cadence", {}, frames, fps)["longest"] == 0


def test_frames_repeated_at_random_are_irregular() -> None:
    times = np.random.default_rng(0).permutation([2] * 12 + [1] * 48)
    values = score_frames("cadence", {}, _shown(list(times), 72), 30)
    assert values["cadence"] == "irregular" and values["duplicate"] == pytest.approx(1 / 6, abs=0.04)


def test_a_still_picture_is_frozen_and_one_where_a_small_thing_moves_is_not() -> None:
    frames = np.repeat(film(scene(), np.zeros(1), 144, 256), 48, 0)
    still = score_frames("cadence", {}, frames, 24)
    assert still["cadence"] == "frozen" and still["frozen"] == 1 and still["true_fps"] == 0
    for number in range(48):
        frames[number, 60:68, 20 + 3 * number : 28 + 3 * number] = 250
    moving = score_frames("cadence", {}, frames, 24)
    assert moving["cadence"] == "full" and moving["frozen"] == moving["duplicate"] == 0


def test_a_still_scene_with_noise_is_not_frozen() -> None:
    still = np.repeat(film(scene(), np.zeros(1), 144, 192), 48, 0).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 6, still.shape)
    values = score_frames("cadence", {}, np.clip(still + noise, 0, 255).astype(np.uint8), 24)
    assert values["cadence"] == "full" and values["frozen"] == values["duplicate"] == 0


def test_values_do_not_depend_on_pieces() -> None:
    clip = coded(_shown([3, 2], 40), 30)
    values = [score_file("cadence", {}, clip, piece) for piece in (1, 7, 1000)]
    assert values[0] == values[1] == values[2]


def test_clips_of_one_and_two_frames() -> None:
    one = score_frames("cadence", {}, _shown([1], 1), 30)
    assert one == {"frozen": 0, "longest": 0, "duplicate": 0, "true_fps": 30, "cadence": "full"}
    assert score_frames("cadence", {}, _shown([1], 2), 30)["cadence"] == "full"
