"""What a stage's evaluation has measured beside its pictures: verdicts against trivial predictions, curves, latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.infra.report import pictures
from longtake.infra.report.embed import Pictures
from longtake.infra.report.runs import StageRun

_MOST_BYTES = 2_000_000  # of a picture


def verdicts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A plain sentence for each trivial prediction, and whether the model beats it."""
    return [{"beats": found["beats"], "text": _sentence(found)} for found in summary.get("against", ())]


def _sentence(found: Mapping[str, Any]) -> str:
    unit = f" {found['unit']}" if found["unit"] else ""
    ours, theirs = (_short(float(found[key]), found["unit"]) for key in ("figure", "baseline"))
    what = str(found["what"])
    return f"{what[:1].upper()}{what[1:]} beats {found['trivial']}: {'yes' if found['beats'] else 'no'}, {ours} against {theirs}{unit}."


def _short(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit == "dB" else f"{value:.4g}"


def whole_clips(summary: Mapping[str, Any]) -> str | None:
    """Whether long clips suffer, in a sentence; None where none was measured."""
    whole, pieces = summary.get("psnr_long"), summary.get("psnr_long_pieces")
    if whole is None or pieces is None:
        return None
    lost = pieces - whole
    how = f"{abs(lost):.1f} dB {'less' if lost > 0 else 'more'}" if abs(lost) >= 0.05 else "the same"
    return (
        (
            f"{summary['long_clips']:.0f} clips of up to {summary['long_frames']:.0f} frames, encoded whole, have {whole:.1f} dB beyond"
            f" the {summary['frames']} frames of a training window: {how} as in pieces of a window ({pieces:.1f} dB)."
        )
        .replace("less as", "less than")
        .replace("more as", "more than")
    )


def curves(stage: StageRun, summary: Mapping[str, Any], keep: Pictures) -> list[dict[str, str]]:
    """Plots of PSNR by position, and of the latents' distance by interval, each with a title and a legend."""
    series = summary.get("series", {})
    plots = []
    for title, unit, names in (
        ("PSNR by latent step", "dB", {"whole": "psnr_by_step", "in pieces": "psnr_by_step_pieces"}),
        (
            "distance of latents",
            "by steps apart",
            {"held-out": "ltd_normalised", "generated": "ltd_normalised_generated"},
        ),
    ):
        lines = {label: series[name] for label, name in names.items() if len(series.get(name, ())) > 1}
        if lines:
            drawn = keep.add(f"{stage.name}-{title}.svg", pictures.lines(lines))
            plots.append({"title": title, "unit": unit, "picture": drawn})
    if paths := {_name(kind): some for kind, some in summary.get("latents", {}).get("paths", {}).items()}:
        drawn = keep.add(f"{stage.name}-paths.svg", pictures.paths(paths))
        plots.append({"title": "paths of latents", "unit": "two components", "picture": drawn})
    return plots


def latents(stage: StageRun, keep: Pictures) -> str | None:
    """The picture of latents as colours; None where there is none."""
    path = Path(stage.artifacts) / "heldout" / "latents.png" if stage.artifacts else None
    if path is None or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return None
    return keep.add(f"{stage.name}-latents.png", path.read_bytes())


def measured(stage: StageRun, summary: Mapping[str, Any], keep: Pictures) -> dict[str, Any]:
    """All of it, for the page."""
    return {
        "verdicts": verdicts(summary),
        "whole": whole_clips(summary),
        "curves": curves(stage, summary, keep),
        "latents": latents(stage, keep),
        "kinds": " and ".join(map(_name, summary.get("latents", {}).get("ltd") or {"heldout": None})),
    }


def _name(kind: str) -> str:
    return "held-out" if kind == "heldout" else kind
