"""How sources are cut: what a clip looks like, and what a source may cost."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from longtake.datasets.stage import StageConfig


def _ratio(text: str) -> str:
    width, colon, height = text.partition(":")
    if not (colon and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"{text!r} is not an aspect ratio; write width:height, such as 16:9")
    return text


class ClipConfig(StageConfig):
    """What a clip is.

    short_side       pixels
    fps              frames per second, resampled by time
    min_seconds      shorter shots are dropped
    max_seconds      longer shots are cut into pieces
    aspects          the shapes of clips; a video is cropped to the nearest
    multiple         pixels; the long side is rounded to a multiple of it
    max_crop         share of the picture that may be cropped
    crf              x264's quality, 0 is lossless
    encoder_preset   x264's speed
    gop              frames from one key frame to the next
    """

    short_side: int = Field(256, ge=32, le=4096, multiple_of=2)
    fps: float = Field(24, gt=0, le=240)
    min_seconds: float = Field(1.0, gt=0)
    max_seconds: float = Field(10.0, gt=0, le=600)
    aspects: tuple[Annotated[str, AfterValidator(_ratio)], ...] = ("9:16", "3:4", "1:1", "4:3", "16:9")
    multiple: int = Field(16, ge=2, multiple_of=2)
    max_crop: float = Field(0.35, ge=0, lt=1)
    crf: int = Field(20, ge=0, le=51)
    encoder_preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"
    gop: int = Field(12, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "ClipConfig":
        if self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds:g} is above max_seconds {self.max_seconds:g}")
        return self

    @property
    def rate(self) -> Fraction:
        return Fraction(self.fps).limit_denominator(1001)

    @property
    def min_frames(self) -> int:
        return max(2, math.ceil(self.min_seconds * self.fps - 1e-9))

    @property
    def max_frames(self) -> int:
        return max(2, math.floor(self.max_seconds * self.fps + 1e-9))

    def buckets(self) -> Iterator[tuple[int, int]]:
        """Yield the (width, height) of each aspect."""
        for aspect in self.aspects:
            width, height = (int(n) for n in aspect.split(":"))
            ratio = max(width, height) / min(width, height)
            longer = max(self.short_side, round(self.short_side * ratio / self.multiple) * self.multiple)
            yield (longer, self.short_side) if width >= height else (self.short_side, longer)


class LimitsConfig(StageConfig):
    """What one source may cost before it is rejected or cut off.

    max_bytes         size of the file
    max_pixels        size of a coded frame
    max_frames        frames that are decoded
    timeout_seconds   time to cut it, and time to keep its sound
    memory_bytes      address space of the decoding process
    """

    max_bytes: int = Field(64 << 30, gt=0)
    max_pixels: int = Field(7680 * 4320, gt=0)
    max_frames: int = Field(2_000_000, gt=0)
    timeout_seconds: float = Field(1800, gt=0)
    memory_bytes: int = Field(6 << 30, gt=0)

    def check_patience(self, stall_seconds: float) -> None:
        """ValueError where work that takes no longer than it may would be said to stand still."""
        if stall_seconds <= self.timeout_seconds:
            raise ValueError(
                f"run.stall_seconds {stall_seconds:g} must be more than limits.timeout_seconds"
                f" {self.timeout_seconds:g}, which one source may take"
            )


class FrameDiffConfig(StageConfig):
    """The frame-difference column.

    short_side   pixels; clips are box-averaged by the whole factor that brings them nearest to it
    """

    short_side: int = Field(64, ge=8)

    def factor(self, width: int, height: int) -> int:
        factor = max(1, min(width, height) // self.short_side)
        while width % factor or height % factor:
            factor -= 1
        return factor


class AudioConfig(StageConfig):
    """The column of sound.

    codec      opus takes a fifth of the bytes of flac, which loses nothing
    bitrate    of opus, bits per second; with less than the least one a window would not sound as in the whole
    rate       samples per second
    channels   that the sound is mixed to
    """

    codec: Literal["opus", "flac"] = "opus"
    bitrate: int = Field(96_000, ge=64_000, le=512_000)
    rate: int = Field(48_000, ge=8_000, le=192_000)
    channels: Literal[1, 2] = 2

    @model_validator(mode="after")
    def _possible(self) -> "AudioConfig":
        if self.codec == "opus" and self.rate != 48_000:
            raise ValueError(f"rate {self.rate}: opus has 48000 samples per second; leave rate out, or take flac")
        return self


class CutConfig(StageConfig):
    """How one source is cut.

    clip         what a clip is
    frame_diff   the column of frame differences
    audio        the column of sound; null: none
    limits       what the source may cost
    decoder      decord rejects what it would show wrongly (see second_opinion.py)
    """

    clip: ClipConfig = ClipConfig()
    frame_diff: FrameDiffConfig = FrameDiffConfig()
    audio: AudioConfig | None = AudioConfig()
    limits: LimitsConfig = LimitsConfig()
    decoder: Literal["pyav", "decord"] = "pyav"


def fit(config: ClipConfig, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int], float]:
    """The scaled size of a picture, the size of its bucket, and the share that is cropped.

    Sizes are (width, height) and even.
    """
    bucket = min(config.buckets(), key=lambda b: abs(math.log((b[0] / b[1]) / (width / height))))
    scale = max(bucket[0] / width, bucket[1] / height)
    scaled = (max(bucket[0], round(width * scale / 2) * 2), max(bucket[1], round(height * scale / 2) * 2))
    return scaled, bucket, 1 - bucket[0] * bucket[1] / (scaled[0] * scaled[1])
