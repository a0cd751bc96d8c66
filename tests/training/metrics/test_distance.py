"""Fréchet and kernel distance against closed forms; accumulation in any order; what a record says."""

import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from longtake.training.metrics.distance import (
    Moments,
    frechet_distance,
    kernel_distance,
    merge,
    moments,
    video_distance,
)
from longtake.training.metrics.features import FeatureNetwork


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    mix = torch.randn(width, width, generator=seeded(seed + 100))
    return torch.randn(count, width, generator=seeded(seed)) @ mix


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    """Moments of 11 samples that have exactly this mean and covariance."""
    return Moments(11, mean.double(), 10 * covariance.double())


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=seeded(3), dtype=torch.float64)).Q


def test_the_distance_of_diagonal_gaussians_is_known():
    a = gaussian(torch.tensor([0.0, 1.0]), torch.diag(torch.tensor([4.0, 9.0])))
    b = gaussian(torch.tensor([3.0, 1.0]), torch.diag(torch.tensor([1.0, 16.0])))
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 4) ** 2)


@pytest.mark.parametrize("width", [2, 7])
def test_turning_the_space_changes_nothing(width):
    variances = [torch.rand(width, generator=seeded(s)).double() + 0.1 for s in (1, 2)]
    means = [torch.randn(width, generator=seeded(s)).double() for s in (4, 5)]
    turn = rotation(width)
    turned = [gaussian(turn @ m, turn @ torch.diag(v) @ turn.T) for m, v in zip(means, variances, strict=True)]
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert frechet_distance(*turned) == pytest.approx(expected.item(), rel=1e-9)


def test_covariances_that_do_not_commute_agree_with_the_root_of_their_product():
    a, b = moments(rows(50, 5, 1)), moments(rows(60, 5, 2))
    product = sqrtm(a.covariance().numpy() @ b.covariance().numpy())
    expected = (a.mean - b.mean).square().sum().item() + np.trace(
        a.covariance().numpy() + b.covariance().numpy() - 2 * product.real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_equal_sets_are_at_zero_also_where_the_covariance_is_singular():
    few = rows(5, 40)
    assert frechet_distance(moments(few), moments(few)) < 1e-9 * few.var(0).sum()


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(moments(rows(1, 3)), moments(rows(5, 3)))


@given(cuts=st.lists(st.integers(1, 39), max_size=5), seed=st.integers(0, 99))
def test_the_moments_do_not_depend_on_order_nor_on_the_split(cuts, seed):
    data = rows(40, 6) + 1e3  # far from 0, where sums of squares cancel
    shuffled = data[torch.randperm(40, generator=seeded(seed))]
    parts = [p for p in torch.tensor_split(shuffled, sorted(cuts)) if len(p)]
    total = merge(moments(p) for p in parts)
    assert total.count == 40
    torch.testing.assert_close(total.mean, data.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.covariance(), torch.cov(data.double().T), rtol=1e-9, atol=1e-9)


def test_the_kernel_distance_of_a_hand_computed_pair_of_sets():
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    # k(1,2) = 27 twice over 2; k(0,3) = 1; across: k(1,0) = 1, k(1,3) = 64, k(2,0) = 1, k(2,3) = 343
    assert kernel_distance(first, second) == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4)


def test_the_kernel_divides_by_the_number_of_features():
    first, second = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert kernel_distance(first, second) == pytest.approx((2 / 2 + 1) ** 3 + 1 - 2)


def test_the_kernel_distance_is_unbiased():
    # the mean over many pairs of small sets of one distribution is 0; with the diagonal it would be far above
    drawn = torch.randn(400, 2, 4, 3, generator=seeded())
    values = torch.tensor([kernel_distance(a, b) for a, b in drawn])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(400)
    assert values.min() < 0


def test_the_kernel_distance_is_the_same_in_blocks(monkeypatch):
    first, second = rows(30, 4, 1), rows(20, 4, 2)
    whole = kernel_distance(first, second)
    monkeypatch.setattr("longtake.training.metrics.distance._BLOCK", 7)
    assert kernel_distance(first, second) == pytest.approx(whole, rel=1e-12)
    assert kernel_distance(first.flip(0), second.roll(3, 0)) == pytest.approx(whole, rel=1e-12)


def colours(video: torch.Tensor) -> torch.Tensor:
    return video.mean((2, 3, 4))


VIDEOS = FeatureNetwork("colours", "d" * 64, "bytes", None, videos=colours)
FRAMES = FeatureNetwork("pixels", "e" * 64, "signed", 4, images=lambda x: [nn.functional.avg_pool2d(x, 2)])


