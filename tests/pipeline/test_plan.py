"""Groups and splits follow from what the sources hold, and stay."""

import json
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtake.datasets import annotations, schema
from longtake.datasets.errors import Failure
from longtake.pipeline import buckets, plan

identities = st.lists(st.text("0123456789abcdef", min_size=20, max_size=20), min_size=1, max_size=40)
FIRST = {"train": 0, "val": 0}
NOTHING = schema.PLAN.empty_table()


def found(names: list[str]) -> pa.Table:
    count = len(names)
    return pa.table(
        {
            "source": pa.chunked_array([names], pa.string()),
            "uri": pa.chunked_array([[f"u{n}" for n in range(count)]], pa.string()),
            "bytes": pa.array([10 + n for n in range(count)], pa.int64()),
            "extra": pa.nulls(count, pa.string()),
        }
    )


def assigned(new: pa.Table, known: pa.Table, *options: Any, buckets: int = 1) -> pa.Table:
    """The plan from sources that are dealt out to buckets by their first digit."""

    def part(table: pa.Table, n: int) -> pa.Table:
        mine = [int(source[0], 16) * buckets // 16 == n for source in table["source"].to_pylist()]
        return table.filter(pa.array(mine, pa.bool_())).select([c for c in table.column_names if c != "group"])

    pairs = [(part(new, n), part(known, n)) for n in range(buckets)]
    tables = plan.assign([(some, old) for some, old in pairs if len(some)], *options)
    return pa.concat_tables([NOTHING, *tables]).sort_by("split")


@given(identities, st.floats(0, 0.9), st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 16]))
def test_each_source_gets_one_row_in_one_group_whatever_the_listing_order(
    names: list[str], val: float, per_group: int, seed: int, buckets: int
) -> None:
    sources = found(names)
    table = assigned(sources, NOTHING, FIRST, val, 1000, per_group)
    shuffled = sources.take(np.random.default_rng(seed).permutation(len(names)))
    assert assigned(shuffled, NOTHING, FIRST, val, 1000, per_group, buckets=buckets).equals(table)
    rows = table.to_pylist()
    assert sorted(r["uri"] for r in rows) == sorted(sources["uri"].to_pylist())
    originals = [r for r in rows if r["duplicate_of"] is None]
    assert {r["source"] for r in originals} == set(names) and len(originals) == len(set(names))
    by_uri = {r["uri"]: r["source"] for r in originals}
    assert all(by_uri[r["duplicate_of"]] == r["source"] for r in rows if r["duplicate_of"])
    for split in ("train", "val"):
        groups = [r["group"] for r in rows if r["split"] == split]
        assert groups == sorted(groups) and set(groups) == set(range(len(set(groups))))
        assert all(groups.count(g) <= per_group for g in groups)
    assert len({(r["source"], r["split"]) for r in rows}) == len(set(names)), "a source is in one split"


@given(identities, identities)
def test_growth_moves_nothing_and_repeats_nothing(old: list[str], new: list[str]) -> None:
    first = assigned(found(old), NOTHING, FIRST, 0.3, 1000, 3)
    free = {
        s: 1 + max((r["group"] for r in first.to_pylist() if r["split"] == s), default=-1) for s in ("train", "val")
    }
    added = assigned(found(new), first, free, 0.3, 1000, 3).to_pylist()
    known = {r["source"]: r["split"] for r in first.to_pylist()}
    assert all(r["group"] >= free[r["split"]] for r in added)
    assert {r["source"] for r in added if r["duplicate_of"] is None} == set(new) - set(old)
    assert all(known[r["source"]] == r["split"] for r in added if r["source"] in known)


@given(identities.filter(lambda names: len(set(names)) > 3))
def test_the_split_of_a_source_depends_on_nothing_else(names: list[str]) -> None:
    def splits(some: list[str]) -> dict[str, str]:
        rows = assigned(found(some), found(["f" * 20]).append_column("split", pa.array(["train"])), FIRST, 0.4, 1000, 3)
        return {r["source"]: r["split"] for r in rows.to_pylist()}

    whole, half = splits(names), splits(names[::2])
    assert all(whole[k] == v for k, v in half.items())


@given(st.lists(st.lists(st.integers(0, 50), max_size=20), max_size=5), st.integers(1, 120), st.integers(1, 7))
def test_groups_are_bounded_and_full(parts: list[list[int]], most_bytes: int, most_rows: int) -> None:
    cut = plan.Grouping(0)
    groups = [g for part in parts for g in cut.assign(np.array(part, np.int64), most_bytes, most_rows).tolist()]
    sizes = [size for part in parts for size in part]
    whole = plan.Grouping(0).assign(np.array(sizes, np.int64), most_bytes, most_rows).tolist()
    assert groups == whole and groups == sorted(groups) and set(groups) == set(range(len(set(groups))))
    for number in set(groups):
        members = [s for s, g in zip(sizes, groups, strict=True) if g == number]
        assert len(members) <= most_rows and (sum(members) <= most_bytes or len(members) == 1)


