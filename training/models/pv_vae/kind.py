"""The row of PV-VAE (see `longtake.training.models.kind`)."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longtake.training.models.kind import Kind
from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig


def kind(facts: Mapping[str, Any]) -> Kind:
    """An autoencoder, which is served as one."""
    return Kind("PVVAE", PVVAEConfig, PVVAE, "longtake.training.models.pv_vae.judge", answer=_reconstruct)


def _reconstruct(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    from longtake.training.engines import device
    from longtake.training.models.common.codec import reconstruct_arrays
    from longtake.training.registry import disk

    return partial(reconstruct_arrays, disk.load(Path(folder)).to(device()))
