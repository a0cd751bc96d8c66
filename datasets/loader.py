"""The loader: any split, view and columns of a dataset as a deterministic stream of batches.

The order is `datasets.order`; here is the reading. Samples are fetched by their byte offsets, travel as WebDataset
samples (`__key__`, `mp4`, `json`, …) through webdataset's own map and batch stages, and cross process borders as
uint8. The state is the number of batches taken: resuming opens only the tars that come next.
"""

import functools
import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import webdataset as wds

from longtake.datasets import clip, index, order, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.view import kept_keys, read_view

COLUMNS = ("video", "frame_diff", "json")
_CACHE_COLUMNS = {"frame_diff": "npy.zst"}
_OPEN_TARS = 32


class Loader:
    """Batches of windows, endless over epochs unless `epochs` is given.

    A batch is `{"key": [str], "epoch": int, "video": uint8 (B, 3, T, H, W), "frame_diff": uint8 (B, 3, T-1, h, w),
    "json": [dict]}` with the columns asked for; B = batch / world.

    Args:
        dataset: URL of the dataset.
        split: "train" or "val".
        view: URL of a view; None takes every clip.
        columns: some of `COLUMNS`.
        frames: frames T in a window. A clip shorter than the window is left out; `samples_short` counts them.
        stride: every how many frames of the clip.
        size: (height, width) of the video; a clip is scaled down to cover it and cropped.
        crop: "center", or "random" along the longer side, from the sample's own seed.
        batch: samples in a global batch, over all ranks.
        last: "drop" leaves the last incomplete batch of an epoch out, "pad" fills it from the epoch's start.
        shuffle: False gives the order on disk and the window at each clip's start.
        workers: decoding processes of this rank; 0 decodes in this one.

    Raises:
        UserError: nothing to load, a batch that does not divide, an unknown column, clips smaller than `size`.
        Failure: a column that was made from other clips.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        *,
        view: str | None = None,
        columns: Sequence[str] = ("video", "json"),
        frames: int = 17,
        stride: int = 1,
        size: tuple[int, int] = (64, 64),
        crop: Literal["center", "random"] = "center",
        batch: int = 8,
        last: order.Last = "drop",
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if unknown := set(columns) - set(COLUMNS):
            raise UserError(f"columns: unknown {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
        index.describe(dataset)
        shards = index.read_shards(dataset, split)
        where = f"{dataset} ({split})"
        tables = [s.table.append_column("shard", pa.array(np.full(len(s.table), i))) for i, s in enumerate(shards)]
        if not tables:
            raise UserError(f"{where}: no committed shard; run its `shard` stage")
        samples = pa.concat_tables([t.replace_schema_metadata(None) for t in tables])
        for column in _CACHE_COLUMNS.keys() & set(columns):
            samples = _join_column(samples, dataset, split, column, [s.name for s in shards])
        fingerprint = [index.digest(shards)]
        if view is not None:
            table = read_view(view)
            fingerprint.append(hashlib.sha256(index.to_parquet(table)).hexdigest())
            samples = samples.filter(pc.is_in(samples["key"], kept_keys(table, split)))
        long_enough = pc.greater_equal(samples["frame_count"], (frames - 1) * stride + 1)
        self.samples_short = len(samples) - (pc.sum(long_enough).as_py() or 0)
        samples = samples.filter(long_enough)
        order.check_batch(len(samples), batch, world, last, where)
        if "video" in columns and len(
            small := samples.filter(pc.or_(pc.less(samples["height"], size[0]), pc.less(samples["width"], size[1])))
        ):
            raise UserError(
                f"{where}: clips of {small['height'][0]}x{small['width'][0]} are smaller than size {size[0]}x{size[1]};"
                f" raise `clip.short_side` or lower `size`"
            )
        self.samples = len(samples)
        self.batches_per_epoch = order.batch_count(len(samples), batch, last)
        self.batch = batch
        self._state: dict[str, Any] = {
            "order": order.ORDER_VERSION,
            "data": hashlib.sha256(json.dumps([*fingerprint, split, frames, stride, size, crop]).encode()).hexdigest(),
            "seed": seed,
            "batch": batch,
            "taken": 0,
        }
        self._end = None if epochs is None else epochs * self.batches_per_epoch
        self._workers = workers
        sizes = np.bincount(np.asarray(samples["shard"]), minlength=len(shards))
        self._stream = _Stream(
            urls=[storage.join(dataset, split, s.name) for s in shards],
            samples=samples,
            columns=tuple(columns),
            batch_rows=functools.partial(_rows, sizes, seed, shuffle, batch, self.batches_per_epoch, rank, world),
            window=functools.partial(_window, frames, stride, crop == "random", seed if shuffle else None),
            size=size,
            local_batch=batch // world,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = _Slice(self._stream, self._state["taken"], self._end)
        options: dict[str, Any] = {}
        if self._workers:
            options = {"num_workers": self._workers, "multiprocessing_context": "forkserver", "prefetch_factor": 2}
        for item in torch.utils.data.DataLoader(
            stream, batch_size=None, pin_memory=torch.cuda.is_available(), **options
        ):
            if isinstance(item, Failure):
                raise item
            self._state["taken"] += 1
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the batch that comes next, and what it is a batch of."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, on any world size and worker count. Raises UserError for another stream's state."""
        for name, what in (
            ("order", "another version of the order"),
            ("data", "another dataset, view or window"),
            ("seed", "another seed"),
            ("batch", "another global batch"),
        ):
            if state[name] != self._state[name]:
                raise UserError(
                    f"loader state: belongs to {what} ({state[name]} there, {self._state[name]} here); start a new run"
                )
        self._state["taken"] = state["taken"]


