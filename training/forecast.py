"""The first line of a training: what it takes of its device at its largest batch, before anything is there.

It is computed as a plan computes it (see `fit`), for the inputs and the device that are really there.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import psutil
import torch

from longtake.datasets.errors import Failure, UserError
from longtake.training.fit import USABLE, Fit, Source
from longtake.training.launch.processes import processes_here
from longtake.training.remedies import Planned, Remedy


class Device(NamedTuple):
    """What a rank may take, in bytes, and of what."""

    bytes: float
    name: str


def device() -> Device:
    """This rank's GPU, or its share of the memory that is free on this machine."""
    if torch.cuda.is_available():
        return Device(float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), "the device")
    return Device(psutil.virtual_memory().available / processes_here(), "the memory that is free")


def announce(stage: Any, config: Any, inputs: Mapping[str, str], there: Device | None = None) -> float | None:
    """Print the line, on the first rank; returns the bytes that are foreseen, None where they are not known.

    Every rank must call it, in the process group: losses ask for their place in it. It never ends a training.

    Args:
        there: the memory of the device; by default what is there.
    """
    began, there = time.perf_counter(), there or device()
    fit, remedy, why = None, None, ""
    # the first rank's memory, since all must try the same changes; before anything that can fail on one rank alone
    limit = [USABLE * there.bytes]
    torch.distributed.broadcast_object_list(limit)
    try:
        planned = _planned(stage, config, inputs)
        fit = planned.fit()
        if fit.total > limit[0]:
            remedy = planned.remedy(limit[0])
    except (UserError, Failure) as e:
        why = str(e)
    except Exception as e:
        # what a trace cannot follow may train very well
        why = f"{type(e).__name__}: {e}"
    why = " ".join(why.split())[:300]
    if torch.distributed.get_rank() == 0:
        seconds = time.perf_counter() - began
        text = _line(fit, remedy, there, why) if fit else f"not known ({why})"
        print(f"memory: {text}; told in {seconds:.1f} s", flush=True)
    return fit.total if fit else None


def _planned(stage: Any, config: Any, inputs: Mapping[str, str]) -> Planned:
    if not hasattr(stage, "largest"):
        raise UserError(f"a {config.kind} stage cannot say before it runs")
    sources = {field: Source(None, None, uri, {}) for field, uri in inputs.items()}
    launched = _as_launched(config, torch.distributed.get_world_size())
    if hasattr(stage, "resolved"):
        launched = stage.resolved(launched, sources)
    return Planned(stage, launched, sources, on_gpu=torch.cuda.is_available())


def _as_launched(config: Any, world: int) -> Any:
    """The config with the number of ranks that there are, whoever has started them."""
    launcher = config.run.launcher
    if launcher.processes == world:
        return config
    by = "torchrun" if launcher.by == "process" else launcher.by
    launcher = launcher.model_copy(update={"by": by, "processes": world})
    return config.model_copy(update={"run": config.run.model_copy(update={"launcher": launcher})})


def _line(fit: Fit, remedy: Remedy | None, there: Device, why: str) -> str:
    parts = sorted(((size, name) for name, size in fit._asdict().items() if size), reverse=True)
    line = f"{_gb(fit.total)} of {_gb(there.bytes)} of {there.name} at the largest batch"
    line += f" ({', '.join(f'{name} {_gb(size)}' for size, name in parts)})"
    if fit.total <= USABLE * there.bytes:
        return line
    if why:
        return f"{line}, does NOT fit; what would make it fit is not known ({why})"
    if remedy is None:
        return f"{line}, does NOT fit, whatever is changed but the optimizer: choose a smaller model, window or batch"
    return f"{line}, does NOT fit; {', '.join(remedy.changes)} makes it {_gb(remedy.fit.total)}"


def _gb(count: float) -> str:
    """Bytes as GB with three digits at least, since models of tests are small."""
    return f"{count / 1e9:.1f} GB" if count >= 10e9 else f"{count / 1e9:.3g} GB"
