"""What a memory is made of: history and its times, masks of noise, what is given beside it; and what is got back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longtake.training.models.common import flow
from longtake.training.models.memory import segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import config_from_preset
from longtake.training.models.memory.history import (
    cut_to_groups,
    history_lengths,
    memory_of,
    split_segment,
    stretch_of,
    true_lengths,
)
from longtake.training.models.memory.retrieval import retrieve
from longtake.training.models.memory.stretch import Stretch, draw_omega, gather_latents, mask, noise_like
from longtake.training.models.memory.tokens import Memory

pytestmark = pytest.mark.usefixtures("one_thread")

ROOM, SEGMENT = 10, 3


def model(**changes: Any) -> MemoryDiT:
    """A tiny one with weights that matter: none of them zero."""
    torch.manual_seed(0)
    known = {"depth": 1, "width": 24, "heads": 2, "channels": 2, "memory_widths": (4, 8), "memory_heads": 2}
    settings = known | {"rates": ("2x2x2",), "shape": (SEGMENT, 4, 4), "history": ROOM, "window": 2} | changes
    made = MemoryDiT(config_from_preset("memory_dit_tiny", **settings))
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
        for number, length in enumerate(true):
            before[number, :, :, : ROOM - length] = 99.0
        return {"history": before.half(), "window": moments[:, :, :, ROOM:].half()}

    high, low = column(1.0, 4), column(10.0, 2)
    return {
        "latent": high["window"],
        "low": low["window"],
        "history_latent": high["history"],
        "history_low": low["history"],
        "history_steps": torch.tensor(true),
        "stream_step": torch.tensor([steps + 5 * (steps == ROOM) for steps in true]),
        "key": [""] * len(true),
    }


def random_stretch(count: int = 6, batch: int = 2, start: int = 4) -> Stretch:
    noise = draws(9)
    return Stretch(
        torch.randn(batch, 2, count, 4, 4, generator=noise),
        torch.randn(batch, 2, count, 2, 2, generator=noise),
        start,
        torch.zeros(batch, count, dtype=torch.bool),
    )


def test_latents_are_those_that_each_sample_truly_has_at_their_own_times() -> None:
    dit = model()
    for most in (10, 7, 5, 0):
        stretch = stretch_of(batch(), dit, most)
        assert stretch.low is not None and stretch.high.shape == (2, 2, most + SEGMENT, 4, 4)
        skip = [0, max(0, most - 7)]
        assert skip == [0, 0] if stretch.skip is None else stretch.skip.tolist() == skip
        times = stretch.start + torch.arange(most + SEGMENT).float()
        for n, missing in enumerate(skip):
            torch.testing.assert_close(stretch.high[n, 0, missing:, 0, 0], times[missing:], atol=0, rtol=0)
            torch.testing.assert_close(stretch.low[n, 1, missing:, 1, 0], 10 * times[missing:], atol=0, rtol=0)
        # the second sample's stream begins seven latents before its segment
        assert stretch.first[0].sum() == 0 and stretch.first[1].nonzero().flatten().tolist() == [most - 7] * (most >= 7)
        assert true_lengths(batch(), most).tolist() == [most, min(7, most)]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_memory_has_whole_groups_counted_from_the_first_latent_of_the_video(group: int) -> None:
    given, dit = batch(), model(rates=("2x2x" + str(group),))
    ends = given["stream_step"] + SEGMENT
    whole = cut_to_groups(stretch_of(given, dit, 10), ends, dit.config)
    count = whole.high.shape[2]
    for n, (known, end) in enumerate(zip((13, 10), ends.tolist(), strict=True)):
        late = end % group
        held = (known - late) // group * group
        skip = 0 if whole.skip is None else int(whole.skip[n])
        assert count - skip == held
        # its last latent is the video's last that fills a group; what cannot be seen is of nobody's
        assert whole.high[n, 0, skip:, 0, 0].tolist() == [float(13 - late - held + n) for n in range(held)]


def test_a_packed_memory_calls_all_its_layers_however_little_history_a_rank_has() -> None:
    dit, short = model(memory="framepack", history=ROOM), batch((0, 1))
    calls = [0, 0, 0]
    for number, kernel in enumerate(dit.memory[0].kernels):
        kernel.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    whole = cut_to_groups(stretch_of(short, dit, ROOM), short["stream_step"] + SEGMENT, dit.config)
    memory = memory_of(dit, whole)
    assert calls == [1, 1, 1], "else ranks wait for each other's weights"
    assert memory.seen is not None and whole.skip is not None
    assert (whole.high.shape[2] - whole.skip).tolist() == [SEGMENT, 1 + SEGMENT]
    alone = memory_of(dit, Stretch(whole.high[:1, :, -SEGMENT:], None, whole.start + ROOM, whole.first[:1, -SEGMENT:]))
    torch.testing.assert_close(memory.tokens[:1, memory.seen[0]], alone.tokens)


def test_both_columns_are_normalised_by_their_own_statistics_and_drawn_where_asked() -> None:
    dit = model()
    dit.set_statistics(*(torch.full((2,), value) for value in (1.0, 2.0, 5.0, 10.0)))
    stretch = stretch_of(batch(), dit, 7)
    assert stretch.low is not None and stretch.skip is None
    torch.testing.assert_close(stretch.high[0, 0, :, 0, 0], (torch.arange(3, 13).float() - 1) / 2)
    torch.testing.assert_close(stretch.low[0, 0, :, 0, 0], (10 * torch.arange(3, 13).float() - 5) / 10)
    uncertain = batch()
    uncertain["latent"][:, 1] = uncertain["low"][:, 1] = 0.0
    drawn = stretch_of(uncertain, dit, 7, "sample", draws())
    assert (drawn.high[:, :, :7] - stretch.high[:, :, :7]).abs().max() < 1e-3
    assert 0.2 < (drawn.high[:, :, 7:] - stretch.high[:, :, 7:]).std() < 0.8
    torch.testing.assert_close(stretch_of(uncertain, dit, 7, "sample", draws()).high, drawn.high, atol=0, rtol=0)
    # the low-res branch never: generation encodes frames for it, and takes the likeliest latents
    assert drawn.low is not None and torch.equal(drawn.low, stretch.low)


@given(latents=st.integers(1, 12), most=st.integers(1, 5), seed=st.integers(0, 1000))
def test_omega_is_some_distinct_latents_of_each_sample(latents: int, most: int, seed: int) -> None:
    omega = draw_omega(5, latents, most, draws(seed))
    assert omega.shape[0] == 5 and 1 <= omega.shape[1] <= min(most, latents)
    assert ((omega >= 0) & (omega < latents)).all() and (omega.diff(dim=1) > 0).all()
    torch.testing.assert_close(draw_omega(5, latents, most, draws(seed)), omega, atol=0, rtol=0)


def test_omega_has_no_latent_that_a_sample_does_not_have() -> None:
    for seed in range(50):
        omega = draw_omega(3, 8, 4, draws(seed), torch.tensor([0, 5, 2]))
        assert omega.shape[1] <= 3 and (omega[1] >= 5).all() and (omega[2] >= 2).all() and (omega.diff(dim=1) > 0).all()


def test_omega_has_every_count_and_every_latent_about_as_often() -> None:
    many = [draw_omega(8, 6, 4, draws(seed)) for seed in range(400)]
    counts = torch.tensor([omega.shape[1] for omega in many]).bincount(minlength=5)[1:] / 400
    assert (counts - 0.25).abs().max() < 0.08
    where = torch.cat([omega.flatten() for omega in many]).bincount(minlength=6)
    assert (where / where.sum() - 1 / 6).abs().max() < 0.02
    assert len({tuple(row.tolist()) for row in draw_omega(8, 6, 3, draws(1))}) > 1


def masked(stretch: Stretch, sigma: float | Tensor, omega: Tensor, noise: Stretch | None = None) -> Stretch:
    level = sigma if isinstance(sigma, Tensor) else torch.full(stretch.high.shape[:3:2], sigma)
    return mask(stretch, omega, level, noise or noise_like(stretch, draws(3)))


OMEGA = torch.tensor([[1, 4], [0, 2]])


def others() -> Tensor:
    return torch.ones(2, 6, dtype=torch.bool).scatter(1, OMEGA, False)


def branches(stretch: Stretch) -> list[Tensor]:
    """Of each branch `(B, T, ...)`."""
    assert stretch.low is not None
    return [stretch.high.transpose(1, 2), stretch.low.transpose(1, 2)]


def test_latents_in_omega_are_clean_to_the_bit_and_all_others_noised_at_their_own_level() -> None:
    stretch, noise = random_stretch(), noise_like(random_stretch(), draws(3))
    stretch.high[0, 0, 1, 0, 0] = -0.0
    sigma = torch.rand(2, 6, generator=draws(1))
    made = masked(stretch, sigma, OMEGA, noise)
    for z, epsilon, seen in zip(branches(stretch), branches(noise), branches(made), strict=True):
        clean = ~others()
        assert torch.equal(z[clean].view(torch.int32), seen[clean].view(torch.int32))
        level = sigma.view(2, 6, 1, 1, 1)
        torch.testing.assert_close(seen[others()], ((1 - level) * z + level * epsilon)[others()])
        assert (seen[others()] != z[others()]).any(dim=(1, 2, 3)).all()
    assert made.start == stretch.start


def test_what_is_in_omega_does_not_leak_into_other_latents_and_nothing_gets_into_it() -> None:
    stretch, noise = random_stretch(), noise_like(random_stretch(), draws(3))
    made = masked(stretch, 0.5, OMEGA, noise)
    changed = stretch._replace(high=stretch.high.clone(), low=stretch.low.clone() if stretch.low is not None else None)
    for part in branches(changed):
        part[~others()] += 5.0
    for before, after in zip(branches(made), branches(masked(changed, 0.5, OMEGA, noise)), strict=True):
        assert torch.equal(before[others()], after[others()]) and not torch.equal(before, after)
    for part, epsilon in zip(branches(changed), branches(noise), strict=True):
        part.copy_(branches(stretch)[0] if part.shape[-1] == 4 else branches(stretch)[1])
        part[others()] += 5.0
        epsilon[~others()] = torch.nan
    for before, after in zip(branches(made), branches(masked(changed, 0.5, OMEGA, noise)), strict=True):
        assert torch.equal(before[~others()], after[~others()])
    whole = [branches(masked(some, 1.0, OMEGA, noise)) for some in (stretch, changed)]
    for one, other in zip(*whole, strict=True):
        assert torch.equal(one[others()], other[others()]), "at level 1 nothing of a masked latent is left"


def test_gathered_latents_are_those_of_each_sample() -> None:
    stretch = random_stretch()
    found = gather_latents(stretch.high, OMEGA)
    for number, row in enumerate(OMEGA.tolist()):
        for at, latent in enumerate(row):
            assert torch.equal(found[number, :, at], stretch.high[number, :, latent])


def test_a_call_with_a_history_is_a_call_with_the_memory_of_it() -> None:
    dit, stretch = model(), random_stretch()
    x, t, times = (
        torch.randn(2, 2, 2, 4, 4, generator=draws(2)),
        torch.tensor([0.3, 0.9]),
        torch.tensor([[11, 12], [4, 20]]),
    )
    memory = dit.remember(stretch.high, stretch.low, stretch.start)
    assert torch.equal(dit(x, t, times, stretch), dit(x, t, times, memory))
    assert not torch.allclose(dit(x, t, times, stretch), dit(x, t, times, None), atol=1e-4)


@pytest.mark.parametrize("rates", [("2x2x2",), ("2x2x4",), ("1x1x8", "2x2x2")])
@pytest.mark.parametrize("window", [0, 2, 5])
def test_training_gives_each_sample_what_generation_gives_there(rates: tuple[str, ...], window: int) -> None:
    dit = model(rates=rates, window=window, branches="high", history=16)
    latents = torch.randn(1, 2, 24 + SEGMENT, 4, 4, generator=draws(5))
    x = torch.randn(1, 2, SEGMENT, 4, 4, generator=draws(6))
    counts = list(range(0, 25, SEGMENT))
    moments = torch.cat([latents, torch.full_like(latents, -30.0)])[None]
    histories, alone = list[Tensor](), list[Tensor]()
    for known in counts:
        # what generation sees after so many latents
        history = segments.History(dit)
        for piece in latents[:, :, :known].split(SEGMENT, 2) if known else ():
            history.append(piece)
        seen = history.noised_recent()
        clean = x if seen is None else torch.cat([seen, x], dim=2)
        times = torch.arange(known + SEGMENT - clean.shape[2], known + SEGMENT)
        t = torch.zeros(1, clean.shape[2])
        t[:, -SEGMENT:] = 0.7
        made = dit(clean, t, times, history.memory, first=(times == 0)[None])
        alone.append(made[0, :, -SEGMENT:])
        past = min(known, 16)
        before = torch.full((1, 2, 2, 16, 4, 4), 99.0)
        before[:, :, :, 16 - past :] = moments[:, :, :, known - past : known]
        histories.append(before)
    # all of them in one batch of training
    together = {
        "latent": moments[:, :, :, :SEGMENT].expand(len(counts), -1, -1, -1, -1, -1),
        "history_latent": torch.cat(histories),
        "history_steps": torch.tensor(counts).clamp(max=16),
        "stream_step": torch.tensor(counts),
    }
    given = split_segment(stretch_of(together, dit, 16), SEGMENT, together["stream_step"], dit.config)
    assert given.history is not None
    clean = torch.cat([given.x0[:, :, : given.recent], x.expand(len(counts), -1, -1, -1, -1)], dim=2)
    t = torch.zeros(len(counts), clean.shape[2])
    t[:, -SEGMENT:] = 0.7
    made = dit(clean, t, given.times, given.history, first=given.first, seen=given.seen)[:, :, -SEGMENT:]
    for n, known in enumerate(counts):
        # of a history that is cut, φ's first tokens have in generation seen what came before
        if known <= 16:
            torch.testing.assert_close(made[n], alone[n], atol=1e-4, rtol=1e-4)


CUT: list[tuple[dict[str, Any], int]] = [
    ({"rates": ("2x2x4",)}, 11),
    ({"rates": ("2x2x2", "2x2x8")}, 20),
    ({"rates": ("2x2x1",)}, 7),
    ({"memory": "framepack"}, 10),
    ({"memory": "framepack"}, 30),
]


@pytest.mark.parametrize(("changes", "most"), CUT)
def test_a_history_that_is_cut_has_in_generation_the_tokens_that_it_has_in_training(
    changes: dict[str, Any], most: int
) -> None:
    dit = model(branches="high", history=most, **changes)
    history = segments.History(dit)
    piece = torch.zeros(1, 2, SEGMENT, 4, 4)
    for known in range(0, 60, SEGMENT):
        if known:
            history.append(piece)
        behind, past = torch.tensor([known]), min(known, most)
        stretch = Stretch(
            torch.zeros(1, 2, past + SEGMENT, 4, 4), None, known - past, torch.zeros(1, past + SEGMENT) > 0
        )
        given = split_segment(stretch, SEGMENT, behind, dit.config)
        assert given.history is not None
        memory = memory_of(dit, given.history)
        positions = memory.positions if memory.seen is None else memory.positions[memory.seen[0]]
        # times are those of the window's scale, which is shifted by what fills no group
        late = given.times[0, -1] - (known + SEGMENT - 1)
        held = torch.zeros(0, 3) if history.memory is None else history.memory.positions
        assert (positions[:, 0] - late).sort().values.tolist() == held[:, 0].sort().values.tolist()


@given(
    segment=st.integers(1, 7),
    time=st.sampled_from([1, 2, 4, 8]),
    window=st.integers(0, 6),
    most=st.integers(8, 60),
    start=st.integers(0, 60),
    count=st.integers(1, 30),
)
def test_every_history_that_generation_comes_to_is_drawn_and_no_other(
    segment: int, time: int, window: int, most: int, start: int, count: int
) -> None:
    config = model(shape=(segment, 4, 4), rates=(f"2x2x{time}",), window=window, history=most, branches="high").config
    lengths = history_lengths(config)
    groups = start // time * time
    begin = groups if max(window, 1) <= groups <= most else 0
    met = begin + count * segment
    known = min(met, most)
    assert known in {min(some, most) for some in lengths.some}
    if met > most:
        first = lengths.some[-1]
        assert (met - first) % lengths.unit == 0, "any place that it comes to later can be drawn"
    # and all that is drawn is met
    starts = {0, *(n * time for n in range(1, most // time + 1) if n * time >= max(window, 1))}
    every = {s + n * segment for s in starts for n in range(most // segment + 2)}
    assert (
        all(some in every for some in lengths.some[:-1]) and lengths.some[-1] >= most > lengths.some[-1] - lengths.unit
    )


class Oracle:
    """Knows every latent of a video, and tells its times to `called`."""

    def __init__(self, video: Tensor) -> None:
        self.video, self.called = video, list[list[int]]()
        self.config, self.latent_mean = model().config, torch.zeros(2)

    def __call__(
        self, x: Tensor, t: Tensor, times: Tensor, memory: Memory, condition: Tensor | None, first: Tensor
    ) -> Tensor:
        assert first.tolist() == [[time == 0 for time in times.tolist()]]
        self.called.append(times.tolist())
        return (x - self.video[:, :, times]) / t.view(-1, 1, 1, 1, 1)


def test_retrieval_asks_for_a_few_latents_at_a_time_and_gives_them_in_the_order_asked() -> None:
    video = torch.randn(1, 2, 9, 4, 4, generator=draws(8))
    oracle = Oracle(video)
    memory = Memory(torch.zeros(1, 1, 24), torch.zeros(1, 3), torch.zeros(1, 1, 0))
    asked = [7, 2, 3, 8, 0]
    made = retrieve(oracle, memory, asked, (4, 4), draws(1), solver_steps=3, at_once=2)  # type: ignore[arg-type]
    torch.testing.assert_close(made, video[:, :, asked], atol=1e-5, rtol=1e-5)
    assert oracle.called[::3] == [[7, 2], [3, 8], [0]]


def test_the_target_of_the_flow_is_exact_for_retrieved_steps() -> None:
    stretch = random_stretch()
    x0 = gather_latents(stretch.high, OMEGA)
    noise, t = torch.randn(x0.shape, generator=draws(2)), torch.tensor([0.4, 0.8])
    velocity = (flow.interpolate(x0, noise, t) - x0) / t.view(-1, 1, 1, 1, 1)
    assert flow.loss(velocity, x0, noise).max() < 1e-9
