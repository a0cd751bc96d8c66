"""`finetune_mavin`: a model that fills the gap between two clips (MAVIN, arXiv 2405.18003).

Windows are A | M | B. A and B are encoded apart and stay clean, M is noised; the loss is that of M alone. Where M begins
and ends is drawn anew for each window, so that one model fills gaps of many lengths.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import Loader, to_model, to_pixels
from longtake.datasets.text import Text
from longtake.training import data, registry, sizes, stage
from longtake.training.data import HELDOUT
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, made_by, module_of, untraced, video_batch
from longtake.training.foreign.codec import ForeignCodec
from longtake.training.metrics.features import digest_of
from longtake.training.metrics.share import place
from longtake.training.models.common.codec import Codec, Pixels, load_codec
from longtake.training.models.common.draws import rng_of
from longtake.training.models.common.flow import shifted
from longtake.training.models.common.pictures import OWN
from longtake.training.models.common.text import set_empty
from longtake.training.models.mavin import spans as spanning
from longtake.training.models.mavin.config import (
    PARTS,
    Config,
    MavinConfig,
    check,
    check_hidden,
    check_parts,
    check_size,
    stride_of,
)
from longtake.training.models.mavin.encode import (
    boundary_frames,
    encode_windows,
    gap_frames,
    window_latents,
)
from longtake.training.models.mavin.evaluate import SUMMARY, Plan, judges_of, reach_of
from longtake.training.models.mavin.evaluate import evaluate as measure
from longtake.training.models.mavin.guidance import boundary_tokens, checked_encoder
from longtake.training.models.mavin.infill import Hints
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.spans import Spans, spans_to_measure
from longtake.training.models.mavin.unet import NEW, UNet, fields_of_folder, load_folder
from longtake.training.models.mavin.windows import Window, cut, filled, framed
from longtake.training.models.mavin.windows import window_of as gap_of
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn
from longtake.training.pictures import ImageEncoder
from longtake.training.registry.uri import in_store

__all__ = ["SUMMARY", "Config", "check"]  # the stage's parts from another file

VERSION = 2
PRODUCES = "model"
MODEL = "mavin"

_SOME = 32  # windows by which latents are normalised, and that must not all have a cut


def outside(config: Config) -> str:
    """Changes with the files of networks and weights that it names; a recipe is resolved without the registry."""
    encoders = [name for name in (config.image, config.embedder) if name and name != OWN and not in_store(name)]
    return digest_of(*encoders, config.unet, config.features, config.perceptual, config.perceptual_linear)


def registered(config: Config) -> dict[str, str]:
    """The registered image encoder that `image` names, which is pinned when the training begins."""
    return {"image": config.image} if config.image and in_store(config.image) else {}


class Setup(NamedTuple):
    """All that the stage works with; `fps` and `stride` are those of windows, `encoder` sees the frames beside a gap."""

    inputs: Mapping[str, str]
    codec: Codec
    text: Text | None
    encoder: ImageEncoder | None
    spans: Spans
    model: Mavin
    fps: float
    stride: int


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Data, checked, and the model before its first step.

    Raises:
        UserError: no clip is as long as a window; the autoencoder does not divide it, or decodes no stream; spans do
            not fit it; texts, a base, a public U-Net or an image encoder do not fit.
        Failure: damaged files; latents that do not vary.
    """
    rate = data.frame_rate(inputs["dataset"], config.frames)
    stride = stride_of(config, rate)
    data.frame_rate(inputs["dataset"], (config.frames - 1) * stride + 1, "lower `frames` or `stride`, or raise `fps`")
    codec: Any = load_codec(inputs["vae"]).requires_grad_(False) if "vae" in inputs else Pixels()
    codec = codec.eval().to(device())
    if "vae" in inputs:
        _check_streams(inputs["vae"], codec)
    text = data.text_of(inputs)
    name = inputs.get("image", config.image)
    encoder = checked_encoder(name, config.size, "image") if name else None
    side = codec.config.spatial_stride
    try:
        latents = window_latents(codec, config.frames)
        spans = config.spans_of(latents)
        if "base" not in inputs:
            check_size(config.size, side, config.numbers)
        shape = (latents, config.size[0] // side, config.size[1] // side)
        model = _model(config, inputs, codec, shape, spans, encoder, text)
        check_size(config.size, side, model.config)
        check_parts(config.train, model.config.body)
        check_hidden(model.config, config.guidance, config.image_guidance)
    except ValueError as e:
        raise e if isinstance(e, UserError | Failure) else UserError(str(e)) from e
    setup = Setup(inputs, codec, text, encoder, spans, model, rate / stride, stride)
    if "vae" in inputs and "base" not in inputs and not _has_learned_scale(config, codec):
        _normalise(config, setup)
    _keep_still(config, model)
    _check_cuts(config, setup)
    model.to(device())
    return setup


def _model(
    config: Config,
    inputs: Mapping[str, str],
    codec: Codec,
    shape: tuple[int, int, int],
    spans: Spans,
    encoder: ImageEncoder | None,
    text: Text | None,
) -> Mavin:
    """The model before its first step, on the CPU."""
    channels, width = codec.config.latent_channels, encoder.width if encoder else 0
    if "base" in inputs:
        uri = inputs["base"]
        model, facts = registry.load_with_facts(uri)
        if not isinstance(model, Mavin):
            raise UserError(f"base: {uri} is a {type(model).__name__}, not a MAVIN; name a `finetune_mavin` model")
        data.check_base_text(uri, facts, text)
        has, ours = (facts.get("vae") or {}).get("encoder"), _digest(codec)
        if has != ours:
            raise UserError(f"base: {uri} has learned latents of another autoencoder; name that in vae")
        if ((facts.get("image") or {}).get("digest")) != (encoder.digest if encoder else None):
            raise UserError(f"base: {uri} sees the frames beside a gap by another encoder; name that in image")
        if text is not None and not model.config.text_width:
            raise UserError(f"base: {uri} has learned no text; leave text out")
        changed = Mavin(model.config.model_copy(update={"shape": shape, "gap": spans.gap}))
        changed.load_state_dict(model.state_dict())
        return changed.train()
    changes = fields_of_folder(config.unet) if config.unet else {}
    if changes.pop("channels", channels) != channels:
        raise UserError(
            f"unet: {config.unet}: is of other latents than these of {channels} channels; name its autoencoder"
        )
    model = Mavin(config.mavin(channels, shape, spans, width, text, changes))
    if config.unet:
        assert isinstance(model.body, UNet)
        load_folder(model.body, config.unet)
    set_empty(model.guide.text_in, text)
    return model


def _digest(codec: Any) -> str | None:
    """The digest of an autoencoder's encoder; None of pixels."""
    return None if isinstance(codec, Pixels) else encoder_digest(codec)


@torch.no_grad()
def _check_streams(uri: str, codec: Codec) -> None:
    """Refuse an autoencoder that decodes no stream, as gaps are decoded: UserError, before training and not after it."""
    latent = torch.zeros(1, codec.config.latent_channels, 1, 1, 1, dtype=codec.dtype, device=device())
    try:
        next(codec.decode_stream([latent]))
    except ValueError as e:
        raise UserError(f"vae: {uri}: decodes no stream, and so no gap ({e}); name another") from e


def _has_learned_scale(config: Config, codec: Any) -> bool:
    """Whether a public U-Net has learned latents as they come: its own autoencoder scales them for it."""
    return config.unet is not None and isinstance(codec, ForeignCodec)


@torch.no_grad()
def _normalise(config: Config, setup: Setup) -> None:
    """Normalise latents by the mean and deviation of some windows', encoded as in training."""
    windows = loader_of(config, setup, "train", batch=1, seed=config.seed, columns={"video": "video"})
    start, latents = (setup.spans.starts[0] + setup.spans.starts[1]) // 2, setup.spans.latents
    span = [(start, min(latents - 1, max(start + 1, setup.spans.ends[0])))]
    some = [
        encode_windows(setup.codec, to_model(batch["video"].to(device())), span)
        for batch in windows.at(range(min(_SOME, windows.batches_per_epoch)))
    ]
    values = torch.cat(some).transpose(0, 1).flatten(1).double().cpu()
    try:
        setup.model.set_statistics(values.mean(1).float(), values.std(1).float())
    except ValueError as e:
        raise Failure(f"vae: {setup.inputs['vae']}: {e}; train it for longer") from e


def _keep_still(config: Config, model: Mavin) -> None:
    """Freeze all parts that `train` does not name, but for what a public U-Net lacks: that would stay as it was drawn."""
    if config.train == "all":
        return
    parts = [re.compile(PARTS[model.config.body][name]) for name in config.train]
    named = {name for name, _ in model.named_parameters() if any(part.match(name) for part in parts)}
    if not named:
        raise UserError(
            f"train: {', '.join(config.train)}: this model has no such part, and nothing would learn; name others"
        )
    new = ("guide.", *(f"body.{name}" for name in NEW)) if config.unet else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named or name.startswith(new))


