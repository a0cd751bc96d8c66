"""Training Latte on cached latents against training it on pixels: samples a second, through the real loader, in one run.

    python tests/benchmarks/bench_latte.py                                  # two CPU cores, some minutes
    python tests/benchmarks/bench_latte.py --size 256 --preset latte_b --batch 64 --workers 14 --precision bf16   # a GPU

Every row sees 17 frames of each clip. `equal tokens` takes every fourth of them as pixels, in patches as large as the
latents' positions: model and tokens are the same, and what differs is the loader. `all frames` takes all 17, so that the
pixels can be played as the latents' videos can; `patch 8` has four times the detail.
"loader" is what the loader gives by itself: no model, however fast, trains on more.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.datasets import clip, compact, encoding, index, schema, storage
from longtake.datasets import latents as column
from longtake.datasets.shard import write_tar
from longtake.pipeline import latents
from longtake.training import engines
from longtake.training.models.common.codec import Pixels
from longtake.training.models.latte.finetune import Config, _loss, loader_of
from longtake.training.models.latte.model import Latte
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.objective import Turn
from longtake.training.target import LatentTarget, PixelTarget, Target

WARM_UP = 2


def footage(folder: Path, clips: int, size: int, frames: int) -> str:
    """A dataset of drifting noise."""
    rng = np.random.default_rng(0)
    for split in schema.SPLITS:
        (folder / split).mkdir(parents=True)
        rows, videos = [], []
        for number in range(clips):
            picture = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            clip.write(folder / "clip.mp4", np.stack([np.roll(picture, 2 * n, 1) for n in range(frames)]), 24)
            videos.append((f"{number:020d}-00000", {"mp4": (folder / "clip.mp4").read_bytes(), "json": b"{}"}))
        tar = folder / split / "00000.tar"
        members = write_tar(tar, videos)
        for number, (key, _) in enumerate(videos):
            mp4, data = members[2 * number : 2 * number + 2]
            row = {"key": key, "source": key[:20], "clip": 0, "sha256": mp4.sha256, "start_seconds": 0.0}
            row |= {"frame_count": frames, "fps": 24.0, "height": size, "width": size}
            row |= {f"mp4_{name}": getattr(mp4, name) for name in ("offset", "size", "crc32")}
            rows.append(row | {f"json_{name}": getattr(data, name) for name in ("offset", "size", "crc32")})
        index.write_index(f"{tar.with_suffix('.parquet')}", rows, schema.INDEX, tar.stat().st_size, "0")
    storage.write(f"{folder}/dataset.json", json.dumps({"format": schema.FORMAT_VERSION}).encode())
    return str(folder)


def cached(dataset: str, size: int) -> column.Latents:
    """Its latents by an autoencoder with random weights."""
    torch.manual_seed(0)
    vae = PVVAE(config_from_preset("pv_vae_tiny")).eval().to(engines.device())
    chosen = encoding.Settings((size, size), "fp32", "float16", None, 64, 8, 4)
    strides, digest = encoding.strides_of(vae, "here"), column.encoder_digest(vae)
    name = encoding.column_name(digest, chosen, "")
    for split in schema.SPLITS:
        count = len(compact.open_split(dataset, split)[1])
        latents.make_latents(vae, strides, dataset, split, "00000", name, chosen, np.ones(count, bool))
    found = column.read_moments(dataset, index.read_shard(dataset, "train", f"00000.{name}"))
    std, drawn = np.sqrt(found.m2 / found.count) + 1e-3, np.sqrt(found.variance)
    facts = dict(
        dataset=dataset, column=name, encoder={"digest": digest}, channels=strides.channels, factor=strides.factor
    )
    facts |= dict(
        stride=strides.stride, size=(size, size), precision="fp32", dtype="float16", count=found.count, view=None
    )
    values = {"mean": found.mean, "std": std, "posterior_std": drawn}
    return column.Latents(**facts, **{n: tuple(v.tolist()) for n, v in values.items()}, digests={})


def loaded(loader: Any, steps: int) -> float:
    """Seconds a batch of the loader alone."""
    batches = iter(loader)
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return (time.perf_counter() - start) / steps


def trained(config: Config, target: Target, loader: Any, steps: int) -> float:
    """Seconds a step: the objective of the stage, AdamW."""
    device = engines.device()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    latte = Latte(config.latte(target.channels, target.shape)).to(device, dtype)
    optimizer = torch.optim.AdamW(latte.parameters(), lr=1e-4)

    def batches() -> Iterator[dict[str, Any]]:
        for batch in loader:
            yield {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    rng = torch.Generator(device).manual_seed(0)
    start = 0.0
    for number, batch in enumerate(batches()):
        if number == WARM_UP:
            start = time.perf_counter()
        if number == WARM_UP + steps:
            break
        value, _ = _loss(config, target, latte, Turn("model", {"model": latte}, batch, number, rng, 0, {}))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(value.detach())
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--preset", default="latte_tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    size = options.size
    with tempfile.TemporaryDirectory() as folder:
        dataset = footage(Path(folder) / "dataset", options.clips, size, frames=48)
        made = cached(dataset, size)
        general = {"kind": "finetune_latte", "dataset": dataset, "batch": options.batch, "precision": options.precision}
        side = size // made.stride

        def pixels(frames: int, stride: int, patch: int) -> tuple[Config, Target]:
            model = {"preset": options.preset, "patch": patch}
            config = Config(**general, size=(size, size), frames=frames, stride=stride, model=model)
            return config, PixelTarget((frames, size, size), 24.0 / stride, config.clip_starts)

        rows: dict[str, tuple[Config, Target]] = {
            "latents": (
                Config(**general, latents="cached", model={"preset": options.preset}, frames=17),
                LatentTarget(made, made.channels, (5, side, side), 24.0, Pixels(), "sample", 0.5),
            ),
            "pixels, equal tokens": pixels(5, 4, 16),
            "pixels, all frames": pixels(17, 1, 16),
            "pixels, all frames, patch 8": pixels(17, 1, 8),
        }
        print(f"{options.preset}, {size}x{size}, batch {options.batch}, workers {options.workers}, {engines.device()}")
        print(f"{'':<28} {'tokens':>7} {'loader samples/s':>17} {'training samples/s':>19} {'latents are':>12}")
        base = 0.0
        for name, (config, target) in rows.items():

            def loader(chosen: Config = config, what: Target = target) -> Any:
                return loader_of(
                    chosen, {"dataset": dataset}, what, "train", batch=options.batch, workers=options.workers
                )

            steps = options.steps if "patch 8" not in name else min(2, options.steps)
            alone = options.batch / loaded(loader(), 4 * options.steps)
            rate = options.batch / trained(config, target, loader(), steps)
            base = base or rate
            tokens = int(np.prod(target.shape)) // config.latte(target.channels, target.shape).patch ** 2
            print(f"{name:<28} {tokens:>7} {alone:>17.1f} {rate:>19.2f} {base / rate:>11.1f}x", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
