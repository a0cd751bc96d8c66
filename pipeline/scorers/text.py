"""How much of a picture is text.

Always by strokes: letters are small, thin, of one height and one luma, and stand in a row. With `ocr` also by the networks
that rapidocr ships, which read Latin and Chinese; nothing is ever downloaded.

What it gives up: single letters and steep lines are missed; a fence may pass for a line of text without `ocr`.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.errors import UserError, not_installed
from longtake.datasets.networks import imported
from longtake.datasets.scores import Field
from longtake.datasets.shard import sha256_of
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import needed, opencv, reduced
from longtake.pipeline.scorers.scorer import Scorer, Values

_SIDE = 256  # pixels; at the least, of the shorter side
_STROKE = 11  # pixels; strokes are thinner
_CONTRAST = 18  # luma between a stroke and its ground
_MOST = 2000  # letters of one picture
_LETTERS = 4  # of a line, at least
_OWN = 0.7  # share of the strokes in a line's box that are its own
_MARGIN = 0.5  # density of the strokes right above and below a line, of that within
_READ_SIDE = 512  # pixels; smaller pictures are scaled to it before they are read
_MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}

Box = tuple[float, float, float, float]  # left, top, width, height


class Config(StageConfig):
    """Text in the picture.

    frames   of a clip, spread evenly
    ocr      read it too; some hundred times as slow
    least    how sure a read line is, 0 to 1, to count
    """

    frames: int = Setting(6, ge=1, le=64)
    ocr: bool = False
    least: float = Setting(0.6, ge=0, le=1)


def fields(config: Config) -> tuple[Field, ...]:
    strokes = (
        Field(
            "share",
            "number",
            "of the picture within strokes that look like text, 0 to 1; reached in a third of the frames",
        ),
        Field("lines", "number", "of such strokes; reached in a third of the frames"),
    )
    read = (
        Field("read", "number", "share of the picture within text that was read, 0 to 1; the frame with most"),
        Field("words", "number", "that were read, in the frame with most; Chinese counts by line"),
        Field("characters", "number", "that were read, in the frame with most"),
    )
    return strokes + read if config.ocr else strokes


class Looker:
    size: tuple[int, int] | None = None
    batch = 8

    def __init__(self, config: Config, reader: Any) -> None:
        self.count = config.frames
        self._config = config
        self._reader = reader
        self._cv2 = opencv()

    def look(self, frames: np.ndarray) -> list[Values]:
        return [self._clip(clip) for clip in frames]

    def _clip(self, clip: np.ndarray) -> Values:
        found = []
        for rgb in clip:
            luma = reduced(self._cv2.cvtColor(rgb, self._cv2.COLOR_RGB2GRAY), _SIDE).astype(np.uint8)
            boxes = lines(luma, self._cv2)
            found.append((covered(boxes, luma.shape), len(boxes)))
        # leaves and cloth look like text in a frame by chance, and then seldom in others
        shares, counts = (sorted(each, reverse=True)[(len(found) - 1) // 3] for each in zip(*found, strict=True))
        values: Values = {"share": float(shares), "lines": float(counts)}
        if self._reader is not None:
            read, words, characters = zip(*(self._read(rgb) for rgb in clip), strict=True)
            values |= {"read": max(read), "words": float(max(words)), "characters": float(max(characters))}
        return values

    def _read(self, rgb: np.ndarray) -> tuple[float, int, int]:
        """Share of the picture, words and characters of what is read in (H, W, 3)."""
        result = self._reader(np.ascontiguousarray(rgb[..., ::-1]))
        if result.boxes is None or result.txts is None:
            return 0.0, 0, 0
        good = [
            (box, text)
            for box, text, sure in zip(result.boxes, result.txts, result.scores, strict=True)
            if sure >= self._config.least
        ]
        mask = np.zeros(rgb.shape[:2], np.uint8)
        for box, _ in good:
            self._cv2.fillPoly(mask, [np.asarray(box, np.int32)], 1)
        words = [word for _, text in good for word in text.split()]
        return float(mask.mean()), len(words), sum(len(word) for word in words)


def lines(luma: np.ndarray, cv2: Any) -> list[Box]:
    """Boxes of what looks like lines of text in (H, W) uint8."""
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (_STROKE, _STROKE))
    found: list[Box] = []
    # strokes darker than their ground, and brighter ones
    for way in (cv2.MORPH_BLACKHAT, cv2.MORPH_TOPHAT):
        strokes = (cv2.morphologyEx(luma, way, kernel) > _CONTRAST).astype(np.uint8)
        _, parts, stats, _ = cv2.connectedComponentsWithStats(strokes, connectivity=8)
        letters = _letters(stats, luma, parts)
        rows = (letters[row] for row in _rows(letters))
        found += [_around(row) for row in rows if _stands_alone(row, strokes, parts)]
    # the gaps between bright letters are a dark line
    apart: list[Box] = []
    for box in sorted(found, key=lambda box: -box[2] * box[3]):
        if all(_shared(box, other) < 0.5 for other in apart):
            apart.append(box)
    return apart


def _shared(box: Box, other: Box) -> float:
    """Share of a box that another one covers."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    return max(0.0, width) * max(0.0, height) / (box[2] * box[3])


