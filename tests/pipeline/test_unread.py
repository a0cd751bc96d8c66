"""One bad source never stops a job: it has its row with the reason, and what may pass is tried again."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from answering import CUT, Web, hashes, listed, make
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import UserError
from longtake.datasets.verify import verify
from longtake.pipeline import fetch, plan, retry, seen
from longtake.pipeline.commit import make_group
from longtake.pipeline.discover import find
from longtake.pipeline.stages import shard

WAYS = {
    "plain": "good", "chunked": "good", "gzip": "good", "closed": "good", "moved": "good", "404": "missing",
    "410": "missing", "401": "refused", "403": "refused", "451": "refused", "400": "refused", "loop": "refused",
    "file": "refused", "endless": "too_large", "503": "unreachable", "429": "unreachable", "cut": "unreachable",
}  # fmt: skip


@pytest.mark.parametrize("sized", [False, True])
def test_each_way_of_not_answering_is_a_row_and_the_others_become_clips(web: Web, tmp_path: Path, sized: bool) -> None:
    uris = {f"{web.url}/{way}/{n % 16}.mp4": reason for n, (way, reason) in enumerate(WAYS.items()) if n < 16}
    uris[f"{web.url}/cut/15.mp4"] = "unreachable"
    odd = {"http://": "refused", "nowhere://x/y.mp4": "refused", f"{tmp_path}/gone.mp4": "missing", "/\0": "refused"}
    odd[f"{tmp_path}/{'x' * 300}.mp4"] = "missing"
    odd |= {"http://127.0.0.1:1/a.mp4": "unreachable", f"file://{tmp_path}/none.mp4": "missing"}
    columns: dict[str, list[Any]] = {}
    if sized:
        count = len(uris | odd)
        columns = {"bytes": [5000 + n for n in range(count)], "etag": [f"e{n}" for n in range(count)]}
    told = make(tmp_path / "ds", listed(tmp_path, *(uris | odd), **columns))
    by_path = {storage.filesystem(u)[1] if storage.is_local(u) else u: reason for u, reason in told.items()}
    expected = {storage.filesystem(u)[1] if storage.is_local(u) else u: r for u, r in (uris | odd).items()}
    assert by_path == expected
    details = {
        row["uri"].split("/")[3]: row["detail"]
        for row in index.read_sources(str(tmp_path / "ds")).to_pylist()
        if web.url in row["uri"]
    }
    assert "HTTP 403" in details["403"] and "HTTP 503" in details["503"] and "without end" in details["loop"]
    assert sized or "not complete" in details["cut"] or "length" in details["cut"], details["cut"]
    assert "not an HTTP address" in details["file"] and web.asked["/403/8.mp4"] < 5, (
        "what is refused is not asked again"
    )


def test_what_was_unreachable_is_made_once_it_answers_and_nothing_else_again(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [f"{web.url}/{way}/{n}.mp4" for n, way in enumerate(["plain", "503", "429", "404", "plain", "429", "gzip"])]
    manifest, dataset = listed(tmp_path, *uris), tmp_path / "ds"
    first = make(dataset, manifest)
    assert Counter(first.values()) == {"good": 3, "unreachable": 3, "missing": 1}
    made = hashes(dataset)
    assert make(dataset, manifest) == first and hashes(dataset) == made, "what still does not answer is not planned"
    digests = [retry.retried(str(dataset))]
    for healed in ({"503"}, {"503", "429"}):
        web.healed = healed
        digests.append(retry.retried(str(dataset)))
        before = hashes(dataset)
        web.asked.clear()
        told = make(dataset, manifest)
        assert told == first | {u: "good" for u in uris if u.split("/")[3] in healed}
        assert before.items() <= hashes(dataset).items()
        assert not any("/plain/" in path for path in web.asked), "no source that was made is read again"
        assert retry.retried(str(dataset)) == digests[-1], "it stands for what was tried again since"
    assert len(set(digests)) == 3 and digests[0] == ""
    with monkeypatch.context() as patch:
        patch.setattr(retry, "read_tries", lambda *_: pytest.fail("every command would read all accounts"))
        assert retry.retried(str(dataset)) == digests[-1] and retry.retried(str(tmp_path)) == ""
    whole = hashes(dataset)
    assert make(dataset, manifest) and hashes(dataset) == whole
    totals = index.summary(str(dataset))
    assert totals["sources"] == 7 and totals["sources_tried_again"] == 3


def test_where_nothing_was_read_all_is_planned_anew_once_it_answers(web: Web, tmp_path: Path) -> None:
    uris = [f"{web.url}/503/{n}.mp4" for n in range(3)]
    manifest, url = listed(tmp_path, *uris), str(tmp_path / "ds")
    for heal in (set[str](), {"503"}):
        web.healed = heal
        storage.write(f"{url}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION}))
        for group in shard.missing_groups(url, plan.plan(url, [manifest], 0.2, 1 << 30, 3)):
            assert not make_group(group, plan.sources_of(url, group), url, CUT)["error"]
        retry.record(url)
    assert not list(verify(url)) and index.summary(url)["sources_good"] == 3


def test_a_source_that_is_always_cut_short_makes_nothing_run_for_ever(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, dataset = listed(tmp_path, f"{web.url}/plain/0.mp4", f"{web.url}/cut/1.mp4"), tmp_path / "ds"
    monkeypatch.setattr(retry, "answers", lambda uri: True)
    first = make(dataset, manifest)
    digest = retry.retried(str(dataset))
    assert digest and set(first.values()) == {"good", "unreachable"}
    assert make(dataset, manifest) == first
    assert retry.retried(str(dataset)) == digest
    url = str(dataset)
    assert len(index.table_names(f"{url}/plan")) == 1
    # as after a driver that died once it had planned
    web.healed = {"cut"}
    assert plan.plan(url, [manifest], 0.2, 1 << 30, 3) == plan.plan(url, [manifest], 0.2, 1 << 30, 3)
    assert len(index.table_names(f"{url}/plan")) == 2
    # and a shard that is made again has nothing that a later one has
    told = make(dataset, manifest)
    assert set(told.values()) == {"good"}
    (old,) = (
        g for g in plan.groups(url) if any("/cut/" in r["uri"] for r in plan.sources_of(url, g)) and g["plan"][4] == "0"
    )
    before = index.summary(url)
    Path(f"{url}/{old['split']}/{old['group']:05d}.parquet").unlink()
    old["again"] = seen.planned_again(url, [old])[old["split"], old["group"]]
    assert not make_group(old, plan.sources_of(url, old), url, CUT)["error"]
    assert index.summary(url) == before and not list(verify(url))
    # a damaged account does not keep the stage from running
    Path(f"{url}/sources/{old['split']}-{old['group']:05d}.parquet").write_bytes(b"torn")
    retry.record(url)
    assert plan.plan(url, [manifest], 0.2, 1 << 30, 3) == plan.groups(url)


@pytest.mark.parametrize(
    "content", [None, b"{", b'{"awaited": null}', b'{"awaited":[],"repeated":"xyz","rounds":1}', b"[" * 100_000]
)
def test_a_record_that_is_missing_or_damaged_is_made_again(web: Web, tmp_path: Path, content: bytes | None) -> None:
    dataset = tmp_path / "ds"
    make(dataset, listed(tmp_path, f"{web.url}/plain/0.mp4", f"{web.url}/503/1.mp4"))
    assert shard.complete(str(dataset))
    before = (dataset / retry.RECORD).read_bytes()
    (dataset / retry.RECORD).unlink()
    if content is not None:
        (dataset / retry.RECORD).write_bytes(content)
    assert not shard.complete(str(dataset)) and retry.retried(str(dataset)) == ""
    retry.record(str(dataset))
    assert shard.complete(str(dataset)) and (dataset / retry.RECORD).read_bytes() == before


def test_a_store_that_is_silent_holds_no_command_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(retry, "answers", lambda uri: held.wait() and False)
    uris = [f"http://h/{n}.mp4" for n in range(40)]
    content = storage.canonical_json({"awaited": uris, "repeated": [], "rounds": 2})
    storage.write(str(tmp_path / retry.RECORD), content)
    assert retry.retried(str(tmp_path), seconds=0.1) == " 2"
    held.set()
    monkeypatch.setattr(retry, "answers", lambda uri: uri == uris[7])
    assert retry.retried(str(tmp_path)) == " 3"


def test_what_is_unreachable_while_planning_keeps_the_identity_of_its_content(web: Web, tmp_path: Path) -> None:
    uris = [f"{web.url}/{mode}/{n}.mp4" for n, mode in enumerate(["plain", "503", "429"])]
    for folder, heal in (("whole", {"503", "429"}), ("late", set[str]())):
        web.healed = heal
        manifest = listed(tmp_path, *uris, bytes=[(web.folder / f"{n}.mp4").stat().st_size for n in range(3)])
        told = make(tmp_path / folder, manifest)
        assert told == {u: "good" if heal or "plain" in u else "unreachable" for u in uris}
    web.healed = {"503", "429"}
    make(tmp_path / "late", manifest)
    keys = [
        {r["key"] for s in schema.SPLITS for r in index.read_all(str(tmp_path / d), s).to_pylist()}
        for d in ("whole", "late")
    ]
    assert keys[0] == keys[1] and len(keys[0]) == 3


def test_long_files_are_copies_only_if_every_byte_is(tmp_path: Path) -> None:
    """Samples see head, middle and tail."""
    data = bytearray(1 << 20)
    contents = {"a": bytes(data), "copy": bytes(data)}
    for n, name in enumerate(("b", "c")):
        data[200_000] = n + 1
        contents[name] = bytes(data)
    contents["b again"] = contents["b"]
    for name, content in contents.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)

    def copies(*names: str) -> dict[str, str | None]:
        patterns = [str(tmp_path / f"{name}.mp4") for name in names]
        plan.plan(str(tmp_path / "ds"), patterns, 0, 1 << 30, 9)
        rows = [r for g in plan.groups(str(tmp_path / "ds")) for r in plan.sources_of(str(tmp_path / "ds"), g)]
        return {Path(r["uri"]).stem: r["duplicate_of"] and Path(r["duplicate_of"]).stem for r in rows}

    assert copies("b", "a", "copy") == {"a": None, "copy": "a", "b": None}
    assert copies(*contents) == {"a": None, "copy": "a", "b": None, "b again": "b", "c": None}
    rows = [r for g in plan.groups(str(tmp_path / "ds")) for r in plan.sources_of(str(tmp_path / "ds"), g)]
    assert len({r["source"] for r in rows}) == 3


def test_a_source_is_a_copy_only_of_what_was_read(web: Web, tmp_path: Path) -> None:
    none = [f"{web.url}/404/0.mp4", f"{web.url}/404/1.mp4", f"{tmp_path}/a.mp4", f"{tmp_path}/b.mp4"]
    unknown = [f"{web.url}/{way}/{n}.mp4" for n, way in enumerate(["chunked", "chunked", "gzip", "closed"])]
    told = make(tmp_path / "ds", listed(tmp_path, *none, *unknown))
    assert [told[u] for u in none + unknown] == ["missing"] * 4 + ["good"] * 4


def test_a_copy_takes_the_place_of_what_cannot_be_read(web: Web, tmp_path: Path) -> None:
    uris = [f"{web.url}/403/1.mp4", f"{web.url}/moved/1.mp4", f"{web.url}/plain/1.mp4"]
    told = make(tmp_path / "ds", listed(tmp_path, *uris, bytes=[7] * 3, etag=["same"] * 3))
    assert told == {uris[0]: "refused", uris[1]: "good", uris[2]: "duplicate"}
    later = listed(tmp_path, *uris, f"{web.url}/chunked/1.mp4", bytes=[7] * 4, etag=["same"] * 4)
    assert make(tmp_path / "ds", later)[f"{web.url}/chunked/1.mp4"] == "duplicate"


def test_a_size_that_is_told_only_sometimes_makes_no_new_source(web: Web, tmp_path: Path) -> None:
    uris = [f"{web.url}/{mode}/{n}.mp4" for n, mode in enumerate(["chunked", "plain", "chunked", "404"])]
    first = make(tmp_path / "ds", listed(tmp_path, *uris))
    web.healed = {"chunked"}
    assert make(tmp_path / "ds", listed(tmp_path, *uris)) == first
    web.healed = {"chunked", "404"}
    assert make(tmp_path / "ds", listed(tmp_path, *uris)) == first | {uris[3]: "good"}, "a new file under an old name"
    totals = index.summary(str(tmp_path / "ds"))
    assert totals["sources"] == 4 and totals["sources_tried_again"] == 1


def test_an_archived_object_is_a_row(s3_server: Any, tiny_videos: Path, tmp_path: Path) -> None:
    fs = storage.filesystem("s3://lake")[0]
    fs.pipe_file("lake/videos/a%20b?.mp4", (tiny_videos / "0.mp4").read_bytes())
    fs.call_s3("put_object", Bucket="lake", Key="videos/cold.mp4", Body=b"x" * 9, StorageClass="GLACIER")
    fs.invalidate_cache()
    told = make(tmp_path / "ds", "s3://lake/videos")
    assert told == {"s3://lake/videos/a%20b?.mp4": "good", "s3://lake/videos/cold.mp4": "refused"}


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_a_while(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = storage.filesystem(web.url)[0].client_kwargs["timeout"]
    assert plain.total is None and plain.sock_read and plain.sock_connect, "a long file may take its time, silence not"
    brief = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_read=0.3)}}
    monkeypatch.setattr(storage, "_options", lambda protocol: brief if protocol == "http" else {})
    uris = [f"{web.url}/silent/0.mp4", f"{web.url}/plain/1.mp4"]
    told = make(tmp_path / "ds", listed(tmp_path, *uris, bytes=[5, 5], etag=["a", "b"]))
    assert told == {uris[0]: "unreachable", uris[1]: "good"}


def test_a_server_that_drips_is_too_slow(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no silence."""
    monkeypatch.setattr(fetch, "_SLOW_SECONDS", 0.3)
    uri, size = f"{web.url}/drip/0.mp4", (web.folder / "0.mp4").stat().st_size
    with pytest.raises(fetch.Unread, match="too slow"):
        fetch.part(uri, size, 0, size)
    with pytest.raises(fetch.Unread, match="too slow"):
        fetch.fetch(uri, tmp_path / "copy", 1 << 20)
    assert web.asked["/drip/0.mp4"] == 2, "what is too slow is not tried five times"


