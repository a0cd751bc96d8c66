"""Requests to a served infiller, as tables, and the frames in answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.generator import Gap, Infiller, InfillSettings, with_changes
from longtake.training.registry.requests import rows_of, seed_of, text_of, whole

NEEDED = ("before", "after", "frames", "seed")  # columns
WORDS = ("prompt", "negative")
# what a call may change of the settings, with its type as MLflow needs it
PARAMETERS = {
    field.name: {int: "long", float: "double", str: "string"}[type(field.default)] for field in fields(InfillSettings)
}


class Order(NamedTuple):
    """A gap that is to be filled."""

    gap: Gap
    seed: int
    negative: str | None


def orders_of(table: Any) -> list[Order]:
    """The gaps that a caller of the served model asks for.

    Args:
        table: a pandas table, lists or arrays by name, or a list of rows: `before` and `after`, the frames on the sides of a
            gap, `(t, H, W, 3)` in 0..255 as an array or as nested lists; `frames`, how many to make, the same in every row;
            `seed`; and where wanted `prompt` and `negative`, texts, None for none.

    Raises:
        UserError: other columns or values.
    """
    rows = rows_of(table, NEEDED, WORDS)
    lengths = {whole("frames", row["frames"]) for row in rows}
    if len(lengths) > 1:
        raise UserError(f"videos: frames must be the same in every row, got {sorted(lengths)}")
    frames = lengths.pop()
    return [
        Order(
            Gap(_clip("before", row), _clip("after", row), frames, text_of("prompt", row)),
            seed_of(row),
            text_of("negative", row),
        )
        for row in rows
    ]


def serve_gaps(infiller: Infiller, table: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
    """The frames of the gaps of `orders_of(table)`: `(N, frames, H, W, 3)` uint8.

    The same row gives the same frames, whatever is beside it.

    Args:
        params: may change some of the settings.

    Raises:
        UserError: other columns, values or settings; texts that the model cannot be led by.
    """
    orders = orders_of(table)
    changes = {name: value for name, value in (params or {}).items() if value is not None}
    if unknown := changes.keys() - PARAMETERS.keys():
        raise UserError(f"params: unknown {', '.join(sorted(unknown))}; there are {', '.join(PARAMETERS)}")
    try:
        settings = with_changes(infiller.settings, changes)
    except ValueError as e:
        raise UserError(f"params: {e}") from e
    _check_texts(infiller, orders, settings)
    try:
        # all are checked at the call, before the first is made
        made = [infiller.fill([o.gap], o.seed, settings, negative=o.negative) for o in orders]
        return np.stack([next(frames) for frames in made])
    except (ValueError, TypeError) as e:
        raise UserError(f"videos: {e}") from e


def pixels_of(video: Any) -> Any:
    """Nested lists of 0..255, as JSON brings them over HTTP, as an array; anything else as it is."""
    if not isinstance(video, list):
        return video
    try:
        values = np.array(video)
    except ValueError:
        return video
    fits = values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 255
    return values.astype(np.uint8) if fits else values


def _clip(name: str, row: Mapping[str, Any]) -> np.ndarray:
    clip = pixels_of(row[name])
    if not isinstance(clip, np.ndarray) or clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        got = f"{clip.dtype} {clip.shape}" if isinstance(clip, np.ndarray) else type(clip).__name__
        raise UserError(f"videos: {name} must be a uint8 video (t, H, W, 3), got {got}")
    return clip


def _check_texts(infiller: Infiller, orders: list[Order], settings: InfillSettings) -> None:
    negatives = [order.negative for order in orders if order.negative is not None]
    texts = [order.gap.prompt for order in orders if order.gap.prompt is not None] + negatives
    if texts and not infiller.takes_prompts:
        raise UserError("prompt: this model takes none; leave it out")
    if negatives and settings.guidance <= 1:
        raise UserError(
            f"negative: guidance leads away from it, and is {settings.guidance:g}; set guidance above 1, such as 4"
        )
    if texts:
        infiller.check_prompts(list(dict.fromkeys(texts)))
