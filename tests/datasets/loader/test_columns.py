"""What each column gives: latents in step with the video, labels, and what came before a window."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtake.datasets import clip, index, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader, batches

WINDOW: dict[str, Any] = {"frames": 5, "size": (16, 16), "batch": 2, "epochs": 2}
FACTOR = 4  # frames in a step of the handmade latents, which tell their clip (64 each) and their step


def decoded(dataset: str) -> dict[str, np.ndarray]:
    """All frames of all clips by key, (3, T, H, W)."""
    found = {}
    for row in index.read_all(dataset, "train").to_pylist():
        mp4 = storage.read_range(f"{dataset}/train/{row['shard']}.tar", row["mp4_offset"], row["mp4_size"])
        found[row["key"]] = clip.decode(mp4).transpose(3, 0, 1, 2)
    return found


def numbers(dataset: str) -> dict[str, int]:
    """The number of each clip, which its latent tells."""
    return {key: n for n, key in enumerate(index.read_all(dataset, "train")["key"].to_pylist())}


def each(batches: Any) -> Any:
    """The samples of batches one by one."""
    for batch in batches:
        for n in range(len(batch["key"])):
            yield {name: values[n] for name, values in batch.items() if name != "epoch"}


def test_a_latent_is_of_the_same_window_as_the_video(small: str) -> None:
    videos, number = decoded(small), numbers(small)
    starts = set()
    columns = ("video", "frame_diff", "latent-test", "label")
    for sample in each(Loader(small, **WINDOW, columns=columns)):
        latent, key = sample["latent"], sample["key"]
        assert latent.dtype == torch.float16 and latent.shape == (2, 3, 2, 2, 2)
        step = int(latent[0, 0, 0, 0, 0]) - 64 * number[key]
        assert torch.equal(
            latent[0], (64 * number[key] + step + torch.arange(2.0)).half().view(1, 2, 1, 1).expand(3, 2, 2, 2)
        )
        assert torch.equal(latent[1], -latent[0])
        seen = videos[key][:, FACTOR * step : FACTOR * step + 5]
        assert np.array_equal(sample["video"].numpy(), seen)
        assert np.array_equal(sample["frame_diff"].numpy(), np.abs(np.diff(seen.astype(int), axis=1)))
        starts.add(step)
    assert starts == {0, 1}  # of 12 frames a window of 5 starts at 0 or 4


def test_the_frame_difference_is_that_of_the_decoded_clip_exactly(dataset: str) -> None:
    rows = {(r["key"]): r for r in index.read_all(dataset, "train").to_pylist()}
    for shard in index.read_shards(dataset, "train", "frame_diff"):
        for row in shard.table.to_pylist():
            base = rows[row["key"]]
            tar = storage.join(dataset, "train", f"{base['shard']}.tar")
            video = clip.decode(storage.read_range(tar, base["mp4_offset"], base["mp4_size"])).astype(int)
            packed = storage.read_range(storage.join(dataset, "train", f"{shard.name}.tar"), row["offset"], row["size"])
            assert np.array_equal(clip.unpack_array(packed), np.abs(np.diff(video, axis=0)))


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"clip_starts": 0.5}, {"rank": 1, "world": 2}])
def test_latents_alone_are_those_of_samples_made_one_by_one(
    small: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    columns = ("latent-test", "label")
    wanted = list(Loader(small, **WINDOW | options, columns=columns, unreadable="skip"))
    monkeypatch.setattr(batches, "load", None)  # which makes one sample
    for ours, theirs in zip(Loader(small, **WINDOW | options, columns=columns), wanted, strict=True):
        assert list(ours) == [name for name in theirs if name != "skipped"]
        for name, value in ours.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
            assert same and type(value) is type(theirs[name]), name


def test_a_latent_alone_decodes_nothing(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "decode", None)
    assert next(iter(Loader(small, **WINDOW, columns=("latent-test",))))["latent"].shape == (2, 2, 3, 2, 2, 2)


@pytest.mark.parametrize("options", [{"frames": 6}, {"frames": (5, 7)}, {"frames": 5, "stride": 2}])
def test_windows_that_are_not_whole_steps_are_refused(small: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"frames: latent-test has a step for 4 frames: windows of 1 \+ 4n"):
        Loader(small, **WINDOW | options, columns=("latent-test",))


def test_damaged_steps_and_other_clips_are_errors(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[{}, {}]], columns=("latent-test",))
    options = WINDOW | {"batch": 1, "shuffle": False, "columns": ("latent-test",), "epochs": 1}
    shard = index.read_shard(root, "train", "00000.latent-test")
    rows, tar = shard.table.to_pylist(), tmp_path / "train" / "00000.latent-test.tar"
    whole = tar.read_bytes()
    data = bytearray(whole)
    last = rows[0]["offset"] + rows[0]["size"] - 1
    data[last] ^= 1  # of step 2, and the window at the start is of steps 0 and 1
    tar.write_bytes(data)
    assert len(list(Loader(root, **options))) == 2
    data[last - rows[0]["size"] // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=r"latent-test\.tar: .*-00000: steps 0 to 2 are damaged"):
        list(Loader(root, **options))
    tar.write_bytes(whole)
    url = str(tar.with_suffix(".parquet"))
    for changed in ({"base_sha256": "0" * 64}, {"key": "other"}):
        index.write_index(url, [rows[0], rows[1] | changed], schema.LATENT_INDEX, shard.tar_bytes, shard.tar_sha256)
        with pytest.raises(Failure, match="made from other clips"):
            list(Loader(root, **options | {"shuffle": True}))


def test_labels_are_numbers_of_the_sorted_classes_of_both_splits(handmade: Callable[..., str], tmp_path: Path) -> None:
    labels = ["dog", None, "cat"]
    root = handmade(tmp_path, [[{"label": label} for label in labels]])
    handmade(tmp_path, [[{"label": "ant"}]], split="val")
    loader = Loader(root, **WINDOW | {"batch": 3, "epochs": 1}, columns=("label", "json"), shuffle=False)
    (batch,) = loader
    assert loader.classes == ["ant", "cat", "dog"]
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [2, -1, 1]
    assert [j["key"] for j in batch["json"]] == batch["key"]


def test_a_dataset_without_labels_has_no_label_column(handmade: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no clip has a label"):
        Loader(handmade(tmp_path, [[{}]]), **WINDOW | {"batch": 1}, columns=("label",))


@pytest.fixture
def joined(handmade: Callable[..., str], tmp_path: Path) -> str:
    """Source a: three clips of 9 frames in a row, then a hole and a fourth; source b: clip 1 is not there."""
    a = [{"source": "a", "clip": n, "frames": 9, "start": n * 9 / 12 + (n == 3)} for n in range(4)]
    b = [{"source": "b", "clip": n, "frames": 9, "start": n / 2 * 9 / 12} for n in (0, 2)]
    return handmade(tmp_path, [[*a, *b]], columns=("latent-test",))


def past(key: str) -> list[str]:
    """The keys of the clips before this one that follow each other without a hole, and itself."""
    return [*{"a-00001": ["a-00000"], "a-00002": ["a-00000", "a-00001"]}.get(key, []), key]


@pytest.mark.parametrize("stride", [1, 2])
def test_history_is_the_frames_of_the_clips_before(joined: str, stride: int) -> None:
    videos = decoded(joined)
    options = WINDOW | {"frames": 3, "batch": 1, "epochs": 3}
    seen = set()
    for sample in each(Loader(joined, **options, stride=stride, history_seconds=1.0)):
        line = np.concatenate([videos[key] for key in past(sample["key"])], 1)
        window, before = sample["video"].numpy(), sample["history_video"].numpy()
        length = line.shape[1]
        (at,) = [
            n
            for n in range(length - 9, length - 2 * stride)
            if np.array_equal(window, line[:, n : n + 2 * stride + 1 : stride])
        ]
        wanted = [n for n in range(at - 12 // stride * stride, at, stride) if n >= 0]
        assert before.shape == (3, 12 // stride, 16, 16)
        assert int(sample["history_frames"]) == len(wanted)
        true = before.shape[1] - len(wanted)
        assert np.array_equal(before[:, true:], line[:, wanted]) and not before[:, :true].any()
        seen.add(sample["key"])
    assert len(seen) == 6


def test_history_of_latents_is_the_steps_of_the_clips_before(joined: str) -> None:
    number = numbers(joined)
    full = set()
    for sample in each(Loader(joined, **WINDOW | {"batch": 1}, columns=("latent-test",), history_seconds=1.0)):
        line = [64 * number[key] + step for key in past(sample["key"]) for step in range(3)]
        here = line.index(int(sample["latent"][0, 0, 0, 0, 0]))
        wanted = line[max(0, here - 3) : here]
        assert sample["history_latent"].shape == (2, 3, 3, 2, 2)
        assert int(sample["history_steps"]) == len(wanted)
        assert sample["history_latent"][0, 0, :, 0, 0].tolist() == [0] * (3 - len(wanted)) + wanted
        full.add(len(wanted))
    assert {0, 3} <= full


def test_clips_of_other_sizes_share_no_batch_of_a_column_that_keeps_them(
    handmade: Callable[..., str], tmp_path: Path
) -> None:
    shapes = [(16, 32), (32, 16), (16, 32), (32, 16)]
    root = handmade(tmp_path, [[{"size": size} for size in shapes]], columns=("frame_diff", "latent-test"))
    for columns in (("video", "frame_diff"), ("latent-test", "video")):
        batches = list(Loader(root, **WINDOW | {"size": (16, 16), "epochs": 1}, columns=columns))
        assert sum(len(b["key"]) for b in batches) == 4
    small = WINDOW | {"size": (8, 16), "epochs": 1}
    assert len(list(Loader(root, **small, columns=("video", "frame_diff")))) == 2


def test_a_columns_shard_that_is_ahead_of_its_base_is_not_there_yet(
    handmade: Callable[..., str], tmp_path: Path
) -> None:
    root = handmade(tmp_path, [[{}, {}], [{}, {}], [{}, {}]], columns=("frame_diff", "latent-test"))
    (tmp_path / "train" / "00001.parquet").unlink()
    (tmp_path / "train" / "00001.tar").unlink()
    loader = Loader(root, **WINDOW | {"epochs": 1}, columns=("video", "frame_diff", "latent-test"))
    assert len({key for batch in loader for key in batch["key"]}) == loader.samples == 4


def test_a_first_shard_without_clips_is_no_matter(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[], [{}, {}], []], columns=("frame_diff", "latent-test"))
    assert len(list(Loader(root, **WINDOW, columns=("video", "latent-test", "frame_diff")))) == 2


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_so_many_windows_start_their_clip_and_the_others_start_anywhere_alike(
    handmade: Callable[..., str], tmp_path: Path, share: float
) -> None:
    root = handmade(tmp_path, [[{"frames": 21}] * 4, [{"frames": 21}] * 4], columns=("latent-test",))
    options = WINDOW | {"epochs": 100, "columns": ("latent-test",), "clip_starts": share}
    starts, counts, epochs = Counter[int](), Counter[tuple[int, str]](), 100
    for batch in Loader(root, **options):
        starts.update(batch["start"].tolist())
        counts.update((batch["epoch"], key) for key in batch["key"])
        assert batch["latent"][:, 0, 0, 0, 0, 0].remainder(64).tolist() == (batch["start"] / FACTOR).tolist()
    assert len(counts) == 8 * epochs and set(counts.values()) == {1}
    draws = 8 * epochs
    expected = {0: share, **dict.fromkeys((4, 8, 12, 16), (1 - share) / 4)}
    assert starts.keys() <= expected.keys()
    for start, p in expected.items():
        assert abs(starts[start] - draws * p) <= 4.5 * (draws * p * (1 - p)) ** 0.5


def test_windows_that_start_clips_are_the_same_on_any_ranks_and_resumed(small: str) -> None:
    options = WINDOW | {"batch": 4, "columns": ("latent-test",), "clip_starts": 0.5}
    whole = [dict(zip(b["key"], b["start"].tolist(), strict=True)) for b in Loader(small, **options)]
    ranks = [Loader(small, **options, rank=rank, world=2) for rank in range(2)]
    for whole_batch, *parts in zip(whole, *ranks, strict=True):
        assert whole_batch == {k: s for b in parts for k, s in zip(b["key"], b["start"].tolist(), strict=True)}
    stopped = Loader(small, **options)
    batches = iter(stopped)
    for _ in range(3):
        next(batches)
    resumed = Loader(small, **options)
    resumed.load_state_dict(stopped.state_dict())
    assert [dict(zip(b["key"], b["start"].tolist(), strict=True)) for b in resumed] == whole[3:]
    with pytest.raises(UserError, match="another dataset, view or window"):
        Loader(small, **options | {"clip_starts": 0.4}).load_state_dict(stopped.state_dict())


def test_a_clip_of_one_window_starts_it_whatever_the_share(small: str) -> None:
    options = {"frames": 9, "size": (16, 16), "batch": 4, "epochs": 2, "clip_starts": 0.0}
    assert all(not batch["start"].any() for batch in Loader(small, **options, columns=("latent-test",)))


def test_in_the_order_on_disk_windows_are_drawn_where_a_share_is_given(small: str) -> None:
    options = WINDOW | {"batch": 4, "columns": ("latent-test",), "shuffle": False, "epochs": 1}
    plain, later = list(Loader(small, **options)), list(Loader(small, **options, clip_starts=0.0))
    assert [b["key"] for b in plain] == [b["key"] for b in later]
    assert all(not b["start"].any() for b in plain) and all((b["start"] == FACTOR).all() for b in later)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_windows_is_from_none_to_all(small: str, share: float) -> None:
    with pytest.raises(UserError, match=r"clip_starts: .* give one from 0 to 1"):
        Loader(small, **WINDOW, clip_starts=share)


def test_latents_of_a_workspace_that_was_moved_are_those_of_its_dataset(tmp_path: Path) -> None:
    from longtake.datasets import latents as column

    old, new = tmp_path / "old", tmp_path / "new"
    (old / "shards" / "0123").mkdir(parents=True)
    (old / "shards" / "0123" / "dataset.json").write_text("{}")
    made = column.Latents(
        f"{old}/shards/0123", "latent-1", {"uri": "models:/v/1", "digest": "0"}, 1, 4, 16, None, "fp32", "float16", 1,
        (0.0,), (1.0,), (0.0,), None, {},
    )  # fmt: skip
    column.write_latents(f"{old}/latents/4567", made)
    assert column.read_latents(f"{old}/latents/4567").dataset == f"{old}/shards/0123"
    # a copy is a workspace of its own, whatever becomes of the first
    shutil.copytree(old, new)
    assert column.read_latents(f"{new}/latents/4567").dataset == f"{new}/shards/0123"
    shutil.rmtree(old)
    assert column.read_latents(f"{new}/latents/4567").dataset == f"{new}/shards/0123"
