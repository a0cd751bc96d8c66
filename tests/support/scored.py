"""Scorers run on one clip without Ray, and columns of scores that nothing has scored."""

from __future__ import annotations

import io
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from longtake.datasets import compact, index, schema, score_columns, scores
from longtake.datasets.scores import Column, Field
from longtake.pipeline.encode import encode
from longtake.pipeline.score_shard import PIECE, Clip, is_looker
from longtake.pipeline.scorers import load
from longtake.pipeline.scorers.scorer import Scorer, Values


def score_file(
    scorer: str | Scorer, settings: Mapping[str, Any], file: Path | bytes, piece: int = PIECE, device: str = "cpu"
) -> Values:
    """The values of a whole video, H.264 in mp4 as clips are: a path or its bytes."""
    kind = load(scorer) if isinstance(scorer, str) else scorer
    mp4 = file.read_bytes() if isinstance(file, Path) else file
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        count = sum(1 for packet in container.demux(stream) if packet.size)
        row = {"key": "clip-00000", "frame_count": count, "fps": float(stream.average_rate or 1)}
        row |= {"height": stream.height, "width": stream.width}
    config = kind.config.model_validate(settings)
    at_work = kind.load(config, device)
    if is_looker(at_work):
        frames = Clip(mp4, row, [at_work], "clip").pictures()[0]  # type: ignore[list-item]
        return at_work.look(frames[None])[0]  # type: ignore[union-attr]
    watch = at_work.begin(row)  # type: ignore[union-attr]
    for frames in Clip(mp4, row, [], "clip").pieces(piece):
        watch.add(frames)
    return dict(watch.values())


def score_frames(
    scorer: str | Scorer,
    settings: Mapping[str, Any],
    frames: np.ndarray,
    fps: float,
    piece: int = PIECE,
    crf: int = 16,
    device: str = "cpu",
) -> Values:
    """The values of (T, H, W, 3) uint8 RGB, H and W even, coded as clips are."""
    return score_file(scorer, settings, coded(frames, fps, crf), piece, device)


def coded(frames: np.ndarray, fps: float, crf: int = 16, gop: int = 12, preset: str = "medium") -> bytes:
    """(T, H, W, 3) uint8 RGB as the mp4 of a clip."""
    scaler, target = VideoReformatter(), {"dst_colorspace": "ITU601", "dst_color_range": "MPEG", "threads": 1}
    images = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    planes = [np.ascontiguousarray(scaler.reformat(i, format="yuv420p", **target).to_ndarray()) for i in images]
    return encode(planes, Fraction(fps).limit_denominator(1001), crf, preset, gop)


def write_columns(
    dataset: str, fields: Mapping[str, Mapping[str, Literal["number", "label"] | int | np.ndarray]], seed: int = 0
) -> dict[str, str]:
    """Columns of made-up scores for all clips of a dataset: `{NAME: {FIELD: what}}`; returns the column of each name.

    `what` is "number" (uniform in 0..1, a tenth of them null), "label" (of "red", "green", "blue"), D for unit vectors (D,),
    or an array of what all clips get, those of the train split first: (N,) numbers or labels, or (N, D) vectors.
    """
    named = {}
    for name, kinds in fields.items():
        known = tuple(_field(field, what) for field, what in kinds.items())
        column = scores.column_name(name, [seed, sorted(kinds)])
        named[name] = column
        about = Column(column, "made-up", {}, "", known)
        rng, done = np.random.default_rng(seed), 0
        for split in schema.SPLITS:
            for shard in index.read_shards(dataset, split):
                rows: list[dict[str, Any]] = [{} for _ in range(len(shard.table))]
                for field, (number, row) in ((f, each) for f in known for each in enumerate(rows)):
                    row[field.name] = _value(kinds[field.name], field, rng, done + number)
                done += len(rows)
                scores.write_shard(dataset, shard, about, rows)
    return named


def _field(name: str, what: Any) -> Field:
    if isinstance(what, np.ndarray) and what.ndim == 2:
        return Field(name, "vector", "made up", width=what.shape[1])
    if isinstance(what, np.ndarray) and what.dtype.kind in "UO":
        return Field(name, "label", "made up", labels=tuple(sorted({str(v) for v in what if v is not None})))
    if isinstance(what, int):
        return Field(name, "vector", "made up", width=what)
    return (
        Field(name, "label", "made up", ("red", "green", "blue"))
        if isinstance(what, str) and what == "label"
        else Field(name, "number", "0..1")
    )


def _value(what: Any, field: Field, rng: np.random.Generator, number: int) -> Any:
    if isinstance(what, np.ndarray):
        return str(what[number]) if field.kind == "label" and what[number] is not None else what[number]
    if field.kind == "vector":
        vector = rng.standard_normal(field.width)
        return vector / np.linalg.norm(vector)
    if field.kind == "label":
        return field.labels[rng.integers(len(field.labels))]
    return None if rng.random() < 0.1 else rng.random()


def write_record(uri: str, dataset: str, columns: Mapping[str, str]) -> str:
    """The record of a `score` stage for columns that a dataset has; returns `uri`."""
    described = {name: score_columns.described(dataset, column) for name, column in columns.items()}
    digests = {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS}
    scores.write_scores(uri, scores.Scores(dataset, described, None, digests))
    return uri
