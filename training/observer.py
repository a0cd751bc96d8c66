"""The observer: a process beside a training, which samples videos and measures held-out clips from its checkpoints.

A training that does both itself stops all its ranks meanwhile. The observer has a device of its own, `run.observer`, and
takes part in no step: it needs the checkpoints alone. What it makes of a checkpoint is what the training would have made
at that step, but for the rounding of bf16 weights, since the weights of checkpoints are fp32.

Its input is the job, a line of JSON. A second line says that the training has ended: it does what is left, and ends too.
An input that ends without that line means that the training is gone.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.datasets import environment, storage
from longtake.datasets.errors import Failure, UserError
from longtake.training import checkpoint, tracker
from longtake.training.asides import heldout, show_samples
from longtake.training.checkpoint import upload
from longtake.training.checkpoint.folder import step_of
from longtake.training.config import LaunchConfig, TrainConfig
from longtake.training.engines import device, lora, process_group
from longtake.training.engines.ema import label
from longtake.training.launch.processes import Job, processes_here, share_of_cpus
from longtake.training.live.record import resolved
from longtake.training.objective import Objective
from longtake.training.registry import lineage
from longtake.training.tracker import Tracker

_FOLDER = "observer"  # in that of the checkpoints
_EVERY = 2.0  # seconds between looks for a checkpoint
_MISTAKE = 2  # exit code: another attempt would not help
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def beside(module: str, config: TrainConfig, inputs: Mapping[str, str], folder: Path) -> Iterator[None]:
    """Run the observer that `config.run.observer` asks for while the block trains, and let it finish at the end.

    One that dies is started again, `max_failures` times; that it is missing ends no training. After an error in the block
    it is stopped: the next attempt's continues. The arguments are those of `launch.run`.

    Raises:
        UserError: the device is not there, or a process of the training has it.
    """
    if config.run.observer is None:
        # a later attempt's makes up for nothing of this one
        _record(folder).unlink(missing_ok=True)
        yield
    else:
        check_device(config)
        if config.run.upload:
            upload.fetch_alone(folder, config.run.upload)
        _settle(folder)
        keeper = _Keeper(Job.of(module, config, inputs, folder), config, _environment(config))
        keeper.start()
        try:
            yield
            keeper.finish()
        finally:
            keeper.stop()

    # what an observer that gave up, or was stopped before, has made and not sent
    if any(folder.glob(f"{_FOLDER}/tracking/*")):
        with tracker.connect(folder / _FOLDER, system_metrics=False):
            pass


def check_device(config: TrainConfig) -> None:
    """Raise UserError where a GPU that `run.observer` names is not there, or a process of the training has it."""
    place, launcher = str(config.run.observer), config.run.launcher
    if not place.startswith("cuda:"):
        return
    number, count = int(place.removeprefix("cuda:")), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"run.observer: {place}, but this machine has {count} GPUs for it; name another one, or cpu")
    # on a Ray cluster only Ray knows which GPUs it gives away
    taken = {"process": processes_here(), "torchrun": launcher.processes, "ray": 0}[launcher.by]
    if number < taken:
        raise UserError(
            f"run.observer: {place} is the device of a training process; name cuda:{taken} or a later one, or cpu"
        )


def _environment(config: TrainConfig) -> dict[str, str]:
    """The observer's environment, in which its device is the only one."""
    kept = {name: value for name, value in os.environ.items() if name not in _RANKS}
    if config.run.observer == "cpu":
        return kept | {"CUDA_VISIBLE_DEVICES": ""}
    number = int(str(config.run.observer).removeprefix("cuda:"))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return kept | {"CUDA_VISIBLE_DEVICES": visible[number] if visible else str(number)}


