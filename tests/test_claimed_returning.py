"""The films of the memory's claims: what is generated is what comes back, and nothing of it is in the frames that are given."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def films(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from claimed import _returning  # type: ignore[import-not-found]

    made: ModuleType = _returning
    return made


def test_one_segment_holds_the_return_and_nothing_of_it_is_given(films: ModuleType) -> None:
    for away in films.AWAYS["grey"]:
        pixels, truths = films.drawn("grey", away, 1, True)
        latents, begin = 1 + (pixels.shape[2] - 1) // films.FACTOR, films.given(truths[0])
        given = 1 + (begin - 1) * films.FACTOR
        assert begin + films.SEGMENT == latents <= films.HISTORY and begin % 2 == 0
        coloured = (pixels.amax(1) != pixels.amin(1)).flatten(2).any(2)[0].numpy()
        # the squares are seen, then not for the whole window, then again
        assert coloured[0] and coloured[given + 1 :].all()
        unseen = given - 1 - np.flatnonzero(coloured[:given])[-1]
        assert unseen + 1 >= away * films.FPS - 1


def test_a_batch_has_all_that_came_before_its_segments(films: ModuleType) -> None:
    high = torch.arange(2 * 3 * 16).float().view(2, 3, 16, 1, 1)
    made = films.Films(torch.zeros(2, 3, 31, 8, 8), [{}, {}], high, {2: -high})
    batch = films.batch_of(made, np.array([1, 0]), 12, 2)
    assert torch.equal(batch["history_latent"][:, 0], high[[1, 0], :, :12])
    assert torch.equal(batch["latent"][:, 0], high[[1, 0], :, 12:])
    assert torch.equal(batch["low"][:, 0], -high[[1, 0], :, 12:])
    assert batch["history_steps"].tolist() == batch["stream_step"].tolist() == [12, 12]
    assert "low" not in films.batch_of(made, np.array([0]), 4, None)


def test_streams_go_on_where_they_were(films: ModuleType) -> None:
    _, truths = films.drawn("grey", 1, 2, False)
    latents = torch.randn(2, 3, 10, 1, 1)
    made = {1: films.Films(torch.zeros(2, 3, 19, 8, 8), truths, latents, {})}
    stream = films.Stretches(made, None, 4, 0)
    batches = iter(stream)
    next(batches)
    again = films.Stretches(made, None, 4, 0)
    again.load_state_dict(stream.state_dict())
    one, other = next(batches), next(iter(again))
    assert one["key"] == other["key"] and torch.equal(one["latent"], other["latent"])
