"""Pictures from files, as scorers and searches compare clips with them."""

import io

import numpy as np

from longtake.datasets import clip, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.pictures import first_line

_MOST_BYTES = 64 << 20  # of a file
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def picture_bytes(path: str, what: str) -> bytes:
    """The file of a picture. Raises UserError where there is none, or it is too large; `what` says in errors what it is."""
    try:
        data = storage.read_range(path, 0, _MOST_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"{what}: no such file; name a picture") from e
    except (OSError, Failure) as e:
        raise UserError(f"{what}: cannot be read ({first_line(e)}); give read permission") from e
    if len(data) > _MOST_BYTES:
        raise UserError(f"{what}: has more than {_MOST_BYTES >> 20} MiB; name a smaller picture")
    return data


def picture(path: str, what: str, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8, cropped and scaled to a size if there is one. Raises UserError where it is no picture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = picture_bytes(path, what)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
                raise ValueError(f"{image.width}x{image.height} pixels")
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as e:
        raise UserError(f"{what}: not a picture ({first_line(e)}); name a JPEG or PNG") from e
    if size is None:
        return pixels
    cropped = Image.fromarray(clip.crop(pixels[None], size)[0])
    return np.asarray(cropped.resize((size[1], size[0])))
