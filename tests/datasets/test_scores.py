"""Columns of scores: what is written comes back, for all clips, and is checked."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scored import write_columns, write_record

from longtake.datasets import compact, index, score_columns, scores, storage, verify
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Column, Field

FIELDS = (
    Field("speed", "number", "per second"),
    Field("move", "label", "how", labels=("pan", "zoom")),
    Field("vector", "vector", "of the clip", width=3),
    Field("each", "vector", "of frames", width=2, count=4),
)
VALUES: list[dict[str, Any]] = [
    {"speed": 0.1, "move": "pan", "vector": np.ones(3), "each": np.ones((4, 2))},
    {"speed": float("nan"), "move": "zoom", "vector": np.zeros(3), "each": np.zeros((1, 2))},
    {"reason": "not_in_view"},
    {"speed": 2, "move": None, "vector": np.full(3, 1e9), "each": None, "reason": "too_short"},
]


@pytest.fixture
def scored(handmade: Callable[..., str], tmp_path: Path) -> str:
    """Two shards of four clips, of which the first has a column `score-all-0`."""
    dataset = handmade(tmp_path / "data", [[{}] * 4, [{}] * 4])
    column = Column("score-all-0", "all", {"a": 1}, "d", FIELDS)
    scores.write_shard(dataset, index.read_shard(dataset, "train", "00000"), column, VALUES)
    return dataset


@pytest.mark.parametrize("compacted", [False, True])
def test_values_come_back_for_all_clips(scored: str, compacted: bool) -> None:
    if compacted:
        compact.write(scored, "train")
        compact.write(scored, "train", "score-all-0")
    table = score_columns.read_column(scored, "train", "score-all-0")
    assert table["reason"].to_pylist() == [None, "not_finite", "not_in_view", "too_short", *["not_scored"] * 4]
    assert table["speed"].to_pylist()[:4] == [np.float32(0.1), None, None, 2.0]
    assert table["move"].to_pylist() == ["pan", "zoom", *[None] * 6]
    rows, vectors = score_columns.vectors(table["vector"])
    assert rows.tolist() == [0, 1] and vectors.tolist() == [[1, 1, 1], [0, 0, 0]]
    rows, vectors = score_columns.vectors(table["each"])
    assert rows.tolist() == [0, 0, 0, 0, 1] and vectors.dtype == np.float16
    named = score_columns.table(scored, "train", {"a": "score-all-0"}, fields=["a.speed", "a.move"])
    assert named.column_names == ["a.speed", "a.move"] and named["a.speed"].null_count == 6


def test_a_column_says_what_it_is(scored: str) -> None:
    assert score_columns.columns_of(scored) == ["score-all-0"]
    assert score_columns.described(scored, "score-all-0") == Column("score-all-0", "all", {"a": 1}, "d", FIELDS)
    assert not [p for p in verify.verify(scored) if "score" in p]
    with pytest.raises(UserError, match="no column score-al-0; did you mean score-all-0"):
        score_columns.described(scored, "score-al-0")


def test_rows_of_clips_that_are_gone_do_not_count(scored: str) -> None:
    """A shard that was cut again keeps the values of the clips that are the same."""
    url = f"{scored}/train/00000.parquet"
    base = index.read_shard(scored, "train", "00000")
    rows = base.table.to_pylist()[::-1]
    rows[0] |= {"sha256": "another"}
    index.write_index(url, rows, base.table.schema.remove_metadata(), base.tar_bytes, base.tar_sha256)
    table = score_columns.read_column(scored, "train", "score-all-0", ["move"])
    assert table["move"].to_pylist() == [None, None, "zoom", "pan", *[None] * 4]
    assert table["reason"].to_pylist()[:4] == ["not_scored", "not_in_view", "not_finite", None]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"speed": np.ones(2)}, "speed, a number"),
        ({"move": "fly"}, "'fly' as move, a label"),
        ({"vector": np.ones(4)}, r"shape \(4,\) as vector, a vector of 3"),
        ({"each": np.ones((5, 2))}, r"\(5, 2\) as each"),
    ],
)
def test_a_value_that_is_not_its_field_is_refused(scored: str, value: dict[str, Any], said: str) -> None:
    base = index.read_shard(scored, "train", "00001")
    with pytest.raises(Failure, match=said):
        scores.write_shard(scored, base, Column("score-all-0", "all", {}, "", FIELDS), [value] * 4)


def test_records_are_of_one_dataset(scored: str, handmade: Callable[..., str], tmp_path: Path) -> None:
    columns = write_columns(scored, {"mood": {"joy": "number", "colour": "label", "vector": 4}})
    record = scores.read_scores_of(write_record(str(tmp_path / "scores"), scored, columns), scored)
    assert record.names == columns
    assert [field.name for field in record.columns["mood"].fields] == ["joy", "colour", "vector"]
    assert not [p for p in verify.verify(scored) if "score" in p]
    other = handmade(tmp_path / "other", [[{}]])
    with pytest.raises(UserError, match=r"has scores of .*data, not of .*other"):
        scores.read_scores_of(str(tmp_path / "scores"), other)
    with pytest.raises(UserError, match="no scores here"):
        scores.read_scores(str(tmp_path / "nothing"))


def test_vectors_of_two_sizes_are_refused() -> None:
    column = pa.chunked_array([pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float16()))])
    with pytest.raises(UserError, match="vectors of 1 and 2 numbers"):
        score_columns.vectors(column)


def test_damage_is_found(scored: str) -> None:
    shard = index.read_shard(scored, "train", "00000.score-all-0")
    url = f"{scored}/train/00000.score-all-0.parquet"
    notes = index.read_notes(scored, shard)
    column = shard.table.column_names.index("reason")
    wrong = shard.table.set_column(column, "reason", pa.nulls(4, pa.string())).replace_schema_metadata(None)
    index.commit_table(url, wrong, notes)
    assert [p for p in verify.verify(scored) if "lacks a value without a reason" in p and "score" in p]
    index.commit_table(url, wrong, notes | {"column": "score-b-0"})
    assert [p for p in verify.verify(scored) if "of another column, score-b-0" in p]
    index.commit_table(url, wrong)
    assert [p for p in verify.verify(scored) if "notes are missing" in p and "score-all-0" in p]
    assert storage.exists(url)
    # what is there stays: running the stage again would not help
    storage.write(url, b"half")
    with pytest.raises(Failure, match="not readable; delete it and run the stage"):
        index.notes_of(scored, "train", "00000.score-all-0")
    Path(url).unlink()
    with pytest.raises(Failure, match="missing; run the stage"):
        index.notes_of(scored, "train", "00000.score-all-0")


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads from now on."""
    sizes: list[int] = []

    def counted(read: Callable[..., bytes], *arguments: Any) -> bytes:
        sizes.append(len(data := read(*arguments)))
        return data

    for name in ("read", "read_range"):
        monkeypatch.setattr(storage, name, partial(counted, getattr(storage, name)))
    return sizes


