"""Equivariance in closed form: tokens that move with their video, that do not, and that are all the same."""

import math

import pytest
import torch

from longtake.training.metrics.equivariance import histogram, matched, perplexity, scores


def tokens(codes: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(codes, shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_that_move_with_their_video_are_all_equal() -> None:
    video = tokens(16, 3, 5, 4, 4)
    shares = matched(video[:, :4], video[:, 1:])
    assert shares.tolist() == [1.0, 1.0, 1.0]
    found = scores(shares, histogram(16, video))
    assert found["score"] == found["kappa"] == 1.0 and found["score_paper"] == 0.75


def test_shares_are_by_latent_frame() -> None:
    first, second = torch.zeros(2, 3, 2, 2, dtype=torch.int64), torch.zeros(2, 3, 2, 2, dtype=torch.int64)
    first[0, 1, 0, 0] = 1  # of the 8 cells that the clips share first
    second[:, 1] = 1
    second[:, 2] = 7  # the first clip does not see it
    assert matched(first, second).tolist() == [7 / 8, 0.0]
    found = scores(matched(first, second), torch.tensor([1, 1]))
    assert found == {"score": 7 / 16, "score_paper": 7 / 24, "kappa": pytest.approx(2 * 7 / 16 - 1), "perplexity": 2.0}


def test_independent_tokens_are_at_chance_however_few_codes_there_are() -> None:
    for codes in (2, 8):
        first, second = tokens(codes, 4, 5, 40, 40), tokens(codes, 4, 5, 40, 40, seed=1)
        found = scores(matched(first, second), histogram(codes, first, second))
        assert found["score"] == pytest.approx(1 / codes, abs=0.02)
        assert found["kappa"] == pytest.approx(0, abs=0.02)
        assert found["perplexity"] == pytest.approx(codes, rel=1e-3)


def test_a_collapsed_codebook_scores_high_and_says_nothing() -> None:
    same = torch.full((1, 4, 2, 2), 3)
    assert scores(matched(same, same), histogram(8, same)) == {
        "score": 1.0, "score_paper": 0.75, "kappa": 0.0, "perplexity": 1.0
    }  # fmt: skip


def test_perplexity_is_that_of_its_formula() -> None:
    assert perplexity(torch.tensor([3, 1, 0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


def test_clips_that_share_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs two \(B, t, h, w\) with t > 1"):
        matched(tokens(4, 1, 1, 2, 2), tokens(4, 1, 1, 2, 2))
