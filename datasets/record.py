"""The record of a column: the JSON file in a stage's output with the fields of a dataclass, such as `Latents`."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError

T = TypeVar("T")

_FORMAT = 1


def write(uri: str, name: str, fields: Mapping[str, Any]) -> None:
    """Write `NAME.json` to a stage's output."""
    storage.write(storage.join(uri, f"{name}.json"), storage.canonical_json({"format": _FORMAT, **fields}))


def read(uri: str, name: str, stage: str, kind: Callable[..., T]) -> T:
    """What `kind` makes of the fields that a stage has written as `NAME.json`; lists become tuples.

    Raises:
        UserError: there is none at `uri`, or it has another format.
        Failure: it is damaged.
    """
    url = storage.join(uri, f"{name}.json")
    try:
        content = json.loads(storage.read(url))
        if (number := content.pop("format")) != _FORMAT:
            raise UserError(f"{url}: format {number}, this longtake reads {_FORMAT}; run its `{stage}` stage again")
        # these are outputs of stages, perhaps in one workspace that was moved
        then, now = content["dataset"].rsplit("/", 2)[0], uri.rstrip("/").rsplit("/", 2)[0]
        content |= {each: content[each] and storage.placed(content[each], then, now) for each in ("dataset", "view")}
        return kind(**{field: tuple(value) if isinstance(value, list) else value for field, value in content.items()})
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{uri}: no {name} here (no {name}.json); name what a `{stage}` stage has made") from e
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{url}: damaged ({e}); run its `{stage}` stage again") from e
