"""Metrics of registered models on held-out clips, clip by clip: two models see the same clips, noise and times.

A model's kind says which metrics it has and how one clip is measured (see `longtake.training.models.kind`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.training import registry
from longtake.training.data import on_device
from longtake.training.engines import device
from longtake.training.models import judge_of, kind_of
from longtake.training.models.common.condition import Condition, of_batch, of_classes
from longtake.training.models.kind import Judged
from longtake.training.objective import Batch
from longtake.training.registry.gate import Better, Gate, Rows, Window, check


def load(uri: str) -> Judged:
    """A registered model, on this rank's device. Raises UserError, Failure as `registry.load`."""
    model, facts = registry.load_with_facts(uri)
    return Judged(uri, model.to(device()).eval(), facts)


def better_of(judged: Judged) -> Mapping[str, Better]:
    """The metrics that such a model can have, and the better direction of each."""
    return judge_of(judged.facts).better


def rows_of(
    candidate: Judged, champion: Judged | None, inputs: Mapping[str, str], gate: Gate
) -> tuple[Rows, Rows | None]:
    """The figures of both, by source and clip, on up to `gate.samples` clips of the val split.

    Args:
        inputs: URIs `dataset` and, if any, `view`, `latents`, `low_latents`, `text`, `pooled`, `tokens`,
            `audio_tokens`, `captions`.

    Raises:
        UserError: models that do not compare, or do not take the window; inputs that they need and do not have.
        Failure: damaged files.
    """
    check(gate, sorted(better_of(candidate)), better_of(candidate))
    window = _window(candidate, champion, gate.window)
    if champion is None:
        return _measured(candidate, inputs, window, gate, 1.0), None
    ours, theirs = (kind_of(each.facts).what for each in (candidate, champion))
    if ours != theirs:
        raise UserError(f"{candidate.uri} is a {ours}, {champion.uri} a {theirs}; register them by different names")
    if candidate.encoder() != champion.encoder():
        raise UserError(
            f"{candidate.uri} has learned latents of another autoencoder than {champion.uri}: their losses do not compare;"
            " promote: true in its training stage makes it champion as it is"
        )
    return (
        _measured(candidate, inputs, window, gate, _unit(candidate, champion)),
        _measured(champion, inputs, window, gate, 1.0),
    )


def _window(candidate: Judged, champion: Judged | None, gate: Window) -> Window:
    """The gate's window, completed by that of the models. Raises UserError where they do not agree on what it leaves open."""
    fields = judge_of(candidate.facts).window
    for field in ("stride", "size", "history_seconds", "history_least"):
        if field not in fields and getattr(gate, field) is not None:
            why = "sees latents, which have their own" if field in ("stride", "size") else "has no memory"
            raise UserError(f"gate: window: {field}: {candidate.uri} {why}; leave it out")
    ours = trained_on(candidate)
    theirs = trained_on(champion) if champion else ours
    settled: dict[str, Any] = {}
    for field in ("frames", "stride", "size", "history_seconds"):
        value = getattr(gate, field)
        if value is None and getattr(ours, field) != getattr(theirs, field):
            raise UserError(
                f"{candidate.uri} was made for {field} {getattr(ours, field)}, its champion for {getattr(theirs, field)};"
                f" say in the gate what to compare them on, such as window: {{{field}: {_as_list(getattr(ours, field))}}}"
            )
        settled[field] = getattr(ours, field) if value is None else value
    if settled["frames"] is None:
        raise UserError(
            f"{candidate.uri}: its config.json has no window; give the gate one, such as window: {{frames: 17}}"
        )
    return Window(**settled, history_least=gate.history_least)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def trained_on(judged: Judged) -> Window:
    """The window that a model was trained on."""
    window, pixels = judged.facts.get("window") or {}, judged.encoder() is None
    return Window(
        frames=window.get("frames"),
        stride=window.get("stride", 1) if pixels else None,
        size=window.get("size") if pixels else None,
        history_seconds=(judged.facts.get("history") or {}).get("seconds"),
    )


def _unit(candidate: Judged, champion: Judged) -> Tensor | float:
    """The factor from errors of the candidate to the champion's units: models divide channels by different deviations."""
    ours, theirs = (dict(each.model.named_buffers()).get("latent_std") for each in (candidate, champion))
    return 1.0 if ours is None or theirs is None else (ours / theirs).view(1, -1, 1, 1, 1)


@torch.inference_mode()
def _measured(judged: Judged, inputs: Mapping[str, str], window: Window, gate: Gate, unit: Tensor | float) -> Rows:
    loader, figures = _loader(judged, inputs, window, gate.seed), judge_of(judged.facts).figures
    count = min(gate.samples, loader.samples)
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for batch in tqdm(islice(loader, count), f"measure {judged.uri}", count, unit="clip"):
        key = batch["key"][0]
        try:
            condition = _condition(judged, batch, loader.classes)
            metrics = figures(judged, on_device(batch), condition, _seed(gate.seed, key), unit)
        except UserError:
            raise
        except ValueError as e:
            raise UserError(f"{judged.uri}: does not take this window: {e}; change the gate's window") from e
        if metrics:
            rows[key.rpartition("-")[0], key] = metrics
    return rows


def _loader(judged: Judged, inputs: Mapping[str, str], window: Window, seed: int) -> Loader:
    """Windows of held-out clips in a random order, one at a time, of the columns that this model sees."""
    options = judge_of(judged.facts).options(judged, inputs, window)
    columns = options.pop("columns") | ({"label": "label"} if judged.facts.get("classes") else {})
    return Loader(
        inputs["dataset"], "val", view=inputs.get("view"), columns=columns, frames=window.frames or 1, batch=1,
        last="pad", seed=seed, epochs=1, **options,
    )  # fmt: skip


def _condition(judged: Judged, batch: Batch, classes: list[str]) -> Condition | None:
    """What the model is told of a clip: its text, and its label by the model's own number.

    A dataset may have got more classes since the model learned them.
    """
    given = replace(of_batch(batch), chances=None)
    if "label" not in batch:
        return None if given.text is None and given.audio is None else given
    learned = list(judged.facts["classes"])
    names = [classes[int(label)] if label >= 0 else "" for label in batch["label"]]
    ids = of_classes(learned.index(name) if name in learned else None for name in names)
    return replace(given, classes=ids.classes)


def _seed(seed: int, key: str) -> int:
    """A seed that depends only on the clip, not on order or neighbours."""
    return int(np.frombuffer(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "<u4")[0])
