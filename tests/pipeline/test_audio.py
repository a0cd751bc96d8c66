"""The sound of clips: in step with the picture wherever a source was cut, whatever its container does to its clocks."""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import claps
import numpy as np
import pytest

from longtake.datasets import audio, index, verify
from longtake.datasets.stage import content
from longtake.pipeline.config import CutConfig, LimitsConfig
from longtake.pipeline.isolate import Worker
from longtake.pipeline.soundtrack import clocks_of
from longtake.pipeline.source import process
from longtake.pipeline.stages import shard

MILLISECONDS_APART = 2.0


def hashes(folder: Path | str) -> dict[str, str]:
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def joined(rows: list[dict[str, Any]], folder: Path) -> np.ndarray:
    """(channels, samples) of clips that follow each other."""
    return np.concatenate([claps.sound_of(row, folder) for row in rows], 1)


SOURCES: dict[str, dict[str, Any]] = {
    "aac.mp4": {},
    "cd.mp4": {"rate": 44_100},
    "mono.mp4": {"channels": 1, "rate": 44_100},
    "surround.mp4": {"channels": 6},
    "late.mp4": {"heard": (0.5, 4.4)},
    "early.mp4": {"heard": (0.0, 3.3)},
    "before.mp4": {"video_from": 0.3},
    "stream.ts": {},
    "aac.mkv": {"rate": 44_100},
    "opus.mkv": {"codec": "libopus"},
    "pcm.mov": {"codec": "pcm_s16le", "rate": 44_100},
    "flac.mkv": {"codec": "flac", "channels": 1},
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("codec", ["opus", "flac"])
def test_a_clap_is_seen_and_heard_at_once(name: str, codec: str, tmp_path: Path) -> None:
    path = claps.write(tmp_path / name, **SOURCES[name])
    rows, detail = claps.cut(path, tmp_path / "out", claps.settings(codec=codec))
    assert detail is None and len(rows) == 4
    assert all(row["has_audio"] and row["samples"] == 48_000 for row in rows)
    first, last = SOURCES[name].get("heard", (0.0, 4.0))
    together = joined(rows, tmp_path / "out")
    found = 0
    for number, row in enumerate(rows):
        for frame in claps.seen(claps.frames_of(row, tmp_path / "out")):
            at = frame / claps.FPS
            if not first <= number + at < last:
                continue
            alone = claps.heard_at(claps.sound_of(row, tmp_path / "out"), 48_000, at)
            assert abs(alone - at) * 1000 < MILLISECONDS_APART
            assert abs(claps.heard_at(together, 48_000, number + at) - number - at) * 1000 < MILLISECONDS_APART
            found += 1
    assert found == sum(first <= time < last for time in claps.TIMES)


def test_an_edit_list_that_leaves_out_the_beginning_of_the_sound_is_followed(tmp_path: Path) -> None:
    skipped = 0.37
    wave = claps.sound(4.4 + skipped, 48_000, [time + skipped for time in claps.TIMES])
    path = claps.write(tmp_path / "edit.mp4", samples=wave)
    claps.skip_by_edit(path, round(skipped * 48_000))
    rows, _ = claps.cut(path, tmp_path / "out")
    for row in rows:
        for frame in claps.seen(claps.frames_of(row, tmp_path / "out")):
            heard = claps.heard_at(claps.sound_of(row, tmp_path / "out"), 48_000, frame / claps.FPS)
            assert abs(heard - frame / claps.FPS) * 1000 < MILLISECONDS_APART


@pytest.mark.parametrize("fps", [25, 24, 23.976, 29.97, 7.3])
def test_neighbours_join_to_the_sound_of_the_source(fps: float, tmp_path: Path) -> None:
    path = claps.write(tmp_path / "a.mov", codec="pcm_s16le")
    config = claps.settings(claps.SMALL.model_copy(update={"fps": fps, "max_seconds": 0.7}), codec="flac")
    rows, _ = claps.cut(path, tmp_path / "out", config)
    with av.open(str(path)) as container:
        whole = np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in container.decode(audio=0)])
    spans = [audio.span(row, 48_000) for row in rows]
    assert len(rows) > 4 and sum(before[1] == after[0] for before, after in pairwise(spans)) >= len(rows) - 2
    together = joined(rows, tmp_path / "out")
    expected = np.concatenate([whole[begin:end] for begin, end in spans])
    assert np.array_equal(np.round(together.T * 32768).astype(np.int16), expected)


