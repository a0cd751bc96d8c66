"""Text encoders of the registry, on this machine."""

from pathlib import Path
from typing import NamedTuple

from longtake.datasets.errors import UserError
from longtake.training.models import kind_of
from longtake.training.registry import cache, disk

KIND = "text_encoder"  # in config.json


class Registered(NamedTuple):
    """An encoder of the registry on this machine: the version that was named, and its folder."""

    uri: str
    folder: Path


def pulled(uri: str) -> Registered:
    """The encoder that a URI of the registry names, fetched if it is not here.

    Raises:
        UserError: there is no such model, or it is no text encoder.
        Failure: as `cache.pull`.
    """
    try:
        folder = cache.pull(uri)
    except UserError as e:
        raise UserError(f"encoder: {e}") from e
    content = disk.read_config(folder)
    if content["model"] != KIND:
        raise UserError(
            f"encoder: {uri}: is a {kind_of(content).what}, and no text encoder; register one by `longtake models import`"
        )
    return Registered(cache.version_of(uri), folder)
