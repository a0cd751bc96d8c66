"""Whether sound leads a tiny TATS: the picture shows which tone is heard, and is drawn for sounds that it has never heard.

    python tests/benchmarks/ablation_sound.py OUT [--seeds 3] [--steps 1500]

Generated footage: a patch has one of three colours, and a tone of the same name is heard as long; both change together at
random times. So a picture that fits its sound cannot be guessed from the pictures before it. A recipe cuts the footage, trains
a VQGAN of the pictures and one of the sound, writes the tokens of both, and trains a transformer on them.

Videos are then drawn for the sounds of further footage, at guidance 1 and 2, and judged by their pixels: the share of frames
whose patch has the colour of the tone that is heard, away from changes. Beside it the same of another video's sound and of
none, whose chance is a third; `footage` is this judge on the real videos as the VQGAN gives them back, the most that can be
reached. Each finished seed is a file of JSON in OUT and is not made again. A seed takes some 10 minutes on a core.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from longtake.datasets import clip, storage
from longtake.infra import graph, recipe, runner, runs
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.generator import Request, Scene, Sound

COLOURS = np.array([(220, 40, 40), (40, 200, 60), (50, 70, 230)])
TONES = (300.0, 900.0, 2700.0)  # Hz
SIZE, SEEN, FPS, SECONDS, RATE = 32, 16, 12, 3, 16_000  # pixels a side of the videos, and of what the models see
PATCH = slice(SIZE // 4, 3 * SIZE // 4)
FRAMES = 16  # of a window
GUIDANCES = (1.0, 2.0)


class Video(NamedTuple):
    """A video with its sound: frames (T, H, W, 3) uint8, samples (n,), and which tone each frame has."""

    frames: np.ndarray
    samples: np.ndarray
    tones: np.ndarray


def draw(rng: np.random.Generator) -> Video:
    length = SECONDS * FPS
    tones = np.empty(length, int)
    at, tone = 0, int(rng.integers(3))
    while at < length:
        lasts = int(rng.integers(6, 15))
        tones[at : at + lasts] = tone
        at, tone = at + lasts, (tone + int(rng.integers(1, 3))) % 3
    # a plain background, since one with a pattern is how a small transformer knows its training videos again
    frames = np.full((length, SIZE, SIZE, 3), rng.integers(90, 150))
    frames[:, PATCH, PATCH] = COLOURS[tones][:, None, None]
    # the phase goes on where the tone changes, so that there is no click
    hz = np.array(TONES)[tones[np.arange(length * RATE // FPS) * FPS // RATE]]
    samples = rng.uniform(0.3, 0.6) * np.sin(2 * np.pi * np.cumsum(hz) / RATE)
    return Video(frames.astype(np.uint8), samples.astype(np.float32), tones)


def fits(frames: np.ndarray, tones: np.ndarray) -> float:
    """The share of frames (T, H, W, 3) whose patch has the colour of the tone, two frames or more from a change."""
    side = frames.shape[1] // 4
    patch = frames[:, side + 1 : 3 * side - 1, side + 1 : 3 * side - 1].astype(float).mean((1, 2))
    seen = np.linalg.norm(patch[:, None] - COLOURS, axis=-1).argmin(1)
    changes = np.flatnonzero(np.diff(tones)) + 0.5
    away = np.array([np.abs(changes - n).min(initial=np.inf) > 2 for n in range(len(tones))])
    return float((seen == tones)[away].mean())


def stages(options: argparse.Namespace, footage: Path, seed: int) -> dict[str, Any]:
    """The recipe's stages."""
    rules = {"short_side": SIZE, "fps": FPS, "min_seconds": 2, "max_seconds": SECONDS, "aspects": ["1:1"], "crf": 4}
    quiet = {"workers": 0, "sample_every": 0, "keep_checkpoints": 1}
    common = {"dataset": "shards", "seed": seed, "run": quiet, "schedule": "cosine"}
    learned = common | {"batch": 8, "lr": 1e-3, "betas": [0.9, 0.99]}
    window = {"kind": "cache_tokens", "dataset": "shards", "frames": FRAMES, "hop": 4, "size": [SEEN, SEEN]}
    return {
        "shards": {"kind": "shard", "sources": [str(footage)], "clip": rules, "val_fraction": 0.15},
        "vqgan": learned | {
            "kind": "pretrain_vqgan", "model": {"preset": "vqgan_tiny", "codes": 64}, "size": [SEEN, SEEN], "lambda_gan": 0,
            "frames": FRAMES, "steps": options.steps // 2,
        },
        "hearing": learned | {
            "kind": "pretrain_sound_vqgan", "model": {"preset": "sound_vqgan_tiny"}, "frames": FRAMES,
            "spectrogram": {"rows": 16, "columns": 4}, "steps": options.steps // 2,
        },
        "tokens": window | {"encoder": "vqgan"},
        "heard": window | {"encoder": "hearing"},
        "tats": common | {
            "kind": "pretrain_tats", "tokens": "tokens", "audio_tokens": "heard", "model": {"preset": "tats_tiny"},
            "steps": options.steps, "batch": 16, "lr": 1e-3, "warmup_steps": 50, "top_k": 0, "top_p": 0.95, "eval_videos": 2,
            "eval_frames": FRAMES,
        },
    }  # fmt: skip


