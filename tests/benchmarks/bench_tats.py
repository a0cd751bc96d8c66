"""How fast a TATS draws tokens, and its VQGAN trains: each beside something known, in turns, in one run.

    python tests/benchmarks/bench_tats.py [--only NAME…] [--turns 5] [--threads 1]

cache      1,024 tokens with the cache of keys and values, beside reading all of them anew for each: target 10 times as fast.
           That takes a minute: of N turns each reads anew for every N-th token, from another on, and counts it N times
hierarchy  a video of 257 latent frames, the paper's 1,024 frames, by anchors and gaps, beside drawing all one after the other:
           3 times; and by models of one GPU's size (`hierarchy_small`, one turn of some 6 minutes), whose weights are read
           once for all gaps
peer       tokens a second beside a GPT-2 of `transformers` of equal depth, width and heads that generates with its cache, by
           the same top-k and top-p: 1.0 times
step       a step of the VQGAN's training in the loop, beside a plain PyTorch loop with the same model and batch: at most
           1.03 times as long; and with the discriminators (`step_gan`), which the plain loop trains in turns by hand
codebook   a training step of 4,096 codes beside that of vector-quantize-pytorch with its k-means, which must be installed
           (`pip install vector-quantize-pytorch`); asked for by name alone

A line of JSON each: medians over the turns of CPU seconds, and the median of the turns' ratios. With more `--threads`
than one they are seconds of the clock: nothing else may run beside it then.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import figures
import torch
import torch.nn.functional as F

from longtake.datasets.loader import to_model
from longtake.training import engines
from longtake.training.loop import train
from longtake.training.models.common import patchgan
from longtake.training.models.generator import Settings
from longtake.training.models.tats import pretrain
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import config_from_preset
from longtake.training.models.tats.rollout import Rollout, continued
from longtake.training.models.tats.vqgan import VQGAN
from longtake.training.models.tats.vqgan_losses import Discriminators, judging, pleasing
from longtake.training.objective import Objective

WARM_UP = 5  # steps
SETTINGS = Settings(top_k=256, top_p=0.8)
CODES = 1024
RATIOS = "ratios"  # those of each turn, for `--figures`


def model(shape: tuple[int, int, int], mode: Any = "base", preset: Any = "tats_tiny") -> TATS:
    torch.manual_seed(0)
    return TATS(config_from_preset(preset, codes=CODES, shape=shape, mode=mode)).eval()


def clocked(work: Callable[[], Any]) -> float:
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    work()
    return now() - start


def compared(
    ours: Callable[[], Any], theirs: Callable[[], Any], turns: int, warm_up: int = 1, parts: int = 1
) -> dict[str, Any]:
    """Seconds of both, in turns, and by how much ours is faster. A call of `theirs` does one of so many equal parts."""
    taken = [(clocked(ours), parts * clocked(theirs)) for _ in range(warm_up + turns)][warm_up:]
    first, second = (statistics.median(column) for column in zip(*taken, strict=True))
    ratios = [b / a for a, b in taken]
    found = {"seconds": first, "seconds_other": second, "times_as_fast": statistics.median(ratios), "turns": turns}
    return found | {RATIOS: ratios}


def cache(turns: int) -> dict[str, Any]:
    tats, count = model((4, 16, 16)), 1024
    uniforms, nothing = torch.rand(1, count), torch.zeros(1, 0, dtype=torch.long)
    tokens, firsts = torch.randint(CODES, (1, count)), iter(range(turns))

    @torch.no_grad()
    def uncached() -> None:
        for length in range(next(firsts), count, turns):
            tats(tokens[:, :length], last=1)[:, -1].argmax(-1)

    cached = partial(continued, tats, nothing, uniforms, SETTINGS)
    return compared(cached, uncached, turns, warm_up=0, parts=turns)


def hierarchy(turns: int, preset: str = "tats_tiny", latents: int = 257) -> dict[str, Any]:
    base, anchors = model((4, 8, 8), preset=preset), model((16, 8, 8), "anchors", preset)
    gaps = model((5, 8, 8), "interpolate", preset)
    plain, hierarchical = Rollout(base, [0], SETTINGS), Rollout(gaps, [0], SETTINGS, anchors)
    return compared(lambda: list(hierarchical.tokens(latents)), lambda: list(plain.tokens(latents)), turns, warm_up=0)


def peer(turns: int) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    tats, count = model((4, 8, 8)), 256
    config = tats.config
    sizes = {"n_embd": config.width, "n_layer": config.depth, "n_head": config.heads, "n_positions": count + 1}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": None}
    gpt2: Any = GPT2LMHeadModel(GPT2Config(vocab_size=CODES, **sizes, **quiet)).eval()
    uniforms, nothing = torch.rand(1, count), torch.zeros(1, 0, dtype=torch.long)
    drawing = {"do_sample": True, "top_k": SETTINGS.top_k, "top_p": SETTINGS.top_p, "pad_token_id": 0}

    def theirs() -> None:
        start = torch.zeros(1, 1, dtype=torch.long)
        gpt2.generate(start, max_new_tokens=count, min_new_tokens=count, **drawing)

    found = compared(lambda: continued(tats, nothing, uniforms, SETTINGS), theirs, turns)
    rates = {"tokens_a_second": count / found["seconds"], "tokens_a_second_other": count / found["seconds_other"]}
    return found | rates


class Turns:
    """A stream of one batch; before each, a step of the plain loop. What passes until it is asked again is the loop's step."""

    def __init__(self, config: pretrain.Config, video: torch.Tensor) -> None:
        self.config, self.video, self.plain, self.ours = config, video, list[float](), list[float]()
        torch.manual_seed(0)
        self.model = VQGAN(config.vae())
        self.judges = judges_of(config) if config.lambda_gan else None
        modules = [self.model, *([self.judges] if self.judges else [])]
        rates: Any = {"lr": config.lr, "betas": config.betas, "weight_decay": 0.0}
        self.optimizers = {module: torch.optim.AdamW(module.parameters(), **rates) for module in modules}

    def learn(self, module: torch.nn.Module, loss: torch.Tensor) -> None:
        """A step of a module."""
        self.optimizers[module].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.config.gradient_clip)
        self.optimizers[module].step()
        loss.item()

    def step(self) -> None:
        """A step of the plain loop."""
        config, video = self.config, to_model(self.video)
        made, _, commitment, _ = self.model(video)
        loss = config.lambda_l1 * F.l1_loss(made, video) / 2 + config.vae().commitment * commitment
        if self.judges is None:
            return self.learn(self.model, loss)
        numbers = torch.randint(video.shape[2], (len(video),))
        self.judges.requires_grad_(False)
        hinge, matching = pleasing(self.judges, made, video, numbers)
        self.learn(self.model, loss + config.lambda_gan * (hinge + config.lambda_features * matching))
        self.judges.requires_grad_(True)
        self.learn(self.judges, config.lambda_gan * judging(self.judges, made.detach(), video, numbers)[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            start = time.process_time()
            self.step()
            given = time.process_time()
            self.plain.append(given - start)
            yield {"video": self.video, "key": ["none"] * len(self.video)}
            self.ours.append(time.process_time() - given)

    def state_dict(self) -> dict[str, Any]:
        return {}


def judges_of(config: pretrain.Config) -> Discriminators:
    torch.manual_seed(1)
    return Discriminators(patchgan.config_from_preset(**config.discriminator))


def step(turns: int, lambda_gan: float = 0.0) -> dict[str, Any]:
    """A turn is ten steps."""
    steps = WARM_UP + 10 * turns
    config = pretrain.Config(
        kind="pretrain_vqgan", dataset="none", model={"preset": "vqgan_tiny"}, size=(64, 64), batch=4, steps=steps,
        warm_steps=0, lambda_gan=lambda_gan, gan_start=0, discriminator={"preset": "patchgan_tiny"}, lr=1e-4,
        run={"checkpoint_every": steps, "sample_every": 0, "heldout_every": 0},
    )  # fmt: skip
    video = torch.randint(256, (config.batch, 3, config.frames, *config.size), dtype=torch.uint8)
    steps_taken = Turns(config, video)
    torch.manual_seed(0)
    modules: dict[str, torch.nn.Module] = {"generator": VQGAN(config.vae())}
    modules |= {"discriminator": judges_of(config)} if lambda_gan else {}
    objective = Objective(modules, partial(pretrain._loss, config, None), lead="generator")
    with engines.process_group(), tempfile.TemporaryDirectory() as folder:
        stream: Any = steps_taken
        train(objective, stream, config, Path(folder))
    ours, plain = steps_taken.ours[WARM_UP:], steps_taken.plain[WARM_UP:]
    ratios = [a / b for a, b in zip(ours, plain, strict=False)]
    seconds = {"seconds": statistics.median(ours), "seconds_plain": statistics.median(plain)}
    return seconds | {"times_as_long": statistics.median(ratios), RATIOS: figures.parts(ratios, turns)}


def codebook(turns: int) -> dict[str, Any]:
    from vector_quantize_pytorch import VectorQuantize

    from longtake.training.models.tats.codebook import Codebook

    codes, width, shape = 4096, 256, (4, 4, 16, 16)
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3 * codes // 4, width, generator=draw)

    def latents() -> torch.Tensor:
        rows = centres[torch.randint(len(centres), shape, generator=draw)]
        return (rows + 0.3 * torch.randn(*shape, width, generator=draw)).movedim(-1, 1)

    ours = Codebook(codes, width, decay=0.99, restart=0.0)
    theirs = VectorQuantize(dim=width, codebook_size=codes, decay=0.99, kmeans_init=True)
    batches = [latents() for _ in range(2 + turns)]
    mine, other = iter(batches), iter(batches)
    found: dict[str, Any] = compared(
        lambda: ours(next(mine)), lambda: theirs(next(other).movedim(1, -1).flatten(1, 3)), turns
    )
    z = batches[-1]
    made = {
        "": ours.eval()(z)[0],
        "_other": theirs.eval()(z.movedim(1, -1).flatten(1, 3))[0].view(*shape, width).movedim(-1, 1),
    }
    return found | {f"error{name}": float((each - z).square().mean() / z.var()) for name, each in made.items()}


def main() -> None:
    def small(_: int) -> dict[str, Any]:
        return hierarchy(1, "tats_small")

    works = {"cache": cache, "hierarchy": hierarchy, "hierarchy_small": small, "peer": peer, "step": step}
    works["codebook"] = codebook
    works["step_gan"] = partial(step, lambda_gan=1.0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=works)
    parser.add_argument("--threads", type=int, default=1)
    figures.add_option(parser, turns=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ratios = {}
    for name in options.only or [name for name in works if name != "codebook"]:
        found = works[name](options.turns)
        ratios[name] = found.pop(RATIOS)
        print(json.dumps({"what": name} | found), flush=True)
    figures.write(options.figures, ratios)


if __name__ == "__main__":
    main()
