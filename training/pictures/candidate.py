"""A folder with an image encoder that is to be registered: what is said of it, and its files."""

from pathlib import Path
from typing import Any

import torch

from longtake.datasets.errors import UserError
from longtake.datasets.networks import files_of
from longtake.training.pictures.encoder import clip_folder, load_clip
from longtake.training.registry.foreign import type_of


def checked(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What is said of CLIP's model of pictures in a folder, and its files by their names in the registry.

    Raises:
        UserError: as `load_image_encoder`; its tokens are not finite, or the same for two pictures.
    """
    place = clip_folder(folder)
    encoder = load_clip(place, "cpu", "image")
    plain = torch.zeros(1, 3, encoder.side, encoder.side)
    ramp = torch.linspace(-1, 1, encoder.side).expand_as(plain)
    one, other = (encoder.tokens(picture) for picture in (plain, ramp))
    if not (one.isfinite().all() and other.isfinite().all()):
        raise UserError(f"image: {folder}: its tokens are not finite; look at its weights")
    if torch.allclose(one, other, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"image: {folder}: gives two different pictures the same tokens; its weights are not those of a trained encoder"
        )
    config = {"model_type": type_of(place), "width": encoder.width, "pixels": encoder.side, "pooling": encoder.pooling}
    return config, {f"image_encoder/{path.relative_to(place)}": path for path in files_of(place, "image")}
