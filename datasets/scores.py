"""Scores of clips: columns `score-NAME-DIGEST`, each a table beside the shards, and the record of those that a stage has made.

A column is the values of one scorer with its weights and settings. Its table has a row a clip: `key`, `base_sha256`,
`reason` (null where the clip has all values, else why one is missing), and a column for each of the scorer's fields. A rule
names a value as NAME.FIELD, such as `motion.camera`. The index of each shard says in its notes what the column is, so that
it can be read without a record.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import compact, index, record, schema, storage
from longtake.datasets.errors import Failure, UserError, near

PREFIX = "score-"

# Why a clip has no value; a scorer may have codes of its own.
REASONS = {
    "not_in_view": "the view leaves it out",
    "no_value": "the scorer has none for it, such as a movement of one frame",
    "not_finite": "the value is no number: NaN or infinite",
    "not_scored": "the column has no row for it yet",  # in tables that are read, never stored
}

_THREADS = 16


@dataclass(frozen=True)
class Field:
    """What a scorer gives a clip.

    name     in lower case, `[a-z][a-z0-9_]*`, no name of schema.SCORE_INDEX
    kind     a number, one of some labels, or a vector
    meaning  a line for people, with the unit and the range
    labels   all that there are, of a label
    width    D of a vector (D,) float16
    count    N where there is a vector for each of at most N frames, (N, D); None: one vector
    """

    name: str
    kind: Literal["number", "label", "vector"]
    meaning: str
    labels: tuple[str, ...] = ()
    width: int = 0
    count: int | None = None

    @property
    def type(self) -> pa.DataType:
        """Of its column in a table; lists of a fixed size with nulls are not readable in Parquet."""
        if self.kind == "number":
            return pa.float32()
        if self.kind == "label":
            return pa.string()
        vector = pa.list_(pa.float16())
        return vector if self.count is None else pa.list_(vector)


def table_schema(fields: Sequence[Field]) -> pa.Schema:
    """Of a column's table."""
    return pa.schema([*schema.SCORE_INDEX, *((field.name, field.type) for field in fields)])


@dataclass(frozen=True)
class Column:
    """One column of scores.

    column   "score-NAME-DIGEST"
    scorer   its name in the table of scorers, or the stage that made it
    config   the scorer's settings, as plain data
    digest   of files that decide the values, such as weights
    fields   what it gives
    """

    column: str
    scorer: str
    config: Mapping[str, Any]
    digest: str
    fields: tuple[Field, ...]

    def plain(self) -> dict[str, Any]:
        """As `from_plain` takes it."""
        return asdict(self)


def from_plain(plain: Mapping[str, Any]) -> Column:
    """The inverse of `Column.plain`, also after a way through JSON. Raises KeyError, TypeError, ValueError."""
    fields = (Field(**(each | {"labels": tuple(each["labels"])})) for each in plain["fields"])
    return Column(**{**plain, "fields": tuple(fields)})


@dataclass(frozen=True)
class Scores:
    """The columns that a stage has made.

    dataset  URL
    columns  by the name that the recipe gives them
    view     URL; only clips that it keeps were scored
    digests  of the splits' base shards when this was written (see `compact.Rows`)
    """

    dataset: str
    columns: Mapping[str, Column]
    view: str | None
    digests: Mapping[str, str]

    @property
    def names(self) -> dict[str, str]:
        """The column of each name, as `table` takes them."""
        return {name: column.column for name, column in self.columns.items()}


def write_scores(uri: str, scores: Scores) -> None:
    """Write the record of a stage's columns to its output."""
    plain = {name: column.plain() for name, column in scores.columns.items()}
    record.write(uri, "scores", {**vars(scores), "columns": plain})


def read_scores(uri: str) -> Scores:
    """The record that a stage has written. Raises UserError, Failure: see `record.read`."""

    def parsed(columns: Mapping[str, Any], **fields: Any) -> Scores:
        return Scores(columns={name: from_plain(column) for name, column in columns.items()}, **fields)

    return record.read(uri, "scores", "score", parsed)


