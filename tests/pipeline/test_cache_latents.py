"""Latents beside the shards: what is in them, what reads them, and what they leave alone. No Ray but in the slow tests."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from torch import nn

from longtake.datasets import clip, encoding, images, index, schema, storage, view
from longtake.datasets import latents as column
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import read_latents
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.shard import write_tar
from longtake.datasets.stage import content
from longtake.datasets.verify import verify
from longtake.infra import graph, recipe
from longtake.pipeline import latents
from longtake.pipeline.column import by_shard, missing
from longtake.pipeline.stages import cache_latents
from longtake.training import registry
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk, promotion

pytestmark = pytest.mark.usefixtures("one_thread")

Hashes = Callable[[object], dict[str, str]]
FP16 = {"rtol": 2e-3, "atol": 2e-4}


def vae(seed: int = 0) -> PVVAE:
    """Random weights; layers that start at zero are woken, so that every one of them counts."""
    torch.manual_seed(seed)
    model = PVVAE(config_from_preset("pv_vae_tiny"))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PVVAE:
    return vae()


def settings(**changed: Any) -> encoding.Settings:
    usual = {"size": None, "precision": "fp32", "dtype": "float16", "tile": None, "overlap": 64, "batch": 3, "chunk": 2}
    return encoding.Settings(**usual | changed)


def cache(root: str, model: PVVAE, chosen: encoding.Settings, kept: str | None = None) -> tuple[str, dict[str, int]]:
    """What the stage does, in this process and in turn. Returns the column's name, and what was counted."""
    strides = encoding.strides_of(model, "here")
    name = encoding.column_name(column.encoder_digest(model), chosen, kept or "")
    totals: dict[str, int] = {}
    for split in schema.SPLITS:
        base, _ = index_of(root, split)
        for shard, keep in by_shard(base, view.kept(base, kept)[0]).items():
            made = latents.make_latents(model, strides, root, split, shard, name, chosen, keep)
            totals = {key: totals.get(key, 0) + value for key, value in made.items()}
    return name, totals


def index_of(root: str, split: str) -> Any:
    from longtake.datasets import compact

    return compact.open_split(root, split)


@pytest.fixture
def root(dataset: str, tmp_path: Path) -> str:
    """A copy of the small dataset."""
    return str(shutil.copytree(dataset, tmp_path / "dataset"))


@pytest.fixture(scope="module")
def cached(dataset: str, model: PVVAE, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, int]]:
    """A dataset with a column: read it, do not change it."""
    copy = str(shutil.copytree(dataset, tmp_path_factory.mktemp("cached") / "dataset"))
    return copy, *cache(copy, model, settings())


def clips(root: str, split: str = "train") -> dict[str, np.ndarray]:
    """All frames of all clips, (T, H, W, 3), by key."""
    found = {}
    for row in index.read_all(root, split).to_pylist():
        tar = storage.join(root, split, f"{row['shard']}.tar")
        found[row["key"]] = clip.decode(storage.read_range(tar, row["mp4_offset"], row["mp4_size"]))
    return found


def members(root: str, name: str, split: str = "train") -> dict[str, np.ndarray]:
    """The arrays of a column as numpy reads them, by key."""
    found = {}
    for shard in index.read_shards(root, split, name):
        tar = Path(storage.join(root, split, f"{shard.name}.tar")).read_bytes()
        for row in shard.table.to_pylist():
            data = tar[row["offset"] : row["offset"] + row["size"]]
            found[row["key"]] = np.load(io.BytesIO(data), allow_pickle=False)
    return found


@torch.inference_mode()
def at_once(model: PVVAE, video: np.ndarray) -> torch.Tensor:
    """Mean and log-variance (2, C, t, h, w) of (T, H, W, 3), in one pass."""
    posterior = model.encode(to_model(torch.from_numpy(video).permute(3, 0, 1, 2)[None]))
    return torch.cat([posterior.mean, posterior.logvar])


