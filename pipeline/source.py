"""One source to clips: a single pass over its frames feeds cutting, scoring, encoding and the frame differences.

Runs inside the isolated worker (see isolate.py). Memory is bounded by one clip, whatever the source's length.
"""

import errno
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from longtake.datasets import clip
from longtake.datasets.annotations import label_of
from longtake.pipeline.config import CutConfig, fit
from longtake.pipeline.container import NoVideo, Unreadable
from longtake.pipeline.cut import Sampled, shots
from longtake.pipeline.decode import Frame, Probe, Tally, frames, luma, probe, to_planes
from longtake.pipeline.encode import encode
from longtake.pipeline.index_scores import perceptual_hash, score

REASONS = {
    "missing": "there is no such file",
    "refused": "it may not be read, or its store will not give it",
    "unreachable": "its store did not give it whole; it is tried again once it answers",
    "duplicate": "the same content as another source",
    "empty": "the file has no bytes",
    "unreadable": "no decoder opens it",
    "no_video": "it has no video stream",
    "no_frames": "not one frame could be decoded",
    "too_large": "it exceeds a limit of the stage's `limits`",
    "too_small": "its picture is smaller than the clips",
    "aspect": "its shape is too far from every aspect bucket",
    "too_short": "no piece of it reaches `clip.min_seconds`",
    "black": "it shows nothing but black",
    "crashed": "the decoder crashed on it",
    "timed_out": "it took longer than `limits.timeout_seconds`",
}
_MAX_GAP_SECONDS = 2.0
_TOLERANCE = 0.01  # share by which counts and lengths may differ without a note
_COUNTS = (
    "frames_decoded",
    "frames_sampled",
    "shots",
    "clips",
    "clips_dropped_short",
    "frames_dropped_short",
    "frames_dropped_black",
    "frames_dropped_transition",
)

Sizes = tuple[tuple[int, int], tuple[int, int]]  # (width, height) to scale to, and to crop from the middle


class Rejected(Exception):
    """Why a source gives no clips: a key of REASONS, and a line for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def process(
    path: str, source: str, folder: str, cut: CutConfig, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Cut one local video into `folder`: KEY.mp4, KEY.json and KEY.npy.zst (frame differences) for each clip.

    Args:
        source: the identity of the source, with which keys begin.
        extra: its annotations (`annotations.of_sample`), which go into each KEY.json; `label` goes into the index as well.

    Returns:
        `{"account": columns of schema.SOURCES, "clips": rows of schema.INDEX without offsets, "clocks": as in Tally}`.
    """
    tally = Tally()
    account: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    clips: list[dict[str, Any]] = []

    def write(frames: list[Sampled]) -> None:
        clips.append(_write_clip(Path(folder), source, len(clips), frames, cut, extra or {}))

    try:
        header = _header(path)
        account |= {name: getattr(header, name) for name in ("codec", "width", "height", "fps")}
        account["frames_expected"] = header.frames
        _sizes(cut, header.width, header.height, header.coded_pixels)
        try:
            notes = _cut(path, cut, header, account, tally, write)
        except Unreadable as e:
            # how far decord came depends on its threads
            clips.clear()
            account |= dict.fromkeys(_COUNTS, 0)
            raise Rejected("unreadable", str(e)) from e
        if not clips:
            raise _without_clips(cut, account, notes)
        account |= {"status": "good", "reason": None, "detail": "; ".join(notes) or None}
    except Rejected as e:
        assert not clips, "a source with clips is good"
        account |= {"status": "rejected", "reason": e.reason, "detail": e.detail}
    return {"account": account, "clips": clips, "clocks": tally.clocks}


def _header(path: str) -> Probe:
    """What the container says. Raises Rejected where nothing can be decoded."""
    if not Path(path).stat().st_size:
        raise Rejected("empty", "0 bytes")
    try:
        return probe(path)
    except NoVideo as e:
        raise Rejected("no_video", str(e)) from e
    except Unreadable as e:
        raise Rejected("no_frames" if "frame" in str(e) else "unreadable", str(e)) from e


