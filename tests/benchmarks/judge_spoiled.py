"""Judge the scorers of pictures on real footage that was spoiled on purpose: the truth is known, the contents are real.

    LONGTAKE_VIDEOS=../shared/videos PYTHONPATH=tests/support python tests/benchmarks/judge_spoiled.py [--most 42]

The first second of each file of `LONGTAKE_VIDEOS/real` are shrunk to clips of 256 pixels, spoiled in each way, and coded as
clips are. What `labels_picture.json` says is spoiled already in that way, or leaves out, is not asked. A threshold is chosen for
the best F1 on every second file, spoiled and not, and judged on the others.
"""

import argparse
import io
import itertools
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scored import coded, score_file
from tqdm import tqdm

LABELS = Path(__file__).parent / "labels_picture.json"
SIDE, SECONDS = 256, 1.0

Spoil = Callable[[np.ndarray], np.ndarray]  # of (T, H, W, 3) uint8


def blurred(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 2.0) for frame in frames])


def noisy(frames: np.ndarray) -> np.ndarray:
    grain = np.random.default_rng(0).normal(0, 6, (*frames.shape[:3], 1))
    return np.clip(np.rint(frames + grain), 0, 255).astype(np.uint8)


def blocky(frames: np.ndarray) -> np.ndarray:
    spoiled = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=10)
        spoiled.append(np.asarray(Image.open(file)))
    return np.stack(spoiled)


def letterboxed(frames: np.ndarray) -> np.ndarray:
    frames, lines = frames.copy(), frames.shape[1] // 10
    frames[:, :lines] = frames[:, -lines:] = 0
    return frames


def written(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    mask = Image.new("L", (width, height), 0)
    font = ImageFont.load_default(size=height // 14)
    ImageDraw.Draw(mask).text((width * 0.6, height * 0.06), "CHANNEL", fill=230, font=font)
    opacity = np.asarray(mask, np.float32)[None, ..., None] / 255
    return np.asarray(frames * (1 - opacity) + 255 * opacity).round().astype(np.uint8)


# scorer, field, name in the labels, and how to spoil
WAYS: tuple[tuple[str, str, str, Spoil], ...] = (
    ("focus", "subject", "blurred", blurred),
    ("focus", "blur", "blurred", blurred),
    ("coding", "noise", "noisy", noisy),
    ("coding", "blocks", "blocky", blocky),
    ("bars", "share", "bars", letterboxed),
    ("overlay", "share", "overlay", written),
    ("text", "share", "text", written),
)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=42, help="files, spread evenly")
    lines = json.loads(LABELS.read_text())
    most = min(parser.parse_args().most, len(lines))
    lines = [lines[n * len(lines) // most] for n in range(most)]

    real = Path(os.environ["LONGTAKE_VIDEOS"]) / "real"
    answers: list[list[tuple[float | None, bool, int]]] = [[] for _ in WAYS]
    for number, line in enumerate(tqdm(lines)):
        frames, fps = beginning(real / line["file"])
        clips = {
            spoil: coded(spoil(frames), fps, preset="superfast") for spoil in dict.fromkeys(way[3] for way in WAYS)
        }
        untouched = coded(frames, fps, preset="superfast")
        for (scorer, field, seen, spoil), judged in zip(WAYS, answers, strict=True):
            if line.get(seen) in (False, ["none"]):
                judged += [
                    (score_file(scorer, {}, clip)[field], clip is not untouched, number % 2)
                    for clip in (untouched, clips[spoil])
                ]

    print("| scorer | rule | spoiled: precision, recall | both halves | no value |\n|-|-|-|-|-|")
    for (scorer, field, seen, _), judged in zip(WAYS, answers, strict=True):
        known = [(value, spoiled, half) for value, spoiled, half in judged if value is not None]
        threshold = chosen([(value, spoiled) for value, spoiled, half in known if half == 0])
        figures = ", ".join(figure([(value > threshold, spoiled) for value, spoiled, half in known if half == 1]))
        both = ", ".join(figure([(value > threshold, spoiled) for value, spoiled, _ in known]))
        print(
            f"| `{scorer}` | {field} > {threshold:.3g}: {seen} | {figures} | {both} | {len(judged) - len(known)} of {len(judged)} |"
        )


def beginning(file: Path) -> tuple[np.ndarray, float]:
    """The first frames (T, H, W, 3) of a file, and its frames per second."""
    with av.open(str(file)) as container:
        fps = Fraction(container.streams.video[0].average_rate or 1)
        images = []
        for frame in itertools.islice(container.decode(video=0), round(SECONDS * fps)):
            scale = SIDE / min(frame.width, frame.height)
            width, height = (int(n * scale / 2 + 1e-6) * 2 for n in (frame.width, frame.height))
            images.append(frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray())
    return np.stack(images), float(fps.limit_denominator(1001))


def chosen(known: list[tuple[float, bool]]) -> float:
    """The threshold of the best F1: in the middle of two values."""
    ordered = sorted({value for value, _ in known})
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ordered)]

    def f1(threshold: float) -> float:
        right = sum(value > threshold and spoiled for value, spoiled in known)
        return 2 * right / max(1, 2 * right + sum((value > threshold) != spoiled for value, spoiled in known))

    return max(middles, key=f1, default=0.0)


def figure(answers: list[tuple[bool, bool]]) -> tuple[str, str]:
    """Precision and recall."""
    right = sum(yes and spoiled for yes, spoiled in answers)
    return f"{right}/{sum(yes for yes, _ in answers)}", f"{right}/{sum(spoiled for _, spoiled in answers)}"


if __name__ == "__main__":
    main()
