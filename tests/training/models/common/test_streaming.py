"""Streaming equals one pass, streams do not disturb each other or training, tiles blend without visible seams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longtake.training.models.common.causal import ChannelRMSNorm, NormSiLU
from longtake.training.models.common.codec import Posterior
from longtake.training.models.common.streaming import Past, ramps, regroup, spans
from longtake.training.models.pv_vae.model import PVVAE, PVVAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = PVVAEConfig(
    patch=4, encoder_width=8, decoder_width=8, multipliers=(1, 2, 4), encoder_blocks=1, decoder_blocks=1
)
LOCAL = SMALL.model_copy(update={"attention": False, "encoder_blocks": 0, "decoder_blocks": 0})
REACH = 6  # latent positions that LOCAL looks to each side: conv_in, two res blocks and conv_out, all 3 wide, and a bit


def awake_model(config: PVVAEConfig = SMALL) -> PVVAE:
    """A model whose every weight counts: what starts at zero is filled with noise, in eval mode."""
    torch.manual_seed(0)
    model = PVVAE(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def clip(frames: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def cut(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """`x` in pieces of these lengths, as often as it takes."""
    pieces, at = [], 0
    while at < x.shape[2]:
        for length in lengths:
            pieces.append(x[:, :, at : at + length])
            at += length
    return pieces


def joined(posteriors: Iterator[Posterior]) -> Posterior:
    return Posterior(*(torch.cat(parts, dim=2) for parts in zip(*posteriors, strict=True)))


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def model() -> PVVAE:
    return awake_model()


lengths = st.lists(st.integers(0, 11), min_size=1, max_size=4).filter(any)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 8), chunks=lengths, chunk=st.integers(1, 4))
@torch.no_grad()
def test_a_streamed_encoding_equals_that_of_the_whole_for_any_chunks(model, n, chunks, chunk):
    video = clip(1 + 4 * n)
    whole, streamed = model.encode(video), joined(model.encode_stream(cut(video, chunks), chunk))
    close(streamed.mean, whole.mean)
    close(streamed.logvar, whole.logvar)


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 9), chunks=lengths, chunk=st.integers(1, 4))
@torch.no_grad()
def test_a_streamed_decoding_equals_that_of_the_whole_for_any_chunks(model, groups, chunks, chunk):
    latent = torch.randn(1, 64, groups, 2, 2, generator=torch.Generator().manual_seed(groups))
    streamed = list(model.decode_stream(cut(latent, chunks), chunk))
    assert [piece.shape[2] for piece in streamed][:2] == [1, 4 * min(chunk, groups - 1)][: len(streamed)]
    close(torch.cat(streamed, dim=2), model.decode(latent))


@torch.no_grad()
def test_streams_hold_in_every_shape_of_model_and_in_bf16():
    changes = [
        {"temporal_downs": 0},
        {"temporal_downs": 1, "attention": False},
        {"patch": 2, "multipliers": (1, 2, 2, 2), "encoder_blocks": 0},
    ]
    for change in changes:
        model = awake_model(SMALL.model_copy(update=change))
        video = clip(13)
        close(joined(model.encode_stream(cut(video, [5]), 1)).mean, model.encode(video).mean)
    half, latent = awake_model().bfloat16(), torch.randn(1, 64, 4, 2, 2)
    streamed = torch.cat(list(half.decode_stream([latent], 1)), dim=2)
    assert streamed.dtype == torch.bfloat16
    assert (streamed - half.decode(latent)).float().abs().mean() < 0.01


@torch.no_grad()
def test_encoding_what_was_appended_goes_on_from_what_was_encoded(model):
    video, seen = clip(17), []

    def chunks() -> Iterator[Tensor]:
        for at in range(0, 17, 3):
            seen.append(at)
            yield video[:, :, at : at + 3]

    stream = model.encode_stream(chunks(), chunk=1)
    close(next(stream).mean, model.encode(video[:, :, :1]).mean)
    assert seen == [0]  # as soon as it is known: the other frames have not been asked for
    close(next(stream).mean, model.encode(video[:, :, :5]).mean[:, :, 1:])
    assert seen == [0, 3]
    assert sum(p.mean.shape[2] for p in stream) == 3


@torch.no_grad()
def test_streams_compose_into_a_reconstruction(model):
    video = clip(13)
    streamed = model.decode_stream(p.mode() for p in model.encode_stream(cut(video, [4]), 2))
    close(torch.cat(list(streamed), dim=2).clamp(-1, 1), model.reconstruct(video))


@torch.no_grad()
def test_two_streams_in_turns_do_not_disturb_each_other(model):
    videos = [clip(13, seed=1), clip(13, seed=2)]
    streams = [model.encode_stream([v], chunk=1) for v in videos]
    turns = list(zip(*streams, strict=True))
    for number, video in enumerate(videos):
        close(torch.cat([turn[number].mean for turn in turns], dim=2), model.encode(video).mean)


def test_streams_in_threads_do_not_disturb_each_other(model):
    videos, made = [clip(21, seed=seed) for seed in range(4)], {}

    def work(seed: int) -> None:
        made[seed] = joined(model.encode_stream([videos[seed]], chunk=1)).mean

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, video in enumerate(videos):
        close(made[seed], model.encode(video).mean.detach())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stream_between_forward_and_backward_changes_no_gradient_and_no_stream(checkpointing):
    model = awake_model(SMALL.model_copy(update={"activation_checkpointing": checkpointing})).train()
    video, gradients = clip(9), []
    with torch.no_grad():
        whole = model.encode(clip(17, seed=3)).mean
    for streams in (False, True):
        model.zero_grad()
        stream, parts = model.encode_stream([clip(17, seed=3)], chunk=1), []
        parts += [next(stream)] if streams else []
        made, _ = model(video, rng=torch.Generator().manual_seed(0))
        parts += [next(stream)] if streams else []
        made.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        parts += stream
        close(joined(iter(parts)).mean, whole)
    for plain, disturbed in zip(*gradients, strict=True):
        assert torch.equal(plain, disturbed)


def test_a_model_remembers_nothing_and_a_stream_keeps_no_graph(model):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    (first, *_) = model.encode_stream([clip(5)])
    assert not first.mean.requires_grad
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_what_a_stream_remembers_does_not_grow(model):
    past, sizes = Past(), []
    for piece in regroup([clip(33)], 1, 4):
        model._moments(piece, past)
        past.begun = True
        sizes.append(sum(x.untyped_storage().nbytes() for x in past.inputs.values()))
    assert len(sizes) == 9
    assert len(set(sizes)) == 1


@torch.no_grad()
def test_bad_streams_are_refused_in_one_line(model):
    stream = model.encode_stream(cut(clip(15), [4]), chunk=2)
    assert [next(stream).mean.shape[2] for _ in range(3)] == [1, 2, 1]
    with pytest.raises(ValueError, match=r"^video has 15 frames; PV-VAE needs 1\+4n \(e.g. 13 or 17\)$"):
        next(stream)
    with pytest.raises(ValueError, match=r"^video has 0 frames; PV-VAE needs 1\+4n \(e.g. 1 or 5\)$"):
        list(model.encode_stream([]))
    with pytest.raises(ValueError, match=r"^video is 30x32; PV-VAE needs height and width in multiples of 16$"):
        list(model.encode_stream([torch.zeros(1, 3, 5, 30, 32)]))
    with pytest.raises(ValueError, match=r"^a chunk has B, C, H, W = \(1, 3, 32, 48\); the stream began with \(1, 3, "):
        list(model.encode_stream([clip(5), clip(4, 32, 48)]))
    with pytest.raises(ValueError, match=r"^chunk is 0; needs to be at least 1$"):
        list(model.decode_stream([torch.zeros(1, 64, 2, 2, 2)], chunk=0))


@pytest.mark.parametrize(("tile", "overlap"), [(40, 16), (64, 64), (64, 24), (64, -16), (0, 0)])
def test_tiles_that_do_not_fit_the_latent_are_refused(model, tile, overlap):
    message = f"^tile {tile} with overlap {overlap}; need multiples of 16 with 0 <= overlap < tile$"
    for use in (model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=message):
            use(clip(1), tile=tile, overlap=overlap)
    with pytest.raises(ValueError, match=message):
        list(model.decode_stream([torch.zeros(1, 64, 1, 2, 2)], tile=tile, overlap=overlap))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 60), tile=st.integers(1, 20), share=st.floats(0, 0.99), scale=st.integers(1, 3))
def test_tiles_cover_every_position_share_enough_and_weigh_one_together(size, tile, share, scale):
    overlap = int(tile * share)
    pieces = spans(size, tile, overlap)
    assert (pieces[0][0], pieces[-1][1]) == (0, size)
    assert all(end - start == min(tile, size) for start, end in pieces)
    assert all(end - start >= overlap for (_, end), (start, _) in pairwise(pieces))
    total = torch.zeros(size * scale)
    for (start, end), weights in zip(pieces, ramps(pieces, scale), strict=True):
        assert (weights >= 0).all()
        total[start * scale : end * scale] += weights
    close(total, torch.ones(size * scale), 1e-6)


@torch.no_grad()
def test_a_frame_that_fits_into_a_tile_is_exactly_the_untiled_result(model):
    video, latent = clip(5, 32, 48), torch.randn(1, 64, 2, 2, 3)
    assert torch.equal(model.encode(video, tile=48, overlap=16).mean, model.encode(video).mean)
    assert torch.equal(model.decode(latent, tile=64, overlap=16), model.decode(latent))


@settings(max_examples=6, deadline=None)
@given(width=st.integers(20, 44), tile=st.integers(16, 24), share=st.integers(0, 4), seed=st.integers(0, 9))
@torch.no_grad()
def test_away_from_the_borders_of_tiles_a_model_without_attention_gives_the_untiled_result(width, tile, share, seed):
    model, video = awake_model(LOCAL), clip(5, 16, 16 * width, seed)
    latent = torch.randn(1, 64, 2, 1, width, generator=torch.Generator().manual_seed(seed))
    near = torch.zeros(width, dtype=torch.bool)
    pieces = spans(width, tile, share)
    for (_, end), (start, _) in pairwise(pieces):
        near[max(start - REACH, 0) : end + REACH] = True
    for made, whole, scale in (
        (model.encode(video, 16 * tile, 16 * share).mean, model.encode(video).mean, 1),
        (model.decode(latent, 16 * tile, 16 * share), model.decode(latent), 16),
    ):
        far = ~near.repeat_interleave(scale)
        close(made[..., far], whole[..., far])
    if len(pieces) > 1:
        assert not torch.equal(made, whole)


def footage(frames: int, height: int, width: int) -> Tensor:
    """A smooth picture that moves: waves of several lengths, in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, height / 32, height), torch.linspace(0, width / 32, width), indexing="ij")
    t = torch.arange(frames)[:, None, None] / 5
    return torch.stack([torch.sin(x + k * t) * torch.cos(y * (1 + k / 3) - t) for k in range(3)])[None]


