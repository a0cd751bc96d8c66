"""Image networks that features are taken from, built around the weights of a state dict.

The layers are torchvision's, under its key names (`features.N.weight`, `features.N.squeeze.weight`, ...), so that its
published files fit. Which of them a file holds is seen from its keys and shapes. Heads (`classifier...`) are left out.
The package itself is refused, since each of its versions needs one version of torch.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.datasets.errors import UserError

# Convolution (inputs, outputs, kernel, stride, padding), ReLU, max-pooling (kernel, ceil), fire (inputs, squeezed, expanded).
Layer = tuple[str, *tuple[int, ...]]


def _vgg(*widths: int) -> list[Layer]:
    """Convolutions of 3x3 with a ReLU each; 0 is a pooling of 2x2."""
    layers: list[Layer] = []
    width = 3
    for outputs in widths:
        layers += [("conv", width, outputs, 3, 1, 1), ("relu",)] if outputs else [("pool", 2, 2, 0)]
        width = outputs or width
    return layers


_POOL: Layer = ("pool", 3, 2, 1)
_FIRES: list[Layer] = [
    ("fire", 128, 16, 64),
    ("fire", 128, 32, 128),
    ("fire", 256, 32, 128),
    ("fire", 256, 48, 192),
    ("fire", 384, 48, 192),
    ("fire", 384, 64, 256),
    ("fire", 512, 64, 256),
]

# name: the layers in order, and after which of them LPIPS looks (models of its v0.1; ours for squeezenet1_0)
ARCHITECTURES: dict[str, tuple[list[Layer], tuple[int, ...]]] = {
    "vgg16": (_vgg(64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512), (3, 8, 15, 22, 29)),
    "alexnet": (
        [
            ("conv", 3, 64, 11, 4, 2),
            ("relu",),
            ("pool", 3, 2, 0),
            ("conv", 64, 192, 5, 1, 2),
            ("relu",),
            ("pool", 3, 2, 0),
            ("conv", 192, 384, 3, 1, 1),
            ("relu",),
            ("conv", 384, 256, 3, 1, 1),
            ("relu",),
            ("conv", 256, 256, 3, 1, 1),
            ("relu",),
        ],
        (1, 4, 7, 9, 11),
    ),
    "squeezenet1_0": (
        [
            *(("conv", 3, 96, 7, 2, 0), ("relu",), _POOL),
            *(("fire", 96, 16, 64), *_FIRES[:2], _POOL),
            *(*_FIRES[2:6], _POOL, _FIRES[6]),
        ],
        (1, 5, 10, 12),
    ),
    "squeezenet1_1": (
        [
            *(("conv", 3, 64, 3, 2, 0), ("relu",), _POOL),
            *(("fire", 64, 16, 64), _FIRES[0], _POOL),
            *(*_FIRES[1:3], _POOL, *_FIRES[3:]),
        ],
        (1, 4, 7, 9, 10, 11, 12),
    ),
}


class Fire(nn.Module):
    """SqueezeNet's module: squeeze to few channels, expand by 1x1 and by 3x3 side by side (arXiv 1602.07360, §3.1)."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def _module_of(layer: Layer) -> nn.Module:
    kind, *sizes = layer
    if kind == "conv":
        inputs, outputs, kernel, stride, padding = sizes
        return nn.Conv2d(inputs, outputs, kernel, stride, padding)
    if kind == "pool":
        kernel, stride, ceil = sizes
        return nn.MaxPool2d(kernel, stride, ceil_mode=bool(ceil))
    return Fire(*sizes) if kind == "fire" else nn.ReLU()


class Backbone(nn.Module):
    """The layers of one architecture. Images (N, 3, H, W), normalised, -> the feature maps (N, C, h, w) of its taps."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        layers, self.taps = ARCHITECTURES[architecture]
        self.features = nn.ModuleList(_module_of(layer) for layer in layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                maps.append(x)
        return maps


def from_state_dict(weights: Mapping[str, Tensor], source: str) -> tuple[str, Backbone]:
    """The name of the architecture that has these weights, and the network, in fp32.

    Raises:
        UserError: no known architecture has these keys and shapes; names `source`.
    """
    shapes = {key: value.shape for key, value in weights.items() if key.startswith("features.")}
    for name in ARCHITECTURES:
        with torch.device("meta"):
            network = Backbone(name)
        if shapes == {key: value.shape for key, value in network.state_dict().items()}:
            state = {key: weights[key].float() for key in shapes}
            network.load_state_dict(state, assign=True)
            return name, network
    raise UserError(f"{source}: its weights are of none of {', '.join(ARCHITECTURES)} (torchvision's key names)")
