"""The `shard` and `curate` stages on a real Ray, by what they leave on disk."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from longtake.datasets import compact, index, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.stage import content
from longtake.datasets.verify import layout_problems
from longtake.datasets.view import read_view
from longtake.pipeline.commit import make_group
from longtake.pipeline.plan import sources_of
from longtake.pipeline.stages import curate, shard

pytestmark = pytest.mark.usefixtures("ray_session")


def config(*sources: object, **options: Any) -> shard.Config:
    clip = {"short_side": 32, "fps": 12, "max_seconds": 3}
    return shard.Config(
        **{"kind": "shard", "sources": [str(s) for s in sources], "clip": clip, "val_fraction": 0.3, "group_sources": 2}
        | options
    )


def hashes(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def sharded(footage: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    shard.run(config(footage), {}, str(folder))
    return folder


def test_the_same_sources_give_the_same_bytes(sharded: Path, footage: Path, tmp_path: Path) -> None:
    shard.run(config(footage), {}, str(tmp_path))
    assert hashes(tmp_path) == hashes(sharded)
    assert any(name.endswith(".tar") for name in hashes(tmp_path))


def test_running_again_does_nothing(sharded: Path, footage: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in sharded.rglob("*") if p.is_file()}
    shard.run(config(footage), {}, str(sharded))
    assert {p: p.stat().st_mtime_ns for p in sharded.rglob("*") if p.is_file()} == before


def test_uncommitted_groups_are_made_again_and_debris_goes(sharded: Path, footage: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    (copy / "train" / "00000.parquet").unlink()
    (copy / "train" / "00000.tar").write_bytes(b"half a tar")
    (copy / "train" / f".00001.tar~{os.uname().nodename}@999999999~ab.tmp").write_bytes(b"debris")
    (copy / "val" / "00000.parquet").unlink()
    shard.run(config(footage), {}, str(copy))
    assert hashes(copy) == hashes(sharded)


def test_new_sources_append_and_move_nothing(footage: Path, tmp_path: Path) -> None:
    videos, output = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    paths = sorted(footage.glob("*.mp4"))
    for path in paths[:4]:
        shutil.copy(path, videos)
    shard.run(config(videos), {}, str(output))
    before = hashes(output)
    shutil.copy(paths[4], videos / "new.mp4")
    shutil.copy(paths[0], videos / "the same under another name.mp4")
    totals = shard.run(config(videos), {}, str(output))["metrics"]
    after = hashes(output)
    assert before.items() <= after.items() and len(after) > len(before)
    assert totals["sources"] == 6 and totals["sources_good"] == 5
    rejected = [r for r in index.read_sources(str(output)).to_pylist() if r["status"] == "rejected"]
    assert [(r["reason"], Path(r["uri"]).name) for r in rejected] == [("duplicate", "the same under another name.mp4")]


@pytest.mark.parametrize("committed", [True, False])
def test_another_driver_that_lists_more_disturbs_no_account(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    paths, videos, output = sorted(footage.glob("*.mp4")), tmp_path / "videos", str(tmp_path / "out")
    videos.mkdir()
    shutil.copy(paths[0], videos)
    mine = config(videos)

    def make(_: Any, output: str, missing: Any) -> None:
        """All groups, and one that the other driver has committed, or is about to, when this one counts."""
        for group in missing:
            assert not make_group(group, sources_of(output, group), output, mine.cut)["error"]
        shutil.copy(paths[1], videos)
        planned = shard.plan(output, mine.sources, mine.val_fraction, mine.group_bytes, mine.group_sources)
        (group,) = shard.missing_groups(output, planned)
        assert not make_group(group, sources_of(output, group), output, mine.cut)["error"]
        if not committed:
            Path(output, group["split"], f"{group['group']:05d}.parquet").unlink()

    monkeypatch.setattr(shard, "_make", make)
    metrics = shard.run(mine, {}, output)["metrics"]
    assert metrics["sources"] == metrics["shards"] == (2 if committed else 1)
    assert metrics["clips"] == metrics["clips_cut"] >= metrics.get("clips_with_sound", 0)


def test_a_folder_of_broken_files_is_one_line_and_each_has_its_row(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text <b>.mp4").write_bytes(b"no video" * 50)
    with pytest.raises(UserError, match=r"none of 2 sources gave a clip \(1 empty, 1 unreadable\)"):
        shard.run(config(videos), {}, str(tmp_path / "out"))
    assert len(index.read_sources(str(tmp_path / "out"))) == 2


def test_sources_in_memory_and_globs_are_read(footage: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in sorted(footage.glob("*.mp4"))[:2]:
        fs.put_file(str(path), f"/bucket/{path.name}")
    totals = shard.run(config("memory://bucket/*.mp4"), {}, str(tmp_path))["metrics"]
    assert totals["sources_good"] == 2
    with pytest.raises(UserError, match="cannot see this process's memory"):
        shard.run(config(footage), {}, "memory://out")


def samples(dataset: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The index row and KEY.json of each sample."""
    found = []
    for split in schema.SPLITS:
        for row in index.read_all(str(dataset), split).to_pylist():
            tar = storage.join(str(dataset), split, f"{row['shard']}.tar")
            found.append((row, json.loads(storage.read_range(tar, row["json_offset"], row["json_size"]))))
    return found


