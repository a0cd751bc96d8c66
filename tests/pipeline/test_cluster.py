"""Clusters, and pairs of clips that look alike: against brute force, in crowds, after kills. Ray in the long test alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import vectored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtake.datasets import alike, cluster_lists, clusters, index, schema, score_columns, scores, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.verify import verify
from longtake.pipeline import clustering, dedup, pairs
from longtake.pipeline import column as columns
from longtake.pipeline.stages import cluster, score

Hashes = Callable[[object], dict[str, str]]
ROUNDING = 1e-4  # of cosines of float16 vectors that were rounded twice


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many jobs for few clips, without Ray but in the long test."""
    monkeypatch.setattr(clustering, "_PART_CLIPS", 64)
    if "soak" not in request.keywords:
        monkeypatch.setattr(columns, "make", vectored.make_here)


def made(url: str, **changed: Any) -> clusters.Clusters:
    return clusters.read_clusters(vectored.run(url, f"{url}-out", **changed)["uri"])


def pairs_in(record: clusters.Clusters, similarity: float | None = None) -> set[tuple[int, int]]:
    table = clusters.pairs(record, similarity)
    return set(zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True))


def values(record: clusters.Clusters, split: str) -> dict[str, list[Any]]:
    """The columns `reason`, `cluster` and `distance` of a split."""
    return score_columns.read_column(record.dataset, split, record.column["column"]).to_pydict()


def test_all_pairs_of_one_cluster_are_those_of_brute_force(tmp_path: Path) -> None:
    vectors = vectored.crowded(400, 24)
    record = made(vectored.make(tmp_path / "d", vectors, held_out=90), clusters=1)
    found = pairs_in(record)
    assert vectored.true_pairs(vectors, 0.9 + ROUNDING) <= found <= vectored.true_pairs(vectors, 0.9 - ROUNDING)
    assert len(found) > 30
    assert pairs_in(record, 0.97) < found and pairs_in(record, 0.97) >= vectored.true_pairs(vectors, 0.97 + ROUNDING)


def test_few_pairs_are_lost_between_clusters_and_none_is_made_up(tmp_path: Path) -> None:
    vectors = vectored.crowded(3000, 32)
    record = made(vectored.make(tmp_path / "d", vectors, shard=250, held_out=500))
    true, found = vectored.true_pairs(vectors, 0.9 + ROUNDING), pairs_in(record)
    assert record.counts["clusters"] == 55 and record.counts["lists"] > 5 and record.counts["groups"] > 5
    assert found <= vectored.true_pairs(vectors, 0.9 - ROUNDING)
    assert len(true & found) / len(true) > 0.98
    # without visits more are lost
    alone = pairs_in(made(record.dataset, border=0))
    assert len(true & alone) < len(true & found)


def test_each_clip_has_the_number_of_the_nearest_centroid(tmp_path: Path) -> None:
    vectors = vectored.crowded(300, 16)
    vectors[7] = np.nan
    vectors[8] = 0
    url = vectored.make(tmp_path / "d", vectors, held_out=60)
    record = made(url, clusters=9)
    centres = cluster_lists.read_centroids(storage.join(url, record.folder))
    assert np.allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5) and len(centres) == 9
    first = 0
    for split, count in (("train", 240), ("val", 60)):
        found = values(record, split)
        for number in range(count):
            if first + number in (7, 8):
                assert found["cluster"][number] is None and found["reason"][number] == "no_value"
                continue
            cosines = centres @ vectors[first + number]
            assert cosines[int(found["cluster"][number])] >= cosines.max() - 1e-3
            assert found["distance"][number] == pytest.approx(1 - cosines.max(), abs=1e-3)
        first += count
    assert record.counts["clips"] == 298 and record.clips == {"train": 240, "val": 60}
    shards = [shard for split in schema.SPLITS for shard in index.read_shards(url, split, record.column["column"])]
    assert len(shards) == 8 and not [line for shard in shards for line in score_columns.problems(url, shard)]


