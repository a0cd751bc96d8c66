"""The training loop: read it from top to bottom. It knows engines, objective, loader, tracker and checkpoints.

A step is: data, then for each engine a forward, a backward and an update, then the averages of the weights, then
bookkeeping. Nothing random outlives a step: generators are seeded from (seed, step, pass, rank), so a resumed run needs no
saved random state.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from longtake.datasets.errors import Interrupted, UserError
from longtake.datasets.loader import Loader, Stream
from longtake.datasets.stage import content
from longtake.training import checkpoint, engines, guards
from longtake.training import progress as watch
from longtake.training.checkpoint import upload as copies
from longtake.training.config import TrainConfig
from longtake.training.engines import ema as averages
from longtake.training.tracker import Tracker

Batch = dict[str, Any]
Engines = Mapping[str, Any]
_ALL_RANKS = 1 << 31
_MAY_CHANGE = ("steps", "skip_nonfinite")


@dataclass(frozen=True)
class Objective:
    """What is trained: modules by engine name, and for each engine its loss on a batch.

    Args:
        modules: in the order in which their engines take turns. The first is the one that is averaged and registered.
        loss: `loss(name, engines, batch, generator)` returns a scalar and metrics to log. It calls `engines[name](...)`
            for the engine that learns now, and `engines[other].module(...)` for one that is frozen meanwhile.
            `batch["seed"]` is a number of the pass that all ranks share, `generator` is the rank's own.
        sample: `sample(engines, generator)` returns videos to look at by name, uint8 `(T, H, W, 3)`; called without
            gradients, on all ranks.
        fps: of those videos.
        tokens: how many tokens a batch has, for the tokens per second.
        blocks: parts of the modules that `compile` compiles one by one.
        heldout: held-out clips, one a batch, the same each time: their loss is logged as `heldout/...` now and then.
        starts: step at which an engine begins to learn, 0 for those that are not named.
        settings: of engines that have a rate, betas or schedule of their own, counted from their start.
        state: small vectors that outlive a step and go through a checkpoint, changed in place, on all ranks alike.
    """

    modules: dict[str, nn.Module]
    loss: Callable[[str, Engines, Batch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
    sample: Callable[[Engines, torch.Generator], dict[str, np.ndarray]] | None = None
    fps: int = 8
    tokens: Callable[[Batch], int] | None = None
    blocks: Sequence[nn.Module] = ()
    heldout: Iterable[Batch] = ()
    starts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, TrainConfig] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear warm-up, then constant or a cosine that ends at `final_lr` of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def pass_seed(seed: int, step: int, number: int, rank: int) -> int:
    """The seed of a rank's `number`-th forward pass of a step, or of `_ALL_RANKS` together."""
    return int(np.random.SeedSequence([seed, step, number, rank]).generate_state(1, np.uint64)[0] >> 1)


