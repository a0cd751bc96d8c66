"""What training stages learn from: loaders of a dataset, and its columns of latents, tokens and texts."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from longtake.datasets import compact, schema, storage, view
from longtake.datasets.cache import Cache
from longtake.datasets.captions import Captions, read_captions
from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents, encoder_digest, read_latents
from longtake.datasets.loader import Loader
from longtake.datasets.loader.split import open_columns
from longtake.datasets.stage import StageConfig
from longtake.datasets.text import Text, read_text
from longtake.datasets.tokens import Tokens, model_digest, read_tokens
from longtake.training import registry
from longtake.training.config import TrainConfig
from longtake.training.engines import device
from longtake.training.live import record as records
from longtake.training.live.encoder import LiveLoader
from longtake.training.models.common.codec import load_codec, nearest_lengths
from longtake.training.objective import Batch

_LEFT_OUT = -1  # captions of a clip that a column's view has left out
HELDOUT: dict[str, Any] = {"batch": 1, "last": "pad", "shuffle": False, "epochs": 1}  # clips one by one, once


def loader(config: Any, inputs: Mapping[str, str], split: str, **options: Any) -> Loader:
    """A loader of the dataset that a stage names, with its view, its cache and its window."""
    window = {name: getattr(config, name) for name in ("frames", "stride") if hasattr(config, name)}
    settings = {"view": inputs.get("view"), "cache": cache_of(config), **window, **options}
    columns = options.get("columns", ())
    named = columns.values() if isinstance(columns, Mapping) else columns
    if live := {column: each for column, each in records.live_columns(inputs).items() if column in named}:
        batch_of = next(iter(live.values())).live["batch"]  # type: ignore[index]
        made = {column: records.column_of(each) for column, each in live.items()}
        return LiveLoader(inputs["encoder"], batch_of, inputs["dataset"], split, live=made, **settings)
    return Loader(inputs["dataset"], split, **settings)


def cache_of(config: TrainConfig) -> Cache | None:
    """The cache of a remote dataset's tars that a stage names."""
    return Cache(config.run.cache.folder, config.run.cache.max_bytes) if config.run.cache else None


def share_of(config: TrainConfig, rank: int, world: int) -> dict[str, Any]:
    """The options of a training loader for this rank's share of each pass."""
    batch = config.batch // config.accumulate
    return {"batch": batch, "rank": rank, "world": world, "seed": config.seed, "workers": config.run.workers}


def clip_counts(clips: Loader, **left_out: int) -> dict[str, float]:
    """Metrics of the train split: clips that are used, that are too short, and that lack what else is named."""
    lacking = {f"train_clips_{name}": float(count) for name, count in left_out.items()}
    return {"train_clips": float(clips.samples), "train_clips_too_short": float(clips.samples_short)} | lacking


def on_device(batch: Batch) -> Batch:
    """A batch with its tensors on this rank's device."""
    return {name: value.to(device()) if isinstance(value, Tensor) else value for name, value in batch.items()}


def check_recipe(config: Any, inputs: Mapping[str, StageConfig], columns: Collection[str], span: int) -> None:
    """ValueError where a recipe's columns are of another dataset, or its clips are shorter than `span` frames."""
    for field in columns:
        column: Any = inputs.get(field)
        if column is not None and column.dataset != config.dataset:
            raise ValueError(f"{field}: are of the dataset {column.dataset}, not of {config.dataset}")
    clip = getattr(inputs.get("dataset"), "clip", None)
    if clip is not None and clip.max_frames < span:
        raise ValueError(
            f"frames: a window spans {span} frames, the dataset's clips have at most {clip.max_frames}; raise clip.max_seconds"
        )


