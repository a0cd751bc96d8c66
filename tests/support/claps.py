"""Videos with claps: at known times a corner of the picture turns white for one frame, and there is a click."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from longtake.datasets import audio, clip, index, schema, storage
from longtake.pipeline import plan
from longtake.pipeline.audio import keep
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import AudioConfig, ClipConfig, CutConfig
from longtake.pipeline.source import process
from longtake.pipeline.stages import shard

FPS = 25
TIMES = (0.6, 1.4, 2.2, 3.0, 3.8)
SMALL = ClipConfig(short_side=32, fps=FPS, min_seconds=0.5, max_seconds=1, crf=10, encoder_preset="ultrafast")
_SIZE, _CORNER = 64, 24
_NAMES = {1: "mono", 2: "stereo", 6: "5.1"}


def click(rate: int) -> np.ndarray:
    """10 ms of a tone that begins at once and fades."""
    at = np.arange(rate // 100) / rate
    return 0.8 * np.sin(2 * np.pi * 2000 * at) * np.exp(-at * 400)


def sound(seconds: float, rate: int, times: Sequence[float] = TIMES, tone: float = 0.1) -> np.ndarray:
    """(samples,) of clicks at these times over a soft tone."""
    out = tone * np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate)) / rate)
    for time in times:
        start = round(time * rate)
        part = out[start : start + rate // 100]
        part += click(rate)[: len(part)]
    return out


def write(
    path: Path,
    seconds: float = 4.4,
    times: Sequence[float] = TIMES,
    *,
    rate: int = 48_000,
    channels: int = 2,
    codec: str | None = "aac",
    heard: tuple[float, float] | None = None,
    video_from: float = 0.0,
    samples: np.ndarray | None = None,
) -> Path:
    """Write a video of `seconds` with its claps. By default the sound is as long as the picture.

    Args:
        codec: of the sound; None: there is none.
        heard: seconds in which there is sound.
        video_from: time of the first picture, while the sound begins at 0.
        samples: (n,) in place of the claps' sound.
    """
    rng = np.random.default_rng(0)
    still = rng.integers(60, 160, (_SIZE // 4, _SIZE // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "16", "bf": "2", "mbtree": "0"})
        video.width, video.height, video.pix_fmt = _SIZE, _SIZE, "yuv420p"
        video.codec_context.time_base, video.codec_context.thread_count = Fraction(1, 1000), 1
        stream = container.add_stream(codec, rate=rate) if codec else None
        if stream:
            stream.codec_context.layout = _NAMES[channels]
            if codec == "aac":
                stream.codec_context.bit_rate = 64_000 * channels
        white = {round(time * FPS) for time in times}
        for n in range(round(seconds * FPS)):
            picture = np.roll(still, n, 1)
            if n in white:
                picture[:_CORNER, :_CORNER] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round((n / FPS + video_from) * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if stream:
            shifted = [time + video_from for time in times]
            wave = sound(seconds + video_from, rate, shifted) if samples is None else samples
            first, last = (round(t * rate) for t in heard) if heard else (0, len(wave))
            _mux_sound(container, stream, wave[first:last], first, rate, channels)
    return path


def _mux_sound(container: Any, stream: Any, wave: np.ndarray, first: int, rate: int, channels: int) -> None:
    values = np.repeat((wave * 32767).astype(np.int16)[:, None], channels, 1)
    resampler = av.AudioResampler(stream.codec_context.format, _NAMES[channels], rate)
    for start in range(0, len(values), rate):
        part = np.ascontiguousarray(values[start : start + rate])
        frame = av.AudioFrame.from_ndarray(part.reshape(1, -1), format="s16", layout=_NAMES[channels])
        frame.sample_rate, frame.pts, frame.time_base = rate, first + start, Fraction(1, rate)
        for ready in resampler.resample(frame):
            container.mux(stream.encode(ready))
    container.mux(stream.encode(None))


def skip_by_edit(path: Path, samples: int) -> None:
    """Let the edit list of the sound leave out this many samples more at its beginning."""
    data = bytearray(path.read_bytes())
    place = data.rfind(b"elst")
    version, entries = data[place + 4], struct.unpack(">I", data[place + 8 : place + 12])[0]
    assert version == 0 and entries == 1
    (media_time,) = struct.unpack(">i", data[place + 16 : place + 20])
    data[place + 16 : place + 20] = struct.pack(">i", media_time + samples)
    path.write_bytes(data)


def spoil_sound(path: Path, share: tuple[float, float]) -> None:
    """Overwrite the packets of the sound from one share of their number to another."""
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(container.streams.audio[0]) if p.size]
    data = bytearray(path.read_bytes())
    for start, size in places[round(share[0] * len(places)) : round(share[1] * len(places))]:
        data[start : start + size] = bytes([0xFF]) * size
    path.write_bytes(data)


def settings(clips: ClipConfig = SMALL, **audio_settings: Any) -> CutConfig:
    return CutConfig(clip=clips, audio=AudioConfig(**audio_settings))


def cut(path: Path, folder: Path, config: CutConfig | None = None) -> tuple[list[dict[str, Any]], str | None]:
    """The clips of a video, with the facts of their sound, and what was odd about it; the files are in `folder`."""
    folder.mkdir(exist_ok=True, parents=True)
    config = config or settings()
    result = process(str(path), path.stem, str(folder), config)
    assert result["account"]["status"] == "good", result["account"]
    sounds = keep(str(path), result["clips"], str(folder), config, clocks=result["clocks"])
    return [row | facts for row, facts in zip(result["clips"], sounds["clips"], strict=True)], sounds["detail"]


def sound_of(row: dict[str, Any], folder: Path) -> np.ndarray:
    """(channels, samples) of a clip that was cut."""
    return audio.decode((folder / f"{row['key']}.ogg").read_bytes(), 0, row["samples"], row["channels"], row["key"])


def seen(video: np.ndarray) -> list[int]:
    """The frames of (T, H, W, 3) with a white corner."""
    corner = video[:, 2:8, 2:8].astype(int).mean((1, 2, 3))
    return np.flatnonzero(corner > 220).tolist()


def frames_of(row: dict[str, Any], folder: Path) -> np.ndarray:
    return clip.decode((folder / f"{row['key']}.mp4").read_bytes())


def heard_at(samples: np.ndarray, rate: int, near: float) -> float:
    """Seconds at which the click within 0.1 s of `near` begins."""
    wave = samples.mean(0) if samples.ndim > 1 else samples
    template = click(rate)
    low = max(0, round((near - 0.1) * rate))
    part = wave[low : low + round(0.2 * rate) + len(template)]
    return (low + int(np.argmax(np.correlate(part, template, "valid")))) / rate


def dataset_of(
    folder: Path, paths: Sequence[Path], audio: dict[str, Any] | None = None, val_fraction: float = 0, **clips: Any
) -> str:
    """A dataset made without Ray, by default all in split train; `audio` None leaves the sound out."""
    config = shard.Config(
        kind="shard",
        sources=[str(path) for path in paths],
        clip=SMALL.model_dump() | clips,
        audio=audio,
        val_fraction=val_fraction,
        group_sources=2,
    )
    folder.mkdir(exist_ok=True, parents=True)
    shard.describe(config, str(folder))
    for group in plan.plan(str(folder), config.sources, val_fraction, 1 << 40, 2):
        assert not make_group(group, plan.sources_of(str(folder), group), str(folder), config.cut)["error"]
    return str(folder)


def column(dataset: str, name: str = audio.COLUMN) -> list[dict[str, Any]]:
    """All rows of a column, each with the bytes of its member as `data`."""
    rows = []
    for shard_ in index.read_shards(dataset, schema.SPLITS[0], name):
        tar = Path(dataset) / schema.SPLITS[0] / f"{shard_.name}.tar"
        for row in shard_.table.to_pylist():
            rows.append(row | {"data": storage.read_range(str(tar), row["offset"], row["size"])})
    return rows
