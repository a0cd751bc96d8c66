"""Scores of clips: what a column `score-NAME-DIGEST` is, a table beside the shards, and the record of those that a stage has made.

A column is the values of one scorer with its weights and settings. Its table has a row a clip: `key`, `base_sha256`,
`reason` (null where the clip has all values, else why one is missing), and a column for each of the scorer's fields. A rule
names a value as NAME.FIELD, such as `motion.camera`. The index of each shard says in its notes what the column is, so that
it can be read without a record (see score_columns.py).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from longtake.datasets import index, record, schema, storage
from longtake.datasets.errors import Failure, UserError

PREFIX = "score-"

# Why a clip has no value; a scorer may have codes of its own.
REASONS = {
    "not_in_view": "the view leaves it out",
    "no_value": "the scorer has none for it, such as a movement of one frame",
    "not_finite": "the value is no number: NaN or infinite",
    "not_scored": "the column has no row for it yet",  # in tables that are read, never stored
}


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
