"""Clips to vectors by an image encoder that was saved as TorchScript.

A TorchScript file is code, and loading it runs it: name only files that you trust.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from longtake.datasets import clip, storage
from longtake.datasets.errors import UserError

if TYPE_CHECKING:
    import torch

_BATCH = 64


def read_encoder(path: str, key: str) -> bytes:
    """The bytes of a TorchScript file. Raises UserError, naming the config's `key`, where there is none."""
    try:
        return storage.read(path)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(
            f"{key}.encoder: {path}: no such file; name one that `torch.jit.script(model).save(...)` wrote"
        ) from e


def vectors(dataset: str, clips: pa.Table, encoder: str, size: int, key: str) -> np.ndarray:
    """The encoder's vector for the middle frame of each clip.

    Args:
        dataset: URL of the dataset.
        clips: N rows of its index with the columns `split` and `shard`.
        encoder: path of a TorchScript module, (B, 3, size, size) float32 in 0..1 -> (B, D).
        size: pixels a side; frames are scaled to cover it, and their centre is cropped.
        key: the config's key of this encoder, for errors.

    Returns:
        (N, D) float32.

    Raises:
        UserError: the encoder is missing, is no TorchScript, or does not give (B, D) finite numbers.
        Failure: a clip is not readable.
    """
    import torch

    model = _load(encoder, key)
    batches: list[np.ndarray] = []
    bar = tqdm(desc=key, total=len(clips), unit="clip")
    with torch.inference_mode(), ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(clips), _BATCH):
            rows = clips.slice(start, _BATCH).to_pylist()
            frames = np.stack(list(pool.map(lambda row: _middle_frame(dataset, row, size), rows)))
            batches.append(_encode(model, torch.from_numpy(frames), encoder, key))
            bar.update(len(rows))
    return np.concatenate(batches) if batches else np.empty((0, 1), np.float32)


def read_image(path: str, key: str) -> bytes:
    """The bytes of a picture. Raises UserError, naming the config's `key`, where there is none."""
    try:
        return storage.read(path)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"{key}.image: {path}: no such file; name a picture") from e


def image_vector(path: str, encoder: str, size: int, key: str) -> np.ndarray:
    """The encoder's vector (D,) of a picture. Raises UserError: it is no picture, or as `vectors`."""
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(read_image(path, key))) as image:
            picture = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as e:
        raise UserError(f"{key}.image: {path}: not a picture ({e}); name a JPEG or PNG") from e
    cropped = Image.fromarray(clip.crop(picture[None], (size, size))[0]).resize((size, size))
    frames = torch.from_numpy(np.asarray(cropped).transpose(2, 0, 1)[None].copy())
    with torch.inference_mode():
        return _encode(_load(encoder, key), frames, encoder, key)[0]


def cosines(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The cosines (N,) of vectors (N, D) to one (D,)."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector)
    return np.asarray(vectors @ vector / np.maximum(norms, 1e-12))


def _load(path: str, key: str) -> "torch.jit.ScriptModule":
    import torch

    data = io.BytesIO(read_encoder(path, key))
    try:
        return torch.jit.load(data, map_location="cuda" if torch.cuda.is_available() else "cpu").eval()
    except RuntimeError as e:
        raise UserError(
            f"{key}.encoder: {path}: not a TorchScript file; write one with `torch.jit.script(model).save(...)`"
        ) from e


def _middle_frame(dataset: str, row: dict[str, Any], size: int) -> np.ndarray:
    """(3, size, size) uint8."""
    url = storage.join(dataset, row["split"], f"{row['shard']}.tar")
    mp4 = storage.read_range(url, row["mp4_offset"], row["mp4_size"])
    scaled = clip.covering_size((row["height"], row["width"]), (size, size))
    video = clip.decode(mp4, [row["frame_count"] // 2], scaled, f"{url}: {row['key']}.mp4")
    return clip.crop(video, (size, size))[0].transpose(2, 0, 1)


def _encode(model: "torch.jit.ScriptModule", frames: "torch.Tensor", encoder: str, key: str) -> np.ndarray:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        out = model(frames.to(device).float() / 255)
    except RuntimeError as e:
        last = str(e).strip().splitlines()[-1]
        raise UserError(
            f"{key}.encoder: {encoder}: does not take {tuple(frames.shape)} float32 ({last}); change `{key}.size`"
        ) from e
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(frames) or not out.isfinite().all():
        output = f"{tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise UserError(
            f"{key}.encoder: {encoder}: gives {output} for {len(frames)} frames; ({len(frames)}, D) finite numbers are needed"
        )
    return out.float().cpu().numpy()
