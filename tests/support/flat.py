"""Settings of a training stage written flat, as tests do for short."""

from collections.abc import Mapping
from typing import Any

from longtake.training.config import RunConfig


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a recipe has them: those of `run` below that key."""
    run = {name: value for name, value in settings.items() if name in RunConfig.model_fields}
    rest = {name: value for name, value in settings.items() if name not in run}
    return rest | ({"run": dict(rest.get("run", {})) | run} if run else {})
