"""Modules of the parts of a folder: an autoencoder as a `ForeignCodec`, a transformer as a `Backbone`.

A module is built without memory, its shapes are compared with the headers of the files, and then it takes the tensors of
the files as they are: weights are in memory once, in the dtype of the files.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from longtake.datasets.errors import Failure, UserError
from longtake.training.foreign import backbone_config, codec_rows
from longtake.training.foreign.backbone import Backbone, BackboneConfig
from longtake.training.foreign.codec import CodecConfig, ForeignCodec
from longtake.training.foreign.folder import (
    CONFIG,
    TRANSFORMER,
    TRANSFORMER_2,
    VAE,
    Part,
    digests_of,
    index_of,
    part_of,
    parts_of,
    pipeline_of,
    scheduler_of,
    tensors_of,
)
from longtake.training.foreign.library import class_of
from longtake.training.registry import disk

Config = TypeVar("Config", bound=BaseModel)
Module = TypeVar("Module", ForeignCodec, Backbone)

KNOWN = (*codec_rows.ROWS, *backbone_config.ROWS)  # classes that a part may be of
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # layers of old autoencoders
_OLD = re.compile(rf"(attentions\.\d+)\.({'|'.join(_RENAMED)})\.")
_QUANTISED = ("F8", "F4", "I8", "U8")  # how dtypes begin that no module of ours computes in


def codec_of(folder: Path, known: Mapping[Path, str] | None = None) -> tuple[ForeignCodec, dict[str, Any]]:
    """The autoencoder of a pipeline folder, or of a folder that is one, and what our config.json would say of it.

    Args:
        known: sha256 of files that were read just now, and are not read for it again.

    Returns:
        The module on the CPU, in evaluation mode; `model`, `config`, `sha256` by file, and under `foreign` its folder.

    Raises:
        UserError: as `part_of`; its class is not known here; the extra is not installed.
        Failure: its weights do not fit its config, or are damaged.
    """
    part = part_of(folder, VAE)
    config = _codec_config(part)
    return _filled(part, lambda: ForeignCodec(config)), _facts(folder, part, "foreign_vae", config, known)


def backbone_of(
    folder: Path, expert: Literal["high", "low", "first"] | None = None, known: Mapping[Path, str] | None = None
) -> tuple[Backbone, dict[str, Any]]:
    """The transformer of a pipeline folder, or of a folder that is one, likewise.

    Of a transformer that lies in its pipeline's folder the rest is that of the pipeline: its times, its rate, its experts.

    Args:
        expert: which of two that share the times: `transformer` is for high noise, `transformer_2` for low. `first` is the one
            for high noise of two, or the only one.

    Raises:
        UserError, Failure: as `codec_of`; an expert is asked for where there is one transformer, or none where there are two.
    """
    part, config, pipeline = _transformer(folder, expert)
    module = _filled(part, lambda: Backbone(config))
    # what its class keeps in fp32 may be in another dtype in the file
    return module.to(module.dtype), _facts(pipeline, part, "backbone", config, known)


def config_of(
    folder: Path, name: Literal["vae", "transformer"], expert: Literal["high", "low"] | None = None
) -> tuple[str, CodecConfig | BackboneConfig]:
    """The kind and the config of a part of a pipeline folder, or of a folder that is one. Raises UserError as `codec_of`."""
    if name == VAE:
        return "foreign_vae", _codec_config(part_of(folder, VAE))
    return "backbone", _transformer(folder, expert)[1]


def check(part: Part) -> None:
    """Compare the config of a part of a class in `KNOWN` with the headers of its weights. Raises as `codec_of`."""
    if part.class_name in codec_rows.ROWS:
        codec = _codec_config(part)
        _empty(part, lambda: ForeignCodec(codec))
    else:
        config = _valid(part, BackboneConfig)
        _empty(part, lambda: Backbone(config))


def _transformer(folder: Path, expert: Literal["high", "low", "first"] | None) -> tuple[Part, BackboneConfig, Path]:
    """The transformer that a folder and an expert name, its config, and its pipeline's folder. Raises as `backbone_of`."""
    pipeline = pipeline_of(folder) if folder.name in (TRANSFORMER, TRANSFORMER_2) else folder
    two = TRANSFORMER_2 in parts_of(pipeline)
    if two and pipeline != folder:
        own: Literal["high", "low"] = "low" if folder.name == TRANSFORMER_2 else "high"
        if expert not in (None, "first", own):
            raise UserError(f"{folder}: is the expert of {own} noise; name the whole pipeline, or give `expert`: {own}")
        expert = own
    if expert == "first":
        expert = "high" if two else None
    if two and expert is None:
        raise UserError(f"{folder}: has a transformer for high noise and one for low; say which by `expert`")
    if expert and not two:
        raise UserError(f"{folder}: has no second transformer; leave `expert` out, or name the whole pipeline")
    part = part_of(pipeline, TRANSFORMER_2 if expert == "low" else TRANSFORMER)
    return part, _backbone_config(part, pipeline, expert), pipeline


