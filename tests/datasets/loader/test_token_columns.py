"""Tokens in batches: those of the window that all other columns have, wherever it begins."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import claps
import numpy as np
import pytest
import spoken
import tiny_codes
import torch
from tiny_codes import Codes, at_once, cache, settings

from longtake.datasets import audio, compact, index, storage
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.streams import Lengths

WINDOW: dict[str, Any] = {"frames": 4, "size": (16, 16), "batch": 2, "epochs": 3}


@pytest.fixture(scope="module")
def model() -> Codes:
    return tiny_codes.codes()


@pytest.fixture(scope="module")
def made(small: str, model: Codes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Clips of 12 frames with a window at every second: read it, do not change it."""
    root = str(shutil.copytree(small, tmp_path_factory.mktemp("tokens") / "dataset"))
    return root, cache(root, model, settings(hop=2))[0]


def each(batches: Any) -> Any:
    """The samples of batches one by one."""
    for batch in batches:
        for n in range(len(batch["key"])):
            yield {name: values[n] for name, values in batch.items() if name != "epoch"}


def test_tokens_are_those_of_the_window_beside_them(made: tuple[str, str], model: Codes) -> None:
    root, name = made
    starts = set()
    for batch in Loader(root, **WINDOW, columns=("video", "label", "frame_diff", name)):
        assert batch["tokens"].dtype == torch.int64 and batch["tokens"].shape == (2, 1, 2, 2)
        for video, tokens, start in zip(batch["video"], batch["tokens"], batch["start"].tolist(), strict=True):
            expected = at_once(model, video.permute(1, 2, 3, 0).numpy(), 0, settings())
            assert np.array_equal(tokens.numpy(), expected)
            starts.add(start)
    assert starts == {0, 2, 4, 6, 8}


def test_tokens_alone_decode_nothing_and_are_the_same(made: tuple[str, str]) -> None:
    root, name = made
    alone = each(Loader(root, **WINDOW, columns=(name,)))
    beside = each(Loader(root, **WINDOW, columns=("video", name)))
    for one, other in zip(alone, beside, strict=True):
        assert one["key"] == other["key"] and torch.equal(one["tokens"], other["tokens"]) and "video" not in one


def test_windows_with_a_stride_are_at_frames_that_far_apart(small: str, model: Codes, tmp_path: Path) -> None:
    root = str(shutil.copytree(small, tmp_path / "dataset"))
    chosen = settings(stride=2, hop=3)
    name, _ = cache(root, model, chosen)
    videos = dict(tiny_codes.clips(root, (16, 16)))
    starts = set()
    for sample in each(Loader(root, **WINDOW, stride=2, columns=("video", name))):
        start = int(sample["start"])
        assert np.array_equal(sample["tokens"], at_once(model, videos[sample["key"]], start, chosen))
        assert np.array_equal(sample["video"].permute(1, 2, 3, 0), videos[sample["key"]][start : start + 7 : 2])
        starts.add(start)
    assert starts == {0, 3}, "of 12 frames a window that spans 7 begins at 0 or 3"