class _Keeper(threading.Thread):
    """Keeps the observer running until it has finished."""

    def __init__(self, job: Job, config: TrainConfig, variables: Mapping[str, str]) -> None:
        super().__init__(name="observer", daemon=True)
        self._job, self._variables = job, dict(variables)
        self._attempts, self._patience = config.run.launcher.max_failures, config.run.stall_seconds
        self._lock, self._process = threading.Lock(), self._begin()
        self._finishing, self._stopping = False, threading.Event()

    def _begin(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "longtake.training.observer"]
        # a group of its own: Ctrl-C is for the training, which then stops it
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=self._variables, process_group=0)
        self._say(process, json.dumps(self._job._asdict()))
        return process

    @staticmethod
    def _say(process: "subprocess.Popen[bytes]", line: str) -> None:
        assert process.stdin
        # one that has died hears nothing
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()

    def run(self) -> None:
        left, last = self._attempts, _last(Path(self._job.folder))
        while (code := self._process.wait()) != 0 and not self._stopping.is_set():
            # as many attempts again once one has come further
            left, before, last = left - 1, last, _last(Path(self._job.folder))
            left = self._attempts if last > before else left
            again = left >= 0 and code != _MISTAKE
            print(
                f"warning: the observer has ended with exit code {code}; "
                + ("it is started again" if again else "samples and held-out losses are missing from here on"),
                file=sys.stderr,
                flush=True,
            )
            # what it lacks, such as a disk, may be there again in a moment
            if not again or self._stopping.wait(_EVERY):
                return
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = self._begin()
                if self._finishing:
                    self._say(self._process, "finish")

    def finish(self) -> None:
        """Let it do what is left, and wait for that as long as for a step."""
        with self._lock:
            self._finishing = True
            self._say(self._process, "finish")
        if self.is_alive():
            print("training has ended; the observer finishes its samples and held-out losses", flush=True)
            self.join(self._patience)
        if self.is_alive():
            print(
                f"warning: the observer has not finished in {self._patience:g} s (stall_seconds); it is stopped",
                file=sys.stderr,
                flush=True,
            )

    def stop(self) -> None:
        """End it, whatever it does."""
        self._stopping.set()
        with self._lock:
            self._process.kill()
        self.join()


@dataclass(frozen=True)
class _Alone:
    """A module in the place of its engine."""

    module: nn.Module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def observe(job: Job, finish: threading.Event) -> None:
    """Observe the checkpoints of a training until `finish` is set and none is left.

    A checkpoint that is removed before its turn is left out. Raises UserError, Failure.
    """
    stage = importlib.import_module(job.module)
    config, folder = stage.Config.model_validate(job.config), Path(job.folder)
    config = config.model_copy(update={"run": config.run.model_copy(update={"launcher": LaunchConfig()})})
    if device().type == "cpu":
        # as the weights of checkpoints are, whatever the training's devices compute in
        config = config.model_copy(update={"precision": "fp32"})
    torch.set_num_threads(environment.threads() or share_of_cpus(2))
    objective: Objective | None = None
    late = 0
    with process_group(), tracker.connect(folder / _FOLDER, system_metrics=False) as log:
        ended = False
        while not ended:
            # asked before the folder is read, so that the last checkpoint is seen
            ended = finish.is_set()
            if objective is None and _next(folder):
                inputs = resolved(config, lineage.pinned(job.inputs, folder), folder)
                objective = stage.objective(config, stage.prepare(config, inputs, folder))
                if config.lora:
                    # apart, as in training: added to bf16 weights, small changes would be lost
                    lora.attach(objective.modules[objective.lead], config.lora)
            while objective and (path := _next(folder)):
                # what was due of a checkpoint that is removed meanwhile is due of the next one
                with _unless_removed(path):
                    _observe(objective, config, path, _last(folder), log)
                    late += _left_out(objective, config, step_of(path), _last(folder))
                    _note(folder, step_of(path))
            if not ended:
                finish.wait(_EVERY)
    if late:
        print(
            f"warning: {late} samples and held-out losses were due at steps whose checkpoints the observer did not find; raise"
            " keep_checkpoints if it is too slow, and let checkpoint_every divide sample_every and heldout_every",
            file=sys.stderr,
            flush=True,
        )


