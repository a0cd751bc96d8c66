"""Windows by what their stream has before them: where they begin, what they are given, how long that is on the average."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import index, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader, streams
from longtake.datasets.loader.streams import Lengths

HIGH = "latent-test"
WINDOW: dict[str, Any] = {"frames": 5, "columns": (HIGH,), "batch": 1, "epochs": 30}
SOME = Lengths((2, 4, 5), 5)


def in_streams(root: str, streams_of: dict[str, list[int]], name: str = HIGH) -> str:
    """Say of a column's clips, by source, at which step of their streams they begin."""
    for shard in index.read_shards(root, "train", name):
        rows = shard.table.to_pylist()
        for row in rows:
            source, clip = row["key"].rsplit("-", 1)
            row["stream_step"] = streams_of[source][int(clip)]
        url = storage.join(root, "train", f"{shard.name}.parquet")
        index.write_index(url, rows, schema.STREAM_INDEX, shard.tar_bytes, shard.tar_sha256)
    return root


@pytest.fixture(scope="module")
def root(handmade: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A source of five clips of three steps, of which three and two are a stream, and one of two: do not change it."""
    sources = [{"source": "a", "clip": n, "start": float(n)} for n in range(5)]
    others = [{"source": "b", "clip": n, "start": float(n)} for n in range(2)]
    made = handmade(tmp_path_factory.mktemp("streams"), [sources, others], columns=(HIGH,))
    return in_streams(made, {"a": [0, 3, 6, 0, 3], "b": [0, 3]})


# the first step of each stream's clips, as their values tell it, by the clip's key
STEPS = {
    **{f"a-{n:05d}": [64 * clip + step for clip in range(3) for step in range(3)] for n in range(3)},
    **{f"a-{n:05d}": [64 * clip + step for clip in (3, 4) for step in range(3)] for n in (3, 4)},
    **{f"b-{n:05d}": [64 * clip + step for clip in (5, 6) for step in range(3)] for n in range(2)},
}


def test_a_window_is_given_what_its_stream_has_before_it_and_nothing_else(root: str) -> None:
    begins: dict[str, set[int]] = {}
    for batch in Loader(root, **WINDOW, histories=SOME):
        key, begin, known = batch["key"][0], int(batch["stream_step"]), int(batch["history_steps"])
        steps = STEPS[key]
        assert known == min(begin, 5) and batch["history_latent"].shape == (1, 2, 3, 5, 2, 2)
        assert batch["latent"][0, 0, 0, :, 0, 0].tolist() == steps[begin : begin + 2]
        before = batch["history_latent"][0, 0, 0, :, 0, 0].tolist()
        assert before == [0] * (5 - known) + steps[begin - known : begin]
        begins.setdefault("long" if len(steps) == 9 else "short", set()).add(begin)
    # from the most on a window may begin anywhere; a shorter stream has shorter histories
    assert begins == {"long": {2, 4, 5, 6, 7}, "short": {2, 4}}


def test_none_is_the_stream_s_start_as_often_as_is_asked(root: str) -> None:
    whole = [int(batch["stream_step"]) for batch in Loader(root, **WINDOW, histories=Lengths((2, 4, 5), 5, none=1.0))]
    assert set(whole) == {0}
    some = [int(batch["stream_step"]) for batch in Loader(root, **WINDOW, histories=Lengths((2, 4), 5, none=0.4))]
    assert 0.28 < np.mean(np.array(some) == 0) < 0.52


def test_the_expected_length_is_what_samples_have_for_any_batch_and_world(root: str) -> None:
    histories = Lengths((2, 4, 5), 5, none=0.25)
    found: dict[int, list[int]] = {}
    for world in (1, 2, 6):
        options = WINDOW | {"batch": 6, "epochs": 120, "last": "pad", "world": world, "histories": histories}
        loaders = [Loader(root, **options, rank=rank) for rank in range(world)]
        # the fewest of a global batch would be 0 in most of them
        found[world] = [int(n) for loader in loaders for batch in islice(loader, 150) for n in batch["history_steps"]]
        expected = loaders[0].history_mean()
        assert abs(np.mean(found[world]) - expected) < 0.2 and expected == pytest.approx(
            0.75 * (3 * 11 / 3 + 4 * 3) / 7
        )
    assert sorted(found[1]) == sorted(found[2]) == sorted(found[6])
    loader = Loader(root, **WINDOW, histories=histories)
    assert loader.history_mean(3) == pytest.approx(0.75 * 2) and loader.history_mean(4) == pytest.approx(0.75 * 3)
    assert loader.history_mean(1) == pytest.approx(0.75 * 1) and loader.history_mean(5) == expected


def test_without_shuffling_every_stream_comes_once_as_late_as_it_can(root: str) -> None:
    options = WINDOW | {"epochs": 1, "shuffle": False}
    batches = [(b["key"][0], int(b["stream_step"])) for b in Loader(root, **options, histories=SOME)]
    assert batches == [("a-00000", 5), ("a-00003", 4), ("b-00000", 4)]
    later = Loader(root, **options, histories=Lengths((5,), 5, least=5))
    assert [b["key"][0] for b in later] == ["a-00000"] and later.samples_without_history == 4
    with pytest.raises(UserError, match="no stream of latents has 8 steps of history and 2 of a window, the longest 9"):
        Loader(root, **options, histories=Lengths((5,), 5, least=8))


def test_resuming_on_another_world_gives_bitwise_the_same_batches(root: str) -> None:
    options = WINDOW | {"batch": 2, "epochs": 3, "histories": Lengths((2, 4, 5), 5, none=0.2)}
    whole = list(Loader(root, **options))
    first = Loader(root, **options)
    list(islice(first, 4))
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [Loader(root, **options, rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for expected, *parts in zip(whole[4:], *ranks, strict=True):
        for name in ("latent", "history_latent", "history_steps", "stream_step"):
            assert torch.equal(expected[name], torch.cat([part[name] for part in parts]))
    with pytest.raises(UserError, match="another dataset, view or window"):
        Loader(root, **options | {"histories": SOME}).load_state_dict(state)


def facts(batch: dict[str, Any]) -> list[tuple[str, int, int, list[float]]]:
    begins, known = batch["stream_step"].tolist(), batch["history_steps"].tolist()
    return list(zip(batch["key"], begins, known, batch["latent"].flatten(1).tolist(), strict=True))


def test_a_curriculum_draws_what_is_within_its_reach_each_as_likely_on_any_world_and_after_a_resume(root: str) -> None:
    plain = Lengths((2, 4, 5), 5, none=0.2)
    rising = replace(plain, reaches=((0, 1), (90, 4), (180, 5)))
    options = WINDOW | {"batch": 2, "epochs": None}
    batches = list(islice(Loader(root, **options, histories=rising), 200))
    parts = [[f for batch in batches[a:b] for f in facts(batch)] for a, b in ((0, 90), (90, 180), (180, 200))]
    shares = [np.bincount([known for _, _, known, _ in part], minlength=6) / len(part) for part in parts]
    # no length is within a reach of one step: all are given that much
    assert shares[0][[0, 1]].sum() == 1 and abs(shares[0][1] - 0.8) < 0.1
    assert shares[1][[0, 2, 4]].sum() == 1 and abs(shares[1][2] - 0.4) < 0.12 and abs(shares[1][4] - 0.4) < 0.12
    assert all(begin >= known and (begin == known or known in (1, 4)) for _, begin, known, _ in parts[0] + parts[1])
    assert all(batch["history_latent"].shape[3] == 5 for batch in batches)
    # as if there had never been a curriculum
    later = Loader(root, **options, histories=plain)
    assert [facts(batch) for batch in batches[180:]] == [facts(batch) for batch in later.at(range(180, 200))]
    # exact on two ranks, with a worker, from the middle on
    first = Loader(root, **options, histories=rising)
    list(islice(first, 85))
    ranks = [Loader(root, **options, histories=rising, rank=rank, world=2, workers=1) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, *parts_of in zip(batches[85:95], *ranks, strict=False):
        assert facts(expected) == [f for part in parts_of for f in facts(part)]
    with pytest.raises(UserError, match="another dataset, view or window"):
        later.load_state_dict(first.state_dict())
    # what is held out has all of its history from the first batch on
    still = Loader(root, **options | {"shuffle": False, "batch": 1, "epochs": 1}, histories=rising)
    assert [int(batch["history_steps"]) for batch in still] == [5, 4, 4]


def test_what_cannot_be_read_from_streams_is_one_line(root: str, handmade: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="histories: are of latents and windows of one length"):
        Loader(root, **WINDOW | {"columns": (HIGH, "video"), "size": (16, 16)}, histories=SOME)
    with pytest.raises(UserError, match=f"columns: {HIGH} was encoded in streams of several clips"):
        Loader(root, **WINDOW)
    made = handmade(
        tmp_path, [[{"source": "a", "clip": n, "start": float(n)} for n in range(2)]], columns=(HIGH, "latent-b")
    )
    in_streams(made, {"a": [0, 3]})
    with pytest.raises(
        Failure, match="begins at step 0 of its stream, and at 3 in latent-test; encode both with the same"
    ):
        list(Loader(made, **WINDOW | {"columns": {"latent": HIGH, "low": "latent-b"}}, histories=SOME))


@given(
    some=st.sets(st.integers(1, 30), min_size=1, max_size=6),
    unit=st.integers(1, 4),
    window=st.integers(1, 6),
    total=st.integers(1, 80),
    seed=st.integers(0, 100),
)
def test_a_draw_has_room_in_its_stream_and_the_mean_is_that_of_all_draws(
    some: set[int], unit: int, window: int, total: int, seed: int
) -> None:
    lengths = Lengths(tuple(sorted(some)), max(some), 0.2, unit)
    rng = np.random.default_rng(seed)
    draws = [lengths.draw(total, window, rng) for _ in range(40)]
    able = {begin for begin in some if begin + window <= total}
    assert all(begin in able | {0} or (begin > max(some) and (begin - max(some)) % unit == 0) for begin in draws)
    assert all(begin + window <= max(total, window) for begin in draws)
    longest = lengths.draw(total, window, None)
    assert longest == max(able, default=0)
    expected = 0.8 * (np.mean(sorted(able)) if able else 0.0)
    assert lengths.mean(np.array([total]), window) == pytest.approx(expected)


@given(
    some=st.sets(st.integers(1, 30), min_size=1, max_size=6),
    short=st.integers(0, 3),
    reach=st.integers(1, 34),
    total=st.integers(5, 80),
)
def test_within_a_reach_lengths_are_uniform_over_those_that_are_no_longer(
    some: set[int], short: int, reach: int, total: int
) -> None:
    every = Lengths(tuple(sorted(some)), max(1, max(some) - short), 0.25)
    lengths = every.within(reach)
    rng = np.random.default_rng(0)
    known = [min(lengths.draw(total, 2, rng), lengths.most) for _ in range(2000)]
    inside = sorted(some) if reach >= every.most else [n for n in sorted(some) if n <= reach] or [min(some)]
    able = [min(n, reach, every.most) for n in inside if n + 2 <= total] or [0]
    expected = 0.25 * (np.arange(81) == 0) + 0.75 * np.bincount(able, minlength=81) / len(able)
    assert np.abs(np.bincount(known, minlength=81) / 2000 - expected).max() < 0.06
    assert every.mean(np.array([total]), 2, reach) == pytest.approx(expected @ np.arange(81))


def judged(root: str, weights: dict[str, float], name: str) -> str:
    """A view with these weights; a clip without one is left out."""
    keys = index.read_all(root, "train")["key"].to_pylist()
    reasons = [None if key in weights else "out" for key in keys]
    url = f"{root}/views/{name}.parquet"
    view.write(url, view.rows("train", keys, reasons, np.array([weights.get(key, 1.0) for key in keys])), {})
    return url


def test_no_window_lies_in_a_clip_that_the_view_leaves_out(root: str) -> None:
    weights = dict.fromkeys(STEPS, 1.0)
    del weights["a-00001"]
    loader = Loader(root, **WINDOW, view=judged(root, weights, "hole"), histories=SOME)
    assert {batch["key"][0] for batch in loader} == {"a-00003", "a-00004", "b-00000", "b-00001"}
    assert loader.samples_of_mixed_streams == 2 and not loader.samples_without_history
    with pytest.raises(UserError, match="every stream of latents has clips that the view leaves out; encode them with"):
        Loader(root, **WINDOW, view=judged(root, {"a-00000": 1.0}, "one"), histories=SOME)


def test_the_expected_length_counts_streams_as_often_as_the_view_has_them(root: str) -> None:
    weights = {key: 4.0 if len(steps) == 9 else 0.5 for key, steps in STEPS.items()}
    loader = Loader(root, **WINDOW | {"epochs": 60}, view=judged(root, weights, "often"), histories=SOME)
    expected = (12 * 11 / 3 + 2 * 3) / 14
    assert loader.history_mean() == pytest.approx(expected)
    assert abs(np.mean([int(batch["history_steps"]) for batch in loader]) - expected) < 0.2


def test_clips_by_themselves_are_streams_of_their_own(handmade: Callable[..., str], tmp_path: Path) -> None:
    made = handmade(tmp_path, [[{"source": "a", "clip": n, "start": float(n)} for n in range(3)]], columns=(HIGH,))
    rows = Loader(made, **WINDOW).plan.split.columns["latent"]  # type: ignore[attr-defined]
    assert not streams.joined(rows) and streams.totals(rows).tolist() == [3, 3, 3]
    assert {int(b["stream_step"]) for b in Loader(made, **WINDOW, histories=Lengths((1, 2), 2))} == {1}
