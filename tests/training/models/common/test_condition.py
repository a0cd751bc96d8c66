"""Conditions: said of a batch, joined, hidden, and looked up."""

import pytest
import torch
from torch import nn

from longtake.training.models.common.condition import Condition, class_vectors, of_batch, of_classes

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


def test_text_is_refused_by_a_model_that_takes_none() -> None:
    with pytest.raises(ValueError, match=r"^text: this model takes none; leave it out$"):
        class_vectors(nn.Embedding(6, 4), worded(), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"^classes: this model has none; leave them out$"):
        class_vectors(None, of_classes([1]), torch.zeros(1, 1))
    assert class_vectors(None, None, torch.zeros(1, 1)) is None
