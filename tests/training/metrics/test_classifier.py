"""Classifiers from files: what they get to see, what their rows are taken for, and what is refused."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.metrics.classifier import load_classifier, log_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")


class Colours(nn.Module):
    """Logits of three classes: the mean of each colour, in units of 100 levels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3, 4]) / 100


class Shares(nn.Module):
    """Probabilities: the share of each colour."""

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=[2, 3, 4])
        return means / means.sum(dim=1, keepdim=True)


class Told(nn.Module):
    """The interface of StyleGAN-V's I3D: says what it was told."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = True) -> Tensor:
        return torch.tensor([[float(rescale), float(resize), float(return_features)]]).expand(x.shape[0], 3)


class Picky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != 16:
            raise ValueError("sixteen frames alone")
        return x.mean(dim=[2, 3, 4])


class Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[1, 2, 3, 4])[:, None]


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=2)


def script(module: nn.Module, folder: Path) -> str:
    path = folder / f"{type(module).__name__.lower()}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def clip(*levels: float) -> Tensor:
    """A still clip of a colour, `(1, 3, 4, 8, 8)`."""
    return (torch.tensor(levels) / 127.5 - 1)[None, :, None, None, None].expand(1, 3, 4, 8, 8)


def test_logits_and_probabilities_are_told_apart_and_become_the_same_thing(tmp_path: Path) -> None:
    logits = load_classifier(script(Colours(), tmp_path), 4, (8, 8))
    shares = load_classifier(script(Shares(), tmp_path), 4, (8, 8))
    assert (logits.gives, shares.gives) == ("logits", "probabilities")
    video = torch.cat([clip(100, 0, 50), clip(20, 20, 160)])
    torch.testing.assert_close(
        log_probabilities(logits, video).exp(),
        torch.softmax(torch.tensor([[1.0, 0, 0.5], [0.2, 0.2, 1.6]]).double(), 1),
        rtol=1e-6, atol=1e-8,
    )  # fmt: skip
    found = log_probabilities(shares, video)
    torch.testing.assert_close(
        found.exp(), torch.tensor([[2 / 3, 0, 1 / 3], [0.1, 0.1, 0.8]]).double(), rtol=1e-6, atol=1e-8
    )
    assert found.isfinite().all()


def test_a_record_names_the_file_by_its_digest(tmp_path: Path) -> None:
    path = script(Colours(), tmp_path)
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    expected = {"classifier": "colours", "classifier_digest": sha256, "classes": 3, "gives": "logits"}
    assert load_classifier(path, 4, (8, 8), digest=sha256).record() == expected
    with pytest.raises(UserError, match="expected " + "0" * 64):
        load_classifier(path, 4, (8, 8), digest="0" * 64)


def test_the_video_interface_is_told_to_scale_and_to_classify(tmp_path: Path) -> None:
    told = load_classifier(script(Told(), tmp_path), 4, (8, 8))
    assert told.run(clip(0, 0, 0)).tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Picky(), "takes no clips of 4 frames of 8x8"),
        (Single(), "makes no row of finite numbers of clips of 4 frames of 8x8"),
        (Maps(), "makes no row of finite numbers"),
    ],
    ids=["raises", "one class", "maps"],
)
def test_what_is_no_classifier_of_such_clips_is_refused_in_one_line(
    tmp_path: Path, module: nn.Module, why: str
) -> None:
    with pytest.raises(UserError, match=why) as e:
        load_classifier(script(module, tmp_path), 4, (8, 8))
    assert "\n" not in str(e.value)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.pt"
    torch.save(Colours(), path)
    with pytest.raises(UserError, match=r"classifier\.pt: no TorchScript archive"):
        load_classifier(str(path), 4, (8, 8))
