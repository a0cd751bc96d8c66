import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import annotations

ROWS = st.dictionaries(st.sampled_from(["caption", "label", "fps", "manifest", "x"]), st.integers(0, 2), max_size=3)


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_nothing_of_any_row_is_lost_and_nothing_of_ours_is_taken(rows: list[dict[str, Any]]) -> None:
    said = annotations.merged([json.dumps(row) if row else None for row in rows])
    assert len(annotations.rows_of(said)) == (len(rows) if len(rows) > 1 else bool(rows[0]))
    sample = annotations.of_sample(said)
    assert not sample.keys() & (annotations.OURS - {"manifest"})
    kept = sample.get("manifest", [])
    for row in filter(None, rows):
        assert row in kept or row == sample
    firsts = {name: row[name] for row in reversed(rows) for name in row}
    assert {k: v for k, v in sample.items() if k != "manifest"} == {
        k: v for k, v in firsts.items() if k not in annotations.OURS
    }


@given(st.lists(st.lists(ROWS, min_size=1, max_size=2), min_size=1, max_size=3))
def test_rows_may_be_merged_in_any_steps(parts: list[list[dict[str, Any]]]) -> None:
    def merged(rows: list[dict[str, Any]]) -> str | None:
        return annotations.merged([json.dumps(row) if row else None for row in rows])

    whole = merged([row for part in parts for row in part])
    assert annotations.of_sample(annotations.merged([merged(part) for part in parts])) == annotations.of_sample(whole)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("dog", "dog"),
        (" dog ", "dog"),
        ("", None),
        (" ", None),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (3, "3"),
        (3.0, "3"),
        (0.5, "0.5"),
        (0, "0"),
        (["a", "b"], None),
        ({"a": 1}, None),
    ],
)
def test_a_label_is_a_text_or_a_number(value: Any, label: str | None) -> None:
    assert annotations.label_of({"label": value}) == label
    assert annotations.label_of({}) is None
