"""Curation by columns of scores: bounds, labels, classes and clusters, what a view says of them, and mistakes in a line."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scored
import toy_scorers
import yaml
from curated import reasons, run, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.datasets import clusters, compact, index, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.infra import graph, recipe
from longtake.infra.report import clips
from longtake.infra.report.embed import Pictures
from longtake.pipeline import scorers
from longtake.pipeline.stages import curate

VIEW = "views/some.parquet"
NOTHING: dict[str, Any] = {"rules": {}, "exact_duplicates": False}


def with_scores(folder: Path, values: dict[str, dict[str, Any]], count: int = 12, shards: int = 2) -> tuple[str, str]:
    """A dataset whose first clips, by key, are trained on, and the record of columns `{NAME: {FIELD: values by key}}`."""
    clips = [{"key": f"{n:02d}", "split": "val" if n >= count * 3 // 4 else "train"} for n in range(count)]
    dataset = write_dataset(folder / "data", clips, shards)
    keys = [key for split in schema.SPLITS for key in index.read_all(dataset, split)["key"].to_pylist()]
    order = [int(key) for key in keys]
    laid = {
        name: {
            field: np.array(each, object if isinstance(each[0], str | None) else float)[order]
            for field, each in fields.items()
        }
        for name, fields in values.items()
    }
    return dataset, scored.write_record(str(folder / "scores"), dataset, scored.write_columns(dataset, laid))


def test_bounds_labels_and_missing_values_are_reasons_and_the_view_keeps_the_values(tmp_path: Path) -> None:
    camera = [n / 10 if n % 5 else np.nan for n in range(12)]
    move: list[str | None] = [("static", "pan", "shake", None)[n % 4] for n in range(12)]
    dataset, record = with_scores(
        tmp_path, {"motion": {"camera": camera, "move": move}, "other": {"value": [1.0] * 12}}
    )
    table = run(
        dataset, scores=record, exact_duplicates=False,
        rules={"motion.camera": {"min": 0.15, "max": 0.75}},
        labels={"motion.move": {"never": ["shake"], "missing": "drop"}},
    )  # fmt: skip
    found = reasons(table)
    assert found == {
        "00": None, "01": "motion.camera < 0.15", "02": "motion.move: shake", "03": "no motion.move",
        "04": None, "05": None, "06": "motion.move: shake", "07": "no motion.move",
        "08": "motion.camera > 0.75", "09": "motion.camera > 0.75", "10": "motion.move: shake",
        "11": "motion.camera > 0.75",
    }  # fmt: skip
    assert [table[f"{n:02d}"]["motion.move"] for n in range(12)] == move
    kept = [table[f"{n:02d}"]["motion.camera"] for n in range(12)]
    assert kept == [None if np.isnan(each) else np.float32(each) for each in camera]
    assert "other.value" not in table["00"]
    # what it stood on, and no more
    stood = view.stood_on(storage.join(dataset, VIEW))
    assert list(stood) == ["motion"] and stood["motion"] in {
        n.split(".")[1] for n in index.shard_names(dataset, "train", stood["motion"])
    }
    dropped = reasons(run(dataset, scores=record, **NOTHING | {"rules": {"motion.camera": {"missing": "drop"}}}))
    assert {key for key, why in dropped.items() if why == "no motion.camera"} == {"00", "05", "10"}
    only = reasons(run(dataset, scores=record, **NOTHING, labels={"motion.move": {"only": ["pan", "static"]}}))
    assert Counter(only.values()) == {None: 9, "motion.move: not pan or static": 3}


NUMBER = st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0])
ROW = st.tuples(NUMBER, st.sampled_from([None, "a", "b", "c"]))


@given(
    st.lists(ROW, min_size=4, max_size=14), st.integers(0, 100), st.sets(st.sampled_from("abc"), max_size=2),
    st.sampled_from(["keep", "drop"]), st.integers(1, 4), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_what_stays_is_what_a_loop_over_the_clips_keeps(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    percentile: int,
    never: set[str],
    missing: str,
    shards: int,
    folded: bool,
) -> None:
    numbers = [np.nan if number is None else number for number, _ in rows]
    labels = [label for _, label in rows]
    if not any(label is not None for label in labels):
        labels[0] = "a"
    values = {"x": {"number": numbers}, "y": {"label": labels}}
    dataset, record = with_scores(tmp_path_factory.mktemp("curated"), values, len(rows), shards)
    if folded:
        for split in schema.SPLITS:
            for column in (None, *clusterless(dataset)):
                compact.write(dataset, split, column)
    valid = [each for each in numbers if not np.isnan(each)]
    least = np.percentile(valid, percentile) if valid else -1.0
    options = {"rules": {"x.number": {"min_percentile": percentile, "missing": missing}}}
    if kinds := sorted(never & {label for label in labels if label}):
        options["labels"] = {"y.label": {"never": kinds}}
    stay = {
        f"{n:02d}"
        for n, (number, label) in enumerate(zip(numbers, labels, strict=True))
        if (missing == "keep" if np.isnan(number) else number >= least) and label not in kinds
    }
    if not stay:
        with pytest.raises(UserError, match="none of"):
            run(dataset, scores=record, **NOTHING | options)
        return
    table = run(dataset, scores=record, **NOTHING | options)
    assert {key for key, row in table.items() if row["keep"]} == stay
    assert list(table) == [k for s in schema.SPLITS for k in index.read_all(dataset, s)["key"].to_pylist()]


def clusterless(dataset: str) -> Sequence[str]:
    """The names of a dataset's columns."""
    names = {n.partition(".")[2] for n in storage.names(storage.join(dataset, "train")) if ".score-" in n}
    return sorted(name.removesuffix(".parquet") for name in names)


