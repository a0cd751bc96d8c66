"""The row of MAVIN (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.kind import Kind
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.sample import infiller_of


def kind(facts: Mapping[str, Any]) -> Kind:
    """A flow that fills the gap between two clips."""
    return Kind("MAVIN", MavinConfig, Mavin, "longtake.training.models.mavin.judge", infiller=infiller_of)
