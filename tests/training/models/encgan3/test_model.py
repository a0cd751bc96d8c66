"""EncGAN3: attention beside a plain reference, shapes, the reference frame kept, recall in one pass, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.training.models.common.codec import Posterior
from longtake.training.models.encgan3.blocks import FactorisedAttention, ThreeStreams
from longtake.training.models.encgan3.config import EncGAN3Config, config_from_preset
from longtake.training.models.encgan3.discriminators import Discriminators
from longtake.training.models.encgan3.model import NOISES, EncGAN3
from longtake.training.models.encgan3.recursion import merged

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"preset": "encgan3_tiny", "size": 16, "width": 4, "content": 8, "movement": 4, "attention": 8}


def model(**changes: Any) -> EncGAN3:
    torch.manual_seed(0)
    return EncGAN3(config_from_preset(**SMALL | changes))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(chosen: EncGAN3, count: int = 2) -> tuple[Tensor, Tensor]:
    return random(count, chosen.config.content), random(count, chosen.config.movement, seed=1)


def test_attention_is_that_of_each_position_over_time_and_then_of_each_frame_over_its_positions() -> None:
    torch.manual_seed(0)
    layer = FactorisedAttention(16).double()
    with torch.no_grad():
        layer.time.weight.fill_(0.7)
        layer.space.weight.fill_(-0.4)
    x = random(2, 16, 3, 2, 4).double()
    expected = x.clone()
    for part, tokens in ((layer.time, "time"), (layer.space, "space")):
        before = expected.clone()
        for b in range(2):
            groups = (
                [[(t, h, w) for t in range(3)] for h in range(2) for w in range(4)]
                if tokens == "time"
                else [[(t, h, w) for h in range(2) for w in range(4)] for t in range(3)]
            )
            for group in groups:
                rows = torch.stack([before[b, :, t, h, w] for t, h, w in group])
                weights = torch.softmax(part.query(rows) @ part.key(rows).T, dim=1)
                for row, (t, h, w) in zip(rows + part.weight * (weights @ part.value(rows)), group, strict=True):
                    expected[b, :, t, h, w] = row
    torch.testing.assert_close(layer(x), expected)
    fresh = FactorisedAttention(16)
    assert torch.equal(fresh(x.float()), x.float()), "it begins as nothing"


def test_the_streams_grow_apart_and_the_video_sees_both() -> None:
    torch.manual_seed(0)
    begin, double = ThreeStreams((5, 3, 8), 6, "begin", True, 2), ThreeStreams((6, 6, 12), 4, "double", False, 2)
    content, movement, video = begin(random(2, 5, 1, 1, 1), random(2, 3, 2, 1, 1), random(2, 8, 2, 1, 1))
    assert (content.shape, movement.shape, video.shape) == ((2, 6, 1, 4, 4), (2, 6, 5, 1, 1), (2, 12, 5, 4, 4))
    assert torch.equal(video[:, :6], content.expand(-1, -1, 5, -1, -1)), "the content is in front"
    content, movement, video = double(content, movement, video)
    assert (content.shape, movement.shape, video.shape) == ((2, 4, 1, 8, 8), (2, 4, 10, 1, 1), (2, 8, 10, 8, 8))


def test_shapes_at_64_pixels_and_16_frames() -> None:
    chosen = EncGAN3(config_from_preset("encgan3", width=4, attention=8, groups=2)).eval()
    video = random(1, 16, 3, 64, 64)
    content, movement = chosen.encode_content(video[:, 0]), chosen.encode_movement(chosen.differences_of(video))
    assert content.mean.shape == content.logvar.shape == (1, 128) and movement.mean.shape == (1, 10)
    clip = chosen.generate(content.mean, movement.mean, video[:, 0])
    assert clip.shape == (1, 16, 3, 64, 64) and chosen.first_frame(content.mean).shape == (1, 3, 64, 64)
    assert [block.video_space.convolution.out_channels for block in chosen.generator.blocks] == [32, 32, 16, 8, 4]


@pytest.mark.parametrize("recursion", ["previous", "reference"])
@pytest.mark.parametrize("index", [0, 5, 15])
def test_the_clip_has_exactly_its_reference_and_moves_to_both_sides(recursion: str, index: int) -> None:
    chosen = model(recursion=recursion).eval()
    reference = random(2, 3, 16, 16)
    clip = chosen.generate(*latents(chosen), reference, index)
    assert torch.equal(clip[:, index], reference)
    moved = (clip - reference[:, None]).abs().amax((0, 2, 3, 4)) > 0
    assert [frame for frame in range(16) if not moved[frame]] == [index]


def test_more_steps_of_movement_make_longer_clips() -> None:
    chosen = model().eval()
    z_x, z_v = latents(chosen)
    reference = random(2, 3, 16, 16)
    assert chosen.generate(z_x, z_v, reference, 19, frames=20).shape == (2, 20, 3, 16, 16)
    steps = z_v.unsqueeze(1).repeat(1, 2, 1)
    assert torch.equal(
        chosen.generate(z_x, steps, reference, frames=20), chosen.generate(z_x, z_v, reference, frames=20)
    )
    steps[:, 1] += 1
    later = chosen.generate(z_x, steps, reference, frames=20) - chosen.generate(z_x, z_v, reference, frames=20)
    assert later[:, -1].abs().max() > 0
    for frames, index, why in ((18, 0, "12 \\+ 4k frames"), (12, 0, "12 \\+ 4k frames"), (16, 16, "0 to 15")):
        with pytest.raises(ValueError, match=why):
            chosen.generate(z_x, z_v, reference, index, frames)


def test_a_movement_has_a_direction_if_differences_are_signed() -> None:
    clip = random(2, 16, 3, 16, 16)
    for kind in ("signed", "absolute"):
        chosen = model(differences=kind).eval()
        there, back = (chosen.encode_movement(chosen.differences_of(x)).mean for x in (clip, -clip))
        assert torch.allclose(there, back) == (kind == "absolute")
        expected = clip[:, 1:] - clip[:, :-1]
        assert torch.equal(chosen.differences_of(clip), expected if kind == "signed" else expected.abs())


def test_the_divergence_is_that_of_two_gaussians() -> None:
    mean, logvar = random(3, 5), random(3, 5, seed=1)
    ours = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).mean(1)
    torch.testing.assert_close(Posterior(mean, logvar).kl(), expected)


def test_one_pass_makes_both_clips_the_second_from_a_frame_of_the_first() -> None:
    chosen = model(merge="cut").eval()
    config = chosen.config
    assert (config.span, config.joint, config.index) == (28, 13, 1)
    video, noise = random(2, 28, 3, 16, 16), random(2, NOISES, 12, seed=1)
    drawn = chosen(video, chosen.differences_of(video), noise, 3)
    assert drawn.clips.shape == (2, 2, 16, 3, 16, 16) and drawn.sampled.shape == drawn.joined.shape == video.shape
    first, second = drawn.clips.unbind(1)
    assert torch.equal(first[:, 3], video[:, 3]) and torch.equal(second[:, 1], first[:, 13])
    assert torch.equal(drawn.joined, merged(first, second, 4, 13))
    assert drawn.content.mean.shape == (2, 2, 8) and drawn.movement.mean.shape == (2, 2, 4)

    # the posteriors are those of what each clip was made of
    torch.testing.assert_close(drawn.content.mean[:, 0], chosen.encode_content(video[:, 3]).mean)
    torch.testing.assert_close(drawn.content.mean[:, 1], chosen.encode_content(first[:, 13]).mean)
    for number, clip in enumerate((video[:, :16], video[:, 12:])):
        expected = chosen.encode_movement(chosen.differences_of(clip))
        torch.testing.assert_close(drawn.movement.mean[:, number], expected.mean)

    # samples begin with a frame of their content, and go on by noise alone
    z_x, z_v = noise[:, :, :8], noise[:, :, 8:]
    begun = chosen.generate(z_x[:, 1], z_v[:, 1], chosen.first_frame(z_x[:, 1]), 3)
    torch.testing.assert_close(drawn.sampled[:, :14], begun[:, :14])
    again = chosen.encode_content(begun[:, 13])
    joined = chosen.generate(again.mean + (0.5 * again.logvar).exp() * z_x[:, 3], z_v[:, 3], begun[:, 13], config.index)
    torch.testing.assert_close(drawn.sampled[:, 13:], joined[:, 1:])
    assert not len(chosen(video, chosen.differences_of(video), noise, sample=False).sampled)


def test_gradients_flow_through_the_joint() -> None:
    chosen = model()
    video = random(2, 28, 3, 16, 16)
    movements = list[Tensor]()

    def keep(layer: object, given: object, out: Tensor) -> None:
        out.retain_grad()
        movements.append(out)

    chosen.movement.register_forward_hook(keep)
    drawn = chosen(video, chosen.differences_of(video), random(2, NOISES, 12), sample=False)
    drawn.joined[:, 20].square().sum().backward()
    gradient = movements[0].grad
    assert gradient is not None and gradient[:2].abs().max() > 0, "the first clip's movement decides the second"


def test_frames_of_another_size_are_refused() -> None:
    chosen = model()
    with pytest.raises(ValueError, match="frames are 32x16; this model needs 16x16"):
        chosen.encode_content(torch.zeros(1, 3, 32, 16))
    with pytest.raises(ValueError, match="frames are 8x8; this model needs 16x16"):
        chosen.encode_movement(torch.zeros(1, 15, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"size": 48}, "size is 48; it must be a power of 2"),
        ({"frames": 18}, "frames is 18; it must be 12 \\+ 4k, such as 16 or 20"),
        ({"frames": 12}, "greater than or equal to 16"),
        ({"overlap": 16}, "overlap is 16; it must be less than frames, 16"),
        ({"reference": 11}, "reference is 11; it must be in the overlap, 12 to 15"),
        ({"attention": 10}, "attention is 10; it must be null or one of 4, 8, 16"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        config_from_preset(**SMALL | changes)
    with pytest.raises(ValueError, match="unknown preset 'g3an'; choose one of: encgan3"):
        config_from_preset("g3an")


def test_numbers_in_quotes_are_numbers() -> None:
    quoted = config_from_preset("encgan3_tiny", frames="20", overlap=6.0)
    assert quoted == config_from_preset("encgan3_tiny", frames=20, overlap=6) and quoted.reference == 16


def test_the_reference_is_the_last_frame_before_the_middle_of_the_overlap() -> None:
    joints = {overlap: EncGAN3Config(overlap=overlap).joint for overlap in (2, 3, 4, 6, 8)}
    assert joints == {2: 14, 3: 14, 4: 13, 6: 12, 8: 11}
    assert EncGAN3Config.model_validate(EncGAN3Config(overlap=6).model_dump()).joint == 12


@pytest.mark.parametrize("pooled", [True, False])
def test_a_random_model_is_scaled_to_latents_that_differ(pooled: bool) -> None:
    chosen, clips = model(pooled=pooled), random(32, 16, 3, 16, 16).clamp(-1, 1)
    chosen.scale_latents(clips)
    for posterior in (
        chosen.encode_content(clips[:, 0]),
        chosen.encode_movement(chosen.differences_of(clips)),
    ):
        torch.testing.assert_close(posterior.mean.mean(0), torch.zeros(posterior.mean.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(posterior.mean.std(0, correction=0), torch.ones(posterior.mean.shape[1]))
        assert torch.equal(posterior.logvar, torch.full_like(posterior.logvar, -4))


def test_clips_that_are_nearly_alike_scale_latents_by_no_more_than_a_hundred() -> None:
    clips, other = 0.002 * random(32, 16, 3, 16, 16), random(4, 16, 3, 16, 16, seed=1)
    chosen, scaled = model(), model()
    scaled.scale_latents(clips)
    for of in (lambda each: each.encode_content(other[:, 0]), lambda each: each.encode_movement(other.diff(dim=1))):
        before, after = (of(each).mean.std(0) for each in (chosen, scaled))
        assert (after <= 100.1 * before).all()
    scaled = model()
    scaled.scale_latents(clips[:1, :1].expand(32, 16, -1, -1, -1))
    assert scaled.encode_movement(scaled.differences_of(clips)).mean.isfinite().all(), "all alike, and still"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spectral_weights_have_norm_one_in_any_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    judges = Discriminators(16, 4, "spectral", 2).to(dtype)
    for _ in range(60):  # of the power iteration
        judges(random(1, 16, 3, 16, 16), random(1, 3, 16, 16))
    judges.eval()
    for module in judges.modules():
        if isinstance(module, nn.Conv3d):
            assert module.weight.dtype == dtype
            assert torch.linalg.matrix_norm(module.weight.float().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_a_pooled_movement_is_the_same_wherever_it_is() -> None:
    clip = torch.zeros(1, 16, 3, 64, 64)
    for frame in range(16):
        clip[:, frame, :, 24:28, 16 + frame // 2 : 20 + frame // 2] = 1
    elsewhere = clip.roll((16, 16), (3, 4))
    gaps = []
    for pooled in (True, False):
        chosen = model(size=64, pooled=pooled).eval()
        a, b = (chosen.encode_movement(chosen.differences_of(video)).mean for video in (clip, elsewhere))
        gaps.append(float((a - b).norm() / a.norm()))
    assert gaps[0] < 0.05 < gaps[1], "but for what the edges do to the norms"
