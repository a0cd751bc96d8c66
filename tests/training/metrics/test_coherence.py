"""Inception score, class and inception coherence, and degradation by chunk, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.metrics.coherence import coherence, inception_score, kl
from longtake.training.metrics.degradation import degradation, heldout_degradation
from longtake.training.metrics.distance import Sample
from longtake.training.metrics.features import FeatureNetwork

TINY = 1e-12


def certain(*classes: int, of: int = 4) -> Tensor:
    """Rows that are sure of their class."""
    return torch.eye(of)[list(classes)].double().clamp_min(TINY).log()


def test_the_inception_score_is_the_number_of_classes_that_come_equally_often_and_surely() -> None:
    assert inception_score(certain(0, 1, 2, 3, 3, 2, 1, 0), 1, 0).mean == pytest.approx(4, rel=1e-6)
    assert inception_score(certain(0, 0, 1, 1), 1, 0).mean == pytest.approx(2, rel=1e-6)
    # a single class, however sure; and no knowledge at all
    assert inception_score(certain(2, 2, 2), 1, 0).mean == pytest.approx(1, rel=1e-6)
    assert inception_score(torch.full((6, 5), 0.2).log(), 3, 0).mean == pytest.approx(1, rel=1e-6)


def test_the_inception_score_of_two_unsure_rows_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).double()
    mean = p.mean(0)
    expected = math.exp(sum(float((row * (row / mean).log()).sum()) for row in p) / 2)
    assert inception_score(p.log(), 1, 0).mean == pytest.approx(expected, rel=1e-9)


def test_splits_are_scored_apart_and_the_seed_says_which_rows_they_have() -> None:
    rows = certain(0, 0, 0, 0, 1, 1, 1, 1)
    by_seed = {seed: inception_score(rows, 2, seed) for seed in range(6)}
    assert by_seed[3] == inception_score(rows, 2, 3)
    # a part of a zeros and b ones scores a^(-a/n) b^(-b/n) n: with both parts of one class each it would be 1
    assert len({round(score.mean, 6) for score in by_seed.values()}) > 1
    assert all(1 <= score.mean < 2 + 1e-9 and score.std >= 0 for score in by_seed.values())
    for splits in (0, 5):
        with pytest.raises(ValueError, match="videos or more, got 8"):
            inception_score(rows, splits, 0)


def test_a_video_that_keeps_its_class_is_coherent() -> None:
    rows = torch.stack([certain(0, 0, 0), certain(1, 1, 1), certain(2, 2, 2), certain(3, 3, 3)])
    found = coherence(rows)
    assert found.ccs.tolist() == [1, 1, 1] and found.ics.abs().max() < 1e-9
    assert found.chance == 0  # no two videos have one class


def test_ccs_is_the_share_that_keeps_its_class_and_chance_that_of_other_videos() -> None:
    rows = torch.stack([certain(0, 0, 1), certain(0, 1, 1), certain(1, 1, 0)])
    found = coherence(rows)
    assert found.ccs.tolist() == pytest.approx([1, 2 / 3, 0])
    later = [[0, 1], [1, 1], [1, 0]]
    pairs = [later[j].count((0, 0, 1)[i]) / 2 for i in range(3) for j in range(3) if i != j]
    assert found.chance == pytest.approx(sum(pairs) / 6)


def test_ics_is_the_divergence_from_the_first_chunk() -> None:
    first, later = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    rows = torch.stack([torch.stack([first, later]), torch.stack([first, first])]).log()
    expected = float((later * (later / first).log()).sum())
    assert coherence(rows).ics.tolist() == pytest.approx([0, expected / 2])
    # the other way round is another number
    assert kl(first.log(), later.log()).item() == pytest.approx(float((first * (first / later).log()).sum()))
    sure = torch.tensor([0.0, 1.0]).log()
    assert kl(sure, torch.tensor([0.5, 0.5]).log()).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1, 4), (3, 4)])
def test_coherence_needs_two_videos_and_two_chunks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 videos and 2 chunks at least"):
        coherence(torch.zeros(shape))


COLOURS = FeatureNetwork("colours", "d" * 64, "bytes", None, videos=lambda levels: levels.mean((2, 3, 4)))


def sample(*levels: float) -> Sample:
    """Still grey videos of these levels."""
    found = Sample("generated", COLOURS)
    for level in levels:
        found.add(torch.full((1, 3, 4, 8, 8), level / 127.5 - 1))
    return found


def test_the_curve_is_the_distance_of_each_chunk_to_the_real_videos() -> None:
    real = sample(100, 104)
    found = degradation(real, [sample(100, 104), sample(110, 114), sample(100, 112)], split="val", seed=3)
    # three equal colours are one direction: means by 10, then by 4 and a spread of sqrt(8) to sqrt(72), each three times
    assert found["frechet"] == pytest.approx([0, 3 * 100, 3 * (16 + (72**0.5 - 8**0.5) ** 2)], abs=1e-6)
    assert found["frechet_rise"] == pytest.approx(found["frechet"][2], abs=1e-6)
    assert len(found["kernel"]) == 3 and found["kernel"][1] > found["kernel"][0]
    record = found["distance"]
    assert (record["network_digest"], record["videos_fake"], record["frames"], record["seed"]) == ("d" * 64, 2, 4, 3)
    assert record["frechet"] == found["frechet"][0]


def test_too_few_videos_are_refused() -> None:
    with pytest.raises(UserError, match="features: generated: 1 sample; a distance"):
        heldout_degradation(sample(1, 2), [sample(3)], 0)
    with pytest.raises(ValueError, match="there is no chunk"):
        degradation(sample(1, 2), [], split="val", seed=0)
