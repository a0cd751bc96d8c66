"""Caching latents beside encoding alone: what reading, decoding, statistics and the commit cost in one process.

    python tests/benchmarks/bench_latents.py [--preset pv_vae_tiny] [--device cpu] [--precision fp32] [--side 64] [--turns 3]

Generated footage is cut into clips, as `shard` does. `encode` puts decoded clips from memory through the encoder, in the
batches and chunks of the stage; `stage` is its inner function, from mp4s to a committed column. They take turns, and the
figure is the median of the turns' ratios. `at once` encodes the same clips without a stream, as a reference.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch

from longtake.datasets import encoding, index, storage
from longtake.datasets.loader import to_model
from longtake.infra.footage import generate
from longtake.pipeline import latents, plan
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import ClipConfig, CutConfig
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset


def make_dataset(folder: Path, clips: int, side: int, seconds: float) -> str:
    """One shard of `train`."""
    generate(str(folder / "videos"), max(2, clips // 3), 0, 12.0)
    cut = CutConfig(clip=ClipConfig(short_side=side, fps=12, max_seconds=seconds))
    root = str(folder / "dataset")
    storage.write(f"{root}/dataset.json", b'{"format": 2}')
    for group in plan.plan(root, [str(folder / "videos" / "*.mp4")], 0.0, 1 << 40, 10_000):
        assert not make_group(group, plan.sources_of(root, group), root, cut)["error"]
    return root


def clocked(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pv_vae_tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--clips", type=int, default=24, help="about so many")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    figures.add_option(parser, turns=3)
    return parser


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of each work against those of `encode`, of each turn."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    kind = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    model = PVVAE(config_from_preset(arguments.preset)).eval().requires_grad_(False).to(arguments.device, kind)
    strides = encoding.strides_of(model, arguments.preset)
    settings = encoding.Settings(
        size=None,
        precision=arguments.precision,
        dtype="float16",
        tile=None,
        overlap=64,
        batch=arguments.batch,
        chunk=arguments.chunk,
        threads=arguments.threads,
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.threads) as pool:
        root = make_dataset(Path(folder), arguments.clips, arguments.side, arguments.seconds)
        rows = index.read_all(root, "train").to_pylist()
        tar = storage.join(root, "train", "00000.tar")
        groups = encoding.batches(encoding.streams(rows, settings, strides), settings, strides)
        chunks = list(latents.video_chunks(tar, groups, settings, strides, pool))
        videos = [[chunk for number, chunk in chunks if number == n] for n in range(len(groups))]

        def tensor(chunk: np.ndarray) -> torch.Tensor:
            return to_model(torch.from_numpy(chunk).to(arguments.device).permute(0, 4, 1, 2, 3))

        def encode() -> None:
            with torch.inference_mode():
                for pieces in videos:
                    for _ in model.encode_stream(map(tensor, pieces), settings.chunk):
                        pass

        def at_once() -> None:
            with torch.inference_mode():
                for pieces in videos:
                    model.encode(tensor(np.concatenate(pieces, 1)))

        def decode() -> None:
            for _ in latents.video_chunks(tar, groups, settings, strides, pool):
                pass

        def stage() -> None:
            keep = np.ones(len(rows), bool)
            latents.make_latents(model, strides, root, "train", "00000", "latent-bench", settings, keep)

        works = {"encode": encode, "at once": at_once, "decode": decode, "stage": stage}
        for work in works.values():
            work()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(arguments.turns):
            for name, work in works.items():
                seconds[name].append(clocked(work, arguments.device))
        frames = sum(chunk.shape[0] * chunk.shape[1] for _, chunk in chunks)
        print(f"{arguments.preset}, {arguments.device}, {arguments.precision}: {len(rows)} clips, {frames} frames")
        result, ratios = {}, {}
        for name, taken in seconds.items():
            ratios[name] = [t / e for t, e in zip(taken, seconds["encode"], strict=True)]
            ratio = statistics.median(ratios[name])
            median = statistics.median(taken)
            result[name] = {"clips_s": len(rows) / median, "frames_s": frames / median, "to_encode": ratio}
            print(
                f"{name:8s} {result[name]['clips_s']:8.1f} clips/s {result[name]['frames_s']:9.0f} frames/s {ratio:6.2f} x encode"
            )
        print(json.dumps(result))
    return ratios


if __name__ == "__main__":
    given = options().parse_args()
    figures.write(given.figures, measure(given))
