"""The parts of `gpu.py`, whose docstring says what each measures: a plain function each, in a table, with their sizes."""

import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "support"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import bench_latents  # noqa: E402
import measured  # noqa: E402
import torch  # noqa: E402
import trainings  # noqa: E402
from bench_latte import cached, footage  # noqa: E402
from same_draws import SameDraws  # noqa: E402
from torch import nn  # noqa: E402

from longtake.datasets.loader import Loader  # noqa: E402
from longtake.training import engines, fit  # noqa: E402
from longtake.training.loop import train  # noqa: E402
from longtake.training.models.common.codec import Pixels  # noqa: E402
from longtake.training.models.latte import finetune as latte  # noqa: E402
from longtake.training.objective import Batch, Objective, Turn  # noqa: E402
from longtake.training.target import LatentTarget  # noqa: E402

LOSS, GRADIENTS = 1e-4, 1e-3  # relative tolerances of fp32 on another device [assumption]
EVERY = 5  # steps that a row of figures is the mean of
SHOWN = (
    "seconds_per_step",
    "seconds_forward",
    "seconds_backward",
    "seconds_update",
    "samples_per_second",
    "tflops",
    "mfu",
)
Found = dict[str, Any]
Passed = dict[str, tuple[float, dict[str, torch.Tensor], int]]  # by engine: loss, gradients, number of draws


@dataclass(frozen=True)
class Sizes:
    """What the parts are measured with.

    before   the stages before a training, by name
    models   the trainings whose steps are measured
    steps    of a measurement
    latents  options of bench_latents.py
    clips    of a dataset, and their size in pixels, for the loader
    workers  of a loader
    """

    before: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    steps: int
    latents: Sequence[str]
    clips: tuple[int, int]
    workers: int


_BF16 = {"precision": "bf16", "zero_stage": 1}
_256 = {"size": [256, 256]}
FULL = Sizes(
    trainings.BEFORE
    | {
        "shards": trainings.SHARDS | {"clip": {"short_side": 256, "fps": 24, "max_seconds": 60}},
        "vae": trainings.VAE | {"model": {"preset": "pv_vae"}, "sizes": [[256, 256]]},
        "latents": trainings.LATENTS | _256,
        "low": trainings.LOW | _256,
    },
    {
        # with its discriminator; some 35 GB
        "pv_vae": trainings.VAE
        | {
            "model": {"preset": "pv_vae"},
            "sizes": [[256, 256]],
            "frames": 17,
            "batch": 4,
            "gan_start": 0,
            "gan_warmup": 0,
        }
        | _BF16,
        # some 50 GB
        "latte": trainings.LATTE | {"model": {"preset": "latte_xl"}, "batch": 16} | _BF16,
        # 20 s of history; some 45 GB
        "memory": {"kind": "pretrain_memory"}
        | trainings.MEMORY
        | {"model": {"preset": "memory_dit_xl"}, "history_seconds": 20, "frames": 21, "batch": 8}
        | _BF16,
    },
    steps=30,
    latents=["--preset", "pv_vae", "--precision", "bf16", "--side", "256", "--clips", "32", "--threads", "8"],
    clips=(256, 256),
    workers=max(1, len(os.sched_getaffinity(0)) - 2),
)
TINY = Sizes(
    trainings.BEFORE | {"low": trainings.LOW},
    {
        "pv_vae": trainings.TRAININGS["vae_against_a_discriminator"],
        "latte": trainings.LATTE,
        "memory": trainings.TRAININGS["memory"],
    },
    steps=10,
    latents=["--clips", "2", "--seconds", "1", "--turns", "1"],
    clips=(8, 64),
    workers=1,
)
FAMILIES = (*trainings.TRAININGS, "backbone")


class Enough(Exception):
    """The end of a stream, so that the loop saves nothing."""


class Stream:
    """As many batches as are asked for, of a loader or of the same batch again and again."""

    def __init__(self, batches: Any, steps: int) -> None:
        self._batches, self._steps = batches, steps

    def __iter__(self) -> Iterator[Batch]:
        batches = None if isinstance(self._batches, dict) else iter(self._batches)
        for _ in range(self._steps):
            yield self._batches if batches is None else next(batches)
        raise Enough

    def state_dict(self) -> dict[str, Any]:
        return {}


class Rows:
    """What the loop would send to MLflow."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)


def source_of(sizes: Sizes, model: str, **changes: Any) -> fit.Source:
    """One of the trainings, of stages that have not run."""
    with tempfile.TemporaryDirectory() as folder:
        return trainings.source(Path(folder), dict(sizes.models[model]), sizes.before, **changes)


def filled(batch: Batch) -> Batch:
    """A batch of zeros with random pixels and latents, by torch's random state."""
    random = dict(batch)
    for name, value in batch.items():
        if name == "video":
            # a picture that hardly changes: some losses leave out what looks like a cut
            picture = torch.randint(240, (*value.shape[:2], 1, *value.shape[3:]))
            random[name] = (picture + torch.randint(16, value.shape)).to(value.dtype)
        elif "lat" in name or "low" in name:
            random[name] = torch.rand(value.shape).to(value.dtype)
    return random


