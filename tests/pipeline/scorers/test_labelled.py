"""The scorers on real footage against labels that were given by looking: the figures of their page do not fall.

As `tests/benchmarks/judge_scorers.py` judges them, but on the first two seconds of each file, or of its stretch, in small, so
that it takes seconds; for all, and for other thresholds, run that script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from scored import coded, score_file

LABELS = Path(__file__).parents[2] / "benchmarks"
SECONDS, SIDE = 2.0, 256
# of each line of the labels: what was seen, and what the scorers say
Judged = list[tuple[Mapping[str, Any], Mapping[str, Any]]]

pytestmark = pytest.mark.slow

MOTION, PICTURE = ("motion", "cadence", "light"), ("focus", "coding", "bars", "overlay", "text")


def shown(file: Path, first: int, last: int) -> bytes:
    """A stretch of a file, coded as clips are."""
    images = []
    with av.open(str(file)) as container:
        rate = container.streams.video[0].average_rate or 1
        for number, frame in enumerate(container.decode(video=0)):
            if number >= min(last, first + SECONDS * rate):
                break
            if number >= first:
                scale = SIDE / min(frame.width, frame.height)
                size = [round(side * scale / 2) * 2 for side in (frame.width, frame.height)]
                images.append(frame.reformat(*size, "rgb24", interpolation="AREA").to_ndarray())
    return coded(np.stack(images), float(rate), preset="ultrafast")


@pytest.fixture(scope="module")
def judged(videos: Path) -> Judged:
    """Of each line of the labels: what was seen, and what the scorers say, by SCORER.FIELD."""
    pairs: Judged = []
    clips: dict[tuple[str, int], bytes] = {}
    for name, scorers in (("labels_motion.json", MOTION), ("labels_picture.json", PICTURE)):
        for line in json.loads((LABELS / name).read_text()):
            first, last = line.get("frames", (0, 1 << 30))
            # far into a file, decoding takes longest
            if first > 400:
                continue
            key = line["file"], first
            if key not in clips:
                clips[key] = shown(videos / "real" / line["file"], first, last)
            values = {scorer: score_file(scorer, {}, clips[key]) for scorer in scorers}
            said = {f"{scorer}.{field}": value for scorer in scorers for field, value in values[scorer].items()}
            pairs.append((line, said))
    return pairs


def rates(answers: list[tuple[bool, bool]]) -> tuple[float, float]:
    """Precision and recall of (said, seen)."""
    right = sum(said and seen for said, seen in answers)
    return right / max(1, sum(said for said, _ in answers)), right / max(1, sum(seen for _, seen in answers))


@pytest.mark.parametrize(
    ("field", "seen", "label", "precision", "recall"),
    [
        ("motion.move", "move", "static", 0.85, 0.8),
        ("motion.move", "move", "mixed", 0.65, 0.8),
        ("motion.move", "move", "shake", 0.4, 0.99),
        ("cadence.cadence", "cadence", "full", 0.95, 0.75),
        ("cadence.cadence", "cadence", "frozen", 0.5, 0.99),
        ("cadence.cadence", "cadence", "telecine", 0.7, 0.9),
        ("bars.shape", "bars", "none", 0.95, 0.95),
        ("bars.shape", "bars", "pillarbox", 0.99, 0.99),
    ],
)
def test_labels(judged: Judged, field: str, seen: str, label: str, precision: float, recall: float) -> None:
    # where several labels would do, any is right
    pairs = [(said[field], line[seen]) for line, said in judged if seen in line and said.get(field) is not None]
    answers = [
        (value == label, label in right if value == label else right[0] == label and value not in right)
        for value, right in pairs
    ]
    found = rates(answers)
    assert found[0] >= precision and found[1] >= recall, found


@pytest.mark.parametrize(
    ("field", "threshold", "seen", "precision", "recall"),
    [
        ("light.exposure", -0.258, "dark", 0.7, 0.99),
        ("light.bright", 0.0204, "blown", 0.3, 0.99),
        ("light.flicker", 0.00343, "flicker", 0.2, 0.99),
        ("focus.subject", 0.403, "blurred", 0.25, 0.4),
        ("focus.blur", 0.496, "blurred", 0.35, 0.65),
        ("coding.blocks", 0.0541, "blocky", 0.7, 0.7),
        ("text.share", 0.00157, "text", 0.6, 0.55),
        ("text.share", 0.02, "overlay", 0.6, 0.45),
    ],
)
def test_numbers(judged: Judged, field: str, threshold: float, seen: str, precision: float, recall: float) -> None:
    # a negative threshold: the number answers yes from there downwards
    sign = 1 if threshold > 0 else -1
    pairs = [(said[field], line[seen]) for line, said in judged if seen in line and said.get(field) is not None]
    found = rates([(sign * value > threshold, true) for value, true in pairs])
    assert found[0] >= precision and found[1] >= recall, found


def test_no_overlay_and_no_fade_is_made_up(judged: Judged) -> None:
    assert all(said["light.fade_in"] == 0 for line, said in judged if line.get("fade") is False)
    overlays = [(line["overlay"], said) for line, said in judged if "overlay" in line]
    assert all(
        said["overlay.place"] == "still" and said["overlay.share"] is None for marked, said in overlays if marked
    )
    assert sum((said["overlay.share"] or 0) > 0.0336 for marked, said in overlays if not marked) <= 2
