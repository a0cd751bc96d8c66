"""Videos from a prior and through an autoencoder: in a stream, the same by seed, of any length, and as they are served."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from priors import awake

from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import to_model
from longtake.training.models.common.codec import Pixels, load_codec, reconstruct_video, to_array
from longtake.training.models.common.condition import of_classes
from longtake.training.models.common.video import concatenated, grid, video_file
from longtake.training.models.generator import Settings, class_id
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.models.latte.sample import Prior, generate, generate_videos, load_prior
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk
from longtake.training.registry import requests as serving

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(steps=2, overlap=1)
SMALL = LatteConfig(depth=2, width=32, heads=2, channels=8, classes=3, shape=(3, 2, 2))


@pytest.fixture(scope="module")
def vae() -> PVVAE:
    tiny = config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)
    return awake(PVVAE(tiny))


@pytest.fixture(scope="module")
def prior() -> Latte:
    return awake(Latte(SMALL))


def made(prior: Latte, vae: Any, frames: int = 9, seeds: tuple[int, ...] = (1,), **more: Any) -> np.ndarray:
    return concatenated(generate_videos(prior, vae, frames, seeds, settings=more.pop("settings", QUICK), **more))


def test_the_same_seed_makes_the_same_video_whoever_else_is_made(prior: Latte, vae: PVVAE) -> None:
    one = made(prior, vae)
    assert one.shape == (1, 9, 32, 32, 3) and one.dtype == np.uint8 and one.std() > 5
    np.testing.assert_array_equal(one, made(prior, vae))
    both = made(prior, vae, seeds=(2, 1))
    assert np.abs(both[1].astype(int) - one[0]).max() <= 1
    assert np.abs(both[0].astype(int) - one[0]).mean() > 3


def test_the_class_and_the_guidance_matter(prior: Latte, vae: PVVAE) -> None:
    free, first, second = (made(prior, vae, condition=c) for c in (None, of_classes([0]), of_classes([1])))
    assert (free != first).any() and (first != second).any()
    np.testing.assert_array_equal(free, made(prior, vae, condition=of_classes([-1])))
    np.testing.assert_array_equal(free, made(prior, vae, settings=Settings(steps=2, overlap=1, guidance=3.0)))
    strong = made(prior, vae, condition=of_classes([0]), settings=Settings(steps=2, overlap=1, guidance=3.0))
    assert (strong != first).any()


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 29])
def test_videos_are_as_long_as_asked_and_longer_ones_begin_with_the_shorter(
    prior: Latte, vae: PVVAE, frames: int
) -> None:
    video = made(prior, vae, frames)
    assert video.shape[1] == frames
    reference = made(prior, vae, 33)[:, :frames]
    # the shared frames are decoded in other pieces
    assert np.abs(video.astype(int) - reference).max() <= 1


def test_a_stream_is_what_decoding_all_latents_at_once_gives(prior: Latte, vae: PVVAE) -> None:
    video = made(prior, vae, 21)
    latent = torch.cat(list(generate(prior, 6, [1], settings=QUICK)), 2)
    with torch.no_grad():
        reference = to_array(vae.decode(latent))
    assert np.abs(video.astype(int) - reference).max() <= 1


def test_the_first_frames_come_before_the_last_are_made(prior: Latte, vae: PVVAE) -> None:
    steps: list[int] = []
    chunks = generate_videos(prior, vae, 81, [0], settings=QUICK, each_step=lambda: steps.append(1))
    assert not steps
    first = next(chunks)
    assert first.shape[1] == 1 and len(steps) == QUICK.steps
    rest = sum(chunk.shape[1] for chunk in chunks)
    assert rest == 80 and len(steps) == bundle(prior, vae).rounds(81, QUICK) == 10 * QUICK.steps


def bundle(prior: Latte, vae: Any, classes: tuple[str, ...] = ("cat", "dog", "7")) -> Prior:
    return Prior(prior, vae, classes, 9, 12.0, (32, 32), QUICK)


@pytest.mark.parametrize(("frames", "near"), [(6, "5 or 9"), (10, "9 or 13"), (0, "1"), (4, "1 or 5")])
def test_frames_that_no_latents_are_of_are_refused_with_the_nearest_two(
    prior: Latte, vae: PVVAE, frames: int, near: str
) -> None:
    with pytest.raises(ValueError, match=rf"frames is {frames}.*such as {near}"):
        generate_videos(prior, vae, frames, [0])


def test_a_prior_of_other_latents_is_refused(vae: PVVAE) -> None:
    with pytest.raises(ValueError, match="64 channels, the autoencoder 8"):
        generate_videos(Latte(LatteConfig(depth=2, width=32, heads=2, shape=(3, 2, 2))), vae, 9, [0])


def test_a_prior_of_pixels_needs_no_autoencoder() -> None:
    pixels = awake(Latte(LatteConfig(depth=2, width=32, heads=2, channels=3, patch=16, shape=(4, 32, 48))))
    assert made(pixels, Pixels(), 4).shape == (1, 4, 32, 48, 3)
    assert made(pixels, Pixels(), 6).shape == (1, 6, 32, 48, 3)


def test_a_class_has_a_name_and_a_number() -> None:
    known = ("cat", "dog", "7")
    assert [class_id(c, known) for c in ("dog", "1", "7", None)] == [1, 1, 2, -1]
    for wrong, said in (
        ("dgo", "3 classes, by name such as dog"),
        ("3", "by number 0 to 2"),
        ("-1", "by number 0 to 2"),
    ):
        with pytest.raises(UserError, match=said):
            class_id(wrong, known)
    with pytest.raises(UserError, match="has no classes"):
        class_id("0", ())


def save(folder: Path, prior: Latte, vae: PVVAE | None) -> tuple[str, str]:
    """A prior and its autoencoder as model folders."""
    facts: dict[str, Any] = {
        "classes": ["cat", "dog", "7"],
        "window": {"frames": 9, "fps": 12.0, "size": [32, 32]},
        "lineage": {},
    }
    facts |= {"sampling": vars(QUICK), "vae": None}
    if vae:
        disk.save(folder / "vae", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}})
        facts["vae"] = {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)}
    disk.save(folder / "latte", "latte", prior.config.model_dump(mode="json"), prior.state_dict(), facts)
    return str(folder / "latte"), str(folder / "vae")


def test_a_saved_prior_finds_its_autoencoder_and_makes_the_same_videos(
    prior: Latte, vae: PVVAE, tmp_path: Path
) -> None:
    uri, _ = save(tmp_path, prior, vae)
    loaded = load_prior(uri)
    assert (loaded.classes, loaded.frames, loaded.fps, loaded.settings) == (("cat", "dog", "7"), 9, 12.0, QUICK)
    np.testing.assert_array_equal(made(loaded.latte, loaded.codec), made(prior, vae))


def test_another_decoder_is_taken_and_another_encoder_is_not(prior: Latte, vae: PVVAE, tmp_path: Path) -> None:
    uri, _ = save(tmp_path, prior, vae)
    other = PVVAE(vae.config)
    other.load_state_dict(vae.state_dict())
    with torch.no_grad():
        other.decoder[0].weight.mul_(1.1)
    _, decoder = save(tmp_path / "decoder", prior, other)
    assert load_prior(uri, decoder).codec is not None
    with torch.no_grad():
        other.encoder[0].weight.mul_(1.1)
    _, encoder = save(tmp_path / "encoder", prior, other)
    with pytest.raises(UserError, match="another encoder than the latents"):
        load_prior(uri, encoder)
    with pytest.raises(UserError, match="is a PVVAE, which generates no videos"):
        load_prior(decoder)
    with pytest.raises(UserError, match="is a Latte, not a video autoencoder"):
        load_codec(uri)


def test_half_precision_makes_nearly_the_same_video(prior: Latte, vae: PVVAE, tmp_path: Path) -> None:
    uri, _ = save(tmp_path, prior, vae)
    half = load_prior(uri, dtype=torch.bfloat16)
    close = np.abs(made(half.latte, half.codec).astype(int) - made(prior, vae)).mean()
    assert 0 < close < 15


def test_a_grid_shows_every_video_once() -> None:
    videos = np.stack([np.full((2, 4, 6, 3), n + 1, np.uint8) for n in range(5)])
    sheet = grid(videos)
    assert sheet.shape == (2, 2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    assert sorted(np.unique(sheet)) == [0, 1, 2, 3, 4, 5]
    assert all((sheet == n).sum() == videos[0].size for n in range(1, 6))
    np.testing.assert_array_equal(grid(videos[:1]), videos[0])


def test_a_file_of_the_same_frames_has_the_same_bytes_however_they_come(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    for name, pieces in (("one", [9]), ("two", [1, 4, 4])):
        with video_file(tmp_path / f"{name}.mp4", 12.5) as write:
            for piece in np.split(frames, np.cumsum(pieces)[:-1]):
                write(piece)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    with av.open(str(tmp_path / "one.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.width, stream.height, float(stream.average_rate)) == (9, 48, 32, 12.5)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), video_file(tmp_path / "x.mp4", 12) as write:
        write(np.zeros((3, 32, 32, 3), np.uint8))
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())


def noise(frames: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (frames, 32, 48, 3), np.uint8)


def at_once(vae: PVVAE, frames: np.ndarray, visible: int | None = None) -> np.ndarray:
    video = to_model(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
    return to_array(vae.reconstruct(video, visible))[0]


@pytest.mark.parametrize(("frames", "visible"), [(1, None), (21, None), (37, 9), (21, 1), (21, 21)])
def test_a_streamed_reconstruction_is_that_of_the_whole_video(vae: PVVAE, frames: int, visible: int | None) -> None:
    source = noise(frames)
    shown, ours = (np.concatenate(part) for part in zip(*reconstruct_video(vae, source, visible, chunk=2), strict=True))
    np.testing.assert_array_equal(shown, source)
    assert np.abs(ours.astype(int) - at_once(vae, source, visible)).max() <= 1


def test_any_number_of_frames_is_reconstructed(vae: PVVAE) -> None:
    for frames in (2, 8, 20):
        pairs = list(reconstruct_video(vae, noise(frames), chunk=2))
        assert sum(len(ours) for _, ours in pairs) == frames
        np.testing.assert_array_equal(np.concatenate([shown for shown, _ in pairs]), noise(frames))
    assert sum(len(ours) for _, ours in reconstruct_video(vae, noise(20), visible=9)) == 20


def test_a_long_video_is_read_no_further_than_it_is_shown(vae: PVVAE) -> None:
    read: list[int] = []
    endless = (read.append(1) or frame for frame in itertools.cycle(noise(7)))
    stream = reconstruct_video(vae, endless, chunk=2)
    shown = 0
    for _ in range(6):
        shown += len(next(stream)[0])
        assert len(read) <= shown + 2 * 2 * 4
    assert shown > 30


def test_frames_that_cannot_be_visible_are_refused(vae: PVVAE) -> None:
    with pytest.raises(ValueError, match=r"visible is 4.*such as 1 or 5"):
        next(reconstruct_video(vae, noise(9), visible=4))
    with pytest.raises(ValueError, match="visible is 13, but the video has only 9 frames"):
        list(reconstruct_video(vae, noise(9), visible=13))
    with pytest.raises(ValueError, match="no frame"):
        next(reconstruct_video(vae, []))


def test_a_served_prior_takes_a_table_and_gives_videos(prior: Latte, vae: PVVAE) -> None:
    import pandas

    known = bundle(prior, vae)
    table = pandas.DataFrame({"seed": [1, 1, 2], "class": ["dog", None, "0"]})
    videos = serving.serve(known, table)
    assert videos.shape == (3, 9, 32, 32, 3) and videos.dtype == np.uint8
    np.testing.assert_array_equal(videos[0], made(prior, vae, condition=of_classes([1]))[0])
    np.testing.assert_array_equal(videos[1], made(prior, vae)[0])
    np.testing.assert_array_equal(serving.serve(known, [{"seed": 1, "class": "dog"}, {"seed": 1}]), videos[:2])
    longer = serving.serve(known, {"seed": np.array([1]), "frames": [13]}, {"steps": 3, "guidance": None})
    np.testing.assert_array_equal(longer, made(prior, vae, 13, settings=Settings(steps=3, overlap=1)))


@pytest.mark.parametrize(
    ("given", "params", "said"),
    [
        ({"class": ["dog"]}, {}, "need a column seed"),
        ({"seed": [1], "colour": ["red"]}, {}, "got seed, colour"),
        ({"seed": []}, {}, "at least one row"),
        (np.zeros(3), {}, "need a table, or a list of rows, got ndarray"),
        ({"seed": [1.5]}, {}, "seed must be a whole number, got 1.5"),
        ({"seed": [1, 2], "frames": [9, 13]}, {}, "the same in every row"),
        ({"seed": [1], "frames": [10]}, {}, "such as 9 or 13"),
        ({"seed": [1], "class": ["cow"]}, {}, "by number 0 to 2"),
        ({"seed": [1]}, {"speed": 2}, "unknown speed"),
        ({"seed": [1]}, {"steps": 0}, "needs at least 1"),
        ({"seed": [-1]}, {}, "seed must not be negative"),
    ],
)
def test_what_a_served_prior_cannot_do_it_says_in_one_line(
    prior: Latte, vae: PVVAE, given: Any, params: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        serving.serve(bundle(prior, vae), given, params)
