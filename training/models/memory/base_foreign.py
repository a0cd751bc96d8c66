"""The model before the first optimizer step where its base is a transformer of another library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.text import Text
from longtake.training.engines import lora
from longtake.training.foreign.backbone import Backbone, BackboneConfig
from longtake.training.foreign.clip_rate import check_rate
from longtake.training.foreign.columns import check_latents, check_pooled, check_text
from longtake.training.foreign.folder import CONFIG, TRANSFORMER, TRANSFORMER_2, is_foreign, parts_of
from longtake.training.models.memory.config import MemoryConfig, MemoryLora, check_low
from longtake.training.models.memory.data import Data, check_history, check_precision
from longtake.training.models.memory.foreign import MemoryBackbone, MemoryBackboneConfig, why_not
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.registry import cache, disk, pipelines
from longtake.training.registry.uri import in_store

_RANK = 128  # of a low-rank change, as in the paper
_FROM_DATA = ("history", "shape", "history_noise")  # fields of the memory that follow from other settings
_MODELS = ("backbone", "memory_backbone")  # registered models whose transformer is of another library
Settings = TypeVar("Settings", bound=MemoryConfig)


def facts_of_base(uri: str) -> dict[str, Any]:
    """What a base's config.json says; nothing of a folder of diffusers. Its weights are not loaded. Raises as `registry.load`."""
    folder = _folder(uri)
    return {} if is_foreign(folder) or not (folder / CONFIG).is_file() else disk.read_config(folder)


def _folder(uri: str) -> Path:
    """The folder of a base on this machine; of a registered pipeline the transformer's files are compared."""
    return cache.pull(uri, frozenset({TRANSFORMER})) if in_store(uri) else pipelines.local(uri)


def with_lora(config: Settings, inputs: Mapping[str, str]) -> Settings:
    """The settings with what truly learns: from then on a `lora` of null is none, whatever the base.

    Where they say nothing of it, and the base is of another library, `lora` is the paper's.
    """
    if config.lora is not None or "base" not in inputs:
        return adapting(config, None)
    facts = facts_of_base(inputs["base"])
    foreign = not facts or facts["model"] in _MODELS
    return adapting(config, facts.get("config", {}) | (config.model or {}) if foreign else None)


def adapting(config: Settings, fields: Mapping[str, Any] | None) -> Settings:
    """See `with_lora`, for a memory with these fields; None: the base is not of another library.

    What has no weights, or is not used, is left out of what learns in full.
    """
    if config.lora == "none":
        return config.model_copy(update={"lora": None})
    if config.lora is not None or fields is None:
        return config
    used = {
        "memory": fields.get("memory") != "none" and fields.get("branches") != "low",
        # its attention to the memory's states is of the memory too
        "cross": bool(fields.get("cross_attention")),
    }
    full = tuple(name for name, learns in used.items() if learns)
    return config.model_copy(update={"lora": MemoryLora(rank=_RANK, full=full)})


def check_one_transformer(uri: str) -> None:
    """Refuse a pipeline with two transformers that share the times."""
    folder = _folder(uri)
    if is_foreign(folder) and TRANSFORMER_2 in parts_of(pipelines.opened(uri, folder, frozenset()).folder):
        raise UserError(
            f"base: {uri} has two transformers, for high and for low noise; a memory needs one for all times, such as Wan 2.1"
        )


