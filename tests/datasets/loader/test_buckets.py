"""Batches of one shape each, weights of a view, and mixtures of loaders."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.datasets import compact, index, view
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, Mixture

SHAPES = [(16, 32), (32, 16), (16, 16)]


@pytest.fixture(scope="module")
def odd(handmade: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four shards of six clips each: three shapes, of 5, 9 and 13 frames; and two too short for all."""
    shards = [[{"size": SHAPES[n % 3], "frames": (5, 9, 13)[(n + s) % 3]} for n in range(6)] for s in range(4)]
    shards[0] += [{"frames": 3}, {"frames": 4}]
    return handmade(tmp_path_factory.mktemp("odd"), shards)


def facts(dataset: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in index.read_all(dataset, "train").to_pylist()}


@pytest.mark.parametrize("last", ["drop", "pad"])
@pytest.mark.parametrize("size", [{"batch": 2}, {"batch": None, "pixels": 16 * 32 * 9 * 2}])
def test_each_batch_is_of_one_shape_and_each_clip_comes_once(odd: str, last: Any, size: dict[str, Any]) -> None:
    rows = facts(odd)
    loader = Loader(odd, frames=(5, 9), size=16, **size, last=last, epochs=1)
    seen = Counter[str]()
    for batch in loader:
        b, _, t, h, w = batch["video"].shape
        assert b == len(batch["key"]) and (batch["video"].float().std((1, 2, 3, 4)) > 1).all()
        if "pixels" in size:
            assert b == 16 * 32 * 9 * 2 // (t * h * w)
        for key in batch["key"]:
            row = rows[key]
            assert (t, h, w) == (9 if row["frame_count"] >= 9 else 5, row["height"], row["width"])
        seen.update(batch["key"])
    assert (loader.samples, loader.samples_short) == (24, 2)
    if last == "drop":
        assert set(seen.values()) == {1} and len(seen) == 24 - loader.samples_left_out
    else:
        assert len(seen) == 24 and loader.samples_left_out == 0


