"""A TATS that hears: trained on tokens of sound beside those of the video, judged, and led by the sound of a file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import claps
import heard
import latent_stages
import numpy as np
import pytest
import tats_stages
import torch
from flat import nested
from priors import awake, frames_of, longtake

from longtake.datasets import tokens as records
from longtake.datasets.errors import UserError
from longtake.datasets.tokens import model_digest, read_tokens
from longtake.pipeline import soundtrack
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.common.video import concatenated, video_file
from longtake.training.models.generator import Request, Scene, Sound
from longtake.training.models.tats import train as pretrain_tats
from longtake.training.models.tats.train import Config
from longtake.training.registry import requests as serving
from longtake.training.registry.gate import Gate
from longtake.training.registry.judge import Judged, rows_of

pytestmark = pytest.mark.usefixtures("one_thread", "group")

QUICK: dict[str, Any] = {
    "kind": "pretrain_tats",
    "dataset": "dataset",
    "tokens": "tokens",
    "audio_tokens": "audio_tokens",
    "model": tats_stages.TINY,
    "every": tats_stages.EVERY,
    "steps": 4,
    "batch": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 4,
    "eval_clips": 2,
    "eval_videos": 1,
}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return heard.inputs(tmp_path_factory.mktemp("heard"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield from latent_stages.mlflow_run(tmp_path_factory.mktemp("mlflow"), patch)


def test_a_stopped_training_goes_on_exactly_and_its_samples_hear_held_out_sound(
    made: dict[str, str], tmp_path: Path
) -> None:
    chosen, log = config(), latent_stages.Log()
    straight = latent_stages.fit(pretrain_tats, chosen, made, tmp_path / "straight", log=log)
    latent_stages.fit(pretrain_tats, chosen, made, tmp_path / "stopped", until=2)
    again = latent_stages.fit(pretrain_tats, chosen, made, tmp_path / "stopped")
    torch.testing.assert_close(again, straight, atol=0, rtol=0)
    assert log.videos == {"generated": (tats_stages.FRAMES, 34, 34, 3)}
    setup = latent_stages.prepared(chosen, made, tmp_path / "straight", pretrain_tats)
    model = setup.model.config
    assert (model.audio_codes, model.audio_tokens, model.conditions) == (16, 4, 1 + 3 * 4)
    plan = setup.rollout(chosen, setup.model, [0, 1], None)
    assert plan.audio is not None
    found = plan.audio.window(0, 3)
    assert found.shape == (2, 3, 4)
    window = next(iter(pretrain_tats.loader_of(chosen, setup, "val", batch=1, shuffle=False)))
    assert torch.equal(found[:1], window["audio_tokens"].flatten(2))


def test_the_loss_depends_on_the_sound(made: dict[str, str], tmp_path: Path) -> None:
    chosen = config()
    setup = latent_stages.prepared(chosen, made, tmp_path, pretrain_tats)
    batch = next(iter(pretrain_tats.loader_of(chosen, setup, "train", batch=2)))
    assert batch["audio_tokens"].shape == (2, 3, 2, 2)

    def loss(audio: torch.Tensor) -> float:
        turn = latent_stages.turn(setup.model, batch | {"audio_tokens": audio}, torch.Generator().manual_seed(0))
        return pretrain_tats._loss(setup, None, turn)[0].item()

    setup.model.eval()
    awake(setup.model)
    plain = loss(batch["audio_tokens"])
    assert plain == loss(batch["audio_tokens"]) != loss((batch["audio_tokens"] + 1) % 16)


def test_it_is_registered_with_what_hears_and_judged_on_its_tokens(
    made: dict[str, str], store: str, tmp_path: Path
) -> None:
    result = pretrain_tats.run(config(), made, str(tmp_path / "out"))
    module, facts = registry.load_with_facts(result["uri"])
    record = read_tokens(made["audio_tokens"])
    assert facts["sound"]["uri"] == record.model["uri"] and facts["sound"]["encoder"] == record.model["digest"]
    assert "audio" in kind_of(facts).accepts and result["metrics"]["heldout_loss"] > 0
    judged = Judged(result["uri"], module.eval(), facts)
    gate = Gate(metrics={"loss": {"better": "lower"}}, samples=2)  # type: ignore[dict-item]
    ours, theirs = rows_of(judged, judged, made, gate)
    assert ours == theirs and len(ours) == 2
    # what sounds mean to the model decides its loss
    other_ears = copy.deepcopy(judged.model)
    with torch.no_grad():
        other_ears.token_in.weight[-32 - 16 : -32] *= -1
    changed, _ = rows_of(judged._replace(model=other_ears), None, made, gate)
    assert any(changed[key] != ours[key] for key in ours)
    with pytest.raises(UserError, match=r"audio_tokens: .* has learned to hear; name what"):
        rows_of(judged, None, {name: uri for name, uri in made.items() if name != "audio_tokens"}, gate)
    other = replace(record, model=record.model | {"digest": "other"})
    records.write_tokens(str(tmp_path / "other"), other)
    with pytest.raises(UserError, match=r"audio_tokens: .* are of another VQGAN than"):
        rows_of(judged, None, made | {"audio_tokens": str(tmp_path / "other")}, gate)
    generator = kind_of(facts).generator
    assert generator
    prior: Any = generator(result["uri"], module, facts, None, torch.float32)
    assert _video(prior, _sound()).shape == (1, 24, 16, 16, 3)


def test_tokens_that_do_not_fit_are_refused_in_one_line(made: dict[str, str], tmp_path: Path) -> None:
    video, sound = read_tokens(made["tokens"]), read_tokens(made["audio_tokens"])
    others = {
        "hop": replace(sound, hop=8),
        "size": replace(sound, size=(32, 32)),
        "long": replace(sound, frames=16, shape=(4, 2, 2)),
    }
    for name, record in others.items():
        records.write_tokens(str(tmp_path / name), record)
    for changed, says in (
        ({"audio_tokens": made["tokens"]}, "audio_tokens: .* are of video; encode the sound by"),
        ({"tokens": made["audio_tokens"]}, "tokens: .* are of sound; name those of the video"),
        (
            {"audio_tokens": str(tmp_path / "hop")},
            "audio_tokens: have windows of hop 8, tokens of 4; encode both alike",
        ),
        ({"audio_tokens": str(tmp_path / "size")}, "windows of size "),
        ({"audio_tokens": str(tmp_path / "long")}, "windows of frames 16, tokens of 12"),
    ):
        with pytest.raises(UserError, match=says) as e:
            latent_stages.prepared(config(), made | changed, tmp_path / says[:8], pretrain_tats)
        assert "\n" not in str(e.value)
    facts = {"sound": {"uri": "models:/other/1", "encoder": "other"}}
    tats_stages.save_tats(tmp_path / "base", video.model["uri"], facts=facts, audio_codes=16, audio_tokens=4)
    with pytest.raises(UserError, match=r"base: .* has learned sound of another VQGAN, models:/other/1"):
        latent_stages.prepared(
            config(base="x", model={}), made | {"base": str(tmp_path / "base")}, tmp_path / "b", pretrain_tats
        )


# generation


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `gaps` hear, `deaf` does not."""
    root = tmp_path_factory.mktemp("models")
    uri = tats_stages.saved(tats_stages.vqgan(), root / "vqgan")
    sound = heard.saved(heard.vqgan(), root / "sound")
    digest = model_digest(registry.load(sound))
    facts: dict[str, Any] = {"sound": {"uri": sound, "encoder": digest}}
    fields = {"audio_codes": 16, "audio_tokens": 4}
    tats_stages.save_tats(root / "deaf", uri)
    tats_stages.save_tats(root / "base", uri, facts=facts, **fields)  # type: ignore[arg-type]
    tats_stages.save_tats(root / "line", uri, "anchors", facts, **fields)  # type: ignore[arg-type]
    facts |= {"anchors": {"uri": str(root / "line")}}
    tats_stages.save_tats(root / "gaps", uri, "interpolate", facts, **fields)  # type: ignore[arg-type]
    other = {"sound": {"uri": sound, "encoder": "other"}}
    tats_stages.save_tats(root / "other", uri, facts=other, **fields)  # type: ignore[arg-type]
    return root


