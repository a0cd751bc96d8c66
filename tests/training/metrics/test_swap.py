"""What of a video is like which other one, by probes that know no model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.training.metrics.swap import content, fit_classes, movement, nearer, steady

RED, BLUE = (0.9, -0.8, -0.8), (-0.8, -0.8, 0.9)


def sprite(colour: tuple[float, ...], step: tuple[int, int], frames: int = 4, size: int = 24, seed: int = 0) -> Tensor:
    """A patch with some texture that moves by (x, y) pixels a frame over grey: `(1, 3, T, H, W)`."""
    texture = 0.1 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))
    patch = torch.tensor(colour)[:, None, None] + texture
    video = torch.zeros(1, 3, frames, size, size)
    for frame in range(frames):
        x, y = (8 + frame * each for each in step)
        video[0, :, frame, y : y + 8, x : x + 8] = patch
    return video


def test_content_is_how_often_each_colour_comes_wherever_it_is() -> None:
    one = content(sprite(RED, (1, 0)))
    assert one.shape == (1, 64) and float(one.square().sum()) == pytest.approx(1)
    assert torch.equal(one, content(sprite(RED, (0, -2))))
    assert float((one - content(sprite(BLUE, (1, 0)))).norm()) > 0.3
    # black and white, half of each: two bins
    half = torch.cat([torch.full((1, 3, 2, 4, 4), -1.0), torch.full((1, 3, 2, 4, 4), 1.0)], dim=2)
    assert content(half)[0, [0, 63]].square().tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("step", "direction"), [((2, 0), 0), ((1, 1), 1), ((0, 2), 2), ((-2, 0), 4), ((0, -2), 6), ((1, -1), 7)]
)
def test_movement_says_in_which_direction_it_goes(step: tuple[int, int], direction: int) -> None:
    found = movement(sprite(RED, step))[0]
    assert int(found.argmax()) == direction
    assert float(found[direction] / found.sum()) > 0.8


def test_movement_grows_with_speed_and_a_still_video_has_none() -> None:
    slow, fast = (float(movement(sprite(RED, (step, 0))).sum()) for step in (1, 2))
    assert fast == pytest.approx(2 * slow, rel=0.25)
    assert float(movement(sprite(RED, (0, 0))).sum()) == 0.0


def test_the_probes_tell_a_perfect_swap_from_one_that_keeps_everything() -> None:
    a, b = sprite(RED, (2, 0)), sprite(BLUE, (-2, 0))
    swapped = sprite(RED, (-2, 0), seed=1)
    assert float(nearer(content(swapped), content(a), content(b))) == 1.0
    assert float(nearer(movement(swapped), movement(b), movement(a))) == 1.0
    assert float(nearer(movement(a), movement(b), movement(a))) == 0.0
    assert float(nearer(content(a), content(a), content(a))) == 0.5


def test_a_classifier_names_what_can_be_told_and_the_nearest_of_what_cannot() -> None:
    rng = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0, 5], [4, 0, 5], [0, 4, 5]])
    labels = torch.tensor([0] * 30 + [1] * 6 + [2] * 6)  # classes of unequal number
    rows = centres[labels] + 0.3 * torch.randn(len(labels), 3, generator=rng)
    rows[:, 2] = 5  # says nothing
    classes = fit_classes(rows, labels)
    assert torch.equal(classes(rows), labels)
    assert classes(torch.tensor([[3.0, 0.5, 5.0], [0.5, 3.0, 5.0]])).tolist() == [1, 2]


def test_nothing_to_tell_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        fit_classes(torch.rand(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="never change"):
        fit_classes(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="ridge"):
        fit_classes(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), ridge=0)


def test_steady_paths_go_one_way() -> None:
    assert steady(torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0]])) == 1.0
    assert steady(torch.tensor([[0.0, 2, 1, 3]])) == pytest.approx(2 / 3)
    assert steady(torch.tensor([[1.0, 1, 1]])) == 0.0  # nothing happens
    with pytest.raises(ValueError, match="three values"):
        steady(torch.zeros(2, 2))
