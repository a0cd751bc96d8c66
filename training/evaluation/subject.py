"""A registered model that is measured, loaded once, with what it can do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.evaluation.suite import Aspect
from longtake.training.foreign.folder import is_foreign
from longtake.training.models import kind_of
from longtake.training.models.kind import Kind
from longtake.training.registry import cache, disk, pipelines, store
from longtake.training.registry.foreign import check_ours
from longtake.training.registry.uri import in_store

_ELSEWHERE = ("lineage", "longtake")  # of config.json: where a model comes from, not what it does


@dataclass
class Subject:
    """A model under measurement.

    uri      as the user named it
    pinned   models:/NAME/VERSION, or the folder
    digest   sha256 of its config and weights
    facts    its config.json
    kind     its row
    module   on this rank's device, in evaluation mode
    """

    uri: str
    pinned: str
    digest: str
    facts: Mapping[str, Any]
    kind: Kind
    module: Any


class Named(NamedTuple):
    """A model before it is loaded: the same fields, but for the module."""

    uri: str
    pinned: str
    digest: str
    facts: Mapping[str, Any]
    kind: Kind


def described(uri: str) -> Named:
    """What a URI names, without its weights in memory. Raises UserError, Failure as `load`."""
    pinned = _pinned(uri)
    folder = cache.pull(pinned) if in_store(pinned) else pipelines.local(pinned)
    if is_foreign(folder) or not (folder / "config.json").is_file():
        subject = load(uri)
        return Named(subject.uri, subject.pinned, subject.digest, subject.facts, subject.kind)
    facts = disk.read_config(folder)
    check_ours(uri, facts)
    return Named(uri, pinned, digest_of(facts), facts, kind_of(facts))


def load(uri: str) -> Subject:
    """A model of the registry, a model folder, or the folder of a pipeline or an autoencoder of another library.

    Raises:
        UserError: there is no such model, or it is of no kind that is measured.
        Failure: it is damaged; the store cannot be reached.
    """
    pinned = _pinned(uri)
    try:
        module, facts = registry.load_with_facts(pinned, "transformer", "first")
    except UserError:
        folder = cache.pull(pinned) if in_store(pinned) else pipelines.local(pinned)
        if not is_foreign(folder):
            raise
        # an autoencoder without its transformer
        module, facts = registry.load_with_facts(pinned, "vae")
    kind = kind_of(facts)
    if kind.complete:
        facts = dict(kind.complete(pinned, facts))
    return Subject(uri, pinned, digest_of(facts), facts, kind, module.to(device()).eval())


def loaded(named: Named) -> Subject:
    """A described model with its weights: its version, wherever its alias points by now.

    Raises:
        UserError: its folder has another model by now.
        Failure: as `load`.
    """
    subject = load(named.pinned)
    if subject.digest != named.digest:
        raise UserError(f"{named.uri}: has changed since this evaluation began; run the same command again")
    return replace(subject, uri=named.uri)


def digest_of(facts: Mapping[str, Any]) -> str:
    """The sha256 that results of a model are kept by: of its config.json, which has those of its weights."""
    decisive = {name: value for name, value in facts.items() if name not in _ELSEWHERE}
    return hashlib.sha256(storage.canonical_json(decisive)).hexdigest()


def _pinned(uri: str) -> str:
    if in_store(uri):
        return str(store.resolve(uri)["uri"])
    return str(Path(pipelines.local(uri)).absolute())


def aspects(kind: Kind) -> frozenset[Aspect]:
    """What models of a kind do, and so which measures they have."""
    if "spectrogram" in kind.config.model_fields:
        return frozenset()  # an autoencoder of sound answers, and refuses videos
    does: dict[Aspect, Any] = {
        "reconstructs": kind.answer and not kind.retriever,
        "generates": kind.generator,
        "retrieves": kind.retriever,
        "fills": kind.infiller,
        "runs": True,
    }
    return frozenset(aspect for aspect, row in does.items() if row)
