"""Trainings in which ranks share windows: of real stages, with their own loaders. Run as a script it is one of the ranks.

The script takes jobs from its input, one JSON line each (what `work` takes), and answers with a line each.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import small
import torch
from flat import nested
from latent_stages import prepared
from priors import awake

from longtake.datasets.errors import UserError
from longtake.training import checkpoint, engines
from longtake.training.checkpoint import resume
from longtake.training.loop import train


class Log:
    """A tracker that keeps figures, and videos as lists."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.videos: dict[str, Any] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, metrics))

    def video(self, step: int, name: str, video: Any, fps: float) -> None:
        self.videos[f"{name} {step}"] = video.tolist()

    def text(self, *_: Any) -> None:
        """Prompts."""


class Noted:
    """A stream that notes the keys of its batches."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.keys = stream, list[list[str]]()
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._stream:
            self.keys.append(list(batch["key"]))
            yield batch


def work(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], folder: str) -> dict[str, Any]:
    """Train as a rank of the stage does; what came of it, as plain data: weights, averages, figures, videos, keys."""
    module: Any = importlib.import_module(f"longtake.training.models.{stage}")
    log = Log()
    try:
        config = module.Config(**nested(settings))
        torch.manual_seed(config.seed)
        setup = prepared(config, dict(inputs), Path(f"{folder}-{torch.distributed.get_rank()}"), module)
        # else attention is behind gates that are closed
        awake(setup.model).train()
        stream = Noted(module.loader(config, setup, *engines.place(config)))
        train(module.objective(config, setup), stream, config, Path(folder), log)  # type: ignore[arg-type]
    except UserError as e:
        return {"error": str(e)}
    latest = checkpoint.latest(Path(folder))
    assert latest
    kinds = (checkpoint.RAW, *(f"{life:g}" for life in config.ema_half_lives))
    weights = {kind: {k: v.tolist() for k, v in checkpoint.Weights(latest, kind).items()} for kind in kinds}
    return {"weights": weights, "rows": log.rows, "videos": log.videos, "keys": stream.keys}


if __name__ == "__main__":
    torch.set_num_threads(1)
    resume.subprocess = SimpleNamespace(run=small.converted_here)  # type: ignore[assignment]
    with engines.process_group():
        for line in sys.stdin:
            print(json.dumps(work(**json.loads(line))), flush=True)
