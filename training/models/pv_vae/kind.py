"""The row of PV-VAE (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.common.codec import served
from longtake.training.models.kind import Kind
from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig


def kind(facts: Mapping[str, Any]) -> Kind:
    """An autoencoder that predicts, which is served as one."""
    judge, measures = "longtake.training.models.common.reconstruction", frozenset({"prediction"})
    return Kind("PVVAE", PVVAEConfig, PVVAE, judge, answer=served, measures=measures)
