"""What `shots` finds in real footage whose hard cuts were labelled by looking."""

import json
import math
from itertools import pairwise
from pathlib import Path

from longtake.pipeline.cut import shots
from longtake.pipeline.decode import frames, probe
from longtake.pipeline.source import resample

LABELS: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parents[1] / "pipeline" / "labels_cuts.json").read_text()
)


def judged(folder: Path, rate: float | None) -> tuple[int, int, int]:
    """Of the labelled files in a folder, at a rate, None for their own: the cuts that are found, all cuts, all starts of shots.

    Whoever made the labels has looked at each of these frames and those before it; all others are no cuts either.
    """
    hits = wanted = made = 0
    for name, labels in LABELS.items():
        path = str(folder / name)
        own = probe(path)
        scale = 128 / min(own.width, own.height)
        scaled = (round(own.width * scale / 2) * 2, round(own.height * scale / 2) * 2)
        sampled = resample(((frame, (scaled, scaled)) for frame in frames(path)), rate or min(own.fps, 30.0))
        said = [(frame.number, start, why) for frame, start, why in shots(sampled)]
        cuts = {b[0] for a, b in pairwise(said) if b[1] and not a[2]}
        # at a low rate a cut is seen in the first frame after it that is sampled
        step = math.ceil(own.fps / rate) if rate else 1
        hits += sum(any(0 <= start - cut < step for start in cuts) for cut in labels["cuts"])
        wanted, made = wanted + len(labels["cuts"]), made + len(cuts)
    return hits, wanted, made
