"""Videos that a trained prior has generated, as its run's `heldout` artifacts hold them in `generated.json`."""

import json
from pathlib import Path
from typing import Any

from longtake.infra.report.embed import Pictures
from longtake.infra.report.heldout import playable
from longtake.infra.report.measured import measured
from longtake.infra.report.runs import StageRun

_MOST_BYTES = 4_000_000  # of video in one page


def generated(stage: StageRun, keep: Pictures) -> dict[str, Any] | None:
    """The videos, and what was measured; None where the run has none."""
    folder = stage.artifacts / "heldout" if stage.artifacts else None
    if folder is None or not (folder / "generated.json").is_file():
        return None
    record = json.loads((folder / "generated.json").read_text())
    videos, room = [], _MOST_BYTES
    for entry in record.get("videos", ()):
        # a plain name, never a path: the file comes from a store that others write
        path = folder / Path(entry["file"]).name
        size = path.stat().st_size if path.is_file() else 0
        if size <= room:
            videos.append({"entry": entry, "video": playable(path) if size else None})
            room -= size
    summary = record.get("summary", {})
    return {
        "stage": stage,
        "summary": summary,
        "scores": _scores(summary),
        "distance": _distance(summary.get("distance")),
        "measured": measured(stage, summary, keep),
        "videos": videos,
        "left_out": len(record.get("videos", ())) - len(videos),
    }


def _scores(summary: dict[str, Any]) -> list[tuple[str, float]]:
    distance = summary.get("distance") or {}
    named = [
        ("held-out flow loss", summary.get("heldout_loss")),
        ("held-out flow loss, later in clips", summary.get("heldout_loss_later")),
        ("Fréchet distance", distance.get("frechet")),
        ("kernel distance", distance.get("kernel")),
        ("Fréchet distance of training videos", summary.get("frechet_train")),
    ]
    return [(name, float(value)) for name, value in named if value is not None]


def _distance(found: dict[str, Any] | None) -> str:
    """In one sentence what the distances are of, without which they say nothing."""
    if not found:
        return "No distance to real videos was measured: the stage names no feature network in features."
    few = f" Careful: {found['warning']}." if found.get("warning") else ""
    return (
        f"Distances by {found['network']} ({str(found['network_digest'])[:12]}), resize {found['resize']}, of"
        f" {found['videos_fake']} generated to {found['videos_real']} {found['split']} videos of {found['frames']} frames,"
        f" {found['width']}×{found['height']}, seed {found['seed']}.{few}"
    )