def frame_rate(dataset: str, span: int, remedy: str = "lower `frames`") -> float:
    """Frames a second of the train split's clips. Raises UserError, with the remedy, where none has `span` frames."""
    base, facts = compact.open_split(dataset, "train")
    longest = pc.max(facts["frame_count"]).as_py() or 0
    if longest and longest < span:
        what = "images, and a video prior needs clips" if longest == 1 else f"clips of at most {longest} frames"
        raise UserError(f"dataset: {dataset} has {what}; a window spans {span} frames: {remedy}")
    # a shard may be without clips
    filled = np.flatnonzero(base.counts)
    return float(base.row(int(filled[0]), 0)["fps"]) if longest else 0.0


def column_of(dataset: str, uri: str, frames: int, field: str = "latents") -> Latents:
    """The record of a column of latents, checked to have windows of `frames` frames.

    Raises:
        UserError: the latents are of another dataset or of an earlier state of it, or have no such windows.
        Failure: damaged files.
    """
    record = read_latents(uri)
    _check_dataset(record, dataset, uri, field)
    low, high = nearest_lengths(frames, record.factor)
    if low != high:
        raise UserError(
            f"frames: {frames}: latents have windows of 1 + {record.factor}n frames, such as {low} or {high}"
        )
    if record.live is None:
        _check_state(record, dataset, uri, field, "cache_latents")
    elif any(compact.open_split(dataset, split)[0].digest != digest for split, digest in record.digests.items()):
        raise UserError(f"dataset: {dataset} has changed since this training began; use --force to start anew")
    return record


def tokens_of(inputs: Mapping[str, str], field: str = "tokens") -> Tokens:
    """The record of a column of tokens among a stage's inputs.

    Raises:
        UserError: the tokens are of another dataset, or of an earlier state of it.
        Failure: damaged files.
    """
    dataset, uri = inputs["dataset"], inputs[field]
    record = read_tokens(uri)
    _check_dataset(record, dataset, uri, field)
    _check_state(record, dataset, uri, field, "cache_tokens")
    return record


def token_windows(record: Tokens) -> dict[str, Any]:
    """The options of a loader of the windows of a column of tokens."""
    return {"columns": {"tokens": record.column}, "frames": record.frames, "stride": record.stride, "size": record.size}


def vqgan_of(record: Tokens, uri: str) -> Any:
    """The model that decodes the tokens, frozen, on this rank's device. Raises UserError where it has made other ones."""
    model: Any = registry.load(uri)
    if model_digest(model) != record.model["digest"]:
        raise UserError(
            f"tokens: are of another model, {record.model['uri']}, than {uri}; run `cache_tokens` with that, or name the other"
        )
    return model.eval().requires_grad_(False).to(device())


def _check_dataset(record: Captions | Latents | Text | Tokens, dataset: str, uri: str, field: str) -> None:
    if record.dataset != storage.absolute(dataset):
        raise UserError(f"{field}: {uri} are of the dataset {record.dataset}, not of {dataset}")


def _check_state(record: Captions | Latents | Text | Tokens, dataset: str, uri: str, field: str, stage: str) -> None:
    """UserError where a column is of an earlier state of its dataset, or is gone."""
    for split in schema.SPLITS:
        if compact.open_split(dataset, split)[0].digest != record.digests[split]:
            raise UserError(
                f"{field}: {uri}: the dataset has changed since they were made; run their `{stage}` stage again"
            )
    if not len(compact.open_split(dataset, "train", record.column)[0].shards):
        raise UserError(f"{field}: {dataset} has no column {record.column}; run their `{stage}` stage again")


