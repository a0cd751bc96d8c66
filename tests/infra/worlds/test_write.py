"""Worlds as files: complete, the same again, and held out where training does not look."""

import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from longtake.datasets.errors import UserError
from longtake.infra import worlds
from longtake.infra.cli import cli
from longtake.infra.worlds import write
from longtake.pipeline.plan import plan, sources_of


def beep(seed: int, heldout: bool, **options: object) -> worlds.Video:
    sound = (np.sin(np.arange(16_000) / 8).astype(np.float32), 16_000)
    frames: Iterator[np.ndarray] = iter(np.full((8, 32, 32, 3), seed % 200, np.uint8))
    return worlds.Video(frames, 8, 8, f"shade {seed}", "shade", heldout, {"shade": seed % 200}, sound)


@pytest.fixture
def with_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.World("is it heard?", beep, {"rate": 1.0}, lambda frames, truth, fps: {})
    monkeypatch.setattr(worlds, "load", lambda name: world)
    monkeypatch.setitem(worlds.WORLDS, "beep", "beep")


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.5])
def test_held_out_combinations_are_in_val(tmp_path: Path, fraction: float) -> None:
    videos = write.generate(tmp_path / "videos", "physics", 20, heldout=0.25)
    output = str(tmp_path / "dataset")
    groups = plan(output, [str(tmp_path / "videos" / "captions.jsonl")], fraction, 1 << 30, 100)
    apart = {video.name for video in videos if json.loads(video.with_suffix(".truth.json").read_text())["heldout"]}
    rows = {group["split"]: sources_of(output, group) for group in groups}
    assert {Path(row["uri"]).name for row in rows["val"]} == apart
    assert len(rows["train"]) == 15 and len(apart) == 5
    assert {json.loads(row["extra"])["label"] for row in rows["train"]} == {"bounce"}


def test_files_play_and_are_not_made_again(tmp_path: Path, with_sound: None) -> None:
    first = write.generate(tmp_path, "beep", 2, seed=3)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in first]
    with av.open(str(first[1])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    with av.open(str(first[1])) as video:
        samples = sum(frame.samples for frame in video.decode(audio=0))
    assert len(frames) == 8 and abs(float(np.mean(frames)) - 1) < 4
    assert samples > 0.9 * 48_000 * 1.0
    first[0].unlink()
    assert write.generate(tmp_path, "beep", 2, seed=3) == first
    assert [path.read_bytes() for path in first] == [data for data, _ in before]
    assert first[1].stat().st_mtime_ns == before[1][1]
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert lines[1] == {"uri": "clip-00001.mp4", "caption": "shade 3000001", "label": "shade"}


@pytest.mark.parametrize("world", [[], ["--world", "physics"]])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path, world: list[str], place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^FOLDER: .*file.*; name a folder$"):
        cli.main(["footage", str(tmp_path / place), *world], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--world", "phisics"], "no such world; there are"),
        (["--world", "physics", "--seconds", "2"], "worlds have options of their own"),
        (["--world", "physics", "--option", "mass=2"], "mass: is no option of the world physics; it has law"),
        (["--world", "physics", "--option", "size=big"], "size: must be int, as in size=32, got 'big'"),
        (["--world", "endless", "--option", "size=0"], "size: must be from 16 to 1024, got 0"),
        (["--world", "endless", "--option", "size=17"], "size: must be even, got 17"),
        (["--world", "sound", "--option", "fps=0"], "fps: must be from 1 to 240, got 0"),
        (["--world", "return", "--option", "away=NaN"], "away: must be from 0 to 3600, got nan"),
        (["--world", "return", "--option", "away=1e9"], "away: must be from 0 to 3600, got 1000000000.0"),
        (["--world", "physics", "--option", "seed=3"], "seed: is no option of the world physics"),
        (["--world", "physics", "--option", "size"], "write KEY=VALUE"),
        (["--world", "physics", "--option", "law=swim"], "law is one of bounce, fall, orbit"),
        (["--world", "physics", "--heldout", "1.5"], "heldout 0 to 1"),
        (["--heldout", "0.5"], "is of worlds; add --world"),
    ],
)
def test_mistakes_say_what_to_do(tmp_path: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        cli.main(["footage", str(tmp_path), *arguments], standalone_mode=False)
    assert says in str(caught.value)
