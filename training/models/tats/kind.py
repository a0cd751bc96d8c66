"""The row of TATS (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.kind import Kind
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import TATSConfig
from longtake.training.models.tats.sample import accepts, prior_of


def kind(facts: Mapping[str, Any]) -> Kind:
    """A prior over tokens that generates videos latent frame by latent frame, or anchors first."""
    judge = "longtake.training.models.tats.judge"
    # losses of other modes do not compare
    what = {"anchors": "TATS of anchors", "interpolate": "TATS of gaps"}.get(facts["config"]["mode"], "TATS")
    return Kind(what, TATSConfig, TATS, judge, generator=prior_of, accepts=accepts(facts))
