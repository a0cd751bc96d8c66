"""The codebook: nearest codes, averages as their formulas, seeds and restarts from data, and the same on two ranks as on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.training.models.tats.codebook import Codebook, usage

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """
import json, sys
import torch
from longtake.training import engines
from longtake.training.models.tats.codebook import Codebook

if __name__ == "__main__":
    with engines.process_group() as (rank, world):
        torch.set_num_threads(1)
        for line in sys.stdin:
            torch.manual_seed(rank)
            book = Codebook(**json.loads(line))
            for step in range(5):
                z = torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(step)) * (1 + step)
                _, _, usage = book(z[rank * 4 // world : (rank + 1) * 4 // world])
            state = {name: value.tolist() for name, value in book.state_dict().items()}
            print(json.dumps(state | {"usage": [float(value) for value in usage]}), flush=True)
"""


def latents(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 2, 2, 2, generator=torch.Generator().manual_seed(seed))


def rows(z: Tensor) -> Tensor:
    return z.movedim(1, -1).reshape(-1, 3)


def book(codes: int = 8, decay: float = 0.9, restart: float = 0.0) -> Codebook:
    torch.manual_seed(0)
    return Codebook(codes, 3, decay, restart)


def test_a_latent_becomes_its_nearest_code_with_its_own_gradient():
    chosen, z = book().eval(), latents().requires_grad_()
    code, tokens, _ = chosen(z)
    distances = torch.cdist(rows(z.detach()), chosen.codes)
    assert torch.equal(tokens.flatten(), distances.argmin(1)) and torch.equal(tokens, chosen.tokens(z))
    torch.testing.assert_close(code, chosen.embed(tokens))
    (code * latents(1)).sum().backward()
    assert torch.equal(z.grad, latents(1))


def test_the_first_batch_seeds_the_codes_and_the_averages_are_those_of_the_formula():
    chosen, z = book(), latents()
    code, tokens, seen = chosen(z)
    first = rows(code.detach())
    assert all((rows(z) == row).all(1).any() for row in first), "codes of the first batch are rows of it"
    # by hand, from the seeds
    draws = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:8]
    seeds = rows(z)[draws]
    one_hot = torch.nn.functional.one_hot(tokens.flatten(), 8).float()
    counts = 0.9 + 0.1 * one_hot.sum(0)
    sums = 0.9 * seeds + 0.1 * one_hot.T @ rows(z)
    torch.testing.assert_close(chosen.counts, counts)
    torch.testing.assert_close(chosen.codes, sums / counts[:, None], rtol=1e-4, atol=1e-5)
    p = one_hot.mean(0)
    assert seen.perplexity.item() == pytest.approx(float(torch.exp(-(p * p.clamp_min(1e-9).log()).sum())), rel=1e-5)
    assert seen.share == (p > 0).float().mean()


def test_more_codes_than_rows_are_seeded_with_little_noise():
    chosen, z = book(80), latents()
    chosen._seed(rows(z))
    distances = (chosen.codes[:, None] - rows(z)).norm(dim=2)
    nearest = distances.amin(1)
    assert (nearest[:32] == 0).all() and (nearest[32:] > 0).all() and nearest.max() < 0.05
    assert set(distances.argmin(1).bincount().tolist()) == {2, 3}


def test_evaluation_changes_nothing():
    chosen = book().eval()
    before = {name: value.clone() for name, value in chosen.state_dict().items()}
    chosen(latents())
    assert all(torch.equal(before[name], value) for name, value in chosen.state_dict().items())


def test_codes_that_nothing_uses_are_replaced_by_latents_if_so_asked():
    near = 0.01 * latents() + 5
    for restart in (0.0, 0.5):
        chosen = book(decay=0.5, restart=restart)
        chosen._seed(torch.full((1, 3), -5.0))
        chosen.updates += 1
        for _ in range(4):
            _, _, seen = chosen(near)
        away = (chosen.codes - 5).abs().amax(1) > 1
        assert away.any() == (restart == 0)
        if restart:
            assert seen.share > 0.5
            torch.testing.assert_close(chosen.sums / chosen.counts[:, None], chosen.codes, rtol=1e-3, atol=1e-3)


def test_latents_that_are_not_finite_move_nothing():
    chosen, bad = book(restart=0.5), latents().fill_(torch.nan)
    chosen(bad)
    assert chosen.codes.isfinite().all() and chosen.updates == 0
    chosen(latents())
    before = {name: value.clone() for name, value in chosen.state_dict().items()}
    bad[1:] = 0
    chosen(bad)
    torch.testing.assert_close(chosen.codes, before["codes"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(chosen.state_dict()[name], before[name]) for name in ("counts", "sums", "updates"))


def test_usage_of_one_code_and_of_all():
    assert usage(torch.tensor([0.0, 9.0])).perplexity == 1 and usage(torch.tensor([0.0, 9.0])).share == 0.5
    assert usage(torch.full((16,), 3.0)).perplexity.item() == pytest.approx(16)


@pytest.mark.parametrize("codes", [8, 80])
@pytest.mark.parametrize("restart", [0.0, 0.5])
def test_two_ranks_have_the_codes_of_one(module_ranks: Callable[[int, str], Any], codes: int, restart: float) -> None:
    settings = {"codes": codes, "width": 3, "decay": 0.8, "restart": restart}
    for world in (1, 2):
        if world not in started:
            started[world] = module_ranks(world, SCRIPT)
        started[world].send(settings)
    (alone,), pair = (started[world].answers() for world in (1, 2))
    assert pair[0] == pair[1]
    for name, value in alone.items():
        torch.testing.assert_close(torch.tensor(pair[0][name]), torch.tensor(value), rtol=1e-4, atol=1e-5, msg=name)
    assert alone["updates"] == 5 and json.dumps(alone["codes"]) != json.dumps(book(codes).codes.tolist())


started: dict[int, Any] = {}
