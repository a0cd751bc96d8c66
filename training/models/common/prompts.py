"""Prompts as conditions: the text encoder that a model has learned from, as its config.json names it, and its states.

A model's folder does not have the weights of its encoder, which may be larger than the model. It names them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longtake.datasets.errors import UserError
from longtake.datasets.text import WORDS, TextConfig
from longtake.training.models.common.condition import Condition, of_classes, pooled_of
from longtake.training.models.common.story import Story
from longtake.training.models.generator import Request
from longtake.training.registry.uri import in_store

if TYPE_CHECKING:
    from longtake.training.text import TextEncoder

VARIABLE = "LONGTAKE_TEXT_ENCODER"  # where a served model's encoder is, if not where it was
_KEPT = 64  # prompts whose states are kept; of a large encoder each has some megabytes
_REMEDY = f"say where it is with --text-encoder FOLDER or models:/NAME@ALIAS, or in {VARIABLE} for a served model"


def accepted(facts: Mapping[str, Any]) -> frozenset[str]:
    """The options of a request that a model takes because of what it has learned of texts."""
    return frozenset({"prompt"} if facts.get("text") else ())


def with_encoder(facts: Mapping[str, Any], encoder: str | None) -> Mapping[str, Any]:
    """A config.json whose text encoder is in this folder or registered so; unchanged for None, or for a model without text."""
    text = facts.get("text")
    if not encoder or not text:
        return facts
    return {**facts, "text": text | {"encoder": text["encoder"] | {"encoder": encoder}}}


def with_served_encoder(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json whose text encoder is where `VARIABLE` says; the packaged words are where the model is served."""
    encoder = (facts.get("text") or {}).get("encoder", {}).get("encoder")
    return facts if encoder == WORDS else with_encoder(facts, os.environ.get(VARIABLE))


def prompts_of(uri: str, facts: Mapping[str, Any]) -> Prompts | None:
    """The prompts of the model with this config.json; None for a model without text."""
    return Prompts(uri, facts["text"]["encoder"], facts["config"]["text_length"]) if facts.get("text") else None


def check_bytes(prompts: Sequence[str]) -> None:
    """UserError for a prompt that a shell has passed on with bytes that are no UTF-8."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"prompt {prompt[:40]!r}: has bytes that are no UTF-8; write it again") from e


class States(Protocol):
    """What makes prompts the states of a `Condition`: those of an encoder, or a model's own words."""

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that it cannot encode: UserError."""

    def states(self, prompts: Sequence[str | None], device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The states `(B, N, width)` of prompts and their mask `(B, N)`; None for both if all are None."""


