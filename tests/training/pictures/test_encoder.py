"""Image encoders: the project's own, CLIP's model of pictures from a folder, a feature network, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.pictures import load_image_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_projects_own_tokens_need_no_file() -> None:
    encoder = load_image_encoder("own")
    for size in ((16, 16), (36, 64)):
        tokens = encoder.tokens(torch.rand(3, 3, *size))
        assert tokens.shape == (3, 64, encoder.width)
        assert len(tokens[0, :, 48:].unique(dim=0)) == 64, "each says where it is"
    picture = torch.rand(1, 3, 32, 32)
    assert encoder.tokens(picture)[0, :, :48].mean().item() == pytest.approx(picture.mean().item(), abs=1e-5)


def clip_folder(path: Path, projected: bool) -> Any:
    """CLIP's model of pictures with random weights, saved to a folder, with its projection or without."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=6)
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    net = kind(settings).eval()
    net.save_pretrained(path)
    return net


@pytest.mark.parametrize("projected", [False, True])
@torch.no_grad()
def test_clip_sees_frames_by_a_local_folder(tmp_path: Path, projected: bool) -> None:
    net = clip_folder(tmp_path, projected)
    encoder = load_image_encoder(str(tmp_path))
    frames = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = encoder.tokens(frames)
    assert tokens.shape == (2, 5, 16) and encoder.width == 16 and len(encoder.digest) == 64
    # in the resolution of the model, pixels go in as its own processor has them
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = ((frames + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    seen = net(pixel_values=pixels)
    torch.testing.assert_close(tokens, seen.last_hidden_state, atol=1e-4, rtol=1e-4)
    expected = seen.image_embeds if projected else seen.pooler_output
    torch.testing.assert_close(encoder.embeddings(frames), expected, atol=1e-4, rtol=1e-4)
    assert (encoder.pooling, expected.shape[1]) == (("projected", 6) if projected else ("pooled", 16))


def test_a_frame_is_one_embedding(tmp_path: Path) -> None:
    class Halves(nn.Module):
        """The mean colours of the left and the right half, as a map."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., : x.shape[3] // 2].mean((2, 3)), x[..., x.shape[3] // 2 :].mean((2, 3))], 2)[
                :, :, None
            ]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Halves()).save(str(tmp_path / "halves.pt"))
    network, own = load_image_encoder(str(tmp_path / "halves.pt")), load_image_encoder("own")
    frames = torch.rand(2, 3, 8, 8)
    assert network.tokens(frames).shape == (2, 2, 3 + 16) and network.pooling == "pooled"
    torch.testing.assert_close(network.embeddings(frames), network.tokens(frames)[..., :3].mean(1))
    assert own.embeddings(frames).shape == (2, 64 * 48) and own.pooling == "pixels"


def test_what_is_no_image_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no image encoder"):
        load_image_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert; name a folder with CLIP"):
        load_image_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"safetensors"):
        load_image_encoder(str(tmp_path))
    with pytest.raises(UserError):
        load_image_encoder(str(tmp_path / "nothing"))
