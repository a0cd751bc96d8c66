"""Scorers of single pictures on footage whose blur, noise, blocks and bars are known."""

import io
from typing import Any

import cv2
import numpy as np
import pytest
from pictures import colour, pan, watched, world, written
from PIL import Image
from scored import coded, score_file, score_frames

WATCH = ["focus", "coding", "bars", "overlay"]


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    """Blurred by a share of the height."""
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma * frames.shape[1]) for frame in frames])


def barred(frames: np.ndarray, top: float = 0, bottom: float = 0, left: float = 0, right: float = 0) -> np.ndarray:
    frames = frames.copy()
    height, width = frames.shape[1:3]
    frames[:, : round(top * height)] = 0
    frames[:, height - round(bottom * height) :] = 0
    frames[:, :, : round(left * width)] = 0
    frames[:, :, width - round(right * width) :] = 0
    return frames


def jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("scorer", WATCH)
def test_a_clip_has_the_same_values_in_pieces_of_any_size(scorer: str) -> None:
    mp4 = coded(written(pan(20, 128, 192), "STILL HERE", 0.1, 0.1, 0.1), 24)
    one, *others = [score_file(scorer, {}, mp4, piece=size) for size in (1, 7, 64)]
    assert others == [one, one]


@pytest.mark.parametrize(("height", "fps"), [(128, 8), (256, 30), (540, 4)])
def test_more_blur_is_a_higher_number_at_any_size(height: int, fps: float) -> None:
    frames = pan(max(2, int(fps / 4)), height, height * 3 // 2, speed=0.003)
    values = [
        score_frames("focus", {}, blurred(frames, sigma) if sigma else frames, fps)["blur"]
        for sigma in (0, 0.006, 0.012, 0.03)
    ]
    assert values == sorted(values) and values[0] < 0.46 < values[1] < 0.7 < values[3], values


def test_blur_does_not_depend_on_contrast() -> None:
    frames = pan(4, 256, 384)
    faint = (64 + frames / 2).astype(np.uint8)
    assert score_frames("focus", {}, faint, 24)["blur"] == pytest.approx(
        score_frames("focus", {}, frames, 24)["blur"], abs=0.04
    )


def test_a_subject_in_focus_stands_out_from_a_soft_ground() -> None:
    frames = pan(4, 256, 384, speed=0)
    soft = blurred(frames, 0.02)
    soft[:, 64:192, 96:288] = frames[:, 64:192, 96:288]
    values = score_frames("focus", {}, soft, 24)
    assert values["subject"] < values["blur"]
    alike = score_frames("focus", {}, blurred(frames, 0.02), 24)
    assert values["subject"] < alike["subject"] - 0.2


def test_moments_of_blur_show_in_the_worst() -> None:
    frames = pan(48, 128, 192, speed=0)
    frames[36:] = blurred(frames[36:], 0.04)
    values = score_frames("focus", {"rate": 8}, frames, 24)
    assert values["worst"] > values["blur"] + 0.2


@pytest.mark.parametrize("scorer", ["focus", "coding"])
def test_a_picture_of_nothing_has_no_blur_and_no_blocks(scorer: str) -> None:
    values = watched(scorer, np.full((4, 128, 192), 100, np.uint8))
    expected: dict[str, dict[str, Any]] = {
        "focus": {"blur": None, "subject": None, "worst": None},
        "coding": {"noise": 0.0, "blocks": 0.0, "spacing": 0.0},
    }
    assert values == expected[scorer]


@pytest.mark.parametrize("height", [128, 256, 512])
@pytest.mark.parametrize("sigma", [1.0, 3.0, 8.0])
def test_noise_is_measured_in_levels(height: int, sigma: float) -> None:
    smooth = cv2.GaussianBlur(world(height, height * 3 // 2), (0, 0), height / 64)
    noise = np.random.default_rng(1).normal(0, sigma, (4, *smooth.shape))
    luma = np.clip(np.rint(smooth + noise), 16, 235).astype(np.uint8)
    assert watched("coding", luma)["noise"] == pytest.approx(sigma, rel=0.25)


def test_noise_survives_the_coding_of_clips() -> None:
    frames = pan(8, 256, 384, speed=0)
    rng = np.random.default_rng(2)
    values = [
        score_frames("coding", {}, colour(frames[..., 0] + rng.normal(0, sigma, frames.shape[:3])), 24)["noise"]
        for sigma in (0, 4, 10)
    ]
    assert values[0] < 1.1 < values[1] < values[2]


@pytest.mark.parametrize("scale", [1.0, 1.5, 0.75])
def test_blocks_are_found_at_the_distance_that_scaling_gave_them(scale: float) -> None:
    clean = pan(6, 256, 384)
    size = round(384 * scale / 16) * 16, round(256 * scale / 16) * 16
    shown = [
        np.stack([cv2.resize(each, size) for each in frames])
        for frames in (np.stack([jpeg(f, 6) for f in clean]), clean)
    ]
    blocky, sharp = (score_frames("coding", {}, frames, 24) for frames in shown)
    assert blocky["blocks"] > 0.1 and sharp["blocks"] < 0.06, (blocky, sharp)
    assert blocky["spacing"] == pytest.approx(8 * size[1] / 256, rel=0.02)


@pytest.mark.parametrize(
    ("bars", "shape"),
    [
        ({}, "none"),
        ({"top": 0.125, "bottom": 0.125}, "letterbox"),
        ({"left": 0.25, "right": 0.25}, "pillarbox"),
        ({"top": 0.1, "bottom": 0.1, "left": 0.2, "right": 0.2}, "window"),
        ({"bottom": 0.2}, "edge"),
    ],
)
@pytest.mark.parametrize("size", [(128, 224), (360, 640), (256, 144)])
def test_bars_are_measured(bars: dict[str, float], shape: str, size: tuple[int, int]) -> None:
    values = score_frames("bars", {}, barred(pan(12, *size), **bars), 12)
    assert values["shape"] == shape
    for side in ("top", "bottom", "left", "right"):
        assert values[side] == pytest.approx(bars.get(side, 0), abs=2 / min(size))


def test_the_night_is_no_bar() -> None:
    night = pan(12, 128, 192) // 12
    lamp = night.copy()
    lamp[:, 60:70, 90:100] = 200
    assert [score_frames("bars", {}, frames, 12)["shape"] for frames in (night, lamp, night * 0)] == ["none"] * 3


def test_a_bar_that_does_not_stay_is_none() -> None:
    frames = pan(24, 128, 192)
    half = np.concatenate([barred(frames[:12], top=0.2, bottom=0.2), frames[12:]])
    assert score_frames("bars", {}, half, 12)["shape"] == "none"


@pytest.mark.parametrize(("size", "fps"), [((160, 240), 30), ((360, 640), 6)])
@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("none", None),
        ("logo", ("LOGO", 0.75, 0.06, 0.1)),
        ("subtitle", ("what they then said", 0.25, 0.84, 0.09)),
        ("other", ("STOCK", 0.35, 0.42, 0.12)),
    ],
)
def test_what_stands_still_while_the_rest_moves_is_an_overlay(
    size: tuple[int, int], fps: float, place: str, line: tuple[str, float, float, float] | None
) -> None:
    frames = pan(int(2 * fps), *size, speed=0.6 / fps)
    values = score_frames("overlay", {}, written(frames, *line) if line else frames, fps)
    assert values["place"] == place and values["moves"] > 0.5
    assert (values["share"] > 0.005) == (line is not None) and values["share"] < 0.15


def test_subtitles_that_change_are_seen() -> None:
    frames = pan(96, 160, 240, speed=0.03)
    frames = np.concatenate([frames[:30], written(frames[30:80], "and so it went on", 0.25, 0.84, 0.09), frames[80:]])
    assert score_frames("overlay", {}, frames, 24)["place"] == "subtitle"


def test_before_a_still_camera_nothing_is_told() -> None:
    frames = written(pan(48, 160, 240, speed=0), "LOGO", 0.75, 0.06, 0.1)
    values = score_frames("overlay", {}, frames, 24)
    assert values["place"] == values["reason"] == "still" and values["share"] is None and values["moves"] < 0.1


def test_the_edges_of_bars_are_no_overlay() -> None:
    values = score_frames("overlay", {}, barred(pan(48, 160, 240), top=0.125, bottom=0.125), 24)
    assert values["place"] == "none"
