"""Captions: what annotations may say, what a clip gets of it, and the column that keeps it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longtake.datasets import captions, compact, index, schema, storage
from longtake.datasets.captions import Caption, of_annotations, of_clip, of_source
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.verify import verify

COLUMN = "caption-test"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", "👩‍👩‍👧 two\nlines\r\n", "שלום עולם", "\u202eright to left", 'a "quoted", one\t;', "\x00", "x" * 100_000]
)
SECONDS = st.none() | st.floats(0, 1000)
SPAN = st.tuples(SECONDS, SECONDS).filter(lambda span: span[1] is None or (span[0] or 0.0) < span[1])  # type: ignore[operator]
CAPTION = st.builds(
    lambda text, span, language, source: Caption(text, *span, language, source),
    TEXT, SPAN, st.none() | TEXT, TEXT,
)  # fmt: skip


def captioned(root: str, of: Callable[[dict[str, Any]], list[Caption]], column: str = COLUMN) -> str:
    """A column with the captions `of` each row of the base. Returns the dataset."""
    for split in schema.SPLITS:
        for base in index.read_shards(root, split):
            rows = [captions.row_of(row, of(row), "not_annotated", "") for row in base.table.to_pylist()]
            index.write_table(f"{root}/{split}/{base.name}.{column}.parquet", rows, schema.CAPTION_INDEX)
    return root


def read(root: str, column: str = COLUMN) -> dict[str, list[Caption]]:
    return {
        row["key"]: captions.rows_to_captions(row["captions"])
        for shard in index.read_shards(root, "train", column)
        for row in shard.table.to_pylist()
    }


@given(st.lists(st.lists(CAPTION, max_size=3), min_size=1, max_size=4))
def test_every_caption_comes_back_from_a_column_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, clips: list[list[Caption]]
) -> None:
    folder = tmp_path_factory.mktemp("c")
    keys = [f"source-{n:05d}" for n in range(len(clips))]
    rows = [
        captions.row_of({"key": key, "sha256": f"s{key}"}, said, "not_annotated", "d")
        for key, said in zip(keys, clips, strict=True)
    ]
    (folder / "train").mkdir()
    index.write_table(f"{folder}/train/00000.{COLUMN}.parquet", rows, schema.CAPTION_INDEX)
    shard = index.read_shard(str(folder), "train", f"00000.{COLUMN}")
    found = shard.table.to_pylist()
    assert [captions.rows_to_captions(row["captions"]) for row in found] == clips
    assert [row["captions"] is None for row in found] == [row["reason"] is not None for row in found]
    assert not list(captions.problems(str(folder), shard))


def test_no_change_of_a_nested_value_goes_unnoticed() -> None:
    """Rows that differ anywhere have another digest, however their values would run together."""
    said = [
        [["ab"], None], [["a", "b"], None], [["ab"], ["c"]], [["abc"], None], [None, ["ab"]], [[""], None],
    ]  # fmt: skip
    tables = [
        index.rows_table([captions.row_of({"key": "k", "sha256": "s"}, [Caption(t) for t in texts or ()], "r", "d")
                          for texts in clips], schema.CAPTION_INDEX)
        for clips in said
    ]  # fmt: skip
    digests = {index._rows_sha256("train/x", {}, table) for table in tables}
    assert len(digests) == len(said)
    # and parts of a larger table have the digest of their own rows
    joined = index.rows_table([row for table in tables for row in table.to_pylist()], schema.CAPTION_INDEX)
    assert index._rows_sha256("train/x", {}, joined.slice(2, 2)) == index._rows_sha256("train/x", {}, tables[1])


def test_annotations_give_captions_with_their_spans_and_makers() -> None:
    found = of_source(
        {
            "caption": "",
            "captions": ["one", {"text": "two", "start": 1, "language": "he", "source": "me"}],
            "shots": [[0, 1.5, "first"], {"start": 1.5, "end": 3, "text": "second"}],
            "label": "x",
        }
    )
    assert found == [
        Caption(""),
        Caption("one"),
        Caption("two", 1.0, None, "he", "me"),
        Caption("first", 0.0, 1.5, None, "shots"),
        Caption("second", 1.5, 3.0, None, "shots"),
    ]
    assert of_source({"caption": None, "captions": [], "shots": None}) == []
    # in a cell of CSV they are JSON; two rows that name a source say each thing once
    assert of_source({"captions": '["a", "b"]'}) == [Caption("a"), Caption("b")]
    two = json.dumps([{"caption": "a"}, {"caption": "b", "captions": ["a"]}])
    assert of_annotations(two) == [Caption("a"), Caption("b")]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"caption": 3}, "caption: 3 is no text"),
        ({"captions": "a dog"}, "captions: 'a dog' is no list in JSON"),
        ({"captions": {"text": "a"}}, "captions: .* is no list"),
        ({"captions": "[" * 100_000}, r"captions: '\[{79} is no list in JSON"),
        ({"captions": ["a", None]}, "captions: entry 2: None is no text"),
        ({"captions": [{"text": "a", "begin": 1}]}, "captions: entry 1: unknown begin; there are text, start"),
        ({"captions": [{"start": 1}]}, "captions: entry 1: its text is None"),
        ({"shots": ["a"]}, r"shots: entry 1: 'a' is no \[start, end, text\]"),
        ({"shots": [[2, 1, "a"]]}, "shots: entry 1: it ends at 1 s, and starts at 2 s"),
        ({"shots": [[0, "x", "a"]]}, "shots: entry 1: its end is 'x', no seconds"),
        ({"shots": [[-1, 1, "a"]]}, "shots: entry 1: its start is -1, no seconds"),
        ({"shots": [[10**400, 1, "a"]]}, "shots: entry 1: its start is 1000*, no seconds"),
        ({"captions": [{"text": "a", "end": float("nan")}]}, "captions: entry 1: its end is nan, no seconds"),
        ({"shots": [{"text": "a", "start": 1}]}, "shots: entry 1: a shot needs its start and its end"),
        ({"caption": "half \ud83d"}, "is no UTF-8"),
    ],
)
def test_what_is_no_caption_is_refused_with_its_place(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        of_source(columns)


def test_spans_are_cut_to_the_clip_and_count_from_its_start() -> None:
    said = [Caption("all"), Caption("a", 0, 4), Caption("b", 4, 6), Caption("c", 6, 99), Caption("d", None, 5)]
    assert of_clip(said, 3.0, 2.0) == [
        Caption("all"), Caption("a", 0.0, 1.0), Caption("b", 1.0, 2.0), Caption("d"),
    ]  # fmt: skip
    assert of_clip(said, 10.0, 2.0) == [Caption("all"), Caption("c")]
    assert of_clip([Caption("x", 1, 2)], 2.0, 1.0) == []
    # neighbours whose span reaches in by less than a frame, as rounding alone makes it
    shots = [Caption("before", 0, 2.02), Caption("own", 2, 3), Caption("after", 2.9993, 9)]
    assert of_clip(shots, 2.0, 1.0, 1 / 12) == [Caption("own")]
    assert len(of_clip(shots, 2.0, 1.0)) == 3


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.001, 20)), max_size=5), st.floats(0, 20), st.floats(0.1, 10))
@example([(1.8125, 1.0)], 0.0, 1.8125)
def test_a_caption_of_a_clip_overlaps_it_and_stays_within(
    spans: list[tuple[float, float]], start: float, seconds: float
) -> None:
    said = [Caption(str(n), begin, begin + length) for n, (begin, length) in enumerate(spans)]
    for caption in of_clip(said, start, seconds):
        whole = said[int(caption.text)]
        assert whole.start is not None and whole.end is not None
        assert whole.start < start + seconds and whole.end > start
        if caption.start is not None and caption.end is not None:
            assert 0 <= caption.start < caption.end <= seconds
            assert caption.start == pytest.approx(max(0, whole.start - start), abs=1e-3)


@pytest.fixture
def root(handmade: Callable[..., str], tmp_path: Path) -> str:
    """Three shards of two clips, of which every second has two captions."""
    made = handmade(tmp_path / "d", [[{}, {}]] * 3, columns=("latent-test",))
    return captioned(
        made, lambda row: [Caption(row["key"]), Caption("🙂", 0.5, 1.0)] if row["source"][-1] in "024" else []
    )


def test_a_column_is_verified_and_folded_like_any_other(root: str) -> None:
    assert not [line for line in verify(root) if COLUMN in line]
    rows, facts = compact.open_split(root, "train", COLUMN)
    assert compact.write(root, "train", COLUMN) == 3 and not list(compact.problems(root, "train"))
    again, _ = compact.open_split(root, "train", COLUMN)
    assert isinstance(again.data, str) and not facts.column_names
    assert [again.of(n) for n in range(3)] == [rows.of(n) for n in range(3)] and again.digest == rows.digest
    # other captions are another content
    captioned(root, lambda row: [Caption("other")])
    assert [line for line in compact.problems(root, "train") if "is not as its index" in line]
    compact.forget(root, "train", COLUMN)
    assert not list(compact.problems(root, "train")) and read(root)["train000-00000"] == [Caption("other")]
    assert compact.open_split(root, "train", COLUMN)[0].digest != rows.digest


def test_each_damage_of_a_column_is_a_line(root: str) -> None:
    path = Path(root) / "train" / f"00001.{COLUMN}.parquet"
    good = path.read_bytes()

    def said() -> list[str]:
        return [line for line in verify(root) if f"00001.{COLUMN}" in line]

    path.with_suffix(".tar").write_bytes(b"x")
    assert ["its column is a table; delete it" in line for line in said()] == [True]
    path.with_suffix(".tar").unlink()
    path.write_bytes(good[:-100])
    assert said()
    (Path(root) / "train" / f"00000.{COLUMN}.parquet").replace(path)
    assert said()
    base = index.read_shard(root, "train", "00001").table.to_pylist()
    for row, says in (
        ({"captions": []}, "neither captions nor a reason"),
        ({"reason": None, "captions": None}, "neither captions nor a reason"),
        (
            {"captions": [{"text": "a", "start": 2.0, "end": 1.0, "source": "m"}], "reason": None},
            "ends before it starts",
        ),
        ({"key": "another"}, "belongs to other clips"),
    ):
        rows = [captions.row_of(each, [], "not_annotated", "") | row for each in base]
        index.write_table(str(path), rows, schema.CAPTION_INDEX)
        assert says in said()[0] and "`caption`" in said()[0]
    index.write_table(str(path), [captions.row_of(each, [Caption("")], "", "") for each in base], schema.CAPTION_INDEX)
    assert not said()


def test_the_record_comes_back_and_what_is_none_is_said(tmp_path: Path) -> None:
    record = captions.Captions(str(tmp_path), COLUMN, {"model": "m"}, None, {"train": "1"}, {"clips": 3})
    captions.write_captions(str(tmp_path / "out"), record)
    assert captions.read_captions(str(tmp_path / "out")) == record
    with pytest.raises(UserError, match=r"no captions here \(no captions.json\)"):
        captions.read_captions(str(tmp_path))
    storage.write(str(tmp_path / "captions.json"), b'{"format": 1}')
    with pytest.raises(Failure, match="damaged"):
        captions.read_captions(str(tmp_path))
    storage.write(str(tmp_path / "captions.json"), b'{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        captions.read_captions(str(tmp_path))


def test_a_span_that_ends_with_the_clip_is_the_whole_clip_whatever_its_seconds() -> None:
    seconds = 61 / 30  # more places than spans are kept with
    [caption] = of_clip([Caption("a shot", 0.0, seconds)], 0.0, seconds, 1 / 30)
    assert (caption.start, caption.end) == (None, None)
