"""`longtake generate` and `longtake reconstruct`: the files that they write, the same each time, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click import Abort, BadParameter
from priors import awake, frames_of, longtake, save_vae

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.infra.cli import media
from longtake.infra.report import StageRun, build
from longtake.training.models.common.condition import of_classes
from longtake.training.models.common.video import video_file
from longtake.training.models.generator import Request, Scene
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.models.latte.sample import generate_videos, load_prior
from longtake.training.models.memory import prior as memory
from longtake.training.models.memory import segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `latte`, `plain` (without classes), `vae`, `memory` and `holder` (which retrieves)."""
    folder = tmp_path_factory.mktemp("models")
    vae = save_vae(folder / "vae")
    for name, classes in (("latte", ["cat", "dog"]), ("plain", [])):
        config = LatteConfig(depth=2, width=32, heads=2, channels=8, classes=len(classes), shape=(3, 2, 2))
        facts: dict[str, Any] = {
            "lineage": {},
            "classes": classes,
            "window": {"frames": 9, "fps": 12.0, "size": [32, 32]},
            "sampling": {"steps": 2, "guidance": 1.0, "shift": 1.0, "overlap": 1},
            "vae": {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)},
        }
        disk.save(folder / name, "latte", config.model_dump(mode="json"), awake(Latte(config)).state_dict(), facts)
    small: dict[str, Any] = {"depth": 2, "width": 24, "heads": 2, "channels": 8, "classes": 2, "rates": ("2x2x2",)}
    small |= {"memory_widths": (4, 8), "memory_heads": 2, "history": 6, "shape": (3, 2, 2), "window": 2}
    dit = awake(MemoryDiT(MemoryDiTConfig(**small)))
    for name, stage in (("memory", "generation"), ("holder", "retrieval")):
        facts |= {
            "stage": stage,
            "rates": ["2x2x2"],
            "classes": ["cat", "dog"],
            "low_latents": {"uri": "", "digest": "0", "shrink": [2, 2]},
            "window": {"frames": 9, "steps": 3, "factor": 4, "fps": 12.0, "size": [32, 32]},
            "history": {"seconds": 2.0, "steps": 6},
            "sampling": {"steps": 2, "guidance": 1.0, "shift": 1.0},
        }
        disk.save(folder / name, "memory_dit", dit.config.model_dump(mode="json"), dit.state_dict(), facts)
    return folder


