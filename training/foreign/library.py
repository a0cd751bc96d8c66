"""The library that foreign models are of, imported when one of its classes is needed: that takes about ten seconds."""

from __future__ import annotations

import importlib
from typing import Any

from longtake.datasets.errors import UserError


def class_of(name: str, library: str = "diffusers") -> Any:
    """A class of diffusers or another library of the extra `[foreign]` by its name.

    Raises:
        UserError: the library is not installed, or its version has no such class.
    """
    try:
        module = importlib.import_module(library)
    except ImportError as e:
        raise UserError(
            f"{name}: needs {library}, which cannot be imported ({e}); pip install longtake[foreign]"
        ) from e
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{name[:80]}: {library} {getattr(module, '__version__', '')} has no such class; update it")
    return found