def test_classes_may_be_a_label_that_was_scored(tmp_path: Path) -> None:
    move = ["pan"] * 6 + ["zoom"] * 2 + [None] + ["pan"] * 3  # the last three are held out
    dataset, record = with_scores(tmp_path, {"motion": {"move": move}})
    found = reasons(run(dataset, scores=record, **NOTHING, balance={"by": "motion.move", "most": 2}))
    assert Counter(found.values()) == {None: 8, "over 2 of label pan": 4}
    weighed = run(dataset, scores=record, **NOTHING, balance={"by": "motion.move", "weights": True})
    assert [weighed[key]["weight"] for key in ("00", "06", "08", "11")] == [0.5, 1.5, 3.0, 1.0]


def test_a_view_of_a_plain_recipe_is_the_one_that_it_was_before_there_were_columns() -> None:
    def digest(**options: Any) -> str:
        config = curate.Config.model_validate({"kind": "curate", "dataset": "x", **options})
        return graph._hash(graph.content(config))[:16]

    assert digest() == "1396b00a8531d22a"
    options = {"rules": {"motion": {"min": 0.1}}, "near_duplicates": {"radius": 3}, "balance": {"most": 3}}
    assert digest(**options, captions="c", caption_rules={"min_words": 2}) == "bb72fdd0c5d7c08d"
    assert digest(rules={"motion": {"min": 0.1, "missing": "drop"}}) != digest(rules={"motion": {"min": 0.1}})


def pairs_of(folder: Path, dataset: str, rows: list[tuple[int, int, float]], similarity: float = 0.8) -> str:
    """The record of a `cluster` stage with these pairs of clips, by their rows in the dataset."""
    column = scored.write_columns(dataset, {"cluster": {"distance": "number"}})["cluster"]
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    plain = scored.score_columns.described(dataset, column).plain()
    made = clusters.Clusters(
        dataset, "clusters/abc", plain, {}, None, similarity,
        {split: int(base.counts.sum()) for split, base in bases.items()},
        {split: base.digest for split, base in bases.items()}, {"groups": 1}, {},
    )  # fmt: skip
    name = clusters.pairs_name(similarity)
    shard = storage.join(dataset, "clusters/abc", name, "00000.parquet")
    table = [{"first": a, "second": b, "cosine": cosine, "crowd": False} for a, b, cosine in rows]
    index.write_table(shard, table, clusters.PAIRS)
    clusters.write_clusters(str(folder), made)
    return str(folder)