def test_a_video_of_the_models_window_by_default_and_the_same_bytes_each_time(models: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        longtake("generate", models / "latte", "--seed", 7, "--class", "dog", "--out", tmp_path / f"{name}.mp4")
    assert frames_of(tmp_path / "a.mp4").shape == (9, 32, 32, 3)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    longtake("generate", models / "latte", "--seed", 8, "--class", 1, "--out", tmp_path / "c.mp4")
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12


def test_a_longer_video_than_the_window_and_another_rate(models: Path, tmp_path: Path) -> None:
    longtake("generate", models / "plain", "--frames", 33, "--fps", 7.5, "--steps", 1, "--out", tmp_path / "x.mp4")
    assert frames_of(tmp_path / "x.mp4").shape[0] == 33
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(15, 2)


def test_several_videos_are_several_files_which_each_alone_has_as_well(models: Path, tmp_path: Path) -> None:
    said = longtake("generate", models / "latte", "--seeds", "3,5-6", "--out", tmp_path / "x.mp4")
    names = ["x-seed3.mp4", "x-seed5.mp4", "x-seed6.mp4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert said.stdout.split() == [str(tmp_path / name) for name in names]
    longtake("generate", models / "latte", "--seed", 5, "--out", tmp_path / "alone.mp4")
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "x-seed5.mp4").read_bytes()
    longtake("generate", models / "latte", "--class", "cat", "--class", "dog", "--out", tmp_path / "y.mp4")
    assert (tmp_path / "y-cat.mp4").read_bytes() != (tmp_path / "y-dog.mp4").read_bytes()
    for batch in (2, 3):
        longtake("generate", models / "plain", "--count", 3, "--batch", batch, "--out", tmp_path / f"z{batch}.mp4")
    two, three = (frames_of(tmp_path / f"z{n}-seed1.mp4") for n in (2, 3))
    assert np.abs(two.astype(int) - three).mean() < 2


def test_a_grid_is_one_file_however_many_are_made_at_once(models: Path, tmp_path: Path) -> None:
    for batch in (1, 5):
        more = ["--count", 5, "--grid", "--frames", 13, "--batch", batch]
        longtake("generate", models / "plain", *more, "--out", tmp_path / f"{batch}.mp4")
    assert frames_of(tmp_path / "1.mp4").shape == (13, 2 * 32 + 2, 3 * 32 + 4, 3)
    assert np.abs(frames_of(tmp_path / "1.mp4").astype(int) - frames_of(tmp_path / "5.mp4")).mean() < 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["latte", "--frames", "10"], "--frames: frames is 10.*such as 9 or 13"),
        (
            ["latte", "--class", "dgo"],
            "class 'dgo': this model has 2 classes, by name such as dog, or by number 0 to 1",
        ),
        (["latte", "--class", "2"], "by number 0 to 1"),
        (["plain", "--class", "0"], "this model has no classes"),
        (["latte", "--guidance", "3"], "--guidance: leads towards a class or a prompt or a sound; name one with"),
        (["latte", "--seeds", "1,x"], "--seeds: 'x' is no seed"),
        (["latte", "--seeds", "5-3"], "'5-3' is no seed"),
        (["latte", "--seeds", "1", "--count", "2"], "--seeds and --count: give one of them"),
        (["latte", "--seeds", "1,1"], "the same video is asked for twice"),
        (["latte", "--count", "65", "--grid"], "at most 64 fit"),
        (["vae"], "is a PVVAE, which generates no videos"),
        (["nowhere"], "nowhere: no such folder"),
        (["latte", "--tile", "24"], "tile 24 with overlap 64"),
        (["latte", "--seconds", "1", "--frames", "9"], "--frames and --seconds: give one of them"),
        (["latte", "--start", __file__], "--start: latte takes none; leave it out"),
        (["latte", "--movement", __file__], "--movement: latte takes none; leave it out"),
        (["memory", "--backward"], "--backward: memory takes none; leave it out"),
        (["latte", "--content", "keep"], "--content: latte takes none; leave it out"),
        (["latte", "--storyboard", __file__], "--storyboard: .*not valid YAML"),
        (["latte", "--prompt", "a cat"], "--prompt: latte takes none; leave it out"),
        (["memory", "--negative", ""], "--negative: memory takes none; leave it out"),
        (["memory", "--text-encoder", "vae"], "--text-encoder: memory takes none; leave it out"),
        (["memory", "--prompt", "cat", "--storyboard", "x"], "--prompt and --storyboard: give one of them"),
        (["latte", "--class", "cat", "--class", "cow"], "class 'cow': this model has 2 classes"),
        (["memory", "--class", "cat", "--storyboard", "x"], "--class and --storyboard: give one of them"),
        (["memory", "--storyboard", "none.yaml"], "--storyboard: none.yaml: No such file"),
        (["memory", "--storyboard", "vae/config.json"], "--storyboard: vae/config.json: needs a list with entries"),
        (["memory", "--storyboard", "vae/model.safetensors"], "--storyboard: vae/model.safetensors: not a text file"),
        (["memory", "--start", "none.mp4"], "none.mp4: no such video file"),
        (["memory", "--start", "vae/config.json"], "not a video or image that can be read"),
        (["memory", "--frames", "12"], "--frames: frames is 12.*such as 9 or 13"),
        (["memory", "--class", "dgo"], "by name such as dog"),
        (["memory", "--vae", "latte"], "is a Latte, not a video autoencoder"),
        (["memory", "--tile", "24"], "tile 24 with overlap 64"),
        (["holder"], "is a MemoryDiT that does retrieval, which generates no videos; name a prior"),
        (["latte", "--vae", "latte"], "is a Latte, not a video autoencoder"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(UserError, match=said) as e:
        longtake("generate", *arguments, "--out", tmp_path / "x.mp4")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--fps", "nan"), ("--fps", "1e-9"), ("--fps", "1e9"), ("--seconds", "nan"), ("--seconds", "inf")],
)
def test_numbers_that_no_file_can_have_are_refused(tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(BadParameter, match=r"is not (a finite number|in the range)"):
        longtake("generate", "latte", option, value, "--out", tmp_path / "x.mp4")


def test_seconds_are_at_least_so_many_of_the_file(models: Path, tmp_path: Path) -> None:
    for model, more, frames in (
        ("plain", ["--seconds", "1"], 13),
        ("plain", ["--seconds", "1", "--fps", 24], 25),
        ("memory", ["--seconds", "1.5"], 21),
        ("memory", [], 9),
    ):
        longtake("generate", models / model, *more, "--steps", 1, "--out", tmp_path / "x.mp4")
        assert len(frames_of(tmp_path / "x.mp4")) == frames


def test_a_model_with_a_memory_makes_the_same_bytes_each_time_and_leaves_nothing_beside(
    models: Path, tmp_path: Path
) -> None:
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 8])):
        longtake(
            "generate", models / "memory", "--seconds", 2, "--class", "dog", *more, "--out", tmp_path / f"{name}.mp4"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c
    prior = memory.load_prior(str(models / "memory"), "generation")
    request = Request(0, [(0.0, Scene(1))])
    with video_file(tmp_path / "python.mp4", 12, joints=prior.joints(25, prior.settings)) as write:
        for chunk in prior.videos([request], 25, prior.settings):
            write(chunk[0])
    assert (tmp_path / "python.mp4").read_bytes() == a


def test_several_videos_with_a_memory_side_by_side(models: Path, tmp_path: Path) -> None:
    longtake("generate", models / "memory", "--count", 3, "--batch", 2, "--grid", "--out", tmp_path / "grid.mp4")
    assert frames_of(tmp_path / "grid.mp4").shape == (9, 2 * 32 + 2, 2 * 32 + 2, 3)
    longtake(
        "generate", models / "memory", "--class", "cat", "--class", "dog", "--batch", 2, "--out", tmp_path / "x.mp4"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.mp4", "x-cat.mp4", "x-dog.mp4"]
    assert (tmp_path / "x-cat.mp4").read_bytes() != (tmp_path / "x-dog.mp4").read_bytes()


def test_a_file_says_where_its_model_went_on(models: Path, tmp_path: Path) -> None:
    clip.write(tmp_path / "start.mp4", np.zeros((9, 32, 32, 3), np.uint8), 12)
    start = ["--start", tmp_path / "start.mp4"]
    for model, frames, more, joints in (
        ("plain", 9, [], []),
        ("plain", 29, [], [9, 17, 25]),
        ("memory", 29, [], [9, 21]),
        ("memory", 28, start, [12, 24]),
        ("memory", 29, ["--grid", "--count", 2], []),
    ):
        longtake("generate", models / model, "--frames", frames, *more, "--steps", 1, "--out", tmp_path / "x.mp4")
        assert media.joints_of(str(tmp_path / "x.mp4")) == joints
    prior = memory.load_prior(str(models / "memory"), "generation")
    lengths = [chunk.shape[1] for chunk in prior.videos([Request(0, [(0.0, Scene())])], 29, prior.settings)]
    assert list(accumulate(lengths))[:-1] == prior.joints(29, prior.settings) == [9, 21]


def test_a_storyboard_is_followed(models: Path, tmp_path: Path) -> None:
    story = tmp_path / "story.yaml"
    story.write_text("- {at: 0s, class: cat}\n- {at: 1.0s, class: dog}\n")
    for name, more in (("told", ["--storyboard", story]), ("cat", ["--class", "cat"]), ("dog", ["--class", 1])):
        longtake("generate", models / "memory", "--seconds", 2, *more, "--out", tmp_path / f"{name}.mp4")
    told, cat, dog = (frames_of(tmp_path / f"{name}.mp4").astype(int) for name in ("told", "cat", "dog"))
    same = np.abs(told - cat).mean((1, 2, 3))
    # 1 s is frame 12, which the step from frame 9 to 12 has: the next segment begins at frame 9
    assert same[:5].max() < 2 < same[-4:].mean()
    assert np.abs(told - dog)[:9].mean() > 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "needs a list with entries"),
        ("- cat", "entry 1 needs `at` and `class` or `prompt`, and has 'cat'"),
        ("- {at: 0s}", "entry 1 needs `at` and `class` or `prompt`, and has at"),
        ("- {at: 0s, caption: a cat}", "and has at, caption"),
        ("- {at: 0s, prompt: a cat}", "prompt: this model takes none; leave it out"),
        ("- {at: 0s, prompt: 7}", "entry 1: prompt: 7 is no text; put it in quotes"),
        ("- {at: soon, class: cat}", "entry 1: at: 'soon' is no time"),
        ("- {at: -1s, class: cat}", "entry 1: at: '-1s' is no time"),
        ("- {at: 0s, class: dgo}", "entry 1: class 'dgo'"),
        ("- {at: 2s, class: cat}\n- {at: 1s, class: dog}", "entry 2: at: 1 s must be later than the 2 s before"),
        (
            "- {at: 0s, class: cat}\n- {at: 100s, class: dog}",
            "entry 2: at: 100 s is beyond the end .* which has 0.75 s",
        ),
        ("- {at: 0.7s, class: cat}", "entry 1: at: 0.7 s is beyond the end of the video"),
        ("- {at: 0s, class: [}", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_storyboard_is_said_in_one_line(
    models: Path, tmp_path: Path, text: str, said: str
) -> None:
    story = tmp_path / "story.yaml"
    story.write_text(text)
    with pytest.raises(UserError, match=said) as e:
        longtake("generate", models / "memory", "--storyboard", story, "--out", tmp_path / "x.mp4")
    assert str(story) in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["story.yaml"]


def test_a_video_is_gone_on_from_its_end(models: Path, video: Path, tmp_path: Path) -> None:
    clip.write(tmp_path / "short.mp4", np.zeros((4, 32, 32, 3), np.uint8), 12)
    with pytest.raises(UserError, match=r"short\.mp4: has 4 frames at 12 a second; the model goes on from 5 or more"):
        longtake("generate", models / "memory", "--start", tmp_path / "short.mp4", "--out", tmp_path / "x.mp4")
    with pytest.raises(
        UserError, match="--frames: frames is 10; going on from a video makes 4n frames, such as 8 or 12"
    ):
        longtake("generate", models / "memory", "--start", video, "--frames", 10, "--out", tmp_path / "x.mp4")
    clip.write(tmp_path / "white.mp4", np.full((40, 32, 48, 3), 255, np.uint8), 12)
    for name, start in (("a", video), ("b", tmp_path / "white.mp4")):
        longtake("generate", models / "memory", "--seconds", 1, "--start", start, "--out", tmp_path / f"{name}.mp4")
    a, b = (frames_of(tmp_path / f"{name}.mp4") for name in "ab")
    assert a.shape == b.shape == (12, 32, 32, 3) and np.abs(a.astype(int) - b).mean() > 2


def test_what_is_gone_on_from_is_drawn_as_in_training_by_each_video_s_own_seed(models: Path) -> None:
    prior = memory.load_prior(str(models / "memory"), "generation")
    assert prior.posterior == "mean", "of a model that does not say what it has learned"
    start = prior.begin(np.random.default_rng(0).integers(0, 255, (13, 32, 32, 3), np.uint8))
    # new weights are sure of nothing
    start = start._replace(logvar=torch.linspace(-4, 2, start.mean.numel()).view_as(start.mean))
    assert torch.equal(segments.draw_latents(start, [1, 2], "mean"), start.mean.expand(2, -1, -1, -1, -1))
    draws = segments.draw_latents(start, range(400), "sample")
    deviation = (0.5 * start.logvar[0]).exp()
    assert torch.allclose(draws.std(0), deviation, rtol=0.3)
    assert ((draws.mean(0) - start.mean[0]).abs() < 0.3 * deviation).all()

    def made(how: Any, seeds: list[int]) -> np.ndarray:
        chosen = replace(prior, posterior=how)
        return np.concatenate(
            list(chosen.videos([Request(seed, [(0.0, Scene())]) for seed in seeds], 8, chosen.settings, start=start)),
            axis=1,
        )

    both = made("sample", [3, 4])
    np.testing.assert_allclose(made("sample", [4])[0].astype(int), both[1], atol=1)
    assert (made("mean", [3, 4]) != both).any()


def test_a_stopped_command_goes_on_and_one_of_other_options_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*more: object) -> None:
        options = ["--seconds", 2, "--count", 2, *more]
        longtake("generate", models / "memory", *options, "--out", tmp_path / "x.mp4")

    command()
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    original, calls = segments._sample, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(segments, "_sample", killed)
    with pytest.raises((KeyboardInterrupt, Abort)):
        command()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-seed0.mp4", "x.mp4.part"]
    with pytest.raises(UserError, match=r"x\.mp4\.part/0: has segments of a run .* with other settings; delete it"):
        command("--steps", 3)
    command()
    assert len(calls) == 7  # of three segments each, four were kept
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_the_registry_must_be_named_and_files_are_mp4(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for command in (["generate", "models:/latte@champion"], ["reconstruct", "models:/pv-vae@champion", __file__]):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set; set it to the registry, such as sqlite"):
            longtake(*command, "--out", tmp_path / "x.mp4")
    with pytest.raises(UserError, match=r"name it such as x\.mp4"):
        longtake("generate", models / "latte", "--out", tmp_path / "x.gif")


def test_where_nothing_can_be_written_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "folder.mp4").mkdir()
    for out, says in (
        (tmp_path / "a.txt" / "x.mp4", r"cannot be written in \S+/a\.txt \(Not a directory\); choose another name"),
        (tmp_path / "a.txt" / "b" / "x.mp4", r"cannot be written in \S+/a\.txt \(Not a directory\)"),
        (Path("/proc/x.mp4"), r"cannot be written in /proc \("),
        (tmp_path / f"{'x' * 300}.mp4", "File name too long"),
        (tmp_path / "folder.mp4", "is a folder; name a file in it"),
    ):
        for command in (["generate", tmp_path / "no-model"], ["reconstruct", tmp_path / "no-model", __file__]):
            with pytest.raises(UserError, match=rf"^--out: {out}: .*{says}") as e:
                longtake(*command, "--out", out)
            assert "\n" not in str(e.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder.mp4"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 frames of 36 x 54, which 16 does not divide."""
    path = tmp_path_factory.mktemp("video") / "in.mp4"
    rows, columns = np.mgrid[:36, :54]
    still = np.stack([rows * 6, columns * 4, rows + columns], -1)
    clip.write(path, np.stack([(still + 5 * n) % 256 for n in range(22)]).astype(np.uint8), 10)
    return path


def test_a_video_that_is_read_is_not_replaced(models: Path, tmp_path: Path) -> None:
    video, apart = tmp_path / "x-seed1.mp4", "would replace .*x-seed1.mp4, which is read"
    clip.write(video, np.zeros((9, 32, 32, 3), np.uint8), 12)
    before = video.read_bytes()
    with pytest.raises(UserError, match=f"--out: {video}: {apart}"):
        longtake("generate", models / "memory", "--start", video, "--count", 2, "--out", tmp_path / "x.mp4")
    with pytest.raises(UserError, match=f"--out: {video}: {apart}"):
        longtake("reconstruct", models / "vae", video, "--out", video)
    assert video.read_bytes() == before


def test_a_reconstruction_is_as_long_as_the_video_and_cropped_around_its_middle(
    models: Path, video: Path, tmp_path: Path
) -> None:
    said = longtake("reconstruct", models / "vae", video, "--out", tmp_path / "x.mp4")
    assert "54x36 is cropped to 48x32" in said.stderr
    assert frames_of(tmp_path / "x.mp4").shape == (22, 32, 48, 3)
    longtake("reconstruct", models / "vae", video, "--out", tmp_path / "two.mp4", "--side-by-side")
    both, alone = frames_of(tmp_path / "two.mp4"), frames_of(tmp_path / "x.mp4")
    assert both.shape == (22, 32, 96, 3)
    source = frames_of(video)[:, 2:34, 2:50]
    assert np.abs(both[:, :, :48].astype(int) - source).mean() < 12
    assert np.abs(both[:, 4:-4, 52:-4].astype(int) - alone[:, 4:-4, 4:-4]).mean() < 10
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].average_rate == 10


def test_frames_that_the_encoder_does_not_see_are_predicted(models: Path, video: Path, tmp_path: Path) -> None:
    for name, more in (("all", []), ("some", ["--visible", "9"])):
        longtake("reconstruct", models / "vae", video, "--out", tmp_path / f"{name}.mp4", *more)
    full, some = frames_of(tmp_path / "all.mp4").astype(int), frames_of(tmp_path / "some.mp4")
    assert len(some) == 22
    difference = np.abs(full - some).mean((1, 2, 3))
    assert difference[:9].max() < 3 < difference[12:].min()


def test_an_image_is_a_video_of_one_frame(models: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((40, 32, 3), 90, np.uint8)).save(tmp_path / "in.png")
    longtake("reconstruct", models / "vae", tmp_path / "in.png", "--out", tmp_path / "x.mp4")
    assert frames_of(tmp_path / "x.mp4").shape == (1, 32, 32, 3)


def test_what_cannot_be_reconstructed_is_said_in_one_line(models: Path, video: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((8, 32, 3), np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "text.mp4").write_text("no video")
    cases: list[tuple[list[Any], str]] = [
        ([models / "vae", tmp_path / "none.mp4"], "no such video file"),
        ([models / "vae", tmp_path / "text.mp4"], "not a video or image that can be read"),
        ([models / "vae", tmp_path / "small.png"], "the picture is 32x8; the model needs at least 16x16"),
        ([models / "latte", video], "is a Latte, not a video autoencoder"),
        ([models / "vae", video, "--visible", 10], "visible is 10.*such as 9 or 13"),
        ([models / "vae", video, "--visible", 41], "visible is 41, but the video has only 22 frames"),
        ([models / "vae", video, "--tile", 24], "tile"),
    ]
    for arguments, said in cases:
        with pytest.raises(UserError, match=said) as e:
            longtake("reconstruct", *arguments, "--out", tmp_path / "x.mp4")
        assert "\n" not in str(e.value) and not (tmp_path / "x.mp4").exists()


def test_large_frames_go_through_in_tiles(models: Path, tmp_path: Path) -> None:
    clip.write(tmp_path / "in.mp4", np.random.default_rng(0).integers(0, 256, (5, 160, 96, 3), np.uint8), 10)
    longtake("reconstruct", models / "vae", tmp_path / "in.mp4", "--tile", 96, "--out", tmp_path / "x.mp4")
    assert frames_of(tmp_path / "x.mp4").shape == (5, 160, 96, 3)


def test_the_report_shows_generated_videos_and_what_their_distance_is_of(models: Path, tmp_path: Path) -> None:
    seen = tmp_path / "artifacts" / "heldout"
    seen.mkdir(parents=True)
    longtake("generate", models / "latte", "--seed", 3, "--out", seen / "seed-3.mp4")
    distance = {"frechet": 12.5, "kernel": 0.25, "network": "i3d", "network_digest": "abcdef" * 11, "resize": 224}
    distance |= {
        "videos_fake": 16,
        "videos_real": 15,
        "split": "val",
        "frames": 9,
        "width": 32,
        "height": 32,
        "seed": 0,
    }
    summary = {"heldout_loss": 0.75, "clips": 4, "videos": 1, "frames": 9, "split": "val", "seed": 0}
    videos = [{"file": name, "seed": 3, "frames": 9, "class": "<b>dog"} for name in ("seed-3.mp4", "lost.mp4")]

    def page(found: dict[str, Any] | None) -> str:
        record = {"summary": summary | {"distance": found}, "videos": videos}
        (seen / "generated.json").write_text(json.dumps(record))
        facts = StageRun(
            "prior", "finetune_latte", "FINISHED", False, 1.0, "1", "models:/latte/1", {}, {}, {}, seen.parent
        )
        return build(tmp_path / "page", "r", [facts], None, None, "").read_text()

    measured = page(distance | {"warning": "2 samples for 400 features"})
    assert measured.count("<video") == 1 and "lost.mp4: no playable video" in measured
    assert "&lt;b&gt;dog" in measured and "<b>dog" not in measured
    assert "12.5" in measured and "16 generated to 15 val videos of 9 frames" in measured
    assert "Careful: 2 samples for 400 features" in measured
    assert "No distance to real videos was measured" in page(None)


@pytest.mark.slow
def test_a_shell_makes_the_same_video_as_python(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "generate", str(models / "latte")]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300)

    done = run("--class", "dog", "--seed", "3", "--frames", "17", "--out", "x.mp4")
    assert done.returncode == 0 and done.stdout.strip() == "x.mp4" and "generate: 100%" in done.stderr, done.stderr
    prior = load_prior(str(models / "latte"))
    ours = generate_videos(prior.latte, prior.codec, 17, [3], of_classes([1]), prior.settings)
    with video_file(tmp_path / "y.mp4", 12, joints=[9]) as write:
        for chunk in ours:
            write(chunk[0])
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    wrong = run("--frames", "16", "--out", "z.mp4")
    assert wrong.returncode == 2 and wrong.stderr.count("error: ") == 1 and "13 or 17" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    """Killed twice: when a segment is finished, and when some steps of the next are done."""
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "generate", str(models / "memory"), "--seconds", "4"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"OMP_NUM_THREADS": "1"}

    def started(name: str) -> subprocess.Popen[bytes]:
        arguments = [*command, "--steps", "300", "--out", name]
        return subprocess.Popen(arguments, cwd=tmp_path, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    done = started("whole.mp4")
    assert done.wait(timeout=300) == 0, done.communicate()
    part = tmp_path / "x.mp4.part" / "0"
    for number, wait in ((0, 0.0), (2, 0.3)):
        run = started("x.mp4")
        while not (part / f"{number:05d}.safetensors").exists():
            assert run.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        run.kill()
        run.communicate()
        assert not (tmp_path / "x.mp4").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in part.glob("*.safetensors")}
    assert 3 <= len(kept) < 5
    assert started("x.mp4").wait(timeout=300) == 0
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.mp4", "x.mp4"]
