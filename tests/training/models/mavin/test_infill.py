"""Gaps filled by velocities in closed form: clean sides to the bit, guidance, seeds, batches, resume, films of several clips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.metrics.trivial import Gaussian
from longtake.training.models.common.codec import Pixels
from longtake.training.models.common.film import (
    Hole,
    check_room,
    connecting,
    filled,
    gaps_in,
    reachable,
    smoothing,
)
from longtake.training.models.generator import Gap, InfillSettings
from longtake.training.models.mavin.baselines import faded, held
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.models.mavin.infill import Filler, Hints, guided, sample

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = InfillSettings(steps=4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Between(nn.Module):
    """The exact velocity of gaps that go linearly from one side to the other. Remembers what it was called with."""

    def __init__(self, **hidden: float) -> None:
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.zeros(1)), MavinConfig(**hidden)
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, times: Tensor, length: Tensor, *hints: Tensor | None) -> Tensor:
        self.calls.append((x.clone(), times.clone(), length.clone(), *hints))
        noised = (times > 0).nonzero()[:, 1]
        first, last = int(noised.min()), int(noised.max()) + 1
        target = x.clone()
        target[:, :, first:last] = faded(x[:, :, :first], x[:, :, last:], last - first)
        return (x - target) / times.clamp_min(1e-6)[:, None, :, None, None]

    @staticmethod
    def normalise(latent: Tensor) -> Tensor:
        return latent.float()

    denormalise = normalise


def encode_pixels(codec: Any, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    return codec.encode(before).mode(), codec.encode(after).mode()


def filler(**changes: Any) -> Filler:
    fields: dict[str, Any] = {
        "model": Between(),
        "codec": Pixels(),
        "encode": encode_pixels,
        "fps": 8.0,
        "size": (4, 6),
        "settings": SETTINGS,
        "context": (2, 3),
        "longest": 8,
        "window": 14,
        "digest": "0",
        "device": torch.device("cpu"),
    }
    return Filler(**fields | changes)


def clip(frames: int, level: int = 0, size: tuple[int, int] = (4, 6)) -> np.ndarray:
    """Frame n is grey, of brightness `level` + n."""
    return np.stack([np.full((*size, 3), level + n, np.uint8) for n in range(frames)])


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("clean_time", ["zero", "same"])
def test_clean_latents_are_seen_at_every_step_and_leave_bit_for_bit_as_they_came(count: int, clean_time: Any) -> None:
    before, after, noise = randn(2, 3, 4, 5, 6), randn(2, 3, 2, 5, 6, seed=1), randn(2, 3, count, 5, 6, seed=2)
    seen = list[tuple[Tensor, Tensor, Tensor]]()

    def velocity(x: Tensor, times: Tensor, length: Tensor, *_: Any) -> Tensor:
        seen.append((x, times, length))
        return x + 1  # also where it is clean

    made = sample(velocity, before, after, noise, Hints(), SETTINGS, clean_time)
    assert torch.equal(made[:, :, :4], before) and torch.equal(made[:, :, -2:], after)
    assert made.shape == (2, 3, 6 + count, 5, 6) and len(seen) == 4
    for (x, times, length), now in zip(seen, (1.0, 0.75, 0.5, 0.25), strict=True):
        assert torch.equal(x[:, :, :4], before) and torch.equal(x[:, :, -2:], after)
        assert length.tolist() == [count, count]
        assert (times[:, 4 : 4 + count] == now).all()
        assert (times[:, [0, -1]] == (now if clean_time == "same" else 0)).all()


def test_a_velocity_in_closed_form_is_followed_to_its_end() -> None:
    before, after, noise = randn(2, 3, 4, 5, 6), randn(2, 3, 2, 5, 6, seed=1), randn(2, 3, 5, 5, 6, seed=2)
    made = sample(Between(), before, after, noise, Hints(), SETTINGS)
    torch.testing.assert_close(made[:, :, 4:9], faded(before, after, 5), atol=1e-5, rtol=0)


def test_gaps_of_a_gaussian_have_its_mean_and_deviation() -> None:
    exact = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0]))
    sides, noise = torch.zeros(8, 2, 2, 8, 8), randn(8, 2, 6, 8, 8)
    made = sample(exact, sides, sides, noise, Hints(), replace(SETTINGS, steps=60))[:, :, 2:-2]
    assert made.mean((0, 2, 3, 4)).tolist() == pytest.approx([1.0, -2.0], abs=0.1)
    assert made.std((0, 2, 3, 4)).tolist() == pytest.approx([0.5, 2.0], rel=0.06)


def hinted(x: Tensor, times: Tensor, length: Tensor, text: Any, mask: Any, image: Any) -> Tensor:
    """A velocity that says what it was led by: 1 for a text, 100 for an image."""
    return torch.full_like(x, (0.0 if text is None else float(text.mean())) + (0.0 if image is None else 100.0))


@pytest.mark.parametrize(
    ("given", "text", "image", "expected", "calls"),
    [
        ("text image", 1.0, 1.0, 101.0, 1),
        ("text image", 9.0, 1.0, 109.0, 2),
        ("text image", 9.0, 2.0, 209.0, 3),
        ("text image", 3.0, 3.0, 303.0, 2),
        ("text image", 0.0, 1.0, 100.0, 1),
        ("image", 9.0, 2.0, 200.0, 2),
        ("text", 4.0, 7.0, 4.0, 2),
        ("text negative", 4.0, 1.0, 19.0, 2),  # -5 + 4 (1 - -5)
        ("", 4.0, 7.0, 0.0, 1),
    ],
)
def test_guidance_leads_to_the_frames_beside_the_gap_and_then_to_the_text(
    given: str, text: float, image: float, expected: float, calls: int
) -> None:
    words, mask = torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    count = 0

    def model(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return hinted(*arguments)

    hints = Hints(
        words if "text" in given else None,
        mask if "text" in given else None,
        -5 * words if "negative" in given else None,
        mask if "negative" in given else None,
        torch.ones(1, 2, 3, 4) if "image" in given else None,
    )
    found = guided(model, hints, text, image)(torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 2), torch.ones(1))
    assert found.unique().tolist() == [pytest.approx(expected)] and count == calls


@pytest.mark.parametrize("mixer", ["none", "paper", "per_frame"])
def test_a_gap_depends_on_its_seed_and_number_and_not_on_those_beside_it(mixer: Any) -> None:
    """The velocity is 0, so what is made is what was drawn."""
    still = filler(model=Still())
    gaps = [Gap(clip(3), clip(3, 50), 5), Gap(clip(3, 9), clip(3, 70), 4), Gap(clip(3, 20), clip(3, 50), 5)]
    settings = replace(SETTINGS, mixer=mixer)
    one_by_one = list(still.fill(gaps, 7, settings))
    for batch in (2, 3):
        for found, expected in zip(still.fill(gaps, 7, settings, batch=batch), one_by_one, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert [each.shape for each in one_by_one] == [(5, 4, 6, 3), (4, 4, 6, 3), (5, 4, 6, 3)]
    assert (one_by_one[0] != one_by_one[2]).any()
    assert (next(still.fill(gaps, 8, settings)) != one_by_one[0]).any()
    np.testing.assert_array_equal(next(still.fill(gaps[:1], 7, settings)), one_by_one[0])


class Still(Between):
    """A velocity of 0."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(x)


