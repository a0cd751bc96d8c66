"""One clip to all scorers: the frames that they get are those of the clip, in whatever pieces."""

from typing import Any

import numpy as np
import pytest
import toy_scorers
from scored import coded, score_frames

from longtake.datasets import clip
from longtake.datasets.errors import Failure
from longtake.pipeline.score_shard import Clip
from longtake.pipeline.scorers.scorer import places

FRAMES = np.random.default_rng(0).integers(0, 256, (50, 6, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
MP4 = coded(FRAMES, 24, gop=6)
ROW = {"key": "clip-00000", "frame_count": 50, "fps": 24.0, "height": 48, "width": 64}


class Look:
    def __init__(self, count: int, size: tuple[int, int] | None = None) -> None:
        self.count, self.size, self.batch = count, size, 1

    def look(self, frames: np.ndarray) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("most", [1, 7, 32, 50])
def test_watchers_see_every_frame_once(most: int) -> None:
    whole = clip.decode(MP4)
    pieces = list(Clip(MP4, ROW, [], "clip").pieces(most))
    assert [piece.first for piece in pieces] == list(range(0, 50, most))
    assert max(len(piece.planes) for piece in pieces) == most
    luma = np.concatenate([piece.luma for piece in pieces]).astype(float)
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs((luma - 16) / 219 * 255 - whole @ weights).mean() < 2
    blue = np.concatenate([piece.chroma for piece in pieces])[:, 0].astype(float)
    small = whole.reshape(50, 24, 2, 32, 2, 3).mean((2, 4))
    assert np.abs((blue - 128) / 224 * 255 - (small[..., 2] - small @ weights) / 1.772).mean() < 2


@pytest.mark.parametrize("size", [None, (32, 32), (40, 100)])
@pytest.mark.parametrize("count", [1, 3, 50, 80])
def test_lookers_see_the_same_frames_whoever_watches(count: int, size: tuple[int, int] | None) -> None:
    alone = Clip(MP4, ROW, [Look(count, size), Look(2)], "clip")
    beside = Clip(MP4, ROW, [Look(count, size), Look(2)], "clip")
    assert sum(len(piece.planes) for piece in beside.pieces()) == 50
    for one, other in zip(alone.pictures(), beside.pictures(), strict=True):
        assert np.array_equal(one, other)
    numbers = places(50, count)
    expected = np.stack(list(clip.fitted(MP4, (48, 64), numbers, size or (48, 64), "clip")))
    assert np.array_equal(beside.pictures()[0], expected)
    # key frames are 6 apart: some frames cost far fewer
    assert beside.decoded == 50 and (count > 3 or alone.decoded < 35)


def test_damage_is_one_line() -> None:
    with pytest.raises(Failure, match=r"clip: has 50 frames, its index says 51; run"):
        list(Clip(MP4, ROW | {"frame_count": 51}, [], "clip").pieces())
    with pytest.raises(Failure, match="clip: cannot decode"):
        list(Clip(b"nothing" * 99, ROW, [], "clip").pieces())
    with pytest.raises(Failure, match="clip: frame 50 is missing"):
        Clip(MP4, ROW | {"frame_count": 60}, [Look(60)], "clip").pictures()


def test_the_test_helper_scores_a_clip() -> None:
    frames = np.full((20, 48, 64, 3), (200, 100, 50), np.uint8)
    values = score_frames(toy_scorers.BRIGHT, {"scale": 2.0}, frames, 12, piece=7)
    assert values["frames"] == 20 and values["side"] == "dark" and abs(values["mean"] / 2 - 124) < 3
    values = score_frames(toy_scorers.COLOUR, {"size": 16}, frames, 12)
    assert values["each"].shape == (4, 3) and np.abs(values["vector"] - (200, 100, 50)).max() < 4