def test_a_manifest_carries_labels_and_captions_to_the_samples(footage: Path, tmp_path: Path) -> None:
    paths = sorted(footage.glob("*.mp4"))[:2]
    rows: list[dict[str, Any]] = [
        {"uri": str(paths[0]), "label": "class 0", "caption": "a caption of 0", "fps": 1e6, "source": "mine"},
        {"uri": str(paths[0]), "caption": "another caption of 0", "licence": "free", "label": float("nan")},
        {"uri": str(paths[1]), "label": "", "caption": "a caption of 1"},
        {"uri": "gone.mp4", "label": "x"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    totals = shard.run(config(tmp_path / "list.json"), {}, str(tmp_path / "out"))
    assert totals["rejected_by_reason"] == {"missing": 1}
    details = {row["uri"]: row["detail"] for row in index.read_sources(str(tmp_path / "out")).to_pylist()}
    assert details[str(paths[0])] == "2 rows name it" and details[str(paths[1])] is None
    seen = {}
    for row, said in samples(tmp_path / "out"):
        assert said["source"] == row["source"] and said["fps"] == row["fps"] == 12
        assert row["phash"] is not None
        seen[row["label"]] = {k: said.get(k) for k in ("caption", "licence", "manifest")}
    both = [
        {"caption": "a caption of 0", "fps": 1e6, "label": "class 0", "source": "mine"},
        {"caption": "another caption of 0", "licence": "free"},
    ]
    assert seen["class 0"] == {"caption": "a caption of 0", "licence": "free", "manifest": both}
    assert seen[None] == {"caption": "a caption of 1", "licence": None, "manifest": None}


def test_captions_and_labels_that_change_reach_loaders_and_views_and_no_tar(
    footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = sorted(footage.glob("*.mp4"))[:3], tmp_path / "out"

    def run(*columns: dict[str, Any]) -> str:
        rows = [{"uri": str(path), **more} for path, more in zip(paths, columns, strict=True)]
        (tmp_path / "list.json").write_text(json.dumps(rows))
        shard.run(config(tmp_path / "list.json"), {}, str(out))
        return capsys.readouterr().err

    def read() -> dict[str, tuple[Any, Any]]:
        """Label and caption of each source, as batches have them."""
        told = {}
        for split in schema.SPLITS:
            loader = Loader(
                str(out), split=split, frames=3, size=(32, 32), batch=1, columns=("json", "label"), epochs=1
            )
            for batch in loader:
                name = loader.classes[batch["label"][0]] if batch["label"][0] >= 0 else None
                told[batch["json"][0]["source"]] = (name, batch["json"][0].get("caption"))
        return told

    first = run({"label": "x", "caption": "old"}, {"label": "y", "caption": "kept"}, {})
    assert "other columns" not in first
    before = hashes(out)
    assert sorted(read().values(), key=str) == [("x", "old"), ("y", "kept"), (None, None)]
    said = run({"label": "z", "caption": "new", "fps": 3}, {"label": "y", "caption": "kept"}, {"label": "z"})
    assert "2 sources have other columns in their manifest than before" in said
    now = [("y", "kept"), ("z", "new"), ("z", None)]
    assert sorted(read().values(), key=str) == sorted(now, key=str)
    assert before.items() <= hashes(out).items(), "no shard is written again"
    assert "other columns" not in run({"label": "z", "caption": "new", "fps": 3}, {"label": "y", "caption": "kept"}, {})
    for split in schema.SPLITS:
        compact.write(str(out), split)
        labels = {row["source"]: row["label"] for row in compact.table(str(out), split).to_pylist()}
        assert labels.items() <= {source: label for source, (label, _) in read().items()}.items()
    assert sorted(read().values(), key=str) == sorted(now, key=str)
    assert list(layout_problems(str(out))) == []
    view = curate.Config(kind="curate", dataset="x", balance={"weights": True})
    assert curate.run(view, {"dataset": str(out)}, str(tmp_path / "view"))["metrics"]["clips_kept"] > 0


def test_other_settings_do_not_mix_into_a_dataset(sharded: Path, footage: Path) -> None:
    with pytest.raises(UserError, match="made with other settings of clips"):
        shard.run(config(footage, clip={"short_side": 32, "fps": 6}), {}, str(sharded))


def test_an_object_store_gets_the_same_clips(sharded: Path, footage: Path, s3_variables: dict[str, str]) -> None:
    fs = storage.filesystem("s3://bucket")[0]
    fs.mkdir("bucket")
    fs.put(str(footage), "bucket/raw", recursive=True)
    output = "s3://bucket/dataset"
    shard.describe(config(footage), output)
    planned = shard.plan(output, ["s3://bucket/raw/*.mp4"], 0.3, 1 << 30, 2)
    # the session's Ray workers know no keys: groups are made here, as a worker would
    for group in shard.missing_groups(output, planned):
        assert not make_group(group, sources_of(output, group), output, config("x").cut)["error"]
    assert shard.missing_groups(output, planned) == []

    # the store's tags name the sources, so keys and splits are others, but the clips are the same bytes
    def clips(url: str) -> set[str]:
        return {c for split in schema.SPLITS for c in index.read_all(url, split)["sha256"].to_pylist()}

    assert clips(output) == clips(str(sharded))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="making a small disk needs root")
def test_a_full_disk_is_one_line_and_the_run_can_go_on(sharded: Path, footage: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(Failure, match="No space left on device"):
            shard.run(config(footage), {}, str(disk / "out"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        shard.run(config(footage), {}, str(disk / "out"))
        assert hashes(disk / "out") == hashes(sharded)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moments",
    [("*/*", "*/?????.parquet"), pytest.param((4.0, 6.0, 8.0), marks=pytest.mark.soak)],
    ids=["first files", "seconds"],
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    sharded: Path, footage: Path, tmp_path: Path, moments: Sequence[str | float]
) -> None:
    """Killed when a file of this name is there, or after so many seconds."""
    script = (
        "import sys\nfrom longtake.pipeline.stages import shard\n"
        "if __name__ == '__main__':\n"
        "    shard.run(shard.Config.model_validate_json(sys.argv[1]), {}, sys.argv[2])"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-P", "-c", script, config(footage).model_dump_json(), str(output)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    for moment in moments:
        child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        if isinstance(moment, str):
            while child.poll() is None and not list(output.glob(moment)):
                time.sleep(0.01)
            assert child.poll() is None, f"{moment} was never there"
        else:
            time.sleep(moment)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    last = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert last.returncode == 0, last.stderr[-4000:]
    assert hashes(output) == hashes(sharded)


def test_a_view_drops_by_rule_and_says_why(sharded: Path, tmp_path: Path) -> None:
    chosen = curate.Config(kind="curate", dataset="shards", rules={"motion": {"min": 0.01}, "brightness": {"max": 0.9}})  # type: ignore[dict-item]
    result = curate.run(chosen, {"dataset": str(sharded)}, str(tmp_path / "view" / "abc"))
    table = read_view(result["uri"]).to_pylist()
    clips = {r["key"]: r for split in schema.SPLITS for r in index.read_all(str(sharded), split).to_pylist()}
    assert {r["key"] for r in table} == set(clips)
    assert all(r["keep"] == (clips[r["key"]]["motion"] >= 0.01 and clips[r["key"]]["brightness"] <= 0.9) for r in table)
    assert all((r["reason"] is None) == r["keep"] for r in table)
    assert result["metrics"]["clips_kept"] + result["metrics"]["clips_dropped"] == len(table)
    storage.filesystem(result["uri"])[0].rm(result["uri"])
    with pytest.raises(UserError, match=r"none of \d+ clips is kept"):
        curate.run(
            curate.Config(kind="curate", dataset="x", rules={"motion": {"min": 2}}), {"dataset": str(sharded)}, "o/v"
        )  # type: ignore[dict-item]


def test_a_group_that_stands_still_is_named(tmp_path: Path) -> None:
    """A store that takes a connection and then says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}/silent.mp4"
        (tmp_path / "list.csv").write_text(f"uri,bytes,etag\n{uri},1000,a\n")
        hasty = config(tmp_path / "list.csv", run={"stall_seconds": 20}, limits={"timeout_seconds": 2})
        recipe = {
            "name": "hasty",
            "workspace": str(tmp_path / "out"),
            "stages": {"shards": hasty.model_dump(mode="json")},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [str(Path(sys.executable).parent / "longtake"), "stage", str(tmp_path / "recipe.yaml"), "shards"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = rf"error: stage shard: nothing has moved for 20 s: group train/00000 has stood still for \d+ s at {uri}"
    assert re.search(line, done.stderr)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"cpus": 999}, r"stage shard: run\.cpus: a task needs 999 CPU, no node of the Ray cluster has more than"),
        ({"custom": {"spot": 1}}, r"stage shard: run\.custom\.spot: a task needs 1 spot, .* more than 0"),
        ({"memory_bytes": 1 << 60}, r"run\.memory_bytes: a task needs"),
    ],
)
def test_more_than_a_node_has_is_refused_at_once(footage: Path, tmp_path: Path, task: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        shard.run(config(footage, run=task), {}, str(tmp_path / "out"))


def test_how_the_work_is_scheduled_is_no_part_of_the_fingerprint(footage: Path) -> None:
    assert content(config(footage)) == content(config(footage, run={"cpus": 2}))
    assert content(config(footage)) != content(config(footage, val_fraction=0.5))
    with pytest.raises(ValueError, match=r"run\.stall_seconds 10 must be more than limits\.timeout_seconds 1800"):
        config(footage, run={"stall_seconds": 10})
