"""Latte as a prior of PV-VAE (arXiv 2605.02134; 2401.03048): a rectified flow over latents, which generates videos.

It trains from a dataset's column of latents, and then reads no video at all; or, for comparison, from pixels.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from longtake.datasets.cache import Cache
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import Latents
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.stage import DatasetInput, Input, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import checkpoint, launch, registry, tracker
from longtake.training import data as latent_data
from longtake.training.config import ModelName
from longtake.training.data import pinned
from longtake.training.engines import device
from longtake.training.evaluation import EvaluatedConfig, checked_network, emptied, published
from longtake.training.loop import Batch, Engines, Objective, train
from longtake.training.metrics import trivial
from longtake.training.metrics.distance import merge, moments
from longtake.training.metrics.features import read_file
from longtake.training.metrics.probes import Pairs
from longtake.training.metrics.share import batches, place
from longtake.training.models.common import flow, sampling
from longtake.training.models.latte import base as latte_base
from longtake.training.models.latte.evaluate import Held, Videos, evaluate
from longtake.training.models.latte.model import Latte, LatteConfig, config_from_preset
from longtake.training.models.memory.shared import on_device
from longtake.training.models.pv_vae.model import PVVAE, Posterior

VERSION = 2
PRODUCES = "model"

_FROM_DATA = ("channels", "classes", "shape", "conditioning")  # fields of LatteConfig that `model` must not have
_PRESET = {"preset": "latte_xl"}
_PIXEL_PATCH = 16
_SAMPLED = 4  # videos in a sample during training
_WINDOWS = 16  # of pixels, which their mean and variance are taken of
_PROBED_AT = 0.25  # time of the flow at which probes see hidden states [assumption]


class Config(EvaluatedConfig):
    """Train Latte on a dataset's latents, or pixels, and register it. `model` is a preset with fields of LatteConfig to change.

    With a `base` it goes on from that one: see `training.models.latte.base` for what is taken of it.

    The defaults are PV-VAE's, where it says something [paper]; "assumption" marks what no paper says.
    """

    kind: Literal["finetune_latte"]
    dataset: DatasetInput
    latents: Annotated[str, Input("latents")] | None = None  # None trains on pixels
    view: ViewInput | None = None
    vae: ModelInput | None = None  # makes videos of latents; None is the model that has encoded them
    base: ModelInput | None = None  # the Latte to go on from; None begins with random weights
    name: ModelName = "latte"
    # a preset, latte_xl unless it says otherwise, with fields to change; with a base, fields alone; None: as it is
    model: dict[str, Any] | None = None
    classes: bool = False  # learn the dataset's labels
    frames: int = Field(17, ge=1)  # of a window; 1 + 4n for latents [paper: 17]
    stride: int = Field(1, ge=1)  # every how many frames; latents have all
    size: tuple[int, int] | None = None  # height, width of pixels; latents have their own
    # share of windows that start their clip, as generated videos do: their first latent is of one frame. The others start
    # later. Pixels look the same anywhere, and so many windows are only told that they do [paper: all; assumption]
    clip_starts: float = Field(0.5, ge=0, le=1)
    posterior: Literal["sample", "mean"] = "sample"  # what of each latent is learned, drawn anew each step [assumption]
    conditioning: float = Field(0.3, ge=0, le=1)  # probability that a window has clean leading frames [assumption]
    time_mean: float = 0.0  # of the logit-normal times (arXiv 2403.03206, rf/lognorm(0, 1))
    time_std: float = Field(1.0, gt=0)  # likewise
    shift: float = Field(1.0, gt=0)  # of times towards noise, in training and sampling (2403.03206, eq. 23); 1 is none
    steps: int = Field(250_000, ge=1)  # [paper]
    batch: int = Field(64, ge=1)  # [paper]
    lr: float = Field(1e-4, gt=0)  # [paper]
    warmup_steps: int | None = Field(0, ge=0)  # [Latte: none, adaLN-Zero starts silently]
    schedule: Literal["constant", "cosine"] = "constant"  # [Latte, DiT]
    weight_decay: float = Field(0.0, ge=0)  # [Latte, DiT]
    ema_half_lives: tuple[float, ...] = (6931.0,)  # steps [DiT: a decay of 0.9999]
    sample_steps: int = Field(100, ge=1)  # Euler steps [paper]
    guidance: float = Field(1.0, ge=0)  # of samples with a class; 1 is none [assumption]
    overlap: int = Field(2, ge=1)  # latent steps that a window of a longer video is given [assumption]
    # generated at the end, and with `features` compared with as many held-out and training clips
    eval_videos: Annotated[int, Measuring()] = Field(16, ge=1)

    @field_validator("model")
    @classmethod
    def _without_data(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := [name for name in _FROM_DATA if name in (model or {})]:
            raise ValueError(f"{taken[0]} follows from the stage's other settings; leave it out")
        return model

    @model_validator(mode="after")
    def _begins(self) -> "Config":
        model = self.model or {}
        if self.base is None:
            if self.lora is not None:
                raise ValueError("lora: without a base all else would stay random; name one, or leave it out")
            config_from_preset(**_PRESET | model)
        elif "preset" in model:
            raise ValueError("model: preset: the base has its own; leave it out, or the base")
        elif unknown := model.keys() - LatteConfig.model_fields.keys():
            raise ValueError(f"model: unknown {min(unknown)}; there are {', '.join(LatteConfig.model_fields)}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.latents is None:
            if self.size is None:
                raise ValueError("size: training on pixels needs (height, width); or name latents")
            if self.vae is not None:
                raise ValueError("vae: a prior of pixels has none; leave it out, or name latents")
            if self.base is None:
                self.latte(3, (self.frames, *self.size))
        elif self.size is not None:
            raise ValueError("size: latents have the size that they were made with; leave it out")
        elif self.stride != 1:
            raise ValueError("stride: latents are of every frame; leave it out")
        return self

    def latte(self, channels: int, shape: tuple[int, int, int], classes: int = 0) -> LatteConfig:
        """Of the model without a base that this data needs."""
        patch = {} if self.latents else {"patch": _PIXEL_PATCH}
        known = {"channels": channels, "classes": classes, "shape": shape, "conditioning": self.conditioning}
        return config_from_preset(**_PRESET | patch | (self.model or {}) | known)

    def settings(self) -> sampling.Settings:
        return sampling.Settings(self.sample_steps, self.guidance, self.shift, self.overlap)


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse latents of another dataset, windows that they do not have, and a base that is no such prior."""
    latent_data.check_recipe(config, inputs, ("latents",), (config.frames - 1) * config.stride + 1)
    base: Any = inputs.get("base")
    if base is not None and base.kind != config.kind:
        raise ValueError(f"base: a {base.kind} stage makes no Latte; name a {config.kind} stage, or a model")
    if base is not None and (base.latents is None) != (config.latents is None):
        raise ValueError("base: one of the two learns latents, the other pixels; name a base of the same")