def _left_out(objective: Objective, config: TrainConfig, step: int, before: int) -> int:
    """How many samples and held-out losses were due between two steps, but for the later one's own."""
    every = (config.run.sample_every if objective.sample else 0, config.run.heldout_every)
    return sum(max(0, step // each - before // each - 1) for each in every if each)


def _observe(objective: Objective, config: TrainConfig, path: Path, before: int, log: Tracker) -> None:
    """Make of a checkpoint what is due since step `before`."""
    meta, run = checkpoint.meta(path), config.run
    step, engines = meta["step"], {name: _Alone(module) for name, module in objective.modules.items()}
    for name, value in objective.state.items():
        value.copy_(torch.tensor(meta["state"][name]))

    if objective.sample and _due(run.sample_every, step, before):
        _load(objective, path, checkpoint.RAW)
        show_samples(objective, engines, config.seed, step, log)

    if _due(run.heldout_every, step, before) or (run.heldout_every and step == config.steps):
        _load(objective, path, label(config.ema_half_lives[0]) if config.ema_half_lives else checkpoint.RAW)
        if figures := heldout(objective, engines, {}, config, step):
            log.log(step, figures)


def _due(every: int, step: int, before: int) -> bool:
    return every > 0 and step // every > before // every


def _load(objective: Objective, path: Path, kind: str) -> None:
    """Give the modules the weights of a checkpoint, the lead those of `kind`."""
    for name, module in objective.modules.items():
        leads = name == objective.lead
        module.load_state_dict(dict(checkpoint.Weights(path, kind if leads else checkpoint.RAW, "" if leads else name)))


def _next(folder: Path) -> Path | None:
    """The oldest checkpoint after the last one that was observed."""
    newest, last = checkpoint.latest(folder), _last(folder)
    # later ones than `latest` are left of a training that went back
    steps = {step_of(path): path for path in folder.glob("step-*")} if newest else {}
    waiting = [step for step in steps if newest and last < step <= step_of(newest)]
    return steps[min(waiting)] if waiting else None


def _settle(folder: Path) -> None:
    """Before a training begins or continues: what it has behind it without an observer is not made up for."""
    newest = checkpoint.latest(folder)
    step = step_of(newest) if newest else 0
    _note(folder, min(_last(folder), step) if _record(folder).exists() else step)


def _last(folder: Path) -> int:
    """The step of the last checkpoint that was observed."""
    record = _record(folder)
    return int(json.loads(record.read_bytes())["step"]) if record.exists() else 0


def _note(folder: Path, step: int) -> None:
    _record(folder).parent.mkdir(parents=True, exist_ok=True)
    storage.write(str(_record(folder)), json.dumps({"step": step}).encode())


def _record(folder: Path) -> Path:
    return folder / _FOLDER / "observed.json"


@contextlib.contextmanager
def _unless_removed(path: Path) -> Iterator[None]:
    """Leave the block early where the checkpoint is removed while it is read."""
    try:
        yield
    except (Failure, OSError):
        if path.exists():
            raise


def main() -> int:
    """Read the job and observe; returns the exit code."""
    finish = threading.Event()
    job = Job(**json.loads(sys.stdin.readline()))

    def listen() -> None:
        if not sys.stdin.readline():
            # without the training there is nothing to observe; what is done is on disk
            os._exit(0)
        finish.set()

    threading.Thread(target=listen, name="training", daemon=True).start()
    if device().type == "cpu":
        # the training's processes come first
        os.nice(10)
    try:
        observe(job, finish)
    except UserError as e:
        print(f"observer: {e}", file=sys.stderr, flush=True)
        return _MISTAKE
    except Failure as e:
        print(f"observer: {e}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = main()
    # native threads, such as torch's, have aborted a finished process while it unloaded them
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
