"""LeRobot's dataset format v3.0: a clip is an episode of one camera, `observation.images.clip`, with captions as its tasks.

    meta/info.json, meta/tasks.parquet, meta/stats.json
    meta/episodes/chunk-000/file-000.parquet    a row an episode, with `key`, `source`, `split`, `label` and `captions` of ours
    data/chunk-000/file-000.parquet             a row a frame: its time, its number, its task
    videos/observation.images.clip/chunk-000/file-000.mp4    a clip, as it is

All of a dataset has one frame rate and one size. The task of a frame is the caption of the whole clip, else the first one of
a part that has the frame, else the empty text. There is no state and no action.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtake.datasets import clip, media, schema, storage
from longtake.datasets.errors import UserError
from longtake.pipeline.layouts.chosen import Chosen, clips_of, facts_of, state_of
from longtake.pipeline.tables import ROW_BYTES

_VERSION = "v3.0"
_CAMERA = "observation.images.clip"
_FILES = 1000  # in a chunk
_INFO_BYTES = 16 << 20
_SAMPLES = 128  # clips whose middle frames are the statistics of pixels
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

_FRAMES = pa.schema(
    [
        ("timestamp", pa.float32()),
        *((name, pa.int64()) for name in ("frame_index", "episode_index", "index", "task_index")),
    ]
)
_PLACE = ("chunk_index", "file_index")
_DTYPES = {pa.float32(): "float32", pa.int64(): "int64"}
_EPISODE = pa.schema(
    [
        ("episode_index", pa.int64()),
        ("tasks", pa.list_(pa.string())),
        ("length", pa.int64()),
        *((f"data/{name}", pa.int64()) for name in _PLACE),
        ("dataset_from_index", pa.int64()),
        ("dataset_to_index", pa.int64()),
        *((f"videos/{_CAMERA}/{name}", pa.int64()) for name in _PLACE),
        *((f"videos/{_CAMERA}/{name}", pa.float64()) for name in ("from_timestamp", "to_timestamp")),
        *((f"meta/episodes/{name}", pa.int64()) for name in _PLACE),
        *((name, pa.string()) for name in ("key", "source", "split", "label")),
        schema.CAPTION_INDEX.field("captions"),
    ]
)


class _Plan(NamedTuple):
    """What all files of a dataset share.

    kind    frame rate, height and width of all clips
    firsts  of each shard that is written, its number among them, that of its first episode and that of its first frame
    totals  those of a shard that would follow the last one
    tasks   the number of each text
    """

    kind: tuple[float, int, int]
    firsts: dict[tuple[str, int], tuple[int, int, int]]
    totals: tuple[int, int, int]
    tasks: dict[str, int]


@functools.lru_cache(maxsize=1)
def _plan(chosen: Chosen) -> _Plan:
    kind, firsts, totals = _kind(chosen), {}, (0, 0, 0)
    tasks: dict[str, int] = {}
    for split, number, kept in chosen.shards():
        firsts[split, number] = totals
        frames = int(np.sum(_lengths(chosen, split, number, kept), dtype=np.int64))
        totals = (totals[0] + 1, totals[1] + len(kept), totals[2] + frames)
        for _, facts in facts_of(chosen, split, number):
            for text in _tasks(facts)[0]:
                tasks.setdefault(text, len(tasks))
    return _Plan(kind, firsts, totals, tasks)


def _lengths(chosen: Chosen, split: str, number: int, kept: np.ndarray) -> np.ndarray:
    """Frames of each clip of a shard that is written."""
    return chosen.bases[split].of(number)["frame_count"].to_numpy()[kept]


def _kind(chosen: Chosen) -> tuple[float, int, int]:
    names, kinds = ["fps", "height", "width"], set()
    for split, number, kept in chosen.shards():
        table = chosen.bases[split].of(number).select(names).take(kept)
        kinds |= set(zip(*(table[name].to_pylist() for name in names), strict=True))
    if len(kinds) > 1:
        shown = ", ".join(f"{width}x{height} at {fps:g}" for fps, height, width in sorted(kinds)[:4])
        raise UserError(
            f"{chosen.dataset}: LeRobot has one size and frame rate, here are {shown}; choose one by --view"
        )
    return kinds.pop()


def _tasks(facts: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """The texts that frames of a clip have, and which of them each has, (T,)."""
    said, numbers = facts["captions"], np.zeros(facts["frame_count"], np.int64)
    whole = [each["text"] for each in said if each["start"] is None and each["end"] is None]
    if whole:
        return whole[:1], numbers
    seconds = np.arange(len(numbers)) / facts["fps"]
    texts = list(dict.fromkeys(["", *(each["text"] for each in said)]))
    # the first one stands
    for each in reversed(said):
        last = math.inf if each["end"] is None else each["end"]
        numbers[(seconds >= (each["start"] or 0.0)) & (seconds < last)] = texts.index(each["text"])
    used, numbers = np.unique(numbers, return_inverse=True)
    return [texts[number] for number in used], numbers


def check(chosen: Chosen) -> None:
    """Raise UserError where the chosen clips have several frame rates or sizes."""
    _kind(chosen)


def _place(number: int) -> dict[str, int]:
    return dict(zip(_PLACE, divmod(number, _FILES), strict=True))


def _video(folder: Path, episode: int) -> Path:
    return folder / _VIDEO.format(video_key=_CAMERA, **_place(episode))


def exported(chosen: Chosen, split: str, number: int, folder: Path) -> bool:
    """Whether a shard is there."""
    return (folder / _EPISODES.format(**_place(_plan(chosen).firsts[split, number][0]))).exists()


def export(chosen: Chosen, split: str, number: int, folder: Path) -> None:
    """Write the videos and frames of a shard, and its episodes last. Raises Failure: see `clips_of`."""
    plan = _plan(chosen)
    place, episode, frame = plan.firsts[split, number]
    data, episodes = folder / _DATA.format(**_place(place)), []
    data.parent.mkdir(parents=True, exist_ok=True)
    with storage.staged(str(data)) as path, pq.ParquetWriter(path, _FRAMES) as file:
        for mp4, facts in clips_of(chosen, split, number):
            video = _video(folder, episode)
            video.parent.mkdir(parents=True, exist_ok=True)
            video.write_bytes(mp4)
            texts, of_frames = _tasks(facts)
            file.write_table(_frames(facts, episode, frame, np.array([plan.tasks[text] for text in texts])[of_frames]))
            row = {name: facts[name] for name in ("key", "source", "split", "label", "captions")}
            row |= {"episode_index": episode, "tasks": texts, "length": facts["frame_count"]}
            row |= {"dataset_from_index": frame, "dataset_to_index": frame + facts["frame_count"]}
            row |= {f"data/{name}": value for name, value in _place(place).items()}
            row |= {f"meta/episodes/{name}": value for name, value in _place(place).items()}
            row |= {f"videos/{_CAMERA}/{name}": value for name, value in _place(episode).items()}
            row |= {f"videos/{_CAMERA}/from_timestamp": 0.0, f"videos/{_CAMERA}/to_timestamp": facts["seconds"]}
            episodes.append(row)
            episode, frame = episode + 1, frame + facts["frame_count"]
    with storage.staged(str(folder / _EPISODES.format(**_place(place)))) as path:
        pq.write_table(pa.Table.from_pylist(episodes, schema=_EPISODE), path)


def _frames(facts: dict[str, Any], episode: int, first: int, tasks: np.ndarray) -> pa.Table:
    numbers = np.arange(facts["frame_count"])
    columns = (numbers / facts["fps"], numbers, np.full(len(numbers), episode), first + numbers, tasks)
    return pa.table([pa.array(each, kind.type) for each, kind in zip(columns, _FRAMES, strict=True)], schema=_FRAMES)


def finish(chosen: Chosen, folder: Path) -> None:
    """Write the tasks, the statistics of pixels, and what makes the whole count last: meta/info.json."""
    plan = _plan(chosen)
    if (folder / "meta" / "info.json").exists():
        return
    with storage.staged(str(folder / "meta" / "tasks.parquet")) as path:
        pq.write_table(_tasks_table(list(plan.tasks)), path)
    _, episodes, frames = plan.totals
    lengths = [_lengths(chosen, split, number, kept) for split, number, kept in chosen.shards()]
    statistics = {_CAMERA: _statistics(folder, np.concatenate(lengths))}
    storage.write(str(folder / "meta" / "stats.json"), json.dumps(statistics).encode())
    fps, height, width = plan.kind
    rate = int(fps) if fps == int(fps) else fps
    counts = [int(keep.sum()) for keep in chosen.keeps.values()]
    ends = itertools.pairwise(itertools.accumulate([0, *counts]))
    video = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
    info: dict[str, Any] = {"video.fps": rate, "video.height": height, "video.width": width, "video.channels": 3}
    info |= {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "has_audio": False}
    numbers = {field.name: {"dtype": _DTYPES[field.type], "shape": [1], "names": None} for field in _FRAMES}
    facts = {
        "codebase_version": _VERSION,
        "robot_type": None,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": len(plan.tasks),
        "chunks_size": _FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": rate,
        "splits": {split: f"{a}:{b}" for split, (a, b) in zip(chosen.keeps, ends, strict=True) if a < b},
        "data_path": _DATA,
        "video_path": _VIDEO,
        "features": {_CAMERA: video | {"info": info}, **numbers},
    }
    storage.write(str(folder / "meta" / "info.json"), json.dumps(facts, indent=4).encode())


def _tasks_table(texts: list[str]) -> pa.Table:
    """As pandas writes a frame with the texts as its index."""
    index = "__index_level_0__"
    column = {"metadata": None, "field_name": "task_index", "name": "task_index", "pandas_type": "int64"}
    texts_of = {"metadata": None, "field_name": index, "name": None, "pandas_type": "unicode"}
    about = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [column | {"numpy_type": "int64"}, texts_of | {"numpy_type": "object"}],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(range(len(texts)), pa.int64()), index: pa.array(texts, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def _statistics(folder: Path, lengths: np.ndarray) -> dict[str, Any]:
    """Least, greatest, mean and deviation of each colour, 0 to 1, of the middle frames of clips spread over all.

    Args:
        lengths: (N,) frames of each episode.
    """
    parts = []
    for number in np.unique(np.linspace(0, len(lengths) - 1, _SAMPLES).astype(int)).tolist():
        path = _video(folder, number)
        pixels = clip.decode(path.read_bytes(), [int(lengths[number]) // 2], name=str(path))[0] / 255.0
        parts.append((pixels.min((0, 1)), pixels.max((0, 1)), pixels.mean((0, 1)), (pixels**2).mean((0, 1))))
    low, high, mean, square = (np.stack(each) for each in zip(*parts, strict=True))
    mean = mean.mean(0)
    deviation = np.sqrt(np.maximum(square.mean(0) - mean**2, 0))
    named = {"min": low.min(0), "max": high.max(0), "mean": mean, "std": deviation}
    return {name: value.round(6).reshape(3, 1, 1).tolist() for name, value in named.items()} | {"count": [len(parts)]}


def rows(folder: Path, beside: Path) -> Iterator[dict[str, Any]]:
    """A row for each episode and camera below a folder with `meta/info.json`.

    A video file of one episode stays where it is; one of several is cut to `beside`, without coding again.

    Raises UserError: another version, no video, a file outside the folder, or an episode that is not in its video.
    """
    if not (folder / "meta" / "info.json").is_file():
        return
    cameras = _cameras(folder)
    for path in sorted((folder / "meta" / "episodes").glob("*/*.parquet")):
        for facts in _episodes(path, cameras):
            said = _said(path, facts)
            for number, camera in enumerate(cameras):
                to = beside / f"{facts['episode_index']:08d}-{number}.mp4"
                yield {"uri": str(_source(path, folder, camera, facts, to)), **said}


def _cameras(folder: Path) -> list[str]:
    """The features that are videos."""
    path = folder / "meta" / "info.json"
    try:
        with path.open("rb") as file:
            data = file.read(_INFO_BYTES + 1)
        if len(data) > _INFO_BYTES:
            raise ValueError(f"more than {_INFO_BYTES} bytes")
        info = json.loads(data)
        version, video_path = info["codebase_version"], info.get("video_path")
        cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    except (ValueError, RecursionError, OSError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not readable ({storage.printable(repr(e))[:200]}); correct it") from e
    if version != _VERSION:
        shown = storage.printable(str(version))[:20]
        raise UserError(f"{path}: is of LeRobot {shown}; convert it with convert_dataset_v21_to_v30 of lerobot")
    if not cameras:
        raise UserError(f"{path}: has no feature that is a video; images in Parquet are not read")
    if video_path != _VIDEO:
        raise UserError(f"{path}: video_path is {storage.printable(str(video_path))[:100]}; only {_VIDEO} is read")
    return cameras


def _episodes(path: Path, cameras: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file of episodes, with numbers that are some."""
    places = [f"videos/{camera}/{name}" for camera in cameras for name in _PLACE]
    times = [f"videos/{camera}/{name}_timestamp" for camera in cameras for name in ("from", "to")]
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            there = file.schema_arrow.names
            if missing := [name for name in ("episode_index", "length", *places, *times) if name not in there]:
                raise ValueError(f"no column {missing[0]}")
            names = ["episode_index", "length", *places, *times]
            names += [name for name in ("tasks", "captions", "label") if name in there]
            for batch in file.iter_batches(256, columns=names):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    if not all(
                        type(row[name]) is int and row[name] >= 0 for name in ("episode_index", "length", *places)
                    ):
                        raise ValueError(f"episode {row['episode_index']!r}: no numbers from 0")
                    if not all(isinstance(row[name], int | float) and math.isfinite(row[name]) for name in times):
                        raise ValueError(f"episode {row['episode_index']}: no times in seconds")
                    yield row
    except (pa.ArrowException, ValueError, OSError) as e:
        message = storage.printable(" ".join(str(e).split()))[:300]
        raise UserError(f"{path}: not readable ({message}); correct it") from e


