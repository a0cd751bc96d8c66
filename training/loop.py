"""The training loop: read it from top to bottom. It knows engines, an objective, a loader, a tracker and checkpoints.

Nothing random outlives a step: random states are seeded from (seed, step, pass, rank), so a resumed run needs no saved
random state. Ranks that share windows (`engines.share_windows`) count as one.
"""

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import Interrupted, UserError
from longtake.datasets.loader import Stream
from longtake.datasets.stage import content
from longtake.training import checkpoint, engines, guards
from longtake.training.asides import heldout, on_device, pass_seed, show_samples
from longtake.training.checkpoint import upload
from longtake.training.config import TrainConfig
from longtake.training.engines import activations, ema
from longtake.training.objective import Batch, Engines, Objective, Turn
from longtake.training.progress import Progress, peak
from longtake.training.registry import lineage
from longtake.training.tracker import Tracker

_ALL_RANKS = 1 << 31  # in place of a rank, in the seed that all share


def train(
    objective: Objective,
    loader: Stream,
    config: TrainConfig,
    folder: Path,
    tracker: Tracker | None = None,
    stop: Callable[[], bool] = lambda: False,
    foreseen: float | None = None,
) -> None:
    """Train to `config.steps` from the latest checkpoint in `folder`, if there is one, and leave the last one there.

    Every rank of the process group calls it.

    Args:
        tracker: on the first rank only.
        stop: whether this process is to save and end; SIGINT and SIGTERM ask for the same.
        foreseen: bytes that the largest batch is to take (see `forecast`), said beside what it has taken.

    Raises:
        UserError: the checkpoints in `folder` belong to other settings, or to another dataset.
        Failure: out of memory; a loss or gradient is not finite; a checkpoint cannot be read or written.
        Interrupted: asked to stop; the state is saved.
    """
    objective = activations.offloaded(objective, config)
    run = _resume(objective, loader, config, folder)
    _rehearse(objective, run, config, foreseen)
    step, weights = run.step, ema.weights_of(run.engines[objective.lead])
    nonfinite = guards.Nonfinite(folder, config.skip_nonfinite, run.left_out)
    spikes, spike_count, leaps = guards.Spikes(folder, config.run.spike), 0, False
    checkpoints = checkpoint.Checkpoints(
        folder, config.run.keep_checkpoints, config.run.keep_every, config.run.upload, config.run.stall_seconds
    )
    batches = iter(loader)
    with (
        guards.stop_signal(config.run.stop_seconds, stop) as stop_requested,
        checkpoints,
        guards.Watchdog(config.run.stall_seconds) as watchdog,
        Progress(config, folder, step, watchdog.beat) as progress,
    ):
        while step < config.steps:
            progress.begin(step)
            log_due = (step + 1) % config.run.log_every == 0 or step + 1 == config.steps
            rates = learning_rates(objective, config, step)
            update = _Update()

            # Forward and backward of every engine, in as many passes as accumulate; the last one updates the weights.
            for number in range(config.accumulate):
                with progress.part(step, "data"):
                    batch = on_device(next(batches), objective)
                rng, seed = _seeded(config, step, number)
                update.begin_pass(batch)
                for name, rate in rates.items():
                    turn = Turn(name, run.engines, batch, step, rng, seed, update.carry)
                    engines.set_lr(run.engines[name], rate)
                    _take_turn(turn, objective, progress, update, log_due and number + 1 == config.accumulate)
                update.tokens += objective.tokens(batch) if objective.tokens else 0
            step += 1

            # Ask all ranks at once: whether to stop, whether a loss has leapt in the step before, which losses are not
            # finite, which updates were left out. Here the host waits for the device.
            skipped = [engines.left_out(run.engines[name]) for name in update.nonfinite]
            flags = (stop_requested(), leaps, *update.nonfinite.values(), *skipped)
            with progress.part(step, "exchange"):
                (stopping, leapt, *bad), losses = guards.ask_ranks(
                    flags, [t.get("loss", math.nan) for t in update.terms]
                )
            leaps = True in [spikes.begins(step, *each) for each in zip(losses, update.keys, strict=True)]

            # Count the updates that the engines have left out; too many end the training.
            found = zip(update.nonfinite.items(), bad[: len(skipped)], bad[len(skipped) :], strict=True)
            for (name, here), anywhere, left in found:
                update.norms[f"gradient_norm_{name}"] = engines.gradient_norm(run.engines[name])
                if anywhere or left:
                    nonfinite.record(step, name, bool(here), anywhere, list(chain.from_iterable(update.keys)))

            # Report a spike of the loss: with the next step's question, unless figures are due.
            leaps_now, leaps = log_due and guards.ask_ranks([leaps])[0][0], leaps and not log_due
            for number in [step - 1] * leapt + [step] * leaps_now:
                spike_count += 1
                progress.warn(f"the loss leaps at step {number}; {folder}/spikes.jsonl names the rank and the batch")

            # Move the averages.
            ema.move(run.averages, weights, step)

            # Log.
            profile = progress.end(step, [update.norms, *update.terms], sum(map(len, update.keys)), update.tokens)
            if log_due:
                figures = progress.take(step) | {"learning_rate": rates[objective.lead]}
                figures |= {"updates_left_out": float(nonfinite.count), "spikes": float(spike_count)}
                if tracker:
                    tracker.log(step, figures)
            if profile and tracker:
                tracker.later(profile, "profile")

            # Sample videos to look at, unless an observer does.
            aside = config.run.observer is None
            if aside and objective.sample and config.run.sample_every and step % config.run.sample_every == 0:
                with progress.aside(step, "sample"):
                    show_samples(objective, run.engines, config.seed, step, tracker)

            # Measure held-out clips, likewise.
            if aside and config.run.heldout_every and (step % config.run.heldout_every == 0 or step == config.steps):
                with progress.aside(step, "heldout"):
                    figures = heldout(objective, run.engines, run.averages, config, step)
                if tracker and figures:
                    tracker.log(step, figures)

            # Checkpoint, and end if asked to.
            if step % config.run.checkpoint_every == 0 or step == config.steps or stopping:
                meta = _meta(objective, loader, config, folder, step, nonfinite.count)
                with progress.part(step, "checkpoint"):
                    checkpoints.save(run.engines, objective.lead, run.averages, meta)
            if stopping:
                checkpoints.wait()
                raise Interrupted(f"train: stopped at step {step}, state saved")


