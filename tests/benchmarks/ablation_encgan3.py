"""The claims of EncGAN3 and REncGAN3 (arXiv 2512.21776) with tiny models, several seeds, held-out sprites and sources.

    python tests/benchmarks/ablation_encgan3.py OUT [--seeds 3] [--features squeezenet1_0.pth] [--part R] [--seed 0]

T  training of `plain` (signed differences) and `absolute`, the paper's; of `anew`, with recall from the first step on; and
   of `single` and `recall`, which both continue `plain` for as many steps, the one without recall, the other with it. Of
   each the errors of held-out clips beside those of repeating their first frame; the direction that reconstructed sprites
   move in; and clips of the content of one sprite and the movement of another: whether they have the colour of the one, by
   a probe that has seen real ones only, and go the way of the other.
R  long videos from held-out frames: `independent` clips of `single` that all begin from the same frame, `chained` clips of
   it, `recall`, `lstm`, which draws the movement of each clip of `single` given those before, and `longer`, its generator
   run once with more steps of movement. What is seen at joints, and how far the videos drift.

Sprites are shapes of a colour that move evenly over a grey ground and come in again on the other side; pairs of shape and
colour are held out. Footage is generated: photographs under a moving camera, of which videos are held out whole. A quarter
of each batch is footage. Frames have 16 pixels, and each clip begins from the first of its frames. Each finished part of a seed is a file of JSON in OUT and is not made again, and a training goes on
where it was stopped; several processes may take a part or a seed each. R of a seed needs its T.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from toys import DIRECTIONS, SIZE, SPAN, Mixture, filmed, prepare, sprites

from longtake.datasets import storage
from longtake.datasets.loader import to_model
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.metrics import swap
from longtake.training.metrics.degradation import degradation
from longtake.training.metrics.distance import Sample
from longtake.training.metrics.features import load_network
from longtake.training.metrics.seams import around, bends, between, changes, out_of_range, seam_distances, seams
from longtake.training.models.common.draws import rng_of
from longtake.training.models.encgan3 import pretrain
from longtake.training.models.encgan3.discriminators import Discriminators
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.rollout import Rollout, Start
from longtake.training.objective import Objective

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "absolute": {"model": {"differences": "absolute"}},
    "anew": {"recall": True},
    "single": {"parent": "plain"},
    "recall": {"recall": True, "parent": "plain"},
}
# the reference of the next clip is where that begins, as it is for the first one
MODEL = {"preset": "encgan3_tiny", "size": 16, "width": 16, "groups": 4, "attention": 8, "reference": 12}
MODEL |= {"differences": "signed"}
ARMS = ("independent", "chained", "recall", "lstm", "longer")
FRAMES, LONG, BIN = 16, 208, 52  # 208 = 12 + 4 * 49, which the generator makes at once


# Data.


def draw(count: int, frames: int, seed: int) -> Tensor:
    """Sprites to train on, none of which is held out."""
    return sprites(count, frames, seed, False).video


def heading(video: Tensor) -> Tensor:
    """The direction in which what is coloured moves, of 8, `(N,)`: the way of its centre, `(N, 3, T, H, W)` in [-1, 1].

    The centre is a mean on a circle, since a sprite that leaves comes in again on the other side.
    """
    colour = (video.amax(1) - video.amin(1) - 0.2).clamp_min(0).cpu()
    ways = []
    for axis in (2, 3):
        turn = 2 * math.pi * torch.arange(video.shape[-1]) / video.shape[-1]
        weights = colour.sum(5 - axis)
        centre = torch.atan2(weights @ turn.sin(), weights @ turn.cos())
        step = centre.diff(dim=1)
        ways.append(torch.atan2(step.sin(), step.cos()).sum(1))
    return (torch.atan2(*ways) / (2 * math.pi) * DIRECTIONS).round().long() % DIRECTIONS


# T: training, and what the encoders have learned.


def trained(options: argparse.Namespace, variant: str, seed: int, videos: Any = None) -> EncGAN3:
    """The model of a variant: trained, or continued to the end.

    Args:
        videos: `(frames, batch) -> stream` to learn from; None: sprites and footage.
    """
    changes = VARIANTS[variant]
    videos = videos or (lambda frames, batch: Mixture(options.films, options.draw, frames, batch, seed))
    settings: dict[str, Any] = {"steps": options.steps, "lr": options.lr, "gan_start": options.steps * 2 // 3}
    if "parent" in changes:
        settings = {"steps": options.steps // 3, "lr": options.lr / 2, "gan_start": 0}
    config = pretrain.Config(
        kind="pretrain_encgan3", dataset=options.dataset, model=MODEL | changes.get("model", {}), seed=seed,
        recall=changes.get("recall", False), batch=12, schedule="cosine", betas=(0.9, 0.999), anywhere=0,
        kl_warmup=0.0 if "parent" in changes else 0.1, lambda_frame=1, lambda_gan=options.lambda_gan, ema_half_lives=(100,),
        run={"workers": 0, "sample_every": 0, "heldout_every": 0, "checkpoint_every": 250, "keep_checkpoints": 1},
        **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = EncGAN3(config.encgan3())
    if "parent" in changes:
        made.load_state_dict(trained(options, changes["parent"], seed, videos).state_dict())
    else:
        first = next(iter(videos(FRAMES, 32)))["video"]
        made.scale_latents(to_model(first).transpose(1, 2))
    made.to(engines.device())
    judges = Discriminators(SIZE, made.config.width, "group", made.config.groups).to(engines.device())
    objective = Objective(
        {"generator": made, "discriminator": judges},
        partial(pretrain._loss, config, made),
        lead="generator",
        starts={"discriminator": config.gan_start},
        settings={"discriminator": pretrain._discriminator_settings(config)},
    )
    folder = options.out / f"T-{variant}-{seed}"
    made.train()
    train(objective, videos(SPAN if config.recall else FRAMES, config.batch), config, folder)
    made.load_state_dict(checkpoint.trained(folder, config))
    return made.eval()


def clips_of(videos: Tensor) -> Tensor:
    """The first clip of videos uint8, `(N, 3, T, H, W)` in [-1, 1]."""
    return to_model(videos[:, :, :FRAMES].to(engines.device()))


def made_of(model: EncGAN3, content: Tensor, movement: Tensor, drawn: bool = False) -> Tensor:
    """Clips with the first frames of the ones and the movement of the others; `drawn`: without these frames themselves."""
    first = content[:, :, 0]
    z_x, moving = model.encode_content(first).mean, movement.transpose(1, 2)
    z_v = model.encode_movement(model.differences_of(moving)).mean
    clips = model.generate(z_x, z_v, model.first_frame(z_x) if drawn else first)
    return clips.clamp(-1, 1).transpose(1, 2)


def part_t(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    return learned(options, trained(options, variant, seed), seed)


@torch.no_grad()
def learned(options: argparse.Namespace, model: EncGAN3, seed: int) -> dict[str, Any]:
    """What the encoders of a model have learned."""

    # a probe of the colours of real sprites, none of which is held out; where they move to is their way
    known = sprites(512, FRAMES, 1_000_000 + seed, False)
    looks = swap.fit_classes(swap.content(to_model(known.video)), known.colour)

    def look(video: Tensor) -> float:
        return float((looks(swap.content(video).cpu()) == some.colour).double().mean())

    def way(video: Tensor, labels: Tensor) -> float:
        return float((heading(video) == labels).double().mean())

    # held-out sprites, each with the movement of another one
    some = sprites(options.clips, FRAMES, 2_000_000 + seed, True)
    real, order = clips_of(some.video), torch.arange(options.clips).roll(1)
    again, other = made_of(model, real, real), some.direction[order]
    found: dict[str, Any] = {"errors": errors(model, {"sprites": real, "footage": clips_of(options.heldout)})}
    found["direction"] = {
        "real": way(real, some.direction),
        "reconstructed": way(again, some.direction),
        "opposite": way(again, (some.direction + DIRECTIONS // 2) % DIRECTIONS),
    }
    found["swap"] = {"content_real": look(real)}
    for name, drawn in (("", False), ("_drawn", True)):
        swapped = made_of(model, real, real[order], drawn)
        found["swap"] |= {f"content{name}": look(swapped), f"movement{name}": way(swapped, other)}
    return found


def errors(model: EncGAN3, kinds: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean absolute and root mean square errors of reconstructions, and of repeating the first frame, in 0..1."""
    found = {}
    for kind, clips in kinds.items():
        for name, video in ((kind, made_of(model, clips, clips)), (f"{kind}_copy", clips[:, :, :1].expand_as(clips))):
            found[name] = float((video - clips).abs().mean()) / 2
            found[f"{name}_rms"] = float((video - clips).square().mean().sqrt()) / 2
    return found


