"""Scores of clips: columns `score-NAME-DIGEST`, each a table beside the shards, and the record of those that a stage has made.

A column is the values of one scorer with its weights and settings. Its table has a row a clip: `key`, `base_sha256`,
`reason` (null where the clip has all values, else why one is missing), and a column for each of the scorer's fields. A rule
names a value as NAME.FIELD, such as `motion.camera`. The index of each shard says in its notes what the column is, so that
it can be read without a record.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
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
    config   the scorer's settings that decide the values, as plain data
    digest   of files that decide the values, such as weights
    fields   what it gives
    where    the other settings, such as where these files lie; known to the record of the stage alone
    """

    column: str
    scorer: str
    config: Mapping[str, Any]
    digest: str
    fields: tuple[Field, ...]
    where: Mapping[str, Any] = dataclass_field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All that are known."""
        return {**self.config, **self.where}

    def plain(self) -> dict[str, Any]:
        """As `from_plain` takes it."""
        return asdict(self)

    def notes(self) -> dict[str, Any]:
        """The same as each shard has it, whose bytes do not depend on where files lie."""
        return {name: value for name, value in self.plain().items() if name != "where"}


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


def stage_of(column: str) -> str:
    """The kind of the stage that makes a column, by its name, or by that of one of its shards."""
    return "cluster" if column[column.find(PREFIX) :].startswith(f"{PREFIX}cluster-") else "score"


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
    index.commit_table(url, table, column.notes())
    return len(table) - table["reason"].null_count


def _checked(base: index.Shard, key: str, column: Column, values: Mapping[str, Any]) -> dict[str, Any]:
    """A clip's values as they are stored, with their `reason`."""
    row: dict[str, Any] = {"reason": None}
    for field in column.fields:
        value, reason = values.get(field.name), values.get("reason") or "no_value"
        if value is not None and field.kind != "label":
            value = _floats(base, key, column, field, value)
            if not np.isfinite(value).all():
                value, reason = None, "not_finite"
        if value is not None and not _fits(field, value):
            shown = repr(value) if field.kind == "label" else f"an array of shape {value.shape}"
            raise _refusal(base, key, column, field, shown)
        row[field.name] = value
        if value is None and row["reason"] in (None, "no_value"):
            row["reason"] = reason
    return row


def _floats(base: index.Shard, key: str, column: Column, field: Field, value: Any) -> np.ndarray:
    try:
        # beyond the range of the type it is no number either
        with np.errstate(over="ignore"):
            return np.asarray(value).astype(np.float16 if field.kind == "vector" else np.float32)
    except (TypeError, ValueError) as e:
        raise _refusal(base, key, column, field, repr(value)) from e


def _refusal(base: index.Shard, key: str, column: Column, field: Field, given: str) -> Failure:
    return Failure(
        f"{base.split}/{base.name}: {key}: scorer {column.scorer} gives {' '.join(given.split())[:80]} as {field.name}, a"
        f" {field.kind}{f' of {field.width}' if field.width else ''}; correct the scorer"
    )


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


def counts(dataset: str, column: str) -> dict[str, int]:
    """The number of clips that have a value, by field."""
    places = [(split, name) for split in schema.SPLITS for name in index.shard_names(dataset, split, column)]
    names = [field.name for field in described(dataset, column).fields]

    def of_shard(place: tuple[str, str]) -> list[int]:
        url = storage.join(dataset, place[0], f"{place[1]}.parquet")
        nulls, rows = index.null_counts(url)
        return [rows - nulls[name] for name in names]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, map(sum, zip(*pool.map(of_shard, places), strict=True)), strict=True))