def _check_cuts(config: Config, setup: Setup) -> None:
    """Refuse to train where all of some windows have a cut: UserError."""
    windows = loader_of(config, setup, "train", batch=1, seed=config.seed, columns={"video": "video"})
    some = windows.at(range(min(_SOME, windows.batches_per_epoch)))
    if windows.samples and all(bool(cut(to_model(batch["video"]), config.least_similarity)) for batch in some):
        least = f"least_similarity: {config.least_similarity:g}"
        raise UserError(f"{least}: all windows that were looked at have a cut, and none would count; lower it")


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's share of random windows."""
    return loader_of(config, setup, "train", **data.share_of(config, rank, world), crop="random")


def loader_of(config: Config, setup: Setup, split: str, **options: Any) -> Loader:
    """Windows of videos, with texts if they are learned."""
    columns = {"video": "video"} | ({"text": setup.text.column} if setup.text else {})
    window = {"columns": columns, "frames": config.frames, "stride": setup.stride, "size": config.size}
    return data.loader(config, setup.inputs, split, **window | options)


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss in the gap, with the first held-out window, filled, as a sample.

    Raises:
        UserError: no clip is held out; a network that measures does not take such videos, or has too few.
    """
    heldout = loader_of(config, setup, "val", **HELDOUT)
    if not heldout.samples:
        raise UserError("dataset: its val split has no clip for the evaluation; raise val_fraction")
    if config.features and heldout.samples < 2:
        raise UserError(f"features: {heldout.samples} clip is held out; a distance needs 2: raise val_fraction")
    plan_of(config, setup)
    return Objective(
        {"model": setup.model},
        partial(_loss, config, setup),
        sample=partial(_sample, config, setup, heldout),
        fps=max(1, round(setup.fps)),
        tokens=partial(_tokens, setup),
        blocks=list(setup.model.blocks()),
        heldout=heldout,
    )


class Draws(NamedTuple):
    """What is drawn for the windows of a batch: it depends on their places in the pass, not on ranks.

    mask      latents that are noised, bool (B, T)
    spans     start and end of each window's span; of random latents they have no meaning
    t         (B,)
    noise     (B, C, T, h, w)
    early     frames by which B begins before the last latent of the span ends (see `encode`)
    flipped, textless, blind   windows that are flipped, and that lose their text, and their frames, bool (B,)
    """

    mask: Tensor
    spans: list[tuple[int, int]]
    early: list[int]
    t: Tensor
    noise: Tensor
    flipped: Tensor
    textless: Tensor
    blind: Tensor


def draw(config: Config, setup: Setup, seed: int, places: Sequence[int], learning: bool = True) -> Draws:
    """The draws of windows at these places of a pass. Those that are only measured keep their sides, text and frames."""
    model = setup.model.config
    assert model.shape
    masks, spans, early, normal, noise, chances = [], [], [], [], [], []
    for number in places:
        rng, normals = np.random.default_rng([seed, number]), rng_of(seed, number)
        mask = spanning.draw_mask(setup.spans, rng)
        masks.append(torch.from_numpy(mask))
        spans.append((int(mask.argmax()), int(len(mask) - mask[::-1].argmax())))
        normal.append(torch.randn((), generator=normals))
        noise.append(torch.randn(model.channels, *model.shape, generator=normals))
        chances.append(torch.from_numpy(rng.random(3)))
        early.append(int(rng.integers(setup.codec.config.temporal_stride)))
    limits = torch.tensor([config.flip, model.text_dropout, model.image_dropout]) * learning
    flipped, textless, blind = (torch.stack(chances) < limits).unbind(1)
    t = shifted(torch.sigmoid(config.time_mean + config.time_std * torch.stack(normal)), config.shift)
    on = partial(torch.Tensor.to, device=device(), non_blocking=True)
    return Draws(
        on(torch.stack(masks)), spans, early, on(t), on(torch.stack(noise)), *map(on, (flipped, textless, blind))
    )


def _loss(config: Config, setup: Setup, turn: Turn) -> tuple[Tensor, Terms]:
    """The loss of the span, and the share of windows that have a cut and so do not count."""
    video, learning = to_model(turn.batch["video"]), torch.is_grad_enabled()
    rank, count = place()[0] if learning else 0, len(video)
    draws = draw(config, setup, turn.seed, range(rank * count, (rank + 1) * count), learning)
    video = torch.where(draws.flipped[:, None, None, None, None], video.flip(-1), video)

    x0 = setup.model.normalise(latents_of(setup, video, draws.spans, draws.early))
    x = spanning.noised(x0, draws.noise, draws.t, draws.mask)
    times = spanning.times_of(draws.t, draws.mask, setup.model.config.clean_time)
    hints = hints_of(setup, turn.batch, video, draws.spans, draws.early, draws.textless, draws.blind)
    length = gap_frames(setup.codec, 1) * draws.mask.sum(1) - torch.tensor(draws.early).to(
        draws.mask.device, non_blocking=True
    )
    velocity = turn.engines[turn.name](x, times, length, *hints)

    losses = spanning.loss(velocity, x0, draws.noise, draws.mask)
    whole = ~cut(video, config.least_similarity)
    # divided by all: ranks whose windows have cuts must not count more in the others
    loss = torch.where(whole, losses, 0.0).sum() / count
    return loss, {"loss": loss.detach(), "cuts": 1 - whole.float().mean()}


def model_of(config: Config, inputs: Mapping[str, Source]) -> MavinConfig:
    """See `training.fit`."""
    return _planned(config, inputs, _encoder(config, inputs))[0]


def _encoder(config: Config, inputs: Mapping[str, Source]) -> ImageEncoder | None:
    """The image encoder, with its weights: what it is decides how wide its tokens are."""
    with untraced():
        name = inputs["image"].uri if "image" in inputs else config.image
        return checked_encoder(name, config.size, "image") if name else None


def _planned(
    config: Config, inputs: Mapping[str, Source], encoder: ImageEncoder | None
) -> tuple[MavinConfig, Spans, Any]:
    """The config of the model, its spans, and the codec."""
    codec: Any = module_of(inputs["vae"]).requires_grad_(False) if "vae" in inputs else Pixels()
    latents, side = window_latents(codec, config.frames), codec.config.spatial_stride
    spans, shape = config.spans_of(latents), (latents, config.size[0] // side, config.size[1] // side)
    if "base" in inputs:
        return made_by(inputs["base"]).model_copy(update={"shape": shape, "gap": spans.gap}), spans, codec
    changes = fields_of_folder(config.unet) if config.unet else {}
    changes.pop("channels", None)
    width, text = encoder.width if encoder else 0, sizes.text_of(inputs)
    return config.mavin(codec.config.latent_channels, shape, spans, width, text, changes), spans, codec


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: windows of videos, which the autoencoder encodes in each step."""
    encoder = _encoder(config, inputs)
    planned, spans, codec = _planned(config, inputs, encoder)
    model = Mavin(planned)
    _keep_still(config, model)
    setup = Setup({}, codec.eval(), None, encoder, spans, model, 1.0, 1)
    batch = sizes.said(planned.model_copy(update={"classes": 0}), count) | video_batch(
        count, config.frames, *config.size
    )
    return Largest(Objective({"model": model}, partial(_loss, config, setup)), batch, (codec,))


