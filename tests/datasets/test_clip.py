from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longtake.datasets.clip import frame_difference, pack_array, unpack_array


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    factor=st.sampled_from([1, 2, 3, 4, 5, 16, 17]),
    low=st.sampled_from([0, 250, 255]),
    seed=st.integers(0, 2**32 - 1),
)
@example(frames=2, height=2, width=3, factor=16, low=255, seed=0)  # the largest sums in 16 bits,
@example(frames=2, height=2, width=3, factor=17, low=255, seed=0)  # and the first that need more
def test_the_frame_difference_is_that_of_rounded_box_means(
    frames: int, height: int, width: int, factor: int, low: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    video = rng.integers(low, 256, (frames, height * factor, width * factor, 3), np.uint8)
    if seed % 2:
        video[::2] = 0
    boxes = video.reshape(frames, height, factor, width, factor, 3).astype(np.int64).sum((2, 4))
    means = (boxes + factor * factor // 2) // (factor * factor)
    found = frame_difference(video, factor)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.abs(np.diff(means, axis=0)))


def test_the_frame_difference_takes_a_video_that_is_cropped_and_strided() -> None:
    video = np.random.default_rng(0).integers(0, 256, (6, 10, 14, 3), np.uint8)[::2, 1:9, 2:14]
    assert np.array_equal(frame_difference(video, 2), frame_difference(video.copy(), 2))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4, 4, 3), (2, 3, 4)])
def test_an_array_comes_back_as_it_was_packed(shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
    for dtype in (np.uint8, np.float32, np.dtype("<u2")):
        array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype, order)
        unpacked = unpack_array(pack_array(array))
        assert unpacked.dtype == array.dtype and unpacked.flags.writeable
        np.testing.assert_array_equal(unpacked, array)
