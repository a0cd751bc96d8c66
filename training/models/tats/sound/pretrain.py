"""`pretrain_sound_vqgan`: the VQGAN of sound of TATS (arXiv 2204.03638), which makes tokens of what frames sound like.

The reconstruction of the pictures of sound is held by absolute errors alone. The paper's code has a perceptual loss too, by a
network of photographs; neither has discriminators.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from longtake.datasets import audio, index, storage
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, to_pixels
from longtake.datasets.stage import DatasetInput, Measuring, StageConfig, ViewInput
from longtake.training import data, sizes, stage
from longtake.training.config import ModelName, TrainConfig
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.fit import Largest, Source
from longtake.training.metrics.reconstruction import SSIM_REACH
from longtake.training.models.common.codec import nearest_lengths
from longtake.training.models.tats.sound.vqgan import SoundVQGAN, SoundVQGANConfig, config_from_preset
from longtake.training.models.tats.spectrogram import Spectrogram, loudness_range, magnitudes
from longtake.training.models.tats.vqgan_evaluate import evaluate as measure
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

VERSION = 1
PRODUCES = "model"
MODEL = "sound_vqgan"
SUMMARY = "reconstructed.json"

_RANGE = "range.json"  # in the folder of checkpoints
_PRESET = {"preset": "sound_vqgan_paper"}
_FROM_DATA = ("rate", "low", "high")  # fields of Spectrogram
_WARM_STEPS = {"sound_vqgan_tiny": 200}  # by preset, as for videos


class Config(TrainConfig):
    """Train the VQGAN of sound of TATS on the clips of a dataset that have sound, and register it.

    Defaults are those of the paper's code, whose rate is for the whole batch.

    dataset       to train on, with a column of sound
    view          which clips to use; null uses all
    spectrogram   rows, columns, scale, highest or window of Spectrogram, to change: `{scale: linear}`
    model         a preset with fields of SoundVQGANConfig to change: `{preset: sound_vqgan_paper}`
    range_clips   training clips whose least and greatest magnitudes become -1 and 1 [assumption: 256; code: all]
    frames        of a window, in multiples of the model's temporal stride [paper: 16]
    stride        of the frames; each has the sound up to the next one [paper: 1]
    warm_steps    steps without the codebook, which is then seeded by the latents [paper: 0; sound_vqgan_tiny: 200]
    lambda_l1     weight of the absolute error of pictures, in units of the range 0..1 [paper's code: 4]
    eval_clips    held-out clips, at most
    """

    kind: Literal["pretrain_sound_vqgan"]
    dataset: DatasetInput
    view: ViewInput | None = None
    name: ModelName = "sound-vqgan"
    spectrogram: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=lambda: dict(_PRESET))
    range_clips: int = Field(256, ge=1)
    frames: int = Field(16, ge=1)
    stride: int = Field(1, ge=1)
    warm_steps: int = Field(0, ge=0)
    lambda_l1: float = Field(4.0, gt=0)
    steps: int = Field(30_000, ge=1)
    batch: int = Field(96, ge=1)
    lr: float = Field(9e-5, gt=0)
    warmup_steps: int | None = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0)
    ema_half_lives: tuple[float, ...] = ()
    eval_clips: Annotated[int, Measuring()] = Field(512, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_preset(cls, fields: Any) -> Any:
        model = fields.get("model") if isinstance(fields, dict) else None
        preset = model.get("preset") if isinstance(model, dict) else None
        return {"warm_steps": _WARM_STEPS[preset]} | fields if preset in _WARM_STEPS else fields

    @field_validator("spectrogram")
    @classmethod
    def _without_data(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if derived := [name for name in _FROM_DATA if name in fields]:
            raise ValueError(f"{derived[0]} follows from the dataset's sound; leave it out")
        Spectrogram(**fields | {"rate": 1})
        return fields

    @field_validator("model")
    @classmethod
    def _valid_model(cls, model: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "spectrogram" in model:
            raise ValueError("spectrogram is a setting of the stage; write it beside `model`")
        if "spectrogram" in info.data:
            config_from_preset(**_PRESET | model, spectrogram=Spectrogram(**info.data["spectrogram"] | {"rate": 1}))
        return model

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        factor = self.vqgan({"rate": 1}).temporal_stride
        low, high = nearest_lengths(self.frames, factor, factor)
        if self.frames != low:
            raise ValueError(f"frames {self.frames}: the model needs {factor}n frames, such as {low} or {high}")
        picture = self.vqgan({"rate": 1}).spectrogram
        if min(picture.rows, self.frames * picture.columns) <= SSIM_REACH:
            raise ValueError(
                f"spectrogram: {picture.rows} rows, and {picture.columns} columns in each of {self.frames} frames, are too few"
                f" for SSIM; give both sides of a window {SSIM_REACH + 1} or more"
            )
        if self.warm_steps >= self.steps:
            raise ValueError(
                f"warm_steps {self.warm_steps}: leave none of {self.steps} steps to the codebook; lower them"
            )
        if self.lora is not None:
            raise ValueError("lora: all else would stay random; leave it out")
        return self

    def vqgan(self, from_data: Mapping[str, Any]) -> SoundVQGANConfig:
        """The config of the model, with what the dataset's sound says."""
        return config_from_preset(**_PRESET | self.model, spectrogram=Spectrogram(**self.spectrogram | dict(from_data)))


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a window that does not fit into the clips of a `shard` stage, and one that keeps no sound."""
    data.check_recipe(config, inputs, (), config.frames * config.stride)
    shard: Any = inputs.get("dataset")
    if getattr(shard, "kind", None) == "shard" and shard.audio is None:
        raise ValueError("dataset: its stage keeps no sound (audio: null); let it, or add a `cache_audio` stage")


class Setup(NamedTuple):
    """All that the stage works with; `fps` is that of the windows' frames."""

    inputs: Mapping[str, str]
    model: SoundVQGAN
    frames: int
    fps: float

    def pictures(self, batch: Mapping[str, Any]) -> Tensor:
        """The pictures of a batch's sound, `(B, 1, frames, rows, columns)`."""
        sound = batch["audio"].to(next(self.model.parameters()).device)
        frames = round(sound.shape[-1] / self.model.config.spectrogram.rate * self.fps)
        return self.model.pictures(sound, frames)


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """The model with random weights, for the loudness of the dataset's sound.

    Raises:
        UserError: no clip of the train split has sound.
        Failure: damaged files.
    """
    fps = data.frame_rate(inputs["dataset"], config.frames * config.stride) / config.stride
    clips, rate = _loader(config, inputs, "train", **HELDOUT), _rate(inputs["dataset"])
    low, high = _range(config, clips, rate, folder)
    model = SoundVQGAN(config.vqgan({"rate": rate, "low": low, "high": high}))
    return Setup(inputs, model.to(device()), config.frames, fps)


def _range(config: Config, clips: Loader, rate: int, folder: Path) -> tuple[float, float]:
    """The least and the greatest magnitude of the first clips, found once, by the first rank, and kept: datasets grow."""
    path, distributed = folder / _RANGE, torch.distributed.is_initialized()
    if not path.exists() and (not distributed or torch.distributed.get_rank() == 0):
        plain = config.vqgan({"rate": rate}).spectrogram
        chosen = islice(clips, config.range_clips)
        found = loudness_range(magnitudes(batch["audio"].mean(1), config.frames, plain) for batch in chosen)
        storage.write(str(path), storage.canonical_json(found))
    if distributed:
        torch.distributed.barrier()
    low, high = json.loads(path.read_bytes())
    return low, high


def _rate(dataset: str) -> int:
    """Samples a second of the sound of the train split, in which some clip has sound."""
    shard = next(iter(index.read_shards(dataset, "train", audio.COLUMN)))
    return int(shard.table["rate"][0].as_py())


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's batches of random windows."""
    return _loader(config, setup.inputs, "train", **data.share_of(config, rank, world))


def _loader(config: Config, inputs: Mapping[str, str], split: str, more: int = 0, **options: Any) -> Loader:
    """The sound of whole windows, which lasts until the frame that would follow, and of `more` frames."""
    window = {"columns": ("audio",), "heard": True, "frames": (config.frames + more) * config.stride, "stride": 1}
    return data.loader(config, inputs, split, **window | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The absolute error of pictures.

    Raises:
        UserError: no held-out clip has sound.
    """
    heldout = _loader(config, setup.inputs, "val", **HELDOUT)
    if not heldout.samples:
        raise UserError("dataset: its val split has no clip for the evaluation; raise val_fraction")
    return Objective(
        {"model": setup.model},
        partial(_loss, config, setup),
        sample=partial(_sample, setup, heldout),
        fps=6,
        tokens=partial(_tokens, setup),
        blocks=list(setup.model.blocks()),
        heldout=heldout,
    )


def _loss(config: Config, setup: Setup, turn: Turn) -> tuple[Tensor, Terms]:
    """The loss, and its terms."""
    pictures = setup.pictures(turn.batch)
    made, _, commitment, usage = turn.engines[turn.name](pictures, quantise=turn.step >= config.warm_steps)
    # pictures in [-1, 1] differ by twice as much as those in 0..1
    terms = {"l1": (made.float() - pictures).abs().mean() / 2, "commitment": commitment}
    loss = config.lambda_l1 * terms["l1"] + setup.model.config.commitment * commitment
    terms |= {"loss": loss, "usage": usage.share, "perplexity": usage.perplexity}
    return loss, {name: value.detach() for name, value in terms.items()}


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: the sound of windows, with any loudness, which decides no size."""
    dataset = inputs["dataset"]
    fps, (rate, channels) = sizes.frame_rate(dataset) / config.stride, _sound_of(dataset)
    setup = Setup({}, SoundVQGAN(config.vqgan({"rate": rate})), config.frames, fps)
    samples = round(config.frames * rate / fps)
    batch: Batch = {"audio": torch.zeros(count, channels, samples), "key": [""] * count}
    return Largest(Objective({"model": setup.model}, partial(_loss, config, setup)), batch)


def _sound_of(dataset: Source) -> tuple[int, int]:
    """Samples a second, and channels, of a dataset's sound. Raises UserError where a stage must run first."""
    if sound := getattr(dataset.config, "audio", None):
        return sound.rate, sound.channels
    if not storage.exists(storage.join(dataset.uri, "dataset.json")):
        raise UserError("dataset: its sound is known when its `cache_audio` stage has run; run it first")
    first = next(iter(index.read_shards(dataset.uri, "train", audio.COLUMN))).table
    return int(first["rate"][0].as_py()), int(first["channels"][0].as_py())


def _sample(setup: Setup, heldout: Loader, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """The pictures of the first held-out clip and, beside them, their reconstruction."""
    pictures = setup.pictures(next(heldout.at([0])))
    made, *_ = engines["model"](pictures)
    panels = torch.cat([pictures, made.float().clamp(-1, 1)], dim=4).expand(-1, 3, -1, -1, -1)[0].permute(1, 2, 3, 0)
    return {"reconstructed": to_pixels(panels).cpu().numpy()}


def _tokens(setup: Setup, batch: Batch) -> int:
    """Tokens of a batch."""
    config = setup.model.config
    cells = config.spectrogram.rows * config.spectrogram.columns // config.spatial_stride**2
    return len(batch["key"]) * setup.frames // config.temporal_stride * cells


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Measure reconstructions and tokens of held-out clips, each rank its share."""
    heldout = _loader(config, setup.inputs, "val", **HELDOUT)
    shifted = _shifted(config, setup)
    measure(setup.model, heldout, folder, config.seed, config.eval_clips, seen=setup.pictures, shifted=shifted)


def _shifted(config: Config, setup: Setup) -> Loader | None:
    """Held-out clips that are longer than a window by a latent frame; None where there are none."""
    frames = setup.model.config.temporal_stride
    if config.frames == frames:
        return None
    try:
        return _loader(config, setup.inputs, "val", frames, **HELDOUT)
    except UserError:
        # the windows themselves have been found
        return None


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The field of config.json: the window of training, in frames of the dataset, and how many of its own are in a second."""
    return {"window": {"frames": config.frames * config.stride, "stride": config.stride, "fps": setup.fps}}


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, without sound."""
    clips = _loader(config, setup.inputs, "train", batch=1)
    return data.clip_counts(clips, without_sound=clips.samples_without_sound)
