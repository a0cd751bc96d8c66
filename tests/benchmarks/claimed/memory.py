"""The claims of the paper on a memory of the past (arXiv 2512.23851), on films of the world `return`.

return       goes on with films from before the squares are in sight again: what they were is nowhere but in the memory
pretraining  the same, in fewer steps, from a memory that has learned to retrieve and from a new one
retrieval    films with a wall full of squares, retrieved from their memory alone: by rate, by a patchifier, with one branch

Each arm of a seed trains by the losses of `finetune_memory_prior` and `pretrain_memory`, on the latents of an autoencoder
that all arms and seeds share.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from claimed import Claim, Shown, digest
from claimed import _returning as films
from longtake.datasets import storage
from longtake.training.models.memory import finetune, pretrain
from longtake.training.models.memory.dit import MemoryDiT


class Scale(NamedTuple):
    """How much is trained and measured; `continued` are the steps after a pretraining at which it is measured."""

    vae_steps: int
    train_films: int
    heldout_films: int
    steps: int
    retrieved: int
    continued: tuple[int, ...]


WHOLE, SHORT = Scale(350, 200, 32, 600, 600, (20, 40, 80)), Scale(20, 8, 2, 4, 4, (1, 2, 3))
RETURN: Mapping[str, Mapping[str, Any]] = {
    "memory": {"rates": ["2x2x2"]},
    "FramePack": {"memory": "framepack"},
    "last latents": {"memory": "none"},
}
LONGEST = films.AWAYS["grey"][-1:]  # seconds beyond any window
AFTER = ("early", "later", "late")  # names of the figures at `Scale.continued`
# consistency of characters, the paper's own figure of what a memory keeps
CHARACTERS = "80.19, frozen 61.42, not pretrained 52.64 (consistency of characters)"
KEPT = "80.19 at 4x4x2 (consistency of characters, table of ablations)"
# after a pretraining
CONTINUED = {"schedule": "constant", "warmup_steps": 10, "ema_half_lives": (20,)}
PRETRAINING = ("pretrained", "pretrained, frozen", "not pretrained")
RETRIEVAL: Mapping[str, Mapping[str, Any]] = {
    "2x2x1": {"rates": ["2x2x1"]},
    "2x2x2": {"rates": ["2x2x2"]},
    "4x4x2": {"rates": ["4x4x2"]},
    "4x4x2, a large patchifier": {"rates": ["4x4x2"], "memory": "patchify"},
    "4x4x2, low-res branch only": {"rates": ["4x4x2"], "branches": "low"},
    "4x4x2, high-res branch only": {"rates": ["4x4x2"], "branches": "high"},
}


def shared(short: bool, wall: str) -> dict[str, Any]:
    """Settings of the films with such a wall, and of their autoencoder."""
    scale = SHORT if short else WHOLE
    return {
        "wall": wall, "away": films.AWAYS[wall], "film": films.FILM, "vae": films.VAE, "vae_steps": scale.vae_steps,
        "train_films": scale.train_films, "heldout_films": scale.heldout_films,
    }  # fmt: skip


def settings(short: bool, wall: str, *more: str) -> dict[str, Any]:
    """Settings of a claim: those of its films, of the scale, and of each training."""
    scale = SHORT if short else WHOLE
    training = films.settings(scale.steps, 0, {})
    training.pop("seed")
    return shared(short, wall) | {"training": training} | {name: getattr(scale, name) for name in more}


def material(folder: Path, short: bool, wall: str) -> tuple[Scale, films.Material]:
    """Films and their autoencoder, which the claims of a wall share: they are beside the folder of a claim."""
    scale = SHORT if short else WHOLE
    sizes = (scale.vae_steps, scale.train_films, scale.heldout_films)
    return scale, films.material(folder.parent / f"films-{wall}-{digest(shared(short, wall))}", wall, *sizes)


def place(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm.replace(',', '').replace(' ', '-')}-{seed}"


def returns(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    scale, made = material(folder, short, "grey")
    if arm == "autoencoder alone":
        return films.bound(made)
    config = finetune.Config(kind="finetune_memory_prior", **films.settings(scale.steps, seed, RETURN[arm]))
    here = place(folder, arm, seed)
    model = films.trained(finetune, config, films.fresh(made, config, seed), made, here)
    return films.returned(model, made, films.AWAYS["grey"], here)


def retriever(made: films.Material, steps: int, seed: int, model: Mapping[str, Any], folder: Path) -> MemoryDiT:
    """A model that has learned to retrieve latents of films from their memory."""
    config = pretrain.Config(kind="pretrain_memory", **films.settings(steps, seed, model))
    return films.trained(pretrain, config, films.fresh(made, config, seed), made, folder)


def pretraining(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    scale, made = material(folder, short, "grey")
    rates, here = RETURN["memory"], place(folder, arm, seed)
    base = retriever(made, scale.retrieved, seed, rates, place(folder, "retriever", seed)).state_dict()
    if arm == "not pretrained":
        base = {name: value for name, value in base.items() if not name.startswith("memory.")}
    chosen = films.settings(scale.continued[-1], seed, rates) | CONTINUED
    if arm == "pretrained, frozen":
        chosen["freeze"] = ["memory"]
    config = finetune.Config(kind="finetune_memory_prior", **chosen)
    model, file = films.fresh(made, config, seed), here / "found.json"
    model.load_state_dict(base, strict=False)
    # a training that goes on has no way back to what it was after fewer steps
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for steps, name in zip(scale.continued, AFTER, strict=True):
        if name not in found:
            model = films.trained(finetune, config.model_copy(update={"steps": steps}), model, made, here)
            found[name] = films.returned(model, made, LONGEST, here / str(steps))[f"right {LONGEST[0]}"]
            storage.write(str(file), json.dumps(found).encode())
    return found


def retrieval(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    scale, made = material(folder, short, "squares")
    here = place(folder, arm, seed)
    model = retriever(made, scale.retrieved, seed, RETRIEVAL[arm], here)
    return films.retrieved(model, made, here / "heldout", seed, 2 if short else 12)


AWAY = {away: f"away for {away} s" for away in films.AWAYS["grey"]}
RETURNED = {
    **{
        f"right {away}": Shown(
            f"squares in their places and colours, {told}", "higher", KEPT if away in LONGEST else ""
        )
        for away, told in AWAY.items()
    },
    **{f"corners {away}": Shown(f"corners empty or not as before, {told}", "higher") for away, told in AWAY.items()},
}
BEYOND = f"right {LONGEST[0]}"
CLAIMS = (
    Claim(
        "memory",
        "return",
        "What comes back into sight is as it was, since the memory holds it; what only sees the last latents, or has dropped"
        " the first ones, invents it (section 1). By chance 1/8 of the squares and 5/8 of the corners are right.",
        {**RETURN, "autoencoder alone": None},
        RETURNED,
        (("memory", "last latents", BEYOND), ("memory", "FramePack", BEYOND)),
        returns,
        partial(settings, wall="grey"),
    ),
    Claim(
        "memory",
        "pretraining",
        "A memory that has learned to retrieve holds together what it is then to continue; one that has not learned it finds"
        " less of it in as many steps (table of ablations).",
        dict.fromkeys(PRETRAINING),
        {
            name: Shown(
                f"squares in their places and colours, {AWAY[LONGEST[0]]}, after {steps} steps", "higher", CHARACTERS
            )
            for name, steps in zip(AFTER, WHOLE.continued, strict=True)
        },
        tuple(("pretrained", "not pretrained", name) for name in AFTER),
        pretraining,
        lambda short: settings(short, "grey", "retrieved", "continued") | {"continuing": CONTINUED},
    ),
    Claim(
        "memory",
        "retrieval",
        "The lower the rate, the better frames are retrieved; φ keeps more than a large patchifier with as many tokens, and"
        " both branches more than one (table of reconstruction).",
        RETRIEVAL,
        {
            "psnr": Shown(
                "PSNR of retrieved frames", "higher", "4x4x2 17.41, 2x2x2 19.12, 2x2x1 20.19, patchifier 12.93"
            ),
            "ssim": Shown("SSIM", "higher", "4x4x2 .596, 2x2x2 .683, 2x2x1 .705, patchifier .412"),
            "psnr_bound": Shown("PSNR of the autoencoder alone", "higher"),
            "tokens": Shown("tokens of a film", "lower"),
        },
        (
            ("2x2x1", "2x2x2", "psnr"),
            ("2x2x2", "4x4x2", "psnr"),
            ("4x4x2", "4x4x2, a large patchifier", "psnr"),
            ("4x4x2", "4x4x2, low-res branch only", "psnr"),
            ("4x4x2", "4x4x2, high-res branch only", "psnr"),
        ),
        retrieval,
        lambda short: settings(short, "squares", "retrieved"),
    ),
)
