"""Scores of clips: columns `score-NAME-DIGEST`, each a table beside the shards, and the record of those that a stage has made.

A column is the values of one scorer with its weights and settings. Its table has a row a clip: `key`, `base_sha256`,
`reason` (null where the clip has values, else why it has none), and a column for each of the scorer's fields. A rule names
a value as NAME.FIELD, such as `motion.camera`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from longtake.datasets import schema

PREFIX = "score-"


@dataclass(frozen=True)
class Field:
    """What a scorer gives a clip.

    name     in lower case, `[a-z][a-z0-9_]*`
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
        """Of its column in a table."""
        if self.kind == "number":
            return pa.float32()
        if self.kind == "label":
            return pa.string()
        vector = pa.list_(pa.float16(), self.width)
        return vector if self.count is None else pa.list_(vector)


def table_schema(fields: tuple[Field, ...]) -> pa.Schema:
    """Of a column's table."""
    return pa.schema([*schema.SCORE_INDEX, *((field.name, field.type) for field in fields)])


@dataclass(frozen=True)
class Column:
    """One column of scores.

    column   "score-NAME-DIGEST"
    scorer   its name in the table of scorers, or the stage that made it
    config   the scorer's settings, as plain data
    digest   of files that decide the values, such as weights
    fields   what it gives, as plain data (see `Field`)
    """

    column: str
    scorer: str
    config: Mapping[str, Any]
    digest: str
    fields: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Scores:
    """The columns that a stage has made.

    dataset  URL
    columns  by the name that the recipe gives them (see `Column`), as plain data
    view     URL; only clips that it keeps were scored
    digests  of the splits' base shards when this was written (see `compact.Rows`)
    """

    dataset: str
    columns: Mapping[str, Mapping[str, Any]]
    view: str | None
    digests: Mapping[str, str]
