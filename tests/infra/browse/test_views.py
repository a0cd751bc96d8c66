"""Views saved from the page: the same as those of the recipe that the page shows, and nothing else is written."""

import subprocess
import sys
from pathlib import Path

import browsed
import pytest
import scored

from longtake.datasets import clusters, compact, score_columns, view
from longtake.infra import yaml_text
from longtake.infra.browse import library
from longtake.pipeline.stages import curate

RULES = {
    "rules": {"motion": {"min": 0.1}, "flow.camera": {"max": 0.8}, "seconds": {"max": 3}},
    "labels": {
        "flow.move": {"only": ["red", "blue"]},
        "label": {"only": ["archery", "juggling"], "never": ["surfing"]},
    },
    "exact_duplicates": False,
}
WHERE = [
    {"field": "motion", "min": 0.1},
    {"field": "flow.camera", "max": 0.8},
    {"field": "flow.move", "any": ["red", "blue"]},
    {"field": "label", "any": ["archery", "juggling"], "none": ["surfing"]},
]


@pytest.fixture
def opened(tmp_path):
    """A dataset in its workspace with a record of its scores, and a client that may write."""
    dataset = browsed.make_dataset(tmp_path / "shards/0123456789abcdef", 300)
    columns = scored.write_columns(
        dataset, {"flow": {"camera": "number", "move": "label"}, "light": {"mean": "number"}}
    )
    scored.write_record(str(tmp_path / "scores/0123456789abcdef"), dataset, {"flow": columns["flow"]})
    return dataset, browsed.client_of(library.load(dataset), writable=True)


def test_a_view_is_that_of_the_recipe_byte_for_byte(opened):
    dataset, client = opened
    made = client.post("/api/view", json={"name": "chosen", **RULES}).json()
    ((name, stage),) = yaml_text.parse(made["recipe"], "the page").items()
    config = curate.Config.model_validate(stage)
    assert (name, config.scores) == ("chosen", str(Path(dataset).parents[1] / "scores/0123456789abcdef"))
    again = curate.run(config, {"dataset": dataset, "scores": config.scores}, "again")
    assert Path(again["uri"]).read_bytes() == Path(made["uri"]).read_bytes()
    assert made["uri"] == f"{dataset}/views/chosen.parquet"
    assert view.stood_on(made["uri"]).keys() == {"flow"}
    assert made["kept"] + sum(each["count"] for each in made["dropped"]) == 300


def test_a_view_keeps_what_the_filters_show(opened):
    _, client = opened
    made = client.post("/api/view", json={"name": "chosen", **RULES}).json()
    query = client.post("/api/query", json={"where": WHERE}).json()
    seen = client.post("/api/query", json={"where": [{"view": "chosen"}]}).json()
    both = client.post("/api/query", json={"where": [*WHERE, {"view": "chosen"}]}).json()
    assert made["kept"] == query["total"] == seen["total"] == both["total"] > 0
    assert "chosen" in {each["name"] for each in client.get("/api/dataset").json()["views"]}


def test_lines_without_a_record_say_which_columns_they_need(opened):
    _, client = opened
    lines = client.post("/api/recipe", json={"name": "bright", "rules": {"light.mean": {"min": 0.5}}}).json()["recipe"]
    assert "name the `score` stage" in lines and "light: score-light-" in lines
    assert yaml_text.parse(lines, "the page")["bright"]["rules"] == {"light.mean": {"min": 0.5}}
    # the page has the column itself
    assert client.post("/api/view", json={"name": "bright", "rules": {"light.mean": {"min": 0.5}}}).status_code == 200


def test_without_rules_the_defaults_of_the_stage_do_not_come_back(opened):
    _, client = opened
    made = client.post("/api/view", json={"name": "all", "exact_duplicates": False}).json()
    assert made["kept"] == 300


def test_seconds_become_frames_and_keep_what_the_filter_shows(opened):
    dataset, client = opened
    assert set(compact.table(dataset, "train")["fps"].to_pylist()) == {12.0}
    for bound, frames in (
        ({"min": 2.0}, {"min": 24}),
        ({"max": 1.99}, {"max": 23}),
        ({"min": 1.99, "max": 2.01}, {"min": 24, "max": 24}),
    ):
        lines = client.post("/api/recipe", json={"name": "a", "rules": {"seconds": bound}}).json()["recipe"]
        assert yaml_text.parse(lines, "the page")["a"]["rules"] == {"frame_count": frames}


