"""Prompts as states: by the encoder that a model names, loaded when it is needed, and what is said where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import letters
import pytest
import torch

from longtake.datasets.errors import UserError
from longtake.training import text
from longtake.training.models.common.prompts import (
    Prompts,
    accepted,
    negative_of_requests,
    prompts_of,
    story_of_requests,
    with_encoder,
)
from longtake.training.models.generator import Request, Scene, scene_of, story_of

CPU = torch.device("cpu")


def facts(encoder: str = "words", length: int = 24) -> dict[str, Any]:
    return {"text": letters.facts(encoder), "config": {"text_length": length}}


def prompts(encoder: str = "words", length: int = 24) -> Prompts:
    made = prompts_of("latte", facts(encoder, length))
    assert made
    return made


def test_a_model_without_text_takes_no_prompts() -> None:
    for without in ({}, {"text": None}):
        assert prompts_of("latte", without) is None and not accepted(without)
        assert with_encoder(without, "x") == without
    assert accepted(facts()) == {"prompt"}
    with pytest.raises(ValueError, match="prompt: this model takes none; leave it out"):
        story_of_requests([Request(0, [(0.0, Scene(prompt="x"))])], round, None, CPU)
    with pytest.raises(ValueError, match="prompt: this model takes none"):
        negative_of_requests([Request(0, [], "x")], None, CPU)


def test_prompts_of_several_lengths_are_padded_and_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = letters.install(monkeypatch)
    made = prompts()
    states, mask = made.states(["abc", None, "x", ""], CPU)
    assert states is not None and mask is not None and states.dtype == torch.bfloat16
    assert mask.sum(1).tolist() == [3, 0, 1, 1] and states.shape == (4, 3, letters.WIDTH)
    for row, one in ((0, "abc"), (2, "x"), (3, "")):
        assert torch.equal(states[row][mask[row]], letters.states(one))
    assert not states[~mask].any()
    assert made.states([None, None], CPU) == (None, None)
    made.states(["x", "abc"], CPU)
    assert encoder.encoded == ["abc", "x", ""], "each prompt is encoded once"


def test_no_encoder_is_loaded_for_requests_without_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: Any) -> Any:
        raise AssertionError("nobody has asked for a text")

    monkeypatch.setattr(text, "load_encoder", load)
    requests = [Request(0, [(0.0, Scene(2)), (1.0, Scene())]), Request(1, [(0.0, Scene()), (1.0, Scene(1))])]
    story = story_of_requests(requests, round, prompts(), CPU)
    assert [(begin, condition.record()) for begin, condition in story] == [(0, [2, -1]), (1, [-1, 1])]
    assert negative_of_requests(requests, prompts(), CPU) is None


def test_requests_become_conditions_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    requests = [
        Request(0, [(0.0, Scene(2, "ab")), (1.0, Scene())], "no"),
        Request(1, [(0.0, Scene()), (1.0, Scene(1, "c"))]),
    ]
    (_, first), (begin, second) = story_of_requests(requests, lambda second: round(3 * second), prompts(), CPU)
    assert begin == 3 and first.mask is not None and second.mask is not None
    assert first.mask.tolist() == [[True, True], [False, False]] and second.mask.tolist() == [[False], [True]]
    negative = negative_of_requests(requests, prompts(), CPU)
    assert negative is not None and negative.mask is not None and negative.mask.any(1).tolist() == [True, False]
    one = story_of_requests(requests, lambda second: 0, prompts(), CPU)
    assert len(one) == 1 and one[0][1].record() == second.record(), "of two at one latent the later holds"


@pytest.mark.parametrize(
    ("prompt", "length", "said"),
    [
        ("x" * 25, 99, "prompt 'x{25}': has 25 tokens, and 24 fit; shorten it"),
        ("x" * 99, 12, "prompt 'x{40}': has 99 tokens, and 12 fit; shorten it"),
        ("bad \udcff", 24, "has bytes that are no UTF-8; write it again"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, prompt: str, length: int, said: str
) -> None:
    letters.install(monkeypatch)
    for use in (lambda made: made.check(["x", prompt]), lambda made: made.states([prompt], CPU)):
        with pytest.raises(UserError, match=said) as e:
            use(prompts(length=length))
        assert "\n" not in str(e.value)
    prompts(length=length).check(["x" * 12])


def test_an_encoder_that_is_gone_or_another_is_refused_with_where_to_name_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remedy = r"say where it is with --text-encoder FOLDER or models:/NAME@ALIAS, or in LONGTAKE_TEXT_ENCODER for a served model"
    with pytest.raises(UserError, match=rf"latte: its text encoder is not at /nowhere/umt5; {remedy}"):
        prompts("/nowhere/umt5").check(["x"])
    with pytest.raises(UserError, match=r"latte: text encoder: .*is no text encoder"):
        prompts(str(tmp_path)).check(["x"])
    letters.install(monkeypatch, digest="another-encoder")
    with pytest.raises(UserError, match=rf"latte: has learned texts by another encoder than {tmp_path} .*; {remedy}"):
        prompts(str(tmp_path)).check(["x"])
    with pytest.raises(UserError, match=r"by another encoder than words .*; install the version of wordllama"):
        prompts().check(["x"])


def test_a_missing_extra_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"latte: text encoder: words: .*pip install 'longtake\[text\]'"):
        prompts().check(["x"])


def test_an_encoder_that_has_moved_is_taken_from_where_it_is_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    letters.install(monkeypatch)
    known = facts("/nowhere/umt5")
    moved = prompts_of("latte", with_encoder(known, str(tmp_path)))
    assert moved
    moved.check(["x"])
    assert with_encoder(known, None) is known and known["text"]["encoder"]["encoder"] == "/nowhere/umt5"


def test_a_storyboard_has_classes_prompts_or_both() -> None:
    board = [
        {"at": "0s", "class": "dog", "prompt": "a dog"},
        {"at": 1.5, "prompt": "rain\n雨 🌧"},
        {"at": "3", "class": "cat"},
        {"at": 4, "class": None, "prompt": None},
        {"at": 5, "prompt": ""},
    ]
    assert story_of(board, ("cat", "dog")) == [
        (0.0, Scene(1, "a dog")),
        (1.5, Scene(-1, "rain\n雨 🌧")),
        (3.0, Scene(0)),
        (4.0, Scene()),
        (5.0, Scene(-1, "")),
    ]
    assert scene_of(1, None, ("cat", "dog")) == Scene(1)
    for entry, said in (
        ({"at": 0}, "entry 1 needs `at` and `class` or `prompt`, and has at"),
        ({"prompt": "x"}, "entry 1 needs `at` and `class` or `prompt`, and has prompt"),
        ({"at": 0, "prompt": "x", "negative": "y"}, "and has at, prompt, negative"),
        ({}, "and has none of them"),
        ({"at": 0, "prompt": ["x"]}, r"entry 1: prompt: \['x'\] is no text; put it in quotes"),
        ({"at": 0, "prompt": "x", "class": "cow"}, "entry 1: class 'cow'"),
    ):
        with pytest.raises(UserError, match=said):
            story_of([entry], ("cat", "dog"))
