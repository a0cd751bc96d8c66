"""What gaps of MAVIN (arXiv 2405.18003) begin from, and joints made smooth: tiny models, held-out sprites and sources.

The paper's claims on spans and on frames at the ends are in `claimed/mavin.py`.

    python tests/benchmarks/ablation_mavin.py OUT [--seeds 3] [--features squeezenet1_0.pth] [--part 3] [--seed 0]

3  what the noise of a gap begins from, of `variable`: how close frames are to the nearer one beside the gap, first and last
   ones and those in the middle; and how unlike gaps of 4 seeds are there.
S  seams of long videos (see `long_films`) before and after `variable` has remade 4 frames on both sides of each joint: of
   the joints, and after also of the first and the last frame remade; and the Fréchet distance of windows around joints from
   real ones, beside that of windows between joints.

Sprites turn within the gap, and what they are is seen on both sides (see `toys`). A quarter of each batch is footage. Each
finished part of a seed and an arm is a file of JSON in OUT and is not made again, and a training of `variable`, spans of 2
to 12 of 20 frames, goes on where it was stopped; several processes may take a part, a seed or an arm each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import long_films
import torch
from mavin_arms import (
    FRAMES,
    PLAIN,
    SPEEDS,
    TURNS,
    Trained,
    draw,
    filled,
    heldout,
    span_of,
    trained,
)  # fmt: skip
from torch import Tensor
from toys import FPS, SIZE, filmed, prepare, sprites

from longtake.datasets import storage
from longtake.datasets.loader import to_model, to_pixels
from longtake.training import engines
from longtake.training.metrics import transitions
from longtake.training.metrics.distance import Sample, distance
from longtake.training.metrics.features import FeatureNetwork, load_network
from longtake.training.metrics.seams import around, bends, between, changes, seams
from longtake.training.models.common import film
from longtake.training.models.common.video import write_panels
from longtake.training.models.generator import InfillSettings
from longtake.training.models.mavin import encode, infill
from longtake.training.models.mavin.guidance import boundary_tokens
from longtake.training.models.mavin.mixer import Mixer
from longtake.training.models.mavin.windows import cut

MIXERS = {
    "none": PLAIN,
    "paper same": Mixer("paper"),
    "paper fresh": Mixer("paper", "fresh"),
    "per_frame same": Mixer("per_frame"),
    "per_frame fresh": Mixer("per_frame", "fresh"),
    "unfiltered": Mixer("per_frame", cutoff=float("inf")),  # x_T
}
PARTS = {
    "3": (*MIXERS, "real"),
    "S": tuple(long_films.FAMILIES),
}
REACH, STRIDE = 4, 2  # frames remade on each side of a joint; of the frames of footage every other one
LEAST = 0.3  # SSIM of neighbouring frames without a cut between them
NETWORK_SIDE = 64  # pixels that frames are enlarged to for the network

Found = dict[str, dict[str, float | None]]  # figure, group -> column -> value


def psnr(truth: Tensor, made: Tensor) -> float:
    """The mean over gaps `(N, 3, n, H, W)`."""
    pairs = zip(made.split(1), truth.split(1), strict=True)
    return statistics.mean(transitions.middle(*pair)["psnr"] for pair in pairs)


# 3: what a gap begins from.


def part_3(options: argparse.Namespace, name: str, seed: int) -> Found:
    found = dict[str, dict[str, float | None]]()
    one = trained(options, "variable", seed) if name in MIXERS else None
    for kind, windows in heldout(options, seed, options.gaps // 4).items():
        truth = to_model(windows)
        for length in (8, 12):
            begin, end = span_of(length)
            count = 4 if one else 1
            made = [filled(one, windows, length, 10 * seed + n, MIXERS[name]) if one else truth for n in range(count)]
            near = [
                transitions.closeness(each[:, :, begin:end], truth[:, :, begin - 1], truth[:, :, end]) for each in made
            ]
            curve = torch.stack(near).mean((0, 1))
            row: dict[str, float | None] = {"closeness at the ends": ends(curve), "in the middle": inner(curve)}
            if one:
                gaps = torch.stack(made)[:, :, :, begin:end].transpose(0, 1)
                unlike = torch.stack([transitions.diversity(each) for each in gaps]).mean(0)
                row |= {"diversity at the ends": ends(unlike), "diversity in the middle": inner(unlike)}
                row["psnr"] = statistics.mean(psnr(truth[:, :, begin:end], each[:, :, begin:end]) for each in made)
            found[f"gaps of {length}, {kind}"] = row
    return found


def ends(curve: Tensor) -> float:
    return float(curve[[0, -1]].mean())


def inner(curve: Tensor) -> float:
    return float(curve[len(curve) // 2 - 1 : len(curve) // 2 + 1].mean())


# S: seams of long videos.


def part_s(options: argparse.Namespace, family: str, seed: int) -> Found:
    turning = sprites(options.videos * 3 // 4, FRAMES, 3_000_000 + seed, True, SPEEDS, TURNS).video
    real = torch.cat([turning, options.heldout[: options.videos - len(turning), :, :FRAMES]])
    source = long_films.Source(options.out / family, options.dataset, options.films, draw, options.film_steps)
    video, joints = long_films.FAMILIES[family](source, seed, real[:, :, 0])
    joints = [joint for joint in joints if REACH < joint < video.shape[2] - REACH]
    after = smoothed(trained(options, "variable", seed), video, joints, seed)
    write_panels(options.out / f"S-{family}-{seed}.mp4", [video[:1], after[:1]], 8)

    was, now = (seams(changes(each), bends(each), joints) for each in (video, after))
    remade = sorted(joint + side for joint in joints for side in (-REACH, REACH))
    beside = seams(changes(after), bends(after), remade)
    found: Found = {
        "seam ratio": {"before": was.ratio, "after": now.ratio, "after, ends of gaps": beside.ratio},
        "bend ratio": {"before": was.bend_ratio, "after": now.bend_ratio, "after, ends of gaps": beside.bend_ratio},
        "change": {"before": was.change, "after": now.change, "real": float(changes(to_model(real)).mean())},
    }
    for name, each in (("before", video), ("after", after)):
        found["change"][f"{name}, at joints"] = float(changes(each)[:, [joint - 1 for joint in joints]].mean())
    if options.network:
        length = 2 * REACH + 2
        true = to_model(real)
        truth = sample(options.network, torch.cat([true[:, :, :length], true[:, :, -length:]]))
        kinds = {"before": around(video, joints, length), "after": around(after, joints, length)}
        kinds["before, between joints"] = between(video, joints, length)
        found["frechet"] = {
            name: distance(truth, sample(options.network, windows), split="val", seed=0)["frechet"]
            for name, windows in kinds.items()
        }
    return found


def sample(network: FeatureNetwork, windows: Tensor) -> Sample:
    found = Sample("windows", network, kernel=False)
    for batch in windows.to(engines.device()).split(8):
        found.add(batch)
    return found


def smoothed(one: Trained, films: Tensor, joints: Sequence[int], seed: int) -> Tensor:
    """Films `(N, 3, T, H, W)` in [-1, 1] with frames beside their joints remade, as `longtake infill --smooth` does it."""
    setup, holes, context = one.setup, film.smoothing(joints, REACH), (1, FRAMES - 2)
    assert setup.encoder
    filler = infill.Filler(
        setup.model, setup.codec, encode.encode_apart, fps=FPS, size=(SIZE, SIZE),
        settings=InfillSettings(steps=one.config.sample_steps), context=context, longest=setup.spans.gap[1],
        window=FRAMES, digest="", device=engines.device(), features=partial(boundary_tokens, setup.encoder),
    )  # fmt: skip
    again = []
    for number, video in enumerate(films):
        frames = to_pixels(video).permute(1, 2, 3, 0).numpy()
        gaps = list(film.gaps_in(frames, holes, context[1]))
        made = filler.fill(gaps, 1000 * seed + number, filler.settings, batch=len(gaps))
        again.append(torch.stack([torch.from_numpy(frame) for frame in film.filled(frames, holes, made)]))
    return to_model(torch.stack(again).permute(0, 4, 1, 2, 3))


# All of it.

MAKERS = {"3": part_3, "S": part_s}


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Found]]]:
    """The name of each part's file, and what makes it."""
    for seed in [options.seed] if options.seed is not None else range(options.seeds):
        for part in options.part:
            for name in PARTS[part]:
                if options.arm in (None, name):
                    yield f"{part}-{name.replace(' ', '_')}-{seed}", partial(MAKERS[part], options, name, seed)


