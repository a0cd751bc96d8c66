"""What measures are given of a model: held-out clips, and what the model makes, each made once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite, Videos
from longtake.training.metrics.classifier import Classifier
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual
from longtake.training.models.generator import Generator, Infiller, Retriever
from longtake.training.pictures import ImageEncoder


class Clip(NamedTuple):
    """A held-out clip: `video` is uint8 (1, 3, T, H, W) of the suite's size and rate, on the model's device."""

    unit: str  # its source
    key: str
    video: Tensor
    fps: float
    caption: str | None


class Generated(NamedTuple):
    """A generated video.

    unit      its prompt, or itself where there are none
    key       of it among the model's videos
    frames    `frames()` reads it again from the disk: chunks uint8 (1, 3, t, H, W) of the suite's size and rate
    joints    numbers of the frames at which another window, segment or clip begins, at the suite's rate
    own       numbers of the frames that show another one of the model's than the frame before: all, unless its rate is lower
    seconds   that it took to make; nan where it was made in more than one go
    file      an mp4 to look at, in the evaluation's folder
    """

    unit: str
    key: str
    seed: int
    prompt: str | None
    length: int
    frames: Frames
    joints: Sequence[int]
    own: Sequence[int]
    seconds: float
    file: str


class Frames(Protocol):
    def __call__(self, chunk: int = 16) -> Iterator[Tensor]: ...


class Filled(NamedTuple):
    """A gap in a held-out clip that a model has filled.

    begin   the first frame of the gap
    made    uint8 (1, 3, gap, H, W)
    own     numbers of the clip's frames at the model's rate, where that is lower than the suite's; else all
    """

    clip: Clip
    begin: int
    made: Tensor
    own: Sequence[int]


class Retrieved(NamedTuple):
    """Frames that a model retrieved from its memory of a held-out clip, and those that its autoencoder alone keeps.

    `clip.video` is `source`.
    """

    clip: Clip
    source: Tensor  # uint8 (1, 3, t, H, W)
    made: Tensor
    bound: Tensor


class Material(Protocol):
    """All that is the same for the models of an evaluation, and the doors to what each of them makes.

    What is slow to make is kept in the evaluation's folder under the digests of the model and of what was asked of it; so an
    evaluation that was stopped goes on, and measures share it. `made.Made` is the one of a dataset.
    """

    @property
    def suite(self) -> Suite:
        """Its `clips.fps` is a number."""

    def clips(self) -> Iterator[Clip]: ...

    def reconstructed(self, subject: Subject) -> Iterator[tuple[Clip, Tensor]]:
        """Clips, and their reconstructions from all frames, uint8 (1, 3, T, H, W)."""

    def generated(self, subject: Subject, videos: Videos) -> Iterator[Generated]: ...

    def filled(self, subject: Subject) -> Iterator[Filled]:
        """Clips of `gaps.context` frames, a gap, and `gaps.context` frames."""

    def retrieved(self, subject: Subject) -> Iterator[Retrieved]:
        """Clips of up to `suite.seconds`, as much of them as the memory holds, at the suite's rate."""

    def close(self) -> None:
        """Forget what was opened of a model, with all that it holds on the device; it is opened again where it is needed."""

    def generator(self, subject: Subject) -> Generator: ...

    def infiller(self, subject: Subject) -> Infiller: ...

    def retriever(self, subject: Subject) -> Retriever: ...

    def features(self, name: Literal["features", "debiased"] = "features") -> FeatureNetwork: ...

    def classifier(self) -> Classifier: ...

    def perceptual(self) -> Perceptual: ...

    def embedder(self) -> ImageEncoder: ...

    def folder(self, name: Literal["dual"]) -> str:
        """The folder of an encoder that the user names."""
