"""The scorer `light` on footage whose light is known, through H.264 as clips are."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.moving import film, scene
from tests.support.scored import coded, score_file, score_frames

SHAPES = [(96, 128, 24), (144, 80, 60), (108, 192, 30)]  # height, width, fps


def _lit(gain: np.ndarray, height: int, width: int, fps: int, pan: float = 0.1) -> np.ndarray:
    frames = film(scene(), np.arange(len(gain)) / fps, height, width, pan)
    return np.clip(frames * gain[:, None, None, None], 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "fps"), SHAPES)
@pytest.mark.parametrize("grey", [0, 64, 128, 255])
def test_exposure_and_clipping(height: int, width: int, fps: int, grey: int) -> None:
    frames = np.full((8, height, width, 3), grey, np.uint8)
    frames[:, :, : width // 4] = 255
    values = score_frames("light", {}, frames, fps)
    assert values["exposure"] == pytest.approx(0.25 + 0.75 * grey / 255, abs=0.01)
    assert values["dark"] == pytest.approx(0.75 if grey == 0 else 0, abs=0.02)
    assert values["bright"] == pytest.approx(1 if grey == 255 else 0.25, abs=0.02)
    assert values["contrast"] == pytest.approx(0.433 * (1 - grey / 255), abs=0.02)
    assert values["flicker"] == values["fade_in"] == values["fade_out"] == 0


@pytest.mark.parametrize(("height", "width", "fps"), SHAPES)
@pytest.mark.parametrize("rate", [3.0, 5.0, 9.7])
def test_flicker_is_seen_whatever_its_rate(height: int, width: int, fps: int, rate: float) -> None:
    wave = np.sin(2 * np.pi * rate * np.arange(2 * fps) / fps)
    even, slight, strong = (
        score_frames("light", {}, _lit(1 + swing * wave, height, width, fps), fps)["flicker"] for swing in (0, 0.05, 0.15)
    )
    assert even < 0.004 < 0.009 < slight < strong
    assert 0.04 < strong < 0.15  # the mean luma is about a half


def test_slow_changes_of_light_and_what_moves_are_no_flicker() -> None:
    fps = 24
    dimmed = score_frames("light", {}, _lit(np.linspace(1, 0.4, 3 * fps), 96, 128, fps), fps)
    assert dimmed["flicker"] < 0.004 and dimmed["fade_out"] == 0

    frames = _lit(np.ones(2 * fps), 96, 128, fps, pan=0.0)
    for number in range(2 * fps):  # a white square that comes and goes in a third of the picture
        if number % 4 < 2:
            frames[number, 20:76, 30:86] = 255
    assert score_frames("light", {}, frames, fps)["flicker"] < 0.004

    switched = _lit(np.repeat([0.5, 1.0], fps), 96, 128, fps)  # a lamp goes on
    assert score_frames("light", {}, switched, fps)["flicker"] < 0.006


@pytest.mark.parametrize(("height", "width", "fps"), SHAPES)
@pytest.mark.parametrize("level", [0, 255, 120])
def test_fades_from_and_to_a_plain_picture(height: int, width: int, fps: int, level: int) -> None:
    count = 2 * fps
    share = np.minimum(1, np.arange(count) / (0.75 * fps))[:, None, None, None]  # in three quarters of a second
    frames = film(scene(), np.arange(count) / fps, height, width, 0.1)
    faded = (share * frames + (1 - share) * level).round().astype(np.uint8)
    once = score_frames("light", {}, faded, fps)
    assert once["fade_in"] == pytest.approx(0.7, abs=0.12) and once["fade_out"] == 0
    back = score_frames("light", {}, faded[::-1], fps)
    assert back["fade_out"] == pytest.approx(0.7, abs=0.12) and back["fade_in"] == 0


def test_a_cut_from_black_is_no_fade() -> None:
    frames = _lit(np.repeat([0.0, 1.0], [12, 36]), 96, 128, 24)
    values = score_frames("light", {}, frames, 24)
    assert values["fade_in"] == values["fade_out"] == 0


def test_values_do_not_depend_on_pieces_and_a_frame_is_enough() -> None:
    clip = coded(_lit(np.linspace(0, 1, 20), 96, 128, 24), 24)
    values = [score_file("light", {}, clip, piece) for piece in (1, 7, 1000)]
    assert values[0] == values[1] == values[2]
    assert score_frames("light", {}, _lit(np.ones(1), 96, 128, 24), 24)["flicker"] == 0
