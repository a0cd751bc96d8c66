"""Columns of scores as a dataset has them: which there are, their values in the order of its shards, and whether they are right.

What a column is, and how a shard of one is written, is in scores.py.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import compact, index, schema, storage
from longtake.datasets.errors import Failure, UserError, near
from longtake.datasets.scores import PREFIX, Column, Field, from_plain, stage_of, table_schema

_THREADS = 16


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