def prior(models: Path, name: str) -> Any:
    module, facts = registry.load_with_facts(str(models / name))
    generator = kind_of(facts).generator
    assert generator
    return generator(name, module, facts, None, torch.float32)


def _sound(seconds: float = 2.0, seed: int = 0) -> Sound:
    return Sound(heard.noise(seconds, seed).expand(2, -1).numpy(), heard.RATE)


def _video(generator: Any, *sounds: Sound | None, frames: int = 24) -> np.ndarray:
    requests = [Request(3, [(0.0, Scene())], sound=sound) for sound in sounds]
    return concatenated(generator.videos(requests, frames, generator.settings))


@pytest.mark.parametrize("name", ["base", "gaps"])
def test_a_sound_leads_the_video_and_each_of_a_batch_hears_its_own(models: Path, name: str) -> None:
    generator, sound, other = prior(models, name), _sound(), _sound(seed=1)
    both = _video(generator, sound, other, None)
    assert (both[0] != both[1]).any() and (both[0] != both[2]).any()
    np.testing.assert_array_equal(both[:1], _video(generator, sound))
    np.testing.assert_array_equal(both[2:], _video(generator, None))
    # 12 frames a second: the first second decides nothing of what is drawn before windows reach it
    later = Sound(np.concatenate([sound.samples[:, :48_000], other.samples[:, 48_000:]], 1), 48_000)
    assert (_video(generator, later) != both[:1]).any()


