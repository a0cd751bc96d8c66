import functools
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from longtake.datasets import index, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader, order, to_model, to_pixels

WINDOW: dict[str, Any] = {"frames": 9, "size": (32, 32), "batch": 2}


@pytest.fixture(scope="module")
def dataset(handmade: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of clips of 32 x 32 and several lengths, two of them short of nine frames: do not change it."""
    shards = [
        [{"size": (32, 32), "frames": frames} for frames in (9, 12, 8 + 4 * (n > 1), 17, 10, 11)] for n in range(3)
    ]
    return handmade(tmp_path_factory.mktemp("clips"), shards, columns=("frame_diff",))


def keys(loader: Loader) -> list[list[str]]:
    return [b["key"] for b in loader]


def test_an_epoch_gives_each_long_enough_clip_once(dataset: str) -> None:
    loader = Loader(dataset, **WINDOW | {"batch": 1}, epochs=1)
    seen = [k for batch in keys(loader) for k in batch]
    clips = index.read_all(dataset, "train").to_pylist()
    assert sorted(seen) == sorted(r["key"] for r in clips if r["frame_count"] >= 9)
    assert loader.samples + loader.samples_short == len(clips)


def test_batches_have_the_shapes_and_types_that_are_promised(dataset: str) -> None:
    batch = next(iter(Loader(dataset, **WINDOW, columns=("video", "frame_diff", "json"))))
    assert batch["video"].shape == (2, 3, 9, 32, 32) and batch["video"].dtype == torch.uint8
    assert batch["frame_diff"].shape[:3] == (2, 3, 8) and batch["frame_diff"].dtype == torch.uint8
    assert [data["key"] for data in batch["json"]] == batch["key"]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_window_of_frame_diff_is_the_window_of_the_video(dataset: str, crop: Any) -> None:
    for batch in Loader(dataset, **WINDOW, columns=("video", "frame_diff"), crop=crop, epochs=2):
        assert torch.equal(batch["video"].int().diff(dim=2).abs().to(torch.uint8), batch["frame_diff"])


@functools.cache
def unbroken(url: str) -> list[dict[str, Any]]:
    return list(Loader(url, **WINDOW | {"batch": 4, "epochs": 2}))


def resumed(url: str, at: int, before: dict[str, Any], after: list[dict[str, Any]]) -> None:
    """Two epochs, stopped after batch `at` and gone on with otherwise, are those of one run, bit by bit."""
    whole, options = unbroken(url), WINDOW | {"batch": 4, "epochs": 2}
    first = Loader(url, **options, **before)
    list(islice(first, at))
    state = json.loads(json.dumps(first.state_dict()))
    assert {type(value) for value in state.values()} == {int, str} and state["taken"] == at
    ranks = [Loader(url, **options, **more) for more in after]
    for loader in ranks:
        loader.load_state_dict(state)
    rest = [list(loader) for loader in ranks]
    assert {len(batches) for batches in rest} == {len(whole) - at}
    for number, parts in enumerate(zip(*rest, strict=True), at):
        assert [key for part in parts for key in part["key"]] == whole[number]["key"]
        assert torch.equal(torch.cat([part["video"] for part in parts]), whole[number]["video"])
        assert {part["epoch"] for part in parts} == {whole[number]["epoch"]}


def test_resuming_at_any_step_on_any_world_size_gives_bitwise_the_same_batches(dataset: str) -> None:
    length = 2 * Loader(dataset, **WINDOW | {"batch": 4}).batches_per_epoch
    assert length >= 8
    for at in range(length + 1):
        world = (1, 2, 4)[at % 3]
        before = {"rank": at % 2, "world": 2}
        resumed(dataset, at, before, [{"rank": rank, "world": world} for rank in range(world)])


def test_resuming_without_workers_what_workers_began(dataset: str) -> None:
    resumed(dataset, 4, {"workers": 2}, [{}])


@pytest.mark.slow
def test_resuming_with_workers_on_two_ranks(dataset: str) -> None:
    resumed(dataset, 5, {}, [{"workers": workers, "rank": rank, "world": 2} for rank, workers in enumerate((1, 3))])


def test_two_ranks_see_halves_of_what_one_sees(dataset: str) -> None:
    alone = keys(Loader(dataset, **WINDOW, epochs=2))
    ranks = [keys(Loader(dataset, **WINDOW, epochs=2, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone


def test_a_state_of_another_stream_is_refused(dataset: str, small: str, tmp_path: Path) -> None:
    state = Loader(dataset, **WINDOW).state_dict()
    keys = index.read_all(dataset, "train")["key"].to_pylist()
    url = str(tmp_path / "view.parquet")
    view.write(url, view.rows("train", keys, [None] * len(keys)), {})
    for other, says in (
        ({"seed": 1}, "another seed"),
        ({"batch": 1}, "another global batch"),
        *(
            (option, "another dataset, view or window")
            for option in (
                {"frames": 5},
                {"size": (16, 16)},
                {"stride": 2, "frames": 4},
                {"crop": "random"},
                {"shuffle": False},
                {"last": "pad"},
                {"view": url},
                {"history_seconds": 1.0},
            )
        ),
    ):
        with pytest.raises(UserError, match=says) as caught:
            Loader(dataset, **WINDOW | other).load_state_dict(state)
        assert "\n" not in str(caught.value)
    for bad, says in (
        (state | {"order": order.ORDER_VERSION + 1}, "another version of the order"),
        (Loader(small, **WINDOW | {"size": (16, 16)}).state_dict(), "another dataset"),
        ({}, "another version of the order"),
    ):
        with pytest.raises(UserError, match=says):
            Loader(dataset, **WINDOW).load_state_dict(bad)


def test_a_view_chooses_the_clips(dataset: str, tmp_path: Path) -> None:
    table = index.read_all(dataset, "train")
    reasons = [None if n > 10 else "too little" for n in table["frame_count"].to_pylist()]
    assert 0 < sum(r is not None for r in reasons) < len(table)
    url = str(tmp_path / "view.parquet")
    storage.write(url, index.to_parquet(view.rows("train", table["key"].to_pylist(), reasons)))
    kept = {k for k, r in zip(table["key"].to_pylist(), reasons, strict=True) if r is None}
    assert {k for batch in keys(Loader(dataset, view=url, **WINDOW | {"batch": 1}, epochs=1)) for k in batch} <= kept
    storage.write(url, index.to_parquet(view.rows("train", table["key"].to_pylist(), ["no"] * len(table))))
    with pytest.raises(UserError, match="no usable sample"):
        Loader(dataset, view=url, **WINDOW)


def test_pad_fills_the_last_batch_from_the_front(dataset: str) -> None:
    loader = Loader(dataset, **WINDOW | {"batch": 4}, last="pad", shuffle=False, epochs=1)
    flat = [k for b in keys(loader) for k in b]
    assert flat[: loader.samples] == sorted(set(flat))
    assert flat[loader.samples :] == flat[: len(flat) - loader.samples]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": (64, 64)}, "smaller than size 64x64"),
        ({"columns": ("video", "latents")}, "unknown latents; there are"),
        ({"columns": ("video", "video")}, "columns: video twice"),
        ({"history_least": 1.0}, "no clip follows others of its source for 1 s"),
        ({"frames": 400}, "no usable sample"),
        ({"batch": 4000}, "no batch of 4000"),
        ({"split": "test"}, "no committed shard"),
        ({"view": "/nonexistent/view.parquet"}, "no such view"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(dataset: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Loader(dataset, **WINDOW | options)


def test_a_column_of_other_clips_or_too_short_is_an_error(dataset: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    name = index.shard_names(str(copy), "train", "frame_diff")[0]
    shard = index.read_shard(str(copy), "train", name)
    rows = shard.table.to_pylist()
    url = str(copy / "train" / f"{name}.parquet")
    for changed, says in (
        ([rows[0] | {"base_sha256": "0" * 64}, *rows[1:]], "made from other clips"),
        (rows[:-1], "1 clips have no frame_diff"),
    ):
        index.write_index(url, changed, schema.COLUMN_INDEX, shard.tar_bytes, shard.tar_sha256)
        with pytest.raises(Failure, match=says):
            list(Loader(str(copy), **WINDOW | {"batch": 1, "frames": 2}, columns=("video", "frame_diff"), epochs=1))


def test_a_truncated_tar_stops_with_its_name(dataset: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    for tar in (copy / "train").glob("?????.tar"):
        tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(Failure, match=r"\.tar: is too short for bytes"):
        list(Loader(str(copy), **WINDOW, epochs=1))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_byte_is_one_line_wherever_it_is_read(dataset: str, tmp_path: Path, workers: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    for tar in (copy / "train").glob("?????.tar"):
        data = bytearray(tar.read_bytes())
        data[2000] ^= 1
        tar.write_bytes(data)
    with pytest.raises(Failure, match=r"\.tar: bytes \d+ to \d+ are damaged") as caught:
        list(Loader(str(copy), **WINDOW, epochs=1, workers=workers))
    assert "\n" not in str(caught.value)


def test_reading_from_another_filesystem_gives_the_same_batches(dataset: str) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(dataset, "/remote-dataset", recursive=True)
    assert keys(Loader("memory://remote-dataset", **WINDOW, epochs=1)) == keys(Loader(dataset, **WINDOW, epochs=1))


def test_pixels_survive_the_way_to_the_model_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model(pixels)), pixels)
    assert to_model(pixels).min() == -1 and to_model(pixels).max() == 1


def test_an_empty_table_makes_an_empty_view() -> None:
    assert len(view.rows("train", [], [])) == 0
    empty = pa.table({"motion": pa.array([], pa.float32())})
    assert [b.tolist() for _, b in view.broken(empty, {"motion": {"min": 1.0}})] == [[]]


def test_fewer_samples_than_ranks_are_refused_or_repeated(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{}, {}], [{}]])
    options: dict[str, Any] = {"frames": 9, "size": (16, 16), "batch": 4, "world": 4, "epochs": 2}
    with pytest.raises(UserError, match="3 samples give no batch of 4; lower `batch` or use `last: pad`"):
        Loader(root, **options)
    ranks = [keys(Loader(root, **options, rank=rank, last="pad")) for rank in range(4)]
    for batch in zip(*ranks, strict=True):
        joined = [key for part in batch for key in part]
        assert len(set(joined)) == 3 and joined[3] == joined[0]


def test_one_sample_is_a_dataset(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{}]])
    batches = list(Loader(root, frames=12, size=(16, 16), batch=1, epochs=3))
    assert [b["key"] for b in batches] == [["train000-00000"]] * 3 and batches[0]["video"].shape == (1, 3, 12, 16, 16)
    padded = list(Loader(root, frames=9, size=(16, 16), batch=3, epochs=1, last="pad"))
    assert [b["key"] for b in padded] == [["train000-00000"] * 3]


def test_a_clip_shorter_than_the_window_is_left_out_and_counted(dataset: str) -> None:
    loader = Loader(dataset, **WINDOW | {"batch": 1, "frames": 4, "stride": 4}, epochs=1)
    # 13 frames are needed
    assert (loader.samples, loader.samples_short) == (3, 15)
    assert len(keys(loader)) == 3


def test_a_short_clip_is_not_too_small_either(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{"size": (32, 32)}, {"frames": 5}]])
    assert Loader(root, frames=9, size=(32, 32), batch=1).samples == 1


def test_a_shard_without_index_is_not_there(dataset: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / "train" / "00001.parquet").unlink()
    loader = Loader(str(copy), **WINDOW | {"batch": 1}, columns=("video", "frame_diff"), epochs=1)
    gone = set(index.read_shard(dataset, "train", "00001").table["key"].to_pylist())
    assert loader.samples == 11 and not gone & {key for batch in keys(loader) for key in batch}


def test_a_missing_tar_is_named(dataset: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / "train" / "00001.tar").unlink()
    with pytest.raises(Failure, match=r"train/00001\.tar: is missing; run `longtake dataset verify`"):
        list(Loader(str(copy), **WINDOW, epochs=1))


def test_a_damaged_frame_difference_is_an_error(dataset: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    row = index.read_shard(dataset, "train", "00000.frame_diff").table.to_pylist()[1]
    tar = copy / "train" / "00000.frame_diff.tar"
    data = bytearray(tar.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=r"00000\.frame_diff\.tar: bytes \d+ to \d+ are damaged"):
        list(Loader(str(copy), **WINDOW, columns=("frame_diff",), epochs=1))


def test_a_worker_that_the_system_kills_is_one_line_with_a_remedy(dataset: str) -> None:
    import psutil

    batches = iter(Loader(dataset, **WINDOW, workers=1))
    next(batches)
    started = [p for p in psutil.Process().children(recursive=True) if "forkserver" in " ".join(p.cmdline())]
    # the server's children are the workers
    for process in started:
        if process.ppid() != psutil.Process().pid:
            process.kill()
    with pytest.raises(Failure, match="a decoding process was killed, perhaps for want of memory: lower `workers`"):
        list(batches)
