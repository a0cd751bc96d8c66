"""The row of the VQGAN (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.common.codec import served
from longtake.training.models.kind import Kind
from longtake.training.models.tats.vqgan import VQGAN, VQGANConfig


def kind(facts: Mapping[str, Any]) -> Kind:
    """An autoencoder, which is served as one."""
    judge, measures = "longtake.training.models.tats.vqgan_judge", frozenset({"equivariance"})
    return Kind("VQGAN", VQGANConfig, VQGAN, judge, answer=served, measures=measures)
