"""Reading checkpoints: state back into engines, whatever the number of processes, and the weights of a finished training."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.datasets.errors import Failure
from longtake.training.checkpoint.folder import latest, meta
from longtake.training.checkpoint.weights import RAW, Weights, damaged
from longtake.training.config import TrainConfig
from longtake.training.engines import alone, lora
from longtake.training.engines.ema import label

_UNIVERSAL = "universal"
_OWN = ("weight_decay", "fused")  # of a group of parameters: as this training has it, not as the checkpoint had it
_numbers = itertools.count()


def for_world(folder: Path, names: Sequence[str], zero_stage: int) -> bool:
    """Make the latest checkpoint fit for this number of processes; returns whether engines must load it as universal.

    ZeRO shards the optimizer by process, so a checkpoint of another number of processes is converted first, once, into a
    folder beside its files. Every rank must call it.

    Raises:
        Failure: on every rank, where DeepSpeed cannot convert it.
    """
    path, world = latest(folder), torch.distributed.get_world_size()
    if path is None or zero_stage == 0 or meta(path)["world"] == world:
        return False
    alone(f"convert/{next(_numbers)}", partial(_make_universal, path, names, zero_stage))
    return True


def _make_universal(path: Path, names: Sequence[str], zero_stage: int) -> None:
    """Write `path/universal`, unless it is there. Raises Failure."""
    if (path / _UNIVERSAL).exists():
        return
    try:
        error = _convert(path, names, zero_stage)
    except OSError as e:
        # such as a full disk
        error = str(e)
    if error:
        raise Failure(
            f"{path}: could not be converted for {torch.distributed.get_world_size()} processes ({error}); go on with as many as"
            " before"
        )


def _convert(path: Path, names: Sequence[str], zero_stage: int) -> str:
    """Write `path/universal`; returns the error, or an empty string."""
    scratch = path / f".{_UNIVERSAL}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    for name in names:
        command = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(path / _tag(path, name)), "--output_folder", str(scratch / _tag(path, name))]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        command += ["--inject_missing_state"] if zero_stage < 3 else []
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        process = subprocess.run(command, capture_output=True, check=False, text=True, env=environment)
        if process.returncode:
            return (process.stderr.strip().splitlines() or ["no reason given"])[-1]
    scratch.rename(path / _UNIVERSAL)
    return ""


def _tag(path: Path, name: str) -> str:
    """The name of an engine in a checkpoint: old ones call the only engine of a prior generator."""
    return "generator" if name == "model" and not (path / name).is_dir() else name


def load(path: Path, engines: Mapping[str, Any], universal: bool = False) -> None:
    """Put a checkpoint's state into the engines. Raises Failure where it is damaged."""
    try:
        for name, engine in engines.items():
            groups = engine.optimizer.param_groups
            own = [{key: group[key] for key in _OWN if key in group} for group in groups]
            loaded, _ = engine.load_checkpoint(str(path / _UNIVERSAL if universal else path), tag=_tag(path, name))
            if loaded is None:
                raise FileNotFoundError(f"no state of {name}")
            # from a universal checkpoint ZeRO-3 gives all groups the first one's decay, and one tensor of steps to share
            for group, kept in zip(engine.optimizer.param_groups, own, strict=True):
                group.update(kept)
            fused = any(kept.get("fused") for kept in own)
            for parameter, state in engine.basic_optimizer.state.items():
                if "step" in state:
                    step = state["step"]
                    state["step"] = step.to(parameter.device if fused else "cpu", copy=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever an unpickler makes of damaged bytes
        raise damaged(path, e) from e


def trained(folder: Path, config: TrainConfig, start: nn.Module | None = None) -> dict[str, Tensor]:
    """The weights of a finished training: its first average, or the raw weights where none is kept; LoRA merged into them.

    Args:
        start: the module before its first step. Weights that stood still are taken from it, since engines with
            `precision: bf16` have rounded them; without it they stay rounded.

    Raises:
        Failure: there is no checkpoint, or it is damaged.
    """
    weights: Mapping[str, Tensor] = _weights(folder, config)
    weights = weights if start is None else _Unrounded(weights, start)
    return dict(lora.merged(weights, config.lora) if config.lora else weights)


class _Unrounded(Mapping[str, Tensor]):
    """Weights of a checkpoint, but those of `start` where it has the same rounded to bf16."""

    def __init__(self, weights: Mapping[str, Tensor], start: nn.Module) -> None:
        self._weights, self._start = weights, start.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[name]
        if value.dtype != torch.bfloat16 or name not in self._start:
            return value
        before = self._start[name].cpu()
        # what bf16 holds exactly stays as small as it is
        rounded = torch.equal(before.bfloat16(), value) and not torch.equal(before, value.to(before.dtype))
        return before if rounded else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def changes(folder: Path, config: TrainConfig) -> dict[str, Tensor]:
    """The tensors of LoRA after a finished training, likewise of its first average, by the names that `lora.attach` gives.

    Raises:
        Failure: there is no checkpoint, or it is damaged.
    """
    weights = _weights(folder, config)
    return {name: weights[name] for name in weights if lora.is_change(name)}


def _weights(folder: Path, config: TrainConfig) -> Weights:
    return Weights(_last(folder), label(config.ema_half_lives[0]) if config.ema_half_lives else RAW)


def beside(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The raw weights of a module other than the lead after a finished training, and the state of its objective.

    Raises:
        Failure: there is no checkpoint, or it is damaged.
    """
    path = _last(folder)
    return dict(Weights(path, RAW, name)), dict(meta(path)["state"])


def _last(folder: Path) -> Path:
    path = latest(folder)
    if path is None:
        raise Failure(f"{folder}: holds no checkpoint; run the same command again")
    return path
