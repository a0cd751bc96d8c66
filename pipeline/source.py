"""One source to clips: a single pass over its frames feeds cutting, scoring, encoding and the frame differences.

Runs inside the isolated worker (see isolate.py): memory is bounded by one clip, whatever the source's length.
"""

import errno
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from longtake.datasets import clip as clips
from longtake.datasets.annotations import label_of
from longtake.pipeline.config import ClipConfig, FrameDiffConfig, LimitsConfig, fit
from longtake.pipeline.container import Unreadable, is_no_video
from longtake.pipeline.cut import Sampled, shots
from longtake.pipeline.decode import Frame, Probe, Tally, frames, probe, to_planes
from longtake.pipeline.encode import encode
from longtake.pipeline.score import perceptual_hash, score

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
_MISMATCH = 0.01
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

Sizes = tuple[tuple[int, int], tuple[int, int]]  # (width, height) to scale to, and to cut out of the middle


class Rejected(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def process(
    path: str,
    source: str,
    folder: str,
    clip: ClipConfig,
    limits: LimitsConfig,
    diff: FrameDiffConfig,
    decoder: str = "pyav",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Cut one local video into `folder`: KEY.mp4, KEY.json and KEY.npy.zst (frame differences) a clip.

    `extra` are its annotations (`annotations.of_sample`): they go into each KEY.json, `label` into the index as well.

    Returns:
        `{"account": columns of schema.SOURCES, "clips": rows of schema.INDEX without offsets}`.
    """
    account: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    rows: list[dict[str, Any]] = []
    try:
        _cut(path, source, Path(folder), clip, limits, diff, decoder, extra or {}, account, rows)
        account |= {"status": "good", "reason": None, "detail": account.get("detail")}
    except Rejected as e:
        assert not rows, "a source with clips is good"
        account |= {"status": "rejected", "reason": e.reason, "detail": e.detail}
    return {"account": account, "clips": rows}


def _cut(
    path: str,
    source: str,
    folder: Path,
    clip: ClipConfig,
    limits: LimitsConfig,
    diff: FrameDiffConfig,
    decoder: str,
    extra: Mapping[str, Any],
    account: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    if not Path(path).stat().st_size:
        raise Rejected("empty", "0 bytes")
    try:
        facts = probe(path)
    except Unreadable as e:
        if is_no_video(e):
            raise Rejected("no_video", str(e)) from e
        raise Rejected("no_frames" if "frame" in str(e) else "unreadable", str(e)) from e
    account |= {
        "codec": facts.codec,
        "width": facts.width,
        "height": facts.height,
        "fps": facts.fps,
        "frames_expected": facts.frames,
    }
    _fitted(clip, limits, facts.width, facts.height, facts.coded_pixels)

    notes: list[str] = []
    tally, unfit = Tally(), Counter[str]()
    held: list[Sampled] = []

    def flush() -> None:
        if len(held) >= clip.min_frames:
            rows.append(_write_clip(folder, source, len(rows), held, clip, diff, extra))
            account["clips"] += 1
        elif held:
            account["clips_dropped_short"] += 1
            account["frames_dropped_short"] += len(held)
        held.clear()

    stream = _counted(frames(path, decoder, tally), limits.max_frames, account, notes)
    fitting = _fitting(stream, clip, limits, unfit)
    try:
        for frame, starts, dropped in shots(_sampled(fitting, float(clip.rate))):
            account["frames_sampled"] += 1
            account["shots"] += starts
            if starts or dropped or len(held) == clip.max_frames:
                flush()
            if dropped:
                account[f"frames_dropped_{dropped}"] += 1
            else:
                held.append(frame)
        flush()
    except Unreadable as e:
        # how far decord came is a matter of its threads
        rows.clear()
        account |= dict.fromkeys(_COUNTS, 0)
        raise Rejected("unreadable", str(e)) from e
    notes += _differences(facts, tally, account, float(clip.rate)) if not notes else []
    notes += [f"frames left out, of another shape: {count} ({why})" for why, count in unfit.items()]
    account["detail"] = "; ".join(notes) or None
    if not account["frames_decoded"]:
        raise Rejected("no_frames", account["detail"] or "no decodable frame")
    if not rows:
        black, sampled = account["frames_dropped_black"], account["frames_sampled"]
        if black > sampled / 2:
            raise Rejected("black", "; ".join([f"{black} of {sampled} frames are black", *notes]))
        longest = f"{sampled} frames at {clip.fps:g} fps in {account['shots']} shots"
        raise Rejected("too_short", "; ".join([f"{longest}; clip.min_seconds is {clip.min_seconds:g}", *notes]))


def _counted(stream: Iterator[Frame], limit: int, account: dict[str, Any], notes: list[str]) -> Iterator[Frame]:
    for frame in stream:
        if account["frames_decoded"] == limit:
            notes.append(f"cut off at limits.max_frames {limit}")
            return
        account["frames_decoded"] += 1
        yield frame


def _differences(facts: Probe, tally: Tally, account: Mapping[str, Any], rate: float) -> Iterator[str]:
    """What there is to say where frames and seconds are not those of the container or its packets."""
    decoded, shown, said = account["frames_decoded"], account["frames_sampled"] / rate, facts.stream_seconds
    if facts.frames and abs(decoded - facts.frames) > _MISMATCH * facts.frames:
        yield f"the container says {facts.frames} frames, {decoded} could be decoded"
    # two fields may come in packets of their own
    elif not facts.frames and min(abs(n * decoded - tally.packets) for n in (1, 2)) > _MISMATCH * tally.packets:
        yield f"its packets hold {tally.packets} frames, {decoded} could be decoded"
    if said and abs(shown - said) > max(_MISMATCH * said, 2 / rate):
        yield f"the container says {said:.2f} s, {shown:.2f} s are shown"
    if tally.refused:
        yield f"damaged packets: {tally.refused}"
    if tally.damaged:
        yield f"frames left out, damaged or predicted from damaged ones: {tally.damaged}"
    if tally.turns_back:
        yield f"shots that start where the clock goes back: {tally.turns_back}"
    if tally.ended:
        yield f"it ends early: {tally.ended}"


def _fitted(clip: ClipConfig, limits: LimitsConfig, width: int, height: int, coded_pixels: int) -> Sizes:
    """The sizes to scale to and to cut out for a picture as shown. Raises Rejected where it makes no clips."""
    if coded_pixels > limits.max_pixels:
        raise Rejected("too_large", f"{coded_pixels} pixels a frame; limits.max_pixels is {limits.max_pixels}")
    scaled, bucket, lost = fit(clip, width, height)
    if lost > clip.max_crop:
        raise Rejected("aspect", f"{width}x{height}: {lost:.0%} would be cropped; clip.max_crop is {clip.max_crop:.0%}")
    if min(width, height) < clip.short_side:
        raise Rejected("too_small", f"{width}x{height}; clip.short_side is {clip.short_side}")
    return scaled, bucket


def _fitting(
    stream: Iterator[Frame], clip: ClipConfig, limits: LimitsConfig, unfit: Counter[str]
) -> Iterator[tuple[Frame, Sizes | None]]:
    """Each frame with the same for its shape, which may change; None for those to leave out, which are counted."""

    @cache
    def fitted(width: int, height: int, coded_pixels: int) -> Sizes | str:
        try:
            return _fitted(clip, limits, width, height, coded_pixels)
        except Rejected as e:
            return e.detail

    for frame in stream:
        sizes = fitted(*frame.size, frame.image.width * frame.image.height)
        if isinstance(sizes, str):
            unfit[sizes] += 1
            yield frame, None
        else:
            yield frame, sizes


def _sampled(stream: Iterable[tuple[Frame, Sizes | None]], fps: float) -> Iterator[Sampled]:
    """Frames at a steady rate by their times: each tick shows the frame that is on screen then.

    A frame may come up to half a tick (or half its own duration) early, so that times rounded to milliseconds do not
    double one frame and skip the next. Over a gap of more than two seconds, and where frames are missing, nothing is
    shown.
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

    for frame, fitting in stream:
        missing = previous is None
        if previous is not None:
            step = frame.seconds - previous.seconds
            parted = frame.starts or step > _MAX_GAP_SECONDS
            missing = parted and step > duration
            shown = duration if missing else step
            yield from until(previous.seconds + shown if missing else frame.seconds, shown, previous)
            after_gap |= parted or fitting != sizes
            duration = duration if parted else step
        if fitting is None:
            previous, after_gap = None, True
            continue
        if missing:
            tick = max(tick, math.ceil(frame.seconds * fps - 1e-6))
        previous, planes, sizes = frame, None, fitting
    if previous is not None:
        # the last one for its whole time, which at low rates is long
        if duration * (1 + _MISMATCH) < previous.duration <= _MAX_GAP_SECONDS:
            duration = previous.duration
        yield from until(previous.seconds + duration, duration, previous)


def _write_clip(
    folder: Path,
    source: str,
    number: int,
    held: list[Sampled],
    clip: ClipConfig,
    diff: FrameDiffConfig,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    key = f"{source}-{number:05d}"
    planes = [f.planes for f in held]
    height, width = planes[0].shape[0] * 2 // 3, planes[0].shape[1]
    mp4 = encode(planes, clip.rate, clip.crf, clip.encoder_preset, clip.gop)
    scores = score(planes)
    facts: dict[str, Any] = {
        "source": source,
        "clip": number,
        "first_frame": held[0].number,
        "start_seconds": round(held[0].seconds, 6),
        "frame_count": len(held),
        "fps": float(clip.rate),
        "width": width,
        "height": height,
    }
    rounded = {name: round(value, 6) for name, value in scores.items()}
    text = json.dumps({**extra, **facts, "scores": rounded}, sort_keys=True, allow_nan=False)
    try:
        (folder / f"{key}.mp4").write_bytes(mp4)
        (folder / f"{key}.json").write_text(text)
        # of the clip as it will be decoded again, not of the frames before encoding
        difference = clips.frame_difference(clips.decode(mp4, name=key), diff.factor(width, height))
        (folder / f"{key}.npy.zst").write_bytes(clips.pack_array(difference))
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from e
        raise
    row = {"key": key, "sha256": hashlib.sha256(mp4).hexdigest(), "label": label_of(extra)}
    return row | facts | rounded | {"phash": perceptual_hash(planes[len(planes) // 2])}
