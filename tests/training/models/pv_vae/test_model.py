"""PV-VAE: shapes, strict causality, what the decoder sees instead of dropped frames, sizes, closed-form KL."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.training.models.common.causal import CausalConv3d, Downsample, Upsample, fold, unfold
from longtake.training.models.common.codec import Posterior, frames_of, latent_groups
from longtake.training.models.common.reconstruction import judge
from longtake.training.models.kind import Judged
from longtake.training.models.pv_vae.model import PRESETS, PVVAE, PVVAEConfig, config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = PVVAEConfig(
    patch=4, encoder_width=8, decoder_width=8, multipliers=(1, 2, 4), encoder_blocks=1, decoder_blocks=1
)


def awake_model(config: PVVAEConfig = SMALL) -> PVVAE:
    """A model whose every weight counts: what starts at zero is filled with noise, in eval mode."""
    torch.manual_seed(0)
    model = PVVAE(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def clip(frames: int, height: int = 32, width: int = 32, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def model() -> PVVAE:
    return awake_model()


@pytest.mark.parametrize(("frames", "groups"), [(1, 1), (5, 2), (9, 3), (17, 5)])
@torch.no_grad()
def test_a_clip_of_1_plus_4n_frames_has_1_plus_n_latents_and_comes_back_whole(model, frames, groups):
    video = clip(frames, 32, 48, batch=2)
    assert (latent_groups(frames), frames_of(groups)) == (groups, frames)
    assert model.encode(video).mean.shape == (2, 64, groups, 2, 3)
    assert model.decode(torch.zeros(2, 64, groups, 2, 3)).shape == video.shape
    assert model.reconstruct(video).shape == video.shape


@torch.no_grad()
def test_an_image_is_the_first_frame_of_any_clip(model):
    video = clip(9)
    torch.testing.assert_close(model.encode(video[:, :, :1]).mean, model.encode(video).mean[:, :, :1])


@settings(max_examples=10, deadline=None)
@given(n=st.integers(0, 3), height=st.integers(1, 3), width=st.integers(1, 3), batch=st.integers(1, 2))
@torch.no_grad()
def test_any_valid_size_round_trips_in_shape(model, n, height, width, batch):
    video = clip(1 + 4 * n, 16 * height, 16 * width, batch)
    reconstruction, posterior = model(video)
    assert posterior.mean.shape == posterior.logvar.shape == (batch, 64, 1 + n, height, width)
    assert reconstruction.shape == video.shape
    assert latent_groups(frames_of(1 + n)) == 1 + n


@settings(max_examples=12, deadline=None)
@given(groups=st.integers(1, 6), more=st.integers(1, 3), size=st.floats(0.1, 100))
@torch.no_grad()
def test_encoding_a_prefix_equals_the_prefix_of_the_encoding(model, groups, more, size):
    """To rounding: oneDNN takes other kernels for other lengths; measured are at most 4e-6 on latents up to 8."""
    video, frames = clip(frames_of(groups + more)), frames_of(groups)
    video[:, :, frames:] *= size
    prefix, whole = model.encode(video[:, :, :frames]), model.encode(video)
    torch.testing.assert_close(prefix.mean, whole.mean[:, :, :groups], rtol=0, atol=1e-5)
    torch.testing.assert_close(prefix.logvar, whole.logvar[:, :, :groups], rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_the_decoder_is_causal_too(model, groups):
    latent = torch.randn(1, 64, 5, 2, 2, generator=seeded())
    torch.testing.assert_close(
        model.decode(latent[:, :, :groups]), model.decode(latent)[:, :, : frames_of(groups)], rtol=0, atol=1e-5
    )


def test_each_latent_depends_on_exactly_the_frames_up_to_its_group(model):
    video = clip(9).requires_grad_()
    for group in range(3):
        (gradient,) = torch.autograd.grad(model.encode(video).mean[:, :, group].sum(), video)
        seen = gradient.abs().amax(dim=(0, 1, 3, 4)) > 0
        assert seen.tolist() == [frame < frames_of(group + 1) for frame in range(9)]


@settings(max_examples=12, deadline=None)
@given(groups=st.integers(2, 5), data=st.data(), padding=st.sampled_from(["token", "noise"]), size=st.floats(0.1, 1e4))
@torch.no_grad()
def test_dropped_frames_move_nothing(groups, data, padding, size):
    model = awake_model(SMALL.model_copy(update={"padding": padding}))
    visible = data.draw(st.integers(1, groups - 1))
    video, seen = clip(frames_of(groups)), frames_of(visible)
    other = video.clone()
    other[:, :, seen:] += size * torch.randn(other[:, :, seen:].shape)
    first, second = (model(v, visible=visible, rng=seeded()) for v in (video, other))
    assert first[1].mean.shape[2] == visible
    assert torch.equal(first[1].mean, second[1].mean)
    assert torch.equal(first[1].logvar, second[1].logvar)
    assert torch.equal(first[0], second[0])
    assert torch.equal(model.reconstruct(video, seen, seeded()), model.reconstruct(other, seen, seeded()))


@torch.no_grad()
def test_a_seen_frame_does_move_the_prediction(model):
    video = clip(17)
    other = video.clone()
    other[:, :, 4] += 0.5
    assert not torch.allclose(model.reconstruct(video, 5)[:, :, 5:], model.reconstruct(other, 5)[:, :, 5:])


@torch.no_grad()
def test_the_decoder_sees_the_token_in_place_of_dropped_groups():
    model, video = awake_model(), clip(17)
    model.padding.token.fill_(0.3)
    seen = model.encode(video[:, :, :9]).sample(seeded())
    by_hand = torch.cat([seen, torch.full((1, 64, 2, 2, 2), 0.3)], dim=2)
    assert torch.equal(model(video, visible=3, rng=seeded())[0], model.decode(by_hand))


def test_the_token_always_has_a_gradient_and_a_real_one_when_frames_were_dropped():
    model, video = awake_model(), clip(9)
    for visible, is_used in ((3, False), (1, True)):
        model.zero_grad()
        model(video, visible)[0].square().mean().backward()
        assert model.padding.token.grad is not None
        assert bool(model.padding.token.grad.any()) == is_used


def test_noise_padding_is_standard_normal_and_has_no_parameter():
    padding = PVVAE(SMALL.model_copy(update={"padding": "noise"})).padding
    tail = padding(torch.zeros(4, 64, 1, 8, 8), 3, seeded())[:, :, 1:]
    assert not list(padding.parameters())
    assert abs(tail.mean().item()) < 0.02
    assert abs(tail.std().item() - 1) < 0.02


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)])
def test_what_is_predicted_from_noise_depends_on_the_seed_alone(seeds: tuple[int, int]) -> None:
    model = awake_model(SMALL.model_copy(update={"padding": "noise"}))
    video = ((clip(9) + 1) * 127.5).byte()
    judged, found = Judged("", model, {}), []
    for number, seed in enumerate(seeds):
        torch.manual_seed(number)
        with torch.no_grad():
            found.append(judge({}).figures(judged, {"video": video}, None, seed, 1.0)["psnr_predicted"])
    assert (found[0] == found[1]) == (seeds[0] == seeds[1])


@pytest.mark.parametrize(
    ("preset", "millions", "tolerance"),
    [("pv_vae", 661, 0.05), ("pv_vae_small", 100, 0.05), ("pv_vae_tiny", 3.6, 0.05)],
)
def test_presets_have_the_promised_size(preset, millions, tolerance):
    with torch.device("meta"):
        model = PVVAE(config_from_preset(preset))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=tolerance)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_compresses_4_x_16_x_16_into_64_channels(preset):
    config = config_from_preset(preset)
    assert (config.temporal_stride, config.spatial_stride, config.latent_channels) == (4, 16, 64)


def test_kl_and_sampling_agree_with_torch_distributions():
    mean, logvar = (torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    normal = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    posterior = Posterior(mean, logvar)
    torch.testing.assert_close(posterior.kl(), expected.flatten(1).mean(1))
    draws = torch.stack([posterior.sample(seed) for seed in [seeded()] for _ in range(2000)])
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.5)
    torch.testing.assert_close(draws.std(0), normal.stddev, rtol=0.1, atol=0)
    assert posterior.mode() is mean


@torch.no_grad()
def test_logvar_is_clamped():
    model = awake_model()
    for bias, bound in ((1e3, 20.0), (-1e3, -30.0)):
        model.encoder.conv_out.bias[64:] = bias
        assert (model.encode(clip(1)).logvar == bound).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 32, 32), r"video has 16 frames; PV-VAE needs 1\+4n \(e.g. 13 or 17\)"),
        ((2, 32, 32), r"video has 2 frames; PV-VAE needs 1\+4n \(e.g. 1 or 5\)"),
        ((0, 32, 32), r"video has 0 frames; PV-VAE needs 1\+4n \(e.g. 1 or 5\)"),
        ((5, 30, 32), "video is 30x32; PV-VAE needs height and width in multiples of 16"),
        ((5, 32, 8), "video is 32x8; PV-VAE needs height and width in multiples of 16"),
    ],
)
def test_other_shapes_are_refused_in_one_line(model, shape, message):
    for use in (model, model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=f"^{message}$"):
            use(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize("visible", [0, 4, -1])
def test_visible_groups_must_exist(model, visible):
    with pytest.raises(ValueError, match=rf"^visible is {visible}; a clip of 9 frames has latent groups 1 to 3$"):
        model(clip(9), visible)


def test_configs_are_checked():
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of: pv_vae, pv_vae_small"):
        config_from_preset("huge")
    for bad in ({"widht": 3}, {"patch": 0}, {"temporal_downs": 3}, {"multipliers": (1, 3, 9)}, {"padding": "zeros"}):
        with pytest.raises(ValidationError):
            config_from_preset("pv_vae_tiny", **bad)
    assert config_from_preset("pv_vae_tiny", padding="noise").padding == "noise"


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = awake_model(SMALL.model_copy(update={"activation_checkpointing": checkpointing})).train()
        reconstruction, posterior = model(clip(5), visible=1, rng=seeded())
        (reconstruction.square().mean() + posterior.kl().mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_runs_and_kl_stays_fp32():
    model = awake_model().bfloat16()
    reconstruction, posterior = model(clip(9), visible=2, rng=seeded())
    (reconstruction.float().square().mean() + posterior.kl().mean()).backward()
    assert reconstruction.dtype == posterior.mean.dtype == torch.bfloat16
    assert posterior.kl().dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_bf16_is_close_to_fp32(model):
    half, full = awake_model().bfloat16().reconstruct(clip(9)), model.reconstruct(clip(9))
    assert (half.float() - full).abs().mean() < 0.02 * full.abs().mean()


def test_fold_and_unfold_are_inverse_and_keep_blocks_together():
    x = torch.arange(2 * 3 * 4 * 4 * 6).view(2, 3, 4, 4, 6)
    assert torch.equal(unfold(fold(x, 2, 2), 2, 2), x)
    assert torch.equal(fold(x, 2, 2)[0, :8, 0, 0, 0], x[0, 0, :2, :2, :2].flatten())


@torch.no_grad()
def test_samplers_without_their_weights_average_and_duplicate():
    down, up = Downsample(2, 4, time=2), Upsample(4, 2, time=2)
    for sampler in (down, up):
        nn.init.zeros_(sampler.conv.weight)
        nn.init.zeros_(sampler.conv.bias)
    blocky = torch.randn(1, 2, 5, 3, 3).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert down(blocky).shape == (1, 4, 3, 3, 3)
    torch.testing.assert_close(up(down(blocky)), blocky)


@torch.no_grad()
def test_a_still_video_looks_the_same_at_every_step():
    still = torch.randn(1, 4, 1, 5, 5).expand(-1, -1, 6, -1, -1)
    out = CausalConv3d(4, 4)(still)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out))
