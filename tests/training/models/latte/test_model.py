"""Latte: what mixes with what, a silent start, classes and guidance, learning, and clips longer than a window."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.training.models.common import dit
from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.common.dit import attention
from longtake.training.models.common.flow import training_loss
from longtake.training.models.generator import Settings
from longtake.training.models.latte import sample
from longtake.training.models.latte.model import PRESETS, Block, Latte, LatteConfig, config_from_preset
from longtake.training.models.latte.sample import windows

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = LatteConfig(depth=4, width=32, heads=4, channels=6, classes=5, shape=(4, 2, 3))


def awake_model(config: LatteConfig = SMALL) -> Latte:
    """A model whose every weight counts: what starts at zero is filled with noise, in eval mode."""
    torch.manual_seed(0)
    model = Latte(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def latents(batch: int = 2, frames: int = 4, height: int = 2, width: int = 3, channels: int = 6) -> Tensor:
    return torch.randn(batch, channels, frames, height, width, generator=seeded(frames))


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replaced(config: LatteConfig = SMALL, **changes) -> LatteConfig:
    return LatteConfig(**config.model_dump() | changes)


@pytest.fixture(scope="module")
def model() -> Latte:
    return awake_model()


T = torch.tensor([0.3, 0.8])
IDS = of_classes([1, 4])


# shapes and the start


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 1), (4, 2, 3), (9, 5, 2)])
@torch.no_grad()
def test_any_length_and_size_comes_back_in_shape(model, frames, height, width):
    x = latents(2, frames, height, width)
    assert model(x, T, IDS).shape == x.shape
    assert model.features(x, T, 2, IDS).shape == (2, 32, frames, height, width)


@torch.no_grad()
def test_at_the_start_the_prediction_is_zero_and_every_block_the_identity():
    model = Latte(SMALL)
    assert not model(latents(), T, IDS).any()
    tokens, condition = torch.randn(2, 4, 6, 32), torch.randn(2, 1, 32)
    assert all(torch.equal(block(tokens, condition), tokens) for block in model.blocks())


def test_at_the_start_the_gradient_reaches_the_output_and_after_a_step_everything():
    model = Latte(SMALL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):  # output, then gates, then what is behind the gates
        optimizer.zero_grad()
        (model(latents(), T, IDS, rng=seeded()) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("latte_xl", 673.68), ("latte_l", 456.81), ("latte_b", 129.54), ("latte_s", 32.48), ("latte_tiny", 1.33)],
)
def test_presets_have_the_size_of_the_paper(preset, millions):
    with torch.device("meta"):
        model = Latte(config_from_preset(preset))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


@torch.no_grad()
def test_the_same_model_takes_pixels_in_patches():
    model = awake_model(replaced(channels=3, patch=4, classes=0, shape=None))
    video = latents(2, 3, 8, 12, 3)
    made = model(video, T)
    assert made.shape == video.shape
    assert model.features(video, T, 1).shape == (2, 32, 3, 2, 3)
    video[:, :, 1, 4:8, 8:12] += 1  # the last patch of frame 1
    changed = model.features(video, T, 1) - model.features(latents(2, 3, 8, 12, 3), T, 1)
    assert changed[:, :, 1, 1, 2].any()
    assert not changed[:, :, 0].any(), "the first block looks at one frame"


# what mixes with what


@pytest.mark.parametrize("over", ["space", "time"])
@torch.no_grad()
def test_a_block_mixes_only_along_its_axis(over):
    torch.manual_seed(0)
    block = Block(SMALL, over)
    nn.init.normal_(block.modulation.linear.weight, std=0.1)
    tokens, condition = torch.randn(2, 4, 6, 32), torch.randn(2, 1, 32)
    poked = tokens.clone()
    poked[0, 1, 2] += torch.randn(32)
    reached = (block(poked, condition) - block(tokens, condition)).abs().amax(-1) > 1e-6
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[(0, 1) if over == "space" else (0, slice(None), 2)] = True
    assert torch.equal(reached, expected)


def test_blocks_alternate_between_space_and_time(model):
    assert [block.over for block in model.blocks()] == ["space", "time", "space", "time"]


@torch.no_grad()
def test_the_whole_model_mixes_space_and_time_but_never_samples(model):
    x, poked = latents(), latents()
    poked[0, :, 1, 1, 2] += 1
    changed = (model(poked, T, IDS) - model(x, T, IDS)).abs().amax(1) > 1e-7
    assert changed[0].all()
    assert not changed[1].any()


@torch.no_grad()
def test_permuting_the_batch_permutes_the_prediction(model):
    x, order = latents(3), torch.tensor([2, 0, 1])
    t, ids = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, -1])
    torch.testing.assert_close(
        model(x[order], t[order], of_classes(ids[order].tolist())),
        model(x, t, Condition(ids))[order],
        rtol=0,
        atol=1e-5,
    )


@torch.no_grad()
def test_frames_rows_and_columns_know_where_they_are(model):
    same = latents(1, 1, 1, 1).expand(1, -1, 4, 2, 3)
    made = model(same, T[:1]).flatten(2)[0].T
    apart = torch.cdist(made, made) + torch.eye(len(made))
    assert apart.min() > 1e-3


@torch.no_grad()
def test_a_window_knows_whether_it_begins_its_clip_and_nothing_more(model):
    x = latents()
    begin, later = model(x, T, IDS), model(x, T, IDS, start=1)
    assert not torch.allclose(begin, later, atol=1e-4)
    assert torch.equal(later, model(x, T, IDS, start=500))
    each = model(x, T, IDS, start=torch.tensor([0, 9]))
    torch.testing.assert_close(each, torch.stack([begin[0], later[1]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_attention_is_the_softmax_of_the_formula_in_any_number_of_rows(monkeypatch, rows):
    monkeypatch.setattr(dit, "_ROWS", 5)
    q, k, v = (torch.randn(rows, 2, 6, 8, generator=seeded(i)) for i in range(3))
    expected = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), dim=-1) @ v
    torch.testing.assert_close(attention(q, k, v), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_block_is_the_block_of_the_paper(model):
    """Written out with explicit loops over frames and heads."""
    block = next(model.blocks())
    x, c = torch.randn(1, 2, 3, 32, generator=seeded()), torch.randn(1, 1, 32, generator=seeded(1))
    a, s, g, a2, s2, g2 = block.modulation.linear(nn.functional.silu(c[0, 0])).chunk(6)

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    for frame in range(2):
        y = x[0, frame]
        q, k, v = block.qkv(norm(y) * (1 + s) + a).chunk(3, dim=-1)
        heads = [slice(8 * h, 8 * h + 8) for h in range(4)]
        mixed = [torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(8), -1) @ v[:, h] for h in heads]
        y = y + g * block.out(torch.cat(mixed, -1))
        y = y + g2 * block.mlp(norm(y) * (1 + s2) + a2)
        torch.testing.assert_close(block(x, c)[0, frame], y, rtol=0, atol=1e-5)


# time, classes, statistics


@torch.no_grad()
def test_a_time_for_all_frames_is_that_time_for_each(model):
    x = latents()
    torch.testing.assert_close(model(x, T[:, None].expand(2, 4), IDS), model(x, T, IDS), rtol=0, atol=1e-5)
    assert not torch.allclose(model(x, T, IDS), model(x, T.flip(0), IDS), atol=1e-3)


@torch.no_grad()
def test_the_time_of_a_frame_conditions_that_frame_and_reaches_others_only_through_attention(model):
    x, t, clean = latents(1), torch.full((1, 4), 0.6), torch.tensor([[0.0, 0.6, 0.6, 0.6]])
    first = model.features(x, clean, 1) - model.features(x, t, 1)
    assert first[:, :, 0].any()
    assert not first[:, :, 1:].any(), "attention over space leaves the other frames alone"
    assert (model.features(x, clean, 2) - model.features(x, t, 2))[:, :, 1:].any()


@torch.no_grad()
def test_the_class_counts_and_none_is_minus_one(model):
    x = latents()
    assert not torch.allclose(model(x, T, IDS), model(x, T, of_classes([4, 1])), atol=1e-4)
    assert torch.equal(model(x, T), model(x, T, of_classes([-1, -1])))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@torch.no_grad()
def test_as_many_labels_are_hidden_in_training_as_asked(dropout):
    model = awake_model(replaced(label_dropout=dropout, width=4, heads=1, depth=2))
    x = latents(1, 1, 1, 1).expand(4000, -1, -1, -1, -1)
    ids, t = torch.full((4000,), 2), torch.full((4000,), 0.5)
    free = model(x[:1], t[:1])
    assert not (model(x, t, Condition(ids), rng=seeded()) - free).abs().amax((1, 2, 3, 4)).min() < 1e-6
    made = model.train()(x, t, Condition(ids), rng=seeded())
    hidden = (made - free).abs().amax((1, 2, 3, 4)) < 1e-6
    assert hidden.float().mean().item() == pytest.approx(dropout, abs=0.025)
    assert torch.equal(made, model(x, t, Condition(ids), rng=seeded()))


@torch.no_grad()
def test_hidden_labels_use_the_last_row():
    model = awake_model()
    before = model(latents(), T)
    model.class_in.weight[:-1] += 1
    assert torch.equal(model(latents(), T), before)
    model.class_in.weight[-1] += 1
    assert not torch.allclose(model(latents(), T), before, atol=1e-4)


def test_statistics_travel_with_the_weights_and_normalising_inverts():
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    model = Latte(SMALL)
    model.set_statistics(mean, std)
    other = Latte(SMALL)
    other.load_state_dict(model.state_dict())
    x = torch.randn(64, 6, 4, 8, 8, generator=seeded()) * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)
    normal = other.normalise(x)
    torch.testing.assert_close(normal.mean((0, 2, 3, 4)), torch.zeros(6), rtol=0, atol=0.03)
    torch.testing.assert_close(normal.std((0, 2, 3, 4)), torch.ones(6), rtol=0, atol=0.03)
    torch.testing.assert_close(other.denormalise(normal), x)
    assert model.bfloat16().normalise(x).dtype == torch.float32


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)])
def test_statistics_stay_whole_whatever_the_weights_are_cast_to(cast: Any) -> None:
    from longtake.training.models.memory.dit import MemoryDiT
    from longtake.training.models.memory.dit_config import config_from_preset as memory_config

    mean, std = torch.linspace(20, 30, 4) + 1 / 3, torch.full((4,), 1 / 3)
    latte = Latte(config_from_preset("latte_tiny", channels=4))
    latte.set_statistics(mean, std)
    dit = MemoryDiT(memory_config("memory_dit_tiny", channels=4))
    dit.set_statistics(mean, std, mean, std)
    inside = torch.nn.ModuleList([latte, dit])
    for module in cast(inside):
        assert module.dtype != torch.float32
        assert torch.equal(module.latent_mean, mean) and torch.equal(module.latent_std, std)
    assert torch.equal(dit.low_mean, mean) and torch.equal(dit.low_std, std)


# training


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = awake_model(replaced(activation_checkpointing=checkpointing)).train()
        model(latents(), T, IDS, rng=seeded()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_activation_checkpointing_keeps_fewer_tensors_for_the_backward_pass():
    kept = []
    for checkpointing in (False, True):
        model, count = awake_model(replaced(activation_checkpointing=checkpointing)).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, c=count: c.append(x.numel()) or x, lambda x: x):
            model(latents(), T, IDS, rng=seeded())
        kept.append(sum(count))
    assert kept[1] < kept[0] / 3


def test_bf16_is_close_to_fp32_and_every_weight_gets_a_gradient(model):
    half = awake_model().bfloat16()
    made = half(latents(), T, IDS)
    made.float().square().mean().backward()
    full = model(latents(), T, IDS).detach()
    assert made.dtype == torch.bfloat16
    assert (made.float() - full).abs().mean() < 0.02 * full.abs().mean()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


@torch.no_grad()
def test_close_times_stay_apart_in_bf16():
    model = awake_model().bfloat16()
    times = torch.linspace(0.99, 1.0, 11)
    made = model(latents(1).expand(11, -1, -1, -1, -1), times).float().flatten(1)
    assert (made.diff(dim=0).abs().amax(1) > 0).all()


def toy(batch: int, frames: int, rng: torch.Generator) -> Tensor:
    """Latents of two classes: a point on a circle that turns by 45 degrees a frame, one way or the other."""
    phase = 2 * math.pi * torch.rand(batch, 1, generator=rng)
    turn = torch.where(torch.arange(batch) % 2 == 0, 1.0, -1.0).view(-1, 1) * math.pi / 4
    angle = phase + turn * torch.arange(frames)
    point = torch.stack([angle.cos(), angle.sin()], dim=1).repeat(1, 3, 1)
    return point[..., None, None].expand(-1, -1, -1, 2, 1)


@pytest.fixture(scope="module")
def trained() -> tuple[Latte, list[float]]:
    """A small model after some seconds on the toy set, with clean leading frames half of the time."""
    torch.manual_seed(0)
    config = LatteConfig(depth=2, width=48, heads=4, channels=6, classes=2, conditioning=0.5, shape=(4, 2, 1))
    model, rng, losses = Latte(config), seeded(), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    ids = torch.arange(32) % 2
    model.set_statistics(torch.zeros(6), torch.full((6,), 0.7))
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1, (step + 1) / 20) * (1 - step / 400)
        x0 = model.normalise(toy(32, 4, rng))
        start = torch.randint(2, (32,), generator=rng)
        loss = training_loss(
            lambda x, t, start=start: model(x, t, Condition(ids), start, rng), x0, rng, conditioning=0.5
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_it_learns_a_toy_set(trained):
    losses = trained[1]
    assert losses[0] > 1
    assert sum(losses[-20:]) / 20 < 0.35


def test_what_it_generates_follows_its_class_beyond_the_window(trained):
    seeds, classes = list(range(8)), [0, 1] * 4
    made = torch.cat(list(generate(trained[0], 12, seeds, condition=of_classes(classes), steps=20)), dim=2).mean((3, 4))
    angle = torch.atan2(made[:, 1], made[:, 0])
    turns = torch.remainder(angle.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    assert made[:, :2].norm(dim=1).mean().item() == pytest.approx(1, abs=0.15)
    for part in (turns[:, :3], turns[:, 3:]):  # the first window, and beyond
        assert part[::2].mean().item() == pytest.approx(math.pi / 4, abs=0.25)
        assert part[1::2].mean().item() == pytest.approx(-math.pi / 4, abs=0.25)


# generation


def generate(model: Latte, latents: int, seeds: list[int], condition=None, shape=None, each_step=None, **settings):
    return sample.generate(model, latents, seeds, condition, Settings(**settings), shape, each_step)


def clip(model: Latte, latents: int, seeds: list[int], **settings) -> Tensor:
    return torch.cat(list(generate(model, latents, seeds, **({"steps": 3} | settings))), dim=2)


def test_a_seed_gives_the_same_clip_again_and_another_seed_another(model):
    a, b, c = (clip(model, 11, [seed], condition=of_classes([1]), guidance=2.0) for seed in (5, 5, 6))
    assert a.shape == (1, 6, 11, 2, 3)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-2)


def test_a_sample_does_not_depend_on_its_batch(model):
    together = clip(model, 8, [5, 6, 7], condition=of_classes([1, 2, -1]), guidance=3.0)
    torch.testing.assert_close(
        together[1:2], clip(model, 8, [6], condition=of_classes([2]), guidance=3.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_a_longer_clip_begins_with_the_shorter_one(model, overlap):
    long = clip(model, 13, [5], overlap=overlap)
    for frames in (1, 3, 4, 7, 10):
        assert torch.equal(clip(model, frames, [5], overlap=overlap), long[:, :, :frames])


@pytest.mark.parametrize(
    ("frames", "overlap", "lengths"), [(3, 2, [3]), (4, 2, [4]), (9, 2, [4, 2, 2, 1]), (8, 1, [4, 3, 1])]
)
def test_chunks_are_the_first_window_and_then_what_is_new(model, frames, overlap, lengths):
    steps: list[int] = []
    chunks = generate(model, frames, [5], overlap=overlap, steps=2, each_step=lambda: steps.append(1))
    assert [c.shape[2] for c in chunks] == lengths
    assert len(steps) == 2 * windows(frames, 4, overlap) == 2 * len(lengths)


def test_each_window_sees_the_frames_before_it_clean_and_itself_as_a_later_one(monkeypatch):
    model = awake_model()
    model.set_statistics(torch.full((6,), 3.0), torch.full((6,), 2.0))
    calls, forward = [], Latte.forward
    monkeypatch.setattr(Latte, "forward", lambda self, *a: calls.append(a) or forward(self, *a))
    first, second, third = generate(model, 8, [5], steps=2)
    whole = torch.cat([first, second, third], dim=2)
    assert [start for *_, start in calls] == [0, 0, 1, 1, 1, 1]
    for x, t, _, _ in calls[2:4]:
        torch.testing.assert_close(x[:, :, :2], model.normalise(whole[:, :, 2:4]), rtol=0, atol=1e-5)
        assert (t[:, :2] == 0).all()
        assert (t[:, 2:] > 0).all()
    for x, _, _, _ in calls[4:]:
        torch.testing.assert_close(x[:, :, :2], model.normalise(whole[:, :, 4:6]), rtol=0, atol=1e-5)


def test_results_are_in_the_units_of_the_autoencoder():
    model = awake_model()
    plain = clip(model, 4, [5])
    model.set_statistics(torch.full((6,), 3.0), torch.full((6,), 2.0))
    torch.testing.assert_close(clip(model, 4, [5]), plain * 2 + 3)


def test_another_shape_than_the_trained_one_can_be_asked_for(model):
    assert clip(model, 9, [5, 6], shape=(6, 1, 2)).shape == (2, 6, 9, 1, 2)


def test_only_a_window_is_held_however_long_the_clip(model):
    def tensors() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is Tensor]

    # other tests' tensors may be freed meanwhile, so only those born here count
    before = tensors()
    known = {id(tensor) for tensor in before}

    def alive() -> int:
        return sum(tensor.numel() for tensor in tensors() if id(tensor) not in known)

    held = [alive() for i, _ in enumerate(generate(model, 40, [5], steps=1)) if i in (2, 18)]
    assert len(held) == 2
    assert held[0] == held[1]


def test_a_model_in_training_samples_as_in_evaluation_and_goes_on_training(model):
    expected = clip(model, 4, [5], condition=of_classes([1]))
    hiding = awake_model(replaced(label_dropout=1.0)).train()
    assert torch.equal(clip(hiding, 4, [5], condition=of_classes([1])), expected)
    assert hiding.training


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(condition=Condition(torch.tensor([1, 5]))),
            "class 5 is out of range; this model has classes 0 to 4, and -1 for none",
        ),
        (
            dict(condition=Condition(torch.tensor([-2, 0]))),
            "class -2 is out of range; this model has classes 0 to 4, and -1 for none",
        ),
        (dict(condition=Condition(torch.tensor([1]))), r"classes has shape \(1,\); a batch of 2 needs one id each"),
        (dict(t=torch.zeros(2, 3)), r"t has shape \(2, 3\); Latte needs \(2,\) or \(2, 4\)"),
        (dict(x=torch.zeros(2, 5, 4, 2, 2)), r"x has shape \(2, 5, 4, 2, 2\); Latte needs \(B, 6, T, H, W\)"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**{"x": latents(), "t": T} | arguments)


def test_wrong_sizes_layers_and_classes_of_a_model_without_are_refused(model):
    pixels = awake_model(replaced(patch=4, classes=0, shape=None))
    with pytest.raises(ValueError, match=r"^x is 6x8; Latte needs height and width in multiples of 4$"):
        pixels(latents(2, 1, 6, 8), T)
    with pytest.raises(ValueError, match=r"^classes: this model has none; leave them out$"):
        pixels(latents(2, 1, 8, 8), T, IDS)
    for layer in (0, 5):
        with pytest.raises(ValueError, match=rf"^layer is {layer}; this model has blocks 1 to 4$"):
            model.features(latents(), T, layer)
    with pytest.raises(ValueError, match=r"^mean is \(3,\); this model has 6 channels$"):
        model.set_statistics(torch.zeros(3), torch.ones(6))
    with pytest.raises(ValueError, match="positive, finite std"):
        model.set_statistics(torch.zeros(6), torch.zeros(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(latents=0), "frames is 0, seeds are 1; there is nothing to generate"),
        (dict(overlap=4), "overlap is 4; a window of 4 can go on from 1 to 3 frames"),
        (dict(condition=of_classes([5])), "class 5 is out of range; this model has classes 0 to 4, and -1 for none"),
        (dict(condition=of_classes([1, 2])), "classes are 2, seeds 1; each sample needs one of both"),
        (dict(guidance=2.0), "guidance is 2.0; it needs a class or a text to guide to"),
        (dict(steps=0), "steps is 0; sampling needs at least 1"),
    ],
)
def test_generation_refuses_at_the_call_what_does_not_fit(model, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(model, **{"latents": 8, "seeds": [1]} | settings)


def test_generation_needs_a_shape_and_beyond_a_window_a_model_trained_for_it():
    with pytest.raises(ValueError, match=r"^shape: give \(frames, height, width\) of a window"):
        generate(Latte(replaced(shape=None)), 4, [1])
    with pytest.raises(ValueError, match=r"trained without clean leading frames \(conditioning: 0\) and cannot go on"):
        generate(Latte(replaced(conditioning=0)), 5, [1])
    assert clip(Latte(replaced(conditioning=0, classes=0)), 4, [1]).shape == (1, 6, 4, 2, 3)
    with pytest.raises(ValueError, match=r"^class 0 is out of range; this model has no classes$"):
        generate(Latte(replaced(classes=0)), 4, [1], condition=of_classes([0]))


def test_configs_are_checked():
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of: latte_xl, latte_l"):
        config_from_preset("huge")
    for bad in (
        {"depth": 3},
        {"width": 30},
        {"heads": 5},
        {"widht": 4},
        {"label_dropout": 2},
        {"patch": 2, "shape": (4, 3, 2)},
    ):
        with pytest.raises(ValidationError):
            config_from_preset("latte_tiny", **bad)
    assert [config_from_preset(p).channels for p in PRESETS] == [64] * 5
