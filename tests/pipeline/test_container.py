"""Containers that are strange: other streams, clocks, shapes, orientations, damage. By the pixels and times of the clips."""

import io
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import clip, index
from longtake.datasets.loader import Loader
from longtake.infra.cli.media import frames_at
from longtake.pipeline.config import ClipConfig, CutConfig, LimitsConfig
from longtake.pipeline.decode import Tally, monotonic
from longtake.pipeline.orientation import oriented, upright
from longtake.pipeline.source import process
from longtake.pipeline.stages import shard

ONE = 1 << 16
CONFIG = ClipConfig(short_side=64, fps=12, crf=4)


def cut(path: Path, decoder: str = "pyav", config: ClipConfig = CONFIG, **limits: Any) -> tuple[dict[str, Any], Any]:
    """The account of a source, and for each clip its row and its frames."""
    folder = path.parent / "out"
    folder.mkdir(exist_ok=True)
    cut = CutConfig(clip=config, limits=LimitsConfig(**limits), decoder=decoder)
    result = process(str(path), "ab" * 10, str(folder), cut)
    shown = [(row, clip.decode((folder / f"{row['key']}.mp4").read_bytes())) for row in result["clips"]]
    return result["account"], shown


def scene(count: int, size: tuple[int, int] = (64, 80), seed: int = 0, pace: int = 1) -> list[np.ndarray]:
    """Frames (H, W, 3) of a blurred random picture that moves sideways."""
    rng = np.random.default_rng(seed)
    picture = np.kron(rng.integers(30, 220, (size[0] // 8, size[1] // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return [np.roll(picture, pace * n, 1) for n in range(count)]


def video(
    frames: list[np.ndarray],
    form: str,
    rate: int = 25,
    codec: str = "libx264",
    first: int = 0,
    matrix: list[int] | None = None,
    **options: str,
) -> bytes:
    """A file in memory; `first` is its first time, in frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        if matrix:
            stream.set_display_matrix(matrix)
        stream.codec_context.thread_count = 1
        for n, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = first + n, Fraction(1, rate)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return buffer.getvalue()


# streams


def both(path: Path, first: list[np.ndarray], second: list[np.ndarray], *said: Any, codec: str = "mjpeg") -> None:
    """Two streams: pictures of `codec`, one a second, and a film."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream(codec, rate=1), out.add_stream("libx264", rate=25)]
        for stream, frames, disposition in zip(streams, (first, second), said or (None, None), strict=True):
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuvj420p" if stream.name == "mjpeg" else "yuv420p"
            if disposition is not None:
                stream.disposition = disposition
        for stream, frames in zip(streams, (first, second), strict=True):
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())


@pytest.mark.parametrize("form", ["mkv", "mp4", "avi"])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_cover_is_not_the_film_even_if_it_comes_first_and_is_larger(form: str, decoder: str, tmp_path: Path) -> None:
    film = scene(75)
    both(tmp_path / f"x.{form}", scene(1, (192, 192), 5), film)
    account, clips = cut(tmp_path / f"x.{form}", decoder)
    assert sum(row["frame_count"] for row, _ in clips) == 36, account
    assert abs(clips[0][1][0].astype(int) - film[0]).mean() < 12


def test_of_two_films_the_default_one_is_shown_and_else_the_larger(tmp_path: Path) -> None:
    said = av.stream.Disposition
    small, large = scene(5, (64, 80), 1), scene(100, (128, 160), 2)
    for dispositions, size in (((said.default, said.default), (160, 128)), ((said.default, said(0)), (80, 64))):
        both(tmp_path / "x.mp4", small, large, *dispositions, codec="libx264")
        account, _ = cut(tmp_path / "x.mp4")
        assert (account["width"], account["height"]) == size


def test_sound_with_an_attached_picture_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as out:
        cover, sound = out.add_stream("mjpeg", rate=1), out.add_stream("aac", rate=8000)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(scene(1)[0], format="rgb24")))
        out.mux(cover.encode())
        for n in range(16):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 8000, 1024 * n
            out.mux(sound.encode(silence))
        out.mux(sound.encode())
    assert cut(tmp_path / "x.mp4")[0]["reason"] == "no_video"


# orientation


def ways() -> list[list[int]]:
    """The display matrices of the eight ways to lay a picture: each axis of it along either axis, either way."""
    made = []
    for i, j in itertools.product((ONE, -ONE), repeat=2):
        made += [[i, 0, 0, 0, j, 0, 0, 0, 1 << 30], [0, i, 0, j, 0, 0, 0, 0, 1 << 30]]
    return made


