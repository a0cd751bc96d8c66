"""Words that a model learns from captions: the same each time, cut and padded, and refused where no caption has them."""

from __future__ import annotations

import json

import pytest
import torch

from longtake.datasets.errors import UserError
from longtake.training.models.tats.words import Words

CAPTIONS = ["A red square moves left", "a blue disc moves  RIGHT", "two discs &amp; a square"] * 3


def test_the_same_captions_make_the_same_words_in_any_order() -> None:
    one, two = Words.learned(CAPTIONS, 60, 8), Words.learned(CAPTIONS[::-1], 60, 8)
    assert json.dumps(one.record(), sort_keys=True) == json.dumps(two.record(), sort_keys=True)
    assert one.size <= 60
    again = Words.of(json.loads(json.dumps(one.record())), 8)
    for texts in (["a red disc", None, ""], CAPTIONS):
        for first, second in zip(one.encoded(texts), again.encoded(texts), strict=True):
            assert torch.equal(first, second)


def test_texts_are_cleaned_cut_and_padded() -> None:
    words = Words.learned(CAPTIONS, 200, 3)
    ids, mask = words.encoded(["a red square moves left", "A  Red", None])
    assert ids.shape == (3, 3, 1) and mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert torch.equal(ids[0, :2], ids[1, :2]) and ids[0].min() > 0 and ids.max() < words.size
    assert words.states([None, None], torch.device("cpu")) == (None, None)
    with pytest.raises(UserError, match="has 5 tokens, and 3 fit; shorten it"):
        words.check(["a red square moves left"])


def test_a_word_that_no_caption_has_is_named_with_those_that_are_near() -> None:
    words = Words.learned(CAPTIONS, 200, 8)
    words.check(["a blue square", "two red discs", ""])
    with pytest.raises(UserError, match=r"has 'zebra'; it knows words such as a, "):
        words.check(["a red square", "a zebra moves"])
    with pytest.raises(UserError, match=r"has 'squares'; it knows words such as square"):
        words.states(["two squares"], torch.device("cpu"))
    with pytest.raises(UserError, match="has 'redleft'; it"):  # though its pieces are known
        words.check(["a redleft"])
    ids, mask = words.encoded(["a zebra"])  # a held-out caption may have it
    assert mask.all() and ids.max() < words.size
    with pytest.raises(UserError, match="have no word to learn"):
        Words.learned(["", " "], 60, 8)


def test_a_prompt_with_bytes_that_are_no_utf_8_is_refused() -> None:
    with pytest.raises(UserError, match=r"has bytes that are no UTF-8; write it again"):
        Words.learned(CAPTIONS, 200, 8).check(["a red square", "a red \udcff"])
