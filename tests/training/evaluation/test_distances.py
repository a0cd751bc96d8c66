"""Distances of generated videos to held-out clips, against other implementations on the same features, and their replicates."""

import materials
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from longtake.datasets.errors import UserError
from longtake.training.evaluation.bootstrap import draws
from longtake.training.evaluation.measures import debiased, distance, inception
from longtake.training.metrics.distance import frechet_distance, moments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics"),
]


class Flat(nn.Module):
    """Features as they are, for torchmetrics."""

    num_features = 24

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(1)


def material(real: int = 60, made: int = 50, **fields) -> materials.Fixed:
    networks = {"features": materials.network("corners", materials.corners), "classifier": materials.judge()}
    clips, videos = materials.noisy(real), materials.noisy(made, frames=6, seed=1, low=60)
    return materials.Fixed(
        materials.short(length=6, **fields), materials.clips(clips), materials.generated(videos), networks
    )


def rows_of(found: materials.Fixed) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of both sides: of the first four frames."""
    sides = [clip.video[0] for clip in found.held], [next(made.frames(4))[0] for made in found.videos]
    return tuple(materials.corners(torch.stack(side).float()) for side in sides)


def test_both_distances_are_those_of_torchmetrics_on_the_same_features():
    found = material()
    real, made = rows_of(found)
    theirs = FrechetInceptionDistance(Flat()).set_dtype(torch.float64)
    kernels = KernelInceptionDistance(Flat(), subsets=1, subset_size=50)
    for side, is_real in ((real, True), (made, False)):
        theirs.update(side.double()[:, :, None, None], real=is_real)
    for side, is_real in ((real[:50], True), (made, False)):
        kernels.update(side[:, :, None, None], real=is_real)
    pooled = distance.MEASURE.run(None, found).pooled
    assert pooled["frechet"].value == pytest.approx(float(theirs.compute()), abs=1e-3 * float(theirs.compute()))
    alike = found._replace(held=found.held[:50])
    assert distance.MEASURE.run(None, alike).pooled["kernel"].value == pytest.approx(
        float(kernels.compute()[0]), rel=1e-3
    )


def test_prompts_are_drawn_where_videos_have_some_and_sources_of_clips():
    clips = materials.clips(materials.noisy(12), [f"source {n // 2}" for n in range(12)])
    videos = materials.generated(materials.noisy(12, seed=1, low=60), [f"prompt {n % 4}" for n in range(12)])
    networks = {"features": materials.network("corners", materials.corners)}
    found = distance.MEASURE.run(None, materials.Fixed(materials.short(seed=3), clips, videos, networks)).pooled[
        "frechet"
    ]
    real, made = (rows.double() for rows in rows_of(materials.Fixed(materials.short(), clips, videos, networks)))
    for number in range(3):
        sources, prompts = draws(6, 100, 3)[number], draws(4, 100, 4)[number]
        first = torch.cat([real[2 * source : 2 * source + 2] for source in sources])
        second = torch.cat([made[prompt::4] for prompt in prompts])
        assert found.replicates[number] == pytest.approx(frechet_distance(moments(first), moments(second)), rel=1e-6)
    assert (found.units, len(found.replicates)) == (4, 100)


def test_equal_videos_have_equal_replicates_so_that_models_pair():
    first, second = (distance.MEASURE.run(None, material()).pooled for _ in range(2))
    assert first == second
    assert len(set(first["frechet"].replicates)) > 90


def test_too_few_videos_have_no_distance_but_the_least_number():
    few = material(real=7)
    result = distance.MEASURE.run(None, few)
    assert not result.pooled
    assert result.notes == ["7 held-out clips are too few for a distance; it needs 8 at least"]
    result = distance.MEASURE.run(None, material(made=3))
    assert result.notes == ["3 generated videos are too few for a distance; it needs 8 at least"]


def test_a_distance_of_fewer_samples_than_features_says_so():
    assert distance.MEASURE.run(None, material(real=20)).notes == [
        "20 samples for 24 features: Fréchet distances depend on their number"
    ]
    assert not distance.MEASURE.run(None, material()).notes


def test_clips_of_a_single_source_have_no_replicates():
    found = material()
    alone = found._replace(held=[clip._replace(unit="one") for clip in found.held])
    pooled = distance.MEASURE.run(None, alone).pooled["frechet"]
    assert (list(pooled.replicates), pooled.units) == ([], 1)
    assert pooled.value == distance.MEASURE.run(None, found).pooled["frechet"].value


def test_the_debiased_distance_sees_movement_alone_where_its_network_does():
    def changes(levels):
        return levels.diff(dim=2).mean((1, 3, 4))

    clips = materials.noisy(20, high=200)
    brighter = [video + 50 for video in clips]  # in the same movement
    networks = {
        "features": materials.network("corners", materials.corners),
        "debiased": materials.network("changes", changes),
    }
    found = materials.Fixed(materials.short(), materials.clips(clips), materials.generated(brighter), networks)
    assert distance.MEASURE.run(None, found).pooled["frechet"].value > 0.5
    pooled = debiased.MEASURE.run(None, found).pooled
    assert set(pooled) == {"frechet_debiased", "kernel_debiased"}
    assert pooled["frechet_debiased"].value == pytest.approx(0, abs=1e-6)


def test_a_network_of_frames_has_a_row_for_each_frame_of_a_unit():
    found = material()
    images = materials.network("frames", images=lambda x: [torch.nn.functional.adaptive_avg_pool2d(x, 1)])
    pooled = distance.MEASURE.run(None, found._replace(networks={"features": images})).pooled["frechet"]
    sides = [
        torch.cat([clip.video[0] for clip in found.held], 1),
        torch.cat([next(m.frames(4))[0] for m in found.videos], 1),
    ]
    rows = [side.float().mean((2, 3)).T.double() for side in sides]
    assert pooled.value == pytest.approx(frechet_distance(*map(moments, rows)), rel=1e-4)
    assert pooled.units == 50


def test_a_network_that_does_not_take_the_videos_is_one_line():
    def picky(levels):
        raise ValueError("needs 16 frames")

    found = material()._replace(networks={"features": materials.network("i3d", picky)})
    with pytest.raises(UserError, match=r"^features: i3d: takes no videos of 4 frames of 8x8 \(needs 16 frames\)"):
        distance.MEASURE.run(None, found)


def test_a_suite_without_videos_is_refused():
    with pytest.raises(UserError, match=r"^videos: the suite makes none"):
        distance.MEASURE.run(None, material()._replace(suite=materials.short().model_copy(update={"videos": ()})))


def test_the_inception_score_is_that_of_torchmetrics():
    found = material()
    pooled = inception.MEASURE.run(None, found).pooled["inception_score"]
    logits = materials.colours(torch.stack([next(made.frames(4))[0] for made in found.videos]).float())

    class Logits(nn.Module):
        def forward(self, rows):
            return rows.flatten(1)

    theirs = InceptionScore(Logits(), splits=1)
    theirs.update(logits[:, :, None, None])
    assert pooled.value == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
    assert (len(pooled.replicates), pooled.units) == (100, 50)


def test_conditions_tell_videos_and_prompts_apart():
    def conditions(**fields):
        return distance.MEASURE.conditions(materials.short(**fields))

    assert conditions() == conditions(chunk=8)
    assert conditions() != conditions(length=5)
    assert conditions(prompts=("a", "b")) != conditions(prompts=("a", "c")) != conditions()
