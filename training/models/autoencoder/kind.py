"""The row of video autoencoders of other libraries (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.foreign.codec import CodecConfig, ForeignCodec
from longtake.training.models.common.codec import served
from longtake.training.models.kind import Kind


def kind(facts: Mapping[str, Any]) -> Kind:
    """An autoencoder, which is served as one, and measured as a PV-VAE is; whether it predicts its config says."""
    return Kind(
        "foreign autoencoder",
        CodecConfig,
        ForeignCodec,
        "longtake.training.models.common.reconstruction",
        answer=served,
        measures=frozenset({"prediction"}) if facts["config"].get("padding") else frozenset(),
    )