def plan_rows(dataset: str) -> list[dict[str, Any]]:
    return [row for group in plan.groups(dataset) for row in plan.sources_of(dataset, group)]


@pytest.mark.parametrize("val_fraction", [0.01, 0.99])
def test_a_small_dataset_has_both_splits(tmp_path: Path, val_fraction: float) -> None:
    for n in range(2):
        (tmp_path / f"{n}.mp4").write_bytes(bytes([n]))
    plan.plan(str(tmp_path / "ds"), [str(tmp_path)], val_fraction, 1000, 3)
    assert {row["split"] for row in plan_rows(str(tmp_path / "ds"))} == {"train", "val"}


def test_identity_is_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    paths = [tmp_path / n for n in ("a.mp4", "b c.mp4", "c.mp4")]
    for path, data in zip(paths, (b"x" * 300_000, b"x" * 300_000, b"x" * 299_999 + b"y"), strict=True):
        path.write_bytes(data)
    plan.plan(str(tmp_path / "ds"), [str(p) for p in paths], 0, 1 << 30, 9)
    one, two, other = sorted(plan_rows(str(tmp_path / "ds")), key=lambda row: row["uri"])
    assert one["source"] == two["source"] != other["source"]
    assert two["duplicate_of"] == str(paths[0]) and one["duplicate_of"] is other["duplicate_of"] is None


def test_many_rows_are_planned_as_few_are_and_growth_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"uri": f"s3://b/{n}.mp4", "bytes": 100 + n % 7, "etag": f"{n % 900}", "caption": str(n)} for n in range(1000)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:800]), tmp_path / "some.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")

    def planned(name: str) -> list[dict[str, Any]]:
        for manifest in ("some", "all", "all"):
            plan.plan(str(tmp_path / name), [str(tmp_path / f"{manifest}.parquet")], 0.1, 10_000, 30)
        assert sorted(p.name for p in (tmp_path / name / "plan").iterdir()) == ["00000.parquet", "00001.parquet"]
        return plan_rows(str(tmp_path / name))

    whole = planned("whole")
    monkeypatch.setattr(buckets, "_ROWS_AT_ONCE", 64)
    monkeypatch.setattr(plan, "_ROWS_A_ROW_GROUP", 16)
    assert planned("parts") == whole
    assert sorted(r["uri"] for r in whole) == sorted(r["uri"] for r in rows)
    assert all(json.loads(r["extra"]) == {"caption": r["uri"][7:-4]} for r in whole)


def test_a_file_that_is_named_twice_is_planned_once(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    (tmp_path / "b.mp4").write_bytes(b"2")
    groups = plan.plan(str(tmp_path / "ds"), [f"{tmp_path}/*.mp4", f"{tmp_path}/a.mp4"], 0.5, 1 << 30, 4)
    assert sum(g["sources"] for g in groups) == 2


def test_a_file_of_two_rows_is_planned_once_with_the_annotations_of_both(tmp_path: Path) -> None:
    rows = [{"uri": f"s3://b/{n % 7}.mp4", "bytes": 100, "etag": str(n % 3), "caption": str(n)} for n in range(21)]
    del rows[20]["caption"]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    plan.plan(str(tmp_path / "ds"), [str(tmp_path / "list.json")], 0.5, 1 << 30, 4)
    told = {(row["uri"], row["source"]): json.loads(row["extra"] or "{}") for row in plan_rows(str(tmp_path / "ds"))}
    assert len(told) == 21, "each of the 7 files has 3 contents"
    (tmp_path / "twice.json").write_text(json.dumps(rows + rows[:5] + [rows[20]]))
    plan.plan(str(tmp_path / "two"), [str(tmp_path / "twice.json")], 0.5, 1 << 30, 4)
    again = plan_rows(str(tmp_path / "two"))
    assert len(again) == 21
    for row in again:
        extra, was = json.loads(row["extra"] or "{}"), told[row["uri"], row["source"]]
        assert extra == was or (extra == [was, was] and (was == {} or int(was["caption"]) < 5))


WORDS = st.none() | st.dictionaries(st.sampled_from(["caption", "label"]), st.sampled_from("abc"), min_size=1)
LISTS = st.lists(st.tuples(st.integers(0, 5), WORDS), min_size=1, max_size=9)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LISTS, LISTS, st.booleans())
def test_columns_that_change_are_known_from_the_next_plan_on(
    tmp_path: Path, first: list[Any], second: list[Any], csv: bool
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))

    def planned(rows: list[Any], name: str) -> dict[int, list[Any]]:
        """What the plan says of each source, after planning these rows."""
        listed = [{"uri": f"s3://b/{n}", "bytes": 1, "etag": str(n)} | (said or {}) for n, said in rows]
        if csv:
            columns = ["uri", "bytes", "etag", "caption", "label"]
            lines = [",".join(str(row.get(c, "")) for c in columns) for row in listed]
            (folder / f"{name}.csv").write_text("\n".join([",".join(columns), *lines]))
        else:
            (folder / f"{name}.json").write_text(json.dumps(listed))
        plan.plan(str(folder / "ds"), [str(folder / f"{name}.{'csv' if csv else 'json'}")], 0.5, 1 << 30, 2)
        rows_now = plan_rows(str(folder / "ds"))
        assert len({row["uri"] for row in rows_now}) == len(rows_now)
        return {int(row["uri"][7:]): annotations.of_sample(row["extra"]) for row in rows_now}

    def meant(rows: list[Any]) -> dict[int, Any]:
        said: dict[int, list[str | None]] = {}
        for n, words in rows:
            said.setdefault(n, []).append(words and json.dumps(words))
        return {n: annotations.of_sample(annotations.merged(words)) for n, words in said.items()}

    def same(mine: Any, other: Any) -> bool:
        """A row that is known already may come before others."""
        first, second = ([json.dumps(row, sort_keys=True) for row in s.get("manifest", [s])] for s in (mine, other))
        return sorted(first) == sorted(second)

    assert planned(first, "one") == meant(first)
    told = meant(second)
    now = planned(second, "two")
    # a source that is listed no more, or without columns, keeps those it had
    for n, said in (meant(first) | {n: said for n, said in told.items() if said or n not in meant(first)}).items():
        assert same(now[n], said)
    kept = {p.name: p.stat().st_mtime_ns for p in (folder / "ds").rglob("*.parquet")}
    assert planned(second, "three") == now
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "ds").rglob("*.parquet")} == kept


