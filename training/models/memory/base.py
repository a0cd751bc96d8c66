"""The model before the first optimizer step: with random weights, or with those of a base."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.text import Text
from longtake.training import data as common
from longtake.training import registry
from longtake.training.engines import lora
from longtake.training.foreign.backbone import Backbone
from longtake.training.models.common.text import fields_of, is_of_text, set_empty
from longtake.training.models.memory.base_foreign import check_one_transformer, foreign_model
from longtake.training.models.memory.config import MemoryConfig, check_low
from longtake.training.models.memory.data import Data, check_history, check_precision
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.foreign import MemoryBackbone
from longtake.training.models.memory.model import MemoryModel


def initial_model(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    data: Data,
    classes: int,
    text: Text | None = None,
    pooled: Text | None = None,
) -> MemoryModel:
    """Make the model with the base's weights or random ones, and the statistics of the latents that it learns.

    Raises:
        UserError: the history or the latents are too small for the memory; the base does not fit.
        Failure: the latents do not vary.
    """
    base, facts = _base_of(inputs)
    foreign = isinstance(base, Backbone | MemoryBackbone)
    # a training that takes no texts leaves alone what its base has learned of them
    if (config.listens and text is None) or (text is not None and not foreign):
        common.check_base_text(inputs.get("base", ""), facts, text)
    if isinstance(base, Backbone | MemoryBackbone):
        return foreign_model(config, inputs, data, text, base, facts, pooled)
    if pooled is not None:
        raise UserError(
            "pooled: is for a base of another library; a memory_dit takes no vector of a text, leave it out"
        )
    if text is not None and not config.listens:
        raise UserError("text: is for a base of another library; a memory_dit is told nothing here, leave it out")

    # The config: the base's or the preset's, with what follows from the data.
    from_data = {"channels": data.latents.channels, "classes": classes, "history_noise": config.noise}
    from_data |= fields_of(text)
    try:
        if base is not None:
            fields = base.config.model_dump() | (config.model or {}) | from_data
        else:
            fields = config.dit(**from_data).model_dump()
        check_history(fields, fields["patch"], data)
        dit = MemoryDiTConfig(**fields | {"shape": data.shape, "history": data.history})
    except ValidationError as e:
        raise UserError(f"model: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e
    check_low(dit, data.low.shrink if data.low else None)
    check_precision(config, dit)

    # The weights and the statistics. A base that never read low-res latents gets theirs.
    model = MemoryDiT(dit)
    if base is not None:
        if (facts.get("vae") or {}).get("encoder") != data.latents.encoder["digest"]:
            raise UserError(
                f"base: {inputs['base']} has learned latents of another autoencoder than {inputs['latents']}; encode by that one"
            )
        _load_base(model, base, inputs["base"])
    try:
        low = common.statistics(data.low, "mean") if data.low else (None, None)
        if base is None:
            model.set_statistics(*common.statistics(data.latents, config.posterior), *low)
        elif base.config.shrink is None and data.low:
            model.set_statistics(model.latent_mean.clone(), model.latent_std.clone(), *low)
    except ValueError as e:
        raise Failure(f"latents: {data.latents.column}: {e}; train the autoencoder for longer") from e
    set_empty(model.text_in, text)
    return model


def _base_of(inputs: Mapping[str, str]) -> tuple[MemoryDiT | MemoryBackbone | Backbone | None, dict[str, Any]]:
    """The base and its config.json, if there is one. UserError where it is nothing that takes a memory."""
    if "base" not in inputs:
        return None, {}
    uri = inputs["base"]
    check_one_transformer(uri)
    base, facts = registry.load_with_facts(uri, part="transformer")
    if not isinstance(base, MemoryDiT | MemoryBackbone | Backbone):
        raise UserError(
            f"base: {uri} is a {type(base).__name__}, not a MemoryDiT; name a `pretrain_memory` model, or a folder in the"
            " layout of diffusers"
        )
    return base, facts


def _load_base(model: MemoryDiT, base: MemoryDiT, uri: str) -> None:
    """Load the base's weights. Those that it lacks of the memory, of attention to it, or of text, start anew."""
    ours, theirs = model.state_dict(), base.state_dict()
    new = sorted(ours.keys() - theirs.keys())
    strange = [
        name for name in new if not name.startswith("memory.") and ".cross." not in name and not is_of_text(name)
    ]
    strange += sorted(theirs.keys() - ours.keys())
    strange += [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if strange:
        raise UserError(
            f"base: {uri} does not fit these settings, such as in {strange[0]}; leave out of `model` what differs"
        )
    model.token_in.load_state_dict(base.token_in.state_dict())
    model.start_memory()
    model.load_state_dict(theirs, strict=False)
    if not base.first.shift.any():
        # the base is older than this weight, or has learned nothing by it
        new.append("first.shift")
    if new:
        lora.let_learn(model, new)
        print(f"base: {len(new)} tensors are not in {uri} and begin anew, such as {new[0]}", flush=True)
