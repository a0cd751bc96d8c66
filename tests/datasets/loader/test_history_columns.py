"""Several columns of latents side by side, and the clips that have a long enough past: how a memory gets its history."""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.datasets import compact, index, neighbours, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.shard import sha256_of, write_tar

HIGH, LOW = "latent-test", "latent-low"
BOTH = {"latent": HIGH, "low": LOW}
WINDOW: dict[str, Any] = {"frames": 5, "size": (16, 16), "batch": 2, "epochs": 2}
Change = Callable[[dict[str, Any], np.ndarray], np.ndarray]


def low(_: dict[str, Any], high: np.ndarray) -> np.ndarray:
    """Two channels at one position of each two by two, whose values tell the clip and the step of the full one."""
    return high[:, :, :2, ::2, ::2] + np.array([0.5, -0.5], np.float16).reshape(1, 2, 1, 1, 1)


def beside(root: str, change: Change = low, name: str = LOW, **facts: Any) -> str:
    """Another column, its arrays (steps, 2, C, h, w) made from those of `latent-test`. Returns the dataset."""
    for shard in index.read_shards(root, "train", HIGH):
        path = Path(root) / "train" / f"{shard.name.partition('.')[0]}.{name}.tar"
        rows = shard.table.to_pylist()
        data = path.with_name(f"{shard.name}.tar").read_bytes()
        arrays = [np.load(io.BytesIO(data[row["offset"] : row["offset"] + row["size"]])) for row in rows]
        changed = [np.ascontiguousarray(change(row, array)) for row, array in zip(rows, arrays, strict=True)]
        parts = []
        for array in changed:
            buffer = io.BytesIO()
            np.save(buffer, array)
            parts.append({"npy": buffer.getvalue()})
        members = write_tar(path, [(row["key"], part) for row, part in zip(rows, parts, strict=True)])
        table = []
        for row, member, array in zip(rows, members, changed, strict=True):
            placed = {field: getattr(member, field) for field in ("offset", "size", "crc32", "sha256")}
            shape = dict(zip(("steps", "channels", "height", "width"), np.delete(array.shape, 1).tolist(), strict=True))
            if not array.shape[0]:
                shape |= {"height": 0, "width": 0}
            sums = np.array([zlib.crc32(step.tobytes()) for step in array], "<u4").tobytes()
            table.append(row | placed | shape | {"step_crc32": sums} | facts)
        url, size = str(path.with_suffix(".parquet")), path.stat().st_size
        index.write_index(url, table, schema.LATENT_INDEX, size, sha256_of(path))
    return root


def row_of(source: str, clip: int, **facts: Any) -> dict[str, Any]:
    """A clip of 12 frames, a second, that begins where the one of the number before ends."""
    return {"source": source, "clip": clip, "frames": 12, "start": float(clip)} | facts


