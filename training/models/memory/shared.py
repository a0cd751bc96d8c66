"""What `pretrain_memory` and `finetune_memory_prior` share: their settings and data, the model, and its way to the registry."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor

from longtake.datasets.cache import Cache
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import Latents
from longtake.datasets.loader import Loader, to_pixels
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.stage import DatasetInput, Input, Measuring, ModelInput, StageConfig, ViewInput
from longtake.training import checkpoint, launch, registry, tracker
from longtake.training import data as latent_data
from longtake.training.config import ModelName, TrainConfig
from longtake.training.engines import device, lora
from longtake.training.evaluation import emptied, published
from longtake.training.loop import Batch, Objective, train
from longtake.training.models.memory.dit import MemoryDiT, MemoryDiTConfig, config_from_preset
from longtake.training.models.memory.encoder import parse_rate
from longtake.training.models.memory.history import Remembering, lengths_of
from longtake.training.models.pv_vae.model import PVVAE

_FROM_DATA = (
    "channels",
    "classes",
    "shape",
    "history",
    "history_noise",
)  # fields of MemoryDiTConfig that `model` must not have
_PRESET = {"preset": "memory_dit_xl"}


class MemoryConfig(TrainConfig):
    """What both stages are told. "Assumption" marks what the paper (arXiv 2512.23851) does not say."""

    dataset: DatasetInput
    latents: Annotated[str, Input("latents")]
    low_latents: Annotated[str, Input("latents")] | None = (
        None  # with the `shrink` of the rates, for the low-res branch
    )
    view: ViewInput | None = None
    vae: ModelInput | None = None  # makes videos of latents; None is the model that has encoded them
    base: ModelInput | None = None  # the memory_dit to go on from; None begins with random weights
    name: ModelName = "memory-dit"
    model: dict[str, Any] | None = None  # a preset with fields to change, or with a base, fields alone; None: as it is
    classes: bool = False  # learn the dataset's labels
    frames: int = Field(21, ge=1)  # of a segment, 1 + 4n [assumption]
    history_seconds: float = Field(20.0, gt=0)  # before the segment [paper: 5 to over 20]
    history_least: float | None = Field(
        None, ge=0
    )  # s of it that a stream of latents must have room for; None is `history_seconds`
    posterior: Literal["sample", "mean"] = "sample"  # what of each latent is learned, drawn anew each step [assumption]
    time_mean: float = 0.2  # of the flow's logit-normal times: that of the masks [assumption]
    time_std: float = Field(1.0, gt=0)  # likewise
    shift: float = Field(1.0, gt=0)  # of times towards noise, in training and sampling; 1 is none [assumption]
    lr: float = Field(1e-4, gt=0)  # [assumption]
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    sample_steps: int = Field(50, ge=1)  # Euler steps [assumption]
    # held-out clips that are measured, at most, over all processes
    eval_clips: Annotated[int, Measuring()] = Field(64, ge=1)

    @field_validator("model")
    @classmethod
    def _without_data(cls, model: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := [name for name in _FROM_DATA if name in (model or {})]:
            raise ValueError(f"{taken[0]} follows from the stage's other settings; leave it out")
        return model

    @model_validator(mode="after")
    def _known(self) -> "MemoryConfig":
        model = self.model or {}
        if self.base is None:
            if self.lora is not None:
                raise ValueError("lora: without a base all else would stay random; name one, or leave it out")
            self.dit()
        elif "preset" in model:
            raise ValueError("model: preset: the base has its own; leave it out, or the base")
        elif unknown := model.keys() - MemoryDiTConfig.model_fields.keys():
            raise ValueError(f"model: unknown {min(unknown)}; there are {', '.join(MemoryDiTConfig.model_fields)}")
        if self.history_least is not None and self.history_least > self.history_seconds:
            raise ValueError(f"history_least: {self.history_least:g} s are more than history_seconds; lower it")
        return self

    @property
    def noise(self) -> float:
        """The most that its history has."""
        return 0.0

    @property
    def reaches(self) -> tuple[tuple[int, float], ...]:
        """From which step on histories have how many seconds at most."""
        return ((0, self.history_seconds),)

    @property
    def least_seconds(self) -> float:
        return self.history_seconds if self.history_least is None else self.history_least

    def histories(self, dit: MemoryDiTConfig, least: int) -> Lengths:
        """What a segment is given of its stream; `least` steps at least must have room in that."""
        return lengths_of(dit, 0.0, least)

    def dit(self, **known: Any) -> MemoryDiTConfig:
        """Of the model without a base."""
        return config_from_preset(**_PRESET | (self.model or {}) | known)


def check(config: MemoryConfig, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse latents of another dataset or encoder, or at another scale, and windows that they do not have."""
    latent_data.check_recipe(config, inputs, ("latents", "low_latents"), config.frames)
    made: Any = inputs.get("latents")
    low: Any = inputs.get("low_latents")
    if made is not None and low is not None:
        if made.encoder != low.encoder:
            raise ValueError(f"low_latents: are of another encoder, {low.encoder}, than latents, {made.encoder}")
        if made.join_seconds != low.join_seconds:
            raise ValueError(
                f"low_latents: have join_seconds {low.join_seconds:g}, latents {made.join_seconds:g}; set both alike"
            )
    clip = getattr(inputs.get("dataset"), "clip", None)
    if made is not None and clip is not None:
        longest, needed = max(made.join_seconds, clip.max_seconds), config.least_seconds + config.frames / clip.fps
        if longest < needed:
            raise ValueError(
                f"latents: streams of at most {longest:g} s have no room for {config.least_seconds:g} s of history and a"
                f" segment; set join_seconds: {math.ceil(3 * needed)} in their stage, or lower history_seconds"
            )
    if config.base is None and (low is not None or config.low_latents is None):
        try:
            _check_low(config.dit(), None if low is None else low.shrink)
        except UserError as e:
            raise ValueError(str(e)) from e


