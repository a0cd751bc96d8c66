"""The door through which media are opened: nothing is read but what was handed in."""

import ctypes
import io
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from longtake.datasets import clip, images, media
from longtake.datasets.errors import Failure, UserError
from longtake.infra.cli.media import frames_of, sound_of
from longtake.infra.footage import write_video
from longtake.pipeline.config import ClipConfig, CutConfig
from longtake.pipeline.source import process

_IN_OPEN = 0x20


class Watch:
    """Tells whether anybody, C libraries too, has opened one of some files."""

    def __init__(self, *paths: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(os.O_NONBLOCK)
        assert self._events >= 0
        for path in paths:
            assert libc.inotify_add_watch(self._events, os.fsencode(path), _IN_OPEN) >= 0

    def opened(self) -> bool:
        try:
            return bool(os.read(self._events, 1 << 16))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._events)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with a video and pictures that nobody asks for, beside what a test puts there."""
    rng = np.random.default_rng(0)
    pictures = [np.roll(rng.integers(40, 200, (64, 64, 3), dtype=np.uint8), n, 1) for n in range(30)]
    write_video(tmp_path / "secret.mp4", pictures, 10)
    for n in range(30):
        with av.open(str(tmp_path / f"secret{n:03d}.png"), "w", format="image2") as out:
            stream = out.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[n], format="rgb24")))
            out.mux(stream.encode())
    return tmp_path


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT3S"'
    ' profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>'
)
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 0 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
# name of the file, and what it says of a place
HOSTILE: dict[str, tuple[str, str]] = {
    "ffconcat": ("x.mp4", "ffconcat version 1.0\nfile {}\n"),
    "ffconcat behind a tag": ("x.mp3", "ID3\4\0\0\0\0\0\0ffconcat version 1.0\nfile {}\n"),
    "HLS": ("x.m3u8", HLS),
    "HLS by another name": ("x.mp4", HLS),
    "DASH": ("x.mpd", DASH),
    "session description": ("x.sdp", SDP + "a=control:{}\n"),
    "numbered pictures": ("secret%03d.png", "{}"),
    "metadata": ("x.mp4", ";FFMETADATA1\ntitle={}\n"),
    "SVG": ("x.svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"><image xlink:href="{}"/></svg>'),
    "subtitles' index": ("x.idx", "# VobSub index file, v7\nsize: 64x64\nid: en, index: 0\n{}\n"),
}
PLACES = (
    "secret.mp4",
    "file:{folder}/secret.mp4",
    "subfile,,start,0,end,0,,:{folder}/secret.mp4",
    "http://127.0.0.1:{port}/x",
)


def with_data_in(name: str, movie: bytes) -> bytes:
    """A QuickTime file whose track lies in a file of that name beside it: an alias in place of "this file"."""
    path = name.encode()
    alias = bytes(10) + bytes([1]) + b"v".ljust(27, b"\0") + bytes(12) + bytes([len(path)]) + path.ljust(63, b"\0")
    alias += bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    alias += struct.pack(">hh", 2, len(path)) + path + bytes(len(path) % 2) + struct.pack(">hh", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias

    def boxes(data: bytes) -> bytes:
        made, at = b"", 0
        while at < len(data):
            size, kind = struct.unpack(">I4s", data[at : at + 8])
            body = data[at + 8 : at + size]
            if kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
                body = boxes(body)
            elif kind == b"dref":
                body = body[:8] + entry
            made, at = made + struct.pack(">I4s", 8 + len(body), kind) + body, at + size
        return made

    return boxes(movie)


def doors(path: Path, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each way in which a command opens what others have made."""
    for decoder in ("pyav", "decord"):
        cut = CutConfig(clip=ClipConfig(short_side=32, fps=10), decoder=decoder)
        yield decoder, lambda cut=cut: process(str(path), "ab" * 10, str(folder), cut)  # type: ignore[misc]
    yield "command", lambda: list(frames_of(str(path), 2)[0])
    yield "sound", lambda: sound_of(str(path), 1.0)
    yield "clip", lambda: clip.decode(path.read_bytes())
    yield "picture", lambda: images.picture(path.read_bytes())
    yield "door", lambda: media.opened(path).__enter__()


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_names_other_files_is_refused_and_they_are_not_opened(
    kind: str, planted: Path, server: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, text = HOSTILE[kind]
    folder = tmp_path_factory.mktemp("out")
    watch = Watch(*planted.glob("secret*"))
    try:
        for place in (named.format(folder=planted, port=server.getsockname()[1]) for named in PLACES):
            (planted / name).write_text(text.format(place))
            for door, open_it in doors(planted / name, folder):
                try:
                    result = open_it()
                except (Failure, UserError, ValueError, av.error.FFmpegError, images.Rejected):
                    pass
                else:
                    assert door in ("pyav", "decord"), f"{door} opens {place}"
                    assert isinstance(result, dict) and result["account"]["reason"] == "unreadable"
                    assert result["account"]["detail"] and not result["clips"]
                assert not watch.opened(), f"{door} opens the file beside {place}"
                with pytest.raises(BlockingIOError):
                    server.accept()
    finally:
        watch.close()


@pytest.mark.parametrize(
    "name", ["%03d.mp4", "concat:a|b.mp4", "data:video,x", "http:x.mp4", "a.m3u8", "pipe:0", "é\udcff"]
)
def test_a_name_is_a_name_whatever_it_looks_like(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    write_video(tmp_path / "v.mp4", [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)] * 20, 10)
    (tmp_path / "v.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        with media.opened(path) as container:
            assert sum(1 for _ in container.decode(video=0)) == 20
    for decoder in ("pyav", "decord"):
        cut = CutConfig(clip=ClipConfig(short_side=32, fps=10), decoder=decoder)
        assert process(str(tmp_path / name), "ab" * 10, str(tmp_path), cut)["account"]["clips"] == 1


def test_a_movie_whose_data_lie_in_another_file_is_not_read_from_there(planted: Path) -> None:
    """QuickTime's external data references."""
    with av.open(str(planted / "secret.mp4")) as container, av.open(str(planted / "secret.mov"), "w") as out:
        stream = container.streams.video[0]
        copied = out.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
    (planted / "x.mov").write_bytes(with_data_in("secret.mov", (planted / "secret.mov").read_bytes()))
    watch = Watch(planted / "secret.mov")
    with av.open(str(planted / "x.mov"), container_options={"enable_drefs": "1"}) as container:
        assert next(container.decode(video=0)).width == 64
    assert watch.opened()
    with media.opened(planted / "x.mov") as container:
        assert container.format.name.startswith("mov")
    assert not watch.opened()
    watch.close()


@pytest.mark.parametrize("codec", ["png", "mjpeg", "webp", "bmp", "gif", "tiff"])
def test_pictures_are_opened(codec: str) -> None:
    buffer = io.BytesIO()
    formats = {"mjpeg": "image2pipe", "gif": "gif", "webp": "webp"}
    try:
        with av.open(buffer, "w", format=formats.get(codec, "image2pipe")) as out:
            stream = out.add_stream("libwebp" if codec == "webp" else codec, rate=1)
            stream.width, stream.height = 32, 32
            stream.pix_fmt = {"mjpeg": "yuvj420p", "webp": "yuv420p", "gif": "rgb8", "bmp": "bgr24"}.get(codec, "rgb24")
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
    except av.error.FFmpegError as e:
        pytest.skip(f"no encoder here: {e}")
    with media.opened(buffer.getvalue()) as container:
        assert next(container.decode(video=0)).width == 32
