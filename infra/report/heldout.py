"""Held-out reconstructions of a training run, as its `heldout` artifacts hold them."""

import json
import math
from pathlib import Path
from typing import Any

from longtake.datasets import media
from longtake.infra.report.embed import data_uri
from longtake.infra.report.runs import StageRun

SCORES = {
    "psnr_predicted": "predicted frames",
    "psnr_copy_last": "copy of last visible",
    "psnr_visible": "visible frames",
    "psnr_all": "all frames, all visible",
}
_MOST_BYTES = 3_000_000  # of video in one page
_SHOWN_HEIGHT = 220
_SAME = 0.05  # dB that nobody sees


def heldout(stage: StageRun) -> dict[str, Any] | None:
    """The clips with their videos, and the verdict; None where the run has none."""
    folder = stage.artifacts / "heldout" if stage.artifacts else None
    if folder is None or not (folder / "heldout.json").is_file():
        return None
    record = json.loads((folder / "heldout.json").read_text())
    clips, room = [], _MOST_BYTES
    for entry in record.get("clips", ()):
        # a plain name, never a path: the file comes from a store that others write
        path = folder / Path(entry["file"]).name
        size = path.stat().st_size if path.is_file() else 0
        if size <= room:
            clips.append({"entry": entry, "scores": _scores(entry), "video": playable(path) if size else None})
            room -= size
    return {
        "stage": stage,
        "summary": record.get("summary", {}),
        "scores": _scores(record.get("summary", {})),
        "panels": record.get("panels", []),
        "clips": clips,
        "left_out": len(record.get("clips", ())) - len(clips),
        "verdict": verdict(record.get("summary", {}), record.get("clips", [])),
    }


def _scores(numbers: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, float(numbers[key])) for key, name in SCORES.items() if numbers.get(key) is not None]


def playable(path: Path) -> dict[str, Any] | None:
    """A video inside the page: its URI and size, and the width to show it at; None where it cannot be read."""
    import av

    try:
        with media.opened(path) as container:
            context = container.streams.video[0].codec_context
            width, height = context.width, context.height
    except (av.FFmpegError, IndexError, ValueError):
        return None
    return {
        "uri": data_uri("mp4", path.read_bytes()),
        "width": width,
        "height": height,
        "shown": min(1150, round(width * _SHOWN_HEIGHT / height)),
    }


def verdict(summary: dict[str, Any], clips: list[dict[str, Any]]) -> str | None:
    """One honest sentence: is predicting the hidden frames better than copying the last visible one?"""
    predicted, copied = (_number(summary, key) for key in ("psnr_predicted", "psnr_copy_last"))
    if not (math.isfinite(predicted) and math.isfinite(copied)):
        return None
    pairs = [(_number(c, "psnr_predicted"), _number(c, "psnr_copy_last")) for c in clips]
    wins = sum(a > b for a, b in pairs)
    gain = predicted - copied
    if abs(gain) < _SAME:
        how = "no better and no worse than"
    else:
        how = f"{abs(gain):.1f} dB {'better' if gain > 0 else 'worse'} than"
    first = f"Hidden frames are predicted at {predicted:.1f} dB, {how} copying the last visible frame ({copied:.1f} dB)"
    return first + (f"; the prediction wins on {wins} of the {len(pairs)} clips." if pairs else ".")


def _number(numbers: dict[str, Any], key: str) -> float:
    return math.nan if numbers.get(key) is None else float(numbers[key])
