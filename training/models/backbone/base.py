"""What a fine-tuning works with: the base, and a dataset's latents and texts, checked to be of the base's own pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.buckets import Bucket
from longtake.datasets.text import Text
from longtake.training import data, registry
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.foreign.backbone import Backbone
from longtake.training.foreign.clip_rate import check_rate
from longtake.training.foreign.columns import check_latents, check_pooled, check_text
from longtake.training.models.backbone import sample
from longtake.training.models.backbone.config import Config
from longtake.training.models.backbone.given import given
from longtake.training.models.backbone.solver import solver_of
from longtake.training.models.common.codec import decoded
from longtake.training.models.common.condition import of_batch
from longtake.training.models.common.wanted import Wanted
from longtake.training.models.generator import Settings
from longtake.training.objective import Batch
from longtake.training.target import LatentTarget


class Setup(NamedTuple):
    """All that the stage works with.

    facts        of the base, as its config.json has them
    text, pooled records of the columns of texts
    fps          of the clips
    image_share  share of windows that have a start image
    """

    inputs: Mapping[str, str]
    target: LatentTarget
    text: Text
    pooled: Text | None
    model: Backbone
    facts: Mapping[str, Any]
    image_share: float

    @property
    def holds(self) -> bool:
        """Whether start images are clean first latents, and not channels of their own."""
        return self.image_share > 0 and not self.model.config.sizes.image_channels

    def loader(self, config: Config, split: str, **options: Any) -> Loader:
        """Windows of latents with their texts. UserError where latents do not divide into tokens."""
        settings = self.target.columns(split)
        settings["columns"] |= {"text": self.text.column} | ({"pooled": self.pooled.column} if self.pooled else {})
        made = data.loader(config, self.inputs, split, **settings | options)
        for height, width in (bucket.latent for bucket in made.buckets):
            _, rows, columns = self.model.config.patch
            if height % rows or width % columns:
                stride = self.target.record.stride
                raise UserError(
                    f"latents: some are of {height}x{width} positions, and the base takes {rows}x{columns} in a token; encode with"
                    f" a size in multiples of {rows * stride}x{columns * stride} pixels"
                )
        return made

    def wanted(self, config: Config) -> Wanted:
        """What generated videos are to show: what the held-out clips say of themselves."""
        columns = {"text": self.text.column, "caption": self.text.captions}
        return Wanted((), data.loader(config, self.inputs, "val", columns=columns, **HELDOUT))

    def given(self, batch: Batch, x0: Tensor) -> dict[str, Any]:
        """What the model needs of a batch of latents `x0` beside them and their texts."""
        return given(self.model, batch, x0, self.target.fps, self.target.codec)

    def sampled(self, config: Config, model: Backbone, batch: Batch, seed: int) -> Tensor:
        """A video `(1, 3, T, H, W)` uint8 by the text, and maybe the start image, of a held-out clip."""
        x0 = self.target.given(model, batch)
        beside = self.given(batch, x0)
        wanted = sample.Text(of_batch(batch), beside.get("pooled"))
        shown = sample.Shown(beside["image"]) if "image" in beside else None
        frames, height, width = x0.shape[2:]
        shape = (frames, height, width)
        settings = settings_of(config, model, shape)
        latents = sample.sample((model,), shape, [seed], settings, wanted, shown=shown, fps=self.target.fps)
        return decoded(self.target.codec, latents)

    def filled(self, bucket: Bucket, count: int) -> Batch:
        """A batch of `count` windows of a bucket with the longest texts, of zeros."""
        record, frames = self.target.record, 1 + (bucket.window.frames - 1) // self.target.record.factor
        latent = torch.zeros(count, 2, record.channels, frames, *bucket.latent)
        batch: Batch = {"key": ["largest"] * count, "latent": latent, "start": torch.zeros(count, dtype=torch.long)}
        for name, text in (("text", self.text), ("pooled", self.pooled)):
            if text is not None:
                length = min(int(text.encoder["length"]), self.model.config.longest_text)
                batch[name] = torch.zeros(count, length, text.width, dtype=torch.bfloat16)
                batch[f"{name}_mask"] = torch.ones(count, length, dtype=torch.bool)
        return batch


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Data, checked, and the model before its first step.

    Raises:
        UserError: the latents or texts are of another dataset, or of an older state of it, or of another autoencoder or
            encoder than the base's; the clips have another frame rate; an expert or a start image is missing, or not known.
        Failure: damaged files.
    """
    dataset, base = inputs["dataset"], inputs["base"]
    record = [data.column_of(dataset, inputs["latents"], frames) for frames in config.lengths].pop()
    text = data.text_of(inputs)
    pooled = data.text_of({**inputs, "text": inputs["pooled"]}) if "pooled" in inputs else None
    assert text
    model, facts = opened(base, config)
    check_latents(base, model.config, facts, record, inputs["latents"])
    check_text(base, model.config, facts, text, inputs["text"])
    fps = _frame_rate(base, model, facts, config, dataset)
    share = image_share(base, model, config)
    check_pooled(base, model.config, facts, pooled, inputs.get("pooled", ""))
    codec = data.decoder_of(record, inputs["vae"])
    shape = (1 + (config.lengths[0] - 1) // record.factor, *data.commonest_size(dataset, record))
    target = LatentTarget(record, record.channels, shape, fps, codec, config.posterior, config.clip_starts)
    changes = {"shape": shape, "text_dropout": config.text_dropout, "text_length": model.config.longest_text}
    changes["activation_checkpointing"] = config.activation_checkpointing
    # a model that has learned to go on from clean first latents can do it
    changes["expand_timesteps"] = model.config.expand_timesteps or (share > 0 and not model.config.sizes.image_channels)
    model.config = model.config.model_copy(update=changes)
    last = None if pooled is None else torch.from_numpy(pooled.empty())[-1]
    model.set_empty(torch.from_numpy(text.empty()), last)
    return Setup(inputs, target, text, pooled, model.train().to(device()), facts, share)


def opened(base: str, config: Config) -> tuple[Backbone, dict[str, Any]]:
    """The base in the training's precision, on the CPU, and its config.json. Raises UserError: it is no such model."""
    model, facts = registry.load_with_facts(base, part="transformer", expert=config.expert)
    if not isinstance(model, Backbone):
        raise UserError(
            f"base: {base} is a {type(model).__name__}, and no video transformer of another library; name a folder in the"
            " layout of diffusers, or what `finetune_backbone` has made"
        )
    if (own := model.config.expert) != config.expert:
        asked = f"leave expert: {config.expert} out" if own is None else f"give expert: {own}"
        raise UserError(f"expert: {base} is {'no expert' if own is None else f'the expert of {own} noise'}; {asked}")
    model.requires_grad_(True)
    if config.precision == "fp32":
        return model.float(), facts
    # what learns in full begins as it is stored: an engine keeps it in fp32 beside its bf16
    return model.to(torch.bfloat16) if config.lora else model, facts


def _frame_rate(base: str, model: Backbone, facts: Mapping[str, Any], config: Config, dataset: str) -> float:
    """Frames a second of the clips. UserError where they are neither those of the base nor those of the config."""
    rate = data.frame_rate(dataset, config.lengths[-1])
    check_rate(base, model.config, facts, rate, config.fps)
    return rate


def settings_of(config: Config, model: Backbone, shape: tuple[int, int, int]) -> Settings:
    """How videos of latents (T, H, W) are sampled: as the base's pipeline does, but for the config's steps and guidance."""
    solver = solver_of(model.config.scheduler)
    return Settings(config.sample_steps, config.guidance, model.shift_of(shape), solver=solver)


def image_share(base: str, model: Backbone, config: Config) -> float:
    """The share of windows with a start image. UserError where the base takes none, or needs one."""
    needs, share = bool(model.config.sizes.image_channels), config.image_conditioning
    if needs and share not in (None, 1.0):
        raise UserError(f"image_conditioning: {base} always needs a start image; give 1, or leave it out")
    if model.config.sizes.image_width:
        raise UserError(
            f"base: {base} attends to states of its start image by a vision encoder, of which a dataset has none; take one"
            " without, such as Wan 2.2"
        )
    return float(needs) if share is None else share
