"""Held-out reconstructions of a training run, as its `heldout` artifacts hold them."""

import json
from pathlib import Path
from typing import Any

from longtake.datasets import media
from longtake.infra.report.embed import Pictures, data_uri
from longtake.infra.report.measured import measured
from longtake.infra.report.runs import StageRun

SCORES = {
    "psnr_predicted": "predicted frames",
    "psnr_copy_last": "copy of last visible",
    "psnr_visible": "visible frames",
    "psnr_all": "all frames, all visible",
}
_MOST_BYTES = 3_000_000  # of video in one page
_SHOWN_HEIGHT = 220


def heldout(stage: StageRun, keep: Pictures) -> dict[str, Any] | None:
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
        "distances": _distances(record.get("summary", {})),
        "panels": record.get("panels", []),
        "clips": clips,
        "left_out": len(record.get("clips", ())) - len(clips),
        "measured": measured(stage, record.get("summary", {}), keep),
    }


def _scores(numbers: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, float(numbers[key])) for key, name in SCORES.items() if numbers.get(key) is not None]


def _distances(summary: dict[str, Any]) -> str:
    """Fréchet and kernel distance of the reconstructions in a sentence; empty where none was measured."""
    found = summary.get("distance")
    if not found:
        return ""
    few = f" Careful: {found['warning']}." if found.get("warning") else ""
    return (
        f"Reconstructions are at a Fréchet distance of {found['frechet']:.4g} and a kernel distance of {found['kernel']:.4g} from"
        f" their {found['videos_real']} sources, by {found['network']} ({str(found['network_digest'])[:12]}).{few}"
    )


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
