"""The peak of memory of a real training, in a process of its own: what a stage's `largest` gives, in DeepSpeed's engines.

    python measured.py MODULE CONFIG.json    prints {"allocated": bytes, "resident": bytes}

`allocated` is the peak of what torch's CPU allocator has given out (`torch.profiler` with `profile_memory`), exact to the
byte and without the interpreter; `resident` is by how much the process has grown at its peak, as the kernel counts it.
"""

import importlib
import json
import resource
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from longtake.training import engines
from longtake.training.objective import Turn

STEPS = 2  # the optimizer's states come with the first


def peak_of(events: Any) -> int:
    """The most bytes that lived at once, of a profile's events."""
    memory = sorted((e.start_ns(), n, e.nbytes()) for n, e in enumerate(events) if e.name() == "[memory]")
    now = most = 0
    for _, _, change in memory:
        now += change
        most = max(most, now)
    return most


def train(stage: Any, config: Any, inputs: Any = None) -> None:
    """Some steps as `training.loop` makes them, without data and averages."""
    objective, batch, _ = stage.largest(config, inputs or {}, config.batch // config.accumulate)
    made = engines.engines_of(objective.modules, objective.lead, config, 1, settings=objective.settings)
    for _ in range(STEPS):
        for number in range(config.accumulate):
            carry: dict[str, Any] = {}
            rng = torch.Generator().manual_seed(number)
            for name, engine in made.items():
                others = [p for other in made if other != name for p in made[other].module.parameters() if p.requires_grad]
                for parameter in others:
                    parameter.requires_grad_(False)
                loss, _ = objective.loss(Turn(name, made, batch, config.steps - 1, rng, 0, carry))
                engine.backward(loss)
                for parameter in others:
                    parameter.requires_grad_(True)
                engine.step()
                del loss


def resident() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    stage = importlib.import_module(sys.argv[1])
    config = stage.Config(**json.loads(sys.argv[2]))
    with engines.process_group():
        torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()
        before = resident()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train(stage, config)
        grown = resident() - before
    print(json.dumps({"allocated": peak_of(profiler.profiler.kineto_results.events()), "resident": grown}))


if __name__ == "__main__":
    main()