def train(
    objective: Objective,
    loader: Stream,
    config: TrainConfig,
    folder: Path,
    tracker: Tracker | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train to `config.steps` from the latest checkpoint in `folder`, if there is one, and leave the last one there.

    Every rank of the process group calls it. `tracker` is for the first rank only; `stop` says that somebody wants this
    process to save and leave, beside SIGINT and SIGTERM.

    Raises:
        UserError: the checkpoints in `folder` belong to other settings, or to another dataset.
        Failure: out of memory; a loss or gradient is not finite; a checkpoint cannot be read or written.
        Interrupted: told to stop, and saved.
    """
    rank, world, device = torch.distributed.get_rank(), torch.distributed.get_world_size(), engines.device()
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0 and (config.warmup_steps or 0) > config.steps:
        print(
            f"warmup_steps: {config.warmup_steps} are more than all {config.steps} steps; warming up for {config.warmup}",
            flush=True,
        )
    if rank == 0:
        for old in (*folder.glob("nonfinite-*.json"), *folder.glob("spikes.jsonl")):
            old.unlink()
    if config.upload:
        copies.fetch(folder, config.upload)
    universal = checkpoint.for_world(folder, list(objective.modules), config.zero_stage)
    made = engines.engines_of(objective.modules, config, world, universal, objective.settings)
    _speed_up(objective, config)
    lead = next(iter(made.values()))
    step, left_out, ema = 0, 0, averages.begin(lead, config.ema_half_lives)
    if found := checkpoint.latest(folder):
        meta = checkpoint.meta(found)
        _same_settings(config, meta["settings"], found)
        loader.load_state_dict(meta["loader"])
        checkpoint.load(found, made, universal)
        averages.restore(ema, lead, {life: checkpoint.Weights(found, life) for life in ema})
        for name, value in objective.state.items():
            value.copy_(torch.tensor(meta["state"][name]))
        step, left_out = meta["step"], meta["left_out"]

    facts = {"run": os.environ.get("MLFLOW_RUN_ID"), "recipe": os.environ.get("LONGTAKE_RECIPE"), "seed": config.seed}
    keeper = checkpoint.Checkpoints(
        folder, config.keep_checkpoints, config.keep_every, config.upload, config.stall_seconds
    )
    nonfinite = guards.Nonfinite(folder, config.skip_nonfinite, left_out)
    spikes = guards.Spikes(folder, config.spike)
    clock, flops, rows = watch.Clock(), watch.Flops(), list[dict[str, Any]]()
    peak, profile = (
        watch.peak_flops(config.peak_tflops),
        watch.Profile(config.profile, folder / "profile", config.steps),
    )
    batches, began, leaps = iter(loader), step, 0
    bar = tqdm(
        desc="train",
        total=config.steps,
        initial=step,
        unit="step",
        disable=rank != 0,
        mininterval=1.0 if sys.stderr.isatty() else 15.0,
    )
    with (
        guards.stop_signal(config.stop_seconds, stop) as told,
        keeper,
        guards.watchdog(config.stall_seconds) as beat,
        bar,
    ):
        while step < config.steps:
            profile.before(step + 1)
            rate = learning_rate(config, step)
            logs = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            lost = dict[str, Tensor]()
            metrics, passes, keys = dict[str, Any](), list[dict[str, Any]](), list[list[str]]()
            for number in range(config.accumulate):
                beat(step, "data")
                with clock.part("data"):
                    batch = _to_device(next(batches), device)
                keys.append(batch.get("key", []))
                passes.append({})
                # after the data, since a loader that starts draws from the global generator
                seed = pass_seed(config.seed, step, number, rank)
                torch.manual_seed(seed)
                generator = torch.Generator(device).manual_seed(seed)
                batch["seed"] = pass_seed(config.seed, step, number, _ALL_RANKS)
                for name, engine in made.items():
                    since = step - objective.starts.get(name, 0)
                    if since < 0:
                        continue
                    own = objective.settings.get(name)
                    engines.set_lr(engine, learning_rate(own, since) if own else rate)
                    shape = watch.batch_key(name, batch)
                    with _only_learning(made, name), guards.memory_told(step, batch):
                        beat(step, f"forward of {name}")
                        with clock.part("forward"), flops.counting(shape, "forward"):
                            loss, logged = objective.loss(name, made, batch, generator)
                        beat(step, f"backward of {name}")
                        with clock.part("backward"), flops.counting(shape, "backward"):
                            engine.backward(guards.contagious(loss))
                        lost[name] = lost.get(name, 0) + ~torch.isfinite(loss.detach())
                        beat(step, f"update of {name}")
                        if logs and number + 1 == config.accumulate:
                            norms = engines.gradient_norms(engine)
                            metrics |= {f"gradient_norm_{name}/{child}": norm for child, norm in norms.items()}
                        with clock.part("update"):
                            engine.step()
                    clock.flops += world * flops.of(shape)
                    passes[-1] |= logged
                if objective.tokens:
                    clock.tokens += world * objective.tokens(batch)
            step += 1
            clock.steps += 1
            clock.samples += world * sum(map(len, keys))
            losses = [float(found.get("loss", math.nan)) for found in passes]
            leapt = [spikes.heed(step, loss, each) for loss, each in zip(losses, keys, strict=True)]
            leave, leapt_anywhere, *anywhere = guards.on_any_rank(told(), any(leapt), *lost.values())
            for (name, here), somewhere in zip(lost.items(), anywhere, strict=True):
                metrics[f"gradient_norm_{name}"] = engines.gradient_norm(made[name])
                if somewhere or engines.left_out(made[name]):
                    nonfinite.heed(step, name, bool(here), somewhere, list(chain.from_iterable(keys)))
            averages.move(ema, lead, step)
            leaps += leapt_anywhere
            if leapt_anywhere and rank == 0:
                where = f"{folder}/spikes.jsonl names the rank and the batch"
                bar.write(f"warning: the loss leaps at step {step}; {where}", file=sys.stderr)
            rows += [metrics, *passes]
            bar.update()
            if logs:
                beat(step, "log")
                values = (
                    watch.means(rows) | clock.take(peak and peak * world) | watch.memory() | {"learning_rate": rate}
                )
                values |= {"updates_left_out": float(nonfinite.count), "spikes": float(leaps)}
                rows, clock = list[dict[str, Any]](), watch.Clock()
                bar.set_postfix(
                    loss=f"{values.get('loss', math.nan):.4f}",
                    data_wait=f"{values['data_wait_share']:.0%}",
                    refresh=False,
                )
                if values["data_wait_share"] > config.warn_data_wait and step > began + config.log_every:
                    bar.write(
                        f"warning: step {step}: {values['data_wait_share']:.0%} of the time went into waiting for data;"
                        f" raise workers (now {config.workers}), or cache the dataset",
                        file=sys.stderr,
                    )
                if tracker:
                    tracker.log(step, values)
            if (recorded := profile.after(step)) and tracker:
                tracker.later(recorded, "profile")
            if objective.sample and config.sample_every and step % config.sample_every == 0:
                beat(step, "sample")
                with clock.aside():
                    _look(objective, made, config, step, tracker)
            if config.heldout_every and (step % config.heldout_every == 0 or step == config.steps):
                beat(step, "heldout")
                with clock.aside():
                    values = _heldout(objective, made, ema, config)
                if tracker and values:
                    tracker.log(step, values)
            if step % config.checkpoint_every == 0 or step == config.steps or leave:
                beat(step, "checkpoint")
                state = {
                    "step": step,
                    "loader": loader.state_dict(),
                    "settings": content(config),
                    "left_out": nonfinite.count,
                    "state": {name: value.tolist() for name, value in objective.state.items()},
                }
                keeper.save(made, ema, state | facts)
            if leave:
                keeper.wait()
                raise Interrupted(f"train: stopped at step {step}, state saved")


def _speed_up(objective: Objective, config: TrainConfig) -> None:
    """Compile, and choose how convolutions are computed, as the config says."""
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.channels_last:
        for module in objective.modules.values():
            engines.channels_last(module)
    if config.compile:
        # blocks of a class share these limits, of 8 graphs: beyond, those whose shapes come late would stay uncompiled
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1 << 16
        for block in objective.blocks:
            block.compile()


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def _only_learning(made: Engines, name: str) -> Iterator[None]:
    """Freeze every engine but one: gradients flow through the frozen ones without reaching their weights."""
    frozen = [
        p for other, engine in made.items() if other != name for p in engine.module.parameters() if p.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.no_grad()
def _look(objective: Objective, made: Engines, config: TrainConfig, step: int, tracker: Tracker | None) -> None:
    """Sample videos for people to look at, always from the same noise. Under ZeRO-3 every rank must take part."""
    assert objective.sample is not None
    generator = torch.Generator(engines.device()).manual_seed(config.seed)
    with _not_learning(made):
        videos = objective.sample(made, generator)
    for name, video in videos.items():
        if tracker:
            tracker.video(step, name, video, objective.fps)


@contextmanager
def _not_learning(made: Engines) -> Iterator[None]:
    learning = [m for engine in made.values() for m in engine.module.modules() if m.training]
    for module in learning:
        module.training = False
    yield
    for module in learning:
        module.training = True


@torch.no_grad()
def _heldout(objective: Objective, made: Engines, ema: averages.Averages, config: TrainConfig) -> dict[str, float]:
    """What the loss of the first engine is on held-out clips, with its averaged weights; it leaves no trace in the training.

    Each clip has its own noise, times and whatever else is drawn, always the same. Ranks take turns: all take as many
    clips, as ZeRO-3 needs it, but one that is left without takes another's, which does not count.
    """
    rank, world, device = torch.distributed.get_rank(), torch.distributed.get_world_size(), engines.device()
    name, lead = next(iter(made.items()))
    average = averages.swapped(next(iter(ema.values())), lead) if ema else nullcontext()
    heldout, rows = objective.heldout, list[dict[str, Any]]()
    if isinstance(heldout, Loader):
        # which goes on where it was left: from its first clip again
        heldout.load_state_dict(heldout.state_dict() | {"taken": 0})
    clips = iter(islice(heldout, config.heldout_clips))
    # compiled blocks would be compiled again, for a module that does not learn
    eagerly = torch.compiler.set_stance("force_eager")
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, average, _not_learning(made), eagerly:
        for first in count(0, world):
            own, number = None, first
            for other, clip in enumerate(islice(clips, world)):
                if other == rank or own is None:
                    own, number = clip, first + other
            if own is None:
                break
            seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1, np.uint64)[0] >> 1)
            torch.manual_seed(seed)
            generator = torch.Generator(device).manual_seed(seed)
            # without the other engines: the loss that needs no opponent
            _, logged = objective.loss(name, {name: lead}, _to_device(own, device) | {"seed": seed}, generator)
            counts = number == first + rank
            rows.append({f"heldout/{key}": value if counts else math.nan for key, value in logged.items()})
    return watch.means(rows)


def _same_settings(config: TrainConfig, saved: dict[str, Any], found: Path) -> None:
    now = content(config)
    other = [k for k in sorted(now.keys() | saved.keys()) if k not in _MAY_CHANGE and now.get(k) != saved.get(k)]
    if other:
        raise UserError(
            f"{found}: belongs to other settings ({', '.join(f'{k}: {saved.get(k)} there, {now.get(k)} here' for k in other[:3])});"
            " name another folder in checkpoints"
        )
