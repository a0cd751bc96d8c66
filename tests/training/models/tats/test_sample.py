"""Videos of a registered TATS: by command, from a start, along a storyboard, stopped and resumed; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tats_stages
import torch
from priors import frames_of, longtake

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.common.video import concatenated, video_file
from longtake.training.models.generator import Request, Scene
from longtake.training.models.tats.words import Words
from longtake.training.registry import disk
from longtake.training.registry import requests as serving
from longtake.training.registry.requests import parameters_of

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a red square", "a blue circle moves left"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, with classes; `gaps` with `line`, which have words too; all for one VQGAN."""
    root = tmp_path_factory.mktemp("models")
    uri = tats_stages.saved(tats_stages.vqgan(), root / "vqgan")
    words = Words.learned(CAPTIONS, 60, 6)
    worded: dict[str, Any] = {"classes": 2, "words": words.size, "word_length": 6}
    tats_stages.save_tats(root / "base", uri, classes=2)
    own = {"sampling": {"guidance": 1.0, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "keep": 0}}
    tats_stages.save_tats(root / "line", uri, "anchors", {"words": words.record()} | own, **worded)
    facts = {"words": words.record(), "anchors": {"uri": str(root / "line")}}
    tats_stages.save_tats(root / "gaps", uri, "interpolate", facts, **worded)
    return root


def prior(models: Path, name: str, vae: str | None = None) -> Any:
    module, facts = registry.load_with_facts(str(models / name))
    generator = kind_of(facts).generator
    assert generator
    return generator(name, module, facts, vae, torch.float32)


def made(generator: Any, seed: int = 1, frames: int = 24, story: Any = None, **more: Any) -> np.ndarray:
    request = Request(seed, story or [(0.0, Scene())])
    return concatenated(generator.videos([request], frames, more.pop("settings", generator.settings), **more))


def clip(models: Path, frames: int) -> Path:
    path = models / f"clip-{frames}.mp4"
    with video_file(path, 12.0) as write:
        write(made(prior(models, "base"), 9, 40)[0, :frames])
    return path


@pytest.mark.parametrize("name", ["base", "gaps"])
def test_the_same_command_writes_the_same_file_of_any_length(models: Path, tmp_path: Path, name: str) -> None:
    for file, frames in (("x", 8), ("y", 8), ("z", 36)):
        longtake(
            "generate", models / name, "--frames", frames, "--class", 1, "--seed", 3, "--out", tmp_path / f"{file}.mp4"
        )
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    assert len(frames_of(tmp_path / "z.mp4")) == 36 and not (tmp_path / "z.mp4.part").exists()
    generator = prior(models, name)
    short, long = (made(generator, 3, frames, [(0.0, Scene(1))]) for frames in (8, 36))
    # what a token looks like depends on those next to it
    assert short.shape == (1, 8, 16, 16, 3) and long.shape == (1, 36, 16, 16, 3) and long.std() > 1
    assert (long != made(generator, 4, 36, [(0.0, Scene(1))])).any()
    assert (long != made(generator, 3, 36, [(0.0, Scene(0))])).any()


def test_joints_are_where_gaps_meet(models: Path) -> None:
    base, gaps = prior(models, "base"), prior(models, "gaps")
    assert base.joints(36, base.settings) == [], "a window that slides has none"
    start = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    factor, every = gaps._factor, gaps._every
    for begun, first in ((None, 1 + every), (start, every)):
        joints = gaps.joints(12 * factor, gaps.settings, begun)
        assert joints == [latent * factor for latent in range(first, 12, every)] and joints


def test_anchors_keep_their_own_settings_where_nothing_else_is_asked_for(models: Path) -> None:
    generator = prior(models, "gaps")
    assert generator.leading == replace(generator.settings, top_k=5)
    sure = replace(generator.settings, top_k=1)
    assert np.array_equal(*(made(generator, seed, settings=sure) for seed in (1, 2)))
    assert not np.array_equal(*(made(generator, seed) for seed in (1, 2)))