def read_scores_of(uri: str, dataset: str) -> Scores:
    """The record at `uri`. Raises UserError where its columns are of another dataset."""
    scores = read_scores(uri)
    if storage.absolute(scores.dataset) != storage.absolute(dataset):
        raise UserError(f"{uri}: has scores of {scores.dataset}, not of {dataset}; name those of this dataset")
    return scores


# A column, shard by shard.


def column_name(name: str, decides: Any) -> str:
    """`score-NAME-DIGEST`, by all that decides the values, as plain data."""
    return f"{PREFIX}{name}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"


def write_shard(dataset: str, base: index.Shard, column: Column, values: Sequence[Mapping[str, Any]]) -> int:
    """Commit a column's table for all clips of a base shard; returns the number of clips that lack a value.

    Args:
        values: of each clip in the order of the base, by the name of the field: a number, a label, (D,) or (N, D) of any
            float type, None where there is none; perhaps with a "reason" why. What is not finite becomes null.

    Raises:
        Failure: a value does not fit its field.
    """
    rows = [_checked(base, key, column, row) for key, row in zip(base.table["key"].to_pylist(), values, strict=True)]
    arrays = [base.table["key"], base.table["sha256"], pa.array([row["reason"] for row in rows], pa.string())]
    arrays += [_array(field, [row[field.name] for row in rows]) for field in column.fields]
    table = pa.table(arrays, schema=table_schema(column.fields))
    url = storage.join(dataset, base.split, f"{base.name}.{column.column}.parquet")
    index.commit_table(url, table, column.plain())
    return len(table) - table["reason"].null_count


def _checked(base: index.Shard, key: str, column: Column, values: Mapping[str, Any]) -> dict[str, Any]:
    """A clip's values as they are stored, with their `reason`."""
    row: dict[str, Any] = {"reason": None}
    for field in column.fields:
        value, reason = values.get(field.name), values.get("reason") or "no_value"
        if value is not None and field.kind != "label":
            # beyond the range of the type it is no number either
            with np.errstate(over="ignore"):
                value = np.asarray(value).astype(np.float16 if field.kind == "vector" else np.float32)
            if not np.isfinite(value).all():
                value, reason = None, "not_finite"
        if value is not None and not _fits(field, value):
            shown = repr(value) if field.kind == "label" else f"an array of shape {value.shape}"
            raise Failure(
                f"{base.split}/{base.name}: {key}: scorer {column.scorer} gives {shown[:80]} as {field.name}, a"
                f" {field.kind}{f' of {field.width}' if field.width else ''}; correct the scorer"
            )
        row[field.name] = value
        if value is None and row["reason"] in (None, "no_value"):
            row["reason"] = reason
    return row


def _fits(field: Field, value: Any) -> bool:
    if field.kind == "label":
        return value in field.labels
    if field.kind == "number":
        return bool(value.shape == ())
    if field.count is None:
        return bool(value.shape == (field.width,))
    return bool(value.ndim == 2 and value.shape[1] == field.width and 0 < len(value) <= field.count)


def _array(field: Field, values: Sequence[Any]) -> pa.Array:
    if field.kind != "vector":
        return pa.array([None if value is None else getattr(value, "item", lambda v=value: v)() for value in values],
                        field.type)  # fmt: skip
    given = [value for value in values if value is not None]
    missing = pa.array([value is None for value in values], pa.bool_())
    flat = pa.array(np.concatenate([np.ravel(value) for value in given] or [np.empty(0, np.float16)]), pa.float16())
    counts = [0 if value is None else len(value) for value in values]
    if field.count is None:
        return pa.ListArray.from_arrays(_offsets(counts), flat, mask=missing)
    inner = pa.ListArray.from_arrays(_offsets([field.width] * sum(counts)), flat)
    return pa.ListArray.from_arrays(_offsets(counts), inner, mask=missing)


