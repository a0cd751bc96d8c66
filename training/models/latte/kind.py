"""The row of Latte (see `longtake.training.models.kind`)."""

from collections.abc import Mapping
from typing import Any

from longtake.training.models.common.prompts import accepted
from longtake.training.models.kind import Kind
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.models.latte.sample import ACCEPTS, prior_of


def kind(facts: Mapping[str, Any]) -> Kind:
    """A prior that generates videos window by window."""
    judge = "longtake.training.models.latte.judge"
    return Kind("Latte", LatteConfig, Latte, judge, generator=prior_of, accepts=ACCEPTS | accepted(facts))
