"""The held-out clips of an evaluation: the same for every model, and at any rate and size that is asked for."""

from __future__ import annotations

from pathlib import Path

import judged
import numpy as np
import pytest

from longtake.datasets import compact
from longtake.datasets.errors import UserError
from longtake.training.evaluation.clips import Heldout, Part, frames_needed, listing, ticks

SIZE = (judged.SIZE, judged.SIZE)


def test_the_frame_that_is_on_screen_at_each_tick() -> None:
    assert ticks(4, 12, 12) == [0, 1, 2, 3]
    assert ticks(4, 6, 12) == [0, 2, 4, 6]
    assert ticks(6, 12, 8) == [0, 0, 1, 2, 2, 3]
    assert ticks(3, 10, 30) == [0, 3, 6]  # where 3 * 0.1 * 10 is a little below 3
    assert frames_needed(16, 12, 8) == 11


def test_the_choice_depends_on_the_seed_alone_and_is_of_held_out_clips(squares: str) -> None:
    heldout = Heldout(squares, None)
    first, again = (heldout.chosen(0.75, SIZE, 3, seed=5) for _ in range(2))
    assert first == again
    assert len(first) == 3
    keys = {row["key"] for row in compact.table(squares, "val").to_pylist()}
    assert {part.key for part in first} < keys
    assert all(0 <= part.first <= part.row["frame_count"] - 9 for part in first)
    assert listing(first) != listing(heldout.chosen(0.75, SIZE, 3, seed=6))
    # fewer are the first of more, so that a suite can grow
    assert heldout.chosen(0.75, SIZE, 9, seed=5)[:3] == first


def test_frames_at_another_rate_are_those_on_screen(squares: str) -> None:
    heldout = Heldout(squares, None)
    assert heldout.fps == judged.FPS
    [part] = heldout.chosen(1.0, SIZE, 1, seed=0)
    every = np.stack(list(heldout.frames(part, 12, 12, SIZE)))
    half = np.stack(list(heldout.frames(part, 6, 6, SIZE)))
    double = np.stack(list(heldout.frames(part, 24, 24, SIZE)))
    later = np.stack(list(heldout.frames(part, 6, 12, SIZE, after=0.5)))
    assert (half == every[::2]).all()
    assert (double == every.repeat(2, 0)).all()
    assert (later == every[6:]).all()


def test_short_clips_that_touch_in_their_source_are_one_long_video(long_squares: str) -> None:
    heldout = Heldout(long_squares, None)
    assert not heldout.chosen(4.0, SIZE, 9, 0)
    parts = heldout.chosen(4.0, SIZE, 9, 0, join=True)
    assert parts and all(len(part.rows) == 2 and 0 <= part.first <= 72 - 48 for part in parts)
    part = parts[0]
    every = np.stack(list(heldout.frames(part, 48, 12, SIZE)))
    whole = [
        np.stack(list(heldout.frames(Part(part.shard, part.number + n, row, 0), 36, 12, SIZE)))
        for n, row in enumerate(part.rows)
    ]
    assert (every == np.concatenate(whole)[part.first : part.first + 48]).all()
    assert (np.stack(list(heldout.frames(part, 96, 24, SIZE))) == every.repeat(2, 0)).all()
    # a clip that is long enough stays by itself
    assert heldout.chosen(1.0, SIZE, 9, 0, join=True) == heldout.chosen(1.0, SIZE, 9, 0)
    assert listing(parts) != listing([part._replace(rest=part.rest[:0]) for part in parts])


def test_clips_with_a_hole_between_them_are_not_joined(long_squares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout = Heldout(long_squares, None)
    for _, _, row in heldout._rows:
        row["start_seconds"] *= 1.5
    assert not heldout.chosen(4.0, SIZE, 9, 0, join=True)


def test_clips_that_are_too_short_or_small_do_not_take_part(squares: str) -> None:
    heldout = Heldout(squares, None)
    assert not heldout.chosen(3.1, SIZE, 9, 0)
    assert not heldout.chosen(1.0, (64, 64), 9, 0)
    assert heldout.longest() == "the longest held-out clip lasts 3 s, the largest has 32x32"


def test_a_dataset_without_held_out_clips_is_one_line(tmp_path: Path) -> None:
    dataset = judged.dataset(tmp_path, videos=1, frames=12)
    for split in ("train", "val"):
        if not len(compact.open_split(dataset, split)[0].shards):
            break
    with pytest.raises(UserError, match="has no held-out clip; shard it with a val split"):
        Heldout(dataset, None).chosen(0.1, SIZE, 1, 0)
