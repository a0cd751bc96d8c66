"""The arithmetic of sound: which samples belong to which frames, whatever the frame rate and wherever a clip is cut."""

import contextlib
import io
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import audio
from longtake.datasets.errors import Failure
from longtake.pipeline.audio import encode, score
from longtake.pipeline.config import AudioConfig, ClipConfig
from longtake.pipeline.soundtrack import in_spans

RATES = (8_000, 16_000, 44_100, 48_000, 192_000)
fps_values = st.sampled_from((6.0, 10.0, 12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94, 60.0)) | st.floats(1, 240)


def rows(fps: float, cuts: list[int]) -> list[dict[str, Any]]:
    """Clips between these frames, as an index has them."""
    rate = float(ClipConfig(fps=fps).rate)
    return [{"start_seconds": round(a / rate, 6), "frame_count": b - a, "fps": rate} for a, b in pairwise(cuts)]


@given(fps_values, st.sets(st.integers(0, 5_000_000), min_size=3, max_size=6), st.sampled_from(RATES))
def test_neighbours_join_to_the_sample_and_none_drifts(fps: float, cuts: set[int], rate: int) -> None:
    clips = rows(fps, sorted(cuts))
    spans = [audio.span(row, rate) for row in clips]
    for row, (begin, end), (following, _) in zip(clips, spans, [*spans[1:], (None, None)], strict=True):
        assert following in (end, None)
        exact = ClipConfig(fps=fps).rate
        for sample, seconds in (
            (begin, row["start_seconds"]),
            (end, row["start_seconds"] + row["frame_count"] / row["fps"]),
        ):
            assert abs(sample - seconds * rate) <= 0.51 + 1e-6 * rate
        first = round(row["start_seconds"] * exact)
        assert abs(begin - Fraction(first * rate) / exact) <= Fraction(1, 2)
        assert abs(end - begin - Fraction(row["frame_count"] * rate) / exact) <= 1


@given(fps_values, st.integers(0, 100_000), st.integers(1, 300), st.data(), st.sampled_from(RATES))
def test_a_window_is_as_long_wherever_it_begins_and_ends_in_its_clip(
    fps: float, start: int, frames: int, data: Any, rate: int
) -> None:
    (row,) = rows(fps, [start, start + frames])
    begin, end = audio.span(row, rate)
    assert audio.offset_of(0, row, rate) == 0 and audio.offset_of(frames, row, rate) == end - begin
    length = data.draw(st.integers(1, frames))
    first = data.draw(st.integers(0, frames - length))
    count = audio.samples_of(length, row, rate)
    assert audio.offset_of(first, row, rate) + count <= audio.offset_of(first + length, row, rate)
    assert audio.offset_of(first + length, row, rate) - audio.offset_of(first, row, rate) - count in (0, 1)


@given(st.data())
def test_every_sample_goes_where_it_belongs(data: Any) -> None:
    total = 60
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    whole = np.where(kept, np.arange(1, total + 1), 0).astype(np.int16)[:, None]
    # the kept samples, broken into pieces anywhere
    breaks = data.draw(st.sets(st.integers(1, total - 1)))
    pieces, start = [], 0
    for end in [*sorted(breaks | {n for n in range(1, total) if kept[n] != kept[n - 1]}), total]:
        if kept[start]:
            pieces.append((start, whole[start:end]))
        start = end
    points = sorted(data.draw(st.lists(st.integers(0, total), unique=True, min_size=2, max_size=8)))
    spans = list(zip(points[::2], points[1::2], strict=False)) or [(0, total)]
    found = list(in_spans(iter(pieces), spans))
    assert len(found) == len(spans)
    for (begin, end), samples in zip(spans, found, strict=True):
        if samples is None:
            assert not kept[begin:end].any()
        else:
            assert np.array_equal(samples, whole[begin:end])


