"""The memory of a real training on a CPU: what a stage's `largest` gives, in DeepSpeed's engines and with its averages, for two steps.

Two figures are measured. `allocated` is the peak of what torch's allocator has given out, by `torch.profiler` with
`profile_memory`: exact to the byte, and without the interpreter, so it is compared. `resident` is by how much a process has
grown at its peak as the kernel counts it: all that a machine must have, libraries and fragments too, so it only says that
large trainings take what is allocated. Run as a script, for a process of its own: measured.py RECIPE STAGE
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from longtake.infra import graph, recipe
from longtake.infra.upkeep.memory import sources_of
from longtake.training import engines, fit
from longtake.training.engines import ema
from longtake.training.objective import Turn

STEPS = 2  # the optimizer's states come with the first


def source_of(path: str, name: str) -> fit.Source:
    """A stage of a recipe."""
    return sources_of(graph.build(recipe.load(path)))[name]


def planned(source: fit.Source) -> int:
    """What is said of a training on a CPU."""
    traced = fit.trace_of(source.stage, source.config, source.inputs, 1)
    return fit.memory_of(traced, source.config, 1, on_gpu=False).total


def allocated(source: fit.Source) -> int:
    """The most bytes that torch had given out at once. Needs a process group."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(source)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, _, change in sorted((e.start_ns(), n, e.nbytes()) for n, e in enumerate(events) if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    return most


def train(source: fit.Source) -> None:
    """Some steps as `training.loop` makes them, without data."""
    config = source.config
    objective, batch, beside = source.stage.largest(config, source.inputs, config.batch // config.accumulate)
    made = engines.engines_of(objective.modules, objective.lead, config, 1, settings=objective.settings)
    lead = made[objective.lead]
    averages, weights = ema.begin(lead, config.ema_half_lives), ema.weights_of(lead)
    for step in range(STEPS):
        for number in range(config.accumulate):
            carry: dict[str, Any] = {}
            for name, engine in made.items():
                others = [p for each in made if each != name for p in made[each].module.parameters() if p.requires_grad]
                for parameter in others:
                    parameter.requires_grad_(False)
                rng = torch.Generator().manual_seed(number)
                loss, _ = objective.loss(Turn(name, made, batch, config.steps - 1, rng, config.seed, carry))
                engine.backward(loss)
                for parameter in others:
                    parameter.requires_grad_(True)
                engine.step()
                del loss
        ema.move(averages, weights, step + 1)
    del beside


def resident() -> int:
    """The most memory that this process has had, in bytes; `getrusage` would count that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    with engines.process_group():
        # what is loaded once is not counted
        import deepspeed  # noqa: F401

        source = source_of(*sys.argv[1:])
        torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()
        before = resident()
        train(source)
        print(json.dumps(resident() - before))
