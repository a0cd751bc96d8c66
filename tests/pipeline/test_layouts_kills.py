"""Exports and imports that are killed: the same command again ends with the same bytes, and nothing half is taken for whole."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import exported
import pytest
from exported import files_of, invoke

from longtake.pipeline.layouts import LAYOUTS

# kills itself when it touches files of some folders for the Nth time
SCRIPT = """
import os, signal, sys

roots, moment, touched = tuple(sys.argv[1].split(os.pathsep)), int(sys.argv[2]), 0

def hook(event, arguments):
    global touched
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and not isinstance(arguments[0], int):
        touched += os.fsdecode(arguments[0]).startswith(roots)
        if touched == moment:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
from longtake.infra.cli import cli

cli(["dataset", *sys.argv[3:]])
"""


def killed(moment: int, roots: Sequence[Path], *arguments: str) -> bool:
    """Whether `longtake dataset` with these arguments was still at work when it was killed."""
    command = [sys.executable, "-P", "-c", SCRIPT, os.pathsep.join(map(str, roots)), str(moment), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def read_as(layout: str, folder: Path) -> dict[str, bytes]:
    """The files that a reader of a layout takes for whole, in an export that was stopped."""
    files = {name: data for name, data in files_of(folder).items() if not Path(name).name.startswith(".")}
    if layout == "lance":
        return files if any(name.endswith(".manifest") for name in files) else {}
    if layout == "lerobot":
        return files if "meta/info.json" in files else {}
    if layout == "huggingface":
        return {name: data for name, data in files.items() if str(Path(name).parent / "metadata.jsonl") in files}
    return {name: data for name, data in files.items() if name.endswith(".tar")}


def shown(layout: str, folder: Path) -> object:
    """What an export has: its bytes, but for Lance, which names files by chance."""
    if layout != "lance":
        return files_of(folder)
    lance = pytest.importorskip("lance")
    made = lance.dataset(str(folder / "clips.lance"))
    table = made.to_table(with_row_id=True)
    videos = [blob.read() for blob in made.take_blobs("video", ids=table["_rowid"].to_pylist())]
    names = [Path(name) for name in files_of(folder)]
    return table.drop_columns(["video"]).to_pylist(), videos, sorted(f"{name.parent}/{name.suffix}" for name in names)


def check_kills(own: str, layout: str, tmp_path: Path, moments: Iterable[tuple[int, int]]) -> list[int]:
    """Kill an export and an import at some moments, each time anew; returns how often each was still at work."""
    whole, listed = tmp_path / "whole", tmp_path / "listed" / "list.jsonl"
    invoke("export", own, "--layout", layout, "--to", str(whole))
    expected, theirs = shown(layout, whole), files_of(whole)
    if layout == "lerobot":
        exported.join_videos(whole)  # which are cut
    invoke("import", str(whole), "--layout", layout, "--to", str(listed))
    unpacked, count = files_of(listed.parent), [0, 0]
    for moment, later in moments:
        part, back = tmp_path / "part", tmp_path / "back" / "list.jsonl"
        for each in (part, back.parent):
            shutil.rmtree(each, ignore_errors=True)
        export = ("export", own, "--layout", layout, "--to", str(part))
        stopped = killed(moment, (part, Path(own)), *export)
        if part.exists() and (there := read_as(layout, part)):
            assert layout == "lance" or theirs.items() >= there.items(), moment
        invoke(*export)
        assert shown(layout, part) == expected, moment

        import_ = ("import", str(whole), "--layout", layout, "--to", str(back))
        stopped_later = killed(later, (back.parent, whole), *import_)
        if back.exists():
            assert back.read_bytes().replace(bytes(back.parent), bytes(listed.parent)) == listed.read_bytes(), later
        invoke(*import_)
        moved = {
            name: data.replace(bytes(back.parent), bytes(listed.parent)) for name, data in files_of(back.parent).items()
        }
        assert moved == unpacked, later
        count = [count[0] + stopped, count[1] + stopped_later]
        if not (stopped or stopped_later):
            break  # all later ones are past the end too
    return count


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_in_the_middle_and_run_again_it_has_the_same_bytes(dataset: str, layout: str, tmp_path: Path) -> None:
    own = exported.told(dataset, tmp_path / "own")
    assert check_kills(own, layout, tmp_path, [(40, 8 if layout == "huggingface" else 24)]) == [1, 1]


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_moment_and_run_again_it_has_the_same_bytes(dataset: str, layout: str, tmp_path: Path) -> None:
    own = exported.told(dataset, tmp_path / "own")
    exports, imports = check_kills(own, layout, tmp_path, ((n, n // 2) for n in range(2, 1000, 9)))
    assert exports > 3 and imports > 1
