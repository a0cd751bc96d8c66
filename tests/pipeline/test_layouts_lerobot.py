"""Views as LeRobot datasets, those of others as manifests, and the way through each layout back to the same clips."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import exported
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import spoken
from exported import CAMERA, half, invoke, mp4_of, read_manifest, rows_of
from shards import make_dataset

from longtake.datasets import captions, clip, index, schema
from longtake.datasets.captions import Caption
from longtake.datasets.errors import UserError
from longtake.pipeline.captions import said
from longtake.pipeline.layouts import LAYOUTS, chosen
from longtake.pipeline.stages import shard


@pytest.fixture
def own(dataset: str, tmp_path: Path) -> str:
    """A copy of the dataset with captions of all clips but one; one has captions of parts alone."""
    folder = exported.told(dataset, tmp_path / "own")
    keys = spoken.keys(folder)
    about = {key: [Caption("the whole"), Caption("a part", 0.1, 0.2)] for key in keys}
    parts = [Caption("first", 0.25, 0.5, "en"), Caption("second", 0.4, 0.75, source="Ada")]
    spoken.describe(folder, about | {min(keys): None, max(keys): parts})
    return folder


def frames_of(folder: Path, episode: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an episode's frames, as its row says where they are."""
    place = (episode["data/chunk_index"], episode["data/file_index"])
    table = pq.read_table(folder / "data/chunk-{:03d}/file-{:03d}.parquet".format(*place))
    return [row for row in table.to_pylist() if row["episode_index"] == episode["episode_index"]]


def video_of(folder: Path, episode: dict[str, Any]) -> Path:
    place = (episode[f"videos/{CAMERA}/chunk_index"], episode[f"videos/{CAMERA}/file_index"])
    return folder / "videos/{}/chunk-{:03d}/file-{:03d}.mp4".format(CAMERA, *place)


