"""Sources and manifests that change between planning and cutting: all content is cut, once, with the annotations of now."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from answering import Web, hashes, listed, make

from longtake.datasets import index
from longtake.pipeline import plan, retry


@pytest.fixture
def folder(tiny_videos: Path, tmp_path: Path) -> Path:
    """A folder with three videos."""
    (tmp_path / "in").mkdir()
    for n, name in enumerate("axy"):
        shutil.copy(tiny_videos / f"{n}.mp4", tmp_path / "in" / f"{name}.mp4")
    return tmp_path / "in"


def planned(dataset: object, pattern: object) -> list[dict[str, Any]]:
    return plan.plan(str(dataset), [str(pattern)], 0.2, 1 << 30, 3)


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
