"""Views in the layouts of other tools: what they read is what the dataset has, and what they wrote are sources again."""

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import exported
import pytest
import webdataset
from exported import half, invoke, mp4_of, read_manifest, rows_of

from longtake.datasets import index, later, schema, storage
from longtake.datasets.errors import UserError
from longtake.pipeline import layouts
from longtake.pipeline.layouts import chosen


@pytest.fixture
def own(dataset: str, tmp_path: Path) -> str:
    """A copy of the dataset with captions of all clips but one."""
    return exported.told(dataset, tmp_path / "own")


def test_webdataset_reads_what_a_view_keeps_and_its_tars_are_sources_again(own: str, tmp_path: Path) -> None:
    kept = half(own)[1]
    said = invoke("export", own, "--layout", "webdataset", "--to", str(tmp_path / "out"), "--view", "half")
    assert f"{len(kept)} clips of " in said
    tars = sorted((tmp_path / "out").glob("*.tar"))
    rows = rows_of(own)
    samples = {s["__key__"]: s for s in webdataset.WebDataset([str(t) for t in tars], shardshuffle=False)}
    assert samples.keys() == kept
    for key, sample in samples.items():
        facts = json.loads(sample["json"])
        assert sample["mp4"] == mp4_of(own, rows[key])
        assert (facts["frame_count"], facts["fps"], facts["split"]) == tuple(
            rows[key][name] for name in ("frame_count", "fps", "split")
        )
        if key == min(rows):
            assert "txt" not in sample and facts["captions"] == []
        else:
            assert sample["txt"].decode() == '<b>a</b> läuft, "fast"\n🐕' and len(facts["captions"]) == 2
    # back
    invoke("import", str(tmp_path / "out"), "--layout", "webdataset", "--to", str(tmp_path / "back" / "list.jsonl"))
    found = read_manifest(tmp_path / "back" / "list.jsonl")
    videos = {Path(row["uri"]).read_bytes(): row for row in found}
    assert videos.keys() == {mp4_of(own, rows[key]) for key in kept}
    texts = [len(row.get("captions", [])) for row in found]
    assert sorted(texts) == sorted(0 if key == min(rows) else 2 for key in kept)


def test_an_export_goes_on_where_it_was_stopped_and_into_no_folder_of_another(own: str, tmp_path: Path) -> None:
    for layout in ("webdataset", "huggingface"):
        whole, part = tmp_path / f"{layout}-whole", tmp_path / f"{layout}-part"
        selection = chosen.choose(own, None, None)
        chosen.write(selection, layout, str(whole))
        exported.stop_at(7, selection, layout, str(part))
        chosen.write(selection, layout, str(part))
        assert exported.files_of(whole) == exported.files_of(part)
        url, _ = half(own)
        with pytest.raises(UserError, match="has something else in it; name a new folder"):
            chosen.write(chosen.choose(own, url, None), layout, str(part))


def test_an_export_with_labels_of_before_is_another_one(own: str, tmp_path: Path) -> None:
    row = next(row for row in rows_of(own).values() if row["split"] == "train")
    out, selection = str(tmp_path / "out"), chosen.choose(own, None, None)
    exported.stop_at(7, selection, "webdataset", out)

    def correct(**columns: str) -> None:
        changed = {"source": row["source"], "uri": "x", "extra": json.dumps(columns)}
        later.write(own, "train", row["shard"], [changed])

    correct(caption="which no export has")
    chosen.write(chosen.choose(own, None, None), "webdataset", out)
    correct(label="new")
    with pytest.raises(UserError, match="has something else in it; name a new folder"):
        chosen.write(chosen.choose(own, None, None), "webdataset", out)


