"""Which latents of a window are noised, and what the loss counts."""

import numpy as np
import pytest
import torch

from longtake.training.models.mavin import spans as spanning
from longtake.training.models.mavin.spans import Spans, draw_mask, draw_span, spans_of


def drawn(spans: Spans, count: int = 400) -> np.ndarray:
    return np.array([draw_span(spans, np.random.default_rng(n)) for n in range(count)])


def test_the_papers_windows_have_the_papers_spans() -> None:
    spans = spans_of("variable", 32)
    assert (spans.starts, spans.ends, spans.gap) == ((5, 15), (17, 27), (2, 22))
    starts, ends = drawn(spans, 2000).T
    assert set(starts) == set(range(5, 16)) and set(ends) == set(range(17, 28))
    assert abs(np.corrcoef(starts, ends)[0, 1]) < 0.1


@pytest.mark.parametrize("latents", [3, 4, 5, 6, 9, 20, 33])
@pytest.mark.parametrize("kind", ["variable", "fixed", "random"])
def test_every_window_keeps_a_latent_on_either_side(kind: str, latents: int) -> None:
    spans = spans_of(kind, latents)  # type: ignore[arg-type]
    masks = np.array([draw_mask(spans, np.random.default_rng(n)) for n in range(200)])
    counts = masks.sum(1)
    assert (counts >= 1).all() and (counts < latents).all()
    assert counts.min() >= spans.gap[0] and counts.max() <= spans.gap[1]
    if kind != "random":
        assert not masks[:, 0].any() and not masks[:, -1].any()
        assert (np.abs(np.diff(masks.astype(int), axis=1)).sum(1) == 2).all(), "one piece"


def test_spans_of_one_length_are_at_every_place() -> None:
    starts, ends = drawn(spans_of("fixed", 20, length=8)).T
    assert set(ends - starts) == {8} and set(starts) == set(range(3, 10))


def test_random_latents_are_as_many_on_average_as_those_of_variable_spans() -> None:
    counts = [
        np.mean([draw_mask(spans_of(kind, 32), np.random.default_rng(n)).sum() for n in range(2000)])  # type: ignore[arg-type]
        for kind in ("variable", "random")
    ]
    assert counts[0] == pytest.approx(12, abs=0.3) and counts[1] == pytest.approx(12, abs=0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("variable", 2), "a window of 2 latents has no gap"),
        (("variable", 9, (0, 3), (5, 7)), "starts 0 to 3"),
        (("variable", 9, (1, 5), (5, 7)), "1 <= starts < ends"),
        (("variable", 9, (1, 3), (5, 9)), "ends 5 to 9"),
        (("fixed", 9, (1, 3), (5, 7), 7), "length 7 does not fit"),
    ],
)
def test_spans_that_do_not_fit_are_refused(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spans_of(*given)


def test_clean_latents_stay_to_the_bit_and_do_not_count() -> None:
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 6, 4, 4, generator=rng) for _ in range(2))
    mask, t = spanning.mask_of([(1, 3), (2, 5)], 6), torch.tensor([0.3, 0.9])
    x = spanning.noised(x0, noise, t, mask)
    kept = ~mask[:, None, :, None, None].expand_as(x)
    assert torch.equal(x[kept], x0[kept]) and not torch.isclose(x[~kept], x0[~kept]).all()
    assert torch.equal(spanning.times_of(t, mask, "zero"), t[:, None] * mask)
    assert torch.equal(spanning.times_of(t, mask, "same"), t[:, None].expand(2, 6))

    velocity = (noise - x0).clone()
    velocity[kept] = torch.nan
    assert spanning.loss(velocity, x0, noise, mask).tolist() == [0, 0]
    velocity[0, :, 1] += 1
    assert spanning.loss(velocity, x0, noise, mask).tolist() == [0.5, 0]