@pytest.mark.parametrize("compacted", [False, True])
def test_vectors_that_nobody_asks_for_are_not_read(
    compacted: bool,
    handmade: Callable[..., str],
    read_bytes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = handmade(tmp_path / "data", [[{}] * 4])
    fields = (
        Field("first", "vector", "large", width=100_000),
        Field("speed", "number", ""),
        Field("last", "vector", "", width=100_000),
    )
    column = Column("score-all-0", "all", {}, "", fields)
    large = np.random.default_rng(0).standard_normal(100_000)
    base = index.read_shard(dataset, "train", "00000")
    scores.write_shard(dataset, base, column, [{"first": large, "speed": n, "last": None} for n in range(4)])
    if compacted:
        compact.write(dataset, "train")
        compact.write(dataset, "train", column.column)
    opened: list[Any] = []
    open_split = compact.open_split
    monkeypatch.setattr(compact, "open_split", lambda *asked: opened.append(asked) or open_split(*asked))
    read_bytes.clear()
    table = score_columns.table(dataset, "train", {"a": column.column}, ["a.speed"])
    assert table.to_pydict() == {"a.speed": [0, 1, 2, 3]}
    # compact files are mapped into memory and checked as a whole
    assert (dataset, "train", column.column) not in opened
    assert score_columns.fits(dataset, base, column.column)
    assert score_columns.counts(dataset, column.column) == {"first": 4, "speed": 4, "last": 0}
    assert 0 < sum(read_bytes) < 700_000 < 4 * 200_000
    assert max(read_bytes) < 100_000
    rows, vectors = score_columns.vectors(
        score_columns.read_column(dataset, "train", column.column, ["first"])["first"]
    )
    assert rows.tolist() == [0, 1, 2, 3] and (vectors == large.astype(np.float16)).all()


def test_a_shard_of_other_clips_does_not_fit(scored: str) -> None:
    base = index.read_shard(scored, "train", "00000")
    assert score_columns.fits(scored, base, "score-all-0")
    other = index.Shard("train", "00000", 0, "", base.table.take([1, 0, 2, 3]))
    assert not score_columns.fits(scored, other, "score-all-0")
    with pytest.raises(Failure, match=r"00001\.score-all-0\.parquet: is missing"):
        score_columns.fits(scored, index.read_shard(scored, "train", "00001"), "score-all-0")


GOOD: dict[str, list[Any]] = {
    "speed": [1.0, 2.0, None, None],
    "move": ["pan", "zoom", None, None],
    "vector": [[0.0] * 3, [1.0] * 3, None, None],
    "each": [[[0.0] * 2] * 4, [[1.0] * 2], None, None],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("speed", float("nan")),
        ("move", "fly"),
        ("vector", [1.0, 2.0]),
        ("vector", [1.0, float("inf"), 2.0]),
        ("vector", [1.0, None, 2.0]),
        ("each", []),
        ("each", [[1.0] * 2] * 5),
        ("each", [[1.0] * 2, [1.0] * 3]),
        ("each", [[1.0] * 2, None]),
        ("each", [[1.0] * 2, [float("nan"), 1.0]]),
        (None, None),
    ],
)
def test_values_that_no_field_allows_are_found(scored: str, field: str | None, value: Any) -> None:
    shard = index.read_shard(scored, "train", "00000.score-all-0")
    values = GOOD if field is None else GOOD | {field: [GOOD[field][0], value, None, None]}
    start = [
        shard.table["key"],
        shard.table["base_sha256"],
        pa.array([None, None, "no_value", "no_value"], pa.string()),
    ]
    arrays = [pa.array(values[each.name], each.type) for each in FIELDS]
    table = pa.table([*start, *arrays], schema=scores.table_schema(FIELDS))
    index.commit_table(f"{scored}/train/{shard.name}.parquet", table, index.read_notes(scored, shard))
    said = [line for line in verify.verify(scored) if "score" in line]
    key = shard.table["key"][1].as_py()
    assert len(said) == (field is not None)
    assert all(f"{key}: {field} is not what its field says; delete it and run its `score`" in line for line in said)


