"""No clean latent, and no token of a frame, knows what is in the gap."""

from types import SimpleNamespace
from typing import Any

import latent_stages
import pytest
import torch
from torch import Tensor

from longtake.training.models.common.codec import Pixels, Posterior
from longtake.training.models.mavin import encode
from longtake.training.models.mavin.guidance import boundary_tokens
from longtake.training.models.tats.vqgan import VQGAN, config_from_preset
from longtake.training.pictures import load_image_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


class BothWays:
    """A codec that looks both ways in time: each latent is of 2 frames and of the mean of the whole clip."""

    config = SimpleNamespace(temporal_stride=2, first_frames=2, spatial_stride=1, latent_channels=3)
    dtype = torch.float32

    def encode(self, video: Tensor) -> Posterior:
        assert video.shape[2] % 2 == 0
        mean = video.unflatten(2, (-1, 2)).mean(3) + video.mean(2, keepdim=True)
        return Posterior(mean, torch.zeros_like(mean))


def codecs() -> dict[str, Any]:
    vqgan = VQGAN(config_from_preset("vqgan_tiny"))
    return {"pv_vae": latent_stages.vae(), "pixels": Pixels(), "both ways": BothWays(), "vqgan": vqgan}


def clip(codec: Any, latents: int, seed: int = 0) -> Tensor:
    side = 2 * codec.config.spatial_stride
    shape = (1, 3, encode.window_frames(codec, latents), side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", ["pv_vae", "pixels", "both ways", "vqgan"])
@pytest.mark.parametrize("span", [(1, 2), (2, 5), (3, 4)])
def test_changing_the_middle_changes_no_clean_latent_and_no_token(name: str, span: tuple[int, int]) -> None:
    codec, image = codecs()[name], load_image_encoder("own")
    start, end = span
    video = clip(codec, 6)
    other = video.clone()
    begin, stop = encode.frames_of_span(codec, start, end)
    other[:, :, begin:stop] = -other[:, :, begin:stop]

    one, two = (encode.encode_window(codec, each, start, end) for each in (video, other))
    assert one.shape[2] == 6
    assert torch.equal(one[:, :, :start], two[:, :, :start]) and torch.equal(one[:, :, end:], two[:, :, end:])
    assert not torch.isclose(one[:, :, start:end], two[:, :, start:end]).all()

    tokens = [boundary_tokens(image, encode.boundary_frames(codec, each, [span])) for each in (video, other)]
    assert torch.equal(*tokens)

    # they are what use will have, which knows both clips alone
    before, after = encode.encode_apart(codec, video[:, :, :begin], video[:, :, stop:])
    assert torch.equal(torch.cat([before, after], dim=2), torch.cat([one[:, :, :start], one[:, :, end:]], dim=2))


@pytest.mark.parametrize("early", [1, 3])
def test_a_clip_that_begins_early_makes_gaps_of_any_length(early: int) -> None:
    codec = latent_stages.vae()
    video = clip(codec, 6)
    other = video.clone()
    other[:, :, 5 : 13 - early] = -other[:, :, 5 : 13 - early]  # a gap of 8 frames less those
    one, two = (encode.encode_window(codec, each, 2, 4, early) for each in (video, other))
    assert one.shape[2] == 6 and torch.equal(one[:, :, :2], two[:, :, :2]) and torch.equal(one[:, :, 4:], two[:, :, 4:])
    assert not torch.isclose(one[:, :, 2:4], two[:, :, 2:4]).all()
    before, after = encode.encode_apart(codec, video[:, :, :5], video[:, :, 13 - early : 18 - early])
    assert torch.equal(torch.cat([before, after], dim=2), torch.cat([one[:, :, :2], one[:, :, 4:]], dim=2))
    (frames,) = encode.boundary_frames(codec, video, [(2, 4)], [early])
    assert torch.equal(frames[0], video[0, :, 4]) and torch.equal(frames[1], video[0, :, 13 - early])


def test_encoded_whole_the_clip_after_the_gap_knows_it() -> None:
    codec = latent_stages.vae()
    video = clip(codec, 7)[:, :, :21]
    other = video.clone()
    other[:, :, 9:13] = -other[:, :, 9:13]
    one, two = (codec.encode(each).mode() for each in (video, other))
    assert torch.equal(one[:, :, :3], two[:, :, :3])
    assert not torch.isclose(one[:, :, 4:], two[:, :, 4:]).all(), "this is the leak"


def test_boundary_frames_are_those_beside_the_gap() -> None:
    codec = latent_stages.vae()
    video = clip(codec, 6).expand(2, -1, -1, -1, -1)
    frames = encode.boundary_frames(codec, video, [(1, 2), (2, 4)])
    for row, (before, after) in zip(frames, [(0, 5), (4, 13)], strict=True):
        assert torch.equal(row[0], video[0, :, before]) and torch.equal(row[1], video[0, :, after])


def test_windows_of_each_codec_have_its_lengths() -> None:
    vae, pixels = latent_stages.vae(), Pixels()
    for latents in range(3, 9):
        assert encode.window_latents(vae, encode.window_frames(vae, latents)) == latents
        assert encode.window_latents(pixels, latents) == latents == encode.window_frames(pixels, latents)
    assert [encode.gap_latents(vae, frames) for frames in (1, 4, 5, 12, 13)] == [1, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"a window of 33 frames: .* needs 2 \+ 4n, such as 30 or 34"):
        encode.window_latents(vae, 33)
    with pytest.raises(ValueError, match="does not leave a clip on either side"):
        encode.encode_window(pixels, torch.zeros(1, 3, 5, 8, 8), 0, 2)


def test_windows_with_spans_of_their_own_are_those_one_by_one() -> None:
    codec = latent_stages.vae()
    video = torch.cat([clip(codec, 6, seed) for seed in (1, 2)])
    both = encode.encode_windows(codec, video, [(1, 2), (2, 5)])
    for number, span in enumerate([(1, 2), (2, 5)]):
        assert torch.equal(both[number : number + 1], encode.encode_window(codec, video[number : number + 1], *span))
