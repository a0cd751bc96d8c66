"""The networks that a user brings to an evaluation, each loaded once, and what its figures say of them."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import torch

from longtake.datasets.dual import check
from longtake.datasets.errors import UserError
from longtake.datasets.pictures import opened
from longtake.training.engines import device
from longtake.training.evaluation.suite import Clips, Networks
from longtake.training.metrics.classifier import Classifier, load_classifier
from longtake.training.metrics.features import FeatureNetwork, checked_network, digest_of, read_file, reason
from longtake.training.metrics.perceptual import Perceptual, checked_perceptual
from longtake.training.pictures import ImageEncoder, load_image_encoder

FOLDERS = ("dual",)


class Brought:
    """Networks by their fields in `suite.Networks`, for clips as a suite has them.

    Each raises UserError where its file is missing, or is of another interface.
    """

    def __init__(self, named: Networks, clips: Clips) -> None:
        self._named, self._clips = named, clips

    @cached_property
    def features(self) -> FeatureNetwork:
        return self._network("features")

    @cached_property
    def debiased(self) -> FeatureNetwork:
        return self._network("debiased")

    def _network(self, name: Literal["features", "debiased"]) -> FeatureNetwork:
        network = checked_network(self._path(name), self._clips.frames, self._clips.size, name)
        assert network is not None
        return network

    @cached_property
    def classifier(self) -> Classifier:
        return load_classifier(self._path("classifier"), self._clips.frames, self._clips.size, device=device())

    @cached_property
    def perceptual(self) -> Perceptual:
        perceptual = checked_perceptual(self._path("perceptual"), self._named.linear, self._clips.size)
        assert perceptual is not None
        return perceptual

    @cached_property
    def dual(self) -> str:
        path = self._path("dual")
        check(opened(path, "dual"))
        return path

    @cached_property
    def embedder(self) -> ImageEncoder:
        encoder, frames = (
            load_image_encoder(self._path("embedder"), device(), "embedder"),
            torch.zeros(2, 3, *self._clips.size),
        )
        try:
            with torch.no_grad():
                encoder.embeddings(frames.to(device()))
        except (RuntimeError, ValueError, torch.jit.Error) as e:
            height, width = self._clips.size
            why = reason(e)
            raise UserError(f"embedder: {self._path('embedder')}: takes no frames of {height}x{width} ({why})") from e
        return encoder

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of these fields that the user has not named."""
        return [name for name in names if getattr(self._named, name) is None]

    def record(self, names: Iterable[str]) -> dict[str, Any]:
        """What makes figures by these networks comparable: their digests, and how pixels are put into them."""
        record: dict[str, Any] = {}
        for name in names:
            if name in FOLDERS:
                record[name] = {"digest": digest_of(getattr(self, name)), "resize": "by its preprocessor config"}
            elif name == "embedder":
                embedder = self.embedder
                facts = {"embedding": embedder.pooling, "resize": embedder.resize or "none"}
                record[name] = {"digest": embedder.digest, **facts}
            else:
                record[name] = getattr(self, name).record()
            if name == "perceptual" and self._named.linear:
                record[name]["linear"] = hashlib.sha256(read_file(self._named.linear)).hexdigest()
        return record

    def _path(self, name: str) -> str:
        path: str | None = getattr(self._named, name)
        if path is None:
            raise UserError(f"{name}: is not named; give --{name}, or {name}: in the stage")
        return path
