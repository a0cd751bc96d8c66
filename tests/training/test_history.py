"""What a memory is made of: history and its times, masks of noise, what is given beside it; and what is got back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longtake.training import flow, segments
from longtake.training.history import (
    Remembering,
    Steps,
    draw_late,
    draw_omega,
    given_of,
    mask,
    noise_like,
    picked,
    retrieve,
    steps_of,
    true_steps,
)
from longtake.training.models.memory import Memory
from longtake.training.models.memory_dit import config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")

ROOM, SEGMENT = 10, 3


def model(**changes: Any) -> Remembering:
    """A tiny one with weights that matter: none of them zero."""
    torch.manual_seed(0)
    known = {"depth": 1, "width": 24, "heads": 2, "channels": 2, "memory_widths": (4, 8), "memory_heads": 2}
    settings = known | {"rates": ("2x2x2",), "shape": (SEGMENT, 4, 4), "history": ROOM, "window": 2} | changes
    made = Remembering(config_from_preset("memory_dit_tiny", **settings))
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(true: tuple[int, ...] = (10, 7)) -> dict[str, Any]:
    """Two samples of a loader. Every latent is its own time (of the low-res column, times ten); what is not true is 99."""

    def column(scale: float, side: int) -> dict[str, Tensor]:
        time = scale * torch.arange(ROOM + SEGMENT).float()[None, None, None, :, None, None]
        moments = torch.cat(
            [time.expand(len(true), 1, 2, -1, side, side), torch.full((len(true), 1, 2, 13, side, side), -30.0)], 1
        )
        before = moments[:, :, :, :ROOM].clone()
        for number, steps in enumerate(true):
            before[number, :, :, : ROOM - steps] = 99.0
        return {"history": before.half(), "window": moments[:, :, :, ROOM:].half()}

    high, low = column(1.0, 4), column(10.0, 2)
    return {
        "latent": high["window"],
        "latent_2": low["window"],
        "history_latent": high["history"],
        "history_latent_2": low["history"],
        "history_steps": torch.tensor(true),
        "key": [""] * len(true),
    }


def random_steps(count: int = 6, batch: int = 2, start: int = 4) -> Steps:
    noise = draws(9)
    return Steps(
        torch.randn(batch, 2, count, 4, 4, generator=noise), torch.randn(batch, 2, count, 2, 2, generator=noise), start
    )


def test_steps_are_those_that_all_samples_truly_have_at_their_own_times() -> None:
    dit = model()
    assert true_steps(batch()) == 7 and true_steps({"latent": None}) == 0
    for known in (7, 5, 0):
        steps = steps_of(batch(), dit, known)
        assert steps.low is not None and steps.high.shape == (2, 2, known + SEGMENT, 4, 4)
        times = steps.start + torch.arange(known + SEGMENT).float()
        torch.testing.assert_close(steps.high[:, 0, :, 0, 0], times.expand(2, -1), atol=0, rtol=0)
        torch.testing.assert_close(steps.low[:, 1, :, 1, 0], 10 * times.expand(2, -1), atol=0, rtol=0)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_cutting_to_whole_groups_takes_the_oldest_and_leaves_true_times(group: int) -> None:
    whole = steps_of(batch(), model(), 7).whole(group)
    assert whole.low is not None
    count = whole.high.shape[2]
    assert count == whole.low.shape[2] == 10 // group * group
    assert whole.high[0, 0, 0, 0, 0] == whole.start and whole.low[0, 0, 0, 0, 0] == 10 * whole.start
    assert whole.high[0, 0, -1, 0, 0] == ROOM + SEGMENT - 1


def test_both_columns_are_normalised_by_their_own_statistics_and_drawn_where_asked() -> None:
    dit = model()
    dit.set_statistics(*(torch.full((2,), value) for value in (1.0, 2.0, 5.0, 10.0)))
    steps = steps_of(batch(), dit, 7)
    assert steps.low is not None
    torch.testing.assert_close(steps.high[0, 0, :, 0, 0], (torch.arange(3, 13).float() - 1) / 2)
    torch.testing.assert_close(steps.low[0, 0, :, 0, 0], (10 * torch.arange(3, 13).float() - 5) / 10)
    uncertain = batch()
    uncertain["latent"][:, 1] = uncertain["latent_2"][:, 1] = 0.0
    drawn = steps_of(uncertain, dit, 7, "sample", draws())
    assert (drawn.high[:, :, :7] - steps.high[:, :, :7]).abs().max() < 1e-3
    assert 0.2 < (drawn.high[:, :, 7:] - steps.high[:, :, 7:]).std() < 0.8
    torch.testing.assert_close(steps_of(uncertain, dit, 7, "sample", draws()).high, drawn.high, atol=0, rtol=0)
    # the low-res branch never: generation encodes frames for it, and takes the likeliest latents
    assert drawn.low is not None and torch.equal(drawn.low, steps.low)


@given(steps=st.integers(1, 12), most=st.integers(1, 5), seed=st.integers(0, 1000))
def test_omega_is_some_distinct_steps_of_each_sample(steps: int, most: int, seed: int) -> None:
    omega = draw_omega(5, steps, most, draws(seed))
    assert omega.shape[0] == 5 and 1 <= omega.shape[1] <= min(most, steps)
    assert ((omega >= 0) & (omega < steps)).all() and (omega.diff(dim=1) > 0).all()
    torch.testing.assert_close(draw_omega(5, steps, most, draws(seed)), omega, atol=0, rtol=0)


def test_omega_has_every_count_and_every_step_about_as_often() -> None:
    many = [draw_omega(8, 6, 4, draws(seed)) for seed in range(400)]
    counts = torch.tensor([omega.shape[1] for omega in many]).bincount(minlength=5)[1:] / 400
    assert (counts - 0.25).abs().max() < 0.08
    where = torch.cat([omega.flatten() for omega in many]).bincount(minlength=6)
    assert (where / where.sum() - 1 / 6).abs().max() < 0.02
    assert len({tuple(row.tolist()) for row in draw_omega(8, 6, 3, draws(1))}) > 1


def masked(steps: Steps, sigma: float | Tensor, omega: Tensor, noise: Steps | None = None) -> Steps:
    level = sigma if isinstance(sigma, Tensor) else torch.full(steps.high.shape[:3:2], sigma)
    return mask(steps, omega, level, noise or noise_like(steps, draws(3)))


OMEGA = torch.tensor([[1, 4], [0, 2]])


def others() -> Tensor:
    return torch.ones(2, 6, dtype=torch.bool).scatter(1, OMEGA, False)


def branches(steps: Steps) -> list[Tensor]:
    """Of each branch `(B, T, ...)`."""
    assert steps.low is not None
    return [steps.high.transpose(1, 2), steps.low.transpose(1, 2)]


def test_steps_in_omega_are_clean_to_the_bit_and_all_others_noised_at_their_own_level() -> None:
    steps, noise = random_steps(), noise_like(random_steps(), draws(3))
    steps.high[0, 0, 1, 0, 0] = -0.0
    sigma = torch.rand(2, 6, generator=draws(1))
    made = masked(steps, sigma, OMEGA, noise)
    for z, epsilon, seen in zip(branches(steps), branches(noise), branches(made), strict=True):
        clean = ~others()
        assert torch.equal(z[clean].view(torch.int32), seen[clean].view(torch.int32))
        level = sigma.view(2, 6, 1, 1, 1)
        torch.testing.assert_close(seen[others()], ((1 - level) * z + level * epsilon)[others()])
        assert (seen[others()] != z[others()]).any(dim=(1, 2, 3)).all()
    assert made.start == steps.start


def test_what_is_in_omega_does_not_leak_into_other_steps_and_nothing_gets_into_it() -> None:
    steps, noise = random_steps(), noise_like(random_steps(), draws(3))
    made = masked(steps, 0.5, OMEGA, noise)
    changed = Steps(steps.high.clone(), steps.low.clone() if steps.low is not None else None, steps.start)
    for part in branches(changed):
        part[~others()] += 5.0
    for before, after in zip(branches(made), branches(masked(changed, 0.5, OMEGA, noise)), strict=True):
        assert torch.equal(before[others()], after[others()]) and not torch.equal(before, after)
    for part, epsilon in zip(branches(changed), branches(noise), strict=True):
        part.copy_(branches(steps)[0] if part.shape[-1] == 4 else branches(steps)[1])
        part[others()] += 5.0
        epsilon[~others()] = torch.nan
    for before, after in zip(branches(made), branches(masked(changed, 0.5, OMEGA, noise)), strict=True):
        assert torch.equal(before[~others()], after[~others()])
    whole = [branches(masked(some, 1.0, OMEGA, noise)) for some in (steps, changed)]
    for one, other in zip(*whole, strict=True):
        assert torch.equal(one[others()], other[others()]), "at level 1 nothing of a masked step is left"


def test_picked_steps_are_those_of_each_sample() -> None:
    steps = random_steps()
    found = picked(steps.high, OMEGA)
    for number, row in enumerate(OMEGA.tolist()):
        for at, step in enumerate(row):
            assert torch.equal(found[number, :, at], steps.high[number, :, step])


def test_a_call_with_a_history_is_a_call_with_the_memory_of_it() -> None:
    dit, steps = model(), random_steps()
    x, t, times = (
        torch.randn(2, 2, 2, 4, 4, generator=draws(2)),
        torch.tensor([0.3, 0.9]),
        torch.tensor([[11, 12], [4, 20]]),
    )
    memory = dit.remember(steps.high, steps.low, steps.start)
    assert torch.equal(dit(x, t, times, steps), dit(x, t, times, memory))
    assert not torch.allclose(dit(x, t, times, steps), dit(x, t, times, None), atol=1e-4)


@pytest.mark.parametrize("rates", [("2x2x2",), ("2x2x4",), ("1x1x8", "2x2x2")])
@pytest.mark.parametrize("window", [0, 2, 5])
def test_training_gives_what_generation_gives_after_so_many_steps(rates: tuple[str, ...], window: int) -> None:
    dit = model(rates=rates, window=window, branches="high", history=16)
    latents = torch.randn(1, 2, 12 + SEGMENT, 4, 4, generator=draws(5))
    for known in range(1, 13):
        history = segments.History(dit)
        for piece in latents[:, :, :known].split(3, 2):
            history.append(piece)
        seen = given_of(
            Steps(dit.normalise(latents[:, :, : known + SEGMENT]), None, 0), known, dit.config, known % dit.config.group
        )
        clean = seen.x0[:, :, : seen.window]
        assert (history.window is None) == (seen.window == 0)
        if history.window is not None:
            assert torch.equal(history.window, clean)
        assert seen.times.tolist() == list(range(known - seen.window, known + SEGMENT))
        assert (history.memory is None) == (seen.memory is None)
        if history.memory is not None and seen.memory is not None:
            memory = dit.remember(*seen.memory)
            torch.testing.assert_close(memory.positions.sort(0)[0], history.memory.positions.sort(0)[0])


def test_the_last_steps_of_a_history_are_in_the_memory_or_beside_it() -> None:
    config = model(rates=("2x2x4",), window=1).config
    steps = random_steps(count=12, start=5)
    for known in range(13):
        for late in range(4):
            seen = given_of(steps, known, config, late)
            held = (
                range(0)
                if seen.memory is None
                else range(seen.memory.start, seen.memory.start + seen.memory.high.shape[2])
            )
            assert len(held) % 4 == 0 and seen.x0.shape[2] == len(seen.times) == seen.window + 12 - known
            assert seen.times[-1] == 16 and (seen.window == 0) == (known == 0)
            beside = set(seen.times.tolist()[: seen.window])
            recent = (
                range(5 + max(0, known - 4 - late), 5 + known)
                if seen.memory
                else range(5 + max(0, known - 3), 5 + known)
            )
            assert set(recent) <= beside | set(held)
    assert given_of(steps, 8, model(memory="none").config).memory is None


@pytest.mark.parametrize(
    ("segment", "rate", "behind"),
    [(6, "2x2x4", {0, 2}), (5, "2x2x2", {0, 1}), (4, "1x1x2", {0}), (3, "2x2x8", set(range(8)))],
)
def test_a_memory_is_as_late_in_training_as_generation_comes_to(segment: int, rate: str, behind: set[int]) -> None:
    config = model(shape=(segment, 4, 4), rates=(rate,)).config
    assert {segment * number % config.group for number in range(1, 20)} == behind
    assert {draw_late(config, draws(seed)) for seed in range(100)} == behind


class Oracle:
    """Knows every step of a video, and tells its times to `called`."""

    def __init__(self, video: Tensor) -> None:
        self.video, self.called = video, list[list[int]]()
        self.config, self.latent_mean = model().config, torch.zeros(2)

    def __call__(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory, classes: Tensor | None) -> Tensor:
        self.called.append(times.tolist())
        return (x - self.video[:, :, times]) / t.view(-1, 1, 1, 1, 1)


def test_retrieval_asks_for_a_few_steps_at_a_time_and_gives_them_in_the_order_asked() -> None:
    video = torch.randn(1, 2, 9, 4, 4, generator=draws(8))
    oracle = Oracle(video)
    memory = Memory(torch.zeros(1, 1, 24), torch.zeros(1, 3), torch.zeros(1, 1, 0))
    asked = [7, 2, 3, 8, 0]
    made = retrieve(oracle, memory, asked, (4, 4), draws(1), steps=3, at_once=2)  # type: ignore[arg-type]
    torch.testing.assert_close(made, video[:, :, asked], atol=1e-5, rtol=1e-5)
    assert oracle.called[::3] == [[7, 2], [3, 8], [0]]


def test_the_target_of_the_flow_is_exact_for_retrieved_steps() -> None:
    steps = random_steps()
    x0 = picked(steps.high, OMEGA)
    noise, t = torch.randn(x0.shape, generator=draws(2)), torch.tensor([0.4, 0.8])
    velocity = (flow.interpolate(x0, noise, t) - x0) / t.view(-1, 1, 1, 1, 1)
    assert flow.loss(velocity, x0, noise).max() < 1e-9
