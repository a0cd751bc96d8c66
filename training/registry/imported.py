"""Models of other libraries that are registered (see `foreign`), on this machine."""

from pathlib import Path
from typing import NamedTuple

from longtake.datasets.errors import UserError
from longtake.training.models import kind_of
from longtake.training.registry import cache, disk, pipelines
from longtake.training.registry.foreign import FOREIGN, PARTS, PIPELINE


class Registered(NamedTuple):
    """A model of the registry on this machine: the version that was named, and its folder."""

    uri: str
    folder: Path


def pulled(uri: str, kind: str, key: str) -> Registered:
    """The model of a kind of `foreign.FOREIGN` that a URI of the registry names, fetched if it is not here.

    It may be in a pipeline, whose folder is then returned.

    `key` is the setting that names it, for messages.

    Raises:
        UserError: there is no such model, or it is of another kind.
        Failure: as `cache.pull`.
    """
    try:
        folder = cache.pull(uri, PARTS[kind])
    except UserError as e:
        raise UserError(f"{key}: {e}") from e
    content = disk.read_config(folder)
    if content["model"] == PIPELINE:
        folder = pipelines.opened(uri, folder, PARTS[kind]).folder
    elif content["model"] != kind:
        other = FOREIGN.get(content["model"])
        is_a = other.one if other else f"a {kind_of(content).what}"
        raise UserError(
            f"{key}: {uri}: is {is_a}, and no {FOREIGN[kind].what}; register one by `longtake models import`"
        )
    return Registered(cache.version_of(uri), folder)