def test_a_stopped_run_goes_on_after_the_gaps_it_has_kept(tmp_path: Path) -> None:
    gaps = [Gap(clip(3), clip(3, 20 * n), 4) for n in range(1, 5)]
    whole, folder, steps = list(filler().fill(gaps, 1, SETTINGS)), str(tmp_path / "x.part"), 0

    def step() -> None:
        nonlocal steps
        steps += 1

    stopped = filler()
    begun = stopped.fill(gaps, 1, SETTINGS, folder=folder, batch=2)
    next(begun)
    assert len(stopped.model.calls) == 4
    later = filler()
    found = list(later.fill(gaps, 1, SETTINGS, folder=folder, each_step=step))
    assert len(later.model.calls) == 2 * 4 and steps == 4 * 4
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="other seed; delete it"):
        later.fill(gaps, 2, SETTINGS, folder=folder)
    later.forget(str(tmp_path))
    assert not list(tmp_path.glob("*/*"))


def test_a_model_sees_no_more_frames_than_in_training_and_as_many_as_its_autoencoder_can_take() -> None:
    made = filler()
    list(made.fill([Gap(clip(9), clip(7, 50), 2)], 0, SETTINGS))
    assert made.model.calls[0][0].shape[2] == 3 + 2 + 3
    seen = made.model.calls[0][0][0, 0, :, 0, 0]
    expected = torch.tensor([6, 7, 8], dtype=torch.float32) / 127.5 - 1
    torch.testing.assert_close(seen[:3], expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("sides", "gap", "seen"),
    [
        ((9, 9), 4, (4, 4)),
        ((2, 9), 4, (2, 6)),
        ((9, 2), 4, (6, 2)),
        ((9, 9), 5, (4, 3)),
        ((9, 9), 20, (2, 2)),
        ((1, 1), 2, (1, 1)),
    ],
)
def test_sides_share_the_room_of_a_training_window(sides: tuple[int, int], gap: int, seen: tuple[int, int]) -> None:
    made = filler(context=(1, 8), longest=8, window=12)
    list(made.fill([Gap(clip(sides[0]), clip(sides[1], 50), gap)], 0, SETTINGS))
    times = made.model.calls[0][1][0]
    assert times.nonzero().flatten().tolist() == [*range(seen[0], seen[0] + gap)] and len(times) == sum(seen) + gap


