"""What a registered model is worth on held-out clips, clip by clip, so that two can be compared: by the same clips, noise and times.

A `pv_vae` has `psnr_all`, `ssim_all`, `psnr_visible` and, of windows of more than a frame, `psnr_predicted` (see heldout.py).
A prior has `loss`: that of its flow, averaged over times, in the units that the champion normalises latents by; given the
history, of a model with a memory, or for one that retrieves, the memory of all (see retrieval.py).
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from longtake.datasets.errors import UserError
from longtake.datasets.latents import read_latents
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.loader.streams import Lengths
from longtake.training import data as latent_data
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.loop import Batch
from longtake.training.models.common import flow
from longtake.training.models.latte import evaluate as generated
from longtake.training.models.latte.model import Latte
from longtake.training.models.memory import continuation, retrieval
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.history import given_of, steps_of, true_steps, whole_of
from longtake.training.models.memory.shared import on_device
from longtake.training.models.pv_vae import evaluate as heldout
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.registry.gate import Better, Gate, Rows, Window, check

BETTER: dict[str, Better] = {
    "psnr_all": "higher",
    "ssim_all": "higher",
    "psnr_visible": "higher",
    "psnr_predicted": "higher",
    "loss": "lower",
}


class Judged(NamedTuple):
    """A registered version, its module on this device, and what its config.json says of it."""

    uri: str
    model: nn.Module
    facts: Mapping[str, Any]

    def encoder(self) -> str | None:
        """Digest of what has made the latents that it has learned; None where it sees pixels."""
        found: str | None = (self.facts.get("vae") or {}).get("encoder")
        return found

    def window(self) -> Window:
        """What it was trained on."""
        known = self.facts.get("window") or {}
        pixels = self.encoder() is None
        return Window(
            frames=known.get("frames"),
            stride=known.get("stride", 1) if pixels else None,
            size=known.get("size") if pixels else None,
            history_seconds=(self.facts.get("history") or {}).get("seconds"),
        )


def load(uri: str) -> Judged:
    """Raises UserError, Failure as `registry.load`."""
    model, facts = registry.load_with_facts(uri)
    return Judged(uri, model.to(device()).eval(), facts)


def metrics_of(judged: Judged) -> list[str]:
    """The metrics that such a model can have."""
    return sorted(name for name in BETTER if (name == "loss") != isinstance(judged.model, PVVAE))


def rows_of(
    candidate: Judged, champion: Judged | None, inputs: Mapping[str, str], gate: Gate
) -> tuple[Rows, Rows | None]:
    """The figures of both, by source and clip, on up to `gate.samples` clips of the val split.

    Args:
        inputs: URIs `dataset` and, where there are, `view`, `latents`, `low_latents`.

    Raises:
        UserError: models that do not compare, or do not take the window; inputs that they need and do not have.
        Failure: damaged files.
    """
    check(gate, metrics_of(candidate), BETTER)
    window = _window(candidate, champion, gate.window)
    if champion is None:
        return _measured(candidate, inputs, window, gate, 1.0), None
    what = [(type(each.model).__name__, each.facts.get("stage")) for each in (candidate, champion)]
    if what[0] != what[1]:
        kinds = [" that does ".join(filter(None, kind)) for kind in what]
        raise UserError(
            f"{candidate.uri} is a {kinds[0]}, {champion.uri} a {kinds[1]}; register them by different names"
        )
    if candidate.encoder() != champion.encoder():
        raise UserError(
            f"{candidate.uri} has learned latents of another autoencoder than {champion.uri}: their losses do not compare;"
            " promote: true in its training stage makes it champion as it is"
        )
    return (
        _measured(candidate, inputs, window, gate, _unit(candidate, champion)),
        _measured(champion, inputs, window, gate, 1.0),
    )


def _window(candidate: Judged, champion: Judged | None, asked: Window) -> Window:
    """The gate's window, completed by that of the models. Raises UserError where they do not agree on what it leaves open."""
    pixels, remembers = candidate.encoder() is None, isinstance(candidate.model, MemoryDiT)
    for field, used in (
        ("stride", pixels),
        ("size", pixels),
        ("history_seconds", remembers),
        ("history_least", remembers),
    ):
        if not used and getattr(asked, field) is not None:
            why = "sees latents, which have their own" if field in ("stride", "size") else "has no memory"
            raise UserError(f"gate: window: {field}: {candidate.uri} {why}; leave it out")
    own = candidate.window()
    theirs = champion.window() if champion else own
    settled: dict[str, Any] = {}
    for field in ("frames", "stride", "size", "history_seconds"):
        value = getattr(asked, field)
        if value is None and getattr(own, field) != getattr(theirs, field):
            raise UserError(
                f"{candidate.uri} was made for {field} {getattr(own, field)}, its champion for {getattr(theirs, field)};"
                f" say in the gate what to compare them on, such as window: {{{field}: {_plain(getattr(own, field))}}}"
            )
        settled[field] = getattr(own, field) if value is None else value
    if settled["frames"] is None:
        raise UserError(
            f"{candidate.uri}: its config.json has no window; give the gate one, such as window: {{frames: 17}}"
        )
    return Window(**settled, history_least=asked.history_least)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unit(candidate: Judged, champion: Judged) -> Tensor | float:
    """What errors of the candidate count in the champion's units: channels that it divides by more count as much more."""
    if isinstance(candidate.model, PVVAE):
        return 1.0
    ours, theirs = (each.model.get_buffer("latent_std") for each in (candidate, champion))
    return (ours / theirs).view(1, -1, 1, 1, 1)


