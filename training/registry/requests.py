"""Requests to a served prior, as tables, and the videos in answer."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.common.video import concatenated
from longtake.training.models.generator import (
    Generator,
    Request,
    Settings,
    Story,
    check_requests,
    check_story,
    scene_of,
    story_of,
)

_FIRST = ("seed", "class", "frames")  # columns that all generators take
_BY_PART = {"guidance_classes": "classes", "guidance_text": "text"}  # no sound is sent
# what a call may change of the settings, each of one plain type, as MLflow needs it
_TYPES = {"steps": "long", "guidance": "double"} | dict.fromkeys(_BY_PART, "double")
_TYPES |= {"temperature": "double", "top_k": "long", "top_p": "double", "keep": "long"}
_TYPES |= {"content": "string", "backward": "boolean", "solver": "string", "guidance_2": "double"}
_TYPES |= {"negative_guidance": "double"}


def parameters_of(accepts: Collection[str]) -> dict[str, str]:
    """What a call may change of the settings of a generator that accepts these options, with its type."""
    return {name: of for name, of in _TYPES.items() if ("guidance" if name in _BY_PART else name) in accepts}


def columns_of(accepts: Collection[str]) -> list[str]:
    """The columns of a table of requests to a generator that accepts these options."""
    more = {"storyboard": ("storyboard",), "prompt": ("prompt", "negative")}
    return [*_FIRST, *(name for option, names in more.items() if option in accepts for name in names)]


class Order(NamedTuple):
    """A video that is asked for, and how many frames it has."""

    request: Request
    frames: int


def orders_of(generator: Generator, table: Any) -> list[Order]:
    """The videos that a caller of the served model asks for.

    Args:
        table: a pandas table, or lists or arrays by name: `seed` and, where wanted, `class` (a name or a number; None
            for none) and `frames`, the same in every row. A model that accepts prompts also takes `prompt` and `negative`,
            texts, None for none. One that accepts storyboards takes `storyboard` in place of `class` and `prompt`: a list
            of `{at, class, prompt}` (see `generator.story_of`) or the same as JSON; None for none.

    Raises:
        UserError: other columns or values.
    """
    first, *others = columns_of(generator.accepts)
    rows = rows_of(table, [first], others)
    seeds = [seed_of(row) for row in rows]
    lengths = {generator.frames if (frames := row.get("frames")) is None else whole("frames", frames) for row in rows}
    if len(lengths) > 1:
        raise UserError(f"videos: frames must be the same in every row, got {sorted(lengths)}")
    frames = lengths.pop()
    return [
        Order(Request(seed, _story(generator, row, frames), text_of("negative", row)), frames)
        for seed, row in zip(seeds, rows, strict=True)
    ]


def rows_of(table: Any, needed: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table, with None for what is not there.

    Args:
        table: a pandas table, lists or arrays by name, or a list of rows.

    Raises:
        UserError: anything else; other columns than the needed ones and some of the others; no row.
    """
    if isinstance(table, list) and all(isinstance(row, Mapping) for row in table):
        names = dict.fromkeys(name for row in table for name in row)
        columns = {str(name): [row.get(name) for row in table] for name in names}
    elif isinstance(table, Mapping) or hasattr(table, "columns"):
        try:
            columns = {str(name): list(table[name]) for name in getattr(table, "columns", table)}
        except TypeError as e:
            raise UserError(f"videos: a column must be a list, with a value for each row ({e})") from e
    else:
        raise UserError(f"videos: need a table, or a list of rows, got {type(table).__name__}")
    if set(needed) - set(columns) or set(columns) - {*needed, *others}:
        need = f"{'a column' if len(needed) == 1 else 'columns'} {', '.join(needed)}"
        raise UserError(f"videos: need {need}, and if wanted {', '.join(others)}; got {', '.join(columns) or 'none'}")
    count = len(columns[needed[0]])
    if not count or any(len(values) != count for values in columns.values()):
        raise UserError("videos: need at least one row, and columns of the same length")
    return [
        {name: None if _is_none(values[n]) else values[n] for name, values in columns.items()} for n in range(count)
    ]


def _story(generator: Generator, row: Mapping[str, Any], frames: int) -> Story:
    board = row.get("storyboard")
    if board is not None:
        for name in ("class", "prompt"):
            if row.get(name) is not None:
                raise UserError(f"videos: {name} and storyboard: give one of them in a row")
        try:
            story = story_of(json.loads(board) if isinstance(board, str) else board, generator.classes)
            check_story(story, frames, generator.fps)
            return story
        except (UserError, json.JSONDecodeError) as e:
            raise UserError(f"videos: storyboard: {e}") from e
    return [(0.0, scene_of(row.get("class"), row.get("prompt"), generator.classes))]


def text_of(name: str, row: Mapping[str, Any]) -> str | None:
    """A text of a row, None for none. UserError for anything else."""
    text = row.get(name)
    if text is not None and not isinstance(text, str):
        raise UserError(f"videos: {name} must be a text, got {text!r}")
    return text


def seed_of(row: Mapping[str, Any]) -> int:
    """The seed of a row. UserError where it is no whole number, or negative."""
    seed = whole("seed", row["seed"])
    if seed < 0:
        raise UserError(f"videos: seed must not be negative, got {seed}")
    return seed


def serve(generator: Generator, table: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
    """Videos for `orders_of(table)`: `(N, T, H, W, 3)` uint8. `params` may change some of the settings. Raises UserError."""
    orders = orders_of(generator, table)
    settings = _settings(generator, params or {})
    check_requests(generator, [order.request for order in orders], settings)
    try:
        # one by one: the last bits of a video do not depend on the others
        return np.concatenate([concatenated(generator.videos([o.request], o.frames, settings)) for o in orders])
    except (ValueError, TypeError) as e:
        raise UserError(f"videos: {e}") from e


def _settings(generator: Generator, params: Mapping[str, Any]) -> Settings:
    """The generator's settings with the changes of a call."""
    changes = {name: value for name, value in params.items() if value is not None}
    defaults = vars(generator.settings)
    names = [name for name in defaults if name in generator.accepts] + list(_BY_PART)
    if unknown := changes.keys() - set(names):
        raise UserError(f"params: unknown {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if parts := {part: changes.pop(name) for name, part in _BY_PART.items() if name in changes}:
        if "guidance" in changes:
            raise UserError(f"params: guidance and {' or '.join(_BY_PART)}: give one number for both, or one for each")
        changes["guidance"] = parts
    try:
        return Settings(**defaults | changes)
    except ValueError as e:
        raise UserError(f"params: {e}") from e


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def whole(name: str, value: Any) -> int:
    """A whole number of a row. UserError for anything else."""
    try:
        if isinstance(value, bool) or int(value) != value:
            raise ValueError
        return int(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"videos: {name} must be a whole number, got {value!r}") from e
