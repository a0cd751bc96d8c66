"""The discriminator: shapes down to one frame, samples that do not mix, hinge losses, and that it learns."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from longtake.training.models.common.patchgan import (
    PRESETS,
    PatchGAN,
    PatchGANConfig,
    config_from_preset,
    discriminator_loss,
    generator_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def video(batch: int, frames: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def tiny() -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(config_from_preset("patchgan_tiny"))


@pytest.mark.parametrize(
    ("layers", "frames", "steps"), [(2, 1, 1), (2, 5, 2), (2, 17, 5), (3, 1, 1), (3, 17, 3), (3, 16, 2)]
)
@torch.no_grad()
def test_each_layer_halves_space_and_rounds_half_of_time_up(layers, frames, steps):
    model = PatchGAN(PatchGANConfig(width=4, layers=layers, groups=2))
    assert model(video(2, frames, 32, 48)).shape == (2, 1, steps, 32 // 2**layers, 48 // 2**layers)


@torch.no_grad()
def test_an_image_is_judged_like_a_still_clip(tiny):
    image = video(2, 1)
    still = tiny(image.expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(tiny(image).expand_as(still), still, rtol=0, atol=1e-5)


@torch.no_grad()
def test_real_and_fake_in_one_batch_are_judged_as_alone(tiny):
    real, fake = video(2, 5), 3 * video(3, 5, seed=1) + 1
    together = tiny(torch.cat([real, fake]))
    torch.testing.assert_close(together, torch.cat([tiny(real), tiny(fake)]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[:1], tiny(real[:1]), rtol=0, atol=1e-5)


def test_a_logit_looks_at_a_patch_and_at_several_frames():
    """Without the norms, which only set the level, the reach of the logit in the middle is that of its layers."""
    model = PatchGAN(PatchGANConfig(width=4, layers=2, groups=1))
    for step in model.steps:
        if isinstance(step, torch.nn.GroupNorm):
            step.forward = lambda x: x
    x = video(1, 17, 64, 64).requires_grad_()
    model(x)[0, 0, 2, 8, 8].backward()
    reached = x.grad[0].abs().sum(0) > 0
    assert reached.amax((0, 1)).sum() == 34  # 1 -> 4 -> 7 -> 16 -> 34 pixels: two of stride 1, two of stride 2
    assert reached.amax((1, 2)).sum() > 10
    assert not reached.all()


@torch.no_grad()
def test_motion_alone_changes_the_judgement(tiny):
    moving = video(1, 5)
    assert not torch.allclose(tiny(moving), tiny(moving.flip(2)).flip(2), atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "millions"), [("patchgan", 8.29), ("patchgan_small", 2.08), ("patchgan_tiny", 0.126)]
)
def test_presets_have_the_promised_size(preset, millions):
    with torch.device("meta"):
        model = PatchGAN(config_from_preset(preset))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
    assert not list(model.buffers()), "a buffer would change at each call, on each rank in its own way"


def test_hinge_losses_are_those_of_the_formula_and_fp32():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))
    assert generator_loss(fake).item() == pytest.approx(-1 / 3)
    for loss in (discriminator_loss(real.bfloat16(), fake.bfloat16()), generator_loss(fake.bfloat16())):
        assert loss.dtype == torch.float32


def test_no_gradient_comes_from_beyond_the_hinge():
    real, fake = torch.tensor([2.0, 0.5]).requires_grad_(), torch.tensor([-2.0, 0.5]).requires_grad_()
    discriminator_loss(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("frames", [1, 5])
def test_it_learns_to_tell_smooth_from_noisy_and_the_generator_loss_pulls_towards_real(frames):
    torch.manual_seed(0)
    model = PatchGAN(config_from_preset("patchgan_tiny"))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.5, 0.9))

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        noisy = video(4, frames, seed=seed)
        return torch.nn.functional.avg_pool3d(noisy, (1, 5, 5), 1, (0, 2, 2)), noisy

    for seed in range(30):
        loss = discriminator_loss(*model(torch.cat(batch(seed))).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    smooth, noisy = batch(99)
    noisy.requires_grad_()
    real, fake = model(torch.cat([smooth, noisy])).chunk(2)
    assert real.mean() > 0.5 > -0.5 > fake.mean()
    generator_loss(fake).backward()
    assert (noisy.grad * (smooth - noisy)).sum() < 0, "the way down leads towards what is smooth"


def test_bf16_runs_and_every_weight_gets_a_gradient():
    model = PatchGAN(config_from_preset("patchgan_tiny")).bfloat16()
    logits = model(video(2, 5))
    discriminator_loss(*logits.chunk(2)).backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bad_shapes_and_configs_are_refused_in_one_line(tiny):
    with pytest.raises(ValueError, match=r"^video is 2x32; this discriminator needs at least 4x4$"):
        tiny(video(1, 1, 2, 32))
    with pytest.raises(
        ValueError, match="unknown preset 'huge'; choose one of: patchgan, patchgan_small, patchgan_tiny"
    ):
        config_from_preset("huge")
    for bad in ({"groups": 3}, {"widht": 3}, {"layers": 0}):
        with pytest.raises(ValidationError):
            config_from_preset("patchgan_tiny", **bad)
    assert all(config_from_preset(p) for p in PRESETS)