def test_each_clip_is_an_episode_whose_frames_have_its_captions_as_tasks(own: str, tmp_path: Path) -> None:
    url, kept = half(own)
    out = tmp_path / "out"
    invoke("export", own, "--layout", "lerobot", "--to", str(out), "--view", url)
    assert {min(rows_of(own)), max(rows_of(own))} <= kept
    rows, info = rows_of(own), json.loads((out / "meta" / "info.json").read_text())
    episodes = [
        row for path in sorted((out / "meta/episodes").glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    tasks = pq.read_table(out / "meta" / "tasks.parquet").to_pandas()
    assert {row["key"] for row in episodes} == kept and tasks["task_index"].to_list() == list(range(len(tasks)))
    assert [row["episode_index"] for row in episodes] == list(range(len(kept)))
    index_ = 0
    for row in episodes:
        base, frames = rows[row["key"]], frames_of(out, row)
        assert video_of(out, row).read_bytes() == mp4_of(own, base)
        assert (row["length"], row["split"], row["label"]) == (base["frame_count"], base["split"], base["label"])
        assert [frame["index"] for frame in frames] == list(range(index_, index_ + base["frame_count"]))
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (index_, index_ + len(frames))
        index_ += len(frames)
        # LeRobot asks for the frame at this time, and takes none that is 0.1 ms off
        with av.open(str(video_of(out, row))) as container:
            times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
        assert np.allclose([frame["timestamp"] for frame in frames], times, atol=1e-4)
        texts = [tasks.index[frame["task_index"]] for frame in frames]
        assert list(dict.fromkeys(texts)) == [t for t in dict.fromkeys(texts) if t in row["tasks"]]
        if row["key"] == min(rows):
            assert set(texts) == {""} and not row["captions"]
        elif row["key"] == max(rows):
            seconds = np.arange(len(texts)) / base["fps"]
            # where two parts have a frame, the first one's text stands
            assert texts == ["" if s < 0.25 else "first" if s < 0.5 else "second" if s < 0.75 else "" for s in seconds]
        else:
            assert set(texts) == {"the whole"} and len(row["captions"]) == 2
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (len(kept), index_, len(tasks))
    trained = sum(row["split"] == "train" for row in episodes)
    assert info["splits"] == {"train": f"0:{trained}", "val": f"{trained}:{len(kept)}"}
    video = info["features"][CAMERA]
    assert (info["fps"], video["shape"]) == (12, [base["height"], base["width"], 3])
    statistics = json.loads((out / "meta" / "stats.json").read_text())[CAMERA]
    pixels = np.stack([clip.decode(mp4_of(own, rows[key]))[rows[key]["frame_count"] // 2] for key in kept]) / 255
    for name, value in statistics.items():
        if name != "count":
            assert np.allclose(np.ravel(value), getattr(pixels, name)((0, 1, 2)), atol=1e-5), name


def test_a_stopped_export_goes_on(own: str, tmp_path: Path) -> None:
    selection, whole, part = chosen.choose(own, None, None), tmp_path / "whole", tmp_path / "part"
    chosen.write(selection, "lerobot", str(whole))
    exported.stop_at(7, selection, "lerobot", str(part))
    assert not (part / "meta" / "info.json").exists()
    chosen.write(chosen.choose(own, None, None), "lerobot", str(part))
    assert exported.files_of(whole) == exported.files_of(part)


def test_clips_of_two_sizes_are_refused_before_anything_is_written(tmp_path: Path, tiny_videos: Path) -> None:
    folder = tmp_path / "mixed"
    for n, size in enumerate(((48, 64), (48, 96))):
        picture = np.random.default_rng(n).integers(40, 200, (*size, 3), dtype=np.uint8)
        clip.write(tmp_path / f"{n}.mp4", np.stack([np.roll(picture, t, 1) for t in range(20)]), 12)
    own = make_dataset(folder, [tmp_path / "0.mp4", tmp_path / "1.mp4"], 0.0)
    with pytest.raises(
        UserError, match="one size and frame rate, here are 48x32 at 12, 64x32 at 12; choose one by --view"
    ):
        chosen.write(chosen.choose(own, None, None), "lerobot", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_video_of_several_episodes_is_cut_to_the_same_frames(own: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen.write(chosen.choose(own, None, None), "lerobot", str(out))
    exported.join_videos(out)
    count = chosen.write_manifest(str(out), "lerobot", str(tmp_path / "in" / "list.jsonl"))
    rows = rows_of(own)
    assert count == len(rows)
    for row, (key, base) in zip(read_manifest(tmp_path / "in" / "list.jsonl"), rows.items(), strict=True):
        assert Path(row["uri"]).parent == tmp_path / "in" / "list-videos"
        one = clip.decode(Path(row["uri"]).read_bytes())
        assert np.array_equal(one, clip.decode(mp4_of(own, base)))
        expected = {min(rows): None, max(rows): ["first", "second"]}.get(key, ["the whole"])
        assert sorted(row.get("captions") or []) == sorted(expected or [])
    # times that no frame begins at
    path = sorted((out / "meta" / "episodes").glob("*/*.parquet"))[0]
    table = pq.read_table(path)
    for name, says in (("from_timestamp", "begins within a group of frames"), ("to_timestamp", r"has \d+ frames from")):
        place = table.column_names.index(f"videos/{CAMERA}/{name}")
        moved = pa.array(table.column(place).to_numpy() + 0.25)
        pq.write_table(table.set_column(place, f"videos/{CAMERA}/{name}", moved), path)
        with pytest.raises(UserError, match=says) as error:
            chosen.write_manifest(str(out), "lerobot", str(tmp_path / name / "list.jsonl"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_clips_come_back_the_same_with_their_captions(
    layout: str, own: str, made_alone: Callable[[shard.Config, object], dict[str, str]], tmp_path: Path
) -> None:
    url, kept = half(own)
    listed = tmp_path / "in" / "list.jsonl"
    invoke("export", own, "--layout", layout, "--to", str(tmp_path / "out"), "--view", url)
    invoke("import", str(tmp_path / "out"), "--layout", layout, "--to", str(listed))
    cut = {"short_side": 32, "fps": 12, "max_seconds": 3}
    config = shard.Config(kind="shard", sources=[str(listed)], clip=cut, val_fraction=0.3, group_sources=4)  # type: ignore[arg-type]
    made_alone(config, tmp_path / "again")

    rows, column = rows_of(own), {}
    for split in schema.SPLITS:
        for table in (each.table for each in index.read_shards(own, split, spoken.COLUMN)):
            found = (captions.rows_to_captions(each) for each in table["captions"].to_pylist())
            column |= dict(zip(table["key"].to_pylist(), found, strict=True))
    again = rows_of(str(tmp_path / "again"))
    told = {key: one.captions for split in schema.SPLITS for base in index.read_shards(str(tmp_path / "again"), split)
            for key, one in zip(base.table["key"].to_pylist(), said(str(tmp_path / "again"), base, False), strict=True)}  # fmt: skip
    videos = {row["source"]: Path(row["uri"]) for row in index.read_sources(str(tmp_path / "again")).to_pylist()}
    by_bytes = {mp4_of(own, rows[key]): key for key in kept}
    assert {by_bytes[videos[row["source"]].read_bytes()] for row in again.values()} == kept and len(again) == len(kept)
    for key, row in again.items():
        before = rows[by_bytes[videos[row["source"]].read_bytes()]]
        assert all(row[name] == before[name] for name in ("frame_count", "fps", "width", "height"))
        one, other = clip.decode(mp4_of(str(tmp_path / "again"), row)), clip.decode(mp4_of(own, before))
        assert np.abs(one.astype(int) - other).mean() < 6
        assert told[key] == column[before["key"]]


def write_dataset(folder: Path, info: dict[str, Any] | bytes, **columns: Any) -> None:
    """A LeRobot dataset of one episode."""
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    data = info if isinstance(info, bytes) else json.dumps(INFO | info).encode()
    (folder / "meta" / "info.json").write_bytes(data)
    facts = {"episode_index": 0, "length": 20, "tasks": ["go"], "videos/v/chunk_index": 0, "videos/v/file_index": 0}
    facts |= {"videos/v/from_timestamp": 0.0, "videos/v/to_timestamp": 1.0} | columns
    table = pa.Table.from_pylist([facts])
    pq.write_table(table, folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")


INFO = {
    "codebase_version": "v3.0",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "features": {"v": {"dtype": "video"}, "action": {"dtype": "float32"}},
}


@pytest.mark.parametrize(
    ("info", "columns", "says"),
    [
        (b"{nonsense", {}, r"info\.json: not readable"),
        (b"[" * 100_000, {}, r"info\.json: not readable"),
        (b'{"codebase_version": "v3.0", "features": []}', {}, r"info\.json: not readable"),
        (b" " * (16 << 20) + b"{}", {}, r"info\.json: not readable \(ValueError\('more than 16777216 bytes"),
        ({"codebase_version": "v2.1"}, {}, "is of LeRobot v2.1; convert it with convert_dataset_v21_to_v30"),
        ({"features": {"v": {"dtype": "image"}}}, {}, "has no feature that is a video"),
        ({"video_path": "{video_key.__class__}/../../x"}, {}, "only videos/{video_key}/chunk-"),
        ({"features": {"../../../up": {"dtype": "video"}}}, {}, r"no column videos/\.\./\.\./\.\./up/chunk_index"),
        ({}, {"videos/v/file_index": 7}, "episode 0: v: its video is no file of this folder"),
        ({}, {"videos/v/file_index": 1}, "episode 0: v: its video is no file of this folder"),
        ({}, {"videos/v/file_index": -1}, "episode 0: no numbers from 0"),
        ({}, {"videos/v/file_index": "../../x"}, "episode 0: no numbers from 0"),
        ({}, {"videos/v/to_timestamp": float("nan")}, "episode 0: no times in seconds"),
        ({}, {"videos/v/to_timestamp": "x"}, "episode 0: no times in seconds"),
        ({}, {"videos/v/from_timestamp": 1e300}, "cannot be cut out"),
        ({}, {"videos/v/from_timestamp": -1e300, "videos/v/to_timestamp": 0.1}, "cannot be cut out"),
        ({}, {"videos/v/file_index": 2}, "cannot be cut out"),
        ({}, {"tasks": ["x" * (1 << 20)]}, "episode 0: tasks have 10485"),
        ({}, {"tasks": [b"\xff"]}, "episode 0: tasks are no texts"),
        ({}, {"tasks": 3}, "episode 0: tasks are no texts"),
        ({}, {"captions": [3]}, "captions: entry 1: 3 is no text"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_dataset_is_one_line(
    info: dict[str, Any] | bytes, columns: dict[str, Any], says: str, tiny_videos: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    write_dataset(theirs, info, **columns)
    videos = theirs / "videos" / "v" / "chunk-000"
    videos.mkdir(parents=True)
    shutil.copy(tiny_videos / "0.mp4", videos / "file-000.mp4")
    (videos / "file-001.mp4").symlink_to(tiny_videos / "1.mp4")
    (videos / "file-002.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=says) as error:
        chosen.write_manifest(str(theirs), "lerobot", str(tmp_path / "in" / "list.jsonl"))
    assert "\n" not in str(error.value) and not (tmp_path / "in" / "list.jsonl").exists()


def test_a_camera_whose_name_leads_outside_is_refused(tiny_videos: Path, tmp_path: Path) -> None:
    up = "../../outside"
    names = {f"videos/{up}/chunk_index": 0, f"videos/{up}/file_index": 0}
    times = {f"videos/{up}/from_timestamp": 0.0, f"videos/{up}/to_timestamp": 1.0}
    write_dataset(tmp_path / "theirs", {"features": {up: {"dtype": "video"}}}, **names, **times)
    (tmp_path / "theirs" / "videos").mkdir()
    (tmp_path / "outside" / "chunk-000").mkdir(parents=True)
    shutil.copy(tiny_videos / "0.mp4", tmp_path / "outside" / "chunk-000" / "file-000.mp4")
    with pytest.raises(UserError, match=r"\.\./\.\./outside: its video is no file of this folder"):
        chosen.write_manifest(str(tmp_path / "theirs"), "lerobot", str(tmp_path / "in" / "list.jsonl"))