def _check_low(dit: MemoryDiTConfig, shrink: tuple[int, int] | None) -> None:
    """Refuse a low-res column that the rates do not need, or the lack of one; `shrink` is the column's, None without."""
    if dit.shrink == shrink:
        return
    if dit.shrink is None:
        raise UserError("low_latents: this memory has no low-res branch that reads them; leave them out")
    needs = f"a `cache_latents` stage with shrink: [{dit.shrink[0]}, {dit.shrink[1]}]"
    if shrink is None:
        raise UserError(f"low_latents: rates {', '.join(dit.rates)} need {needs}; name it, or set branches: high")
    raise UserError(
        f"low_latents: are shrunk by {shrink[0]}x{shrink[1]}, rates {', '.join(dit.rates)} need {needs}; name that"
    )


class Data(NamedTuple):
    """The records of the columns, the shape (T, H, W) of a segment in latents, frames a second, steps of history."""

    made: Latents
    low: Latents | None
    shape: tuple[int, int, int]
    fps: float
    history: int

    def size(self) -> tuple[int, int]:
        """Pixels of a video, height and width."""
        return self.shape[1] * self.made.stride, self.shape[2] * self.made.stride

    def steps_in(self, seconds: float) -> int:
        """As the loader counts them."""
        return round(seconds * self.fps / self.made.factor)

    def reach(self, config: MemoryConfig, step: int) -> int:
        """How many steps of history a training step is given, at most."""
        seconds = [s for begins, s in config.reaches if begins <= step]
        return max(1, min(self.history, self.steps_in(seconds[-1])))

    def histories(self, config: MemoryConfig, dit: MemoryDiTConfig) -> Lengths:
        """What each batch of the training draws from."""
        lengths = config.histories(dit, self.steps_in(config.least_seconds))
        reaches = tuple((begins * config.accumulate, self.reach(config, begins)) for begins, _ in config.reaches)
        return replace(lengths, reaches=reaches if min(reach for _, reach in reaches) < lengths.most else ())


def data_of(config: MemoryConfig, inputs: Mapping[str, str]) -> Data:
    """What there is to learn, checked.

    Raises:
        UserError: latents of another dataset, of what it was before, or the two of different encoders; no clip is as
            long as a segment.
        Failure: damaged files.
    """
    dataset = inputs["dataset"]
    fps = latent_data.frame_rate(dataset, config.frames)
    made = latent_data.column_of(dataset, inputs["latents"], config.frames)
    low = None
    if "low_latents" in inputs:
        low = latent_data.column_of(dataset, inputs["low_latents"], config.frames, "low_latents")
        if low.encoder["digest"] != made.encoder["digest"]:
            raise UserError(
                f"low_latents: {inputs['low_latents']} are of another encoder than latents, {low.encoder['uri']};"
                f" encode them by {made.encoder['uri']}"
            )
        if low.size != made.size:
            raise UserError(
                f"low_latents: {inputs['low_latents']} were made with size {low.size}, latents with {made.size}"
            )
        if low.join_seconds != made.join_seconds:
            raise UserError(
                f"low_latents: {inputs['low_latents']} were made with join_seconds {low.join_seconds:g}, latents with"
                f" {made.join_seconds:g}"
            )
    steps = 1 + (config.frames - 1) // made.factor
    shape = (steps, *latent_data.commonest_size(dataset, made))
    return Data(made, low, shape, fps, round(config.history_seconds * fps / made.factor))