@pytest.mark.parametrize("name", ["base", "gaps"])
def test_a_start_is_continued_and_is_no_part_of_the_result(models: Path, tmp_path: Path, name: str) -> None:
    start = clip(models, 14)
    command = ("generate", models / name, "--start", start, "--frames", 16, "--top-k", 5, "--keep", 1)
    longtake(*command, "--out", tmp_path / "x.mp4")
    assert len(frames_of(tmp_path / "x.mp4")) == 16
    generator = prior(models, name)
    frames = list(frames_of(start))
    tokens = generator.begin(iter(frames))
    assert tokens.shape == (1, 3, 4, 4)
    assert torch.equal(tokens, generator.begin(iter(frames[2:])))
    going = made(generator, frames=16, start=tokens)
    assert going.shape == (1, 16, 16, 16, 3) and (going != made(generator, frames=16)).any()
    with pytest.raises(UserError, match=r"--start: .* has 3 frames at 12 a second; the model goes on from 4 or more"):
        longtake("generate", models / name, "--start", clip(models, 3), "--out", tmp_path / "y.mp4")


def test_a_storyboard_changes_the_class_and_the_words(models: Path, tmp_path: Path) -> None:
    generator = prior(models, "gaps")
    once, told = (
        made(generator, 1, 48, story)
        for story in (
            [(0.0, Scene(0, "a red square"))],
            [(0.0, Scene(0, "a red square")), (2.0, Scene(1, "a blue circle"))],  # from frame 24, latent frame 6 on
        )
    )
    assert (told != once)[:, 24:].any()
    # the VQGAN's decoder looks 6 latent frames ahead: its first frames see none of the second scene
    tokens = [list(_tokens(generator, story)) for story in (1, 2)]
    assert torch.equal(tokens[0][0][:, :6], tokens[1][0][:, :6]) and not torch.equal(tokens[0][0], tokens[1][0])
    (tmp_path / "story.yaml").write_text(
        "- {at: 0s, prompt: a red square}\n- {at: 1s, prompt: a circle, class: class 1}\n"
    )
    longtake(
        "generate",
        models / "gaps",
        "--frames",
        24,
        "--storyboard",
        tmp_path / "story.yaml",
        "--out",
        tmp_path / "x.mp4",
    )
    assert len(frames_of(tmp_path / "x.mp4")) == 24


def _tokens(generator: Any, scenes: int) -> Any:
    from longtake.training.models.tats.rollout import Rollout

    condition = [
        generator.prompts.states([text], torch.device("cpu")) for text in ("a red square", "a blue circle")[:scenes]
    ]
    from longtake.training.models.common.condition import Condition

    story = [(6 * n, Condition(torch.tensor([n]), *states)) for n, states in enumerate(condition)]
    plan = Rollout(generator.model, [1], generator.settings, generator.anchors, story=story)
    yield torch.cat(list(plan.tokens(12)), dim=1)


@pytest.mark.parametrize("name", ["base", "gaps"])
def test_a_stopped_video_goes_on_from_its_parts(models: Path, tmp_path: Path, name: str) -> None:
    generator = prior(models, name)
    whole = made(generator, frames=400 if name == "gaps" else 80)
    steps: list[int] = []
    folder = str(tmp_path / "part" / "0")
    stopped = generator.videos(
        [Request(1, [(0.0, Scene())])],
        whole.shape[1],
        generator.settings,
        folder=folder,
        each_step=lambda: steps.append(1),
    )
    next(stopped)
    stopped.close()
    assert list(Path(folder).glob("*.safetensors"))
    again = made(generator, frames=whole.shape[1], folder=folder, each_step=lambda: steps.append(1))
    np.testing.assert_array_equal(again, whole)
    with pytest.raises(UserError, match="with other settings; delete it"):
        from dataclasses import replace

        made(generator, frames=whole.shape[1], folder=folder, settings=replace(generator.settings, top_k=3))
    generator.forget(str(tmp_path / "part"))
    assert not (tmp_path / "part").exists()


