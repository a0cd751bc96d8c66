"""What a VQGAN is measured by: whether its tokens move with their video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtake.training.models.tats.vqgan_evaluate import moved


class Numbers(nn.Module):
    """A token is the brightness of the first of its 4 frames."""

    config = SimpleNamespace(temporal_stride=4, codes=256)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def tokens(self, video: Tensor) -> Tensor:
        return ((video[:, 0, ::4, ::4, ::4] + 1) * 127.5).round().long()


class Places(Numbers):
    """But those of a clip's first latent frame are one more."""

    def tokens(self, video: Tensor) -> Tensor:
        tokens = super().tokens(video)
        tokens[:, 0] += 1
        return tokens


class Clips:
    """Of 16 frames, each as bright as its number says; after the second one comes none that may be read."""

    def at(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            assert number < 2
            frames = torch.arange(16, dtype=torch.uint8) + 100 * number
            yield {"video": frames[None, None, :, None, None].expand(1, 3, 16, 8, 8)}


@pytest.mark.parametrize(("model", "by_step"), [(Numbers(), [1.0, 1.0]), (Places(), [0.0, 1.0])])
def test_tokens_are_compared_with_those_a_latent_frame_later(model: Any, by_step: list[float]) -> None:
    clips: Any = Clips()
    figures, steps = moved(model, clips, 2)
    assert steps == list(enumerate(by_step, 1))
    assert figures["score"] == sum(by_step) / 2 and figures["score_paper"] == pytest.approx(sum(by_step) / 3)
    assert figures["kappa"] == pytest.approx(1.0) if by_step[0] else figures["kappa"] < 0.5