@dataclass(frozen=True)
class _Run:
    """A training as it begins or continues: its optimizer steps so far, and how many updates were left out."""

    engines: Engines
    averages: ema.Averages
    step: int
    left_out: int


def _resume(objective: Objective, loader: Stream, config: TrainConfig, folder: Path) -> _Run:
    """Make the engines; set them, the loader and the objective's state to the latest checkpoint. Raises as `train`."""
    # the first rank prepares the folder, and another machine's checkpoint is fetched into it
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        _prepare_folder(config, folder)
    if config.run.upload:
        upload.fetch(folder, config.run.upload)

    # engines, compiled blocks, averages
    engines.share_windows(objective.modules.values(), config)
    universal = checkpoint.for_world(folder, list(objective.modules), config.zero_stage)
    trained = engines.engines_of(objective.modules, objective.lead, config, world, universal, objective.settings)
    _speed_up(objective, config)
    averages = ema.begin(trained[objective.lead], config.ema_half_lives)
    path = checkpoint.latest(folder)
    if path is None:
        return _Run(trained, averages, 0, 0)

    # the checkpoint's state
    meta = checkpoint.meta(path)
    _check(config, meta, path)
    try:
        loader.load_state_dict(meta["loader"])
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    checkpoint.load(path, trained, universal)
    saved = {life: checkpoint.Weights(path, life) for life in averages}
    ema.restore(averages, trained[objective.lead], saved)
    for name, value in objective.state.items():
        value.copy_(torch.tensor(meta["state"][name]))
    return _Run(trained, averages, meta["step"], meta["left_out"])


def _rehearse(objective: Objective, run: _Run, config: TrainConfig, foreseen: float | None) -> None:
    """An update of the largest batch that is left out, as one with a loss that is not finite is: no weight changes.

    Raises:
        Failure: out of memory.
    """
    if not objective.largest or run.step >= config.steps:
        return
    batch = on_device(objective.largest(), objective)
    for number in range(config.accumulate):
        rng, seed = _seeded(config, run.step, number)
        carry: dict[str, Any] = {}
        for name in learning_rates(objective, config, run.step):
            engine, turn = run.engines[name], Turn(name, run.engines, batch, run.step, rng, seed, carry)
            with _only_learning(run.engines, name), guards.explain_out_of_memory(run.step, batch):
                loss, _ = objective.loss(turn)
                engine.backward(loss * math.nan)
                engine.step()
    tokens = f", {objective.tokens(batch):,} tokens" if objective.tokens else ""
    if torch.distributed.get_rank() == 0:
        print(f"the largest batch, {len(batch['key'])} windows{tokens}: {peak(foreseen)}", flush=True)


def _prepare_folder(config: TrainConfig, folder: Path) -> None:
    """Delete the reports of an earlier attempt, and print what is odd about the settings."""
    if (config.warmup_steps or 0) > config.steps:
        print(
            f"warmup_steps: {config.warmup_steps} are more than all {config.steps} steps; warming up for {config.warmup}",
            flush=True,
        )
    for report in (*folder.glob("nonfinite-*.json"), *folder.glob("spikes.jsonl")):
        report.unlink()


