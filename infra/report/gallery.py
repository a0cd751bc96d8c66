"""The results of evaluations, for any kind of model: JSON records and videos in a run's `heldout` artifacts.

A record has figures in `summary`, verdicts in `summary.against`, and a row for each video in `videos` or `clips`. LAYOUTS
has the page's words for a record, by its file name. Any other record is shown with all its numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.infra.report import figures
from longtake.infra.report.embed import Pictures
from longtake.infra.report.runs import StageRun
from longtake.infra.report.text import fill, value_at

_VIDEO_BYTES = 4_000_000  # of a stage's videos in one page
_UNMEASURED = "No distance to real videos was measured: the stage names no feature network in features."


@dataclass(frozen=True)
class Layout:
    """The words for one kind of record.

    Braces in a text are paths in the summary; in a caption, paths in the video's row. A text with a missing value is left
    out.
    """

    title: str
    note: str = ""  # below the title
    heading: str = ""  # beside the stage's name
    scores: Mapping[str, str] | None = None  # labels and paths, in the summary and in the rows; None: all numbers
    unit: str = ""  # of the scores
    notes: Sequence[tuple[str, str]] = ()  # a sentence, and its replacement if it is left out
    columns: Mapping[str, str] | None = None  # labels and paths of a table that compares the stages
    caption: Sequence[str] = ("{file}",)  # of a video
    video: str | None = None  # a file that no row names, shown with some of its frames side by side


_SPLIT = "split {split}, seed {seed}"
_DISTANCE = (
    "Reconstructions are at a Fréchet distance of {distance[frechet]:.4g} and a kernel distance of {distance[kernel]:.4g}"
    " from their {distance[videos_real]} sources, by {distance[network]} ({distance[network_digest]:.12}).",
    "",
)
_SCORE = (
    "Inception score {inception_score:.4g} ± {inception_score_std:.2g} of {classified[videos]} videos in"
    " {classified[splits]} parts, by {classified[classifier]} ({classified[classifier_digest]:.12}), which has"
    " {classified[classes]} classes.",
    "",
)
_CAREFUL = ("Careful: {distance[warning]}.", "")

LAYOUTS = {
    "heldout.json": Layout(
        title="Held-out reconstructions",
        heading=f"{{clips}} clips of {{frames}} frames, {{frames_visible}} of them visible to the encoder; {_SPLIT}",
        scores={
            "predicted frames": "psnr_predicted",
            "copy of last visible": "psnr_copy_last",
            "visible frames": "psnr_visible",
            "all frames, all visible": "psnr_all",
        },
        unit="dB",
        notes=(
            _DISTANCE,
            _CAREFUL,
        ),
        caption=("{key}",),
    ),
    "reconstructed.json": Layout(
        title="Held-out reconstructions from tokens",
        heading=f"{{clips}} clips of {{frames}} frames; {_SPLIT}",
        scores={
            "PSNR in dB": "psnr",
            "PSNR of the clip scaled down to as many bits": "psnr_scaled_down",
            "share of codes used": "usage",
            "perplexity of tokens": "perplexity",
            "equal tokens a latent frame later": "score",
            "the same, above chance": "kappa",
        },
        notes=(
            _DISTANCE,
            _CAREFUL,
        ),
        caption=("{key}",),
    ),
    "generated.json": Layout(
        title="Generated videos",
        heading=f"{{videos}} videos of {{frames}} frames; loss on {{clips}} clips of the {_SPLIT}",
        scores={
            "held-out flow loss": "heldout_loss",
            "held-out flow loss, later in clips": "heldout_loss_later",
            "Fréchet distance": "distance[frechet]",
            "kernel distance": "distance[kernel]",
            "Fréchet distance of training videos": "frechet_train",
        },
        notes=(
            (
                "Distances by {distance[network]} ({distance[network_digest]:.12}), resize {distance[resize]}, of"
                " {distance[videos_fake]} generated to {distance[videos_real]} {distance[split]} videos of"
                " {distance[frames]} frames, {distance[width]}×{distance[height]}, seed {distance[seed]}.",
                _UNMEASURED,
            ),
            _CAREFUL,
        ),
        caption=("seed {seed}", "{class}", "{prompt}", "{frames} frames"),
    ),
    "drawn.json": Layout(
        title="Videos drawn token by token",
        heading=f"loss on {{clips}} clips of the {_SPLIT}",
        scores={
            "held-out loss in nats": "heldout_loss",
            "perplexity": "heldout_perplexity",
            "share of tokens foretold": "accuracy",
            "Fréchet distance": "distance[frechet]",
            "rise to the last chunk": "frechet_rise",
            "inception score": "inception_score",
            "class coherence of later chunks": "ccs",
        },
        notes=(
            (
                "Distances by {distance[network]} ({distance[network_digest]:.12}), resize {distance[resize]}, of the first"
                " {distance[frames]} frames of {distance[videos_fake]} generated videos of {frames} to"
                " {distance[videos_real]} {distance[split]} ones, {distance[width]}×{distance[height]}, seed {distance[seed]}.",
                _UNMEASURED,
            ),
            _CAREFUL,
            _SCORE,
        ),
        caption=("seed {seed}", "{class}", "{prompt}", "{frames} frames"),
    ),
    "joined.json": Layout(
        title="Videos joined clip by clip",
        note="Figures of change are shares of the range of pixels. At a joint of ratio 1 nothing is to be seen.",
        heading=f"errors on {{clips}} clips, {{videos}} videos of {{frames}} frames; {_SPLIT}",
        scores={
            "error of reconstructions": "l1",
            "the same, repeating the reference": "l1_copy",
            "the same, no movement encoded": "l1_unmoved",
            "change at joints to that inside": "seam_ratio",
            "turns at joints to those inside": "bend_ratio",
            "change": "change",
            "change of held-out clips": "change_heldout",
            "pixels out of range": "out_of_range",
            "drift of brightness": "level_drift",
            "exchanged: content is the one's": "swap_content",
            "exchanged: movement is the other's": "swap_movement",
            "Fréchet distance at joints": "frechet_seam",
            "Fréchet distance inside": "frechet_inner",
            "rise to the last bin": "frechet_rise",
            "inception score": "inception_score",
        },
        notes=(
            (
                "Distances by {distance[network]} ({distance[network_digest]:.12}), resize {distance[resize]}, of windows of"
                " {distance[frames]} frames, {distance[videos_fake]} generated and {distance[videos_real]} {distance[split]}"
                " ones, {distance[width]}×{distance[height]}, seed {distance[seed]}.",
                _UNMEASURED,
            ),
            _CAREFUL,
            _SCORE,
        ),
        caption=("{what}", "{key}", "seed {seed}", "{frames} frames"),
    ),
    "gaps.json": Layout(
        title="Filled gaps",
        note="Frames that are made are framed. PSNR, SSIM, LPIPS and CLIP-RS are of these frames alone, beside gaps that"
        " are filled without a model.",
        heading=f"losses on {{clips}} clips, gaps filled in {{videos}}; {_SPLIT}",
        scores={
            "held-out flow loss in gaps": "heldout_loss",
            "PSNR in dB": "middle_psnr",
            "PSNR of cross-fades": "middle_psnr_faded",
            "PSNR of ways between latents": "middle_psnr_latent",
            "SSIM": "middle_ssim",
            "LPIPS": "middle_lpips",
            "CLIP-RS": "clip_rs",
            "CLIP-RS of cross-fades": "clip_rs_faded",
            "CLIP-RS as released": "clip_rs_code",
            "change at joints to that elsewhere": "seam_ratio",
            "the same where frames are real": "seam_ratio_true",
            "error of the change at joints": "joint_error",
            "difference to the nearer side": "closeness",
            "difference of real frames": "closeness_true",
            "deviation of several draws": "diversity",
            "Fréchet distance over both joints": "frechet_seam",
            "Fréchet distance of cross-fades": "frechet_seam_faded",
        },
        notes=(
            ("CLIP-RS compares frames by an encoder of digest {embedder[digest]:.12} ({embedder[embedding]}).", ""),
            (
                "Distances by {distance[network]} ({distance[network_digest]:.12}), resize {distance[resize]}, of windows of"
                " {distance[frames]} frames, {distance[videos_fake]} filled and {distance[videos_real]} {distance[split]}"
                " ones, {distance[width]}×{distance[height]}, seed {distance[seed]}.",
                _UNMEASURED,
            ),
            _CAREFUL,
        ),
        caption=("{what}", "{key}"),
    ),
    "retrieved.json": Layout(
        title="Retrieved from memory",
        note="Held-out clips are compressed into a memory, and each of their latents is generated from that memory alone."
        " The bound is what the autoencoder loses without any memory.",
        heading=f"{{rate}}: true frames above, retrieved below; {_SPLIT}",
        scores={},
        columns={
            "rate (height × width × time)": "rate",
            "tokens": "tokens",
            "of latents": "steps",  # the records' key for latents
            "PSNR": "psnr",
            "PSNR bound": "psnr_bound",
            "SSIM": "ssim",
            "SSIM bound": "ssim_bound",
            "clips": "clips",
        },
        caption=(),
        video="retrieved.mp4",
    ),
    "continued.json": Layout(
        title="Continued videos",
        heading=f"{{videos}} held-out videos continued for {{segments}} segments; loss on {{clips}} clips of the {_SPLIT}",
        scores={
            "held-out flow loss": "heldout_loss",
            "the same at a video's start": "heldout_loss_start",
            "the same later": "heldout_loss_later",
            "distance to the beginning": "distance",
            "the same of what truly came next": "distance_true",
        },
        notes=(
            ("Held-out flow loss by latents of history: {heldout_loss_by_history}.", ""),
            (
                "Distance of each segment to the beginning: {distance_by_segment}.",
                "No distance to the beginning was measured: the stage names no feature network in features.",
            ),
        ),
        caption=("seed {seed}", "{prompt}", "the first {given_frames} frames are given"),
    ),
}


def galleries(stages: Sequence[StageRun], keep: Pictures) -> list[dict[str, Any]]:
    """The sections of the page that show evaluations: one for each kind of record, with an item for each stage."""
    folders = {stage.name: stage.artifacts / "heldout" for stage in stages if stage.artifacts}
    names = {path.name for folder in folders.values() for path in folder.glob("*.json")}
    sections = []
    for name in (*(name for name in LAYOUTS if name in names), *sorted(names - LAYOUTS.keys())):
        layout = LAYOUTS.get(name) or Layout(title=Path(name).stem.capitalize())
        records = {stage: folder / name for stage, folder in folders.items() if (folder / name).is_file()}
        items = [_item(stage, path, layout, keep) for stage, path in records.items()]
        sections.append({"id": Path(name).stem, "layout": layout, "items": items})
    return sections


def _item(stage: str, path: Path, layout: Layout, keep: Pictures) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    summary = record.get("summary", {})
    summary |= {"rate": _rate(summary)} if "rates" in summary else {}

    rows = [{"file": layout.video}] if layout.video else record.get("videos", record.get("clips", ()))
    rows = [row for row in rows if "file" in row]
    reels, room = [], _VIDEO_BYTES
    for row in rows:
        # a plain name, never a path: the record comes from a store that others write
        video = path.parent / Path(row["file"]).name
        size = video.stat().st_size if video.is_file() else 0
        if size <= room:
            caption = [text for template in layout.caption if (text := fill(template, row))]
            reel = {"file": row["file"], "video": figures.player(video) if size else None}
            reels.append(reel | {"caption": caption, "scores": _scores(layout, row)})
            room -= size

    frames = figures.stills(path.parent / layout.video) if layout.video else None
    return {
        "stage": stage,
        "heading": fill(layout.heading, summary),
        "cells": [value_at(place, summary) for place in (layout.columns or {}).values()],
        "verdicts": figures.verdicts(summary),
        "scores": _scores(layout, summary),
        "notes": [*(fill(text, summary) or otherwise for text, otherwise in layout.notes), figures.long_clips(summary)],
        "curves": figures.curves(stage, summary, keep),
        "latents": figures.latents(stage, path.parent, summary, keep),
        "stills": keep.add(f"{stage}-{path.stem}.jpg", frames) if frames else None,
        "panels": record.get("panels", []),
        "reels": reels,
        "left_out": len(rows) - len(reels),
    }


def _scores(layout: Layout, record: Mapping[str, Any]) -> list[tuple[str, float]]:
    paths = {name: name for name in record} if layout.scores is None else layout.scores
    values = ((label, value_at(path, record)) for label, path in paths.items())
    return [(label, float(value)) for label, value in values if isinstance(value, int | float)]


def _rate(summary: Mapping[str, Any]) -> str:
    """The kind and the rates of a memory, in a few words."""
    kind, branches = summary.get("memory", "encoder"), summary.get("branches", "both")
    rates = " + ".join(str(rate).replace("x", "×") for rate in summary["rates"])
    if kind == "encoder":
        return rates if branches == "both" else f"{rates}, {branches} branch only"
    return f"{rates}, patchify" if kind == "patchify" else str(kind)
