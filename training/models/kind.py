"""One row for each kind of model: all that serving, generation, the judge and the registry need from a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from longtake.training.models.common.condition import Condition
from longtake.training.models.generator import Generator, Infiller, Retriever
from longtake.training.registry.gate import Better, Window


class Judged(NamedTuple):
    """A registered version to measure: its URI, its module on this device, and its config.json."""

    uri: str
    model: Any
    facts: Mapping[str, Any]

    def encoder(self) -> str | None:
        """Digest of the encoder of the latents or tokens that it was trained on; None for a model of pixels."""
        encoder: str | None = (self.facts.get("vae") or self.facts.get("vqgan") or {}).get("encoder")
        return encoder


class Judge(NamedTuple):
    """How a kind of model is measured on single held-out clips, so that two models of a kind can be compared.

    better   for each metric, whether higher or lower is better
    window   fields of a gate's window, beside `frames`, that apply to the kind
    options  `options(judged, inputs, window)` returns columns and other options for the loader of its clips
    figures  `figures(judged, batch, condition, seed, unit)` returns the metrics of a batch of one clip, empty for a clip
             that it cannot measure. `condition` has the model's own class ids, `seed` depends on the clip alone, and
             `unit` is the unit of errors
    """

    better: Mapping[str, Better]
    window: frozenset[str]
    options: Callable[[Judged, Mapping[str, str], Window], dict[str, Any]]
    figures: Callable[[Judged, Mapping[str, Any], Condition | None, int, Tensor | float], dict[str, float]]


class Kind(NamedTuple):
    """A kind of model.

    what       noun for messages, as in "models:/x/1 is a WHAT, not ..."
    config     class of its config
    module     class of its module, constructed from a config, also on the device "meta"
    judge      name of the module whose `judge(facts)` returns its `Judge`; imported on demand
    generator  `generator(uri, model, facts, vae, dtype)` returns a `Generator` of a loaded model; `vae` replaces its
               autoencoder, if not None. None for a kind that generates nothing
    retriever  the same of a `Retriever`; None for a kind that retrieves nothing
    infiller   the same of an `Infiller`; None for a kind that fills no gaps
    accepts    options of a request to the generator, some of "class", "prompt", "audio", "start", "movement", "storyboard", "size",
               and the names of its `generator.Settings` that have an effect
    answer     `answer(folder)` returns the function of videos, uint8 (B, T, H, W, 3), that is served; None for a generator,
               and for a kind that fills gaps
    measures   names of measures that only such models have (see `longtake.training.evaluation.measures`)
    complete   `complete(uri, facts)` adds to a config.json what its own library says of a model that was not trained here;
               None: there are none
    """

    what: str
    config: type[BaseModel]
    module: type[nn.Module]
    judge: str
    generator: Callable[[str, nn.Module, Mapping[str, Any], str | None, torch.dtype], Generator] | None = None
    retriever: Callable[[str, nn.Module, Mapping[str, Any], str | None, torch.dtype], Retriever] | None = None
    infiller: Callable[[str, nn.Module, Mapping[str, Any], str | None, torch.dtype], Infiller] | None = None
    accepts: frozenset[str] = frozenset()
    answer: Callable[[str], Callable[[np.ndarray], np.ndarray]] | None = None
    complete: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None
    measures: frozenset[str] = frozenset()
