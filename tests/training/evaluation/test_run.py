"""An evaluation: models of four families in one table, each result kept, and only figures of equal conditions together."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import heard
import judged
import pytest
import torch
import toy_levels

from longtake.datasets.errors import Failure, UserError
from longtake.training.evaluation import evaluate as stage
from longtake.training.evaluation import peak, run, subject, table
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Networks, Suite
from longtake.training.evaluation.table import Table

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("vae", "latte", "tats", "mavin")


def evaluate(
    models: Path, names: Any, squares: str, folder: Path, suite: Suite | None = None, **networks: str
) -> Table:
    uris = [str(models / name) for name in names]
    return run.evaluate(uris, squares, None, suite or judged.suite(), Networks(**networks), folder, lambda _: None)


def values(made: Table, measure: str, figure: str) -> dict[str, Any]:
    """The values of a figure by the names of the models' folders."""
    names = {model["digest"]: Path(model["uri"]).name for model in made.models}
    [group] = [group for group in made.groups if group["measure"] == measure]
    return {names[digest]: value for digest, value in group["figures"][figure]["values"].items()}


def test_a_gpu_that_is_full_fails_a_stage_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any) -> Table:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "evaluate", fill)
    config = stage.Config(kind="evaluate", models=("a",), dataset="clips")
    with pytest.raises(Failure, match=r"memory is too small for this; lower suite\.chunk"):
        stage.run(config, {"models.0": "models:/a/1", "dataset": "clips"}, str(tmp_path))


def test_models_of_four_families_are_measured_side_by_side(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    made = evaluate(models, FAMILIES, squares, tmp_path)
    assert [Path(model["uri"]).name for model in made.models] == list(FAMILIES)
    found = {group["measure"]: sorted(values(made, group["measure"], "level")) for group in made.groups}
    assert found == {"fills_level": ["mavin"], "generates_level": ["latte", "tats"], "reconstructs_level": ["vae"]}
    value = values(made, "generates_level", "level")["latte"]
    assert value["low"] < value["value"] < value["high"]
    assert (value["units"], value["clips"]) == (3, 3)
    assert made == table.read(tmp_path)
    assert "level (lower is better)" in table.printed(made)

    # each video is named with what was asked for and what it got, and lies there
    ours = [video for video in made.videos if video["aspect"] == "generates" and video["class"]]
    assert [video["class"] for video in ours] == ["cat", "dog", "cat"]
    assert all((tmp_path / video["file"]).is_file() for video in made.videos)
    assert ours[0]["scores"].keys() == {"level"}


@pytest.mark.parametrize("call", [1, 3])
def test_a_stopped_evaluation_goes_on_and_has_the_same_table(
    models: Path, squares: str, tmp_path: Path, toys: list[str], call: int
) -> None:
    whole = evaluate(models, FAMILIES, squares, tmp_path / "whole")
    toys.clear()
    toy_levels.STOP_AT.append(call)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, FAMILIES, squares, tmp_path / "stopped")
    toy_levels.STOP_AT.clear()
    assert evaluate(models, FAMILIES, squares, tmp_path / "stopped") == whole
    assert len(toys) == len(FAMILIES) + 1  # only the one that was stopped twice
    names = ("whole", "stopped")
    assert len({(tmp_path / name / table.FILE).read_bytes() for name in names}) == 1


