"""The claims of the paper on a memory of the past (arXiv 2512.23851), on films of the world `return`.

`return`       goes on with films from before the squares are in sight again: what is there is nowhere but in the memory.
`pretraining`  the same from a memory that has learned to retrieve and from a new one, beside the same transformer.
`retrieval`    latents of films, retrieved from their memory alone: by rate, beside a large patchifier, and with one branch.

Each arm of a seed trains by the losses of `finetune_memory_prior` and `pretrain_memory`, on the latents of an autoencoder
that all arms and seeds share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.training import checkpoint
from longtake.training.models.memory import finetune, pretrain
from longtake.training.models.memory.dit import MemoryDiT

from claimed import Claim, Shown
from claimed import _returning as films


class Scale(NamedTuple):
    """How much is trained and measured."""

    vae_steps: int
    train_films: int
    heldout_films: int
    steps: int
    pretrain_steps: int
    later_steps: int


WHOLE = Scale(400, 200, 32, 1200, 800, 200)
SHORT = Scale(20, 8, 2, 4, 4, 4)


def scale_of(short: bool) -> Scale:
    return SHORT if short else WHOLE


def material_of(folder: Path, scale: Scale) -> films.Material:
    """Shared by all claims, arms and seeds: beside the folder of a claim."""
    return films.material(folder.parent / "films", scale.vae_steps, scale.train_films, scale.heldout_films)


def finetuned(
    made: films.Material, steps: int, seed: int, model: Mapping[str, Any], folder: Path, base: MemoryDiT | None = None
) -> MemoryDiT:
    """A model that has learned to continue films; with a base, what it has of the same shape begins with the base's weights."""
    config = finetune.Config(kind="finetune_memory_prior", **films.settings(steps, seed, 16, model))
    begun = films.fresh(made, config, seed)
    if base is not None:
        begun.load_state_dict(base.state_dict(), strict=False)
    return films.trained(finetune, config, begun, made, folder)


def retriever(made: films.Material, steps: int, seed: int, model: Mapping[str, Any], folder: Path) -> MemoryDiT:
    """A model that has learned to retrieve latents of films from their memory."""
    config = pretrain.Config(kind="pretrain_memory", **films.settings(steps, seed, 16, model))
    begun = films.fresh(made, config, seed)
    if checkpoint.latest(folder) and (kept := checkpoint.trained(folder, config)):
        begun.load_state_dict(kept)
    return films.trained(pretrain, config, begun, made, folder)


RETURNING: Mapping[str, Mapping[str, Any]] = {
    "memory": {"rates": ["2x2x2"]},
    "FramePack": {"memory": "framepack"},
    "last latents": {"memory": "none"},
}


def returning(arm: str, seed: int, folder: Path, short: bool) -> Mapping[str, float]:
    scale = scale_of(short)
    made = material_of(folder, scale)
    if arm == "autoencoder":
        return films.bound(made)
    place = folder / f"{arm.replace(' ', '-')}-{seed}"
    return films.returned(finetuned(made, scale.steps, seed, RETURNING[arm], place), made, pictures=place)