def test_buckets_are_the_same_on_any_rank_and_on_resume(odd: str) -> None:
    options: dict[str, Any] = {"frames": (5, 9), "size": 16, "batch": None, "pixels": 16 * 32 * 9 * 4, "last": "pad"}
    whole = list(Loader(odd, **options, ranks=2, epochs=2))
    first = Loader(odd, **options, ranks=2)
    head = list(islice(first, 5))
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [Loader(odd, **options, ranks=2, epochs=2, rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    joined = [torch.cat([a["video"], b["video"]]) for a, b in zip(*ranks, strict=True)]
    assert all(len(b["key"]) % 2 == 0 for b in whole)
    assert len(head) + len(joined) == len(whole)
    assert all(torch.equal(a, b["video"]) for a, b in zip([*(b["video"] for b in head), *joined], whole, strict=True))
    for other in ({"pixels": 16 * 32 * 9 * 2}, {"frames": (5, 13)}, {"last": "drop"}):
        with pytest.raises(UserError, match="loader state: belongs to another") as caught:
            Loader(odd, **options | other, ranks=2).load_state_dict(state)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pixels": 100}, "pixels: 100 hold no 1 windows of 5x16x16"),
        ({"pixels": 1 << 20, "ranks": 4, "world": 3}, "do not divide among 3"),
        ({"pixels": 1 << 30}, "give no batch of"),
        ({"pixels": 1 << 20, "frames": 99, "world": 3}, "no usable sample"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_line(odd: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Loader(odd, **{"frames": 5, "size": 16, "batch": None} | options)
    assert "\n" not in str(caught.value)


def test_a_short_side_scales_down_and_never_up(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{"size": (32, 56)}, {"size": (48, 80)}, {"size": (16, 16)}]])
    loader = Loader(root, frames=5, size=24, multiple=8, batch=2, epochs=1)
    assert (loader.samples, loader.samples_small) == (2, 1)
    # 24 x 42 and 24 x 40, to multiples of 8
    assert [tuple(b["video"].shape) for b in loader] == [(2, 3, 5, 24, 40)]
    with pytest.raises(UserError, match="clips of 32x56 are smaller than size 64"):
        Loader(root, frames=5, size=64, batch=1)


def weighted(dataset: str, weights: dict[str, float], *, order: Any = None, aligned: bool = False) -> str:
    """A view with weights of some clips, the others dropped; its rows in another order than the shards'."""
    keys = index.read_all(dataset, "train")["key"].to_pylist()
    keys = keys if order is None else [keys[n] for n in order]
    table = view.rows(
        "train", keys, [None if k in weights else "out" for k in keys], np.array([weights.get(k, 1) for k in keys])
    )
    digests = {"train": compact.open_split(dataset, "train")[0].digest} if aligned else {}
    url = f"{dataset}/views/weighted-{aligned}-{order is None}.parquet"
    view.write(url, table, digests)
    return url


@pytest.mark.parametrize("size", [(16, 16), 16])
def test_weights_say_how_often_a_clip_comes_aligned_or_not(odd: str, size: Any) -> None:
    keys = [key for key, row in facts(odd).items() if row["frame_count"] >= 5]
    weights = {key: (0.5, 1.0, 3.0, 0.0)[n % 4] for n, key in enumerate(keys)}
    shuffled = np.random.default_rng(0).permutation(len(facts(odd)))
    urls = [weighted(odd, weights, aligned=True), weighted(odd, weights), weighted(odd, weights, order=shuffled)]
    options: dict[str, Any] = {"columns": ("json",), "frames": 5, "size": size, "batch": 1, "epochs": 8}
    runs = [[b["key"][0] for b in Loader(odd, view=url, **options)] for url in urls]
    assert runs[0] == runs[1] == runs[2]
    kept = np.array([w for w in weights.values() if w])
    epochs = [Counter(runs[0][n : n + len(kept)]) for n in range(0, len(runs[0]), len(kept))]
    assert len(epochs) == 8
    for key, weight in weights.items():
        counts = [epoch[key] for epoch in epochs]
        # of three shapes each shape's part is rounded to whole samples
        assert abs(np.mean(counts) - weight / kept.mean()) < 0.35
        assert weight or not any(counts)


def test_copies_of_a_heavy_clip_are_other_windows(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{"frames": 40}, *({} for _ in range(9))]])
    keys = index.read_all(root, "train")["key"].to_pylist()
    url = weighted(root, {key: 99.0 if key == keys[0] else 0.01 for key in keys}, aligned=True)
    batches = list(Loader(root, view=url, frames=5, size=(16, 16), batch=1, epochs=1))
    heavy = [b["video"].numpy().tobytes() for b in batches if b["key"] == [keys[0]]]
    assert len(heavy) >= 9 and len(set(heavy)) > 4


def test_clips_that_came_after_the_view_are_not_in_it(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{}, {}], [{}, {}]])
    later = [tmp_path / "train" / f"00000.{end}" for end in ("parquet", "tar")]
    away = [path.rename(tmp_path / path.name) for path in later]
    keys = index.read_all(root, "train")["key"].to_pylist()
    url = weighted(root, {keys[0]: 1.0, keys[1]: 3.0}, aligned=True)
    for path, target in zip(away, later, strict=True):
        path.rename(target)
    seen = Counter(b["key"][0] for b in Loader(root, view=url, frames=5, size=(16, 16), batch=1, epochs=4))
    assert set(seen) == set(keys) and seen[keys[1]] > seen[keys[0]] and seen.total() == 8


def test_an_empty_view_keeps_nothing(small: str, tmp_path: Path) -> None:
    url = str(tmp_path / "empty.parquet")
    view.write(url, view.rows("train", [], []), {})
    with pytest.raises(UserError, match="no usable sample"):
        Loader(small, view=url, frames=5, size=(16, 16), batch=1)


