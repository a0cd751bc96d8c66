"""Prompts steer a tiny Latte: what videos show of prompts whose combinations it has never seen, beside one whose captions lie.

The world of actions, with a single action: a caption says shape, colour, direction and background, and a fifth of the
combinations is held out. Videos are judged by their pixels alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from claimed import Claim, Shown, alone
from claimed._moving import RUN, ran, sharded
from longtake.infra.worlds.actions import LOOKS, OPPOSITE, Look, heldout, look_at
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.models.generator import Request, Scene
from longtake.training.models.latte import finetune
from longtake.training.models.latte.sample import Prior, load_prior
from longtake.training.objective import Objective, Turn
from longtake.training.registry import disk, lineage

SIZE, SEEN = 32, 16  # pixels a side of the videos, and of what the model sees
FRAMES, FPS, LENGTH = 8, 8, 12  # frames of a window, a second, of a video
# a patch must have fewer values, here 48, than a token has: velocities are mostly noise, which cannot be compressed
MODEL = {"preset": "latte_tiny", "patch": 4}
GUIDANCE = 4.0
TRAINING: dict[str, Any] = {
    "batch": 16, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 40, "ema_half_lives": (50.0,), "sample_steps": 25,
}  # fmt: skip
ATTRIBUTES = Look._fields


class Scale(NamedTuple):
    """How much is done: videos to learn from and held out, steps, prompts of each kind."""

    clips: int = 570
    steps: int = 2000
    prompts: int = 48


WHOLE, SHORT = Scale(), Scale(40, 60, 8)


def settings(short: bool) -> dict[str, Any]:
    """All that results depend on."""
    videos = {"size": [SIZE, SEEN], "frames": [FRAMES, LENGTH], "fps": FPS, "guidance": GUIDANCE}
    scale = (SHORT if short else WHOLE)._asdict()
    return {"world": "actions", **videos, "model": MODEL, "training": TRAINING, "scale": scale}


def learned(arm: str, seed: int, folder: Path, short: bool) -> Prior:
    """A Latte trained by its stage's own code, with the right captions or with those of others of the batch."""
    scale = SHORT if short else WHOLE
    with alone(folder / "lock"):
        shards = sharded(folder, "actions", scale.clips, SIZE, (1, 1.5), actions=1, frames=LENGTH, fps=FPS)
        captions = {"kind": "caption", "dataset": "shards"}
        text = {"kind": "cache_text", "captions": "captions", "dataset": "shards"}
        found = ran(folder, {"shards": shards, "captions": captions, "text": text})
    inputs = {"dataset": found["shards"].uri, "text": found["text"].uri}
    mine = folder / f"{arm}-{seed}"
    mine.mkdir(exist_ok=True)
    config = finetune.Config(
        kind="finetune_latte", **inputs, model=MODEL, size=(SEEN, SEEN), frames=FRAMES, steps=scale.steps,
        seed=seed, run=RUN, **TRAINING,
    )  # fmt: skip
    with engines.process_group():
        torch.manual_seed(seed)
        setup = finetune.prepare(config, lineage.pinned(inputs, mine), mine)
        objective = finetune.objective(config, setup)
        if arm == "shuffled captions":
            objective = shuffled(objective)
        train(objective, finetune.loader(config, setup, 0, 1), config, mine / "checkpoints")
        weights = checkpoint.trained(mine / "checkpoints", config)
        facts = finetune.facts(config, setup, lineage.read(mine)) | {"lineage": {}}
        disk.save(mine / "model", finetune.MODEL, setup.model.config.model_dump(mode="json"), weights, facts)
    return load_prior(str(mine / "model"))


def shuffled(objective: Objective) -> Objective:
    """The same objective, with each caption given to another video of the batch."""

    def loss(turn: Turn) -> Any:
        moved = {name: turn.batch[name].roll(1, 0) for name in ("text", "text_mask")}
        return objective.loss(turn._replace(batch=turn.batch | moved))

    return replace(objective, loss=loss)


def generated(prior: Prior, stories: Sequence[Sequence[tuple[float, str]]], frames: int = FRAMES) -> list[np.ndarray]:
    """A video (frames, H, W, 3) uint8 for each story of prompts."""
    settings = replace(prior.settings, guidance=GUIDANCE)
    videos: list[np.ndarray] = []
    for first in range(0, len(stories), 16):
        part = stories[first : first + 16]
        requests = [
            Request(first + n, [(at, Scene(prompt=text)) for at, text in story]) for n, story in enumerate(part)
        ]
        videos += list(np.concatenate(list(prior.videos(requests, frames, settings)), axis=1))
    return videos


def accuracies(looks: Sequence[Look], videos: Sequence[np.ndarray]) -> dict[str, float]:
    """The share of videos with each attribute of their prompt, and with all of them."""
    seen = [look_at(video) for video in videos]
    right = [
        [getattr(each, name) == getattr(look, name) for name in ATTRIBUTES]
        for look, each in zip(looks, seen, strict=True)
    ]
    shares = dict(zip(ATTRIBUTES, np.mean(right, axis=0).tolist(), strict=True))
    return shares | {"all": float(np.mean([all(row) for row in right]))}


def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    """Figures of an arm; see `FIGURES`."""
    prior, found = learned(arm, seed, folder, short), dict[str, float]()
    count = (SHORT if short else WHOLE).prompts
    for split in ("held out", "seen"):
        looks = [look for look in LOOKS if heldout(look) == (split == "held out")]
        chosen = [looks[n] for n in np.random.default_rng(seed).choice(len(looks), count)]
        shares = accuracies(chosen, generated(prior, [[(0.0, look.caption())] for look in chosen]))
        found |= {f"{name}, {split}": value for name, value in shares.items() if split == "held out" or name == "all"}
    return found | {"turned": turned(prior, seed, count)}


def turned(prior: Prior, seed: int, videos: int) -> float:
    """Of videos whose prompt turns the direction round half-way: the share of halves that move as their own prompt says."""
    looks = [LOOKS[n] for n in np.random.default_rng(seed).permutation(len(LOOKS))[:videos]]
    backs = [look._replace(action=OPPOSITE[look.action]) for look in looks]
    stories = [[(0.0, look.caption()), (FRAMES / FPS, back.caption())] for look, back in zip(looks, backs, strict=True)]
    made = generated(prior, stories, 2 * FRAMES - prior.settings.overlap)
    halves = [(video[:FRAMES], look) for video, look in zip(made, looks, strict=True)]
    halves += [(video[FRAMES:], back) for video, back in zip(made, backs, strict=True)]
    return float(np.mean([look_at(half).action == look.action for half, look in halves]))


FIGURES = {f"{name}, held out": Shown(f"{name} right, held out", "higher") for name in (*ATTRIBUTES, "all")} | {
    "all, seen": Shown("all right, seen combinations", "higher"),
    "turned": Shown("halves that move as their prompt says, which turns half-way", "higher"),
}
CLAIMS = [
    Claim(
        "latte",
        "steering",
        "Prompts steer what is made, in combinations that no training video shows: the share of videos with each "
        f"attribute of their prompt, at guidance {GUIDANCE:g}. Chance is 0.33, 0.25, 0.25 and 0.33, and 0.01 for all.",
        dict.fromkeys(("right captions", "shuffled captions")),
        FIGURES,
        [("right captions", "shuffled captions", name) for name in FIGURES],
        run,
        settings,
    )
]