@pytest.mark.parametrize("codec", ["opus", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("count", [1, 313, 959, 960, 961, 48_000, 100_001])
def test_a_member_has_exactly_its_samples_and_the_same_bytes(codec: str, channels: int, count: int) -> None:
    settings = AudioConfig(codec=codec, channels=channels)
    at = np.arange(count)[:, None] / 48_000
    wave = (12_000 * np.sin(2 * np.pi * (220 + 110 * np.arange(channels)) * at)).astype(np.int16)
    data = encode(wave, settings)
    assert data == encode(wave, settings)
    found = audio.decode(data, 0, count, channels)
    assert found.shape == (channels, count) and found.dtype == np.float32
    error = np.abs(found.T - wave / 32768)
    assert error.max() == 0 if codec == "flac" else error[480:].max(initial=0) < 0.05
    with pytest.raises(Failure, match=f"clip: has no samples 0 to {count + 1} of its sound"):
        audio.decode(data, 0, count + 1, channels)


def sounds() -> dict[str, np.ndarray]:
    """Four seconds each, (n, 2) int16, of which those that go on unchanged are predicted most from what came before."""
    rng = np.random.default_rng(0)
    at = np.arange(4 * 48_000) / 48_000
    waves = {
        "tone": 0.5 * np.sin(2 * np.pi * 440 * at),
        "square": 0.9 * np.sign(np.sin(2 * np.pi * 110 * at)),
        "bursts": 0.4 * np.sin(2 * np.pi * 300 * at) * (np.sin(2 * np.pi * 3 * at) > 0),
        "noise": 0.2 * rng.normal(size=len(at)),
    }
    return {name: (32767 * np.stack([w, w[::-1]], 1).clip(-1, 1)).astype(np.int16) for name, w in waves.items()}


@pytest.mark.parametrize("settings", [AudioConfig(), AudioConfig(bitrate=64_000), AudioConfig(codec="flac")])
def test_a_part_is_that_part_of_the_whole(settings: AudioConfig) -> None:
    for name, wave in sounds().items():
        data = encode(wave, settings)
        whole = audio.decode(data, 0, len(wave), 2)
        for begin, end in (
            (0, 100),
            (20_000, 70_001),
            (100_003, 150_000),
            (151_200, 151_300),
            (191_000, 192_000),
            (5, 5),
        ):
            part = audio.decode(data, begin, end, 2)
            assert part.shape == (2, end - begin)
            error = np.abs(part - whole[:, begin:end]).max(initial=0)
            assert error <= (1e-3 if settings.codec == "opus" else 0), name


@pytest.mark.parametrize("duration", ["2.5", "10", "20", "60"])
@pytest.mark.parametrize("mode", ["audio", "voip"])
def test_opus_of_any_packets_is_what_ffmpeg_makes_of_it(duration: str, mode: str) -> None:
    wave = sounds()["bursts"]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg") as container:
        options = {"frame_duration": duration, "application": mode}
        stream = container.add_stream("libopus", rate=48_000, options=options)
        stream.codec_context.layout, stream.codec_context.format = "stereo", "s16"
        stream.codec_context.bit_rate = 24_000 if mode == "voip" else 96_000
        frame = av.AudioFrame.from_ndarray(wave.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        expected = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
    found = audio.decode(buffer.getvalue(), 0, len(wave), 2)
    assert np.abs(found - expected[:, : len(wave)].clip(-1, 1)).max() < 1e-4


def test_nothing_is_left_of_what_was_decoded_before() -> None:
    data = {codec: encode(sounds()["square"], AudioConfig(codec=codec)) for codec in ("opus", "flac")}
    broken = bytearray(data["opus"])
    broken[2000:40_000] = bytes(38_000)
    for codec, member in data.items():
        alone = audio.decode(member, 100_000, 110_000, 2)
        for before in (*data.values(), bytes(broken)):
            with contextlib.suppress(Failure):
                audio.decode(before, 30_000, 60_000, 2)
            assert np.array_equal(audio.decode(member, 100_000, 110_000, 2), alone), codec


def test_a_damaged_member_is_one_line() -> None:
    data = encode(np.zeros((9_600, 2), np.int16), AudioConfig())
    for broken in (b"", b"no sound", data[: len(data) // 2]):
        with pytest.raises(Failure, match=r"^KEY: .*; run `longtake dataset verify`$"):
            audio.decode(broken, 0, 9_600, 2, "KEY")


def test_scores_of_known_sound() -> None:
    square = np.full((48_000, 2), 32767, np.int16)
    square[::2] *= -1
    assert score(square, 48_000) == {"loudness": pytest.approx(0, abs=1e-3), "silence": 0, "clipping": 1}
    assert score(np.zeros((480, 1), np.int16), 48_000) == {"loudness": -120, "silence": 1, "clipping": 0}
    half = np.concatenate([np.zeros((24_000, 1), np.int16), (square[:24_000, :1] / 2).astype(np.int16)])
    found = score(half, 48_000)
    assert found["loudness"] == pytest.approx(-9.03, abs=0.01)
    assert (found["silence"], found["clipping"]) == (0.5, 0)