def text_of(inputs: Mapping[str, str]) -> Text | None:
    """The record of the column of texts among a stage's inputs, if there is one.

    Raises:
        UserError: the texts are of another dataset, or of an earlier state of it or its captions; their view leaves out clips
            to learn from; no training clip has a caption.
        Failure: damaged files.
    """
    if "text" not in inputs:
        return None
    dataset, uri = inputs["dataset"], inputs["text"]
    record = read_text(uri)
    _check_dataset(record, dataset, uri, "text")
    _check_state(record, dataset, uri, "text", "cache_text")
    for split, digest in record.captions_digests.items():
        if compact.open_split(dataset, split, record.captions)[0].digest != digest:
            raise UserError(f"text: {uri}: captions have changed since; run their `cache_text` stage again")
    counts = {split: _captions_of(inputs, record, split) for split in schema.SPLITS}
    if left_out := sum(int((each == _LEFT_OUT).sum()) for each in counts.values()):
        raise UserError(
            f"text: {uri}: its view leaves out {left_out} clips of this training; encode those too, or name its view here"
        )
    if not (counts["train"] > 0).any():
        which = "its view keeps" if "view" in inputs else "there is"
        raise UserError(f"text: {uri}: no training clip that {which} has a caption; make some by a `caption` stage")
    return record


def captions_of(inputs: Mapping[str, str]) -> Captions | None:
    """The record of the column of captions among a stage's inputs, if there is one. Raises as `tokens_of`."""
    if "captions" not in inputs:
        return None
    dataset, uri = inputs["dataset"], inputs["captions"]
    record = read_captions(uri)
    _check_dataset(record, dataset, uri, "captions")
    _check_state(record, dataset, uri, "captions", "caption")
    return record


def captioned(inputs: Mapping[str, str], record: Text) -> np.ndarray:
    """Which training clips of the stage's view have captions, bool (clips,)."""
    return _captions_of(inputs, record, "train") > 0


def _captions_of(inputs: Mapping[str, str], record: Text, split: str) -> np.ndarray:
    """The captions with states of each clip of the stage's view, (clips,); `_LEFT_OUT` of one that the texts' view lacks."""
    base, _ = compact.open_split(inputs["dataset"], split)
    rows = open_columns(base, {"text": record.column}, None)[0].columns["text"]
    lengths = [pc.list_value_length(rows.of(shard)["texts"]) for shard in range(len(rows.shards))]
    # a clip without captions has null, one that the view left out an empty list
    counts = [pc.fill_null(pc.if_else(pc.equal(each, 0), _LEFT_OUT, each), 0) for each in lengths]
    keep, _, _ = view.kept(base, inputs.get("view"))
    found: np.ndarray = np.concatenate([np.empty(0, np.int32), *(count.to_numpy() for count in counts)])[keep]
    return found


def text_counts(inputs: Mapping[str, str], record: Text | None) -> dict[str, float]:
    """The number of training clips without captions, as a metric; nothing where no text is learned."""
    return {} if record is None else {"train_clips_without_captions": float((~captioned(inputs, record)).sum())}


