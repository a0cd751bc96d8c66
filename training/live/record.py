"""The record of live latents: what `latents.json` says of a column, with the statistics of a sample of windows."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.datasets import compact, encoding, schema, storage, view
from longtake.datasets.cache import Cache
from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents, Moments, merged, moments, read_latents, write_latents
from longtake.datasets.loader.live import Live
from longtake.datasets.loader.streams import Lengths
from longtake.training.checkpoint import latest
from longtake.training.live.config import LiveConfig, live_of
from longtake.training.live.encoder import LiveLoader, frozen

_FOLDER = "live"  # in that of the checkpoints


def resolved(config: Any, inputs: Mapping[str, str], folder: Path) -> dict[str, str]:
    """A stage's inputs, where its latents are live with their records in `folder` in the place of columns.

    The first call measures the statistics, each rank its share; then every rank must call it.

    They are measured again where settings or inputs have changed before there is a checkpoint.

    Raises:
        UserError: the encoder is no video autoencoder, or does not fit the settings; no clip is large or long enough.
        Failure: damaged files; latents that are not finite.
    """
    live = live_of(config)
    if live is None:
        return dict(inputs)
    shrinks = {"latents": (1, 1)} | ({"low_latents": live.shrink} if live.shrink else {})
    uris = {field: str(folder / _FOLDER / field) for field in shrinks}
    # the settings of a training that has begun are compared with those of its checkpoint
    begun = latest(folder) is not None
    missing = [
        field
        for field, uri in uris.items()
        if not storage.exists(storage.join(uri, "latents.json"))
        or not (begun or _is_of(read_latents(uri), config, live, inputs, shrinks[field]))
    ]
    if torch.distributed.is_initialized():
        # ranks may read a dataset that grows at different times
        decided = [missing]
        torch.distributed.broadcast_object_list(decided)
        missing = decided[0]
    found = {field: _measured(config, live, inputs, shrinks[field]) for field in missing}
    if missing and torch.distributed.is_initialized():
        torch.distributed.barrier()  # all have looked
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        for field, record in found.items():
            write_latents(uris[field], record)
    if missing and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return dict(inputs) | uris


def live_columns(inputs: Mapping[str, str]) -> dict[str, Latents]:
    """The records of the live columns among a stage's inputs (see `resolved`), by column."""
    if "encoder" not in inputs:
        return {}
    records = [read_latents(inputs[field]) for field in ("latents", "low_latents") if field in inputs]
    return {record.column: record for record in records if record.live is not None}


def column_of(record: Latents) -> Live:
    """The live column of a record."""
    assert record.live is not None
    settings = encoding.Settings(
        size=record.size,
        precision=record.precision,  # type: ignore[arg-type]
        dtype=record.dtype,  # type: ignore[arg-type]
        tile=record.live["tile"],
        overlap=record.live["overlap"],
        batch=record.live["batch"],
        chunk=record.live["chunk"],
        shrink=record.shrink,
        join_seconds=record.join_seconds,
    )
    strides = encoding.Strides(record.stride, record.factor, record.channels)
    return Live(record.column, settings, strides, record.view)


def sides_of(record: Latents) -> np.ndarray:
    """(N, 2) height and width in positions of the latents of each training clip, 0 of one without."""
    base, facts = compact.open_split(record.dataset, "train", None if record.live else record.column)
    sizes = column_of(record).open(base, facts)[1] if record.live else facts
    return np.stack([sizes[name].to_numpy() for name in ("height", "width")], 1)