def _letters(stats: np.ndarray, luma: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(N, 6) left, top, width, height, luma and number of the parts that may be letters, from left to right."""
    width, height, area = (stats[:, n].astype(float) for n in (2, 3, 4))
    fill = area / (width * height)
    likely = (height >= 5) & (height <= len(luma) / 6) & (width <= 2.5 * height) & (fill >= 0.15) & (fill <= 0.95)
    shade = np.bincount(parts.ravel(), luma.ravel().astype(float), len(stats)) / area
    letters = np.column_stack([stats[:, :4], shade, np.arange(len(stats))])[1:][likely[1:]]
    return np.asarray(letters[np.lexsort((letters[:, 1], letters[:, 0]))][:_MOST])


def _rows(letters: np.ndarray) -> list[np.ndarray]:
    """Places of the letters of each line: neighbours of like height, foot and luma, that make a regular row."""
    if len(letters) < _LETTERS:
        return []
    left, top, width, height, shade, _ = letters.T
    foot = top + height
    group = np.arange(len(letters))
    for n in range(len(letters)):
        gap = left[n + 1 :] - (left[n] + width[n])
        taller = np.maximum(height[n], height[n + 1 :])
        like = (gap < 1.2 * taller) & (gap > -0.5 * taller)
        like &= np.minimum(height[n], height[n + 1 :]) > 0.55 * taller
        like &= np.abs(foot[n + 1 :] - foot[n]) < 0.3 * taller
        like &= np.abs(shade[n + 1 :] - shade[n]) < 30
        for other in np.flatnonzero(like) + n + 1:
            group[group == group[other]] = group[n]
    rows = [np.flatnonzero(group == label) for label in np.unique(group)]
    return [row for row in rows if len(row) >= _LETTERS and _is_regular(letters[row])]


def _is_regular(row: np.ndarray) -> bool:
    left, top, _, height, _, _ = row.T
    tall = float(np.median(height))
    # on one line, straight or slightly rising
    foot = top + height
    line = np.polyfit(left, foot, 1)
    off = np.abs(foot - np.polyval(line, left))
    return bool(
        abs(line[0]) < 0.35 and off.mean() < 0.15 * tall and height.std() < 0.3 * tall and left[-1] - left[0] > 2 * tall
    )


def _stands_alone(row: np.ndarray, strokes: np.ndarray, parts: np.ndarray) -> bool:
    """Whether few other strokes lie within a row and right above and below it, as they do in grass and leaves."""
    left, top, width, height = (int(n) for n in _around(row))
    columns, gap = slice(left, left + width), max(2, int(np.median(row[:, 3]) / 4))
    inside = strokes[top : top + height, columns]
    own = np.isin(parts[top : top + height, columns], row[:, 5].astype(int))
    margin = np.concatenate(
        [strokes[max(0, top - gap) : top, columns], strokes[top + height : top + height + gap, columns]]
    )
    density = float(inside.mean())
    return bool(own.sum() > _OWN * inside.sum() and (not margin.size or margin.mean() < _MARGIN * density))


def _around(row: np.ndarray) -> Box:
    left, top = row[:, 0].min(), row[:, 1].min()
    right, bottom = (row[:, 0] + row[:, 2]).max(), (row[:, 1] + row[:, 3]).max()
    return left, top, right - left, bottom - top


def covered(boxes: Sequence[Box], size: tuple[int, ...]) -> float:
    """Share of an (H, W) picture within boxes."""
    mask = np.zeros(size, bool)
    for left, top, width, height in boxes:
        mask[int(top) : int(top + height), int(left) : int(left + width)] = True
    return float(mask.mean())


def models() -> dict[str, Path]:
    """The networks that rapidocr ships. Raises UserError where they are not there."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        raise not_installed("rapidocr", "curation", "ocr")
    files = {part: Path(spec.submodule_search_locations[0]) / "models" / name for part, name in _MODELS.items()}
    for file in files.values():
        if not file.is_file():
            raise UserError(
                f"ocr: this version of rapidocr does not ship {file.name}: pip install 'longtake[curation]'"
            )
    return files


def reader(least: float) -> Any:
    """A callable from (H, W, 3) uint8 BGR to boxes, texts and scores, on one thread; it opens no other file than the networks."""
    files = models()
    settings: dict[str, Any] = {f"{part}.model_path": str(file) for part, file in files.items()}
    settings |= {
        "Det.limit_side_len": _READ_SIDE,
        "Global.use_cls": False,
        "Global.text_score": least,
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return imported("rapidocr", "ocr", "curation").RapidOCR(params=settings)


def _digest(config: Config) -> str:
    return needed("cv2") + ("".join(sha256_of(file) for file in models().values()) if config.ocr else "")


SCORER = Scorer(
    Config,
    1,
    fields,
    lambda config, device: Looker(config, reader(config.least) if config.ocr else None),
    digest=_digest,
)