def loader_of(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    data: Data,
    dit: MemoryDiTConfig,
    split: str,
    histories: Lengths | None = None,
    **options: Any,
) -> Loader:
    """Segments with the history that their streams have, of the columns that this learns, and labels where it does.

    `histories` are by default the config's.
    """
    # one column where the low-res branch reads the same
    columns = list(dict.fromkeys(made.column for made in (data.made, data.low) if made))
    histories = histories or data.histories(config, dit)
    columns += ["label"] if config.classes else []
    return _loader(config, inputs, split, columns=columns, histories=histories, **options)


def heldout_of(config: MemoryConfig, setup: "Setup", begin: int | None = None, least: int = 0) -> Loader:
    """A segment of each held-out stream, as late as generation comes to; or at step `begin`, of those that have it.

    With `least` of streams alone that have room for so many steps before a segment, wherever it begins.
    """
    histories = setup.data.histories(config, setup.model.config)
    if begin is not None:
        histories = replace(histories, some=(begin,), least=max(begin, least))
    options: dict[str, Any] = {"batch": 1, "last": "pad", "shuffle": False, "epochs": 1}
    return loader_of(config, setup.inputs, setup.data, setup.model.config, "val", histories, **options)


def videos_of(config: MemoryConfig, inputs: Mapping[str, str], data: Data) -> Loader:
    """The pixels of held-out segments and what came before them."""
    columns = ("video", *(("label",) if config.classes else ()))
    options = {"columns": columns, "size": data.size(), "batch": 1, "last": "pad", "shuffle": False, "epochs": 1}
    history = {"history_seconds": config.history_seconds, "history_least": config.least_seconds}
    return _loader(config, inputs, "val", **options, **history)


def _loader(config: MemoryConfig, inputs: Mapping[str, str], split: str, **options: Any) -> Loader:
    cache = Cache(config.cache.folder, config.cache.max_bytes) if config.cache else None
    return Loader(inputs["dataset"], split, view=inputs.get("view"), frames=config.frames, cache=cache, **options)


