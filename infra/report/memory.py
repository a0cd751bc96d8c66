"""What models with a memory have left in their runs' `heldout` artifacts: retrieved frames, and videos that they went on with."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets import clip, media
from longtake.datasets.errors import Failure
from longtake.infra.report import pictures
from longtake.infra.report.embed import Pictures
from longtake.infra.report.heldout import playable
from longtake.infra.report.measured import verdicts
from longtake.infra.report.runs import StageRun

_MOST_BYTES = 4_000_000  # of video of a stage in one page
_STILLS, _HEIGHT = 8, 160


def retrieved(stages: Sequence[StageRun], keep: Pictures) -> list[dict[str, Any]]:
    """For each stage that has retrieved held-out clips: its scores, some frames in a row, PSNR by step, and the video."""
    return [_retrieved(stage, record, keep) for stage in stages if (record := _record(stage, "retrieved.json"))]


def _retrieved(stage: StageRun, record: dict[str, Any], keep: Pictures) -> dict[str, Any]:
    assert stage.artifacts
    summary = record.get("summary", {})
    path = stage.artifacts / "heldout" / "retrieved.mp4"
    small = path.is_file() and path.stat().st_size <= _MOST_BYTES
    stills = _stills(path) if path.is_file() else None
    by_step = [(n, float(value)) for n, value in enumerate(summary.get("psnr_by_step", ())) if math.isfinite(value)]
    return {
        "stage": stage,
        "summary": summary,
        "memory": memory_of(summary),
        "verdicts": verdicts(summary),
        "stills": keep.add(f"{stage.name}-retrieved.jpg", stills) if stills else None,
        "curve": keep.add(f"{stage.name}-psnr-by-step.svg", pictures.curve(by_step)) if by_step else None,
        "video": playable(path) if small else None,
    }


def memory_of(summary: dict[str, Any]) -> str:
    """In a few words which memory it was."""
    kind, branches = summary.get("memory", "encoder"), summary.get("branches", "both")
    rates = " + ".join(str(rate).replace("x", "×") for rate in summary.get("rates", ()))
    if kind == "encoder":
        return rates if branches == "both" else f"{rates}, {branches} branch only"
    return f"{rates}, patchify" if kind == "patchify" else str(kind)


def _stills(path: Path) -> bytes | None:
    """Frames spread over a video, in a row, small ones enlarged; None where it cannot be read."""
    import av
    from PIL.Image import Resampling

    try:
        with media.opened(path) as container:
            count = container.streams.video[0].frames
        chosen = np.linspace(0, count - 1, min(_STILLS, count)).round().astype(int)
        row = pictures.strip(clip.decode(path.read_bytes(), chosen.tolist()), _HEIGHT)
        times = max(1, _HEIGHT // row.height)
        return pictures.jpeg(row.resize((times * row.width, times * row.height), Resampling.NEAREST))
    except (av.FFmpegError, Failure, IndexError, ValueError):
        return None


def continued(stage: StageRun) -> dict[str, Any] | None:
    """Held-out videos that a model has gone on with, and how far they drift; None where the run has none."""
    record = _record(stage, "continued.json")
    if record is None:
        return None
    assert stage.artifacts
    videos, room = [], _MOST_BYTES
    for entry in record.get("videos", ()):
        # a plain name, never a path: the file comes from a store that others write
        path = stage.artifacts / "heldout" / Path(entry["file"]).name
        size = path.stat().st_size if path.is_file() else 0
        if size <= room:
            videos.append({"entry": entry, "video": playable(path) if size else None})
            room -= size
    summary = record.get("summary", {})
    named = [
        ("held-out flow loss", summary.get("heldout_loss")),
        ("the same at a video's start", summary.get("heldout_loss_start")),
        ("the same later", summary.get("heldout_loss_later")),
        ("distance to the beginning", summary.get("distance")),
        ("the same of what truly came next", summary.get("distance_true")),
    ]
    return {
        "stage": stage,
        "summary": summary,
        "scores": [(name, float(value)) for name, value in named if value is not None],
        "by_history": [(int(steps), float(loss)) for steps, loss in summary.get("heldout_loss_by_history") or ()],
        "verdicts": verdicts(summary),
        "by_segment": [float(value) for value in summary.get("distance_by_segment") or ()],
        "videos": videos,
        "left_out": len(record.get("videos", ())) - len(videos),
    }


def _record(stage: StageRun, name: str) -> dict[str, Any] | None:
    path = stage.artifacts / "heldout" / name if stage.artifacts else None
    if path is None or not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record
