"""`longtake retrieve`, and what a memory is recalled by: pictures, which frames, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from priors import awake, longtake, save_vae

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.infra.cli import media
from longtake.training.models.memory import recall
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.prior import MemoryPrior, load_prior
from longtake.training.registry import disk
from longtake.training.registry import requests as serving

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vae`, `holder`, which retrieves from 8 steps (29 frames) at 12 a second, `none` and `teller`."""
    folder = tmp_path_factory.mktemp("models")
    vae = save_vae(folder / "vae")
    small: dict[str, Any] = {"depth": 2, "width": 24, "heads": 2, "channels": 8, "rates": ("2x2x2",)}
    small |= {"memory_widths": (4, 8), "memory_heads": 2, "history": 9, "shape": (3, 2, 4), "window": 2}
    facts: dict[str, Any] = {
        "lineage": {},
        "rates": ["2x2x2"],
        "classes": [],
        "window": {"frames": 9, "steps": 3, "factor": 4, "fps": 12.0, "size": [32, 64]},
        "sampling": {"steps": 2, "guidance": 1.0, "shift": 1.0},
        "vae": {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)},
    }
    for name, stage, changes in (
        ("holder", "retrieval", {}),
        ("none", "retrieval", {"memory": "none"}),
        ("teller", "generation", {}),
    ):
        model = awake(MemoryDiT(MemoryDiTConfig(**small | changes)))
        config = model.config.model_dump(mode="json")
        disk.save(folder / name, "memory_dit", config, model.state_dict(), facts | {"stage": stage})
    return folder


@pytest.fixture(scope="module")
def prior(models: Path) -> MemoryPrior:
    return load_prior(str(models / "holder"), "retrieval")


def footage(frames: int, size: tuple[int, int] = (32, 64)) -> np.ndarray:
    """Frame n is a ramp from left to right that has moved n steps on."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    still = np.stack([columns * 2, rows * 3, columns + rows], -1)
    return np.stack([(still + 4 * n) % 200 for n in range(frames)]).astype(np.uint8)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 frames at 12 a second, which are two stretches of 29 and some more."""
    path = tmp_path_factory.mktemp("video") / "in.mp4"
    clip.write(path, footage(70), 12)
    return path


