"""`finetune_latte`: Latte as a prior of PV-VAE (arXiv 2605.02134; 2401.03048), a rectified flow that generates videos.

It trains from a dataset's column of latents, and then reads no video at all; or, for comparison, from pixels.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.text import Text, read_text
from longtake.training import data, sizes, stage
from longtake.training.data import HELDOUT, on_device
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, made_by
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.probes import Pairs
from longtake.training.metrics.share import batches, place
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.common.text import check_guidance, fields_of, set_empty
from longtake.training.models.common.video import grid
from longtake.training.models.common.wanted import Wanted
from longtake.training.models.generator import plain
from longtake.training.models.latte.base import continue_from
from longtake.training.models.latte.config import Config, check
from longtake.training.models.latte.evaluate import HeldoutWindow, VideoPlan
from longtake.training.models.latte.evaluate import evaluate as measure
from longtake.training.models.latte.model import Latte, LatteConfig
from longtake.training.models.latte.sample import SETTINGS, generate_videos
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn
from longtake.training.target import LatentTarget, PixelTarget, Target

__all__ = ["Config", "check"]  # the stage's parts from another file

VERSION = 2
PRODUCES = "model"
MODEL = "latte"
SUMMARY = "generated.json"

_SAMPLED = 4  # videos in a sample during training
_WINDOWS = 16  # windows from which the mean and variance of pixels are computed
_PROBE_TIME = 0.25  # time of the flow at which probes see hidden states [assumption]


def outside(config: Config) -> str:
    """Changes with the feature network."""
    return digest_of(config.features)


class Setup(NamedTuple):
    """All that the stage works with; `base_note` says what the model has from its base, "" without one."""

    inputs: Mapping[str, str]
    target: Target
    classes: Sequence[str]
    text: Text | None
    model: Latte
    base_note: str

    def wanted(self, config: Config) -> Wanted:
        """What generated videos are to show."""
        if self.text is None:
            return Wanted(self.classes)
        columns = {"text": self.text.column, "caption": self.text.captions}
        columns |= {"label": "label"} if config.classes else {}
        return Wanted(self.classes, data.loader(config, self.inputs, "val", columns=columns, **HELDOUT))


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Data, checked, and the model before its first step.

    Raises:
        UserError: the latents or texts are of another dataset, or of an older state of it; no clip is as long as a window,
            or none has a caption; an autoencoder or a base does not fit.
        Failure: damaged files; latents that do not vary.
    """
    target, text = target_of(config, inputs), data.text_of(inputs)
    classes = loader_of(config, inputs, target, "train", batch=1).classes
    model, base_note = _model(config, inputs, target, classes, text)
    return Setup(inputs, target, classes, text, model.to(device()), base_note)


