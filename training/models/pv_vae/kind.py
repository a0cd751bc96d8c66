"""The row of PV-VAE (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.common.codec import served
from longtake.training.models.kind import Kind
from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig


def kind(facts: Mapping[str, Any]) -> Kind:
    """An autoencoder, which is served as one."""
    return Kind("PVVAE", PVVAEConfig, PVVAE, "longtake.training.models.common.reconstruction", answer=served)