@pytest.mark.parametrize("channels", [1, 2])
def test_neighbours_in_opus_join_without_a_click(channels: int, tmp_path: Path) -> None:
    at = np.arange(round(4.4 * 48_000)) / 48_000
    wave = sum(0.15 * np.sin(2 * np.pi * pitch * at + pitch) for pitch in (220, 523, 1480))
    path = claps.write(tmp_path / "a.mov", codec="pcm_s16le", samples=np.asarray(wave), channels=channels)
    exact, _ = claps.cut(path, tmp_path / "flac", claps.settings(codec="flac", channels=channels))
    rows, _ = claps.cut(path, tmp_path / "opus", claps.settings(codec="opus", channels=channels))
    error = np.abs(joined(rows, tmp_path / "opus") - joined(exact, tmp_path / "flac"))
    assert error.max() < 0.05
    edges = [n * 48_000 for n in range(1, len(rows))]
    near = np.concatenate([error[:, edge - 240 : edge + 240] for edge in edges], 1)
    assert np.sqrt(np.square(near).mean()) < 0.01 and near.max() < 0.03


def test_what_no_sound_covers_is_zero_or_marked(tmp_path: Path) -> None:
    path = claps.write(tmp_path / "a.mov", codec="pcm_s16le", heard=(1.5, 2.8))
    rows, detail = claps.cut(path, tmp_path / "out", claps.settings(codec="flac"))
    assert detail is None
    assert [row["has_audio"] for row in rows] == [False, True, True, False]
    assert [row["reason"] for row in rows] == ["outside", None, None, "outside"]
    assert [row["samples"] for row in rows] == [0, 48_000, 48_000, 0]
    sounds = [claps.sound_of(row, tmp_path / "out") for row in rows[1:3]]
    begins, ends = 24_000, round(0.8 * 48_000)
    assert not sounds[0][:, : begins - 96].any() and sounds[0][:, begins + 96 :].any(0).mean() > 0.99
    assert not sounds[1][:, ends + 96 :].any() and sounds[1][:, : ends - 96].any(0).mean() > 0.99


def test_a_gap_is_silent_and_what_follows_it_in_place(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with av.open(str(claps.write(tmp_path / "whole.mkv"))) as source, av.open(str(path), "w") as target:
            streams = {s: target.add_stream_from_template(s) for s in source.streams}
            for packet in source.demux():
                sound = packet.stream.type == "audio"
                if packet.size and not (sound and 1.65 < packet.pts * packet.time_base < 2.15):
                    packet.stream = streams[packet.stream]
                    target.mux(packet)

    write(tmp_path / "gap.mkv")
    rows, _ = claps.cut(tmp_path / "gap.mkv", tmp_path / "out", claps.settings(codec="flac"))
    sounds = [claps.sound_of(row, tmp_path / "out") for row in rows]
    assert not sounds[1][:, round(0.72 * 48_000) :].any() and not sounds[2][:, : round(0.1 * 48_000)].any()
    assert abs(claps.heard_at(sounds[2], 48_000, 0.2) - 0.2) * 1000 < MILLISECONDS_APART
    assert abs(claps.heard_at(sounds[3], 48_000, 0.0) - 0.0) * 1000 < MILLISECONDS_APART


def test_recordings_that_were_joined_keep_their_sound(tmp_path: Path) -> None:
    paths = [claps.write(tmp_path / f"{n}.ts", seconds=2.0, times=times) for n, times in enumerate([(0.6,), (1.4,)])]
    (tmp_path / "joined.ts").write_bytes(b"".join(path.read_bytes() for path in paths))
    rows, detail = claps.cut(tmp_path / "joined.ts", tmp_path / "out")
    assert detail is None
    claps_seen = 0
    for row in rows:
        for frame in claps.seen(claps.frames_of(row, tmp_path / "out")):
            heard = claps.heard_at(claps.sound_of(row, tmp_path / "out"), 48_000, frame / claps.FPS)
            assert abs(heard - frame / claps.FPS) * 1000 < MILLISECONDS_APART
            claps_seen += 1
    assert claps_seen == 2
    # as somebody finds them who has not decoded all pictures
    made = process(str(tmp_path / "joined.ts"), "x", str(tmp_path / "out"), claps.settings())["clocks"]
    assert len(made) == 2 and clocks_of(str(tmp_path / "joined.ts")) == made


def test_a_source_without_sound_is_marked_and_nothing_else(footage: Path, tmp_path: Path) -> None:
    rows, detail = claps.cut(sorted(footage.glob("*.mp4"))[0], tmp_path / "out")
    assert detail is None and rows
    for row in rows:
        assert (row["has_audio"], row["samples"], row["reason"]) == (False, 0, "no_audio")
    assert not list((tmp_path / "out").glob("*.ogg"))


@pytest.mark.parametrize("share", [(0.0, 1.0), (0.4, 0.6), (0.0, 0.2)])
def test_damaged_sound_costs_no_clip(share: tuple[float, float], tmp_path: Path) -> None:
    path = claps.write(tmp_path / "a.mp4")
    whole, _ = claps.cut(path, tmp_path / "whole")
    claps.spoil_sound(path, share)
    rows, detail = claps.cut(path, tmp_path / "out")
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in whole]
    assert detail and "sound" in detail
    assert any(row["reason"] or row["silence"] > 0.1 for row in rows)
    assert all(row["has_audio"] == (share != (0.0, 1.0)) for row in rows[-1:])