def outside(config: Config) -> str:
    """Changes with the feature network."""
    return hashlib.sha256(read_file(config.features)).hexdigest() if config.features else ""


class Data(NamedTuple):
    """What the prior learns: the record of its latents (None for pixels), the shape of a window as it sees it, `fps`."""

    made: Latents | None
    channels: int
    shape: tuple[int, int, int]  # frames, height, width
    fps: float

    def size(self) -> tuple[int, int]:
        """Pixels of a video, height and width."""
        stride = self.made.stride if self.made else 1
        return self.shape[1] * stride, self.shape[2] * stride


def data_of(config: Config, inputs: Mapping[str, str]) -> Data:
    """What there is to learn, checked.

    Raises:
        UserError: the latents are of another dataset, or of what it was before; no clip is as long as a window.
        Failure: damaged files.
    """
    dataset = inputs["dataset"]
    fps = latent_data.frame_rate(dataset, (config.frames - 1) * config.stride + 1) / config.stride
    if config.latents is None:
        assert config.size
        return Data(None, 3, (config.frames, *config.size), fps)
    made = latent_data.column_of(dataset, inputs["latents"], config.frames)
    height, width = latent_data.commonest_size(dataset, made)
    return Data(made, made.channels, (1 + (config.frames - 1) // made.factor, height, width), fps)


def decoder(data: Data, uri: str) -> PVVAE | None:
    """The autoencoder that makes videos of the latents, on this rank's device; None for pixels.

    Raises:
        UserError: it is none, or has another encoder than has made the latents.
    """
    return latent_data.decoder_of(data.made, uri) if data.made else None


def begin(config: Config, data: Data, classes: int) -> Latte:
    """The model without a base before its first step, which normalises what it learns.

    Raises:
        Failure: the latents do not vary.
    """
    latte = Latte(config.latte(data.channels, data.shape, classes))
    if data.made:
        try:
            latte.set_statistics(*latent_data.statistics(data.made, config.posterior))
        except ValueError as e:
            raise Failure(f"latents: {data.made.column}: {e}; train the autoencoder for longer") from e
    return latte


def model_of(config: Config, inputs: Mapping[str, str], data: Data, classes: Sequence[str]) -> tuple[Latte, str]:
    """The model before its first step, of a base or as `begin` has it, and a line that says what of the base is taken.

    Raises as `begin` and `latte_base.go_on`.
    """
    if "base" not in inputs:
        return begin(config, data, len(classes)), ""
    known = {"channels": data.channels, "shape": data.shape, "conditioning": config.conditioning}
    encoder = data.made.encoder["digest"] if data.made else None
    moments = latent_data.statistics(data.made, config.posterior) if data.made else None
    return latte_base.go_on(inputs["base"], config.model or {}, known, classes, encoder, moments)


def objective(config: Config, data: Data, latte: Latte, vae: PVVAE | None, classes: Sequence[str] = ()) -> Objective:
    """The flow's loss; and videos of the first classes, or of none, as samples."""
    return Objective(
        {"generator": latte},
        partial(_loss, config, data, latte),
        sample=partial(_sample, config, vae, classes),
        fps=max(1, round(data.fps)),
        tokens=partial(_tokens, latte.config),
        blocks=list(latte.blocks()),
    )


def _loss(
    config: Config, data: Data, latte: Latte, name: str, engines: Engines, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    x0 = _given(config, data, latte, batch, generator)
    ids = batch["label"].cpu() if config.classes else None
    loss = flow.training_loss(
        lambda x, t: engines[name](x, t, ids, _starts(config, data, batch, generator), generator),
        x0,
        generator,
        config.time_mean,
        config.time_std,
        config.shift,
        config.conditioning,
    ).mean()
    return loss, {"loss": loss.detach()}


def _given(config: Config, data: Data, latte: Latte, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
    """What is to be generated, normalised, fp32: draws from the posteriors where a generator is given."""
    if data.made is None:
        return to_model(batch["video"])
    posterior = Posterior(*batch["latent"].float().unbind(1))
    drawn = config.posterior == "sample" and generator is not None
    return latte.normalise(posterior.sample(generator) if drawn else posterior.mode())


def _starts(config: Config, data: Data, batch: Batch, generator: torch.Generator) -> Tensor:
    """0 for a window at the start of its clip, whose first latent is of one frame. Pixels look the same anywhere: drawn."""
    if data.made:
        return batch["start"]
    count = len(batch["key"])
    return (torch.rand(count, generator=generator, device=generator.device) >= config.clip_starts).long()


def _sample(
    config: Config, vae: PVVAE | None, classes: Sequence[str], engines: Engines, generator: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """Some videos in a grid, always of the same seeds and classes."""
    latte = engines["generator"].module
    seeds = [config.seed + n for n in range(_SAMPLED)]
    ids = [n % len(classes) for n in range(_SAMPLED)] if classes else None
    chunks = sampling.generate_videos(latte, vae, config.frames, seeds, ids, config.settings())
    return {"generated": np.concatenate([sampling.grid(chunk) for chunk in chunks])}


def _tokens(latte: LatteConfig, batch: Batch) -> int:
    shape = batch["latent"].shape[-3:] if "latent" in batch else batch["video"].shape[-3:]
    return len(batch["key"]) * int(np.prod(shape)) // latte.patch**2


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """What each rank does: train from the latest checkpoint in `folder`, leave the last one there, and measure it."""
    torch.distributed.barrier()  # the first rank has pinned the inputs before
    inputs = pinned(inputs, folder)
    data = data_of(config, inputs)
    checked_network(config.features, config.frames, data.size())
    _train(config, inputs, data, folder)
    _evaluate(config, inputs, data, folder)


def _train(config: Config, inputs: Mapping[str, str], data: Data, folder: Path) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(config.seed)
    vae = decoder(data, inputs.get("vae", ""))
    each = config.batch // config.accumulate
    options = {"rank": rank, "world": world, "seed": config.seed, "workers": config.workers, "crop": "random"}
    loader = loader_of(config, inputs, data, "train", batch=each, **options)
    heldout = _heldout(config, inputs, data)
    if not heldout.samples:
        raise UserError("dataset: its val split has no clip for the evaluation; raise val_fraction")
    latte, taken = model_of(config, inputs, data, loader.classes)
    if rank == 0 and taken:
        print(taken, flush=True)
    latte.to(device())
    log = tracker.connect(folder) if rank == 0 else None
    made = replace(objective(config, data, latte, vae, loader.classes), heldout=heldout)
    train(made, loader, config, folder, log, launch.stop_requested)
    if log:
        log.close()


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Train from the latest checkpoint, log and register the model, evaluate it, make it champion.

    Raises:
        UserError: no usable sample; latents, autoencoder or windows that do not fit; a workspace for no checkpoints.
        Failure, Interrupted: of the loop.
    """
    folder = checkpoint.folder_of(config, output)
    first = os.environ.get("RANK", "0") == "0"
    with checkpoint.locked(folder) if first else nullcontext():
        if first:
            pinned(inputs, folder)
        return _publish(config, inputs, folder) if launch.run(__name__, config, inputs, folder) else {}


def _publish(config: Config, inputs: Mapping[str, str], folder: Path) -> dict[str, Any]:
    inputs = pinned(inputs, folder)
    data = data_of(config, inputs)
    loader = loader_of(config, inputs, data, "train", batch=1)
    weights = checkpoint.trained(folder, config)
    lineage = latent_data.lineage_of(folder)
    facts = {
        "lineage": lineage,
        "vae": lineage["inputs"]["vae"] | {"encoder": data.made.encoder["digest"]} if data.made else None,
        "latents": lineage["inputs"]["latents"] if data.made else None,
        "classes": loader.classes,
        "window": {"frames": config.frames, "stride": config.stride, "size": list(data.size()), "fps": data.fps},
        "sampling": vars(config.settings()),
    }
    log = tracker.connect(folder, system_metrics=False)
    with TemporaryDirectory() as scratch:
        made = Path(scratch) / "model"
        model, _ = model_of(config, inputs, data, loader.classes)
        registry.save(made, "latte", model.config.model_dump(mode="json"), weights, facts)
        uri = registry.register(made, config.name, log.run_id)
        figures = published(folder, "generated.json", log)
    log.close()
    if config.promote:
        registry.promote(uri)
    counts = {"train_clips": loader.samples, "train_clips_too_short": loader.samples_short}
    counts |= {"train_clips_without_latents": loader.samples_without_latent}
    return {"uri": uri, "metrics": figures | {name: float(value) for name, value in counts.items()}}


def _evaluate(config: Config, inputs: Mapping[str, str], data: Data, folder: Path) -> None:
    classes = loader_of(config, inputs, data, "train", batch=1).classes
    latte, _ = model_of(config, inputs, data, classes)
    latte.load_state_dict(checkpoint.trained(folder, config))
    vae = decoder(data, inputs.get("vae", ""))
    _measured(config, inputs, data, latte.to(device()).eval(), vae, classes, emptied(folder))


def _measured(
    config: Config,
    inputs: Mapping[str, str],
    data: Data,
    latte: Latte,
    vae: PVVAE | None,
    classes: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Measure what has been trained, each rank its share."""
    network = checked_network(config.features, config.frames, data.size())
    if network is None and place()[0] == 0:
        print("evaluate: no Fréchet distance, since `features` names no feature network", flush=True)
    pixels = {"columns": ("video",), "size": data.size(), "batch": 1, "last": "pad"}
    real = _loader(config, inputs, "val", shuffle=False, epochs=1, **pixels)
    return evaluate(
        latte,
        vae,
        _held(config, inputs, data, latte),
        folder,
        Videos(config.frames, data.fps, config.eval_videos, config.seed, config.settings(), classes, config.eval_batch),
        _trivial(config, inputs, data),
        latents=config.eval_latents and data.made is not None,
        network=network,
        real=_videos(real, min(config.eval_videos, real.samples)),
        train=_videos(_loader(config, inputs, "train", seed=config.seed, **pixels), config.eval_videos),
        probed=_probed(config, inputs, data, latte) if config.eval_probes else None,
    )


def _held(config: Config, inputs: Mapping[str, str], data: Data, latte: Latte) -> Iterator[Held]:
    for later in (False, True):
        heldout = _heldout(config, inputs, data, later)
        count = min(config.eval_clips, heldout.samples)
        for number, batch in batches(heldout, count, "evaluate later windows" if later else "evaluate"):
            # a clip as long as a window has no later one
            if bool(batch["start"]) is later:
                x0 = _given(config, data, latte, on_device(batch))
                yield Held(number, x0, batch.get("label"), int(batch["start"]))


def _videos(loader: Loader, count: int) -> Iterator[Tensor]:
    for _, batch in batches(loader, count, "compare"):
        yield to_model(batch["video"].to(device()))


def _trivial(config: Config, inputs: Mapping[str, str], data: Data) -> tuple[trivial.Still, trivial.Gaussian]:
    """Of latents, which are normalised, or of some training windows' pixels."""
    if data.made:
        return trivial.unit(data.channels, torch.zeros((), device=device()))
    windows = loader_of(config, inputs, data, "train", batch=1, seed=config.seed).at(range(_WINDOWS))
    total = merge(moments(to_model(batch["video"]).transpose(0, 1).flatten(1).T) for batch in windows)
    std = total.covariance().diagonal().sqrt()
    return trivial.Still(total.mean.float()), trivial.Gaussian(total.mean.float(), std.float())


def _probed(config: Config, inputs: Mapping[str, str], data: Data, latte: Latte) -> tuple[Pairs, Pairs]:
    """Hidden states of half the blocks [paper: 14 of 28] and videos, of training clips and as many held-out ones."""
    layer = max(1, latte.config.depth // 2)

    def pairs(split: str) -> Iterator[tuple[Tensor, Tensor]]:
        columns = ("video", *((data.made.column,) if data.made else ()))
        order = {"seed": config.seed} if split == "train" else {"shuffle": False, "last": "pad"}
        loader = _loader(config, inputs, split, columns=columns, size=data.size(), batch=1, **order)
        for number, batch in batches(loader, min(config.eval_probes, loader.samples), "probe"):
            there = on_device(batch)
            x0 = _given(config, data, latte, there)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed + number)).to(x0.device)
            t = x0.new_full((1,), _PROBED_AT)
            hidden = latte.features(flow.interpolate(x0, noise, t), t, layer, None, there["start"])
            yield hidden.float(), to_model(there["video"])

    return pairs("train"), pairs("val")


def loader_of(config: Config, inputs: Mapping[str, str], data: Data, split: str, **options: Any) -> Loader:
    """Windows of the column that this trains on, with labels where classes are learned, and nothing else."""
    columns = (data.made.column if data.made else "video", *(("label",) if config.classes else ()))
    settings: dict[str, Any] = {"columns": columns, "size": config.size or (64, 64)}
    if data.made and split == "train":
        settings["clip_starts"] = config.clip_starts
    return _loader(config, inputs, split, **settings | options)


def _heldout(config: Config, inputs: Mapping[str, str], data: Data, later: bool = False) -> Loader:
    """Held-out clips one by one, always the same window of each: the first one, or one that starts later, if there is any."""
    options = {"clip_starts": 0.0, "seed": config.seed} if later else {}
    return loader_of(config, inputs, data, "val", batch=1, last="pad", shuffle=False, epochs=1, **options)


def _loader(config: Config, inputs: Mapping[str, str], split: str, **options: Any) -> Loader:
    cache = Cache(config.cache.folder, config.cache.max_bytes) if config.cache else None
    settings = {"view": inputs.get("view"), "frames": config.frames, "stride": config.stride, "cache": cache}
    return Loader(inputs["dataset"], split, **settings | options)