def test_frames_beside_the_gap_lead_as_features() -> None:
    made = filler(features=lambda frames: frames.mean((2, 3, 4))[:, :, None, None])
    list(made.fill([Gap(clip(3), clip(3, 50), 2)], 0, SETTINGS))
    image = made.model.calls[0][-1]
    assert image.flatten().tolist() == pytest.approx([2 / 127.5 - 1, 50 / 127.5 - 1], abs=0.01)


@pytest.mark.parametrize(
    ("gap", "settings", "said"),
    [
        (Gap(clip(3), clip(3), 0), SETTINGS, "frames is 0; a gap has at least 1"),
        (Gap(clip(3), clip(3), 10**30), SETTINGS, "a gap has 224 at most, 16 windows of the model's training"),
        (Gap(clip(1), clip(3), 2), SETTINGS, "a gap has 1 frames on a side; the model needs 2"),
        (Gap(clip(3, size=(2, 2)), clip(3), 2), SETTINGS, "frames are 2x2, and the model makes 4x6"),
        (Gap(clip(3), clip(3), 2), replace(SETTINGS, steps=0), "steps is 0"),
        (Gap(clip(3), clip(3), 2), replace(SETTINGS, cutoff=0.0), "cutoff is 0.0"),
        (Gap(clip(3), clip(3), 2), replace(SETTINGS, image_guidance=2.0), "does not see the frames beside a gap"),
    ],
)
def test_what_cannot_be_filled_is_said_at_the_call(gap: Gap, settings: InfillSettings, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        filler().fill([gap], 0, settings)


def test_guidance_leads_away_only_from_what_training_hid() -> None:
    made = filler(model=Between(image_dropout=0), features=lambda frames: frames)
    with pytest.raises(ValueError, match="image_guidance: is 2, and the model learns with image_dropout: 0"):
        made.fill([Gap(clip(3), clip(3), 2)], 0, replace(SETTINGS, image_guidance=2.0))


def test_without_a_prompt_guidance_asks_the_model_once() -> None:
    made = filler()
    list(made.fill([Gap(clip(3), clip(3), 2)], 0, replace(SETTINGS, guidance=4.0)))
    assert len(made.model.calls) == SETTINGS.steps


def test_a_model_without_words_refuses_them() -> None:
    with pytest.raises(UserError, match="takes none"):
        filler().check_prompts(["a dog"])


def film(holes: list[Hole], frames: np.ndarray, context: tuple[int, int] = (2, 3)) -> tuple[list[Gap], list[int]]:
    """The gaps, and the brightness of the filled film, with 255 where frames are made."""
    check_room(holes, len(frames), context[0])
    gaps = list(gaps_in(frames, holes, context[1]))
    made = [np.full((gap.frames, *frames.shape[1:]), 255, np.uint8) for gap in gaps]
    return gaps, [int(frame[0, 0, 0]) for frame in filled(frames, holes, made)]


def shades(frames: np.ndarray) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in frames]