def test_sound_that_crashes_hangs_or_asks_too_much_costs_no_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, worker = claps.write(tmp_path / "a.mp4"), Worker()
    config = claps.settings()
    clips = process(str(path), "x", str(tmp_path), config)["clips"]
    try:
        hasty = config.model_copy(update={"limits": LimitsConfig(timeout_seconds=1e-3)})
        late = worker.keep_sound(str(path), clips, str(tmp_path), hasty, clocks=[(0.0, 0.0)])
        assert {row["reason"] for row in late["clips"]} == {"timed_out"} and "not done after" in late["detail"]
        # no child can be started with so little
        small = config.model_copy(update={"limits": LimitsConfig(memory_bytes=1 << 20)})
        gone = worker.keep_sound(str(path), clips, str(tmp_path), small, clocks=[(0.0, 0.0)])
        assert {row["reason"] for row in gone["clips"]} == {"crashed"}
    finally:
        worker.close()
    monkeypatch.setattr("longtake.pipeline.soundtrack._MAX_RATE", 44_100)
    rows, detail = claps.cut(path, tmp_path / "out")
    assert {row["reason"] for row in rows} == {"too_large"} and detail and "48000 samples a second" in detail


def test_sound_much_longer_than_the_picture_is_not_decoded_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longtake.pipeline.soundtrack._PACKETS_A_SECOND", 1)
    monkeypatch.setattr("longtake.pipeline.soundtrack._SPARE_SECONDS", 0)
    rows, detail = claps.cut(claps.write(tmp_path / "a.mp4"), tmp_path / "out")
    assert [row["has_audio"] for row in rows] == [True, False, False, False]
    assert detail == "its sound ends early: more packets than its pictures have time for"


def test_the_old_tars_stay_as_they_were_with_sound_and_without(tmp_path: Path) -> None:
    paths = [claps.write(tmp_path / "a.mp4"), claps.write(tmp_path / "b.mp4", codec=None)]
    with_sound, without = (claps.dataset_of(tmp_path / str(n), paths, audio) for n, audio in enumerate(({}, None)))
    new, old = hashes(with_sound), hashes(without)
    assert {name for name in new if ".audio." in name} == {"train/00000.audio.tar", "train/00000.audio.parquet"}
    assert old.pop("dataset.json") != new["dataset.json"]
    assert old == {name: new[name] for name in old}
    for dataset in (with_sound, without):
        assert list(verify.verify(dataset)) == []


def test_the_same_sources_give_the_same_sound_in_any_process(tmp_path: Path) -> None:
    paths = [claps.write(tmp_path / f"{n}.mp4", rate=rate) for n, rate in enumerate((44_100, 48_000, 44_100))]
    one, two = (claps.dataset_of(tmp_path / name, paths, {}) for name in ("one", "two"))
    assert hashes(one) == hashes(two)
    alone, _ = claps.cut(paths[0], tmp_path / "alone")
    rows = {row["sha256"]: row for row in index.read_all(one, "train").to_pylist()}
    members = {row["base_sha256"]: row["data"] for row in claps.column(one)}
    assert rows.keys() == members.keys()
    for row in alone:
        assert members[row["sha256"]] == (tmp_path / "alone" / f"{row['key']}.ogg").read_bytes()


def test_without_sound_a_recipe_is_the_one_from_before() -> None:
    config = shard.Config(kind="shard", sources=("a",), audio=None)
    assert "audio" not in content(config)
    assert content(shard.Config(kind="shard", sources=("a",)))["audio"]["codec"] == "opus"
    assert "audio" in config.model_dump()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"codec": "opus", "rate": 44_100}, "opus has 48000 samples per second"),
        ({"channels": 6}, "1 or 2"),
        ({"codec": "mp3"}, "opus"),
        ({"bitrate": 32_000}, "greater than or equal to 64000"),
    ],
)
def test_settings_that_no_codec_has_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CutConfig(audio=settings)


def test_verify_finds_sound_that_is_not_that_of_its_clips(tmp_path: Path) -> None:
    dataset = Path(claps.dataset_of(tmp_path / "d", [claps.write(tmp_path / "a.mp4")], {}))
    shard_ = index.read_shard(str(dataset), "train", "00000.audio")
    rows = shard_.table.to_pylist()
    rows[1]["samples"] -= 1
    url = str(dataset / "train" / "00000.audio.parquet")
    index.write_index(url, rows, shard_.table.schema.remove_metadata(), shard_.tar_bytes, shard_.tar_sha256)
    (problem,) = verify.verify(str(dataset))
    assert f"{rows[1]['key']}: 47999 samples, its clip has 48000; delete it and run a `cache_audio` stage" in problem
    tar = dataset / "train" / "00000.audio.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    assert any("run a `cache_audio` stage" in line and "bytes" in line for line in verify.verify(str(dataset)))
