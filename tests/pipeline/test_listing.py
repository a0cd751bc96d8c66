"""Every name that a file system or a bucket can hold is one source; a path that exists is never a glob."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.pipeline import discover, listing
from longtake.pipeline.stages import shard

ODD = [
    "[4K] a.mp4", "what?.mp4", "*.mp4", "100%.mp4", "50%25.mp4", "#1.mp4", "a::b.mp4", "s3:x.mp4", "-r.mp4", "~me.mp4",
    "two  spaces .mp4", "new\nline.mp4", "tab\t\x7f.mp4", "ends\u2028here.mp4", "caf\udce9.mp4", "日本語\xa0.mp4", "é.mp4",
    "e\u0301.mp4", "{a,b}.mp4", "a'\"b.mp4", "back\\slash.mp4", "frame-%05d.mp4", "x" * 251 + ".mp4", "data:,x.mp4",
]  # fmt: skip


def uris(*patterns: object) -> list[str]:
    return [row["uri"] for batch in discover.find([str(p) for p in patterns]) for row in batch.to_pylist()]


def paths(*patterns: object) -> list[str]:
    return [storage.filesystem(uri)[1] for uri in uris(*patterns)]


def touch(path: Path | str, data: bytes = b"1") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)
    return str(path)


def test_every_odd_name_is_one_source_by_its_folder_and_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "My [4K] *clips?"
    files = sorted(touch(folder / name) for name in ODD)
    assert sorted(paths(folder)) == files
    listed = uris(folder)
    assert all(uri.encode() and uri.splitlines() == [uri] for uri in listed)
    for file in files:
        assert paths(storage.named(file)) == [file], "by its own name, it is no glob and no URL"
    assert sorted(paths(f"{folder}/*.mp4")) == [f"{folder}/*.mp4"], "what exists is no glob"
    assert sorted(paths(f"{folder}/?*.mp4")) == files, "a glob below a folder whose name is none"
    # as the recipe and the manifest carry them
    config = shard.Config(kind="shard", sources=[str(folder)])
    assert shard.Config(**json.loads(config.model_dump_json())).sources == config.sources
    pq.write_table(pa.table({"uri": listed, "bytes": [1] * len(files)}), tmp_path / "m.parquet")
    assert uris(tmp_path / "m.parquet") == listed


names = st.binary(min_size=1, max_size=60).filter(lambda b: not set(b) & {0, 47} and b[:1] != b".")


@given(st.sets(names, min_size=1, max_size=5))
def test_any_bytes_that_can_be_a_name_come_back(tmp_path_factory: pytest.TempPathFactory, some: set[bytes]) -> None:
    folder = tmp_path_factory.mktemp("f")
    files = {touch(folder / os.fsdecode(name + b".mp4")) for name in some}
    listed = uris(folder)
    assert {storage.filesystem(uri)[1] for uri in listed} == files and len(listed) == len(files)
    assert all(json.loads(json.dumps(uri).encode()) == uri == uri.encode().decode() for uri in listed)


@pytest.mark.parametrize("write", ["file://{}", "file:{}", "file://localhost{}", "FILE://{}", "local://{}"])
def test_file_urls_are_local_files_encoded_or_not(tmp_path: Path, write: str) -> None:
    files = [touch(tmp_path / name) for name in ("a b.mp4", "100%.mp4", "c#d.mp4", "é.mp4")]
    for file in files:
        for url in (write.format(file), write.format(Path(file).as_uri().removeprefix("file://"))):
            assert paths(url) == [file]
            (tmp_path / "m.csv").write_text(f'uri\n"{url}"\n')
            assert uris(tmp_path / "m.csv") == [file]
            assert storage.is_local(url) and storage.read(url) == b"1"
    assert sorted(paths(write.format(tmp_path))) == sorted(files)


def test_names_in_a_manifest_count_from_its_folder_whatever_they_hold(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    some = ["a::b.mp4", "new\nline.mp4", "-r.mp4", "~me.mp4", "50%25.mp4", "s3:x.mp4"]
    for where in (folder, tmp_path / "plain"):
        files = [touch(where / name) for name in some]
        manifest = touch(where / "m.jsonl", "".join(json.dumps({"uri": name}) + "\n" for name in some).encode())
        assert paths(storage.named(manifest)) == files


def test_folders_behind_links_are_entered_once_and_loops_never(tmp_path: Path) -> None:
    footage, disk = tmp_path / "footage", tmp_path / "disk2"
    touch(footage / "0.mp4"), touch(disk / "1.mp4"), touch(disk / "sub/2.mp4")
    (footage / "amore").symlink_to("../disk2")
    (footage / "more").symlink_to("../disk2")
    (footage / "back").symlink_to(tmp_path)
    (footage / "self").symlink_to("self")
    (disk / "up").symlink_to(footage)
    (disk / "sub/gone.mp4").symlink_to("nothing")
    (footage / "a").symlink_to("z")
    touch(footage / "z/3.mp4")
    below = [str(footage / n) for n in ("0.mp4", "amore/1.mp4", "amore/sub/2.mp4", "amore/sub/gone.mp4", "z/3.mp4")]
    assert paths(footage) == paths(f"{footage}/**/*.mp4") == below
    assert paths(f"{footage}/*/*.mp4") == [
        str(footage / n) for n in ("a/3.mp4", "amore/1.mp4", "more/1.mp4", "z/3.mp4")
    ]
    assert paths(f"{footage}/**") == [*below[:4], str(footage / "self"), below[4]]


def test_a_folder_that_may_not_be_read_is_a_source_of_its_own_or_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "in/a.mp4"), touch(tmp_path / "in/shut/b.mp4")
    plain = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [(r["uri"], r["bytes"]) for b in discover.find([f"{tmp_path}/in"]) for r in b.to_pylist()] == [
        (f"{tmp_path}/in/a.mp4", 1),
        (f"{tmp_path}/in/shut", None),
    ]
    with pytest.raises(UserError, match=r"in/shut: may not be read \(Permission denied\)"):
        uris(tmp_path / "in/shut")


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_source_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="a source is empty"):
        shard.Config(kind="shard", sources=["videos", source])


@pytest.mark.skipif(sys.platform != "linux", reason="pipes")
def test_what_is_no_file_is_a_source_that_nobody_waits_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert [(r["uri"], r["bytes"]) for b in discover.find([str(tmp_path)]) for r in b.to_pylist()] == [
        (f"{tmp_path}/pipe.mp4", None)
    ]


def make_workspace(folder: Path | str, write: Callable[[str], object]) -> None:
    write(f"{folder}/recipes/0123456789ab.yaml")
    write(f"{folder}/artifacts/1/samples/x.mp4")


def test_what_lies_in_a_workspace_is_no_source(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "recipes/cooking.mp4")
    make_workspace(tmp_path / "runs/one", touch)
    (tmp_path / "mine").symlink_to("runs")
    expected = [str(tmp_path / "a.mp4"), str(tmp_path / "recipes/cooking.mp4")]
    assert paths(tmp_path) == paths(f"{tmp_path}/**/*.mp4") == expected
    assert paths(tmp_path / "runs/one/artifacts") == [str(tmp_path / "runs/one/artifacts/1/samples/x.mp4")], "if named"
    for pattern in (tmp_path / "runs/one", f"{tmp_path}/runs/one/**"):
        with pytest.raises(UserError, match="is a workspace"):
            uris(pattern)


def test_a_folder_that_may_not_be_entered_is_said_and_never_passed_over(
    tmp_path: Path, shut: Callable[[Path], None]
) -> None:
    for folder in ("a", "shut"):
        touch(tmp_path / folder / "x.csv"), touch(tmp_path / folder / "1.mp4")
    shut(tmp_path / "shut")
    assert str(tmp_path / "shut") in paths(tmp_path / "*" / "1.mp4")
    for pattern in ("**/*.csv", "*/x.csv", "shut/*.csv", "shut/1.mp4", "shut/*.mp4"):
        with pytest.raises(UserError, match="may not be read"):
            list(discover.find([str(tmp_path / pattern)]))


def test_every_odd_key_of_a_bucket_is_one_source(s3_server: Any) -> None:
    fs = storage.filesystem("s3://raw")[0]
    # moto's own routes end at a line end
    keys = [name for name in ODD if storage.printable(name) == name]
    keys += ["a/b?c=d/e.mp4", "what%3F.mp4", "two//slashes.mp4"]
    for key in keys:
        fs.pipe_file(f"raw/My [4K] clips/{key}", b"1")
    make_workspace("raw/My [4K] clips/runs", lambda path: fs.pipe_file(path, b"1"))
    fs.invalidate_cache()
    folder = "s3://raw/My [4K] clips"
    assert uris(folder) == sorted(f"{folder}/{key}" for key in keys)
    flat = sorted(f"{folder}/{key}" for key in keys if "/" not in key)
    assert uris(f"{folder}/**/[!q]*.mp4") == uris(folder)
    assert uris(f"{folder}/?*.mp4") == flat
    for key in keys:
        assert uris(f"{folder}/{key}") == [f"{folder}/{key}"]
        assert storage.read(f"{folder}/{key}") == b"1"
    with pytest.raises(UserError, match="no such file or folder"):
        uris("s3://raw/none")


def test_an_address_is_a_source_whatever_its_query_holds() -> None:
    address = "http://127.0.0.1:9/a.mp4?sig=x*y&list=[1]"
    assert not listing.is_glob("http://127.0.0.1:9/a.mp4?x")
    assert uris("http://127.0.0.1:9/a.mp4?sig=x%2Ay") == ["http://127.0.0.1:9/a.mp4?sig=x%2Ay"]
    assert storage.absolute(address) == address
