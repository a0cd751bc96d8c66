"""The latents and texts that a transformer of another library has learned from, and columns that are of others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents, encoder_digest
from longtake.datasets.text import Text, TextConfig
from longtake.training import registry
from longtake.training import text as encoders
from longtake.training.foreign.backbone_config import BackboneConfig
from longtake.training.foreign.folder import VAE, parts_of
from longtake.training.registry import pipelines
from longtake.training.registry.foreign import TEXT_ENCODER
from longtake.training.registry.uri import in_store

_SETTINGS = ("clean", "layer", "template", "crop")  # of `TextConfig`, that decide the states of a text
_POOLED = ("text_encoder_2", "tokenizer_2")
_LONGEST_POOLED = 77  # tokens of CLIP


def pipeline_uri(uri: str, facts: Mapping[str, Any]) -> str:
    """What names the other parts of a transformer: its URI in the registry, or the folder of its pipeline.

    Args:
        uri: of the transformer, which may be a folder within its pipeline's.
        facts: its config.json, as `registry.load_with_facts` gives it.
    """
    return uri if in_store(uri) or "foreign" not in facts else str(facts["foreign"]["folder"])


def text_settings(uri: str, facts: Mapping[str, Any], config: BackboneConfig) -> dict[str, Any]:
    """The settings of `TextConfig` by which a transformer's texts are encoded: those it has learned, or its pipeline's."""
    if facts.get("text"):
        return dict(facts["text"]["encoder"])
    settings = {"encoder": pipeline_uri(uri, facts), "length": config.longest_text}
    if config.class_name == "WanTransformer3DModel":
        return settings | {"clean": "wan"}
    if config.class_name == "HunyuanVideoTransformer3DModel":
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

        # the third state from the end, after a template that is cut off
        return settings | {
            "clean": "none",
            "layer": -3,
            "template": TEMPLATE["template"],
            "crop": TEMPLATE["crop_start"],
        }
    return settings | {"clean": "none"}


def pooled_settings(uri: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the vectors that a transformer has learned, or of its pipeline's second text encoder."""
    if facts.get("pooled"):
        return dict(facts["pooled"]["encoder"])
    folder = pipelines.found(pipeline_uri(uri, facts), _POOLED).folder
    return {"encoder": str(folder / _POOLED[0]), "length": _LONGEST_POOLED, "clean": "none"}


def check_pooled(base: str, config: BackboneConfig, facts: Mapping[str, Any], pooled: Text | None, uri: str) -> None:
    """Refuse a base that takes a vector of each text without such, another one with it, and vectors of another encoder."""
    width = config.sizes.pooled_width
    if bool(width) != (pooled is not None):
        remedy = "leave it out" if pooled else "name texts by the second text encoder of its pipeline (text_encoder_2)"
        raise UserError(
            f"pooled: {base} takes {'a' if width else 'no'} vector of each text beside its states; {remedy}"
        )
    if pooled and pooled.width != width:
        raise UserError(f"pooled: are of {pooled.width} values, and {base} takes {width}; encode by its text_encoder_2")
    if pooled:
        check_encoder(base, pooled_settings(base, facts), pooled, uri, "pooled")


def check_latents(base: str, config: BackboneConfig, facts: Mapping[str, Any], record: Latents, uri: str) -> None:
    """Refuse latents of other channels than the base's, and of another autoencoder where that is known.

    Args:
        base: URI of a transformer with this config and this config.json.
        uri: of the latents.
    """
    if record.channels != config.channels:
        raise UserError(
            f"latents: {uri} have {record.channels} channels, and {base} takes {config.channels}; encode by the"
            " autoencoder of its own pipeline"
        )
    vae, whole = facts.get("vae") or {}, pipeline_uri(base, facts)
    learned = vae.get("encoder")
    if learned is None and _has(facts, VAE):
        learned = encoder_digest(registry.load(whole, part="vae"))
    if learned not in (None, record.encoder["digest"]):
        raise UserError(
            f"latents: {uri} are of {record.encoder['uri']}, another autoencoder than that of {base}; encode by its own:"
            f" encoder: {vae.get('uri', whole)}"
        )


def check_text(base: str, config: BackboneConfig, facts: Mapping[str, Any], text: Text, uri: str) -> None:
    """Refuse texts of another width than the base's, too long ones, those of other settings, and of another encoder.

    The encoder is compared where it is known. Arguments are as of `check_latents`.
    """
    if text.width != config.text_width:
        raise UserError(
            f"text: {uri} has states of {text.width} values, and {base} takes {config.text_width}; encode by the text"
            " encoder of its own pipeline"
        )
    if int(text.encoder["length"]) > config.longest_text:
        most = config.longest_text
        raise UserError(
            f"text: {uri} has up to {text.encoder['length']} tokens, and {base} takes {most}; encode with length: {most}"
        )
    learned = text_settings(base, facts, config)
    check_encoder(base, learned, text, uri, "text", "digest" in learned or _has(facts, TEXT_ENCODER))


def check_encoder(
    base: str, learned: Mapping[str, Any], text: Text, uri: str, field: Literal["text", "pooled"], known: bool = True
) -> None:
    """Refuse texts of other settings than those that a base has learned, and of another encoder if that is `known`."""
    wanted = TextConfig(**{name: value for name, value in learned.items() if name in TextConfig.model_fields})
    given = text.config()
    if others := [name for name in _SETTINGS if getattr(wanted, name) != getattr(given, name)]:
        theirs, ours = (_written({name: getattr(one, name) for name in others}) for one in (given, wanted))
        raise UserError(
            f"{field}: {uri} has states of {theirs}, and {base} has learned others; write in its `cache_text` stage: {ours}"
        )
    if not known:
        return
    # what does not change the meaning of states is as the column has it
    digest = learned.get("digest") or encoders.digest_of(given.model_copy(update={"encoder": wanted.encoder}))
    if text.encoder["digest"] != digest:
        raise UserError(
            f"{field}: {uri} are of {given.encoder}, another encoder than that of {base}; encode by its own:"
            f" encoder: {wanted.encoder}"
        )


def _written(settings: Mapping[str, Any]) -> str:
    """Settings as they stand in a recipe, on one line."""
    words = {
        name: value if isinstance(value, str) and value.isalpha() else json.dumps(value)
        for name, value in settings.items()
    }
    return ", ".join(f"{name}: {value}" for name, value in words.items())


def _has(facts: Mapping[str, Any], part: str) -> bool:
    """Whether a transformer is of a pipeline with such a part, and not alone."""
    folder = (facts.get("foreign") or {}).get("folder")
    return folder is not None and part in parts_of(Path(folder))
