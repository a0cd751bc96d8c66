"""Video autoencoders of diffusers against the library itself: its pipelines, its classes, and its own `encode`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign_codecs
import pytest
import tiny_foreign
import torch
from foreign_codecs import CODECS, adopted, clip, codec
from torch import Tensor

from longtake.datasets.latents import encoder_digest
from longtake.training.foreign.codec import CodecConfig, ForeignCodec
from longtake.training.models.common.codec import latent_groups, reconstruct_video
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(CODECS)
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    """The models of diffusers. Their tests do not change them."""
    return {name: make(0) for name, (make, _, _) in CODECS.items()}


@pytest.fixture(scope="module")
def codecs(nets: dict[str, Any]) -> dict[str, ForeignCodec]:
    return {name: adopted(net) for name, net in nets.items()}


def moments_of(net: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the class, as a video."""
    if type(net).__name__ != "AutoencoderKL":
        latents = net.encode(video).latent_dist
        return latents.mean, latents.logvar
    latents = net.encode(video.transpose(1, 2).flatten(0, 1)).latent_dist
    return tuple(x.unflatten(0, (len(video), -1)).transpose(1, 2) for x in (latents.mean, latents.logvar))


def normalised(net: Any, mean: Tensor) -> Tensor:
    """What the pipelines that begin with a video or an image give to their transformer; in the words of each."""
    from diffusers import LTXPipeline

    config = net.config
    if type(net).__name__ == "AutoencoderKLWan":  # WanImageToVideoPipeline.prepare_latents
        inverse = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1)
        return (mean - torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1)) * inverse
    if type(net).__name__ == "AutoencoderKLLTXVideo":
        return LTXPipeline._normalize_latents(mean, net.latents_mean, net.latents_std, config.scaling_factor)
    if type(net).__name__ == "AutoencoderKLHunyuanVideo":  # HunyuanVideoImageToVideoPipeline.prepare_latents
        return mean * config.scaling_factor
    return (mean - config.shift_factor) * config.scaling_factor  # FluxImg2ImgPipeline._encode_vae_image


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_latents_are_those_that_the_pipelines_transformer_sees(
    nets: dict[str, Any], codecs: dict[str, ForeignCodec], name: str
) -> None:
    video = clip(name, count=2)
    posterior, (mean, logvar) = codecs[name].encode(video), moments_of(nets[name], video)
    torch.testing.assert_close(posterior.mean, normalised(nets[name], mean), **CLOSE)
    # the spread of a draw is that of the normalised draws
    noise = torch.randn_like(mean)
    high, low = (normalised(nets[name], mean + sign * (0.5 * logvar).exp() * noise) for sign in (1, -1))
    torch.testing.assert_close(2 * (0.5 * posterior.logvar).exp() * noise, high - low, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_start_image_is_encoded_as_wans_pipeline_does() -> None:
    pipe = tiny_foreign.pipeline("wan_i2v")
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    _, given = pipe.prepare_latents(image, 1, 4, 32, 32, 9, torch.float32, torch.device("cpu"))
    video = torch.cat([image[:, :, None], torch.zeros(1, 3, 8, 32, 32)], dim=2)
    torch.testing.assert_close(adopted(pipe.vae).encode(video).mode(), given[:, 4:], **CLOSE)


def run(pipe: Any, kind: str, output: str) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    side = {"ltx": 64}.get(kind, 32)
    text: dict[str, Any] = {"prompt_embeds": torch.randn(1, 8, tiny_foreign.TEXT, generator=rng)}
    if kind in ("ltx", "hunyuan"):
        text["prompt_attention_mask"] = torch.ones(1, 8, dtype=torch.long)
    if kind == "hunyuan":
        text["pooled_prompt_embeds"] = torch.randn(1, tiny_foreign.POOLED, generator=rng)
    made = pipe(
        **text, height=side, width=side, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        generator=rng, output_type=output, return_dict=False,
    )  # fmt: skip
    return made[0]


@pytest.mark.parametrize("kind", ["wan", "wan22_5b", "ltx", "hunyuan"])
@torch.no_grad()
def test_videos_are_those_that_the_pipeline_decodes(kind: str) -> None:
    pipe = tiny_foreign.pipeline(kind)
    latents, video = run(pipe, kind, "latent"), run(pipe, kind, "pt")
    if kind == "ltx":
        latents = pipe._unpack_latents(latents, 2, 2, 2)
    ours = adopted(pipe.vae).decode(latents).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(ours.transpose(1, 2), video, **CLOSE)


@torch.no_grad()
def test_videos_of_images_are_those_that_lattes_pipeline_decodes() -> None:
    """That has a scaling factor alone; shift, and mean and std, are those of pipelines of images."""
    from diffusers import LattePipeline

    net = tiny_foreign._vae("AutoencoderKL", foreign_codecs.KL | {"shift_factor": None}, 0)
    pipe = LattePipeline(tokenizer=None, text_encoder=None, vae=net, transformer=None, scheduler=None)
    latents = torch.randn(2, 4, 3, 8, 8)
    torch.testing.assert_close(adopted(net).decode(latents), pipe.decode_latents(latents, 3), **CLOSE)


@torch.no_grad()
def test_means_and_deviations_of_an_image_autoencoder_count() -> None:
    changed = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0], "shift_factor": None}
    net = tiny_foreign._vae("AutoencoderKL", foreign_codecs.KL | changed, 0)
    video, made = clip("kl"), adopted(net)
    mean, std = (torch.tensor(changed[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latent = made.encode(video).mode()
    torch.testing.assert_close(latent * std / 0.36 + mean, moments_of(net, video)[0], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_stream_is_equal_to_one_pass(codecs: dict[str, ForeignCodec], name: str) -> None:
    """Whatever the pieces, and while another stream and whole clips go through the same module."""
    model, video, other = codecs[name], clip(name), clip(name, seed=2)
    stride = model.config.temporal_stride
    whole = model.encode(video)
    streams = [iter(model.encode_stream(v.split(3, dim=2), chunk)) for v, chunk in ((video, 2), (other, 1))]
    made: list[list[Any]] = [[], []]
    for n in range(12):
        for parts, stream in zip(made, streams, strict=True):
            parts.extend(itertools.islice(stream, 1))
        if n in (1, 2):
            model.encode(other)
    assert not any(next(stream, None) for stream in streams)
    assert [part.mean.shape[2] for part in made[0]][:2] == [1, 2]
    torch.testing.assert_close(torch.cat([p.mean for p in made[0]], 2), whole.mean, **CLOSE)
    torch.testing.assert_close(torch.cat([p.logvar for p in made[0]], 2), whole.logvar, **CLOSE)
    torch.testing.assert_close(torch.cat([p.mean for p in made[1]], 2), model.encode(other).mean, **CLOSE)

    frames = list(model.decode_stream(whole.mean.split(2, dim=2), 2))
    assert [part.shape[2] for part in frames][:2] == [1, 2 * stride]
    torch.testing.assert_close(torch.cat(frames, 2), model.decode(whole.mean), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_class_with_recomputed_blocks_too(nets: dict[str, Any], name: str) -> None:
    video = clip(name, frames=9 if "ltx" not in name else 17)
    net = nets[name]
    frames = video.transpose(1, 2).flatten(0, 1) if name == "kl" else video
    time = [torch.zeros(1)] if net.config.get("timestep_conditioning") else []

    torch.manual_seed(0)  # of noise inside
    latents = net.encode(frames).latent_dist.mean
    expected = net.decode(latents, *time).sample
    gradient = torch.randn_like(expected)
    made = torch.autograd.grad(expected, list(net.parameters()), gradient, allow_unused=True)
    if name == "kl":
        expected = expected.unflatten(0, (1, -1)).transpose(1, 2)
        gradient = gradient.unflatten(0, (1, -1)).transpose(1, 2)

    for recompute in (False, True):
        model = adopted(net, activation_checkpointing=recompute).train()
        torch.manual_seed(0)
        ours = model.decode(model.encode(video).mean)
        kept = ours.detach().clamp(-1, 1) == ours.detach() if name.startswith("wan") else 1.0  # the class clamps
        torch.testing.assert_close(ours.clamp(-1, 1), expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        ours.backward(gradient * kept)
        # a bias of keys has no gradient but roundings
        most = max(value.abs().max() for value in made if value is not None)
        for (key, parameter), value in zip(model.net.named_parameters(), made, strict=True):
            if value is not None:
                assert parameter.grad is not None, key
                error = (parameter.grad - value).abs().max()
                assert error < 5e-3 * max(value.abs().max(), 1e-3 * most), key


def saved_bytes(model: ForeignCodec, video: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(video)
    return sum(seen.values())


@pytest.mark.parametrize("name", ["wan21", "wan22", "hunyuan", "ltx"])
def test_recomputed_blocks_keep_less(name: str) -> None:
    models = (codec(name, activation_checkpointing=share).train() for share in (False, 0.5, True))
    plain, half, whole = (saved_bytes(model, clip(name)) for model in models)
    assert whole < 0.7 * plain and whole < half < plain


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("wan21", 10, r"^video has 10 frames; AutoencoderKLWan needs 1\+4n \(e.g. 9 or 13\)$"),
        ("ltx", 16, r"^video has 16 frames; AutoencoderKLLTXVideo needs 1\+8n \(e.g. 9 or 17\)$"),
        ("hunyuan", 2, r"^video has 2 frames; AutoencoderKLHunyuanVideo needs 1\+4n \(e.g. 1 or 5\)$"),
    ],
)
@torch.no_grad()
def test_frames_that_make_no_latent_are_refused_not_dropped(
    codecs: dict[str, ForeignCodec], name: str, frames: int, message: str
) -> None:
    video = clip(name, frames)
    for refused in (
        codecs[name].encode,
        codecs[name],
        codecs[name].reconstruct,
        lambda v: list(codecs[name].encode_stream([v])),
    ):
        with pytest.raises(ValueError, match=message):
            refused(video)
    with pytest.raises(ValueError, match="needs height and width in multiples of"):
        codecs[name].encode(video[:, :, :1, :-2])


@torch.no_grad()
def test_a_video_of_any_length_is_reconstructed(codecs: dict[str, ForeignCodec]) -> None:
    video = ((clip("wan21", 10)[0].permute(1, 2, 3, 0) + 1) * 127.5).to(torch.uint8).numpy()
    pairs = list(reconstruct_video(codecs["wan21"], iter(video)))
    assert sum(len(copy) for _, copy in pairs) == 10
    with pytest.raises(ValueError, match="does not predict"):
        next(reconstruct_video(codecs["wan21"], iter(video), visible=5))
    predicted = list(reconstruct_video(codec("wan21", padding="token"), iter(video), visible=5))
    assert sum(len(copy) for _, copy in predicted) == 10


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tiles_are_blended_and_one_tile_is_exact(codecs: dict[str, ForeignCodec], name: str) -> None:
    model, video = codecs[name], clip(name)
    stride = model.config.spatial_stride
    whole, side = model.encode(video), video.shape[-1]
    assert torch.equal(model.encode(video, tile=side, overlap=0).mean, whole.mean)
    wide = torch.cat([video, video.flip(-1)], dim=-1)
    tiled = model.encode(wide, tile=side, overlap=0)
    # tiles without overlap are the halves, each by itself
    torch.testing.assert_close(tiled.mean[..., : side // stride], whole.mean, **CLOSE)
    parts = list(model.encode_stream(wide.split(4, dim=2), 2, side, 0))
    torch.testing.assert_close(torch.cat([part.mean for part in parts], 2), tiled.mean, **CLOSE)
    decoded = model.decode(tiled.mean, tile=side, overlap=0)
    torch.testing.assert_close(decoded[..., :side], model.decode(whole.mean), **CLOSE)
    with pytest.raises(ValueError, match="need multiples of"):
        model.encode(video, tile=stride + 1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_keeps_the_statistics_in_fp32(nets: dict[str, Any], name: str) -> None:
    model, video = adopted(nets[name]), clip(name)
    exact = model.encode(video).mean
    model.to(torch.bfloat16)
    rounded = model.encode(video)
    assert model.dtype == rounded.mean.dtype == model.decode(rounded.mean).dtype == torch.bfloat16
    assert ((rounded.mean.float() - exact).square().mean() / exact.square().mean()).sqrt() < 0.05
    if name.startswith("ltx"):
        assert model.net.latents_mean.dtype == model.net.latents_std.dtype == torch.float32
        assert torch.equal(model.net.latents_std, nets[name].latents_std)


@torch.no_grad()
def test_noise_inside_a_decoder_is_the_same_in_every_call_and_piece() -> None:
    model = codec("ltx095")
    latent = model.encode(clip("ltx095")).mean
    quiet = model.decode(latent)
    for module in model.modules():
        for name in ("per_channel_scale1", "per_channel_scale2"):
            if getattr(module, name, None) is not None:
                torch.nn.init.ones_(getattr(module, name))
    state = torch.get_rng_state()
    first = model.decode(latent)
    assert not torch.allclose(first, quiet) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, model.decode(latent))
    torch.testing.assert_close(torch.cat(list(model.decode_stream([latent], 3)), 2), first, **CLOSE)
    with torch.enable_grad():
        torch.testing.assert_close(model.decode(latent), first, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame(nets: dict[str, Any], codecs: dict[str, ForeignCodec], name: str) -> None:
    video, model = clip(name, 1), codecs[name]
    latent = model.encode(video).mode()
    torch.testing.assert_close(latent, normalised(nets[name], moments_of(nets[name], video)[0]), **CLOSE)
    (frame,) = model.decode_stream([latent])
    with torch.enable_grad():
        torch.testing.assert_close(frame, model.decode(latent).detach(), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_stream_does_not_wait_for_its_end(codecs: dict[str, ForeignCodec], name: str) -> None:
    """At any time it has read a few latents more than it has given, however long it is."""
    model = codecs[name]
    channels, side = model.config.latent_channels, CODECS[name][2] // model.config.spatial_stride
    read, given, most = 0, 0, 0

    def latents() -> Iterator[Tensor]:
        nonlocal read
        for _ in range(40):
            read += 1
            yield torch.zeros(1, channels, 1, side, side)

    for frames in model.decode_stream(latents(), 1):
        given += frames.shape[2]
        most = max(most, read - latent_groups(given, model.config.temporal_stride))
    assert latent_groups(given, model.config.temporal_stride) == 40
    assert most <= {"ltx": 12, "ltx095": 12, "hunyuan": 4}.get(name, 1), most


def test_the_digest_is_of_what_the_latents_depend_on(nets: dict[str, Any]) -> None:
    model = adopted(nets["ltx"])
    digest = encoder_digest(model)
    with torch.no_grad():
        next(model.net.decoder.parameters()).add_(1)
    assert (
        encoder_digest(model) == digest == encoder_digest(model.changed(padding="token", activation_checkpointing=True))
    )
    assert encoder_digest(adopted(nets["ltx"]).to(torch.bfloat16)) != digest  # rounded weights are others
    half = adopted(nets["ltx"]).to(torch.bfloat16)
    assert encoder_digest(half) == encoder_digest(half.float())  # the same values, stored otherwise

    model.net.latents_std.mul_(2)
    assert encoder_digest(model) != digest
    other = model.config.model_copy(update={"settings": model.config.settings | {"scaling_factor": 0.5}})
    moved = ForeignCodec(other)
    moved.net.load_state_dict(nets["ltx"].state_dict())
    assert encoder_digest(moved) != digest


@pytest.mark.parametrize("name", NAMES)
def test_a_model_folder_gives_the_same_codec(codecs: dict[str, ForeignCodec], name: str, tmp_path: Path) -> None:
    model = codecs[name].changed(padding="token")
    disk.save(tmp_path / "vae", "foreign_vae", model.config.model_dump(mode="json"), model.state_dict(), {})
    loaded = disk.load(tmp_path / "vae")
    assert isinstance(loaded, ForeignCodec) and loaded.config == model.config
    assert encoder_digest(loaded) == encoder_digest(codecs[name])
    with torch.no_grad():
        assert torch.equal(loaded.encode(clip(name)).mean, codecs[name].encode(clip(name)).mean)


@pytest.mark.parametrize("name", ["wan21", "hunyuan"])
def test_unseen_frames_are_predicted_from_padding(name: str) -> None:
    model = codec(name, padding="token").train()
    video = clip(name, 13)
    made, posterior = model(video, visible=2, rng=torch.Generator().manual_seed(0))
    assert made.shape == video.shape and posterior.mean.shape[2] == 2
    made.square().mean().backward()
    assert model.padding is not None and model.padding.token is not None and model.padding.token.grad is not None
    assert model.padding.token.grad.abs().max() > 0
    with pytest.raises(ValueError, match="does not predict"):
        codec(name)(video, visible=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_name": "AutoencoderTiny", "settings": {}}, "is no video autoencoder that longtake knows"),
        ({"class_name": "AutoencoderKLWan", "settings": {"dim_mult": 3}}, "settings: not those of a AutoencoderKLWan"),
        ({"class_name": "AutoencoderKLWan", "settings": {"z_dim": "x"}}, "settings: strides and channels"),
    ],
)
def test_settings_of_no_known_class_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodecConfig(**fields)
