"""The leaderboard on the page: what is best, what is compared with what, and videos that play in step."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromium
import judged
import pytest
import yaml
from evaluated import group, model, table, value, video, write
from priors import longtake

from longtake.datasets.errors import Failure, UserError
from longtake.infra import graph, recipe, runner, runs
from longtake.infra.report import StageRun, build, build_of_evaluation
from longtake.infra.report.embed import Pictures
from longtake.infra.report.leaderboard import best_of, leaderboard
from longtake.training.evaluation import chosen
from longtake.training.evaluation.figures import said
from longtake.training.evaluation.table import Table, read

MODELS = [model("models:/latte@champion", "a", "models:/latte/3"), model("models:/tats/2", "b"), model("/m/gan", "c")]


def page_of(folder: Path, content: dict[str, Any]) -> tuple[str, str]:
    """(the page, its words)."""
    raw = build_of_evaluation(write(folder, content)).read_text()
    body = re.sub(r"(?s)<(style|script)>.*?</\1>|<[^>]*>", " ", raw)
    return raw, " ".join(html.unescape(body).split())


@pytest.mark.parametrize(
    ("values", "better", "best"),
    [
        ([value(3, 2.5, 3.5), value(2, 1.5, 2.4)], "higher", 0),
        ([value(3, 2.5, 3.5), value(2, 1.5, 2.5)], "higher", None),  # they touch
        ([value(3, 2.5, 3.5), value(2, 1.5, 2.4)], "lower", 1),
        ([value(3, 2.5, 3.5), value(9, 2.6, 20), value(2, 1.5, 2.4)], "higher", None),
        ([value(3, 2.5, 3.5), None, value(2, 1.5, 2.4)], "higher", 0),
        ([value(3, 2.5, 3.5), None], "higher", None),  # nothing to compare with
        ([value(3, 2.5, 3.5), value(2)], "higher", None),  # of unknown error
        ([value(3, 2.5, 3.5), value(float("nan"), float("nan"), float("nan"))], "higher", None),
    ],
)
def test_best_is_only_what_is_so_beyond_its_error(values: list[Any], better: str, best: int | None) -> None:
    assert best_of(values, better) == best


def test_figures_stand_with_their_intervals_and_conditions(tmp_path: Path) -> None:
    figures = {"psnr": ("higher", {"a": value(31.25, 31, 31.5), "b": value(26.5, 26, 27)})}
    fewer = {"psnr": ("higher", {"c": value(40.125, 40, 41)})}
    groups = [group("reconstruction", figures, frames=17), group("reconstruction", fewer, "2", frames=9)]
    left_out = [{"model": 64 * letter, "measure": "debiased", "why": "no --debiased"} for letter in "abc"]
    left_out += [{"model": 64 * "c", "measure": "distance", "why": "12 <videos> are too few"}]
    raw, words = page_of(tmp_path / "<b>run", table(MODELS, groups, left_out=left_out))
    assert "31.25 31 – 31.5" in words and "best 31.25" in words and "best 26.5" not in words
    assert "best 40.125" not in words and words.index("frames 9") < words.index("40.12"), "other conditions are apart"
    assert "frames 17" in words and re.search(r"split val", words), "those of all are told once"
    assert "debiased : no --debiased" in words and "distance of gan: 12 <videos> are too few" in words
    assert "models:/latte/3" in words and "<b>run" in words and "<b>run" not in raw
    assert raw.count("<script>") == 1 and "script-src 'sha256-" in raw


def test_models_of_one_name_are_told_apart_and_curves_have_bands(tmp_path: Path) -> None:
    names = [model("/one/vae", "a"), model("/two/vae", "b")]
    curves = {"psnr_by_age": {"a": [[0.5, 30, 29, 31], [1.5, 28, None, None]], "b": [[0.5, 20, 19, 21]]}}
    _, words = page_of(tmp_path, table(names, [group("retrieval", {}, curves=curves)]))
    assert "vae (aaaaaa)" in words and "vae (bbbbbb)" in words
    drawn = next((tmp_path / "pictures").iterdir()).read_text()
    assert "var(--kept)" in drawn and "var(--dropped)" in drawn and "vae (aaaaaa)" in drawn and "#2f6fdb;" in drawn


def made(content: dict[str, Any]) -> Table:
    return Table(*(content[field] for field in Table._fields))


def test_what_shows_the_same_stands_side_by_side() -> None:
    videos = [video(letter, f"17f-s{n}", prompt=f"p{n % 3}") for letter in "ab" for n in range(6)]
    videos += [video("c", "17f-s5", prompt="p2"), video("c", "17f-alone", prompt="p9")]
    videos += [video("b", "17f-s1", file="x.mp4") | {"aspect": "fills", "seed": seed} for seed in (0, 1)]
    found = chosen.together(made(table(MODELS, [], videos)), 3)
    keys = [[row["key"] for row in each.videos] for each in found]
    assert keys == [["17f-s0"] * 2, ["17f-s1"] * 2, ["17f-s5"] * 3, ["17f-s1"], ["17f-s1"]], "of each prompt one"
    assert [row["model"][0] for row in found[2].videos] == ["a", "b", "c"]
    assert [each.aspect for each in found[2:]] == ["generates", "fills", "fills"]
    long = [video("a", f"{length}-s{n}") for length in ("1024f", "720f") for n in range(8)]
    keys = [each.videos[0]["key"] for each in chosen.together(made(table(MODELS, [], long)), 4)]
    assert keys == ["1024f-s0", "1024f-s1", "720f-s0", "720f-s1"], "of each length some"


def test_the_worst_and_the_best_are_found_by_the_figures_direction() -> None:
    videos = [video(letter, f"{n}", ssim=n) for letter in "ab" for n in range(6)]
    content = table(MODELS, [group("quality", {"ssim": ("lower", {})})], videos)
    one, two = chosen.extremes(made(content))
    assert (one.model[0], two.model[0]) == ("a", "b")
    assert [v["key"] for v in one.worst] == ["5", "4"] and [v["key"] for v in one.best] == ["0", "1"]
    few = table(MODELS, content["groups"], videos[:3])
    assert [len(e.worst) for e in chosen.extremes(made(few))] == [1], "no video is both"
    files = chosen.files(made(content))
    assert len(files) == len(set(files)) and {video["file"] for video in (*one.worst, *two.best)} <= set(files)


def test_videos_that_are_lost_or_elsewhere_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"private")
    content = table(MODELS[:1], [], [video("a", "1", file="../secret.mp4"), video("a", "2")])
    write(tmp_path / "f", content)
    (tmp_path / "f" / content["videos"][1]["file"]).unlink()
    board = leaderboard("f", tmp_path / "f", Pictures(tmp_path / "pictures"))
    assert [reel["video"] for each in board["together"] for row in each["rows"] for reel in row["reels"]] == [
        None,
        None,
    ]


def test_videos_too_large_for_a_page_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = table(MODELS, [group("q", {"ssim": ("higher", {})})], [video("a", f"{n}", ssim=n) for n in range(4)])
    monkeypatch.setattr("longtake.infra.report.leaderboard._VIDEO_BYTES", 0)
    _, words = page_of(tmp_path, content)
    assert "8 more videos would make this page too large" in words


def test_what_is_no_evaluation_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no evaluation here \(evaluation.json is missing\)"):
        build_of_evaluation(tmp_path)
    long = video("a", "1", file="a" * 5000)
    curve = group("q", {}, curves={"x": {"a": [[1]]}})
    for damaged in (
        *("{", "[]", "{}"),
        *map(
            json.dumps,
            (table([{"uri": 1}]), table(MODELS, [], [long]), table(MODELS, [curve]), table(MODELS, [{"measure": 1}])),
        ),
    ):
        (tmp_path / "evaluation.json").write_text(damaged)
        with pytest.raises(Failure, match=r"evaluation.json: .*; run the evaluation again") as e:
            build_of_evaluation(tmp_path)
        assert "\n" not in str(e.value)


def test_a_recipes_report_has_the_leaderboards_of_its_stages(tmp_path: Path) -> None:
    def stage(name: str, letter: str) -> StageRun:
        figures = {"psnr": ("higher", {letter: value(31.25, 31, 32)})}
        write(tmp_path / name / "evaluation", table([model(f"models:/{name}/1", letter)], [group("r", figures)]))
        return StageRun(name, "evaluate", "FINISHED", False, 1.0, "1", "", {}, {}, {}, tmp_path / name)

    raw = build(tmp_path / "out", "r", [stage("first", "a"), stage("second", "b")], None, None, "http://x").read_text()
    assert raw.count('class="board"') == 2 and 'href="#board-2">Leaderboard second' in raw
    assert raw.count("<script>") == 1 and "31.25" in raw


@pytest.mark.usefixtures("own_store")
def test_the_command_writes_the_page_and_a_run(
    tmp_path: Path, with_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_store(tmp_path)
    folder = tmp_path / "judged"
    made = table([model("/m/gan", "c")], [group("q", {"ssim": ("higher", {"c": value(1, 0, 2)})})])
    monkeypatch.setattr("longtake.training.evaluation.run.evaluate", lambda *_, **__: read(write(folder, made)))
    arguments = ["evaluate", "/m/gan", "--dataset", "/d", "--out", str(folder)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(UserError, match="no such database"):
        longtake(*arguments)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said = longtake(*arguments).stdout
    assert f"{folder / 'report.html'}   <- open this in a browser" in said
    run = runs.client_of(uri).get_run(re.findall(r"^run (\w+) in ", said, re.M)[0])
    assert run.info.run_name == "judged" and run.info.artifact_uri.startswith(f"{tmp_path}/artifacts")
    assert (Path(run.info.artifact_uri) / "report.html").read_bytes() == (folder / "report.html").read_bytes()


@pytest.mark.usefixtures("own_store", "one_thread")
def test_a_recipe_that_evaluates_has_it_in_its_report_and_in_mlflow(
    tmp_path: Path, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path / "runs")
    suite = judged.suite(measures=("reconstruction",)).model_dump(mode="json", exclude_unset=True)
    folders = judged.models(tmp_path / "models")
    stage = {
        "kind": "evaluate",
        "models": [str(folders / "vae"), str(folders / "vqgan")],
        "dataset": judged.dataset(tmp_path / "squares"),
        "suite": suite,
    }
    content = {"name": "judged", "workspace": str(tmp_path / "runs"), "stages": {"judge": stage}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    loaded = graph.pin(recipe.load(str(tmp_path / "recipe.yaml")))
    runner.run_stage(loaded, "judge")
    nodes, store = graph.build(loaded), runs.connect(loaded)
    parent = store.open_parent(loaded, "whole")
    page = runner.make_report(loaded, nodes, store, parent, set()).read_text()
    assert 'class="board"' in page and "vqgan" in page and page.count("<video") >= 2
    run = store.find(nodes[0].fingerprint)
    assert run
    below = store.client.search_runs([store.experiment], f"tags.`mlflow.parentRunId` = '{run.id}'")
    assert len(below) == 2 and all("psnr_low" in each.data.metrics for each in below)


@chromium.there
def test_videos_play_in_step(tmp_path: Path) -> None:
    """Of other lengths, too; all that the browser does is allowed by the page itself, on a phone as well."""
    videos = [video(letter, "1", prompt="a ball", ssim=1.0) for letter in "abc"]
    curves = {"c": {"a": [[0, 1, 0, 2], [1, 1, 0, 2]]}}
    ssim = {"ssim": ("higher", {letter: value(1, 0, 2) for letter in "abc"})}
    content = table(MODELS, [group("q", ssim, curves=curves)], videos)
    page = build_of_evaluation(write(tmp_path / "f", content))
    with chromium.opened(tmp_path / "profile", (390, 800)) as driver:
        driver.get(page.as_uri())
        all_of = "[...document.querySelectorAll('.step video')]"
        assert chromium.until(driver, f"{all_of}.length === 3 && {all_of}.every(v => v.readyState >= 2)")
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert driver.execute_script("return document.images.length && [...document.images].every(i => i.naturalWidth)")
        driver.find_element("css selector", ".player button").click()
        chromium.until(driver, f"{all_of}.every(v => v.currentTime > 0.4)")
        spread = f"(t => Math.max(...t) - Math.min(...t))({all_of}.map(v => v.currentTime))"
        driver.execute_script(f"{all_of}[0].currentTime = 0")
        assert chromium.until(driver, f"{spread} < 0.1"), "one that falls behind is brought back"
        driver.find_element("css selector", ".player button").click()
        assert driver.execute_script(f"return {all_of}.every(v => v.paused)")
        times = chromium.until(driver, f"{all_of}.every(v => !v.seeking) && {all_of}.map(v => v.currentTime)")
        assert max(times) - min(times) < 0.01, "paused on the same frame"
        driver.execute_script(
            "const bar = document.querySelector('.player input'); bar.value = 1; bar.dispatchEvent(new Event('input'))"
        )
        assert chromium.until(driver, f"Math.abs({all_of}[2].currentTime - 4) < 0.1")
        assert driver.execute_script(f"return {all_of}[0].currentTime <= {all_of}[0].duration"), "it waits at its end"
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_only_sizes_are_written_as_sizes() -> None:
    assert said({"size": [64, 96], "videos": [{"seeds": [0, 1]}]}) == "size 64×96, videos seeds 0, 1"
