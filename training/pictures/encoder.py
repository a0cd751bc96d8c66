"""What an image encoder is, and how one is loaded: the project's own, a feature network, or CLIP's model of pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.networks import imported, weights_of
from longtake.training.metrics.features import FeatureNetwork, feature_maps, load_network, reason
from longtake.training.models.common.causal import fold
from longtake.training.models.common.dit import sincos
from longtake.training.models.common.pictures import OWN
from longtake.training.registry.foreign import IMAGE_ENCODER, PICTURES, type_of
from longtake.training.registry.imported import pulled
from longtake.training.registry.uri import in_store

_GRID = 8  # tokens along a side of a frame of the project's own encoder, at most
_PLACE = 16  # channels of a token that say where in the frame it is
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PROJECTION = "visual_projection.weight"  # of CLIP


def _placed(maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) as tokens (N, h w, C + 16), the last channels of which say where: attention knows no places itself."""
    rows, columns = (sincos(torch.arange(n, device=maps.device), _PLACE // 2) for n in maps.shape[2:])
    places = torch.cat([rows[:, None].expand(-1, len(columns), -1), columns[None].expand(len(rows), -1, -1)], dim=2)
    tokens = torch.cat([maps.movedim(1, -1), places.expand(len(maps), -1, -1, -1)], dim=3)
    return tokens.flatten(1, 2)


class ImageEncoder(Protocol):
    """Single frames as tokens, and as one embedding each.

    width    channels of a token
    digest   of all that decides the tokens
    pooling  what an embedding is: the pixels themselves, or tokens that are pooled, or pooled and projected as CLIP's are
    resize   pixels of both sides that frames are scaled to; None: they are taken as they are
    """

    @property
    def width(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def pooling(self) -> Literal["pixels", "pooled", "projected"]: ...

    @property
    def resize(self) -> int | None: ...

    def tokens(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) in [-1, 1] -> tokens (N, K, width), fp32."""

    def embeddings(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) in [-1, 1] -> one embedding each, (N, E), fp32."""


@dataclass(frozen=True)
class OwnFrames:
    """The project's own features of a frame, which need no file: its pixels, 8 x 8 cells with 4 x 4 averages each."""

    width: int = 3 * 16 + _PLACE
    digest: str = "own-2"
    pooling: Literal["pixels"] = "pixels"
    resize: int = 4 * _GRID

    def tokens(self, frames: Tensor) -> Tensor:
        return _placed(self._cells(frames))

    def embeddings(self, frames: Tensor) -> Tensor:
        # side by side: their mean would be little more than a colour
        return self._cells(frames).flatten(1)

    def _cells(self, frames: Tensor) -> Tensor:
        """(N, 48, 8, 8)"""
        pixels = F.interpolate(frames.float(), (self.resize, self.resize), mode="area")
        return fold(pixels[:, :, None], 1, 4)[:, :, 0]


@dataclass(frozen=True)
class NetworkFrames:
    """The positions of the last map of a feature network (see `metrics.features`)."""

    network: FeatureNetwork
    width: int
    pooling: Literal["pooled"] = "pooled"

    @property
    def digest(self) -> str:
        return f"{self.network.digest}-{self.network.pixels}-2"

    @property
    def resize(self) -> int | None:
        return self.network.resize

    def tokens(self, frames: Tensor) -> Tensor:
        return _placed(feature_maps(self.network, frames)[-1].float())

    def embeddings(self, frames: Tensor) -> Tensor:
        return feature_maps(self.network, frames)[-1].float().mean((2, 3))


@dataclass(frozen=True)
class ClipFrames:
    """CLIP's model of pictures [paper: ViT-L/14, 257 x 1024].

    Tokens are its last hidden state, before its last norm and projection. Embeddings are the first token after both; after
    the norm alone where a file has no projection.
    """

    model: Any
    width: int
    side: int
    digest: str
    pooling: Literal["pooled", "projected"]

    @property
    def resize(self) -> int:
        return self.side

    def tokens(self, frames: Tensor) -> Tensor:
        states: Tensor = self._seen(frames).last_hidden_state
        return states.float()

    def embeddings(self, frames: Tensor) -> Tensor:
        seen = self._seen(frames)
        embeddings: Tensor = seen.image_embeds if self.pooling == "projected" else seen.pooler_output
        return embeddings.float()

    @torch.no_grad()
    def _seen(self, frames: Tensor) -> Any:
        x = F.interpolate(frames.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
        # in fp32: its hidden states have a few channels beyond what half precision can say
        with torch.autocast(x.device.type, enabled=False):
            return self.model(pixel_values=((x + 1) / 2 - mean) / std)


def load_image_encoder(name: str, device: torch.device | str = "cpu", key: str = "image") -> ImageEncoder:
    """The encoder that a config names: own; CLIP's model of pictures, in a folder or registered; a feature network's file.

    `key` is the setting that names it, for messages.

    Raises:
        UserError: the extra is not installed, there is no such encoder, or its weights are no safe ones.
        Failure: a registered one is not here, and its store cannot be reached.
    """
    if name == OWN:
        return OwnFrames()
    folder = pulled(name, IMAGE_ENCODER, key).folder if in_store(name) else Path(name).expanduser()
    if folder.is_dir():
        return load_clip(clip_folder(folder), device, key)
    network = load_network(name, device=device)
    if network.images is None:
        raise UserError(f"{key}: {name}: takes whole videos; name a network of pictures")
    try:
        with torch.no_grad():
            width = feature_maps(network, torch.zeros(1, 3, 64, 64, device=device))[-1].shape[1]
    except (RuntimeError, torch.jit.Error) as e:
        raise UserError(f"{key}: {name}: takes no frames of 64x64 ({reason(e)})") from e
    return NetworkFrames(network, width + _PLACE)


def clip_folder(folder: Path) -> Path:
    """Where a folder has its model of pictures: itself, or `image_encoder` in it, as diffusers and the registry lay it out."""
    inner = folder / "image_encoder"
    return inner if type_of(folder) is None and inner.is_dir() else folder


def load_clip(folder: Path, device: torch.device | str, key: str) -> ClipFrames:
    """CLIP's model of pictures in a folder. Raises UserError as `load_image_encoder`."""
    kind = type_of(folder)
    if kind is None:
        raise UserError(f"{key}: {folder}: is no image encoder (no config.json of a model)")
    if kind not in PICTURES:
        raise UserError(f"{key}: {folder}: is a {kind[:40]}; name a folder with CLIP's model of pictures")
    files = weights_of(folder, key)
    transformers = imported("transformers", key)
    projected = any(_PROJECTION in _names(path, key) for path in files)
    clip = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    try:
        model, info = clip.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"{key}: {folder}: transformers cannot load it ({str(e).splitlines()[0][:200]})") from e
    if absent := sorted(info["missing_keys"]):
        raise UserError(f"{key}: {folder}: its weights lack {absent[0]}; copy the whole model there")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    model = model.eval().requires_grad_(False).to(device)
    width, side = int(model.config.hidden_size), int(model.config.image_size)
    return ClipFrames(model, width, side, digest.hexdigest(), "projected" if projected else "pooled")


def _names(path: Path, key: str) -> set[str]:
    """The names of the weights in a safetensors file; UserError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as e:
        raise UserError(f"{key}: {path}: damaged ({e}); copy it again") from e
