"""The packaged encoder of words: its tokens, its states, and what it says of settings that it does not have."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

import longtake
from longtake.datasets.errors import UserError
from longtake.training.text import TextConfig, load_encoder, words


@pytest.fixture(scope="module")
def encoder() -> words.Words:
    found = load_encoder(TextConfig())
    assert isinstance(found, words.Words)
    return found


def test_states_are_the_rows_of_the_table_for_the_tokens(encoder: words.Words) -> None:
    spec = importlib.util.find_spec("wordllama")
    assert spec and spec.submodule_search_locations
    (table,) = load_file(f"{spec.submodule_search_locations[0]}/weights/l2_supercat_256.safetensors").values()
    (states,) = encoder.encode(["a red square"])
    # <s>, a, red, square
    assert states.shape == (4, 256) and states.dtype == torch.bfloat16 and encoder.width == 256
    assert torch.equal(states[0], table[1].float().to(torch.bfloat16))
    red, left, square = (encoder.encode([word])[0][-1] for word in ("red", "left", "square"))
    assert torch.equal(states[2], red) and torch.equal(states[3], square) and not torch.equal(red, left)


def test_every_text_has_a_state_and_long_ones_are_cut() -> None:
    encoder = load_encoder(TextConfig(length=8))
    texts = ["", "   \n", "🙂 naïve \u202e שלום\n\ttext", "word " * 100_000]
    states = encoder.encode(texts)
    assert [len(s) for s in states][:2] == [1, 1] and max(map(len, states)) == encoder.limit == 8
    counts = encoder.count(texts)
    assert counts[:2] == [1, 1] and counts[3] == 100_001
    assert all(len(s) == min(count, 8) for s, count in zip(states, counts, strict=True))
    assert encoder.encode([]) == [] and encoder.count([]) == []


@pytest.mark.parametrize(
    ("clean", "same"),
    [("none", []), ("whitespace", [" a \n red"]), ("wan", [" a \n red", "a &#114;ed", "a &amp;#114;ed"])],
)
def test_cleaning_makes_alike_what_it_says(clean: str, same: list[str]) -> None:
    encoder = load_encoder(TextConfig(clean=clean))  # type: ignore[arg-type]
    texts = ["a red", " a \n red", "a &#114;ed", "a &amp;#114;ed", "A red"]
    first, *others = encoder.encode(texts)
    assert [text for text, s in zip(texts[1:], others, strict=True) if torch.equal(s, first)] == same


def test_a_template_stands_around_the_text_and_its_beginning_is_cropped() -> None:
    plain, framed = load_encoder(TextConfig()), load_encoder(TextConfig(template="a film of {} !", crop=4))
    (states,), (whole,) = framed.encode(["red"]), plain.encode(["a film of red !"])
    assert torch.equal(states, whole[4:]) and framed.count(["red"]) == [len(whole) - 4]
    # a text that leaves nothing behind the crop
    bare = load_encoder(TextConfig(template="film {}", crop=2))
    assert len(bare.encode([""])[0]) == 1


def test_the_digest_is_of_all_that_decides_states() -> None:
    changes = [{}, {"length": 9}, {"clean": "wan"}, {"template": "x {}"}, {"template": "x {}", "crop": 1}]
    digests = [load_encoder(TextConfig(**each)).digest for each in changes]  # type: ignore[arg-type]
    assert len(set(digests)) == len(digests)
    assert load_encoder(TextConfig(length=512)).digest == digests[0]


def test_what_it_says_of_itself_gives_it_again(encoder: words.Words) -> None:
    again = longtake.text_encoder(**encoder.describe())
    assert again.digest == encoder.digest and again.describe() == encoder.describe()
    assert encoder.describe()["length"] == 512 == encoder.limit


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layer": -2}, "layer: -2: the encoder 'words' has no layers; leave it out"),
        ({"side": "left"}, "side: left: the encoder 'words' has no padding"),
        ({"crop": 2}, "crop: 2: an empty text has 1 tokens; lower it"),
        ({"template": "x {}", "crop": 40}, "crop: 40: its template has . tokens; lower it"),
        ({"template": "x"}, "template: .*must have one {}"),
        ({"layer": 0}, "layer: Input should be less than or equal to -1"),
        ({"depth": 1}, "depth: Extra inputs are not permitted"),
        ({"encoder": "nowhere"}, r'encoder: nowhere: no such folder; name "words", a folder'),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        longtake.text_encoder(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wordllama" else find(name))
    with pytest.raises(UserError, match=r"wordllama is not installed; pip install 'longtake\[text\]'"):
        longtake.text_encoder()