class _Stream:
    """Everything that a worker process needs to make batch number n."""

    def __init__(
        self,
        urls: list[str],
        samples: pa.Table,
        columns: tuple[str, ...],
        batch_rows: Callable[[int], tuple[int, np.ndarray]],
        window: Callable[[int, str, int], tuple[list[int], float]],
        size: tuple[int, int],
        local_batch: int,
    ) -> None:
        self.urls, self.samples, self.columns, self.size = urls, samples, columns, size
        self.batch_rows, self.window, self.local_batch = batch_rows, window, local_batch

    def batches(self, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
        pipeline = wds.DataPipeline(
            lambda: self.read(numbers),
            wds.map(self.decode),
            wds.batched(self.local_batch, collation_fn=collate, partial=False),
        )
        yield from pipeline

    def read(self, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
        """WebDataset samples, their members still bytes."""
        for number in numbers:
            epoch, rows = self.batch_rows(number)
            for row in self.samples.take(pa.array(rows)).to_pylist():
                base = self.urls[row["shard"]]
                sample = {"__key__": row["key"], "__url__": f"{base}.tar", "epoch": epoch, "row": row}
                if "video" in self.columns:
                    sample["mp4"] = _read(f"{base}.tar", row["mp4_offset"], row["mp4_size"], row["sha256"])
                if "json" in self.columns:
                    sample["json"] = _read(f"{base}.tar", row["json_offset"], row["json_size"], row["json_sha256"])
                for column in _CACHE_COLUMNS.keys() & set(self.columns):
                    place = (row[f"{column}_{field}"] for field in ("offset", "size", "sha256"))
                    sample[column] = _read(f"{base}.{column}.tar", *place)
                yield sample

    def decode(self, sample: dict[str, Any]) -> dict[str, Any]:
        row, key = sample["row"], sample["__key__"]
        name = f"{sample['__url__']}: {key}"
        frames, place = self.window(sample["epoch"], key, row["frame_count"])
        out: dict[str, Any] = {"key": key, "epoch": sample["epoch"]}
        if "video" in self.columns:
            own = (row["height"], row["width"])
            scaled = clip.covering_size(own, self.size)
            video = clip.decode(sample["mp4"], frames, None if scaled == own else scaled, f"{name}.mp4")
            out["video"] = _channels_first(clip.crop(video, self.size, place))
        if "frame_diff" in self.columns:
            diff = clip.unpack_array(sample["frame_diff"], f"{name} (frame_diff)")
            if len(diff) != row["frame_count"] - 1:
                raise Failure(
                    f"{name}: frame_diff has {len(diff)} entries for {row['frame_count']} frames; delete its index and run `shard` again"
                )
            out["frame_diff"] = _channels_first(clip.crop(diff[np.asarray(frames[1:], int) - 1], self.size, place))
        if "json" in self.columns:
            try:
                out["json"] = json.loads(sample["json"])
            except ValueError as e:
                raise Failure(f"{name}.json: damaged ({e}); run `longtake dataset verify`") from e
        return out


class _Slice(torch.utils.data.IterableDataset):
    """Batches from number `start` on; with workers, each takes every n-th one, and DataLoader deals them in turn."""

    def __init__(self, stream: _Stream, start: int, end: int | None) -> None:
        self.stream, self.start, self.end = stream, start, end

    def __iter__(self) -> Iterator[dict[str, Any] | Failure]:
        info = torch.utils.data.get_worker_info()
        number, step = (self.start + info.id, info.num_workers) if info else (self.start, 1)
        try:
            yield from self.stream.batches(_count(number, step, self.end))
        except Failure as e:
            # handed over as an item: torch would raise it again with a stack trace for its message
            yield e


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples: arrays become tensors, everything else lists; all samples of a batch are of one epoch."""
    out: dict[str, Any] = {}
    for name, first in samples[0].items():
        if name.startswith("__"):
            continue
        values = [s[name] for s in samples]
        out[name] = torch.from_numpy(np.stack(values)) if isinstance(first, np.ndarray) else values
    out["epoch"] = samples[0]["epoch"]
    return out


def to_model(video: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 0..255 to [-1, 1], on the device where the tensor is."""
    return video.to(dtype) / 127.5 - 1.0


def to_pixels(video: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 0..255, rounding and clamping."""
    return ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _count(number: int, step: int, end: int | None) -> Iterator[int]:
    while end is None or number < end:
        yield number
        number += step


@functools.lru_cache(maxsize=2)
def _epoch_order(sizes: tuple[int, ...], seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    return order.epoch_order(np.asarray(sizes), seed, epoch, shuffle=shuffle)


def _rows(
    sizes: np.ndarray, seed: int, shuffle: bool, batch: int, per_epoch: int, rank: int, world: int, number: int
) -> tuple[int, np.ndarray]:
    epoch, within = divmod(number, per_epoch)
    sequence = _epoch_order(tuple(sizes.tolist()), seed, epoch, shuffle)
    return epoch, order.rank_rows(order.batch_rows(sequence, within, batch), rank, world)


def _window(
    frames: int, stride: int, random_crop: bool, seed: int | None, epoch: int, key: str, frame_count: int
) -> tuple[list[int], float]:
    """The frames of a sample's window, and the place of its crop."""
    span = (frames - 1) * stride + 1
    if seed is None:
        return list(range(0, span, stride)), 0.5
    rng = order.sample_rng(seed, epoch, key)
    start = int(rng.integers(frame_count - span + 1))
    return list(range(start, start + span, stride)), rng.random() if random_crop else 0.5


def _channels_first(video: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(video.transpose(3, 0, 1, 2))


def _join_column(samples: pa.Table, dataset: str, split: str, column: str, names: list[str]) -> pa.Table:
    """Add `COLUMN_offset`, `COLUMN_size` and `COLUMN_sha256`, matched by key and checked against the clips they were made from."""
    shards = [index.read_shard(dataset, split, f"{name}.{column}") for name in names]
    cache = pa.concat_tables([s.table.replace_schema_metadata(None) for s in shards])
    where = pc.index_in(samples["key"], cache["key"])
    if where.null_count:
        raise Failure(
            f"{dataset} ({split}): {where.null_count} clips have no {column}; delete the column's indexes and run its stage again"
        )
    joined = cache.take(where)
    if not pc.all(pc.equal(joined["base_sha256"], samples["sha256"])).as_py():
        raise Failure(
            f"{dataset} ({split}): {column} was made from other clips; delete the column's indexes and run its stage again"
        )
    for field in ("offset", "size", "sha256"):
        samples = samples.append_column(f"{column}_{field}", joined[field])
    return samples


@functools.lru_cache(maxsize=_OPEN_TARS)
def _mapped(url: str) -> mmap.mmap:
    with Path(storage.filesystem(url)[1]).open("rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _read(url: str, offset: int, size: int, sha256: str) -> bytes:
    """A member's bytes. Raises Failure where they are not there, or not those of `sha256` (hex)."""
    if storage.is_local(url):
        try:
            data = _mapped(url)[offset : offset + size]
        except (OSError, ValueError) as e:
            raise Failure(f"{url}: {e}; run `longtake dataset verify`") from e
    else:
        data = storage.retrying(url, lambda: storage.read_range(url, offset, size))
    if len(data) != size:
        raise Failure(
            f"{url}: is too short for bytes {offset} to {offset + size} of the index; run `longtake dataset verify`"
        )
    # a damaged clip often decodes, to other pixels
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Failure(f"{url}: bytes {offset} to {offset + size} are damaged; run `longtake dataset verify`")
    return data
