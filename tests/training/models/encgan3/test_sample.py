"""Videos of a registered EncGAN3: by command, from an image or a clip, with the movement of others; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from priors import awake, frames_of, longtake

from longtake.datasets.errors import UserError
from longtake.infra.cli import media
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.common.video import concatenated, video_file
from longtake.training.models.encgan3.config import EncGAN3Config
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.generator import Request, Scene
from longtake.training.registry import disk
from longtake.training.registry import requests as serving

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"size": 16, "width": 2, "content": 5, "movement": 3, "attention": None, "groups": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder `model` and clips `FRAMES.mp4` of 16 x 16 pixels, `wide.mp4` of 24 x 16."""
    folder = tmp_path_factory.mktemp("encgan3")
    config = EncGAN3Config(**SMALL)
    model = awake(EncGAN3(config))
    model.scale_latents(torch.randn(8, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    model.generator.to_differences.weight.data *= 10  # so that all that decides a video is seen in its pixels
    facts: dict[str, Any] = {
        "lineage": {},
        "classes": [],
        "window": {"frames": 16, "fps": 8.0, "size": [16, 16]},
        "sampling": {"content": "encode", "backward": False},
    }
    disk.save(folder / "model", "encgan3", config.model_dump(mode="json"), model.state_dict(), facts)
    (folder / "text.mp4").write_text("no video\n")
    rng = np.random.default_rng(0)
    for name, frames, width in (("1", 1, 16), ("20", 20, 16), ("30", 30, 16), ("wide", 20, 24)):
        with video_file(folder / f"{name}.mp4", 8.0) as write:
            write(rng.integers(0, 256, (frames, 16, width, 3), np.uint8))
    return folder


@pytest.fixture(scope="module")
def sampler(root: Path) -> Any:
    return loaded(root, torch.float32)


def loaded(root: Path, dtype: torch.dtype) -> Any:
    module, facts = registry.load_with_facts(str(root / "model"))
    generator = kind_of(facts).generator
    assert generator
    return generator("model", module, facts, None, dtype)


def made(
    sampler: Any, frames: int = 30, seed: int = 1, movement: Any = (), start: Any = None, **more: Any
) -> np.ndarray:
    request = Request(seed, [(0.0, Scene())], movement=movement)
    return concatenated(sampler.videos([request], frames, replace(sampler.settings, **more), start=start))


def test_a_command_writes_seconds_of_video_the_same_each_time(root: Path, sampler: Any, tmp_path: Path) -> None:
    for name in ("x", "y"):
        longtake("generate", root / "model", "--seconds", 3.5, "--seed", 1, "--out", tmp_path / f"{name}.mp4")
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    assert len(frames_of(tmp_path / "x.mp4")) == 28 and not (tmp_path / "x.mp4.part").exists()
    joints = sampler.joints(28, sampler.settings)
    assert joints == [14, 26] and media.joints_of(str(tmp_path / "x.mp4")) == joints
    with video_file(tmp_path / "z.mp4", 8.0, joints=joints) as write:
        write(made(sampler, 28)[0])
    assert (tmp_path / "z.mp4").read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_a_command_makes_what_the_options_say(root: Path, sampler: Any, tmp_path: Path) -> None:
    command = ("generate", root / "model", "--frames", 30, "--out", tmp_path / "x.mp4", "--seed", 1)
    longtake(*command, "--start", root / "20.mp4", "--movement", root / "30.mp4", "--content", "keep", "--backward")
    start, movement = (frames_of(root / f"{name}.mp4") for name in ("20", "30"))
    begun, back = sampler.begin(iter(start)), replace(sampler.settings, backward=True)
    joints = sampler.joints(30, back, begun)
    assert joints != sampler.joints(30, sampler.settings, begun) != sampler.joints(30, sampler.settings) != []
    with video_file(tmp_path / "y.mp4", 8.0, joints=joints) as write:
        moves = [sampler.movement(iter(movement))]
        write(made(sampler, movement=moves, start=begun, content="keep", backward=True)[0])
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()


def test_each_option_changes_the_video(root: Path, sampler: Any) -> None:
    start, other = (frames_of(root / f"{name}.mp4") for name in ("20", "30"))
    begun, moves = sampler.begin(iter(start)), sampler.movement(iter(other))
    rest = sampler.movement(iter(start))
    videos = [
        made(sampler),
        made(sampler, seed=2),
        made(sampler, start=begun),
        made(sampler, start=sampler.begin(iter(start[:1]))),
        made(sampler, start=begun, backward=True),
        made(sampler, start=begun, content="keep"),
        made(sampler, start=begun, movement=[moves]),
        made(sampler, start=begun, movement=[moves, rest]),
    ]
    assert all(video.shape == (1, 30, 16, 16, 3) and video.dtype == np.uint8 for video in videos)
    for n, video in enumerate(videos):
        assert not any(np.array_equal(video, other) for other in videos[:n])
    assert np.array_equal(videos[-1], made(sampler, start=begun, movement=[moves, rest]))


def test_half_the_precision_makes_nearly_the_same_video(root: Path, sampler: Any) -> None:
    half, start = loaded(root, torch.bfloat16), frames_of(root / "20.mp4")
    whole = made(sampler, 12, start=sampler.begin(iter(start)), movement=[sampler.movement(iter(start))])
    found = made(half, 12, start=half.begin(iter(start)), movement=[half.movement(iter(start))])
    assert 0 < abs(found.astype(int) - whole).mean() < 8


def test_a_start_of_another_size_is_scaled_and_a_line_says_so(root: Path, tmp_path: Path) -> None:
    done = longtake(
        "generate", root / "model", "--frames", 4, "--start", root / "wide.mp4", "--out", tmp_path / "x.mp4"
    )
    assert done.stderr.count("wide.mp4: 24x16 is scaled and cropped to 16x16\n") == 1
    same = longtake("generate", root / "model", "--frames", 4, "--start", root / "20.mp4", "--out", tmp_path / "x.mp4")
    assert "scaled" not in same.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--movement", "1.mp4"), r"--movement: .*1\.mp4: has 1 frame; movement is read from clips of 16"),
        (("--movement", "none.mp4"), r"none\.mp4: no such video file"),
        (("--start", "text.mp4"), r"^--start: text\.mp4: not a video or image that can be read \([^:]*\)$"),
        (("--movement", "20.mp4") * 3, "--movement: 3 videos; give one, or two"),
        (("--class", "0"), "this model has no classes"),
        (("--frames", "0"), "--frames: frames is 0"),
        (("--keep", "2"), "--keep: .* takes none"),
        (("--tile", "16"), "tile: an EncGAN3 makes whole frames"),
        (("--vae", "vae"), "makes pixels and needs no autoencoder"),
        (("--prompt", "a dog"), "--prompt: .* takes none"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=words) as error:
        longtake("generate", "model", *options, "--out", tmp_path / "x.mp4")
    assert "\n" not in str(error.value)


def test_a_model_whose_clips_began_at_their_first_frame_makes_nothing_backward(root: Path) -> None:
    module, facts = registry.load_with_facts(str(root / "model"))
    generator = kind_of(facts).generator
    assert generator
    for anywhere, able in ((0.0, False), (0.25, True)):
        sampler = generator("model", module, facts | {"anywhere": anywhere}, None, torch.float32)
        assert ("backward" in sampler.accepts) == able


def test_frames_of_another_size_are_refused_in_python(sampler: Any) -> None:
    wrong = np.zeros((2, 16, 24, 3), np.uint8)
    for take in (sampler.begin, sampler.movement):
        with pytest.raises(UserError, match="frames are 16x24, and the model makes 16x16; scale them first"):
            take(iter(wrong))
    with pytest.raises(UserError, match="has no frame"):
        sampler.begin(iter(()))


def test_it_is_served_with_its_settings(sampler: Any) -> None:
    table = {"seed": [1], "frames": [30]}
    kept = serving.serve(sampler, table, {"content": "keep", "backward": True})
    assert np.array_equal(kept, made(sampler, content="keep", backward=True))
    with pytest.raises(UserError, match="content: 'kept' is neither encode nor keep"):
        serving.serve(sampler, table, {"content": "kept"})
