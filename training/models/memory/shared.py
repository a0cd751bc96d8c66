"""The parts of a training stage that `pretrain_memory` and `finetune_memory_prior` share (see `longtake.training.stage`)."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents
from longtake.datasets.loader import Loader, to_pixels
from longtake.training import data as common
from longtake.training import sizes
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, made_by
from longtake.training.foreign.backbone import BackboneConfig
from longtake.training.models.common.codec import Codec
from longtake.training.models.common.text import fields_of
from longtake.training.models.memory.base import initial_model
from longtake.training.models.memory.base_foreign import Settings, adapting, facts_of_base, foreign_config
from longtake.training.models.memory.config import MemoryConfig
from longtake.training.models.memory.data import (
    Setup,
    captions_of,
    data_of,
    describe_history,
    describe_memory,
    heldout_of,
    loader_of,
    videos_of,
)
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.foreign import MemoryBackbone, MemoryBackboneConfig
from longtake.training.models.memory.history import ON_HOST, full_tokens
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.objective import Engines, Objective, Terms, Turn

MODEL = "memory_dit"


def kind(setup: Setup) -> str:
    """The kind of a setup's model in config.json."""
    return "memory_backbone" if isinstance(setup.model, MemoryBackbone) else MODEL


def prepare(config: MemoryConfig, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Read, check and load the data and the models. Raises as `data_of`, `initial_model` and `training.data.text_of`."""
    data, text = data_of(config, inputs), common.text_of(inputs)
    codec = common.decoder_of(data.latents, inputs["vae"])
    labels = {"columns": ("label",), "batch": 1}
    classes = common.loader(config, inputs, "train", **labels).classes if config.classes else []
    pooled = common.text_of({**inputs, "text": inputs["pooled"]}) if "pooled" in inputs else None
    model = initial_model(config, inputs, data, len(classes), text, pooled)
    return Setup(inputs, data, classes, model.to(device()), codec, text, pooled)


def loader(config: MemoryConfig, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's share of the training segments."""
    return loader_of(config, setup, "train", **common.share_of(config, rank, world))


def objective_of(
    config: MemoryConfig,
    setup: Setup,
    loss: Callable[[Turn], tuple[Tensor, Terms]],
    sample: Callable[[MemoryConfig, Setup, Engines, torch.Generator], dict[str, np.ndarray[Any, Any]]],
) -> Objective:
    """The objective of either stage. Raises UserError where nothing is held out, before training and not after it."""
    videos_of(config, setup)
    return Objective(
        {"model": setup.model},
        loss,
        sample=partial(sample, config, setup),
        fps=max(1, round(setup.data.fps)),
        prompts=_prompts(config, setup),
        tokens=partial(full_tokens, setup.model.config.patch),
        blocks=list(setup.model.blocks()),
        heldout=heldout_of(config, setup),
        on_host=ON_HOST,
    )


def _prompts(config: MemoryConfig, setup: Setup) -> list[str]:
    """The caption of the held-out segment that samples are of; none for a model without text."""
    if setup.text is None or not config.listens:
        return []
    caption = next(iter(heldout_of(config, setup, columns=captions_of(config, setup))))["caption"][0]
    return [" ".join((caption or "no caption").split())]


class Planned(NamedTuple):
    """What is known before any data are there: the window, the model, and the latents of the longest history."""

    window: sizes.Window
    model: MemoryModelConfig
    history: int


def planned(config: MemoryConfig, inputs: Mapping[str, Source]) -> Planned:
    """Raises UserError where a stage must run first."""
    window = sizes.window_of(config, inputs)
    fps, codec = sizes.frame_rate(inputs["dataset"]), window.codec
    history = round(config.history_seconds * fps / codec.temporal_stride)
    base = made_by(inputs["base"], "transformer") if "base" in inputs else None
    model: MemoryModelConfig
    if isinstance(base, BackboneConfig | MemoryBackboneConfig):
        model = foreign_config(config, inputs["base"].uri, base, window.shape, history)
        told = {"text_empty": max(1, model.backbone.text_empty)}
        model = model.model_copy(update={"backbone": model.backbone.model_copy(update=told)})
    elif base is not None and not isinstance(base, MemoryDiTConfig):
        raise UserError(f"base: {inputs['base'].uri} is neither a model with a memory nor a video transformer")
    else:
        from_data = {"channels": window.channels, "shape": window.shape, "history": history}
        from_data |= {"history_noise": config.noise, "classes": sizes.classes_of(config, inputs)}
        from_data |= fields_of(sizes.text_of(inputs))
        changes = (config.model or {}) | from_data
        model = config.dit(**from_data) if base is None else MemoryDiTConfig(**base.model_dump() | changes)
    lengths = config.histories(model, round(config.least_seconds * fps / codec.temporal_stride))
    return Planned(window, model, min(lengths.most, lengths.some[-1]))


def model_of(config: MemoryConfig, inputs: Mapping[str, Source]) -> MemoryModelConfig:
    """See `training.fit`."""
    return planned(config, inputs).model


def resolved(config: Settings, inputs: Mapping[str, Source]) -> Settings:
    """See `training.fit`, and `with_lora`."""
    model = planned(config, inputs).model
    return adapting(config, model.model_dump() if isinstance(model, MemoryBackboneConfig) else None)


def largest_of(
    config: MemoryConfig,
    inputs: Mapping[str, Source],
    count: int,
    loss: Callable[[Any, MemoryModel, Turn], tuple[Tensor, Terms]],
) -> Largest:
    """See `training.fit`: each sample of a batch has the longest history."""
    window, model, history = planned(config, inputs)
    steps = {"history_steps": torch.full((count,), history), "stream_step": torch.full((count,), history)}
    batch = window.batch(count) | sizes.said(model, count) | steps
    before = window._replace(shape=(history, *window.shape[1:]))
    batch |= before.batch(count, "history_latent")
    if model.shrink is not None and model.shrink != (1, 1):
        for name, latents in (("low", window), ("history_low", before)):
            height, width = (side // by for side, by in zip(latents.shape[1:], model.shrink, strict=True))
            batch |= latents._replace(shape=(latents.shape[0], height, width)).batch(count, name)
    if isinstance(model, MemoryBackboneConfig) and (width := model.backbone.sizes.pooled_width):
        batch["pooled"] = torch.zeros(count, 1, width, dtype=torch.bfloat16)
        batch["pooled_mask"] = torch.ones(count, 1, dtype=torch.bool)
    assert window.encoder
    made = MemoryBackbone(model) if isinstance(model, MemoryBackboneConfig) else MemoryDiT(model)  # type: ignore[arg-type]
    objective = Objective({"model": made}, partial(loss, config, made), on_host=ON_HOST)
    return Largest(objective, batch, sizes.beside(config, window.encoder))


def shift_of(config: MemoryConfig, model: MemoryModel) -> float:
    """How far times are moved towards noise, in training and sampling."""
    return model.shift if config.shift is None else config.shift


def announce(config: MemoryConfig, setup: Setup, loader: Loader) -> tuple[list[str], dict[str, float]]:
    """The lines and the metric that a training begins with: the size of its memory and of its history."""
    lines = [describe_memory(setup.model.config, setup.data), describe_history(config, setup.data, loader)]
    return lines, {"history_steps_expected": loader.history_mean(setup.data.reach(config, 0))}


def facts_of(config: MemoryConfig, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that both stages write into config.json, beside `config` (`MemoryModelConfig`) and `lineage`.

    `registry.load_with_facts(uri)` gives the model and its facts. Their `steps` are latents, but in `sampling`. Either
    stage adds `stage` and `sampling`, `pretrain_memory` adds `retrieved` and `finetune_memory_prior` adds `posterior`.

        stage        "retrieval" (of `pretrain_memory`) or "generation" (of `finetune_memory_prior`)
        rates        ["4x4x2"] and so on; [] for a memory without rates
        vae          {"uri", "sha256", "encoder"}: what decodes, and encodes what is appended; `encoder` is its digest
        latents      {"uri", "digest"}: the column that it has learned from; {"column", "encoder", "live"} of live latents
        low_latents  {"uri", "digest", "shrink": [4, 4]}: the column of the low-res branch; null without one
        text         {"uri", "digest", "encoder"}: the texts that it has learned, or its base; null for a model without
        pooled       the same of vectors of the texts; only of a model that takes such
        classes      ["cat", "dog"]: names in the order of their ids
        window       {"frames": 21, "steps": 6, "factor": 4, "fps": 24.0, "size": [480, 832]}: of a segment; a video's
                     first one has `frames`, each later one `steps * factor`. `size` is height and width in pixels
        history      {"seconds": 20.0, "steps": 120}: what the memory has learned to hold, as in `config.history`
        sampling     {"steps": 50, "guidance": 1.0, "shift": 1.0}: the solver's steps; of generation `history_noise` too
        retrieved    4: latents that it has learned to retrieve at once, at most; models of before do not say it
        posterior    "sample" or "mean", what of each latent the model has learned
    """
    data, dit, inputs = setup.data, setup.model.config, lineage["inputs"]
    pooled = common.text_facts(setup.pooled, inputs.get("pooled")) or _of_base(inputs, "pooled")
    return {
        "rates": list(dit.rates) if dit.variant.rated else [],
        "vae": inputs["vae"] | {"encoder": data.latents.encoder["digest"]},
        "latents": common.latents_facts(data.latents, inputs),
        "low_latents": _low_facts(data.low, inputs) if data.low else None,
        "text": common.text_facts(setup.text, inputs.get("text")) or _of_base(inputs, "text"),
        **({"pooled": pooled} if pooled else {}),
        "classes": list(setup.classes),
        "window": {
            "frames": config.frames,
            "steps": data.shape[0],
            "factor": data.latents.factor,
            "fps": data.fps,
            "size": list(data.size()),
        },
        "history": {"seconds": config.history_seconds, "steps": dit.history},
    }


def _low_facts(low: Latents, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return common.latents_facts(low, inputs, "low_latents") | {"shrink": list(low.shrink)}


def _of_base(inputs: Mapping[str, Any], field: str) -> dict[str, Any] | None:
    """What the base's config.json says of texts, which a training without any keeps as they are."""
    return facts_of_base(inputs["base"]["uri"]).get(field) if "base" in inputs else None


def counts(config: MemoryConfig, setup: Setup) -> dict[str, float]:
    """Counts of the train split's clips that were used and that were left out, and the mean history of a sample."""
    clips = loader_of(config, setup, "train", batch=1)
    lacking = {"without_latents": clips.samples_without_latent, "without_history": clips.samples_without_history}
    used = common.clip_counts(clips, **lacking) | common.text_counts(setup.inputs, setup.text)
    return used | {"history_steps_expected": clips.history_mean()}


def above_each_other(codec: Codec, model: MemoryModel, before: Tensor, *rows: Tensor) -> np.ndarray[Any, Any]:
    """Decode rows of latents `(1, C, T, H, W)`, normalised, into one video `(t, height, width, 3)` uint8.

    Each row is decoded as the continuation of `before`, which begins a video or is long enough for the decoder not to see
    its beginning.
    """
    videos = []
    for latents in rows:
        chunks = list(codec.decode_stream([model.denormalise(torch.cat([before, latents], dim=2))], chunk=1))
        videos.append(torch.cat([to_pixels(chunk) for chunk in chunks[before.shape[2] :]], dim=2))
    return torch.cat(videos, dim=3)[0].permute(1, 2, 3, 0).cpu().numpy()