def _codec_config(part: Part) -> CodecConfig:
    return _valid(part, CodecConfig)


def _backbone_config(part: Part, folder: Path, expert: Literal["high", "low", "first"] | None) -> BackboneConfig:
    index = index_of(folder)
    facts: dict[str, Any] = {"scheduler": scheduler_of(folder), "expert": expert}
    facts |= {"expand_timesteps": bool(index.get("expand_timesteps"))}
    if expert:
        facts["boundary"] = index.get("boundary_ratio")
    if VAE in parts_of(folder) and (vae := part_of(folder, VAE)).class_name in codec_rows.ROWS:
        codec = _codec_config(vae)
        facts["stride"] = codec.temporal_stride, codec.spatial_stride
    return _valid(part, BackboneConfig, **facts)


def _valid(part: Part, config: type[Config], **more: Any) -> Config:
    try:
        return config(class_name=part.class_name, settings=part.config, **more)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        why = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{part.files[CONFIG]}: makes no {part.class_name[:80]} ({why})") from e


def _facts(folder: Path, part: Part, model: str, config: BaseModel, known: Mapping[Path, str] | None) -> dict[str, Any]:
    return {
        "format": disk.FORMAT,
        "model": model,
        "config": config.model_dump(mode="json"),
        "sha256": digests_of(part, known),
        "foreign": {"folder": str(folder.absolute()), "part": part.name, "class_name": part.class_name},
    }


def _empty(part: Part, make: Callable[[], Module]) -> tuple[Module, dict[str, str]]:
    """The module without memory for its weights, and its name for each tensor of the files that it has.

    Raises:
        UserError: the extra is not installed; the weights are quantised.
        Failure: config and weights do not fit.
    """
    _check_types(part)
    try:
        # buffers that no file has are computed
        with class_of("init_empty_weights", "accelerate")(include_buffers=False):
            module = make()
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as e:
        if isinstance(e, UserError):
            raise
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise Failure(f"{part.files[CONFIG]}: makes no {part.class_name} ({why}); download it again") from e
    tensors = tensors_of(part)
    if quantised := sorted({tensor.dtype for tensor in tensors.values() if tensor.dtype.startswith(_QUANTISED)}):
        raise UserError(f"{part.folder}: has weights in {quantised[0]}; name those in bf16 or fp32")

    expected = {name: list(t.shape) for name, t in module.state_dict().items() if name.startswith("net.")}
    names = {name: f"net.{_OLD.sub(lambda old: f'{old[1]}.{_RENAMED[old[2]]}.', name)}" for name in tensors}
    unused = getattr(module.net, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = {
        name: ours
        for name, ours in names.items()
        if ours in expected or not any(re.search(pattern, name) for pattern in unused)
    }
    disk.check_shapes(part.folder, {ours: list(tensors[name].shape) for name, ours in names.items()}, expected)
    return module, names


def _check_types(part: Part) -> None:
    """UserError for a text or an object in the config where the class has a number: it may fail only when it is used."""
    for name, parameter in inspect.signature(class_of(part.class_name).__init__).parameters.items():
        value = part.config.get(name)
        if isinstance(parameter.default, int | float) and isinstance(value, str | dict):
            raise UserError(
                f"{part.files[CONFIG]}: {name} is {str(value)[:40]!r}, and no number; copy or download it again"
            )


def _filled(part: Part, make: Callable[[], Module]) -> Module:
    """The module with the tensors of the files, in evaluation mode. Raises as `_empty`."""
    module, names = _empty(part, make)
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("net.")}
    try:
        for path in part.weights:
            with safe_open(path, "pt") as file:
                state |= {names[name]: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise Failure(f"{path}: damaged ({' '.join(str(e).split())[:120]}); download it again") from e
    module.load_state_dict(state, assign=True)
    return module.eval()
