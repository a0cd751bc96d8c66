"""The VQGAN: shapes of the paper, tokens that depend on what they see alone, streams and tiles equal to one pass."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from longtake.datasets.encoding import strides_of
from longtake.datasets.errors import UserError
from longtake.datasets.latents import state_digest
from longtake.datasets.tokens import model_digest
from longtake.training.metrics import equivariance
from longtake.training.models.common.codec import latents_of, reconstruct_video
from longtake.training.models.tats.convolution import SameConv3d
from longtake.training.models.tats.vqgan import PRESETS, VQGAN, config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")


def made(**changes: object) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(config_from_preset("vqgan_tiny", **{"width": 4, "codes": 64, "code_width": 8} | changes)).eval()


def clip(frames: int, height: int = 16, width: int = 16, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def model() -> VQGAN:
    return made()


def test_the_papers_shapes_and_size():
    with torch.device("meta"):
        paper = VQGAN(config_from_preset("vqgan_paper"))
        video, tokens, commitment, usage = paper.eval()(torch.zeros(1, 3, 16, 128, 128), quantise=False)
        assert video.shape == (1, 3, 16, 128, 128) and tokens.shape == (1, 4, 16, 16)
        assert commitment.shape == usage.share.shape == ()
        assert [tuple(m.stride) for m in paper.encoder if isinstance(m, SameConv3d)][1:4] == [
            (2, 2, 2),
            (2, 2, 2),
            (1, 2, 2),
        ]
    assert paper.codebook.codes.shape == (16384, 256)
    assert not list(paper.codebook.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_differ_in_size_alone(preset):
    config = config_from_preset(preset)
    assert (config.padding, config.norm, config.decay, config.commitment) == ("replicate", "rms", 0.99, 0.25)
    assert config.temporal_stride == config.first_frames == 4


@settings(max_examples=8)
@given(t=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4), batch=st.integers(1, 2))
@torch.no_grad()
def test_a_clip_of_4n_frames_comes_back_whole(model, t, h, w, batch):
    video = clip(4 * t, 4 * h, 4 * w, batch)
    tokens = model.tokens(video)
    assert tokens.shape == (batch, t, h, w) and tokens.dtype == torch.int64
    assert model.encode(video).mode().shape == (batch, 8, t, h, w)
    assert model.decode_tokens(tokens).shape == video.shape
    latents = model(video)[0]
    model.codebook.updates.fill_(1)
    torch.testing.assert_close(model(video)[0], model.decode_tokens(tokens), rtol=0, atol=1e-5)
    model.codebook.updates.fill_(0)
    assert not torch.allclose(latents, model.decode_tokens(tokens), atol=1e-3), (
        "codes that nothing has seeded decode nothing"
    )
    assert model.reconstruct(video).abs().max() <= 1
    assert latents_of(4 * t, 4, 4) == t


@torch.no_grad()
def test_a_still_video_has_the_same_tokens_at_every_time(model):
    tokens = model.tokens(clip(1).expand(-1, -1, 24, -1, -1))
    assert torch.equal(tokens, tokens[:, :1].expand_as(tokens))


@torch.no_grad()
def test_borders_of_zeros_tell_where_a_token_is_and_replicated_ones_do_not():
    """As at random weights in the ablation: shifted by a latent frame, the same tokens."""
    video = clip(1).expand(4, -1, 28, -1, -1) + 0.2 * clip(28, batch=4, seed=1)
    scores = {}
    for padding in ("replicate", "zeros"):
        model = made(padding=padding, width=8, codes=256)
        first, second = (model.tokens(part) for part in (video[:, :, :24], video[:, :, 4:]))
        found = equivariance.scores(equivariance.matched(first, second), equivariance.histogram(256, first, second))
        scores[padding] = found["kappa"]
    assert scores["replicate"] > scores["zeros"] + 0.1


def test_padding_reaches_every_convolution_of_the_encoder_and_none_of_the_decoder():
    model = made(padding="zeros")
    assert {m.border for m in model.encoder.modules() if isinstance(m, SameConv3d)} == {"zeros"}
    assert {m.border for m in model.decoder.modules() if isinstance(m, SameConv3d)} == {"replicate"}


@settings(max_examples=8)
@given(
    t=st.integers(1, 30),
    chunk=st.integers(1, 9),
    cut=st.integers(1, 37),
    padding=st.sampled_from(["replicate", "zeros", "reflect"]),
)
@torch.no_grad()
def test_a_stream_in_chunks_equals_one_pass(t, chunk, cut, padding):
    model = made(padding=padding)
    video = clip(4 * (t + 2))
    tokens = model.tokens(video)
    assert torch.equal(torch.cat(list(model.tokens_stream(video.split(cut, 2), chunk)), 1), tokens)
    whole = model.decode_tokens(tokens)
    parts = list(model.decode_tokens_stream(tokens.split(cut, 1), chunk))
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)
    z = [posterior.mode() for posterior in model.encode_stream([video], chunk)]
    torch.testing.assert_close(torch.cat(list(model.decode_stream(z, chunk)), 2), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_chunk_without_the_last_of_its_margin_is_no_longer_exact(model):
    """So the margins are not larger than they must be."""
    tokens = model.tokens(clip(64))
    (before, after), *_ = model._margins(model.decoder)
    whole = model.decode_tokens(tokens)[:, :, 32:36]
    exact = model.decode_tokens(tokens[:, 8 - before : 9 + after])[:, :, 4 * before : 4 * before + 4]
    less = model.decode_tokens(tokens[:, 9 - before : 9 + after])[:, :, 4 * before - 4 : 4 * before]
    assert (exact - whole).abs().max() < 1e-6 < (less - whole).abs().max()


@torch.no_grad()
def test_tiles_equal_the_whole_frame(model):
    video = clip(8, 96, 64)
    tokens = model.tokens(video)
    assert torch.equal(torch.cat(list(model.tokens_stream([video], 2, tile=56)), 1), tokens)
    frames = torch.cat(list(model.decode_tokens_stream([tokens], 2, tile=56)), 2)
    torch.testing.assert_close(frames, model.decode_tokens(tokens), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^tile 16; needs 36 pixels a side or more$"):
        list(model.tokens_stream([video], 2, tile=16))
    assert sum(part.shape[1] for part in model.tokens_stream([video], 2, tile=36)) == 2
    with pytest.raises(ValueError, match=r"^tile 18; needs a multiple of 4$"):
        list(model.tokens_stream([video], 2, tile=18))


def test_what_depends_on_the_whole_video_is_not_streamed():
    for changes, message in (({"norm": "group"}, "whole clip"), ({"padding": "circular"}, "last frame")):
        model = made(**changes)
        assert model.tokens(clip(16)).shape == (1, 4, 4, 4)
        with pytest.raises(ValueError, match=message):
            next(model.tokens_stream([clip(16)]))


@torch.no_grad()
def test_a_video_of_any_length_is_reconstructed_for_people(model):
    frames = ((clip(10)[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    pairs = list(reconstruct_video(model, iter(frames), chunk=1))
    assert sum(len(a) for a, _ in pairs) == sum(len(b) for _, b in pairs) == 10
    with pytest.raises(ValueError, match="does not predict frames"):
        next(reconstruct_video(model, iter(frames), visible=5))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((17, 16, 16), r"video has 17 frames; VQGAN needs 4n \(e.g. 16 or 20\)"),
        ((0, 16, 16), r"video has 0 frames; VQGAN needs 4n \(e.g. 4 or 8\)"),
        ((8, 18, 16), "video is 18x16; VQGAN needs height and width in multiples of 4"),
    ],
)
def test_other_shapes_are_refused_in_one_line(model, shape, message):
    for use in (model, model.encode, model.tokens, model.reconstruct):
        with pytest.raises(ValueError, match=f"^{message}$"):
            use(torch.zeros(1, 3, *shape))


def test_a_column_of_latents_is_refused(model):
    with pytest.raises(
        UserError, match=r"^encoder: here: is a VQGAN, whose first latent stands for 4 frames, .*`cache_tokens`"
    ):
        strides_of(model, "here")


def test_a_tail_that_fills_no_token_is_refused_after_all_others(model):
    found = []
    with pytest.raises(ValueError, match="video has 11 frames"):
        for tokens in model.tokens_stream(clip(11).split(3, 2), 1):
            found.append(tokens)
    assert torch.equal(torch.cat(found, 1), model.tokens(clip(11)[:, :, :8]))


def test_a_clip_too_small_for_its_padding_is_refused():
    with pytest.raises(ValueError, match=r"^video is 8x16x16; padding reflect needs 12x12x12 or more$"):
        made(padding="reflect").tokens(clip(8))


def test_configs_are_checked():
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of: vqgan_paper, vqgan_small, vqgan_tiny"):
        config_from_preset("huge")
    for bad in ({"widht": 3}, {"downsample": (4, 6, 6)}, {"downsample": (4, 8, 4)}, {"decay": 1}, {"padding": "zero"}):
        with pytest.raises(ValidationError):
            config_from_preset("vqgan_tiny", **bad)


def test_training_reaches_every_weight_and_bf16_keeps_the_codes_fp32():
    model = made(restart=0.1).train().bfloat16()
    video, _, commitment, usage = model(clip(8, batch=2))
    (video.float().square().mean() + commitment).backward()
    assert video.dtype == torch.bfloat16 and commitment.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert {b.dtype for b in model.codebook.buffers()} == {torch.float32, torch.int64}
    assert 0 < usage.share <= 1 <= usage.perplexity <= 64


def test_without_quantising_the_codebook_stays_and_the_latents_are_decoded():
    model = made().train()
    before = {name: value.clone() for name, value in model.codebook.state_dict().items()}
    video, _, commitment, _ = model(clip(8), quantise=False)
    torch.testing.assert_close(video, model.decoder(model.encode(clip(8)).mode()) * 2)
    assert commitment == 0 and all(torch.equal(before[n], v) for n, v in model.codebook.state_dict().items())


def test_what_is_recomputed_in_training_decides_no_token_and_old_models_keep_their_digest():
    plain, again = made(), made(activation_checkpointing=0.5)
    assert model_digest(plain) == model_digest(again) != model_digest(made(padding="zeros"))
    known = {"width": 4, "codes": 64, "code_width": 8, "downsample": [4, 4, 4], "padding": "replicate", "norm": "rms"}
    known |= {"commitment": 0.25, "decay": 0.99, "restart": 0.1}
    assert model_digest(plain) == state_digest(json.dumps(["VQGAN", known], sort_keys=True), plain)
