"""The parts of an evaluation's record as sentences, plots and players: verdicts, curves, latents, videos."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets import clip, media
from longtake.datasets.errors import Failure
from longtake.infra.report import pictures
from longtake.infra.report.embed import Pictures, data_uri

_PICTURE_BYTES = 2_000_000  # the largest picture of latents in a page
_STILLS, _STILLS_HEIGHT = 8, 160
_VIDEO_HEIGHT, _VIDEO_WIDTH = 220, 1150  # pixels on the page

# title, unit, and which series of a summary are drawn, by their labels
_CURVES = (
    ("PSNR by latent", "dB, from the oldest on", {"whole": "psnr_by_step", "in pieces": "psnr_by_step_pieces"}),
    ("equal tokens a latent later", "share, by latent", {"held-out": "equal_tokens_by_step"}),
    ("loss of tokens", "nats, by latent", {"held-out": "heldout_loss_by_step"}),
    ("Fréchet distance of chunks", "by first frame", {"generated": "frechet_by_chunk"}),
    ("kernel distance of chunks", "by first frame", {"generated": "kernel_by_chunk"}),
    ("class coherence (CCS)", "share of videos, by first frame", {"generated": "ccs_by_chunk"}),
    ("inception coherence (ICS)", "nats, by first frame", {"generated": "ics_by_chunk"}),
    (
        "change from frame to frame",
        "of the range of pixels; lines where clips meet",
        {"generated": "change_by_frame", "held-out": "change_by_frame_heldout"},
    ),
    ("Fréchet distance of bins", "by first frame", {"generated": "frechet_by_bin"}),
    ("kernel distance of bins", "by first frame", {"generated": "kernel_by_bin"}),
    ("LPIPS to the first frame", "at the end of a bin, by its first frame", {"generated": "lpips_by_bin"}),
    (
        "loss in gaps",
        "of the flow, by frames of a gap",
        {"model": "heldout_loss_by_gap", "mean velocity": "heldout_loss_mean_by_gap"},
    ),
    (
        "PSNR of gaps",
        "dB, by frames of a gap",
        {
            "filled": "middle_psnr_by_gap",
            "cross-faded": "middle_psnr_faded_by_gap",
            "hold and cut": "middle_psnr_held_by_gap",
            "way between latents": "middle_psnr_latent_by_gap",
        },
    ),
    (
        "SSIM of gaps",
        "by frames of a gap",
        {"filled": "middle_ssim_by_gap", "cross-faded": "middle_ssim_faded_by_gap"},
    ),
    (
        "LPIPS of gaps",
        "by frames of a gap",
        {
            "filled": "middle_lpips_by_gap",
            "cross-faded": "middle_lpips_faded_by_gap",
            "hold and cut": "middle_lpips_held_by_gap",
            "way between latents": "middle_lpips_latent_by_gap",
        },
    ),
    (
        "CLIP-RS of gaps",
        "by frames of a gap",
        {
            "filled": "clip_rs_by_gap",
            "cross-faded": "clip_rs_faded_by_gap",
            "hold and cut": "clip_rs_held_by_gap",
            "way between latents": "clip_rs_latent_by_gap",
        },
    ),
    (
        "change at joints to that elsewhere",
        "by frames of a gap",
        {"filled": "seam_ratio_by_gap", "held-out": "seam_ratio_true_by_gap"},
    ),
    (
        "distance of latents",
        "by latents apart",
        {"held-out": "ltd_normalised", "generated": "ltd_normalised_generated"},
    ),
)


def verdicts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A plain sentence for each trivial prediction, and whether the model beats it."""
    return [{"beats": verdict["beats"], "text": _sentence(verdict)} for verdict in summary.get("against", ())]


def _sentence(verdict: Mapping[str, Any]) -> str:
    unit = f" {verdict['unit']}" if verdict["unit"] else ""
    digits = ".1f" if verdict["unit"] == "dB" else ".4g"
    ours, theirs = (format(float(verdict[key]), digits) for key in ("figure", "baseline"))
    subject, answer = str(verdict["what"]), "yes" if verdict["beats"] else "no"
    return f"{subject[:1].upper()}{subject[1:]} beats {verdict['trivial']}: {answer}, {ours} against {theirs}{unit}."


def long_clips(summary: Mapping[str, Any]) -> str:
    """A sentence on whether long clips suffer; empty where none was measured."""
    psnr, pieces = summary.get("psnr_long"), summary.get("psnr_long_pieces")
    if psnr is None or pieces is None:
        return ""
    loss = pieces - psnr
    relation = f"{abs(loss):.1f} dB {'less' if loss > 0 else 'more'} than" if abs(loss) >= 0.05 else "the same as"
    return (
        f"{summary['long_clips']:.0f} clips of up to {summary['long_frames']:.0f} frames, encoded whole, have {psnr:.1f} dB"
        f" beyond the {summary['frames']} frames of a training window: {relation} in pieces of a window ({pieces:.1f} dB)."
    )


def curves(stage: str, summary: Mapping[str, Any], keep: Pictures) -> list[dict[str, str]]:
    """Plots of a summary's series and of the paths of latents, each with a title and a unit."""
    plots = []
    for title, unit, names in _CURVES:
        lines = {label: points for label, name in names.items() if len(points := _series(summary, name)) > 1}
        if lines:
            marks = [x for name in names.values() for x in summary.get("marks", {}).get(name, ())]
            picture = keep.add(f"{stage}-{title}.svg", pictures.lines(lines, marks))
            plots.append({"title": title, "unit": unit, "picture": picture})
    if paths := {_kind(kind): points for kind, points in summary.get("latents", {}).get("paths", {}).items()}:
        picture = keep.add(f"{stage}-paths.svg", pictures.paths(paths))
        plots.append({"title": "paths of latents", "unit": "two components", "picture": picture})
    return plots


def _series(summary: Mapping[str, Any], name: str) -> list[tuple[int, float]]:
    """The finite points of a series. Old records of retrieval have its values alone, in the summary itself."""
    points = summary.get("series", {}).get(name) or list(enumerate(summary.get(name) or ()))
    return [(x, y) for x, y in points if math.isfinite(y)]


def _kind(kind: str) -> str:
    return "held-out" if kind == "heldout" else kind


def latents(stage: str, folder: Path, summary: Mapping[str, Any], keep: Pictures) -> dict[str, str] | None:
    """The picture of latents as colours, and of which videos they are; None if there is none."""
    path = folder / "latents.png"
    if not path.is_file() or path.stat().st_size > _PICTURE_BYTES:
        return None
    kinds = " and ".join(map(_kind, summary.get("latents", {}).get("ltd") or ["heldout"]))
    return {"picture": keep.add(f"{stage}-latents.png", path.read_bytes()), "kinds": kinds}


def stills(path: Path) -> bytes | None:
    """A JPEG of frames spread over a video, in a row, small ones enlarged; None where it cannot be read."""
    import av
    from PIL.Image import Resampling

    try:
        with media.opened(path) as container:
            count = container.streams.video[0].frames
        frames = np.linspace(0, count - 1, min(_STILLS, count)).round().astype(int)
        row = pictures.strip(clip.decode(path.read_bytes(), frames.tolist()), _STILLS_HEIGHT)
        scale = max(1, _STILLS_HEIGHT // row.height)
        return pictures.jpeg(row.resize((scale * row.width, scale * row.height), Resampling.NEAREST))
    except (av.FFmpegError, OSError, Failure, IndexError, ValueError):
        return None


def player(path: Path) -> dict[str, Any] | None:
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
        "shown": min(_VIDEO_WIDTH, round(width * _VIDEO_HEIGHT / height)),
    }