def trained(objective: Objective, stream: Stream, config: Any, steps: int) -> list[dict[str, float]]:
    """The loop's metrics of each few steps."""
    rows: Any = Rows()
    run = config.run.model_copy(
        update={"log_every": EVERY, "sample_every": 0, "heldout_every": 0, "stall_seconds": 3600}
    )
    # one more than there are batches, so that nothing is saved
    config = config.model_copy(update={"steps": steps + 1, "run": run})
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(objective, stream, config, Path(folder), rows)  # type: ignore[arg-type]
        except Enough:
            return list(rows.rows)
    raise AssertionError("the stream had no end")


def late(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in rows[len(rows) // 3 :])


def correct(family: str, folder: Path, sizes: Sizes) -> Found:
    """A family's losses and gradients here beside those on the CPU, which are computed meanwhile, once, and kept in the folder."""
    file = folder / f"{family}.pt"
    making = None if file.exists() else _on_cpu().submit(refer, family, file)
    here = passed(family)
    if making:
        making.result()
    there: Passed = torch.load(file)
    assert here.keys() == there.keys()
    found: Found = {"engines": {}, "within": True}
    for engine, (loss, gradients, draws) in here.items():
        loss_there, gradients_there, draws_there = there[engine]
        assert gradients.keys() == gradients_there.keys() and draws == draws_there
        pairs = [(gradients[name].double(), g.double()) for name, g in gradients_there.items()]
        apart = math.sqrt(sum(float((one - two).square().sum()) for one, two in pairs))
        norm = math.sqrt(sum(float(two.square().sum()) for _, two in pairs))
        off = {"loss": abs(loss - loss_there) / max(abs(loss_there), 1e-12), "gradients": apart / max(norm, 1e-12)}
        found["engines"][engine] = off | {"loss_here": loss, "norm_of_gradients": norm, "draws": draws}
        found["within"] &= math.isfinite(loss) and norm > 0 and off["loss"] <= LOSS and off["gradients"] <= GRADIENTS
    if not found["within"]:
        raise RuntimeError(f"beyond the tolerances: {json.dumps(found['engines'])}")
    return found


@functools.cache
def _on_cpu() -> ProcessPoolExecutor:
    """A process that sees no GPU, for all families of this one: it takes seconds to begin."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        # it begins with the environment of its first task
        pool.submit(os.getpid).result()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        os.environ |= {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}
    return pool


def end_references() -> None:
    """End the process that computed on the CPU, if there is one."""
    if _on_cpu.cache_info().currsize:
        _on_cpu().shutdown()


def refer(family: str, file: Path) -> None:
    """Write what a family gives on this process's device."""
    with engines.process_group():
        made = passed(family)
    scratch = file.with_suffix(".tmp")
    torch.save(made, scratch)
    scratch.rename(file)


@contextmanager
def _exact() -> Iterator[None]:
    """Products of fp32 as they are, not rounded to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@_exact()
def passed(family: str) -> Passed:
    """The loss, the gradients and the number of draws of each engine's turn, on this process's device."""
    with tempfile.TemporaryDirectory() as folder:
        if family == "backbone":
            source = trainings.of_another_library(Path(folder), None)
        else:
            source = trainings.source(Path(folder), trainings.TRAININGS[family])
        config, device = source.config, engines.device()
        torch.manual_seed(0)
        objective, batch, beside = source.stage.largest(config, source.inputs, config.batch)
    for module in beside:
        module.to(device)
    for module in objective.modules.values():
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        for parameter in module.parameters():
            if not parameter.any():  # what begins at zero would hide what comes before it
                nn.init.normal_(parameter, std=0.02)
        module.to(device)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in filled(batch).items()}
    made = {name: Plain(module) for name, module in objective.modules.items()}
    found, carry = {}, dict[str, Any]()
    for name, engine in made.items():
        for other, each in made.items():
            each.module.requires_grad_(other == name)
            each.module.zero_grad()
        with SameDraws(0) as same:
            rng = torch.Generator(device).manual_seed(0)
            loss, _ = objective.loss(Turn(name, made, batch, config.steps - 1, rng, 0, carry))
            loss.backward()
        named = engine.module.named_parameters()
        gradients = {n: p.grad.float().cpu() for n, p in named if p.grad is not None}
        found[name] = float(loss.detach()), gradients, same.draws
    return found


class Plain:
    """A module in the place of DeepSpeed's engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def mfu(model: str, compiled: bool, _folder: Path, sizes: Sizes) -> Found:
    """The figures of a step."""
    source = source_of(sizes, model, compile=compiled)
    torch.manual_seed(0)
    objective, batch, _ = source.stage.largest(source.config, source.inputs, source.config.batch)
    blocks: Any = objective.modules[objective.lead]
    objective = replace(objective, blocks=list(blocks.blocks()))
    rows = trained(objective, Stream(filled(batch), sizes.steps), source.config, sizes.steps)
    found: Found = {"batch": source.config.batch, "steps": sizes.steps, "precision": source.config.precision}
    found["parameters_million"] = sum(p.numel() for m in objective.modules.values() for p in m.parameters()) / 1e6
    found |= {name: late(rows, name) for name in SHOWN if name in rows[-1]}
    found |= {name: max(row[name] for row in rows) for name in ("gpu_memory_gb", "host_memory_gb") if name in rows[-1]}
    return found | {"loss": rows[-1]["loss"]}


def memory(model: str, _folder: Path, sizes: Sizes) -> Found:
    """The peak of a step beside what is said of it before, in bytes."""
    source, gpu = source_of(sizes, model), torch.cuda.is_available()
    traced = fit.trace_of(source.stage, source.config, source.inputs, 1)
    said = fit.memory_of(traced, source.config, 1, on_gpu=gpu)
    if gpu:
        objective, batch, beside = source.stage.largest(source.config, source.inputs, source.config.batch)
        held = [module.to(engines.device()) for module in beside]
        torch.cuda.reset_peak_memory_stats()
        rows = trained(objective, Stream(filled(batch), 2), source.config, 2)
        peak = int(max([torch.cuda.max_memory_allocated(), *(1e9 * row["gpu_memory_gb"] for row in rows)]))
        del held
    else:
        peak = measured.allocated(source)
    return {"said": said.total, "measured": peak, "said_to_measured": said.total / peak, "parts": said._asdict()}


def cache_latents(_folder: Path, sizes: Sizes) -> Found:
    """The stage's rate as a share of the encoder's."""
    options = bench_latents.options().parse_args([*sizes.latents, "--device", engines.device().type])
    threads = torch.get_num_threads()
    ratios = bench_latents.measure(options)
    torch.set_num_threads(threads)
    return {"share_of_encode": statistics.median(1 / r for r in ratios["stage"]), "seconds_to_encode": ratios}


def fed_by_videos(_folder: Path, sizes: Sizes) -> Found:
    """PV-VAE's training from mp4s."""
    source, (clips, side) = source_of(sizes, "pv_vae"), sizes.clips
    objective, batch, _ = source.stage.largest(source.config, source.inputs, source.config.batch)
    frames = batch["video"].shape[2]
    with tempfile.TemporaryDirectory() as folder:
        dataset = footage(Path(folder) / "dataset", clips, side, frames=2 * frames)
        options: dict[str, Any] = {"frames": frames, "size": tuple(batch["video"].shape[3:]), "workers": sizes.workers}
        return _fed(objective, Loader(dataset, batch=source.config.batch, **options), source.config, sizes)


def fed_by_latents(_folder: Path, sizes: Sizes) -> Found:
    """Latte's training from cached latents."""
    source, (clips, side) = source_of(sizes, "latte"), sizes.clips
    with tempfile.TemporaryDirectory() as folder:
        dataset = footage(Path(folder) / "dataset", clips, side, frames=34)
        made = cached(dataset, side)
        across = side // made.stride
        target = LatentTarget(made, made.channels, (5, across, across), 24.0, Pixels(), "sample", 0.5)
        model = latte.Latte(source.config.latte(target.channels, target.shape))
        objective = Objective({"model": model}, partial(latte._loss, source.config, target, model))
        options: dict[str, Any] = {"batch": source.config.batch, "workers": sizes.workers}
        loader = latte.loader_of(source.config, {"dataset": dataset}, target, "train", **options)
        return _fed(objective, loader, source.config, sizes)


def _fed(objective: Objective, loader: Any, config: Any, sizes: Sizes) -> Found:
    rows = trained(objective, Stream(loader, sizes.steps), config, sizes.steps)
    found = {name: late(rows, name) for name in ("data_wait_share", "samples_per_second", "seconds_per_step")}
    return found | {"workers": sizes.workers, "batch": config.batch}


Part = Callable[[Path, Sizes], Found]
PARTS: dict[str, Part] = {
    **{f"mfu/{model}": partial(mfu, model, False) for model in FULL.models},
    **{f"correct/{family}": partial(correct, family) for family in FAMILIES},
    **{f"memory/{model}": partial(memory, model) for model in FULL.models},
    "latents": cache_latents,
    "loader/videos": fed_by_videos,
    "loader/latents": fed_by_latents,
    **{f"mfu/{model}-compiled": partial(mfu, model, True) for model in FULL.models},
}