def begin(config: MemoryConfig, inputs: Mapping[str, str], data: Data, classes: int) -> Remembering:
    """The model before its first step, which normalises what it learns: the base's weights, or random ones.

    Raises:
        UserError: a memory that this history, or these latents, do not have; a base that does not fit.
        Failure: the latents do not vary.
    """
    base, facts = registry.load_with_facts(inputs["base"]) if "base" in inputs else (None, {})
    if base is not None and not isinstance(base, MemoryDiT):
        raise UserError(
            f"base: {inputs['base']} is a {type(base).__name__}, not a MemoryDiT; name a `pretrain_memory` model"
        )
    known = {"channels": data.made.channels, "classes": classes, "history_noise": config.noise}
    try:
        given = base.config.model_dump() | (config.model or {}) | known if base else config.dit(**known).model_dump()
        _check_history(given, data)
        dit = MemoryDiTConfig(**given | {"shape": data.shape, "history": data.history})
    except ValidationError as e:
        raise UserError(f"model: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e
    _check_low(dit, data.low.shrink if data.low else None)
    if config.precision == "bf16" and device().type == "cpu" and _strided(dit):
        raise UserError(
            "precision: bf16: torch's strided convolutions of small frames crash on a CPU; train this memory in fp32"
        )
    model = Remembering(dit)
    if base is not None:
        if (facts.get("vae") or {}).get("encoder") != data.made.encoder["digest"]:
            raise UserError(
                f"base: {inputs['base']} has learned latents of another autoencoder than {inputs['latents']}; encode by that one"
            )
        _take(model, base, inputs["base"])
    try:
        low = latent_data.statistics(data.low, "mean") if data.low else (None, None)
        if base is None:
            model.set_statistics(*latent_data.statistics(data.made, config.posterior), *low)
        elif base.config.shrink is None and data.low:
            model.set_statistics(model.latent_mean.clone(), model.latent_std.clone(), *low)
    except ValueError as e:
        raise Failure(f"latents: {data.made.column}: {e}; train the autoencoder for longer") from e
    return model


def _strided(dit: MemoryDiTConfig) -> bool:
    """Whether the memory has convolutions that stride in space."""
    sides = [side for rate in map(parse_rate, dit.rates) for side in rate[:2]]
    return dit.memory == "encoder" and dit.branches != "low" and dit.patch * max(sides) > 1


def _check_history(dit: Mapping[str, Any], data: Data) -> None:
    """Refuse a model that the history, or the latents, are too small for."""
    if data.history < dit["window"]:
        raise UserError(
            f"history_seconds: are {data.history} steps, fewer than the {dit['window']} of the window beside the memory; raise it"
        )
    for rate in dit["rates"] if dit["memory"] in ("encoder", "patchify") else ():
        height, width, time = parse_rate(rate)
        if time > data.history:
            raise UserError(
                f"rates: {rate}: a token stands for {time} steps, the history has {data.history}; raise history_seconds"
            )
        rows, columns = (side // dit["patch"] for side in data.shape[1:])
        if height > rows or width > columns:
            raise UserError(f"rates: {rate}: the latents make a grid of {rows}x{columns} tokens; choose a lower rate")


def _take(model: MemoryDiT, base: MemoryDiT, uri: str) -> None:
    """Give a model the weights of its base. What the base lacks of the memory, or of attention to it, begins anew."""
    ours, theirs = model.state_dict(), base.state_dict()
    new = sorted(ours.keys() - theirs.keys())
    strange = [name for name in new if not name.startswith("memory.") and ".cross." not in name]
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
        # of a base from before it was told which latents are first, or that has learned nothing of them
        new.append("first.shift")
    if new:
        lora.let_learn(model, new)
        print(f"base: {len(new)} tensors are not in {uri} and begin anew, such as {new[0]}", flush=True)


def told(dit: MemoryDiTConfig, data: Data) -> str:
    """How many tokens stand for how much history."""
    height, width, steps = *data.shape[1:], data.history
    count, seconds = dit.tokens((steps // dit.group * dit.group, height, width)), steps * data.made.factor / data.fps
    how = ", ".join(dit.rates) if dit.memory in ("encoder", "patchify") else dit.memory
    return (
        f"memory ({how}): {seconds:.4g} s of history, {steps} steps of {height}x{width} latents, are {count} tokens,"
        f" {count / seconds:.4g} a second"
    )


def expected(config: MemoryConfig, data: Data, loader: Loader) -> str:
    """How much history a sample has on the average, and which clips' streams are too short for it."""
    parts = list[str]()
    for begins, most in ((begins, data.reach(config, begins)) for begins, _ in config.reaches):
        mean = loader.history_mean(most)
        part = f"{mean:.1f} steps on the average, {mean * data.made.factor / data.fps:.3g} s, of {most} at most"
        parts.append(f"from step {begins} on {part}" if len(config.reaches) > 1 else part)
    line = f"history: {'; '.join(parts)}"
    if loader.samples_without_history:
        line += f"; {loader.samples_without_history} clips are of streams too short for history_least, and left out"
    if loader.samples_of_mixed_streams:
        line += (
            f"; {loader.samples_of_mixed_streams} clips are left out beside clips that the view leaves out: encode latents"
            " with this view"
        )
    return line


def on_device(batch: Batch) -> Batch:
    return {name: value.to(device()) if isinstance(value, Tensor) else value for name, value in batch.items()}


def above_each_other(vae: PVVAE, model: MemoryDiT, before: Tensor, *steps: Tensor) -> np.ndarray[Any, Any]:
    """Latents `(1, C, T, H, W)`, normalised, as one video `(t, height, width, 3)` uint8.

    Each is decoded as what comes after `before`, which begins a video, or is long enough that the decoder does not mind.
    """
    videos = []
    for some in steps:
        chunks = list(vae.decode_stream([model.denormalise(torch.cat([before, some], dim=2))], steps=1))
        videos.append(torch.cat([to_pixels(chunk) for chunk in chunks[before.shape[2] :]], dim=2))
    return torch.cat(videos, dim=3)[0].permute(1, 2, 3, 0).cpu().numpy()


class Setup(NamedTuple):
    """All that a stage works with; `inputs` are pinned, the model has its weights from before the first step."""

    inputs: Mapping[str, str]
    data: Data
    classes: Sequence[str]
    model: Remembering
    vae: PVVAE


def prepared(config: MemoryConfig, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Read, check and load all of it. Raises as `data_of` and `begin`."""
    inputs = latent_data.pinned(inputs, folder)
    data = data_of(config, inputs)
    vae = latent_data.decoder_of(data.made, inputs["vae"])
    classes = _loader(config, inputs, "train", columns=("label",), batch=1).classes if config.classes else []
    return Setup(inputs, data, classes, begin(config, inputs, data, len(classes)).to(device()), vae)


def work(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    folder: Path,
    objective: Callable[[Setup], Objective],
    evaluate: Callable[[Setup, Path], object],
) -> None:
    """What each rank does: train from the latest checkpoint in `folder`, leave the last one there, and measure it.

    Args:
        evaluate: measures a trained model on this rank's share of held-out clips, and leaves what is found in a folder.
    """
    _train(config, inputs, folder, objective)
    found = emptied(folder)
    setup = prepared(config, inputs, folder)
    setup.model.load_state_dict(checkpoint.trained(folder, config))
    setup.model.eval()
    evaluate(setup, found)


def _train(
    config: MemoryConfig, inputs: Mapping[str, str], folder: Path, objective: Callable[[Setup], Objective]
) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(config.seed)
    torch.distributed.barrier()  # the first rank has pinned the inputs before
    setup = prepared(config, inputs, folder)
    options: dict[str, Any] = {"rank": rank, "world": world, "seed": config.seed, "workers": config.workers}
    batch, dit = config.batch // config.accumulate, setup.model.config
    loader = loader_of(config, setup.inputs, setup.data, dit, "train", batch=batch, **options)
    # else their lack would be seen at the end
    heldout = heldout_of(config, setup)
    videos_of(config, setup.inputs, setup.data)
    log = tracker.connect(folder) if rank == 0 else None
    if rank == 0:
        print(told(dit, setup.data), expected(config, setup.data, loader), sep="\n", flush=True)
    if log:
        log.log(0, {"history_steps_expected": loader.history_mean(setup.data.reach(config, 0))})
    made = replace(objective(setup), heldout=heldout)
    train(made, loader, config, folder, log, launch.stop_requested)
    if log:
        log.close()


def run(
    module: str,
    config: MemoryConfig,
    inputs: Mapping[str, str],
    output: str,
    facts: Mapping[str, Any],
    summary: str,
) -> dict[str, Any]:
    """Train from the latest checkpoint, measure, log and register the model, make it champion.

    Args:
        module: of the stage, whose `work` each rank does.
        facts: those of `longtake.training.models.memory.history` that only the stage knows.
        summary: the file, among what is found on held-out clips, that tells its figures.

    Raises:
        UserError: no usable sample; latents, models or histories that do not fit; a workspace for no checkpoints.
        Failure, Interrupted: of the loop.
    """
    folder = checkpoint.folder_of(config, output)
    first = os.environ.get("RANK", "0") == "0"
    with checkpoint.locked(folder) if first else nullcontext():
        if first:
            latent_data.pinned(inputs, folder)
        if not launch.run(module, config, inputs, folder):
            return {}
        return _publish(config, inputs, folder, facts, summary)


def _publish(
    config: MemoryConfig,
    inputs: Mapping[str, str],
    folder: Path,
    facts: Mapping[str, Any],
    summary: str,
) -> dict[str, Any]:
    weights = checkpoint.trained(folder, config)
    setup = prepared(config, inputs, folder)
    data, dit = setup.data, setup.model.config
    lineage = latent_data.lineage_of(folder)
    record = {
        "lineage": lineage,
        "rates": list(dit.rates) if dit.memory in ("encoder", "patchify") else [],
        "vae": lineage["inputs"]["vae"] | {"encoder": data.made.encoder["digest"]},
        "latents": lineage["inputs"]["latents"],
        "low_latents": lineage["inputs"]["low_latents"] | {"shrink": list(data.low.shrink)} if data.low else None,
        "classes": list(setup.classes),
        "window": {
            "frames": config.frames,
            "steps": data.shape[0],
            "factor": data.made.factor,
            "fps": data.fps,
            "size": list(data.size()),
        },
        "history": {"seconds": config.history_seconds, "steps": dit.history},
        **facts,
    }
    log = tracker.connect(folder, system_metrics=False)
    with TemporaryDirectory() as scratch:
        made = Path(scratch) / "model"
        registry.save(made, "memory_dit", dit.model_dump(mode="json"), weights, record)
        uri = registry.register(made, config.name, log.run_id)
        metrics = published(folder, summary, log)
    log.close()
    if config.promote:
        registry.promote(uri)
    loader = loader_of(config, setup.inputs, data, dit, "train", batch=1)
    metrics |= {
        "train_clips": float(loader.samples),
        "train_clips_too_short": float(loader.samples_short),
        "train_clips_without_latents": float(loader.samples_without_latent),
        "train_clips_without_history": float(loader.samples_without_history),
        "history_steps_expected": loader.history_mean(),
    }
    return {"uri": uri, "metrics": metrics}
