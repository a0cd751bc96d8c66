"""The rows of a split that take part, and counts of the others by reason: pure functions over its N rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from longtake.datasets import audio, neighbours, view
from longtake.datasets.compact import Rows
from longtake.datasets.errors import UserError
from longtake.datasets.loader import streams
from longtake.datasets.loader.buckets import Shapes


@dataclass(frozen=True)
class Selection:
    """The rows of a split that take part, and counts of those that the view keeps and a rule leaves out."""

    where: str  # dataset and split, for messages
    keep: np.ndarray  # (N,) bool
    in_view: np.ndarray  # (N,) bool
    weights: np.ndarray | None  # (N,) of the view; None: all alike
    view_digest: str
    encoded: np.ndarray  # (N,) bool: rows with latents and tokens in each column of these
    without_latent: int = 0
    short: int = 0
    small: int = 0
    mixed_streams: int = 0
    without_history: int = 0
    without_sound: int = 0
    stream_latents: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64)
    )  # (samples,) latents in the stream of each row that takes part
    longest_stream: int = 0


def select(
    base: Rows, facts: pa.Table, view_url: str | None, shapes: Shapes, code_facts: Iterable[pa.Table], video: bool
) -> Selection:
    """Rows that a view keeps, that are as long as a window, that have latents or tokens, and for `video` as large.

    Args:
        code_facts: `compact.FACTS` of the columns of latents and tokens.

    Raises:
        UserError: no row of the view has latents or tokens, or none is as large as `shapes.size`.
    """
    in_view, weights, digest = view.kept(base, view_url)
    where = f"{base.dataset} ({base.split})"

    # length; a clip that is too short has no tokens either
    keep, short = _split_off(in_view, shapes.short)

    # latents and tokens
    encoded = np.ones(len(in_view), bool)
    for table in code_facts:
        encoded &= table["height"].to_numpy() > 0
    keep, without_latent = _split_off(keep, ~encoded)
    if without_latent and not keep.any():
        raise UserError(
            f"{where}: no clip of this view has latents or tokens; make them with this view, or without one"
        )

    # size
    too_small = keep & shapes.small & video
    keep, small = _split_off(keep, too_small)
    if small and not keep.any():
        height, width = (facts[name][int(np.argmax(too_small))].as_py() for name in ("height", "width"))
        size = "x".join(map(str, np.atleast_1d(shapes.size)))
        raise UserError(
            f"{where}: clips of {height}x{width} are smaller than size {size}; raise `clip.short_side` or lower `size`"
        )
    return Selection(where, keep, in_view, weights, digest, encoded, without_latent, short, small)


def with_sound(selection: Selection, columns: Mapping[str, Rows]) -> Selection:
    """Rows of clips that have sound. Raises UserError where none does, or sound is no column that is read."""
    if audio.COLUMN not in columns:
        raise UserError(f"heard: is of the column {audio.COLUMN!r}; name it in `columns`")
    rows = columns[audio.COLUMN]
    has = [rows.of(shard)["has_audio"].to_numpy(zero_copy_only=False) for shard in range(len(rows.shards))]
    keep, without_sound = _split_off(selection.keep, ~np.concatenate([np.empty(0, bool), *has]))
    if without_sound and not keep.any():
        raise UserError(f"{selection.where}: no clip that is used has sound; use others, or leave the sound out")
    return replace(selection, keep=keep, without_sound=without_sound)


def with_history(selection: Selection, base: Rows, seconds: float) -> Selection:
    """Rows of clips that follow at least `seconds` of their source without a hole. Raises UserError where none does."""
    reaches = neighbours.reach_back(base, seconds, selection.encoded)
    keep, without_history = _split_off(selection.keep, ~reaches)
    if without_history and not keep.any():
        raise UserError(
            f"{selection.where}: no clip follows others of its source for {seconds:g} s without a hole; lower the "
            "seconds of history, or shard longer shots, with a lower `clip.max_seconds`"
        )
    return replace(selection, keep=keep, without_history=without_history)


def in_streams(
    selection: Selection, latents: Rows, window: int, histories: streams.Lengths, shuffle: bool
) -> Selection:
    """Rows of streams with room for `histories.least` latents and a window of `window`; without `shuffle` one row a stream.

    A window may be anywhere in its stream: all rows of a stream are left out where the view leaves out one of them.

    Raises:
        UserError: no stream is in the view, or long enough.
    """
    totals, firsts = streams.totals(latents), streams.firsts(latents)
    keep, mixed = _split_off(selection.keep, np.isin(firsts, firsts[~selection.in_view]))
    if mixed and not keep.any():
        raise UserError(
            f"{selection.where}: every stream of latents has clips that the view leaves out; encode them with this view"
        )

    longest = int(totals[keep].max(initial=0))
    keep, short = _split_off(keep, totals < histories.least + window)
    if short and not keep.any():
        raise UserError(
            f"{selection.where}: no stream of latents has {histories.least} steps of history and {window} of a window,"
            f" the longest {longest} in all; lower the seconds of history, or encode clips in longer streams, with"
            " `join_seconds`"
        )

    if not shuffle:
        rows = np.flatnonzero(keep)
        keep = np.zeros_like(keep)
        keep[rows[np.unique(firsts[rows], return_index=True)[1]]] = True
    selection = replace(selection, keep=keep, mixed_streams=mixed, without_history=short)
    return replace(selection, stream_latents=totals[keep], longest_stream=longest)


def _split_off(keep: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, int]:
    """`keep` without the rows of `out`, and how many of its rows these are."""
    rest = keep & ~out
    return rest, int(keep.sum() - rest.sum())
