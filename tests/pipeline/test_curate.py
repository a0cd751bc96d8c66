"""Curation, by what it drops: each kind of duplicate against the plain way to find it, and the stage as a whole."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from curated import reasons, run, write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from longtake.datasets import schema, view
from longtake.datasets.errors import UserError
from longtake.pipeline import dedup
from longtake.pipeline.stages import curate

# few bits set, so that small sets have many neighbours
HASHES = st.lists(st.sets(st.integers(0, 63), max_size=4).map(lambda bits: sum(1 << b for b in bits)), max_size=40)


def distances(hashes: np.ndarray) -> np.ndarray:
    return np.bitwise_count(hashes[:, None] ^ hashes[None])


def one_by_one(alike: np.ndarray) -> list[bool]:
    """What is dropped when rows are judged in order; alike: (N, N) bool."""
    stay: list[int] = []
    for row in range(len(alike)):
        if not alike[row, stay].any():
            stay.append(row)
    return [row not in stay for row in range(len(alike))]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=20))
def test_exact_duplicates_are_those_seen_before(values: list[str | None]) -> None:
    found = dedup.exact(pa.chunked_array([values[:7], values[7:]], pa.string()))
    assert found.tolist() == [v is not None and v in values[:i] for i, v in enumerate(values)]


@given(HASHES, st.integers(0, 4), st.sampled_from([2, 1024]))
@example([(1 << 64) - 1, 0, 1 << 63], 0, 2)
def test_near_duplicates_are_those_of_brute_force(hashes: list[int], radius: int, batch: int) -> None:
    values = np.array(hashes, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_FIRST_BATCH", batch)
        assert dedup.near(values, radius).tolist() == one_by_one(distances(values) <= radius)


@given(st.integers(0, 16), st.sampled_from([10, 10**4, 10**5, 10**6, 10**8]), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_hashes_within_the_radius_are_equal_under_some_mask(radius: int, count: int, random: Any) -> None:
    masks = dedup.bit_masks(radius, count)
    for _ in range(20):
        difference = np.uint64(sum(1 << bit for bit in random.sample(range(64), radius)))
        assert any(difference & mask == 0 for mask in masks)


def test_a_large_set_is_thinned_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, 3000, dtype=np.uint64)
    hashes[1000:2000] = hashes[:1000] ^ (np.uint64(1) << rng.integers(0, 64, 1000, dtype=np.uint64))
    crowd = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (4, 1000), dtype=np.uint64), axis=0)
    hashes[rng.permutation(3000)[:1000]] = crowd
    whole = dedup.near(hashes, 3)
    assert whole.tolist() == one_by_one(distances(hashes) <= 3)
    # too many pairs at once are taken in smaller batches, to the same end
    monkeypatch.setattr(dedup, "_FIRST_BATCH", 4)
    monkeypatch.setattr(dedup, "_MOST_PAIRS", 50)
    assert dedup.near(hashes, 3).tolist() == whole.tolist()


@given(st.integers(0, 60), st.floats(0.1, 1), st.integers(0, 99))
@settings(deadline=None)
def test_similar_vectors_are_those_of_brute_force(count: int, similarity: float, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_BLOCK", 7)
        assert dedup.similar(unit, similarity - 1e-6).tolist() == one_by_one(unit @ unit.T >= similarity - 1e-6)


CLIP = st.fixed_dictionaries(
    {
        "split": st.sampled_from(schema.SPLITS),
        "sha256": st.sampled_from("abcdefghij"),
        "phash": st.none() | st.sampled_from([0, 1, 3, 7, 255, 1 << 63]),
        "label": st.sampled_from(["cat", "dog", None]),
        "motion": st.sampled_from([0.1, 0.5, 0.9]),
    }
)


@given(st.lists(CLIP, min_size=1, max_size=25), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_the_view_depends_on_the_clips_alone_and_every_dropped_one_has_its_like(
    tmp_path_factory: pytest.TempPathFactory, clips: list[dict[str, Any]], random: Any
) -> None:
    clips = [clip | {"key": f"{number:03d}"} for number, clip in enumerate(clips)]
    clips.append({"key": "good", "split": "train", "sha256": "x", "phash": None, "label": "cat", "motion": 0.5})
    options = {"rules": {"motion": {"max": 0.8}}, "near_duplicates": {"radius": 1}, "balance": {"most": 3}}
    table = run(write_dataset(tmp_path_factory.mktemp("one"), clips), **options)
    shuffled = random.sample(clips, len(clips))
    other = write_dataset(tmp_path_factory.mktemp("other"), shuffled, shards=3)
    assert run(other, **options) == table
    by_key = {clip["key"]: clip for clip in clips}
    unique = [
        by_key[k] for k, row in table.items() if row["reason"] in (None, "near duplicate") or "over" in row["reason"]
    ]
    stayed = [c for c in unique if table[c["key"]]["reason"] != "near duplicate"]
    for key, why in reasons(table).items():
        clip = by_key[key]
        same = [c for c in unique if c["sha256"] == clip["sha256"] and c is not clip]
        close = [c for c in stayed if c is not clip and near_by(c, clip, radius=1)]
        if why == "exact duplicate":
            assert [preference(c) < preference(clip) for c in same] == [True]
        elif why == "near duplicate":
            assert any(preference(c) < preference(clip) for c in close)
        elif why is None:
            assert not same and not close


def preference(clip: dict[str, Any]) -> tuple[bool, str]:
    return clip["split"] != "val", clip["key"]


def near_by(one: dict[str, Any], other: dict[str, Any], radius: int) -> bool:
    known = one["phash"] is not None and other["phash"] is not None
    return known and (one["phash"] ^ other["phash"]).bit_count() <= radius


def test_held_out_clips_stay_and_their_like_leaves_training(tmp_path: Path) -> None:
    clips = [
        {"key": "a", "sha256": "same", "phash": 0},
        {"key": "b", "split": "val", "sha256": "same", "phash": 0},
        {"key": "c", "phash": 0b11},
        {"key": "d", "split": "val", "phash": 1 << 40},
        {"key": "e", "phash": None},
        {"key": "f", "phash": None},
    ]
    found = reasons(run(write_dataset(tmp_path, clips), near_duplicates={"radius": 2}))
    assert found == {
        "a": "exact duplicate",
        "b": None,
        "c": "near duplicate",
        "d": "near duplicate",
        "e": None,
        "f": None,
    }
    assert reasons(run(str(tmp_path), near_duplicates={"radius": 0}))["c"] is None
    assert set(reasons(run(str(tmp_path), exact_duplicates=False)).values()) == {None}


def test_a_clip_that_a_rule_drops_does_not_drop_its_like(tmp_path: Path) -> None:
    clips = [{"key": "a", "sha256": "x", "motion": 0.0}, {"key": "b", "sha256": "x"}]
    assert reasons(run(write_dataset(tmp_path, clips))) == {"a": "motion < 0.002", "b": None}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 50), st.integers(50, 100))
def test_percentiles_keep_the_middle(values: list[int], low: int, high: int) -> None:
    table = pa.table({"motion": pa.array([*values, None], pa.float32())})
    masks = [rows for _, rows in view.broken(table, {"motion": {"min_percentile": low, "max_percentile": high}})]
    bounds = np.percentile(values, [low, high])
    kept = ~np.logical_or(*masks)
    assert kept.tolist() == [bool(bounds[0] <= v <= bounds[1]) for v in values] + [True]


def test_percentiles_are_over_both_splits_and_the_first_broken_bound_is_the_reason(tmp_path: Path) -> None:
    clips = [{"key": f"{n:02d}", "motion": n / 100, "split": "val" if n % 2 else "train"} for n in range(101)]
    found = reasons(run(write_dataset(tmp_path, clips), rules={"motion": {"min": 0.05, "min_percentile": 10}}))
    expected = dict.fromkeys(("motion < 0.05",), 5) | {"motion < 0.1 (percentile 10)": 5, None: 91}
    assert Counter(found.values()) == expected


def test_classes_are_cut_and_weighed_but_not_those_held_out(tmp_path: Path) -> None:
    clips = [{"key": f"cat{n}", "label": "cat"} for n in range(8)] + [
        {"key": f"dog{n}", "label": "dog"} for n in range(2)
    ]
    clips += [{"key": f"none{n}"} for n in range(5)] + [
        {"key": f"val{n}", "label": "cat", "split": "val"} for n in range(9)
    ]
    dataset = write_dataset(tmp_path, clips)
    cut = Counter(reasons(run(dataset, balance={"most": 4})).values())
    assert cut == {"over 4 of label cat": 4, "over 4 without a label": 1, None: 19}
    weighed = run(dataset, balance={"weights": True})
    weights = {
        name: {row["weight"] for key, row in weighed.items() if key.startswith(name)} for name in ("cat", "dog", "val")
    }
    assert weights == {"cat": {0.625}, "dog": {2.5}, "val": {1.0}}
    assert np.mean([row["weight"] for row in weighed.values() if row["split"] == "train"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"motoin": {"min": 1}}}, r"unknown score motoin; did you mean motion\?"),
        ({"rules": {"xyz": {"min": 1}}}, "unknown score xyz; there are motion, still, "),
        ({"rules": {"motion": {"min_percentile": 101}}}, "less than or equal to 100"),
        ({"rules": {"motion": {"min": 2, "max": 1}}}, "min 2 is above max 1, which keeps nothing; swap them"),
        (
            {"rules": {"motion": {"min_percentile": 60, "max_percentile": 50}}},
            "min_percentile 60 is above max_percentile 50",
        ),
        ({"rules": {"motion": {"min": float("nan")}}}, "finite"),
        ({"near_duplicates": {"radius": 17}}, "less than or equal to 16"),
        ({"semantic_duplicates": {"similarity": 0}, "clusters": "c"}, "greater than 0"),
        ({"semantic_duplicates": {}}, "need clusters; name a `cluster` stage in clusters"),
        ({"labels": {"motion.move": {}}, "scores": "s"}, "asks for nothing; give `only: "),
        (
            {"labels": {"motion.move": {"only": ["a", "b"], "never": ["b"]}}, "scores": "s"},
            "b is in only and in never; take it out of one",
        ),
        ({"labels": {"move": {"only": ["a"]}}}, "unknown score move; there are label"),
        ({"rules": {"motion.camera": {"min": 1}}}, "rules.motion.camera: needs scores; name a `score` stage in scores"),
        ({"rules": {"cluster.distance": {"max": 1}}}, "rules.cluster.distance: needs clusters; name a `cluster` stage"),
        ({"balance": {"most": 1, "by": "motion.move"}}, "balance.by: needs scores; name a `score` stage in scores"),
        (
            {"scores": {"dogs": {"prompt": "a dog"}}},
            "is the name of a `score` stage; an encoder or an image is a scorer of that now .* and a prompt is a line of",
        ),
        ({"balance": {}}, "asks for nothing; give `most: N`"),
        ({"balance": {"by": "source", "most": 1}}, "unknown score source; there are label"),
    ],
)
def test_a_mistake_in_the_config_says_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        curate.Config.model_validate({"kind": "curate", "dataset": "x", **options})


def test_keeping_nothing_and_balancing_without_labels_are_errors(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [{"key": "a"}, {"key": "b"}])
    with pytest.raises(UserError, match=r"none of 2 clips is kept \(\{'motion < 2': 2\}\); loosen the rules"):
        run(dataset, rules={"motion": {"min": 2}})
    with pytest.raises(UserError, match="balance: no clip has a label; give the manifest a `label` column"):
        run(dataset, balance={"most": 1})
