import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from longtake.datasets import clip, index, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader, to_model, to_pixels

WINDOW: dict[str, Any] = {"frames": 9, "size": (32, 32), "batch": 2}


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
    assert batch["json"][0]["source"] == batch["key"][0].partition("-")[0]


def test_the_frame_difference_is_that_of_the_decoded_clip_exactly(dataset: str) -> None:
    rows = {(r["key"]): r for r in index.read_all(dataset, "train").to_pylist()}
    for shard in index.read_shards(dataset, "train", "frame_diff"):
        for row in shard.table.to_pylist():
            base = rows[row["key"]]
            tar = storage.join(dataset, "train", f"{base['shard']}.tar")
            video = clip.decode(storage.read_range(tar, base["mp4_offset"], base["mp4_size"])).astype(int)
            packed = storage.read_range(storage.join(dataset, "train", f"{shard.name}.tar"), row["offset"], row["size"])
            assert np.array_equal(clip.unpack_array(packed), np.abs(np.diff(video, axis=0)))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_window_of_frame_diff_is_the_window_of_the_video(dataset: str, crop: Any) -> None:
    for batch in Loader(dataset, **WINDOW, columns=("video", "frame_diff"), crop=crop, epochs=2):
        assert torch.equal(batch["video"].int().diff(dim=2).abs().to(torch.uint8), batch["frame_diff"])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_bitwise_the_same_batches_on_any_worker_count(dataset: str, workers: int) -> None:
    whole = list(Loader(dataset, **WINDOW, epochs=3))
    first = Loader(dataset, **WINDOW, epochs=3, workers=2 - workers)
    stream = iter(first)
    head = [next(stream) for _ in range(4)]
    state = json.loads(json.dumps(first.state_dict()))
    second = Loader(dataset, **WINDOW, epochs=3, workers=workers)
    second.load_state_dict(state)
    both = [*head, *second]
    assert [b["key"] for b in both] == [b["key"] for b in whole]
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(both, whole, strict=True))


def test_two_ranks_see_halves_of_what_one_sees(dataset: str) -> None:
    alone = keys(Loader(dataset, **WINDOW, epochs=2))
    ranks = [keys(Loader(dataset, **WINDOW, epochs=2, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone


def test_a_state_of_another_stream_is_refused(dataset: str) -> None:
    state = Loader(dataset, **WINDOW).state_dict()
    for other, says in (
        ({"seed": 1}, "another seed"),
        ({"batch": 1}, "another global batch"),
        ({"frames": 5}, "another dataset, view or window"),
    ):
        with pytest.raises(UserError, match=says):
            Loader(dataset, **WINDOW | other).load_state_dict(state)


def test_a_view_chooses_the_clips(dataset: str, tmp_path: Path) -> None:
    table = index.read_all(dataset, "train")
    reasons = [None if m >= np.median(table["motion"]) else "too little" for m in table["motion"].to_pylist()]
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
            Loader(str(copy), **WINDOW, columns=("video", "frame_diff"))


def test_a_truncated_tar_stops_with_its_name(dataset: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    for tar in (copy / "train").glob("?????.tar"):
        tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(Failure, match=r"\.tar: is too short for bytes"):
        list(Loader(str(copy), **WINDOW, epochs=1))


@pytest.mark.parametrize("workers", [0, 1])
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