class Prompts:
    """The states of prompts. The encoder is loaded with the first one.

    Each prompt is encoded alone: its states do not depend on those beside it.
    """

    def __init__(self, uri: str, encoder: Mapping[str, Any], length: int, cut: bool = False) -> None:
        """`encoder` is what config.json says of it, as `Text.encoder`; `length` the most tokens.

        Without a digest in it, as of a pipeline that brings its encoder, no other encoder is refused. With `cut` prompts
        that are too long are cut, and not refused.
        """
        self._uri, self._digest, self._length, self._cut = uri, encoder.get("digest"), length, cut
        self._probe = encoder.get("probe")  # older models have none
        self._config = TextConfig(**{name: value for name, value in encoder.items() if name in TextConfig.model_fields})
        self._states = lru_cache(_KEPT)(self._encoded)

    def check(self, prompts: Sequence[str]) -> None:
        """Load the encoder, and count.

        Raises:
            UserError: the encoder is not there, or is another one; a prompt has more tokens than the model takes.
        """
        check_bytes(prompts)
        if self._cut:
            return
        most = min(self._length, self._encoder.limit)
        for prompt, count in zip(prompts, self._encoder.count(prompts), strict=True):
            if count > most:
                raise UserError(f"prompt {prompt[:40]!r}: has {count} tokens, and {most} fit; shorten it")

    def states(self, prompts: Sequence[str | None], device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The states `(B, N, width)` of prompts and their mask `(B, N)`; None for both if all are None. Raises as `check`."""
        texts = [prompt for prompt in prompts if prompt is not None]
        if not texts:
            return None, None
        self.check(texts)
        none = torch.zeros(0, self._encoder.width, dtype=torch.bfloat16)
        rows = [none if prompt is None else self._states(prompt, str(device)) for prompt in prompts]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return pad_sequence(rows, batch_first=True).to(device), pad_sequence(masks, batch_first=True).to(device)

    def _encoded(self, prompt: str, device: str) -> Tensor:
        return self._encoder.encode([prompt], device)[0]

    @cached_property
    def _encoder(self) -> TextEncoder:
        from longtake.training import text

        name = self._config.encoder
        if name != WORDS and not in_store(name) and not Path(name).expanduser().is_dir():
            raise UserError(f"{self._uri}: its text encoder is not at {name}; {_REMEDY}")
        try:
            encoder = text.load_encoder(self._config)
        except UserError as e:
            raise UserError(f"{self._uri}: text {e}") from e
        if self._digest is not None and encoder.digest != self._digest:
            remedy = "install the version of wordllama that its training had" if name == WORDS else _REMEDY
            raise UserError(
                f"{self._uri}: has learned texts by another encoder than {name} (digest {self._digest[:12]}, not"
                f" {encoder.digest[:12]}); {remedy}"
            )
        if self._probe is not None and not text.gives(encoder, self._probe):
            raise UserError(
                f"{self._uri}: {name} gives other states than in training, though its files are the same; install the"
                " transformers that its training had"
            )
        return encoder


def story_of_requests(
    requests: Sequence[Request],
    latent_of: Callable[[float], int],
    prompts: States | None,
    device: torch.device,
    vectors: States | None = None,
) -> Story:
    """What requests ask for as conditions of their batch. Their stories change at the same seconds.

    Args:
        latent_of: the new latent of a second. Of two scenes that begin with the same one the later holds.
        vectors: a second encoder, for a model that takes a vector of each text.

    Raises:
        ValueError, UserError: prompts for a model without text, and as `Prompts.check`.
    """
    story: dict[int, Condition] = {}
    for beats in zip(*(request.story for request in requests), strict=True):
        scenes = [scene for _, scene in beats]
        said = [scene.prompt for scene in scenes]
        classes, pooled = of_classes(scene.class_id for scene in scenes).classes, _vectors(said, vectors, device)
        text, mask = _states(said, prompts, device)
        story[latent_of(beats[0][0])] = Condition(classes, text, mask, pooled=pooled)
    return list(story.items())


def negative_of_requests(
    requests: Sequence[Request], prompts: States | None, device: torch.device, vectors: States | None = None
) -> Condition | None:
    """The texts that guidance leads away from; None if there is none. Arguments and errors as of `story_of_requests`."""
    said = [request.negative for request in requests]
    text, mask = _states(said, prompts, device)
    return None if text is None else Condition(None, text, mask, pooled=_vectors(said, vectors, device))


def _vectors(texts: Sequence[str | None], vectors: States | None, device: torch.device) -> Tensor | None:
    """A vector of each text `(B, D)`; None if there is no text, or no model that takes such."""
    states, mask = (None, None) if vectors is None else vectors.states(texts, device)
    return None if states is None or mask is None else pooled_of(states, mask)


def pooled_for(uri: str, facts: Mapping[str, Any]) -> Prompts | None:
    """The prompts of a second encoder, for a model that takes a vector of each text; longer ones are cut, as CLIP's are."""
    encoder = (facts.get("pooled") or {}).get("encoder")
    return Prompts(uri, encoder, encoder["length"], cut=True) if encoder else None


def _states(
    texts: Sequence[str | None], prompts: States | None, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if prompts is not None:
        return prompts.states(texts, device)
    if any(text is not None for text in texts):
        raise ValueError("prompt: this model takes none; leave it out")
    return None, None
