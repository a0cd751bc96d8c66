"""What callers of a served prior ask for, as tables, and the videos that they get."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.common.sampling import Prior, Settings, generate_videos, whole
from longtake.training.models.memory import prior as recall
from longtake.training.models.memory.prior import MemoryPrior


class Request(NamedTuple):
    """A video: its seed, what it is of at which second, and how many frames it has."""

    seed: int
    story: list[tuple[float, int]]
    frames: int


def requests_of(prior: Prior | MemoryPrior, given: Any) -> list[Request]:
    """What a caller of the served model asks for.

    Args:
        given: a pandas table, or lists or arrays by name: `seed` and, where wanted, `class` (a name or a number; None
            for none) and `frames`, the same in every row. A model with a memory also takes `storyboard` in place of
            `class`: a list of `{at, class}` (see `recall.story_of`) or the same as JSON; None for none.

    Raises:
        UserError: other columns or values.
    """
    columns = {str(name): list(given[name]) for name in getattr(given, "columns", given)}
    known = ["seed", "class", "frames", *(["storyboard"] if isinstance(prior, MemoryPrior) else [])]
    if "seed" not in columns or set(columns) - set(known):
        raise UserError(
            f"videos: need a column seed, and if wanted {', '.join(known[1:])}; got {', '.join(columns) or 'none'}"
        )
    count = len(columns["seed"])
    if not count or any(len(values) != count for values in columns.values()):
        raise UserError("videos: need at least one row, and columns of the same length")
    seeds = [_whole("seed", value) for value in columns["seed"]]
    if min(seeds) < 0:
        raise UserError(f"videos: seed must not be negative, got {min(seeds)}")
    lengths = {prior.frames if _is_none(f) else _whole("frames", f) for f in columns.get("frames", [None] * count)}
    if len(lengths) > 1:
        raise UserError(f"videos: frames must be the same in every row, got {sorted(lengths)}")
    frames = lengths.pop()
    classes, boards = (columns.get(name, [None] * count) for name in ("class", "storyboard"))
    return [Request(s, _story(prior, c, b), frames) for s, c, b in zip(seeds, classes, boards, strict=True)]


def _story(prior: Prior | MemoryPrior, name: Any, board: Any) -> list[tuple[float, int]]:
    if isinstance(prior, MemoryPrior) and not _is_none(board):
        if not _is_none(name):
            raise UserError("videos: class and storyboard: give one of them in a row")
        try:
            return recall.story_of(json.loads(board) if isinstance(board, str) else board, prior)
        except (UserError, json.JSONDecodeError) as e:
            raise UserError(f"videos: storyboard: {e}") from e
    return [(0.0, prior.class_id(None if _is_none(name) else str(name)))]


def serve(prior: Prior | MemoryPrior, given: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
    """Videos for `requests_of(given)`: `(N, T, H, W, 3)` uint8. `params` may change some of `Settings`. Raises UserError."""
    asked = requests_of(prior, given)
    changes = {name: value for name, value in (params or {}).items() if value is not None}
    if unknown := changes.keys() - Settings.__dataclass_fields__.keys():
        raise UserError(
            f"params: unknown {', '.join(sorted(unknown))}; there are {', '.join(Settings.__dataclass_fields__)}"
        )
    settings = Settings(**vars(prior.settings) | changes)
    try:
        # one by one: the last bits of a video do not depend on the others
        return np.concatenate([whole(_video(prior, one, settings)) for one in asked])
    except (ValueError, TypeError) as e:
        raise UserError(f"videos: {e}") from e


def _video(prior: Prior | MemoryPrior, asked: Request, settings: Settings) -> Iterator[np.ndarray]:
    if isinstance(prior, MemoryPrior):
        story = [(at, [c]) for at, c in asked.story]
        return recall.generate_videos(prior, asked.frames, [asked.seed], story, settings)
    classes = [c for _, c in asked.story]
    return generate_videos(prior.latte, prior.vae, asked.frames, [asked.seed], classes, settings)


def serve_recall(prior: MemoryPrior, videos: Any) -> np.ndarray:
    """What the memory of each of some videos `(B, T, H, W, 3)` uint8 has kept, of all frames it is of. Raises UserError."""
    if not isinstance(videos, np.ndarray) or videos.ndim != 5 or not len(videos):
        got = f"{videos.dtype} {videos.shape}" if isinstance(videos, np.ndarray) else type(videos).__name__
        raise UserError(f"videos: need a uint8 array (B, T, H, W, 3), got {got}")
    return np.stack([recall.recall(prior, video)[0] for video in videos])


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != value:
            raise ValueError
        return int(value)
    except (TypeError, ValueError) as e:
        raise UserError(f"videos: {name} must be a whole number, got {value!r}") from e