def tables(out: Path) -> Iterator[str]:
    """Means ± standard deviations over the seeds, in Markdown, a table for each figure."""
    for part, names in PARTS.items():
        rows = {
            name: [json.loads(path.read_text()) for path in sorted(out.glob(f"{part}-{name.replace(' ', '_')}-*.json"))]
            for name in names
        }
        for title in dict.fromkeys(title for some in rows.values() for row in some for title in row["found"]):
            records = {
                name: [row["found"][title] for row in some if title in row["found"]] for name, some in rows.items()
            }
            yield from table(f"{part}: {title}", {name: some for name, some in records.items() if some})


def table(title: str, rows: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for some in rows.values() for row in some for column in row))
    yield f"\n**{title}**\n"
    yield f"| | {' | '.join(columns)} | seeds |"
    yield "|-" * (len(columns) + 2) + "|"
    for name, some in rows.items():
        cells = [spread([row.get(column) for row in some]) for column in columns]
        yield f"| {name} | {' | '.join(cells)} | {len(some)} |"


def spread(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    deviation = statistics.stdev(there) if len(there) > 1 else 0.0
    return f"{statistics.mean(there):.4g} ±{deviation:.2g}" if there else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--part", choices=[*PARTS], action="append", help="this one alone")
    parser.add_argument("--arm", help="this arm, baseline, noise or family alone")
    parser.add_argument("--features", help="state dict or TorchScript of a feature network of pictures")
    parser.add_argument("--steps", type=int, default=1000, help="of a training")
    parser.add_argument("--film-steps", type=int, default=700, help="of the training of a family of long videos")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--footage", type=int, default=24, help="videos of 24 seconds")
    parser.add_argument("--windows", type=int, default=512, help="of training footage")
    parser.add_argument(
        "--gaps",
        type=int,
        default=64,
        help="held-out gaps of each length, of sprites, four times those made; half as many of footage",
    )
    parser.add_argument("--videos", type=int, default=16, help="long ones of a family")
    options = parser.parse_args()
    options.out, options.part = options.out.absolute(), options.part or [*PARTS]
    options.out.mkdir(parents=True, exist_ok=True)
    options.network = None
    if options.features:
        options.network = load_network(options.features, resize=NETWORK_SIDE, device=engines.device())
    options.dataset = prepare(options.out, options.footage, "ablation-mavin")
    # windows with cuts are left out once, so that no step looks for them
    films = filmed(options.dataset, "train", options.windows, STRIDE)
    options.films = films[~cut(to_model(films), LEAST)]
    options.heldout = filmed(options.dataset, "val", 2 * max(options.gaps, options.videos), STRIDE)
    options.heldout = options.heldout[~cut(to_model(options.heldout[:, :, :FRAMES]), LEAST)]
    if len(options.heldout) < max(options.gaps // 2, options.videos // 4):
        parser.error("too few held-out windows have no cut; raise --footage")
    with engines.process_group():
        for name, make in jobs(options):
            if (options.out / f"{name}.json").exists():
                continue
            begun = time.monotonic()
            record = {"found": make(), "seconds": time.monotonic() - begun}
            storage.write(str(options.out / f"{name}.json"), json.dumps(record, indent=2).encode())
            print(f"{name}: {record['seconds']:.0f} s", flush=True)
    print(*tables(options.out), sep="\n", flush=True)


if __name__ == "__main__":
    main()
