"""Annotations: the columns that manifests have for a source (caption, label, licence ...), and those that samples get.

The annotations of a source are JSON: an object of its row's columns; a list of objects where several rows name it; null
where there are none. A cell that is empty, null or NaN is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# names in KEY.json that describe the clip itself; `manifest` has all rows where one value a name is not enough
OURS = frozenset(
    ("source", "clip", "first_frame", "start_seconds", "frame_count", "fps", "width", "height", "scores", "manifest")
)


def merged(rows: Sequence[str | None]) -> str | None:
    """The annotations of a source that these rows name, in order; each row is an object, a list of objects, or null."""
    if len(rows) == 1:
        return rows[0]
    objects = [row for text in rows for row in (rows_of(text) or [{}])]
    return json.dumps(objects, sort_keys=True, ensure_ascii=False)


def rows_of(annotations: str | None) -> list[dict[str, Any]]:
    """The rows, one for each time that a manifest names the source."""
    if annotations is None:
        return []
    content = json.loads(annotations)
    return list(content) if isinstance(content, list) else [content]


def same(one: str | None, other: str | None) -> bool:
    """Whether both have the same rows, in any order and number."""
    first, second = ({json.dumps(row, sort_keys=True) for row in rows_of(text) if row} for text in (one, other))
    return first == second


def of_sample(annotations: str | None) -> dict[str, Any]:
    """The annotations in KEY.json: each column under its name, from the first row that has it.

    Where a name is one of OURS, or rows differ, `manifest` lists all rows as well.
    """
    rows = [row for row in rows_of(annotations) if row]
    columns: dict[str, Any] = {}
    for row in rows:
        columns = row | columns
    plain = {name: value for name, value in columns.items() if name not in OURS}
    distinct = [row for n, row in enumerate(rows) if row not in rows[:n]]
    return plain if len(distinct) <= 1 and len(plain) == len(columns) else plain | {"manifest": distinct}


def label_of(columns: Mapping[str, Any]) -> str | None:
    """The class in the column `label`: a text or a number, 3.0 written as "3"; None where there is none."""
    value = columns.get("label")
    if isinstance(value, float):
        value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return (str(value).strip() or None) if isinstance(value, str | int | float) else None
