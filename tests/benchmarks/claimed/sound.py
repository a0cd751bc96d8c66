"""A tiny TATS that hears: a ball bounces and rings, and is drawn for sounds that no model has heard.

A recipe cuts videos of the world of sound, trains a VQGAN of the pictures and one of the sound, writes the tokens of both,
and trains a transformer on them. What is drawn is read by its pixels beside the sound that was given, beside another
video's, and beside none. `real` is the same of real videos as the VQGAN gives them back, the most that can be reached.
"""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from claimed import Claim, Shown, alone
from claimed._moving import frames_of, ran, sharded
from longtake.infra.worlds import sound
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.generator import Request, Scene, Sound

SIZE, SEEN = 32, 16  # pixels a side of the videos, and of what is learned
FPS, LENGTH = 12, 36  # frames a second, and of a video
FRAMES = 16  # of a window
GUIDANCE = 2.0
ARMS = {"its own sound": 0, "another video's": 1, "no sound": None, "real": None}


class Scale(NamedTuple):
    """How much is done: videos to learn from and held out, steps of a VQGAN, of the transformer, and videos that are drawn."""

    clips: int = 400
    codes: int = 500
    steps: int = 1000
    heldout: int = 32


WHOLE, SHORT = Scale(), Scale(24, 20, 20, 6)


def settings(short: bool) -> dict[str, Any]:
    """All that results depend on: the recipe, and how its models are used."""
    videos = {"size": SIZE, "fps": FPS, "length": LENGTH, "guidance": GUIDANCE}
    return {"world": "sound", **videos, "recipe": stages(0, short), "scale": (SHORT if short else WHOLE)._asdict()}


def stages(seed: int, short: bool) -> dict[str, Any]:
    """The recipe's stages that learn from its videos."""
    scale = SHORT if short else WHOLE
    quiet = {"workers": 0, "sample_every": 0, "keep_checkpoints": 1}
    common = {"dataset": "shards", "seed": seed, "run": quiet, "schedule": "cosine"}
    steps = scale.codes
    learned = common | {"batch": 8, "lr": 1e-3, "betas": [0.9, 0.99], "frames": FRAMES}
    learned |= {"steps": steps, "warm_steps": steps * 2 // 5}
    window = {"kind": "cache_tokens", "dataset": "shards", "frames": FRAMES, "hop": 4, "size": [SEEN, SEEN]}
    return {
        "vqgan": learned | {
            "kind": "pretrain_vqgan", "model": {"preset": "vqgan_tiny", "codes": 128}, "size": [SEEN, SEEN], "lambda_gan": 0,
        },
        "hearing": learned | {
            "kind": "pretrain_sound_vqgan", "model": {"preset": "sound_vqgan_tiny"}, "spectrogram": {"rows": 16, "columns": 4},
        },
        "tokens": window | {"encoder": "vqgan"},
        "heard": window | {"encoder": "hearing"},
        "tats": common | {
            "kind": "pretrain_tats", "tokens": "tokens", "audio_tokens": "heard", "model": {"preset": "tats_tiny"},
            "steps": scale.steps, "batch": 16, "lr": 1e-3, "warmup_steps": 10, "top_k": 0, "top_p": 0.95,
            "eval_videos": 2, "eval_frames": FRAMES,
        },
    }  # fmt: skip


def run(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    """What the reader says of an arm's videos, beside the sound of each; the arms of a seed share their models."""
    mine, scale, seconds = folder / str(seed), SHORT if short else WHOLE, (2, LENGTH / FPS)
    with alone(mine / "lock"):
        shards = sharded(mine, "sound", scale.clips, SIZE, seconds, seed=seed, frames=LENGTH, fps=FPS)
        uri = ran(mine, {"shards": shards} | stages(seed, short))["tats"].uri
    module, facts = registry.load_with_facts(uri)
    generator: Any = kind_of(facts).generator
    prior = generator(uri, module, facts, None, torch.float32)

    # held-out videos, of other seeds than those in the footage
    videos = [
        sound.render(900_000_000 + 1000 * seed + n, True, size=SIZE, frames=LENGTH, fps=FPS)
        for n in range(scale.heldout)
    ]
    if arm == "real":
        made = [restored(prior, np.stack(list(video.frames))) for video in videos]
    else:
        made = drawn(prior, seed, [heard_by(videos, n, ARMS[arm]) for n in range(len(videos))])
    rows = [sound.read(frames, video.truth, FPS) for frames, video in zip(made, videos, strict=True)]
    return {name: statistics.mean(row[name] for row in rows) for name in FIGURES}


def heard_by(videos: list[Any], number: int, moved: int | None) -> Sound | None:
    """The sound of the video that is so many later, or none."""
    if moved is None:
        return None
    samples, rate = videos[(number + moved) % len(videos)].sound
    return Sound(samples[None], rate)


def drawn(prior: Any, seed: int, sounds: list[Sound | None]) -> list[np.ndarray]:
    """A video (T, H, W, 3) uint8 for each sound; guidance leads towards a sound, where there is one."""
    settings = replace(prior.settings, guidance=GUIDANCE if sounds[0] else 1.0)
    made: list[np.ndarray] = []
    for first in range(0, len(sounds), 8):
        part = sounds[first : first + 8]
        requests = [Request(seed * 1000 + first + n, [(0.0, Scene())], sound=each) for n, each in enumerate(part)]
        made += list(np.concatenate(list(prior.videos(requests, LENGTH, settings)), axis=1))
    return made


@torch.no_grad()
def restored(prior: Any, frames: np.ndarray) -> np.ndarray:
    """A real video as its VQGAN gives it back."""
    boxes = frames.reshape(len(frames), SEEN, SIZE // SEEN, SEEN, SIZE // SEEN, 3).mean((2, 4))
    seen = torch.from_numpy(boxes).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    return frames_of(prior.vqgan.decode_tokens(prior.vqgan.tokens(seen))[0])


FIGURES = {
    "colour": Shown("frames whose ball has the colour of the tone", "higher"),
    "bounce": Shown("bounces heard at which the ball is lowest", "higher"),
    "height": Shown("correlation of its height with that of the sound's ball", "higher"),
}
CLAIMS = [
    Claim(
        "tats",
        "hearing",
        "A transformer that sees the tokens of the sound first makes videos that fit it. Chance is a third for the colour.",
        ARMS,
        FIGURES,
        [("its own sound", other, name) for other in ("another video's", "no sound") for name in FIGURES],
        run,
        settings,
    )
]