def test_the_bar_counts_the_latent_frames_that_are_drawn(models: Path) -> None:
    for name in ("base", "gaps"):
        generator, steps = prior(models, name), list[int]()
        for frames in (4, 8, 28):
            steps.clear()
            made(generator, frames=frames, each_step=lambda steps=steps: steps.append(1))
            assert len(steps) == generator.rounds(frames, generator.settings)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("base", ("--frames", 30), "--frames: frames is 30; this model makes 4n frames, such as 28 or 32"),
        ("base", ("--frames", 3), "such as 4 or 8"),
        ("base", ("--top-p", 0), "top_p is 0; it must be above 0 and at most 1"),
        ("base", ("--temperature", 0), "temperature is 0; it must be a number above 0"),
        ("base", ("--tile", 8), "tile 8; needs .* pixels a side or more"),
        ("base", ("--keep", 3), "keep is 3; a window has room for 1 to 2"),
        ("base", ("--steps", 3), "--steps: .* takes none; leave it out"),
        ("base", ("--history-noise", 0.1), "--history-noise: .* takes none"),
        ("base", ("--prompt", "a red square"), "--prompt: .* takes none"),
        ("base", ("--class", "cat"), "class 'cat': this model has 2 classes"),
        ("gaps", ("--prompt", "a red zebra"), "no caption that this model has learned from has 'zebra'"),
        ("gaps", ("--prompt", "a red square moves left a red square"), "has 8 tokens, and 6 fit; shorten it"),
        ("line", (), "makes anchors alone, one in 2 latent frames; name the model of mode interpolate"),
        ("base", ("--vae", "OTHER"), "has not made the tokens that .* was trained on"),
    ],
)
def test_what_a_model_cannot_make_is_one_line(
    models: Path, tmp_path: Path, name: str, options: tuple[Any, ...], why: str
) -> None:
    if "OTHER" in options:
        other = tats_stages.vqgan()
        with torch.no_grad():
            other.codebook.codes.add_(1.0)
        options = ("--vae", tats_stages.saved(other, tmp_path / "other"))
    with pytest.raises(UserError, match=why) as e:
        longtake("generate", models / name, *options, "--out", tmp_path / "x.mp4")
    assert "\n" not in str(e.value) and not (tmp_path / "x.mp4.part").exists()


def test_a_served_model_takes_its_own_settings(models: Path) -> None:
    generator = prior(models, "gaps")
    assert set(parameters_of(generator.accepts)) == {
        "guidance", "guidance_classes", "guidance_text", "temperature", "top_k", "top_p", "keep",
    }  # fmt: skip
    table = {"seed": [1, 1], "prompt": ["a red square", None], "frames": [8, 8]}
    videos = serving.serve(generator, table, {"top_k": 4, "temperature": 0.5})
    assert videos.shape == (2, 8, 16, 16, 3)
    with pytest.raises(UserError, match="params: unknown steps; there are guidance, temperature, top_k, top_p, keep"):
        serving.serve(generator, table, {"steps": 4})


def test_a_model_needs_its_own_vqgan(models: Path, tmp_path: Path) -> None:
    assert prior(models, "base", str(models / "vqgan")).vqgan is not None
    module, facts = registry.load_with_facts(str(models / "base"))
    kept = {name: value for name, value in facts.items() if name not in ("format", "model", "config", "sha256")}
    kept["vqgan"] = kept["vqgan"] | {"encoder": "other"}
    disk.save(tmp_path / "base", "tats", module.config.model_dump(mode="json"), module.state_dict(), kept)
    with pytest.raises(UserError, match="has not made the tokens"):
        prior(tmp_path, "base")
