"""`longtake generate` with prompts: the files that it writes, the same each time, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest
import tiny_encoders
from priors import frames_of, longtake

from longtake.datasets.errors import UserError
from longtake.training.text import TextConfig, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters.save_priors(tmp_path_factory.mktemp("models"))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> letters.Letters:
    return letters.install(monkeypatch)


@pytest.mark.parametrize("family", ["latte", "memory"])
def test_the_same_prompt_makes_the_same_bytes_and_another_others(
    models: Path, tmp_path: Path, family: str, encoder: Any
) -> None:
    left = ["--prompt", "left"]
    for name, more in (
        ("a", left),
        ("b", left),
        ("right", ["--prompt", "right"]),
        ("none", []),
        ("strong", [*left, "--guidance", 4]),
        ("away", [*left, "--guidance", 4, "--negative", "up"]),
        ("both", [*left, "--class", "dog"]),
    ):
        longtake("generate", models / family, *more, "--out", tmp_path / f"{name}.mp4")
    made = {path.stem: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    assert made["a"] == made["b"] and len(set(made.values())) == len(made) - 1
    assert len(list(tmp_path.iterdir())) == len(made)


def test_several_prompts_are_files_by_number_and_words_or_a_grid(models: Path, tmp_path: Path, encoder: Any) -> None:
    (tmp_path / "list.txt").write_text("\ufeffred: a/b?\r\n\n  🌧  \n", encoding="utf-8")
    asked = ["--prompt", "A red square moves left and left and left"[:24], "--prompts", tmp_path / "list.txt"]
    said = longtake("generate", models / "latte", *asked, "--seeds", "0,4", "--out", tmp_path / "x.mp4")
    names = [
        f"x-{prompt}-seed{seed}.mp4" for prompt in ("1-A-red-square-moves-left", "2-red-a-b", "3") for seed in (0, 4)
    ]
    assert said.stdout.split() == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == sorted(names)
    longtake("generate", models / "latte", "--prompt", "🌧", "--seed", 4, "--out", tmp_path / "alone.mp4")
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "x-3-seed4.mp4").read_bytes()
    longtake("generate", models / "latte", *asked, "--grid", "--batch", 2, "--out", tmp_path / "grid.mp4")
    assert frames_of(tmp_path / "grid.mp4").shape == (9, 2 * 32 + 2, 2 * 32 + 2, 3)


def test_class_and_prompt_may_have_guidance_of_their_own(models: Path, tmp_path: Path, encoder: Any) -> None:
    asked = ["--prompt", "left", "--class", "dog", "--guidance"]
    for name, guidance in (
        ("both", "4"),
        ("equal", "classes=4,text=4"),
        ("apart", "classes=2,text=6"),
        ("text", "text=6"),
    ):
        longtake("generate", models / "latte", *asked, guidance, "--out", tmp_path / f"{name}.mp4")
    both, equal, apart, text = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("both", "equal", "apart", "text"))
    assert both == equal and len({both, apart, text}) == 3


@pytest.mark.parametrize("family", ["latte", "memory"])
def test_a_storyboard_of_prompts_is_followed(models: Path, tmp_path: Path, family: str, encoder: Any) -> None:
    story = tmp_path / "story.yaml"
    story.write_text("- {at: 0s, prompt: left, class: cat}\n- {at: 0.75s, prompt: right, class: cat}\n")
    options = ["--frames", 25, "--guidance", 2]
    for name, more in (
        ("told", ["--storyboard", story]),
        ("again", ["--storyboard", story]),
        ("away", ["--storyboard", story, "--negative", "up"]),
        ("left", ["--prompt", "left", "--class", "cat"]),
    ):
        longtake("generate", models / family, *options, *more, "--out", tmp_path / f"{name}.mp4")
    assert (tmp_path / "told.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    told, left, away = (frames_of(tmp_path / f"{name}.mp4").astype(int) for name in ("told", "left", "away"))
    same = np.abs(told - left).mean((1, 2, 3))
    # the second scene begins with the latent of frames 9 to 12
    assert same[:5].max() < 2 < same[13:].mean() and np.abs(told - away).mean() > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["latte", "--prompt", "x" * 25], "prompt 'x{25}': has 25 tokens, and 24 fit; shorten it"),
        (["latte", "--prompt", "x", "--prompt", "y" * 25], "has 25 tokens, and 24 fit"),
        (["latte", "--prompt", "x", "--prompt", "x"], "--seeds, --class, --prompt: the same video is asked for twice"),
        (["latte", "--prompt", "x", "--negative", "y"], "negative: .* set guidance above 1, such as 4"),
        (["latte", "--prompts", "none.txt"], "--prompts: none.txt: No such file"),
        (["latte", "--prompts", "empty.txt"], "--prompts: empty.txt: has no prompt; write one a line"),
        (["latte", "--prompts", "vae/model.safetensors"], "--prompts: vae/model.safetensors: not a text file"),
        (["latte", "--prompt", "x", "--storyboard", "story.yaml"], "--prompt and --storyboard: give one of them"),
        (["latte", "--storyboard", "story.yaml"], "prompt 'z{40}': has 60 tokens, and 24 fit"),
        (["latte", "--prompt", "x", "--text-encoder", "gone"], "latte: its text encoder is not at gone; say where it"),
        (["hasty", "--prompt", "x", "--guidance", "4"], "trained with text_dropout: 0 .* leave guidance at 1"),
        (
            ["latte", "--prompt", "x", "--guidance", "-1"],
            "^--guidance: needs a number from 0 on, such as 4, or one for",
        ),
        (
            ["latte", "--prompt", "x", "--guidance", "words=2"],
            "^--guidance: has no words; there are classes, text and audio$",
        ),
        (
            ["latte", "--prompt", "x", "--guidance", "text=2,classes=3"],
            "--guidance: leads towards a class; name one with --class",
        ),
        (
            ["latte", "--class", "dog", "--guidance", "text=2"],
            "^--guidance: leads towards a prompt; name one with --prompt",
        ),
        (
            ["plain", "--storyboard", "worded.yaml", "--guidance", "classes=2,text=3"],
            "has learned no classes; leave it",
        ),
        (["vae", "--prompt", "x"], "is a PVVAE, which generates no videos"),
    ],
)
def test_what_cannot_be_prompted_is_said_in_one_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Any, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(models)
    (models / "empty.txt").write_text("\n \n")
    (models / "story.yaml").write_text(f"- {{at: 0s, class: cat}}\n- {{at: 0.5s, prompt: {'z' * 60}}}\n")
    (models / "worded.yaml").write_text("- {at: 0s, prompt: x}\n")
    with pytest.raises(UserError, match=said) as e:
        longtake("generate", *arguments, "--out", tmp_path / "x.mp4")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_another_encoder_than_that_of_the_training_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters.install(monkeypatch, digest="another")
    with pytest.raises(UserError, match=r"has learned texts by another encoder than .* --text-encoder FOLDER"):
        longtake(
            *("generate", models / "latte", "--prompt", "x", "--text-encoder", tmp_path, "--out", tmp_path / "x.mp4")
        )


def learned(config: TextConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """What config.json says of an encoder that a model has learned from, and fields of the model's config."""
    encoder = load_encoder(config)
    said = encoder.describe() | {"digest": encoder.digest, "width": encoder.width}
    fields = {"text_width": encoder.width, "text_empty": len(encoder.encode([""])[0]), "text_length": encoder.limit}
    return {"uri": "", "digest": "0", "encoder": said}, fields


