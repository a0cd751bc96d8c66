"""`cache_audio`: the sound of a dataset that was made without it, from its sources."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import claps
import numpy as np
import pytest

from longtake.datasets import compact, index, schema, storage, verify
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.infra import graph, recipe
from longtake.pipeline.isolate import Worker
from longtake.pipeline.sounds import make_sounds
from longtake.pipeline.stages import cache_audio


def config(dataset: str, **options: Any) -> cache_audio.Config:
    return cache_audio.Config(kind="cache_audio", dataset=dataset, **options)


def run(dataset: str, **options: Any) -> dict[str, Any]:
    return cache_audio.run(config(dataset, **options), {"dataset": dataset}, "")


def hashes(folder: str) -> dict[str, str]:
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five sources: AAC at two rates, sound that begins late, two recordings in one file, one without sound."""
    folder = tmp_path_factory.mktemp("videos")
    parts = [claps.write(folder / f"part{n}.ts", seconds=1.6, times=(0.6 + 0.2 * n,)) for n in range(2)]
    (folder / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    claps.write(folder / "a.mp4", rate=44_100)
    claps.write(folder / "late.mp4", heard=(1.2, 4.4), video_from=0.2)
    claps.write(folder / "silent.mp4", codec=None)
    claps.write(folder / "b.mkv", channels=1)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def made(videos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `shard` makes of them, with sound: do not change it."""
    return claps.dataset_of(tmp_path_factory.mktemp("made"), videos, {})


@pytest.fixture
def mute(videos: list[Path], tmp_path: Path) -> str:
    """The same without sound, of sources of its own."""
    copies = [Path(shutil.copy(path, tmp_path / path.name)) for path in videos]
    return claps.dataset_of(tmp_path / "mute", copies)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the shards in this process, without Ray."""
    worker = Worker()

    def make(_: str, jobs: Any, __: Any, ___: Any, ____: Any, arguments: dict[str, Any]) -> None:
        for job in jobs:
            keep = np.unpackbits(np.frombuffer(job.keep, np.uint8), count=job.clips).astype(bool)
            make_sounds(worker, **arguments, split=job.split, name=job.name, keep=keep)

    monkeypatch.setattr(cache_audio.columns, "make", make)
    yield
    worker.close()


@pytest.mark.usefixtures("ray_session")
def test_the_column_is_the_one_that_shard_makes(made: str, mute: str) -> None:
    before = hashes(mute)
    result = run(mute)
    wanted, found = hashes(made), hashes(mute)
    columns = {name for name in found if ".audio." in name}
    assert columns == {name for name in wanted if ".audio." in name} and len(columns) == 6
    assert {name: found[name] for name in columns} == {name: wanted[name] for name in columns}
    assert {name: value for name, value in found.items() if name not in columns} == before
    assert result["uri"] == mute and cache_audio.complete(mute)
    assert list(verify.verify(mute)) == []

    metrics = result["metrics"]
    clips = sum(len(index.read_all(mute, split)) for split in schema.SPLITS)
    silent = metrics["clips_no_audio"] + metrics.get("clips_outside", 0)
    assert metrics["clips"] == clips == metrics["clips_with_sound"] + silent
    assert (metrics["made_shards"], metrics["clips_no_audio"]) == (3, 4)
    assert next(iter(Loader(mute, columns=("audio",), frames=9, size=(32, 32))))["audio"].any()
    # again, there is nothing to do
    assert run(mute)["metrics"]["made_shards"] == 0 and hashes(mute) == found


@pytest.mark.usefixtures("alone")
def test_a_stopped_run_makes_what_is_missing(made: str, mute: str) -> None:
    run(mute)
    Path(mute, "train", "00001.audio.parquet").unlink()
    Path(mute, "train", "00001.audio.tar").write_bytes(b"half a tar")
    assert not cache_audio.complete(mute)
    assert run(mute)["metrics"]["made_shards"] == 1
    assert {n: h for n, h in hashes(mute).items() if ".audio." in n} == {
        n: h for n, h in hashes(made).items() if ".audio." in n
    }


@pytest.mark.usefixtures("alone")
def test_a_source_that_is_gone_or_another_is_marked(mute: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").unlink()
    claps.write(tmp_path / "late.mp4", seconds=3)
    metrics = run(mute)["metrics"]
    assert metrics["clips_missing"] == metrics["clips_changed"] == 4
    reasons = {row["key"]: row["reason"] for row in claps.column(mute)}
    assert set(reasons.values()) == {None, "missing", "changed", "no_audio"}
    assert list(verify.verify(mute)) == []
    masks = {bool(m) for batch in Loader(mute, columns=("audio",), frames=9, epochs=1) for m in batch["audio_mask"]}
    assert masks == {True, False}


@pytest.mark.usefixtures("alone")
def test_another_file_of_the_same_size_is_another_source(videos: list[Path], mute: str, tmp_path: Path) -> None:
    long, other = tmp_path / "a.mp4", tmp_path / "other.mp4"
    claps.write(other, seconds=3)
    other.write_bytes(other.read_bytes().ljust(long.stat().st_size, b"\0"))
    assert other.stat().st_size == long.stat().st_size
    other.replace(long)
    assert run(mute)["metrics"]["clips_changed"] == 4


@pytest.mark.usefixtures("alone")
def test_unreachable_sources_are_asked_again(mute: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> Path:
        raise sounds.Unread("unreachable", "no answer")

    from longtake.pipeline import sounds

    worker, cut = Worker(), claps.settings()
    with monkeypatch.context() as patch:
        patch.setattr(sounds, "fetch", down)
        for name in index.shard_names(mute, "train"):
            clips = len(index.read_shard(mute, "train", name).table)
            counts = make_sounds(worker, cut, mute, "train", name, np.ones(clips, bool))
            assert counts == {"clips": clips, "with_sound": 0}
    worker.close()
    assert {row["reason"] for row in claps.column(mute)} == {"unreachable"}
    assert run(mute)["metrics"]["made_shards"] == 3
    assert [row["sha256"] for row in claps.column(mute)] == [row["sha256"] for row in claps.column(made)]


@pytest.mark.usefixtures("alone")
def test_sound_that_was_kept_stays_while_others_are_asked_again(
    mute: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtake.pipeline import sounds

    fetch = sounds.fetch

    def partly_down(uri: str, *rest: Any) -> Path:
        if "late" in uri:
            raise sounds.Unread("unreachable", "no answer")
        return fetch(uri, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sounds, "fetch", partly_down)
        assert run(mute)["metrics"]["clips_unreachable"] == 4
    compact.write(mute, "train", "audio")
    (tmp_path / "a.mp4").unlink()
    metrics = run(mute)["metrics"]
    assert "clips_missing" not in metrics and "clips_unreachable" not in metrics
    assert [row["sha256"] for row in claps.column(mute)] == [row["sha256"] for row in claps.column(made)]
    # the compact index of before is not read
    assert all(batch["audio_mask"].any() for batch in Loader(mute, columns=("audio",), frames=9, batch=8, epochs=1))
    assert list(verify.verify(mute)) == []
    assert run(mute)["metrics"]["made_shards"] == 0


@pytest.mark.usefixtures("alone")
def test_one_column_has_one_setting(mute: str) -> None:
    run(mute)
    with pytest.raises(UserError, match="has sound with codec: opus; set the same, or delete"):
        run(mute, audio={"codec": "flac"})
    with pytest.raises(UserError, match=r"has images, which have no sound|no clip to encode|no dataset here"):
        run(storage.join(mute, "nowhere"))


@pytest.mark.usefixtures("alone")
def test_sound_is_folded_into_one_file_as_other_columns(mute: str) -> None:
    run(mute)
    plain = [batch["audio"] for batch in Loader(mute, columns=("audio",), frames=9, epochs=1)]
    for column in (None, "audio"):
        compact.write(mute, "train", column)
    folded = [batch["audio"] for batch in Loader(mute, columns=("audio",), frames=9, epochs=1)]
    assert len(plain) == len(folded) and all(a.equal(b) for a, b in zip(plain, folded, strict=True))
    assert list(verify.verify(mute)) == []


def test_later_stages_read_the_dataset_through_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: a\nworkspace: {tmp_path}/runs\nstages:\n"
        f"  shards: {{kind: shard, sources: [{tmp_path}], audio: null}}\n"
        "  sound: {kind: cache_audio, dataset: shards}\n"
        "  view: {kind: curate, dataset: sound}\n"
    )
    assert [node.name for node in graph.build(recipe.load(str(path)))] == ["shards", "sound", "view"]
