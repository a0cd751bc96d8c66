"""The stage that trains a VQGAN of sound: resumed exactly, measured, registered, judged; what it refuses; tokens of any sound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import heard
import latent_stages
import numpy as np
import pytest
import tats_stages
import torch
from flat import nested
from pydantic import ValidationError

from longtake.datasets import index
from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.models import judge_of
from longtake.training.models.generator import Sound
from longtake.training.models.kind import Judged
from longtake.training.models.tats.sound import pretrain
from longtake.training.models.tats.sound.hearing import HeardSamples, resampled
from longtake.training.models.tats.sound.pretrain import Config, check
from longtake.training.models.tats.sound.vqgan import SoundVQGAN
from longtake.training.models.tats.spectrogram import magnitudes
from longtake.training.registry.gate import Gate
from longtake.training.registry.judge import rows_of

pytestmark = pytest.mark.usefixtures("one_thread", "group")

QUICK: dict[str, Any] = {
    "kind": "pretrain_sound_vqgan",
    "dataset": "dataset",
    "model": heard.TINY,
    "spectrogram": heard.PICTURE,
    "frames": 8,
    "warm_steps": 1,
    "steps": 4,
    "batch": 2,
    "lr": 1e-2,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 4,
    "heldout_every": 4,
    "heldout_clips": 1,
    "eval_clips": 3,
}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Read it, do not change it."""
    return heard.dataset(tmp_path_factory.mktemp("heard"))


def prepared(chosen: Config, root: str, folder: Path) -> Any:
    return latent_stages.prepared(chosen, {"dataset": root}, folder, pretrain)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (3, "bf16")])
