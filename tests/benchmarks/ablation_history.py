"""What history a memory prior is trained on, with tiny models and several seeds, on held-out real footage.

    python tests/benchmarks/ablation_history.py OUT --videos REAL [--features squeezenet1_0.pth] [--seeds 3] [--jobs 2]

Once: real and generated footage to shards of short clips, one autoencoder, and latents in streams, whole and scaled down.
Then `finetune_memory_prior` from random weights, each training in a process of its own:

extremes    no history or all of it, and nothing between: what was done before
uniform     any that generation comes to, each as likely
noise       the same, and the history has noise of which the model is told

The loss of held-out segments by how much came before them, at the same places and from the same noise for all of them;
and the drift of films of ten times the longest that training sees, which go on from the first seconds of held-out videos:
1 - cosine of the features of each segment to those of what was given, and how far the spread of its latents is from that
of the data. `noise` is measured with a clean past and with one at a small level.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from longtake.datasets import compact, index, schema, storage, view
from longtake.datasets.loader import to_model
from longtake.datasets.loader.streams import Lengths
from longtake.infra import graph, recipe, runner, runs
from longtake.infra.footage import generate
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.metrics.features import features, load_network
from longtake.training.models.common.codec import load_codec
from longtake.training.models.generator import Settings
from longtake.training.models.memory import finetune as stage
from longtake.training.models.memory import segments
from longtake.training.models.memory.data import Setup, heldout_of
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.history import history_lengths
from longtake.training.registry import disk, lineage

VARIANTS: dict[str, dict[str, Any]] = {"extremes": {}, "uniform": {}, "noise": {"history_noise": 0.5}}
LEVELS = {"extremes": (0.0,), "uniform": (0.0,), "noise": (0.0, 0.1)}  # of the past in generation
MODEL = {
    "preset": "memory_dit_tiny",
    "depth": 3,
    "width": 96,
    "heads": 3,
    "memory_widths": [16, 32, 64],
    "rates": ["2x2x2"],
}
FPS, FRAMES, CLIP, HISTORY, STREAM = (
    12,
    9,
    24,
    72,
    240,
)  # frames of a segment, clip, history and stream: 3, 6, 18, 60 steps
SIZE = 32  # pixels a side, 4x4 latents
TIMES = 10  # as long as the longest that training sees


def prepare(options: argparse.Namespace) -> dict[str, str]:
    """Footage, shards, the autoencoder and latents, whatever is missing; returns their URIs."""
    out = options.out.absolute()
    generate(out / "footage", options.generated, seconds=30.0, fps=FPS, size=(96, 128))
    sources = [str(Path(options.videos).absolute()), str(out / "footage")]
    clip = {"short_side": 2 * SIZE, "fps": FPS, "min_seconds": FRAMES / FPS, "max_seconds": CLIP / FPS, "crf": 12}
    latents = {"kind": "cache_latents", "dataset": "shards", "encoder": options.vae or "vae", "size": [SIZE, SIZE]}
    joined = latents | {"join_seconds": STREAM / FPS}
    content: dict[str, Any] = {
        "name": "ablation-history",
        "workspace": str(out / "runs"),
        "stages": {
            "shards": {"kind": "shard", "sources": sources, "val_fraction": options.val_fraction, "clip": clip},
            "vae": {
                "kind": "pretrain_vae", "dataset": "shards", "frames": FRAMES, "steps": options.vae_steps, "batch": 8,
                "model": {"preset": "pv_vae_tiny", "patch": 2, "latent_channels": 16},
                "sizes": [[SIZE, SIZE], [SIZE // 2, SIZE // 2]],
                "max_drop": 0.0, "lambda_gan": 0, "lr": 1.0e-3, "betas": [0.9, 0.99], "gradient_clip": 0.1,
                "warmup_steps": 40, "ema_half_lives": [20], "run": {"sample_every": 0}, "eval_clips": 16,
            },
            "latents": joined,
            "low_latents": joined | {"shrink": [2, 2]},
        },
    }  # fmt: skip
    if options.vae:
        del content["stages"]["vae"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(content))
    resolved = graph.pin(recipe.load(str(out / "recipe.yaml")))
    runner.run(resolved, runner.Choice(), lambda line: print(line, flush=True))
    store, uris = runs.connect(resolved), dict[str, str]()
    for node in graph.build(resolved):
        done = runner.finished(node, store)
        assert done
        uris[node.name] = done.uri
    vae = load_codec(uris.get("vae") or options.vae)
    if not (out / "vae" / "config.json").exists():
        # a folder, so that the trainings need no tracking store
        disk.save(out / "vae", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}})
    inputs = {"dataset": uris["shards"], "latents": uris["latents"], "low_latents": uris["low_latents"]}
    return inputs | {"vae": str(out / "vae"), "view": real_heldout(uris["shards"], out / "footage")}


def real_heldout(dataset: str, footage: Path) -> str:
    """A view that keeps generated clips for training alone."""
    made = {row["source"] for row in index.read_sources(dataset).to_pylist() if str(footage) in row["uri"]}
    tables, digests = [], {}
    for split in schema.SPLITS:
        clips = index.read_all(dataset, split)
        of = clips["source"].to_pylist()
        reasons = ["generated" if split == "val" and source in made else None for source in of]
        tables.append(view.rows(split, clips["key"], np.array(reasons, object)))
        digests[split] = compact.open_split(dataset, split)[0].digest
    uri = storage.join(dataset, "views", "real-heldout.parquet")
    view.write(uri, pa.concat_tables(tables), digests)
    return uri


class Extremes(stage.Config):
    """The rule of before: all of the history, or none."""

    def histories(self, dit: MemoryDiTConfig, least: int) -> Lengths:
        made = history_lengths(dit, self.no_history, least)
        return replace(made, some=made.some[-1:])


def work(options: argparse.Namespace, variant: str, seed: int) -> None:
    """Train one variant with one seed, measure it and write its result."""
    inputs = json.loads((options.out / "inputs.json").read_text())
    folder = options.out / f"{variant}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "kind": "finetune_memory_prior", **inputs, "model": MODEL, "frames": FRAMES, "history_seconds": HISTORY / FPS,
        "seed": seed, "steps": options.steps, "batch": 4, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 20,
        "ema_half_lives": [20], "sample_steps": options.sample_steps,
        "run": {"workers": 0, "sample_every": 0, "checkpoint_every": 250, "keep_checkpoints": 1},
    }  # fmt: skip
    config = (Extremes if variant == "extremes" else stage.Config)(**settings | VARIANTS[variant])
    with engines.process_group():
        torch.manual_seed(seed)
        setup = stage.prepare(config, lineage.pinned(inputs, folder), folder)
        loader = stage.loader(config, setup, 0, 1)
        print(*stage.announce(config, setup, loader)[0], sep="\n", flush=True)
        train(stage.objective(config, setup), loader, config, folder / "checkpoints")
        setup.model.load_state_dict(checkpoint.trained(folder / "checkpoints", config))
        setup.model.eval()
        record = {"variant": variant, "seed": seed, "losses": losses(config, setup)}
        record["drift"] = {str(level): drift(options, setup, level) for level in LEVELS[variant]}
    storage.write(str(folder.with_suffix(".json")), json.dumps(record, indent=2).encode())


@torch.no_grad()
def losses(config: stage.Config, setup: Setup) -> dict[int, float]:
    """By steps of history, of all held-out streams that have room for the longest, at its place and from the same noise."""
    counts = (0, *history_lengths(setup.model.config).some)
    made = stage.losses_by_history(config.model_copy(update={"seed": 0}), setup, counts)
    return {count: float(losses.mean()) for count, losses in made.items()}


@torch.no_grad()
def drift(options: argparse.Namespace, setup: Setup, level: float) -> dict[str, list[float]]:
    """By segment, means over held-out streams: the distance of the features, and the spread of the latents beside the data's."""
    network = load_network(options.features) if options.features else None
    model, length, begin = setup.model, setup.data.shape[0], setup.data.shape[0]
    settings = Settings(options.sample_steps, history_noise=level)
    config = stage.Config(
        kind="finetune_memory_prior", dataset="", latents="", model=MODEL, frames=FRAMES, history_seconds=HISTORY / FPS
    )
    loader = heldout_of(config, setup, begin)
    batches = list(islice(loader, options.films))
    # what was given is a stream's first segment
    start = torch.cat([batch["history_latent"][:, 0, :, -begin:].float() for batch in batches])
    count = -(-TIMES * (setup.data.history + length) // length)
    given = torch.cat([to_model_frames(chunk) for chunk in setup.codec.decode_stream([start])], dim=2)
    apart: list[float] = []
    spread: list[float] = []
    films = segments.generate(
        model, setup.codec, count * length, list(range(len(start))), start=start, settings=settings
    )
    for chunk in films:
        frames = torch.from_numpy(chunk).permute(0, 4, 1, 2, 3)
        latent = model.normalise(setup.codec.encode(to_model(frames[:, :, -5:])).mode()[:, :, -1:])
        spread.append(float(latent.std(dim=(1, 2, 3, 4)).mean()))
        if network:
            each = [
                1
                - torch.cosine_similarity(features(network, a[None]).mean(0), features(network, b[None]).mean(0), dim=0)
                for a, b in zip(to_model(frames), given, strict=True)
            ]
            apart.append(float(torch.stack(each).mean()))
    return {"distance": apart, "spread": spread}


def to_model_frames(chunk: torch.Tensor) -> torch.Tensor:
    return chunk.float().clamp(-1, 1)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Means ± standard deviations over the seeds, a variant a line."""
    begins = sorted({int(begin) for row in rows for begin in row["losses"]})
    yield f"{'held-out loss':16}" + "".join(f"{begin:>16}" for begin in begins)
    for name in VARIANTS:
        some = [row["losses"] for row in rows if row["variant"] == name]
        if some:
            yield f"{name:16}" + "".join(f"{spread_of([each[str(begin)] for each in some]):>16}" for begin in begins)
    for what in ("distance", "spread"):
        yield ""
        kinds = [(name, str(level)) for name in VARIANTS for level in LEVELS[name]]
        found = {kind: [r["drift"][kind[1]][what] for r in rows if r["variant"] == kind[0]] for kind in kinds}
        length = max((len(curve) for some in found.values() for curve in some), default=0)
        if not length:
            continue
        tenths = np.linspace(0, length, TIMES + 1).astype(int)
        yield f"{what:16}" + "".join(f"{f'{n}-{n + 1} x':>16}" for n in range(TIMES))
        for (name, level), some in found.items():
            if some:
                parts = [[float(np.mean(curve[a:b])) for curve in some] for a, b in pairwise(tenths)]
                yield f"{f'{name} at {level}':16}" + "".join(f"{spread_of(part):>16}" for part in parts)


def spread_of(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ±{deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Folder of everything that is made.")
    parser.add_argument("--videos", default=os.environ.get("LONGTAKE_VIDEOS", "") + "/real", help="Real footage.")
    parser.add_argument("--features", help="State dict or TorchScript of a feature network; none: no distance.")
    parser.add_argument("--vae", help="URI of an autoencoder of stride 8 and 4; none: one is trained.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="Trainings at once, of one thread each.")
    parser.add_argument("--steps", type=int, default=1000, help="Of each training.")
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--generated", type=int, default=24, help="Generated videos, of 30 s.")
    parser.add_argument("--val-fraction", type=float, default=0.4, help="Of the sources.")
    parser.add_argument("--films", type=int, default=8, help="Held-out streams that films go on from, at most.")
    parser.add_argument("--sample-steps", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="Print what there is, and stop.")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        work(options, options.one[0], int(options.one[1]))
        return
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        storage.write(str(options.out / "inputs.json"), json.dumps(prepare(options), indent=2).encode())
        jobs = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
        left = [(name, seed) for name, seed in jobs if not (options.out / f"{name}-{seed}.json").exists()]

        def child(job: tuple[str, int]) -> None:
            began = time.monotonic()
            command = [sys.executable, __file__, *sys.argv[1:], "--one", *map(str, job)]
            with (options.out / f"{job[0]}-{job[1]}.txt").open("ab") as log:
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(command, stdout=log, stderr=log, env=env, check=True)
            print(*job, f"{time.monotonic() - began:.0f} s", flush=True)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(child, left))
    rows = [json.loads(path.read_text()) for path in sorted(options.out.glob("*-?.json"))]
    print("\n".join(table(rows)), flush=True)


if __name__ == "__main__":
    main()
