"""The row of EncGAN3 (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.encgan3.config import EncGAN3Config
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.sample import ACCEPTS, sampler_of
from longtake.training.models.kind import Kind


def kind(facts: Mapping[str, Any]) -> Kind:
    """A VAE-GAN that generates videos clip by clip."""
    judge = "longtake.training.models.encgan3.judge"
    return Kind("EncGAN3", EncGAN3Config, EncGAN3, judge, generator=sampler_of, accepts=ACCEPTS)