def _cut(
    path: str,
    cut: CutConfig,
    header: Probe,
    account: dict[str, Any],
    tally: Tally,
    write: Callable[[list[Sampled]], None],
) -> list[str]:
    """Write the clips, count frames, shots and clips in the account, and return notes for people. Raises Unreadable."""
    notes: list[str] = []
    misfits = Counter[str]()
    pending: list[Sampled] = []  # frames of the clip that is not written yet

    def flush() -> None:
        if len(pending) >= cut.clip.min_frames:
            write(pending)
            account["clips"] += 1
        elif pending:
            account["clips_dropped_short"] += 1
            account["frames_dropped_short"] += len(pending)
        pending.clear()

    decoded = _with_sizes(frames(path, cut.decoder, tally), cut, account, notes, misfits)
    for frame, starts, dropped in shots(resample(decoded, float(cut.clip.rate))):
        account["frames_sampled"] += 1
        account["shots"] += starts
        if starts or dropped or len(pending) == cut.clip.max_frames:
            flush()
        if dropped:
            account[f"frames_dropped_{dropped}"] += 1
        else:
            pending.append(frame)
    flush()

    notes += _differences(header, tally, account, float(cut.clip.rate)) if not notes else []
    notes += [f"frames left out, of another shape: {count} ({why})" for why, count in misfits.items()]
    return notes


def _without_clips(cut: CutConfig, account: Mapping[str, Any], notes: list[str]) -> Rejected:
    """Why a source that was decoded to its end has no clips."""
    if not account["frames_decoded"]:
        return Rejected("no_frames", "; ".join(notes) or "no decodable frame")
    black, sampled = account["frames_dropped_black"], account["frames_sampled"]
    if black > sampled / 2:
        return Rejected("black", "; ".join([f"{black} of {sampled} frames are black", *notes]))
    longest = f"{sampled} frames at {cut.clip.fps:g} fps in {account['shots']} shots"
    return Rejected("too_short", "; ".join([f"{longest}; clip.min_seconds is {cut.clip.min_seconds:g}", *notes]))


def _differences(header: Probe, tally: Tally, account: Mapping[str, Any], rate: float) -> Iterator[str]:
    """Notes where frames and seconds differ from what the container or its packets say."""
    decoded, shown, seconds = account["frames_decoded"], account["frames_sampled"] / rate, header.stream_seconds
    if header.frames and abs(decoded - header.frames) > _TOLERANCE * header.frames:
        yield f"the container says {header.frames} frames, {decoded} could be decoded"
    # two fields may come in separate packets
    elif not header.frames and min(abs(n * decoded - tally.packets) for n in (1, 2)) > _TOLERANCE * tally.packets:
        yield f"its packets hold {tally.packets} frames, {decoded} could be decoded"
    if seconds and abs(shown - seconds) > max(_TOLERANCE * seconds, 2 / rate):
        yield f"the container says {seconds:.2f} s, {shown:.2f} s are shown"
    if tally.refused:
        yield f"damaged packets: {tally.refused}"
    if tally.damaged:
        yield f"frames left out, damaged or predicted from damaged ones: {tally.damaged}"
    if tally.turns_back:
        yield f"shots that start where the clock goes back: {tally.turns_back}"
    if tally.ended:
        yield f"it ends early: {tally.ended}"


def _sizes(cut: CutConfig, width: int, height: int, coded_pixels: int) -> Sizes:
    """The sizes to scale to and to crop for a picture as shown. Raises Rejected where it can give no clips."""
    most_pixels, most_crop, short_side = cut.limits.max_pixels, cut.clip.max_crop, cut.clip.short_side
    if coded_pixels > most_pixels:
        raise Rejected("too_large", f"{coded_pixels} pixels a frame; limits.max_pixels is {most_pixels}")
    scaled, bucket, lost = fit(cut.clip, width, height)
    if lost > most_crop:
        raise Rejected("aspect", f"{width}x{height}: {lost:.0%} would be cropped; clip.max_crop is {most_crop:.0%}")
    if min(width, height) < short_side:
        raise Rejected("too_small", f"{width}x{height}; clip.short_side is {short_side}")
    return scaled, bucket