# R: long videos.


class Next(nn.Module):
    """z_v of the next clip as a Gaussian, given those before: an LSTM over movement, as the paper's LEncGAN3 might be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(width, 64, batch_first=True), nn.Linear(64, 2 * width)

    def forward(self, moves: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """`(B, n, D_v)` of clips -> mean and log-variance of each next one, and the state."""
        hidden, state = self.lstm(moves, state)
        mean, logvar = self.out(hidden).chunk(2, dim=-1)
        return mean, logvar.clamp(-10, 4), state


def followed(options: argparse.Namespace, model: EncGAN3, seed: int) -> Next:
    """The LSTM, trained on the movement of clips in a row of long sprites and of windows of footage."""
    hop = model.config.frames - model.config.overlap
    rows = []
    with torch.no_grad():
        for number in range(options.windows // 32):
            video = to_model(sprites(32, FRAMES + 7 * hop, seed * 1000 + number, False).video).transpose(1, 2)
            clips = [video[:, first : first + FRAMES].to(engines.device()) for first in range(0, 8 * hop, hop)]
            rows.append(torch.stack([model.encode_movement(model.differences_of(clip)).mean for clip in clips], 1))
    moves = torch.cat(rows)
    torch.manual_seed(seed)
    lstm = Next(model.config.movement).to(engines.device())
    optimizer = torch.optim.Adam(lstm.parameters(), 3e-3)
    for step in range(400):
        batch = moves[np.random.default_rng([seed, step]).integers(len(moves), size=32)]
        mean, logvar, _ = lstm(batch[:, :-1])
        loss = (logvar + (batch[:, 1:] - mean).square() / logvar.exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lstm.eval()


@torch.no_grad()
def drawn_by(lstm: Next, first: Tensor, seeds: Sequence[int], clips: int) -> Tensor:
    """`(B, clips, D_v)` that go on from the movement of first clips `(B, D_v)`."""
    made, state = [first], None
    for number in range(1, clips):
        mean, logvar, state = lstm(made[-1][:, None], state)
        noise = torch.stack([torch.randn(first.shape[1], generator=rng_of(seed, number)) for seed in seeds])
        made.append(mean[:, 0] + (0.5 * logvar[:, 0]).exp() * noise.to(first))
    return torch.stack(made, 1)


@torch.no_grad()
def rolled(model: EncGAN3, lstm: Next | None, arm: str, seed: int, frames: Tensor) -> tuple[Tensor, list[int]]:
    """Videos `(B, 3, LONG, H, W)`, not clamped, that go on from frames `(B, 3, H, W)`, and their joints."""
    width, videos, joints = model.config.movement, list[Tensor](), list[int]()
    for number, frame in enumerate(frames):
        one, noise = 1000 * seed + number, partial(torch.randn, generator=rng_of(1000 * seed + number, 1 << 20))
        if arm in ("independent", "longer"):
            z_x = model.encode_content(frame[None]).mean
            if arm == "longer":
                video = model.generate(z_x, noise(1, LONG // 4 - 3, width).to(z_x), frame[None], 0, LONG)
            else:
                count, joints = LONG // FRAMES, list(range(FRAMES, LONG, FRAMES))
                z_v = noise(count, width).to(z_x)
                video = model.generate(z_x.expand(count, -1), z_v, frame.expand(count, -1, -1, -1)).flatten(0, 1)[None]
        else:
            plan = Rollout(model, [one], start=Start(frame[None], frame[None]))
            if lstm:
                begin = noise(1, width).to(frame)
                plan = Rollout(
                    model, [one], start=plan.start, movement=[drawn_by(lstm, begin, [one], plan.clips(LONG))[0]]
                )
            joints, video = plan.joints(LONG), torch.cat(list(plan.pieces(LONG)), dim=1)
        videos.append(video.cpu())
    # the longer one has no joints: it is measured where the chained ones have theirs
    chained = Rollout(model, [0], start=Start(frames[:1], frames[:1])).joints(LONG)
    return torch.cat(videos).transpose(1, 2), joints or chained


def part_r(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    model = trained(options, "recall" if arm == "recall" else "single", seed)
    lstm = followed(options, model, seed) if arm == "lstm" else None
    moving = sprites(options.videos, SPAN, 3_000_000 + seed, True).video
    found = {}
    for kind, real in (("sprites", moving), ("footage", options.heldout[: options.videos])):
        video, joints = rolled(model, lstm, arm, seed, clips_of(real)[:, :, 0])
        found[kind] = measured(options, to_model(real), video, joints)
    return found


def measured(options: argparse.Namespace, real: Tensor, raw: Tensor, joints: Sequence[int]) -> dict[str, Any]:
    """What is seen at joints, and curves over bins, of videos `(B, 3, LONG, H, W)` beside real windows."""
    video, length = raw.clamp(-1, 1), FRAMES - 4
    seen, true = seams(changes(video), bends(video), joints), changes(real)
    bins = video.split(BIN, dim=2)
    looks, levels = [swap.content(part) for part in bins], [part.mean((1, 2, 3, 4)) / 2 for part in bins]
    found: dict[str, Any] = {
        **seen._asdict(),
        "change_of_real": seen.change / float(true.mean()),
        "out_of_range": out_of_range(raw),
        "colours_from_start": [float((look - swap.content(video[:, :, :1])).norm(dim=1).mean()) for look in looks],
        "level_from_start": [float((level - video[:, :, 0].mean((1, 2, 3)) / 2).abs().mean()) for level in levels],
    }
    if options.network:

        def sample(windows: Tensor) -> Sample:
            each = Sample("windows", options.network)
            for batch in windows.to(engines.device()).split(8):
                each.add(nn.functional.interpolate(batch, scale_factor=(1, 4, 4)))  # networks need larger frames
            return each

        truth = sample(torch.cat([real[:, :, :length], real[:, :, -length:]]))
        at, inside = around(video, joints, length), between(video, joints, length)
        distances = seam_distances(truth, sample(at), sample(inside), split="val", seed=0)
        found |= {name: distances[name] for name in ("frechet_seam", "frechet_inner", "frechet_gap")}
        windows = [sample(torch.cat(part[:, :, : BIN // length * length].split(length, dim=2))) for part in bins]
        found["frechet"] = degradation(truth, windows, split="val", seed=0)["frechet"]
    return found


# All of it.


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The name of each part's file, and what makes it."""
    for seed in [options.seed] if options.seed is not None else range(options.seeds):
        for variant in VARIANTS if "T" in options.part else ():
            yield f"T-{variant}-{seed}", lambda v=variant, s=seed: part_t(options, v, s)
        for arm in ARMS if "R" in options.part else ():
            yield f"R-{arm}-{seed}", lambda a=arm, s=seed: part_r(options, a, s)


