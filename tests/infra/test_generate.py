"""`longtake generate` and `longtake reconstruct`: the files that they write, the same each time, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from longtake.datasets import clip
from longtake.datasets.column import encoder_digest
from longtake.datasets.errors import UserError
from longtake.infra.cli import cli
from longtake.infra.report import StageRun, build
from longtake.training import registry, sampling
from longtake.training.models.latte import Latte, LatteConfig
from longtake.training.models.pv_vae import PVVAE, config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")


def awake(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `latte`, `plain` (without classes) and `vae`."""
    folder = tmp_path_factory.mktemp("models")
    vae = awake(PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)))
    registry.save(folder / "vae", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}})
    for name, classes in (("latte", ["cat", "dog"]), ("plain", [])):
        config = LatteConfig(depth=2, width=32, heads=2, channels=8, classes=len(classes), shape=(3, 2, 2))
        facts: dict[str, Any] = {
            "lineage": {},
            "classes": classes,
            "window": {"frames": 9, "fps": 12.0},
            "sampling": {"steps": 2, "guidance": 1.0, "shift": 1.0, "overlap": 1},
            "vae": {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)},
        }
        registry.save(folder / name, "latte", config.model_dump(mode="json"), awake(Latte(config)).state_dict(), facts)
    return folder


def longtake(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result


def frames_of(path: Path) -> np.ndarray:
    return clip.decode(path.read_bytes())


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
        (["latte", "--guidance", "3"], "--guidance: leads towards a class; name one with --class"),
        (["latte", "--seeds", "1,x"], "--seeds: 'x' is no seed"),
        (["latte", "--seeds", "5-3"], "'5-3' is no seed"),
        (["latte", "--seeds", "1", "--count", "2"], "--seeds and --count: give one of them"),
        (["latte", "--seeds", "1,1"], "the same video is asked for twice"),
        (["latte", "--count", "65", "--grid"], "at most 64 fit"),
        (["vae"], "is a PVVAE, which generates no videos"),
        (["nowhere"], "no longtake model here"),
        (["latte", "--tile", "24"], "tile 24 with overlap 64"),
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


def test_the_registry_must_be_named_and_files_are_mp4(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for command in (["generate", "models:/latte@champion"], ["reconstruct", "models:/pv-vae@champion", __file__]):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set; set it to the registry, such as sqlite"):
            longtake(*command, "--out", tmp_path / "x.mp4")
    with pytest.raises(UserError, match=r"name it such as x\.mp4"):
        longtake("generate", models / "latte", "--out", tmp_path / "x.gif")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 frames of 36 x 54, which 16 does not divide."""
    path = tmp_path_factory.mktemp("video") / "in.mp4"
    rows, columns = np.mgrid[:36, :54]
    still = np.stack([rows * 6, columns * 4, rows + columns], -1)
    clip.write(path, np.stack([(still + 5 * n) % 256 for n in range(22)]).astype(np.uint8), 10)
    return path


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
    prior = sampling.load_prior(str(models / "latte"))
    ours = sampling.generate_videos(prior.latte, prior.vae, 17, [3], [1], prior.settings)
    with sampling.video_file(tmp_path / "y.mp4", 12) as write:
        for chunk in ours:
            write(chunk[0])
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    wrong = run("--frames", "16", "--out", "z.mp4")
    assert wrong.returncode == 2 and wrong.stderr.count("error: ") == 1 and "13 or 17" in wrong.stderr
    assert "Traceback" not in wrong.stderr