def parts(small: str, rank: int = 0, world: int = 1, **options: Any) -> dict[str, tuple[Loader, float]]:
    given: dict[str, Any] = {"size": (16, 16), "rank": rank, "world": world}
    return {
        "clips": (Loader(small, frames=5, **given | {"batch": 4} | options), 3.0),
        "images": (Loader(small, frames=1, **given | {"batch": 8} | options), 1.0),
    }


def test_a_mixture_has_its_shares_and_each_part_its_own_epochs(small: str) -> None:
    alone = {name: iter(loader) for name, (loader, _) in parts(small, columns=("label",), batch=1).items()}
    counts = Counter[str]()
    for batch in islice(Mixture(parts(small, columns=("label",), batch=1)), 1000):
        same = next(alone[batch["part"]])
        assert batch["key"] == same["key"] and batch["epoch"] == same["epoch"]
        counts[batch["part"]] += 1
    assert counts == {"clips": 750, "images": 250}


def same(one: Any, other: Any) -> bool:
    return one["part"] == other["part"] and one["key"] == other["key"] and torch.equal(one["video"], other["video"])


def test_a_mixture_resumes_on_another_world(small: str) -> None:
    whole = list(islice(Mixture(parts(small), seed=3), 12))
    assert {b["part"]: tuple(b["video"].shape) for b in whole} == {
        "clips": (4, 3, 5, 16, 16),
        "images": (8, 3, 1, 16, 16),
    }
    first = Mixture(parts(small), seed=3)
    list(islice(first, 5))
    state = json.loads(json.dumps(first.state_dict()))
    ranks = []
    for rank in range(2):
        mixture = Mixture(parts(small, rank, 2), seed=3)
        mixture.load_state_dict(state)
        ranks.append(list(islice(mixture, 7)))
    for one, two, both in zip(*ranks, whole[5:], strict=True):
        joined = {"key": one["key"] + two["key"], "video": torch.cat([one["video"], two["video"]])}
        assert one["part"] == two["part"] and same(joined | {"part": one["part"]}, both)


@pytest.mark.slow
def test_a_mixture_of_workers_is_the_same(small: str) -> None:
    whole = list(islice(Mixture(parts(small)), 12))
    worked = list(islice(Mixture(parts(small), workers=2), 12))
    assert all(same(a, b) for a, b in zip(whole, worked, strict=True))


def test_states_and_parts_of_other_mixtures_are_refused(small: str) -> None:
    given = parts(small)
    state = Mixture(given).state_dict()
    loader, _ = given["images"]
    others = [
        ({**given, "images": (loader, 2.0)}, 0, "another dataset, view or window"),
        ({"clips": given["clips"]}, 0, "another dataset, view or window"),
        (given, 1, "another seed"),
    ]
    for other, seed, says in others:
        with pytest.raises(UserError, match=says):
            Mixture(other, seed=seed).load_state_dict(state)
    with pytest.raises(UserError, match="another"):
        Mixture(given).load_state_dict(loader.state_dict())
    for bad, says in (
        ({}, "weight above 0"),
        ({"a": (loader, 0.0)}, "weight above 0"),
        ({"a": (loader, 1e-6), "b": (loader, 1.0)}, "less than one batch"),
        ({"a": given["clips"], "b": parts(small, 1, 2)["images"]}, "different ranks"),
        ({"a": (Loader(small, frames=5, size=(16, 16), epochs=1), 1.0)}, "endless"),
    ):
        with pytest.raises(UserError, match=says):
            Mixture(bad)


def test_a_shape_of_heavy_clips_comes_more_often(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{"size": SHAPES[n % 2]} for n in range(8)]])
    keys = index.read_all(root, "train")["key"].to_pylist()
    url = weighted(root, {key: (3.0, 1.0)[n % 2] for n, key in enumerate(keys)}, aligned=True)
    loader = Loader(root, view=url, frames=5, size=16, batch=1, epochs=1)
    assert Counter(tuple(b["video"].shape[-2:]) for b in loader) == {(16, 32): 6, (32, 16): 2}
