"""The ablation of the memory encoder (arXiv 2512.23851) with tiny models and several seeds, on held-out real footage.

    python tests/benchmarks/ablation_memory.py OUT --videos REAL [--features squeezenet1_0.pth] [--seeds 3] [--jobs 2]

Once: real and generated footage to shards of short clips, one autoencoder, and latents of all, whole and scaled down. The
view keeps generated clips for training alone, so that what is held out are real sources. Then, each in a process of its
own, trained and measured by the stages' own code:

retrieval   `pretrain_memory`: PSNR and SSIM of all steps of held-out histories, retrieved from the memory: by rate, beside
            a large patchifier at the lowest and FramePack, which drops what it does not reach; with one branch alone; with
            a history that is not masked.
generation  `finetune_memory_prior`: the flow's loss of held-out segments after equal steps, and 1 - cosine of the features
            of each generated segment to those of the first one of the history. All begin with the transformer that has
            learned to retrieve at 4x4x2, but for `scratch`; they differ in φ: that of the same model, learning on (full)
            or not (frozen); a new one (no pretraining); FramePack's kernels or a patchifier, which begin as its patch
            embedding; none (window only).

Each finished pair of a variant and a seed is a file of JSON in OUT and is not made again; one that was stopped goes on from
its last checkpoint. So stop it whenever you like, give the same command again, or `--table` for what there is. With the
defaults all of it takes some 35 minutes on two free cores after 4 of preparation; `--seeds 0` does that alone.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import yaml

from longtake.datasets import compact, index, neighbours, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.infra import graph, recipe, runner, runs
from longtake.infra.footage import generate
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.models.common.codec import load_codec
from longtake.training.models.memory import finetune as finetune_memory_prior
from longtake.training.models.memory import pretrain as pretrain_memory
from longtake.training.models.memory.data import Setup
from longtake.training.models.memory.tokens import parse_rate
from longtake.training.registry import disk, lineage

STAGES = {"retrieval": pretrain_memory, "generation": finetune_memory_prior}


class Variant(NamedTuple):
    """What it changes of MODEL and of the stage's settings; `base` names what of the 4x4x2 retriever it begins with."""

    model: dict[str, Any]
    settings: Mapping[str, Any] = MappingProxyType({})
    base: Literal["", "model", "transformer"] = ""


VARIANTS = {
    "retrieval": {
        "4x4x2": Variant({"rates": ["4x4x2"]}),  # first, as the base of all of generation
        "2x2x2": Variant({"rates": ["2x2x2"]}),
        "2x2x1": Variant({"rates": ["2x2x1"]}),
        "patchify 4x4x2": Variant({"rates": ["4x4x2"], "memory": "patchify"}),
        "framepack": Variant({"memory": "framepack"}),
        "4x4x2 high only": Variant({"rates": ["4x4x2"], "branches": "high"}),
        "4x4x2 low only": Variant({"rates": ["4x4x2"], "branches": "low"}),
        "4x4x2 clean": Variant({"rates": ["4x4x2"]}, {"history": "clean"}),
    },
    "generation": {
        "full": Variant({}, base="model"),
        "no pretraining": Variant({"memory": "encoder"}, base="transformer"),
        "frozen": Variant({}, {"freeze": ["memory"]}, base="model"),
        "patchify": Variant({"memory": "patchify"}, base="transformer"),
        "framepack": Variant({"memory": "framepack"}, base="transformer"),
        "window only": Variant({}, base="transformer"),
        "scratch": Variant({"rates": ["4x4x2"]}),
    },
}
BASE = "4x4x2"
MODEL = {"preset": "memory_dit_tiny", "depth": 3, "width": 96, "heads": 3, "memory_widths": [16, 32, 64, 128]}
SHRINKS = {"low4": (4, 4), "low2": (2, 2)}  # the stages that make the latents of the low-res branches
FPS, FRAMES, CLIP, HISTORY = 12, 9, 21, 36  # frames of a segment, a clip and a history: 3, 6 and 9 steps
SIZE = 64  # pixels a side, 8x8 latents
EACH = 2  # held-out clips of a source
# seconds on one free core, of a training step on the average, and of all before the first and after the last one
COST = {"retrieval": (0.068, 20.0), "generation": (0.095, 36.0)}


