"""Conditions: said of a batch, joined, hidden, and looked up."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.models.common.condition import Condition, class_vectors, draw_hidden, of_batch, of_classes

TEXT = torch.arange(12.0).view(2, 3, 2)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def worded() -> Condition:
    return Condition(torch.tensor([3, -1]), TEXT, MASK)


def test_a_batch_without_labels_asks_for_nothing() -> None:
    assert of_batch({"key": ["a"]}).classes is None and not of_batch({"key": ["a"]}).asks
    assert of_batch({"label": torch.tensor([1])}).asks
    assert not of_classes([None, -1]).asks


def test_text_asks_only_where_it_has_words() -> None:
    assert Condition(text=TEXT, mask=MASK).asks
    assert not Condition(text=TEXT, mask=torch.zeros_like(MASK)).asks
    with pytest.raises(ValueError, match=r"^text and mask: give both or none$"):
        Condition(text=TEXT)


def test_a_sound_asks_only_where_there_is_one_and_is_hidden_and_joined_as_the_rest() -> None:
    batch = {"audio_tokens": torch.tensor([[[[3, 4]], [[-1, -1]]], [[[0, 1]], [[2, 3]]]])}
    heard = of_batch(batch)
    assert heard.audio is not None and heard.audio.shape == (2, 2, 2) and heard.asks
    hidden = heard.hidden(torch.tensor([False, True]))
    assert hidden.audio is not None and hidden.audio.tolist() == [[[3, 4], [-1, -1]], [[-1, -1], [-1, -1]]]
    assert hidden.asks_for_audio and not heard.null.asks
    both = heard.join(hidden)
    assert both.audio is not None and torch.equal(both.audio, torch.cat([heard.audio, hidden.audio]))
    many = Condition(audio=heard.audio[:1]).expand(3)
    assert many.audio is not None and many.audio.shape == (3, 2, 2)


def test_nothing_is_said_of_hidden_samples_and_the_others_stay() -> None:
    hidden = worded().hidden(torch.tensor([True, False]))
    assert hidden.classes is not None and hidden.classes.tolist() == [-1, -1]
    assert hidden.mask is not None and hidden.mask.tolist() == [[False] * 3, [True, False, False]]
    assert not worded().null.asks and worded().asks


def test_joined_conditions_are_those_of_both_batches() -> None:
    both = worded().join(worded().null)
    assert both.classes is not None and both.classes.tolist() == [3, -1, -1, -1]
    assert both.text is not None and torch.equal(both.text, torch.cat([TEXT, TEXT]))
    assert both.mask is not None and both.mask.sum(1).tolist() == [2, 1, 0, 0]


def test_one_sample_is_expanded_to_many() -> None:
    many = Condition(torch.tensor([3]), TEXT[:1], MASK[:1]).expand(4)
    assert many.classes is not None and many.text is not None and many.mask is not None
    assert many.classes.tolist() == [3] * 4 and many.text.shape == (4, 3, 2) and many.mask.shape == (4, 3)
    assert Condition().expand(4).classes is None


def test_the_record_tells_texts_apart_by_their_words_alone() -> None:
    assert of_classes([2, None]).record() == [2, -1]
    other = TEXT.clone()
    other[0, 2] = 7.0  # not a word
    assert Condition(torch.tensor([3, -1]), other, MASK).record() == worded().record()
    other[0, 1] = 7.0
    assert Condition(torch.tensor([3, -1]), other, MASK).record() != worded().record()


def test_classes_are_refused_by_a_model_that_takes_none() -> None:
    with pytest.raises(ValueError, match=r"^classes: this model has none; leave them out$"):
        class_vectors(None, of_classes([1]), torch.zeros(1, 1))
    assert class_vectors(None, None, torch.zeros(1, 1)) is None


def test_a_batch_with_texts_has_them() -> None:
    given = of_batch({"label": torch.tensor([3, -1]), "text": TEXT, "text_mask": MASK})
    assert given.record() == worded().record()


def test_texts_of_other_lengths_are_padded_where_they_are_joined() -> None:
    short = Condition(torch.tensor([1]), TEXT[:1, :2], MASK[:1, :2])
    both = short.join(worded())
    assert both.text is not None and both.mask is not None
    assert both.text.shape == (3, 3, 2) and both.mask.tolist() == [[True, True, False], *MASK.tolist()]
    assert torch.equal(both.text[0, :2], TEXT[0, :2]) and not both.text[0, 2].any()
    other = worded().join(short)
    assert other.mask is not None and other.mask.tolist() == [*MASK.tolist(), [True, True, False]]


def test_a_text_for_all_frames_joins_one_for_each() -> None:
    frames = torch.tensor([[[True, False], [False, True]]])
    story = Condition(None, TEXT[:1, :2], frames)
    both = Condition(None, TEXT[:1], MASK[:1]).join(story)
    assert both.mask is not None
    assert both.mask.tolist() == [[[True, True, False]] * 2, [[True, False, False], [False, True, False]]]
    null = story.null
    assert null.mask is not None and not null.mask.any() and null.mask.shape == frames.shape
    many = story.expand(3)
    assert many.mask is not None and many.mask.shape == (3, 2, 2)
    assert story.record() != Condition(None, TEXT[:1, :2], frames.flip(1)).record()


def test_the_record_does_not_tell_how_far_a_batch_is_padded() -> None:
    wide = Condition(torch.tensor([3, -1]), F.pad(TEXT, (0, 0, 0, 4)), F.pad(MASK, (0, 4)))
    assert wide.record() == worded().record()
    assert isinstance(Condition(None, TEXT, torch.zeros_like(MASK)).record(), dict)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^mask has shape \(2, 2\); a text of \(2, 3, 2\) needs \(B, N\) or \(B, T, N\)$"
    ):
        Condition(None, TEXT, MASK[:, :2])


# what training hides


def test_a_sample_loses_the_same_whatever_batch_it_is_in() -> None:
    chances = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))

    def lost(which: list[int], seed: int) -> list[Tensor | None]:
        words = (TEXT[:1].expand(len(which), -1, -1), MASK[:1].expand(len(which), -1))
        condition = Condition(torch.ones(len(which), dtype=torch.long), *words, chances[which])
        return list(draw_hidden(condition, torch.zeros(len(which), 1), 0.3, 0.5, torch.Generator().manual_seed(seed)))[
            :2
        ]

    for whole, part in zip(lost(list(range(40)), 0), lost(list(range(39, -1, -2)), 7), strict=True):
        assert whole is not None and part is not None and 0 < whole.sum() < 40
        assert torch.equal(whole[torch.arange(39, -1, -2)], part)


def drawn(condition: Condition | None, label: float, text: float, seed: int = 0) -> tuple[Tensor, ...]:
    """Which of many samples lose their class, their text and their sound."""
    x = torch.zeros(40_000, 1)
    found = draw_hidden(condition, x, label, text, torch.Generator().manual_seed(seed))
    return tuple(torch.zeros(len(x), dtype=torch.bool) if part is None else part for part in found)


def test_a_class_and_a_text_are_hidden_as_often_as_asked_and_often_together() -> None:
    classes, text, _ = drawn(worded(), 0.1, 0.3)
    assert classes.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert text.float().mean().item() == pytest.approx(0.3, abs=0.01)
    # 0.05 drawn together, and what independent draws add
    alone = 0.05 / 0.95 * 0.25 / 0.95
    assert (classes & text).float().mean().item() == pytest.approx(0.05 + 0.95 * alone, abs=0.01)


def test_of_three_each_is_hidden_as_often_as_asked_and_often_all_together() -> None:
    condition = replace(worded(), audio=torch.zeros(2, 1, 1, dtype=torch.int64))
    x, rng = torch.zeros(40_000, 1), torch.Generator().manual_seed(0)
    lost = torch.stack([part for part in draw_hidden(condition, x, 0.1, 0.3, rng, 0.2) if part is not None])
    assert lost.float().mean(1).tolist() == pytest.approx([0.1, 0.3, 0.2], abs=0.01)
    assert 0.05 < lost.all(0).float().mean().item() < 0.06, "chance would hide all three of 0.006"


@pytest.mark.parametrize(("label", "text"), [(0.0, 0.2), (0.2, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_either_may_be_hidden_alone(label: float, text: float) -> None:
    for found, share in zip(drawn(worded(), label, text)[:2], (label, text), strict=True):
        assert found.float().mean().item() == pytest.approx(share, abs=0.01)


def test_a_model_of_classes_alone_draws_as_it_did_before_there_were_texts() -> None:
    classes, text, _ = drawn(of_classes([1, 2]), 0.1, 0.3, seed=5)
    rng = torch.Generator().manual_seed(5)
    assert torch.equal(classes, torch.rand(40_000, generator=rng) < 0.1) and not text.any()
    rng = torch.Generator().manual_seed(5)
    draw_hidden(None, torch.zeros(3, 1), 0.5, 0.5, rng)
    assert torch.equal(rng.get_state(), torch.Generator().manual_seed(5).get_state()), "nothing to hide, nothing drawn"
