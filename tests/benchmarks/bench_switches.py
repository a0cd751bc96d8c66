"""What the switches that take less memory or time cost a training step: CPU seconds with each, against none, in turns.

    python tests/benchmarks/bench_switches.py [--only NAME…] [--turns 3] [--steps 4]

recompute   `activation_checkpointing` of 25, 50, 75 and 100 % of the blocks of a small Latte
update      its `fused_optimizer: true`, and its `optimizer: muon`
loss_chunk  the logits of a quarter of a small TATS's tokens at once: its head has 14 % of the weights, where that of
            `tats_small` has 18 and that of `tats_paper` 5
compile     `compile: true` of the Latte, after it is compiled; needs a C++ compiler; asked for by name alone

A step is forward, backward and update of an engine as a training has it, in fp32 on one thread: 640 tokens of a Latte of
8 blocks of width 256, or 1,024 of a TATS of 4 blocks. All of a part take a step each, one after the other, again and again.
A turn has `--steps` of these rounds, and gives the median of their ratios. The targets: a step takes 1 + 0.45 s times as
long where a share s of the blocks is recomputed, since forward is a third of it; 1.1 times with chunks; no longer fused or
compiled. Muon's price has none, as it is another optimizer: it falls with the tokens of a step.

A line of JSON each: the ratio of the step and that of the update alone, and the seconds of none. Of bf16 and of what moves to the host's memory a
CPU says nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import figures
import torch
from torch import nn

from longtake.training import engines, loop
from longtake.training.config import TrainConfig
from longtake.training.models.latte.model import Latte
from longtake.training.models.latte.model import config_from_preset as latte_config
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import config_from_preset as tats_config
from longtake.training.objective import Objective

WARM_UP = 2  # rounds
BATCH = {"latte": 2, "tats": 4}
CODES, SHAPE = 2048, (4, 8, 8)  # of the TATS
Seconds = tuple[float, float]  # of a step, and of its update alone
Step = Callable[[], Seconds]


def step_of(model: nn.Module, config: TrainConfig, loss: Callable[[Any], torch.Tensor]) -> Step:
    """A training step of the model, whose engine the loss is given."""
    blocks: Any = model.blocks
    objective = Objective({"model": model}, lambda turn: (loss(turn.engines["model"]), {}), blocks=list(blocks()))
    engine = engines.engines_of(objective.modules, objective.lead, config, world=1)["model"]
    loop._speed_up(objective, config)

    def step() -> Seconds:
        begun = time.process_time()
        engine.backward(loss(engine))
        passed = time.process_time()
        engine.step()
        ended = time.process_time()
        return ended - begun, ended - passed

    return step


def latte(share: float = 0, **settings: Any) -> Step:
    """A step of the Latte, of whose blocks a share is recomputed."""
    torch.manual_seed(0)
    config = latte_config("latte_s", depth=8, width=256, heads=4, channels=16, activation_checkpointing=share)
    x, t = torch.randn(BATCH["latte"], 16, 5, 8, 8), torch.rand(BATCH["latte"])
    return step_of(
        Latte(config), TrainConfig(batch=BATCH["latte"], **settings), lambda engine: (engine(x, t) - x).square().mean()
    )


def tats(chunk: int | None = None) -> Step:
    """A step of the TATS, with the logits of so many tokens at once."""
    torch.manual_seed(0)
    config = tats_config("tats_tiny", width=256, codes=CODES, shape=SHAPE)
    tokens = config.sequence(torch.randint(CODES, (BATCH["tats"], *SHAPE)))
    asked: dict[str, Any] = {"last": config.predicted, "targets": tokens[:, -config.predicted :], "chunk": chunk}
    return step_of(TATS(config), TrainConfig(batch=BATCH["tats"]), lambda engine: engine(tokens[:, :-1], **asked))


# the steps of each part, each against `none`
PARTS: dict[str, dict[str, Callable[[], Step]]] = {
    "recompute": {"none": latte} | {f"recompute_{n}": partial(latte, n / 100) for n in (25, 50, 75, 100)},
    "update": {
        "none": latte,
        "fused": partial(latte, fused_optimizer=True),
        "muon": partial(latte, optimizer="muon"),
    },
    "loss_chunk": {"none": tats, "loss_chunk": partial(tats, BATCH["tats"] * SHAPE[0] * SHAPE[1] * SHAPE[2] // 4)},
    "compile": {"none": latte, "compile": partial(latte, compile=True)},
}


def measured(steps: Mapping[str, Step], rounds: int) -> dict[str, list[Seconds]]:
    """The seconds of each step in each round, after those that warm up."""
    taken: dict[str, list[Seconds]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        # forwards, then backwards: no step has always the same one before it
        for name in list(steps)[:: -1 if number % 2 else 1]:
            taken[name].append(steps[name]())
    return {name: each[WARM_UP:] for name, each in taken.items()}


def ratios(taken: Mapping[str, Sequence[Seconds]], turns: int) -> dict[str, list[float]]:
    """By name of each step but `none`, its ratio to that in each turn; by `NAME_update`, that of its update."""
    found = dict[str, list[float]]()
    for name, each in taken.items():
        for which, what in enumerate((name, f"{name}_update")):
            found[what] = figures.parts([a[which] / b[which] for a, b in zip(each, taken["none"], strict=True)], turns)
    return {what: values for what, values in found.items() if what not in ("none", "none_update")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--steps", type=int, default=4, help="of each in a turn (4)")
    figures.add_option(parser, turns=3)
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # prices on a CPU
    parts = options.only or [name for name in PARTS if name != "compile"]
    compiler = os.environ.get("CXX", "g++")
    if "compile" in parts and not shutil.which(compiler):
        figures.unable(f"compile: there is no {compiler}; install a C++ compiler, or name one by CXX")
    found = dict[str, list[float]]()
    with engines.process_group():
        torch.set_num_threads(1)
        for part in parts:
            steps = {name: make() for name, make in PARTS[part].items()}
            taken = measured(steps, options.turns * options.steps)
            of_part = ratios(taken, options.turns)
            found |= of_part
            step, update = (statistics.median(column) for column in zip(*taken["none"], strict=True))
            print(json.dumps({"what": f"{part}, none", "seconds": round(step, 3), "of which update": round(update, 3)}))
            for name in list(steps)[1:]:
                step, update = (statistics.median(of_part[what]) for what in (name, f"{name}_update"))
                print(json.dumps({"what": name, "step": round(step, 3), "update": round(update, 3)}), flush=True)
    figures.write(options.figures, found)


if __name__ == "__main__":
    main()
