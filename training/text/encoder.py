"""What a text encoder is, how one is loaded, and what is checked of it before anything is encoded."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.text import WORDS, TextConfig
from longtake.training.registry.foreign import TEXT_ENCODER
from longtake.training.registry.imported import pulled
from longtake.training.registry.uri import in_store
from longtake.training.text import pretrained
from longtake.training.text.files import found
from longtake.training.text.pretrained import Pretrained
from longtake.training.text.words import Words

# of different lengths, so that one of them is padded when they are encoded together
_SHORT, _LONG = "a red square", "two people walk through a town at night, and it rains all the time"
_ROUNDED = 0.05  # share that other machines and precisions may change
_ALIKE, _SAME = 0.999, 0.99  # cosines: from where on states are alike, and down to where they are the same


class TextEncoder(Protocol):
    """Texts to the states of their tokens. The same text gives the same states, but for roundings, in any batch.

    width    values in the state of a token
    limit    tokens of a text that are kept; the others are cut off
    digest   of all that decides the states: weights, tokenizer, settings
    """

    width: int
    limit: int
    digest: str

    def encode(self, texts: Sequence[str], device: str = "cpu") -> list[Tensor]:
        """The states of each text, (L, width) bfloat16 on the CPU, L at least 1. The texts are one batch."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text before it is cut."""

    def describe(self) -> dict[str, Any]:
        """The settings with every default resolved: `load_encoder(TextConfig(**described))` is this encoder."""


def load_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that a config names, on the CPU and checked.

    Raises:
        UserError: the extra is not installed, there is no such encoder, it has no safe weights, a setting does not fit it,
            or its states are none that a model can learn from.
        Failure: a registered one is not here, and its store cannot be reached.
    """
    encoder: TextEncoder
    if config.encoder == WORDS:
        encoder = Words(config)
    elif in_store(config.encoder):
        version, folder = pulled(config.encoder, TEXT_ENCODER, "encoder")
        encoder = Pretrained(config.model_copy(update={"encoder": version}), found(str(folder)))
    else:
        files = found(config.encoder)
        encoder = Pretrained(config.model_copy(update={"encoder": str(files.model)}), files)
    _check(encoder, config.encoder)
    return encoder


def digest_of(config: TextConfig) -> str:
    """The digest of the encoder of transformers that a config names, with the `length` that it has; its weights are not loaded.

    Raises:
        UserError, Failure: as `load_encoder`.
    """
    if in_store(config.encoder):
        return pretrained.digest_of(config, found(str(pulled(config.encoder, TEXT_ENCODER, "encoder").folder)))
    return pretrained.digest_of(config, found(config.encoder))


def gives(encoder: TextEncoder, probe: Sequence[float]) -> bool:
    """Whether an encoder gives the states that were kept as a `probe`, the first values of those of "", but for roundings.

    The same files may give others by another version of the library that reads them.
    """
    states = encoder.encode([""])[0].flatten()[: len(probe)].double()
    kept = torch.tensor(probe, dtype=torch.float64)
    return len(states) == len(kept) and bool((states - kept).norm() <= _ROUNDED * kept.norm() + 1e-6)


def _check(encoder: TextEncoder, name: str) -> None:
    """Raises UserError where states are not finite, all alike, or depend on the padding."""
    alone = encoder.encode([_SHORT])[0].double()
    short, long = (states.double() for states in encoder.encode([_SHORT, _LONG]))
    if not all(states.isfinite().all() for states in (alone, short, long)):
        raise UserError(f"encoder: {name}: its states are not finite; set precision: fp32, or look at its weights")
    # states of the last tokens too: in large models the first token is the same everywhere and outweighs all others
    if min(_cosine(short.mean(0), long.mean(0)), _cosine(short[-1], long[-1])) >= _ALIKE:
        raise UserError(
            f"encoder: {name}: gives two different texts the same states; its weights are not those of a trained encoder"
        )
    if _cosine(short.flatten(), alone.flatten()) < _SAME:
        raise UserError(f"encoder: {name}: its states depend on the padding; set side to the other one")


def _cosine(one: Tensor, other: Tensor) -> float:
    """The cosine of the angle between two vectors; 1 where one of them is zero."""
    norms = one.norm() * other.norm()
    return float(torch.dot(one, other) / norms) if norms else 1.0
