"""Annotations: what the rows of manifests say of a source (caption, label, licence ...), and what samples have of it.

The annotations of a source are JSON: an object of its row's columns; a list of these where several rows name it; null
where there is nothing. A cell that is empty, null or NaN says nothing, and is not there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# what KEY.json says of the clip itself; `manifest`: the rows, where they say more than the names beside them can
OURS = frozenset(
    ("source", "clip", "first_frame", "start_seconds", "frame_count", "fps", "width", "height", "scores", "manifest")
)


def merged(rows: Sequence[str | None]) -> str | None:
    """The annotations of a source that these rows name, in order; each row is an object, a list of such, or null."""
    if len(rows) == 1:
        return rows[0]
    flat = [row for some in rows for row in (rows_of(some) or [{}])]
    return json.dumps(flat, sort_keys=True, ensure_ascii=False)


def rows_of(annotations: str | None) -> list[dict[str, Any]]:
    """The rows, one for each time that the source is named; none where nothing is known."""
    if annotations is None:
        return []
    content = json.loads(annotations)
    return list(content) if isinstance(content, list) else [content]


def same(one: str | None, other: str | None) -> bool:
    """Whether their rows say the same, in whatever order and however often."""
    first, second = ({json.dumps(row, sort_keys=True) for row in rows_of(some) if row} for some in (one, other))
    return first == second


def of_sample(annotations: str | None) -> dict[str, Any]:
    """What KEY.json has of them: each column under its name, of the first row that has it.

    Where a name is one of OURS, or rows differ, all rows are there as well: `manifest`, a list of objects.
    """
    rows = [row for row in rows_of(annotations) if row]
    columns: dict[str, Any] = {}
    for row in rows:
        columns = row | columns
    kept = {name: value for name, value in columns.items() if name not in OURS}
    distinct = [row for n, row in enumerate(rows) if row not in rows[:n]]
    return kept if len(distinct) <= 1 and len(kept) == len(columns) else kept | {"manifest": distinct}


def label_of(columns: Mapping[str, Any]) -> str | None:
    """The class that the column `label` names: a text, or a number, where whole written as such; None where it names none."""
    value = columns.get("label")
    if isinstance(value, float):
        value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return (str(value).strip() or None) if isinstance(value, str | int | float) else None