def _with_sizes(
    stream: Iterator[Frame], cut: CutConfig, account: dict[str, Any], notes: list[str], misfits: Counter[str]
) -> Iterator[tuple[Frame, Sizes | None]]:
    """Each frame, counted in the account, with the sizes for its shape, which may change.

    The sizes are None for a frame to leave out, which is counted in `misfits`. Ends with a note at `limits.max_frames`.
    """

    @cache
    def sizes_or_reason(width: int, height: int, coded_pixels: int) -> Sizes | str:
        try:
            return _sizes(cut, width, height, coded_pixels)
        except Rejected as e:
            return e.detail

    for frame in stream:
        if account["frames_decoded"] == cut.limits.max_frames:
            notes.append(f"cut off at limits.max_frames {cut.limits.max_frames}")
            return
        account["frames_decoded"] += 1
        sizes = sizes_or_reason(*frame.size, frame.image.width * frame.image.height)
        if isinstance(sizes, str):
            misfits[sizes] += 1
        yield frame, None if isinstance(sizes, str) else sizes


def resample(stream: Iterable[tuple[Frame, Sizes | None]], fps: float) -> Iterator[Sampled]:
    """Frames at a steady rate by their times: each tick shows the frame that is on screen then.

    A frame may come up to half a tick (or half its own duration) early, so that times rounded to milliseconds do not
    double one frame and skip the next. Over a gap of more than two seconds, and where frames are missing, nothing is
    shown.

    Args:
        stream: frames and the sizes to scale and crop them to; None for a frame that is left out.
    """
    tick, previous, duration, after_gap = 0, None, 1 / fps, False
    planes: np.ndarray | None = None
    sizes: Sizes | None = None
    scaler = VideoReformatter()

    def until(end: float, shown: float, frame: Frame) -> Iterator[Sampled]:
        nonlocal tick, after_gap, planes
        while tick / fps < end - min(shown, 1 / fps) / 2:
            if planes is None:
                assert sizes is not None
                planes = to_planes(frame, *sizes, scaler)
            yield Sampled(planes, frame.number, tick / fps, after_gap)
            tick, after_gap = tick + 1, False

    for frame, frame_sizes in stream:
        missing = previous is None
        if previous is not None:
            interval = frame.seconds - previous.seconds
            parted = frame.starts or interval > _MAX_GAP_SECONDS
            missing = parted and interval > duration
            shown = duration if missing else interval
            yield from until(previous.seconds + shown if missing else frame.seconds, shown, previous)
            after_gap |= parted or frame_sizes != sizes
            duration = duration if parted else interval
        if frame_sizes is None:
            previous, after_gap = None, True
            continue
        if missing:
            tick = max(tick, math.ceil(frame.seconds * fps - 1e-6))
        previous, planes, sizes = frame, None, frame_sizes

    if previous is not None:
        # the last frame is shown for its whole duration, which at low rates is long
        if duration * (1 + _TOLERANCE) < previous.duration <= _MAX_GAP_SECONDS:
            duration = previous.duration
        yield from until(previous.seconds + duration, duration, previous)


def _write_clip(
    folder: Path, source: str, number: int, frames: list[Sampled], cut: CutConfig, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files of one clip; returns its row of schema.INDEX without offsets. Raises OSError: the disk is full."""
    key, settings = f"{source}-{number:05d}", cut.clip
    planes = [frame.planes for frame in frames]
    height, width = luma(planes[0]).shape
    mp4 = encode(planes, settings.rate, settings.crf, settings.encoder_preset, settings.gop)
    facts: dict[str, Any] = {
        "source": source,
        "clip": number,
        "first_frame": frames[0].number,
        "start_seconds": round(frames[0].seconds, 6),
        "frame_count": len(frames),
        "fps": float(settings.rate),
        "width": width,
        "height": height,
    }
    scores = {name: round(value, 6) for name, value in score(planes).items()}
    text = json.dumps({**extra, **facts, "scores": scores}, sort_keys=True, allow_nan=False)
    try:
        (folder / f"{key}.mp4").write_bytes(mp4)
        (folder / f"{key}.json").write_text(text)
        # the difference of the clip as it will be decoded, not of the frames before encoding
        video = clip.decode(mp4, name=key)
        difference = clip.frame_difference(video, cut.frame_diff.factor(width, height))
        (folder / f"{key}.npy.zst").write_bytes(clip.pack_array(difference))
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from e
        raise
    row = {"key": key, "sha256": hashlib.sha256(mp4).hexdigest(), "label": label_of(extra)}
    return row | facts | scores | {"phash": perceptual_hash(planes[len(planes) // 2])}
