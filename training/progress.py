"""Figures of a running training: the time of each part of a step, operations, memory; and its progress bar."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from longtake.training.config import TrainConfig
from longtake.training.shares import shares

PARTS = ("data", "forward", "backward", "update", "exchange", "checkpoint")
_BY_HOST = ("data", "checkpoint")  # it waits for them
# dense bf16 TFLOP/s that makers state, by a part of the device's name; the longest match counts
PEAKS = {
    "A100": 312,
    "A10G": 70,
    "L4": 121,
    "L40S": 362,
    "H100": 989,
    "H100 PCIe": 756,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
}


class Clock:
    """Seconds of each part of a step, without making a GPU wait: there they are read off events, at the end of a window."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._marks: list[tuple[str, Any, Any]] = []
        self._asides: dict[str, float] = {}
        self.steps, self.samples, self.tokens, self.flops = 0, 0, 0, 0.0
        self._began = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time of the block counts as `name`, one of PARTS."""
        event = self._gpu and name not in _BY_HOST
        start = self._now(event)
        yield
        self._marks.append((name, start, self._now(event)))

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """The time of the block counts as `name`, and as no part of a step."""
        if self._gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._began += seconds
        self._asides[name] = self._asides.get(name, 0.0) + seconds

    def _now(self, event: bool) -> Any:
        if not event:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def take(self, peak_flops: float | None) -> dict[str, float]:
        """The means since this clock began. `peak_flops` of a device, per second, gives the MFU."""
        if self._gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        spent = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._marks:
            spent[name] += start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start
        values = {f"seconds_{name}": value / self.steps for name, value in spent.items()}
        values["seconds_per_step"] = seconds / self.steps
        values["data_wait_share"] = spent["data"] / seconds
        values["samples_per_second"] = self.samples / seconds
        if self.tokens:
            values["tokens_per_second"] = self.tokens / seconds
        values["tflops"] = self.flops / seconds / 1e12
        if peak_flops:
            values["mfu"] = self.flops / seconds / peak_flops
        return values | shares(spent, self._asides, seconds + sum(self._asides.values()))


class _Counter(TorchDispatchMode):
    """Adds up the operations of what runs, by torch's own formulas, and changes nothing.

    torch's FlopCounterMode would: its hooks on modules have moved gradients by a last bit, so that a resumed run, whose
    first step is counted, was not the straight one. In a backward pass what activation checkpointing computes again is
    left out: a forward pass inside a backward pass, it alone runs with gradients enabled.
    """

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.total, self._backward = 0, backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula and not (self._backward and torch.is_grad_enabled()):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Flops:
    """Floating point operations of a step on this rank, counted once for each shape of batch and engine."""

    def __init__(self) -> None:
        self._counted: dict[Any, float] = {}

    @contextmanager
    def counting(self, key: Any, phase: str) -> Iterator[None]:
        """Count the operations of the block, the first time for this `key` and phase ("forward" or "backward")."""
        if (key, phase) in self._counted:
            yield
            return
        counter = _Counter(phase == "backward")
        # a compiled block is opaque to the counter
        with torch.compiler.set_stance("force_eager"), counter:
            yield
        self._counted[key, phase] = float(counter.total)

    def of(self, key: Any) -> float:
        """Operations of both phases."""
        return self._counted.get((key, "forward"), 0.0) + self._counted.get((key, "backward"), 0.0)


def peak_flops(stated: float | None) -> float | None:
    """Peak operations per second of a device: `stated` in TFLOP/s, or its maker's figure; None where unknown."""
    if stated:
        return stated * 1e12
    if not torch.cuda.is_available():
        return None
    words = re.split(r"[\s-]", torch.cuda.get_device_name())
    models = [key for key in PEAKS if all(word in words for word in key.split())]
    return PEAKS[max(models, key=len)] * 1e12 if models else None


def memory() -> dict[str, float]:
    """Memory in GB: the GPU's peak since the last call, and the process's share of the host's."""
    figures = {"host_memory_gb": psutil.Process().memory_info().rss / 1e9}
    if torch.cuda.is_available():
        figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        figures["gpu_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return figures


def peak(foreseen: float | None = None) -> str:
    """The most memory that this process has had, of its device where it has one, as words, and the bytes foreseen."""
    beside = f", {foreseen / 1e9:.1f} GB foreseen" if foreseen else ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return (
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f} of {total / 1e9:.1f} GB of the device at its peak{beside}"
        )
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB of the host at its peak{beside}"


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the rows, of all ranks, that have it and in which it is finite; NaN where it never is.

    Every rank must call it; they need not have the same metrics.
    """
    totals = _totals(rows)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    totals_of_ranks = [totals] * world
    if world > 1:
        # names with their values, in one exchange: ranks that know other metrics cannot wait for each other
        torch.distributed.all_gather_object(totals_of_ranks, totals)
    means = {}
    for name in dict.fromkeys(name for each in totals_of_ranks for name in each):
        total, count = (
            sum(parts) for parts in zip(*(each[name] for each in totals_of_ranks if name in each), strict=True)
        )
        means[name] = total / count if count else math.nan
    return means


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """The sum and the number of the finite values of each metric."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    # one copy of all that is on the device, since each number by itself would make the host wait
    tensors = [v.detach().float() for column in values.values() for v in column if _on_device(v)]
    found = iter(torch.stack(tensors).cpu() if tensors else ())
    totals = {}
    for name, column in values.items():
        numbers = [next(found) if _on_device(v) else torch.as_tensor(v).float() for v in column]
        on_host = torch.stack(numbers).double()
        finite = on_host[on_host.isfinite()]
        totals[name] = (float(finite.sum()), finite.numel())
    return totals