def test_captions_texts_and_sound_are_of_the_same_window(model: Codes, tmp_path: Path) -> None:
    root = claps.dataset_of(tmp_path / "dataset", [claps.write(tmp_path / "a.mp4")], {"codec": "flac"})
    chosen = settings(size=(32, 32))
    name, _ = cache(root, model, chosen)
    # each quarter of a second has a caption of its own, and a token window is shorter than that
    spans = [Caption(str(n), n / 4, (n + 1) / 4) for n in range(4)]
    spoken.describe(root, dict.fromkeys(spoken.keys(root), spans))
    spoken.encode(root, spoken.Counting())
    sounds = {row["key"]: audio.decode(row["data"], 0, row["samples"], 2) for row in claps.column(root)}
    videos, rate, count = dict(tiny_codes.clips(root, (32, 32))), 48_000, 0
    columns = ("audio", "video", name, spoken.COLUMN, spoken.TEXT)
    for sample in each(Loader(root, **WINDOW | {"size": (32, 32)}, columns=columns)):
        key, start = sample["key"], int(sample["start"])
        assert np.array_equal(sample["tokens"], at_once(model, videos[key], start, chosen))
        first = start * rate // claps.FPS
        assert np.array_equal(sample["audio"], sounds[key][:, first : first + 4 * rate // claps.FPS])
        assert (
            start / claps.FPS < (int(sample["caption"]) + 1) / 4
            and int(sample["caption"]) / 4 < (start + 4) / claps.FPS
        )
        assert torch.equal(sample["text"][0].float(), spoken.Counting().states(sample["caption"])[0])
        count += 1
    assert count > 5


def test_two_columns_of_tokens_are_of_one_window_or_refused(made: tuple[str, str], tmp_path: Path) -> None:
    root = str(shutil.copytree(made[0], tmp_path / "dataset"))
    coarse = tiny_codes.codes(codes=7)
    other, _ = cache(root, coarse, settings(hop=2))
    columns = {"video": "video", "tokens": made[1], "coarse": other}
    for sample in each(Loader(root, **WINDOW, columns=columns)):
        video = sample["video"].permute(1, 2, 3, 0).numpy()
        assert np.array_equal(sample["coarse"], at_once(coarse, video, 0, settings()))
        assert np.array_equal(sample["tokens"], at_once(tiny_codes.codes(), video, 0, settings()))
    apart, _ = cache(root, coarse, settings(hop=3))
    with pytest.raises(UserError, match=r"columns: tokens-\w+ has a window every 3 frames, tokens-\w+ every 2"):
        Loader(root, **WINDOW, columns={"tokens": made[1], "apart": apart})


def test_batches_are_the_same_whoever_makes_them_and_after_a_stop(made: tuple[str, str]) -> None:
    root, name = made
    options = {**WINDOW, "columns": (name,)}
    expected = list(Loader(root, **options))
    stopped = Loader(root, **options)
    first = list(islice(stopped, 4))
    resumed = Loader(root, **options, workers=1)
    resumed.load_state_dict(stopped.state_dict())
    for one, other in zip(expected, [*first, *resumed], strict=True):
        assert one["key"] == other["key"] and torch.equal(one["tokens"], other["tokens"])


def test_windows_that_have_no_tokens_are_refused(made: tuple[str, str]) -> None:
    root, name = made
    says = f"frames: {name} has windows of 4 frames, stride 1; ask for these"
    for changed in ({"frames": 8}, {"frames": (4, 8)}, {"stride": 2}):
        with pytest.raises(UserError, match=says):
            Loader(root, **WINDOW | changed, columns=(name,))
    with pytest.raises(UserError, match="histories: are of latents"):
        Loader(root, **WINDOW, columns=(name,), histories=Lengths((0,), 1))


def test_a_window_that_no_clip_fills_is_one_line(handmade: Callable[..., str], model: Codes, tmp_path: Path) -> None:
    root = handmade(tmp_path / "dataset", [[{"frames": 12}, {"frames": 15}, {"frames": 20}]])
    name, _ = cache(root, model, settings(frames=16, hop=16))
    loader = Loader(root, **WINDOW | {"frames": 16, "batch": 1}, columns=(name,))
    assert (loader.samples, loader.samples_short) == (1, 2)
    name, _ = cache(root, model, settings(frames=24, hop=16))
    with pytest.raises(
        UserError, match=r"no usable sample; loosen .* `frames` \(for tokens, of `cache_tokens`\) below"
    ):
        Loader(root, **WINDOW | {"frames": 24}, columns=(name,))
    name, _ = cache(root, model, settings(frames=16, hop=16, size=(32, 16)))
    with pytest.raises(UserError, match="no clip of this view has latents or tokens"):
        Loader(root, **WINDOW | {"frames": 16}, columns=(name,))


def test_damaged_tokens_are_named_and_those_of_other_clips_refused(made: tuple[str, str], tmp_path: Path) -> None:
    root = str(shutil.copytree(made[0], tmp_path / "dataset"))
    rows, _ = compact.open_split(root, "train", made[1])
    tar = Path(storage.join(root, "train", f"00000.{made[1]}.tar"))
    row, whole = rows.row(0, 0), tar.read_bytes()
    data = bytearray(whole)
    data[row["offset"] + row["size"] - 1] ^= 1  # of the last window
    tar.write_bytes(data)
    options = WINDOW | {"columns": (made[1],), "batch": 1, "shuffle": False}
    # another window of the clip is whole
    assert next(iter(Loader(root, **options)))["key"] == [row["key"]]
    with pytest.raises(Failure, match=rf"{row['key']}: windows 4 to 5 are damaged; run `longtake dataset verify`"):
        list(Loader(root, **options | {"shuffle": True, "epochs": 20}))
    tar.write_bytes(whole)
    shard = index.read_shard(root, "train", f"00000.{made[1]}")
    changed = [each | {"base_sha256": "0" * 64} for each in shard.table.to_pylist()]
    schema = shard.table.schema.remove_metadata()
    notes = index.read_notes(root, shard)
    index.write_index(str(tar.with_suffix(".parquet")), changed, schema, shard.tar_bytes, shard.tar_sha256, notes)
    with pytest.raises(Failure, match="made from other clips"):
        list(Loader(root, **options))