def test_clips_that_a_view_leaves_out_are_in_no_cluster_and_no_pair(tmp_path: Path) -> None:
    vectors = np.repeat(vectored.crowded(50, 8), 2, axis=0)
    url = vectored.make(tmp_path / "d", vectors)
    keys = [key for _, key in alike.keys(url, np.arange(100))]
    reasons = [None if row % 10 else "no" for row in range(100)]
    view.write(f"{url}/views/v.parquet", view.rows("train", keys, reasons), {})
    record = made(url, view=f"{url}/views/v.parquet", clusters=3)
    found = values(record, "train")
    assert [reason == "not_in_view" for reason in found["reason"]] == [row % 10 == 0 for row in range(100)]
    assert not {row for pair in pairs_in(record) for row in pair if row % 10 == 0}
    assert (2, 3) in pairs_in(record) and record.counts["clips"] == 90


# Crowds.


def kept(record: clusters.Clusters, rows: np.ndarray, similarity: float) -> set[int]:
    return set(rows[~dedup.semantic(clusters.pair_tables(record, similarity), rows, similarity)].tolist())


@pytest.mark.parametrize("equal", [True, False])
def test_a_crowd_has_few_pairs_and_one_clip_of_it_stays(equal: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = vectored.crowded(3200, 16, 400)
    black = np.ones(16) / 4
    vectors[:3000] = black if equal else black + rng.standard_normal((3000, 16)) * 0.01
    vectors[1000:1100] = vectors[999]  # equal ones, that are near to the others
    vectors[3199] = black
    record = made(vectored.make(tmp_path / "d", vectors, shard=400, held_out=200))
    # each with each would be four and a half millions
    assert record.counts["pairs"] < 100 * 3200 and record.counts["crowd_clips"] > 2900 and not record.capped
    crowd = np.append(np.arange(3000), 3199)
    for rows in (np.arange(3200), np.arange(3199, -1, -1), rng.permutation(3200), rng.permutation(3200)[:2000]):
        stay = kept(record, rows, 0.95)
        # the first of them, whoever represents it
        assert stay & set(crowd.tolist()) == {next(row for row in rows.tolist() if row in set(crowd.tolist()))}


def test_a_cluster_with_too_many_pairs_has_the_strongest_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pairs, "_PAIRS_A_CLIP", 3)
    monkeypatch.setattr(pairs, "_FEW_PAIRS", 100)
    rng = np.random.default_rng(0)
    vectors = np.ones((300, 256)) / 16 + rng.standard_normal((300, 256)) * 0.017
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    record = made(vectored.make(tmp_path / "d", vectors.astype("f")), clusters=1)
    assert record.counts["capped_clusters"] == 1
    (least,) = record.capped.values()
    found, true = pairs_in(record), vectored.true_pairs(vectors, 0.9)
    assert len(true) > 40_000 and 600 <= len(found) <= 2000 and 0.9 < least < 1
    assert vectored.true_pairs(vectors, least + ROUNDING) <= found
    said = capsys.readouterr().err
    assert f"1 clusters had too many pairs and have the strongest alone, the worst from a cosine of {least:.4f}" in said


def test_a_cluster_with_too_many_clips_is_cut_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pairs, "_MOST_CLIPS", 200)
    vectors = vectored.crowded(1000, 24, 5)
    record = made(vectored.make(tmp_path / "d", vectors), clusters=1)
    true, found = vectored.true_pairs(vectors, 0.9 + ROUNDING), pairs_in(record)
    assert record.counts["cut_clusters"] == 1 and "1 clusters had too many clips" in capsys.readouterr().err
    assert found <= vectored.true_pairs(vectors, 0.9 - ROUNDING) and len(true & found) > 0.7 * len(true)