def _on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


class Profile:
    """torch's profiler over `steps`, the first and the last; the trace and a table of operators go to `folder`.

    It ends at `end` at the latest, the last step of the training.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, end: int) -> None:
        self._steps, self._folder = (steps[0], min(steps[1], end)) if steps else None, folder
        self._running: Any = None

    def before(self, step: int) -> None:
        """Call it before the step with this number, counted from 1."""
        if self._steps and step == self._steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(activities=activities, profile_memory=True)
            self._running.__enter__()

    def after(self, step: int) -> Path | None:
        """Call it after the step; returns the folder of the profile once it is complete."""
        if self._running is None or not self._steps or step < self._steps[1]:
            return None
        self._running.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self._folder / "trace.json.gz"))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self._folder / "operators.txt").write_text(self._running.key_averages().table(sort_by=key, row_limit=50))
        self._running = None
        return self._folder


def batch_key(name: str, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how much an engine computes on a batch: the shapes of its tensors."""
    return (name, *((k, tuple(v.shape)) for k, v in batch.items() if isinstance(v, torch.Tensor)))


class Progress:
    """The times, operations and figures of a training since the last log, and its bar on the first rank; a context.

    Args:
        step: the training begins or continues at it.
        beat: `beat(step, part)` notes the part of a step that begins (see `guards.Watchdog`).
    """

    def __init__(self, config: TrainConfig, folder: Path, step: int, beat: Callable[[int, str], None]) -> None:
        self._config, self._first_step, self._beat = config, step, beat
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._readers = self._world // config.run.launcher.sequence  # groups of ranks that share their windows
        self._clock, self._flops, self._rows = Clock(), Flops(), list[Mapping[str, Any]]()
        self._peak = peak_flops(config.run.peak_tflops)
        self._profile = Profile(config.run.profile, folder / "profile", config.steps)
        self._bar = tqdm(
            desc="train",
            total=config.steps,
            initial=step,
            unit="step",
            disable=self._rank != 0,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, step: int) -> None:
        """Begin the step after `step` others."""
        self._profile.before(step + 1)

    @contextmanager
    def part(self, step: int, part: str, engine: str = "", batch: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Count the time of the block as `part`, one of PARTS; with a batch also its operations."""
        self._beat(step, f"{part} of {engine}" if engine else part)
        key = None if batch is None else batch_key(engine, batch)
        with self._clock.part(part), nullcontext() if key is None else self._flops.counting(key, part):
            yield
        if key is not None and part == "backward":
            self._clock.flops += self._world * self._flops.of(key)

    @contextmanager
    def aside(self, step: int, what: str) -> Iterator[None]:
        """Count the time of the block as no part of a step."""
        self._beat(step, what)
        with self._clock.aside(what):
            yield

    def end(self, step: int, rows: Sequence[Mapping[str, Any]], samples: int, tokens: int) -> Path | None:
        """End step number `step`: the figures of its passes, and the samples and tokens of this rank.

        Returns:
            The folder of the profile if it is complete now.
        """
        self._rows += rows
        self._clock.steps += 1
        self._clock.samples += self._readers * samples
        self._clock.tokens += self._readers * tokens
        self._bar.update()
        return self._profile.after(step)

    def take(self, step: int) -> dict[str, float]:
        """The means since the last call. Every rank must call it."""
        self._beat(step, "log")
        with self._clock.aside("log"):
            figures = means(self._rows)
        figures |= self._clock.take(self._peak and self._peak * self._world) | memory()
        self._rows, self._clock = [], Clock()
        wait = figures["data_wait_share"]
        self._bar.set_postfix(loss=f"{figures.get('loss', math.nan):.4f}", data_wait=f"{wait:.0%}", refresh=False)
        # the first steps wait for the loader to start
        if wait > self._config.run.warn_data_wait and step > self._first_step + self._config.run.log_every:
            self.warn(
                f"step {step}: {wait:.0%} of the time went into waiting for data; raise workers (now"
                f" {self._config.run.workers}), or cache the dataset"
            )
        return figures

    def warn(self, text: str) -> None:
        """Print a warning above the bar, on the first rank."""
        if self._rank == 0:
            self._bar.write(f"warning: {text}", file=sys.stderr)
