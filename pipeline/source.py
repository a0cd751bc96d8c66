"""One source to clips: a single pass over its frames feeds cutting, scoring, encoding and the frame differences.

Runs inside the isolated worker (see isolate.py): memory is bounded by one clip, whatever the source's length.
"""

import errno
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from longtake.datasets import clip as clips
from longtake.datasets.annotations import label_of
from longtake.pipeline.cut import Sampled, shots
from longtake.pipeline.decode import Frame, Unreadable, frames, is_no_video, probe, to_planes
from longtake.pipeline.encode import encode
from longtake.pipeline.geometry import ClipConfig, FrameDiffConfig, LimitsConfig, fit
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
    account: dict[str, Any] = dict.fromkeys(
        (
            "frames_decoded",
            "frames_sampled",
            "shots",
            "clips",
            "clips_dropped_short",
            "frames_dropped_short",
            "frames_dropped_black",
            "frames_dropped_transition",
        ),
        0,
    )
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
    if facts.coded_pixels > limits.max_pixels:
        raise Rejected("too_large", f"{facts.coded_pixels} pixels a frame; limits.max_pixels is {limits.max_pixels}")
    scaled, bucket, lost = fit(clip, facts.width, facts.height)
    if lost > clip.max_crop:
        raise Rejected(
            "aspect", f"{facts.width}x{facts.height}: {lost:.0%} would be cropped; clip.max_crop is {clip.max_crop:.0%}"
        )
    if min(facts.width, facts.height) < clip.short_side:
        raise Rejected("too_small", f"{facts.width}x{facts.height}; clip.short_side is {clip.short_side}")

    notes: list[str] = []
    held: list[Sampled] = []

    def flush() -> None:
        if len(held) >= clip.min_frames:
            rows.append(_write_clip(folder, source, len(rows), held, clip, diff, extra))
            account["clips"] += 1
        elif held:
            account["clips_dropped_short"] += 1
            account["frames_dropped_short"] += len(held)
        held.clear()

    stream = _counted(frames(path, decoder), limits.max_frames, account, notes)
    for frame, starts, dropped in shots(_sampled(stream, float(clip.rate), scaled, bucket)):
        account["frames_sampled"] += 1
        account["shots"] += starts
        if starts or dropped or len(held) == clip.max_frames:
            flush()
        if dropped:
            account[f"frames_dropped_{dropped}"] += 1
        else:
            held.append(frame)
    flush()
    decoded, expected = account["frames_decoded"], facts.frames
    if expected and abs(decoded - expected) > _MISMATCH * expected:
        notes.append(f"the container says {expected} frames, {decoded} could be decoded")
    if notes:
        account["detail"] = "; ".join(notes)
    if not decoded:
        raise Rejected("no_frames", account.get("detail") or "no decodable frame")
    if not rows:
        if account["frames_dropped_black"] > account["frames_sampled"] / 2:
            raise Rejected(
                "black", f"{account['frames_dropped_black']} of {account['frames_sampled']} frames are black"
            )
        longest = f"{account['frames_sampled']} frames at {clip.fps:g} fps in {account['shots']} shots"
        raise Rejected("too_short", f"{longest}; clip.min_seconds is {clip.min_seconds:g}")


def _counted(stream: Iterator[Frame], limit: int, account: dict[str, Any], notes: list[str]) -> Iterator[Frame]:
    for frame in stream:
        if account["frames_decoded"] == limit:
            notes.append(f"cut off at limits.max_frames {limit}")
            return
        account["frames_decoded"] += 1
        yield frame


def _sampled(
    stream: Iterator[Frame], fps: float, scaled: tuple[int, int], bucket: tuple[int, int]
) -> Iterator[Sampled]:
    """Frames at a steady rate by their times: each tick shows the frame that is on screen then.

    A frame may come up to half a tick (or half its own duration) early, so that times rounded to milliseconds do not
    double one frame and skip the next. Over a gap of more than two seconds nothing is shown.
    """
    tick, previous, duration, after_gap = 0, None, 1 / fps, False
    planes: np.ndarray | None = None
    scaler = VideoReformatter()

    def until(end: float, frame: Frame) -> Iterator[Sampled]:
        nonlocal tick, after_gap, planes
        while tick / fps < end:
            if planes is None:
                planes = to_planes(frame, scaled, bucket, scaler)
            yield Sampled(planes, frame.number, tick / fps, after_gap)
            tick, after_gap = tick + 1, False

    for frame in stream:
        if previous is not None:
            step = frame.seconds - previous.seconds
            if step > _MAX_GAP_SECONDS:
                yield from until(previous.seconds + duration, previous)
                tick, after_gap = max(tick, math.ceil(frame.seconds * fps - 1e-6)), True
            else:
                duration = step
                yield from until(frame.seconds - min(step, 1 / fps) / 2, previous)
        previous, planes = frame, None
    if previous is not None:
        yield from until(previous.seconds + duration / 2, previous)


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
