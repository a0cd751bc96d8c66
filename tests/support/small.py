"""A small training: random rows, and modules that learn to map them. Run as a script it is one of several processes.

The script takes jobs from its input, one JSON line each (what `work` takes), and answers with a line each.
"""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flat import nested
from torch import Tensor, nn

from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.training import checkpoint, engines
from longtake.training.checkpoint import resume
from longtake.training.config import TrainConfig
from longtake.training.loop import train
from longtake.training.models.common.causal import CausalConv3d
from longtake.training.objective import Objective, Turn

WIDTH = 32
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "lr": 1e-2,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 3,
    "ema_half_lives": [],
    "schedule": "constant",
    "warmup_steps": 0,  # else it is a share of the steps, and longer for a longer training
}


class Rows:
    """A stream of batches that are random by their number: `batch` rows in each, over all processes."""

    def __init__(self, batch: int = 4, wait: float = 0.0, data: str = "rows") -> None:
        self.batch, self.wait, self.data, self.taken = batch, wait, data, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        share = slice(rank * self.batch // world, (rank + 1) * self.batch // world)
        while True:
            time.sleep(self.wait)
            self.taken += 1
            yield {
                "x": rows(self.taken - 1, self.batch)[share],
                "key": [f"{self.taken - 1}-{n}" for n in range(4)][share],
            }

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "data": self.data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.data:
            raise UserError("this checkpoint belongs to another dataset, view or window")
        self.taken = state["taken"]


def rows(number: int, batch: int) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(number))


class Clip(nn.Module):
    """Rows as clips of 2 channels, 4 frames and 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = CausalConv3d(2, 4), CausalConv3d(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.view(-1, 2, 4, 2, 2)))).flatten(1)


def module(kind: str = "mlp", outputs: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    made = {
        "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, outputs)),
        "noisy": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, outputs)),
        "clip": Clip,
    }
    return made[kind]()


def adamw(*modules: nn.Module, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Optimizer:
    """Plain PyTorch's, with the small training's settings: what is a matrix decays, what is a vector does not."""
    parameters = [p for module in modules for p in module.parameters()]
    decays = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]
    return torch.optim.AdamW([decays[0] | {"weight_decay": 0.01}, decays[1] | {"weight_decay": 0.0}], lr, betas)


def loss_of(module: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (module(x.to(dtype)).float() - x.roll(1, 1)).square().mean()


def objective(
    kind: str = "mlp",
    fault: Mapping[str, Any] | None = None,
    starts: int | None = None,
    noise: float = 0.01,
    told: Sequence[Sequence[float]] = (),
    heldout: int = 0,
    largest: int = 0,
) -> Objective:
    """A module that learns, and from step `starts` on a second one that looks at its outputs.

    `fault` happens in the `calls` of the loss (from 1) on rank `rank`: `kind` is "nan" or "inf" (the loss, with finite
    gradients), "leap", "gradient" (not finite, of a finite loss), "sleep", or the name of a signal.
    With `largest` a batch of so many rows comes before the first step.
    `told` are the losses that each rank says it had, call by call, and says under a name of its own too.
    """
    modules = {"generator": module(kind)} | ({} if starts is None else {"adversary": module("mlp", outputs=1)})
    calls = 0

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        x = turn.batch["x"] + noise * torch.randn(turn.batch["x"].shape, generator=turn.rng, device=turn.rng.device)
        dtype = next(modules["generator"].parameters()).dtype
        if turn.name == "adversary":
            with torch.no_grad():
                fake = turn.engines["generator"].module(x.to(dtype))
            value = turn.engines["adversary"](torch.cat([x.to(dtype), fake])).float().square().mean()
            return value, {"adversary": value.detach()}
        calls += 1
        value = loss_of(turn.engines["generator"], x, dtype)
        if fault and calls in fault["calls"] and fault.get("rank", 0) == torch.distributed.get_rank():
            value = _spoil(fault["kind"], value)
        if told:
            rank = torch.distributed.get_rank()
            said = torch.tensor(told[rank][calls - 1])
            return value, {"loss": said, f"only_of_{rank}": said}
        return value, {"loss": value.detach()}

    return Objective(
        modules,
        loss,
        lead="generator",
        starts={"adversary": starts or 0},
        tokens=lambda batch: batch["x"].numel(),
        largest=(lambda: {"x": rows(2000, largest), "key": ["large"] * largest}) if largest else None,
        heldout=[{"x": rows(1000 + number, 1), "key": [f"held-{number}"]} for number in range(heldout)],
    )


def _spoil(kind: str, value: Tensor) -> Tensor:
    if kind in ("nan", "inf"):
        return value + float(kind)
    if kind == "leap":
        return value + 100.0
    if kind == "gradient":
        return value + (0 * value).sqrt()
    if kind == "sleep":
        time.sleep(600)
    else:
        os.kill(os.getpid(), getattr(signal, kind))
    return value


class Log:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.videos: list[tuple[int, str, Any]] = []
        self.folders: list[tuple[Path, str]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, metrics))

    def video(self, step: int, name: str, video: Any, fps: float) -> None:
        self.videos.append((step, name, video))

    def later(self, folder: Path, name: str) -> None:
        self.folders.append((folder, name))


def fit(
    folder: Path, made: Objective | None = None, stream: Rows | None = None, log: Any = None, **changes: Any
) -> dict[str, Tensor]:
    """Train, with these settings changed, and return the raw weights of the last checkpoint."""
    config = TrainConfig(**nested(SETTINGS | changes))
    made = made or objective()
    train(made, stream or Rows(config.batch // config.accumulate), config, folder, log)  # type: ignore[arg-type]
    return weights(folder)


def weights(folder: Path, kind: str = checkpoint.RAW, step: int | None = None) -> dict[str, Tensor]:
    path = checkpoint.latest(folder) if step is None else folder / f"step-{step:08d}"
    assert path
    return dict(checkpoint.Weights(path, kind))


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], atol: float = 1e-6) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=atol) for k in one)


def work(
    folder: str, changes: Mapping[str, Any], options: Mapping[str, Any] | None = None, wait: float = 0.0
) -> dict[str, Any]:
    """Train as a job says; what came of it, as plain data."""
    log = Log()
    lives = [f"{life:g}" for life in changes.get("ema_half_lives", [])]
    found: dict[str, Any] = {}
    try:
        config = TrainConfig(**nested(SETTINGS | changes))
        stream = Rows(config.batch // config.accumulate, wait)
        fit(Path(folder), objective(**options or {}), stream, log, **changes)
    except (UserError, Failure, Interrupted) as e:
        found = {"error": type(e).__name__, "message": str(e)}
    latest = checkpoint.latest(Path(folder))
    if latest:
        found["step"] = latest.name
        for kind in (checkpoint.RAW, *lives):
            found[kind] = {k: v.tolist() for k, v in weights(Path(folder), kind).items()}
    return found | {"log": log.rows}


def converted_here(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run` in `checkpoint`: DeepSpeed's converter in this process, which has it loaded."""
    from deepspeed.checkpoint import ds_to_universal

    assert list(command[1:4]) == ["-P", "-m", ds_to_universal.__name__]
    before, sys.argv = sys.argv, list(command[3:])
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(command, 0, "", "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    resume.subprocess = SimpleNamespace(run=converted_here)  # type: ignore[assignment]
    with engines.process_group():
        gc.freeze()
        for line in sys.stdin:
            said = work(**json.loads(line))
            print(json.dumps(said), flush=True)