def greedy(vectors: np.ndarray, rows: list[int], similarity: float) -> set[int]:
    """What stays where each clip in turn is dropped that is alike to one that stays."""
    stay: list[int] = []
    for row in rows:
        if all(vectors[row] @ vectors[other] < similarity for other in stay):
            stay.append(row)
    return set(stay)


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_semantic_duplicates_are_dropped_in_the_order_of_preference(data: st.DataObject) -> None:
    # few directions, so that many are equal and many are alike
    coarse = data.draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=25))
    vectors = alike.normed(np.array(coarse, np.float32))
    rows = data.draw(st.permutations(range(len(vectors))))
    rows = rows[: data.draw(st.integers(1, len(vectors)))]
    similarity = data.draw(st.sampled_from([0.9, 0.95, 0.99, 1.0]))
    found = pairs.Found()
    nobody = pairs.Clips(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 3), np.float16))
    everybody = pairs.Clips(np.arange(len(vectors)), np.arange(len(vectors)), vectors.astype(np.float16))
    pairs.pairs_of(found, 0, everybody, nobody, 0.9)
    drop = dedup.semantic([found.table()], np.array(rows), similarity)
    exact = alike.normed(vectors.astype(np.float16))
    assert {row for row, out in zip(rows, drop, strict=True) if not out} == greedy(exact, rows, similarity - 1e-6)


# Small, empty and wrong.


@pytest.mark.parametrize(("count", "asked"), [(1, None), (1, 5), (3, 50), (2, 1)])
def test_few_clips_have_few_clusters(count: int, asked: int | None, tmp_path: Path) -> None:
    url = vectored.make(tmp_path / "d", vectored.crowded(count, 8))
    record = made(url, clusters=asked)
    assert record.counts["clips"] == count and 1 <= record.counts["clusters"] <= count
    assert sum(cluster is not None for cluster in values(record, "train")["cluster"]) == count
    assert len(alike.approximate(record, np.ones(8), 9, 99).rows) == count


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    url = vectored.make(tmp_path / "d", vectored.crowded(90, 8), shard=30)
    other = vectored.make(tmp_path / "other", vectored.crowded(10, 8))
    config = cluster.Config(kind="cluster", dataset="d", scores="s", embedding="clip.vector")
    empty = vectored.make(tmp_path / "empty", np.empty((0, 8)))
    for changed, inputs, says in (
        ({"embedding": "clipp.vector"}, {}, "embedding: clipp.vector: no scorer clipp; did you mean clip\\?$"),
        ({"embedding": "clip.vectors"}, {}, r"embedding: clip.vectors: is no vector; there are clip\.vector$"),
        ({}, {"scores": f"{other}-scores"}, "has scores of .*/other, not of .*/d; name those of this dataset$"),
        ({}, {"scores": str(tmp_path / "none")}, "no scores here .*; name what a `score` stage has made$"),
        ({}, {"dataset": empty}, "no clip to encode; run its `shard` stage, or name another view$"),
        ({}, {"dataset": str(tmp_path / "none")}, "no dataset here"),
    ):
        given_inputs = {"dataset": url, "scores": f"{url}-scores"} | inputs
        with pytest.raises(UserError, match=says) as error:
            cluster.run(config.model_copy(update=changed), given_inputs, str(tmp_path / "out"))
        assert "\n" not in str(error.value)
    scorers = {"light": {}, "clip": {"by": "torchscript", "file": tiny_pictures.script(tmp_path / "net.pt", 5)}}
    upstream = {"scores": score.Config.model_validate({"kind": "score", "dataset": "d", "scorers": scorers})}
    cluster.check(config, upstream)
    for name, says in (
        ("clop.vector", r"no scorer clop; did you mean clip\?$"),
        ("light.dark", r"is no vector; there are clip\.vector$"),
        ("clip.vektor", r"no such field; did you mean clip\.vector\?$"),
    ):
        with pytest.raises(ValueError, match=f"^embedding: {name}: {says}"):
            cluster.check(config.model_copy(update={"embedding": name}), upstream)
    record = made(url)
    with pytest.raises(UserError, match=r"similarity 0.5: the clusters have pairs from 0.9 on; set `similarity: 0.5`"):
        clusters.pairs(record, 0.5)
    with pytest.raises(ValueError, match=r"write a scorer's name in the recipe and its field, as clip.vector"):
        cluster.Config(kind="cluster", dataset="d", scores="s", embedding="clip")
    nothing = vectored.make(tmp_path / "nothing", np.full((5, 8), np.nan))
    with pytest.raises(UserError, match="no clip has a vector"):
        made(nothing)


