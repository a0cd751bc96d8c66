"""The row of transformers of other libraries (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.foreign.backbone import Backbone, BackboneConfig
from longtake.training.models.backbone.pipeline import completed
from longtake.training.models.backbone.sample import accepts_of, prior_of
from longtake.training.models.kind import Kind


def kind(facts: Mapping[str, Any]) -> Kind:
    """A prior that generates a window of video, as the pipeline of its library does."""
    judge = "longtake.training.models.backbone.judge"
    accepts = accepts_of(facts)
    return Kind("backbone", BackboneConfig, Backbone, judge, prior_of, accepts=accepts, complete=completed)
