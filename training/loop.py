"""The training loop: read it from top to bottom. It knows engines, objective, loader, tracker and checkpoints.

A step is: data, then for each engine a forward, a backward and an update, then the average of the weights, then
bookkeeping. Nothing random outlives a step: generators are seeded from (seed, step, pass, rank), so a resumed run needs no
saved random state. It stops, saves and says where on a non-finite loss; it saves and leaves on SIGINT and SIGTERM.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from longtake.datasets.errors import Failure, Interrupted
from longtake.datasets.loader import Loader
from longtake.training import checkpoint, engines
from longtake.training.config import TrainConfig
from longtake.training.tracker import Tracker

Batch = dict[str, Any]
Engines = Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """What is trained: modules by engine name, and for each engine its loss on a batch.

    `loss(name, engines, batch, generator)` returns a scalar loss and metrics to log. It calls `engines[name](...)`
    for the engine that learns now, and `engines[other].module(...)` for one that is frozen meanwhile; engines take
    their turns in the order of `modules`.
    """

    modules: dict[str, nn.Module]
    loss: Callable[[str, Engines, Batch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear warm-up, then constant or a cosine that ends at `final_lr` of it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def pass_seed(seed: int, step: int, number: int, rank: int) -> int:
    """The seed of a rank's `number`-th forward pass of a step."""
    return int(np.random.SeedSequence([seed, step, number, rank]).generate_state(1, np.uint64)[0] >> 1)


def train(
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    folder: Path,
    tracker: Tracker | None,
    rank: int,
    world: int,
) -> dict[str, Tensor]:
    """Train to `config.steps`, from the latest checkpoint in `folder` if there is one.

    Returns:
        fp32 weights of the first engine's module: their average, or the raw ones where `ema_half_life` is 0.

    Raises:
        Failure: out of memory; or a loss or gradient is not finite, and the batch's keys are in `folder/nonfinite-RANK.json`.
        Interrupted: stopped by a signal, after saving.
    """
    device = engines.device()
    if rank == 0:
        for old in folder.glob("nonfinite-*.json"):
            old.unlink()
    universal = checkpoint.for_world(folder, list(objective.modules), config.zero_stage)
    made = engines.engines_of(objective.modules, config, world, universal)
    lead = next(iter(made.values()))
    step, ema = 0, engines.weights(lead)
    if found := checkpoint.load(folder, made, universal):
        meta, ema = found
        step = meta["step"]
        loader.load_state_dict(meta["loader"])
        ema = {name: value.to(device) for name, value in ema.items()}

    def save() -> None:
        checkpoint.save(folder, made, ema, {"step": step, "loader": loader.state_dict()}, config.keep_checkpoints)

    window = _Window()
    batches = iter(loader)
    bar = tqdm(
        desc="train",
        total=config.steps,
        initial=step,
        unit="step",
        disable=rank != 0,
        mininterval=1.0 if sys.stderr.isatty() else 15.0,
    )
    with _stop_signal() as stopped, bar:
        while step < config.steps:
            start = time.perf_counter()
            rate = learning_rate(config, step)
            waited, metrics = 0.0, dict[str, Tensor]()
            for number in range(config.accumulate):
                asked = time.perf_counter()
                batch = {
                    k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in next(batches).items()
                }
                waited += time.perf_counter() - asked
                # after the data, since a loader that starts draws from the global generator
                seed = pass_seed(config.seed, step, number, rank)
                torch.manual_seed(seed)
                generator = torch.Generator(device).manual_seed(seed)
                for name, engine in made.items():
                    with _only_learning(made, name), _memory_told(step, batch):
                        engines.set_lr(engine, rate)
                        loss, logged = objective.loss(name, made, batch, generator)
                        metrics |= logged
                        _check_finite(loss, f"loss of {name}", step, batch, folder)
                        engine.backward(loss)
                        engine.step()
                    if (norm := engines.gradient_norm(engine)) is not None:
                        metrics[f"gradient_norm_{name}"] = torch.tensor(norm)
                        _check_finite(metrics[f"gradient_norm_{name}"], f"gradient of {name}", step, batch, folder)
            step += 1
            _average(ema, lead, config.ema_half_life, step)
            window.add({k: float(v) for k, v in metrics.items()}, time.perf_counter() - start, waited)
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                values = window.take(config.batch)
                bar.set_postfix(
                    loss=f"{values.get('loss', math.nan):.4f}",
                    data_wait=f"{values['data_wait_share']:.0%}",
                    refresh=False,
                )
                if tracker:
                    tracker.log(step, values | {"learning_rate": rate})
            stop = stopped()
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                save()
            if stop:
                raise Interrupted(f"train: stopped at step {step}, state saved")
    return ema


class _Window:
    """Means of what happened since the last logging."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.seconds = self.waited = 0.0

    def add(self, metrics: dict[str, float], seconds: float, waited: float) -> None:
        self.rows.append(metrics)
        self.seconds += seconds
        self.waited += waited

    def take(self, batch: int) -> dict[str, float]:
        names = self.rows[0]
        values = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in names}
        values["seconds_per_step"] = self.seconds / len(self.rows)
        values["samples_per_second"] = batch * len(self.rows) / self.seconds
        values["data_wait_share"] = self.waited / self.seconds
        self.__init__()  # type: ignore[misc]
        return values


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


@contextmanager
def _memory_told(step: int, batch: Batch) -> Iterator[None]:
    """Say which batch did not fit, and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 1)
        raise Failure(
            f"out of memory at step {step} with {shapes} on this process; lower batch, frames or size, or raise accumulate"
            " or zero_stage; the last checkpoint is whole"
        ) from e


def _average(ema: dict[str, Tensor], engine: Any, half_life: float, step: int) -> None:
    """Move the average towards the weights; early on its memory is a tenth of the steps so far (EDM2, section C)."""
    keep = 0.5 ** (1 / min(half_life, step / 10)) if half_life else 0.0
    with engines.whole(engine) as module, torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                ema[name].lerp_(value.float(), 1 - keep)
            else:
                ema[name].copy_(value)


def _check_finite(value: Tensor, what: str, step: int, batch: Batch, folder: Path) -> None:
    """Raises Failure on every rank if the value of any is not finite; a rank where it is not writes its batch's keys."""
    fine = bool(torch.isfinite(value.detach()))
    if _on_any_rank(not fine):
        path = folder / f"nonfinite-{torch.distributed.get_rank()}.json"
        if not fine:
            path.write_text(json.dumps({"step": step, "what": what, "keys": batch["key"]}))
        torch.distributed.barrier()
        found = ", ".join(sorted(p.name for p in folder.glob("nonfinite-*.json")))
        raise Failure(
            f"{what} is not finite at step {step}; the batch's keys are in {folder} ({found});"
            f" the last checkpoint is whole: lower lr and go on"
        )


def _on_any_rank(here: bool) -> bool:
    if torch.distributed.get_world_size() == 1:
        return here
    flag = torch.tensor(float(here), device=engines.device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come on any rank; a second one kills at once."""
    came = False

    def note(number: int, _: Any) -> None:
        nonlocal came
        came = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    try:
        yield lambda: _on_any_rank(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
