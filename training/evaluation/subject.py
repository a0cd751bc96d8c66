"""A registered model that is measured, loaded once, with what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longtake.training.evaluation.suite import Aspect
from longtake.training.models.kind import Kind


@dataclass
class Subject:
    """A model under measurement.

    uri      as the user named it
    pinned   models:/NAME/VERSION, or the folder
    digest   sha256 of its config and weights
    facts    its config.json
    kind     its row
    module   on this rank's device, in evaluation mode
    """

    uri: str
    pinned: str
    digest: str
    facts: Mapping[str, Any]
    kind: Kind
    module: Any


def aspects(kind: Kind) -> frozenset[Aspect]:
    """What models of a kind do, and so which measures they have."""
    does: dict[Aspect, Any] = {
        "reconstructs": kind.answer and not kind.retriever,
        "generates": kind.generator,
        "retrieves": kind.retriever,
        "fills": kind.infiller,
    }
    return frozenset(aspect for aspect, row in does.items() if row)
