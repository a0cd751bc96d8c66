"""Pictures as they reach the clips: tones, fields, bars."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from longtake.pipeline import hdr as tone
from longtake.pipeline.config import ClipConfig, CutConfig
from longtake.pipeline.decode import frames, luma, to_planes
from longtake.pipeline.index_scores import score
from longtake.pipeline.isolate import Worker


def shown(path: Path, size: tuple[int, int]) -> list[np.ndarray]:
    scaler = VideoReformatter()
    return [to_planes(frame, size, size, scaler) for frame in frames(str(path))]


def write_grey(path: Path, signal: float, transfer: int, matrix: int = 9) -> None:
    """One second of flat grey, 10 bits, limited range, with the transfer function and colour matrix named in the stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, matrix, 1
        for number in range(10):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, level in zip(frame.planes, (64 + signal * 876, 512, 512), strict=True):
                plane.update(np.full((plane.height, plane.line_size // 2), round(level), np.uint16).tobytes())
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.5807), (18, 0.75)])
def test_the_white_of_a_high_range_source_is_bright_and_its_peak_is_not_clipped(
    tmp_path: Path, transfer: int, white: float
) -> None:
    """Diffuse white is 58 % of a PQ signal and 75 % of an HLG one (BT.2408), which would look grey unconverted."""
    levels = []
    for signal in (0.0, white / 2, white, white * 1.15, white * 1.29):
        write_grey(tmp_path / "x.mp4", signal, transfer)
        levels.append(float(luma(shown(tmp_path / "x.mp4", (64, 64))[-1]).mean()))
    assert levels[0] == pytest.approx(16, abs=2)
    assert 190 < levels[2] < 225
    assert levels == sorted(levels) and levels[3] - levels[2] > 5 and levels[4] - levels[3] > 5
    write_grey(tmp_path / "x.mp4", white, 1)
    assert luma(shown(tmp_path / "x.mp4", (64, 64))[-1]).mean() == pytest.approx(16 + 219 * white, abs=3)


def test_a_source_whose_colours_cannot_be_converted_is_a_row(tmp_path: Path) -> None:
    """Matrices of ITU-T H.273: reserved, YCgCo, BT.2020 with constant luminance, ICtCp."""
    worker, cut = Worker(), CutConfig(clip=ClipConfig(short_side=32, fps=10, max_seconds=1))
    reasons = dict[tuple[int, int], Any]()
    for transfer in (1, 16):
        for matrix in (3, 8, 10, 14):
            write_grey(tmp_path / "x.mp4", 0.5, transfer, matrix)
            account = worker.run(str(tmp_path / "x.mp4"), "ab" * 10, str(tmp_path), cut, {})["account"]
            reasons[transfer, matrix] = account["reason"]
            assert account["reason"] is None or f"matrix {matrix} of H.273" in account["detail"]
    worker.close()
    assert reasons == {(t, m): None if m in (3, 10) else "unreadable" for t in (1, 16) for m in (3, 8, 10, 14)}


@pytest.mark.parametrize("transfer", [16, 18])
def test_grey_stays_grey_and_brighter_stays_brighter(transfer: int) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None].repeat(3, 2)
    out = tone.to_sdr(ramp, transfer)[0].astype(int)
    assert np.ptp(out, axis=1).max() <= 1
    assert (np.diff(out[:, 0]) >= 0).all() and out[0, 0] == 0 and out[-1, 0] == 255


def test_interlaced_fields_are_woven(videos: Path) -> None:
    def combing(pictures: list[np.ndarray]) -> float:
        y = np.stack([luma(p) for p in pictures]).astype(float)
        return float(np.abs(y[:, 1:-1] - (y[:, :-2] + y[:, 2:]) / 2).mean() / np.abs(y[:, 2:] - y[:, :-2]).mean())

    path = videos / "odd" / "made__interlaced-mpeg2.ts"
    with av.open(str(path)) as container:
        raw = [f.to_ndarray(format="yuv420p") for f in container.decode(video=0)]
    woven = shown(path, (352, 288))
    assert len(woven) == len(raw)
    assert combing(woven) < 0.95 * combing(raw)


def test_bars_and_darkness_are_scored(footage: Path) -> None:
    pictures = shown(sorted(footage.glob("*.mp4"))[0], (96, 64))[:24]
    plain = score(pictures)
    barred = [p.copy() for p in pictures]
    for p in barred:
        p[:8], p[56:64] = 16, 17
    scores = score(barred)
    assert plain["letterbox"] == 0 and scores["letterbox"] == pytest.approx(0.25)
    assert scores["dark"] >= 0.25 > plain["dark"]
    pillars = [p.copy() for p in pictures]
    for p in pillars:
        p[:64, :24] = 16
    assert score(pillars)["letterbox"] == pytest.approx(0.25)
