"""A transformer with a memory: what reaches what, positions that count by their differences, silent starts, pieces."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.training.models.common.causal import fold
from longtake.training.models.common.condition import of_classes
from longtake.training.models.common.flow import training_loss
from longtake.training.models.common.rotary import CrossAttention, grid_positions, rotated, rotation
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import PRESETS, MemoryDiTConfig, config_from_preset
from longtake.training.models.memory.tokens import Memory, cropped, joined
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = MemoryDiTConfig(
    depth=3, width=32, heads=2, channels=4, classes=5, memory_widths=(4, 6, 8, 16), memory_heads=2, shape=(3, 8, 8)
)
MEMORIES = [
    {},
    {"rates": ("4x4x2", "2x2x8")},
    {"branches": "high"},
    {"branches": "low"},
    {"cross_attention": True},
    {"memory": "patchify"},
    {"memory": "framepack"},
]
T = torch.tensor([0.3, 0.8])
IDS = of_classes([1, 4])
TIMES = torch.tensor([16, 17, 3])


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replaced(config: MemoryDiTConfig = SMALL, **changes) -> MemoryDiTConfig:
    return MemoryDiTConfig(**config.model_dump() | changes)


def awake_model(**changes) -> MemoryDiT:
    """A model whose every weight counts: what starts at zero is filled with noise, in eval mode."""
    torch.manual_seed(0)
    model = MemoryDiT(replaced(**changes))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def latents(count: int = 3, side: tuple[int, int] = (8, 8), seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, count, *side, generator=seeded(seed))


def history(config: MemoryDiTConfig, count: int = 16, side: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor | None]:
    high = latents(count, side, 1)
    small = config.shrink
    return high, latents(count, (side[0] // small[0], side[1] // small[1]), 2) if small else None


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> MemoryDiT:
    return awake_model()


# shapes and the start


@torch.no_grad()
@pytest.mark.parametrize("changes", [*MEMORIES, {"memory": "none"}])
@pytest.mark.parametrize("patch", [1, 2])
def test_any_memory_has_as_many_tokens_as_its_config_says_and_is_seen(changes, patch):
    model = awake_model(**changes, patch=patch, shape=(3, 16, 16))
    side = (16, 24)
    memory = model.remember(*history(model.config, 16, side), start=0)
    assert memory.tokens.shape == (2, model.config.tokens((16, *side)), 32)
    assert memory.positions.shape == (memory.tokens.shape[1], 3)
    x = latents(3, side)
    made, alone = model(x, T, TIMES, memory, IDS), model(x, T, TIMES, None, IDS)
    assert made.shape == x.shape
    assert torch.equal(made, alone) == (model.config.memory == "none")


@torch.no_grad()
@pytest.mark.parametrize("side", [(8, 10), (4, 6), (16, 24)])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_packed_memory_takes_frames_of_any_size_and_begins_as_the_patch_embedding(side, patch):
    model = MemoryDiT(replaced(memory="framepack", patch=patch, shape=(3, *side)))
    high = latents(19, side, 1)
    memory = model.remember(high)
    assert memory.tokens.shape[1] == model.config.tokens((19, *side))
    own = model.token_in(fold(high[:, :, 18:], 1, patch).movedim(1, -1)).flatten(1, 3)
    close(memory.tokens[:, -own.shape[1] :], own)


@torch.no_grad()
def test_at_the_start_the_prediction_is_zero_and_every_block_the_identity():
    model = MemoryDiT(replaced(cross_attention=True))
    memory = model.remember(*history(model.config))
    assert not model(latents(), T, TIMES, memory, IDS).any()
    parts, conditions = (torch.randn(2, 1, 4, 32), torch.randn(2, 3, 4, 32)), (torch.randn(2, 1, 32),) * 2
    turned, here = rotation(torch.randn(1, 16, 3), 16), rotation(torch.randn(1, 12, 3), 16)
    hidden = (torch.randn(2, 4, 16), here, rotation(torch.randn(1, 4, 3), 16))
    for block in model.blocks():
        made = block(parts, conditions, turned, hidden)
        assert all(torch.equal(a, b) for a, b in zip(made, parts[-1:] if block.ends else parts, strict=True))


@torch.no_grad()
def test_new_cross_attention_and_a_new_high_branch_change_nothing_of_a_trained_transformer():
    low = awake_model(branches="low")
    both = MemoryDiT(replaced(cross_attention=True)).eval()
    missing, unknown = both.load_state_dict(low.state_dict(), strict=False)
    assert all(name.startswith("memory.") or ".cross." in name for name in missing)
    assert not unknown
    given = history(both.config)
    expected = low(latents(), T, TIMES, low.remember(*given), IDS)
    assert torch.equal(both(latents(), T, TIMES, both.remember(*given), IDS), expected)


@pytest.mark.parametrize("changes", MEMORIES)
def test_gradients_reach_every_weight_after_some_steps(changes):
    torch.manual_seed(0)
    model = MemoryDiT(replaced(**changes))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(6):  # output, gates, what is behind them, and so on into the memory
        optimizer.zero_grad()
        memory = model.remember(*history(model.config, 24), first=torch.arange(24).expand(2, -1) == 0)
        made = model(latents(), T, TIMES, memory, IDS, seeded(), torch.tensor([[True, False, False]]))
        (made - 1).square().mean().backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
@pytest.mark.parametrize("changes", [*MEMORIES, {"rates": ("1x1x8", "2x2x4"), "branches": "high"}])
def test_samples_with_less_history_see_in_a_batch_what_they_see_alone(changes):
    model = awake_model(**changes)
    high, low = history(model.config, 24)
    for short in (0, 8, 16):
        skip = torch.tensor([24 - short, 0])
        memory = model.remember(high, low, skip=skip)
        seen, x = torch.tensor([[short > 0, True, True], [True, True, True]]), latents()
        made = model(x, T, TIMES, memory, IDS, seen=seen)
        own = None if low is None else low[:1, :, 24 - short :]
        less = model.remember(high[:1, :, 24 - short :], own, 24 - short) if short else None
        first = 0 if short else 1
        alone = model(x[:1, :, first:], T[:1], torch.as_tensor(TIMES)[first:], less, of_classes([1]))
        close(made[:1, :, first:], alone)
        whole = model(x[1:], T[1:], TIMES, model.remember(high[1:], None if low is None else low[1:]), of_classes([4]))
        close(made[1:], whole)
        # and nothing of what is not there matters
        other = high.clone()
        other[0, :, : 24 - short] = 9.0
        close(
            model(x, T, TIMES, model.remember(other, low, skip=skip), IDS, seen=seen)[:, :, first:], made[:, :, first:]
        )


@torch.no_grad()
def test_a_first_latent_is_known_in_the_memory_and_beside_it(model):
    given, x = history(model.config), latents()
    plain = model(x, T, TIMES, model.remember(*given), IDS)
    flags = torch.arange(16).expand(2, -1) == 0
    assert not torch.allclose(model(x, T, TIMES, model.remember(*given, first=flags), IDS), plain, atol=1e-4)
    first = torch.tensor([[True, False, False]])
    assert not torch.allclose(model(x, T, TIMES, model.remember(*given), IDS, first=first), plain, atol=1e-4)


@torch.no_grad()
def test_weights_from_before_first_latents_were_told_are_as_they_were(model):
    before = {name: value for name, value in model.state_dict().items() if not name.startswith("first.")}
    after = awake_model()
    after.load_state_dict(before)
    given, first = history(model.config), torch.tensor([[True, False, False]])
    plain = after(latents(), T, TIMES, after.remember(*given), IDS)
    assert torch.equal(after(latents(), T, TIMES, after.remember(*given), IDS, first=first), plain)


@torch.no_grad()
def test_the_noise_of_the_history_is_told_and_none_is_as_if_it_were_clean(model):
    memory, x = model.remember(*history(model.config)), latents()
    plain = model(x, T, TIMES, memory, IDS)
    assert torch.equal(model(x, T, TIMES, memory, IDS, level=torch.zeros(2)), plain)
    assert not torch.allclose(model(x, T, TIMES, memory, IDS, level=torch.full((2,), 0.3)), plain, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_size_that_they_say(preset):
    with torch.device("meta"):
        model = MemoryDiT(config_from_preset(preset))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    said = {"xl": 678.37, "l": 461.43, "b": 134.01, "s": 36.71, "tiny": 2.35}[preset.rpartition("_")[2]]
    assert millions == pytest.approx(said, rel=0.005)


def test_names_of_the_memory_begin_with_memory(model):
    inside = {id(p) for p in model.memory.parameters()}
    assert inside == {id(p) for n, p in model.named_parameters() if n.startswith("memory.")}
    assert 0 < len(inside) < len(list(model.parameters()))


@torch.no_grad()
def test_a_model_folder_brings_it_back(model, tmp_path):
    disk.save(tmp_path / "m", "memory_dit", model.config.model_dump(mode="json"), model.state_dict(), {})
    again = disk.load(tmp_path / "m")
    assert again.config == model.config
    memory = model.remember(*history(SMALL))
    assert torch.equal(again(latents(), T, TIMES, memory, IDS), model(latents(), T, TIMES, memory, IDS))


# positions


def test_a_rotation_turns_pairs_by_the_angles_of_the_formula():
    """Written out with explicit loops over axes and frequencies."""
    x, where = torch.randn(1, 1, 1, 16, generator=seeded()), torch.tensor([[[5.0, 2.5, -1.0]]])
    angles = [5.0 * 10000 ** (-i / 4) for i in range(4)]
    angles += [at * 10000 ** (-i / 2) for at in (2.5, -1.0) for i in range(2)]
    pairs = [
        complex(x[0, 0, 0, i], x[0, 0, 0, 8 + i]) * complex(math.cos(a), math.sin(a)) for i, a in enumerate(angles)
    ]
    expected = torch.tensor([p.real for p in pairs] + [p.imag for p in pairs])
    torch.testing.assert_close(rotated(x, rotation(where, 16))[0, 0, 0], expected, rtol=0, atol=1e-5)


def test_a_grid_counts_time_then_rows_then_columns():
    made = grid_positions(torch.tensor([[7, 2], [0, 1]]), 2, 3, torch.device("cpu"))
    assert made.shape == (2, 12, 3)
    assert made[0, [0, 4, 6]].tolist() == [[7, 0, 0], [7, 1, 1], [2, 0, 0]]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"cross_attention": True}, {"memory": "framepack"}])
def test_shifting_all_times_changes_nothing_and_shifting_some_does(changes):
    model = awake_model(**changes)
    given = history(model.config)
    base = model(latents(), T, TIMES, model.remember(*given), IDS)
    late = model(latents(), T, TIMES + 5000, model.remember(*given, start=5000), IDS)
    torch.testing.assert_close(late, base, rtol=0, atol=1e-5)
    apart = model(latents(), T, TIMES + 3, model.remember(*given), IDS)
    assert (apart - base).abs().max() > 1e-3


@torch.no_grad()
def test_latents_may_come_in_any_order_and_each_sample_at_its_own_times(model):
    memory = model.remember(*history(SMALL))
    x, t, order = latents(), torch.tensor([[0.0, 0.4, 0.9], [0.5, 0.0, 0.1]]), [2, 0, 1]
    base = model(x, t, TIMES, memory, IDS)
    torch.testing.assert_close(
        model(x[:, :, order], t[:, order], TIMES[order], memory, IDS), base[:, :, order], rtol=0, atol=1e-5
    )
    other = torch.tensor([5, 6, 9])
    both = model(x, t, torch.stack([TIMES, other]), memory, IDS)
    torch.testing.assert_close(both[0], base[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1], model(x, t, other, memory, IDS)[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_and_columns_and_times_tell_tokens_apart(model):
    same = latents(1, (1, 1), batch=1).expand(1, -1, 3, 8, 8)
    made = model(same, T[:1], TIMES, model.remember(*(h[:1] for h in history(SMALL)))).flatten(2)[0].T
    assert (torch.cdist(made, made) + torch.eye(len(made))).min() > 1e-6


# what reaches what


@torch.no_grad()
@pytest.mark.parametrize("changes", MEMORIES)
def test_memory_and_all_latents_mix_but_samples_never(changes):
    model = awake_model(**changes)
    high, low = history(model.config, 24)

    def made(high: Tensor, low: Tensor | None, x: Tensor) -> Tensor:
        return model(x, T, TIMES, model.remember(high, low), IDS)

    base = made(high, low, latents())
    poked, small, x = high.clone(), None if low is None else low.clone(), latents()
    poked[0, :, 9:17] += 1
    if small is not None:
        small[0, :, 9:17] += 1
    x[0, :, 1, 4, 4] += 1
    for after in (made(poked, small, latents()), made(high, low, x)):
        changed = (after - base).abs().amax(1) > 1e-6
        assert changed[0].all()
        assert not changed[1].any()


@torch.no_grad()
def test_each_branch_and_each_encoder_counts(model):
    two = awake_model(rates=("4x4x2", "2x2x8"))
    for chosen, high_low in ((model, history(SMALL)), (two, history(two.config))):
        high, low = high_low
        base = chosen.remember(high, low).tokens
        assert ((chosen.remember(high + 1, low).tokens - base).abs().amax(-1) > 1e-4).all()
        assert ((chosen.remember(high, low + 1).tokens - base).abs().amax(-1) > 1e-4).all()
    parts = [encoder(*history(two.config), project=two.token_in) for encoder in two.memory]
    whole = two.remember(*history(two.config))
    assert [p.tokens.shape[1] for p in parts] == [8 * 4, 2 * 16]
    assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts], 1))
    assert torch.equal(whole.positions, torch.cat([p.positions for p in parts]))


@torch.no_grad()
def test_tokens_of_the_memory_are_clean_and_latents_have_their_own_time(model):
    """Steps at t = 0 that are given beside the memory are told as clean; the memory is seen the same at all times."""
    memory, x = model.remember(*history(SMALL)), latents()
    seen = []
    handles = [b.modulation.register_forward_hook(lambda _, i, __: seen.append(i[0])) for b in model.blocks()]
    model(x, torch.tensor([[0.0, 0.4, 0.9]] * 2), TIMES, memory, IDS)
    for handle in handles:
        handle.remove()
    of_memory, of_x = seen[:2]
    assert of_memory.shape == (2, 1, 32)
    assert torch.equal(of_memory[:, 0], of_x[:, 0])
    assert not torch.allclose(of_memory[:, 0], of_x[:, 1], atol=1e-2)
    each = model(x, T[:, None].expand(2, 3), TIMES, memory, IDS)
    torch.testing.assert_close(model(x, T, TIMES, memory, IDS), each, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_model_without_a_memory_attends_as_one_softmax_over_all_its_tokens():
    """One block, written out with loops over heads: the attention of the formula on rotated queries and keys."""
    model = awake_model(depth=1, memory="none", classes=0)
    block = next(model.blocks())
    x, c = torch.randn(1, 2, 4, 32, generator=seeded()), torch.randn(1, 1, 32, generator=seeded(1))
    where = torch.randn(1, 8, 3, generator=seeded(2))
    a, s, g, a2, s2, g2 = block.modulation.linear(nn.functional.silu(c[0, 0])).chunk(6)

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    y = x.view(8, 32)
    q, k, v = block.qkv(norm(y) * (1 + s) + a).chunk(3, dim=-1)
    mixed = []
    for h in (slice(0, 16), slice(16, 32)):
        qh, kh = (rotated(z[None, None, :, h], rotation(where, 16))[0, 0] for z in (q, k))
        mixed.append(torch.softmax(qh @ kh.T / 4, -1) @ v[:, h])
    y = y + g * block.out(torch.cat(mixed, -1))
    y = y + g2 * block.mlp(norm(y) * (1 + s2) + a2)
    made = block((x,), (c,), rotation(where, 16))[0]
    torch.testing.assert_close(made.view(8, 32), y, rtol=0, atol=1e-5)


# pieces


@torch.no_grad()
@pytest.mark.parametrize("changes", MEMORIES)
@pytest.mark.parametrize("cuts", [(8,), (8, 16, 24), (16, 24)])
def test_a_memory_appended_to_is_the_memory_of_all(changes, cuts):
    model = awake_model(**changes)
    high, low = history(model.config, 32)
    memory: Memory | None = None
    pasts = [Past() for _ in model.memory]
    for begin, end in itertools.pairwise((0, *cuts, 32)):
        piece = slice(begin, end)
        memory = model.append(memory, high[:, :, piece], None if low is None else low[:, :, piece], begin, pasts)
    whole = model.remember(high, low)
    assert memory is not None
    assert memory.tokens.shape == whole.tokens.shape
    x, times = latents(), torch.tensor([32, 33, 34])
    torch.testing.assert_close(model(x, T, times, memory, IDS), model(x, T, times, whole, IDS), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_appended_memory_reaches_back_as_far_as_its_config_says_with_true_positions():
    model = awake_model(history=8)
    high, low = history(model.config, 24)
    pasts, memory, sizes = [Past()], None, []
    for begin in range(0, 24, 4):
        piece = slice(begin, begin + 4)
        memory = model.append(memory, high[:, :, piece], low[:, :, piece], begin, pasts)
        sizes.append(memory.tokens.shape[1])
    assert sizes == [8, 16, 16, 16, 16, 16]
    expected = cropped(model.remember(high, low), 16)
    assert memory.positions[:, 0].min() == 16.5
    assert torch.equal(memory.positions, expected.positions)
    torch.testing.assert_close(memory.tokens, expected.tokens, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_order_of_memory_tokens_does_not_matter(model):
    whole = model.remember(*history(SMALL))
    order = torch.randperm(whole.tokens.shape[1], generator=seeded())
    mixed = Memory(whole.tokens[:, order], whole.positions[order], whole.hidden[:, order])
    torch.testing.assert_close(
        model(latents(), T, TIMES, mixed, IDS), model(latents(), T, TIMES, whole, IDS), rtol=0, atol=1e-5
    )


# classes, statistics, precision, recomputation


@torch.no_grad()
def test_classes_count_and_are_hidden_in_training_from_the_given_generator(model):
    memory = model.remember(*history(SMALL))
    with_class, without = (model(latents(), T, TIMES, memory, ids) for ids in (IDS, None))
    assert not torch.allclose(with_class, without, atol=1e-4)
    assert torch.equal(model(latents(), T, TIMES, memory, of_classes([-1, -1])), without)
    hiding = awake_model(label_dropout=1.0).train()
    assert torch.equal(hiding(latents(), T, TIMES, memory, IDS, seeded()), without)


def test_latents_are_normalised_by_the_statistics_of_their_own_column():
    model = MemoryDiT(SMALL)
    mean, std = torch.arange(4.0), torch.arange(1.0, 5.0)
    model.set_statistics(mean, std, mean + 1, std * 2)
    x = latents()
    torch.testing.assert_close(model.denormalise(model.normalise(x)), x)
    torch.testing.assert_close(model.normalise(x)[:, 3], (x[:, 3] - 3) / 4)
    torch.testing.assert_close(model.normalise_low(x)[:, 3], (x[:, 3] - 4) / 8)
    model.set_statistics(mean, std)
    assert model.low_std.tolist() == [2, 4, 6, 8]
    assert {"latent_mean", "latent_std", "low_mean", "low_std"} <= model.state_dict().keys()
    with pytest.raises(ValueError, match=r"^low_mean and low_std: give both or none$"):
        model.set_statistics(mean, std, mean)
    with pytest.raises(ValueError, match="positive, finite std"):
        model.set_statistics(mean, std, mean, -std)


@pytest.mark.parametrize("changes", [{}, {"cross_attention": True}, {"memory": "patchify"}])
def test_recomputing_gives_the_same_loss_and_gradients(changes):
    def gradients(recomputed: bool) -> list[Tensor]:
        model = awake_model(activation_checkpointing=recomputed, **changes).train()
        memory = model.remember(*history(model.config))
        model(latents(), T, TIMES, memory, IDS, seeded()).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("changes", [{}, {"cross_attention": True}])
def test_the_last_block_computes_only_what_is_read(changes):
    made, rows = [], []
    for ends in (False, True):
        model = awake_model(**changes).double().train()
        last = list(model.blocks())[-1]
        assert last.ends and not any(block.ends for block in list(model.blocks())[:-1])
        last.ends, counted = ends, []
        last.mlp.register_forward_pre_hook(
            lambda _, given, counted=counted: counted.append(given[0][0, ..., 0].numel())
        )
        memory = model.remember(*history(model.config))
        out = model(latents(), T, TIMES, memory, IDS, seeded())
        out.square().mean().backward()
        made.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        rows.append(sum(counted))
    assert rows[0] - rows[1] == memory.tokens.shape[1] > 0
    for plain, shorter in zip(*made, strict=True):
        torch.testing.assert_close(plain, shorter, rtol=1e-10, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("changes", MEMORIES)
def test_bf16_is_close_to_fp32(changes):
    model = awake_model(**changes)
    given, x = history(model.config), latents()
    expected = model(x, T, TIMES, model.remember(*given), IDS)
    model.bfloat16()
    made = model(x, T, TIMES, model.remember(*given), IDS)
    assert made.dtype == torch.bfloat16
    assert (made - expected).norm() / expected.norm() < 0.05


def test_the_flow_can_be_learned_from_the_memory_alone():
    """Steps of a history are to be found again, at their times: without the memory there is nothing to know them by."""
    torch.manual_seed(0)
    model = MemoryDiT(replaced(classes=0, rates=("2x2x1",), shape=None))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses, draw = [], seeded()
    for _ in range(150):
        level = torch.randn(8, 4, 4, 1, 1, generator=draw)  # a colour for each latent
        high = level.expand(-1, -1, -1, 4, 4)
        memory = model.remember(high, high[..., ::2, ::2])
        times = torch.randperm(4, generator=draw)[:2]
        loss = training_loss(lambda x, t: model(x, t, times, memory), high[:, :, times], draw).mean()  # noqa: B023
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert sum(losses[-20:]) / 20 < 0.35


# cross-attention


def test_cross_attention_starts_silent_and_finds_by_position():
    torch.manual_seed(0)
    cross = CrossAttention(24, 8, 2)
    x, hidden = torch.randn(1, 4, 24), torch.randn(1, 5, 8)
    here, there = (rotation(torch.randn(1, n, 3, generator=seeded(n)) * 3, 12) for n in (4, 5))
    assert not cross(x, hidden, here, there).any()
    nn.init.normal_(cross.out.weight)
    elsewhere = rotation(torch.zeros(1, 5, 3), 12)
    assert not torch.allclose(cross(x, hidden, here, there), cross(x, hidden, here, elsewhere), atol=1e-3)


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.zeros(2, 5, 3, 8, 8)), r"x has shape \(2, 5, 3, 8, 8\); this model needs \(B, 4, T, H, W\)"),
        (dict(t=torch.zeros(2, 4)), r"t has shape \(2, 4\); it needs \(2,\) or \(2, 3\)"),
        (dict(times=torch.zeros(2)), r"times has shape \(2,\); it needs \(3,\) or \(2, 3\)"),
        (dict(condition=of_classes([5, 0])), "class 5 is out of range; this model has classes 0 to 4, and -1 for none"),
        (
            dict(memory=Memory(torch.zeros(1, 6, 32), torch.zeros(6, 3), torch.zeros(1, 6, 16))),
            r"memory has tokens \(1, 6, 32\); it needs \(2, N, 32\)",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**{"x": latents(), "t": T, "times": TIMES} | arguments)


def test_wrong_histories_sizes_and_classes_of_a_model_without_are_refused(model):
    high, low = history(SMALL)
    with pytest.raises(ValueError, match=r"^high has shape \(2, 4, 16, 8\); it needs \(B, 4, T, H, W\)$"):
        model.remember(high[..., 0], low)
    with pytest.raises(ValueError, match=r"^low has shape \(2, 3, 16, 2, 2\); it needs"):
        model.remember(high, low[:, :3])
    with pytest.raises(ValueError, match=r"^pasts are 2; this model has 1 encoders, which need one each$"):
        model.remember(high, low, 0, [Past(), Past()])
    with pytest.raises(ValueError, match=r"^classes: this model has none; leave them out$"):
        awake_model(classes=0)(latents(), T, TIMES, None, IDS)
    with pytest.raises(ValueError, match=r"^x is 7x8; its height and width must be multiples of 2$"):
        awake_model(patch=2)(latents(3, (7, 8)), T, TIMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=30, heads=4), "width is 30; divided by heads, 4, it must be even and 6 at least"),
        (dict(width=32, heads=8), "width is 32; divided by heads, 8"),
        (dict(patch=3), "patch is 3; it must be a power of two"),
        (dict(rates=("4x4",)), "rate '4x4': needs height x width x time in powers of two"),
        (dict(rates=("4x4x2", "4x4x2")), "rates: 4x4x2, 4x4x2 has one twice"),
        (dict(rates=()), "at least 1 item"),
        (dict(rates=("16x4x2",)), "one token of the memory stands for 16x4, frames are 8x8"),
        (dict(history=7, rates=("2x2x8",)), "history is 7 steps; one token of the memory stands for 8"),
        (dict(memory_widths=(4, 6, 8, 15)), "memory_widths end with 15, no multiple of 2 heads"),
        (dict(cross_attention=True, branches="low"), "cross_attention: needs memory: encoder with its high branch"),
        (dict(cross_attention=True, memory="patchify"), "cross_attention: needs memory: encoder with its high branch"),
        (dict(shape=(3, 5, 8), patch=2), "shape: 5x8 is no multiple of patch 2"),
        (dict(widht=4), "Extra inputs are not permitted"),
    ],
)
def test_configs_are_checked(changes, message):
    with pytest.raises(ValidationError, match=message):
        replaced(**changes)


def test_a_config_says_what_its_memory_needs():
    two = replaced(rates=("4x4x2", "2x2x8"))
    assert (SMALL.shrink, SMALL.group) == ((4, 4), 2)
    assert (two.shrink, two.group) == ((2, 2), 8)
    assert replaced(branches="high").shrink is None
    assert (replaced(memory="patchify").shrink, replaced(memory="patchify").group) == (None, 2)
    assert (replaced(memory="framepack").shrink, replaced(memory="framepack").group) == (None, 1)
    assert replaced(memory="none", history=0).tokens((100, 8, 8)) == 0
    assert replaced(patch=2, shape=None).tokens((120, 60, 104)) == 5460
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of: memory_dit_xl, memory_dit_l"):
        config_from_preset("huge")
    assert [config_from_preset(p).channels for p in PRESETS] == [64] * 5


def test_memories_can_be_joined(model):
    a, b = (model.remember(*history(SMALL), start=start) for start in (0, 16))
    both = joined([a, b])
    assert both.tokens.shape[1] == 2 * a.tokens.shape[1]
    assert both.positions[:, 0].unique().tolist() == [n + 0.5 for n in range(0, 32, 2)]
