"""One shard of clips to the columns of scores that it lacks, beside it: each clip is decoded once for all scorers.

Scorers that watch get every frame in pieces, so that memory does not grow with a clip's length. Those that look get some
frames of several clips of one shape at once. What is batched depends on the clips of the shard alone, in their order: the
bytes do not depend on who else is at work. On another kind of machine the last bits of a network's numbers may differ.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longtake.datasets import clip, index, media, score_columns, scores, storage
from longtake.datasets.errors import Failure, UserError, in_short
from longtake.datasets.scores import Column
from longtake.pipeline import column as columns
from longtake.pipeline.scorers.scorer import Frames, Looker, Values, Watcher, places

PIECE = 32  # frames of a clip that watchers get at once, at most
_PIECE_BYTES = 64 << 20  # or as many as have so many bytes
_WAITING_BYTES = 256 << 20  # of frames that wait for their batch, of one scorer

Report = Callable[[int, str], None]
Row = Mapping[str, Any]  # of a clip in the index of its shard


@dataclass(frozen=True)
class Work:
    """A scorer, and the column that it makes."""

    column: Column
    scorer: Watcher | Looker

    @contextmanager
    def failing_clearly(self, where: str) -> Iterator[None]:
        """Turn any error of the scorer into one line that names the clips."""
        try:
            yield
        except (Failure, UserError):
            raise
        except Exception as e:
            raise Failure(
                f"{where}: scorer {self.column.scorer}: {in_short(e)}; leave the clip out by a `view`, or the scorer out"
            ) from e


def make_scores(
    works: Sequence[Work],
    dataset: str,
    split: str,
    name: str,
    keep: np.ndarray,
    report: Report = lambda clips, position: None,
) -> dict[str, int]:
    """Score the clips of one base shard, and commit the columns that it lacks.

    Args:
        keep: (N,) bool, which of the shard's clips are scored; the others get no values.
        report: called with the number of clips that are scored and the clip that is at work.

    Returns:
        Counts: `clips` and `frames` that were decoded, `columns` that were committed, `without` a value among their rows.

    Raises:
        Failure: a clip is not readable, the base shard is another than before, or a scorer fails.
    """
    base = index.read_shard(dataset, split, name)
    columns.check_keep(dataset, base, keep)
    due = [work for work in works if is_due(dataset, base, work.column.column)]
    tar = storage.join(dataset, split, f"{name}.tar")
    rows = [row if kept else None for row, kept in zip(base.table.to_pylist(), keep.tolist(), strict=True)]
    frames = 0
    try:
        scored = [_Scored(work, tar, base.table["key"].to_pylist()) for work in due]
        for number, row in enumerate(rows):
            if row is None:
                for one in scored:
                    one.values[number] = {"reason": "not_in_view"}
                continue
            report(number, row["key"])
            frames += _score(columns.clip_bytes(tar, row), number, row, scored, f"{tar}: {row['key']}.mp4")
        for one in scored:
            one.flush()
    except UserError as e:
        # such as a network that does not take these frames: one line, as of any other shard that fails
        raise Failure(str(e)) from e

    report(len(rows), "its commit")
    without = 0
    for one in scored:
        without += scores.write_shard(
            dataset, base, one.work.column, [one.values[number] for number in range(len(rows))]
        )
    return {"clips": int(keep.sum()) if due else 0, "frames": frames, "columns": len(due), "without": without}


def is_due(dataset: str, base: index.Shard, column: str) -> bool:
    """Whether a column lacks a shard, or has it of other clips."""
    name = f"{base.name}.{column}"
    if not storage.exists(storage.join(dataset, base.split, f"{name}.parquet")):
        return True
    return not score_columns.fits(dataset, base, column)


@dataclass
class _Scored:
    """A scorer at work on a shard: the values of its clips by number, and frames that wait for their batch."""

    work: Work
    tar: str
    keys: Sequence[str]
    values: dict[int, Values] = field(default_factory=dict)
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    bytes: int = 0

    def add(self, number: int, frames: np.ndarray) -> None:
        """Take the frames (N, H, W, 3) of a clip for a scorer that looks."""
        self.waiting.setdefault(frames.shape, []).append((number, frames))
        self.bytes += frames.nbytes
        if len(self.waiting[frames.shape]) >= self.work.scorer.batch:  # type: ignore[union-attr]
            self._look(frames.shape)
        while self.bytes > _WAITING_BYTES:
            self._look(max(self.waiting, key=lambda shape: (len(self.waiting[shape]) * np.prod(shape), shape)))

    def flush(self) -> None:
        """Let the scorer look at all that still waits."""
        for shape in list(self.waiting):
            self._look(shape)

    def _look(self, shape: tuple[int, ...]) -> None:
        numbers, frames = zip(*self.waiting.pop(shape), strict=True)
        self.bytes -= sum(each.nbytes for each in frames)
        last = f" to {self.keys[numbers[-1]]}" if len(numbers) > 1 else ""
        with self.work.failing_clearly(f"{self.tar}: {self.keys[numbers[0]]}{last}"):
            self.values |= zip(numbers, self.work.scorer.look(np.stack(frames)), strict=True)  # type: ignore[union-attr]


def _score(mp4: bytes, number: int, row: Row, scored: Sequence[_Scored], name: str) -> int:
    """Show one clip to all scorers; returns the frames that were decoded."""
    looking = [one for one in scored if is_looker(one.work.scorer)]
    watching = [one for one in scored if not is_looker(one.work.scorer)]
    clip_frames = Clip(mp4, row, [one.work.scorer for one in looking], name)  # type: ignore[misc]
    watches = []
    for one in watching:
        with one.work.failing_clearly(name):
            watches.append(one.work.scorer.begin(row))  # type: ignore[union-attr]
    for piece in clip_frames.pieces() if watches else ():
        for one, watch in zip(watching, watches, strict=True):
            with one.work.failing_clearly(name):
                watch.add(piece)
    for one, watch in zip(watching, watches, strict=True):
        with one.work.failing_clearly(name):
            one.values[number] = watch.values()
    for one, frames in zip(looking, clip_frames.pictures(), strict=True):
        one.add(number, frames)
    return clip_frames.decoded


def is_looker(scorer: Watcher | Looker) -> bool:
    """Whether a scorer sees some frames of each clip, else all."""
    return hasattr(scorer, "look")


class Clip:
    """The frames of one clip for all scorers, decoded once by one thread."""

    def __init__(self, mp4: bytes, row: Row, lookers: Sequence[Looker], name: str) -> None:
        self.decoded = 0  # frames
        self._mp4, self._row, self._lookers, self._name = mp4, row, lookers, name
        self._places = [places(row["frame_count"], looker.count) for looker in lookers]
        self._pictures: list[list[np.ndarray]] = [[] for _ in lookers]
        self._scalers: dict[Any, Any] = {}  # by the size of a looker

    def pieces(self, most: int = PIECE) -> Iterator[Frames]:
        """All frames of the clip, at most `most` at once; those for lookers are kept on the way."""
        from av.video.reformatter import VideoReformatter

        count, scaler, piece = self._row["frame_count"], VideoReformatter(), np.empty((0, 0, 0), np.uint8)
        first = filled = 0
        for number, shown in self._images(None):
            self._keep(number, shown)
            with self._scaling(number):
                image = _planar(shown, scaler)
            if not filled:
                frame_bytes = image.height * image.width * 3 // 2
                length = min(most, count - number, max(1, _PIECE_BYTES // frame_bytes))
                first, piece = number, np.empty((length, image.height * 3 // 2, image.width), np.uint8)
            _copy(image, piece[filled])
            filled += 1
            if filled == len(piece):
                yield Frames(first, self._row["fps"], piece)
                filled = 0

    def pictures(self) -> list[np.ndarray]:
        """The frames (N, H, W, 3) uint8 of each looker; those that `pieces` has not come by are decoded now."""
        if not self.decoded and self._lookers:
            for number, image in self._images(sorted(set().union(*self._places))):
                self._keep(number, image)
        return [np.stack(frames) for frames in self._pictures]

    def _keep(self, number: int, image: Any) -> None:
        """Scale a frame for the lookers that see it, in the way of the loader."""
        from av.video.reformatter import VideoReformatter

        seen: dict[Any, np.ndarray] = {}
        for looker, numbers, pictures in zip(self._lookers, self._places, self._pictures, strict=True):
            if number not in numbers:
                continue
            if looker.size not in seen:
                own = (image.height, image.width)
                height, width = clip.covering_size(own, looker.size) if looker.size else own
                # one for all frames of a size: each frame's own would set up its tables again
                scaler = self._scalers.setdefault(looker.size, VideoReformatter())
                with self._scaling(number):
                    picture = scaler.reformat(image, width, height, "rgb24", threads=1).to_ndarray()
                seen[looker.size] = clip.crop(picture[None], looker.size)[0] if looker.size else picture
            pictures.append(seen[looker.size])

    @contextmanager
    def _scaling(self, number: int) -> Iterator[None]:
        import av

        try:
            yield
        except (av.error.FFmpegError, MemoryError, ValueError) as e:
            raise Failure(
                f"{self._name}: frame {number} cannot be scaled ({in_short(e)}); leave the clip out by a `view`"
            ) from e

    def _images(self, numbers: Sequence[int] | None) -> Iterator[tuple[int, Any]]:
        """Frames of the clip with their numbers: all, or those of ascending numbers."""
        import av

        count = self._row["frame_count"]
        try:
            with media.opened(self._mp4) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1
                images = container.decode(stream)
                if numbers is None:
                    for number, image in zip(range(count), images, strict=False):
                        self.decoded += 1
                        yield number, image
                else:
                    yield from self._chosen(container, stream, numbers)
        except (av.error.FFmpegError, ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as e:
            raise Failure(f"{self._name}: cannot decode ({e}); run `longtake dataset verify`") from e
        if numbers is None and self.decoded < count:
            raise Failure(
                f"{self._name}: has {self.decoded} frames, its index says {count}; run `longtake dataset verify`"
            )

    def _chosen(self, container: Any, stream: Any, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Frames of ascending numbers; from a key frame on wherever that leaves some out."""
        duration = 1 / (stream.average_rate * stream.time_base)  # of a frame, in ticks
        ticks, parts = duration.numerator, duration.denominator
        # a group of pictures is closed: a key frame has the number by which it is stored
        keys = [number for number, entry in enumerate(stream.index_entries) if entry.is_keyframe]
        images, at = container.decode(stream), -1
        for wanted in numbers:
            if any(at + 1 < key <= wanted for key in keys):
                container.seek(int(wanted * duration), stream=stream)
                images = container.decode(stream)
            for image in images:
                self.decoded += 1
                at = (2 * (image.pts or 0) * parts + ticks) // (2 * ticks)
                if at == wanted:
                    yield wanted, image
                    break
            else:
                raise Failure(f"{self._name}: frame {wanted} is missing; run `longtake dataset verify`")


def _planar(image: Any, scaler: Any) -> Any:
    """An image as yuv420p of even sides, which a clip is already; a picture may be anything."""
    if image.format.name == "yuv420p" and image.width % 2 == image.height % 2 == 0:
        return image
    size = max(2, image.width // 2 * 2), max(2, image.height // 2 * 2)
    return scaler.reformat(image, *size, "yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG", threads=1)


def _copy(image: Any, planes: np.ndarray) -> None:
    """Copy an image of yuv420p to its planes (H 3/2, W)."""
    flat, place = planes.reshape(-1), 0
    for plane in image.planes:
        pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        flat[place : place + pixels.size].reshape(pixels.shape)[:] = pixels
        place += pixels.size
