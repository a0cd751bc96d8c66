"""Joints in the comment of a film: kept whole however many there are, and read from a file that may say anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longtake.infra.cli import media
from longtake.training.models.common.joints import comment_of, joints_in
from longtake.training.models.common.video import video_file


def test_a_file_keeps_the_joints_of_a_long_film_and_is_the_same_each_time(tmp_path: Path) -> None:
    joints = list(range(16, 16 + 12 * 50_000, 12))
    for name in ("a", "b"):
        with video_file(tmp_path / f"{name}.mp4", 12, joints=joints) as write:
            write(np.zeros((2, 32, 32, 3), np.uint8))
    assert media.joints_of(str(tmp_path / "a.mp4")) == joints
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_file_without_joints_has_no_comment(tmp_path: Path) -> None:
    with video_file(tmp_path / "a.mp4", 12) as write:
        write(np.zeros((2, 32, 32, 3), np.uint8))
    assert b"longtake" not in (tmp_path / "a.mp4").read_bytes()
    assert media.joints_of(str(tmp_path / "a.mp4")) == []


@pytest.mark.parametrize(
    "comment",
    ["", "my holidays", "7", "[]", "null", '{"longtake": 7}', '{"longtake": []}', '{"joints": [1]}', "[" * 200_000],
)
def test_a_comment_of_others_says_no_joints(comment: str) -> None:
    assert joints_in(comment) == []


@pytest.mark.parametrize(
    ("joints", "said"),
    [
        ("7", "are no numbers"),
        ("{}", "are no numbers"),
        ("[1.0]", "are no numbers"),
        ("[-1]", "are no numbers"),
        ("[NaN]", "are no numbers"),
        ("[[1]]", "are no numbers"),
        ("[2,1]", "do not rise"),
        (f"[{'1' * 4000}]", "are no numbers"),
    ],
)
def test_wrong_joints_are_refused(joints: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        joints_in(f'{{"longtake": {{"joints": {joints}}}}}')


def test_what_is_read_has_a_limit() -> None:
    with pytest.raises(ValueError, match=r"its comment has 16,777,217 characters, and 16,777,216 are read"):
        joints_in(" " * ((1 << 24) + 1))
    assert joints_in(comment_of([1, 5])) == [1, 5]