def wav(path: Path, seconds: float = 3.0, rate: int = 22_050) -> Path:
    samples = (claps.sound(seconds, rate, (0.5, 1.5)) * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream({"wav": "pcm_s16le", "flac": "flac"}[path.suffix[1:]], rate=rate)
        stream.codec_context.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in (frame, None):
            container.mux(stream.encode(part))
    return path


@pytest.mark.parametrize("file", ["x.wav", "x.flac", "x.mp4"])
def test_the_file_has_the_sound_cut_to_its_length(models: Path, tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    if path.suffix == ".mp4":
        claps.write(path, seconds=3.0, times=(0.5, 1.5), video_from=0.3)
    else:
        wav(path)
    command = ("generate", models / "base", "--frames", 24, "--audio", path)
    for name in ("a.mp4", "b.mp4"):
        longtake(*command, "--out", tmp_path / name)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(frames_of(tmp_path / "a.mp4")) == 24
    samples, rate = _heard(tmp_path / "a.mp4")
    assert abs(samples.shape[1] / rate - 2.0) < 0.05
    for time in (0.5, 1.5):
        assert abs(claps.heard_at(samples, rate, time) - time) < 0.005
    longtake("generate", models / "base", "--frames", 24, "--out", tmp_path / "silent.mp4")
    assert (frames_of(tmp_path / "silent.mp4") != frames_of(tmp_path / "a.mp4")).any()


def _heard(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return np.concatenate(parts, 1), container.streams.audio[0].rate


def test_several_videos_and_a_grid_have_the_sound_too(models: Path, tmp_path: Path) -> None:
    path = wav(tmp_path / "x.wav", seconds=1.0)
    command = ("generate", models / "base", "--frames", 24, "--count", 2, "--audio", path)
    result = longtake(*command, "--out", tmp_path / "v.mp4")
    assert "x.wav: the sound ends after 1.0 s; what follows has none" in result.stderr
    longtake(*command, "--grid", "--out", tmp_path / "grid.mp4")
    for name in ("v-seed0.mp4", "v-seed1.mp4", "grid.mp4"):
        samples, rate = _heard(tmp_path / name)
        assert abs(claps.heard_at(samples, rate, 0.5) - 0.5) < 0.005


def test_what_cannot_be_heard_is_one_line(models: Path, tmp_path: Path) -> None:
    good = wav(tmp_path / "x.wav")
    with video_file(tmp_path / "mute.mp4", 12.0) as write:
        write(np.zeros((12, 16, 16, 3), np.uint8))
    (tmp_path / "text.wav").write_text("no sound")
    late = claps.write(tmp_path / "late.mp4", seconds=4.0, heard=(3.0, 4.0))
    cases: tuple[tuple[str, Path, str], ...] = (
        ("deaf", good, "--audio: .*deaf takes none; leave it out"),
        ("base", tmp_path / "nowhere.wav", "--audio: .*nowhere.wav: no such file"),
        ("base", tmp_path / "mute.mp4", "--audio: .*mute.mp4: no audio stream"),
        ("base", tmp_path / "text.wav", "--audio: .*text.wav: not a file whose sound can be read"),
        ("base", late, "--audio: .*late.mp4: no sound in its first 2 s"),
        ("other", good, "has not made the tokens that .* was trained on"),
    )
    for name, path, says in cases:
        with pytest.raises(UserError, match=says) as e:
            longtake("generate", models / name, "--frames", 24, "--audio", path, "--out", tmp_path / "v.mp4")
        assert "\n" not in str(e.value)


def test_the_sound_of_a_video_without_end_is_as_long_as_its_file(tmp_path: Path) -> None:
    late = str(claps.write(tmp_path / "late.mp4", seconds=4.0, heard=(3.0, 4.0)))
    whole = soundtrack.beginning(late, 48_000, 2, 1e12)
    assert abs(len(whole) / 48_000 - 4.0) < 0.05 and not whole[: 2 * 48_000].any() and whole.any()
    np.testing.assert_array_equal(soundtrack.beginning(late, 48_000, 2, 3.5), whole[: round(3.5 * 48_000)])


def test_a_served_model_takes_no_sound(models: Path) -> None:
    generator = prior(models, "base")
    with pytest.raises(UserError, match="audio") as e:
        serving.serve(generator, {"seed": [1], "audio": ["x.wav"], "frames": [8]}, {})
    assert "\n" not in str(e.value)
    assert serving.serve(generator, {"seed": [1], "frames": [8]}, {}).shape == (1, 8, 16, 16, 3)
