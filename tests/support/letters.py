"""A text encoder for tests: each letter is a token, with random states of its own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.training import text

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
