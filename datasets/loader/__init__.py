"""The loader: any split, view and columns of a dataset as a deterministic stream of batches.

`split` opens the columns, `selection` says which samples take part and `buckets` which of them share batches. `order` is the
order of an epoch, `batches` makes a batch from its number alone, `window` a sample in its place of the batch (`room`), of
latents and tokens by `codes`. `workers` run them, and `handover` brings their batches over.

Samples are read by their byte offsets, the bytes of latents are copied once, and the pixels of a batch are uint8. The
state is the number of batches taken: resuming opens the tars that come next, at the bytes where they are needed, and
replays nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Literal

import pyarrow.compute as pc
import torch

from longtake.datasets import compact, index, storage
from longtake.datasets.cache import Cache
from longtake.datasets.errors import UserError
from longtake.datasets.loader import order
from longtake.datasets.loader.batches import Batches
from longtake.datasets.loader.buckets import batch_counts, make_buckets, window_shapes
from longtake.datasets.loader.live import Live
from longtake.datasets.loader.mixture import Mixture
from longtake.datasets.loader.selection import in_streams, select, with_history, with_sound
from longtake.datasets.loader.split import COLUMNS, by_name, classes, factor_of, open_columns
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.loader.window import Window
from longtake.datasets.loader.workers import Stream

__all__ = ("COLUMNS", "Loader", "Mixture", "Stream", "to_model", "to_pixels")


class Loader(Stream):
    """Batches of windows, endless over epochs unless `epochs` is given.

    A batch is `{"key": [str], "epoch": int}` and the columns asked for: `video` uint8 (B, 3, T, H, W), `frame_diff`
    uint8 (B, 3, T-1, h, w), `audio` float32 (B, channels, samples) and `audio_mask` bool (B,), `latent` float16 or
    bfloat16 (B, 2, C, 1 + (T-1)/4, h, w) of mean and log-variance, `tokens` int64 (B, t, h, w) of code ids, `json` [dict],
    `label` int64 (B,), `caption` [str | None], one of those about the window, drawn, and `text` bfloat16 (B, N, width) of
    the states of its tokens with `text_mask` bool (B, N) and, where samples are drawn, `chances` float64 (B, 4) in 0..1 of
    each sample's own; B is this rank's share. Several columns of one kind have the names that the caller gives them.
    With `history_seconds` there are also `history_video`, `history_latent` and so on, and how many of their frames and
    latents are true (see `datasets.loader.window`).

    Args:
        dataset: URL of the dataset.
        split: "train" or "val".
        view: URL of a view, whose weights say how often a clip comes; None takes every clip once an epoch.
        columns: some of `COLUMNS`; or `{name: column}`, the cache columns by the names that batches have them under,
            such as `{"latent": "latent-1f...", "low": "latent-9c..."}`. Without names they are called "latent",
            "tokens", "caption" and "text".
        frames: frames T in a window, or several T of which a clip takes the longest that it fills. A clip shorter than
            all is left out; `samples_short` counts them.
        stride: take every `stride`-th frame of the clip.
        size: (height, width) of the video; a clip is scaled down to cover it and cropped. Or its short side: then clips
            keep their shapes, the long side rounded to `multiple` pixels, and each batch is of one shape, as it always is
            where a cache column has several shapes. A clip smaller than this is left out; `samples_small` counts them,
            `samples_without_latent` those that a column of latents or tokens has left out.
        crop: "center", or "random" along the longer side, from the sample's own seed.
        batch: samples in a global batch, over all ranks.
        pixels: instead of `batch`, the most T * H * W pixels in a global batch: each shape gets the batch that it allows.
        positions: beside `batch`, the most T * h * w positions of the first column of latents in a global batch: windows of
            larger or longer latents share smaller batches.
        ranks: with `pixels` or `positions`, batches are multiples of this: the largest world to run or resume on; None:
            this world.
        last: "drop" leaves the last incomplete batch of an epoch out, "pad" fills it from the epoch's start.
        shuffle: False gives the order on disk and, without `clip_starts`, the window at each clip's start.
        clip_starts: share of windows that start their clip, 0 to 1; the others start later, at any frame alike. A clip as
            long as its window has only one. None: all starts are equally likely.
        heard: leave out clips without sound, for column "audio"; `samples_without_sound` counts them.
        history_seconds: seconds before the window to give with it.
        history_least: seconds that must have come before the clip; a clip with less is left out, and
            `samples_without_history` counts them. With `history_seconds` the same, every history is whole.
        histories: for latents, in place of `history_seconds`: how many latents of the clip's stream to give before a
            window, and so where in the stream it begins (see `datasets.loader.streams`). Without `shuffle` each stream
            comes once. `history_mean` is their mean number, `longest_stream` the latents of the longest stream. Captions
            are then those of the clip that has most of the window.
        workers: decoding processes of this rank; 0 decodes in this one.
        cache: keeps whole tars of a remote dataset; None reads each sample by itself.
        live: columns of latents by their names that are not there: a batch has zeros in their place, and `pixels`, a list of
            the (T, H, W, 3) that they are to be made of (see `datasets.loader.live`).
        unreadable: "stop" at a sample that cannot be read, or "skip": another of this rank's share of the batch takes
            its place, and `batch["skipped"]` and `skipped` count; a share with nothing readable still stops.

    Raises:
        UserError: nothing to load, a batch that does not divide, an unknown column, sound that was not kept, columns of
            latents with other factors, windows other than those that have tokens, a share outside 0 to 1, no clip as large
            as `size` or with as much history.
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
        positions: int | None = None,
        ranks: int | None = None,
        last: order.Last = "drop",
        shuffle: bool = True,
        clip_starts: float | None = None,
        seed: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        heard: bool = False,
        history_seconds: float = 0.0,
        history_least: float = 0.0,
        histories: Lengths | None = None,
        workers: int = 0,
        cache: Cache | None = None,
        live: Mapping[str, Live] | None = None,
        unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        names = by_name(columns)
        if clip_starts is not None and not 0 <= clip_starts <= 1:
            raise UserError(f"clip_starts: {clip_starts:g} is no share of windows; give one from 0 to 1")

        # the split and its columns
        index.describe(dataset)
        where = f"{dataset} ({split})"
        base, facts = compact.open_split(dataset, split, cache=cache)
        if not len(base.shards):
            raise UserError(f"{where}: no committed shard; run its `shard` stage")
        opened, code_facts = open_columns(base, names, cache, live)
        if history_seconds and opened.live:
            raise UserError("history_seconds: live latents have the histories of their streams; ask for `histories`")

        # the samples that take part, and their shapes
        lengths = sorted({frames} if isinstance(frames, int) else set(frames), reverse=True)
        shapes = window_shapes(facts, lengths, stride, size, multiple, "frame_diff" in names, code_facts)
        selection = select(base, facts, view, shapes, code_facts, "video" in names)
        opened.check_windows(lengths, stride, histories)
        if heard:
            selection = with_sound(selection, opened.columns)
        if histories:
            latents = opened.columns[opened.latents[0]]
            window_latents = 1 + (lengths[0] - 1) // factor_of(latents)
            selection = in_streams(selection, latents, window_latents, histories, shuffle)
            often = None if selection.weights is None else selection.weights[selection.keep]
            self._history_mean = partial(histories.mean, selection.stream_latents, window_latents, weights=often)
        elif history_least:
            selection = with_history(selection, base, history_least)
        self.samples = int(selection.keep.sum())
        self.samples_short, self.samples_small = selection.short, selection.small
        self.samples_without_latent, self.samples_without_history = selection.without_latent, selection.without_history
        self.samples_without_sound = selection.without_sound
        self.samples_of_mixed_streams, self.longest_stream = selection.mixed_streams, selection.longest_stream
        if not self.samples and pc.max(facts["frame_count"]).as_py() == 1 < lengths[-1]:
            raise UserError(
                f"{where}: has images, and windows of {lengths[-1]} frames need videos; set frames: 1 for images"
            )

        # batches of one shape each
        window = Window(0, stride, (0, 0), crop == "random", history_seconds, clip_starts, histories)
        if positions is not None and not opened.latents:
            raise UserError("positions: are of latents; name a column of latents, or leave them out")
        factor = factor_of(opened.columns[opened.latents[0]]) if opened.latents else 1
        buckets = make_buckets(
            selection.keep, selection.weights, shapes, window, batch or 0, pixels, ranks or world, positions, factor
        )
        self.buckets = buckets
        order.check_batch(self.samples, (batch or 0) if pixels is None else ranks or world, world, "pad", where)
        counts = batch_counts(buckets, world, last, where)
        self.batches_per_epoch, self.batch = sum(counts), batch
        self.samples_left_out = sum(max(0, b.samples - n * b.batch) for b, n in zip(buckets, counts, strict=True))
        self.classes = classes(base, facts, cache) if "label" in names else []
        opened.labels = {label: number for number, label in enumerate(self.classes)}
        remote, skip = not storage.is_local(dataset), unreadable == "skip"
        plan = Batches(opened, buckets, counts, seed, shuffle, rank, world, remote, skip)

        # what a state must agree with; settings that came later count only where they are set, so that old states fit
        digests = [base.digest, selection.view_digest, *(rows.digest for rows in opened.columns.values())]
        shapes_of = [[b.window.frames, *b.window.size] for b in buckets]
        data = [digests, split, stride, crop, last, shuffle, history_seconds, shapes_of]
        data += [history_least] if history_least else []
        data += ["heard"] if heard else []
        data += [] if clip_starts is None else [{"clip_starts": clip_starts}]
        data += [list(astuple(histories)[:-1])] if histories else []
        data += [{"reaches": histories.reaches}] if histories and histories.reaches else []
        batch_sizes = batch if pixels is positions is None else [b.batch for b in buckets]
        end = None if epochs is None else epochs * self.batches_per_epoch
        super().__init__(plan, data, seed, batch_sizes, end, workers, rank, world)

    def history_mean(self, reach: int | None = None) -> float:
        """The mean number of latents in a sample's history, `reach` at most, for any batch and world.

        Only for a loader with `histories`.
        """
        return self._history_mean(reach=reach)


def to_model(video: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 0..255 to [-1, 1], on the device where the tensor is."""
    return video.to(dtype) / 127.5 - 1.0


def to_pixels(video: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 0..255, rounding and clamping."""
    return ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