def _is_of(record: Latents, config: Any, live: LiveConfig, inputs: Mapping[str, str], shrink: tuple[int, int]) -> bool:
    """Whether a record was measured with these settings and inputs."""
    wanted = _chosen(live) | {"shrink": shrink, "windows": live.windows, "seed": config.seed}
    wanted |= {"dataset": storage.absolute(inputs["dataset"]), "view": inputs.get("view"), "uri": inputs["encoder"]}
    # windows are of this length, and a dataset grows while a view is made again
    wanted |= {"frames": config.frames} | _data(inputs)
    own = {name: getattr(record, name) for name in wanted if hasattr(record, name)}
    own |= {"uri": record.encoder["uri"]} | dict(record.live or {})
    # as JSON: a record's tuples are lists once it is read
    return json.dumps(own, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _data(inputs: Mapping[str, str]) -> dict[str, Any]:
    """Digests of the splits of the dataset, and of the view."""
    bases = {split: compact.open_split(storage.absolute(inputs["dataset"]), split)[0] for split in schema.SPLITS}
    views = [view.kept(base, inputs.get("view"))[2] for base in bases.values()]
    return {"digests": {split: base.digest for split, base in bases.items()}, "view_digest": views[0]}


def _chosen(live: LiveConfig) -> dict[str, Any]:
    """The settings of a column of latents."""
    names = {"size", "precision", "dtype", "tile", "overlap", "batch", "chunk", "join_seconds"}
    return live.model_dump(include=names)


def _measured(config: Any, live: LiveConfig, inputs: Mapping[str, str], shrink: tuple[int, int]) -> Latents:
    """The record of a column, with the statistics of `live.windows` windows, drawn by the training's seed."""
    dataset, uri = storage.absolute(inputs["dataset"]), inputs["encoder"]
    model, digest = frozen(uri, live.precision)
    strides = encoding.strides_of(model, uri)
    chosen = _chosen(live)
    settings = encoding.Settings(**chosen | {"shrink": shrink})
    encoding.check(settings, strides.stride)
    data = _data(inputs)
    name = encoding.column_name(digest, settings, data["view_digest"])
    column = Live(name, settings, strides, inputs.get("view"))
    found = _statistics(config, live, column, inputs)
    return Latents(
        dataset=dataset,
        column=name,
        encoder={"uri": uri, "digest": digest, "model": type(model).__name__}
        | {"config": dict(model.config.model_dump(mode="json"))},
        **asdict(strides),
        **{field: chosen[field] for field in ("size", "precision", "dtype", "join_seconds")},
        shrink=shrink,
        count=found.count,
        mean=tuple(found.mean.tolist()),
        std=tuple(np.sqrt(found.m2 / found.count).tolist()),
        posterior_std=tuple(np.sqrt(found.variance).tolist()),
        view=inputs.get("view"),
        digests=data["digests"],
        live={field: chosen[field] for field in ("tile", "overlap", "batch", "chunk")}
        | {"windows": live.windows, "seed": config.seed, "frames": config.frames, "view_digest": data["view_digest"]},
    )


def _statistics(config: Any, live: LiveConfig, column: Live, inputs: Mapping[str, str]) -> Moments:
    """The moments of the windows; the same to the last bit for any number of ranks, on the same kind of machine."""
    options: dict[str, Any] = {"columns": {"latent": column.column}, "frames": config.frames, "batch": 1}
    options |= {"seed": config.seed, "view": inputs.get("view")}
    # a window anywhere in a stream, and nothing before it
    options |= {"histories": Lengths((0,), 0)} if column.settings.join_seconds else {}
    cache = config.run.cache
    options["cache"] = Cache(cache.folder, cache.max_bytes) if cache else None
    loader = LiveLoader(inputs["encoder"], 1, inputs["dataset"], "train", live={column.column: column}, **options)
    if not loader.samples:
        raise UserError(
            f"dataset: {inputs['dataset']}: no clip is as long as a window and as large as live.size; lower them"
        )
    rank, world = 0, 1
    if torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    numbers = range(rank, live.windows, world)
    own = {}
    for number, batch in zip(numbers, loader.at(numbers), strict=True):
        own[number] = merged(moments(batch["latent"][0].permute(2, 0, 1, 3, 4).float().cpu().numpy()))
    parts = [own]
    if world > 1:
        parts = [own] * world
        torch.distributed.all_gather_object(parts, own)
    found = {number: part for each in parts for number, part in each.items()}
    return merged(found[number] for number in sorted(found))
