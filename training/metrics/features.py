"""Feature networks from a file that the user names; nothing is downloaded and nothing is unpickled.

Two kinds of file. A *state dict* (`.safetensors`, or `.pth` read with `weights_only=True`) of an architecture in
backbones.py is data. A *TorchScript archive* (I3D for FVD, ...) is code: it runs with the rights of this process,
so it must come from a place you trust.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.networks import is_torchscript, load_torchscript
from longtake.datasets.shard import sha256_of
from longtake.training.engines import device
from longtake.training.metrics.backbones import from_state_dict

Pixels = Literal["imagenet", "caffe", "signed", "unit", "bytes"]
Images = Callable[[Tensor], list[Tensor]]

# the pixels that a network takes, as (shift, scale) of pixels in [-1, 1]
_MEANS, _STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (tuple(2 * m - 1 for m in _MEANS), tuple(2 * s for s in _STDS)),  # LPIPS's scaling layer
    "caffe": (tuple(m / 127.5 - 1 for m in (123.0, 117.0, 104.0)), (1 / 127.5,) * 3),  # RGB 0..255 minus the mean
    "signed": ((0.0,) * 3, (1.0,) * 3),
    "unit": ((-1.0,) * 3, (2.0,) * 3),
    "bytes": ((-1.0,) * 3, (1 / 127.5,) * 3),
}
VIDEO_ARGUMENTS = {"rescale", "resize", "return_features"}


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network and how pixels are put into it. `images` gives feature maps, `videos` one vector a clip."""

    name: str  # the architecture, or the name of the TorchScript file
    digest: str  # sha256 of the file
    pixels: str
    resize: int | None  # both sides in pixels, bilinear with antialiasing; None leaves them to the network
    images: Images | None = None
    videos: Callable[[Tensor], Tensor] | None = None

    def record(self) -> dict[str, Any]:
        """What makes two values comparable, flat, for JSON."""
        return {
            "network": self.name,
            "network_digest": self.digest,
            "sees": "frames" if self.images else "videos",
            "pixels": self.pixels,
            "resize": self.resize or ("by the network" if self.videos else "none"),
        }


def load_network(
    path: str,
    *,
    pixels: Pixels = "imagenet",
    resize: int | None = None,
    digest: str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """A feature network of a state dict or a TorchScript archive, in fp32, frozen.

    A TorchScript archive whose `forward` has the arguments `rescale`, `resize` and `return_features` is a video
    network with the interface of StyleGAN-V's I3D (arXiv 2112.14683, §4): it gets (B, 3, T, H, W) in 0..255 and both
    rescales and resizes by itself, unless `resize` is given here. Any other gets images (N, 3, H, W) as `pixels` says
    and returns a tensor (N, D) or (N, C, h, w), or a list of these.

    An archive is refused where its code calls what reaches out of it (saving, mapping a file, remote calls, foreign
    operators). That catches the obvious only. `digest` is the real guard: it lets in one file, known to be good.

    Args:
        path: any fsspec URL.
        pixels: "imagenet" (mean and std), "caffe" (0..255 minus the mean), "signed" [-1, 1], "unit" [0, 1] or
            "bytes" [0, 255]; of no effect on video networks.
        resize: both sides of the pictures before the network, in pixels.
        digest: the sha256 that the file must have.

    Raises:
        UserError: no such file, another digest, a file of neither kind.
    """
    data = read_file(path, digest)
    sha = hashlib.sha256(data).hexdigest()
    if pixels not in PIXELS:
        raise UserError(f"pixels: {pixels!r} is none of {', '.join(PIXELS)}")
    if not is_torchscript(data):
        name, backbone = from_state_dict(load_state_dict(data, path), path)
        return FeatureNetwork(name, sha, pixels, resize, images=frozen(backbone, device))
    module = load_torchscript(data, path, device)
    name = PurePosixPath(path).stem
    if {argument.name for argument in module.forward.schema.arguments} >= VIDEO_ARGUMENTS:
        return FeatureNetwork(name, sha, "bytes", resize, videos=_as_videos(frozen(module, device), resize, path))
    return FeatureNetwork(name, sha, pixels, resize, images=_as_maps(frozen(module, device), path))


def feature_maps(network: FeatureNetwork, frames: Tensor) -> list[Tensor]:
    """Frames (N, 3, H, W) in [-1, 1] -> the maps (N, C, h, w) of each tap, fp32; gradients reach the frames.

    Raises:
        ValueError: a network that only takes whole videos.
    """
    if network.images is None:
        raise ValueError(f"{network.name} takes whole videos; a network of images is needed here")
    # in fp32 whatever surrounds it: unit-normalised features of bf16 have steps of 1/256
    with torch.autocast(frames.device.type, enabled=False):
        x = frames.float()
        if network.resize:
            x = _resized(x, network.resize)
        shift, scale = (x.new_tensor(values)[:, None, None] for values in PIXELS[network.pixels])
        return network.images((x - shift) / scale)


def levels_of(video: Tensor) -> Tensor:
    """Pixels in [-1, 1] as whole numbers 0..255, fp32, as a file would have them."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255)


@torch.no_grad()
def features(network: FeatureNetwork, video: Tensor) -> Tensor:
    """One fp32 row of features for each frame (B*T, D) or, of a video network, for each clip (B, D).

    Of a network of images it is the last tap, averaged over space. Pixels are rounded to 0..255 first, so that a clip
    in memory and the same clip in a file give the same features.

    Args:
        video: (B, 3, T, H, W) in [-1, 1].
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"features are of videos (B, 3, T, H, W), got {tuple(video.shape)}")
    levels = levels_of(video)
    if network.videos is not None:
        with torch.autocast(video.device.type, enabled=False):
            return network.videos(levels)
    return feature_maps(network, (levels / 127.5 - 1).transpose(1, 2).flatten(0, 1))[-1].mean((2, 3))


