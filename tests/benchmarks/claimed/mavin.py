"""MAVIN (arXiv 2405.18003): gaps of any length, in the world of actions. A body turns within the gap, and is seen at its ends.

Tiny models learn on pixels with spans of 2 to 12 of 20 frames, with spans of 8 alone, and with single frames as BERT has
words. Gaps of 14 frames are longer than any of training. Bodies are of held-out combinations.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mavin_arms
import torch
from mavin_arms import FRAMES, filled, span_of
from torch import Tensor

from claimed import Claim, Shown, alone
from claimed._moving import Clips, Stream, drawn, frames_of, ran, sharded
from longtake.datasets.loader import to_model
from longtake.infra.worlds import actions
from longtake.training import engines
from longtake.training.metrics import transitions
from longtake.training.models.common.video import write_panels
from longtake.training.models.mavin import baselines

SIZE, FPS = 16, 8
BATCH = 16
GAPS = (8, 12, 14)  # frames; the last is longer than any of training
ARMS = {"variable": "variable", "fixed": "fixed", "random": "random", "without frames at the ends": "blind"}
TRAINING = {"lr": 4e-3, "sample_steps": 20}


class Scale(NamedTuple):
    """How much is done: videos to learn from, steps, held-out videos."""

    known: int = 3000
    steps: int = 1000
    heldout: int = 64


WHOLE, SHORT = Scale(), Scale(64, 30, 8)
WITHOUT: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "hold and cut": baselines.held,
    "cross-fade": baselines.faded,
}


def settings(short: bool) -> dict[str, Any]:
    """All that results depend on, beside the arms."""
    videos = {"size": SIZE, "fps": FPS, "frames": FRAMES, "gaps": GAPS}
    training = TRAINING | {"model": mavin_arms.MODEL, "spans": mavin_arms.SPANS, "batch": BATCH}
    return {"world": "actions", **videos, "training": training, "scale": (SHORT if short else WHOLE)._asdict()}


def maker(arm: str, seed: int, folder: Path, short: bool) -> Callable[[Clips, int], Tensor]:
    """(clips, frames of the gap) -> `(N, 3, T, H, W)` in [-1, 1] with the gap filled, by an arm that is trained if need be."""
    scale = SHORT if short else WHOLE
    if arm in WITHOUT:

        def baseline(clips: Clips, length: int) -> Tensor:
            video, (begin, end) = to_model(clips.video), span_of(length)
            before, after = video[:, :, :begin], video[:, :, end:]
            return torch.cat([before, WITHOUT[arm](before, after, length), after], dim=2)

        return baseline
    with alone(folder / "lock"):
        # the stage asks a dataset for its frame rate; what is learned from lies in memory
        shards = sharded(folder, "actions", 24, 2 * SIZE, (FRAMES / FPS, 3), frames=FRAMES, fps=FPS)
        dataset = ran(folder, {"shards": shards})["shards"].uri
    options = argparse.Namespace(out=folder.absolute(), dataset=dataset, steps=scale.steps, **TRAINING)
    known = drawn("actions", scale.known, 1 + seed, False, SIZE, frames=FRAMES, fps=FPS)
    one = mavin_arms.trained(options, ARMS[arm], seed, Stream(known.video, FRAMES, BATCH, seed))
    return lambda clips, length: filled(one, clips.video, length, seed)


def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    """Figures of an arm by the frames of the gap; see `FIGURES`."""
    found: dict[str, float] = {}
    with engines.process_group():
        make = maker(arm, seed, folder, short)
        clips = drawn("actions", (SHORT if short else WHOLE).heldout, 900 + seed, True, SIZE, frames=FRAMES, fps=FPS)
        for length in GAPS:
            made = make(clips, length)
            found |= {f"{name} {length}": value for name, value in measured(clips, made, length).items()}
            pairs = zip(to_model(clips.video[:4]).split(1), made[:4].split(1), strict=True)
            panels: Sequence[Any] = [each for pair in pairs for each in pair]
            write_panels(folder / f"{arm.replace(' ', '-')}-{seed}-{length}.mp4", panels, FPS)
    return found


def measured(clips: Clips, made: Tensor, length: int) -> dict[str, float]:
    """PSNR of the frames of the gap, and what the world's reader says of them and no others."""
    (begin, end), truth = span_of(length), to_model(clips.video)
    rows = []
    for video, true, facts in zip(made, truth, clips.truths, strict=True):
        gap = video[None, :, begin:end]
        row = {"psnr": transitions.middle(gap, true[None, :, begin:end])["psnr"]}
        rows.append(row | actions.read(frames_of(gap[0]), actions.part(facts, begin, end), clips.fps))
    return {name: statistics.mean(row[name] for row in rows) for name in ("psnr", "identity", "action", "off")}


NAMES = {
    "psnr": ("PSNR in dB", "higher"),
    "identity": ("frames with the one body, in its shape and colour", "higher"),
    "action": ("actions that go the right way", "higher"),
    "off": ("distance from where the body should be, in sides", "lower"),
}
FIGURES = {
    f"{name} {gap}": Shown(f"{said}, gaps of {gap}", better) for name, (said, better) in NAMES.items() for gap in GAPS
}  # type: ignore[arg-type]
LONGEST = GAPS[-1]
CLAIMS = [
    Claim(
        "mavin",
        "spans",
        "Spans of any length teach a model to fill gaps, better than spans of one length or single frames do, and the "
        "frames at the ends tell it what the body is. Training has gaps of up to 12 frames. The paper's own figure is another: "
        "CLIP-RS of 0.844 for horses and of 0.846 for tigers (key results).",
        {arm: mavin_arms.ARMS[name] for arm, name in ARMS.items()} | dict.fromkeys(WITHOUT),
        FIGURES,
        [
            *(
                ("variable", other, f"{name} {gap}")
                for gap in GAPS[1:]
                for name in ("psnr", "action", "off")
                for other in ("fixed", "random")
            ),
            ("variable", "fixed", f"identity {LONGEST}"),
            ("variable", "random", f"identity {LONGEST}"),
            # which has no frames at the ends either
            ("without frames at the ends", "random", f"psnr {LONGEST}"),
            ("without frames at the ends", "random", f"identity {LONGEST}"),
            ("variable", "without frames at the ends", f"identity {LONGEST}"),
            ("variable", "cross-fade", f"identity {LONGEST}"),
            ("variable", "hold and cut", f"off {LONGEST}"),
        ],
        run,
        settings,
    )
]