def test_vectors_of_two_sizes_are_refused_in_one_line(tmp_path: Path) -> None:
    url = vectored.make(tmp_path / "d", vectored.crowded(60, 8), shard=30)
    column = scores.read_scores(f"{url}-scores").columns["clip"]
    short = scores.Column(column.column, "made-up", {}, "", (scores.Field("vector", "vector", "short", width=5),))
    base = index.read_shards(url, "train")[1]
    scores.write_shard(url, base, short, [{"vector": np.ones(5)}] * 30)
    says = "00001.*vector has vectors of 5 numbers, other shards of 8; delete it and score it again$"
    with pytest.raises(UserError, match=says):
        made(url)
    # the sample has none of them
    with pytest.raises(Failure, match=says):
        made(url, sample=1, clusters=1, seed=1)
    with pytest.raises(UserError, match=says):
        alike.exact(url, column.column, "vector", np.ones(8), 3)


# Again, after other settings, losses and kills.


def test_the_same_command_makes_what_is_missing_alone_with_the_same_bytes(tmp_path: Path, hashes: Hashes) -> None:
    url = vectored.make(tmp_path / "d", vectored.crowded(500, 8), shard=50, held_out=100)
    first = vectored.run(url, f"{url}-out")
    record, whole = clusters.read_clusters(f"{url}-out"), hashes(url)
    assert cluster.complete(f"{url}-out") and first["metrics"]["made_lists"] == record.counts["lists"] > 3
    folder = Path(url, record.folder)
    for path, lists, groups in (
        (sorted(folder.glob("vectors/*"))[1], 1, 0),
        (sorted(folder.glob("pairs-0.9/*"))[0], 0, 1),
        (sorted(Path(url, "train").glob("*.score-cluster-*"))[2], 1, 0),
        (folder / "centroids.safetensors", 0, 0),
    ):
        path.unlink()
        assert not cluster.complete(f"{url}-out")
        again = vectored.run(url, f"{url}-out")["metrics"]
        assert (again["made_lists"], again["made_groups"]) == (lists, groups) and hashes(url) == whole
    # another similarity needs other pairs alone
    again = vectored.run(url, f"{url}-strict", similarity=0.97)["metrics"]
    assert again["made_lists"] == 0 and again["made_groups"] == record.counts["groups"]
    assert pairs_in(clusters.read_clusters(f"{url}-strict")) == pairs_in(record, 0.97)
    # whatever dead writers have left
    debris = folder / "vectors" / f".x~{os.uname().nodename}@999999999~00.tmp"
    debris.touch()
    assert vectored.run(url, f"{url}-out")["metrics"]["debris_swept"] == 1 and not debris.exists()


def test_a_dataset_that_has_grown_gets_other_clusters(tmp_path: Path) -> None:
    vectors = vectored.crowded(120, 8)
    url = vectored.make(tmp_path / "d", vectors[:80])
    before = made(url)
    vectored.make(tmp_path / "d", vectors)
    assert not cluster.complete(f"{url}-out")
    after = made(url)
    assert after.folder != before.folder and after.counts["clips"] == 120


