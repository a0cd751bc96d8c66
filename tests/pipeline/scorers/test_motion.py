"""The scorer `motion` on footage whose motion is known, through H.264 as clips are."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from tests.support.moving import film, scene
from tests.support.scored import coded, score_file, score_frames

SHAPES = [(108, 192, 24), (176, 144, 30), (240, 426, 12)]  # height, width, fps


def _seconds(fps: int, length: float = 1.25) -> np.ndarray:
    return np.arange(round(length * fps)) / fps


@pytest.mark.parametrize(("height", "width", "fps"), SHAPES)
@pytest.mark.parametrize(
    ("move", "about"),
    [
        ("pan", {"pan": 0.2}),
        ("pan", {"pan": -0.08}),
        ("tilt", {"tilt": 0.12}),
        ("zoom", {"zoom": 0.25}),
        ("zoom", {"zoom": -0.25}),
        ("roll", {"roll": 15.0}),
        ("mixed", {"pan": 0.15, "tilt": -0.13}),
        ("static", {}),
    ],
)
def test_moves_of_a_camera_are_measured_and_named(
    height: int, width: int, fps: int, move: str, about: dict[str, float]
) -> None:
    values = score_frames("motion", {}, film(scene(), _seconds(fps), height, width, **about), fps)
    assert values["move"] == move
    for field, unit in (("pan", 0.01), ("tilt", 0.01), ("zoom", 0.02), ("roll", 1.0)):
        true = about.get(field, 0.0)
        assert values[field] == pytest.approx(true, abs=unit + 0.08 * abs(true)), field
    if move in ("pan", "tilt"):
        assert values["camera"] == pytest.approx(abs(*about.values()), rel=0.15)
    assert values["object"] < 0.01 and values["shake"] < 0.02


@pytest.mark.parametrize(("height", "width", "fps"), SHAPES)
def test_a_shaken_camera(height: int, width: int, fps: int) -> None:
    seconds = _seconds(fps)
    right, up = 0.015 * np.sin(2 * np.pi * 2.6 * seconds), 0.015 * np.sin(2 * np.pi * 3.3 * seconds + 1)
    values = score_frames("motion", {}, film(scene(), seconds, height, width, right, up), fps)
    assert values["move"] == "shake" and values["shake"] > 0.1
    assert abs(values["pan"]) < 0.05 and abs(values["tilt"]) < 0.05


@pytest.mark.parametrize("pan", [0.0, 0.15])
@pytest.mark.parametrize(("height", "width", "fps"), SHAPES)
def test_what_moves_by_itself_is_told_from_the_camera(height: int, width: int, fps: int, pan: float) -> None:
    seconds = _seconds(fps)
    frames = film(scene(), seconds, height, width, pan)
    thing, side = film(scene(seed=1), seconds, height, width), min(height, width) // 2
    for number, second in enumerate(seconds):  # a square, a quarter of side^2, goes down
        top, left = round((0.02 + 0.2 * second) * height), width // 3
        frames[number, top : top + side, left : left + side] = thing[0, :side, :side]
    values = score_frames("motion", {}, frames, fps)
    still = score_frames("motion", {}, film(scene(), seconds, height, width, pan), fps)
    assert values["move"] == still["move"] == ("pan" if pan else "static")
    assert values["pan"] == pytest.approx(pan, abs=0.02)
    share = side * side / (height * width)
    assert values["object"] > still["object"] + 0.4 * share * 0.2 and values["object"] < 0.15


def test_a_pan_whose_frames_are_doubled_is_no_shake() -> None:
    frames = film(scene(), _seconds(15), 144, 256, 0.2).repeat(2, 0)
    values = score_frames("motion", {}, frames, 30)
    assert values["move"] == "pan" and values["pan"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("frames", [np.full((20, 64, 96, 3), 16, np.uint8), scene(96)[None]])
def test_without_anything_to_follow_there_are_no_values(frames: np.ndarray) -> None:
    assert set(score_frames("motion", {}, frames, 24).values()) == {None}


def test_values_do_not_depend_on_pieces_or_threads() -> None:
    clip = coded(film(scene(), _seconds(30, 1.2), 120, 160, 0.1, roll=4.0), 30)
    values: list[dict[str, Any]] = [score_file("motion", {}, clip, piece) for piece in (1, 7, 1000)]
    cv2.setNumThreads(4)
    values.append(score_file("motion", {}, clip))
    assert cv2.getNumThreads() == 1
    assert all(each == values[0] for each in values)