def _offsets(counts: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())


def columns_of(dataset: str) -> list[str]:
    """The names of a dataset's columns of scores, whole or not."""
    stems = (
        name.removesuffix(".parquet").partition(".")[2]
        for split in schema.SPLITS
        for name in index.table_names(storage.join(dataset, split))
    )
    return sorted({stem for stem in stems if stem.startswith(PREFIX)})


def count(dataset: str, column: str) -> int:
    """The number of clips that have all values of a column."""
    places = [(split, name) for split in schema.SPLITS for name in index.shard_names(dataset, split, column)]
    urls = [storage.join(dataset, split, f"{name}.parquet") for split, name in places]
    with ThreadPoolExecutor(_THREADS) as pool:
        return sum(pool.map(lambda url: index.from_parquet(url, ["reason"])["reason"].null_count, urls))


def described(dataset: str, column: str) -> Column:
    """What a column is, as its first shard says. Raises UserError where the dataset has no such column, Failure: damaged."""
    for split in schema.SPLITS:
        if names := index.shard_names(dataset, split, column):
            return _described(dataset, split, names[0], index.notes_of(dataset, split, names[0]))
    there = columns_of(dataset)
    remark = near(column, there) if there else "there are none of scores; run a `score` stage"
    raise UserError(f"{dataset}: no column {column}; {remark}")


def _described(dataset: str, split: str, name: str, notes: Mapping[str, Any]) -> Column:
    try:
        return from_plain(notes)
    except (KeyError, TypeError, ValueError) as e:
        url = storage.join(dataset, split, f"{name}.parquet")
        raise Failure(f"{url}: does not say what it has ({e}); delete it and run its `score` stage again") from e


# A column as a whole.


def table(
    dataset: str,
    split: str,
    columns: Mapping[str, str],
    fields: Collection[str] | None = None,
    base: compact.Rows | None = None,
) -> pa.Table:
    """The scores of all clips of a split in the order of its shards, a column NAME.FIELD each; null where there is none.

    Args:
        columns: the column of each name.
        fields: those to read, as NAME.FIELD; None: all.
        base: the rows of the split, where they are open already.

    Raises:
        UserError: the dataset has no such column.
        Failure: a shard is damaged.
    """
    base = compact.open_split(dataset, split)[0] if base is None else base
    arrays: dict[str, pa.ChunkedArray] = {}
    for name, column in columns.items():
        names = [field.name for field in described(dataset, column).fields]
        wanted = [each for each in names if fields is None or f"{name}.{each}" in fields]
        if wanted:
            read = read_column(dataset, split, column, wanted, base)
            arrays |= {f"{name}.{each}": read[each] for each in wanted}
    return pa.table(arrays)


def read_column(
    dataset: str, split: str, column: str, fields: Sequence[str] | None = None, base: compact.Rows | None = None
) -> pa.Table:
    """`reason` and the fields of a column for all clips of a split in the order of its shards.

    A clip without a row has nulls, and the reason "not_scored".

    Args, Raises: as `table`, but `fields` are names of fields.
    """
    base = compact.open_split(dataset, split)[0] if base is None else base
    whole = table_schema(described(dataset, column).fields)
    names = ["reason", *(whole.names[len(schema.SCORE_INDEX) :] if fields is None else fields)]
    kind = pa.schema([whole.field(name) for name in names])
    scored = compact.open_split(dataset, split, column)[0]
    places = {name.partition(".")[0]: n for n, name in enumerate(scored.shards["name"].to_pylist())}

    def of_shard(number: int) -> pa.Table:
        place = places.get(base.name(number))
        return _joined(base.of(number), None if place is None else scored.of(place), kind)

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(of_shard, range(len(base.shards))))
    return pa.concat_tables([kind.empty_table(), *parts])


