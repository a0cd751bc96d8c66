"""The kinds of models. A family is a folder here, a line in `KINDS`, and a line for each of its stages in `infra.stages`."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtake.training.models.kind import Judge, Kind

# name in config.json -> module whose `kind(facts)` returns its row
KINDS = {
    "pv_vae": "longtake.training.models.pv_vae.kind",
    "foreign_vae": "longtake.training.models.autoencoder.kind",
    "latte": "longtake.training.models.latte.kind",
    "vqgan": "longtake.training.models.tats.vqgan_kind",
    "sound_vqgan": "longtake.training.models.tats.sound.kind",
    "tats": "longtake.training.models.tats.kind",
    "encgan3": "longtake.training.models.encgan3.kind",
    "mavin": "longtake.training.models.mavin.kind",
    "backbone": "longtake.training.models.backbone.kind",
    "memory_dit": "longtake.training.models.memory.kind",
    "memory_backbone": "longtake.training.models.memory.kind",
}


def kind_of(facts: Mapping[str, Any]) -> "Kind":
    """The row of the model with this config.json."""
    kind: Kind = importlib.import_module(KINDS[facts["model"]]).kind(facts)
    return kind


def judge_of(facts: Mapping[str, Any]) -> "Judge":
    """How the model with this config.json is measured."""
    judge: Judge = importlib.import_module(kind_of(facts).judge).judge(facts)
    return judge
