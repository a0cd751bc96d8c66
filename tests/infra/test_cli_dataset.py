import io
import json
import shutil
from pathlib import Path
from typing import Any

import av
import claps
import numpy as np
import pytest
import spoken
from scored import write_columns

from longtake.datasets import captions, clip, index, schema, score_columns, storage
from longtake.datasets.captions import Caption
from longtake.infra.cli import cli, exit_code
from longtake.infra.report import words


def longtake(*arguments: str) -> int:
    """Run a command in this process as the `longtake` script does; its exit code."""
    return exit_code(lambda: cli(list(arguments), standalone_mode=False))


def shards(dataset: str) -> list[int]:
    """The numbers of train and val."""
    return [len(index.shard_names(dataset, split)) for split in schema.SPLITS]


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "dataset"))


def test_verify_a_whole_dataset(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert longtake("dataset", "verify", dataset, "--threads", "2") == 0
    assert f"{3 * sum(shards(dataset))} tars are what their indexes say" in capsys.readouterr().out


def test_verify_names_every_problem_and_exits_1(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "train" / "00000.tar").unlink()
    (copy / "val" / "00007.tar").touch()
    (copy / "val" / "00000.parquet").write_bytes(b"PAR1 not really")
    assert longtake("dataset", "verify", str(copy)) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    for name in ("train/00000.tar: is missing", "val/00007.tar: its shard", "val/00000.parquet: not a readable"):
        assert [line for line in lines if name in line], lines
    assert f"error: {copy}: {len(lines)} problems in {3 * sum(shards(str(copy)))} tars" in said.err


def test_diff_exits_0_and_1(dataset: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longtake("dataset", "diff", dataset, str(copy)) == 0
    for path in [*copy.glob("val/00000*")]:
        path.unlink()
    assert longtake("dataset", "diff", dataset, str(copy)) == 1
    said = capsys.readouterr()
    assert "the same sources, the same clips" in said.out and "clips only in A: " in said.out
    assert not said.err
    assert longtake("dataset", "diff", dataset, "nowhere") == 2


def test_compact_then_show(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longtake("dataset", "compact", str(copy)) == 0
    assert capsys.readouterr().out == "train: {} shards\nval: {} shards\n".format(*shards(str(copy)))
    key = index.read_all(str(copy), "val")["key"][-1].as_py()
    assert longtake("dataset", "show", str(copy), key) == 0
    assert json.loads(capsys.readouterr().out)["key"] == key
    assert longtake("dataset", "verify", str(copy)) == 0


def test_show_saves_what_can_be_played(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = index.read_all(dataset, "train").to_pylist()[3]
    key = row["key"]
    assert longtake("dataset", "show", dataset, key, "--save", str(tmp_path / "out")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{key}.mp4", f"{key}.json", f"{key}.frame_diff.mp4"}
    assert json.loads((tmp_path / "out" / f"{key}.json").read_text()) == shown["json"]
    video = clip.decode((tmp_path / "out" / f"{key}.mp4").read_bytes())
    assert video.shape == (row["frame_count"], row["height"], row["width"], 3)
    played = clip.decode((tmp_path / "out" / f"{key}.frame_diff.mp4").read_bytes())[:, ::2, ::2]
    place = index.read_shard(dataset, "train", f"{row['shard']}.frame_diff").table.to_pylist()
    (place,) = (p for p in place if p["key"] == key)
    tar = storage.join(dataset, "train", f"{row['shard']}.frame_diff.tar")
    difference = clip.unpack_array(storage.read_range(tar, place["offset"], place["size"]))
    assert played.shape == difference.shape
    assert abs(played.astype(int) - difference.astype(int)).mean() < 16


def test_show_of_an_unknown_key_and_of_a_damaged_clip(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longtake("dataset", "show", str(copy), "nothing-00000") == 2
    row = index.read_all(str(copy), "train").to_pylist()[0]
    tar = copy / "train" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[row["mp4_offset"] + 100] ^= 1
    tar.write_bytes(data)
    assert longtake("dataset", "show", str(copy), row["key"], "--save", str(copy / "out")) == 1
    tar.unlink()
    assert longtake("dataset", "show", str(copy), row["key"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [says in line for says, line in zip(("no sample", "is damaged", "is missing"), errors, strict=True)] == [
        True
    ] * 3


def test_ls_adds_up(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert longtake("dataset", "ls", dataset) == 0
    clips = sum(len(index.read_all(dataset, split)) for split in schema.SPLITS)
    out = capsys.readouterr().out
    assert "sources  6 = 6 good + 0 rejected" in out and f"clips    {clips} " in out


def test_scores_are_counted_shown_and_folded(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(copy)
    columns = write_columns(url, {"mood": {"joy": "number", "vector": 4}, "tone": {"colour": "label"}})
    clips = sum(len(index.read_all(url, split)) for split in schema.SPLITS)
    assert longtake("dataset", "ls", url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"scores   colour of {clips} of {clips} clips: {columns['tone']}" in lines
    # a tenth lack one field and have the other
    assert f"scores   vector of {clips} of {clips} clips: {columns['mood']}" in lines
    joyful = score_columns.counts(url, columns["mood"])["joy"]
    assert 0 < joyful < clips and f"scores   joy of {joyful} of {clips} clips: {columns['mood']}" in lines
    key = index.read_all(url, "val")["key"][-1].as_py()
    assert longtake("dataset", "show", url, key) == 0
    shown = json.loads(capsys.readouterr().out)["scores"]
    assert shown[columns["mood"]]["vector"] == "4 numbers" and shown[columns["tone"]]["colour"] in (
        "red",
        "green",
        "blue",
    )
    assert longtake("dataset", "compact", url) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"scores: {column}" for column in sorted(columns.values())]
    assert longtake("dataset", "verify", url) == 0


def test_long_words_are_cut_and_rare_ones_forgotten(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "_WORDS", 50)
    keys = spoken.keys(str(copy))
    texts = [f"{'x' * 900_000} dog {' '.join(f'w{n}_{k}' for k in range(40))}" for n in range(len(keys))]
    said = {key: [Caption(text, source="\x1b[31m" + "m" * 999)] for key, text in zip(keys, texts, strict=True)}
    spoken.describe(str(copy), said)
    assert longtake("dataset", "captions", str(copy), "--most", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    maker, long = f"\\x1b[31m{'m' * 35}…", f"{'x' * 40}…"
    assert lines[0] == f"captions of {len(keys)} of {len(keys)} clips ({len(keys)} by {maker})"
    assert lines[1:3] == [f"word     {len(keys)} dog", f"word     {len(keys)} {long}"]
    (column,) = words.columns(str(copy))
    assert column["words"][:2] == [("dog", len(keys)), (long, len(keys))] and column["words_all"] <= 100


def test_report_accounts_for_every_input(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert longtake("dataset", "report", dataset) == 0
    said = capsys.readouterr().out
    clips = sum(len(index.read_all(dataset, split)) for split in schema.SPLITS)
    assert f"{clips} clips cut = " in said and said.rstrip().endswith("dataset-report/report.html")
    page = (tmp_path / "dataset-report" / "report.html").read_text()
    assert "Where the inputs went" in page and "Training" not in page and "Stages" not in page
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (copy / "val" / "00000.parquet").unlink()
    assert longtake("dataset", "report", str(copy), "--to", str(tmp_path / "other")) == 1
    assert "the account does not add up; run the `shard` stage again" in capsys.readouterr().err
    assert longtake("dataset", "report", dataset, "--view", str(tmp_path / "none.parquet")) == 2


def test_sound_is_counted_shown_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [claps.write(tmp_path / "a.mp4"), claps.write(tmp_path / "b.mp4", codec=None)]
    dataset = claps.dataset_of(tmp_path / "dataset", paths, {})
    assert longtake("dataset", "ls", dataset) == 0
    assert "sound    4 of 8 clips have sound" in capsys.readouterr().out
    for row in claps.column(dataset)[::4]:
        out = tmp_path / row["key"]
        assert longtake("dataset", "show", dataset, row["key"], "--save", str(out)) == 0
        shown = json.loads(capsys.readouterr().out)["audio"]
        assert shown == {name: value for name, value in row.items() if name != "data"}
        assert (out / f"{row['key']}.ogg").exists() == row["has_audio"]
        assert bool(streams(out / f"{row['key']}.mp4").get("audio")) == row["has_audio"]
        if row["has_audio"]:
            assert (out / f"{row['key']}.ogg").read_bytes() == row["data"]


def streams(path: Path) -> dict[str, Any]:
    """The name of the codec of each kind of stream."""
    with av.open(str(path)) as container:
        return {stream.type: stream.codec_context.name for stream in container.streams}


def packets(mp4: bytes) -> list[tuple[Any, ...]]:
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        return [(bytes(p), p.pts * p.time_base, p.dts * p.time_base) for p in container.demux(stream) if p.size]


@pytest.mark.parametrize(
    "settings", [{}, {"codec": "flac", "rate": 44_100, "channels": 1}, {"codec": "flac", "rate": 192_000}]
)
def test_a_clip_is_saved_as_one_file_that_shows_and_sounds_a_clap_at_once(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    dataset = claps.dataset_of(tmp_path / "d", [claps.write(tmp_path / "a.mp4")], settings, encoder_preset="medium")
    heard = 0
    for row in index.read_all(dataset, "train").to_pylist():
        assert longtake("dataset", "show", dataset, row["key"], "--save", str(tmp_path / "out")) == 0
        path = tmp_path / "out" / f"{row['key']}.mp4"
        member = storage.read_range(f"{dataset}/train/{row['shard']}.tar", row["mp4_offset"], row["mp4_size"])
        assert packets(path.read_bytes()) == packets(member)
        assert streams(path) == {"video": "h264", "audio": "aac"}
        with av.open(str(path)) as container:
            sound = container.streams.audio[0]
            assert (sound.start_time, sound.duration * sound.time_base) == (0, 1)
            assert container.duration == 1_000_000
            frames = list(container.decode(sound))
        assert frames[0].pts == 0
        samples = np.concatenate([frame.to_ndarray() for frame in frames], 1)
        assert abs(samples.shape[1] - 48_000) < 1024  # the last frame of AAC, which the edit list cuts
        for frame in claps.seen(clip.decode(path.read_bytes())):
            assert abs(claps.heard_at(samples, 48_000, frame / claps.FPS) - frame / claps.FPS) < 2e-3
            heard += 1
    assert heard == len(claps.TIMES)


def test_a_dataset_without_the_column_says_nothing_of_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = claps.dataset_of(tmp_path / "dataset", [claps.write(tmp_path / "a.mp4")])
    assert longtake("dataset", "ls", dataset) == 0
    assert "sound" not in capsys.readouterr().out
    key = index.read_all(dataset, "train")["key"][0].as_py()
    assert longtake("dataset", "show", dataset, key) == 0
    assert "audio" not in json.loads(capsys.readouterr().out)
