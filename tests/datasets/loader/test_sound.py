"""The column of sound in batches: the same window as the picture, and what came before it."""

from pathlib import Path
from typing import Any

import claps
import numpy as np
import pytest
import torch

from longtake.datasets import audio, index
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader

RATE = 48_000
WINDOW: dict[str, Any] = {"frames": 9, "size": (32, 32), "batch": 2, "epochs": 3}


@pytest.fixture(scope="module")
def sounding(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Clips of one second, four of a source with claps and four of one without sound: do not change it."""
    folder = tmp_path_factory.mktemp("sounding")
    paths = [claps.write(folder / "a.mp4"), claps.write(folder / "b.mp4", codec=None)]
    return claps.dataset_of(folder / "dataset", paths, {"codec": "flac"})


def whole(dataset: str) -> dict[str, np.ndarray]:
    """The sound of each clip by its key, (channels, samples); empty where there is none."""
    return {
        row["key"]: audio.decode(row["data"], 0, row["samples"], 2) if row["has_audio"] else np.empty((2, 0))
        for row in claps.column(dataset)
    }


def each(batches: Any) -> Any:
    for batch in batches:
        for n in range(len(batch["key"])):
            yield {name: values[n] for name, values in batch.items() if name != "epoch"}


def test_sound_is_of_the_same_window_as_the_picture(sounding: str) -> None:
    sounds, starts, masks = whole(sounding), set(), set()
    for sample in each(Loader(sounding, **WINDOW, columns=("video", "audio"))):
        found, first = sample["audio"], int(sample["start"])
        assert found.dtype == torch.float32 and found.shape == (2, 9 * RATE // claps.FPS)
        assert sample["audio_mask"].dtype == torch.bool
        expected = sounds[sample["key"]][:, first * RATE // claps.FPS :][:, : found.shape[1]]
        assert bool(sample["audio_mask"]) == bool(expected.size)
        assert np.array_equal(found.numpy(), expected) if expected.size else not found.any()
        for frame in claps.seen(sample["video"].permute(1, 2, 3, 0).numpy()) if expected.size else ():
            if frame < 8:
                assert abs(claps.heard_at(found.numpy(), RATE, frame / claps.FPS) - frame / claps.FPS) < 2e-3
        starts.add(first)
        masks.add(bool(sample["audio_mask"]))
    assert len(starts) > 3 and masks == {True, False}


def test_a_stride_takes_the_sound_of_all_frames_between(sounding: str) -> None:
    for sample in each(Loader(sounding, **WINDOW, columns=("audio",), stride=2)):
        assert sample["audio"].shape == (2, 17 * RATE // claps.FPS)


def test_sound_alone_decodes_no_picture(sounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtake.datasets.clip.decoded", None)
    assert next(iter(Loader(sounding, **WINDOW, columns=("audio",))))["audio"].any()


def test_a_history_and_its_window_are_one_sound(sounding: str) -> None:
    rows = {row["key"]: row for row in index.read_all(sounding, "train").to_pylist()}
    sounds, lengths = whole(sounding), set()
    by_source: dict[str, np.ndarray] = {}
    for key in sorted(rows):
        source = rows[key]["source"]
        by_source[source] = np.concatenate([by_source.get(source, np.empty((2, 0))), sounds[key]], 1)
    columns = ("video", "audio")
    for sample in each(Loader(sounding, **WINDOW, columns=columns, history_seconds=1.6)):
        row = rows[sample["key"]]
        history, true = sample["history_audio"], int(sample["history_samples"])
        assert history.shape == (2, 40 * RATE // claps.FPS) and history.dtype == torch.float32
        assert not history[:, : history.shape[1] - true].any()
        if not sample["audio_mask"]:
            assert not true
            continue
        begin = round(row["start_seconds"] * RATE) + int(sample["start"]) * RATE // claps.FPS
        assert true == int(sample["history_frames"]) * RATE // claps.FPS == min(begin, history.shape[1])
        joined = np.concatenate([history[:, history.shape[1] - true :], sample["audio"]], 1)
        assert np.array_equal(joined, by_source[row["source"]][:, begin - true :][:, : joined.shape[1]])
        lengths.add(true)
    assert len(lengths) > 3


def test_frames_with_a_broken_number_of_samples(tmp_path: Path) -> None:
    path = claps.write(tmp_path / "a.mp4")
    dataset = claps.dataset_of(tmp_path / "d", [path], {"codec": "flac"}, fps=29.97)
    sounds = whole(dataset)
    for sample in each(Loader(dataset, **WINDOW, columns=("audio",), history_seconds=0.5)):
        assert sample["audio"].shape == (2, 9 * RATE * 1001 // 30_000)
        assert sample["history_audio"].shape == (2, 15 * RATE * 1001 // 30_000)
        found = sample["audio"].numpy()
        part = np.lib.stride_tricks.sliding_window_view(sounds[sample["key"]][0], found.shape[1])
        about = int(sample["start"]) * RATE * 1001 / 30_000
        places = [n for n in range(max(0, int(about) - 1), int(about) + 3) if n < len(part)]
        assert any(np.array_equal(part[n], found[0]) for n in places)


def test_sound_that_was_not_kept_is_asked_for_in_one_line(tmp_path: Path) -> None:
    dataset = claps.dataset_of(tmp_path / "d", [claps.write(tmp_path / "a.mp4")])
    with pytest.raises(
        UserError, match=r"\(train\): 4 clips were cut without their sound; add it with a `cache_audio`"
    ):
        Loader(dataset, **WINDOW, columns=("video", "audio"))
    with pytest.raises(UserError, match="columns: audio cannot be called 'sound'"):
        Loader(dataset, **WINDOW, columns={"sound": "audio"})


def test_damaged_sound_stops_with_the_name_of_its_tar(tmp_path: Path) -> None:
    dataset = claps.dataset_of(tmp_path / "d", [claps.write(tmp_path / "a.mp4")], {})
    tar = Path(dataset) / "train" / "00000.audio.tar"
    data = bytearray(tar.read_bytes())
    for row in claps.column(dataset):
        data[row["offset"] + 200] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=r"00000\.audio\.tar: bytes .* are damaged"):
        next(iter(Loader(dataset, **WINDOW, columns=("audio",))))


def test_workers_and_resuming_give_the_same_sound(sounding: str) -> None:
    options = WINDOW | {"columns": ("audio",), "seed": 3}
    plain = list(Loader(sounding, **options))
    shared = list(Loader(sounding, **options, workers=2))
    loader = Loader(sounding, **options)
    loader.load_state_dict(Loader(sounding, **options).state_dict() | {"taken": 2})
    for batches in (shared, [*plain[:2], *loader]):
        assert len(batches) == len(plain)
        for one, other in zip(plain, batches, strict=True):
            assert one["key"] == other["key"] and torch.equal(one["audio"], other["audio"])
            assert torch.equal(one["audio_mask"], other["audio_mask"])
