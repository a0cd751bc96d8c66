"""Clips from differences: exact at their reference, the same from any frame of theirs, and joined where they agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longtake.training.models.encgan3.recursion import clip_around, clip_of, merged


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 20), st.data())
def test_forward_and_then_backward_returns_to_the_reference(frames: int, data: st.DataObject) -> None:
    v, x = random(2, frames, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    forward = clip_of(v, x)
    torch.testing.assert_close(clip_of(v, forward[:, -1], frames)[:, 0], x)
    # from any of its frames it is the same clip
    index = data.draw(st.integers(0, frames))
    torch.testing.assert_close(clip_of(v, forward[:, index], index), forward)


def test_frames_are_added_up_one_by_one_from_exactly_the_reference() -> None:
    v, x = random(2, 4, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    clip = clip_of(v, x, 2)
    assert torch.equal(clip[:, 2], x)
    torch.testing.assert_close(clip[:, 3], x + v[:, 2])
    torch.testing.assert_close(clip[:, 4], x + v[:, 2] + v[:, 3])
    torch.testing.assert_close(clip[:, 1], x - v[:, 1])
    torch.testing.assert_close(clip[:, 0], x - v[:, 1] - v[:, 0])


def test_around_the_reference_each_frame_has_its_own_difference() -> None:
    v, x = random(2, 5, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    clip = clip_around(v, x, 3)
    assert torch.equal(clip[:, 3], x)
    for frame in (0, 1, 2, 4):
        torch.testing.assert_close(clip[:, frame], x + v[:, frame])


@pytest.mark.parametrize("how", ["cut", "fade"])
def test_clips_that_agree_in_their_overlap_are_merged_exactly(how: str) -> None:
    video = random(2, 28, 3, 2, 2)
    for joint in range(12, 16):
        whole = merged(video[:, :16], video[:, 12:], 4, joint, how)  # type: ignore[arg-type]
        torch.testing.assert_close(whole, video, rtol=0, atol=0 if how == "cut" else 1e-12)


def test_a_cut_has_each_clip_up_to_the_reference_and_a_fade_goes_from_one_to_the_other() -> None:
    first, second = torch.zeros(1, 6, 1), torch.ones(1, 6, 1)
    assert merged(first, second, 3, 4, "cut").flatten().tolist() == [0] * 5 + [1] * 4
    fade = merged(first, second, 3, 4, "fade").flatten()
    torch.testing.assert_close(fade, torch.tensor([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]))
