"""Tokens of sound as a column: of the windows of the video, with a mark where a clip has no sound, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import heard
import numpy as np
import pytest
import tats_stages
import tiny_codes
import torch

from longtake.datasets import audio, index, schema, storage
from longtake.datasets import tokens as records
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.tokens import read_tokens
from longtake.datasets.verify import verify
from longtake.pipeline import windows
from longtake.pipeline.stages import cache_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = tats_stages.FRAMES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return heard.inputs(tmp_path_factory.mktemp("heard"))


def sound_of(root: str, split: str, key: str) -> np.ndarray | None:
    """A clip's samples, mixed to one channel; None without sound."""
    for shard in index.read_shards(root, split, audio.COLUMN):
        for row in shard.table.to_pylist():
            if row["key"] == key and row["has_audio"]:
                data = storage.read_range(storage.join(root, split, f"{shard.name}.tar"), row["offset"], row["size"])
                return audio.decode(data, 0, row["samples"], row["channels"]).mean(0)
    return None


def test_windows_have_the_tokens_of_their_sound_and_a_mark_without(made: dict[str, str]) -> None:
    root, record, model = made["dataset"], read_tokens(made["audio_tokens"]), heard.vqgan()
    video = read_tokens(made["tokens"])
    assert (record.of, record.codes, record.shape) == ("audio", 16, (3, 2, 2))
    assert (record.frames, record.stride, record.hop, record.size) == (FRAMES, 1, 4, (16, 16))
    assert 0 < record.usage <= 1 and not list(verify(root))
    seen: dict[bool, int] = {True: 0, False: 0}
    for split in schema.SPLITS:
        columns = {"tokens": video.column, "audio_tokens": record.column}
        loader = Loader(root, split, columns=columns, frames=FRAMES, size=(16, 16), batch=1, epochs=1, last="pad")
        assert loader.samples == len(index.read_all(root, split))
        for batch in loader:
            found, sound = batch["audio_tokens"][0], sound_of(root, split, batch["key"][0])
            assert found.shape == (3, 2, 2) and found.dtype == torch.int64 and batch["tokens"].min() >= 0
            seen[sound is not None] += 1
            if sound is None:
                assert (found == -1).all()
                continue
            # 25 frames a second: a frame has 1920 samples
            begin = batch["start"][0].item() * 1920
            window = torch.from_numpy(sound[begin : begin + FRAMES * 1920])[None]
            with torch.no_grad():
                expected = model.sound_tokens(window, FRAMES)[0]
            # opus gives a part of a clip with small errors
            assert (found == expected).float().mean() > 0.9
    assert min(seen.values()) > 0


def test_a_stride_takes_the_sound_between_frames_and_a_short_end_is_silent(made: dict[str, str]) -> None:
    from longtake.pipeline import sound_windows

    root = made["dataset"]
    chosen = heard.settings(frames=12, stride=2, hop=1)  # 24 frames of 25: the clip's last window lacks none, or one
    sound, row = next(
        (sound, row)
        for shard in index.read_shards(root, "train")
        for sound in [sound_windows.sound_of(root, shard)]
        for row in shard.table.to_pylist()
        if row["key"] not in sound.silent and row["frame_count"] == 25
    )
    whole = sound_of(root, "train", row["key"])
    assert whole is not None
    found = list(sound_windows.sound_windows(sound, row, chosen))
    assert len(found) == chosen.windows(row) == 3 and {len(each) for each in found} == {24 * 1920}
    assert np.abs(found[1] - whole[1920:]).max() < 2e-3
    assert np.abs(found[2][: 23 * 1920] - whole[2 * 1920 :]).max() < 2e-3 and not found[2][23 * 1920 :].any()


def test_the_mark_is_counted_apart_and_verified(made: dict[str, str], tmp_path: Path) -> None:
    root = str(shutil.copytree(made["dataset"], tmp_path / "copy"))
    record = read_tokens(made["audio_tokens"])
    shards = [shard for split in schema.SPLITS for shard in index.read_shards(root, split, record.column)]
    silent = sum(records.read_silent(root, shard) for shard in shards)
    assert silent % 12 == 0 < silent
    shard = max(shards, key=lambda shard: records.read_silent(root, shard))
    notes = index.read_notes(root, shard)
    url = storage.join(root, shard.split, f"{shard.name}.parquet")
    rows = shard.table.to_pylist()
    index.write_index(
        url, rows, schema.TOKEN_INDEX, shard.tar_bytes, shard.tar_sha256, notes | {"silent": notes["silent"] - 1}
    )
    (line,) = verify(root)
    assert "its statistics are of another number of tokens" in line


def test_the_column_is_named_by_what_hears_and_resumes_to_the_same_bytes(made: dict[str, str], tmp_path: Path) -> None:
    root = str(shutil.copytree(made["dataset"], tmp_path / "copy"))
    record = read_tokens(made["audio_tokens"])
    before = {path.name: path.read_bytes() for path in Path(root).glob(f"*/*.{record.column}.*")}
    for path in Path(root).glob(f"*/*.{record.column}.*"):
        path.unlink()
    name, _ = tiny_codes.cache(root, heard.vqgan(), heard.settings(batch=1))  # type: ignore[arg-type]
    assert name == record.column
    assert {path.name: path.read_bytes() for path in Path(root).glob(f"*/*.{name}.*")} == before
    others = {
        windows.column_name(records.model_digest(model), heard.settings(), "")
        for model in (heard.vqgan(1), heard.vqgan(), tats_stages.vqgan())
    }
    assert len(others | {name}) == 3


def config(encoder: str, **changed: Any) -> cache_tokens.Config:
    usual: dict[str, Any] = {"frames": 12, "size": (16, 16), "hop": 4}
    return cache_tokens.Config(kind="cache_tokens", dataset="x", encoder=encoder, **usual | changed)


def test_what_has_no_sound_is_said_in_one_line(made: dict[str, str], tmp_path: Path) -> None:
    root = str(shutil.copytree(made["dataset"], tmp_path / "copy"))
    encoder = heard.saved(heard.vqgan(), tmp_path / "model")
    other = heard.vqgan()
    other.config = other.config.model_copy(update={"spectrogram": heard.spectrogram(rate=16_000)})
    slow = heard.saved(other, tmp_path / "slow")

    def refused(says: str, encoder: str = encoder, **changed: Any) -> None:
        with pytest.raises((UserError, Failure), match=says) as e:
            cache_tokens.run(config(encoder, **changed), {"dataset": root, "encoder": encoder}, str(tmp_path / "out"))
        assert "\n" not in str(e.value)

    refused("encoder: .*slow: has learned sound of 16000 Hz, the dataset's has 48000", slow)
    refused("frames: 10 is not a multiple of 4", frames=10)
    for path in Path(root).glob("*/*.audio.*"):
        path.unlink()
    refused("dataset: .*: its clips were cut without sound; add it with a `cache_audio` stage")
    shard = index.read_shards(root, "train")[0]
    from longtake.pipeline import sound_windows

    with pytest.raises(Failure, match=r"audio.tar: is missing; run a `cache_audio` stage"):
        sound_windows.sound_of(root, shard)