def spread(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    deviation = statistics.stdev(there) if len(there) > 1 else 0.0
    return f"{statistics.mean(there):8.3f} ±{deviation:6.3f}" if there else "       -"


def table(out: Path) -> Iterator[str]:
    """Means ± standard deviations over the seeds."""
    for part, names in (("T", VARIANTS), ("R", ARMS)):
        for name in names:
            rows = [json.loads(path.read_text()) for path in sorted(out.glob(f"{part}-{name}-*.json"))]
            for group in rows[0] if rows else ():
                if group != "seconds_taken":
                    yield f"{part} {name:11} {group:9} seeds {len(rows)}  {cells([row[group] for row in rows])}"


def cells(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each figure of some records; of a curve the first and the last value."""
    parts = []
    for name, value in rows[0].items():
        if isinstance(value, list):
            parts.append(f"{name} {spread([row[name][0] for row in rows])} ..{spread([row[name][-1] for row in rows])}")
        else:
            parts.append(f"{name} {spread([row[name] for row in rows])}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--part", choices=["T", "R"], action="append", help="this one alone; R needs T")
    parser.add_argument("--features", help="state dict or TorchScript of a feature network")
    parser.add_argument("--steps", type=int, default=3300, help="of a training, a third with discriminators")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--lambda-gan", type=float, default=0.3)
    parser.add_argument("--footage", type=int, default=24, help="videos of 24 seconds")
    parser.add_argument("--windows", type=int, default=512, help="of training footage, and sprites for the LSTM")
    parser.add_argument("--clips", type=int, default=128, help="held-out clips that the encoders are measured on")
    parser.add_argument("--videos", type=int, default=16, help="of either kind that are rolled out")
    options = parser.parse_args()
    options.out, options.part = options.out.absolute(), options.part or ["T", "R"]
    options.out.mkdir(parents=True, exist_ok=True)
    options.network = load_network(options.features, device=engines.device()) if options.features else None
    options.dataset = prepare(options.out, options.footage, "ablation-encgan3")
    options.films, options.draw = filmed(options.dataset, "train", options.windows), draw
    options.heldout = filmed(options.dataset, "val", max(options.videos, 32))
    with engines.process_group():
        for name, make in jobs(options):
            if (options.out / f"{name}.json").exists():
                continue
            begun = time.monotonic()
            found = make() | {"seconds_taken": time.monotonic() - begun}
            storage.write(str(options.out / f"{name}.json"), json.dumps(found, indent=2).encode())
            print(*table(options.out), sep="\n", flush=True)
    print(*table(options.out), sep="\n", flush=True)


if __name__ == "__main__":
    main()