def test_of_clips_whose_embeddings_are_near_one_stays_held_out_before_trained_on(tmp_path: Path) -> None:
    dataset, record = with_scores(tmp_path, {"x": {"number": [0.0] + [1.0] * 11}}, shards=1)
    # 0..8 are train, 9..11 val
    close = [(0, 1, 0.99), (1, 2, 0.97), (3, 9, 0.96), (9, 10, 0.90), (4, 5, 0.95)]
    made = pairs_of(tmp_path / "clusters", dataset, close)
    options = NOTHING | {"semantic_duplicates": {"similarity": 0.95}}
    found = reasons(run(dataset, clusters=made, **options))
    assert {key for key, why in found.items() if why == "semantic duplicate"} == {"01", "03", "05"}
    # a clip that a rule drops drops no other
    options |= {"rules": {"x.number": {"min": 0.5}}}
    found = reasons(run(dataset, clusters=made, scores=record, **options))
    assert {key for key, why in found.items() if why == "semantic duplicate"} == {"02", "03", "05"}
    assert set(view.stood_on(storage.join(dataset, VIEW))) == {"x", "cluster"}
    # the clusters' own values are scores, too
    found = reasons(run(dataset, clusters=made, **NOTHING | {"rules": {"cluster.distance": {"max_percentile": 50}}}))
    assert any(why and why.startswith("cluster.distance > ") for why in found.values())
    with pytest.raises(UserError, match=r"^similarity 0\.5: the clusters have pairs from 0\.8 on; set "):
        run(dataset, clusters=made, **NOTHING | {"semantic_duplicates": {"similarity": 0.5}})


