"""The arms of the ablation of MAVIN: their data, their training by the stage's own code, and gaps filled by them."""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor
from toys import SIZE, Mixture, sprites

from longtake.datasets.loader import to_model
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.models.generator import InfillSettings
from longtake.training.models.mavin import encode, finetune, infill
from longtake.training.models.mavin.guidance import boundary_tokens
from longtake.training.models.mavin.mixer import Mixer, initial

ARMS: dict[str, dict[str, Any]] = {
    "variable": {},
    "fixed": {"spans": {"kind": "fixed", "length": 8}},
    "random": {"spans": {"kind": "random"}, "image": None},
    "blind": {"image": None},
}
MODEL = {"preset": "mavin_tiny", "width": 64, "heads": 2, "patch": 4}
FRAMES, SPANS = 20, {"starts": (4, 9), "ends": (11, 16)}
SPEEDS, TURNS = (0.8, 1.4), (8, 12)  # of sprites; of held-out ones the turn is within the gap
BATCH = 32  # windows filled at once
PLAIN = Mixer()  # noise alone


def draw(count: int, frames: int, seed: int) -> Tensor:
    """Sprites to train on, none of which is held out."""
    return sprites(count, frames, seed, False, SPEEDS, (4, frames - 4)).video


def heldout(options: argparse.Namespace, seed: int, count: int) -> dict[str, Tensor]:
    """Held-out windows, `(count, 3, FRAMES, 16, 16)` uint8, and half as many of footage; sprites turn within the gap."""
    turning = sprites(count, FRAMES, 2_000_000 + seed, True, SPEEDS, TURNS).video
    return {"sprites": turning, "footage": options.heldout[: (count + 1) // 2, :, :FRAMES]}


class Trained(NamedTuple):
    config: finetune.Config
    setup: finetune.Setup


def trained(options: argparse.Namespace, arm: str, seed: int, stream: Any = None) -> Trained:
    """The model of an arm, trained to the end by the stage's own code, on sprites and footage or on another stream."""
    changes = ARMS[arm]
    image = changes.get("image", "own")
    config = finetune.Config(
        kind="finetune_mavin", dataset=options.dataset, image=image, frames=FRAMES, size=(SIZE, SIZE), seed=seed,
        model=MODEL, spans=SPANS | changes.get("spans", {}), steps=options.steps, batch=16,
        lr=options.lr, schedule="cosine", warmup_steps=20, ema_half_lives=(50,), sample_steps=options.sample_steps, least_similarity=-1,
        run={"workers": 0, "sample_every": 0, "heldout_every": 0, "checkpoint_every": 250, "keep_checkpoints": 1},
    )  # fmt: skip
    folder = options.out / f"T-{arm}-{seed}"
    torch.manual_seed(seed)
    setup = finetune.prepare(config, {"dataset": options.dataset}, folder)
    setup.model.train()
    stream = stream or Mixture(options.films, draw, FRAMES, config.batch, seed)
    train(finetune.objective(config, setup), stream, config, folder)
    setup.model.load_state_dict(checkpoint.trained(folder, config))
    setup.model.eval()
    return Trained(config, setup)


def span_of(length: int) -> tuple[int, int]:
    """A gap in the middle of a window, (first frame, one after the last)."""
    return (FRAMES - length) // 2, (FRAMES + length) // 2


def tokens_of(setup: finetune.Setup, video: Tensor, span: tuple[int, int]) -> Tensor | None:
    """What a model sees of the frames beside the gap, `(B, 2, K, E)`."""
    if setup.encoder is None:
        return None
    return boundary_tokens(setup.encoder, encode.boundary_frames(setup.codec, video, [span] * len(video)))


@torch.no_grad()
def filled(one: Trained, windows: Tensor, length: int, seed: int, mixer: Mixer = PLAIN) -> Tensor:
    """Windows `(N, 3, T, H, W)` uint8 with their gap filled, in [-1, 1]."""
    model, (begin, end), made = one.setup.model, span_of(length), []
    for first in range(0, len(windows), BATCH):
        video = to_model(windows[first : first + BATCH].to(engines.device()))
        x0 = model.normalise(encode.encode_windows(one.setup.codec, video, [(begin, end)] * len(video)))
        before, after = x0[:, :, :begin], x0[:, :, end:]
        noise = [
            initial(mixer, left, right, length, (seed, first + number))
            for number, (left, right) in enumerate(zip(before, after, strict=True))
        ]
        hints = infill.Hints(image=tokens_of(one.setup, video, (begin, end)))
        settings = InfillSettings(steps=one.config.sample_steps)
        whole = infill.sample(model, before, after, torch.stack(noise), hints, settings, model.config.clean_time)
        gap = model.denormalise(whole[:, :, begin:end]).clamp(-1, 1)
        made.append(torch.cat([video[:, :, :begin], gap, video[:, :, end:]], dim=2).cpu())
    return torch.cat(made)
