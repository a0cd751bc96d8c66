"""Return: the camera is away for as long as is said, with no square in sight, and the reader knows what is missing."""

from typing import Any

import numpy as np
import pytest

from longtake.datasets.errors import UserError
from longtake.infra import worlds
from longtake.infra.worlds import returning


def film(seed: int, heldout: bool = False, **options: Any) -> tuple[np.ndarray, worlds.Video]:
    made = worlds.load("return").render(seed, heldout, **options)
    return np.stack(list(made.frames)), made


@pytest.mark.parametrize("away", [1, 2.25, 12])
@pytest.mark.parametrize("size", [32, 48])
def test_nothing_but_grey_is_in_sight_for_as_long_as_asked(away: float, size: int) -> None:
    frames, made = film(5, away=away, size=size)
    assert frames.shape == (made.length, size, size, 3) and frames.dtype == np.uint8
    coloured = (frames.max(3) != frames.min(3)).any((1, 2))
    first, last = made.truth["away"]
    assert not coloured[first:last].any() and last - first == round(away * made.fps)
    # the last columns of a view may be the ground beside the squares
    assert coloured[: first - 2].all() and coloured[last + 2 :].all()


def test_the_camera_comes_back_the_way_it_went() -> None:
    for away in (4, 4.25):
        frames, made = film(1, away=away)
        assert np.array_equal(frames, frames[::-1])
        assert made.truth["camera"][made.truth["back"] :] == [0] * 8
        steps = np.abs(np.diff(made.truth["camera"]))
        assert steps.max() == 4 and len(np.flatnonzero(steps == 0)) <= 15


def test_nothing_but_the_squares_differs_between_films_of_one_length() -> None:
    (one, made), (other, _) = film(1, away=6), film(2, away=6)
    first, last = made.truth["away"]
    assert np.array_equal(one[first:last], other[first:last]) and not np.array_equal(one, other)


def test_the_wall_tells_where_the_camera_is() -> None:
    frames, made = film(3, away=6)
    first, last = made.truth["away"]
    light = frames[first : (first + last) // 2].mean((1, 2, 3))
    assert (np.diff(light) > 1).all()


def test_held_out_arrangements_are_in_no_other_film() -> None:
    heldout, others = returning.arrangements(True), returning.arrangements(False)
    assert not set(heldout) & set(others) and len(heldout) + len(others) == 4 * 6 * 5 * 4
    assert 0.15 < len(heldout) / (len(heldout) + len(others)) < 0.25
    for kind in (heldout, others):
        # each colour stands in each corner
        assert {(corner, colour) for arrangement in kind for corner, colour in enumerate(arrangement)} == {
            (corner, colour) for corner in range(4) for colour in (None, *range(6))
        }
    names = list(returning.COLOURS)
    for seed in range(20):
        corners = film(seed, True)[1].truth["corners"]
        assert tuple(name and names.index(name) for name in corners) in heldout


def test_the_reader_agrees_with_the_truth() -> None:
    for seed in range(10):
        frames, made = film(seed, seed % 2 == 0)
        assert returning.read(frames, made.truth, made.fps) == {"right": 1, "corners": 1}
        for name in filter(None, made.truth["corners"]):
            assert f"a {name} square" in made.caption


def test_the_reader_finds_what_has_changed() -> None:
    frames, made = film(4)
    corners, back = made.truth["corners"], made.truth["back"]
    one = next(n for n, name in enumerate(corners) if name)
    quarter = (slice(None), slice(16 * (one // 2), 16 * (one // 2) + 16), slice(16 * (one % 2), 16 * (one % 2) + 16))
    gone = frames.copy()
    gone[back:][quarter] = returning.GROUND
    assert returning.read(gone, made.truth, made.fps) == pytest.approx({"right": 2 / 3, "corners": 3 / 4})
    other = next(value for name, value in returning.COLOURS.items() if name not in corners)
    painted = frames.copy()
    painted[back:][quarter] = other
    assert returning.read(painted, made.truth, made.fps) == pytest.approx({"right": 2 / 3, "corners": 1})
    # only what comes back counts
    before = frames.copy()
    before[:back] = 0
    assert returning.read(before, made.truth, made.fps) == {"right": 1, "corners": 1}


def test_the_reader_bears_noise_and_another_frame_rate() -> None:
    frames, made = film(6)
    noisy = frames + np.random.default_rng(0).normal(0, 20, frames.shape)
    assert returning.read(noisy.clip(0, 255).astype(np.uint8), made.truth, made.fps)["right"] == 1
    twice = np.repeat(frames, 2, axis=0)
    assert returning.read(twice, made.truth, 2 * made.fps) == {"right": 1, "corners": 1}


def test_by_chance_an_eighth_of_the_squares_is_right() -> None:
    films = [film(seed) for seed in range(40)]
    found = [returning.read(a, made.truth, 4) for a, _ in films for _, made in films]
    assert 0.1 < np.mean([row["right"] for row in found]) < 0.16
    assert 0.58 < np.mean([row["corners"] for row in found]) < 0.67


def test_a_wall_of_squares_has_some_in_sight_all_the_time() -> None:
    (frames, made), (other, _) = film(2, away=6, wall="squares"), film(3, away=6, wall="squares")
    first, last = made.truth["away"]
    assert (frames.max(3) - frames.min(3)).max((1, 2)).min() > 100
    assert not np.array_equal(frames[first:last], other[first:last])
    assert np.array_equal(frames, frames[::-1]) and returning.read(frames, made.truth, 4)["right"] == 1
    # the squares of the film are the same with either wall
    assert np.array_equal(film(2, away=6)[0][0], frames[0])


@pytest.mark.parametrize("options", [{"wall": "red"}, {"size": 20}, {"away": 0}, {"fps": 0}, {"colour": 1}])
def test_what_cannot_be_drawn_is_refused_in_a_line(options: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        film(0, **options)
    assert "\n" not in str(refused.value)


def test_a_video_that_ends_before_the_camera_is_back_is_refused() -> None:
    frames, made = film(0)
    with pytest.raises(UserError, match="back with frame"):
        returning.read(frames[: made.truth["back"]], made.truth, made.fps)