def test_a_view_says_where_its_clusters_have_not_all_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, _ = with_scores(tmp_path, {"x": {"number": [1.0] * 12}})
    made = pairs_of(tmp_path / "clusters", dataset, [(0, 1, 0.99)])
    clusters.write_clusters(made, replace(clusters.read_clusters(made), capped={"3": 0.97, "4": 0.9}))
    inputs = {"dataset": dataset, "clusters": made}
    for similarity, metrics in ((0.95, {"capped_clusters": 1.0, "pairs_whole_from": 0.97}), (0.98, {})):
        options = NOTHING | {"semantic_duplicates": {"similarity": similarity}}
        config = curate.Config.model_validate({"kind": "curate", **inputs, **options})
        found = curate.run(config, inputs, "work/some")["metrics"]
        assert {name: found[name] for name in found if not name.startswith("clips_")} == metrics
        said = capsys.readouterr().err
        assert ("whole from a cosine of 0.9700 on, not from 0.95," in said) == (similarity == 0.95)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rules": {"motion.camra": {"min": 1}}}, r"^rules\.motion\.camra: unknown score motion\.camra; did you mean motion\.camera"),
        ({"rules": {"motion.move": {"min": 1}}}, r"^rules\.motion\.move: takes a number, and motion\.move is a label; write `only`"),
        ({"rules": {"clip.vector": {"min": 1}}}, r"^rules\.clip\.vector: takes a number, and clip\.vector is a vector; name it in"),
        ({"labels": {"motion.camera": {"never": ["a"]}}}, r"^labels\.motion\.camera: takes a label, .* is a number; write its bounds"),
        ({"labels": {"motion.move": {"never": ["shaky"]}}}, r"^labels\.motion\.move: no label shaky; did you mean shake\?$"),
        ({"labels": {"motion.move": {"only": ["xyz"]}}}, r"^labels\.motion\.move: no label xyz; there are pan, shake$"),
        ({"balance": {"by": "motion.camera", "most": 1}}, r"^balance\.by: takes a label, and motion\.camera is a number"),
    ],
)  # fmt: skip
def test_a_rule_that_the_scores_cannot_keep_is_one_line(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    values = {"motion": {"camera": [0.5] * 4, "move": ["pan", "shake"] * 2}, "clip": {"vector": [[1.0, 0.0]] * 4}}
    dataset, record = with_scores(tmp_path, values, count=4)
    with pytest.raises(UserError, match=says) as error:
        run(dataset, scores=record, **options)
    assert "\n" not in str(error.value)


def test_scores_of_another_dataset_or_of_fewer_shards_are_one_line(tmp_path: Path) -> None:
    values = {"x": {"number": [1.0] * 12}}
    dataset, record = with_scores(tmp_path / "one", values)
    other, _ = with_scores(tmp_path / "two", values, shards=1)
    rule = NOTHING | {"rules": {"x.number": {"min": 0}}}
    with pytest.raises(UserError, match=r"has scores of \S+/one/data, not of \S+/two/data; name those"):
        run(other, scores=record, **rule)
    made = pairs_of(tmp_path / "clusters", dataset, [])
    with pytest.raises(UserError, match=r"^clusters: \S+ are of the dataset \S+/one/data, not of \S+/two/data"):
        run(other, clusters=made, **NOTHING, semantic_duplicates={})
    with pytest.raises(UserError, match=r"^\S+nowhere: no scores here"):
        run(dataset, scores=str(tmp_path / "nowhere"), **rule)
    # a shard that came later
    index.write_index(
        storage.join(dataset, "train", "00009.parquet"), [{"key": "z", "sha256": "z"}], schema.INDEX, 0, ""
    )
    for inputs in ({"scores": record, **rule}, {"clusters": made, **NOTHING, "semantic_duplicates": {}}):
        with pytest.raises(
            Failure, match=r"not of the train shards that the dataset has now; run its `(score|cluster)` stage"
        ):
            run(dataset, **inputs)


def test_a_recipe_is_refused_for_a_score_that_its_scorers_do_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "SCORERS", toy_scorers.modules())
    stages: dict[str, Any] = {
        "shards": {"kind": "shard", "sources": [str(tmp_path)]},
        "scores": {"kind": "score", "dataset": "shards", "scorers": {"light": {"by": "bright"}, "colour": {}}},
        "groups": {"kind": "cluster", "dataset": "shards", "scores": "scores", "embedding": "colour.vector"},
        "view": {"kind": "curate", "dataset": "shards", "scores": "scores"},
    }

    def load(**view: Any) -> None:
        stages["view"] = {"kind": "curate", "dataset": "shards", "scores": "scores"} | view
        (tmp_path / "r.yaml").write_text(
            yaml.safe_dump({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages})
        )
        graph.build(recipe.load(str(tmp_path / "r.yaml")))

    load(rules={"light.mean": {"min": 1}}, labels={"light.side": {"only": ["dark"]}})
    load(clusters="groups", semantic_duplicates={}, rules={"cluster.distance": {"max": 0.5}})
    for options, says in (
        ({"rules": {"light.meen": {"min": 1}}}, r"stages\.view\.rules\.light\.meen: unknown score light\.meen; did you mean light\.mean"),
        ({"rules": {"bright.mean": {"min": 1}}}, r"unknown score bright\.mean; did you mean light\.mean"),
        ({"labels": {"light.side": {"only": ["darc"]}}}, r"stages\.view\.labels\.light\.side: no label darc; did you mean dark\?"),
        ({"balance": {"by": "colour.vector", "most": 3}}, r"balance\.by: takes a label, and colour\.vector is a vector"),
        ({"clusters": "groups", "semantic_duplicates": {"similarity": 0.5}}, r"semantic_duplicates\.similarity: 0\.5 is less than the 0\.9"),
        ({"scores": {"dogs": {"prompt": "a dog"}}}, r"stages\.view\.scores: is the name of a `score` stage; .*`prompts: \{NAME: TEXT\}` here"),
        ({"embedding": {"encoder": "a.pt"}}, r"stages\.view\.embedding: is a scorer of a `score` stage now, .* a `cluster` stage; name that in `clusters`"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as error:
            load(**options)
        assert "\n" not in str(error.value), json.dumps(options)


def test_the_report_shows_the_scores_that_decided_the_view(tmp_path: Path) -> None:
    values = {"x": {"number": [n / 12 if n % 3 else np.nan for n in range(12)]}, "y": {"number": [np.nan] * 11 + [1.0]}}
    dataset, record = with_scores(tmp_path, values)
    rules = {"x.number": {"min": 0.5}, "y.number": {"min": 0.5}}
    run(dataset, scores=record, **NOTHING | {"rules": rules})
    table = clips.load(dataset, view.read_view(storage.join(dataset, VIEW)))
    size = {name: pa.array([24] * len(table), pa.int32()) for name in ("frame_count", "width", "height")}
    size |= {name: pa.array([0.5] * len(table), pa.float64()) for name in ("fps", "brightness", "sharpness")}
    for name, column in size.items():
        table = table.set_column(table.column_names.index(name), name, column)
    plots = {plot["name"]: plot for plot in clips.histograms(table, Pictures(tmp_path / "pictures"))}
    known = [n / 12 for n in range(12) if n % 3]
    assert plots["x.number"]["median"] == pytest.approx(np.median(known)) and plots["y.number"]["median"] == 1.0
    assert (tmp_path / "pictures" / "clips-x.number.svg").stat().st_size > 1000
