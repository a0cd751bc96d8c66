"""`pretrain_tats`: the transformers of TATS (arXiv 2204.03638) on a dataset's tokens. No video is read but to be shown."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.captions import Captions
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.text import Text
from longtake.datasets.tokens import Tokens, train_counts
from longtake.training import data, registry, sizes, stage
from longtake.training.data import HELDOUT, check_base_text, on_device
from longtake.training.engines import device
from longtake.training.fit import Largest, Source, made_by, module_of
from longtake.training.metrics.classifier import load_classifier
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.share import batches
from longtake.training.models.common.condition import Condition, of_batch
from longtake.training.models.common.text import fields_of, set_empty
from longtake.training.models.common.video import grid
from longtake.training.models.common.wanted import Wanted
from longtake.training.models.generator import Settings, plain
from longtake.training.models.tats.config import Config, check
from longtake.training.models.tats.evaluate import SUMMARY
from longtake.training.models.tats.evaluate import evaluate as measure
from longtake.training.models.tats.generated import Judges, VideoPlan, frames_of, longest
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import TATSConfig
from longtake.training.models.tats.inputs import check_anchors, check_parent, check_sound, check_window, continued
from longtake.training.models.tats.rollout import Rollout, check_learned
from longtake.training.models.tats.sample import SETTINGS, videos_of
from longtake.training.models.tats.sound.hearing import HeardTokens
from longtake.training.models.tats.words import Words, learned_from
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

__all__ = ["SUMMARY", "Config", "check"]  # the stage's parts from other files

VERSION = 1
PRODUCES = "model"
MODEL = "tats"

_WORDS = "words.json"  # in the folder of checkpoints
_SAMPLED = 4  # videos in a sample during training


def outside(config: Config) -> str:
    """Changes with the networks that measure."""
    return digest_of(config.features, config.classifier)


class Setup(NamedTuple):
    """All that the stage works with.

    anchors  the model that makes anchors, for mode interpolate
    leading  and the settings that it was registered with
    note     what the model has from its base; "" without one
    """

    inputs: Mapping[str, str]
    record: Tokens
    sound: Tokens | None
    captions: Captions | None
    text: Text | None
    vqgan: Any
    anchors: TATS | None
    leading: Settings | None
    classes: Sequence[str]
    words: Words | None
    fps: float
    model: TATS
    note: str

    def condition(self, batch: Mapping[str, Any]) -> Condition:
        """What the windows of a batch show, as they say themselves."""
        condition = of_batch(batch)
        if self.words is None:
            return condition
        text, mask = self.words.encoded(batch["caption"])
        return replace(condition, text=text, mask=mask)

    def wanted(self, config: Config) -> Wanted:
        """What generated videos are to show."""
        if self.words is None and self.text is None:
            return Wanted(self.classes)
        options = _options(config, self.record, None, self.captions, self.text)
        if self.text:
            options["columns"]["caption"] = self.text.captions
        return Wanted(self.classes, data.loader(config, self.inputs, "val", **options, **HELDOUT), self.condition)

    def heard(self, config: Config, numbers: Iterable[int]) -> HeardTokens | None:
        """The sound of held-out windows; None for a model without sound."""
        if self.sound is None:
            return None
        windows = loader_of(config, self, "val", **HELDOUT)
        found = [of_batch(next(windows.at([number % windows.samples]))).audio for number in numbers]
        return HeardTokens(torch.cat([tokens for tokens in found if tokens is not None]))

    def rollout(self, config: Config, model: TATS, seeds: Sequence[int], condition: Condition | None) -> Rollout:
        """The videos of seeds, by this model or, for mode interpolate, its anchors and this model.

        Each hears the held-out window of its number, which counts from the first seed, again and again.
        """
        settings, leading = config.settings(), self.leading
        heard = self.heard(config, [seed - config.seed for seed in seeds])
        if heard is None and (condition is None or not condition.asks):
            settings, leading = replace(settings, guidance=1.0), leading and replace(leading, guidance=1.0)
        story = [(0, condition)] if condition else []
        plan = Rollout(model, seeds, settings, self.anchors, leading, story=story)
        if heard is None:
            return plan
        latents = math.ceil(longest(plan.window * self._factor, config.eval_frames) / self._factor)
        times = math.ceil(latents / heard.tokens.shape[1])
        return replace(plan, audio=HeardTokens(heard.tokens.repeat(1, times, 1)))

    @property
    def _factor(self) -> int:
        """Frames of a latent."""
        return int(self.vqgan.config.temporal_stride)


def prepare(config: Config, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Data, checked, and the model before its first step.

    Raises:
        UserError: tokens, captions or texts are of another dataset, or of an older state of it; a base or anchors do not fit.
        Failure: damaged files.
    """
    record, text, captions = data.tokens_of(inputs), data.text_of(inputs), data.captions_of(inputs)
    sound = data.tokens_of(inputs, "audio_tokens") if "audio_tokens" in inputs else None
    if record.of != "video":
        raise UserError(f"tokens: {inputs['tokens']} are of sound; name those of the video, and these as audio_tokens")
    if sound:
        check_sound(inputs["audio_tokens"], sound, record)
    span = (record.frames - 1) * record.stride + 1
    fps = data.frame_rate(inputs["dataset"], span, "lower `frames` of the `cache_tokens` stage") / record.stride
    options = _options(config, record, sound, captions, text)
    classes = data.loader(config, inputs, "train", batch=1, **options).classes
    parents: dict[str, Any] = {
        field: registry.load_with_facts(inputs[field]) for field in ("base", "anchors") if field in inputs
    }
    for field, (model, facts) in parents.items():
        check_parent(field, inputs[field], model, facts, record, sound, classes)
        check_base_text(inputs[field], facts, text, field)
    known = [facts for _, facts in parents.values()]
    if len({storage.canonical_json(facts.get("words")) for facts in known}) > 1:
        raise UserError(f"anchors: {inputs['anchors']} has learned other words than the base {inputs['base']}")
    words = _words(config, inputs, folder, captions, known[0] if known else None)
    from_data = {
        "codes": record.codes,
        "shape": record.shape,
        "mode": config.mode,
        "every": config.every,
        "classes": len(classes),
        "words": words.size if words else 0,
        "audio_codes": sound.codes if sound else 0,
        "audio_tokens": int(np.prod(sound.shape[1:])) if sound else 0,
        **fields_of(text),
    }
    try:
        if "base" in parents:
            model, note = continued(config, inputs["base"], parents["base"][0], from_data)
        else:
            model, note = TATS(config.tats(from_data)), ""
    except ValidationError as e:
        raise UserError(f"model: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e
    anchors = parents["anchors"][0] if "anchors" in parents else None
    if anchors:
        check_anchors(inputs["anchors"], anchors.config, model.config)
        check_window(inputs["anchors"], parents["anchors"][1]["window"], record, fps)
        anchors = anchors.eval().requires_grad_(False).to(device())
    leading = Settings(**parents["anchors"][1]["sampling"]) if anchors else None
    set_empty(model.text_in, text)
    vqgan = data.vqgan_of(record, inputs["vqgan"])
    model = model.to(device())
    return Setup(
        inputs, record, sound, captions, text, vqgan, anchors, leading, classes, words, fps, model, note
    )  # fmt: skip


def _words(
    config: Config, inputs: Mapping[str, str], folder: Path, captions: Captions | None, parent: Mapping[str, Any] | None
) -> Words | None:
    """The words of the captions: those of a base or of anchors, or learned once, by the first rank, and kept."""
    if captions is None:
        return None
    length = (config.model or {}).get("word_length", TATSConfig.model_fields["word_length"].default)
    if parent is not None:
        if not parent.get("words"):
            raise UserError("captions: the base or the anchors have learned no words; leave them out, or name others")
        return Words.of(parent["words"], parent["config"]["word_length"])
    path, distributed = folder / _WORDS, torch.distributed.is_initialized()
    if not path.exists() and (not distributed or torch.distributed.get_rank() == 0):
        words = Words.learned(learned_from(inputs, captions), config.vocabulary, length)
        storage.write(str(path), storage.canonical_json(words.record()))
    if distributed:
        torch.distributed.barrier()
    return Words.of(json.loads(path.read_bytes()), length)


def _options(
    config: Config, record: Tokens, sound: Tokens | None, captions: Captions | None, text: Text | None
) -> dict[str, Any]:
    """The options of a loader of the windows and their conditions."""
    options = data.token_windows(record)
    columns = options["columns"] | ({"label": "label"} if config.classes else {})
    columns |= {"audio_tokens": sound.column} if sound else {}
    columns |= {"caption": captions.column} if captions else {}
    columns |= {"text": text.column} if text else {}
    return options | {"columns": columns}


def loader_of(config: Config, setup: Setup, split: str, **options: Any) -> Loader:
    """Windows of tokens with what they are conditioned on."""
    windows = _options(config, setup.record, setup.sound, setup.captions, setup.text)
    return data.loader(config, setup.inputs, split, **windows | options)


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's share of the training windows."""
    return loader_of(config, setup, "train", **data.share_of(config, rank, world))


def objective(config: Config, setup: Setup) -> Objective:
    """The loss of the tokens, with videos of the first classes or captions as samples.

    Raises:
        UserError: no clip is held out; sampling that the model cannot do.
    """
    heldout = loader_of(config, setup, "val", **HELDOUT)
    if not heldout.samples:
        raise UserError("dataset: its val split has no clip for the evaluation; raise val_fraction")
    model, wanted = setup.model, setup.wanted(config)
    try:
        check_learned(model.config, config.guidance)
        if _whole(setup):
            setup.rollout(config, model, [0], None).check()
            _plan(config, setup)
    except ValueError as e:
        raise UserError(str(e)) from e
    return Objective(
        {"model": model},
        partial(_loss, setup, config.loss_chunk),
        sample=partial(_sample, config, setup, wanted) if _whole(setup) else None,
        prompts=wanted.prompts(_SAMPLED),
        fps=max(1, round(setup.fps)),
        tokens=lambda batch: (
            len(batch["key"]) * (model.config.conditions + len(model.config.order) * model.config.cells)
        ),
        blocks=list(model.blocks()),
        heldout=heldout,
    )


def _whole(setup: Setup) -> bool:
    """Whether the model makes whole videos, by itself or with that of its anchors."""
    return setup.model.config.mode != "anchors"


def _loss(setup: Setup, chunk: int | None, turn: Turn) -> tuple[Tensor, Terms]:
    """Cross-entropy of the predicted tokens, none of which is given: for mode interpolate, of those between the anchors."""
    config = setup.model.config
    sequence = config.sequence(turn.batch["tokens"])
    given, asked = {"last": config.predicted, "targets": sequence[:, -config.predicted :]}, setup.condition(turn.batch)
    loss: Tensor = turn.engines[turn.name](sequence[:, :-1], asked, turn.rng, **given, chunk=chunk)
    return loss, {"loss": loss.detach()}


def model_of(config: Config, inputs: Mapping[str, Source]) -> TATSConfig:
    """See `training.fit`: as many words as captions may have at most, where no model has them already."""
    video = sizes.tokens_of(inputs["tokens"])
    sound = sizes.tokens_of(inputs["audio_tokens"]) if "audio_tokens" in inputs else None
    known = [made_by(inputs[field]) for field in ("base", "anchors") if field in inputs]
    from_data = {
        "codes": video.codes,
        "shape": video.shape,
        "mode": config.mode,
        "every": config.every,
        "classes": sizes.classes_of(config, inputs),
        "words": 0 if "captions" not in inputs else known[0].words if known else config.vocabulary,
        "audio_codes": sound.codes if sound else 0,
        "audio_tokens": math.prod(sound.shape[1:]) if sound else 0,
        **fields_of(sizes.text_of(inputs)),
    }
    if "base" in inputs:
        return TATSConfig(**known[0].model_dump() | (config.model or {}) | from_data)
    return config.tats(from_data)


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: windows of tokens, with as many words as a text may have."""
    tats = model_of(config, inputs)
    model, words = TATS(tats), _Longest(tats.word_length) if tats.words else None
    vqgan = module_of(inputs.get("vqgan") or sizes.encoder_of(inputs["tokens"], "tokens"))
    others = [module_of(inputs["anchors"])] if "anchors" in inputs else []
    batch = sizes.said(tats, count) | {"key": [""] * count, "caption": [""] * count}
    batch["tokens"] = torch.zeros(count, *tats.shape, dtype=torch.int64)
    if tats.audio_codes:
        batch["audio_tokens"] = torch.zeros(count, tats.shape[0], tats.audio_tokens, dtype=torch.int64)
    unknown: Any = None
    setup = Setup({}, unknown, None, None, None, vqgan, None, None, (), words, 1.0, model, "")
    return Largest(Objective({"model": model}, partial(_loss, setup, config.loss_chunk)), batch, (vqgan, *others))


class _Longest(Words):
    """In the place of `Words`: texts of as many words as there may be."""

    def __init__(self, length: int) -> None:
        self.length = length

    def encoded(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(texts), self.length, 1, dtype=torch.int64), torch.ones(
            len(texts), self.length, dtype=torch.bool
        )


def _sample(
    config: Config, setup: Setup, wanted: Wanted, engines: Engines, rng: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """A grid of videos, always of the same seeds and conditions."""
    seeds = [config.seed + n for n in range(_SAMPLED)]
    plan = setup.rollout(config, engines["model"].module, seeds, wanted.condition(range(_SAMPLED)))
    return {"generated": np.concatenate([grid(chunk) for chunk in videos_of(plan, setup.vqgan, plan.window)])}


def announce(config: Config, setup: Setup, loader: Loader) -> tuple[list[str], dict[str, float]]:
    """The note about the base, and the size of the vocabulary."""
    words = [f"captions: {setup.words.size} tokens in the vocabulary of words"] if setup.words else []
    return [*([setup.note] if setup.note else []), *words], {}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json: VQGAN, tokens, anchors, conditions, window and sampling."""
    origins, record = lineage["inputs"], setup.record
    window = {"frames": record.frames, "stride": record.stride, "size": list(record.size), "fps": setup.fps}
    return {
        "vqgan": origins["vqgan"] | {"encoder": record.model["digest"]},
        "tokens": origins["tokens"],
        "audio_tokens": origins.get("audio_tokens"),
        "sound": setup.sound and origins["sound_vqgan"] | {"encoder": setup.sound.model["digest"]},
        "anchors": origins.get("anchors"),
        "text": data.text_facts(setup.text, origins.get("text")),
        "words": setup.words and setup.words.record(),
        "classes": list(setup.classes),
        "window": window,
        "sampling": plain(config.settings(), SETTINGS),
    }


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, without tokens."""
    clips = loader_of(config, setup, "train", batch=1)
    used = data.clip_counts(clips, without_tokens=clips.samples_without_latent)
    return used | data.text_counts(setup.inputs, setup.text)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> dict[str, Any]:
    """Measure what has been trained, each rank its share."""
    plan = _plan(config, setup) if _whole(setup) else None
    windows = _windows(config, setup)
    return measure(setup.model, windows, folder, counts=train_counts(setup.record), seed=config.seed, plan=plan)


def _plan(config: Config, setup: Setup) -> VideoPlan:
    """The videos to generate, and what measures them.

    Raises:
        UserError: a network does not take such videos; no held-out clip fills a chunk; frames that the model cannot make.
    """
    wanted, judges = setup.wanted(config), None
    if config.features or config.classifier:
        chunk, size = config.eval_chunk, setup.record.size
        network, classifier = checked_network(config.features, chunk, size), None
        if config.classifier:
            classifier = load_classifier(config.classifier, chunk, size, device=device())
        judges = Judges(chunk, network, _real(config, setup) if network else (), classifier, config.eval_splits)
    rollout = partial(setup.rollout, config, setup.model)
    frames, batch = config.eval_frames, config.run.eval_batch
    plan = VideoPlan(rollout, setup.vqgan, config.eval_videos, frames, config.seed, setup.fps, wanted, batch, judges)
    stride, frames_longest = setup.vqgan.config.temporal_stride, frames_of(plan)[1]
    # all videos are decoded in a stream
    for _ in setup.vqgan.decode_tokens_stream(iter(())):
        pass
    if frames_longest % stride:
        low = max(1, frames_longest // stride) * stride
        raise UserError(
            f"eval_frames: {frames_longest}; the model makes {stride}n frames, such as {low} or {low + stride}"
        )
    if judges and frames_longest < config.eval_chunk:
        raise UserError(
            f"eval_chunk: {config.eval_chunk} frames are more than a video has, {frames_longest}; raise eval_frames"
        )
    return plan


def _real(config: Config, setup: Setup) -> Iterable[Tensor]:
    """Held-out videos of a chunk's length, as many as are generated. UserError where no clip has so many frames."""
    window = {"frames": config.eval_chunk, "stride": setup.record.stride, "size": setup.record.size}
    try:
        clips = data.loader(config, setup.inputs, "val", columns=("video",), **window, **HELDOUT)
    except UserError as e:  # says what is wrong with `frames`, which are eval_chunk here
        raise UserError(f"eval_chunk: {config.eval_chunk} frames: {e}") from e
    if clips.samples < 2:
        raise UserError(
            f"features: {clips.samples} held-out clip has {config.eval_chunk} frames; a distance needs 2: lower eval_chunk, or"
            " raise val_fraction"
        )
    numbered = batches(clips, min(config.eval_videos, clips.samples), "compare")
    return (to_model(batch["video"].to(device())) for _, batch in numbered)


def _windows(config: Config, setup: Setup) -> Iterator[tuple[int, Batch, Condition]]:
    heldout = loader_of(config, setup, "val", **HELDOUT)
    for number, batch in batches(heldout, min(config.eval_clips, heldout.samples), "evaluate"):
        yield number, on_device(batch), setup.condition(batch)