def videos(count: int, seed: int, frames: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, frames, 8, 8, generator=seeded(seed)) * 2 - 1


def test_a_record_says_all_that_makes_the_value_comparable():
    real, fake = videos(6, 1), videos(8, 2) * 0.5
    record = video_distance(real.split(4), fake.split(4), VIDEOS, split="val", seed=7)
    values = [((v + 1) * 127.5).round().mean((2, 3, 4)) for v in (real, fake)]
    assert record.pop("frechet") == pytest.approx(frechet_distance(*map(moments, values)))
    assert record.pop("kernel") == pytest.approx(kernel_distance(*values))
    assert record == {
        "network": "colours",
        "network_digest": "d" * 64,
        "sees": "videos",
        "pixels": "bytes",
        "resize": "by the network",
        "features": 3,
        "frames": 5,
        "height": 8,
        "width": 8,
        "videos_real": 6,
        "videos_fake": 8,
        "samples_real": 6,
        "samples_fake": 8,
        "split": "val",
        "seed": 7,
        "warning": None,
    }
    json.dumps(record)


def test_a_network_of_images_gives_a_sample_for_each_frame():
    record = video_distance([videos(2, 1)], [videos(3, 2)], FRAMES, split="val", seed=0, kernel=False)
    assert (record["videos_real"], record["samples_real"], record["samples_fake"]) == (2, 10, 15)
    assert record["sees"] == "frames" and record["resize"] == 4 and record["kernel"] is None


def test_the_distance_does_not_depend_on_the_batches():
    real, fake = videos(7, 1), videos(9, 2)
    one = video_distance([real], [fake], VIDEOS, split="val", seed=0)
    other = video_distance(real.flip(0).split(2), fake.split(5), VIDEOS, split="val", seed=0)
    assert other["frechet"] == pytest.approx(one["frechet"], rel=1e-6)
    assert other["kernel"] == pytest.approx(one["kernel"], rel=1e-6)


@pytest.mark.parametrize(("count", "warned"), [(2, True), (3, True), (4, False)])
def test_too_few_samples_for_the_covariance_are_warned_of(count, warned):
    record = video_distance([videos(count, 1)], [videos(9, 2)], VIDEOS, split="val", seed=0)
    assert bool(record["warning"]) == warned
    assert not warned or "singular" in record["warning"]


@pytest.mark.parametrize(
    ("real", "said"),
    [
        ([videos(1, 1)], "real: 1 sample; a distance between distributions needs at least 2"),
        ([], "real: no videos"),
        ([videos(2, 1), videos(2, 1, frames=3)], "real: clips of"),
    ],
)
def test_what_cannot_be_compared_is_one_line(real, said):
    with pytest.raises(ValueError, match=said) as caught:
        video_distance(real, [videos(4, 2)], VIDEOS, split="val", seed=0)
    assert "\n" not in str(caught.value)


RANKS = """
import json, sys
import torch
from longtake.training.engines import process_group
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.share import gathered

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group() as (rank, world):
        real, fake = (torch.rand(n, 3, 5, 8, 8, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (7, 9))
        if world > 1:
            real, fake = (real[:5], fake[:1]) if rank == 0 else (real[5:], fake[1:])
            assert gathered(torch.full((rank, 2), 1.0)).tolist() == [[1.0, 1.0]]
        network = FeatureNetwork("colours", "d", "bytes", None, videos=lambda v: v.mean((2, 3, 4)))
        record = video_distance(real.split(2), fake.split(3), network, split="val", seed=0, across_ranks=world > 1)
        print(json.dumps(record), flush=True)
"""


@pytest.mark.slow
def test_ranks_with_unequal_shares_get_the_value_over_all_videos(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(RANKS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def started(rank: int, world: int) -> subprocess.Popen[str]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
        env = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)

    def records(processes: list[subprocess.Popen[str]]) -> list[dict]:
        said = [p.communicate(timeout=120)[0].splitlines() for p in processes]
        assert all(p.returncode == 0 for p in processes)
        return [json.loads(next(line for line in lines if line.startswith("{"))) for lines in said]

    alone = records([started(0, 1)])[0]
    first, second = records([started(0, 2), started(1, 2)])
    assert first == second
    for record in (first, alone):
        record["frechet"], record["kernel"] = round(record["frechet"], 3), round(record["kernel"], 3)
    assert first == alone
    assert first["videos_real"] == 7 and first["frechet"] > 1