def target_of(config: Config, inputs: Mapping[str, str]) -> Target:
    """The target, latents or pixels, checked. Raises as `prepare`."""
    dataset = inputs["dataset"]
    fps = data.frame_rate(dataset, (config.frames - 1) * config.stride + 1) / config.stride
    if config.latents is None:
        assert config.size
        return PixelTarget((config.frames, *config.size), fps, config.clip_starts)
    record = data.column_of(dataset, inputs["latents"], config.frames)
    shape = (1 + (config.frames - 1) // record.factor, *data.commonest_size(dataset, record))
    codec = data.decoder_of(record, inputs["vae"])
    return LatentTarget(record, record.channels, shape, fps, codec, config.posterior, config.clip_starts)


def _model(
    config: Config, inputs: Mapping[str, str], target: Target, classes: Sequence[str], text: Text | None
) -> tuple[Latte, str]:
    """The model before its first step, with its normalisation and what stands for no text, and a note about its base."""
    record = target.record
    moments = data.statistics(record, config.posterior) if record else None
    if "base" in inputs:
        from_data = {"channels": target.channels, "shape": target.shape, "conditioning": config.conditioning}
        encoder = record.encoder["digest"] if record else None
        return continue_from(inputs["base"], config.model or {}, from_data, classes, encoder, moments, text)
    latte = Latte(config.latte(target.channels, target.shape, len(classes), text))
    set_empty(latte.text_in, text)
    if record and moments:
        try:
            latte.set_statistics(*moments)
        except ValueError as e:
            raise Failure(f"latents: {record.column}: {e}; train the autoencoder for longer") from e
    return latte, ""


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's share of the training windows."""
    share = data.share_of(config, rank, world)
    return loader_of(config, setup.inputs, setup.target, "train", crop="random", **share)


def loader_of(config: Config, inputs: Mapping[str, str], target: Target, split: str, **options: Any) -> Loader:
    """Windows of the target, with labels and texts if they are learned."""
    settings = target.columns(split)
    settings["columns"] |= {"label": "label"} if config.classes else {}
    settings["columns"] |= {"text": read_text(inputs["text"]).column} if "text" in inputs else {}
    return data.loader(config, inputs, split, **settings | options)


def heldout_of(config: Config, setup: Setup, later: bool = False) -> Loader:
    """Held-out clips one by one, always with the same window: the first or, with `later`, one that starts later."""
    options = {"clip_starts": 0.0, "seed": config.seed} if later else {}
    return loader_of(config, setup.inputs, setup.target, "val", **HELDOUT | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss, with videos of the first classes, or of the captions of the first held-out clips, as samples.

    Raises:
        UserError: no clip is held out; the network `features` does not take such videos; guidance that the model does not
            learn to take.
    """
    checked_network(config.features, config.frames, setup.target.size)
    try:
        check_guidance(setup.model.config, config.guidance)
    except ValueError as e:
        raise UserError(str(e)) from e
    heldout = heldout_of(config, setup)
    if not heldout.samples:
        raise UserError("dataset: its val split has no clip for the evaluation; raise val_fraction")
    latte, wanted = setup.model, setup.wanted(config)
    return Objective(
        {"model": latte},
        partial(_loss, config, setup.target, latte),
        sample=partial(_sample, config, setup.target, wanted),
        prompts=wanted.prompts(_SAMPLED),
        fps=max(1, round(setup.target.fps)),
        tokens=partial(_tokens, latte.config),
        blocks=list(latte.blocks()),
        heldout=heldout,
    )


def _loss(config: Config, target: Target, latte: Latte, turn: Turn) -> tuple[Tensor, Terms]:
    x0 = target.given(latte, turn.batch, turn.rng)
    condition = of_batch(turn.batch)
    loss = flow.training_loss(
        lambda x, t: turn.engines[turn.name](x, t, condition, target.start(turn.batch, turn.rng), turn.rng),
        x0,
        turn.rng,
        config.time_mean,
        config.time_std,
        config.shift,
        config.conditioning,
    ).mean()
    return loss, {"loss": loss.detach()}


def model_of(config: Config, inputs: Mapping[str, Source]) -> LatteConfig:
    """See `training.fit`."""
    return _planned(config, inputs)[1]


def _planned(config: Config, inputs: Mapping[str, Source]) -> tuple[sizes.Window, LatteConfig]:
    window = sizes.window_of(config, inputs)
    text, classes = sizes.text_of(inputs), sizes.classes_of(config, inputs)
    from_data = {"channels": window.channels, "classes": classes, "shape": window.shape, **fields_of(text)}
    if "base" in inputs:
        base = made_by(inputs["base"])
        return window, LatteConfig(**base.model_dump() | (config.model or {}) | from_data)
    return window, config.latte(window.channels, window.shape, classes, text)


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: windows of latents, or of pixels."""
    window, model = _planned(config, inputs)
    if window.encoder is None:
        target: Any = PixelTarget(window.shape, 1.0, config.clip_starts)
    else:
        # the loss asks for the sizes alone
        unknown: Any = None
        target = LatentTarget(
            unknown, window.channels, window.shape, 1.0, unknown, config.posterior, config.clip_starts
        )
    latte = Latte(model)
    batch = window.batch(count) | sizes.said(model, count) | {"start": torch.arange(count)}
    beside = () if window.encoder is None else sizes.beside(config, window.encoder)
    return Largest(Objective({"model": latte}, partial(_loss, config, target, latte)), batch, beside)


def _sample(
    config: Config, target: Target, wanted: Wanted, engines: Engines, rng: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """A grid of videos, always of the same seeds and conditions."""
    seeds, condition = [config.seed + n for n in range(_SAMPLED)], wanted.condition(range(_SAMPLED))
    latte = engines["model"].module
    chunks = generate_videos(latte, target.codec, config.frames, seeds, condition, config.settings())
    return {"generated": np.concatenate([grid(chunk) for chunk in chunks])}


def _tokens(latte: LatteConfig, batch: Batch) -> int:
    shape = batch["latent"].shape[-3:] if "latent" in batch else batch["video"].shape[-3:]
    return len(batch["key"]) * int(np.prod(shape)) // latte.patch**2


def announce(config: Config, setup: Setup, loader: Loader) -> tuple[list[str], dict[str, float]]:
    """The note about the base."""
    return [setup.base_note] if setup.base_note else [], {}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json: autoencoder, latents, texts, classes, window and sampling."""
    target, origins = setup.target, lineage["inputs"]
    window = {"frames": config.frames, "stride": config.stride, "size": list(target.size), "fps": target.fps}
    return {
        "vae": origins["vae"] | {"encoder": target.record.encoder["digest"]} if target.record else None,
        "latents": data.latents_facts(target.record, origins) if target.record else None,
        "text": data.text_facts(setup.text, origins.get("text")),
        "classes": list(setup.classes),
        "window": window,
        "sampling": plain(config.settings(), SETTINGS),
    }


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, without latents, and without captions."""
    clips = loader_of(config, setup.inputs, setup.target, "train", batch=1)
    used = data.clip_counts(clips, without_latents=clips.samples_without_latent)
    return used | data.text_counts(setup.inputs, setup.text)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> dict[str, Any]:
    """Measure what has been trained, each rank its share."""
    target, count = setup.target, config.eval_videos
    network = checked_network(config.features, config.frames, target.size)
    if network is None and place()[0] == 0:
        print("evaluate: no Fréchet distance, since `features` names no feature network", flush=True)
    pixels = {"columns": ("video",), "size": target.size, "batch": 1, "last": "pad"}
    real = data.loader(config, setup.inputs, "val", shuffle=False, epochs=1, **pixels)
    train = data.loader(config, setup.inputs, "train", seed=config.seed, **pixels)
    windows = loader_of(config, setup.inputs, target, "train", batch=1, seed=config.seed)
    settings, batch = config.settings(), config.run.eval_batch
    return measure(
        setup.model,
        target.codec,
        _heldout_windows(config, setup),
        folder,
        VideoPlan(config.frames, target.fps, count, config.seed, settings, setup.wanted(config), batch),
        target.trivial(windows.at(range(_WINDOWS))),
        latents=config.eval_latents and target.record is not None,
        network=network,
        real=_videos(real, min(count, real.samples)),
        train=_videos(train, count),
        probed=_probed(config, setup) if config.eval_probes else None,
    )


def _heldout_windows(config: Config, setup: Setup) -> Iterator[HeldoutWindow]:
    for later in (False, True):
        heldout = heldout_of(config, setup, later)
        count = min(config.eval_clips, heldout.samples)
        for number, batch in batches(heldout, count, "evaluate later windows" if later else "evaluate"):
            # a clip as long as a window has no later one
            if bool(batch["start"]) is later:
                x0 = setup.target.given(setup.model, on_device(batch))
                yield HeldoutWindow(number, x0, of_batch(batch), int(batch["start"]))


def _videos(loader: Loader, count: int) -> Iterator[Tensor]:
    for _, batch in batches(loader, count, "compare"):
        yield to_model(batch["video"].to(device()))


def _probed(config: Config, setup: Setup) -> tuple[Pairs, Pairs]:
    """Hidden states after half the blocks [paper: 14 of 28], with videos, of training and held-out clips."""
    latte, target = setup.model, setup.target
    layer = max(1, latte.config.depth // 2)

    def pairs(split: str) -> Iterator[tuple[Tensor, Tensor]]:
        columns = {"video": "video"} | target.columns("val")["columns"]
        order = {"seed": config.seed} if split == "train" else {"shuffle": False, "last": "pad"}
        clips = data.loader(config, setup.inputs, split, columns=columns, size=target.size, batch=1, **order)
        for number, loaded in batches(clips, min(config.eval_probes, clips.samples), "probe"):
            batch = on_device(loaded)
            x0 = target.given(latte, batch)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed + number)).to(x0.device)
            t = x0.new_full((1,), _PROBE_TIME)
            hidden = latte.features(flow.interpolate(x0, noise, t), t, layer, None, batch["start"])
            yield hidden.float(), to_model(batch["video"])

    return pairs("train"), pairs("val")
