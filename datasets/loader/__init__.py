"""The loader: any split, view and columns of a dataset as a deterministic stream of batches.

The order is `order`, a batch is made by `batches`, a sample by `window`. Samples are read by their byte offsets and cross
process borders as uint8. The state is the number of batches taken, and any batch is made from its number alone: resuming
opens the tars that come next, at the bytes where they are needed, and replays nothing.
"""

import hashlib
import json
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from longtake.datasets import compact, index, neighbours, schema, storage
from longtake.datasets.cache import Cache
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import order, streams
from longtake.datasets.loader.batches import Batches, Bucket, Mixed, Plan
from longtake.datasets.loader.reader import Reader
from longtake.datasets.loader.shapes import window_shapes
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.loader.window import Source, Window
from longtake.datasets.view import kept

COLUMNS = ("video", "frame_diff", "latent-DIGEST", "json", "label")
_LATENT = "latent-"  # how columns of latents begin


class Stream:
    """Batches by their numbers, from where the state says. What `Loader` and `Mixture` have in common."""

    def __init__(self, plan: Plan, data: Sequence[Any], seed: int, batch: Any, end: int | None, workers: int) -> None:
        self._plan, self._end, self._workers = plan, end, workers
        self.skipped = 0
        self._state: dict[str, Any] = {
            "order": order.ORDER_VERSION,
            "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
            "seed": seed,
            "batch": batch,
            "taken": 0,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = _Slice(self._plan, self._state["taken"], self._end)
        options: dict[str, Any] = {}
        if self._workers:
            options = {"num_workers": self._workers, "multiprocessing_context": "forkserver", "prefetch_factor": 2}
            _leave_signals()
        loader = torch.utils.data.DataLoader(stream, batch_size=None, pin_memory=torch.cuda.is_available(), **options)
        for item in _while_workers_live(iter(loader)) if self._workers else loader:
            if isinstance(item, Failure):
                raise item
            self._state["taken"] += 1
            self.skipped += item.get("skipped", 0)
            yield item

    def at(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The batches of these numbers, counted from the first epoch on, made in this process; the state stays as it is."""
        yield from self._plan.make(iter(numbers))

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
            if state.get(name) != self._state[name]:
                raise UserError(
                    f"loader state: belongs to {what} ({state.get(name)} there, {self._state[name]} here); start a new run"
                )
        self._state["taken"] = state["taken"]


class Loader(Stream):
    """Batches of windows, endless over epochs unless `epochs` is given.

    A batch is `{"key": [str], "epoch": int}` and of the columns asked for `video` uint8 (B, 3, T, H, W), `frame_diff`
    uint8 (B, 3, T-1, h, w), `latent` float16 or bfloat16 (B, 2, C, 1 + (T-1)/4, h, w) of mean and log-variance, `json`
    [dict] and `label` int64 (B,); B is this rank's share. Several columns of latents, of the same steps, have the names
    that the caller gives them. With `history_seconds` also `history_video`, `history_latent` and so on, and how many of
    their frames and steps are true (see `datasets.loader.window`).

    Args:
        dataset: URL of the dataset.
        split: "train" or "val".
        view: URL of a view, whose weights say how often a clip comes; None takes every clip once an epoch.
        columns: some of `COLUMNS`; or `{name: column}`, the cache columns by the names that batches have them under,
            such as `{"latent": "latent-1f...", "low": "latent-9c..."}`. Without a name one is called by its kind, "latent".
        frames: frames T in a window, or several T of which a clip takes the longest that it fills. A clip shorter than
            all is left out; `samples_short` counts them.
        stride: every how many frames of the clip.
        size: (height, width) of the video; a clip is scaled down to cover it and cropped. Or its short side: then clips
            keep their shapes, the long side to `multiple` pixels, and each batch is of one shape. So it is in any case
            where a cache column has other shapes for them. A clip smaller than this is left out; `samples_small`
            counts them, `samples_without_latent` those that a column of latents has left out.
        crop: "center", or "random" along the longer side, from the sample's own seed.
        batch: samples in a global batch, over all ranks.
        pixels: instead of `batch`, the most T * H * W pixels in a global batch: each shape gets the batch that it allows.
        ranks: with `pixels`, batches are multiples of this: the largest world to run or resume on; None: this world.
        last: "drop" leaves the last incomplete batch of an epoch out, "pad" fills it from the epoch's start.
        shuffle: False gives the order on disk and, without `clip_starts`, the window at each clip's start.
        clip_starts: share of windows that start their clip, 0 to 1; the others start later, anywhere alike. A clip as
            long as its window has only the one. None: any start of a clip is as likely.
        history_seconds: how much of what came before the window to give with it.
        history_least: seconds that must have come before the clip; one that joins to less is left out, and
            `samples_without_history` counts them. With `history_seconds` the same, every history is whole.
        histories: of latents, in place of `history_seconds`: how many steps of the clip's stream to give before a window,
            and so where in the stream it begins (see `datasets.loader.streams`). Without `shuffle` each stream comes once.
            `history_mean` says how many steps that is on the average, `longest_stream` has all the steps of the longest.
        workers: decoding processes of this rank; 0 decodes in this one.
        cache: where to keep whole tars of a remote dataset; None reads each sample by itself.
        unreadable: "stop" at a sample that cannot be read, or "skip": another of this rank's share of the batch takes
            its place, and `batch["skipped"]` and `skipped` count; a share with nothing readable stops.

    Raises:
        UserError: nothing to load, a batch that does not divide, an unknown column, columns of latents of other steps,
            a share outside of 0 to 1, no clip as large as `size` or with as much history.
        Failure: a damaged index, or a column that does not belong to these clips.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        *,
        view: str | None = None,
        columns: Sequence[str] | Mapping[str, str] = ("video", "json"),
        frames: int | Sequence[int] = 17,
        stride: int = 1,
        size: tuple[int, int] | int = (64, 64),
        multiple: int = 16,
        crop: Literal["center", "random"] = "center",
        batch: int | None = 8,
        pixels: int | None = None,
        ranks: int | None = None,
        last: order.Last = "drop",
        shuffle: bool = True,
        clip_starts: float | None = None,
        seed: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        history_seconds: float = 0.0,
        history_least: float = 0.0,
        histories: Lengths | None = None,
        workers: int = 0,
        cache: Cache | None = None,
        unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        named = _by_name(columns)
        if clip_starts is not None and not 0 <= clip_starts <= 1:
            raise UserError(f"clip_starts: {clip_starts:g} is no share of windows; give one from 0 to 1")
        index.describe(dataset)
        where = f"{dataset} ({split})"
        base, facts = compact.open_split(dataset, split, cache=cache)
        if not len(base.shards):
            raise UserError(f"{where}: no committed shard; run its `shard` stage")
        cached = {name: c for name, c in named.items() if c == "frame_diff" or c.startswith(_LATENT)}
        opened = {name: _column(base, dataset, split, c, cache) for name, c in cached.items()}
        joined = {name: rows for name, (rows, _) in opened.items()}
        latents = {name: sizes for name, (_, sizes) in opened.items() if name != "frame_diff"}
        keep, weights, judged = kept(base, view)
        viewed = keep.copy()
        self.samples_without_latent = 0
        encoded = None
        if latents:
            encoded = np.logical_and.reduce([sizes["height"].to_numpy() > 0 for sizes in latents.values()])
            self.samples_without_latent = int((keep & ~encoded).sum())
            keep &= encoded
            if self.samples_without_latent and not keep.any():
                raise UserError(f"{where}: no clip of this view has latents; make them with this view, or without one")
        lengths = sorted({frames} if isinstance(frames, int) else set(frames), reverse=True)
        cropped = "frame_diff" in joined
        shapes, codes, short, small = window_shapes(
            facts, lengths, stride, size, multiple, cropped, list(latents.values())
        )
        self.samples_short = int((short & keep).sum())
        keep &= ~short
        small &= keep & ("video" in named)
        self.samples_small = int(small.sum())
        if self.samples_small == keep.sum() > 0:
            height, width = (facts[name][int(np.flatnonzero(small)[0])].as_py() for name in ("height", "width"))
            asked = f"{size[0]}x{size[1]}" if isinstance(size, tuple) else f"{size}"
            raise UserError(
                f"{where}: clips of {height}x{width} are smaller than size {asked}; raise `clip.short_side` or lower `size`"
            )
        keep &= ~small
        _fit({named[name]: joined[name] for name in latents}, lengths, stride)
        if not histories and (streamed := [name for name in latents if streams.joined(joined[name])]):
            raise UserError(
                f"columns: {named[streamed[0]]} was encoded in streams of several clips, a window inside of one has no first latent;"
                " name latents without `join_seconds`"
            )
        self.samples_without_history = self.samples_of_mixed_streams = 0
        if histories:
            rows = [joined[name] for name in latents]
            keep = self._in_streams(where, rows, named.values(), keep, viewed, weights, lengths, histories, shuffle)
        elif history_least:
            reaches = neighbours.reach_back(base, history_least, encoded)
            self.samples_without_history = int((keep & ~reaches).sum())
            keep &= reaches
            if self.samples_without_history and not keep.any():
                raise UserError(
                    f"{where}: no clip follows others of its source for {history_least:g} s without a hole; lower the "
                    "seconds of history, or shard longer shots, with a lower `clip.max_seconds`"
                )
        self.samples = int(keep.sum())
        if not self.samples and pc.max(facts["frame_count"]).as_py() == 1 < lengths[-1]:
            raise UserError(
                f"{where}: has images, and windows of {lengths[-1]} frames need videos; set frames: 1 for images"
            )
        kinds = np.unique(codes[keep]).tolist()
        rows_of = [np.flatnonzero(keep & (codes == code)).astype(np.int32) for code in kinds]
        # a shape's part of the epoch is that of its clips' weights
        parts = [len(mine) if weights is None else float(weights[mine].sum()) for mine in rows_of]
        buckets = []
        for code, mine, samples in zip(kinds, rows_of, order.shares(parts, self.samples).tolist(), strict=True):
            t, h, w = shapes[code]
            most = batch or 0 if pixels is None else pixels // (t * h * w) // (ranks or world) * (ranks or world)
            if pixels is not None and not most:
                raise UserError(f"pixels: {pixels} hold no {ranks or world} windows of {t}x{h}x{w}; raise it")
            window = Window(t, stride, (h, w), crop == "random", history_seconds, clip_starts, histories)
            buckets.append(Bucket(window, most, mine, None if weights is None else weights[mine], samples))
        order.check_batch(self.samples, (batch or 0) if pixels is None else ranks or world, world, "pad", where)
        counts = [order.batch_count(b.samples, b.batch, last) for b in buckets]
        if not sum(counts):
            fullest = max(buckets, key=lambda b: b.samples / b.batch)
            order.check_batch(fullest.samples, fullest.batch, world, last, where)
        self.batches_per_epoch, self.batch = sum(counts), batch
        self.samples_left_out = sum(max(0, b.samples - n * b.batch) for b, n in zip(buckets, counts, strict=True))
        self.classes = _classes(dataset, split, facts, cache) if "label" in named else []
        reader = Reader(cache)
        plan = Batches(
            source=Source(base, joined, named, reader, self.classes),
            buckets=buckets,
            counts=counts,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world=world,
            remote=not storage.is_local(dataset),
            skip=unreadable == "skip",
        )
        shapes_of = [[b.window.frames, *b.window.size] for b in buckets]
        batches = batch if pixels is None else [b.batch for b in buckets]
        made_of = [base.digest, judged, *(rows.digest for rows in joined.values())]
        data = [made_of, split, stride, crop, last, shuffle, history_seconds, shapes_of]
        data += [history_least] if history_least else []
        data += [] if clip_starts is None else [{"clip_starts": clip_starts}]
        data += [list(astuple(histories)[:-1])] if histories else []
        data += [{"reaches": histories.reaches}] if histories and histories.reaches else []
        end = None if epochs is None else epochs * self.batches_per_epoch
        self.rank, self.world = rank, world
        super().__init__(plan, data, seed, batches, end, workers)

    def _in_streams(
        self,
        where: str,
        latents: list[compact.Rows],
        columns: Iterable[str],
        keep: np.ndarray,
        viewed: np.ndarray,
        weights: np.ndarray | None,
        frames: list[int],
        histories: Lengths,
        shuffle: bool,
    ) -> np.ndarray:
        """Which clips are kept: of streams that have room for enough history, and without `shuffle` one of each.

        A window lies anywhere in its stream: of one with clips that the view leaves out none is kept.

        Raises:
            UserError: other columns than latents; several lengths of windows; no stream is long enough, or in the view.
        """
        other = [c for c in columns if c != "label" and not c.startswith(_LATENT)]
        if other or not latents or len(frames) > 1:
            raise UserError("histories: are of latents and windows of one length; leave out what else is asked for")
        window, totals = 1 + (frames[0] - 1) // _factor(latents[0]), streams.totals(latents[0])
        firsts = streams.firsts(latents[0])
        mixed = np.isin(firsts, firsts[~viewed])
        self.samples_of_mixed_streams = int((keep & mixed).sum())
        if self.samples_of_mixed_streams and not (keep & ~mixed).any():
            raise UserError(
                f"{where}: every stream of latents has clips that the view leaves out; encode them with this view"
            )
        keep = keep & ~mixed
        able = totals >= histories.least + window
        self.samples_without_history = int((keep & ~able).sum())
        self.longest_stream = longest = int(totals[keep].max(initial=0))
        keep = keep & able
        if self.samples_without_history and not keep.any():
            raise UserError(
                f"{where}: no stream of latents has {histories.least} steps of history and {window} of a window, the longest"
                f" {longest} in all; lower the seconds of history, or encode clips in longer streams, with `join_seconds`"
            )
        if not shuffle:
            rows = np.flatnonzero(keep)
            keep = np.zeros_like(keep)
            keep[rows[np.unique(firsts[rows], return_index=True)[1]]] = True
        often = None if weights is None else weights[keep]
        self._history_mean = partial(histories.mean, totals[keep], window, weights=often)
        return keep

    def history_mean(self, reach: int | None = None) -> float:
        """How many steps of history, `reach` at most, a sample has on the average, whatever batch and world it is in."""
        return self._history_mean(reach=reach)


class Mixture(Stream):
    """Whole batches of several endless loaders in turn, each with its share of the batches, exact in every 1000.

    A batch is that of its loader, and `part`: the loader's name. Each loader keeps its own epochs. Images beside
    videos are a loader of windows of one frame.

    Args:
        parts: `{name: (loader, weight)}`, the loaders made for the same rank and world.
    """

    def __init__(self, parts: Mapping[str, tuple[Loader, float]], *, seed: int = 0, workers: int = 0) -> None:
        loaders = {name: loader for name, (loader, _) in parts.items()}
        weights = [weight for _, weight in parts.values()]
        if not parts or min(weights) <= 0:
            raise UserError("mixture: each part needs a weight above 0")
        if least := [n for n, share in zip(loaders, order.shares(weights), strict=True) if not share]:
            raise UserError(f"mixture: {least[0]} has less than one batch in {order.ROUND}; raise its weight")
        if len({(loader.rank, loader.world) for loader in loaders.values()}) > 1:
            raise UserError("mixture: its loaders were made for different ranks")
        if any(loader._end is not None for loader in loaders.values()):
            raise UserError("mixture: a loader has `epochs`; leave them out, a mixture is endless")
        self.loaders = loaders
        plan = Mixed([loader._plan for loader in loaders.values()], list(loaders), weights, seed)
        data = [[name, loader._state["data"], loader._state["seed"]] for name, loader in loaders.items()]
        batches = [loader._state["batch"] for loader in loaders.values()]
        super().__init__(plan, [data, weights], seed, batches, None, workers)


def _leave_signals() -> None:
    """A signal to stop often comes to all processes of a group: the workers to come go on, so that the step can end and be saved.

    They end when the process that they work for says so, or is gone. They inherit the mask of the server that they are
    forked from, so no signal finds them before they are ready for it.
    """
    # which would lift the mask
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _while_workers_live(items: Iterator[Any]) -> Iterator[Any]:
    """The items. Raises Failure where the system has killed a worker, which torch tells in errors of many kinds."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as e:
            # the others: what waits in the queue cannot be fetched from a worker that is gone
            passed_on = str(e).startswith("Caught ")
            if passed_on or (isinstance(e, RuntimeError) and not str(e).startswith("DataLoader worker")):
                raise
            raise Failure(
                "loader: a decoding process was killed, perhaps for want of memory: lower `workers` or `batch`;"
                " the last checkpoint is whole: run the same command again to go on from it"
            ) from e
        yield item


class _Slice(torch.utils.data.IterableDataset):
    """Batches from number `start` on; with workers, each takes every n-th one, and DataLoader deals them in turn."""

    def __init__(self, plan: Plan, start: int, end: int | None) -> None:
        self.plan, self.start, self.end = plan, start, end

    def __iter__(self) -> Iterator[dict[str, Any] | Failure]:
        info = torch.utils.data.get_worker_info()
        number, step = (self.start + info.id, info.num_workers) if info else (self.start, 1)
        try:
            yield from self.plan.make(_count(number, step, self.end))
        except Failure as e:
            # handed over as an item: torch would raise it again with a stack trace for its message
            yield e


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


def _by_name(columns: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Columns by the names that batches have them under. Raises UserError for one that is unknown, or has no name of its own."""
    pairs = list(columns.items()) if isinstance(columns, Mapping) else [(_kind(column), column) for column in columns]
    listed = [column for _, column in pairs]
    if unknown := {c for c in listed if c not in COLUMNS and not c.startswith(_LATENT)}:
        raise UserError(f"columns: unknown {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    if twice := {c for c in listed if listed.count(c) > 1}:
        raise UserError(f"columns: {', '.join(sorted(twice))} twice; name each once")
    named = dict(pairs)
    if len(named) < len(pairs):
        both = [column for name, column in pairs if name == "latent"]
        raise UserError(f"columns: {' and '.join(both)} need names, such as columns={{'latent': ..., 'low': ...}}")
    for name, column in pairs:
        if name != column and (name in COLUMNS or not column.startswith(_LATENT)):
            raise UserError(f"columns: {column} cannot be called {name!r}; choose another name, or leave it out")
    return named


def _kind(column: str) -> str:
    """What a column is called where the caller gives no name."""
    return "latent" if column.startswith(_LATENT) else column


def _column(
    base: compact.Rows, dataset: str, split: str, column: str, cache: Cache | None
) -> tuple[compact.Rows, pa.Table]:
    """The rows of a cache column and their `FACTS`, in the base's order.

    Raises:
        Failure: it has not as many as the base; that they fit is seen on reading.
    """
    rows, facts = compact.open_split(dataset, split, column, cache)
    have = dict(zip(rows.shards["name"].to_pylist(), rows.counts.tolist(), strict=True))
    want = {
        f"{n}.{column}": count for n, count in zip(base.shards["name"].to_pylist(), base.counts.tolist(), strict=True)
    }
    wrong = {name: count for name, count in want.items() if have.get(name) != count}
    if wrong:
        missing = sum(max(0, count - have.get(name, 0)) for name, count in wrong.items())
        what = f"{missing} clips have no {column}" if missing else f"{next(iter(wrong))} has clips that are not there"
        raise Failure(f"{dataset} ({split}): {what}; delete the column's indexes and run its stage again")
    # a column's shard is committed before its base shard: one that is ahead is not there yet
    taken = np.array([name in want for name in rows.shards["name"].to_pylist()], bool)
    return rows.only(list(want)), facts if taken.all() else facts.filter(np.repeat(taken, rows.counts))


def _fit(latents: Mapping[str, compact.Rows], lengths: list[int], stride: int) -> None:
    """Raises UserError where windows are not of whole steps of the latents, or these have other steps than the first."""
    factors = {name: _factor(rows) for name, rows in latents.items()}
    for name, factor in factors.items():
        first, of_first = next(iter(factors.items()))
        if factor != of_first:
            raise UserError(
                f"columns: {name} has a step for {factor} frames, {first} for {of_first}; name latents of one encoder"
            )
        if stride != 1 or any((t - 1) % factor for t in lengths):
            raise UserError(f"frames: {name} has a step for {factor} frames: windows of 1 + {factor}n frames, stride 1")


def _factor(rows: compact.Rows) -> int:
    filled = np.flatnonzero(rows.counts)
    return rows.of(int(filled[0]))["factor"][0].as_py() if len(filled) else 1


def _classes(dataset: str, split: str, facts: pa.Table, cache: Cache | None) -> list[str]:
    """The labels of a dataset, of all its splits, in order: what `label` counts."""
    others = [compact.open_split(dataset, other, cache=cache)[1] for other in schema.SPLITS if other != split]
    labels = {label for table in (facts, *others) for label in pc.unique(table["label"]).drop_null().to_pylist()}
    if not labels:
        raise UserError(f"{dataset}: no clip has a label; give the manifest a `label` column")
    return sorted(labels)