def laid(picture: np.ndarray, matrix: list[int]) -> np.ndarray:
    """By the definition: the pixel at (x, y) is shown at (ax + cy, bx + dy), moved back into the picture."""
    a, b, c, d = (math.copysign(bool(n), n) for n in (matrix[0], matrix[1], matrix[3], matrix[4]))
    y, x = np.indices(picture.shape[:2])
    across, down = (a * x + c * y).astype(int), (b * x + d * y).astype(int)
    across, down = across - across.min(), down - down.min()
    shown = np.zeros((down.max() + 1, across.max() + 1, *picture.shape[2:]), picture.dtype)
    shown[down, across] = picture
    return shown


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("matrix", ways())
def test_each_of_the_eight_orientations_is_shown_as_its_matrix_says(
    matrix: list[int], decoder: str, tmp_path: Path
) -> None:
    frames = scene(50, pace=0)
    (tmp_path / "x.mp4").write_bytes(video(frames, "mp4", matrix=matrix, crf="4"))
    account, [(row, shown)] = cut(tmp_path / "x.mp4", decoder)
    true = laid(frames[0], matrix)
    assert (account["height"], account["width"]) == true.shape[:2] == (row["height"], row["width"])
    assert abs(shown[0].astype(int) - true).mean() < 8


@pytest.mark.parametrize(
    "matrix",
    [
        [0] * 9,
        [0, ONE, 0, 0, 0, 0, 0, 0, 1 << 30],
        [ONE, ONE // 2, 0, ONE // 2, ONE, 0, 0, 0, 1 << 30],
        [ONE, -ONE // 2, 0, -ONE // 2, ONE, 0, 0, 0, 1 << 30],
    ],
)
def test_a_matrix_of_zeros_or_a_shear_leaves_the_picture_as_it_is(matrix: list[int], tmp_path: Path) -> None:
    frames = scene(50, pace=0)
    (tmp_path / "x.mp4").write_bytes(video(frames, "mp4", matrix=matrix, crf="4"))
    [(_, shown)] = cut(tmp_path / "x.mp4")[1]
    assert shown.shape[1:3] == (64, 80) and abs(shown[0].astype(int) - frames[0]).mean() < 8


@given(st.sampled_from(ways()), st.floats(0.1, 10), st.floats(-40, 40))
def test_scale_and_a_slight_turn_change_no_orientation(matrix: list[int], scale: float, degrees: float) -> None:
    turn = math.radians(degrees)
    axes = np.reshape(matrix, (3, 3))[:2, :2] @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    (a, b), (c, d) = np.rint(scale * axes).astype(int).tolist()
    picture = np.arange(6).reshape(2, 3)
    assert np.array_equal(upright(picture, oriented([a, b, 0, c, d, 0, 0, 0, 1 << 30])), laid(picture, matrix))


def test_a_picture_with_exif_is_turned(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = scene(1)[0]
    Image.fromarray(picture).save(tmp_path / "x.jpg", exif=exif, quality=95)
    [shown] = frames_at(str(tmp_path / "x.jpg"), (80, 64), 10)
    assert abs(shown.astype(int) - np.rot90(picture, -1)).mean() < 8


# shapes


@pytest.mark.parametrize("form", ["h264", "mpegts"])
def test_where_the_shape_changes_a_shot_of_its_own_shape_begins(form: str, tmp_path: Path) -> None:
    shapes = (64, 80), (80, 64), (32, 40), (64, 80)
    parts = [scene(50, shape, n, 0) for n, shape in enumerate(shapes)]
    (tmp_path / "x").write_bytes(b"".join(video(p, form, first=50 * n) for n, p in enumerate(parts)))
    account, clips = cut(tmp_path / "x")
    assert [(row["width"], row["height"]) for row, _ in clips] == [(80, 64), (64, 80), (80, 64)]
    for (row, shown), part in zip(clips, (parts[0], parts[1], parts[3]), strict=True):
        assert row["frame_count"] == pytest.approx(24, abs=1)
        true = clip.crop(part[0][None], shown.shape[1:3])[0]
        assert true.shape == shown[0].shape and abs(shown[0].astype(int) - true).mean() < 16
    assert "50 (40x32; clip.short_side is 64)" in account["detail"]


def test_clips_of_several_shapes_from_one_source_go_into_their_buckets(
    tmp_path: Path, made_alone: Callable[..., object]
) -> None:
    (tmp_path / "x.h264").write_bytes(video(scene(50, (64, 80)), "h264") + video(scene(50, (80, 64), 1), "h264"))
    url = str(tmp_path / "set")
    shaped = ClipConfig(short_side=32, fps=12)
    made_alone(shard.Config(kind="shard", sources=[str(tmp_path / "x.h264")], clip=shaped, val_fraction=0), url)
    sizes = {(row["height"], row["width"]) for row in index.read_all(url, "train").to_pylist()}
    assert sizes == {(32, 48), (48, 32)}, sizes
    loader = Loader(url, frames=8, size=32, batch=1, epochs=1)
    assert {tuple(batch["video"].shape[-2:]) for batch in loader} == sizes


def test_a_command_scales_each_shape_by_itself(tmp_path: Path) -> None:
    parts = scene(20, (64, 80), 1, 0), scene(20, (80, 64), 2, 0)
    (tmp_path / "x.h264").write_bytes(b"".join(video(p, "h264", crf="4") for p in parts))
    shown = np.stack(list(frames_at(str(tmp_path / "x.h264"), (64, 64), 25)))
    for frame, part in ((shown[5], parts[0][0]), (shown[-5], parts[1][0])):
        true = clip.crop(part[None], (64, 64))[0]
        assert abs(frame.astype(int) - true).mean() < 10


# time


def joined(form: str, codec: str, firsts: tuple[int, ...] = (0, 0)) -> bytes:
    """Recordings of two seconds each, one after the other, that start at these times."""
    parts = [video(scene(50, (64, 80), n), form, codec=codec, first=at, g="25") for n, at in enumerate(firsts)]
    # a recorder of FLV that is started again goes on without another header
    return parts[0] + b"".join(part[13:] if form == "flv" else part for part in parts[1:])


WRAP = (1 << 33) // 3600  # frames at 25 a second until a clock of 33 bits begins again


@pytest.mark.parametrize(
    ("form", "codec", "firsts"),
    [
        ("mpegts", "libx264", (0, 0)),
        ("mpegts", "mpeg2video", (500, 0)),
        ("mpegts", "libx264", (WRAP - 25, 10, 5)),
        ("webm", "libvpx", (0, 0)),
        ("matroska", "libx264", (0, 0)),
        ("vob", "mpeg2video", (0, 0)),
        ("flv", "libx264", (0, 0)),
    ],
)
def test_where_the_clock_goes_back_a_shot_begins_and_nothing_is_lost(
    form: str, codec: str, firsts: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(joined(form, codec, firsts))
    account, clips = cut(tmp_path / "x")
    assert account["frames_decoded"] == 50 * len(firsts)
    assert account["frames_sampled"] == pytest.approx(24 * len(firsts), abs=2)
    starts = [row["first_frame"] for row, _ in clips]
    assert starts == [50 * n for n in range(len(firsts))], account
    assert "clock goes back" in account["detail"]


def test_what_ffmpeg_does_not_read_is_told(tmp_path: Path) -> None:
    one = video(scene(50), "flv")
    (tmp_path / "x.flv").write_bytes(one + video(scene(50, seed=1), "flv"))
    account, _ = cut(tmp_path / "x.flv")
    assert account["frames_decoded"] == 50 and f"another recording begins at byte {len(one)}" in account["detail"]


def clocked(times: list[float | None], step: float) -> tuple[list[float], list[bool], int]:
    tally = Tally()
    said = list(monotonic(((n, t) for n, t in enumerate(times)), step, tally))
    assert [n for n, _, _ in said] == list(range(len(times)))
    return [s for _, s, _ in said], [b for _, _, b in said], tally.turns_back


@given(st.lists(st.tuples(st.integers(15, 80), st.floats(-1e5, 1e5)), min_size=1, max_size=4), st.integers(5, 60))
def test_joined_recordings_last_as_long_as_their_parts(parts: list[tuple[int, float]], rate: int) -> None:
    times = [at + n / rate for count, at in parts for n in range(count)]
    ends = np.cumsum([count for count, _ in parts])[:-1].tolist()
    seconds, back, turns = clocked(list(times), 1 / rate)
    assert all(a < b for a, b in pairwise(seconds)) and turns == sum(back)
    ahead = sum(b - a - 1 / rate for a, b in pairwise(times) if b > a + 1 / rate)
    lost = max(0.25, 2 / rate) * len(ends)
    assert seconds[-1] == pytest.approx((len(times) - 1) / rate + ahead, abs=lost + 1e-6)
    for n in ends:
        assert back[n] == (times[n] < times[n - 1] - max(0.25, 2 / rate)) or back[n] is False


@given(st.integers(0, 38), st.one_of(st.none(), st.floats(-1e6, 1e6)))
def test_one_frame_with_a_wrong_time_moves_no_other(at: int, wrong: float | None) -> None:
    times: list[float | None] = [n / 25 for n in range(40)]
    times[at] = wrong
    seconds, back, _ = clocked(times, 1 / 25)
    assert all(a < b for a, b in pairwise(seconds))
    if at and (wrong is None or wrong < at / 25):
        assert not any(back) and seconds[-1] == pytest.approx(39 / 25, abs=1e-2)


def test_frames_in_slight_disorder_are_not_taken_for_another_clock() -> None:
    times: list[float | None] = [float(n + (2 if n % 3 == 0 else -1)) / 25 for n in range(60)]
    seconds, back, _ = clocked(times, 1 / 25)
    assert not any(back) and seconds[-1] == pytest.approx(59 / 25, abs=0.1)


@pytest.mark.parametrize("rate", [1, 2, 5])
def test_the_last_frame_is_shown_for_its_whole_time(rate: int, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(video(scene(4, pace=8), "mp4", rate=rate, crf="10"))
    account, _ = cut(tmp_path / "x.mp4", config=ClipConfig(short_side=64, fps=12, min_seconds=0.2))
    assert account["frames_sampled"] == pytest.approx(4 / rate * 12, abs=1)
    assert account["detail"] is None


# damage


def flipped(data: bytes, at: list[int]) -> bytes:
    changed = bytearray(data)
    for n in at:
        changed[n] ^= 0xFF
    return bytes(changed)


def key_frames(data: bytes) -> list[tuple[int, int]]:
    """Place and size of each key frame's packet."""
    with av.open(io.BytesIO(data)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.is_keyframe and p.size]


def test_what_is_predicted_from_a_damaged_key_frame_is_in_no_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = scene(200, (128, 160))
    data = video(frames, "mpegts", g="50", sc_threshold="0", bf="0", crf="18")
    place, size = key_frames(data)[1]
    (tmp_path / "x.ts").write_bytes(flipped(data, (place + 300 + rng.integers(0, size - 600, 20)).tolist()))
    account, clips = cut(tmp_path / "x.ts")
    assert account["status"] == "good" and "damaged" in account["detail"]
    assert sum(row["frame_count"] for row, _ in clips) == pytest.approx(72, abs=3)
    for row, shown in clips:
        for n, frame in enumerate(shown):
            true = frames[min(199, row["first_frame"] + round(n * 25 / 12))]
            small = np.asarray(
                av.VideoFrame.from_ndarray(true, format="rgb24").reformat(80, 64).to_ndarray(format="rgb24")
            )
            true_clip = clip.crop(small[None], frame.shape[:2])[0]
            assert abs(frame.astype(int) - true_clip).mean() < 40, (row["first_frame"], n)
    assert all("50" not in str(row["first_frame"]) for row, _ in clips)


def test_frames_and_seconds_that_are_missing_are_told(tmp_path: Path) -> None:
    data = video(scene(100), "matroska", g="25")
    (tmp_path / "x.mkv").write_bytes(data[: len(data) * 6 // 10])
    account, clips = cut(tmp_path / "x.mkv")
    assert clips and "s are shown" in account["detail"]


def test_an_ordinary_file_has_nothing_to_tell(tmp_path: Path) -> None:
    for form, codec in (("mp4", "libx264"), ("matroska", "libx264"), ("mpegts", "mpeg2video"), ("webm", "libvpx")):
        (tmp_path / "x").write_bytes(video(scene(100), form, codec=codec))
        assert cut(tmp_path / "x")[0]["detail"] is None, form


# decord


def test_what_decord_would_show_wrongly_it_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "x.ts").write_bytes(joined("mpegts", "libx264"))
    (tmp_path / "y.ts").write_bytes(video(scene(50), "mpegts") + video(scene(50, (80, 64)), "mpegts", first=50))
    for name, why in (("x.ts", "clock goes back"), ("y.ts", "shape changes")):
        account, clips = cut(tmp_path / name, "decord")
        assert account["reason"] == "unreadable" and why in account["detail"] and not clips


def test_what_decord_cannot_open_is_unreadable_in_a_line_without_its_source(tmp_path: Path) -> None:
    frames = [np.roll(scene(1, (64, 80))[0], n, 1) for n in range(30)]
    (tmp_path / "x.mp4").write_bytes(video(frames, "mp4", codec="libsvtav1", preset="12"))
    account, _ = cut(tmp_path / "x.mp4", "decord")
    assert account["reason"] == "unreadable" and account["detail"].startswith("decord cannot read it")
    assert not any(said in account["detail"] for said in (".cc", "Check failed", "/", "\n"))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "mjpeg"])
def test_decord_reads_avi_at_its_rate(codec: str, tmp_path: Path) -> None:
    options = {"bf": "2"} if codec != "mjpeg" else {"strict": "-1"}
    (tmp_path / "x.avi").write_bytes(video(scene(75), "avi", codec=codec, **options))
    account, _ = cut(tmp_path / "x.avi", "decord")
    assert account["frames_sampled"] == pytest.approx(36, abs=1), account