def test_the_packaged_words_lead_a_model_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("wordllama", reason="the extra [text] is not installed")
    facts, fields = learned(TextConfig(length=64))
    models = letters.save_priors(tmp_path, facts, **fields)
    for name, prompt in (("a", "a red square moves left"), ("b", "a red square moves left"), ("c", "rain")):
        longtake("generate", models / "latte", "--prompt", prompt, "--guidance", 2, "--out", tmp_path / f"{name}.mp4")
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c
    with pytest.raises(UserError, match="tokens, and 64 fit; shorten it"):
        longtake("generate", models / "latte", "--prompt", "left " * 99, "--out", tmp_path / "x.mp4")


def test_an_encoder_in_a_folder_may_move_and_another_may_not_take_its_place(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra [text] is not installed")
    facts, fields = learned(TextConfig(encoder=tiny_encoders.encoder("umt5", tmp_path / "umt5"), length=16))
    other = tiny_encoders.encoder("umt5", tmp_path / "other", seed=1)
    models = letters.save_priors(tmp_path, facts, **fields)
    command = ["generate", models / "latte", "--prompt", "a red square moves left"]
    longtake(*command, "--out", tmp_path / "a.mp4")
    (tmp_path / "umt5").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"its text encoder is not at .*/umt5; say where it is with --text-encoder"):
        longtake(*command, "--out", tmp_path / "x.mp4")
    longtake(*command, "--text-encoder", tmp_path / "moved", "--out", tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with pytest.raises(UserError, match=r"has learned texts by another encoder than .*/other \(digest"):
        longtake(*command, "--text-encoder", other, "--out", tmp_path / "x.mp4")
    with pytest.raises(UserError, match=r"text encoder: .*/vae: is no text encoder"):
        longtake(*command, "--text-encoder", models / "vae", "--out", tmp_path / "x.mp4")
    assert not (tmp_path / "x.mp4").exists()
