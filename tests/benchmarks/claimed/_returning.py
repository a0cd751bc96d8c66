"""What the memory's claims learn from and are measured by: films of the world `return`, in memory, encoded once.

A film's latents stand for two frames each, half a second. Films differ in how long the squares are out of sight; each batch
is of films of one length and of segments at one place, so that none of it is padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from toys import Batches

from claimed import alone
from longtake.datasets import storage
from longtake.datasets.latents import shrunk
from longtake.datasets.loader import to_model
from longtake.infra import worlds
from longtake.infra.worlds import returning
from longtake.training import checkpoint, engines
from longtake.training.loop import train
from longtake.training.models.generator import Settings
from longtake.training.models.memory import retrieval, segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.retrieval import Video
from longtake.training.models.pv_vae import pretrain as pretrain_vae
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.objective import Objective
from longtake.training.registry import disk

AWAYS = {"grey": (1, 4, 12), "squares": (4,)}  # seconds that films are away for, by what is on the wall
SIZE, FPS, FACTOR = 32, 4, 2  # pixels a side, frames a second and of a latent
FILM = {"look": 1.25, "turn": 1.0, "size": SIZE, "fps": FPS}  # what comes back is one segment
SEGMENT, WINDOW = 4, 3  # latents that are generated at once, and that are seen beside the memory
HISTORY = 40  # latents; no film is longer
BATCH = 16
# towards noise, where a square's colour cannot be seen: it must come from what the model is given
SHIFT = 4.0
SHRINKS = (2, 4)  # of the low-res branches
MODEL: Mapping[str, Any] = {
    "preset": "memory_dit_tiny", "depth": 3, "width": 96, "heads": 3, "memory_widths": [16, 32, 64, 128], "window": WINDOW,
}  # fmt: skip
VAE: Mapping[str, Any] = {
    "preset": "pv_vae_tiny", "patch": 4, "multipliers": (1, 2), "temporal_downs": 1, "latent_channels": 12,
    "encoder_width": 24, "decoder_width": 32,
}  # fmt: skip


class Films(NamedTuple):
    """Films that are out of sight equally long.

    pixels  uint8 (N, 3, T, SIZE, SIZE)
    truths  of the world, a film each
    high    (N, C, t, h, w), latents as the autoencoder makes them
    low     the same of the films scaled down, by the factor
    """

    pixels: Tensor
    truths: list[Mapping[str, Any]]
    high: Tensor
    low: Mapping[int, Tensor]


def drawn(wall: str, away: float, count: int, heldout: bool) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """Pixels of whole latents and truths of `count` films."""
    render = worlds.load("return").render
    made = [render(seed, heldout, wall=wall, away=away, **FILM) for seed in range(count)]
    frames = (made[0].length - 1) // FACTOR * FACTOR + 1
    pixels = np.stack([np.stack(list(video.frames))[:frames] for video in made])
    return torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).contiguous(), [video.truth for video in made]


class Windows(Batches):
    """Batches of random windows of films, of pixels."""

    def __init__(self, films: list[Tensor], frames: int, batch: int, seed: int) -> None:
        super().__init__(seed)
        self._films, self._frames, self._batch = films, frames, batch

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        rows = []
        for _ in range(self._batch):
            films = self._films[int(rng.integers(len(self._films)))]
            begin = int(rng.integers(films.shape[2] - self._frames + 1))
            rows.append(films[int(rng.integers(len(films))), :, begin : begin + self._frames])
        return {"video": torch.stack(rows), "key": [str(n) for n in range(self._batch)]}


class Stretches(Batches):
    """Batches of segments and all that came before them, as `longtake.datasets.loader` makes them.

    Most segments are those in which the squares come back; the others are anywhere.
    """

    def __init__(self, films: Mapping[float, Films], shrink: int | None, batch: int, seed: int) -> None:
        super().__init__(seed)
        self._films, self._shrink, self._batch = films, shrink, batch

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        films = self._films[list(self._films)[int(rng.integers(len(self._films)))]]
        total = films.high.shape[2]
        back = given(films.truths[0])
        begin = back if rng.random() < 0.75 else 2 * int(rng.integers((total - SEGMENT) // 2 + 1))
        return batch_of(films, rng.integers(len(films.high), size=self._batch), begin, self._shrink)


def given(truth: Mapping[str, Any]) -> int:
    """Latents before the squares come back into sight, an even number, so that they fill groups of any rate."""
    return (1 + (truth["away"][1] - 1) // FACTOR) // 2 * 2


def batch_of(films: Films, rows: np.ndarray[Any, Any], begin: int, shrink: int | None) -> dict[str, Any]:
    """A batch of the segments of some films that begin at a latent."""
    count = torch.full((len(rows),), begin)
    batch = {"key": [str(row) for row in rows.tolist()], "history_steps": count, "stream_step": count}
    for name, latents in {"latent": films.high, **({"low": films.low[shrink]} if shrink else {})}.items():
        both = torch.stack([latents[rows], torch.full_like(latents[rows], -30.0)], dim=1)
        batch[f"history_{name}"], batch[name] = both[:, :, :, :begin], both[:, :, :, begin : begin + SEGMENT]
    return batch


def autoencoder(folder: Path, wall: str, steps: int) -> PVVAE:
    """The autoencoder of all arms and seeds, trained once on films with such a wall."""
    if (folder / "vae" / "config.json").exists():
        return disk.load(folder / "vae").eval().requires_grad_(False)
    config = pretrain_vae.Config(
        kind="pretrain_vae", dataset="return", model=dict(VAE), frames=9, sizes=((SIZE, SIZE),), steps=steps, batch=8,
        max_drop=0.0, lambda_gan=0.0, lr=2e-3, schedule="cosine", betas=(0.9, 0.99), gradient_clip=0.1, warmup_steps=20,
        ema_half_lives=(20,), run={"sample_every": 0, "heldout_every": 0, "checkpoint_every": 200, "keep_checkpoints": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = PVVAE(config.vae())
    loss = partial(pretrain_vae._loss, config, model.config, None, {})
    stream: Any = Windows([drawn(wall, away, 100, False)[0] for away in AWAYS[wall]], config.frames, config.batch, 0)
    with engines.process_group():
        train(Objective({"generator": model}, loss, lead="generator"), stream, config, folder / "vae-training")
    model.load_state_dict(checkpoint.trained(folder / "vae-training", config))
    disk.save(folder / "vae", "pv_vae", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def films_of(folder: Path, vae: PVVAE, wall: str, away: float, count: int, heldout: bool) -> Films:
    """Films and their latents, from the folder where they have been encoded before."""
    pixels, truths = drawn(wall, away, count, heldout)
    path = folder / f"films-{away:g}-{count}-{'val' if heldout else 'train'}.pt"
    if not path.exists():
        parts: dict[int, list[Tensor]] = {by: [] for by in (1, *SHRINKS)}
        for some in pixels.split(32):
            for by, latents in parts.items():
                latents.append(vae.encode(shrunk(to_model(some), (by, by), vae.config.spatial_stride)).mode())
        with storage.staged(str(path)) as file:
            torch.save({by: torch.cat(latents) for by, latents in parts.items()}, file)
    encoded = torch.load(path)
    return Films(pixels, truths, encoded[1], {by: encoded[by] for by in SHRINKS})


class Material(NamedTuple):
    """The autoencoder, films to learn from and films to be measured by, each by the seconds out of sight."""

    vae: PVVAE
    train: Mapping[float, Films]
    heldout: Mapping[float, Films]


@cache
def material(folder: Path, wall: str, vae_steps: int, train_films: int, heldout_films: int) -> Material:
    """All of it, of films with such a wall, made where it is missing."""
    with alone(folder / "lock"):  # seeds share it
        vae = autoencoder(folder, wall, vae_steps)
        return Material(
            vae,
            {away: films_of(folder, vae, wall, away, train_films, False) for away in AWAYS[wall]},
            {away: films_of(folder, vae, wall, away, heldout_films, True) for away in AWAYS[wall]},
        )


def fresh(made: Material, config: Any, seed: int) -> MemoryDiT:
    """A random model of a config's `model`, with the statistics of the films' latents."""
    torch.manual_seed(seed)
    shape = (SEGMENT, *next(iter(made.heldout.values())).high.shape[3:])
    dit = config.dit(channels=made.vae.config.latent_channels, shape=shape, history=HISTORY)
    model, shrink = MemoryDiT(dit), shrink_of(dit)
    columns = [[films.high for films in made.train.values()]]
    columns += [[films.low[shrink] for films in made.train.values()]] if shrink else []
    moments: list[Tensor] = []
    for column in columns:
        values = torch.cat([latents.transpose(0, 1).flatten(1) for latents in column], dim=1)
        moments += [values.mean(1), values.std(1).clamp_min(1e-3)]
    model.set_statistics(*moments)
    return model


def shrink_of(dit: Any) -> int | None:
    """By how much the low-res branch's films are scaled down; None where there is no such branch."""
    return dit.shrink and dit.shrink[0]