def test_damage_is_named_with_its_remedy(tmp_path: Path) -> None:
    record = made(vectored.make(tmp_path / "d", vectored.crowded(200, 8)))
    folder = Path(record.dataset, record.folder)
    assert not list(cluster_lists.problems(record.dataset))
    path = next(folder.glob("pairs-0.9/*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    assert [line for line in verify(record.dataset) if "pairs-0.9" in line] == list(
        cluster_lists.problems(record.dataset)
    )
    with pytest.raises(Failure, match=r"not a readable Parquet file .* run the stage that made it again"):
        clusters.pairs(record)
    path.unlink()
    with pytest.raises(Failure, match="some pairs are missing; run the `cluster` stage again"):
        clusters.pairs(record)
    lists = next(folder.glob("vectors/*"))
    lists.write_bytes(lists.read_bytes()[:40])
    with pytest.raises(Failure, match=r"not readable lists of clusters .* run the `cluster` stage again"):
        alike.approximate(record, np.ones(8), 3)
    assert any("lists of clusters" in line for line in cluster_lists.problems(record.dataset))


def test_a_byte_that_is_another_one_is_found_by_verify(tmp_path: Path) -> None:
    record = made(vectored.make(tmp_path / "d", vectored.crowded(200, 8)))
    folder = Path(record.dataset, record.folder)
    for path in (folder / "centroids.safetensors", next(folder.glob("vectors/*"))):
        whole = path.read_bytes()
        for place in (-1, len(whole) // 2, 8 + int.from_bytes(whole[:8], "little")):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            (line,) = cluster_lists.problems(record.dataset)
            assert path.name in line and "run the `cluster` stage again" in line
        path.write_bytes(whole)
    assert not list(cluster_lists.problems(record.dataset))


def test_what_is_read_of_lists_does_not_grow_with_the_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made(vectored.make(tmp_path / "d", vectored.crowded(600, 8)), clusters=60)
    read: list[int] = []
    real = cluster_lists._read

    def count(url: str, start: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
        read.append(np.dtype(kind).itemsize * int(np.prod(shape)))
        return real(url, start, shape, kind)

    monkeypatch.setattr(cluster_lists, "_read", count)
    lists = cluster_lists.read_lists(storage.join(record.dataset, record.folder))
    assert len(lists) == record.counts["lists"] > 3 and sum(read) == 0
    assert sum(len(one.homes_of(5)[0]) for one in lists) > 0 and sum(read) < 24 * len(lists) + 40 * (8 + 16)


def test_a_crowd_in_many_files_is_collapsed_in_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectored.crowded(900, 16, 5)
    vectors[np.random.default_rng(0).random(900) < 0.5] = vectors[7]
    url = vectored.make(tmp_path / "d", vectors, shard=90)
    expected = clusters.pairs(made(url, clusters=4))
    monkeypatch.setattr(pairs, "_MANY", 10)
    held: list[int] = []
    real = pairs.pairs_of
    monkeypatch.setattr(pairs, "pairs_of", lambda found, cluster, homes, *rest: held.append(len(homes.vectors)) or real(found, cluster, homes, *rest))  # fmt: skip
    shutil.rmtree(Path(url, "clusters"))
    assert clusters.pairs(made(url, clusters=4)).equals(expected)
    assert sum(held) < 520


def test_each_step_has_a_bar_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list[str]()
    monkeypatch.setattr(columns, "make", lambda stage, *rest: names.append(stage) or vectored.make_here(stage, *rest))
    made(vectored.make(tmp_path / "d", vectored.crowded(100, 8)))
    assert names == ["cluster lists", "cluster pairs"]


def test_more_pairs_than_memory_holds_are_refused_with_their_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made(vectored.make(tmp_path / "d", vectored.crowded(400, 8)), clusters=3)
    few = clusters.pairs(record, 0.99)
    monkeypatch.setattr(clusters, "_MOST_PAIRS", len(few) + 5)
    clusters.pairs(record, 0.99)
    with pytest.raises(Failure, match=r"more than \d+ pairs of a cosine of 0.9, .* ask for a greater similarity$"):
        dedup.semantic(clusters.pair_tables(record, 0.9), np.arange(400), 0.9)


# small jobs, each of which takes some time
SCRIPT = """
import atexit, json, os, sys, time
from longtake.pipeline import clustering
from longtake.pipeline.stages import cluster

def slow(load):
    def loaded(device, **arguments):
        make = load(device, **arguments)
        return lambda **job: (time.sleep(0.2), make(**job))[1]
    return loaded

if __name__ == "__main__":
    clustering._PART_CLIPS = 64
    cluster._load_lists, cluster._load_pairs = slow(cluster._load_lists), slow(cluster._load_pairs)
    cluster.run(cluster.Config.model_validate_json(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
    # as the command ends: a thread of Ray's that waits for an interpreter which is unloaded aborts the process
    atexit._run_exitfuncs()
    os._exit(0)
"""


def twin_of(url: str, folder: Path) -> str:
    """A copy of a dataset with its record of scores."""
    twin = str(shutil.copytree(url, folder / "twin" / "d"))
    scores.write_scores(f"{twin}-scores", replace(scores.read_scores(f"{url}-scores"), dataset=twin))
    return twin


@pytest.mark.soak
@pytest.mark.parametrize(
    "files", ["clusters/*/pairs-0.9/*.parquet", "clusters/*/vectors/*.safetensors"], ids=["pairs", "lists"]
)
def test_a_cluster_that_loses_a_node_ends_with_the_same_bytes(
    tmp_path: Path, hashes: Hashes, drivers: Any, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    """Lost where the first of such files is there."""
    url = vectored.make(tmp_path / "d", vectored.crowded(1600, 16), shard=100, held_out=300)
    twin = twin_of(url, tmp_path)
    config = {"kind": "cluster", "dataset": url, "scores": f"{url}-scores", "embedding": "clip.vector"}
    inputs = json.dumps({"dataset": url, "scores": f"{url}-scores"})
    with drivers.cluster() as nodes:
        driver = drivers.script(SCRIPT, json.dumps(config), inputs, f"{url}-out", **nodes.environment)
        while not (there := list(Path(url).glob(files))) and driver.poll() is None:
            time.sleep(0.01)
        nodes.lose_node()
        assert there and not Path(f"{url}-out").exists()
        drivers.finish(driver)
    monkeypatch.setattr(columns, "make", vectored.make_here)
    vectored.run(twin, f"{twin}-out")
    assert hashes(url) == hashes(twin) and not list(cluster_lists.problems(url))
    one, other = (clusters.read_clusters(f"{each}-out") for each in (url, twin))
    assert one.counts == other.counts and one.counts["pairs"] > 100


@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_killed_on_one_worker_and_continued_on_four_it_has_the_bytes_of_no_worker(
    tmp_path: Path, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = vectored.make(tmp_path / "d", vectored.crowded(1600, 16), shard=100, held_out=300)
    twin = twin_of(url, tmp_path)
    config = {"kind": "cluster", "dataset": url, "scores": f"{url}-scores", "embedding": "clip.vector"}
    inputs = json.dumps({"dataset": url, "scores": f"{url}-scores"})
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(config | {"run": {"workers": 1}}), inputs, f"{url}-out"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while (
        child.poll() is None and time.time() < deadline and not list(Path(url).glob("clusters/*/pairs-0.9/*.parquet"))
    ):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    there = len(list(Path(url).glob("clusters/*/pairs-0.9/*.parquet")))

    metrics = vectored.run(url, f"{url}-out", run={"cpus": 0.25, "workers": 4})["metrics"]
    assert metrics["made_lists"] == 0 < there and metrics["made_groups"] == metrics["groups"] - there > 10
    monkeypatch.setattr(columns, "make", vectored.make_here)
    vectored.run(twin, f"{twin}-out")
    assert hashes(url) == hashes(twin)
    one, other = (clusters.read_clusters(f"{each}-out") for each in (url, twin))
    rows = np.arange(1600)
    assert kept(one, rows, 0.95) == kept(other, rows, 0.95) and 0 < one.counts["pairs"] == other.counts["pairs"]
