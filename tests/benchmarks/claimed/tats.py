"""TATS (arXiv 2204.03638) in the world of endless textures: tokens that do not know when they are, and videos beyond a window.

borders    a VQGAN whose encoder repeats the frames at the ends of a clip, beside one that adds zeros there: the share of
           equal tokens a latent frame later, above chance (kappa). Then a transformer learns windows of each: what true
           tokens of later windows of a video cost it when they were encoded with the whole video, beside those of the
           window by itself; and what becomes of videos of 8 windows.
hierarchy  videos of 16 windows drawn one latent frame after the other, and by anchors and what is between them.

Held-out combinations of pattern, palette and way are in `val`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from claimed import Claim, Shown
from claimed._moving import RUN, alone, frames_of, ran, sharded
from longtake.datasets.loader import Loader, to_model
from longtake.infra.worlds import endless
from longtake.training import checkpoint, engines
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.data import HELDOUT
from longtake.training.loop import train
from longtake.training.metrics import equivariance
from longtake.training.models.generator import Settings
from longtake.training.models.tats import pretrain
from longtake.training.models.tats.evaluate import heldout_loss
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import TATSConfig, config_from_preset
from longtake.training.models.tats.rollout import Rollout
from longtake.training.models.tats.vqgan import VQGAN
from longtake.training.models.tats.vqgan_evaluate import evaluate
from longtake.training.objective import Objective, Turn

BORDERS: dict[str, dict[str, Any]] = {"replicated": {}, "zeros": {"padding": "zeros"}}
DRAWN = {"one after the other": False, "anchors and gaps": True}
SIZE, FPS, FRAMES = 16, 12, 16  # pixels a side, frames a second and of a window
EVERY, NEAR, FAR = 4, 20, 68  # latent frames to an anchor; frames of the hierarchy's windows
STRIDE, CODES, SIDE = 4, 256, 4  # frames of a token, codes, tokens a side
SETTINGS = Settings(top_k=0, top_p=0.95)


def dataset(folder: Path, short: bool) -> str:
    """Clips of 8 seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        shards = sharded(folder, "endless", 30 if short else 300, 2 * SIZE, (FAR / FPS, 8), frames=96, fps=FPS)
        return str(ran(folder, {"shards": shards})["shards"].uri)


def windows(data: str, split: str, frames: int, count: int, seed: int) -> Iterator[Tensor]:
    """Random windows in batches, `count` in all, in [-1, 1]."""
    options: dict[str, Any] = {"columns": ("video",), "size": (SIZE, SIZE), "batch": 8, "crop": "random", "last": "pad"}
    loader = Loader(data, split, frames=frames, seed=seed, **options)
    for batch in islice(loader, math.ceil(count / 8)):
        yield to_model(batch["video"].to(engines.device()))


# Tokens that do not know when they are.


def vqgan(data: str, arm: str, seed: int, folder: Path, short: bool) -> tuple[VQGAN, dict[str, float]]:
    """A trained VQGAN, and its figures on held-out clips. It first learns without its codebook, for a quarter of the steps."""
    steps = 24 if short else 1200
    config = pretrain.Config(
        kind="pretrain_vqgan", dataset=data, model={"preset": "vqgan_tiny", "codes": CODES, **BORDERS[arm]}, frames=FRAMES,
        size=(SIZE, SIZE), steps=steps, warm_steps=steps // 4, batch=8, lr=1e-3, betas=(0.9, 0.99), lambda_gan=0.0, seed=seed,
        run=RUN,
    )  # fmt: skip
    mine = folder / "models" / f"vqgan-{arm.replace(' ', '-')}-{seed}"
    pictures = mine / "heldout"
    pictures.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    setup = pretrain.prepare(config, {"dataset": data}, mine)
    train(pretrain.objective(config, setup), pretrain.loader(config, setup, 0, 1), config, mine / "checkpoints")
    setup.model.load_state_dict(checkpoint.trained(mine / "checkpoints", config))
    model = setup.model.eval().requires_grad_(False)
    heldout = pretrain._loader(config, setup, "val", **HELDOUT)
    found = evaluate(model, heldout, pictures, seed, 512, shifted=pretrain._shifted(config, setup))
    equal = [value for _, value in found["series"]["equal_tokens_by_step"]]
    figures = {name: float(found[name]) for name in ("kappa", "score_paper", "l1", "perplexity")}
    figures["gain"] = float(found["psnr"] - found["psnr_mean_colour"])
    return model, figures | {"ends": (equal[0] + equal[-1]) / 2, "inside": float(np.mean(equal[1:-1]))}


