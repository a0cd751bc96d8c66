"""The tiny Wan for a first run: the same in every run, and whole."""

from pathlib import Path

import pytest
import torch
from priors import longtake

from longtake.datasets.errors import UserError
from longtake.datasets.text import TextConfig
from longtake.training import registry
from longtake.training.foreign.folder import digest_of, part_of
from longtake.training.text import load_encoder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_a_tiny_wan_is_the_same_in_every_run_and_whole(tmp_path: Path) -> None:
    folder, again = tmp_path / "wan", tmp_path / "again"
    assert f"WAN={folder} longtake run wan_lora_tiny" in longtake("models", "tiny", folder).output
    longtake("models", "tiny", again)
    for name in ("vae", "transformer", "text_encoder"):
        assert digest_of(part_of(folder, name)) == digest_of(part_of(again, name))
    with pytest.raises(UserError, match="wan: is there already; name another folder"):
        longtake("models", "tiny", folder)

    # latents of pictures are near those that a transformer expects
    vae, transformer = (registry.load(str(folder), part) for part in ("vae", "transformer"))  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latent = vae.encode(torch.rand(2, 3, 9, 64, 64, generator=rng) * 2 - 1).mode()  # type: ignore[operator]
    assert latent.shape == (2, transformer.config.channels, 3, 8, 8) and 0.1 < latent.std() < 10  # type: ignore[union-attr]

    # a token for each letter, and one at the end
    encoder = load_encoder(TextConfig(encoder=str(folder), clean="wan"))
    assert [len(states) for states in encoder.encode(["", "a cat!"])] == [1, 7] and encoder.width == 64
