"""A step of `finetune_backbone` on a Wan against a bare PyTorch loop over diffusers' own class, in turns, in one run.

    python tests/benchmarks/bench_backbone_step.py              # two CPU cores, some minutes
    python tests/benchmarks/bench_backbone_step.py --width 1536 --layers 30 --latents 21 60 104 --precision bf16   # a GPU

Both have the same weights, latents, texts and AdamW. Prints medians over the steps;
the goal is a ratio of 1.03 at most. Turns are parts of the steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import figures
import torch
import torch.nn.functional as F

from longtake.training import engines
from longtake.training.config import RunConfig
from longtake.training.foreign.backbone import Backbone
from longtake.training.foreign.backbone_config import BackboneConfig
from longtake.training.loop import train
from longtake.training.models.backbone.base import Setup
from longtake.training.models.backbone.finetune import Config, _loss
from longtake.training.objective import Objective
from longtake.training.target import LatentTarget

WARM_UP, TEXT, TOKENS, SHIFT = 3, 512, 100, 3.0
Seconds = tuple[float, float]  # of the wall's clock, and of the CPU


def made(options: argparse.Namespace) -> Backbone:
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": options.width // 128,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT,
        "ffn_dim": 4 * options.width,
        "num_layers": options.layers,
    }
    config = BackboneConfig(class_name="WanTransformer3DModel", settings=settings, text_dropout=0.0)
    backbone = Backbone(config).train()
    backbone.set_empty(torch.zeros(1, TEXT))
    return backbone.to(engines.device())


def now() -> Seconds:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class Turns:
    """A stream of one batch; before each, a step of the bare loop. What passes until it is asked again is the stage's step."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = engines.device()
        self.bare, self.ours = list[Seconds](), list[Seconds]()
        latent = torch.randn(options.batch, 2, 16, *options.latents, device=device)
        text = torch.randn(options.batch, TOKENS, TEXT, device=device).bfloat16()
        mask = torch.ones(options.batch, TOKENS, dtype=torch.bool, device=device)
        self.batch = {"latent": latent, "text": text, "text_mask": mask, "key": ["none"] * options.batch}
        self.dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        self.net: Any = made(options).net.to(self.dtype)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)

    def step(self) -> None:
        x0 = self.batch["latent"][:, 0]
        text = F.pad(self.batch["text"], (0, 0, 0, 512 - TOKENS)).to(self.dtype)
        t = torch.randn(len(x0), device=x0.device).sigmoid()
        t = SHIFT * t / (1 + (SHIFT - 1) * t)
        noise, at = torch.randn_like(x0), t.view(-1, 1, 1, 1, 1)
        x = ((1 - at) * x0 + at * noise).to(self.dtype)
        velocity = self.net(x, 1000 * t, text, return_dict=False)[0]
        loss = (velocity.float() - (noise - x0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        float(loss)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            start = now()
            self.step()
            given = now()
            self.bare.append((given[0] - start[0], given[1] - start[1]))
            yield self.batch
            end = now()
            self.ours.append((end[0] - given[0], end[1] - given[1]))

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What is printed, and the ratios of each turn by clock."""
    turns, backbone = Turns(options), made(options)
    names = dict.fromkeys(("dataset", "latents", "text", "base"), "none")
    config = Config(
        kind="finetune_backbone",
        **names,
        shift=SHIFT,
        text_dropout=0.0,
        precision=options.precision,
        steps=options.steps,
        batch=options.batch,
        run=RunConfig(checkpoint_every=options.steps, log_every=10),
    )
    frames, height, width = options.latents
    nothing: Any = None
    target = LatentTarget(nothing, 16, (frames, height, width), 16.0, nothing, "mean", 1.0)
    setup = Setup({}, target, nothing, None, backbone, {}, 0.0)
    stream: Any = turns
    with tempfile.TemporaryDirectory() as folder:
        train(Objective({"model": backbone}, partial(_loss, config, setup)), stream, config, Path(folder))
    found: dict[str, Any] = {"tokens": options.batch * frames * height * width // 4, "steps": options.steps}
    ratios = {}
    for which, clock in enumerate(("wall", "cpu")):
        each = zip(turns.ours[WARM_UP:], turns.bare[WARM_UP:], strict=False)
        ratios[clock] = figures.parts([a[which] / b[which] for a, b in each], options.turns)
        bare, ours = (statistics.median(t[which] for t in times[WARM_UP:]) for times in (turns.bare, turns.ours))
        found |= {f"{clock}_bare_ms": 1e3 * bare, f"{clock}_ours_ms": 1e3 * ours, f"{clock}_ratio": ours / bare}
    return found, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--latents", type=int, nargs=3, default=(5, 16, 16), help="Frames, height, width.")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    figures.add_option(parser, turns=3)
    options = parser.parse_args()
    with engines.process_group():
        torch.set_num_threads(1)
        found, ratios = measure(options)
        print(json.dumps(found), flush=True)
        figures.write(options.figures, ratios)


if __name__ == "__main__":
    main()