def test_clips_are_joined_with_all_of_their_frames() -> None:
    gaps, shown = film(connecting([4, 3, 3], 0, 2), clip(10))
    assert shown == [0, 1, 2, 3, 255, 255, 4, 5, 6, 255, 255, 7, 8, 9]
    assert [shades(gap.before) for gap in gaps] == [[1, 2, 3], [4, 5, 6]]
    assert [shades(gap.after) for gap in gaps] == [[4, 5, 6], [7, 8, 9]]


def test_a_connector_remakes_the_ends_that_meet() -> None:
    gaps, shown = film(connecting([5, 5], 2, 3), clip(10))
    assert shown == [0, 1, 2, 255, 255, 255, 7, 8, 9]
    assert shades(gaps[0].before) == [0, 1, 2] and shades(gaps[0].after) == [7, 8, 9]


def test_frames_that_are_remade_are_not_seen_by_the_model() -> None:
    holes = smoothing([4, 10], 2)
    one, other = clip(16), clip(16)
    other[[2, 3, 4, 5, 8, 9, 10, 11]] = 200
    made = [list(filler().fill(list(gaps_in(frames, holes, 3)), 0, SETTINGS)) for frames in (one, other)]
    np.testing.assert_array_equal(*made)


def test_joints_are_smoothed_from_frames_that_are_not_remade() -> None:
    gaps, shown = film(smoothing([4, 8, 13], 1), clip(16))
    assert shown == [0, 1, 2, 255, 255, 5, 6, 255, 255, 9, 10, 11, 255, 255, 14, 15]
    assert [shades(gap.before) for gap in gaps] == [[0, 1, 2], [5, 6], [9, 10, 11]]
    assert [shades(gap.after) for gap in gaps] == [[5, 6], [9, 10, 11], [14, 15]]


def test_too_few_frames_between_holes_are_refused() -> None:
    with pytest.raises(UserError, match="after the gap at frame 3 there are 1 frames, and the model needs 2"):
        film(smoothing([4, 7], 1), clip(16))
    with pytest.raises(UserError, match="before the gap at frame 1 there are 1 frames"):
        film(smoothing([2], 1), clip(16))
    with pytest.raises(UserError, match="after the gap at frame 13 there are 1 frames"):
        film(smoothing([14], 1), clip(16))
    with pytest.raises(UserError, match="joint 2: 2 frames before it are remade"):
        smoothing([2], 2)
    with pytest.raises(UserError, match="joints 8, 8: each must be above"):
        smoothing([8, 8], 2)


def test_joints_with_room_are_those_that_can_be_remade() -> None:
    for joints in ([4, 8, 13], [3, 6, 7, 9, 14], [1, 3, 15], list(range(1, 16))):
        kept = reachable(joints, 1, 16, 2)
        film(smoothing(kept, 1), clip(16))
        for joint in set(joints) - set(kept):
            with pytest.raises(UserError):
                film(smoothing(sorted([*kept, joint]), 1), clip(16))


def test_a_long_film_is_read_no_further_than_to_the_gap_after() -> None:
    read, frame = 0, np.zeros((4, 6, 3), np.uint8)

    def frames() -> Iterator[np.ndarray]:
        nonlocal read
        while read < 120_000:
            read += 1
            yield frame

    holes = smoothing(range(12, 119_990, 12), 1)
    for number, gap in enumerate(gaps_in(frames(), holes, 3), 1):
        assert read <= 12 * (number + 1) - 1 and len(gap.before) == len(gap.after) == 3
    assert number == len(holes) > 9_990


def test_gaps_are_the_same_in_parts_of_a_film() -> None:
    still, gaps = filler(model=Still()), [Gap(clip(3), clip(3, 50), 4)] * 3
    whole = list(still.fill(gaps, 7, SETTINGS))
    assert (whole[0] != whole[1]).any()
    for first in range(3):
        np.testing.assert_array_equal(next(still.fill(gaps[first:], 7, SETTINGS, first=first)), whole[first])


def test_without_a_model_a_gap_is_held_and_cut_or_faded() -> None:
    before, after = torch.zeros(1, 1, 2, 1, 1), torch.full((1, 1, 2, 1, 1), 4.0)
    assert held(before, after, 3).flatten().tolist() == [0, 0, 4]
    assert held(before, after, 4).flatten().tolist() == [0, 0, 4, 4]
    assert faded(before, after, 3).flatten().tolist() == [1, 2, 3]
    assert faded(before, after, 1).flatten().tolist() == [2]