def _joined(base: pa.Table, rows: pa.Table | None, kind: pa.Schema) -> pa.Table:
    """The rows of a shard of a column for the clips of its base shard."""
    if rows is None:
        nothing = {each.name: pa.nulls(len(base), each.type) for each in kind}
        return pa.table(nothing | {"reason": pa.repeat("not_scored", len(base))}, kind)
    if not (base["key"].equals(rows["key"]) and base["sha256"].equals(rows["base_sha256"])):
        # of other clips: those that are the same still count
        pairs = zip(rows["key"].to_pylist(), rows["base_sha256"].to_pylist(), strict=True)
        by_clip = {pair: n for n, pair in enumerate(pairs)}
        asked = zip(base["key"].to_pylist(), base["sha256"].to_pylist(), strict=True)
        places = pa.array([by_clip.get(pair) for pair in asked], pa.int64())
        reason = pc.if_else(pc.is_null(places), "not_scored", rows["reason"].take(places))
        rows = rows.take(places).set_column(rows.column_names.index("reason"), "reason", reason)
    return rows.select(kind.names).replace_schema_metadata(None)


def vectors(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The clips that have a vector, and the vectors, of a field as `table` gives it.

    Returns:
        (M,) int64 ascending numbers of rows, and (M, D) float16; of a field with a vector a frame the row of each, and all.

    Raises:
        UserError: they are of two sizes.
    """
    if not pa.types.is_list(column.type):
        raise UserError(f"a column of {column.type} has no vectors; name a field that is one")
    rows = pc.indices_nonzero(pc.is_valid(column)).to_numpy().astype(np.int64)
    if pa.types.is_list(column.type.value_type):
        counts = pc.list_value_length(column.drop_null()).to_numpy()
        rows, column = rows.repeat(counts), pc.list_flatten(column)
    widths = pc.unique(pc.list_value_length(column.drop_null())).to_pylist()
    if len(widths) > 1:
        raise UserError(
            f"vectors of {' and '.join(map(str, sorted(widths)))} numbers are in one column; score it again"
        )
    flat = pc.list_flatten(column)
    flat = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    return rows, np.asarray(flat, np.float16).reshape(len(rows), widths[0] if widths else 0)


def of_key(dataset: str, split: str, shard: str, key: str) -> dict[str, dict[str, Any]]:
    """The values of one clip by column, with the `reason` where one is missing; columns without a row for it left out."""
    found = {}
    for column in columns_of(dataset):
        if storage.exists(storage.join(dataset, split, f"{shard}.{column}.parquet")):
            rows = index.read_shard(dataset, split, f"{shard}.{column}").table
            for row in rows.filter(pc.equal(rows["key"], key)).to_pylist():
                found[column] = {name: value for name, value in row.items() if name not in ("key", "base_sha256")}
    return found


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for each contradiction in a shard of scores."""
    url = storage.join(dataset, shard.split, f"{shard.name}.parquet")
    remedy = "delete it and run its `score` stage again"
    try:
        column = _described(dataset, shard.split, shard.name, index.read_notes(dataset, shard))
    except Failure as e:
        yield str(e)
        return
    if column.column != shard.name.partition(".")[2]:
        yield f"{url}: has the scores of another column, {column.column}; {remedy}"
    if shard.table.schema.remove_metadata() != table_schema(column.fields):
        yield f"{url}: not a table of the scores that its notes name; {remedy}"
        return
    for row in shard.table.to_pylist():
        values = {field: row[field.name] for field in column.fields}
        if (row["reason"] is None) == (None in values.values()):
            yield f"{url}: {row['key']}: lacks a value without a reason, or has a reason and all values; {remedy}"
        for field, value in values.items():
            number = value if value is None or field.kind == "label" else np.asarray(value, np.float32)
            if value is not None and (
                not _fits(field, number) or (field.kind != "label" and not np.isfinite(number).all())
            ):
                yield f"{url}: {row['key']}: {field.name} is not what its field says; {remedy}"