def foreign_model(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    data: Data,
    text: Text | None,
    base: Backbone | MemoryBackbone,
    facts: Mapping[str, Any],
    pooled: Text | None = None,
) -> MemoryBackbone:
    """The base's transformer with a memory: the base's, if it has such a one, or a new one.

    Raises:
        UserError: settings, latents or texts do not fit the base.
    """
    uri = inputs["base"]
    fields, own = _fields(config, uri, base.config)
    check_rate(uri, own, facts, data.fps, config.fps)
    check_history(fields, own.patch[1], data)
    made = foreign_config(config, uri, base.config, data.shape, data.history)
    check_low(made, data.low.shrink if data.low else None)
    check_precision(config, made)
    check_latents(uri, own, facts, data.latents, inputs["latents"])

    # The weights, and the states of "", which stand for no text.
    # a base is loaded in evaluation mode, in which nothing is hidden or recomputed
    model = MemoryBackbone(made, base.backbone if isinstance(base, MemoryBackbone) else base).train()
    _load_memory(model, base, uri)
    if text is not None:
        check_text(uri, own, facts, text, inputs["text"])
        check_pooled(uri, own, facts, pooled, inputs.get("pooled", ""))
        model.set_empty(
            torch.from_numpy(text.empty()), None if pooled is None else torch.from_numpy(pooled.empty())[-1]
        )
    elif not model.config.backbone.text_empty:
        raise UserError(
            f'text: {uri} attends to texts, and does not know the states of "", which stand for none; name what a `cache_text`'
            " stage has made by the text encoder of its pipeline"
        )

    # weights that are updated in fp32 are fp32; else the engine keeps such copies of those that learn
    if config.precision == "fp32":
        return model.float()
    # what learns in full begins as it is stored
    return model.bfloat16() if config.lora else model


def foreign_config(
    config: MemoryConfig,
    uri: str,
    base: BackboneConfig | MemoryBackboneConfig,
    shape: tuple[int, int, int],
    history: int,
) -> MemoryBackboneConfig:
    """The config of a base with a memory: the base's, with the settings, a segment's shape and latents of history.

    Raises:
        UserError: settings do not fit the base.
    """
    fields, _ = _fields(config, uri, base)
    try:
        return MemoryBackboneConfig(**fields | {"shape": shape, "history": history, "history_noise": config.noise})
    except ValidationError as e:
        raise UserError(f"model: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e


def _fields(
    config: MemoryConfig, uri: str, base: BackboneConfig | MemoryBackboneConfig
) -> tuple[dict[str, Any], BackboneConfig]:
    """Fields of `MemoryBackboneConfig` that do not follow from the data, and the transformer's config."""
    changes = config.model or {}
    if unknown := changes.keys() - MemoryModelConfig.model_fields.keys():
        known = ", ".join(name for name in MemoryModelConfig.model_fields if name not in _FROM_DATA)
        raise UserError(f"model: {min(unknown)}: is the base's own, {uri}; of its memory there are {known}")
    if config.classes:
        raise UserError(f"classes: {uri} takes none; leave it out, and learn from texts")
    own = base.backbone if isinstance(base, MemoryBackboneConfig) else base
    if reason := why_not(own):
        raise UserError(f"base: {uri}: {reason}")
    fields = {name: field.default for name, field in MemoryModelConfig.model_fields.items()}
    fields |= base.model_dump() if isinstance(base, MemoryBackboneConfig) else {"backbone": own.model_dump()}
    return fields | changes, own


def _load_memory(model: MemoryBackbone, base: Backbone | MemoryBackbone, uri: str) -> None:
    """Give the model what its base has beside the transformer, and let the rest learn in full."""

    def beside(module: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in module.state_dict().items() if not name.startswith("backbone.")}

    ours, theirs = beside(model), beside(base) if isinstance(base, MemoryBackbone) else {}
    # a memory of another kind begins anew
    kept = {name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape}
    if (
        isinstance(base, MemoryBackbone)
        and base.config.variant is model.config.variant
        and (lost := theirs.keys() - kept.keys())
    ):
        raise UserError(
            f"base: {uri} does not fit these settings, such as in {min(lost)}; leave out of `model` what differs"
        )
    model.load_state_dict(kept, strict=False)
    new = [name for name, _ in model.named_parameters() if not name.startswith("backbone.") and name not in kept]
    if "first.shift" not in new and not model.first.shift.any():
        new.append("first.shift")
    lora.let_learn(model, new)
