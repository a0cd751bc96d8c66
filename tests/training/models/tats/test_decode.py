"""Temperature, top-k, top-p and the draw, against a reference that is as slow as it is plain."""

from __future__ import annotations

import math

import pytest
import torch

from longtake.training.models.tats.decode import candidates, draw


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The probability of each token that may be drawn."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    weights = {token: math.exp(logits[token] / temperature) for token in ranked}
    total = sum(weights.values())
    kept, reached = dict[int, float](), 0.0
    for token in ranked:
        kept[token] = weights[token] / total
        reached += kept[token]
        if reached > top_p:
            break
    return {token: chance / sum(kept.values()) for token, chance in kept.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999, 1.0])
def test_the_candidates_are_those_of_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    chances, ids = candidates(logits, temperature, top_k, top_p)
    for row in range(len(logits)):
        expected = reference(logits[row].tolist(), temperature, top_k, top_p)
        found = {t: c for t, c in zip(ids[row].tolist(), chances[row].tolist(), strict=True) if c}
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[token], expected[token], rel_tol=1e-6) for token in found)


def test_the_first_token_over_the_threshold_is_kept() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, count in ((0.4, 1), (0.6, 2), (0.8, 3), (0.9, 4)):
        assert (candidates(logits, top_p=top_p)[0] > 0).sum() == count


def test_draws_have_the_probabilities_and_each_row_its_own() -> None:
    chances, ids = candidates(torch.tensor([[0.1, 0.6, 0.3]]).log().repeat(1000, 1))
    drawn = draw(chances, ids, (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(drawn, minlength=3).tolist() == [100, 600, 300]
    two = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    uniform = torch.tensor([0.2, 0.7])
    both = draw(*candidates(two, top_k=4), uniform)
    for row in range(2):
        assert draw(*candidates(two[row : row + 1], top_k=4), uniform[row : row + 1]) == both[row]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_no_number_draws_what_has_no_chance(uniform: float) -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    chances, ids = candidates(logits, top_k=20, top_p=0.7)
    drawn = draw(chances, ids, torch.full((50,), uniform))
    for row, token in enumerate(drawn.tolist()):
        assert chances[row][ids[row] == token] > 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ((0.0, 0, 1.0), "temperature is 0"),
        ((math.nan, 0, 1.0), "temperature is nan"),
        ((math.inf, 0, 1.0), "temperature is inf"),
        ((1.0, 0, math.nan), "top_p is nan"),
        ((1.0, -1, 1.0), "top_k is -1"),
        ((1.0, 0, 0.0), "top_p is 0; it must be above 0"),
    ],
)
def test_settings_that_leave_nothing_are_refused(settings: tuple[float, int, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        candidates(torch.zeros(1, 3), *settings)
