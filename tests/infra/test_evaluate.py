"""`longtake evaluate` and the stage of that name: one table of models of several families, whatever stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluated
import judged
import mlflow
import pytest
import yaml
from priors import longtake

from longtake.datasets.errors import UserError
from longtake.infra import graph, recipe, runner
from longtake.infra.cli.evaluate import suite_of
from longtake.training import registry
from longtake.training.evaluation import evaluate as stage
from longtake.training.evaluation import run, table
from longtake.training.evaluation.suite import Networks, Suite, builtin
from longtake.training.registry import aliases, log

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("vae", "vqgan", "latte", "tats", "mavin")
SMALL = ("clips.frames=9", "clips.size=[32,32]", "clips.most=3", "videos=[{frames: 9, seeds: [0, 1]}]", "resamples=100")
CHEAP = "reconstruction,lpips"  # measures that are quick for every model


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    return judged.dataset(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged.models(tmp_path_factory.mktemp("models"))


def options(squares: str, out: Path, measures: str = CHEAP) -> list[Any]:
    small = [part for setting in SMALL for part in ("--set", f"suite.{setting}")]
    return ["--dataset", squares, "--out", out, "--measures", measures, *small]


def test_one_command_measures_models_and_prints_their_table(models: Path, squares: str, tmp_path: Path) -> None:
    folders = [models / name for name in FAMILIES]
    said = longtake("evaluate", *folders, *options(squares, tmp_path / "out")).stdout
    made = table.read(tmp_path / "out")
    assert [Path(model["uri"]).name for model in made.models] == list(FAMILIES)
    [group] = made.groups
    assert group["figures"]["psnr"]["values"].keys() == {made.models[0]["digest"], made.models[1]["digest"]}
    assert "reconstruction: 3 clips of" in said
    assert "psnr (higher is better)" in said
    assert "left out: lpips of vae, vqgan: needs a network that is not named: perceptual" in said
    assert str(tmp_path / "out" / table.FILE) in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--suite", "longer"],
            "--suite: there is no 'longer'; there are default, gap, long, recall, text, or name a file",
        ),
        (["--suite", "nowhere.yaml"], "--suite: nowhere.yaml: no such file"),
        (["--suite", __file__], "--suite: .*not valid YAML"),
        (["--set", "clips.most=3"], "--set clips.most=3: write suite.KEY=VALUE"),
        (["--set", "suite.clip.most=3"], "suite.clip: unknown key"),
        (["--set", "suite.clips.most=0"], "suite.clips.most: "),
        (["--set", "suite.videos=[{frames: 3, seconds: 4}]"], "videos: give frames or seconds, one of them"),
        (["--set", "suite.videos=[{frames: 3, seeds: [1, 2, 1]}]"], "seeds: 1 is there twice"),
        (["--set", "suite.videos=[{frames: 3, seeds: [-1]}]"], "suite.videos.0.seeds.0: .*not -1"),
        (["--set", "suite.videos=[{frames: 3, seeds: []}]"], "suite.videos.0.seeds: "),
        (["--set", "suite.videos=[{frames: 1000000000000}]"], "suite.videos.0.frames: "),
        (["--set", "suite.videos=[{seconds: .inf}]"], "suite.videos.0.seconds: "),
        (["--set", "suite.seconds=.inf"], "suite.seconds: "),
        (["--set", "suite.seed=1000000000000000000000"], "suite.seed: "),
        (["--set", "suite.resamples=1000000000000"], "suite.resamples: "),
        (["--set", "suite.gaps.draws=1000000000000"], "suite.gaps.draws: "),
        (["--set", "suite.clips.size=[0, 32]"], "suite.clips.size.0: "),
        (["--measures", ""], "suite.measures: "),
        (["--measures", "psnr"], "measures: there is no 'psnr'; there are"),
        (["--out", "s3://bucket/x"], "--out: s3://bucket/x: is elsewhere; name a folder of this machine"),
        (["--out", __file__], "is a file; name a folder"),
        (["--out", f"{__file__}/out"], "is below the file .*; name a folder"),
        (["--out", "/proc/out"], "--out: /proc/out: cannot be written .*; name another folder"),
        (["--view", "none"], "no view none"),
    ],
)
def test_a_mistake_is_one_line(
    models: Path, squares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        longtake("evaluate", models / "vae", "--dataset", squares, *arguments)
    assert "\n" not in str(error.value)


def test_a_registered_model_needs_its_store(squares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="models:/x@champion: MLFLOW_TRACKING_URI is not set"):
        longtake("evaluate", "models:/x@champion", "--dataset", squares)


@pytest.mark.usefixtures("own_store")
def test_a_registered_model_is_measured_by_its_alias_beside_a_folder(
    models: Path, squares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))
    with aliases.run_in(log.experiment("trained", f"{tmp_path}/artifacts"), "vae") as run_id:
        registry.register(models / "vae", "pv-vae", run_id)
    aliases.put("pv-vae", "champion", "1")
    out = tmp_path / "out"
    command = ["evaluate", "models:/pv-vae@champion", models / "vqgan", *options(squares, out, "reconstruction")]
    said = longtake(*command).stdout

    made = table.read(out)
    registered, folder = made.models
    assert (registered["uri"], registered["pinned"]) == ("models:/pv-vae@champion", "models:/pv-vae/1")
    assert made.groups[0]["figures"]["psnr"]["values"].keys() == {registered["digest"], folder["digest"]}
    assert "pv-vae@champion" in said and (out / "report.html").is_file()

    # another name of it is the same model, and what is there is not measured again
    again = longtake(*("models:/pv-vae/1" if part == command[1] else part for part in command))
    assert "models:/pv-vae/1: reconstruction: is there" in again.stderr
    assert table.read(out).groups == made.groups

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("evaluations")
    assert experiment
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"out", "models:/pv-vae@champion", "models:/pv-vae/1", str(models / "vqgan")}
    value = made.groups[0]["figures"]["psnr"]["values"][registered["digest"]]
    assert runs["models:/pv-vae@champion"].data.metrics["psnr_low"] == value["low"]


@pytest.mark.usefixtures("own_store")
def test_an_alias_that_moves_meanwhile_names_the_version_that_it_named_first(
    models: Path, squares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))
    with aliases.run_in(log.experiment("trained", f"{tmp_path}/artifacts"), "codecs") as run_id:
        registry.register(models / "vae", "codec", run_id)
    with aliases.run_in(log.experiment("trained", f"{tmp_path}/artifacts"), "codecs") as run_id:
        registry.register(models / "vqgan", "codec", run_id)
    aliases.put("codec", "champion", "1")

    uris, lines = [str(models / "vqgan"), "models:/codec@champion"], list[str]()

    def say(line: str) -> None:
        lines.append(line)
        aliases.put("codec", "champion", "2")

    suite = judged.suite(measures=("reconstruction",))
    made = run.evaluate(uris, squares, None, suite, Networks(), tmp_path / "out", say)
    assert lines == [f"{uri}: reconstruction" for uri in uris]
    folder, registered = made.models
    assert registered["pinned"] == "models:/codec/1"
    psnr = made.groups[0]["figures"]["psnr"]["values"]
    assert psnr[registered["digest"]]["value"] != psnr[folder["digest"]]["value"]


def test_suites_of_the_package_and_of_files(tmp_path: Path) -> None:
    suites = {name: suite_of(name) for name in builtin()}
    assert {"default", "gap", "long", "recall", "text"} <= suites.keys()
    assert suites["long"].videos[0].frames == 1024
    assert suites["long"].videos[1].seconds == 60
    assert len(suites["text"].prompts) * len(suites["text"].videos[0].seeds) == 64
    path = tmp_path / "own.yaml"
    path.write_text("clips: {frames: 5}\nprompts: [a dog]\n")
    assert suite_of(str(path), ("suite.clips.most=7",)) == Suite.model_validate(
        {"clips": {"frames": 5, "most": 7}, "prompts": ["a dog"]}
    )


# The stage.


def written(folder: Path, squares: str, models: Sequence[str], **changes: Any) -> recipe.Recipe:
    suite = judged.suite(measures=("reconstruction",), **changes).model_dump(mode="json", exclude_unset=True)
    stages = {"judge": {"kind": "evaluate", "models": list(models), "dataset": squares, "suite": suite}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "judged", "workspace": str(folder / "runs"), "stages": stages}))
    return recipe.load(str(path))


@pytest.mark.usefixtures("own_store")
def test_a_stage_evaluates_and_is_reused(
    models: Path, squares: str, tmp_path: Path, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path / "runs")
    loaded = written(tmp_path, squares, [str(models / "vae"), str(models / "vqgan")])
    [node] = graph.build(graph.pin(loaded))
    assert list(node.inputs) == ["models.0", "models.1", "dataset"]
    made = runner.run_stage(graph.pin(loaded), "judge")
    assert made["uri"] == node.output
    found = table.read(Path(node.output))
    assert made["metrics"]["psnr.1"] == found.groups[0]["figures"]["psnr"]["values"][found.models[1]["digest"]]["value"]
    assert stage.complete(node.output)
    assert runner.run_stage(graph.pin(loaded), "judge") == {"uri": node.output}
    (Path(node.output) / found.videos[0]["file"]).unlink()
    assert not stage.complete(node.output)


def test_a_figure_of_videos_of_two_lengths_is_two_metrics() -> None:
    groups = [
        evaluated.group("drift", {"drift": ("lower", {"a": evaluated.value(level)})}, digest=digest, videos=[length])
        for digest, length, level in (("1", {"frames": 1024}, 0.25), ("2", {"seconds": 60}, 0.5))
    ]
    groups.append(evaluated.group("motion", {"speed_distance": ("lower", {"a": evaluated.value(0.125)})}))
    made = table.Table([evaluated.model("vae", "a")], groups, [], [])
    figures = {"drift.drift.11111111.0": 0.25, "drift.drift.22222222.0": 0.5, "speed_distance.0": 0.125}
    assert stage.metrics(made) == {"models": 1.0} | figures


def test_each_model_of_a_list_is_an_input_whose_stage_may_be_renamed(squares: str, tmp_path: Path) -> None:
    def nodes(first: str, second: str, order: Sequence[str], steps: int = 1) -> dict[str, graph.Node]:
        train = {"kind": "pretrain_vae", "name": "vae", "dataset": squares, "steps": steps}
        stages = {first: train, second: train | {"steps": 2}}
        stages["judge"] = {"kind": "evaluate", "models": [*order, "models:/other/3"], "dataset": squares}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"name": "judged", "workspace": str(tmp_path), "stages": stages}))
        return {node.name: node for node in graph.build(recipe.load(str(path)))}

    found = nodes("a", "b", ["a", "b"])
    assert set(found["judge"].upstream) == {"a", "b"}
    assert found["judge"].inputs == {
        "models.0": "a",
        "models.1": "b",
        "models.2": "models:/other/3",
        "dataset": squares,
    }
    assert nodes("c", "d", ["c", "d"])["judge"].output == found["judge"].output
    assert nodes("a", "b", ["b", "a"])["judge"].output != found["judge"].output
    assert nodes("a", "b", ["a", "b"], steps=3)["judge"].output != found["judge"].output
    with pytest.raises(UserError, match=r"stages.judge.models.0: there is no stage 'x'"):
        nodes("a", "b", ["x"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": []}, r"stages.judge.models: "),
        ({"suite": "longest"}, "there is no 'longest'; there are"),
        ({"networks": {"feature": "x.pt"}}, r"stages.judge.networks.feature: unknown key"),
    ],
)
def test_a_wrong_setting_of_the_stage_is_one_line(
    squares: str, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    stages = {"judge": {"kind": "evaluate", "models": ["models:/x/1"], "dataset": squares} | changes}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "judged", "workspace": str(tmp_path), "stages": stages}))
    with pytest.raises(UserError, match=says):
        recipe.load(str(path))


def test_its_suite_may_be_one_of_the_package() -> None:
    config = stage.Config.model_validate(
        {"kind": "evaluate", "models": ["models:/x/1"], "dataset": "d", "suite": "long"}
    )
    assert config.suite == suite_of("long")


# A process that is killed.


def killed(command: Sequence[str], out: Path, results: int) -> bool:
    """Start an evaluation and kill it when so many results are there; whether it was killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if len([*out.glob("results/*/*-*.json"), *out.glob("videos/*/*/video.json")]) >= results:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    return False


@pytest.mark.soak
def test_an_evaluation_that_is_killed_again_and_again_has_the_same_table(
    models: Path, squares: str, tmp_path: Path
) -> None:
    script = "import sys; from longtake.infra.cli import main; main()"

    def command(out: Path) -> list[str]:
        folders = [str(models / name) for name in FAMILIES]
        measures = "reconstruction,diversity,gaps,vbench"
        arguments = ["evaluate", *folders, *map(str, options(squares, out, measures))]
        return [sys.executable, "-c", script, *arguments]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    assert all(killed(command(tmp_path / "killed"), tmp_path / "killed", results) for results in (2, 8, 14))
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)
    whole, found = (json.loads((tmp_path / name / table.FILE).read_text()) for name in ("whole", "killed"))
    assert found == whole