def _meta(
    objective: Objective, loader: Stream, config: TrainConfig, folder: Path, step: int, left_out: int
) -> dict[str, Any]:
    """The content of a checkpoint beside the engines."""
    return {
        "step": step,
        "loader": loader.state_dict(),
        "settings": content(config),
        "lineage": lineage.kept(folder),
        "left_out": left_out,
        "state": {name: value.tolist() for name, value in objective.state.items()},
        "run": os.environ.get("MLFLOW_RUN_ID"),
        "recipe": os.environ.get("LONGTAKE_RECIPE"),
        "seed": config.seed,
    }


@dataclass
class _Update:
    """The figures of one update on this rank.

    terms       to log, of each pass
    norms       of gradients, of the whole update
    keys        of the clips of each pass
    nonfinite   by engine, whether its loss was not finite in some pass
    tokens      of all passes
    carry       of the current pass (see `Turn`)
    """

    terms: list[dict[str, Any]] = field(default_factory=list)
    norms: dict[str, Any] = field(default_factory=dict)
    keys: list[list[str]] = field(default_factory=list)
    nonfinite: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    carry: dict[str, Any] = field(default_factory=dict)

    def begin_pass(self, batch: Batch) -> None:
        self.carry = {}
        self.terms.append({})
        self.keys.append(batch.get("key", []))


def _take_turn(turn: Turn, objective: Objective, progress: Progress, update: _Update, norms: bool) -> None:
    """Forward and backward of one engine; DeepSpeed updates its weights after the last pass.

    `norms` adds the norms of each child's gradients to the update's figures.
    """
    engine, name, batch = turn.engines[turn.name], turn.name, turn.batch
    with _only_learning(turn.engines, name), guards.explain_out_of_memory(turn.step, batch):
        with progress.part(turn.step, "forward", name, batch):
            loss, terms = objective.loss(turn)
        with progress.part(turn.step, "backward", name, batch):
            engine.backward(guards.with_nonfinite_gradients(loss))
        update.nonfinite[name] = update.nonfinite.get(name, 0) + ~torch.isfinite(loss.detach())
        if norms:
            children = engines.gradient_norms(engine)
            update.norms |= {f"gradient_norm_{name}/{child}": norm for child, norm in children.items()}
        with progress.part(turn.step, "update", name):
            engine.step()
    update.terms[-1] |= terms


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step: linear warm-up, then constant or a cosine that ends at `final_lr` of it."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def learning_rates(objective: Objective, config: TrainConfig, step: int) -> dict[str, float]:
    """The rates of the engines that learn in a step, in the order of their turns."""
    rates = {}
    for name in objective.modules:
        since_start = step - objective.starts.get(name, 0)
        if since_start >= 0:
            settings = objective.settings.get(name)
            rates[name] = learning_rate(settings, since_start) if settings else learning_rate(config, step)
    return rates


def _seeded(config: TrainConfig, step: int, number: int) -> tuple[torch.Generator, int]:
    """Seed torch for a pass; returns this rank's random state, seeded alike, and a seed that all ranks share.

    Call it after the data have come: a loader that starts draws from torch's own random state.
    """
    rank_seed = pass_seed(config.seed, step, number, engines.place(config)[0])
    # `torch.manual_seed` would note a whole stack for each device that is not there
    (torch.default_generator if engines.device().type == "cpu" else torch).manual_seed(rank_seed)
    return torch.Generator(engines.device()).manual_seed(rank_seed), pass_seed(config.seed, step, number, _ALL_RANKS)


def _speed_up(objective: Objective, config: TrainConfig) -> None:
    """Choose how convolutions are computed, and compile, as the config says."""
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.channels_last:
        for module in objective.modules.values():
            engines.channels_last(module)
    if config.compile:
        # blocks of a class share a limit of 8 graphs: beyond it, blocks whose shapes come late would stay uncompiled
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1 << 16
        for block in objective.blocks:
            block.compile()


@contextmanager
def _only_learning(all_engines: Engines, name: str) -> Iterator[None]:
    """Freeze every engine but one: gradients flow through the frozen ones without reaching their weights."""
    others = [engine.module for other, engine in all_engines.items() if other != name]
    frozen = [p for module in others for p in module.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _check(config: TrainConfig, meta: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where a checkpoint belongs to other settings, or has more steps than there are to be."""
    if changed := checkpoint.differences(config, meta["settings"]):
        raise UserError(
            f"{path}: belongs to other settings ({', '.join(changed[:3])}); bring them back, or begin anew in another folder,"
            " which --force makes"
        )
    if meta["step"] > config.steps:
        raise UserError(
            f"{path}: has more steps than steps: {config.steps}; raise that, or begin anew in another folder, which --force makes"
        )
