"""The URIs that models are named by: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `models:/ID`, `runs:/RUN/PATH`."""

from typing import NamedTuple


class ModelUri(NamedTuple):
    """A `models:/` URI taken apart; what it does not have is empty.

    name     of the registered model, or the id of a logged one
    version  a number or "latest"
    alias    such as "champion"
    """

    name: str
    version: str = ""
    alias: str = ""


def parse(uri: str) -> ModelUri:
    """Take a `models:/` URI apart; all is empty where it is none."""
    if not uri.startswith("models:/"):
        return ModelUri("")
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        return ModelUri(name, alias=alias)
    name, _, version = name.partition("/")
    return ModelUri(name, version)


def in_store(uri: str) -> bool:
    """Whether a URI names something in MLflow's store, and not a model folder."""
    return uri.startswith(("models:/", "runs:/"))
