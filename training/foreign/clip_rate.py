"""The frame rate of clips that a transformer of another library learns from, beside that of the videos which it makes."""

from collections.abc import Mapping
from typing import Any

from longtake.datasets.errors import UserError
from longtake.training.foreign.backbone_config import BackboneConfig

_FPS = {"WanTransformer3DModel": 16.0, "LTXVideoTransformer3DModel": 25.0, "HunyuanVideoTransformer3DModel": 24.0}
_FPS_5B = 24.0  # Wan 2.2-5B, which alone expands times
_ANY = ("LTXVideoTransformer3DModel",)  # classes that take the rate as an input
_SLACK = 0.01


def fps_of(config: BackboneConfig, facts: Mapping[str, Any]) -> float:
    """Frames a second of the videos of a model with this config.json, which a pipeline does not say: then as it is used."""
    if "window" in facts:
        return float(facts["window"]["fps"])
    return _FPS_5B if config.expand_timesteps else _FPS[config.class_name]


def check_rate(
    base: str, config: BackboneConfig, facts: Mapping[str, Any], rate: float, asked: float | None = None
) -> None:
    """Refuse clips of another frame `rate` than the setting `fps`, `asked`, or, without it, than the base makes: UserError.

    `facts` are the base's config.json.
    """
    wanted = asked or (None if config.class_name in _ANY else fps_of(config, facts))
    if wanted is not None and abs(rate / wanted - 1) > _SLACK:
        raise UserError(
            f"fps: {'is' if asked else f'{base} makes'} {wanted:g} frames a second, and the clips have {rate:g}, so that motion"
            f" would be learned too fast or slow; cut them again with clip.fps: {wanted:g}, or say fps: {rate:g}"
        )
