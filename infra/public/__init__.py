"""Longtake: `longtake.load("models:/NAME@champion")` gives the torch module of a registered model.

This is the package `longtake` itself. It is in this folder because the repository's top folders are its parts.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from longtake.training.text import TextEncoder

__all__ = ["__version__", "load", "resolve", "text_encoder"]


def load(uri: str, part: Literal["vae", "transformer"] | None = None) -> "nn.Module":
    """The torch module of a model, on the CPU, in evaluation mode.

    Args:
        uri: "models:/NAME@ALIAS" or "models:/NAME/VERSION" of the registry that MLFLOW_TRACKING_URI names, fetched once
            and checked (see `longtake models pull`); or a model folder.
        part: which part of a pipeline of another library, such as a folder in the layout of diffusers.

    Raises:
        UserError, Failure: as `longtake.training.registry.load`.
    """
    from longtake.training import registry

    return registry.load(uri, part)


def resolve(uri: str) -> str:
    """The version "models:/NAME/VERSION" that a model's URI names now, since an alias moves; the absolute path of a folder.

    Raises:
        UserError, Failure: as `longtake.training.registry.store.locate`.
    """
    from longtake.datasets import storage
    from longtake.training.registry import store
    from longtake.training.registry.uri import in_store

    return store.locate(uri).uri if in_store(uri) else storage.absolute(uri)


def text_encoder(encoder: str = "words", **settings: Any) -> "TextEncoder":
    """A text encoder, on the CPU and checked: `encode` gives the states of a text's tokens.

    Args:
        encoder: "words", packaged embeddings of words; a local folder with a model of transformers; or
            "models:/NAME@ALIAS", such a model in the registry (see `longtake models import`).
        settings: further fields of `longtake.training.text.TextConfig`.

    Raises:
        UserError, Failure: as `longtake.training.text.load_encoder`; a setting that there is not.
    """
    from pydantic import ValidationError

    from longtake.datasets.errors import UserError
    from longtake.training.text import TextConfig, load_encoder

    try:
        config = TextConfig(encoder=encoder, **settings)
    except ValidationError as e:
        first = e.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from e
    return load_encoder(config)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module 'longtake' has no attribute {name!r}")
    from importlib.metadata import version

    return version("longtake")