def test_a_picture_has_the_true_frame_beside_the_retrieved_one(models: Path, video: Path, tmp_path: Path) -> None:
    said = longtake("retrieve", models / "holder", video, "--at", "0s,2.0,5.5s", "--out", tmp_path / "out").stdout
    names = ["0s.png", "2s.png", "5.5s.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    source = clip.decode(video.read_bytes())
    for name, number in zip(names, (0, 24, 66), strict=True):
        both = np.asarray(Image.open(tmp_path / "out" / name))
        assert both.shape == (32, 128, 3)
        assert np.abs(both[:, :64].astype(int) - source[number]).mean() < 4
        assert np.abs(both[:, :64].astype(int) - both[:, 64:]).mean() > 10
        found = re.search(rf"{name}: PSNR (\S+) dB; of the autoencoder alone (\S+) dB", said)
        assert found
        error = np.square((both[:, :64].astype(float) - both[:, 64:]) / 255).mean()
        assert abs(float(found[1]) + 10 * np.log10(error)) < 0.01


def test_a_frame_is_retrieved_from_the_memory_of_its_own_stretch(
    models: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = clip.decode(video.read_bytes()), []
    original = recall.recall

    def noted(prior: MemoryPrior, frames: np.ndarray, last: int, *more: Any) -> Any:
        distances = [np.abs(source[n].astype(int) - frames[0]).mean() for n in range(len(source))]
        asked.append((int(np.argmin(distances)), len(frames), last))
        return original(prior, frames, last, *more)

    monkeypatch.setattr(recall, "recall", noted)
    longtake("retrieve", models / "holder", video, "--at", "5.8s,0.5s,1s,2.5s", "--out", tmp_path)
    assert asked == [(0, 29, 12), (29, 29, 1), (41, 29, 28)]


def test_of_a_short_video_both_ends_can_be_retrieved(models: Path, tmp_path: Path) -> None:
    clip.write(tmp_path / "short.mp4", footage(8), 12)
    longtake("retrieve", models / "holder", tmp_path / "short.mp4", "--at", "0s,0.6s", "--out", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0s.png", "0.6s.png"}


@pytest.mark.parametrize(
    ("model", "at", "said"),
    [
        ("holder", "soon", "--at: 'soon' is no time"),
        ("holder", "1s,,2s", "--at: '' is no time"),
        ("holder", "6s", r"in\.mp4: lasts 5\.833 s; --at 6s is beyond"),
        ("teller", "1s", "a MemoryDiT that does generation, which retrieves nothing; name a model that was trained to"),
        ("vae", "1s", "which retrieves nothing; name a model that was trained to"),
        ("none", "1s", "this model has no memory to retrieve from"),
        ("nowhere", "1s", "no longtake model here"),
    ],
)
def test_what_cannot_be_retrieved_is_said_in_one_line(
    models: Path, video: Path, tmp_path: Path, model: str, at: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as e:
        longtake("retrieve", models / model, video, "--at", at, "--out", tmp_path)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_video_too_short_for_a_memory_is_refused(models: Path, tmp_path: Path) -> None:
    clip.write(tmp_path / "short.mp4", footage(4), 12)
    with pytest.raises(UserError, match=r"short\.mp4: has 4 frames at 12 a second; a memory takes 5 or more"):
        longtake("retrieve", models / "holder", tmp_path / "short.mp4", "--at", "0s", "--out", tmp_path)
    with pytest.raises(UserError, match="no such video file"):
        longtake("retrieve", models / "holder", tmp_path / "none.mp4", "--at", "0s", "--out", tmp_path)


def test_what_is_recalled_comes_from_the_memory_and_not_from_the_frames_themselves(prior: MemoryPrior) -> None:
    """With a memory of something else, what is retrieved is the same but for what the memory says."""
    one, bound = recall.recall(prior, footage(29), 8)
    assert one.shape == bound.shape == (9, 32, 64, 3)
    again, _ = recall.recall(prior, footage(29), 8)
    np.testing.assert_array_equal(one, again)
    other, other_bound = recall.recall(prior, 255 - footage(29), 8)
    assert (one != other).any() and (bound != other_bound).any()
    remembered = torch.zeros(1)

    class Empty(MemoryDiT):
        def remember(self, *arguments: Any, **named: Any) -> Any:
            memory = super().remember(*arguments, **named)
            return memory._replace(tokens=memory.tokens * 0 + remembered)

    empty = Empty(prior.model.config)
    empty.load_state_dict(prior.model.state_dict())
    blind = MemoryPrior(**vars(prior) | {"model": empty.eval()})
    np.testing.assert_array_equal(
        recall.recall(blind, footage(29), 8)[0], recall.recall(blind, 255 - footage(29), 8)[0]
    )


def test_steps_that_are_retrieved_in_any_order_are_shown_in_their_own(
    prior: MemoryPrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a retrieval that gives back the truth, what is shown is what the autoencoder alone makes of it."""
    frames, asked = footage(29), []
    truth = recall.encode_video(prior.model, prior.codec, torch.from_numpy(frames).permute(3, 0, 1, 2)[None]).high

    def perfect(model: MemoryDiT, memory: Any, times: list[int], *more: Any) -> torch.Tensor:
        asked.append(times)
        return truth[:, :, times]

    monkeypatch.setattr(recall.retrieval, "retrieve", perfect)
    for last, steps in ((28, 8), (13, 5), (12, 4), (0, 1)):
        made, bound = recall.recall(prior, frames, last)
        np.testing.assert_array_equal(made, bound)
        assert len(made) == 1 + 4 * (steps - 1) > last and sorted(asked[-1]) == list(range(steps))
    assert asked[0] != sorted(asked[0])


def test_as_many_latents_are_retrieved_together_as_training_did(models: Path, tmp_path: Path) -> None:
    model, facts = disk.load(models / "holder"), disk.read_config(models / "holder") | {"retrieved": 1}
    disk.save(tmp_path / "one", "memory_dit", facts["config"], model.state_dict(), facts)
    for folder, count in ((tmp_path / "one", 1), (models / "holder", 4)):
        prior, counts = load_prior(str(folder), "retrieval"), set[int]()
        prior.model.register_forward_pre_hook(lambda _, given, counts=counts: counts.add(given[0].shape[2]))
        recall.recall(prior, footage(29))
        assert counts == {count}


def test_the_bound_is_what_the_autoencoder_makes_of_the_frames(prior: MemoryPrior) -> None:
    frames = footage(29)
    _, bound = recall.recall(prior, frames)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    made = prior.codec.reconstruct(video)[0].permute(1, 2, 3, 0).add(1).mul(127.5).round().numpy()
    assert np.abs(bound - made).max() <= 1


def test_how_much_a_memory_takes_at_once(prior: MemoryPrior) -> None:
    assert [prior.holds(n) for n in (0, 1, 4, 5, 12, 13, 28, 29, 33, 1000)] == [0, 0, 0, 5, 5, 13, 21, 29, 29, 29]


@pytest.mark.parametrize(("frames", "taken"), [(5, 5), (8, 5), (13, 13), (40, 29)])
def test_a_start_is_the_end_of_its_video_in_whole_groups(prior: MemoryPrior, frames: int, taken: int) -> None:
    video = footage(40)[:frames]
    pixels = torch.from_numpy(video[-taken:]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        latent = prior.codec.encode(pixels).mode()
    torch.testing.assert_close(prior.begin(iter(video)).mean, latent, atol=1e-4, rtol=1e-4)


def test_a_served_memory_gives_what_it_has_kept_of_videos(prior: MemoryPrior) -> None:
    videos = np.stack([footage(13), 255 - footage(13)])
    made = recall.recall_each(prior, videos)
    assert made.shape == (2, 13, 32, 64, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal(made[1], recall.recall(prior, videos[1])[0])
    for wrong, said in (
        (videos[0], "need a uint8 array"),
        (videos.astype(float), "needs a uint8 array"),
        ("x", "got str"),
        (videos[:, :3], "has 3 frames; a memory takes at least 5"),
        (videos[:, :, :, :40], "video is 32x40"),
    ):
        with pytest.raises(UserError, match=said):
            recall.recall_each(prior, wrong)


def test_a_served_teller_takes_a_table_with_storyboards(models: Path) -> None:
    import pandas

    teller = load_prior(str(models / "teller"), "generation")
    videos = serving.serve(teller, pandas.DataFrame({"seed": [1, 2], "frames": [17, 17]}))
    assert videos.shape == (2, 17, 32, 64, 3)
    np.testing.assert_array_equal(videos[1], next(iter(serving.serve(teller, {"seed": [2], "frames": [17]}))))
    board = [{"at": 0, "class": None}]
    for given in (board, '[{"at": "0s", "class": null}]'):
        told = serving.serve(teller, {"seed": [1], "frames": [17], "storyboard": [given]})
        np.testing.assert_array_equal(told[0], videos[0])
    for columns, said in (
        ({"storyboard": [[{"at": 0}]]}, "videos: storyboard: entry 1 needs `at` and `class` or `prompt`, and has at"),
        ({"storyboard": ["["]}, "videos: storyboard: Expecting value"),
        ({"storyboard": [[{"at": 99, "class": None}]]}, "videos: storyboard: entry 1: at: 99 s is beyond the end"),
        ({"storyboard": [board], "class": ["x"]}, "class and storyboard: give one of them"),
        ({"class": ["x"]}, "this model has no classes"),
        ({"frames": [10]}, "such as 9 or 13"),
    ):
        with pytest.raises(UserError, match=said):
            serving.serve(teller, {"seed": [1]} | columns)


def test_what_mlflow_serves_is_what_the_model_was_trained_for(models: Path, prior: MemoryPrior) -> None:
    from types import SimpleNamespace

    from longtake.training.registry.pyfunc import Videos

    def predicted(name: str, given: Any) -> np.ndarray:
        served = Videos()
        served.load_context(SimpleNamespace(artifacts={"model": str(models / name)}))
        return served.predict(None, given)

    kept = recall.recall_each(prior, footage(13)[None])
    np.testing.assert_array_equal(predicted("holder", footage(13)[None]), kept)
    np.testing.assert_array_equal(predicted("holder", footage(13)[None].tolist()), kept)
    assert predicted("teller", {"seed": [1]}).shape == (1, 9, 32, 64, 3)
    assert predicted("vae", footage(13)[None]).shape == (1, 13, 32, 64, 3)


@pytest.mark.parametrize(
    ("rate", "taken"), [(12, [0, 1, 2, 3]), (12.001, [0, 1, 2, 3]), (6, [0, 2, 4, 6]), (24, [0, 0, 1, 1])]
)
def test_a_video_of_another_rate_and_size_is_seen_as_the_model_has_learned(
    tmp_path: Path, rate: float, taken: list[int]
) -> None:
    frames = np.stack([np.full((48, 40, 3), 20 * n, np.uint8) for n in range(10)])
    clip.write(tmp_path / "in.mp4", frames, 12, crf=4)
    found = list(media.frames_at(str(tmp_path / "in.mp4"), (32, 64), rate))
    assert len(found) == round(10 * rate / 12) and all(frame.shape == (32, 64, 3) for frame in found)
    assert [round(float(frame.mean()) / 20) for frame in found[:4]] == taken
