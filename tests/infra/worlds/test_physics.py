"""Physics: bodies keep their law, held-out pairs are disjoint, and the reader knows a law that is broken."""

from typing import Any

import numpy as np
import pytest

from longtake.infra.worlds import physics


def video(seed: int, heldout: bool = False, **options: Any) -> tuple[np.ndarray, physics.Video]:
    made = physics.render(seed, heldout, **options)
    return np.stack(list(made.frames)), made


@pytest.mark.parametrize("law", physics.LAWS)
def test_the_reader_agrees_with_the_truth(law: str) -> None:
    for seed in range(6):
        frames, made = video(seed, seed % 2 == 0, law=law)
        assert frames.shape == (made.length, 32, 32, 3) and frames.dtype == np.uint8
        figures = physics.read(frames, made.truth, made.fps)
        assert figures["one"] == 1 and figures["follows"] == 1
        assert figures["off"] < 0.005 and figures["off_law"] < 0.01


def test_laws_are_what_they_say() -> None:
    start, velocity = np.array([0.3, 0.4]), np.array([0.03, 0.01])
    bounced = physics.path("bounce", start, velocity, 60, 0.1)
    assert bounced.min() >= 0.1 and bounced.max() <= 1 - 0.1
    assert np.allclose(np.abs(np.diff(bounced[:5], axis=0)), np.abs(velocity))
    orbit = physics.path("orbit", start, velocity, 60, 0.1)
    assert np.allclose(np.diff(orbit, n=2, axis=0), -(2 - 2 * np.cos(physics.PULL**0.5)) * (orbit[1:-1] - 0.5))
    fallen = physics.path("fall", start, velocity, 60, 0.1)
    before = fallen[:6, 1]
    assert np.allclose(np.diff(before, n=2), physics.GRAVITY)
    assert np.isclose(fallen[0, 1], start[1]) and np.isclose(before[1] - before[0], 0.01 + physics.GRAVITY / 2)
    assert fallen[:, 1].max() <= 1 - 0.1 + 1e-9


def test_what_is_held_out_is_never_in_training() -> None:
    pairs: dict[bool, set[tuple[str, str]]] = {False: set(), True: set()}
    speeds: dict[bool, set[tuple[int, str]]] = {False: set(), True: set()}
    for heldout in (False, True):
        for seed in range(300):
            truth = physics.render(seed, heldout).truth
            pairs[heldout].add((truth["colour"], truth["direction"]))
            speeds[heldout].add((truth["speed"], truth["direction"]))
    apart = {(c, d) for c in physics.COLOURS for d in physics.DIRECTIONS} - pairs[False]
    assert len(apart) == 12 and len(speeds[False]) == 24
    assert not apart & pairs[False] and pairs[True] & apart
    # each colour, direction and speed is there by itself
    assert len({d for _, d in pairs[False]}) == 8 and len({c for c, _ in pairs[False]}) == 6


def test_the_reader_sees_a_broken_law_and_more_or_less_than_one_body() -> None:
    frames, made = video(1)
    shuffled = frames[np.random.default_rng(0).permutation(len(frames))]
    figures = physics.read(shuffled, {"law": "bounce", "radius": 0.11}, made.fps)
    assert figures["follows"] == 0 and figures["off_law"] > 2 * physics.NEAR and "off" not in figures
    two = np.where(np.abs(frames[0].astype(int) - frames[0, 0, 0]).max(-1, keepdims=True) > 20, frames[0], frames[-1])
    both = frames.copy()
    both[8] = two
    assert physics.find(both, 0.11).bodies[8] == 2
    assert physics.read(both, made.truth, made.fps)["one"] == pytest.approx(16 / 17)
    empty = np.full_like(frames, 60)
    nothing = {"one": 0.0, "moved": 0.0, "off_law": 1.0, "follows": 0.0, "off": 1.0}
    assert physics.read(empty, made.truth, made.fps) == nothing


def test_a_body_that_stands_still_follows_no_law() -> None:
    frames, made = video(1)
    figures = physics.read(np.repeat(frames[:1], 17, axis=0), {"law": "bounce", "radius": 0.11}, made.fps)
    assert figures == {"one": 1.0, "moved": 0.0, "off_law": 1.0, "follows": 0.0}
    assert physics.read(frames, made.truth, made.fps)["moved"] > 2 * physics.LEAST


def test_a_video_is_its_seed_alone() -> None:
    assert np.array_equal(video(5)[0], video(5)[0])
    assert not np.array_equal(video(5)[0], video(6)[0])