def trained_model() -> PVVAE:
    """A model, with attention, that has learned something of `footage`."""
    torch.manual_seed(0)
    model, video = PVVAE(SMALL), footage(13, 64, 320)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(50):
        t, y, x = step % 9, step * 7 % 32, step * 37 % 224
        part = video[:, :, t : t + 5, y : y + 32, x : x + 96]
        (model(part)[0] - part).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_no_seam_shows_where_tiles_meet():
    model = trained_model()
    with torch.no_grad():
        latent = model.encode(footage(5, 32, 320)).mode()
        whole, hard, soft = model.decode(latent), model.decode(latent, 160, 0), model.decode(latent, 160, 64)

    def jumps(video: Tensor) -> Tensor:
        """The mean difference of each column from the one before."""
        return video.diff(dim=4).abs().mean(dim=(0, 1, 2, 3))

    usual = jumps(whole).median()
    assert jumps(hard - whole).max() > usual  # side by side, the tiles make a line that one sees
    assert jumps(soft - whole).max() < 0.2 * usual


@torch.no_grad()
def test_streaming_and_tiling_go_together(model):
    video = clip(9, 48, 64)
    tiling = {"tile": 32, "overlap": 16}
    whole = model.encode(video, **tiling)
    close(joined(model.encode_stream(cut(video, [3]), 1, **tiling)).mean, whole.mean)
    streamed = torch.cat(list(model.decode_stream([whole.mean], 1, **tiling)), dim=2)
    close(streamed, model.decode(whole.mean, **tiling))
    close(streamed.clamp(-1, 1), model.reconstruct(video, **tiling))


def test_a_kept_input_gives_the_gradients_of_norm_and_silu():
    norm, x = ChannelRMSNorm(6).double(), torch.randn(2, 6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(lambda x, gain: NormSiLU.apply(x, gain, 1e-6), (x, norm.weight))
    close(NormSiLU.apply(x, norm.weight, norm.eps), nn.functional.silu(norm(x)))


@pytest.mark.parametrize("streamed", [False, True])
def test_compiled_blocks_are_one_graph_in_training_give_the_same_and_stream_the_same(streamed):
    config = LOCAL.model_copy(update={"attention": True})
    plain, compiled, video, made = awake_model(config), awake_model(config), clip(9), []
    blocks = list(compiled.blocks())
    assert len(blocks) == len(set(blocks)) == 6
    for block in blocks:
        block.compile(backend="eager", fullgraph=not streamed)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for model in (plain, compiled):
        if streamed:
            made.append([joined(model.encode_stream([video], 1)).mean])
        else:
            reconstruction, posterior = model(video, 2, torch.Generator().manual_seed(0))
            (reconstruction.square().mean() + posterior.kl().mean()).backward()
            made.append([reconstruction.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*made, strict=True):
        close(a, b)
