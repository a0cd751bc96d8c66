"""What models make for an evaluation: made once, kept without loss, at the suite's rate and size, and read in chunks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import judged
import numpy as np
import pytest
import torch

from longtake.datasets.errors import Failure, UserError
from longtake.training.evaluation import asking, subject, videos, windows
from longtake.training.evaluation.made import Made
from longtake.training.evaluation.material import Generated
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Networks, Suite, Videos
from longtake.training.models.generator import Settings
from longtake.training.models.latte.sample import Prior

pytestmark = pytest.mark.usefixtures("one_thread")


def material_of(squares: str, folder: Path, suite: Suite | None = None) -> Made:
    return Made(squares, None, suite or judged.suite(), Networks(), folder / "videos")


def whole(made: Generated) -> torch.Tensor:
    return torch.cat(list(made.frames()), 2)


def test_a_video_is_kept_without_loss_and_its_copy_can_be_looked_at(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 33, 48, 3), dtype=np.uint8)
    kept = videos.keep(tmp_path / "v", frames, 7.5, {"seed": 3})
    found = videos.find(tmp_path / "v")
    assert found == kept
    assert (np.stack(list(kept.frames())) == frames).all()
    facts = {name: value for name, value in kept.facts.items() if name not in ("seconds", "sha256")}
    assert facts == {"seed": 3, "frames": 5, "fps": 7.5, "size": [33, 48]}
    assert (tmp_path / "v" / videos.SHOWN).stat().st_size > 0
    assert videos.find(tmp_path / "other") is None
    (tmp_path / "v" / videos.LOSSLESS).write_bytes(b"no video")
    with pytest.raises(Failure, match=r"damaged .*; delete its folder and run the same command again"):
        list(kept.frames())


def test_a_kept_video_with_another_byte_is_no_video(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    kept = videos.keep(tmp_path, frames, 12, {})
    data = bytearray((tmp_path / videos.LOSSLESS).read_bytes())
    data[len(data) // 2] ^= 0xFF  # which a decoder may show as another colour
    (tmp_path / videos.LOSSLESS).write_bytes(data)
    with pytest.raises(Failure, match=r"video.mkv: damaged .*its bytes are not those that were written"):
        list(kept.frames())


@pytest.mark.parametrize("lost", [videos.LOSSLESS, videos.SHOWN])
def test_a_video_that_has_lost_a_file_is_not_there(tmp_path: Path, lost: str) -> None:
    videos.keep(tmp_path, np.zeros((2, 32, 32, 3), np.uint8), 12, {})
    (tmp_path / lost).unlink()
    assert videos.find(tmp_path) is None


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_damaged_facts_of_a_video_are_named(tmp_path: Path, text: str) -> None:
    videos.keep(tmp_path, np.zeros((2, 32, 32, 3), np.uint8), 12, {})
    (tmp_path / videos.FACTS).write_text(text)
    with pytest.raises(Failure, match=r"video.json: damaged .*; delete its folder and run the same command again"):
        videos.find(tmp_path)


def test_videos_are_made_once_for_a_prompt_seed_length_and_settings(
    models: Path, squares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    plain = Prior.videos
    monkeypatch.setattr(Prior, "videos", lambda *a, **k: calls.append(a) or plain(*a, **k))
    model = subject.load(str(models / "latte"))
    first = list(material_of(squares, tmp_path).generated(model, Videos(frames=9, seeds=(0, 1))))
    again = list(material_of(squares, tmp_path).generated(model, Videos(frames=9, seeds=(0, 1, 2))))
    assert len(calls) == 3
    assert torch.equal(whole(first[1]), whole(again[1]))
    # a process that is killed as soon as a video is whole leaves its parts
    (left := (tmp_path / first[0].file).parent / "parts").mkdir()
    list(material_of(squares, tmp_path).generated(model, Videos(frames=9, seeds=(0,))))
    assert not left.exists() and len(calls) == 3
    # a shorter one is the beginning of one that needs as many latents, as another suite of other clips is
    list(material_of(squares, tmp_path, judged.suite(seed=4)).generated(model, Videos(frames=8, seeds=(0,))))
    assert len(calls) == 3
    list(
        material_of(squares, tmp_path, judged.suite(settings={"steps": 1})).generated(
            model, Videos(frames=9, seeds=(0,))
        )
    )
    list(material_of(squares, tmp_path).generated(model, Videos(frames=10, seeds=(0,))))
    assert len(calls) == 5


def test_a_model_without_prompts_makes_as_many_videos_of_further_seeds(
    models: Path, squares: str, tmp_path: Path
) -> None:
    suite = judged.suite(prompts=("a", "b", "c"), videos=[{"frames": 9, "seeds": (0, 4)}])
    found = {
        prompted: asking.wanted(
            SimpleNamespace(accepts={"prompt"} if prompted else set(), classes=()), (0, 4), suite.prompts, ()
        )  # type: ignore[arg-type]
        for prompted in (True, False)
    }
    assert [(each.words, each.request.seed) for each in found[True]] == [(p, s) for p in "abc" for s in (0, 4)]
    assert [(each.words, each.request.seed) for each in found[False]] == [(None, s) for s in (0, 4, 5, 6, 7, 8)]
    assert windows.conditions(suite)["generated"] == 6
    assert windows.conditions(suite.model_copy(update={"prompts": None}))["generated"] == 2

    made = material_of(squares, tmp_path, suite)
    assert len(list(made.generated(subject.load(str(models / "latte")), suite.videos[0]))) == 6
    assert "takes no prompts; its videos are of as many seeds" in made.told()[1]


@pytest.mark.parametrize("seeds", [[], [1, 2, 1]])
def test_a_video_is_made_of_each_seed_once(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"seeds"):
        Videos(frames=9, seeds=seeds)  # type: ignore[arg-type]


def test_a_generated_video_is_what_the_command_makes(models: Path, squares: str, tmp_path: Path) -> None:
    from priors import longtake

    from longtake.datasets import clip

    longtake("generate", models / "latte", "--seed", 1, "--class", "dog", "--out", tmp_path / "x.mp4")
    model = subject.load(str(models / "latte"))
    made = list(material_of(squares, tmp_path).generated(model, Videos(frames=9, seeds=(0, 1))))[1]
    assert (tmp_path / made.file).read_bytes() == (tmp_path / "x.mp4").read_bytes()
    assert clip.decode((tmp_path / "x.mp4").read_bytes()).shape[0] == 9


def test_other_rates_and_sizes_are_resampled_and_said(models: Path, squares: str, tmp_path: Path) -> None:
    made = material_of(squares, tmp_path, judged.suite(clips={"frames": 9, "size": (32, 32), "fps": 24.0}))
    [video] = made.generated(subject.load(str(models / "tats")), Videos(frames=20, seeds=(0,)))
    frames = whole(video)
    assert frames.shape == (1, 3, 20, 32, 32)
    assert torch.equal(frames[:, :, ::2], frames[:, :, 1::2])  # each frame is seen twice
    assert video.own == list(range(0, 20, 2))
    assert made.told()[1] == [
        "12 frames a second, sampled at the suite's 24",
        "frames of 16x16, scaled and cropped to the suite's 32x32",
    ]
    [kept] = [path.parent for path in (tmp_path / "videos").glob("*/*/video.json")]
    own = np.stack(list(videos.find(kept).frames()))  # type: ignore[union-attr]
    assert own.shape[1:3] == (16, 16)
    nearest = torch.nn.functional.interpolate(
        torch.from_numpy(own[:10]).permute(3, 0, 1, 2)[None].float(), (10, 32, 32), mode="trilinear"
    )
    assert (frames[:, :, ::2].float() - nearest).abs().mean() < 4


def test_gaps_are_cut_where_the_clip_says_and_filled_at_the_models_rate(
    models: Path, squares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject.load(str(models / "mavin"))
    made, given = material_of(squares, tmp_path), []
    door = made.infiller(model)
    plain = type(door).fill
    monkeypatch.setattr(
        type(door), "fill", lambda self, gaps, *a, **k: given.append(gaps[0]) or plain(self, gaps, *a, **k)
    )
    filled = list(made.filled(model))
    assert len(filled) == 2 * 4  # draws of each clip
    one = filled[0]
    assert (one.begin, one.made.shape, one.clip.video.shape) == (4, (1, 3, 4, 32, 32), (1, 3, 12, 32, 32))
    assert not torch.equal(filled[0].made, filled[1].made)
    # 4 frames of 12 a second last as long as 2.7 of 8
    assert one.own == [0, 1, 3, 4, 6, 7, 9, 10]
    assert (len(given[0].before), given[0].frames, len(given[0].after)) == (2, 3, 2)
    source = one.clip.video[0].permute(1, 2, 3, 0).cpu().numpy()
    # 2 frames of 8 a second begin a quarter of a second before the gap, 3 frames of 12 a second
    assert (given[0].before[0] == source[1]).all()
    assert not next(made.filled(model)).made.is_floating_point()
    assert len(given) == 8


def test_retrieved_frames_lie_beside_those_that_were_there(models: Path, squares: str, tmp_path: Path) -> None:
    model = subject.load(str(models / "holder"))
    made = material_of(squares, tmp_path, judged.suite(clips={"frames": 9, "size": (32, 32), "most": 2}))
    kept = list(made.retrieved(model))
    assert len(kept) == 2
    assert kept[0].source.shape == kept[0].made.shape == kept[0].bound.shape
    [part, _] = made.parts("retrieves")
    again = np.stack(list(made._heldout.frames(part, kept[0].source.shape[2], 12, (32, 32))))
    assert (kept[0].source[0].permute(1, 2, 3, 0).numpy() == again).all()


def test_a_memory_is_given_clips_that_touch_as_one(models: Path, long_squares: str, tmp_path: Path) -> None:
    model = subject.load(str(models / "holder"))
    made = material_of(long_squares, tmp_path, judged.suite(seconds=4.0))
    with pytest.raises(UserError, match=r"holder: its memory holds 1.75 s, and does not compare with others of 4"):
        list(made.retrieved(model))
    made.told()
    for part in made.parts("retrieves"):
        assert [row["source"] for row in part.rows] == [part.source] * 2
    with pytest.raises(UserError, match=r"no held-out clip has 48 frames .*: the longest held-out clip lasts 3 s"):
        material_of(long_squares, tmp_path, judged.suite(clips={"frames": 48, "size": (32, 32)})).parts("reconstructs")
    with pytest.raises(UserError, match=r"the longest held-out clips without a hole last 8 s"):
        material_of(long_squares, tmp_path, judged.suite(seconds=9.0)).parts("retrieves")


def test_what_a_memory_rounds_away_is_said(models: Path, squares: str, tmp_path: Path) -> None:
    made = material_of(squares, tmp_path, judged.suite(clips={"frames": 9, "size": (32, 32), "most": 1}))
    list(made.retrieved(subject.load(str(models / "holder"))))
    assert "5 of 12 frames are retrieved, those that fill its memory's latents" in made.told()[1]


def test_reconstructions_of_lengths_that_do_not_divide_are_as_long_as_the_clip(
    models: Path, squares: str, tmp_path: Path
) -> None:
    for name in ("vae", "vqgan"):
        made = material_of(squares, tmp_path, judged.suite(clips={"frames": 10, "size": (32, 32), "most": 1}))
        [(clip, copy)] = made.reconstructed(subject.load(str(models / name)))
        assert clip.video.shape == copy.shape == (1, 3, 10, 32, 32)
        assert copy.dtype == torch.uint8
    odd = material_of(squares, tmp_path, judged.suite(clips={"frames": 9, "size": (24, 24), "most": 1}))
    with pytest.raises(UserError, match=r"vae: .*multiples of"):
        list(odd.reconstructed(subject.load(str(models / "vae"))))


class Long:
    """A generator whose frames are counted while they live."""

    accepts, classes, frames, fps, size = frozenset[str](), (), 16, 24.0, (16, 16)
    settings = Settings()
    alive, most = 0, 0

    def check_prompts(self, prompts: Any) -> None:
        raise AssertionError

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        return round(seconds * fps)

    def joints(self, frames: int, settings: Settings, start: Any = None) -> list[int]:
        return list(range(16, frames, 16))

    def videos(self, requests: Any, frames: int, settings: Settings, **_: Any) -> Iterator[np.ndarray]:
        for start in range(0, frames, 16):
            chunk = np.full((1, min(16, frames - start), 16, 16, 3), start % 256, np.uint8)
            Long.alive += 1
            Long.most = max(Long.most, Long.alive)
            weakref.finalize(chunk, self._dead)
            yield chunk

    def _dead(self) -> None:
        Long.alive -= 1


def test_a_long_video_is_never_whole_in_memory(squares: str, tmp_path: Path) -> None:
    kind = SimpleNamespace(generator=lambda *_: Long(), what="long")
    model = Subject("long", "long", "0" * 64, {}, kind, None)  # type: ignore[arg-type]
    made = material_of(squares, tmp_path, judged.suite(clips={"frames": 9, "size": (16, 16)}))
    [video] = made.generated(model, Videos(seconds=60, seeds=(0,)))
    chunks = 0
    for chunk in video.frames():
        assert chunk.shape[2] == 16
        chunks += 1
    assert chunks == 60 * 12 // 16
    assert Long.most <= 3
    # every second frame of 24 a second is seen, and so a joint lies at every eighth
    assert list(video.joints)[:3] == [8, 16, 24]
    assert video.length == 720
