"""The claims of TATS (arXiv 2204.03638) with tiny models, several seeds and held-out sources.

    python tests/benchmarks/ablation_tats.py OUT [--seeds 3] [--features squeezenet1_0.pth] [--part A] [--seed 0]

A  a VQGAN whose encoder replicates borders makes tokens that do not know where they are: the share of equal tokens a latent
   frame later, above chance (kappa), for `replicate`, `zeros` in every convolution of the encoder, and `group`, replicated
   borders with norms over whole clips. All are trained without the codebook first, which is then seeded. Compared where each
   has the same held-out error: kappa is read off its curve at the error that all reach.
B  so a transformer goes on beyond its training's length: of generated videos, 16 to 256 frames, by chunks of 16, the
   divergence of their codes from those of held-out clips and, with `--features`, the Fréchet distance. And without sampling:
   the loss of true tokens of a long video's later windows, encoded with the whole video and each by itself.
C  a hierarchy drifts less, and is faster: the same curves over 256 frames of a plain transformer and of anchors with what is
   between them, trained for as many steps each; and seconds for one video and for all.

The footage is generated: photographs that move under a camera, with cuts; videos are held out whole. Each finished part of
a seed (and variant) is a file of JSON in OUT and is not made again, so several processes may take a part or a seed each; C
of a seed has its plain transformer from B. On one core some 15 minutes for each variant of A, 10 of B, and 20 for C.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import toys
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.loader import Loader, to_model
from longtake.training import checkpoint, engines, registry
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.data import HELDOUT
from longtake.training.loop import train
from longtake.training.metrics import equivariance
from longtake.training.metrics.degradation import degradation
from longtake.training.metrics.distance import Sample
from longtake.training.metrics.features import FeatureNetwork, load_network
from longtake.training.models.generator import Settings
from longtake.training.models.tats import pretrain
from longtake.training.models.tats.evaluate import heldout_loss
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import TATSConfig, config_from_preset
from longtake.training.models.tats.rollout import Rollout
from longtake.training.models.tats.vqgan import VQGAN
from longtake.training.models.tats.vqgan_evaluate import evaluate
from longtake.training.objective import Objective, Turn
from longtake.training.registry import disk

VARIANTS: dict[str, dict[str, Any]] = {"replicate": {}, "zeros": {"padding": "zeros"}, "group": {"norm": "group"}}
SLIDING = ("replicate", "zeros")  # of which a long video can be made in chunks
SIZE, FPS, FRAMES = 32, 12, 16  # pixels a side, frames a second and of a window
EVERY, NEAR, FAR = 4, 20, 68  # latent frames to an anchor; frames of the hierarchy's windows
STRIDE, CODES, SIDE = 4, 256, 8  # frames of a token, codes, tokens a side
LONG = 256 // STRIDE  # latent frames of generated videos
SETTINGS = Settings(top_k=0, top_p=0.95)
FIGURES = ("l1", "psnr", "kappa", "score", "score_paper", "perplexity", "usage", "latent_error")


def windows(dataset: str, split: str, frames: int, count: int, seed: int) -> Iterator[Tensor]:
    """Random windows in batches, `count` in all, in [-1, 1]."""
    options: dict[str, Any] = {"columns": ("video",), "size": (SIZE, SIZE), "batch": 8, "crop": "random", "last": "pad"}
    loader = Loader(dataset, split, frames=frames, seed=seed, **options)
    for batch in islice(loader, math.ceil(count / 8)):
        yield to_model(batch["video"].to(engines.device()))


# A: tokens that do not know where they are.


def part_a(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Train one VQGAN, measure it on the way, and keep it as a model folder."""
    folder = options.out / f"A-{variant}-{seed}"
    config = pretrain.Config(
        kind="pretrain_vqgan", dataset=options.dataset, model={"preset": "vqgan_tiny", "codes": CODES, **VARIANTS[variant]},
        frames=FRAMES, size=(SIZE, SIZE), steps=options.steps, warm_steps=options.steps // 4, batch=4, lr=1e-3,
        betas=(0.9, 0.99), lambda_gan=0.0, seed=seed,
        run={"workers": 0, "sample_every": 0, "heldout_every": 0, "checkpoint_every": 100, "keep_checkpoints": 1},
    )  # fmt: skip
    inputs, curve = {"dataset": options.dataset}, []
    model = VQGAN(config.vae())
    for until in [options.steps * n // 8 for n in range(3, 9)]:
        torch.manual_seed(seed)
        setup = pretrain.prepare(config, inputs, folder)
        stream = pretrain.loader(config, setup, 0, 1)
        running = config.model_copy(update={"steps": until})
        train(pretrain.objective(config, setup), stream, running, folder / "checkpoints")
        setup.model.load_state_dict(checkpoint.trained(folder / "checkpoints", config))
        model = setup.model.eval()
        pictures = folder / "heldout"
        pictures.mkdir(exist_ok=True)
        heldout = pretrain._loader(config, setup, "val", **HELDOUT)
        found = evaluate(model, heldout, pictures, seed, 512, shifted=pretrain._shifted(config, setup))
        row = {name: found[name] for name in FIGURES} | {"mean_colour": found["psnr_mean_colour"]}
        curve.append({"step": until, **row, "by_step": found["series"]["equal_tokens_by_step"]})
        print(variant, seed, json.dumps(curve[-1]), flush=True)
    disk.save(folder / "model", "vqgan", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return {"curve": curve}


def vqgan_of(options: argparse.Namespace, variant: str, seed: int) -> VQGAN:
    model: Any = registry.load(str(options.out / f"A-{variant}-{seed}" / "model"))
    return model.eval().requires_grad_(False).to(engines.device())


def at_equal_error(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[float, dict[str, float]]:
    """The lowest held-out error that all variants reach, and the kappa of each there: NaN for one that began below it."""
    level = max(min(row["l1"] for row in curve) for curve in curves.values())
    kappas = {}
    for variant, curve in curves.items():
        errors, values = zip(*sorted((row["l1"], row["kappa"]) for row in curve), strict=True)
        kappas[variant] = float(np.interp(level, errors, values, left=np.nan, right=np.nan))
    return level, kappas


# B and C: transformers of the tokens.


class Windows:
    """A stream of random batches of windows of tokens that lie in memory."""

    def __init__(self, tokens: Tensor, batch: int, seed: int) -> None:
        self._tokens, self._batch, self._seed, self._batches = tokens, batch, seed, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            rows = np.random.default_rng([self._seed, self._batches]).integers(len(self._tokens), size=self._batch)
            self._batches += 1
            yield {"tokens": self._tokens[rows], "key": [str(row) for row in rows.tolist()]}

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = state["batches"]


def encoded(options: argparse.Namespace, model: VQGAN, frames: int, seed: int) -> Tensor:
    """Tokens of random training windows, each encoded by itself."""
    with torch.no_grad():
        parts = windows(options.dataset, "train", frames, options.windows, seed)
        return torch.cat([model.tokens(video).cpu() for video in parts])


def learned(options: argparse.Namespace, vqgan: VQGAN, mode: Any, frames: int, seed: int, folder: Path) -> TATS:
    """A transformer of windows of `frames` frames."""
    shape = (frames // STRIDE, SIDE, SIDE)
    config = config_from_preset("tats_tiny", codes=CODES, shape=shape, mode=mode, every=EVERY)
    tokens = encoded(options, vqgan, frames, seed)
    training = TrainConfig(
        steps=options.gpt_steps, batch=16, lr=1e-3, warmup_steps=20, betas=(0.9, 0.95), ema_half_lives=(), seed=seed,
        run=RunConfig(checkpoint_every=options.gpt_steps),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = TATS(config).to(engines.device())
    stream: Any = Windows(tokens, training.batch, seed)
    train(Objective({"model": model}, loss_of(config)), stream, training, folder)
    model.load_state_dict(checkpoint.trained(folder, training))
    return model.eval()


def loss_of(config: TATSConfig) -> Callable[[Turn], Any]:
    def loss(turn: Turn) -> Any:
        sequence = config.sequence(turn.batch["tokens"])
        logits = turn.engines[turn.name](sequence[:, :-1], last=config.predicted)
        value = F.cross_entropy(logits.float().flatten(0, 1), sequence[:, -config.predicted :].flatten())
        return value, {"loss": value.detach()}

    return loss


class Real(NamedTuple):
    """Held-out windows: how often each code comes, how much frames differ, and features."""

    counts: Tensor
    motion: float
    sample: Sample | None


@torch.no_grad()
def real_of(options: argparse.Namespace, vqgan: VQGAN) -> Real:
    counts, motions, sample = torch.zeros(CODES), [], network_sample(options, "real")
    for video in windows(options.dataset, "val", FRAMES, options.videos, 0):
        counts += equivariance.histogram(CODES, vqgan.tokens(video)).cpu()
        motions.append(motion(video))
        if sample:
            sample.add(video)
    return Real(counts, statistics.mean(motions), sample)


def network_sample(options: argparse.Namespace, name: str) -> Sample | None:
    network: FeatureNetwork | None = options.network
    return Sample(name, network) if network else None


def motion(video: Tensor) -> float:
    """The mean difference of neighbouring frames, in 0..1."""
    return float(video.diff(dim=2).abs().mean()) / 2


def divergence(counts: Tensor, others: Tensor) -> float:
    """KL of how often each code comes, in nats; one is added to each count."""
    p, q = ((each + 1) / (each + 1).sum() for each in (counts, others))
    return float((p * (p / q).log()).sum())


@torch.no_grad()
def drift(options: argparse.Namespace, vqgan: VQGAN, tokens: Tensor, real: Real) -> dict[str, Any]:
    """Curves of generated tokens `(V, t, h, w)` over chunks of FRAMES frames."""
    chunks = [part for part in tokens.split(FRAMES // STRIDE, dim=1) if part.shape[1] == FRAMES // STRIDE]
    counts = [equivariance.histogram(CODES, part).cpu().float() for part in chunks]
    video = torch.cat(list(vqgan.decode_tokens_stream([tokens], chunk=16)), dim=2).clamp(-1, 1)
    pieces = video.split(FRAMES, dim=2)[: len(chunks)]
    found: dict[str, Any] = {
        "codes_from_real": [divergence(part, real.counts) for part in counts],
        "codes_from_first": [divergence(part, counts[0]) for part in counts],
        "motion": [motion(part) / max(real.motion, 1e-6) for part in pieces],
    }
    if real.sample:
        samples = []
        for part in pieces:
            sample = network_sample(options, "generated")
            assert sample
            sample.add(part)
            samples.append(sample)
        found["frechet"] = degradation(real.sample, samples, split="val", seed=0)["frechet"]
    return found


def drawn(plan: Rollout, latents: int) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(plan.tokens(latents)), dim=1)


@torch.no_grad()
def later_windows(options: argparse.Namespace, vqgan: VQGAN, model: TATS) -> dict[str, Any]:
    """The loss of true windows by their first latent frame: of tokens encoded with the whole video, and by themselves."""
    loader = Loader(options.dataset, "val", columns=("video",), frames=FAR, size=(SIZE, SIZE), **HELDOUT)
    length, rows = FRAMES // STRIDE, list[list[tuple[float, float, float]]]()
    for batch in loader:
        video = to_model(batch["video"].to(engines.device()))
        whole, row = vqgan.tokens(video), []
        for first in range(whole.shape[1] - length + 1):
            kept = whole[:, first : first + length]
            alone = vqgan.tokens(video[:, :, first * STRIDE : first * STRIDE + FRAMES])
            losses = (float(heldout_loss(model, {"tokens": each}, None)[0].mean()) for each in (kept, alone))
            row.append((*losses, float((kept == alone).float().mean())))
        rows.append(row)  # type: ignore[arg-type]
    table = np.array(rows).mean(0)
    names = ("loss_whole", "loss_alone", "equal")
    return {name: table[:, n].tolist() for n, name in enumerate(names)} | {"clips": len(rows)}


def part_b(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    vqgan = vqgan_of(options, variant, seed)
    model = learned(options, vqgan, "base", FRAMES, seed, options.out / f"B-{variant}-{seed}")
    tokens = drawn(Rollout(model, range(options.videos), SETTINGS), LONG)
    return drift(options, vqgan, tokens, real_of(options, vqgan)) | {"later": later_windows(options, vqgan, model)}


def part_c(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    needed = f"B-replicate-{seed}"
    if not (options.out / f"{needed}.json").exists():
        raise SystemExit(f"C-{seed}: begins with the transformer of {needed}, which is not there; make --part B first")
    vqgan = vqgan_of(options, "replicate", seed)
    folder = options.out / f"C-{seed}"
    plain = learned(options, vqgan, "base", FRAMES, seed, options.out / needed)
    anchors = learned(options, vqgan, "anchors", FAR, seed, folder / "anchors")
    gaps = learned(options, vqgan, "interpolate", NEAR, seed, folder / "gaps")
    real, found = real_of(options, vqgan), dict[str, Any]()
    for name, models in (("plain", (plain, None)), ("hierarchical", (gaps, anchors))):
        seconds = {}
        for count in (1, options.videos):
            plan = Rollout(models[0], range(count), SETTINGS, models[1])
            start, cpu = time.perf_counter(), time.process_time()
            tokens = drawn(plan, LONG)
            seconds[str(count)] = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        found[name] = drift(options, vqgan, tokens, real) | {"seconds": seconds}
    return found


# All of it.


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The name of each part's file, and what makes it."""
    for seed in [options.seed] if options.seed is not None else range(options.seeds):
        for variant in VARIANTS if "A" in options.part else ():
            yield f"A-{variant}-{seed}", lambda v=variant, s=seed: part_a(options, v, s)
        for variant in SLIDING if "B" in options.part else ():
            yield f"B-{variant}-{seed}", lambda v=variant, s=seed: part_b(options, v, s)
        if "C" in options.part:
            yield f"C-{seed}", lambda s=seed: part_c(options, s)


def results(out: Path, part: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The finished parts by variant and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob(f"{part}-*.json")):
        _, variant, seed = path.stem.split("-")
        found.setdefault(variant, {})[int(seed)] = json.loads(path.read_text())
    return found


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):8.3f} ±{deviation:6.3f}"


def table(out: Path) -> Iterator[str]:
    """Means ± standard deviations over the seeds, and what is compared within each seed."""
    trained = results(out, "A")
    for variant, seeds in trained.items():
        last = [row["curve"][-1] for row in seeds.values()]
        cells = "  ".join(f"{name} {spread([row[name] for row in last])}" for name in FIGURES)
        profile = np.mean([[value for _, value in row["by_step"]] for row in last], 0).round(3).tolist()
        yield f"A {variant:10} seeds {len(seeds)}  {cells}  equal by latent {profile}"
    for seed in sorted(set.intersection(*map(set, trained.values()))) if trained else ():
        level, kappas = at_equal_error({variant: seeds[seed]["curve"] for variant, seeds in trained.items()})
        cells = "  ".join(f"{variant} {kappa:.3f}" for variant, kappa in kappas.items())
        yield f"A seed {seed}: kappa at a held-out error of {level:.4f}:  {cells}"
    for variant, seeds in results(out, "B").items():
        rows = list(seeds.values())
        for name in ("codes_from_real", "codes_from_first", "frechet", "motion"):
            if name in rows[0]:
                yield f"B {variant:10} {name:17} seeds {len(rows)}  first {spread([r[name][0] for r in rows])}  last {spread([r[name][-1] for r in rows])}"
        later = [row["later"] for row in rows]
        for name in ("loss_whole", "loss_alone", "equal"):
            yield f"B {variant:10} {name:17} seeds {len(rows)}  first {spread([r[name][0] for r in later])}  middle {spread([r[name][len(r[name]) // 2] for r in later])}"
    yield from hierarchy(out)


def hierarchy(out: Path) -> Iterator[str]:
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("C-*.json"))]
    for way in ("plain", "hierarchical") if rows else ():
        for name in (name for name in rows[0][way] if name != "seconds"):
            cells = [spread([row[way][name][n] for row in rows]) for n in (0, len(rows[0][way][name]) // 2, -1)]
            yield f"C {way:13} {name:17} seeds {len(rows)}  first {cells[0]}  middle {cells[1]}  last {cells[2]}"
        for count in rows[0][way]["seconds"]:
            cells = [spread([row[way]["seconds"][count][clock] for row in rows]) for clock in ("wall", "cpu")]
            yield f"C {way:13} seconds, {count} videos  wall {cells[0]}  cpu {cells[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--part", choices=["A", "B", "C"], action="append", help="this one alone; C needs B, B needs A")
    parser.add_argument("--features", help="state dict or TorchScript of a feature network")
    parser.add_argument("--steps", type=int, default=800, help="of a VQGAN, a quarter of them without the codebook")
    parser.add_argument("--gpt-steps", type=int, default=500)
    parser.add_argument("--footage", type=int, default=40, help="videos of 24 seconds")
    parser.add_argument("--windows", type=int, default=1024, help="training windows of a transformer")
    parser.add_argument("--videos", type=int, default=32, help="generated for each curve, and as many held-out windows")
    options = parser.parse_args()
    options.out, options.part = options.out.absolute(), options.part or ["A", "B", "C"]
    options.out.mkdir(parents=True, exist_ok=True)
    options.dataset = toys.prepare(options.out, options.footage, "ablation-tats", SIZE, FRAMES)
    options.network = load_network(options.features, device=engines.device()) if options.features else None
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
