"""One row for each kind of model: all that serving, generation, the judge and the registry ask of a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from longtake.training.models.common.condition import Condition
from longtake.training.models.generator import Generator
from longtake.training.registry.gate import Better, Window


class Judged(NamedTuple):
    """A registered version, its module on this device, and what its config.json says of it."""

    uri: str
    model: Any
    facts: Mapping[str, Any]

    def encoder(self) -> str | None:
        """Digest of what has made the latents that it has learned; None where it sees pixels."""
        encoder: str | None = (self.facts.get("vae") or {}).get("encoder")
        return encoder


class Judge(NamedTuple):
    """How a kind of model is measured on held-out clips, one by one, so that two of a kind can be compared.

    better   its metrics, and which way each is better
    window   fields of a gate's window, beside `frames`, that mean something to it
    options  `options(judged, inputs, window)`: columns and other options of the loader of its clips
    figures  `figures(judged, batch, condition, seed, unit)`: the metrics of a batch of one clip, empty where it has none.
             `condition` has labels by the model's own numbers, `seed` is the clip's own, `unit` is the unit of errors
    """

    better: Mapping[str, Better]
    window: frozenset[str]
    options: Callable[[Judged, Mapping[str, str], Window], dict[str, Any]]
    figures: Callable[[Judged, Mapping[str, Any], Condition | None, int, Tensor | float], dict[str, float]]


class Kind(NamedTuple):
    """A kind of model.

    what       what it is, as in "models:/x/1 is a WHAT, not ..."
    config     class of its config
    module     class of its module, which is made of a config, also on the device "meta"
    judge      the module whose `judge(facts)` says how it is measured, imported only then
    generator  `generator(uri, model, facts, vae, dtype)`, with an autoencoder in place of its own, or None: the loaded model
               with all that it needs to make videos. None for a kind that generates nothing
    accepts    what may be asked of the generator beside a seed: of "class", "start", "storyboard", "history_noise"
    answer     `answer(folder)`: what the served model does with videos, uint8 (B, T, H, W, 3); None for one that generates
    """

    what: str
    config: type[BaseModel]
    module: type[nn.Module]
    judge: str
    generator: Callable[[str, nn.Module, Mapping[str, Any], str | None, torch.dtype], Generator] | None = None
    accepts: frozenset[str] = frozenset()
    answer: Callable[[str], Callable[[np.ndarray], np.ndarray]] | None = None
