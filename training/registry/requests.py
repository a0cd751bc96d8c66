"""Requests to a served prior, as tables, and the videos in answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.common.video import concatenated
from longtake.training.models.generator import Generator, Request, Story, class_id, story_of


class Order(NamedTuple):
    """A video that is asked for, and how many frames it has."""

    request: Request
    frames: int


def orders_of(generator: Generator, table: Any) -> list[Order]:
    """The videos that a caller of the served model asks for.

    Args:
        table: a pandas table, or lists or arrays by name: `seed` and, where wanted, `class` (a name or a number; None
            for none) and `frames`, the same in every row. A model that accepts storyboards also takes `storyboard` in
            place of `class`: a list of `{at, class}` (see `generator.story_of`) or the same as JSON; None for none.

    Raises:
        UserError: other columns or values.
    """
    columns = {str(name): list(table[name]) for name in getattr(table, "columns", table)}
    names = ["seed", "class", "frames", *(["storyboard"] if "storyboard" in generator.accepts else [])]
    if "seed" not in columns or set(columns) - set(names):
        raise UserError(
            f"videos: need a column seed, and if wanted {', '.join(names[1:])}; got {', '.join(columns) or 'none'}"
        )
    count = len(columns["seed"])
    if not count or any(len(values) != count for values in columns.values()):
        raise UserError("videos: need at least one row, and columns of the same length")
    seeds = [_whole("seed", value) for value in columns["seed"]]
    if min(seeds) < 0:
        raise UserError(f"videos: seed must not be negative, got {min(seeds)}")
    lengths = {generator.frames if _is_none(f) else _whole("frames", f) for f in columns.get("frames", [None] * count)}
    if len(lengths) > 1:
        raise UserError(f"videos: frames must be the same in every row, got {sorted(lengths)}")
    frames = lengths.pop()
    classes, boards = (columns.get(name, [None] * count) for name in ("class", "storyboard"))
    stories = [_story(generator, name, board) for name, board in zip(classes, boards, strict=True)]
    return [Order(Request(seed, story), frames) for seed, story in zip(seeds, stories, strict=True)]


def _story(generator: Generator, name: Any, board: Any) -> Story:
    if not _is_none(board):
        if not _is_none(name):
            raise UserError("videos: class and storyboard: give one of them in a row")
        try:
            return story_of(json.loads(board) if isinstance(board, str) else board, generator.classes)
        except (UserError, json.JSONDecodeError) as e:
            raise UserError(f"videos: storyboard: {e}") from e
    return [(0.0, class_id(None if _is_none(name) else str(name), generator.classes))]


def serve(generator: Generator, table: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
    """Videos for `orders_of(table)`: `(N, T, H, W, 3)` uint8. `params` may change some of the settings. Raises UserError."""
    orders = orders_of(generator, table)
    changes = {name: value for name, value in (params or {}).items() if value is not None}
    defaults = vars(generator.settings)
    if unknown := changes.keys() - defaults.keys():
        raise UserError(f"params: unknown {', '.join(sorted(unknown))}; there are {', '.join(defaults)}")
    settings = type(generator.settings)(**defaults | changes)
    try:
        # one by one: the last bits of a video do not depend on the others
        return np.concatenate([concatenated(generator.videos([o.request], o.frames, settings)) for o in orders])
    except (ValueError, TypeError) as e:
        raise UserError(f"videos: {e}") from e


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != value:
            raise ValueError
        return int(value)
    except (TypeError, ValueError) as e:
        raise UserError(f"videos: {name} must be a whole number, got {value!r}") from e
