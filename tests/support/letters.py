"""A text encoder for tests: each letter is a token, with random states of its own. And priors that have learned by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from priors import awake, save_vae
from torch import Tensor

from longtake.datasets.latents import encoder_digest
from longtake.training import text
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.registry import disk

WIDTH = 8


class Letters:
    """The states of letters. `encoded` has what was asked for."""

    width, limit = WIDTH, 24

    def __init__(self, digest: str = "letters") -> None:
        self.digest = digest
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str], device: str = "cpu") -> list[Tensor]:
        self.encoded += texts
        return [torch.stack([_state(letter) for letter in one or "\0"]) for one in texts]

    def count(self, texts: Sequence[str]) -> list[int]:
        return [max(1, len(one)) for one in texts]

    def describe(self) -> dict[str, Any]:
        return {"encoder": "words"}


def _state(letter: str) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(ord(letter))).to(torch.bfloat16)


def states(one: str) -> Tensor:
    """The states (L, WIDTH) of a text."""
    return Letters().encode([one])[0]


def facts(encoder: str = "words") -> dict[str, Any]:
    """What config.json says of the texts that a model has learned by this encoder."""
    return {"uri": "", "digest": "0", "encoder": {"encoder": encoder, "digest": "letters", "width": WIDTH}}


def install(monkeypatch: pytest.MonkeyPatch, digest: str = "letters") -> Letters:
    """Let every text encoder that is loaded be this one."""
    encoder = Letters(digest)
    monkeypatch.setattr(text, "load_encoder", lambda config: encoder)
    return encoder


def save_priors(folder: Path, text_facts: dict[str, Any] | None = None, **text_fields: Any) -> Path:
    """Folders of tiny priors of texts and two classes, `latte` and `memory`; `hasty` hid no text, `plain` has no classes.

    `text_facts` says by which encoder, if not by letters, and `text_fields` replaces fields of the models' configs.
    """
    vae = save_vae(folder / "vae")
    known: dict[str, Any] = {
        "lineage": {},
        "stage": "generation",
        "classes": ["cat", "dog"],
        "window": {"frames": 9, "fps": 12.0, "size": [32, 32]},
        "sampling": {"steps": 2, "guidance": 1.0, "shift": 1.0, "overlap": 1},
        "vae": {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)},
        "text": text_facts or facts(),
    }
    small: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2, "channels": 8, "classes": 2, "shape": (3, 2, 2)}
    small |= {"text_width": WIDTH, "text_empty": 1, "text_length": Letters.limit} | text_fields
    memory = {"rates": ("2x2x2",), "memory_widths": (4, 8), "memory_heads": 2, "history": 6, "window": 2}
    for name, model, made in (
        ("latte", "latte", Latte(LatteConfig(**small))),
        ("hasty", "latte", Latte(LatteConfig(**small | {"text_dropout": 0.0}))),
        ("plain", "latte", Latte(LatteConfig(**small | {"classes": 0}))),
        ("memory", "memory_dit", MemoryDiT(MemoryDiTConfig(**small | memory))),
    ):
        described = known | {"classes": known["classes"] if made.config.classes else []}
        disk.save(folder / name, model, made.config.model_dump(mode="json"), awake(made).state_dict(), described)
    return folder