class Job(NamedTuple):
    kind: str
    variant: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / self.kind / f"{self.variant.replace(' ', '-')}-{self.seed}"

    def result(self, out: Path) -> Path:
        return out / f"{self.kind}-{self.variant.replace(' ', '-')}-{self.seed}.json"


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that whatever is there when it is stopped compares; the base comes first."""
    return [
        Job(kind, variant, seed)
        for seed, kind in product(range(options.seeds), VARIANTS)
        for variant in VARIANTS[kind]
        if kind not in options.without
    ]


def stages_of(options: argparse.Namespace, sources: list[str]) -> dict[str, Any]:
    """The stages of the recipe that all trainings share."""
    clip = {"short_side": SIZE, "fps": FPS, "min_seconds": FRAMES / FPS, "max_seconds": CLIP / FPS, "crf": 12}
    stages: dict[str, Any] = {
        "shards": {"kind": "shard", "sources": sources, "val_fraction": options.val_fraction, "clip": clip}
    }
    if not options.vae:
        stages["vae"] = {
            "kind": "pretrain_vae", "dataset": "shards", "frames": FRAMES, "steps": options.vae_steps, "batch": 8,
            "model": {"preset": "pv_vae_tiny", "patch": 2, "latent_channels": options.channels},
            "sizes": [[SIZE, SIZE], [SIZE // 2, SIZE // 2]],
            "max_drop": 0.0, "lambda_gan": 0, "lr": 1.0e-3, "betas": [0.9, 0.99], "gradient_clip": 0.1,
            "warmup_steps": 40, "ema_half_lives": [20], "run": {"sample_every": 0}, "eval_clips": 64,
        }  # fmt: skip
    latents = {"kind": "cache_latents", "dataset": "shards", "encoder": options.vae or "vae", "size": [SIZE, SIZE]}
    latents |= {"join_seconds": 3 * (HISTORY + CLIP) / FPS}
    columns = {"latents": (1, 1), **SHRINKS}
    return stages | {name: latents | {"shrink": list(shrink)} for name, shrink in columns.items()}


def prepare(options: argparse.Namespace) -> dict[str, str]:
    """Footage, shards, the autoencoder, latents and the view, whatever is missing; returns their URIs."""
    out, footage = options.out.absolute(), options.out.absolute() / "footage"
    sources = [str(Path(options.videos).absolute())]
    if options.generated:
        generate(footage, options.generated, seconds=36.0, fps=FPS, size=(96, 128))
        sources.append(str(footage))
    content = {"name": "ablation-memory", "workspace": str(out / "runs"), "stages": stages_of(options, sources)}
    (out / "recipe.yaml").write_text(yaml.safe_dump(content))
    resolved = graph.pin(recipe.load(str(out / "recipe.yaml")))
    runner.run(resolved, runner.Choice(), lambda line: print(line, flush=True))
    store, uris = runs.connect(resolved), dict[str, str]()
    for node in graph.build(resolved):
        done = runner.finished(node, store)
        assert done
        uris[node.name] = done.uri
    if not (out / "vae" / "config.json").exists():
        # a folder, so that the trainings need no tracking store
        vae = load_codec(uris.get("vae") or options.vae)
        disk.save(out / "vae", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}})
    heldout = real_heldout(uris["shards"], footage)
    columns = {name: uris[name] for name in ("latents", *SHRINKS)}
    return {"dataset": uris["shards"], "vae": str(out / "vae"), **heldout, **columns}


def real_heldout(dataset: str, footage: Path) -> dict[str, str]:
    """Two views that hold out real sources alone: `retrieval` some clips of each, that one of many clips is not most of
    it, and `generation` all, since a stream of which a view leaves clips out is not read."""
    sources = index.read_sources(dataset).to_pylist()
    made = {row["source"] for row in sources if str(footage) in row["uri"]}
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    tables: dict[str, list[pa.Table]] = {kind: [] for kind in STAGES}
    for split, base in bases.items():
        clips = index.read_all(dataset, split)
        of = np.array(clips["source"].to_pylist())
        usable = neighbours.reach_back(base, HISTORY / FPS)
        for kind in STAGES:
            reasons = np.full(len(clips), None, object)
            if split == "val" and kind == "retrieval":
                reasons[:] = "more of its source"
                for source in set(of.tolist()):
                    rows = np.flatnonzero(usable & (of == source))
                    reasons[rows[np.linspace(0, len(rows) - 1, min(EACH, len(rows))).round().astype(int)]] = None
            if split == "val":
                reasons[np.isin(of, list(made))] = "generated"
            tables[kind].append(view.rows(split, clips["key"], reasons))
            kept = {str(source) for source in of[[reason is None for reason in reasons]]}
            count = sum(reason is None for reason in reasons)
            line = f"{count} clips of {len(kept - made)} real and {len(kept & made)} generated sources"
            print(f"{kind}, {split}: {line}", flush=True)
    uris = {kind: storage.join(dataset, "views", f"real-{kind}.parquet") for kind in STAGES}
    for kind, uri in uris.items():
        view.write(uri, pa.concat_tables(tables[kind]), {split: base.digest for split, base in bases.items()})
    return uris


def settings_of(options: argparse.Namespace, job: Job) -> tuple[Any, dict[str, str]]:
    """The stage's config and its inputs."""
    variant = VARIANTS[job.kind][job.variant]
    every = json.loads((options.out / "inputs.json").read_text())
    inputs = {name: every[name] for name in ("dataset", "latents", "vae")} | {"view": every[job.kind]}
    model: dict[str, Any] | None = MODEL | {"window": options.window} | variant.model
    if variant.base:
        begins = Job("retrieval", BASE, job.seed).folder(options.out) / variant.base
        if not (begins / "config.json").exists():
            raise UserError(f"{begins}: is not there yet; it comes of retrieval {BASE}, seed {job.seed}")
        inputs["base"] = str(begins.absolute())
        known = disk.read_config(begins)["config"] | variant.model
        model = variant.model or None
    else:
        known = model
    reads_low = known.get("memory", "encoder") == "encoder" and known.get("branches", "both") != "high"
    if reads_low:
        shrink = parse_rate(known["rates"][0])[:2]
        inputs["low_latents"] = every[next(name for name, by in SHRINKS.items() if by == shrink)]
    settings = {
        "kind": STAGES[job.kind].__name__.rpartition(".")[2],
        **inputs,
        "model": model,
        "frames": FRAMES,
        "history_seconds": HISTORY / FPS,
        "seed": job.seed,
        "steps": options.steps if job.kind == "retrieval" else options.prior_steps,
        "batch": options.batch,
        "lr": options.lr,
        "schedule": "cosine",
        "warmup_steps": 20,
        "ema_half_lives": [20],
        "run": {"workers": 0, "sample_every": 0, "checkpoint_every": 250, "keep_checkpoints": 1},
        "sample_steps": options.sample_steps,
        "eval_clips": options.clips,
    }
    if job.kind == "generation":
        settings |= {"eval_videos": options.clips, "eval_segments": options.segments, "features": options.features}
    return STAGES[job.kind].Config(**settings | dict(variant.settings)), inputs


