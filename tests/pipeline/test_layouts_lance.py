"""Views as Lance datasets, and those of others as manifests."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import exported
import lance
import numpy as np
import pyarrow as pa
import pytest
from exported import half, invoke, mp4_of, read_manifest, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtake.datasets import index, schema, scores
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Column, Field
from longtake.pipeline.layouts import chosen

COLUMN = Column(
    "score-look-0123456789abcdef",
    "look",
    {},
    "",
    (
        Field("bright", "number", "how bright"),
        Field("side", "label", "of what", ("left", "right")),
        Field("vector", "vector", "what it is like", width=4),
        Field("each", "vector", "what each frame is like", width=2, count=3),
    ),
)


@pytest.fixture
def own(dataset: str, tmp_path: Path) -> str:
    """A copy of the dataset with captions of all clips but one, and scores of every second clip."""
    folder = exported.told(dataset, tmp_path / "own")
    for split in schema.SPLITS:
        for base in index.read_shards(folder, split):
            values = {"bright": 0.5, "side": "left", "vector": [1, 2, 3, 4], "each": [[1, 2], [3, 4]]}
            rows = [values | {"bright": float(n)} if n % 2 == 0 else {} for n in range(len(base.table))]
            scores.write_shard(folder, base, COLUMN, rows)
    return folder


def test_lance_has_what_a_view_keeps_with_captions_and_scores_and_is_sources_again(own: str, tmp_path: Path) -> None:
    url, kept = half(own)
    invoke("export", own, "--layout", "lance", "--to", str(tmp_path / "out"), "--view", url, "--scores", "all")
    found = lance.dataset(str(tmp_path / "out" / "clips.lance"))
    table = found.to_table(columns=[name for name in found.schema.names if name != "video"])
    rows = rows_of(own)
    assert set(table["key"].to_pylist()) == kept and len(table) == len(kept)
    blobs = found.take_blobs("video", indices=list(range(len(table))))
    for row, blob in zip(table.to_pylist(), blobs, strict=True):
        base = rows[row["key"]]
        assert blob.read() == mp4_of(own, base)
        names = ("split", "source", "label", "fps", "frame_count", "width", "height", *schema.SCORES)
        assert all(row[name] == base[name] for name in names)
        assert row["caption"] == (None if row["key"] == min(rows) else '<b>a</b> läuft, "fast"\n🐕')
        assert [each["start"] for each in row["captions"]] == ([] if row["key"] == min(rows) else [None, 0.1])
        look = row["scores"]["look"]
        # every second clip of a shard has scores, and the view keeps every second one of a split
        assert (look["bright"] is None) == (look["side"] is None) == (look["vector"] is None) == (look["each"] is None)
        assert look["vector"] in (None, [1, 2, 3, 4]) and look["each"] in (None, [[1, 2], [3, 4]])
    scored = [row for row in table.to_pylist() if row["scores"]["look"]["bright"] is not None]
    assert scored
    # names of rules are filters, and vectors can be searched
    high = found.to_table(columns=["key"], filter="scores.look.bright >= 2")
    assert set(high["key"].to_pylist()) == {row["key"] for row in scored if row["scores"]["look"]["bright"] >= 2}
    near = {"column": "scores.look.vector", "q": np.array([1, 2, 3, 4], np.float16), "k": 1}
    assert found.to_table(columns=["key", "_distance"], nearest=near)["_distance"].to_pylist() == [0]
    # back
    invoke("import", str(tmp_path / "out"), "--layout", "lance", "--to", str(tmp_path / "back" / "list.jsonl"))
    videos = {Path(row["uri"]).read_bytes(): row for row in read_manifest(tmp_path / "back" / "list.jsonl")}
    assert videos.keys() == {mp4_of(own, rows[key]) for key in kept}
    assert sum("captions" not in row for row in videos.values()) == (min(rows) in kept)


def test_a_sample_of_others_has_numbers_and_labels_and_no_vectors(own: str, tmp_path: Path) -> None:
    invoke("export", own, "--layout", "huggingface", "--to", str(tmp_path / "out"), "--scores", "all")
    lines = [line for path in (tmp_path / "out").rglob("metadata.jsonl") for line in path.read_text().splitlines()]
    values = [json.loads(line)["scores"]["look"] for line in lines]
    assert len(values) == len(rows_of(own)) and all(each.keys() == {"bright", "side"} for each in values)
    assert {each["side"] for each in values} == {"left", None}
    # other scores are another export
    with pytest.raises(UserError, match="has something else in it; name a new folder"):
        chosen.write(chosen.choose(own, None, None), "huggingface", str(tmp_path / "out"))


def test_a_stopped_export_goes_on_and_what_it_left_is_not_in_the_dataset(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection, calls = chosen.choose(own, None, None), 0
    module = chosen.layouts.load("lance")
    original = module.clips_of

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        for one in original(*arguments, **named):
            calls += 1
            if calls == 8:
                raise Failure("the disk is away")
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(module, "clips_of", failing)
        # small batches, so that some of the shard is written
        patch.setattr(module, "_BATCH_BYTES", 1)
        with pytest.raises(Failure, match=r"^the disk is away$"):
            chosen.write(selection, "lance", str(tmp_path / "part"))
    assert not (tmp_path / "part" / "clips.lance" / "_versions").exists()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "part" / "fragments").iterdir()}
    assert first
    # a kill leaves files that no fragment names
    (tmp_path / "part" / "clips.lance" / "data" / "left.lance").write_bytes(b"some")
    calls = 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        for one in original(*arguments, **named):
            calls += 1
            yield one

    monkeypatch.setattr(module, "clips_of", counting)
    chosen.write(selection, "lance", str(tmp_path / "part"))
    rows = rows_of(own)
    assert 0 < calls < len(rows)
    part = lance.dataset(str(tmp_path / "part" / "clips.lance"))
    assert part.to_table(columns=["key"])["key"].to_pylist() == list(rows) and part.version == 1
    named = {file.path for fragment in part.get_fragments() for file in fragment.data_files()}
    assert {path.name for path in (tmp_path / "part" / "clips.lance" / "data").iterdir()} == named
    assert not (tmp_path / "part" / "fragments").exists()
    # nothing is left to do
    calls = 0
    chosen.write(selection, "lance", str(tmp_path / "part"))
    assert not calls and lance.dataset(str(tmp_path / "part" / "clips.lance")).version == 1


def test_datasets_of_others_with_plain_columns(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "mp4": [b"one", None, b"three"], "text": ["a", "b", ""], "label": [7, 8, None]})
    lance.write_dataset(table, str(tmp_path / "theirs" / "deep" / "some.lance"))
    lance.write_dataset(table.select(["mp4"]), str(tmp_path / "theirs" / "other.lance"))
    assert chosen.write_manifest(str(tmp_path / "theirs"), "lance", str(tmp_path / "in" / "list.jsonl")) == 4
    rows = [{**row, "uri": Path(row["uri"]).read_bytes()} for row in read_manifest(tmp_path / "in" / "list.jsonl")]
    assert rows == [
        {"uri": b"one", "caption": "a", "label": "7"}, {"uri": b"three"}, {"uri": b"one"}, {"uri": b"three"},
    ]  # fmt: skip
    # what changed is unpacked again
    changed = table.select(["mp4"]).slice(2)
    lance.write_dataset(changed, str(tmp_path / "theirs" / "other.lance"), mode="append")
    assert chosen.write_manifest(str(tmp_path / "theirs"), "lance", str(tmp_path / "in" / "list.jsonl")) == 5
    # what is unpacked is of that folder alone
    with pytest.raises(UserError, match="list-videos: has something else in it; name a new folder"):
        chosen.write_manifest(str(tmp_path / "theirs" / "deep"), "lance", str(tmp_path / "in" / "list.jsonl"))


def refused(folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        chosen.write_manifest(str(folder), "lance", str(folder.parent / "list.jsonl"))
    assert "\n" not in str(error.value) and not (folder.parent / "list.jsonl").exists()
    shutil.rmtree(folder.parent / "list-videos")


def test_what_lies_outside_or_is_no_such_dataset_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    blobs = lance.blob_array([f"file://{tmp_path}/secret"])
    outside = pa.table({"video": blobs}, pa.schema([lance.blob_field("video")]))
    place = str(tmp_path / "a" / "x.lance")
    lance.write_dataset(outside, place, data_storage_version="2.2", allow_external_blob_outside_bases=True)
    refused(tmp_path / "a", r"x\.lance: video refers to a file outside it")

    lance.write_dataset(pa.table({"video": [b"x"]}), str(tmp_path / "b" / "x.lance"))
    (data,) = (tmp_path / "b" / "x.lance" / "data").iterdir()
    shutil.move(data, tmp_path / "moved")
    data.symlink_to(tmp_path / "moved")
    refused(tmp_path / "b", r"data/\S+\.lance: is a link; copy the dataset without links")

    lance.dataset(place).shallow_clone(str(tmp_path / "c" / "x.lance"), reference=1)
    refused(tmp_path / "c", r"x\.lance: refers to files outside it; write it again as one dataset")

    lance.write_dataset(pa.table({"one": [b"x"], "two": [b"y"], "n": [1]}), str(tmp_path / "d" / "x.lance"))
    refused(tmp_path / "d", r"several columns of bytes \(one, two\); call the one with videos `video`")
    lance.write_dataset(pa.table({"n": [1]}), str(tmp_path / "e" / "x.lance"))
    refused(tmp_path / "e", "has no column of bytes")
    lance.write_dataset(pa.table({"video": [b"x"], "captions": [[3]]}), str(tmp_path / "f" / "x.lance"))
    refused(tmp_path / "f", "captions: entry 1: 3 is no text")
    lance.write_dataset(pa.table({"video": [b"x"], "text": ["x" * (1 << 20)]}), str(tmp_path / "g" / "x.lance"))
    refused(tmp_path / "g", "row 0: its captions have 10485")
    (tmp_path / "h" / "x.lance" / "_versions").mkdir(parents=True)
    refused(tmp_path / "h", r"x\.lance: not a readable Lance dataset")
    (tmp_path / "i").mkdir()
    refused(tmp_path / "i", "has no videos in the layout lance")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of others in one file, with its bytes."""
    folder = tmp_path_factory.mktemp("whole") / "x.lance"
    kind = pa.schema(
        [pa.field("video", pa.large_binary(), metadata={"lance-encoding:blob": "true"}), ("text", pa.string())]
    )
    lance.write_dataset(pa.table([[b"x" * 90, b"y" * 9], ["a", "b"]], kind), str(folder), data_storage_version="2.1")
    return folder


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_one_line(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
    shutil.rmtree(tmp_path / "list-videos", ignore_errors=True)
    shutil.copytree(whole, tmp_path / "theirs" / "x.lance")
    paths = sorted(path for path in (tmp_path / "theirs").rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(paths))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        chosen.write_manifest(str(tmp_path / "theirs"), "lance", str(tmp_path / "list.jsonl"))
    except UserError as e:
        assert "\n" not in str(e)
    else:
        lines = (tmp_path / "list.jsonl").read_text().splitlines()
        assert all(os.path.realpath(json.loads(line)["uri"]).startswith(str(tmp_path)) for line in lines)