class Denying(MemoryFileSystem):
    """A store whose answers are errors of `denials`."""

    protocol = "denying"
    denial: Exception = OSError()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("denying://"))

    def get_file(self, *_: Any, **__: Any) -> None:
        raise Denying.denial

    def info(self, *_: Any, **__: Any) -> Any:
        raise Denying.denial


class Expired(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class Forbidden(Exception):
    """As clients of some stores have it."""

    status_code = 403


@pytest.mark.parametrize(
    ("denial", "expected"),
    [
        (PermissionError("Access Denied"), "refused"),
        (Forbidden("no"), "refused"),
        (TimeoutError(), "unreachable"),
        (ConnectionResetError("reset by peer"), "unreachable"),
        (OSError(28, "No space left on device"), "of this machine"),
        ("ExpiredToken", "of this machine"),
    ],
)
def test_what_is_wrong_with_this_machine_is_no_fault_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denial: Any, expected: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    register_implementation("denying", Denying, clobber=True)
    if isinstance(denial, str):
        error = PermissionError("The provided token has expired")
        error.__cause__, denial = Expired(denial), error
    monkeypatch.setattr(Denying, "denial", denial)
    row = {"source": "ab" * 10, "uri": "denying://b/a.mp4", "bytes": 5, "split": "train", "group": 0, "extra": None}
    result = make_group(row, [row | {"duplicate_of": None}], str(tmp_path), CUT)
    if expected == "of this machine":
        assert result["error"] and not index.shard_names(str(tmp_path), "train")
    else:
        assert not result["error"]
        assert index.read_sources(str(tmp_path))["reason"].to_pylist() == [expected]


def test_a_bucket_that_may_not_be_listed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    register_implementation("denying", Denying, clobber=True)
    monkeypatch.setattr(Denying, "denial", PermissionError("Access Denied"))
    with pytest.raises(UserError, match=r"denying://b/x: may not be read \(Access Denied\)"):
        list(find(["denying://b/x"]))


def test_names_that_are_no_text_are_cut(tmp_path: Path, tiny_videos: Path) -> None:
    data = [(tiny_videos / f"{n}.mp4").read_bytes() for n in range(3)]
    for name, content in zip(("caf\udce9.mp4", "new\nline.mp4", "frame-%05d [x]*?.mp4"), data, strict=True):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in/bro\udce9ken.mp4").write_bytes(b"no video")
    told = make(tmp_path / "ds", str(tmp_path / "in"))
    assert Counter(told.values()) == {"good": 3, "unreadable": 1}
    for row in index.read_sources(str(tmp_path / "ds")).to_pylist():
        assert storage.printable(row["uri"] + (row["detail"] or "")) == row["uri"] + (row["detail"] or "")


def test_a_fetch_answers_once_for_a_store_that_is_silent(web: Web, tmp_path: Path) -> None:
    uris = [f"{web.url}/503/{n}.mp4" for n in range(6)]
    make(tmp_path / "ds", listed(tmp_path, *uris, bytes=[1] * 6, etag=list("abcdef")), group_sources=6)
    # the first of each split is tried five times
    assert sum(n for path, n in web.asked.items()) <= 2 * 5 + 4
