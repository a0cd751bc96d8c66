"""The row of the VQGAN of sound (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.common.codec import served
from longtake.training.models.kind import Kind
from longtake.training.models.tats.sound.vqgan import SoundVQGAN, SoundVQGANConfig


def kind(facts: Mapping[str, Any]) -> Kind:
    """An autoencoder of sound; served, it refuses videos."""
    judge = "longtake.training.models.tats.sound.judge"
    return Kind("VQGAN of sound", SoundVQGANConfig, SoundVQGAN, judge, answer=served)
