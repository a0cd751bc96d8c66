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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import Rows

from claimed import Claim, Shown, alone, digest
from claimed._moving import RUN, frames_of, ran, sharded
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
SIZE, FPS, FRAMES = 32, 12, 16  # pixels a side, frames a second and of a window
EVERY, NEAR, FAR = 4, 20, 68  # latent frames to an anchor; frames of the hierarchy's windows
STRIDE, CODES, SIDE = 4, 256, 8  # frames of a token, codes, tokens a side
SETTINGS = Settings(top_k=0, top_p=0.95)


class Scale(NamedTuple):
    """How much is done.

    clips      of 8 seconds, to learn from and to measure with
    codes      steps of a VQGAN, the first quarter without its codebook
    steps      of a transformer; of the one that a hierarchy of two is compared with, twice as many
    windows    that a transformer learns from
    videos     that are drawn
    borders    windows of a drawn video; of one of the other claim
    hierarchy
    """

    clips: int = 300
    codes: int = 800
    steps: int = 500
    windows: int = 1024
    videos: int = 32
    borders: int = 8
    hierarchy: int = 16


WHOLE, SHORT = Scale(), Scale(30, 24, 20, 32, 4, 2, 4)
LEARNING: dict[str, Any] = {"batch": 4, "lr": 1e-3, "betas": (0.9, 0.99), "lambda_gan": 0.0}
PREDICTING: dict[str, Any] = {"batch": 16, "lr": 1e-3, "betas": (0.9, 0.95), "ema_half_lives": ()}


def scale_of(short: bool) -> Scale:
    return SHORT if short else WHOLE


def settings(short: bool) -> dict[str, Any]:
    """All that results depend on."""
    sizes = {"size": SIZE, "fps": FPS, "frames": FRAMES, "every": EVERY, "near": NEAR, "far": FAR, "codes": CODES}
    models = {"vqgan": ["vqgan_tiny", LEARNING], "transformer": ["tats_tiny", PREDICTING], "top_p": SETTINGS.top_p}
    return {"world": "endless", **sizes, **models, "scale": scale_of(short)._asdict()}


def shared(folder: Path, short: bool) -> Path:
    """Where the claims keep the data and models that they share."""
    return folder.parent / f"shared-{digest(settings(short))}"


def dataset(folder: Path, short: bool) -> str:
    """Clips of 8 seconds."""
    with alone(folder / "lock"):
        shards = sharded(folder, "endless", scale_of(short).clips, 2 * SIZE, (FAR / FPS, 8), frames=96, fps=FPS)
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
    steps = scale_of(short).codes
    config = pretrain.Config(
        kind="pretrain_vqgan", dataset=data, model={"preset": "vqgan_tiny", "codes": CODES, **BORDERS[arm]}, frames=FRAMES,
        size=(SIZE, SIZE), steps=steps, warm_steps=steps // 4, seed=seed, run=RUN, **LEARNING,
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


def transformer(
    data: str, codes: VQGAN, name: str, mode: Any, frames: int, steps: int, seed: int, folder: Path, short: bool
) -> TATS:
    """A transformer of windows of `frames` frames, each encoded by itself."""
    config = config_from_preset("tats_tiny", codes=CODES, shape=(frames // STRIDE, SIDE, SIDE), mode=mode, every=EVERY)
    with torch.no_grad():
        parts = windows(data, "train", frames, scale_of(short).windows, seed)
        tokens = torch.cat([codes.tokens(video).cpu() for video in parts])
    run = RunConfig(checkpoint_every=100, keep_checkpoints=1)
    training = TrainConfig(steps=steps, warmup_steps=min(20, steps // 2), seed=seed, run=run, **PREDICTING)
    torch.manual_seed(seed)
    model, stream = TATS(config).to(engines.device()), Rows("tokens", tokens, training.batch, seed)
    mine = folder / "models" / f"{name.replace(' ', '-')}-{steps}-{seed}"
    train(Objective({"model": model}, loss_of(config)), stream, training, mine)  # type: ignore[arg-type]
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
    common, scale = shared(folder, short), scale_of(short)
    data = dataset(common, short)
    with engines.process_group():
        codes, found = vqgan(data, arm, seed, common, short)
        model = transformer(data, codes, f"base-{arm}", "base", FRAMES, scale.steps, seed, common, short)
        found["later"] = later(data, codes, model)
        plan = Rollout(model, range(scale.videos), SETTINGS)
        return found | drift(data, codes, plan, scale.borders * FRAMES // STRIDE)


def run_hierarchy(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    common, scale = shared(folder, short), scale_of(short)
    data = dataset(common, short)
    with engines.process_group():
        codes, _ = vqgan(data, "replicated", seed, common, short)

        def learned(mode: str, frames: int, steps: int) -> TATS:
            return transformer(data, codes, mode, mode, frames, steps, seed, common, short)

        if DRAWN[arm]:
            anchors, gaps = learned("anchors", FAR, scale.steps), learned("interpolate", NEAR, scale.steps)
            plan = Rollout(gaps, range(scale.videos), SETTINGS, anchors)
        else:
            plan = Rollout(learned("base", FRAMES, 2 * scale.steps), range(scale.videos), SETTINGS)
        begun = time.process_time()
        found = drift(data, codes, plan, scale.hierarchy * FRAMES // STRIDE)
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
        BORDERS,
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
        settings,
    ),
    Claim(
        "tats",
        "hierarchy",
        "Anchors with what is between them drift less than one latent frame after the other (§2.3 of the paper): 16 windows. "
        "The two transformers of a hierarchy learn for as many steps together as the single one.",
        DRAWN,
        LONG
        | {
            "seconds": Shown(
                "CPU seconds for 32 videos", "lower", "7.5 min, one after the other 30, of 1,024 frames (table 3)"
            )
        },
        [("anchors and gaps", "one after the other", name) for name in ("codes last", "same way")],
        run_hierarchy,
        settings,
    ),
]
