"""The stage `score`: columns are made once, exactly, by any number of workers, and whatever is killed meanwhile."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import toy_scorers
from pydantic import ValidationError
from shards import make_dataset

from longtake.datasets import clip, compact, index, schema, score_columns, scores, storage, view
from longtake.datasets.diff import differences
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.verify import verify
from longtake.infra.browse import columns as shown
from longtake.pipeline import column as columns
from longtake.pipeline import score_shard
from longtake.pipeline import scorers as kinds
from longtake.pipeline.score_shard import Work, make_scores
from longtake.pipeline.stages import curate, score

Hashes = Callable[[object], dict[str, str]]

SCORERS = {"bright": {}, "colours": {"by": "colour", "size": 16}, "few": {"by": "colour", "frames": 1}}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers whose values are known, as the only ones."""
    monkeypatch.setattr(kinds, "SCORERS", toy_scorers.modules())
    monkeypatch.setattr(kinds, "PACK", tuple(toy_scorers.modules()))


@pytest.fixture(scope="module")
def plain(tiny_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Clips of a second in shards of two or one: read it, do not change it."""
    return make_dataset(tmp_path_factory.mktemp("plain"), sorted(tiny_videos.glob("*.mp4")))


@pytest.fixture
def root(plain: str, tmp_path: Path) -> str:
    """A copy, to change."""
    return str(shutil.copytree(plain, tmp_path / "data"))


def config(**changed: Any) -> score.Config:
    how = {name: changed.pop(name) for name in score.ScoreConfig.model_fields if name in changed}
    return score.Config(**{"kind": "score", "dataset": "x", "scorers": SCORERS, "run": how} | changed)


def works(chosen: score.Config, seen: str = "") -> list[Work]:
    asked = score._asked(chosen)
    return [Work(score._column(name, one, seen), one.scorer.load(one.config, "cpu")) for name, one in asked.items()]


def made_alone(root: str, chosen: score.Config, seen: str = "") -> list[dict[str, int]]:
    """Score all shards in this process; returns the counts of each."""
    counts = []
    for split in schema.SPLITS:
        for name in index.shard_names(root, split):
            keep = np.ones(len(index.read_shard(root, split, name).table), bool)
            counts.append(make_scores(works(chosen, seen), root, split, name, keep))
    return counts


def test_the_values_are_those_of_the_clips(root: str) -> None:
    counts = made_alone(root, config())
    names = {
        name: column.column for name, column in ((w.column.column.split("-")[1], w.column) for w in works(config()))
    }
    for split in schema.SPLITS:
        clips = index.read_all(root, split).to_pylist()
        table = score_columns.table(root, split, names)
        assert set(table.column_names) == {
            "bright.mean", "bright.frames", "bright.side", "colours.each", "colours.vector", "few.each", "few.vector"
        }  # fmt: skip
        assert table["bright.frames"].to_pylist() == [row["frame_count"] for row in clips]
        for row, values in zip(clips, table.to_pylist(), strict=True):
            tar = storage.join(root, split, f"{row['shard']}.tar")
            video = clip.decode(storage.read_range(tar, row["mp4_offset"], row["mp4_size"]))
            middle = video[row["frame_count"] // 2].mean((0, 1))
            assert np.allclose(values["few.vector"], middle, rtol=1e-3)
            luma = 16 + 219 / 255 * (video @ (0.299, 0.587, 0.114)).mean()
            assert abs(values["bright.mean"] - luma) < 2
            assert values["bright.side"] == ("dark" if values["bright.mean"] < 126 else "bright")
            assert np.shape(values["colours.each"]) == (4, 3)
    # a clip is decoded once for all of them, and not at all for those that are there
    frames = sum(row["frame_count"] for split in schema.SPLITS for row in index.read_all(root, split).to_pylist())
    assert sum(each["frames"] for each in counts) == frames
    assert all(each == {"clips": 0, "frames": 0, "columns": 0, "without": 0} for each in made_alone(root, config()))
    assert not list(verify(root))


def test_settings_name_the_column_and_how_to_run_does_not(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(chosen: score.Config, seen: str = "") -> list[str]:
        return [work.column.column for work in works(chosen, seen)]

    usual = names(config())
    assert usual == names(config(cpus=2, workers=7)) == names(config(scorers=SCORERS | {"bright": {"scale": 1.0}}))
    changed = names(config(scorers=SCORERS | {"bright": {"scale": 2.0}}))
    assert changed[0] != usual[0] and changed[1:] == usual[1:]
    assert set(names(config(), "digest")).isdisjoint(usual)
    renamed = names(config(scorers={"lit": {"by": "bright"}}))
    assert renamed == [usual[0].replace("bright", "lit")]
    # other frames than those of before
    monkeypatch.setattr(score, "VERSION", score.VERSION + 1)
    assert set(names(config())).isdisjoint(usual)


def test_a_record_beside_a_dataset_says_where_the_files_of_a_column_lie(root: str, tmp_path: Path) -> None:
    dataset = str(shutil.copytree(root, tmp_path / "shards" / "0123456789abcdef"))
    base = index.read_shard(dataset, "train", "00000")
    field = scores.Field("vector", "vector", "", width=1)
    made = scores.Column("score-clip-0", "embedding", {"frames": 8}, "", (field,), {"model": "/models/clip"})
    scores.write_shard(dataset, base, made, [{"vector": [1.0]}] * len(base.table))
    assert (
        shown.recorded(dataset, made.column) == score_columns.described(dataset, made.column) == replace(made, where={})
    )
    rows = {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS}
    scores.write_scores(
        str(tmp_path / "score" / "0123456789abcdef"), scores.Scores(dataset, {"clip": made}, None, rows)
    )
    assert shown.recorded(dataset, made.column) == made
    assert made.settings == {"frames": 8, "model": "/models/clip"}


def test_the_company_of_other_scorers_does_not_change_bytes(root: str, hashes: Hashes, tmp_path: Path) -> None:
    twin = str(shutil.copytree(root, tmp_path / "twin"))
    made_alone(root, config())
    for name, entry in SCORERS.items():
        made_alone(twin, config(scorers={name: entry}))
    assert hashes(root) == hashes(twin)


def test_clips_that_a_view_drops_and_those_without_a_value_say_why(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_scorers._Bright, "values", lambda self: {"mean": float("inf"), "frames": 1, "side": None})
    name = index.shard_names(root, "train")[0]
    keep = np.arange(len(index.read_shard(root, "train", name).table)) % 2 == 0
    made_by = works(config(scorers={"bright": {}}), "view")
    counts = make_scores(made_by, root, "train", name, keep)
    assert counts["without"] == len(keep) and counts["clips"] == keep.sum()
    column = made_by[0].column.column
    rows = index.read_shard(root, "train", f"{name}.{column}").table
    assert rows["reason"].to_pylist() == ["not_finite" if kept else "not_in_view" for kept in keep]
    assert rows["mean"].null_count == len(keep) and rows["frames"].null_count == (~keep).sum()
    found = score_columns.read_column(root, "train", column)
    assert found["reason"].to_pylist().count("not_scored") == len(index.read_all(root, "train")) - len(keep)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"brigt": {}}, "brigt: there is no scorer 'brigt'; did you mean bright? (for a name of your own add `by`)"),
        ({"a": {"by": 3}}, "a: there is no scorer 3; there are bright, colour"),
        ({"bright": {"scal": 1}}, "bright.scal: scorer bright has no such setting; did you mean scale?"),
        ({"bright": {"scale": "x"}}, "bright.scale: Input should be a valid number"),
        ({"Bright": {}}, "String should match pattern"),
        (
            {"cluster": {"by": "bright"}},
            "cluster: is what the column of a `cluster` stage is named; choose another name",
        ),
    ],
)
def test_a_mistake_in_a_scorer_is_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(scorers=given)
    assert says in str(caught.value)


def test_without_scorers_the_whole_pack_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score.Config(kind="score", dataset="x")
    assert whole == config(scorers={"bright": None, "colour": {"by": "colour", "frames": 4}})
    assert score.outside(whole) == "bright 1 colour 1"
    monkeypatch.setattr(kinds, "SCORERS", {"bright": "toy_without"})
    with pytest.raises(ValidationError, match=r"no_such_package is not installed; pip install 'longtake\[curation\]'"):
        config(scorers={"bright": {}})


def test_a_loader_a_diff_and_a_compact_file_know_scores(root: str, plain: str) -> None:
    made_alone(root, config())
    column = works(config())[0].column.column
    with pytest.raises(UserError, match=f"columns: {column} has scores, which choose clips"):
        Loader(root, frames=4, size=(16, 16), columns=["video", column])
    assert not differences(plain, root)
    before = score_columns.read_column(root, "train", column)
    compact.write(root, "train")
    compact.write(root, "train", column)
    assert score_columns.read_column(root, "train", column) == before and not list(verify(root))


def _broken(*arguments: Any, **named: Any) -> Any:
    raise ValueError("(-215:Assertion failed)\nin a line of C++")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("_Bright.begin", r"{key}\.mp4: scorer bright: ValueError: \(-215:Assertion failed\); leave the clip out"),
        ("_Bright.add", r"{key}\.mp4: scorer bright: ValueError: \(-215:Assertion failed\); leave the clip out"),
        ("_Bright.values", r"{key}\.mp4: scorer bright: ValueError: \(-215:Assertion failed\); leave the clip out"),
        ("_Colours.look", r"{key} to .*: scorer colour: ValueError: \(-215:Assertion failed\); leave the clip out"),
    ],
)
def test_a_scorer_that_breaks_names_the_clip(place: str, says: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method = place.split(".")
    monkeypatch.setattr(getattr(toy_scorers, kind), method, _broken)
    first = index.read_shard(root, "train", "00000").table
    with pytest.raises(Failure, match="train/00000.tar: " + says.format(key=first["key"][0].as_py())) as caught:
        made_alone(root, config())
    assert len(str(caught.value).splitlines()) == 1


def test_a_frame_that_cannot_be_scaled_names_the_clip(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_shard, "_planar", _broken)
    with pytest.raises(Failure, match=r"\.mp4: frame 0 cannot be scaled \(ValueError: \(-215.*; leave the clip out"):
        made_alone(root, config())


def test_a_scorer_that_cannot_be_loaded_is_one_line(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, one),) = score._asked(config(scorers={"bright": {}})).items()
    asked = [(score._column(name, one, "").plain(), kinds.SCORERS[one.by], one.config.model_dump(mode="json"))]
    monkeypatch.setattr(toy_scorers, "_Bright", _broken)
    with pytest.raises(Failure, match=r"scorers\.bright: scorer bright cannot be loaded on .* \(ValueError: \(-215"):
        score._load("cpu", asked=asked, dataset=root)


def test_an_actor_that_cannot_load_says_so_of_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would start an actor that fails again and again."""
    monkeypatch.setattr(ray, "get", lambda models: models)
    worker = columns.Worker(_broken, [], {}, "cpu", None)
    result = worker({"split": "train", "name": "00000", "clips": 1, "keep": b""})
    assert "cannot load what it needs (ValueError: (-215:Assertion failed)); mend it there" in result["error"]


def test_a_scorer_whose_package_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(kinds.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"toy_bright cannot be imported \(ImportError: libGL.*--force-reinstall"):
        kinds.load("bright")


# With Ray.


@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_the_stage_writes_the_same_bytes_for_any_number_of_workers_and_goes_on(
    root: str, hashes: Hashes, tmp_path: Path
) -> None:
    twin = str(shutil.copytree(root, tmp_path / "twin"))
    output = str(tmp_path / "out")
    result = score.run(config(workers=1), {"dataset": root}, output)
    score.run(config(workers=4, cpus=0.25), {"dataset": twin}, str(tmp_path / "other"))
    made = hashes(root)
    assert hashes(twin) == made and not list(verify(root))
    # and the same view
    options = {"rules": {"bright.mean": {"min_percentile": 30}}, "labels": {"bright.side": {"never": ["bright"]}}}
    views = []
    for folder, uri in ((root, output), (twin, str(tmp_path / "other"))):
        asked = curate.Config.model_validate({"kind": "curate", "dataset": "x", "scores": "y"} | options)
        views.append(Path(curate.run(asked, {"dataset": folder, "scores": uri}, "work/some")["uri"]).read_bytes())
    assert views[0] == views[1]
    shutil.rmtree(Path(root) / "views")
    record = scores.read_scores_of(output, root)
    assert record.names == result["columns"] and score.complete(output)
    shards = sum(len(index.shard_names(root, split)) for split in schema.SPLITS)
    assert (result["metrics"]["scored_shards"], result["metrics"]["scored_columns"]) == (shards, 3 * shards)
    written = (tmp_path / "out" / "scores.json").read_bytes()
    # nothing is left to do, then a shard of one column is; compact files are of before
    assert score.run(config(), {"dataset": root}, output)["metrics"]["scored_shards"] == 0
    column = record.names["few"]
    compact.write(root, "train", column)
    (Path(root) / "train" / f"00000.{column}.parquet").unlink()
    assert not score.complete(output)
    again = score.run(config(), {"dataset": root}, output)["metrics"]
    assert (again["scored_shards"], again["scored_columns"]) == (1, 1)
    shutil.rmtree(Path(root) / "compact")
    assert hashes(root) == made and (tmp_path / "out" / "scores.json").read_bytes() == written
    # clips of a view are columns of their own, beside the others
    kept = f"{root}/views/half.parquet"
    rows = {split: index.read_all(root, split) for split in schema.SPLITS}
    tables = [view.rows(s, t["key"], ["x" if n % 2 else None for n in range(len(t))]) for s, t in rows.items()]
    view.write(kept, pa.concat_tables(tables), {})
    chosen = score.run(config(scorers={"bright": {}}), {"dataset": root, "view": kept}, str(tmp_path / "half"))
    assert chosen["columns"]["bright"] != record.names["bright"]
    assert chosen["metrics"]["without_values"] == sum(len(t) // 2 for t in rows.values())
    assert made.items() <= hashes(root).items() and not list(verify(root))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_stops_the_stage_is_one_line(root: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with pytest.raises(UserError, match="no dataset here"):
        score.run(config(), {"dataset": str(tmp_path / "none")}, output)
    with pytest.raises(UserError, match=r"run\.gpus: a worker needs 64 GPU"):
        score.run(config(gpus=64), {"dataset": root}, output)
    row = index.read_all(root, "train").to_pylist()[0]
    tar = Path(root) / "train" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["mp4_offset"] + 100] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=r"1 of \d+ shards could not be made, the first: train/00000: .*is damaged"):
        score.run(config(), {"dataset": root}, output)
    # the other shards stay, and are not made again
    assert index.shard_names(root, "train", works(config())[0].column.column) == [
        f"{name}.{works(config())[0].column.column}" for name in index.shard_names(root, "train")[1:]
    ]


SCRIPT = """
import atexit, json, os, sys, time
import toy_scorers
from longtake.pipeline import scorers as kinds
from longtake.pipeline.stages import score
if __name__ == "__main__":
    kinds.SCORERS = toy_scorers.modules()
    score.run(score.Config.model_validate_json(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
    # as the command ends: a thread of Ray's that waits for an interpreter which is unloaded aborts the process
    atexit._run_exitfuncs()
    os._exit(0)
"""


def committed(root: str) -> int:
    return len(list(Path(root).glob("*/*.score-*.parquet")))


@pytest.mark.soak
def test_killed_drivers_and_a_lost_node_leave_the_same_bytes(
    root: str, hashes: Hashes, drivers: Any, tmp_path: Path
) -> None:
    undisturbed = str(shutil.copytree(root, tmp_path / "undisturbed"))
    made_alone(undisturbed, config())
    total = committed(undisturbed)
    arguments = (config().model_dump_json(), json.dumps({"dataset": root}), str(tmp_path / "out"))
    with drivers.cluster(PYTHONPATH=str(Path(toy_scorers.__file__).parent), TOY_WAIT="0.1") as cluster:

        def start(columns: int) -> subprocess.Popen[bytes]:
            """A driver that has committed so many columns of shards."""
            driver: subprocess.Popen[bytes] = drivers.script(SCRIPT, *arguments, **cluster.environment)
            while committed(root) < columns and driver.poll() is None:
                time.sleep(0.01)
            assert columns <= committed(root) < total, drivers.finish(driver)
            return driver

        for columns in (1, 2, 4):
            drivers.kill(start(columns))
        # whatever it had begun; its node goes with the worker
        driver = start(committed(root) + 1)
        cluster.lose_node()
        drivers.finish(driver)
    assert hashes(root) == hashes(undisturbed) and not list(verify(root))
    assert score.complete(str(tmp_path / "out"))