def test_of_two_drivers_that_plan_at_once_one_plan_stands(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"{n}.mp4").write_bytes(bytes([n]) * 100)
    plans = []
    threads = [
        threading.Thread(
            target=lambda: plans.append(plan.plan(str(tmp_path / "ds"), [f"{tmp_path}/*.mp4"], 0.2, 1 << 30, 4))
        )
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(plans) == 4 and all(p == plans[0] for p in plans)
    assert sum(g["sources"] for g in plans[0]) == 20
    assert [p.name for p in (tmp_path / "ds" / "plan").iterdir()] == ["00000.parquet"]


class Failing(MemoryFileSystem):
    """A store that refuses some of its calls, as one does that is asked too much."""

    protocol = "failing"
    refusals: ClassVar[list[bool]] = []
    isfile = fsspec.AbstractFileSystem.isfile  # as stores have it: no, where their answer is an error

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("failing://"))

    def _refuse(self) -> None:
        if Failing.refusals and Failing.refusals.pop(0):
            raise OSError("503 Slow Down")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._refuse()
        return super().info(path, **options)

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._refuse()
        return super().open(path, *arguments, **options)


@pytest.mark.parametrize("refusals", [[True], [False, True], [False, False, True]])
def test_a_store_that_fails_is_not_taken_for_one_without_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: list[bool]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    (group,) = plan.plan(str(tmp_path / "ds"), [str(tmp_path / "a.mp4")], 0, 1000, 3)
    fsspec.register_implementation("failing", Failing, clobber=True)
    fsspec.filesystem("failing").put(str(tmp_path / "ds"), "/refusing", recursive=True)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(Failing, "refusals", refusals)
    assert [row["bytes"] for row in plan.sources_of("failing:///refusing", group)] == [1]


def test_a_plan_that_is_missing_is_not_made_anew(tmp_path: Path) -> None:
    """It would give the numbers of shards to other sources."""

    def planned() -> list[dict[str, Any]]:
        return plan.plan(str(tmp_path / "ds"), [f"{tmp_path}/*.mp4"], 0, 1000, 3)

    for n in range(2):
        (tmp_path / f"{n}.mp4").write_bytes(bytes([n]))
        planned()
    first, second = (tmp_path / "ds" / "plan" / f"0000{n}.parquet" for n in range(2))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(Failure, match=r"plan/00000\.parquet: is missing; bring the plan back from a copy"):
        planned()
    first.write_bytes(b"PAR1")
    with pytest.raises(Failure, match=r"plan/00000\.parquet: not a readable plan .*; bring the plan back"):
        planned()
    first.write_bytes(kept)
    (tmp_path / "ds" / "train").mkdir()
    (tmp_path / "ds" / "train" / "00001.parquet").touch()
    planned()
    second.unlink()
    with pytest.raises(Failure, match=r"no plan has the groups of 1 shards, such as train/00001; bring the plan back"):
        planned()
    assert not second.exists()
