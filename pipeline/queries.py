"""A picture or a text as a vector to search by, from the encoder that made a column."""

import io

import numpy as np

from longtake.datasets import clip, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Column
from longtake.pipeline import scorers
from longtake.pipeline.scoring import is_looker

_MOST_BYTES = 64 << 20  # of a picture's file
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def of_text(column: Column, text: str) -> np.ndarray:
    """The vector (D,) of a text. Raises UserError where the column's encoder takes none, or has changed."""
    from longtake.pipeline.scorers import dual

    if not text.strip():
        raise UserError("--text: says nothing; write what is to be seen")
    return dual.encode_query(column, text)


def of_picture(column: Column, field: str, path: str) -> np.ndarray:
    """The vector (D,) of a picture, as of a clip of one frame.

    Raises:
        UserError: it is no picture; what made the column is no scorer of pictures, or has changed since.
    """
    if column.scorer not in scorers.SCORERS:
        raise UserError(f"{column.column}: made by `{column.scorer}`, which encodes no pictures; name a clip's key")
    scorer = scorers.load(column.scorer)
    config = scorer.config.model_validate(dict(column.config))
    if scorer.digest(config) != column.digest:
        raise UserError(f"{column.column}: its encoder's files are other ones by now; copy them back, or score again")
    looker = scorer.load(config, "cpu", 1)
    if not is_looker(looker):
        raise UserError(f"{column.column}: made by `{column.scorer}`, which encodes no pictures; name a clip's key")
    vector = looker.look(_picture(path, looker.size)[None, None])[0][field]  # type: ignore[union-attr]
    return np.asarray(vector, np.float32).reshape(-1, np.shape(vector)[-1]).mean(0)


def _picture(path: str, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8, scaled and cropped to a size if there is one."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        data = storage.read_range(path, 0, _MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB")
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
                raise ValueError(f"{image.width}x{image.height} pixels")
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, Failure, ValueError, SyntaxError) as e:
        raise UserError(f"{path}: not a picture ({str(e).splitlines()[0]}); name a JPEG or PNG, or a clip's key") from e
    if size is None:
        return pixels
    cropped = Image.fromarray(clip.crop(pixels[None], size)[0])
    return np.asarray(cropped.resize((size[1], size[0])))
