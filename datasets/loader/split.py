"""A split and its columns: their names in batches, their rows in the order of the base's, and the windows that they allow."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import audio, compact, schema
from longtake.datasets.cache import Cache
from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import streams
from longtake.datasets.loader.reader import Reader
from longtake.datasets.loader.streams import latents_before

COLUMNS = ("video", "frame_diff", "audio", "latent-DIGEST", "json", "label")
_LATENT = "latent-"  # how columns of latents begin


class Split:
    """A split with its cache columns, as worker processes need it."""

    def __init__(self, base: Rows, names: Mapping[str, str], columns: Mapping[str, Rows], reader: Reader) -> None:
        """`names` are columns by the names that samples have them under, `columns` the rows of those that are caches."""
        self.base, self.names, self.columns, self.reader = base, names, columns, reader
        self.latents = tuple(name for name in columns if names[name].startswith(_LATENT))
        self.labels: dict[str, int] = {}  # the number of each label

    @cached_property
    def sound(self) -> tuple[int, int]:
        """The rate and the channels of the column of sound."""
        rows = self.columns[audio.COLUMN]
        first = rows.row(int(np.flatnonzero(rows.counts)[0]), 0)
        return first["rate"], first["channels"]

    def check_windows(self, lengths: Sequence[int], stride: int, histories: streams.Lengths | None) -> None:
        """Check that the columns have windows of these numbers of frames.

        Raises:
            UserError: a window would not be of whole latents; columns of latents have other factors; a stream of several
                clips is read without `histories`, or anything but latents and labels with them.
        """
        factors = {self.names[name]: factor_of(self.columns[name]) for name in self.latents}
        for column, factor in factors.items():
            first, first_factor = next(iter(factors.items()))
            if factor != first_factor:
                raise UserError(
                    f"columns: {column} has a step for {factor} frames, {first} for {first_factor}; name latents of one encoder"
                )
            if stride != 1 or any((t - 1) % factor for t in lengths):
                raise UserError(
                    f"frames: {column} has a step for {factor} frames: windows of 1 + {factor}n frames, stride 1"
                )
        if histories:
            others = [c for c in self.names.values() if c != "label" and not c.startswith(_LATENT)]
            if others or not factors or len(lengths) > 1:
                raise UserError("histories: are of latents and windows of one length; leave out what else is asked for")
        elif joined := [self.names[name] for name in self.latents if streams.joined(self.columns[name])]:
            raise UserError(
                f"columns: {joined[0]} was encoded in streams of several clips, a window inside of one has no first latent;"
                " name latents without `join_seconds`"
            )

    def cache_row(self, column: str, shard: int, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Row `number` of a shard in a cache column's index. Raises Failure where its clip is not that of the base's `row`."""
        cached = self.columns[column].row(shard, number)
        if cached["key"] != row["key"] or cached["base_sha256"] != row["sha256"]:
            url = self.columns[column].tar(shard)[0]
            raise Failure(f"{url}: made from other clips; delete the column's indexes and run its stage again")
        return cached

    def latent_rows(self, shard: int, number: int, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The `cache_row` of each column of latents."""
        return [self.cache_row(column, shard, number, row) for column in self.latents]

    def check_alike(self, shard: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise Failure where a clip has other latents in one column, by its `latent_rows`, than in another."""
        for column, row in zip(self.latents[1:], rows[1:], strict=True):
            where = f"{self.columns[column].tar(shard)[0]}: {row['key']}"
            first_column, first = self.names[self.latents[0]], rows[0]
            if row["steps"] != first["steps"]:
                raise Failure(
                    f"{where}: has {row['steps']} steps, and {first['steps']} in {first_column}; "
                    "delete the column's indexes and run its stage again"
                )
            if latents_before(row) != latents_before(first):
                raise Failure(
                    f"{where}: begins at step {latents_before(row)} of its stream, and at"
                    f" {latents_before(first)} in {first_column}; encode both with the same join_seconds"
                )


def by_name(columns: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Columns by the names that batches have them under. Raises UserError for an unknown column, or a name that it cannot have."""
    pairs = (
        list(columns.items())
        if isinstance(columns, Mapping)
        else [("latent" if c.startswith(_LATENT) else c, c) for c in columns]
    )
    listed = [column for _, column in pairs]
    if unknown := {c for c in listed if c not in COLUMNS and not c.startswith(_LATENT)}:
        raise UserError(f"columns: unknown {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    if twice := {c for c in listed if listed.count(c) > 1}:
        raise UserError(f"columns: {', '.join(sorted(twice))} twice; name each once")
    names = dict(pairs)
    if len(names) < len(pairs):
        nameless = [column for name, column in pairs if name == "latent"]
        raise UserError(f"columns: {' and '.join(nameless)} need names, such as columns={{'latent': ..., 'low': ...}}")
    for name, column in pairs:
        if name != column and (name in COLUMNS or not column.startswith(_LATENT)):
            raise UserError(f"columns: {column} cannot be called {name!r}; choose another name, or leave it out")
    return names


def open_columns(base: Rows, names: Mapping[str, str], cache: Cache | None) -> tuple[Split, list[pa.Table]]:
    """A split with the cache columns among `names`, and the `FACTS` of its columns of latents.

    Raises:
        UserError: clips of the base have no sound to load.
        Failure: another column lacks clips of the base.
    """
    caches = {name: c for name, c in names.items() if c in ("frame_diff", audio.COLUMN) or c.startswith(_LATENT)}
    opened = {name: _open(base, column, cache) for name, column in caches.items()}
    split = Split(base, names, {name: rows for name, (rows, _) in opened.items()}, Reader(cache))
    return split, [opened[name][1] for name in split.latents]


def factor_of(latents: Rows) -> int:
    """Frames in a latent after the first; 1 for a column without rows."""
    filled = np.flatnonzero(latents.counts)
    return latents.of(int(filled[0]))["factor"][0].as_py() if len(filled) else 1


def classes(base: Rows, facts: pa.Table, cache: Cache | None) -> list[str]:
    """The labels of all splits of a dataset, sorted: the numbers of column `label` count them. Raises UserError: there are none."""
    splits = [split for split in schema.SPLITS if split != base.split]
    others = [compact.open_split(base.dataset, split, cache=cache)[1] for split in splits]
    labels = {label for table in (facts, *others) for label in pc.unique(table["label"]).drop_null().to_pylist()}
    if not labels:
        raise UserError(f"{base.dataset}: no clip has a label; give the manifest a `label` column")
    return sorted(labels)


def _open(base: Rows, column: str, cache: Cache | None) -> tuple[Rows, pa.Table]:
    """The rows of a cache column and their `FACTS`, in the base's order.

    Raises:
        UserError: there is no sound of some shard.
        Failure: a shard has another number of rows than in the base. That they belong to its clips is checked on reading.
    """
    rows, facts = compact.open_split(base.dataset, base.split, column, cache)
    names = rows.shards["name"].to_pylist()
    counts = dict(zip(names, rows.counts.tolist(), strict=True))
    base_names = base.shards["name"].to_pylist()
    expected = {f"{n}.{column}": count for n, count in zip(base_names, base.counts.tolist(), strict=True)}
    wrong = {name: count for name, count in expected.items() if counts.get(name) != count}
    if wrong:
        missing = sum(max(0, count - counts.get(name, 0)) for name, count in wrong.items())
        problem = (
            f"{missing} clips have no {column}" if missing else f"{next(iter(wrong))} has clips that are not there"
        )
        where = f"{base.dataset} ({base.split})"
        if missing and column == audio.COLUMN:
            raise UserError(f"{where}: {missing} clips were cut without their sound; add it with a `cache_audio` stage")
        raise Failure(f"{where}: {problem}; delete the column's indexes and run its stage again")
    # a column's shard is committed before its base shard: drop those that are ahead
    in_base = np.array([name in expected for name in names], bool)
    return rows.only(list(expected)), facts if in_base.all() else facts.filter(np.repeat(in_base, rows.counts))
