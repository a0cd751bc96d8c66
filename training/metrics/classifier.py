"""Classifiers of clips from a TorchScript file that the user names, such as a C3D that has learned UCF-101's classes.

As in features.py nothing is downloaded or unpickled; but an archive is code, so it must come from a place you trust.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.networks import is_torchscript, load_torchscript
from longtake.training.metrics.features import (
    VIDEO_ARGUMENTS,
    frozen,
    levels_of,
    read_file,
)

_LEAST = 1e-12  # of a probability, whose logarithm is finite


@dataclass(frozen=True)
class Classifier:
    """A frozen classifier. `run` makes a row of each clip (B, 3, T, H, W) in 0..255."""

    name: str  # of the file
    digest: str  # sha256 of the file
    classes: int
    gives: Literal["logits", "probabilities"]
    run: Callable[[Tensor], Tensor]

    def record(self) -> dict[str, Any]:
        """What makes two values comparable, flat, for JSON."""
        return {
            "classifier": self.name,
            "classifier_digest": self.digest,
            "classes": self.classes,
            "gives": self.gives,
        }


def load_classifier(
    path: str, frames: int, size: tuple[int, int], *, digest: str | None = None, device: torch.device | str = "cpu"
) -> Classifier:
    """A classifier of clips of `frames` frames of (height, width) pixels, in fp32, after it has taken a grey one.

    It gets (B, 3, T, H, W) in 0..255, and scales them as it needs itself; one whose `forward` has the arguments `rescale`,
    `resize` and `return_features` (StyleGAN-V's I3D) is told to. What it makes of the grey clip says whether its rows are
    probabilities, which are not negative and have the sum 1, or logits.

    Args:
        path: local path or any fsspec URL.
        digest: the sha256 that the file must have.

    Raises:
        UserError: no such file, another digest, no TorchScript archive; a network that makes no row of each such clip.
    """
    data = read_file(path, digest)
    if not is_torchscript(data):
        raise UserError(f"{path}: no TorchScript archive; save the classifier by torch.jit.script(...).save")
    module = frozen(load_torchscript(data, path, device), device)
    run: Callable[[Tensor], Any] = module
    if {argument.name for argument in module.forward.schema.arguments} >= VIDEO_ARGUMENTS:
        run = partial(module, rescale=True, resize=True, return_features=False)
    what = f"clips of {frames} frames of {size[0]}x{size[1]}"
    try:
        with torch.no_grad():
            row = run(torch.full((1, 3, frames, *size), 128.0, device=device))
    except (RuntimeError, torch.jit.Error) as e:  # operators raise the first, a `raise` of the script the second
        raise UserError(f"{path}: takes no {what} ({str(e).strip().splitlines()[-1][:120]})") from e
    if not isinstance(row, Tensor) or row.ndim != 2 or len(row) != 1 or row.shape[1] < 2 or not row.isfinite().all():
        raise UserError(f"{path}: makes no row of finite numbers of {what}; a classifier has one for each class")
    sums_to_one = bool((row >= 0).all()) and abs(float(row.double().sum()) - 1) < 1e-3
    sha256 = hashlib.sha256(data).hexdigest()
    gives: Literal["logits", "probabilities"] = "probabilities" if sums_to_one else "logits"
    return Classifier(PurePosixPath(path).stem, sha256, row.shape[1], gives, run)


@torch.no_grad()
def log_probabilities(classifier: Classifier, video: Tensor) -> Tensor:
    """The logarithm of each class's probability, (B, classes) float64, of clips (B, 3, T, H, W) in [-1, 1].

    Pixels are rounded to 0..255 first, as `features` does.
    """
    with torch.autocast(video.device.type, enabled=False):
        rows = classifier.run(levels_of(video)).double()
    if classifier.gives == "logits":
        return rows.log_softmax(1)
    return rows.clamp_min(_LEAST).log()