def test_bounds_of_seconds_and_of_frames_hold_both(opened):
    _, client = opened
    rules = {"frame_count": {"min": 20, "max": 30}, "seconds": {"min": 1.0, "max": 2.0, "missing": "drop"}}
    for each in (rules, dict(reversed(rules.items()))):
        lines = client.post("/api/recipe", json={"name": "a", "rules": each}).json()["recipe"]
        made = yaml_text.parse(lines, "the page")["a"]["rules"]
        assert made == {"frame_count": {"min": 20, "max": 24, "missing": "drop"}}
    answer = client.post("/api/recipe", json={"name": "a", "rules": rules | {"seconds": {"min": 3}}})
    assert (answer.status_code, "no clip is of such a length" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(("field", "word"), [("flow.camera", "score"), ("light.mean", "lacks 00001")])
def test_a_column_that_lacks_new_shards_is_refused_as_the_recipe_refuses_it(opened, field, word):
    dataset, _ = opened
    browsed.grow(dataset)
    client = browsed.client_of(library.load(dataset), writable=True)
    answer = client.post("/api/view", json={"name": "chosen", "rules": {field: {"min": 0.1}}})
    assert (answer.status_code, word in answer.json()["error"]) == (502, True)
    assert "run its `score` stage again" in answer.json()["error"]
    assert not (Path(dataset) / "views/chosen.parquet").exists()


def test_saving_leaves_the_views_that_others_go_through_as_they_are(opened):
    dataset, _ = opened
    books = library.load(dataset)
    before = books.views
    browsed.client_of(books, writable=True).post("/api/view", json={"name": "chosen", "exact_duplicates": False})
    assert "chosen" in books.views and "chosen" not in before


def test_a_recipe_is_shown_without_torch(small):
    """It takes seconds to import, while a reader waits for some lines."""
    script = (
        "import sys; from longtake.infra.browse import library, views; books = library.load(sys.argv[1]);"
        "views.recipe(books, books.shown, views.Wanted(name='a', rules={'motion': {'min': 0.1}}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, small], timeout=120).returncode == 0


def test_rules_on_clusters_stand_on_the_record_of_their_stage(opened, tmp_path):
    dataset, _ = opened
    column = scored.write_columns(dataset, {"cluster": {"cluster": "number", "distance": "number"}})["cluster"]
    rows = {split: compact.open_split(dataset, split)[0] for split in ("train", "val")}
    record = clusters.Clusters(
        dataset, "clusters/a", score_columns.described(dataset, column).plain(), {"column": "", "field": "", "width": 1}, None,
        0.9, {}, {split: base.digest for split, base in rows.items()}, {}, {},
    )  # fmt: skip
    uri = str(tmp_path / "clusters/0123456789abcdef")
    clusters.write_clusters(uri, record)
    client = browsed.client_of(library.load(dataset), writable=True)
    made = client.post("/api/view", json={"name": "near", "rules": {"cluster.distance": {"max": 0.5}}}).json()
    config = curate.Config.model_validate(yaml_text.parse(made["recipe"], "the page")["near"])
    assert (config.clusters, config.scores) == (uri, None)
    assert view.stood_on(made["uri"]) == {"cluster": column}


def test_read_only_writes_nothing(small, books, tmp_path):
    before = sorted(str(path) for path in Path(small).rglob("*"))
    answer = browsed.client_of(books).post("/api/view", json={"name": "chosen", **RULES})
    assert (answer.status_code, "--write" in answer.json()["error"]) == (403, True)
    assert browsed.client_of(books).post("/api/recipe", json={"name": "chosen", **RULES}).status_code == 200
    assert sorted(str(path) for path in Path(small).rglob("*")) == before


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ({"name": "calm"}, "already"),
        ({"name": "../up"}, "name"),
        ({"name": "A b"}, "name"),
        ({"name": ""}, "name"),
        ({}, "name"),
        ({"name": "a", "rules": {"moton": {"min": 1}}}, "did you mean motion"),
        ({"name": "a", "rules": {"flow.move": {"min": 1}}}, "rules.flow.move: is no number"),
        ({"name": "a", "labels": {"motion": {"only": ["a"]}}}, "labels.motion: is no label"),
        ({"name": "a", "labels": {"split": {"only": ["val"]}}}, "split"),
        ({"name": "a", "labels": {"flow.move": {"only": ["pink"]}}}, "pink"),
        ({"name": "a", "labels": {"flow.move": {}}}, "asks for nothing"),
        ({"name": "a", "rules": {"motion": {"min": 2, "max": 1}}}, "swap"),
        ({"name": "a", "rules": {"motion": {"min": 5}}}, "none of 300 clips"),
        ({"name": "a", "where": []}, "where"),
    ],
)
def test_what_is_no_view_is_one_line_and_writes_nothing(opened, wanted, line):
    dataset, client = opened
    before = sorted(str(path) for path in Path(dataset).rglob("*"))
    answer = client.post("/api/view", json=wanted)
    assert answer.status_code == 400
    assert line in answer.json()["error"] and "\n" not in answer.json()["error"]
    assert sorted(str(path) for path in Path(dataset).rglob("*")) == before
