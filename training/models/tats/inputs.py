"""What a training takes from other stages: whether it fits together, and the weights of a base."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longtake.datasets.errors import UserError
from longtake.datasets.tokens import Tokens
from longtake.training.models.tats.config import Config
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import TATSConfig


def check_sound(uri: str, sound: Tokens, record: Tokens) -> None:
    """UserError where tokens of sound are none, or of other windows than the video's."""
    if sound.of != "audio":
        raise UserError(f"audio_tokens: {uri} are of video; encode the sound by a `pretrain_sound_vqgan` model")
    windows = [
        {"frames": each.frames, "stride": each.stride, "hop": each.hop, "size": each.size, "latents": each.shape[0]}
        for each in (sound, record)
    ]
    if different := [name for name in windows[0] if windows[0][name] != windows[1][name]]:
        theirs, ours = (each[different[0]] for each in windows)
        raise UserError(f"audio_tokens: have windows of {different[0]} {theirs}, tokens of {ours}; encode both alike")


def check_parent(
    field: str,
    uri: str,
    model: Any,
    facts: Mapping[str, Any],
    record: Tokens,
    sound: Tokens | None,
    classes: Sequence[str],
) -> None:
    """UserError where a base or the anchors' model is no TATS, or has learned other tokens or classes."""
    if not isinstance(model, TATS):
        raise UserError(f"{field}: {uri} is a {type(model).__name__}, not a TATS; name a `pretrain_tats` model")
    if facts["vqgan"]["encoder"] != record.model["digest"]:
        raise UserError(
            f"{field}: {uri} has learned tokens of another VQGAN, {facts['vqgan']['uri']}; encode by that one"
        )
    learned = (facts.get("sound") or {}).get("encoder")
    if sound and learned not in (None, sound.model["digest"]):
        raise UserError(
            f"{field}: {uri} has learned sound of another VQGAN, {facts['sound']['uri']}; encode by that one"
        )
    if list(facts["classes"]) != list(classes):
        raise UserError(
            f"{field}: {uri} has learned {len(facts['classes'])} classes, these are {len(classes)} or have other names;"
            " train both on the same"
        )


def check_anchors(uri: str, theirs: TATSConfig, ours: TATSConfig) -> None:
    """UserError where a model does not make the anchors that this one fills what is between."""
    if theirs.mode != "anchors":
        raise UserError(f"anchors: {uri} is of mode {theirs.mode}; name one of mode anchors")
    for name in ("every", "codes", "words", "word_length", "text_width", "audio_codes", "audio_tokens"):
        if getattr(theirs, name) != getattr(ours, name):
            raise UserError(
                f"anchors: {uri} has {name} {getattr(theirs, name)}, this training {getattr(ours, name)}; give both the same"
            )
    if theirs.shape[1:] != ours.shape[1:]:
        raise UserError(
            f"anchors: {uri} has latent frames of {theirs.shape[1]}x{theirs.shape[2]}, these are"
            f" {ours.shape[1]}x{ours.shape[2]}; encode both at one size"
        )


def check_window(uri: str, theirs: Mapping[str, Any], record: Tokens, fps: float) -> None:
    """UserError where anchors were learned at another stride, size or rate than what is between them."""
    ours = {"stride": record.stride, "size": list(record.size), "fps": fps}
    for name, value in ours.items():
        same = math.isclose(theirs[name], fps, rel_tol=1e-3) if name == "fps" else theirs[name] == value
        if not same:
            raise UserError(
                f"anchors: {uri} was trained at {name} {theirs[name]}, these windows have {value}; encode both alike"
            )


def continued(config: Config, uri: str, base: TATS, from_data: Mapping[str, Any]) -> tuple[TATS, str]:
    """The model before its first step with the weights of its base, and a line about it."""
    model = TATS(TATSConfig(**base.config.model_dump() | (config.model or {}) | dict(from_data)))
    weights, ours = base.state_dict(), model.state_dict()
    for name in ours.keys() | weights.keys():
        has, needs = (list(each[name].shape) if name in each else "not" for each in (weights, ours))
        if has != needs:
            raise UserError(f"base: {uri} does not fit these settings: {name} is {has} there, {needs} here")
    model.load_state_dict(weights)
    return model, f"base: {uri}: {len(weights)} tensors are taken"
