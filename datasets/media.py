"""The one function that opens foreign media with FFmpeg.

FFmpeg recognises a format by its first bytes, and some formats name other files: playlists and manifests (HLS, DASH),
scripts (ffconcat), session descriptions, numbered pictures. So FFmpeg gets bytes and never a name, may recognise only the
formats below, which contain their pictures, and may open nothing else by any protocol.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# names of FFmpeg's demuxers
_VIDEOS = (
    "amv apng av1 avi avs avs2 avs3 cavsvideo dirac dnxhd dv evc flic flv gif gxf h261 h263 h264 hevc ipu ivf ivr"
    " live_flv kux asf asf_o matroska webm mjpeg mjpeg_2000 mov m4v mpeg mpegts mpegvideo mtv mxf nsv nut nuv obu ogg"
    " rm r3d roq smjpeg smk bink film_cpk vc1 vc1test vvc wtv yuv4mpegpipe"
)
_PICTURES = "bmp gif jpeg jpegls jpegxl j2k pam pbm pgm pgmyuv png ppm qoi sgi sunrast tiff webp"
FORMATS = (*_VIDEOS.split(), *(f"{name}_pipe" for name in _PICTURES.split()), "jpegxl_anim")
SOUNDS = ("aac", "aiff", "flac", "mp3", "w64", "wav")  # that contain no pictures
_BUFFER = 1 << 16


class _Nameless:
    """A file as FFmpeg needs it, without its name, by which it would guess the format."""

    def __init__(self, file: Any) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextlib.contextmanager
def opened(source: str | Path | bytes | memoryview, formats: Sequence[str] = FORMATS, **options: str) -> Iterator[Any]:
    """An av.InputContainer of a local file or of bytes. `options` are the codecs'.

    Raises:
        av.error.FFmpegError: it cannot be read as any format.
        ValueError: its format is none of `formats`.
        OSError: the file cannot be read.
    """
    import av

    with contextlib.ExitStack() as stack:
        if isinstance(source, str | Path):
            file: Any = stack.enter_context(Path(source).open("rb", buffering=0))
        else:
            file = io.BytesIO(source)
        try:
            container = av.open(
                _Nameless(file),
                options=options,
                # no protocol is called "none"
                container_options={"format_whitelist": ",".join(formats), "protocol_whitelist": "none"},
                metadata_errors="ignore",
                buffer_size=_BUFFER,
            )
        except av.error.ArgumentError as e:
            raise ValueError("of no format that is opened: playlists and all that names other files are not") from e
        yield stack.enter_context(container)