# Transformers of the tokens.


class Windows:
    """A stream of random batches of windows of tokens that lie in memory."""

    def __init__(self, tokens: Tensor, batch: int, seed: int) -> None:
        self._tokens, self._batch, self._seed, self._batches = tokens, batch, seed, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            rows = np.random.default_rng([self._seed, self._batches]).integers(len(self._tokens), size=self._batch)
            self._batches += 1
            yield {"tokens": self._tokens[rows], "key": [str(row) for row in rows.tolist()]}

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = state["batches"]


def transformer(
    data: str, codes: VQGAN, name: str, mode: Any, frames: int, seed: int, folder: Path, short: bool
) -> TATS:
    """A transformer of windows of `frames` frames, each encoded by itself."""
    config = config_from_preset("tats_tiny", codes=CODES, shape=(frames // STRIDE, SIDE, SIDE), mode=mode, every=EVERY)
    with torch.no_grad():
        parts = windows(data, "train", frames, 32 if short else 1024, seed)
        tokens = torch.cat([codes.tokens(video).cpu() for video in parts])
    steps = 20 if short else 600
    training = TrainConfig(
        steps=steps, batch=16, lr=1e-3, warmup_steps=min(20, steps // 2), betas=(0.9, 0.95), ema_half_lives=(), seed=seed,
        run=RunConfig(checkpoint_every=steps),
    )  # fmt: skip
    torch.manual_seed(seed)
    model, stream = TATS(config).to(engines.device()), Windows(tokens, training.batch, seed)
    mine, learner = folder / "models" / f"{name.replace(' ', '-')}-{seed}", Objective({"model": model}, loss_of(config))
    train(learner, stream, training, mine)  # type: ignore[arg-type]
    model.load_state_dict(checkpoint.trained(mine, training))
    return model.eval()


def loss_of(config: TATSConfig) -> Callable[[Turn], Any]:
    def loss(turn: Turn) -> Any:
        sequence = config.sequence(turn.batch["tokens"])
        logits = turn.engines[turn.name](sequence[:, :-1], last=config.predicted)
        value = F.cross_entropy(logits.float().flatten(0, 1), sequence[:, -config.predicted :].flatten())
        return value, {"loss": value.detach()}

    return loss


@torch.no_grad()
def later(data: str, codes: VQGAN, model: TATS) -> float:
    """What true windows of held-out videos cost more, in nats a token, when they were encoded with the whole video."""
    loader = Loader(data, "val", columns=("video",), frames=FAR, size=(SIZE, SIZE), **HELDOUT)
    length, losses = FRAMES // STRIDE, list[float]()
    for batch in loader:
        video = to_model(batch["video"].to(engines.device()))
        whole = codes.tokens(video)
        for first in range(1, whole.shape[1] - length):
            kept = whole[:, first : first + length]
            by_itself = codes.tokens(video[:, :, first * STRIDE : first * STRIDE + FRAMES])
            pair = [float(heldout_loss(model, {"tokens": each}, None)[0].mean()) for each in (kept, by_itself)]
            losses.append(pair[0] - pair[1])
    return float(np.mean(losses))


def divergence(counts: Tensor, others: Tensor) -> float:
    """KL of how often each code comes, in nats; one is added to each count."""
    p, q = ((each + 1) / (each + 1).sum() for each in (counts, others))
    return float((p * (p / q).log()).sum())


@torch.no_grad()
def drift(data: str, codes: VQGAN, plan: Rollout, latents: int) -> dict[str, float]:
    """What becomes of drawn videos from the first to the last of their pieces of `FRAMES` frames.

    Codes are compared with those of held-out clips; a piece is steady where it moves as the first piece of its video does,
    and keeps its colours where these are nearest to the same palette.
    """
    tokens = torch.cat(list(plan.tokens(latents)), dim=1)
    real = torch.zeros(CODES)
    for video in windows(data, "val", FRAMES, 64, 0):
        real += equivariance.histogram(CODES, codes.tokens(video)).cpu()
    parts = tokens.split(FRAMES // STRIDE, dim=1)
    apart = [divergence(equivariance.histogram(CODES, part).cpu().float(), real) for part in (parts[0], parts[-1])]
    video = torch.cat(list(codes.decode_tokens_stream([tokens], chunk=16)), dim=2).clamp(-1, 1)
    looks = [[endless.look_at(frames_of(each)) for each in one.split(FRAMES, dim=1)] for one in video]
    return {
        "codes first": apart[0],
        "codes last": apart[1],
        "same way": float(np.mean([pieces[-1].way == pieces[0].way for pieces in looks])),
        "same palette": float(np.mean([pieces[-1].palette == pieces[0].palette for pieces in looks])),
    }


def run_borders(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    shared = folder.parent / "shared"
    data = dataset(shared, short)
    with engines.process_group():
        codes, found = vqgan(data, arm, seed, shared, short)
        model = transformer(data, codes, f"base-{arm}", "base", FRAMES, seed, shared, short)
        found["later"] = later(data, codes, model)
        plan = Rollout(model, range(4 if short else 32), SETTINGS)
        return found | drift(data, codes, plan, (2 if short else 8) * FRAMES // STRIDE)


def run_hierarchy(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    shared = folder.parent / "shared"
    data = dataset(shared, short)
    with engines.process_group():
        codes, _ = vqgan(data, "replicated", seed, shared, short)
        if DRAWN[arm]:
            anchors = transformer(data, codes, "anchors", "anchors", FAR, seed, shared, short)
            gaps = transformer(data, codes, "gaps", "interpolate", NEAR, seed, shared, short)
            plan = Rollout(gaps, range(4 if short else 32), SETTINGS, anchors)
        else:
            model = transformer(data, codes, "base-replicated", "base", FRAMES, seed, shared, short)
            plan = Rollout(model, range(4 if short else 32), SETTINGS)
        begun = time.process_time()
        found = drift(data, codes, plan, (4 if short else 16) * FRAMES // STRIDE)
        return found | {"seconds": time.process_time() - begun}


LONG = {
    "codes first": Shown("codes from those of real clips, KL, first window", "lower"),
    "codes last": Shown("the same, last window", "lower"),
    "same way": Shown("last window moves the way of the first", "higher"),
    "same palette": Shown("last window has the palette of the first", "higher"),
}
CLAIMS = [
    Claim(
        "tats",
        "borders",
        "An encoder that repeats frames at the ends of clips makes tokens that do not know when they are, so a transformer "
        "goes on beyond its window (§2.2 of the paper).",
        tuple(BORDERS),
        {
            "kappa": Shown("equal tokens a latent frame later, above chance (kappa)", "higher"),
            "score_paper": Shown("their share, as the paper counts", "higher", "0.75 for replicated (§A.3)"),
            "ends": Shown("share at the ends of clips", "higher"),
            "inside": Shown("share inside of clips", "higher"),
            "l1": Shown("error of held-out clips, L1", "lower"),
            "gain": Shown("its PSNR above that of each clip's mean colour, dB", "higher"),
            "perplexity": Shown("codes in use, perplexity", "higher"),
            "later": Shown("nats more for windows of a long video than for clips", "lower"),
            **LONG,
        },
        [("replicated", "zeros", name) for name in ("kappa", "ends", "later", "codes last")],
        run_borders,
    ),
    Claim(
        "tats",
        "hierarchy",
        "Anchors with what is between them drift less than one latent frame after the other (§2.3 of the paper): 16 windows.",
        tuple(DRAWN),
        LONG | {"seconds": Shown("CPU seconds for 32 videos", "lower")},
        [("anchors and gaps", "one after the other", name) for name in ("codes last", "same way")],
        run_hierarchy,
    ),
]