def work(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train with one seed, and measure."""
    folder = options.out.absolute() / str(seed)
    (folder / "footage").mkdir(parents=True, exist_ok=True)
    for number in range(options.videos):
        path = folder / "footage" / f"{number:03d}.mp4"
        if not path.exists():
            video, silent = draw(np.random.default_rng([seed, number])), folder / "silent.mp4"
            clip.write(silent, video.frames, FPS, crf=4)
            clip.write_with_sound(path, silent.read_bytes(), video.samples[None], RATE)
    content = {"name": f"ablation-sound-{seed}", "workspace": str(folder / "runs")}
    content["stages"] = stages(options, folder / "footage" / "*.mp4", seed)  # type: ignore[assignment]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    resolved = graph.pin(recipe.load(str(folder / "recipe.yaml")))
    runner.run(resolved, runner.Choice(), lambda line: print(line, flush=True))
    store = runs.connect(resolved)
    ends = {node.name: runner.finished(node, store) for node in graph.build(resolved)}
    metrics = {name: store.metrics(end.id)[0] for name, end in ends.items() if end}
    end = ends["tats"]
    assert end and end.uri
    module, facts = registry.load_with_facts(end.uri)
    generator: Any = kind_of(facts).generator
    prior = generator(end.uri, module, facts, None, torch.float32)
    return measured(prior, seed, options.judged) | {
        "hearing": {name: metrics["hearing"].get(name) for name in ("psnr", "usage", "perplexity")},
        "heldout_loss": metrics["tats"]["heldout_loss"],
    }


def measured(prior: Any, seed: int, count: int) -> dict[str, Any]:
    """How well videos fit their sound, another's and none, of footage that no model has seen."""
    videos = [draw(np.random.default_rng([seed, 10_000 + n])) for n in range(count)]
    length = len(videos[0].tones)
    found: dict[str, Any] = {"footage": statistics.mean(_restored(prior, video) for video in videos)}
    for guidance in GUIDANCES:
        settings = replace(prior.settings, guidance=guidance)
        for name, moved in (("own", 0), ("another's", 1), ("none", None)):
            shares = []
            if moved is None and guidance > 1:
                continue
            for first in range(0, count, 8):
                part = range(first, min(count, first + 8))
                sounds = [
                    None if moved is None else Sound(videos[(n + moved) % count].samples[None], RATE) for n in part
                ]
                requests = [
                    Request(seed * 1000 + n, [(0.0, Scene())], sound=sound)
                    for n, sound in zip(part, sounds, strict=True)
                ]
                drawn = np.concatenate(list(prior.videos(requests, length, settings)), axis=1)
                shares += [fits(video, videos[n].tones) for n, video in zip(part, drawn, strict=True)]
            found[f"{name}, guidance {guidance:g}"] = statistics.mean(shares)
    return found


@torch.no_grad()
def _restored(prior: Any, video: Video) -> float:
    """How well a real video fits its sound when its VQGAN has encoded and decoded it."""
    boxes = video.frames.reshape(len(video.frames), SEEN, SIZE // SEEN, SEEN, SIZE // SEEN, 3).mean((2, 4))
    seen = torch.from_numpy(boxes).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    decoded = prior.vqgan.decode_tokens(prior.vqgan.tokens(seen)).clamp(-1, 1)
    frames = ((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()
    return fits(frames, video.tones)


def table(out: Path, seeds: Sequence[int]) -> Iterator[str]:
    """Means ± standard deviations over the seeds."""
    rows = [json.loads(path.read_text()) for seed in seeds if (path := out / f"{seed}.json").exists()]
    for name in (key for key in (rows[0] if rows else {}) if isinstance(rows[0][key], float)):
        values = [row[name] for row in rows]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        yield f"{name:24} seeds {len(values)}  {statistics.mean(values):.3f} ±{deviation:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of the transformer; each VQGAN has half as many")
    parser.add_argument("--videos", type=int, default=240, help="to learn from")
    parser.add_argument("--judged", type=int, default=24, help="videos that are drawn and judged")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        if not (options.out / f"{seed}.json").exists():
            storage.write(str(options.out / f"{seed}.json"), json.dumps(work(options, seed), indent=2).encode())
        print(*table(options.out, range(options.seeds)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
