"""`longtake plan`: estimates rest on what was measured, come close to what a run then makes, and say what is not known."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_scorers
import yaml
from click.testing import CliRunner
from flat import nested

from longtake.datasets import index, schema
from longtake.datasets.errors import UserError
from longtake.infra import graph, recipe, runner, runs
from longtake.infra.cli.housekeeping import plan
from longtake.infra.upkeep import estimate
from longtake.infra.upkeep import sources as sample
from longtake.pipeline import retry, scorers

TRAINING = {
    "kind": "pretrain_vae", "phase": "image", "dataset": "shards", "view": "view", "name": "priced",
    "model": {"preset": "pv_vae_tiny"}, "sizes": [[32, 32]], "frames": 1, "lambda_gan": 0, "steps": 7200, "batch": 2,
    "sample_every": 0, "workers": 0, "eval_clips": 1, "ema_half_lives": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def prepared(own_store: None, with_store: Callable[[Path], None], tmp_path: Path) -> None:
    """A workspace `ws` with a store whose tables need not be made."""
    with_store(tmp_path / "ws")


def write(folder: Path, sources: Path, **vae: Any) -> str:
    """The recipe that makes the dataset of the tests, and trains on it."""
    clip = {"short_side": 32, "fps": 12, "max_seconds": 3}
    stages = {
        "shards": {"kind": "shard", "sources": [str(sources)], "clip": clip, "val_fraction": 0.3, "group_sources": 2},
        "view": {"kind": "curate", "dataset": "shards", "rules": {}},
        "vae": nested(TRAINING | vae),
        "latents": {"kind": "cache_latents", "dataset": "shards", "encoder": "vae"},
    }
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "priced", "workspace": str(folder / "ws"), "stages": stages}))
    return str(path)


def opened(path: str) -> tuple[recipe.Recipe, list[graph.Node], runs.Runs]:
    loaded = graph.pin(recipe.load(path))
    return loaded, graph.build(loaded), runs.connect(loaded)


def told(path: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the whole estimate, its stages by name)."""
    found = estimate.estimate(*opened(path), **options)
    return found, {stage["name"]: stage for stage in found["stages"]}


def trained(store: runs.Runs, node: graph.Node, seconds: list[float], gpus: int = 0) -> str:
    """A run of a training that was measured so, and has left a checkpoint."""
    run, output = store.open(node, None)
    for step, value in enumerate(seconds, 1):
        store.client.log_metric(run, "seconds_per_step", value, step=step)
    for number in range(gpus):
        store.client.log_metric(run, f"system/gpu_{number}_utilization_percentage", 50.0)
    folder = Path(output) / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pt").write_bytes(b"0" * 5000)
    store.end(run, "KILLED", "")
    return run


def test_of_all_sources_looked_into_the_clips_and_bytes_are_those_that_sharding_makes(
    footage: Path, dataset: str, tmp_path: Path
) -> None:
    found, stages = told(write(tmp_path, footage), sample=10)
    shards, truth = stages["shards"], index.summary(dataset)
    assert shards["sources"] == truth["sources"] == len(found["sources"])
    assert shards["source_bytes"] == sum(path.stat().st_size for path in footage.glob("*.mp4"))
    assert shards["clips"] == {"value": truth["clips"], "low": truth["clips"], "high": truth["clips"]}
    made = sum(path.stat().st_size for path in Path(dataset).rglob("*.tar"))
    assert 0.6 * made < shards["bytes"]["value"] < 1.1 * made, "tars have headers and padding beside what is in them"
    assert shards["cpu_hours"]["value"] > 0 and shards["gpu_hours"] is None
    assert found["disk"]["free"] > found["disk"]["needed"]["high"] and found["disk"]["enough"]


def measured(uri: str, size: int, _: Any) -> sample.SampledSource:
    """In place of `sources.measure`: four clips and a second."""
    return sample.SampledSource(uri, size, 6.0, 64, 64, 4.0, 1000.0, 1.0, "")