@pytest.fixture(scope="module")
def pair(handmade: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards, of a source of five clips in a row and one of three, with both columns: do not change it."""
    shards = [[row_of("a", n) for n in range(5)], [row_of("b", n) for n in range(3)]]
    return beside(handmade(tmp_path_factory.mktemp("pair"), shards, columns=(HIGH,)))


@pytest.fixture
def own(handmade: Callable[..., str], tmp_path: Path) -> str:
    """A source of four clips in a row, with one column, to be changed."""
    return handmade(tmp_path, [[row_of("a", n) for n in range(4)]], columns=(HIGH,))


def each(batches: Any) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for n in range(len(batch["key"])):
            yield {name: values[n] for name, values in batch.items() if name != "epoch"}


def test_a_second_column_is_of_the_same_steps_in_its_own_shape(pair: str) -> None:
    starts = set()
    for sample in each(Loader(pair, **WINDOW, columns=BOTH)):
        assert sample["latent"].shape == (2, 3, 2, 2, 2) and sample["low"].shape == (2, 2, 2, 1, 1)
        assert torch.equal(sample["low"][0], sample["latent"][0, :2, :, ::2, ::2] + 0.5)
        assert torch.equal(sample["low"][1], sample["latent"][1, :2, :, ::2, ::2] - 0.5)
        starts.add(int(sample["latent"][0, 0, 0, 0, 0]) % 64)
    assert starts == {0, 1}


def test_columns_have_the_names_that_they_are_given_in_any_order(pair: str) -> None:
    given = ({"latent": HIGH, "video": "video", "low": LOW}, {"a": LOW, "b": HIGH})
    for first, second in zip(*(Loader(pair, **WINDOW, columns=columns) for columns in given), strict=False):
        assert first["key"] == second["key"] and {"latent", "low", "video"} <= first.keys() and "latent" not in second
        assert torch.equal(first["latent"], second["b"]) and torch.equal(first["low"], second["a"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ((HIGH, LOW), f"columns: {HIGH} and {LOW} need names, such as"),
        ({"clip": "video"}, "columns: video cannot be called 'clip'"),
        ({"video": HIGH}, f"columns: {HIGH} cannot be called 'video'"),
    ],
)
def test_columns_that_would_be_mistaken_are_refused(pair: str, columns: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Loader(pair, **WINDOW, columns=columns)


def test_three_columns_and_bfloat16_beside_float16(own: str) -> None:
    def bits(_: dict[str, Any], high: np.ndarray) -> np.ndarray:
        return torch.from_numpy(high).bfloat16().view(torch.uint16).numpy()

    beside(own)
    beside(own, bits, "latent-third", dtype="bfloat16")
    for batch in Loader(own, **WINDOW, columns=BOTH | {"third": "latent-third"}, history_seconds=1.0):
        assert batch["third"].dtype == batch["history_third"].dtype == torch.bfloat16
        assert batch["low"].dtype == batch["history_low"].dtype == torch.float16
        assert torch.equal(batch["third"], batch["latent"].bfloat16())
        assert torch.equal(batch["history_third"], batch["history_latent"].bfloat16())


def test_the_history_of_a_second_column_is_of_the_same_steps(pair: str) -> None:
    counts = set()
    for sample in each(Loader(pair, **WINDOW, columns=BOTH, history_seconds=2.0)):
        high, small, count = sample["history_latent"], sample["history_low"], int(sample["history_steps"])
        assert high.shape == (2, 3, 6, 2, 2) and small.shape == (2, 2, 6, 1, 1)
        true = small[:, :, 6 - count :]
        assert torch.equal(true[0], high[0, :2, 6 - count :, ::2, ::2] + 0.5)
        assert torch.equal(true[1], high[1, :2, 6 - count :, ::2, ::2] - 0.5)
        assert not small[:, :, : 6 - count].any()
        counts.add(count)
    assert {0, 6} <= counts and len(counts) > 2


def test_clips_that_one_column_alone_keeps_apart_share_no_batch(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{"source": f"s{n}"} for n in range(12)]], columns=(HIGH,))

    def wide(axis: int, number: int) -> Change:
        return lambda row, high: high.repeat(1 + int(row["key"][1:-6]) // number % 2, axis)

    for nth, (axis, number) in enumerate(((3, 1), (4, 2), (4, 4))):
        beside(root, wide(axis, number), f"latent-{nth}")
    columns = {"latent": HIGH} | {f"number_{nth}": f"latent-{nth}" for nth in range(3)}
    shapes, keys = set(), set()
    for batch in Loader(
        root, **WINDOW | {"epochs": 1}, columns=columns, last="pad"
    ):  # stacking them is what would fail
        shapes.add(tuple(tuple(batch[name].shape[-2:]) for name in columns if name != "latent"))
        keys |= set(batch["key"])
    assert len(shapes) == 8 and len(keys) == 12


def test_larger_and_longer_latents_share_smaller_batches(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{"source": f"s{n}", "frames": (5, 9)[n % 2]} for n in range(16)]], columns=(HIGH,))
    beside(root, lambda row, high: high.repeat(1 + int(row["key"][1:-6]) // 2 % 2, 3), "latent-tall")
    options: dict[str, Any] = {"columns": {"latent": "latent-tall"}, "frames": (5, 9), "batch": 4, "last": "pad"}
    sizes = {}
    for batch in Loader(root, **options, positions=36, epochs=1):
        count, _, _, *shape = batch["latent"].shape
        assert count * np.prod(shape) <= 36
        sizes[tuple(shape)] = count
    assert sizes == {(2, 2, 2): 4, (2, 4, 2): 2, (3, 2, 2): 3, (3, 4, 2): 1}

    # of two ranks each has as many, and the batches are the same after a resume
    ranks = [Loader(root, **options, positions=72, rank=rank, world=2, epochs=1) for rank in range(2)]
    for one, two in zip(*ranks, strict=True):
        assert one["latent"].shape == two["latent"].shape and set(one["key"]).isdisjoint(two["key"])
    state = ranks[0].state_dict()
    with pytest.raises(UserError, match="belongs to another global batch"):
        Loader(root, **options, positions=36).load_state_dict(state)
    with pytest.raises(UserError, match="positions: 20 a process hold no window of 24 positions of latents; raise it"):
        Loader(root, **options, positions=40, world=2)
    with pytest.raises(UserError, match="positions: are of latents; name a column of latents"):
        Loader(root, **options | {"columns": ("video",), "size": 16}, positions=40)


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_resuming_with_two_columns_and_their_history_gives_bitwise_the_same_batches(pair: str, at: int) -> None:
    options: dict[str, Any] = {**WINDOW, "columns": BOTH, "history_seconds": 2.0, "history_least": 1.0}
    whole = list(Loader(pair, **options))
    assert len(whole) == 6
    first = Loader(pair, **options)
    list(islice(first, at))
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [Loader(pair, **options, rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for expected, *parts in zip(whole[at:], *ranks, strict=True):
        assert expected["key"] == [key for part in parts for key in part["key"]]
        for name in ("latent", "low", "history_latent", "history_low", "history_steps"):
            assert torch.equal(expected[name], torch.cat([part[name] for part in parts]))


def test_a_state_of_other_columns_or_another_least_history_is_refused(pair: str) -> None:
    options: dict[str, Any] = WINDOW | {"columns": BOTH}
    state = Loader(pair, **options).state_dict()
    for other in ({"columns": (HIGH,)}, {"columns": {"low": LOW, "latent": HIGH}}, {"history_least": 1.0}):
        with pytest.raises(UserError, match="another dataset, view or window"):
            Loader(pair, **options | other).load_state_dict(state)
    least = Loader(pair, **options, history_least=1.0).state_dict()
    with pytest.raises(UserError, match="another dataset, view or window"):
        Loader(pair, **options, history_least=2.0).load_state_dict(least)


@pytest.mark.parametrize("history", [0.0, 1.0])
def test_damaged_steps_of_a_second_column_are_an_error(own: str, history: float) -> None:
    beside(own)
    options = WINDOW | {"batch": 1, "shuffle": False, "epochs": 1, "columns": BOTH, "history_seconds": history}
    tar = Path(own) / "train" / f"00000.{LOW}.tar"
    rows = index.read_shard(own, "train", tar.stem).table.to_pylist()
    data = bytearray(tar.read_bytes())
    data[rows[0]["offset"] + rows[0]["size"] - 1] ^= 1  # step 2, of which a window at the start sees nothing
    tar.write_bytes(data)
    loader = Loader(own, **options)
    if history:
        with pytest.raises(Failure, match=rf"{LOW}\.tar: a-00000: steps 0 to 3 are damaged"):
            list(loader)
    else:
        assert len(list(loader)) == 4
        data[rows[3]["offset"] + 128] ^= 1  # where its steps begin
        tar.write_bytes(data)
        with pytest.raises(Failure, match=rf"{LOW}\.tar: a-00003: steps 0 to 2 are damaged"):
            list(Loader(own, **options))


def test_a_second_column_of_other_clips_is_an_error(own: str) -> None:
    beside(own, base_sha256="0" * 64)
    with pytest.raises(Failure, match=rf"{LOW}\.tar: made from other clips"):
        list(Loader(own, **WINDOW, columns=BOTH))


def test_columns_of_other_steps_are_one_line(own: str) -> None:
    beside(own, factor=8)
    with pytest.raises(UserError, match=f"{LOW} has a step for 8 frames, {HIGH} for 4; name latents of one encoder"):
        Loader(own, **WINDOW, columns=BOTH)
    beside(own, lambda row, high: low(row, high)[: 2 if row["key"] == "a-00001" else 3])
    for history in (0.0, 1.0):
        with pytest.raises(Failure, match=rf"{LOW}\.tar: a-00001: has 2 steps, and 3 in {HIGH}; delete") as caught:
            list(Loader(own, **WINDOW, columns=BOTH, history_seconds=history))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"columns: {HIGH} twice"):
        Loader(own, **WINDOW, columns=(HIGH, HIGH))


def test_a_clip_without_latents_in_one_column_is_left_out_and_ends_what_came_before(own: str) -> None:
    beside(own, lambda row, high: low(row, high)[: 0 if row["key"] == "a-00001" else None])
    options = WINDOW | {"batch": 1, "epochs": 3, "history_seconds": 1.0}
    loader = Loader(own, **options, columns=BOTH)
    assert (loader.samples, loader.samples_without_latent) == (3, 1)
    steps: dict[str, set[int]] = {}
    for sample in each(loader):
        start = int(sample["latent"][0, 0, 0, 0, 0]) % 64
        steps.setdefault(sample["key"], set()).add(int(sample["history_steps"]) - start)
    assert steps["a-00000"] == steps["a-00002"] == {0}
    assert max(steps["a-00003"]) == 3
    # the clip is known to videos
    assert Loader(own, **options, history_least=1.0).samples == 3
    assert Loader(own, **options, columns=BOTH, history_least=1.0).samples == 1


def joined(handmade: Callable[..., str], folder: Path) -> str:
    """Sources of one shard, whose clips of a second or less follow each other, but for what their names say."""
    shard = [
        *[row_of("a", n) for n in range(4)],
        *[row_of("hole", n, start=n + 0.2 * (n >= 2)) for n in range(4)],
        *[row_of("frame-off", n, start=n + 1 / 12 * (n == 1)) for n in range(2)],
        *[row_of("not-there", n) for n in (0, 1, 3, 4)],
        *[row_of("one", 0), row_of("another", 1)],
        *[row_of("skips", n, start=n / 2) for n in (0, 2)],
        *[row_of("size", n, size=(16, 16) if n < 2 else (16, 24)) for n in range(4)],
        *[row_of("short", n, frames=5, start=n * 5 / 12) for n in range(5)],
    ]
    return handmade(folder, [shard, [row_of("a-on", n + 4) for n in range(1)]], columns=(HIGH,))


WITH_A_SECOND = [
    *("a-00001", "a-00002", "a-00003", "hole-00001", "hole-00003", "frame-off-00001", "not-there-00001"),
    *("not-there-00004", "size-00001", "size-00003", "short-00003", "short-00004"),
]


def test_clips_with_less_past_than_asked_for_are_left_out_and_counted(
    handmade: Callable[..., str], tmp_path: Path
) -> None:
    root = joined(handmade, tmp_path)
    options = WINDOW | {"batch": 1, "epochs": 1}
    everything = Loader(root, **options, columns=(HIGH,))
    assert everything.samples_without_history == 0
    for seconds, expected in (
        (1.0, WITH_A_SECOND),
        (5 / 12, sorted({*WITH_A_SECOND, "short-00001", "short-00002"})),
        (2.0, ["a-00002", "a-00003"]),
        (3.0, ["a-00003"]),
    ):
        loader = Loader(root, **options, columns=(HIGH,), history_least=seconds)
        assert sorted(key for batch in loader for key in batch["key"]) == sorted(expected)
        assert loader.samples == len(expected)
        assert loader.samples_without_history == everything.samples - len(expected)
    with pytest.raises(
        UserError, match=r"\(train\): no clip follows others of its source for 4 s without a hole; lower"
    ):
        Loader(root, **options, columns=(HIGH,), history_least=4.0)


def test_with_as_much_history_as_is_asked_for_every_history_is_whole(
    handmade: Callable[..., str], tmp_path: Path
) -> None:
    root, steps, frames = joined(handmade, tmp_path), set(), set()
    for seconds in (0.75, 1.0, 1.3):
        options: dict[str, Any] = {"history_seconds": seconds, "history_least": seconds}
        for batch in Loader(root, **WINDOW | {"batch": 1, "size": 16}, columns=("video", HIGH), **options):
            assert int(batch["history_steps"]) == batch["history_latent"].shape[3] == round(3 * seconds)
            assert int(batch["history_frames"]) == batch["history_video"].shape[2] == round(12 * seconds)
            steps.add(batch["history_latent"].shape[3])
            frames.add(batch["history_video"].shape[2])
    assert steps == {2, 3, 4} and frames == {9, 12, 16}


def test_all_rows_at_once_reach_as_far_back_as_each_by_itself(handmade: Callable[..., str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards: list[list[dict[str, Any]]] = []
    for shard in range(3):
        rows, start = [], 0.0
        for n in range(40):
            frames = int(rng.integers(5, 13))
            number, size = n + int(rng.random() < 0.1), (16, 16) if rng.random() < 0.9 else (16, 24)
            source = f"s{shard}{n // 12}"
            rows.append({"source": source, "clip": number, "frames": frames, "start": start, "size": size})
            start += frames / 12 + rng.choice([0, 0, 0, 0.1, -0.1, 0.2, -0.2])
        shards.append(rows)
    rows_of, _ = compact.open_split(handmade(tmp_path, shards), "train")
    for seconds in (0.5, 1.0, 2.5):
        expected = []
        for shard, count in enumerate(rows_of.counts.tolist()):
            for at in range(count):
                past = [row for _, row in neighbours.pasts(rows_of, shard, at, seconds)][1:]
                expected.append(sum(row["frame_count"] for row in past) >= seconds * 12)
        assert neighbours.reach_back(rows_of, seconds).tolist() == expected
        assert 0 < sum(expected) < len(expected)


def test_without_a_least_history_opening_reads_no_rows(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    of = compact.Rows.of
    monkeypatch.setattr(compact.Rows, "of", lambda rows, shard: reads.append(shard) or of(rows, shard))
    Loader(pair, **WINDOW, columns=("video",), history_seconds=1.0)
    assert not reads
    Loader(pair, **WINDOW, columns=("video",), history_seconds=1.0, history_least=1.0)
    assert reads == [0, 1]


def test_a_dataset_folded_together_gives_the_same_clips(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = beside(joined(handmade, tmp_path))
    options: dict[str, Any] = WINDOW | {"columns": BOTH, "history_least": 1.0, "batch": 1}
    before = [batch["key"] for batch in Loader(root, **options)]
    for column in (None, HIGH, LOW):
        compact.write(root, "train", column)
    assert storage.exists(storage.join(root, "compact", "train.arrow"))
    assert [batch["key"] for batch in Loader(root, **options)] == before
