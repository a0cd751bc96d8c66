"""The settings of latents that are encoded while training goes on. Light to import: recipes are checked with it."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from longtake.datasets.stage import Input, StageConfig

LIVE = "live"  # in place of a column

LatentsInput = Annotated[str, Input("latents", (LIVE,))]  # what a `cache_latents` stage has made, or `live`


class LiveConfig(StageConfig):
    """How windows are encoded, as by a `cache_latents` stage with the same settings (see there).

    size           height and width; null: each clip's own, to whole positions
    join_seconds   longest stream of clips that are encoded as one video; 0: each clip by itself
    shrink         of `low_latents: live`: scale down by (height, width) before encoding
    precision      of the encoder; fp32 is without TF32
    dtype          that latents are rounded to
    tile           pixels a side; encode larger frames in overlapping tiles
    overlap        of tiles, in pixels
    batch          windows of one length that are encoded together
    chunk          latents of each window that are encoded at once
    windows        whose latents say by which mean and deviation the model normalises
    """

    size: tuple[PositiveInt, PositiveInt] | None = None
    join_seconds: float = Field(0.0, ge=0)
    shrink: tuple[PositiveInt, PositiveInt] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    dtype: Literal["float16", "bfloat16"] = "float16"
    tile: PositiveInt | None = None
    overlap: int = Field(64, ge=0)
    batch: int = Field(8, ge=1)
    chunk: int = Field(4, ge=1)
    windows: int = Field(512, ge=1)


def live_of(config: Any) -> LiveConfig | None:
    """The settings of a stage's live latents; None where they are cached, or there are none."""
    return (config.live or LiveConfig()) if getattr(config, "latents", None) == LIVE else None


def check_live(config: Any) -> None:
    """ValueError where `latents: live` lacks its encoder, or has what only cached latents have; and the other way round."""
    live, low = live_of(config), getattr(config, "low_latents", None)
    if live is None:
        if low == LIVE:
            raise ValueError("low_latents: are live, and latents are cached; make both live, or name a cached column")
        for field in ("encoder", "live"):
            if getattr(config, field) is not None:
                raise ValueError(f"{field}: is for latents: live; set that, or leave it out")
        return
    if config.encoder is None:
        raise ValueError("encoder: latents: live needs the model that encodes; name a `pretrain_vae` stage, or a model")
    if low not in (None, LIVE):
        raise ValueError("low_latents: are cached, and latents are live; set low_latents: live, or name cached latents")
    if low == LIVE and live.shrink in (None, (1, 1)):
        raise ValueError("low_latents: live needs live.shrink, by which the video is scaled down, such as [4, 4]")
    if low is None and live.shrink is not None:
        raise ValueError("live.shrink: is of low_latents: live; set that, or leave it out")
    if live.tile and live.overlap >= live.tile:
        raise ValueError(f"live.tile: {live.tile} with live.overlap {live.overlap}: the overlap must be the smaller")
