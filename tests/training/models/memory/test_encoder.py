"""Memories of a history: how many tokens, where they are, what they have seen, and that pieces make the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.baselines import FRAMEPACK, FramePack, Patchify
from longtake.training.models.memory.encoder import Encoder
from longtake.training.models.memory.tokens import Memory, cropped, joined, parse_rate, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = ["4x4x2", "2x2x2", "2x2x1", "2x2x4", "2x2x8"]
WIDTH, CHANNELS = 24, 3


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def awake(module: nn.Module) -> nn.Module:
    """What starts at zero is filled with noise."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


def encoder(rate: str = "4x4x2", patch: int = 1, **settings) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(parse_rate(rate), patch, CHANNELS, WIDTH, **{"widths": (4, 6, 8, 16), "heads": 2} | settings)
    return awake(made)  # type: ignore[return-value]


def project(patch: int = 1) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(CHANNELS * patch**2, WIDTH)


def history(count: int, side: tuple[int, int] = (8, 12), rate: str = "4x4x2", batch: int = 2) -> tuple[Tensor, Tensor]:
    """Latents, and those of the video scaled down by the rate."""
    rows, columns, _ = parse_rate(rate)
    low = noise(batch, CHANNELS, count, side[0] // rows, side[1] // columns, seed=8)
    return noise(batch, CHANNELS, count, *side), low


def same(a: Memory, b: Memory, tolerance: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


# rates and counts


def test_a_rate_is_height_width_and_time_in_powers_of_two():
    assert parse_rate("4x2x8") == (4, 2, 8)
    for bad in ("4x4", "4x4x2x1", "3x4x2", "0x4x2", "axbxc", "", "-2x2x2", "2x2x1.0", "4X4X2"):
        with pytest.raises(ValueError, match="needs height x width x time in powers of two, such as 4x4x2"):
            parse_rate(bad)


def test_twenty_seconds_of_480p_are_5460_tokens_at_4x4x2():
    """60x104 latents, six a second, patches of two: the paper's "about 5k"."""
    assert tokens_of("4x4x2", 2, (120, 60, 104)) == 5460
    second = {rate: tokens_of(rate, 2, (6, 60, 104)) for rate in ("2x2x1", "2x2x2", "4x4x2")}
    assert second == {"2x2x1": 6 * 15 * 26, "2x2x2": 3 * 15 * 26, "4x4x2": 3 * 7 * 13}
    assert tokens_of((4, 4, 2), 2, (121, 63, 111)) == 5460


@torch.no_grad()
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("side", [(16, 16), (19, 27)])
def test_an_encoder_makes_as_many_tokens_as_its_rate_says_of_any_frame(rate, patch, side):
    high, low = history(8, side, rate)
    memory = encoder(rate, patch)(high, low, project=project(patch))
    count = tokens_of(rate, patch, (8, *side))
    assert memory.tokens.shape == (2, count, WIDTH)
    assert memory.positions.shape == (count, 3)
    assert memory.hidden.shape == (2, count, 16)


@torch.no_grad()
def test_rates_may_differ_in_height_and_width():
    high = noise(1, CHANNELS, 2, 16, 16)
    assert encoder("8x2x2", branches="high")(high).tokens.shape == (1, 2 * 8, WIDTH)
    assert encoder("1x1x1", branches="high")(high).tokens.shape == (1, 2 * 16 * 16, WIDTH)


# positions


@torch.no_grad()
def test_positions_are_the_centres_of_the_cells_in_the_token_grid():
    high, low = history(4, (19, 27))
    made = encoder(patch=2)(high, low, start=10, project=project(2)).positions
    expected = [(t, r, c) for t in (10.5, 12.5) for r in (1.5, 5.5)[: 19 // 8] for c in (1.5, 5.5, 9.5)]
    assert made.dtype == torch.float32
    assert made.tolist() == [list(map(float, e)) for e in expected]


@torch.no_grad()
def test_positions_after_cropping_are_the_true_ones():
    high, low = history(12)
    phi, p = encoder(), project()
    whole = phi(high, low, project=p)
    late = cropped(whole, since=6)
    assert late.positions[:, 0].unique().tolist() == [6.5, 8.5, 10.5]
    keep = whole.positions[:, 0] >= 6
    assert torch.equal(late.tokens, whole.tokens[:, keep])
    assert torch.equal(late.hidden, whole.hidden[:, keep])
    assert cropped(whole, since=100).tokens.shape[1] == 0


@torch.no_grad()
def test_a_token_sees_the_place_that_its_position_says():
    """A change in one latent reaches, of a latent's tokens, most of all the one that is there."""
    phi = encoder("2x2x2", branches="high")
    high = noise(1, CHANNELS, 4, 16, 16)
    for t, row, column in [(0, 0, 0), (2, 6, 9), (3, 15, 1)]:
        poked = high.clone()
        poked[0, :, t, row, column] += 3
        changed = (phi(poked).tokens - phi(high).tokens).norm(dim=-1)[0]
        found = phi(high).positions[changed.argmax()]
        assert (found[1:] - torch.tensor([row, column])).abs().max() <= 0.5
        assert changed.argmax() // 64 == t // 2


# time: causality, pieces


@torch.no_grad()
@pytest.mark.parametrize("rate", RATES)
def test_no_token_sees_a_later_group_of_steps(rate):
    phi, p, time = encoder(rate), project(), parse_rate(rate)[2]
    high, low = history(3 * time, rate=rate)
    before = phi(high, low, project=p)
    for step in range(3 * time):
        late, small = high.clone(), low.clone()
        late[:, :, step:], small[:, :, step:] = noise(*late[:, :, step:].shape, seed=1), 5.0
        after = phi(late, small, project=p)
        whole = before.positions[:, 0] < step // time * time
        assert torch.equal(after.tokens[:, whole], before.tokens[:, whole])
        assert not torch.equal(after.tokens[:, ~whole], before.tokens[:, ~whole])


@torch.no_grad()
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pieces_encoded_one_after_the_other_are_the_whole(rate, seed):
    phi, p, time = encoder(rate), project(), parse_rate(rate)[2]
    high, low = history(6 * time, rate=rate)
    cuts = torch.randperm(5, generator=seeded(seed))[: 1 + seed].sort().values + 1
    past, parts = Past(), []
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), 6], strict=True):
        piece = slice(begin * time, end * time)
        parts.append(phi(high[:, :, piece], low[:, :, piece], begin * time, past, p))
    assert len(parts) == 2 + seed
    same(joined(parts), phi(high, low, project=p))


@torch.no_grad()
def test_what_an_encoder_remembers_does_not_grow():
    phi, past, p = encoder(), Past(), project()
    sizes = []
    for n in range(4):
        phi(*history(2 + 2 * n), 0, past, p)
        sizes.append(sum(x.untyped_storage().nbytes() for x in past.inputs.values()))
    assert len(set(sizes)) == 1


# the branches


@torch.no_grad()
def test_at_the_start_both_branches_give_what_the_low_one_alone_gives():
    torch.manual_seed(0)
    both = Encoder((4, 4, 2), 1, CHANNELS, WIDTH, widths=(4, 6, 8, 16), heads=2)
    low = Encoder((4, 4, 2), 1, CHANNELS, WIDTH, branches="low")
    given = history(4)
    assert torch.equal(both(*given, project=project()).tokens, low(None, given[1], project=project()).tokens)
    assert not any(True for _ in low.parameters())


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_the_low_branch_is_the_last_latent_of_each_group_through_the_given_projection(patch):
    _, low = history(4, (8 * patch, 12 * patch))
    p = project(patch)
    made = encoder(branches="low", patch=patch)(None, low, project=p).tokens.view(2, 2, 2, 3, WIDTH)
    for row in range(2):
        for column in range(3):
            cut = low[:, :, 3, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            torch.testing.assert_close(made[:, 1, row, column], p(cut.flatten(1)))


@torch.no_grad()
def test_a_video_that_is_scaled_down_by_less_is_averaged():
    fine = noise(1, CHANNELS, 2, 4, 6)
    made = encoder(branches="low", shrink=(2, 2))(None, fine, project=project())
    coarse = fine.unflatten(4, (3, 2)).unflatten(3, (2, 2)).mean((4, 6))
    same(made, encoder(branches="low")(None, coarse, project=project()))


@torch.no_grad()
def test_both_branches_are_added_up_and_each_counts():
    high, low = history(4)
    both, p = encoder(), project()
    total = both(high, low, project=p).tokens
    small = encoder(branches="low")(None, low, project=p).tokens
    both.branches = "high"
    torch.testing.assert_close(total, both(high).tokens + small)
    assert both(high).tokens.norm() > 0.1
    assert small.norm() > 0.1


def test_gradients_reach_every_weight_of_the_encoder_and_the_projection_after_the_first_step():
    torch.manual_seed(0)
    phi, p = Encoder((4, 4, 2), 1, CHANNELS, WIDTH, widths=(4, 6, 8, 16), heads=2), project()
    optimizer = torch.optim.SGD([*phi.parameters(), *p.parameters()], 0.1)
    for _ in range(3):  # the output, then what is behind it, then what is behind the attention's output
        optimizer.zero_grad()
        (phi(*history(4), project=p).tokens - 1).square().mean().backward()
        optimizer.step()
    assert all(x.grad is not None and x.grad.any() for x in [*phi.parameters(), *p.parameters()])


def test_hidden_states_begin_with_the_scale_of_the_latents():
    """Without norms nothing else keeps them from fading away layer by layer."""
    torch.manual_seed(0)
    for rate in RATES:
        phi = Encoder(parse_rate(rate), 1, 16, WIDTH, branches="high", widths=(32, 64, 64, 64))
        assert 0.3 < phi(noise(1, 16, 8, 16, 16)).hidden.std() < 1.5


def test_recomputing_gives_the_same_gradients():
    given = history(4)

    def gradients(checkpointing: bool) -> list[Tensor]:
        phi = encoder(checkpointing=checkpointing).train()
        phi(*given, project=project()).tokens.square().mean().backward()
        return [x.grad for x in phi.parameters() if x.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_in_bf16_positions_stay_exact():
    phi, p = encoder().bfloat16(), project().bfloat16()
    high, low = history(4)
    memory = phi(high, low, start=3001, project=lambda x: p(x.bfloat16()))
    assert memory.tokens.dtype == memory.hidden.dtype == torch.bfloat16
    assert memory.positions[0].tolist() == [3001.5, 1.5, 1.5]
    torch.testing.assert_close(memory.tokens.float(), encoder()(high, low, project=project()).tokens, rtol=0, atol=0.1)


# what it is compared with


@torch.no_grad()
def test_a_patchifier_is_one_linear_map_of_all_latents_of_a_token():
    torch.manual_seed(0)
    large = Patchify((2, 4, 2), 2, CHANNELS, WIDTH)
    high = noise(2, CHANNELS, 4, 9, 16)
    made = large(high)
    assert made.tokens.shape == (2, tokens_of("2x4x2", 2, (4, 9, 16)), WIDTH)
    block = high[:, :, 2:4, 4:8, 8:16]
    torch.testing.assert_close(made.tokens.view(2, 2, 2, 2, -1)[:, 1, 1, 1], large.kernel.linear(block.flatten(1)))
    assert made.positions.view(2, 2, 2, 3)[1, 1, 1].tolist() == [2.5, 2.5, 5.5]
    assert made.hidden.shape == (2, 8, 0)
    past = Past()
    same(joined([large(high[:, :, :2], None, 0, past), large(high[:, :, 2:], None, 2, past)]), made)


@torch.no_grad()
def test_a_packed_memory_sees_late_latents_finely_and_old_ones_coarsely():
    torch.manual_seed(0)
    pack = FramePack(1, CHANNELS, WIDTH)
    made = pack(noise(1, CHANNELS, 24, 16, 16), start=100)
    times, counts = made.positions[:, 0].unique(return_counts=True)
    assert dict(zip(times.tolist(), counts.tolist(), strict=True)) == {
        106.5: 16, 110.5: 16, 114.5: 16, 118.5: 16, 121.5: 64, 123.0: 256
    }  # fmt: skip
    assert made.positions[-1].tolist() == [123, 15, 15]
    assert made.positions[0].tolist() == [106.5, 1.5, 1.5]
    assert sum(latents for latents, *_ in FRAMEPACK) == 19


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_a_packed_memory_has_as_many_tokens_of_a_grid_whatever_the_patch(patch):
    """FramePack's own kernels over latents, 1x2x2, 2x4x4 and 4x8x8, are those of a transformer with a patch of 2."""
    pack = FramePack(patch, CHANNELS, WIDTH)
    made = pack(noise(1, CHANNELS, 19, 16 * patch, 16 * patch))
    assert [kernel.size for kernel in pack.kernels] == [(k, k * patch, k * patch) for k in (1, 2, 4)]
    assert made.tokens.shape[1] == 256 + 64 + 64
    assert made.positions[-1].tolist() == [18, 15, 15]


@torch.no_grad()
@pytest.mark.parametrize(("patch", "side"), [(1, (6, 7)), (2, (12, 13)), (1, (1, 3))])
def test_a_packed_memory_repeats_the_last_row_and_column_of_a_frame_that_it_does_not_divide(patch, side):
    torch.manual_seed(0)
    pack, high = FramePack(patch, CHANNELS, WIDTH), noise(1, CHANNELS, 19, *side)
    every = 4 * patch
    larger = [-(-n // every) * every for n in side]
    rows, columns = ([min(n, last - 1) for n in range(size)] for size, last in zip(larger, side, strict=True))
    whole, made = pack(high[..., rows, :][..., columns]), pack(high)
    grid = [-(-n // patch) for n in side]
    counts = [-(-grid[0] // k) * -(-grid[1] // k) for k in (4, 2, 1)]
    assert made.tokens.shape[1] == 4 * counts[0] + counts[1] + counts[2]
    torch.testing.assert_close(made.tokens[:, : 4 * counts[0]], whole.tokens[:, : 4 * counts[0]])
    # where a cell is filled up, its token shows no more than there is
    assert (made.positions[:, 1:].amax(0) == torch.tensor(grid) - 1).all()
    old = made.positions[: counts[0], 1].unique()
    expected = torch.tensor([min(n, grid[0] - 1) for n in range(larger[0] // patch)]).float().view(-1, 4).mean(1)
    torch.testing.assert_close(old, expected)


def embedded(high: Tensor, embedding: nn.Linear, patch: int) -> Tensor:
    """Tokens `(B, T, h, w, D)` of each patch by itself, one by one."""
    rows = [
        [
            embedding(high[..., patch * r : patch * (r + 1), patch * c : patch * (c + 1)].movedim(2, 1).flatten(2))
            for c in range(high.shape[4] // patch)
        ]
        for r in range(high.shape[3] // patch)
    ]
    return torch.stack([torch.stack(row, 2) for row in rows], 2)


def means(x: Tensor, cell: tuple[int, int, int]) -> Tensor:
    """Means of `(B, T, h, w, D)` over cells."""
    x = x.unflatten(3, (-1, cell[2])).unflatten(2, (-1, cell[1])).unflatten(1, (-1, cell[0]))
    return x.mean((2, 4, 6))


@torch.no_grad()
def test_at_the_start_a_token_is_the_mean_of_the_patch_embeddings_that_it_stands_for():
    torch.manual_seed(3)
    embedding, high = project(), noise(2, CHANNELS, 19, 8, 8)
    pack, large = FramePack(1, CHANNELS, WIDTH), Patchify((4, 2, 2), 1, CHANNELS, WIDTH)
    for kernel in (*pack.kernels, large.kernel):
        kernel.start_from(embedding.weight, embedding.bias)
    tokens = embedded(high, embedding, 1)
    parts = [(tokens[:, :16], (4, 4, 4)), (tokens[:, 16:18], (2, 2, 2)), (tokens[:, 18:], (1, 1, 1))]
    packed = torch.cat([means(part, cell).flatten(1, 3) for part, cell in parts], 1)
    torch.testing.assert_close(pack(high).tokens, packed, rtol=0, atol=1e-5)
    same_rate = means(tokens[:, :18], (2, 4, 2)).flatten(1, 3)
    torch.testing.assert_close(large(high[:, :, :18]).tokens, same_rate, rtol=0, atol=1e-5)


@torch.no_grad()
def test_at_the_start_larger_patches_are_the_patch_embedding_of_the_latents_scaled_down():
    """Each weight is repeated in place, as FramePack's authors do it: one token sees the means of its latents."""
    embedding, high = project(2), noise(2, CHANNELS, 19, 16, 16)
    pack, large = FramePack(2, CHANNELS, WIDTH), Patchify((2, 4, 1), 2, CHANNELS, WIDTH)
    for kernel in (*pack.kernels, large.kernel):
        kernel.start_from(embedding.weight, embedding.bias)
    scaled = [
        torch.nn.functional.avg_pool3d(high[:, :, a:b], k, k) for a, b, k in ((0, 16, 4), (16, 18, 2), (18, 19, 1))
    ]
    expected = torch.cat([embedded(part, embedding, 2).flatten(1, 3) for part in scaled], 1)
    torch.testing.assert_close(pack(high).tokens, expected, rtol=0, atol=1e-5)
    small = torch.nn.functional.avg_pool3d(high, (1, 2, 4), (1, 2, 4))
    torch.testing.assert_close(large(high).tokens, embedded(small, embedding, 2).flatten(1, 3), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 2, 9), (5, 20), (24,)])
def test_a_packed_memory_of_chunks_is_that_of_all_latents_so_far(cuts):
    torch.manual_seed(0)
    pack, past, high = FramePack(1, CHANNELS, WIDTH), Past(), noise(1, CHANNELS, 30, 8, 8)
    for begin, end in zip((0, *cuts), (*cuts, 30), strict=True):
        made = pack(high[:, :, begin:end], None, begin, past)
        same(made, pack(high[:, :, :end]))
    assert past.inputs[pack].shape[2] == 19


# what is refused


def test_what_does_not_fit_is_refused_in_one_line():
    phi, p, (high, low) = encoder(), project(), history(4)
    for given, message in [
        ((high[:, :, :3], low), "high has 3 steps; give a multiple of 2, one at least"),
        ((high[:, :, :0], low), "high has 0 steps; give a multiple of 2, one at least"),
        ((high, low[:, :, :2]), r"low makes 1x2x3 tokens \(time, rows, columns\), high 2x2x3"),
        ((high, low[..., :1, :]), r"low makes 2x1x3 tokens \(time, rows, columns\), high 2x2x3"),
        (
            (high[..., :3], low),
            "high is 8x3; a token stands for 4x4 of its positions: take larger frames or a lower rate",
        ),
        ((None, low), "high: is missing; an encoder with branches 'both' reads it"),
        ((high, None), "low: is missing; an encoder with branches 'both' reads it"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            phi(*given, project=p)
    for other in (Patchify((4, 4, 2), 1, CHANNELS, WIDTH), FramePack(1, CHANNELS, WIDTH)):
        with pytest.raises(ValueError, match=r"^high: is missing"):
            other(None)