def test_sources_that_are_in_the_dataset_already_cost_nothing_and_others_do(
    footage: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure", measured)
    shutil.copytree(footage, tmp_path / "others")
    for sources, todo in ((footage, False), (tmp_path / "others", True)):
        path = write(tmp_path, sources)
        shutil.copytree(dataset, opened(path)[1][0].output)
        shards = told(path, sample=1)[1]["shards"]
        assert (shards["cpu_hours"]["value"] > 0) == ("in the dataset already" not in shards["how"]) == todo


def test_a_sample_gives_a_range_and_is_the_same_each_time(footage: Path, tmp_path: Path) -> None:
    path = write(tmp_path, footage)
    count, total, known, chosen = sample.draw((str(footage),), 3)
    assert (
        count == 6
        and known == 0
        and total == sum(p.stat().st_size for p in footage.glob("*.mp4"))
        and len({u for u, _ in chosen}) == 3
    )
    assert (count, total, known, chosen) == sample.draw((str(footage),), 3)
    found, stages = told(path, sample=3)
    assert [s["uri"] for s in found["sources"]] == [u for u, _ in chosen]
    bytes_ = stages["shards"]["bytes"]
    assert bytes_["low"] < bytes_["value"] < bytes_["high"]
    assert "3 of 6 sources" in stages["shards"]["how"]


def test_a_range_holds_the_ratio_and_every_source_leaves_no_doubt() -> None:
    pairs = [(2.0, 1.0), (6.0, 2.0), (1.0, 1.0)]
    found = sample.ratio(pairs)
    assert found.value == 9 / 4 and 1.0 <= found.low < found.value < found.high <= 3.0
    assert sample.ratio(pairs, every=True) == (9 / 4, 9 / 4, 9 / 4)


def test_a_source_is_scaled_from_the_frames_decoded_to_its_whole(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _, _ = opened(write(tmp_path, footage))
    path = sorted(footage.glob("*.mp4"))[0]
    whole = sample.measure(str(path), path.stat().st_size, loaded.stages["shards"])
    monkeypatch.setattr(sample, "FRAMES", 72)
    part = sample.measure(str(path), path.stat().st_size, loaded.stages["shards"])
    assert whole and part and part.seconds == whole.seconds
    assert 0.4 * whole.made_bytes < part.made_bytes < 2.5 * whole.made_bytes


def test_a_source_that_gives_no_clip_or_cannot_be_opened_counts_as_none(footage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(sorted(footage.glob("*.mp4"))[0], folder)
    (folder / "broken.mp4").write_bytes(b"no video" * 1000)
    found, stages = told(write(tmp_path, folder))
    broken = next(s for s in found["sources"] if s["uri"].endswith("broken.mp4"))
    assert broken["clips"] == 0 and broken["rejected"]
    assert stages["shards"]["clips"]["value"] == sum(s["clips"] for s in found["sources"]) > 0


def test_hours_of_training_are_those_of_runs_with_the_same_settings(footage: Path, tmp_path: Path) -> None:
    path = write(tmp_path, footage, launcher={"by": "torchrun", "processes": 4, "cpus": 2})
    _, nodes, store = opened(path)
    vae = next(n for n in nodes if n.name == "vae")
    trained(store, vae, [90.0, 1.0, 2.0, 3.0])  # the first step loads and compiles
    found, stages = told(path, sample=1)
    assert stages["vae"]["wall_hours"]["value"] == 7200 * 2.0 / 3600 == 4.0
    assert (stages["vae"]["wall_hours"]["low"], stages["vae"]["wall_hours"]["high"]) == (2.0, 6.0)
    assert stages["vae"]["cpu_hours"]["value"] == 4.0 * 4 * 2 and stages["vae"]["gpu_hours"] is None
    assert stages["vae"]["bytes"]["value"] == 2 * 5000, "keep_checkpoints of them"
    assert found["total"]["cpu_hours"]["value"] == 32.0 + stages["shards"]["cpu_hours"]["value"]
    # twice the steps and another rate of learning are the same work a step; another batch is not
    _, stages = told(
        write(tmp_path, footage, steps=14400, lr=0.5, launcher={"by": "torchrun", "processes": 4, "cpus": 2}), sample=1
    )
    assert stages["vae"]["wall_hours"]["value"] == 8.0
    found, stages = told(
        write(tmp_path, footage, batch=4, launcher={"by": "torchrun", "processes": 4, "cpus": 2}), sample=1
    )
    assert stages["vae"]["wall_hours"] is None and any(line.startswith("vae: not known") for line in found["unknown"])


def test_runs_on_gpus_are_priced_as_such(footage: Path, tmp_path: Path) -> None:
    path = write(tmp_path, footage)
    _, nodes, store = opened(path)
    trained(store, next(n for n in nodes if n.name == "vae"), [0.5, 0.5], gpus=1)
    found, stages = told(path, sample=1)
    assert stages["vae"]["gpu_hours"]["value"] == 1.0 == found["total"]["gpu_hours"]["value"]
    price = estimate.money(found, 0.0, 2.5)
    assert price and price.value == 2.5
    assert estimate.money({"total": {"cpu_hours": None, "gpu_hours": None}}, 1.0, 1.0) is None


def test_latents_are_counted_by_the_clip(footage: Path, tmp_path: Path) -> None:
    path = write(tmp_path, footage)
    _, nodes, store = opened(path)
    run, _ = store.open(next(n for n in nodes if n.name == "latents"), None)
    store.finish(run, {"uri": "nowhere", "metrics": {"clips": 10.0, "bytes": 5000.0}})
    _, stages = told(path, sample=10)
    assert stages["latents"]["bytes"]["value"] == pytest.approx(500.0 * stages["shards"]["clips"]["value"])


def test_hours_by_the_clip_are_those_of_the_clips_that_a_run_has_made_itself(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "measure", measured)
    path = write(tmp_path, footage)
    _, nodes, store = opened(path)
    node = next(n for n in nodes if n.name == "latents")
    hour = 3600_000

    def ran(shards: float, hours: float) -> None:
        run, _ = store.open(node, None)
        tags = store.client.get_run(run).data.tags
        start = int(tags.get(runs.RESUMED, store.client.get_run(run).info.start_time))
        for name, value in {"clips": 1000.0, "bytes": 5e6, "shards": 10.0, "encoded_shards": shards}.items():
            store.client.log_metric(run, name, value)
        store.client.set_terminated(run, "FINISHED", start + int(hours * hour))

    # one from nothing, and one that found nine of ten shards made; at a clip they are as fast
    ran(10, 10)
    ran(1, 1)
    # one that was stopped, and went on with the last shard two days later
    run, _ = store.open(node, None)
    store.client.set_terminated(run, "KILLED")
    later = runs.time.time() + 48 * 3600
    monkeypatch.setattr(runs.time, "time", lambda: later)
    for run in store.client.search_runs([store.experiment], "attributes.status = 'FINISHED'"):
        store.client.set_tag(run.info.run_id, "longtake.fingerprint", "another")
    ran(1, 1)
    _, stages = told(path, sample=10)
    assert stages["latents"]["wall_hours"]["value"] == pytest.approx(
        0.01 * stages["shards"]["clips"]["value"], rel=0.01
    )


def test_scores_and_clusters_are_counted_by_the_clip_and_by_their_share_of_a_gpu(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "SCORERS", toy_scorers.modules())
    stages = {
        "shards": yaml.safe_load(Path(write(tmp_path, footage)).read_text())["stages"]["shards"],
        "scores": {"kind": "score", "dataset": "shards", "run": {"gpus": 0.25, "workers": 2, "cpus": 3}},
        "groups": {"kind": "cluster", "dataset": "shards", "scores": "scores", "embedding": "colour.vector"},
    }
    stages["scores"]["scorers"] = {"colour": {}}
    path = tmp_path / "scored.yaml"
    path.write_text(yaml.safe_dump({"name": "priced", "workspace": str(tmp_path / "ws"), "stages": stages}))
    loaded = recipe.load(str(path))
    nodes, store = graph.build(loaded), runs.connect(loaded)
    # one run found half of its clips scored already, another all of them
    for name, metrics in (
        ("scores", {"clips": 10.0, "scored_clips": 5.0, "bytes": 5000.0}),
        ("scores", {"clips": 10.0, "scored_clips": 0.0, "bytes": 5000.0}),
        ("groups", {"clips": 10.0, "bytes": 700.0}),
    ):
        run, _ = store.open(next(n for n in nodes if n.name == name), None)
        store.client.set_terminated(run, "FINISHED")
        for metric, value in metrics.items():
            store.client.log_metric(run, metric, value)
    found = estimate.estimate(loaded, nodes, store, sample=2)
    by_name = {stage["name"]: stage for stage in found["stages"]}
    clips = by_name["shards"]["clips"]["value"]
    assert by_name["scores"]["bytes"]["value"] == pytest.approx(500 * clips)
    assert by_name["groups"]["bytes"]["value"] == pytest.approx(70 * clips)
    assert "1 runs" in by_name["scores"]["how"]
    hours = by_name["scores"]["wall_hours"]["value"]
    assert by_name["scores"]["gpu_hours"]["value"] == pytest.approx(hours * 2 * 0.25)
    assert by_name["scores"]["cpu_hours"]["value"] == pytest.approx(hours * 2 * 3)
    assert by_name["groups"]["gpu_hours"] is None


def test_stages_of_a_dataset_that_is_there_are_counted_by_its_clips_and_no_trial_touches_it(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> str:
        raise AssertionError("a trial was run")

    monkeypatch.setattr(estimate, "_run_within", refused)
    stages = {
        "scores": {"kind": "score", "dataset": dataset, "scorers": {"bars": {}}},
        "view": {"kind": "curate", "dataset": dataset, "scores": "scores", "rules": {"bars.share": {"max": 0.1}}},
    }
    path = tmp_path / "scored.yaml"
    path.write_text(yaml.safe_dump({"name": "priced", "workspace": str(tmp_path / "ws"), "stages": stages}))
    loaded = recipe.load(str(path))
    nodes, store = graph.build(loaded), runs.connect(loaded)
    clips = sum(len(index.read_all(dataset, split)) for split in schema.SPLITS)
    found = estimate.estimate(loaded, nodes, store, trial_seconds=60)
    assert [stage["clips"]["value"] for stage in found["stages"]] == [clips, clips]
    assert [line for line in found["unknown"] if "would write to a dataset that is there already" in line] == [
        f"{stage['name']}: {stage['how']}" for stage in found["stages"]
    ]
    assert not found["to_try"]
    run, _ = store.open(nodes[0], None)
    store.finish(run, {"uri": "nowhere", "metrics": {"clips": 10.0, "bytes": 5000.0}})
    found = estimate.estimate(loaded, nodes, store, trial_seconds=60)
    assert found["stages"][0]["bytes"]["value"] == pytest.approx(500 * clips)


def test_what_has_finished_costs_nothing(footage: Path, dataset: str, tmp_path: Path) -> None:
    path = write(tmp_path, footage)
    _, nodes, store = opened(path)
    run, output = store.open(nodes[0], None)
    shutil.copytree(dataset, output)
    retry.record(output)
    store.finish(run, {"uri": output})
    assert runner.finished(nodes[0], store)
    found, stages = told(path, sample=1)
    assert not stages["shards"]["todo"] and stages["shards"]["cpu_hours"] is None and found["total"]["bytes"] is None


def test_the_command_tells_the_figures_the_money_and_what_is_not_known(footage: Path, tmp_path: Path) -> None:
    path = write(tmp_path, footage)
    arguments = [path, "--sample", "1", "--cpu-hour", "1000"]
    said = CliRunner().invoke(plan, arguments, catch_exceptions=False).output
    assert "6 sources of" in said and "CPU h" in said and "money" in said and "unknown" in said and "--trial" in said, (
        said
    )
    plain = json.loads(CliRunner().invoke(plan, [*arguments, "--json"], catch_exceptions=False).output)
    assert plain["money"]["value"] == pytest.approx(1000 * plain["total"]["cpu_hours"]["value"])
    assert [s["name"] for s in plain["stages"]] == ["shards", "view", "vae", "latents"]


def test_sources_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        opened(write(tmp_path, tmp_path / "nowhere"))


def test_a_trial_leaves_out_stages_with_what_is_said_of_them_and_counts_all_checkpoints(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_store: Callable[[Path], None]
) -> None:
    import mlflow

    def tried(path: Path, _: float) -> str:
        loaded = recipe.load(str(path))
        with_store(Path(loaded.workspace))
        with monkeypatch.context() as patched:
            patched.setenv("MLFLOW_TRACKING_URI", "")
            trained(runs.connect(loaded), graph.build(loaded)[0], [1.0, 1.0])
        return ""

    monkeypatch.setattr(estimate, "_run_within", tried)
    vae = TRAINING | {"dataset": dataset, "view": None, "keep_every": 3600}
    stages = {"vae": nested(vae), "latents": {"kind": "cache_latents", "dataset": dataset, "encoder": "vae"}}
    deploy = {"resources": {"latents": {"cpus": 2}}}
    content = {"name": "priced", "workspace": str(tmp_path / "ws"), "stages": stages, "deploy": deploy}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    found, told_of = told(str(tmp_path / "r.yaml"), trial_seconds=60)
    assert told_of["vae"]["wall_hours"]["value"] == 2.0 and "a trial" in told_of["vae"]["how"]
    assert told_of["vae"]["bytes"]["value"] == (2 + 2) * 5000, "keep_checkpoints of them, and two of keep_every"
    assert [line for line in found["unknown"] if line.startswith("latents: ")]
    assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path}/ws/mlflow.db"


@pytest.mark.soak
def test_a_trial_measures_what_no_run_has_and_leaves_nothing(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, footage)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    found, stages = told(path, sample=4, trial_seconds=400)
    assert all(stages[name]["wall_hours"] for name in ("view", "vae")), found["unknown"]
    assert stages["latents"]["bytes"]["value"] > 0 and "a trial" in stages["vae"]["how"]
    # of 7200 steps, from some
    assert stages["vae"]["wall_hours"]["value"] > 7200 * 0.001 / 3600
    _, _, store = opened(path)
    assert not store.client.search_runs([store.experiment]) and not store.client.search_registered_models()
    # torch puts a cache of its own there
    assert not [p for p in scratch.iterdir() if not p.name.startswith("torchinductor")]
