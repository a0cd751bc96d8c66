"""What claims measure tells right videos from wrong ones, before any model is trained."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from longtake.datasets.loader import to_model
from longtake.infra.worlds.actions import LOOKS, heldout

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def claimed(name: str) -> ModuleType:
    return importlib.import_module(f"claimed.{name}")


def test_gaps_that_are_right_are_measured_so_and_hold_and_cut_is_elsewhere() -> None:
    mavin = claimed("mavin")
    clips = mavin.drawn("actions", 8, 5, True, mavin.SIZE, frames=mavin.FRAMES, fps=mavin.FPS)
    real = mavin.measured(clips, to_model(clips.video), 12)
    held = mavin.measured(clips, mavin.maker("hold and cut", 0, Path(), True)(clips, 12), 12)
    faded = mavin.measured(clips, mavin.maker("cross-fade", 0, Path(), True)(clips, 12), 12)
    assert real["identity"] == real["action"] == 1 and real["off"] < 0.03
    assert held["off"] > 2 * real["off"] and held["action"] < 0.7
    assert faded["identity"] < 0.8 and faded["psnr"] < real["psnr"]


def test_joints_of_videos_that_jump_are_further_from_real_ones_than_what_is_between() -> None:
    encgan3 = claimed("encgan3")
    real = encgan3.drawn("endless", 12, 7, False, 16, frames=60, fps=12, pace=encgan3.PACE).video
    joints = list(range(16, 60, 16))
    whole = encgan3.measured(to_model(real), to_model(real), joints)
    torn = to_model(torch.cat([real[:, :, :16], real[:, :, :16], real[:, :, :16], real[:, :, :12]], dim=2))
    again = encgan3.measured(to_model(real), torn, joints)
    assert whole["seam"] < 0.3 and again["seam"] > 1
    assert again["distance at joints"] > 5 * whole["distance at joints"]
    assert again["distance inside"] < again["distance at joints"] / 5
    # no joint shows where nothing moves
    still = encgan3.measured(to_model(real), to_model(real[:, :, :1].expand_as(real)), joints)
    assert whole["change"] < 0.01 and still["change"] > 1
    assert still["distance at joints"] > 2 * whole["distance at joints"]


def test_codes_that_come_as_often_are_no_distance_apart() -> None:
    tats = claimed("tats")
    counts = torch.tensor([5.0, 0, 9, 1])
    assert tats.divergence(counts, counts) == 0
    assert tats.divergence(counts, counts.roll(1)) > 0.1


def test_a_video_that_shows_its_prompt_is_right_and_another_s_is_not() -> None:
    text = claimed("text")
    moving = claimed("_moving").drawn("actions", 6, 3, True, text.SEEN, actions=1, frames=text.FRAMES, fps=text.FPS)
    looks = [type(LOOKS[0])(**{name: truth[name] for name in LOOKS[0]._fields}) for truth in moving.truths]
    videos = list(moving.video.permute(0, 2, 3, 4, 1).numpy())
    assert all(heldout(look) for look in looks)
    assert set(text.accuracies(looks, videos).values()) == {1.0}
    assert text.accuracies(looks, [np.flip(video, 0) for video in videos])["action"] == 0
    assert text.accuracies(looks, videos[1:] + videos[:1])["all"] < 0.5  # two may be alike


def test_each_video_is_given_its_own_sound_the_next_one_s_or_none() -> None:
    sound = claimed("sound")
    videos = [sound.sound.render(seed, True) for seed in range(3)]
    given = [sound.heard_by(videos, number, 1) for number in range(3)]
    assert np.array_equal(given[2].samples[0], videos[0].sound[0])
    assert np.array_equal(sound.heard_by(videos, 1, 0).samples[0], videos[1].sound[0])
    assert sound.heard_by(videos, 1, None) is None
