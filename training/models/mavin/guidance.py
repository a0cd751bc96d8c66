"""What the gap is told beside its clean neighbours: a text, and the two frames beside it as an image encoder sees them.

Boundary frame guidance (arXiv 2405.18003): the tokens of the last frame before the gap and of the first one after it come
after those of the text, and the spatial blocks attend to all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training import engines
from longtake.training.metrics.features import FeatureNetwork, feature_maps, load_network
from longtake.training.models.common.causal import fold
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.dit import sincos
from longtake.training.models.common.pictures import OWN
from longtake.training.models.common.text import TextIn
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.text.files import imported, weights_of

_GRID = 8  # tokens along a side of a frame of the project's own encoder, at most
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PROJECTION = "visual_projection.weight"  # of CLIP
SIDES = 2  # frames beside a gap
_PLACE = 16  # channels of a token that say where in the frame it is


class ImageEncoder(Protocol):
    """Single frames as tokens, and as one embedding each.

    width    channels of a token
    digest   of all that decides the tokens
    pooling  what an embedding is: the pixels themselves, or tokens that are pooled, or pooled and projected as CLIP's are
    """

    @property
    def width(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def pooling(self) -> Literal["pixels", "pooled", "projected"]: ...

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

    def tokens(self, frames: Tensor) -> Tensor:
        return _placed(self._cells(frames))

    def embeddings(self, frames: Tensor) -> Tensor:
        # side by side: their mean would be little more than a colour
        return self._cells(frames).flatten(1)

    def _cells(self, frames: Tensor) -> Tensor:
        """(N, 48, 8, 8)"""
        pixels = F.interpolate(frames.float(), (4 * _GRID, 4 * _GRID), mode="area")
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


def _placed(maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) as tokens (N, h w, C + 16), the last channels of which say where: attention knows no places itself."""
    rows, columns = (sincos(torch.arange(n, device=maps.device), _PLACE // 2) for n in maps.shape[2:])
    places = torch.cat([rows[:, None].expand(-1, len(columns), -1), columns[None].expand(len(rows), -1, -1)], dim=2)
    tokens = torch.cat([maps.movedim(1, -1), places.expand(len(maps), -1, -1, -1)], dim=3)
    return tokens.flatten(1, 2)


def load_image_encoder(name: str, device: torch.device | str = "cpu", key: str = "image") -> ImageEncoder:
    """The encoder that a config names: own; a folder with CLIP's model of pictures; or the file of a feature network.

    `key` is the setting that names it, for messages.

    Raises:
        UserError: the extra is not installed, there is no such encoder, or its weights are no safe ones.
    """
    if name == OWN:
        return OwnFrames()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _clip(folder if (folder / "config.json").exists() else folder / "image_encoder", device, key)
    network = load_network(name, device=device)
    if network.images is None:
        raise UserError(f"{key}: {name}: takes whole videos; name a network of pictures")
    with torch.no_grad():
        width = feature_maps(network, torch.zeros(1, 3, 64, 64, device=device))[-1].shape[1]
    return NetworkFrames(network, width + _PLACE)


def _clip(folder: Path, device: torch.device | str, key: str) -> ClipFrames:
    try:
        described = json.loads((folder / "config.json").read_bytes())
        kind = described["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{key}: {folder}: is no image encoder (no config.json of a model)") from e
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{key}: {folder}: is a {str(kind)[:40]}; name a folder with CLIP's model of pictures")
    files = weights_of(folder)
    transformers = imported("transformers")
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


def checked_embedder(name: str, size: tuple[int, int]) -> ImageEncoder:
    """The encoder that `embedder` names, on this rank's device, after it has seen a frame of this size.

    Raises:
        UserError: as `load_image_encoder`; it takes no such frames.
    """
    encoder = load_image_encoder(name, where := engines.device(), "embedder")
    try:
        encoder.embeddings(torch.zeros(1, 3, *size, device=where))
    except RuntimeError as e:
        reason = str(e).splitlines()[0][:120]
        raise UserError(f"embedder: {name}: takes no frames of {size[0]}x{size[1]} ({reason})") from e
    return encoder


def load_learned(uri: str, image: Mapping[str, Any], device: torch.device | str, remedy: str) -> ImageEncoder:
    """The encoder that a model's config.json names, the one that it has learned from.

    Raises:
        UserError: there is none, or another one; `remedy` says what to do.
    """
    try:
        encoder = load_image_encoder(image["encoder"], device)
    except UserError as e:
        raise UserError(f"{uri}: {e}; {remedy}") from e
    if encoder.digest != image["digest"]:
        raise UserError(
            f"{uri}: has learned from another image encoder than {image['encoder']} (digest {image['digest'][:12]}, not"
            f" {encoder.digest[:12]}); {remedy}"
        )
    return encoder


@torch.no_grad()
def boundary_tokens(encoder: ImageEncoder, frames: Tensor) -> Tensor:
    """The tokens of the two frames beside each gap: (B, 2, 3, H, W) in [-1, 1] -> (B, 2, K, E), fp32."""
    return encoder.tokens(frames.flatten(0, 1)).unflatten(0, (-1, SIDES))


class ImageIn(nn.Module):
    """The tokens of both frames, (B, 2, K, E) -> (B, 2 K, width), each with a learned vector that says which side it is of.

    Where the widths are the same it begins as the identity, as the paper has it: its widths coincide, and it maps nothing.
    """

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(image_width, width)
        self.sides = nn.Parameter(torch.zeros(SIDES, 1, width))
        _begin(self.project)

    def forward(self, image: Tensor) -> Tensor:
        return (self.project(image.to(self.project.weight.dtype)) + self.sides).flatten(1, 2)


class Guide(nn.Module):
    """Text and boundary frames as the tokens that spatial blocks attend to."""

    def __init__(self, config: MavinConfig) -> None:
        super().__init__()
        self.image_width = config.image_width
        fields = {name: getattr(config, name) for name in ("text_width", "text_null", "text_empty")}
        fields |= {name: getattr(config, name) for name in ("text_padding", "text_length")}
        self.text_in = TextIn(SimpleNamespace(**fields, width=config.cross)) if config.text_width else None
        if self.text_in is not None and config.body == "unet":
            # a base has learned states as they are
            self.text_in.norm = nn.Identity()  # type: ignore[assignment]
            _begin(self.text_in.project)
        self.image_in = ImageIn(config.image_width, config.cross) if config.image_width else None

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The tokens (B, N, width) for latents `x`, and which are seen, bool (B, N); None for a model without any.

        Args:
            text, text_mask: states (B, N, W) and which of them there are; without a text its null stands for it.
            image, image_mask: tokens (B, 2, K, E), and of which side they are seen, bool (B, 2); None: of both.

        Raises:
            ValueError: what the model does not take, or in another shape.
        """
        parts, seen = list[Tensor](), list[Tensor]()
        if text is not None and self.text_in is None:
            raise ValueError("text: this model takes none; leave it out")
        if image is not None and self.image_in is None:
            raise ValueError("image: this model takes none; leave it out")
        if self.text_in is not None:
            condition = None if text is None else Condition(text=text, mask=_mask(text, text_mask))
            tokens, there = self.text_in(condition, x)
            parts.append(tokens)
            seen.append(torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device) if there is None else there)
        if self.image_in is not None:
            # also without an image, so that all weights take part in every step of every rank
            given = x.new_zeros(len(x), SIDES, 1, self.image_width) if image is None else image
            if given.shape[:2] != (len(x), SIDES) or given.shape[-1] != self.image_width:
                raise ValueError(
                    f"image has shape {tuple(given.shape)}; this model needs ({len(x)}, {SIDES}, K, {self.image_width})"
                )
            which = torch.ones(len(x), SIDES, dtype=torch.bool) if image_mask is None else image_mask
            which = which.to(x.device) & (image is not None)
            parts.append(self.image_in(given))
            seen.append(which.repeat_interleave(given.shape[2], dim=1))
        if not parts:
            return None, None
        return torch.cat(parts, dim=1), torch.cat(seen, dim=1)


def _mask(text: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask


def _begin(linear: nn.Linear) -> None:
    """Let a map begin as the identity where its widths are the same."""
    if linear.in_features == linear.out_features:
        nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