def test_a_model_that_comes_later_joins_those_that_are_there(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    evaluate(models, ["latte"], squares, tmp_path)
    made = evaluate(models, ["tats"], squares, tmp_path)
    assert toys == ["generates latte", "generates tats"]
    assert values(made, "generates_level", "level").keys() == {"latte", "tats"}


def test_a_model_that_was_stopped_half_way_is_in_the_tables_of_others(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    suite = judged.suite(videos=[{"frames": frames, "seeds": (0, 1)} for frames in (9, 5)])
    toy_levels.STOP_AT.append(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, ["latte"], squares, tmp_path, suite)
    toy_levels.STOP_AT.clear()
    made = evaluate(models, ["tats"], squares, tmp_path, suite)
    assert sorted(len(group["figures"]["level"]["values"]) for group in made.groups) == [1, 2]
    assert {Path(model["uri"]).name for model in made.models} == {"tats", "latte"}


def test_a_result_whose_video_is_lost_is_measured_again(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    made = evaluate(models, ["latte"], squares, tmp_path)
    (tmp_path / made.videos[0]["file"]).unlink()
    assert evaluate(models, ["latte"], squares, tmp_path).videos == made.videos
    assert (tmp_path / made.videos[0]["file"]).is_file()
    assert toys == ["generates latte"] * 2


def test_figures_of_other_conditions_are_not_put_beside_each_other(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    clips = {"frames": 9, "size": (32, 32), "most": 4}
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"clips": clips | {"frames": 5}},
        {"clips": clips | {"size": (16, 16)}},
        {"clips": clips | {"most": 3}},
        {"clips": clips | {"fps": 6.0}},
        {"videos": [{"frames": 5, "seeds": (0, 1, 2)}]},
        {"settings": {"temperature": 0.5}},
        {"resamples": 200},
    ]
    digests = {evaluate(models, ["latte"], squares, tmp_path).groups[0]["digest"]}
    for number, changes in enumerate(others, 2):
        made = evaluate(models, ["tats"], squares, tmp_path, judged.suite(**changes))
        assert values(made, "generates_level", "level").keys() == {"tats"}, changes
        digests.add(made.groups[0]["digest"])
        assert len(digests) == number


def test_the_conditions_say_what_a_figure_was_measured_on(models: Path, squares: str, tmp_path: Path) -> None:
    made = evaluate(models, ["vae"], squares, tmp_path, judged.suite(measures=("reconstruction",)))
    conditions = made.groups[0]["conditions"]
    assert {name: conditions[name] for name in ("split", "clips", "frames", "fps", "size", "seed", "measure")} == {
        **{"split": "val", "clips": 4, "frames": 9, "fps": 12.0, "size": [32, 32], "seed": 0},
        "measure": "reconstruction",
    }
    assert conditions["dataset"] == squares
    assert conditions["sources"] == len({key.partition("-")[0] for key in _keys(made)})


def _keys(made: Table) -> list[str]:
    return [video["key"] for video in made.videos]


def test_the_same_model_by_two_names_is_measured_once(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    lines: list[str] = []
    uris = [str(models / "latte"), f"{models}/../{models.name}/latte"]
    made = run.evaluate(uris, squares, None, judged.suite(), Networks(), tmp_path, lines.append)
    assert len(made.models) == 1
    assert any("is the same model as" in line for line in lines)


def test_a_model_is_gone_before_the_next_one_is_loaded(
    models: Path, squares: str, tmp_path: Path, toys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, alive = subject.load, list[weakref.ref[torch.nn.Module]]()

    def load(uri: str) -> Subject:
        assert not any(module() for module in alive)
        found = plain(uri)
        alive.append(weakref.ref(found.module))
        return found

    monkeypatch.setattr(subject, "load", load)
    evaluate(models, ["latte", "mavin", "tats"], squares, tmp_path)
    assert len(alive) == 3


def test_a_measure_without_its_network_is_left_out_and_said(models: Path, squares: str, tmp_path: Path) -> None:
    made = evaluate(models, ["vae"], squares, tmp_path, judged.suite(measures=("lpips", "reconstruction")))
    assert [(each["measure"], each["why"]) for each in made.left_out] == [
        ("lpips", "needs a network that is not named: perceptual")
    ]
    assert [group["measure"] for group in made.groups] == ["reconstruction"]


def test_an_autoencoder_of_sound_has_no_measure_and_one_line(squares: str, tmp_path: Path) -> None:
    folder = heard.saved(heard.vqgan(), tmp_path / "sound")
    with pytest.raises(UserError, match=r"^nothing can be measured: none of these measures is of a VQGAN of sound$"):
        run.evaluate([str(folder)], squares, None, judged.suite(), Networks(), tmp_path / "out", lambda _: None)


def test_what_a_model_refuses_is_left_out_and_others_go_on(
    models: Path, squares: str, tmp_path: Path, toys: list[str]
) -> None:
    suite = judged.suite(gaps={"frames": 4, "context": 1})
    made = evaluate(models, ["mavin", "latte"], squares, tmp_path, suite)
    [left] = made.left_out
    assert "the model sees 1 frames at least; set the suite's gaps.context to 2" in left["why"]
    assert values(made, "generates_level", "level").keys() == {"latte"}
    assert "left out" in table.printed(made)


def test_a_model_that_the_memory_is_too_small_for_is_measured_otherwise(
    models: Path, squares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(peak, "subprocess", SimpleNamespace(run=lambda *_, **__: killed))
    made = evaluate(models, ["vae"], squares, tmp_path, judged.suite(measures=("memory", "reconstruction")))
    assert [group["measure"] for group in made.groups] == ["reconstruction"]
    [left] = made.left_out
    assert left["measure"] == "memory" and "vae: signal 9 ended the process that measures it" in left["why"]


@pytest.mark.parametrize(
    ("changes", "networks", "said"),
    [
        ({"measures": ("fidelity",)}, {}, "measures: there is no 'fidelity'; there are"),
        ({"settings": {"stepz": 3}}, {}, "suite: settings: there is no 'stepz'; there are"),
        ({"settings": {"solver": "magic"}}, {}, "suite: settings: solver: 'magic' is neither euler nor unipc"),
        ({"settings": {"steps": "fast"}}, {}, "suite: settings: steps: 'fast' is no whole number from 0 on"),
        ({"settings": {"steps": True}}, {}, "suite: settings: steps: True is no whole number from 0 on"),
        ({"settings": {"shift": [1, 2]}}, {}, "suite: settings: shift: .* is no number from 0 on"),
        ({"settings": {"shift": 0}}, {}, "suite: settings: shift: 0 is no number above 0"),
        ({"settings": {"temperature": float("nan")}}, {}, "suite: settings: temperature: nan is no number from 0 on"),
        ({"settings": {"backward": 1}}, {}, "suite: settings: backward: 1 is no true or false"),
        ({"settings": {"mixer": 1}}, {}, "suite: settings: mixer: 1 is no text"),
        ({"measures": ("reconstruction_distance",)}, {"features": "."}, "no such file"),
        (
            {"measures": ("reconstruction_distance",)},
            {"features": "refuses.pt"},
            r"features: .*videos of 9 .*never\)",
        ),
        ({"measures": ("lpips",)}, {"perceptual": "refuses.pt"}, r"perceptual: .* takes no frames of 32x32 .*never\)"),
        ({"measures": ("lpips",)}, {"perceptual": "videos.pt"}, "takes whole videos; a perceptual loss needs"),
        ({"measures": ("lpips",)}, {"perceptual": "nowhere.pth"}, "nowhere.pth: no such file"),
    ],
)
def test_bad_input_is_one_line(
    models: Path, squares: str, tmp_path: Path, changes: dict[str, Any], networks: dict[str, str], said: str
) -> None:
    torch.jit.script(_OfVideos()).save(str(tmp_path / "videos.pt"))
    torch.jit.script(_Refuses()).save(str(tmp_path / "refuses.pt"))
    paths = {name: str(tmp_path / path) for name, path in networks.items()}
    with pytest.raises(UserError, match=said) as error:
        evaluate(models, ["vae"], squares, tmp_path / "out", judged.suite(**changes), **paths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("measure", "networks", "said"),
    [
        ("clip_rs", {"embedder": "refuses.pt"}, "^embedder: .* takes no frames of 64x64"),
        ("debiased", {"debiased": "refuses.pt"}, "^debiased: .* takes no videos of 9 frames"),
        ("background", {"dual": "nowhere"}, "^dual: .*no such folder"),
        ("agreement", {"dual": "."}, "^dual: .*no model here"),
    ],
)
def test_a_generators_network_is_checked_before_anything_is_made(
    models: Path, squares: str, tmp_path: Path, measure: str, networks: dict[str, str], said: str
) -> None:
    torch.jit.script(_Refuses()).save(str(tmp_path / "refuses.pt"))
    paths = {name: str(tmp_path / path) for name, path in networks.items()}
    with pytest.raises(UserError, match=said):
        evaluate(models, ["latte", "mavin"], squares, tmp_path / "out", judged.suite(measures=(measure,)), **paths)
    assert not (tmp_path / "out").exists()


def test_models_and_clips_that_are_not_there_are_one_line(models: Path, squares: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        evaluate(models, ["nowhere"], squares, tmp_path)
    with pytest.raises(UserError, match="models: there are none"):
        evaluate(models, [], squares, tmp_path)


def test_where_no_clip_is_long_enough_for_any_measure_it_fails_and_says_what_to_change(
    models: Path, squares: str, tmp_path: Path
) -> None:
    long = judged.suite(clips={"frames": 99, "size": (32, 32)}, measures=("lpips", "reconstruction"))
    with pytest.raises(UserError, match=r"^nothing can be measured: ") as error:
        evaluate(models, ["vae"], squares, tmp_path, long)
    why = "no held-out clip has 99 frames of 32x32 at 12 a second: the longest held-out clip lasts 3 s"
    assert why in str(error.value)
    assert "lower suite.clips.size or suite.clips.frames; needs a network that is not named" in str(error.value)
    assert not (tmp_path / "evaluation.json").exists()


def test_a_damaged_result_is_named(models: Path, squares: str, tmp_path: Path, toys: list[str]) -> None:
    evaluate(models, ["latte"], squares, tmp_path)
    [path] = (tmp_path / "results").glob("*/generates_level-*.json")
    kept = json.loads(path.read_bytes())
    rows = {**kept["result"], "rows": [["a", "b", {"level": "dark"}]]}
    outside = [{**kept["videos"][0], "file": "../../etc/passwd"}]
    for content in (
        {"format": 1},
        {**kept, "model": "f" * 64},
        {**kept, "digest": "0" * 64},
        {**kept, "result": rows},
        {**kept, "videos": [{"key": "a"}]},
        {**kept, "videos": outside},
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(Failure, match=r"damaged .*; delete it and run the same command again"):
            evaluate(models, ["latte"], squares, tmp_path)
    path.write_text(json.dumps(kept))
    (path.parent / run.MODEL).write_text("{}")
    with pytest.raises(Failure, match=r"model.json: damaged \(no digest\); delete its folder, or evaluate its model"):
        evaluate(models, ["tats"], squares, tmp_path)


class _Refuses(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim > 0:
            raise ValueError("never")
        return x


class _OfVideos(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean(dim=[2, 3, 4])