def work(options: argparse.Namespace, job: Job) -> None:
    """Train one variant with one seed, measure it and write its result."""
    begun, folder, stage = time.monotonic(), job.folder(options.out), STAGES[job.kind]
    folder.mkdir(parents=True, exist_ok=True)
    config, inputs = settings_of(options, job)
    with engines.process_group():
        torch.manual_seed(job.seed)
        setup = stage.prepare(config, lineage.pinned(inputs, folder), folder)
        loader = stage.loader(config, setup, 0, 1)
        print(*stage.announce(config, setup, loader)[0], sep="\n", flush=True)
        began = time.monotonic()
        train(stage.objective(config, setup), loader, config, folder / "checkpoints")
        trained = time.monotonic()
        setup.model.load_state_dict(checkpoint.trained(folder / "checkpoints", config))
        setup.model.eval()
        if job.kind == "retrieval" and job.variant == BASE:
            keep(setup, folder)
        pictures = folder / "heldout"
        pictures.mkdir(exist_ok=True)
        stage.evaluate(config, setup, pictures)
    told = json.loads((pictures / stage.SUMMARY).read_text())
    record = job._asdict() | {
        "summary": told["summary"],
        "steps": config.steps,
        "train_clips": loader.samples,
        "train_seconds": trained - began,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time(),
    }
    storage.write(str(job.result(options.out)), json.dumps(record, indent=2).encode())
    shutil.rmtree(folder / "checkpoints")


