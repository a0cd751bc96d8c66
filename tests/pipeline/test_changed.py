"""Sources and manifests that change between planning and cutting: all content is cut, once, with the annotations of now."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from answering import CUT, Web, cut, hashes, listed, make

from longtake.datasets import index, later, schema, storage
from longtake.pipeline import commit, plan, retry
from longtake.pipeline.fetch import Unread


@pytest.fixture
def folder(tiny_videos: Path, tmp_path: Path) -> Path:
    """A folder with three videos."""
    (tmp_path / "in").mkdir()
    for n, name in enumerate("axy"):
        shutil.copy(tiny_videos / f"{n}.mp4", tmp_path / "in" / f"{name}.mp4")
    return tmp_path / "in"


def planned(dataset: object, pattern: object) -> list[dict[str, Any]]:
    return plan.plan(str(dataset), [str(pattern)], 0.2, 1 << 30, 3)


def samples(dataset: object) -> dict[str, list[dict[str, Any]]]:
    """KEY.json of the clips of each source, by the name of its file."""
    found: dict[str, list[dict[str, Any]]] = {}
    names = {row["source"]: Path(row["uri"]).name for row in index.read_sources(str(dataset)).to_pylist()}
    for split in schema.SPLITS:
        for row in index.read_all(str(dataset), split).to_pylist():
            tar = storage.join(str(dataset), split, f"{row['shard']}.tar")
            said = json.loads(storage.read_range(tar, row["json_offset"], row["json_size"]))
            found.setdefault(names[row["source"]], []).append(said)
    return found


def test_what_is_renamed_before_it_is_cut_is_cut_under_its_new_name(folder: Path, tmp_path: Path) -> None:
    dataset, a, b = tmp_path / "ds", str(folder / "a.mp4"), str(folder / "b.mp4")
    planned(dataset, folder)
    Path(a).rename(b)
    first = make(dataset, str(folder))
    assert (first[a], first[b]) == ("missing", "duplicate")
    assert retry.retried(str(dataset)) == " 1", "a command finds it due"
    told = make(dataset, str(folder))
    assert told == first | {b: "good"}
    assert index.summary(str(dataset))["sources_tried_again"] == 1
    before = hashes(dataset)
    assert make(dataset, str(folder)) == told and hashes(dataset) == before
    assert retry.retried(str(dataset)) == " 1"


def test_copies_of_what_cannot_be_read_are_sources_of_their_own(web: Web, tmp_path: Path) -> None:
    """Where they are in its group, one is cut at once."""
    uris = [f"{web.url}/{way}/1.mp4" for way in ("403", "plain", "moved", "chunked")]
    manifest, dataset = listed(tmp_path, *uris, bytes=[7] * 4, etag=["same"] * 4), tmp_path / "ds"
    first = make(dataset, manifest, 1)
    assert [first[uri] for uri in uris] == ["refused", *["duplicate"] * 3]
    told = make(dataset, manifest, 1)
    assert sorted(told.values()) == ["duplicate", "duplicate", "good", "refused"]
    before = hashes(dataset)
    assert make(dataset, manifest, 1) == told and hashes(dataset) == before


def test_copies_that_shared_an_outage_are_accounted_for_as_they_are_now(web: Web, tmp_path: Path) -> None:
    uris, dataset = [f"{web.url}/{way}/1.mp4" for way in ("404", "503", "429")], tmp_path / "ds"
    manifest = listed(tmp_path, *uris, bytes=[7] * 3, etag=["same"] * 3)
    assert make(dataset, manifest) == dict(zip(uris, ("missing", "unreachable", "unreachable"), strict=True))
    web.healed = {"503", "429"}
    assert sorted(make(dataset, manifest).values()) == ["duplicate", "good", "missing"]
    assert not retry.read_tries(str(dataset)).awaited


def test_a_copy_that_is_planned_again_has_the_annotations_of_now(web: Web, tmp_path: Path) -> None:
    uris, dataset = [f"{web.url}/{way}/1.mp4" for way in ("403", "plain")], tmp_path / "ds"
    for caption, result in (("a", "duplicate"), ("b", "good")):
        manifest = listed(tmp_path, *uris, bytes=[7] * 2, etag=["same"] * 2, caption=["a", caption])
        assert make(dataset, manifest, 1)[uris[1]] == result
    assert [said["caption"] for said in samples(dataset)["1.mp4"]] == ["b"]


def test_what_was_unreachable_is_cut_with_the_annotations_of_now(web: Web, tmp_path: Path) -> None:
    uris, dataset = [f"{web.url}/{way}/{n}.mp4" for n, way in enumerate(("503", "429", "plain"))], str(tmp_path / "ds")

    def run(*captions: str) -> list[dict[str, Any]]:
        """The last rows of the sources, after the stage has run."""
        make(Path(dataset), listed(tmp_path, *uris, caption=list(captions)))
        rows = [row for group in plan.groups(dataset) for row in plan.sources_of(dataset, group)]
        return sorted({row["uri"]: row for row in rows}.values(), key=lambda row: uris.index(row["uri"]))

    def said(rows: list[dict[str, Any]]) -> list[Any]:
        return [json.loads(row["extra"])["caption"] for row in rows]

    assert said(run("a", "a", "a")) == ["a", "a", "a"]
    assert said(run("b", "a", "a")) == ["b", "a", "a"]
    web.healed = {"503", "429"}
    # the second one changes in the very run that can read it
    rows = run("b", "b", "a")
    assert said(rows) == ["b", "b", "a"]
    told = samples(dataset)
    assert [told[f"{n}.mp4"][0]["caption"] for n in range(3)] == ["b", "b", "a"]

    # as in a dataset whose first shard got the caption that its later one lacks
    places = [(split, shard) for split in schema.SPLITS for shard in later.shards(dataset, split)]
    before = {place: later.read(dataset, *place) for place in places}
    (place,) = [place for place, rows in before.items() if uris[0] in {row["uri"] for row in rows}]
    extra = {"extra": json.dumps({"caption": "c"})}
    later.write(dataset, *place, [row | (extra if row["uri"] == uris[0] else {}) for row in before[place]])
    assert said(run("c", "b", "a")) == ["c", "b", "a"]


def test_a_file_that_grows_is_cut_once(folder: Path, tmp_path: Path) -> None:
    """It was still written when it was listed."""
    dataset, whole = str(tmp_path / "ds"), (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 2])
    groups = planned(dataset, folder)
    (folder / "a.mp4").write_bytes(whole)
    cut(dataset, groups)
    assert planned(dataset, folder) == groups, "the account has the size that was read"
    before = hashes(Path(dataset))
    for split in schema.SPLITS:
        for name in index.shard_names(dataset, split):
            (Path(dataset) / split / f"{name}.parquet").unlink()
    cut(dataset, planned(dataset, folder))
    assert hashes(Path(dataset)) == before, "a shard that is made again has it too"
    assert {name: len(found) for name, found in samples(dataset).items()} == {"a.mp4": 1, "x.mp4": 1, "y.mp4": 1}


def test_a_file_that_is_replaced_before_it_is_cut_is_cut_once(folder: Path, tmp_path: Path) -> None:
    dataset, whole = str(tmp_path / "ds"), (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "b.mp4").write_bytes(whole[: len(whole) // 2])
    planned(dataset, folder)
    (folder / "a.mp4").write_bytes(whole)
    cut(dataset, planned(dataset, folder))
    rows = index.read_sources(dataset).to_pylist()
    told = {(Path(row["uri"]).name, row["bytes"]): row["reason"] for row in rows}
    assert told["a.mp4", len(whole) // 2] == "missing" and told["a.mp4", len(whole)] is None
    assert told["b.mp4", len(whole) // 2] == "too_short", "it takes the place of its original, which is there no more"
    assert index.summary(dataset)["clips"] == 3

    # as before again, and its shard is to be made again
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 2])
    (shard,) = {(row["split"], row["group"]) for row in rows if row["bytes"] == len(whole) // 2}
    (Path(dataset) / shard[0] / f"{shard[1]:05d}.parquet").unlink()
    cut(dataset, planned(dataset, folder))
    (row,) = [
        r for r in index.read_sources(dataset).to_pylist() if r["uri"].endswith("a.mp4") and r["group"] == shard[1]
    ]
    assert row["reason"] == "too_short", "it was looked at"


def test_the_shard_that_is_committed_first_stays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver may reach less."""
    dataset = str(tmp_path / "ds")
    groups = planned(dataset, folder)
    cut(dataset, groups)
    before = hashes(Path(dataset))

    def refuse(*_: Any) -> Any:
        raise Unread("unreachable", "not from here")

    monkeypatch.setattr(commit, "fetch", refuse)
    for group in groups:
        assert not commit.make_group(group, plan.sources_of(dataset, group), dataset, CUT)["error"]
    assert hashes(Path(dataset)) == before


def test_a_copy_that_took_the_place_of_its_original_has_its_own_annotations(web: Web, tmp_path: Path) -> None:
    uris, dataset = [f"{web.url}/403/1.mp4", f"{web.url}/moved/1.mp4"], tmp_path / "ds"

    def run(*captions: str) -> list[dict[str, Any]]:
        """The later annotations, after the stage has run."""
        manifest = listed(tmp_path, *uris, bytes=[7] * 2, etag=["same"] * 2, caption=list(captions))
        assert [*make(dataset, manifest).values()] == ["refused", "good"]
        shards = [(split, shard) for split in schema.SPLITS for shard in later.shards(str(dataset), split)]
        return [row for split, shard in shards for row in later.read(str(dataset), split, shard)]

    assert run("a", "a copy's") == []
    assert run("another", "a copy's") == []
    (changed,) = run("another", "of the copy")
    assert changed["uri"] == uris[1] and json.loads(changed["extra"]) == {"caption": "of the copy"}
    assert run("another", "of the copy") == [changed]
