"""Judge the scorers on real footage with labels that a person gave by looking: precision and recall of each label.

    LONGTAKE_VIDEOS=../shared/videos python tests/benchmarks/judge_scorers.py [SCORER …]

A line of `labels_*.json` is a file of `LONGTAKE_VIDEOS/real` by its base name, or some of its frames, with what is seen in it:
true or false, or a list of labels of which the first is the best and the others would do. What isn't clear is left out.
Each is coded as clips are, with a faster preset, before it is scored: at its own size, but those of `labels_picture.json` at the
size and of the length of clips.

A rule on a number has its threshold chosen on one half of the files, every second in the order of their names, for the best F1,
and is judged on the other half. What a label stands on inside a scorer was chosen on the first half too.
"""

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from tests.support.scored import coded, score_file
from tqdm import tqdm

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Rule:
    """A question to a scorer.

    scorer    its name
    field     of it
    side      how a number answers yes: "above" or "below" the threshold; "is": the field is a label
    seen      name of the answer in the labels
    labels    the file of labels
    settings  the scorer's
    """

    scorer: str
    field: str
    side: Literal["above", "below", "is"]
    seen: str
    labels: str = "labels_motion.json"
    settings: tuple[tuple[str, Any], ...] = ()


PICTURE = "labels_picture.json"
SIDES = {PICTURE: 256}  # pixels of the shorter side, of the files of some labels
SECONDS = 10.0  # of these, at most

RULES = (
    Rule("motion", "move", "is", "move"),
    Rule("cadence", "cadence", "is", "cadence"),
    Rule("light", "exposure", "below", "dark"),
    Rule("light", "bright", "above", "blown"),
    Rule("light", "flicker", "above", "flicker"),
    Rule("light", "fade_in", "above", "fade"),
    Rule("focus", "subject", "above", "blurred", PICTURE),
    Rule("focus", "blur", "above", "blurred", PICTURE),
    Rule("coding", "blocks", "above", "blocky", PICTURE),
    Rule("bars", "shape", "is", "bars", PICTURE),
    Rule("overlay", "share", "above", "overlay", PICTURE),
    Rule("text", "share", "above", "text", PICTURE),
    Rule("text", "characters", "above", "text", PICTURE, (("ocr", True),)),
    Rule("faces", "count", "above", "faces", PICTURE),
    Rule("people", "count", "above", "people", PICTURE),
)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorers", nargs="*", help="only these")
    only = parser.parse_args().scorers
    rules = [rule for rule in RULES if not only or rule.scorer in only]
    real = Path(os.environ["LONGTAKE_VIDEOS"]) / "real"
    halves = {name: number % 2 for number, name in enumerate(sorted(file.name for file in real.iterdir()))}

    # values of each line of the labels, by the scorer with its settings
    lines = {name: json.loads((HERE / name).read_text()) for name in dict.fromkeys(rule.labels for rule in rules)}
    values: dict[tuple[str, Any, str, int], Any] = {}
    for name, known in lines.items():
        asked = dict.fromkeys((rule.scorer, rule.settings) for rule in rules if rule.labels == name)
        for number, line in enumerate(tqdm(known, desc=name)):
            clip = _clip(real / line["file"], line.get("frames"), SIDES.get(name))
            for scorer, settings in asked:
                values[scorer, settings, name, number] = score_file(scorer, dict(settings), clip)

    print("| Scorer | Rule | Seen | Precision | Recall | Of both halves |\n|---|---|---|---|---|---|")
    for rule in rules:
        answers = [
            (values[rule.scorer, rule.settings, rule.labels, number][rule.field], line[rule.seen], halves[line["file"]])
            for number, line in enumerate(lines[rule.labels])
            if line.get(rule.seen) is not None
        ]
        for row in _labels(rule, answers) if rule.side == "is" else _number(rule, answers):
            print(row)


def _clip(file: Path, frames: Sequence[int] | None, side: int | None) -> bytes:
    start, end = frames or (0, 10**9)
    with av.open(str(file)) as container:
        fps = float(container.streams.video[0].average_rate or 1)
        end = min(end, start + round(SECONDS * fps)) if side else end
        images = []
        for number, frame in enumerate(container.decode(video=0)):
            if number >= end:
                break
            if number >= start:
                scale = side / min(frame.width, frame.height) if side else 1
                width, height = (int(n * scale / 2 + 1e-6) * 2 for n in (frame.width, frame.height))
                images.append(frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray())
    return coded(np.stack(images), float(Fraction(fps).limit_denominator(1001)), preset="superfast")


def _labels(rule: Rule, answers: list[tuple[Any, Any, int]]) -> Iterator[str]:
    # a label that would do counts as right, and one that is the best as missed where nothing that would do was said
    for label in sorted({seen[0] for _, seen, _ in answers} | {value for value, *_ in answers if value}):
        judged = [
            (value == label, label in seen if value == label else seen[0] == label and value not in seen, half)
            for value, seen, half in answers
        ]
        yield _row(rule, f"{rule.field} = {label}", label, judged)


def _number(rule: Rule, answers: list[tuple[Any, Any, int]]) -> Iterator[str]:
    sign = 1 if rule.side == "above" else -1
    known = [(sign * value, bool(seen), half) for value, seen, half in answers if value is not None]

    # between two neighbouring values of the first half, the best F1; the widest gap of the best
    ordered = sorted(value for value, _, half in known if half == 0)
    best, threshold = (-1.0, 0.0), 0.0
    for low, high in itertools.pairwise(ordered):
        middle = (low + high) / 2
        right = sum(value > middle and seen for value, seen, half in known if half == 0)
        wrong = sum((value > middle) != seen for value, seen, half in known if half == 0)
        score = (2 * right / max(1, 2 * right + wrong), high - low)
        if score > best:
            best, threshold = score, middle
    judged = [(value > threshold, seen, half) for value, seen, half in known]
    yield _row(rule, f"{rule.field} {'>' if sign > 0 else '<'} {sign * threshold:.3g}", rule.seen, judged)


def _row(rule: Rule, said: str, seen: str, judged: list[tuple[bool, bool, int]]) -> str:
    # precision and recall of the second half, and of both
    def figures(answers: list[tuple[bool, bool, int]]) -> tuple[str, str]:
        right = sum(yes and true for yes, true, _ in answers)
        asked, there = sum(yes for yes, *_ in answers), sum(true for _, true, _ in answers)
        return f"{right}/{asked}", f"{right}/{there}"

    half = figures([answer for answer in judged if answer[2] == 1])
    both = figures(judged)
    count = sum(true for _, true, _ in judged)
    return f"| `{rule.scorer}` | {said} | {seen} ({count}) | {half[0]} | {half[1]} | {both[0]}, {both[1]} |"


if __name__ == "__main__":
    main()