def fits(dataset: str, base: index.Shard, column: str) -> bool:
    """Whether a column has a base shard of just these clips; of the column nothing else is read. Raises Failure: it has none."""
    url = storage.join(dataset, base.split, f"{base.name}.{column}.parquet")
    rows = index.columns_of(url, ["key", "base_sha256"])
    return bool(rows["key"].equals(base.table["key"]) and rows["base_sha256"].equals(base.table["sha256"]))


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
        raise Failure(
            f"{url}: does not say what it has ({e}); delete it and run its `{stage_of(name)}` stage again"
        ) from e


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

    A clip without a row has nulls, and the reason "not_scored". Vectors that are not asked for are not read; the digest of
    such a shard is then not checked, as it is of all of them.

    Args, Raises: as `table`, but `fields` are names of fields.
    """
    base = compact.open_split(dataset, split)[0] if base is None else base
    known = described(dataset, column).fields
    whole = table_schema(known)
    names = ["reason", *(whole.names[len(schema.SCORE_INDEX) :] if fields is None else fields)]
    kind = pa.schema([whole.field(name) for name in names])
    read = (
        _without_vectors if any(each.kind == "vector" and each.name not in names for each in known) else _checked_rows
    )
    rows_of = read(dataset, split, column, names)

    def of_shard(number: int) -> pa.Table:
        return _joined(base.of(number), rows_of(base.name(number)), kind)

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(of_shard, range(len(base.shards))))
    return pa.concat_tables([kind.empty_table(), *parts])


def _checked_rows(dataset: str, split: str, column: str, names: Sequence[str]) -> Callable[[str], pa.Table | None]:
    """The rows of a column by the name of the base shard; None where it has none."""
    scored = compact.open_split(dataset, split, column)[0]
    places = {name.partition(".")[0]: n for n, name in enumerate(scored.shards["name"].to_pylist())}
    return lambda shard: scored.of(places[shard]) if shard in places else None


def _without_vectors(dataset: str, split: str, column: str, names: Sequence[str]) -> Callable[[str], pa.Table | None]:
    """The same with these fields alone, from the shards: compact files have all in one digest."""
    there = set(index.shard_names(dataset, split, column))

    def rows_of(shard: str) -> pa.Table | None:
        url = storage.join(dataset, split, f"{shard}.{column}.parquet")
        return index.columns_of(url, ["key", "base_sha256", *names]) if f"{shard}.{column}" in there else None

    return rows_of


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
    remedy = f"delete it and run its `{stage_of(shard.name)}` stage again"
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
    keys = shard.table["key"]
    lacks = np.zeros(len(shard.table), bool)
    for field in column.fields:
        lacks |= np.asarray(shard.table[field.name].is_null())
    for key in keys.filter(pa.array(lacks == np.asarray(shard.table["reason"].is_null()))).to_pylist():
        yield f"{url}: {key}: lacks a value without a reason, or has a reason and all values; {remedy}"
    for field in column.fields:
        for key in keys.filter(pa.array(_wrong(field, shard.table[field.name]))).to_pylist():
            yield f"{url}: {key}: {field.name} is not what its field says; {remedy}"


def _wrong(field: Field, column: pa.ChunkedArray) -> np.ndarray:
    """Which values, (N,) bool, do not fit their field, of the right type; nulls do."""
    if field.kind == "label":
        return np.asarray(pc.and_(column.is_valid(), pc.invert(pc.is_in(column, pa.array(field.labels, pa.string())))))
    if field.kind == "number":
        return ~np.asarray(pc.fill_null(pc.is_finite(column), True))
    sizes = np.asarray(pc.list_value_length(column).fill_null(0))  # of the numbers, or vectors, of each clip
    valid, flat = np.asarray(column.is_valid()), pc.list_flatten(column)
    if field.count is None:
        wrong, bad = sizes != field.width, _bad(flat)
    else:
        widths = np.asarray(pc.list_value_length(flat).fill_null(-1))
        wrong, bad = (sizes < 1) | (sizes > field.count), widths != field.width
        inner = _bad(pc.list_flatten(flat))
        bad |= _any(inner, np.maximum(widths, 0))
    return np.asarray(valid & (wrong | _any(bad, sizes)))


def _bad(numbers: pa.ChunkedArray) -> np.ndarray:
    """Which are null or not finite."""
    return ~np.isfinite(np.asarray(numbers.fill_null(np.float16("nan")), np.float16))


def _any(bad: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether any is true, (N,), of the lists of these sizes, (N,), one after the other."""
    sums = np.concatenate([[0], np.cumsum(bad)])
    ends = np.cumsum(sizes)
    return np.asarray(sums[ends] > sums[ends - sizes])