def test_huggingface_reads_the_folder_and_it_is_sources_again(own: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    url, kept = half(own)
    out = str(tmp_path / "out")
    invoke("export", own, "--layout", "huggingface", "--to", out, "--view", url)
    rows, there = rows_of(own), set[str]()
    for split in ("train", "validation"):
        loaded = datasets.load_dataset("videofolder", data_dir=out, split=split, cache_dir=str(tmp_path / "cache"))
        loaded = loaded.cast_column("video", datasets.Video(decode=False))
        for sample in loaded:
            there.add(sample["key"])
            assert Path(sample["video"]["path"]).read_bytes() == mp4_of(own, rows[sample["key"]])
            assert sample["text"] == ("" if sample["key"] == min(rows) else '<b>a</b> läuft, "fast"\n🐕')
            assert {"train": "train", "validation": "val"}[split] == rows[sample["key"]]["split"]
    assert there == kept
    invoke("import", out, "--layout", "huggingface", "--to", str(tmp_path / "list.jsonl"))
    found = read_manifest(tmp_path / "list.jsonl")
    assert {Path(row["uri"]).stem for row in found} == kept
    assert all(("captions" in row) != (Path(row["uri"]).stem == min(rows)) for row in found)


@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_a_key_that_is_no_name_is_written_nowhere(own: str, tmp_path: Path, layout: str) -> None:
    split = next(split for split in schema.SPLITS if index.shard_names(own, split))
    shard = index.read_shards(own, split)[0]
    for key in ("../../../../x", "/tmp/x", "a.b", "", ".", "x\n", "a" * 300):
        rows = [row | {"key": key} if n == 0 else row for n, row in enumerate(shard.table.to_pylist())]
        url = storage.join(own, split, f"{shard.name}.parquet")
        index.write_index(url, rows, schema.INDEX, shard.tar_bytes, shard.tar_sha256)
        selection = dataclasses.replace(chosen.choose(own, None, None), captions=None)
        with pytest.raises(
            UserError, match=r"\.tar: .* is no key of a clip; export a dataset that `shard` made$"
        ) as error:
            chosen.write(selection, layout, str(tmp_path / "out"))
        assert "\n" not in str(error.value) and not list(tmp_path.rglob("*x.mp4")) and not Path("/tmp/x.mp4").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_tar_that_changed_is_unpacked_again_and_each_has_its_own_place(tmp_path: Path) -> None:
    theirs, manifest = tmp_path / "theirs", tmp_path / "list.jsonl"
    for name in ("a-b.tar", "a/b.tar"):
        tar_of(theirs / name, [("c.mp4", name.encode())])
    assert chosen.write_manifest(str(theirs), "webdataset", str(manifest)) == 2
    videos = [Path(row["uri"]) for row in read_manifest(manifest)]
    assert sorted(video.read_bytes() for video in videos) == [b"a-b.tar", b"a/b.tar"]
    states = {video: video.stat() for video in videos}
    chosen.write_manifest(str(theirs), "webdataset", str(manifest))
    assert states == {video: video.stat() for video in videos}  # not again
    tar_of(theirs / "a-b.tar", [("c.mp4", b"new"), ("d.mp4", b"more")])
    assert chosen.write_manifest(str(theirs), "webdataset", str(manifest)) == 3
    assert {Path(row["uri"]).read_bytes() for row in read_manifest(manifest)} == {b"new", b"more", b"a/b.tar"}


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tars_of_others_stay_in_their_place(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members: list[tuple[tarfile.TarInfo | str, bytes]] = [
        ("../../out.mp4", b"out"), ("../../out.txt", b"a text"), (link, b""), ("/abs.webm", b"abs"), ("/abs.cls", b"3"),
        ("a.b/c.mp4", b"c"), ("a.b/c.json", b'{"caption": "one", "label": "dog", "other": [1]}'), ("alone.txt", b"x"),
    ]  # fmt: skip
    tar_of(tmp_path / "theirs" / "deep" / "0.tar", members)
    count = chosen.write_manifest(str(tmp_path / "theirs"), "webdataset", str(tmp_path / "in" / "list.jsonl"))
    assert count == 3
    found = {Path(row.pop("uri")): row for row in read_manifest(tmp_path / "in" / "list.jsonl")}
    by_bytes = {path.read_bytes(): row for path, row in found.items()}
    assert by_bytes == {b"out": {"caption": "a text"}, b"abs": {"label": "3"}, b"c": {"caption": "one", "label": "dog"}}
    assert all(path.is_relative_to(tmp_path / "in" / "list-videos") for path in found)
    assert {p.name for p in tmp_path.iterdir()} == {"theirs", "in"}


@pytest.mark.parametrize(
    ("layout", "files", "says"),
    [
        ("webdataset", {"a.tar": b"no tar" * 200}, r"a\.tar: not a readable tar"),
        ("webdataset", {"a.txt": b"nothing"}, "has no videos in the layout webdataset"),
        ("huggingface", {"metadata.jsonl": b'{"name": "a.mp4"}'}, r"metadata\.jsonl: row 1 has no file_name"),
        ("huggingface", {"metadata.jsonl": b'{"file_name": "../x.mp4"}'}, r"row 1: \.\./x\.mp4 is no file of this folder"),
        ("huggingface", {"metadata.jsonl": b'{"file_name": "a.mp4"}'}, r"row 1: a\.mp4 is no file of this folder"),
        ("huggingface", {"metadata.jsonl": b"{nonsense"}, r"metadata\.jsonl: not readable"),
        ("huggingface", {"a.mp4": b"a", "metadata.csv": b"file_name,captions\na.mp4,[3]\n"}, "captions: entry 1: 3 is no text"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_layout_is_one_line(
    tmp_path: Path, layout: str, files: dict[str, bytes], says: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "x.mp4").write_bytes(b"secret")
    for name, data in files.items():
        (tmp_path / "theirs" / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        chosen.write_manifest(str(tmp_path / "theirs"), layout, str(tmp_path / "list.jsonl"))
    assert "\n" not in str(error.value) and not (tmp_path / "list.jsonl").exists()


def test_long_and_broken_texts_of_tars_are_one_line(tmp_path: Path) -> None:
    for name, data, says in (
        ("a.json", b"[1]", r"a\.json: not readable \(not an object\)"),
        ("a.json", b"[" * 100000, r"a\.json: not readable"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not readable"),
        ("a.txt", b"x" * (1 << 20) + b"x", r"a\.txt: has 1048577 bytes; 1048576 are allowed"),
    ):
        tar_of(tmp_path / "theirs" / "0.tar", [("a.mp4", b"a"), (name, data)])
        with pytest.raises(UserError, match=says):
            chosen.write_manifest(str(tmp_path / "theirs"), "webdataset", str(tmp_path / "list.jsonl"))


def videos_of(folder: Path, manifest: Path) -> list[tuple[bytes, str]]:
    chosen.write_manifest(str(folder), "webdataset", str(manifest))
    return [(Path(row["uri"]).read_bytes(), row["caption"]) for row in read_manifest(manifest)]


def test_tars_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    theirs, other, manifest = tmp_path / "theirs", tmp_path / "other", tmp_path / "list.jsonl"
    tar_of(theirs / "a" / "b.tar", [("x.mp4", b"1"), ("x.txt", b"a, b")])
    tar_of(theirs / "a-b.tar", [("x.mp4", b"2"), ("x.txt", b"a-b")])
    tar_of(other / "a-b.tar", [("x.mp4", b"3"), ("x.txt", b"other")])
    (theirs / "folder.tar").mkdir()
    assert sorted(videos_of(theirs, manifest)) == [(b"1", "a, b"), (b"2", "a-b")]
    with pytest.raises(UserError, match=r"list-videos: has something else in it; name a new folder"):
        videos_of(other, manifest)
    other_manifest = tmp_path / "other.jsonl"
    assert videos_of(other, other_manifest) == [(b"3", "other")]
    # corrected, of the same size, and imported again
    tar_of(other / "a-b.tar", [("x.mp4", b"3"), ("x.txt", b"again")])
    assert videos_of(other, other_manifest) == [(b"3", "again")]


def test_a_tar_that_is_cut_or_damaged_or_has_holes_loses_no_video_silently(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [(f"{name}.mp4", name.encode() * 600) for name in "abc"])
    whole = (tmp_path / "0.tar").read_bytes()
    second = whole.index(b"b.mp4")
    flipped = bytearray(whole)
    flipped[second + 10] ^= 1
    sparse = tarfile.TarInfo("a.mp4")
    sparse.type = tarfile.GNUTYPE_SPARSE
    holes = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    holes[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    holes[148:156] = b"%06o\0 " % (256 + sum(holes[:148]) + sum(holes[156:]))
    for number, damaged in enumerate((whole[:second], whole[: second + 200], whole[: second + 700], flipped, holes)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "0.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=r"0\.tar: not a readable tar \(.+\); download it again"):
            chosen.write_manifest(str(folder), "webdataset", str(tmp_path / f"{number}.jsonl"))


@pytest.mark.parametrize("name", ["a\0.mp4", "\ud800.mp4", "a" * 5000])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}))
    with pytest.raises(UserError, match=r"metadata\.jsonl: row 1: .+ is no file of this folder"):
        chosen.write_manifest(str(tmp_path), "huggingface", str(tmp_path / "list.jsonl"))


def test_what_cannot_be_chosen_is_one_line(own: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--captions caption-no: there are caption-"):
        chosen.choose(own, None, "caption-no")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "dataset.json").write_text('{"format": 1, "kind": "images"}')
    with pytest.raises(UserError, match="has images, whose tars are WebDataset as they are; name a dataset of clips"):
        chosen.choose(str(tmp_path / "pictures"), None, None)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"--to \S+file: cannot be a folder \(File exists\); name another one"):
        chosen.write(chosen.choose(own, None, None), "webdataset", str(tmp_path / "file"))
    for name in ("folder.jsonl", "file/list.jsonl"):
        with pytest.raises(UserError, match=rf"--to \S+{name}: cannot be a file \(.+\); name another one"):
            chosen.write_manifest(own, "webdataset", str(tmp_path / name))
    with pytest.raises(UserError, match="no dataset here"):
        chosen.choose(f"{own}/dataset.json", None, None)
    with pytest.raises(UserError, match="no such view"):
        chosen.choose(own, f"{own}/views/no.parquet", None)
    with pytest.raises(UserError, match=r"--to \S+list\.csv: name a file on this machine that ends in \.jsonl"):
        chosen.write_manifest(own, "webdataset", str(tmp_path / "list.csv"))