def test_a_training_that_was_stopped_goes_on_exactly(
    root: str, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    chosen, given, log = config(zero_stage=zero_stage, precision=precision), {"dataset": root}, latent_stages.Log()
    straight = latent_stages.fit(pretrain, chosen, given, tmp_path / "straight", log=log)
    latent_stages.fit(pretrain, chosen, given, tmp_path / "stopped", until=2)
    again = latent_stages.fit(pretrain, chosen, given, tmp_path / "stopped")
    torch.testing.assert_close(again, straight, atol=0, rtol=0)
    assert straight["codebook.updates"] == 3, "no update while warming up"
    assert {"l1", "commitment", "usage", "perplexity"} <= log.steps[0].keys()
    assert all(np.isfinite(row["loss"]) for row in log.steps)
    assert log.videos == {"reconstructed": (8, 8, 16, 3)}


def test_it_learns_the_pictures_of_sound_in_the_range_of_the_training_clips(root: str, tmp_path: Path) -> None:
    # at the rate of the other tests it learns on some machines, and on others its error grows
    chosen = config(lr=1e-3, warm_steps=0, steps=40, sample_every=0, heldout_every=0, checkpoint_every=40)
    log = latent_stages.Log()
    latent_stages.fit(pretrain, chosen, {"dataset": root}, tmp_path / "run", log=log)
    losses = [row["l1"] for row in log.steps]
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    setup = prepared(chosen, root, tmp_path / "run")
    spectrogram = setup.model.config.spectrogram
    assert (spectrogram.rate, spectrogram.rows) == (heard.RATE, 8) and setup.fps == 25
    loader = pretrain._loader(chosen, {"dataset": root}, "train", batch=1, epochs=1, shuffle=False)
    levels = [magnitudes(batch["audio"].mean(1), 8, spectrogram) for batch in loader]
    assert spectrogram.low <= min(level.min() for level in levels) + 1e-6
    assert max(level.max() for level in levels) <= spectrogram.high < max(level.max() for level in levels) + 0.02
    with_sound = sum(sum(shard.table["has_audio"].to_pylist()) for shard in index.read_shards(root, "train", "audio"))
    assert len(levels) == with_sound == pretrain.counts(chosen, setup)["train_clips"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield from latent_stages.mlflow_run(tmp_path_factory.mktemp("store"), patch)


def test_it_is_measured_registered_and_judged_and_refuses_videos(root: str, store: str, tmp_path: Path) -> None:
    import mlflow

    given, out = {"dataset": root}, tmp_path / "out"
    # frames of 4 moments, fewer than SSIM's window, as the page advises where there is no GPU
    thin = heard.PICTURE | {"columns": 4}
    result = pretrain.run(config(stride=2, spectrogram=thin), given, str(out))
    assert result["uri"] == "models:/sound-vqgan/1"
    summary = json.loads((out / "checkpoints" / "heldout" / "reconstructed.json").read_text())["summary"]
    assert {"l1", "psnr", "ssim", "usage", "perplexity", "score", "kappa"} <= summary.keys()
    assert summary["frames"] == 8 and result["metrics"]["psnr"] == summary["psnr"]
    model, facts = registry.load_with_facts("models:/sound-vqgan@champion")
    assert isinstance(model, SoundVQGAN) and facts["window"] == {"frames": 16, "stride": 2, "fps": 12.5}

    judged = Judged("here", model, facts)
    gate = Gate(metrics={"psnr": {"better": "higher"}}, samples=2)  # type: ignore[dict-item]
    ours, theirs = rows_of(judged, judged, given, gate)
    assert ours == theirs and 1 <= len(ours) <= 2
    assert judge_of(facts).better.keys() == next(iter(ours.values())).keys()
    pixels = np.zeros((1, 8, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="videos: video has 3 channels; this model needs 1"):
        mlflow.pyfunc.load_model("models:/sound-vqgan/1").predict(pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 9}, "frames 9: the model needs 4n frames, such as 8 or 12"),
        ({"spectrogram": {"rows": 10}}, "spectrogram 10x16: the model needs multiples of 4"),
        (
            {"spectrogram": {"rows": 4}},
            "spectrogram: 4 rows, and 16 columns in each of 8 frames, are too few for SSIM; give",
        ),
        ({"spectrogram": {"rate": 16_000}}, "rate follows from the dataset's sound; leave it out"),
        ({"spectrogram": {"scale": "bark"}}, "Input should be 'mel' or 'linear'"),
        ({"warm_steps": 4}, "warm_steps 4: leave none of 4 steps to the codebook; lower them"),
        ({"lora": {"rank": 2}}, "lora: all else would stay random; leave it out"),
        ({"model": {"preset": "huge"}}, "unknown preset 'huge'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as e:
        config(**changes)
    (error,) = e.value.errors()
    assert message in error["msg"] and "\n" not in error["msg"]


def test_data_without_sound_are_refused(dataset: str, root: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(train\): no clip that is used has sound; use others"):
        prepared(config(), dataset, tmp_path)
    silent: Any = SimpleNamespace(kind="shard", audio=None, clip=SimpleNamespace(short_side=32, max_frames=30))
    with pytest.raises(ValueError, match="dataset: its stage keeps no sound"):
        check(config(), {"dataset": silent})
    silent.audio = {}
    check(config(), {"dataset": silent})
    with pytest.raises(ValueError, match="frames: a window spans 32 frames, the dataset's clips have at most 30"):
        check(config(stride=4), {"dataset": silent})


def test_defaults_are_those_of_the_papers_code() -> None:
    paper = Config(kind="pretrain_sound_vqgan", dataset="shards")
    model = paper.vqgan({"rate": 16_000})
    assert (model.codes, model.code_width, model.downsample) == (1024, 256, (4, 8, 8))
    assert (model.spectrogram.rows, model.spectrogram.columns, paper.batch, paper.lr) == (64, 16, 96, 9e-5)
    sound = torch.randn(1, 16 * 640)
    with torch.no_grad():
        tokens = SoundVQGAN(model.model_copy(update={"width": 4, "code_width": 8})).sound_tokens(sound, 16)
    assert tokens.shape == (1, 4, 8, 2), "64 tokens for 16 frames"


def test_a_window_is_heard_as_in_training_and_has_no_sound_beyond_its_ends() -> None:
    model, samples = heard.vqgan(), heard.noise(1.0)[0, : 17 * 1920]
    videos = HeardSamples(model, [samples, None, samples[: 4 * 1920]], 25.0)

    def alone(begin: int, before: int = 0) -> torch.Tensor:
        part = torch.nn.functional.pad(samples[begin * 1920 : (begin + 12 - before) * 1920], (before * 1920, 0))
        part = torch.nn.functional.pad(part, (0, 12 * 1920 - len(part)))
        with torch.no_grad():
            return model.sound_tokens(part[None], 12).flatten(2)[0]

    found = videos.window(1, 3)
    assert torch.equal(found[0], alone(4)) and (found[1:] == -1).all()
    assert torch.equal(videos.window(3, 3)[0], alone(12)), "silence follows a sound that ends in the window"
    assert torch.equal(videos.window(-2, 3)[0], alone(0, before=8)), "and is before it"
    for first in (5, -3):
        assert (videos.window(first, 3) == -1).all()
    assert (videos.window(0, 3)[2] >= 0).all()
    # of a video that plays at half the rate, latent frames have twice the sound
    slow = HeardSamples(model, [samples], 12.5)
    assert (slow.window(2, 3) >= 0).all() and (slow.window(3, 3) == -1).all()
    assert videos.digest() != HeardSamples(model, [samples, None, samples], 25.0).digest() != slow.digest()


def test_sound_of_another_rate_is_heard_alike() -> None:
    at = np.arange(96_000) / 48_000
    sound = np.sin(2 * np.pi * 440 * at).astype(np.float32)
    other = resampled(Sound(np.stack([sound, sound]), 48_000), 16_000)
    assert abs(len(other) - 32_000) <= 32
    np.testing.assert_allclose(other[500:31_000], sound[::3][500:31_000], atol=0.02)
    assert resampled(Sound(sound[None], 48_000), 48_000) is not None


def test_videos_and_sounds_do_not_pass_for_each_other() -> None:
    with pytest.raises(ValueError, match="video has 3 channels; this model needs 1"):
        heard.vqgan().tokens(torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="video has 1 channels; this model needs 3"):
        tats_stages.vqgan().tokens(torch.zeros(1, 1, 4, 8, 8))
