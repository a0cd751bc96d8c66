"""What each scorer costs beside one decode of the same clips, and the whole pack.

    python tests/benchmarks/bench_scores.py FOLDER [SCORER …] [--clip-short-side 256] [--most 12] [--rounds 3]

The videos of FOLDER are cut as `shard` does. In every round each clip is decoded for scorers that watch, and shown to each
scorer, in turns; a scorer's figure is its own CPU seconds, without the decoding, as a share of those of the decoding. Those of
scorers that look at some frames are beside the decoding of all frames too; what is decoded for them alone is a line of its
own. `people` takes the faces that `faces` has found where both are asked, so that its figure is then that of bodies alone. A
scorer alone shrinks its frames itself (`Frames.small`); in the pack one of them does it for all. The figures are
medians of the rounds. One thread, CPU seconds, so that other work does not disturb the clock.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longtake.datasets import index, schema, storage
from longtake.pipeline import column as columns
from longtake.pipeline import plan, scorers
from longtake.pipeline.commit import make_group
from longtake.pipeline.score_shard import Clip, is_looker
from longtake.pipeline.stages import shard

Clips = Sequence[tuple[bytes, dict[str, Any]]]
BLANK = np.zeros((1, 1, 64, 64, 3), np.uint8)


def clips_of(folder: Path, videos: Path, short_side: int, most: int) -> Clips:
    """The clips of a folder's videos, with their rows."""
    chosen = shard.Config(kind="shard", sources=[str(videos)], clip={"short_side": short_side, "max_seconds": 5})
    paths = [str(path) for path in sorted(videos.iterdir()) if path.suffix in (".mp4", ".mkv", ".mov", ".avi", ".webm")]
    for group in plan.plan(str(folder), paths[:most], 0.0, 1 << 40, 8):
        make_group(group, plan.sources_of(str(folder), group), str(folder), chosen.cut)
    found = []
    for split in schema.SPLITS:
        for row in index.read_all(str(folder), split).to_pylist():
            tar = storage.join(str(folder), split, f"{row['shard']}.tar")
            found.append((columns.clip_bytes(tar, row), row))
    return found


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


class Costs:
    """CPU seconds of one round."""

    def __init__(self, loaded: dict[str, Any]) -> None:
        self.watchers = {name: one for name, one in loaded.items() if not is_looker(one)}
        self.lookers = {name: one for name, one in loaded.items() if is_looker(one)}
        self.decoding = self.pack = self.chosen = 0.0
        self.own = dict.fromkeys(loaded, 0.0)

    def add(self, mp4: bytes, row: dict[str, Any]) -> None:
        """Decode a clip, then show it to each scorer, and to all at once."""
        name = row["key"]
        seconds, pieces = spent(lambda: list(Clip(mp4, row, [], name).pieces()))
        self.decoding += seconds
        for each, watcher in self.watchers.items():
            for piece in pieces:
                piece.__dict__.pop("small", None)
            self.own[each] += spent(lambda w=watcher: shown(w, row, pieces))[0]
        for each, looker in self.lookers.items():
            seconds, pictures = spent(lambda one=looker: Clip(mp4, row, [one], name).pictures()[0])
            self.chosen += seconds / len(self.lookers)
            self.own[each] += spent(lambda one=looker, frames=pictures: one.look(frames[None]))[0]
        for looker in self.lookers.values():
            looker.look(BLANK)  # so that the faces of the clip are looked for again
        self.pack += spent(lambda: self._all(mp4, row))[0]

    def _all(self, mp4: bytes, row: dict[str, Any]) -> None:
        watches = [watcher.begin(row) for watcher in self.watchers.values()]
        clip = Clip(mp4, row, list(self.lookers.values()), row["key"])
        for piece in clip.pieces():
            for watch in watches:
                watch.add(piece)
        for watch in watches:
            watch.values()
        for looker, frames in zip(self.lookers.values(), clip.pictures(), strict=True):
            looker.look(frames[None])


def shown(watcher: Any, row: dict[str, Any], pieces: Sequence[Any]) -> None:
    watch = watcher.begin(row)
    for piece in pieces:
        watch.add(piece)
    watch.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scorers", nargs="*", default=list(scorers.PACK))
    parser.add_argument("--clip-short-side", type=int, default=256)
    parser.add_argument("--most", type=int, default=12, help="videos of FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    loaded = {}
    for name in options.scorers:
        kind = scorers.load(name)
        loaded[name] = kind.load(kind.config(), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        clips = clips_of(Path(folder), options.folder, options.clip_short_side, options.most)
    Costs(loaded).add(*clips[0])  # the first time loads
    rounds = [Costs(loaded) for _ in range(options.rounds)]
    for costs in rounds:
        for mp4, row in tqdm(clips, unit="clip"):
            costs.add(mp4, row)

    frames = sum(row["frame_count"] for _, row in clips)
    sizes = sorted({f"{row['width']}x{row['height']}" for _, row in clips})
    decoding = statistics.median(costs.decoding for costs in rounds)
    print(f"{len(clips)} clips, {frames} frames, {', '.join(sizes)}")
    print(f"decoding   {1000 * decoding / frames:.3f} ms a frame")
    shares = {name: statistics.median(costs.own[name] / costs.decoding for costs in rounds) for name in loaded}
    for name, share in sorted(shares.items(), key=lambda pair: pair[1]):
        print(f"{name:<10} {share:.2f}")
    print(f"the pack with its decoding  {statistics.median(costs.pack / costs.decoding for costs in rounds):.2f}")
    if rounds[0].lookers:
        chosen = statistics.median(costs.chosen / costs.decoding for costs in rounds)
        print(f"decoding for a scorer that looks, alone  {chosen:.2f}")


if __name__ == "__main__":
    main()