def test_damage_in_a_column_of_clusters_names_its_stage(scored: str) -> None:
    base = index.read_shard(scored, "train", "00000")
    column = Column("score-cluster-0", "cluster", {}, "", FIELDS[:1])
    scores.write_shard(scored, base, column, [{"speed": 1}] * 4)
    url = f"{scored}/train/00000.score-cluster-0.parquet"
    shard = index.read_shard(scored, "train", "00000.score-cluster-0")
    notes = index.read_notes(scored, shard)
    index.commit_table(url, shard.table.replace_schema_metadata(None), notes | {"column": "score-b-0"})
    assert [line for line in verify.verify(scored) if line.endswith("run its `cluster` stage again") and "b-0" in line]
    index.commit_table(url, shard.table.replace_schema_metadata(None), {})
    assert [line for line in verify.verify(scored) if "does not say" in line and "run its `cluster` stage" in line]


@pytest.mark.parametrize("value", ["fast", [[1.0], [1.0, 2.0]], {"a": 1}])
def test_what_is_no_number_at_all_is_one_line(scored: str, value: Any) -> None:
    base = index.read_shard(scored, "train", "00001")
    with pytest.raises(Failure, match=r"00001: .*: scorer all gives .* as speed, a number; correct the scorer"):
        scores.write_shard(scored, base, Column("score-all-0", "all", {}, "", FIELDS), [{"speed": value}] * 4)