def _said(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The captions of an episode, else its tasks, and its label, as columns of a manifest."""
    row: dict[str, Any] = {}
    try:
        if said := facts.get("captions") or [text for text in facts.get("tasks") or [] if text]:
            row["captions"] = said
        if facts.get("label") not in (None, ""):
            row["label"] = str(facts["label"])
        size = len(json.dumps(row))
    except TypeError as e:
        raise UserError(f"{path}: episode {facts['episode_index']}: tasks are no texts ({e}); correct them") from e
    if size > ROW_BYTES:
        raise UserError(f"{path}: episode {facts['episode_index']}: tasks have {size} bytes; {ROW_BYTES} are allowed")
    return row


def _source(path: Path, folder: Path, camera: str, facts: dict[str, Any], to: Path) -> Path:
    """The video of an episode: its file where it has no other, else a new one beside `to`."""
    place = {name: facts[f"videos/{camera}/{name}"] for name in _PLACE}
    video = (folder / _VIDEO.format(video_key=camera, **place)).resolve()
    name = storage.printable(f"{path}: episode {facts['episode_index']}: {camera}")[:400]
    if not video.is_relative_to(folder.resolve()) or not video.is_file():
        raise UserError(f"{name}: its video is no file of this folder")
    start, end = (facts[f"videos/{camera}/{name}_timestamp"] for name in ("from", "to"))
    try:
        with media.opened(video) as container:
            stream = container.streams.video[0]
            half = 0.5 / float(stream.average_rate)
            seconds = float((stream.duration or 0) * stream.time_base)
            if abs(start) < half and abs(seconds - end) < half:
                return video
            to = to.with_stem(f"{to.stem}-{_digest(video, start, end)}")
            if not to.exists():
                with storage.staged(str(to)) as spool:
                    frames = _cut(container, stream, spool, start, end, half)
                    if frames != facts["length"]:
                        raise ValueError(f"has {frames} frames from {start:g} to {end:g} s, not {facts['length']}")
    except (ValueError, ArithmeticError, IndexError, TypeError, OSError) as e:
        message = storage.printable(" ".join(str(e).split()))[:200]
        raise UserError(f"{name}: cannot be cut out ({message}); correct the folder") from e
    return to.absolute()


def _digest(video: Path, start: float, end: float) -> str:
    """Another one where the video has changed since, or another part of it is asked for."""
    return hashlib.sha256(json.dumps([state_of([video]), start, end]).encode()).hexdigest()[:12]


def _cut(container: Any, stream: Any, to: Path, start: float, end: float, half: float) -> int:
    """Copy the packets shown from `start` until before `end`, in seconds, to a file; returns their number.

    Times may be wrong by `half` a frame.
    """
    import av

    first, last = (round((seconds - half) / stream.time_base) for seconds in (start, end))
    container.seek(max(round((start + half) / stream.time_base), 0), stream=stream)
    count, offset = 0, None
    with av.open(str(to), "w", format="mp4") as target:
        copy = target.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is None or packet.pts is None or packet.pts < first:
                continue
            if packet.dts >= last:
                break
            if packet.pts < last:
                if offset is None:
                    if not packet.is_keyframe:
                        raise ValueError("it begins within a group of frames")
                    offset = packet.pts
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
                target.mux(packet)
                count += 1
    return count
