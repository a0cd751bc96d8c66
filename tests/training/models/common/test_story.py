"""Scenes over time: when each begins, and what latents that are sampled together see of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.common.story import asks, held, latent_at, seen


def words(tokens: int, number: int, classes: Tensor | None = None) -> Condition:
    """A text of so many tokens, all of this value."""
    return Condition(classes, torch.full((1, tokens, 2), float(number)), torch.ones(1, tokens, dtype=torch.bool))


def values(condition: Condition | None, latents: int) -> list[list[float]]:
    """What each latent sees of the texts."""
    assert condition is not None and condition.text is not None and condition.mask is not None
    mask = condition.mask if condition.mask.ndim == 3 else condition.mask[:, None].expand(-1, latents, -1)
    assert mask.shape == (1, latents, condition.text.shape[1])
    return [condition.text[0, row, 0].tolist() for row in mask[0]]


@pytest.mark.parametrize(
    ("second", "begins", "goes_on"),
    [(0, 0, 0), (1 / 12, 1, 0), (4 / 12, 1, 1), (5 / 12, 2, 1), (0.75, 3, 2), (1.0, 3, 3), (1.0 + 1e-9, 3, 3)],
)
def test_a_scene_begins_with_the_latent_of_its_first_frame(second: float, begins: int, goes_on: int) -> None:
    assert latent_at(second, 12, 4, False) == begins
    assert latent_at(second, 12, 4, True) == goes_on
    assert latent_at(second, 12, 1, False) == round(second * 12)


def test_a_condition_holds_until_the_next_and_nothing_before_the_first() -> None:
    story = [(2, of_classes([1])), (5, of_classes([0]))]
    found = [held(story, latent) for latent in range(7)]
    assert [None if c is None or c.classes is None else int(c.classes) for c in found] == [None] * 2 + [1] * 3 + [0] * 2
    assert asks(story) and not asks([]) and not asks([(0, of_classes([-1]))])


def test_latents_of_one_scene_see_its_condition_as_it_is() -> None:
    story = [(0, words(3, 1)), (4, words(2, 2))]
    assert seen(story, 0, range(4)) is story[0][1]
    assert seen(story, 5, range(4, 8)) is story[1][1]
    assert seen([], 0, range(4)) is None
    classes = [(0, of_classes([1])), (2, of_classes([0]))]
    assert seen(classes, 0, range(4)) is classes[0][1], "a class is that of the first new latent"


def test_each_latent_sees_the_text_of_its_own_scene_alone() -> None:
    story = [(0, words(3, 1, torch.tensor([4]))), (2, words(2, 2, torch.tensor([5]))), (3, words(1, 3))]
    together = seen(story, 2, range(1, 5))
    assert values(together, 4) == [[1, 1, 1], [2, 2], [3], [3]]
    assert together is not None and together.classes is not None and together.classes.tolist() == [5]


def test_a_scene_without_text_and_what_is_before_the_story_see_none() -> None:
    story = [(1, words(2, 1)), (3, of_classes([0])), (4, words(1, 2))]
    assert values(seen(story, 0, range(5)), 5) == [[], [1, 1], [1, 1], [], [2]]
    assert seen(story, 0, range(1)) is None
    before = seen(story, 0, range(2))
    assert before is not None and before.classes is None


def test_what_is_given_sees_what_the_first_new_latent_sees() -> None:
    story = [(0, words(2, 1)), (1, words(1, 2))]
    assert values(seen(story, 0, range(-2, 2)), 4) == [[1, 1], [1, 1], [1, 1], [2]]


def test_texts_of_a_batch_keep_their_own_lengths() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    one = Condition(None, torch.ones(2, 3, 2), mask)
    two = Condition(None, torch.ones(2, 1, 2), torch.tensor([[False], [True]]))
    together = seen([(0, one), (1, two)], 0, range(2))
    assert together is not None and together.mask is not None and together.mask.shape == (2, 2, 4)
    assert together.mask.int().tolist() == [[[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 1]]]