def keep(setup: Setup, folder: Path) -> None:
    """The model as a base of others: whole, and its transformer alone."""
    weights, config = setup.model.state_dict(), setup.model.config
    facts = {"lineage": {}, "vae": {"uri": setup.inputs["vae"], "encoder": setup.data.latents.encoder["digest"]}}
    disk.save(folder / "model", "memory_dit", config.model_dump(mode="json"), weights, facts)
    alone = {name: value for name, value in weights.items() if not name.startswith("memory.")}
    without = config.model_copy(update={"memory": "none"})
    disk.save(folder / "transformer", "memory_dit", without.model_dump(mode="json"), alone, facts)


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Means ± standard deviations over the seeds, a variant a line."""
    for kind, variants in VARIANTS.items():
        found = {name: [r for r in rows if (r["kind"], r["variant"]) == (kind, name)] for name in variants}
        values = {name: [flat(kind, row["summary"]) for row in some] for name, some in found.items() if some}
        if not values:
            continue
        columns = list(dict.fromkeys(column for some in values.values() for row in some for column in row))
        yield f"{kind:18}{'seeds':>6}" + "".join(f"{column:>18}" for column in columns)
        for name, some in values.items():
            yield f"{name:18}{len(some):6}" + "".join(
                f"{spread([row[c] for row in some if c in row]):>18}" for c in columns
            )
        yield ""


def flat(kind: str, summary: Mapping[str, Any]) -> dict[str, float]:
    if kind == "retrieval":
        return {name: summary[name] for name in ("tokens", "psnr", "ssim", "psnr_bound", "ssim_bound")}
    by_segment = enumerate(summary["distance_by_segment"] or (), 1)
    row = {"heldout_loss": summary["heldout_loss"]} | {f"distance_{n}": value for n, value in by_segment}
    return row | {name: summary[name] for name in ("distance", "distance_true") if summary[name] is not None}


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} ±{deviation:.2g}"


def minutes(options: argparse.Namespace, left: list[Job], rows: list[dict[str, Any]]) -> float:
    """How long the jobs will take: as those of their kind have taken, or by COST."""
    seconds = 0.0
    for job in left:
        like = [r["seconds"] for r in rows if r["kind"] == job.kind]
        step, after = COST[job.kind]
        steps = options.steps if job.kind == "retrieval" else options.prior_steps
        seconds += float(np.mean(like)) if like else step * steps + after
    return seconds / options.jobs / 60


def run_all(options: argparse.Namespace, command: list[str]) -> list[Job]:
    """Every job without a result, `options.jobs` at a time; returns those that failed."""
    out, failed, children = options.out, list[Job](), set[subprocess.Popen[bytes]]()
    left = [job for job in jobs_of(options) if not job.result(out).exists()]
    print(f"{len(left)} trainings, about {minutes(options, left, results(out)):.0f} minutes", flush=True)

    def child(job: Job) -> int:
        folder = job.folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            one = [sys.executable, __file__, *command, "--one", *map(str, job)]
            process = subprocess.Popen(one, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            children.add(process)
            return process.wait()

    pool = ThreadPoolExecutor(options.jobs)
    try:
        running = {pool.submit(child, job): job for job in left}
        for done in as_completed(running):
            job = running.pop(done)
            if done.result():
                failed.append(job)
                print(f"{' '.join(map(str, job))}: failed, see {job.folder(out)}/log.txt", file=sys.stderr, flush=True)
                continue
            row = json.loads(job.result(out).read_text())
            told = {name: round(value, 4) for name, value in flat(job.kind, row["summary"]).items()}
            rest = minutes(options, list(running.values()), results(out))
            print(
                f"{' '.join(map(str, job))}: {json.dumps(told)} ({row['seconds']:.0f} s; {rest:.0f} minutes left)",
                flush=True,
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(children):
            if process.poll() is None:
                process.terminate()
        pool.shutdown()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Folder of everything that is made.")
    parser.add_argument("--videos", default=os.environ.get("LONGTAKE_VIDEOS", "") + "/real", help="Real footage.")
    parser.add_argument("--features", help="State dict or TorchScript of a feature network; none: no distance.")
    parser.add_argument("--vae", help="URI of an autoencoder of stride 8 and 4; none: one is trained.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="Trainings at once, of one thread each.")
    parser.add_argument("--steps", type=int, default=1500, help="Of each retrieval.")
    parser.add_argument("--prior-steps", type=int, default=700, help="Of each generation.")
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--channels", type=int, default=16, help="Of the latents.")
    parser.add_argument("--generated", type=int, default=36, help="Generated videos, of 36 s.")
    parser.add_argument("--val-fraction", type=float, default=0.35, help="Of the sources.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--window", type=int, default=3, help="Clean steps beside the memory.")
    parser.add_argument("--clips", type=int, default=32, help="Held-out clips and videos that are measured, at most.")
    parser.add_argument("--segments", type=int, default=4, help="Segments that each video is gone on with.")
    parser.add_argument("--sample-steps", type=int, default=10)
    parser.add_argument("--without", nargs="*", choices=VARIANTS, default=[], help="Leave a kind of training out.")
    parser.add_argument("--table", action="store_true", help="Print what there is, and stop.")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "VARIANT", "SEED"), help="One training, in this process.")
    options = parser.parse_args()
    if options.one:
        kind, variant, seed = options.one
        torch.set_num_threads(1)
        work(options, Job(kind, variant, int(seed)))
        return
    if options.table:
        print("\n".join(table(results(options.out))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        same_settings(options)
        storage.write(str(options.out / "inputs.json"), json.dumps(prepare(options), indent=2).encode())
    except (UserError, Failure) as e:
        sys.exit(f"error: {e}")
    try:
        failed = run_all(options, sys.argv[1:])
    finally:
        print("\n".join(table(results(options.out))), flush=True)
    sys.exit(1 if failed else 0)


def same_settings(options: argparse.Namespace) -> None:
    """Note what decides the results. Raises UserError where the folder has results of other settings."""
    changing = {"out", "seeds", "jobs", "without", "table", "one"}
    ours = {name: value for name, value in vars(options).items() if name not in changing}
    path = options.out / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(ours, indent=2))
        return
    theirs = json.loads(path.read_text())
    if other := [name for name in ours if ours[name] != theirs.get(name)]:
        raise UserError(f"{options.out}: has results of other settings ({', '.join(other)}); name another folder")


if __name__ == "__main__":
    main()
