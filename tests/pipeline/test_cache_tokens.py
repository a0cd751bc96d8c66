"""Tokens beside the shards: what is in them, how they are counted, and what they leave alone. No Ray but in the slow tests."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import tiny_codes
from tiny_codes import Codes, at_once, cache, settings
from torch import nn

from longtake.datasets import compact, index, schema, storage, view
from longtake.datasets import tokens as records
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import content
from longtake.datasets.tokens import read_tokens
from longtake.datasets.verify import verify
from longtake.infra import graph, recipe
from longtake.pipeline import tokens, windows
from longtake.pipeline.column import by_shard, missing
from longtake.pipeline.stages import cache_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

Hashes = Callable[[object], dict[str, str]]


@pytest.fixture(scope="module")
def model() -> Codes:
    return tiny_codes.codes()


@pytest.fixture
def root(dataset: str, tmp_path: Path) -> str:
    """A copy of the small dataset."""
    return str(shutil.copytree(dataset, tmp_path / "dataset"))


def members(root: str, name: str, split: str = "train") -> dict[str, np.ndarray]:
    """The arrays of a column as numpy reads them, by key."""
    found = {}
    for shard in index.read_shards(root, split, name):
        tar = Path(storage.join(root, split, f"{shard.name}.tar")).read_bytes()
        for row in shard.table.to_pylist():
            found[row["key"]] = np.load(io.BytesIO(tar[row["offset"] : row["offset"] + row["size"]]))
    return found


@pytest.mark.parametrize(
    "changed",
    [{}, {"hop": 2}, {"frames": 8, "hop": 3, "stride": 2, "size": (16, 24)}, {"hop": 11, "batch": 1}, {"batch": 1000}],
    ids=str,
)
def test_each_window_is_encoded_by_itself_as_the_decoded_frames_are(
    root: str, model: Codes, changed: dict[str, Any]
) -> None:
    chosen = settings(**changed)
    name, totals = cache(root, model, chosen)
    count, several = 0, False
    for split in schema.SPLITS:
        found = members(root, name, split)
        for key, video in tiny_codes.clips(root, chosen.size, split):
            starts = range(0, len(video) - chosen.span + 1, chosen.hop)
            expected = [at_once(model, video, start, chosen) for start in starts]
            assert found[key].dtype == np.uint16 and found[key].tolist() == [one.tolist() for one in expected]
            count, several = count + len(starts), several or len({window.tobytes() for window in expected}) > 1
    assert totals["windows"] == count and totals["frames"] == count * chosen.frames and several
    assert not list(verify(root))


def test_clips_that_no_window_fits_have_none(root: str, model: Codes) -> None:
    lengths = index.read_all(root, "train")["frame_count"].to_numpy()
    longest = int(lengths.max())
    assert longest > lengths.min()
    chosen = settings(frames=longest // 4 * 4, hop=1)
    name, _ = cache(root, model, chosen)
    counts = [len(array) for array in members(root, name).values()]
    assert counts == [max(0, int(n) - chosen.frames + 1) for n in lengths] and 0 in counts and max(counts) > 0
    assert not list(verify(root))


def test_each_frame_is_decoded_once_and_memory_does_not_grow_with_the_clip(
    root: str, model: Codes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fitted = tokens.clip_file.fitted

    def counting(mp4: Any, clip_size: Any, numbers: Any, *rest: Any) -> Any:
        for number, frame in zip(numbers, fitted(mp4, clip_size, numbers, *rest), strict=True):
            seen.append(number)
            yield frame

    monkeypatch.setattr(tokens.clip_file, "fitted", counting)
    row = max(index.read_all(root, "train").to_pylist(), key=lambda row: row["frame_count"])
    tar = storage.join(root, "train", f"{row['shard']}.tar")
    chosen = settings(hop=2)
    for number, window in enumerate(tokens.clip_windows(tar, row, chosen)):
        assert window.shape == (4, 16, 16, 3)
        assert seen == list(range(2 * number + 4)), "no frame is read before its window, nor twice"
    assert len(seen) >= row["frame_count"] - 1


def test_batches_are_full_where_clips_have_as_many_windows(root: str) -> None:
    model = tiny_codes.codes()
    cache(root, model, settings(hop=100, batch=2))
    clips = [len(shard.table) for split in schema.SPLITS for shard in index.read_shards(root, split)]
    assert sorted(model.batches) == sorted(size for n in clips for size in [2] * (n // 2) + [1] * (n % 2))


def test_what_decides_the_tokens_names_the_column(model: Codes) -> None:
    def name(of: Codes = model, seen: str = "", **changed: Any) -> str:
        return windows.column_name(records.model_digest(of), settings(**changed), seen)

    names = {
        name(),
        name(tiny_codes.codes(2.0)),
        name(tiny_codes.codes(codes=63)),
        name(seen="view"),
        *(name(**changed) for changed in ({"frames": 8}, {"stride": 2}, {"hop": 2}, {"size": (32, 32)})),
    }
    assert len(names) == 8 and all(len(each) == len("tokens-") + 16 for each in names)
    assert name(batch=7, threads=1) == name() == name(tiny_codes.codes())


def test_more_codes_than_16_bits_are_stored_in_32(root: str) -> None:
    model = tiny_codes.codes(codes=1 << 17)
    name, _ = cache(root, model, settings())
    found = members(root, name)
    assert max(array.max() for array in found.values()) >= 1 << 16
    for key, video in tiny_codes.clips(root, (16, 16)):
        assert found[key].dtype == np.uint32
        assert np.array_equal(found[key][0], at_once(model, video, 0, settings()))
    assert not list(verify(root))
    assert records.dtype_of(1 << 16) == np.uint16 and records.dtype_of((1 << 16) + 1) == np.uint32
    assert records.dtype_of(1 << 15, "audio") == np.int16 and records.dtype_of((1 << 15) + 1, "audio") == np.int32


def test_usage_and_entropy_are_those_of_all_tokens(root: str, model: Codes) -> None:
    name, _ = cache(root, model, settings())
    ids = np.concatenate([array.reshape(-1) for array in members(root, name).values()])
    counts = sum(records.read_counts(root, shard) for shard in index.read_shards(root, "train", name))
    assert np.array_equal(counts, np.bincount(ids, minlength=64))
    usage, entropy = records.statistics(np.asarray(counts))
    assert usage == len(set(ids.tolist())) / 64
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    assert entropy == pytest.approx(-(shares * np.log2(shares)).sum())
    assert records.statistics(np.array([3, 0, 3, 3, 3])) == (0.8, 2.0)
    assert records.statistics(np.array([0, 5])) == (0.5, 0.0)


def test_encoding_again_gives_the_same_bytes_and_touches_nothing_else(root: str, model: Codes, hashes: Hashes) -> None:
    before = hashes(root)
    name, _ = cache(root, model, settings())
    made = hashes(root)
    assert before.items() <= made.items() and all(name in path for path in made.keys() - before.keys())
    for path in Path(root).glob(f"*/*.{name}.*"):
        path.unlink()
    cache(root, model, settings(threads=1))
    assert hashes(root) == made


def test_verify_finds_what_is_wrong_with_a_column(root: str, model: Codes) -> None:
    name, _ = cache(root, model, settings())
    tar = Path(root) / "train" / f"00000.{name}.tar"
    shard = index.read_shard(root, "train", f"00000.{name}")
    whole, rows, url = tar.read_bytes(), shard.table.to_pylist(), str(tar.with_suffix(".parquet"))
    data = bytearray(whole)
    data[rows[0]["offset"] + rows[0]["size"] - 1] ^= 1
    tar.write_bytes(data)
    (found,) = verify(root)
    assert found.startswith(f"{tar}: its bytes are not those that were committed (in {rows[0]['key']})")
    assert found.endswith(f"delete train/00000.{name}.parquet and run its `cache_tokens` stage again")
    tar.write_bytes(whole)
    notes = index.read_notes(root, shard)

    def wrong(first: dict[str, Any], noted: Any) -> str:
        changed = [rows[0] | first, *rows[1:]]
        index.write_index(url, changed, schema.TOKEN_INDEX, shard.tar_bytes, shard.tar_sha256, noted)
        (line,) = verify(root)
        return line

    assert "its notes are missing or damaged" in wrong({}, None)
    assert f"{rows[0]['key']}: its size is not that of its windows" in wrong({"windows": 1}, notes)
    counts = [notes["counts"][0] + 1, *notes["counts"][1:]]
    assert "its statistics are of another number of tokens" in wrong({}, notes | {"counts": counts})


def test_shards_that_are_missing_or_of_other_clips_are_made_again(root: str, model: Codes, hashes: Hashes) -> None:
    name, _ = cache(root, model, settings())
    made = hashes(root)
    base = compact.open_split(root, "train")[0]
    keeps = by_shard(base, np.ones(int(base.counts.sum()), bool))
    assert len(keeps) > 1 and not list(missing(root, "train", name, keeps))
    (Path(root) / "train" / f"00001.{name}.parquet").unlink()
    (Path(root) / "train" / f"00001.{name}.tar").write_bytes(b"half a tar")
    # as if the base shard had been made of other sources since
    shard = index.read_shard(root, "train", f"00000.{name}")
    rows = [row | {"base_sha256": "0" * 64} for row in shard.table.to_pylist()]
    url = storage.join(root, "train", f"00000.{name}.parquet")
    index.write_index(url, rows, schema.TOKEN_INDEX, shard.tar_bytes, shard.tar_sha256, {})
    jobs = list(missing(root, "train", name, keeps))
    assert [job.name for job in jobs] == ["00000", "00001"]
    coding = windows.coding_of(model, "", settings())
    for job in jobs:
        tokens.make_tokens(model, coding, settings(), root, "train", job.name, name, keeps[job.name])
    assert hashes(root) == made


def test_clips_that_a_view_drops_have_no_tokens(root: str, model: Codes) -> None:
    keys = index.read_all(root, "train")["key"]
    dropped = set(keys.to_pylist()[1::2])
    reasons = ["no" if key in dropped else None for key in keys.to_pylist()]
    rest = index.read_all(root, "val")["key"]
    kept = storage.join(root, "views", "some.parquet")
    rows = [view.rows("train", keys, reasons), view.rows("val", rest, [None] * len(rest))]
    view.write(kept, pa.concat_tables(rows), {})
    name, totals = cache(root, model, settings(), kept)
    assert totals["clips"] == len(keys) + len(rest) - len(dropped)
    assert {key for key, array in members(root, name).items() if not len(array)} == dropped
    assert not list(verify(root))


def test_a_clip_that_cannot_be_read_is_named(root: str, model: Codes) -> None:
    row = index.read_all(root, "train").to_pylist()[0]
    tar = Path(root) / "train" / f"{row['shard']}.tar"
    data = bytearray(tar.read_bytes())
    data[row["mp4_offset"] + 100] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Failure, match=rf"{row['key']}\.mp4: is damaged; run `longtake dataset verify`"):
        cache(root, model, settings())


def test_what_does_not_fit_the_encoder_is_one_line(model: Codes) -> None:
    for of, changed, says in (
        (nn.Linear(1, 1), {}, "encoder: here: is a Linear, which makes no tokens; name a `pretrain_vqgan` model"),
        (model, {"frames": 6}, "frames: 6 is not a multiple of 4, as the encoder needs; 4 is"),
        (model, {"size": (20, 16)}, "size: 20x16 is not in multiples of 8, as the encoder needs; 16x16 is"),
    ):
        with pytest.raises(UserError, match=says):
            windows.coding_of(of, "here", settings(**changed))


def test_a_recipe_with_windows_that_its_clips_cannot_fill_is_refused(tmp_path: Path) -> None:
    shards = {"kind": "shard", "sources": ["x.mp4"], "clip": {"short_side": 64, "fps": 10, "max_seconds": 2}}
    stage = {"kind": "cache_tokens", "dataset": "shards", "encoder": "models:/vqgan@champion", "size": [64, 64]}

    def built(**changed: Any) -> graph.Node:
        made = {"name": "r", "workspace": str(tmp_path), "stages": {"shards": shards, "tokens": stage | changed}}
        (tmp_path / "r.yaml").write_text(json.dumps(made))
        return graph.build(recipe.load(str(tmp_path / "r.yaml")))[-1]

    node = built()
    assert node.config.settings().hop == 16  # type: ignore[attr-defined]
    assert content(built(run={"batch": 2, "workers": 3, "cpus": 2}).config) == content(node.config)
    assert len({built(**one).fingerprint for one in ({}, {"frames": 8}, {"hop": 4}, {"size": [32, 64]})}) == 4
    for changed, says in (
        ({"size": [128, 128]}, "stages.tokens.size: 128 is larger than clip.short_side 64 of the dataset"),
        ({"frames": 24}, "stages.tokens.frames: a window spans 24 frames, the dataset's clips have at most 20"),
        ({"stride": 2}, "stages.tokens.frames: a window spans 31 frames, the dataset's clips have at most 20"),
        ({"hop": 0}, "stages.tokens.hop"),
        ({"encoder": "shards"}, "stages.tokens.encoder: needs a model, but stage shards makes a dataset"),
    ):
        with pytest.raises(UserError, match=says):
            built(**changed)


def test_what_is_no_output_of_the_stage_is_said_in_one_line(root: str, model: Codes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokens here \(no tokens.json\)"):
        read_tokens(str(tmp_path))
    assert not cache_tokens.complete(str(tmp_path))
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(Failure, match=r"tokens.json: damaged"):
        read_tokens(str(tmp_path))
    written = read_tokens(tiny_codes.record(tmp_path / "out", root, model, settings()))
    assert (written.shape, written.size, written.of) == ((1, 2, 2), (16, 16), "video")
    assert cache_tokens.complete(str(tmp_path / "out"))


# with Ray


@pytest.fixture(scope="module")
def folder(model: Codes, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_codes.saved(model, tmp_path_factory.mktemp("model") / "codes")


def config(encoder: str, **changed: Any) -> cache_tokens.Config:
    how = {name: changed.pop(name) for name in cache_tokens.EncodeConfig.model_fields if name in changed}
    usual = {"frames": 4, "size": (16, 16)} | changed
    return cache_tokens.Config(kind="cache_tokens", dataset="x", encoder=encoder, run=how, **usual)  # type: ignore[arg-type]


@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_the_stage_writes_the_same_bytes_for_any_number_of_workers_and_goes_on(
    root: str, folder: str, model: Codes, hashes: Hashes, tmp_path: Path
) -> None:
    twin = str(shutil.copytree(root, tmp_path / "twin"))
    inputs, output = {"dataset": root, "encoder": folder}, str(tmp_path / "out")
    result = cache_tokens.run(config(folder, workers=1), inputs, output)
    cache_tokens.run(config(folder, workers=2), inputs | {"dataset": twin}, str(tmp_path / "other"))
    made = hashes(root)
    assert hashes(twin) == made and not list(verify(root))
    found = read_tokens(result["uri"])
    assert found.dataset == root and found.model["uri"] == folder and found.shape == (1, 2, 2) and found.hop == 4
    assert found.model["digest"] == records.model_digest(model) and cache_tokens.complete(output)
    name, totals = cache(twin, model, settings())
    assert (found.column, result["metrics"]["windows"]) == (name, totals["windows"])
    assert 0 < result["metrics"]["codes_used"] == found.usage <= 1
    written = (tmp_path / "out" / "tokens.json").read_bytes()
    # nothing is left to do, then a shard is
    assert cache_tokens.run(config(folder), inputs, output)["metrics"]["encoded_shards"] == 0
    (Path(root) / "train" / f"00000.{found.column}.parquet").unlink()
    assert not cache_tokens.complete(output)
    assert cache_tokens.run(config(folder, workers=1), inputs, output)["metrics"]["encoded_shards"] == 1
    assert hashes(root) == made and (tmp_path / "out" / "tokens.json").read_bytes() == written
    # other windows beside it
    longer = read_tokens(cache_tokens.run(config(folder, frames=8, hop=2), inputs, str(tmp_path / "longer"))["uri"])
    assert longer.column != found.column and longer.shape == (2, 2, 2) and made.items() <= hashes(root).items()
    # what stops it
    for changed, says in (
        ({"size": (1024, 1024)}, "size: .*: no clip of the train split is as large as 1024x1024; lower it"),
        ({"frames": 4000}, r"frames: .*: a window spans 4000 frames, and no clip of the train split has more than \d+"),
        ({"frames": 6}, "frames: 6 is not a multiple of 4"),
    ):
        with pytest.raises(UserError, match=says):
            cache_tokens.run(config(folder, **changed), inputs, output)


@pytest.mark.soak
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    root: str,
    folder: str,
    model: Codes,
    hashes: Hashes,
    victims: Callable[[int], list[psutil.Process]],
    tmp_path: Path,
) -> None:
    undisturbed = str(shutil.copytree(root, tmp_path / "undisturbed"))
    cache(undisturbed, model, settings(batch=1))
    script = (
        "import json, sys\nimport tiny_codes\nfrom longtake.pipeline.stages import cache_tokens\n"
        "if __name__ == '__main__':\n"
        "    config = cache_tokens.Config.model_validate_json(sys.argv[1])\n"
        "    cache_tokens.run(config, json.loads(sys.argv[2]), sys.argv[3])"
    )
    chosen = config(folder, batch=1, workers=1).model_dump_json()
    inputs = json.dumps({"dataset": root, "encoder": folder})
    command = [sys.executable, "-P", "-c", script, chosen, inputs, str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(tiny_codes.__file__).parent)

    def committed() -> list[Path]:
        return sorted(Path(root).glob("*/*.tokens-*.parquet"))

    child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while child.poll() is None and time.time() < deadline and not committed():
        time.sleep(0.01)
    assert committed()
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for path in committed()[1:]:
        path.unlink()  # so that there is work left for what comes
    child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    while not workers and child.poll() is None:
        workers = [found for found in victims(child.pid) if "MapWorker" in " ".join(found.cmdline())]
    workers[0].kill()
    assert child.wait() == 0
    assert hashes(root) == hashes(undisturbed)
