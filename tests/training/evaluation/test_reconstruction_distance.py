"""The distance of reconstructions to their sources: against a public implementation, and with sources drawn together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from materials import Fixed, clip, noise, subject, suite
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from longtake.training.evaluation.bootstrap import draws
from longtake.training.evaluation.measures import load
from longtake.training.evaluation.record import Result
from longtake.training.metrics.distance import frechet_distance, kernel_distance, moments
from longtake.training.metrics.features import FeatureNetwork

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics"),
]

SOURCES = 12  # with two clips each


def colours(levels: Tensor) -> Tensor:
    """The colours of the first and the last frame, in 0..1."""
    return (levels[:, :, [0, -1]].mean((3, 4)) / 255).flatten(1)


class Flat(nn.Module):
    """Features as they are."""

    num_features = 6

    def forward(self, rows: Tensor) -> Tensor:
        return rows.flatten(1)


def material(count: int = 2 * SOURCES) -> Fixed:
    held = [clip(noise(2, (4, 4), n), f"source-{n // 2:02d}", n) for n in range(count)]
    copies = [each.video // 4 * 3 + 40 for each in held]
    return Fixed(suite(clips={"frames": 2}), held, copies=copies, networks={"features": network()})


def network() -> FeatureNetwork:
    return FeatureNetwork("colours", "0" * 64, "bytes", None, videos=colours)


def rows(found: Fixed) -> list[Tensor]:
    return [
        colours(torch.cat([video.float() for video in side])) for side in ([c.video for c in found.held], found.copies)
    ]


def run(found: Fixed) -> Result:
    return load("reconstruction_distance").run(subject(None, {"model": "pv_vae"}), found)


def test_it_is_that_of_torchmetrics_on_the_same_features() -> None:
    found = material()
    theirs = FrechetInceptionDistance(Flat()).set_dtype(torch.float64)
    for side, is_real in zip(rows(found), (True, False), strict=True):
        theirs.update(side.double()[:, :, None, None], real=is_real)
    pooled = run(found).pooled
    assert pooled["reconstruction_frechet"].value == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert pooled["reconstruction_kernel"].value == pytest.approx(kernel_distance(*rows(found)), rel=1e-6)
    assert {each.units for each in pooled.values()} == {SOURCES}


def test_a_resample_has_a_source_and_its_reconstruction_as_often() -> None:
    found = material()
    chosen = draws(SOURCES, found.suite.resamples, found.suite.seed)
    numbers = [np.concatenate([[2 * unit, 2 * unit + 1] for unit in units]) for units in chosen]
    expected = [frechet_distance(*(moments(side[each]) for side in rows(found))) for each in numbers]
    np.testing.assert_allclose(run(found).pooled["reconstruction_frechet"].replicates, expected, rtol=1e-5)


def test_too_few_clips_have_no_distance_but_a_note_with_the_least_number() -> None:
    found = run(material(4))
    assert not found.pooled
    assert found.notes == ["4 held-out clips are too few for a distance; it needs 8 at least"]


def test_equal_reconstructions_are_at_no_distance() -> None:
    found = material()
    assert run(found._replace(copies=[each.video for each in found.held])).pooled[
        "reconstruction_frechet"
    ].value == pytest.approx(0, abs=1e-9)
