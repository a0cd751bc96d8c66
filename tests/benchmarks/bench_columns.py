"""What words and sound cost the loader beside video: batches of each choice of columns, made in turns.

    python tests/benchmarks/bench_columns.py FOLDER [--batches 100] [--tokens 64] [--width 256] [--clip-short-side 256]

The videos of FOLDER with sound are cut as `shard` does, and each clip gets a caption and random token states of it. The
target is a rate of 0.9 of that with video alone. CPU seconds, so that other work does not disturb the clock; the medians
are over the turns, each a part of the batches.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import figures
from bench_audio import WINDOW, clips_of, sharded, timed
from bench_text import CAPTION, TEXT, make_captions, make_texts

from longtake.datasets import index
from longtake.datasets.loader import Loader

BATCH = 4
CHOICES = (("video",), ("video", TEXT), ("video", "audio"), ("video", CAPTION, TEXT, "audio"))


def rates(dataset: str, batches: int, short_side: int, turns: int) -> tuple[float, dict[str, list[float]]]:
    """Windows a CPU second with video alone, and the share of it that each other choice of columns reaches in each turn."""
    options: dict[str, Any] = {"frames": WINDOW, "size": (short_side, short_side), "batch": BATCH}
    loaders = {columns: iter(Loader(dataset, columns=columns, **options)) for columns in CHOICES}
    for loader in loaders.values():
        for _ in range(4):
            next(loader)  # the first ones open tars
    seconds: dict[tuple[str, ...], list[float]] = {columns: [0.0] * turns for columns in CHOICES}
    for number in range(batches):
        for columns, loader in loaders.items():
            seconds[columns][number % turns] += timed(partial(next, loader))[0]
    alone = seconds["video",]
    shares = {
        " and ".join(name.split("-")[0] for name in columns): [a / b for a, b in zip(alone, spent, strict=True)]
        for columns, spent in seconds.items()
    }
    return BATCH * batches / sum(alone), shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--codec", choices=("flac", "opus"), default="flac")
    parser.add_argument("--most", type=int, default=12, help="videos of FOLDER")
    parser.add_argument("--clip-short-side", type=int, default=256)
    figures.add_option(parser, turns=5)
    options = parser.parse_args()
    videos = list(islice((p for p in sorted(options.folder.rglob("*.*")) if clips_of(p, 10.0)), options.most))
    with tempfile.TemporaryDirectory() as folder:
        dataset = sharded(Path(folder), videos, options.clip_short_side, {"codec": options.codec})
        clips = sum(len(shard.table) for shard in index.read_shards(dataset, "train"))
        make_captions(dataset, len(index.shard_names(dataset, "train")), clips)
        make_texts(dataset, options.tokens, options.width)
        rate, shares = rates(dataset, options.batches, options.clip_short_side, options.turns)
        medians = {columns: statistics.median(share) for columns, share in shares.items()}
        print(json.dumps({"windows a second, video alone": rate} | medians, indent=2))
        figures.write(options.figures, shares)


if __name__ == "__main__":
    main()