def test_clips_that_touch_are_encoded_as_one_video(root: str, model: PVVAE) -> None:
    """Step n of a stream is of its frames up to 4n, and lies with the clip that has this frame."""
    name, totals = cache(root, model, settings(join_seconds=5.0))
    assert totals["streams"] < totals["clips"] and totals["frames_cut"] < 4 * totals["streams"]
    frames, made, joined = clips(root), members(root, name), 0
    rows = {row["key"]: row for row in index.read_all(root, "train").to_pylist()}
    places = {row["key"]: row for s in index.read_shards(root, "train", name) for row in s.table.to_pylist()}
    for key, place in places.items():
        if place["stream_step"]:
            continue
        stream, steps = [key], place["steps"]
        while (follows := f"{key[:-5]}{int(stream[-1][-5:]) + 1:05d}") in places and places[follows]["stream_step"]:
            assert places[follows]["stream_step"] == steps
            gap = rows[follows]["start_seconds"] - rows[stream[-1]]["start_seconds"]
            assert gap == pytest.approx(rows[stream[-1]]["frame_count"] / 12, abs=0.13)
            stream, steps = [*stream, follows], steps + places[follows]["steps"]
        video = np.concatenate([frames[each] for each in stream])
        assert len(stream) == 1 or len(video) <= 60
        whole = at_once(model, video[: 1 + (len(video) - 1) // 4 * 4])
        found = torch.from_numpy(np.concatenate([made[each] for each in stream])).float().permute(1, 2, 0, 3, 4)
        torch.testing.assert_close(found, whole, **FP16)
        joined += len(stream) > 1
    assert joined > 1
    assert not list(verify(root))


def test_a_column_is_what_encoding_the_decoded_clips_at_once_gives(cached: Any, model: PVVAE) -> None:
    root, name, totals = cached
    frames = {split: clips(root, split) for split in schema.SPLITS}
    for split in schema.SPLITS:
        found = members(root, name, split)
        assert found.keys() == frames[split].keys()
        for key, video in frames[split].items():
            whole = video[: 1 + (len(video) - 1) // 4 * 4]
            height, width = video.shape[1:3]
            assert found[key].dtype == np.float16 and found[key].shape == (
                1 + (len(whole) - 1) // 4,
                2,
                64,
                height // 16,
                width // 16,
            )
            made = torch.from_numpy(found[key]).float().permute(1, 2, 0, 3, 4)
            torch.testing.assert_close(made, at_once(model, whole), **FP16)
    lengths = [len(video) for videos in frames.values() for video in videos.values()]
    assert totals["clips"] == len(lengths) and totals["frames"] + totals["frames_cut"] == sum(lengths)
    assert totals["frames_cut"] == sum((n - 1) % 4 for n in lengths) > 0
    assert totals["latents"] == sum(1 + (n - 1) // 4 for n in lengths)


def test_a_window_anywhere_has_the_steps_of_the_whole_clip(cached: Any, model: PVVAE) -> None:
    root, name, _ = cached
    whole = {key: (video, at_once(model, video[: 1 + (len(video) - 1) // 4 * 4])) for key, video in clips(root).items()}
    height, width = next(iter(whole.values()))[0].shape[1:3]
    starts = set()
    loader = Loader(root, columns=("video", name), frames=9, size=(height, width), batch=2, epochs=3)
    for batch in loader:
        for n, key in enumerate(batch["key"]):
            video, expected = whole[key]
            seen = batch["video"][n].permute(1, 2, 3, 0).numpy()
            (start,) = [s for s in range(0, len(video) - 8, 4) if np.array_equal(video[s : s + 9], seen)] or [None]
            if start is None:
                pytest.fail(f"{key}: the window does not start on a step")
            torch.testing.assert_close(batch["latent"][n].float(), expected[:, :, start // 4 : start // 4 + 3], **FP16)
            starts.add(start)
    assert len(starts) > 2


def test_at_another_size_it_encodes_just_what_the_loader_shows(root: str, model: PVVAE) -> None:
    name, _ = cache(root, model, settings(size=(16, 32)))
    options: dict[str, Any] = {"frames": 5, "size": (16, 32), "batch": 1, "shuffle": False, "epochs": 1}
    for batch in Loader(root, columns=("video", name), **options):
        video = batch["video"][0].permute(1, 2, 3, 0).numpy()
        torch.testing.assert_close(batch["latent"][0].float(), at_once(model, video), **FP16)


def test_no_frame_is_encoded_twice_and_memory_does_not_grow_with_the_clip(
    root: str, model: PVVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    encoded: list[int] = []
    moments, stream = model._moments, model.encode_stream

    def encoding(video: torch.Tensor, past: Any = None) -> torch.Tensor:
        encoded.append(video.shape[2])
        return moments(video, past)

    def streaming(chunks: Iterator[torch.Tensor], *options: Any) -> Iterator[Any]:
        return stream((decoded.append(chunk.shape[2]) or chunk for chunk in chunks), *options)  # type: ignore[func-returns-value]

    monkeypatch.setattr(model, "_moments", encoding)
    monkeypatch.setattr(model, "encode_stream", streaming)
    _, totals = cache(root, model, settings(batch=1, chunk=1))
    assert sum(decoded) == sum(encoded) == totals["frames"]
    assert max(decoded) == max(encoded) == 4


def test_tiles_and_reduced_precision_are_columns_of_their_own(model: PVVAE) -> None:
    digest = column.encoder_digest(model)
    names = {
        encoding.column_name(digest, settings(**changed), "")
        for changed in (
            {},
            {"size": (32, 32)},
            {"precision": "bf16"},
            {"dtype": "bfloat16"},
            {"tile": 32},
            {"tile": 32, "overlap": 0},
        )
    }
    assert len(names) == 6
    assert encoding.column_name(digest, settings(), "") == encoding.column_name(digest, settings(batch=7, chunk=9), "")
    assert encoding.column_name(digest, settings(), "") != encoding.column_name(digest, settings(), "view")
    assert encoding.column_name(column.encoder_digest(vae(1)), settings(), "") not in names


def means(video: np.ndarray, shrink: tuple[int, int]) -> np.ndarray:
    """(T, H, W, 3) averaged over boxes of these pixels, where they begin top left and make whole positions of 16."""
    rows, columns = (side // 16 // by * 16 for side, by in zip(video.shape[1:3], shrink, strict=True))
    part = video[:, : rows * shrink[0], : columns * shrink[1]].astype(np.float64)
    return part.reshape(len(video), rows, shrink[0], columns, shrink[1], 3).mean((2, 4))


@torch.inference_mode()
def of_means(model: PVVAE, video: np.ndarray, shrink: tuple[int, int]) -> torch.Tensor:
    small = torch.from_numpy(means(video, shrink)).permute(3, 0, 1, 2)[None].float()
    posterior = model.encode(small / 127.5 - 1)
    return torch.cat([posterior.mean, posterior.logvar])


@pytest.mark.parametrize("shrink", [(2, 2), (1, 3)])
def test_a_shrunk_column_is_of_the_video_scaled_down_in_the_same_steps(
    root: str, model: PVVAE, shrink: tuple[int, int]
) -> None:
    whole, _ = cache(root, model, settings())
    name, _ = cache(root, model, settings(shrink=shrink))
    frames, full, found = clips(root), members(root, whole), members(root, name)
    for key, video in frames.items():
        steps, _, channels, height, width = full[key].shape
        if width < shrink[1]:
            assert found[key].shape[0] == 0
            continue
        assert found[key].shape == (steps, 2, channels, height // shrink[0], width // shrink[1])
        made = torch.from_numpy(found[key]).float().permute(1, 2, 0, 3, 4)
        torch.testing.assert_close(made, of_means(model, video[: 1 + (len(video) - 1) // 4 * 4], shrink), **FP16)
    assert not list(verify(root))
    columns = {"video": "video", "latent": whole, "low": name}
    loader = Loader(root, columns=columns, frames=5, size=32, batch=1, epochs=1, history_seconds=1.0)
    for batch in loader:
        (key,), start = batch["key"], int(batch["start"][0]) // 4
        for suffix, arrays in (("latent", full), ("low", found)):
            steps = torch.from_numpy(arrays[key]).permute(1, 2, 0, 3, 4)
            assert torch.equal(batch[suffix][0], steps[:, :, start : start + 2])
            before = min(start, int(batch["history_steps"][0]))
            assert before == min(start, 3)
            past = batch[f"history_{suffix}"][0]
            assert torch.equal(past[:, :, past.shape[2] - before :], steps[:, :, start - before : start])


def test_shrinking_takes_whole_positions_and_leaves_out_what_has_none(model: PVVAE, tmp_path: Path) -> None:
    shapes = [(80, 48), (83, 81), (48, 112), (31, 64), (32, 32)]
    root = pictures(tmp_path / "images", shapes)
    whole, _ = cache(root, model, settings())
    name, totals = cache(root, model, settings(shrink=(2, 3)))
    assert (totals["clips"], totals["clips_small"]) == (3, 2)
    sizes = [a.shape[3:] for a in members(root, whole).values()], [a.shape[3:] for a in members(root, name).values()]
    assert sizes == ([(5, 3), (5, 5), (3, 7), (1, 4), (2, 2)], [(2, 1), (2, 1), (1, 2), (0, 0), (0, 0)])
    loader = Loader(root, columns={"latent": whole, "low": name}, frames=1, size=16, batch=1, epochs=1)
    assert (loader.samples, loader.samples_without_latent) == (3, 2)
    # at a common size: scaled and cropped to it first
    sized, _ = cache(root, model, settings(shrink=(2, 1), size=(48, 32)))
    shown = Loader(root, columns=("video", sized), frames=1, size=(48, 32), batch=1, epochs=1)
    assert shown.samples == 3
    for batch in shown:
        video = batch["video"][0].permute(1, 2, 3, 0).numpy()
        torch.testing.assert_close(batch["latent"][0].float(), of_means(model, video, (2, 1)), **FP16)


def test_shrinking_makes_another_column_and_without_it_the_name_is_as_it_was() -> None:
    assert encoding.column_name("abc", settings(), "") == "latent-fcce1dd01c79c519"
    chosen = settings(size=(32, 64), dtype="bfloat16", shrink=(1, 1))
    assert encoding.column_name("abc", chosen, "") == "latent-d83962b82316d454"
    names = {encoding.column_name("abc", settings(shrink=by), "") for by in ((1, 1), (2, 2), (1, 2), (2, 1))}
    assert len(names) == 4


def test_a_record_from_before_there_was_shrinking_is_of_none(tmp_path: Path) -> None:
    facts = {
        "dataset": "d",
        "column": "latent-x",
        "encoder": {},
        "channels": 1,
        "factor": 4,
        "stride": 16,
        "size": None,
    }
    more = {"precision": "fp32", "dtype": "float16", "count": 1, "mean": (0.0,), "std": (1.0,)}
    made = column.Latents(**facts, **more, posterior_std=(1.0,), view=None, digests={}, shrink=(4, 2))  # type: ignore[arg-type]
    column.write_latents(str(tmp_path), made)
    assert read_latents(str(tmp_path)) == made
    written = json.loads((tmp_path / "latents.json").read_text())
    del written["shrink"]
    (tmp_path / "latents.json").write_text(json.dumps(written))
    assert read_latents(str(tmp_path)).shrink == (1, 1)


def test_training_the_decoder_alone_keeps_the_latents() -> None:
    model = vae()
    before = column.encoder_digest(model)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    assert column.encoder_digest(model) == before
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    assert column.encoder_digest(model) != before


def test_statistics_are_those_of_numpy_over_the_train_split(cached: Any) -> None:
    root, name, _ = cached
    arrays = [a.astype(np.float64) for a in members(root, name).values()]
    flat = np.concatenate([a.transpose(1, 2, 0, 3, 4).reshape(2, 64, -1) for a in arrays], 2)
    found = column.merged(column.read_moments(root, s) for s in index.read_shards(root, "train", name))
    assert found.count == flat.shape[2]
    np.testing.assert_allclose(found.mean, flat[0].mean(1), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(found.m2 / found.count), flat[0].std(1), rtol=1e-12)
    np.testing.assert_allclose(found.variance, np.exp(flat[1]).mean(1), rtol=1e-12)


def test_encoding_again_gives_the_same_bytes_and_touches_nothing_else(root: str, model: PVVAE, hashes: Hashes) -> None:
    before = hashes(root)
    first, _ = cache(root, model, settings())
    with_first = hashes(root)
    assert before.items() <= with_first.items() and all(first in name for name in with_first.keys() - before.keys())
    second, _ = cache(root, vae(1), settings())
    both = hashes(root)
    assert second != first and with_first.items() <= both.items()
    for path in Path(root).glob(f"*/*.{first}.*"):
        path.unlink()
    cache(root, model, settings())
    assert hashes(root) == both


def test_bfloat16_comes_out_of_the_loader_as_bfloat16(root: str, model: PVVAE) -> None:
    name, _ = cache(root, model, settings(dtype="bfloat16"))
    wide, _ = cache(root, model, settings())
    options: dict[str, Any] = {"frames": 5, "batch": 1, "epochs": 1, "history_seconds": 1.0}
    pairs = zip(Loader(root, columns=(name,), **options), Loader(root, columns=(wide,), **options), strict=True)
    for narrow, exact in pairs:
        assert narrow["key"] == exact["key"] and narrow["latent"].dtype == torch.bfloat16
        torch.testing.assert_close(narrow["latent"].float(), exact["latent"].float(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(
            narrow["history_latent"].float(), exact["history_latent"].float(), rtol=1e-2, atol=1e-3
        )
    assert not list(verify(root))


def test_verify_finds_what_is_wrong_with_a_column(root: str, model: PVVAE) -> None:
    name, _ = cache(root, model, settings())
    assert not list(verify(root))
    tar = Path(root) / "train" / f"00000.{name}.tar"
    whole, at = tar.read_bytes(), index.read_shard(root, "train", f"00000.{name}").table.to_pylist()[0]
    data = bytearray(whole)
    data[at["offset"] + at["size"] - 1] ^= 1
    tar.write_bytes(data)
    (found,) = verify(root)
    assert found.startswith(f"{tar}: its bytes are not those that were committed (in {at['key']})")
    assert found.endswith(f"delete train/00000.{name}.parquet and run its `cache_latents` stage again")
    tar.write_bytes(whole)
    shard = index.read_shard(root, "train", f"00000.{name}")
    url, rows = str(tar.with_suffix(".parquet")), shard.table.to_pylist()
    index.write_index(url, rows, schema.LATENT_INDEX, shard.tar_bytes, shard.tar_sha256)
    (found,) = verify(root)
    assert f"00000.{name}.parquet: its notes are missing or damaged" in found
    notes = index.read_notes(root, shard)
    index.write_index(
        url, [{**rows[0], "steps": 1}, *rows[1:]], schema.LATENT_INDEX, shard.tar_bytes, shard.tar_sha256, notes
    )
    (found,) = verify(root)
    assert f"{at['key']}: its size is not that of its steps" in found


def test_shards_that_are_missing_or_of_other_clips_are_made_again(
    root: str, model: PVVAE, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = cache(root, model, settings())
    made = hashes(root)
    keeps = by_shard(index_of(root, "train")[0], np.ones(len(clips(root)), bool))
    assert len(keeps) > 1 and not list(missing(root, "train", name, keeps))
    (Path(root) / "train" / f"00001.{name}.parquet").unlink()
    (Path(root) / "train" / f"00001.{name}.tar").write_bytes(b"half a tar")
    # as if the base shard had been made of other sources since
    url = Path(root) / "train" / f"00000.{name}.parquet"
    shard = index.read_shard(root, "train", f"00000.{name}")
    rows = [row | {"base_sha256": "0" * 64} for row in shard.table.to_pylist()]
    index.write_index(str(url), rows, schema.LATENT_INDEX, shard.tar_bytes, shard.tar_sha256, {})
    jobs = list(missing(root, "train", name, keeps))
    assert [job.name for job in jobs] == ["00000", "00001"]
    beside = []

    def seen(work: Callable[..., Any], *arguments: Any) -> Any:
        beside.append(url.exists())
        return work(*arguments)

    monkeypatch.setattr("longtake.pipeline.column.write_tar", partial(seen, write_tar))
    monkeypatch.setattr("longtake.pipeline.column.index.write_index", partial(seen, index.write_index))
    for job in jobs:
        strides = encoding.strides_of(model, "")
        latents.make_latents(model, strides, root, "train", job.name, name, settings(), keeps[job.name])
    # the index of other clips stays while the new tar is made, and goes before it: a reader never sees both
    assert beside == [True, False, True, True]
    assert hashes(root) == made


def test_clips_that_a_view_drops_have_no_latents_and_the_loader_leaves_them_out(root: str, model: PVVAE) -> None:
    keys = list(clips(root))
    dropped = set(keys[1::2])
    url = storage.join(root, "views", "some.parquet")
    table = index.read_all(root, "train")["key"]
    rest = index.read_all(root, "val")["key"]
    reasons = ["no" if key in dropped else None for key in table.to_pylist()]
    view.write(
        url, pa.concat_tables([view.rows("train", table, reasons), view.rows("val", rest, [None] * len(rest))]), {}
    )
    name, totals = cache(root, model, settings(), url)
    assert totals["clips"] == len(keys) + len(rest) - len(dropped)
    assert not list(verify(root))
    loader = Loader(root, columns=(name,), frames=5, batch=1, epochs=1, history_seconds=2.0)
    arrays, seen = members(root, name), []
    for batch in loader:
        (key,) = batch["key"]
        seen.append(key)
        steps = torch.from_numpy(arrays[key]).permute(1, 2, 0, 3, 4)
        starts = [s for s in range(steps.shape[2] - 1) if torch.equal(steps[:, :, s : s + 2], batch["latent"][0])]
        # the clip before is known to the base shard, and has no latents
        assert int(batch["history_steps"][0]) in [min(start, 6) for start in starts]
    assert sorted(seen) == sorted(set(keys) - dropped) and loader.samples_without_latent == len(dropped)
    only = pa.array([None if key in dropped else "no" for key in table.to_pylist()])
    view.write(url, view.rows("train", table, only), {})
    with pytest.raises(UserError, match="no clip of this view has latents"):
        Loader(root, columns=(name,), frames=5, batch=1, view=url)


def pictures(root: Path, shapes: list[tuple[int, int]]) -> str:
    """A dataset of images of noise, of these heights and widths."""
    import av

    def png(number: int, height: int, width: int) -> bytes:
        picture = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        with av.open(str(path := root.with_suffix(".png")), "w", format="image2") as out:
            stream = out.add_stream("png", rate=1)
            stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
            out.mux([*stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *stream.encode()])
        return path.read_bytes()

    (root / "train").mkdir(parents=True)
    write_tar(root / "train" / "a.tar", [(f"{n}", {"png": png(n, *shape)}) for n, shape in enumerate(shapes)])
    images.adopt(str(root))
    return str(root)


def test_images_are_clips_of_one_frame_and_share_batches_at_a_common_size(model: PVVAE, tmp_path: Path) -> None:
    root = Path(pictures(tmp_path / "images", [(48, 40), (40, 70), (33, 33), (20, 60)]))
    before = (root / "train" / "a.tar").read_bytes()
    name, totals = cache(str(root), model, settings(size=(32, 32)))
    assert (totals["clips"], totals["clips_small"], totals["latents"]) == (3, 1, 3)
    assert (root / "train" / "a.tar").read_bytes() == before and not list(verify(str(root)))
    loader = Loader(str(root), columns=("video", name), frames=1, size=(32, 32), batch=3, epochs=1)
    (batch,) = loader
    assert loader.samples_without_latent == 1
    for n in range(3):
        torch.testing.assert_close(
            batch["latent"][n].float(), at_once(model, batch["video"][n].permute(1, 2, 3, 0).numpy()), **FP16
        )
    own, _ = cache(str(root), model, settings())
    shapes_of = {found.shape[3:] for found in members(str(root), own).values()}
    assert shapes_of == {(3, 2), (2, 4), (2, 2), (1, 3)}


def test_a_clip_that_cannot_be_read_is_named(root: str, model: PVVAE) -> None:
    row = index.read_all(root, "train").to_pylist()[0]
    tar = Path(root) / "train" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["mp4_offset"] + 100] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=rf"{row['key']}\.mp4: is damaged; run `longtake dataset verify`"):
        cache(root, model, settings())
    tar.unlink()
    with pytest.raises(Failure, match=rf"{row['shard']}\.tar: is missing"):
        cache(root, model, settings())


def test_values_beyond_float16_are_refused_and_bfloat16_takes_them(root: str) -> None:
    model = vae()
    with torch.no_grad():
        model.encoder.conv_out.bias[0] = 1e6  # type: ignore[union-attr,index]
    with pytest.raises(Failure, match=r"latents are not finite in float16; try `dtype: bfloat16`"):
        cache(root, model, settings())
    cache(root, model, settings(dtype="bfloat16"))


def test_what_does_not_fit_the_encoder_is_one_line() -> None:
    with pytest.raises(UserError, match="encoder: here: is a Linear, which does not encode videos"):
        encoding.strides_of(nn.Linear(1, 1), "here")
    with pytest.raises(UserError, match="size: 40x64 is not in multiples of 16, as the encoder needs; 32x64 is"):
        encoding.check(settings(size=(40, 64)), 16)
    encoding.check(settings(size=(64, 32), shrink=(4, 2)), 16)
    with pytest.raises(UserError, match="shrink: 4x3 leaves no whole position of size 64x32; lower it"):
        encoding.check(settings(size=(64, 32), shrink=(4, 3)), 16)
    with pytest.raises(ValueError, match="shrink: 4x1 leaves nothing of 63x16 pixels"):
        column.shrunk(torch.zeros(1, 3, 1, 63, 16), (4, 1), 16)
    with pytest.raises(UserError, match="tile: 40 with overlap 16"):
        encoding.check(settings(tile=40, overlap=16), 16)


def test_a_recipe_leads_from_a_model_to_latents(tmp_path: Path) -> None:
    stages = {
        "shards": {"kind": "shard", "sources": ["x.mp4"], "clip": {"short_side": 64}},
        "vae": {
            "kind": "pretrain_vae",
            "dataset": "shards",
            "model": {"preset": "pv_vae_tiny"},
            "sizes": [[64, 64]],
            "steps": 1,
            "batch": 1,
        },
        "latents": {"kind": "cache_latents", "dataset": "shards", "encoder": "vae"},
    }

    def built(**changed: Any) -> list[graph.Node]:
        made = {"name": "r", "workspace": str(tmp_path), "stages": stages | {"latents": stages["latents"] | changed}}
        (tmp_path / "r.yaml").write_text(json.dumps(made))
        return graph.build(recipe.load(str(tmp_path / "r.yaml")))

    node = built()[-1]
    assert node.kind == "cache_latents" and set(node.upstream) == {"shards", "vae"}
    assert content(built(run={"batch": 2, "chunk": 1, "workers": 3, "cpus": 2})[-1].config) == content(node.config)
    assert built(size=[32, 32])[-1].fingerprint != node.fingerprint
    assert built(shrink=[4, 4])[-1].fingerprint != node.fingerprint
    for changed, says in (
        ({"encoder": "shards"}, "stages.latents.encoder: needs a model, but stage shards makes a dataset"),
        ({"size": [60, 64]}, "stages.latents.size: 60x64 is not in multiples of the encoder's 16"),
        ({"size": [128, 128]}, "stages.latents.size: 128 is larger than clip.short_side 64 of the dataset"),
        ({"size": [64, 64], "shrink": [4, 5]}, "stages.latents.shrink: 4x5 leaves no whole position of size 64x64"),
        ({"shrink": [0, 1]}, "shrink"),
    ):
        with pytest.raises(UserError, match=says):
            built(**changed)


def test_what_is_no_output_of_the_stage_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no latents here \(no latents.json\)"):
        read_latents(str(tmp_path))
    assert not cache_latents.complete(str(tmp_path))
    (tmp_path / "latents.json").write_text("{}")
    with pytest.raises(Failure, match=r"latents.json: damaged"):
        read_latents(str(tmp_path))


# with Ray


@pytest.fixture(scope="module")
def folder(model: PVVAE, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(model, tmp_path_factory.mktemp("model") / "vae")


def saved(model: PVVAE, path: Path) -> str:
    disk.save(path, "pv_vae", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return str(path)


def config(encoder: str, **changed: Any) -> cache_latents.Config:
    how = {"batch": 3} | {
        name: changed.pop(name) for name in cache_latents.EncodeConfig.model_fields if name in changed
    }
    return cache_latents.Config(kind="cache_latents", dataset="x", encoder=encoder, run=how, **changed)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_stage_writes_the_same_bytes_for_any_number_of_workers_and_goes_on(
    root: str, folder: str, model: PVVAE, hashes: Hashes, tmp_path: Path
) -> None:
    twin = str(shutil.copytree(root, tmp_path / "twin"))
    inputs, output = {"dataset": root, "encoder": folder}, str(tmp_path / "out")
    result = cache_latents.run(config(folder, workers=1), inputs, output)
    cache_latents.run(config(folder, workers=2), inputs | {"dataset": twin}, str(tmp_path / "other"))
    made = hashes(root)
    assert hashes(twin) == made and not list(verify(root))
    found = read_latents(result["uri"])
    assert found.dataset == root and found.encoder["uri"] == folder and found.channels == 64 == len(found.mean)
    assert found.encoder["digest"] == column.encoder_digest(model) and cache_latents.complete(output)
    assert result["metrics"]["clips"] == sum(len(clips(root, split)) for split in schema.SPLITS)
    written = (tmp_path / "out" / "latents.json").read_bytes()
    # nothing is left to do, then a shard is
    assert cache_latents.run(config(folder), inputs, output)["metrics"]["encoded_shards"] == 0
    (Path(root) / "train" / f"00000.{found.column}.parquet").unlink()
    (Path(root) / "val" / f".x.tar~{os.uname().nodename}@999999999~ab.tmp").write_bytes(b"debris")
    assert not cache_latents.complete(output)
    again = cache_latents.run(config(folder, workers=1), inputs, output)["metrics"]
    assert (again["encoded_shards"], again["debris_swept"]) == (1, 1)
    assert hashes(root) == made and (tmp_path / "out" / "latents.json").read_bytes() == written
    # another resolution beside it
    small = read_latents(cache_latents.run(config(folder, shrink=(2, 2)), inputs, str(tmp_path / "small"))["uri"])
    assert (small.shrink, found.shrink) == ((2, 2), (1, 1)) and small.encoder == found.encoder
    assert small.column != found.column and made.items() <= hashes(root).items() and not list(verify(root))
    # another encoder, another column
    cache_latents.run(config("x"), inputs | {"encoder": saved(vae(1), tmp_path / "second")}, str(tmp_path / "out2"))
    assert made.items() <= hashes(root).items() and cache_latents.complete(output)
    assert read_latents(str(tmp_path / "out2")).column != found.column


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_stops_the_stage_is_one_line(root: str, folder: str, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    for changed, inputs, says in (
        ({}, {"dataset": str(tmp_path / "none")}, "no dataset here"),
        ({"size": (40, 64)}, {}, "size: 40x64 is not in multiples of 16"),
        ({"size": (1024, 1024)}, {}, "no clip of the train split is large enough for `size`"),
        ({"shrink": (9, 9)}, {}, "no clip of the train split is large enough for `size` and `shrink`; lower them"),
        ({"gpus": 64}, {}, r"run\.gpus: a worker needs 64 GPU, no node of the Ray cluster has more than"),
        ({"cpus": 999}, {}, r"run\.cpus: a task needs 999 CPU"),
    ):
        with pytest.raises(UserError, match=says):
            cache_latents.run(config(folder, **changed), {"dataset": root, "encoder": folder} | inputs, output)
    row = index.read_all(root, "train").to_pylist()[0]
    tar = Path(root) / "train" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["mp4_offset"] + 100] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=r"1 of \d+ shards could not be made, the first: train/00000: .*is damaged"):
        cache_latents.run(config(folder), {"dataset": root, "encoder": folder}, output)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_alias_is_taken_for_the_version_that_it_names_at_the_start(
    root: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    run_id = client.create_run(client.create_experiment("e", f"{tmp_path}/artifacts")).info.run_id
    version = registry.register(Path(folder), "pv-vae", run_id)
    promotion.promote(version)
    result = cache_latents.run(
        config("x"), {"dataset": root, "encoder": "models:/pv-vae@champion"}, str(tmp_path / "out")
    )
    assert read_latents(result["uri"]).encoder["uri"] == version == "models:/pv-vae/1"
    assert read_latents(result["uri"]).column == encoding.column_name(
        column.encoder_digest(registry.load(folder)),
        settings(),
        "",  # type: ignore[arg-type]
    )


@pytest.mark.soak
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    root: str,
    folder: str,
    model: PVVAE,
    hashes: Hashes,
    victims: Callable[[int], list[psutil.Process]],
    tmp_path: Path,
) -> None:
    undisturbed = str(shutil.copytree(root, tmp_path / "undisturbed"))
    cache(undisturbed, model, settings(batch=1, chunk=1))
    script = (
        "import json, sys\nfrom longtake.pipeline.stages import cache_latents\n"
        "if __name__ == '__main__':\n"
        "    config = cache_latents.Config.model_validate_json(sys.argv[1])\n"
        "    cache_latents.run(config, json.loads(sys.argv[2]), sys.argv[3])"
    )
    chosen = config(folder, batch=1, chunk=1, workers=1).model_dump_json()
    inputs = json.dumps({"dataset": root, "encoder": folder})
    command = [sys.executable, "-P", "-c", script, chosen, inputs, str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    stages = []
    for shards in (1, 2):
        child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while child.poll() is None and time.time() < deadline:
            if len(list(Path(root).glob("*/*.latent-*.parquet"))) >= shards:
                break
            time.sleep(0.01)
        stages.append(len(list(Path(root).glob("*/*.latent-*.parquet"))))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert 0 < stages[0] <= stages[-1]
    for path in sorted(Path(root).glob("*/*.latent-*.parquet"))[1:]:
        path.unlink()  # so that there is work left for what comes
    child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    while not workers and child.poll() is None:
        workers = [found for found in victims(child.pid) if "MapWorker" in " ".join(found.cmdline())]
    workers[0].kill()
    assert child.wait() == 0
    assert hashes(root) == hashes(undisturbed)