def latents_of(
    setup: Setup, video: Tensor, spans: Sequence[tuple[int, int]], early: Sequence[int] | None = None
) -> Tensor:
    """The latents of windows, those beside each span encoded apart."""
    return video if isinstance(setup.codec, Pixels) else encode_windows(setup.codec, video, spans, early)


def hints_of(
    setup: Setup,
    batch: Batch,
    video: Tensor,
    spans: Sequence[tuple[int, int]],
    early: Sequence[int] | None = None,
    textless: Tensor | None = None,
    blind: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Text, its mask, the tokens of the frames beside the spans, and of which sides they are seen."""
    text, mask = batch.get("text"), batch.get("text_mask")
    if mask is not None and textless is not None:
        mask = mask & ~textless[:, None]
    if setup.encoder is None:
        return text, mask, None, None
    image = boundary_tokens(setup.encoder, boundary_frames(setup.codec, video, spans, early))
    return text, mask, image, None if blind is None else ~blind[:, None].expand(-1, image.shape[1])


def _tokens(setup: Setup, batch: Batch) -> int:
    assert setup.model.config.shape
    patch = setup.model.config.patch if setup.model.config.body == "dit" else 1
    return int(len(batch["key"]) * np.prod(setup.model.config.shape)) // patch**2


def window_of(setup: Setup, batch: Batch, span: tuple[int, int]) -> Window:
    """The held-out window of a batch of one, with a span of our choice."""
    video = to_model(batch["video"])
    text, mask, image, _ = hints_of(setup, batch, video, [span])
    return gap_of(setup.codec, video, latents_of(setup, video, [span]), span, Hints(text, mask, image=image))


def _sample(
    config: Config, setup: Setup, heldout: Loader, engines: Engines, rng: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """The first held-out window, and beside it the same with its gap filled."""
    window = window_of(setup, data.on_device(next(heldout.at([0]))), spans_to_measure(setup.spans)[-1])
    made = window.joined(filled(engines["model"].module, setup.codec, window, config.sampling, (config.seed, 0)))
    panels = torch.cat([framed(window.video), framed(made, window.frames)], dim=4)[0].permute(1, 2, 3, 0)
    return {"filled": to_pixels(panels).cpu().numpy()}


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> dict[str, Any]:
    """Measure what has been trained, each rank its share."""
    heldout = loader_of(config, setup, "val", **HELDOUT)
    return measure(setup.model, setup.codec, heldout, plan_of(config, setup), folder)


def plan_of(config: Config, setup: Setup) -> Plan:
    """What the evaluation measures, and by which networks.

    Raises:
        UserError: there is no such network, or it does not take such videos.
    """
    spans = spans_to_measure(setup.spans)
    reach = reach_of(config.frames, gap_frames(setup.codec, spans[-1][1] - spans[-1][0]))
    judges = judges_of(config, setup.encoder, reach, config.size)
    counts = config.eval_clips, config.eval_videos, config.eval_draws
    least = config.least_similarity
    return Plan(partial(window_of, setup), spans, config.sampling, *counts, config.seed, reach, judges, least)


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json: autoencoder, texts, image encoder, window, and what a gap may be, in frames."""
    origins, codec = lineage["inputs"], setup.codec
    gap, factor = setup.model.config.gap, gap_frames(codec, 1)
    assert gap
    window = {"frames": config.frames, "stride": setup.stride, "size": list(config.size), "fps": setup.fps}
    name = setup.inputs.get("image", config.image)
    image = {"encoder": name, "digest": setup.encoder.digest} if setup.encoder else None
    return {
        "vae": origins["vae"] | {"encoder": _digest(codec)} if "vae" in origins else None,
        "text": data.text_facts(setup.text, origins.get("text")),
        "image": image,
        "window": window,
        "context": [int(codec.config.first_frames) + factor * (n - 1) for n in setup.spans.sides],
        "gap": [factor * (gap[0] - 1) + 1, factor * gap[1]],
        "classes": [],
        "sampling": asdict(config.sampling),
    }


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, too small, and without captions."""
    clips = loader_of(config, setup, "train", batch=1)
    used = data.clip_counts(clips, too_small=clips.samples_small)
    return used | data.text_counts(setup.inputs, setup.text)