def text_facts(record: Text | None, origin: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What config.json says of the texts that a model has learned: `uri` and `digest` of the record, and the `encoder`.

    The encoder is `Text.encoder`: the fields of TextConfig, which load it again, its `digest` and its `width`.
    """
    return None if record is None else {**(origin or {}), "encoder": dict(record.encoder)}


def check_base_text(uri: str, facts: Mapping[str, Any], record: Text | None, field: str = "base") -> None:
    """UserError where a base has learned texts of another encoder than a training has, or texts and the training has none."""
    learned = (facts.get("text") or {}).get("encoder")
    if learned is None:
        return
    if record is None:
        other = "anchors" if field == "anchors" else "a base"
        raise UserError(
            f"{field}: {uri} has learned text; name what a `cache_text` stage has made, or {other} without text"
        )
    # a pipeline as it was imported says which encoder it has, and not by which settings of ours it learned
    if learned.get("digest") not in (None, record.encoder["digest"]):
        raise UserError(
            f"{field}: {uri} has learned texts of another encoder, {learned.get('encoder')}; encode by that one, or name"
            " another"
        )


def text_column_of(
    uri: str, facts: Mapping[str, Any], inputs: Mapping[str, str], field: Literal["text", "pooled"] = "text"
) -> dict[str, str]:
    """The column `text`, or `pooled` by a second encoder, that a trained model sees, if it has learned such.

    Raises:
        UserError: it is missing, or of another encoder; and as `text_of`.
    """
    if not facts.get(field):
        return {}
    record = text_of({**inputs, "text": inputs[field]}) if field in inputs else None
    if record is None:
        what = "text" if field == "text" else "a vector of each text"
        raise UserError(f"{field}: {uri} has learned {what}; name what their `cache_text` stage has made")
    if record.encoder["digest"] != facts[field]["encoder"]["digest"]:
        raise UserError(f"{field}: {inputs[field]} are of another encoder than {uri} has learned")
    return {field: record.column}


def columns_of(
    uri: str, encoder: str | None, inputs: Mapping[str, str], frames: int, shrink: tuple[int, int] | None = None
) -> dict[str, str]:
    """The columns that a trained model sees: `latent`, and `low`, of a video scaled down, if it needs one.

    Args:
        uri: of the model, for messages.
        encoder: digest of the encoder of the latents that it has learned.
        inputs: URIs `dataset`, `latents`, `low_latents`.
        shrink: factors by which the video of the second column is scaled down.

    Raises:
        UserError: a column is missing, or of another autoencoder or scale; and as `column_of`.
    """
    if "latents" not in inputs:
        raise UserError(f"latents: {uri} has learned latents; name what their `cache_latents` stage has made")
    columns = [column_of(inputs["dataset"], inputs["latents"], frames)]
    if shrink not in (None, (1, 1)):
        if "low_latents" not in inputs:
            raise UserError(f"low_latents: {uri} needs those with shrink: [{shrink[0]}, {shrink[1]}]; name them")
        low = column_of(inputs["dataset"], inputs["low_latents"], frames, "low_latents")
        if low.shrink != shrink:
            has = f"{low.shrink[0]}x{low.shrink[1]}"
            raise UserError(f"low_latents: are shrunk by {has}, {uri} needs shrink: [{shrink[0]}, {shrink[1]}]")
        columns.append(low)
    for field, column in zip(("latents", "low_latents"), columns, strict=False):
        if column.encoder["digest"] != encoder:
            raise UserError(f"{field}: {inputs[field]} are of another autoencoder than {uri} has learned")
    return dict(zip(("latent", "low"), (column.column for column in columns), strict=False))


def commonest_size(dataset: str, record: Latents) -> tuple[int, int]:
    """Height and width that the latents of most clips have, in positions."""
    sides = records.sides_of(record).T
    kinds, counts = np.unique(sides[:, sides[0] > 0], axis=1, return_counts=True)
    height, width = kinds[:, counts.argmax()].tolist()
    return height, width


def latents_facts(record: Latents, origins: Mapping[str, Any], field: str = "latents") -> dict[str, Any]:
    """What config.json says of the latents that a model has learned: their `uri` and `digest`, or how they were made live.

    Of live ones `live` has the settings, and the `mean`, `std` and `posterior_std` of the windows that were measured.
    """
    if record.live is None:
        return dict(origins[field])
    names = ("size", "shrink", "join_seconds", "precision", "dtype", "count", "mean", "std", "posterior_std")
    measured = {name: getattr(record, name) for name in names}
    return {"column": record.column, "encoder": dict(origins["encoder"]), "live": dict(record.live) | measured}


def statistics(record: Latents, posterior: Literal["sample", "mean"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(C,)` of the training targets: draws from the posteriors, or their means."""
    mean, std = torch.tensor(record.mean), torch.tensor(record.std)
    return mean, (std.square() + torch.tensor(record.posterior_std).square()).sqrt() if posterior == "sample" else std


def decoder_of(record: Latents, uri: str) -> Any:
    """The autoencoder that decodes the latents, frozen, on this rank's device.

    Raises:
        UserError: it is no autoencoder, or has another encoder than the latents.
    """
    codec = load_codec(uri)
    if encoder_digest(codec) != record.encoder["digest"]:
        raise UserError(
            f"vae: {uri} has another encoder than has made the latents, {record.encoder['uri']}; encode again, or name that"
        )
    return codec.requires_grad_(False).to(device())