def settings(steps: int, seed: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that both stages share."""
    return {
        "dataset": "return", "latents": "latents", "posterior": "mean", "shift": SHIFT,
        "frames": 1 + (SEGMENT - 1) * FACTOR, "history_seconds": HISTORY * FACTOR / FPS,
        "model": {**MODEL, **model}, "steps": steps, "batch": BATCH, "seed": seed, "lr": 2e-3,
        "schedule": "cosine", "warmup_steps": 50, "ema_half_lives": (50,), "betas": (0.9, 0.99), "gradient_clip": 1.0,
        "run": {"sample_every": 0, "heldout_every": 0, "checkpoint_every": 200, "keep_checkpoints": 1},
    }  # fmt: skip


def trained(stage: Any, config: Any, model: MemoryDiT, made: Material, folder: Path) -> MemoryDiT:
    """The model after a training by the loss of `finetune` or `pretrain`, from the last checkpoint in the folder."""
    stream: Any = Stretches(made.train, shrink_of(model.config), config.batch, config.seed)
    with engines.process_group():
        train(Objective({"model": model}, partial(stage._loss, config, model)), stream, config, folder)
    model.load_state_dict(checkpoint.trained(folder, config))
    return model.eval()


@torch.no_grad()
def returned(
    model: MemoryDiT, made: Material, aways: Sequence[float], pictures: Path, solver_steps: int = 10
) -> dict[str, float]:
    """What the world's reader says of held-out films that the model goes on with from before the squares are in sight again.

    `right K` and `corners K` of films that are out of sight for K seconds, see `returning.read`; and pictures of some.
    """
    found: dict[str, float] = {}
    for away in aways:
        films = made.heldout[away]
        begin, total = given(films.truths[0]), films.high.shape[2]
        chunks = segments.generate(
            model, made.vae, total - begin, list(range(len(films.high))), start=films.high[:, :, :begin],
            settings=Settings(solver_steps, shift=SHIFT),
        )  # fmt: skip
        seen = films.pixels[:, :, : 1 + (begin - 1) * FACTOR].permute(0, 2, 3, 4, 1).numpy()
        videos = np.concatenate([seen, *chunks], axis=1)
        rows = [returning.read(video, truth, FPS) for video, truth in zip(videos, films.truths, strict=True)]
        found |= {f"{name} {away:g}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
        true = films.pixels.permute(0, 2, 3, 4, 1).numpy()
        show(pictures / f"returned-{away:g}.png", true, videos, seen.shape[1])
    return found


def show(path: Path, true: np.ndarray[Any, Any], made: np.ndarray[Any, Any], begin: int, count: int = 6) -> None:
    """A picture of films, true above generated, from the first look on and from `begin` on every second frame."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    times = [0, begin - 1, *range(begin, true.shape[1], 2)]
    rows = [
        np.concatenate(list(video[n, times]), axis=1) for n in range(min(count, len(true))) for video in (true, made)
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


@torch.no_grad()
def bound(made: Material) -> dict[str, float]:
    """What the reader says of the true films, through the autoencoder."""
    found: dict[str, float] = {}
    for away, films in made.heldout.items():
        videos = (made.vae.decode(films.high).clamp(-1, 1) + 1) * 127.5
        rows = [
            returning.read(video.round().byte().permute(1, 2, 3, 0).numpy(), truth, FPS)
            for video, truth in zip(videos, films.truths, strict=True)
        ]
        found |= {f"{name} {away:g}": float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found


@torch.no_grad()
def retrieved(model: MemoryDiT, made: Material, folder: Path, seed: int, count: int) -> dict[str, float]:
    """PSNR and SSIM of `count` held-out films, all of whose latents are retrieved from their memory alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (films,) = made.heldout.values()
    videos = (Video(n, pixels[None], None) for n, pixels in enumerate(films.pixels[:count]))
    summary = retrieval.evaluate(model, made.vae, videos, folder, fps=FPS, seed=seed, solver_steps=10, shift=SHIFT)
    return {name: summary[name] for name in ("psnr", "ssim", "psnr_bound", "tokens")}