def checked_network(
    path: str | None, frames: int, size: tuple[int, int], key: str = "features"
) -> FeatureNetwork | None:
    """The feature network, on this rank's device, after it has taken a video as they will come; None without a path.

    Args:
        key: of the setting that names it, for messages.

    Raises:
        UserError: no such file, or no such network; it does not take these videos.
    """
    if path is None:
        return None
    network = load_network(path, device=device())
    try:
        features(network, torch.zeros(1, 3, frames, *size, device=device()))
    except (RuntimeError, ValueError, torch.jit.Error) as e:
        what = f"{frames} frames of {size[0]}x{size[1]}"
        raise UserError(f"{key}: {path}: takes no videos of {what} ({reason(e)})") from e
    return network


def reason(error: Exception) -> str:
    """What a network said last; before it TorchScript says where."""
    said = str(error).strip().splitlines()
    return said[-1][:120] if said else type(error).__name__


def digest_of(*paths: str | None) -> str:
    """The digests of some networks, for a stage's `outside`; those that are None are left out.

    A network is a file, or a local folder with configs and safetensors.
    """
    return " ".join(
        _folder_digest(folder)
        if (folder := Path(path).expanduser()).is_dir()
        else hashlib.sha256(read_file(path)).hexdigest()
        for path in paths
        if path
    )


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def read_file(path: str, digest: str | None = None) -> bytes:
    """The file at a URL; UserError where there is none or its sha256 is not `digest`."""
    try:
        data = storage.read(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file; name the weights of a feature network") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if digest is not None and sha256 != digest.lower():
        raise UserError(f"{path}: its sha256 is {sha256}, expected {digest}")
    return data


def load_state_dict(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, without running anything; UserError where it holds anything else."""
    try:
        if source.endswith(".safetensors"):
            weights = safetensors.torch.load(data)
        else:
            weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own way to say that a file is none of its
        why = str(error).strip().splitlines()[0][:120]
        if why.startswith("Weights only"):  # followed by how to run what is in it
            why = "it has more than tensors, which nothing here runs"
        raise UserError(f"{source}: no state dict of tensors alone ({why}); save its weights as .safetensors") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{source}: no flat state dict of tensors")
    return weights


def frozen(module: Any, device: torch.device | str) -> Any:
    """A module on a device for inference, in fp32."""
    module = module.to(device).eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.requires_grad_(False)
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return module


def _resized(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _as_maps(module: nn.Module, source: str) -> Images:
    def run(x: Tensor) -> list[Tensor]:
        out = module(x)
        taps = list(out) if isinstance(out, list | tuple) else [out]
        if not taps or any(not isinstance(tap, Tensor) or tap.ndim not in (2, 4) for tap in taps):
            raise UserError(f"{source}: an image network must return tensors (N, D) or (N, C, h, w)")
        return [(tap if tap.ndim == 4 else tap[..., None, None]).float() for tap in taps]

    return run


def _as_videos(module: nn.Module, resize: int | None, source: str) -> Callable[[Tensor], Tensor]:
    def run(levels: Tensor) -> Tensor:
        if resize:
            levels = _resized(levels.transpose(1, 2).flatten(0, 1), resize).unflatten(0, (levels.shape[0], -1))
            levels = levels.transpose(1, 2)
        out = module(levels, rescale=True, resize=resize is None, return_features=True)
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(levels):
            raise UserError(f"{source}: a video network must return one row of features a clip (B, D)")
        return out.float()

    return run