@torch.inference_mode()
def _measured(judged: Judged, inputs: Mapping[str, str], window: Window, gate: Gate, unit: Tensor | float) -> Rows:
    loader = _loader(judged, inputs, window, gate.seed)
    count = min(gate.samples, loader.samples)
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for batch in tqdm(islice(loader, count), f"measure {judged.uri}", count, unit="clip"):
        key = batch["key"][0]
        try:
            found = _figures(judged, on_device(batch), loader.classes, _seed(gate.seed, key), unit)
        except UserError:
            raise
        except ValueError as e:
            raise UserError(f"{judged.uri}: does not take this window: {e}; change the gate's window") from e
        if found:
            rows[key.rpartition("-")[0], key] = found
    return rows


def _loader(judged: Judged, inputs: Mapping[str, str], window: Window, seed: int) -> Loader:
    """Windows of held-out clips in a random order, one at a time, of the columns that this model sees."""
    columns, options = ["video"], dict[str, Any]()
    if judged.encoder() is None:
        options = {"stride": window.stride, "size": window.size or (64, 64)}
    else:
        columns = _latents(judged, inputs, window)
        # generated videos begin with a clip's first latent, which few windows of long clips have
        options = {"clip_starts": 0.5} if isinstance(judged.model, Latte) else {}
    if isinstance(judged.model, MemoryDiT):
        options = {"histories": _histories(judged, inputs, window)}
    if judged.facts.get("classes"):
        columns.append("label")
    return Loader(
        inputs["dataset"], "val", view=inputs.get("view"), columns=columns, frames=window.frames or 1, batch=1,
        last="pad", seed=seed, epochs=1, **options,
    )  # fmt: skip


def _histories(judged: Judged, inputs: Mapping[str, str], window: Window) -> Lengths:
    """Of whole segments, whatever the model: the same for its champion."""
    factor = read_latents(inputs["latents"]).factor
    per_second, segment = judged.facts["window"]["fps"] / factor, 1 + ((window.frames or 1) - 1) // factor
    most = max(1, round((window.history_seconds or 0.0) * per_second))
    some = (*range(segment, most, segment), -(-most // segment) * segment)
    return Lengths(some, most, unit=segment, least=round((window.history_least or 0.0) * per_second))


def _latents(judged: Judged, inputs: Mapping[str, str], window: Window) -> list[str]:
    """The columns of latents that a model has learned. Raises UserError where they are not given."""
    if "latents" not in inputs:
        raise UserError(f"latents: {judged.uri} has learned latents; name what their `cache_latents` stage has made")
    made = latent_data.column_of(inputs["dataset"], inputs["latents"], window.frames or 1)
    shrink = judged.model.config.shrink if isinstance(judged.model, MemoryDiT) else None
    columns = [made]
    if shrink not in (None, (1, 1)):
        if "low_latents" not in inputs:
            raise UserError(f"low_latents: {judged.uri} needs those with shrink: [{shrink[0]}, {shrink[1]}]; name them")
        low = latent_data.column_of(inputs["dataset"], inputs["low_latents"], window.frames or 1, "low_latents")
        if low.shrink != shrink:
            has = f"{low.shrink[0]}x{low.shrink[1]}"
            raise UserError(f"low_latents: are shrunk by {has}, {judged.uri} needs shrink: [{shrink[0]}, {shrink[1]}]")
        columns.append(low)
    for field, column in zip(("latents", "low_latents"), columns, strict=False):
        if column.encoder["digest"] != judged.encoder():
            raise UserError(f"{field}: {inputs[field]} are of another autoencoder than {judged.uri} has learned")
    return [column.column for column in columns]


def _figures(judged: Judged, batch: Batch, classes: list[str], seed: int, unit: Tensor | float) -> dict[str, float]:
    """Those of one clip; none where its history is too short to be remembered."""
    model = judged.model
    if isinstance(model, PVVAE):
        found, _, _ = heldout.compared(model, to_model(batch["video"]))
        return {name: value for name, value in found.items() if name in BETTER}
    ids = _ids(judged, batch, classes)
    if isinstance(model, Latte):
        if judged.encoder() is None:
            losses = generated.heldout_losses(model, [(to_model(batch["video"]), ids)], seed, unit)
        else:
            clip = model.normalise(batch["latent"][:, 0].float())
            losses = generated.heldout_losses(partial(model, start=batch["start"]), [(clip, ids)], seed, unit)
        return {"loss": float(losses.mean())}
    assert isinstance(model, MemoryDiT)
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    steps = steps_of(batch, model, room)
    if judged.facts.get("stage") == "retrieval":
        if int(true_steps(batch, room)) + segment < model.config.group:
            return {}
        steps = whole_of(steps, batch["stream_step"] + segment, model.config)
        losses = retrieval.heldout_losses(model, [(steps, ids)], seed, unit)
    else:
        given = given_of(steps, segment, batch["stream_step"], model.config)
        losses = continuation.heldout_losses(model, [(given, ids)], seed, unit)
    return {"loss": float(losses.mean())}


def _ids(judged: Judged, batch: Batch, classes: list[str]) -> Tensor | None:
    """The labels by the model's own numbers: a dataset may have got more classes since it learned them."""
    if "label" not in batch:
        return None
    known = list(judged.facts["classes"])
    names = [classes[int(label)] if label >= 0 else "" for label in batch["label"]]
    return torch.tensor([known.index(name) if name in known else flow.NO_CLASS for name in names])


def _seed(seed: int, key: str) -> int:
    """Of a clip's noise: its own, in whatever order and among whatever others it comes."""
    return int(np.frombuffer(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "<u4")[0])
