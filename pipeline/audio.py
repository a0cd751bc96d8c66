"""The column of sound: from a local video and its clips to a KEY.ogg for each clip, with its scores.

Runs inside the isolated worker (see isolate.py), after the pictures were cut, so that a decoder that crashes on the sound
costs no clip. Memory is bounded by one clip. The same file gives the same bytes on machines with the same libraries and
processor features: decoders of AAC and the encoder of Opus calculate in floats, whose last bits vectors of other widths round
otherwise.
"""

import errno
import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from longtake.datasets.audio import ENDING, REASONS, span, without_sound
from longtake.pipeline.config import AudioConfig, CutConfig
from longtake.pipeline.container import Unreadable
from longtake.pipeline.decode import probe
from longtake.pipeline.soundtrack import Clock, Heard, Unheard, clocks_of, in_spans, soundtrack

_LAYOUTS = {1: "mono", 2: "stereo"}
_FULL_SCALE = 1 << 15
_SILENT_DB, _LEAST_DB = -60.0, -120.0
_BLOCKS_A_SECOND = 100
_PAGE_MICROSECONDS = 200_000  # a decoder begins at a page
_SEEKABLE = {"packet_loss": "100"}  # packets of Opus that hardly need those before them, for 1 % more bytes
_HEADER = {"codec": "codec", "width": "width", "height": "height", "fps": "fps", "frames_expected": "frames"}


def keep(
    path: str,
    clips: Sequence[Mapping[str, Any]],
    folder: str,
    cut: CutConfig,
    clocks: Sequence[Clock] | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write KEY.ogg into `folder` for each clip of a local video that has sound.

    Args:
        clips: its rows of schema.INDEX, in their order.
        clocks: those of its pictures (see decode.Tally).
        source: in their place its row of schema.SOURCES, which it has to agree with.

    Returns:
        `{"clips": for each the columns of schema.AUDIO_INDEX that are no places, "detail": what was odd, or None}`.
    """
    settings, heard = cut.audio, Heard()
    assert settings is not None
    kept: list[dict[str, Any]] = []
    reason, detail = "outside", ""
    try:
        known = _known_clocks(path, cut, source) if source is not None else clocks
        # pictures without times are shown from second 0 on
        known = known or [(0.0, 0.0)]
        for row, samples in zip(clips, _sounds(path, settings, clips, known, heard), strict=True):
            nothing = "unreadable" if heard.ended else "outside"
            kept.append(_keep(Path(folder), row["key"], samples, settings, nothing))
    except Unheard as e:
        reason, detail = e.reason, e.detail
    except (av.error.FFmpegError, ArithmeticError, MemoryError, ValueError) as e:
        reason, detail = "unreadable", getattr(e, "strerror", None) or str(e) or type(e).__name__
    plain = settings.model_dump()
    kept += [without_sound(plain, reason) for _ in clips[len(kept) :]]
    return {"clips": kept, "detail": "; ".join(_notes(heard, reason, detail)) or None}


def _notes(heard: Heard, reason: str, detail: str) -> list[str]:
    """Lines for people. That a source has no sound, or no more of it, is nothing odd."""
    notes = [f"its sound: {REASONS[reason]} ({detail})"] if reason not in ("no_audio", "outside") else []
    notes += [f"its sound ends early: {heard.ended}"] if heard.ended else []
    return notes + ([f"damaged packets of sound: {heard.refused}"] if heard.refused else [])


def _sounds(
    path: str, settings: AudioConfig, clips: Sequence[Mapping[str, Any]], clocks: Sequence[Clock], heard: Heard
) -> Iterator[np.ndarray | None]:
    """The samples of each clip, None for one without sound."""
    spans = [span(row, settings.rate) for row in clips]
    seconds = spans[-1][1] / settings.rate
    return in_spans(soundtrack(path, settings.rate, settings.channels, clocks, seconds, heard), spans)


def _known_clocks(path: str, cut: CutConfig, source: Mapping[str, Any]) -> Sequence[Clock]:
    """The clocks of a source that was cut before. Raises Unheard where it is another one now."""
    try:
        header = probe(path)
        if different := [name for name, own in _HEADER.items() if source[name] != getattr(header, own)]:
            raise Unheard("changed", f"another {' and '.join(different)}")
        return clocks_of(path, cut.decoder)
    except Unreadable as e:
        raise Unheard("changed", str(e)) from e


def _keep(folder: Path, key: str, samples: np.ndarray | None, settings: AudioConfig, nothing: str) -> dict[str, Any]:
    """Write a clip's sound; returns what the index says about it. Raises OSError: the disk is full."""
    if samples is None:
        return without_sound(settings.model_dump(), nothing)
    try:
        (folder / f"{key}.{ENDING}").write_bytes(encode(samples, settings))
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from e
        raise
    facts = {"codec": settings.codec, "rate": settings.rate, "channels": settings.channels}
    return facts | {"samples": len(samples), "has_audio": True, "reason": None} | score(samples, settings.rate)


def encode(samples: np.ndarray, settings: AudioConfig) -> bytes:
    """An Ogg file of (n, channels) int16. It has exactly these samples: the container says what the codec has put around them.

    One thread, no dates and no random serial number: the same samples give the same bytes.
    """
    buffer, layout = io.BytesIO(), _LAYOUTS[settings.channels]
    options = {"fflags": "+bitexact", "page_duration": str(_PAGE_MICROSECONDS)}
    with av.open(buffer, "w", format="ogg", container_options=options) as container:
        stream = container.add_stream("libopus" if settings.codec == "opus" else "flac", rate=settings.rate)
        context = stream.codec_context
        context.layout, context.format, context.thread_count = layout, "s16", 1
        stream.options = {"flags": "+bitexact"}
        if settings.codec == "opus":
            context.bit_rate = settings.bitrate
            stream.options |= _SEEKABLE
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = settings.rate, 0, Fraction(1, settings.rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def score(samples: np.ndarray, rate: int) -> dict[str, float]:
    """Scores of (n, channels) int16 before they are encoded: `loudness`, `silence` and `clipping`, as in schema.AUDIO_INDEX."""
    squares = np.square(samples.astype(np.int64)).sum(1)
    block = max(1, rate // _BLOCKS_A_SECOND)
    starts = np.arange(0, len(squares), block)
    sizes = np.diff(np.append(starts, len(squares))) * samples.shape[1]
    blocks = np.add.reduceat(squares, starts) / sizes
    least = _FULL_SCALE**2 * 10 ** (_SILENT_DB / 10)
    mean = float(squares.sum()) / samples.size / _FULL_SCALE**2
    scores = {
        "loudness": max(_LEAST_DB, 10 * np.log10(mean)) if mean else _LEAST_DB,
        "silence": float((blocks < least).mean()),
        "clipping": float((np.abs(samples.astype(np.int32)) >= _FULL_SCALE - 1).mean()),
    }
    return {name: round(float(value), 6) for name, value in scores.items()}
