"""Render deterministic test footage with known cuts, fades, static and black stretches and motion.

Every frame is a weighted sum of shots. A shot is a stack of layers: the camera over a background, then flat soft-edged
objects. Each layer is a crop of a photograph that ships with an installed library, moved by one similarity map per frame.
The ground truth comes from the same weights and maps, never from pixels. Given up: depth, motion blur, sensor noise,
sharpness above 480 rows, and equal bytes under other versions of Pillow, NumPy or FFmpeg.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from longtake.datasets.errors import UserError

_MISSING = 'longtake.infra.footage needs av, matplotlib and scikit-learn: pip install "longtake[pipeline]"'
try:
    import av
    from matplotlib import cbook
    from PIL import Image
except ImportError as error:
    raise UserError(_MISSING) from error

Kind = Literal["cut", "fade", "dissolve", "static", "black"]
Floats = npt.NDArray[np.float64]
Frame = npt.NDArray[np.uint8]
Range = tuple[int, int]
PHOTOS = ("a Chinese temple", "a flower", "a portrait of a woman")  # in the order of `_photos`
MANIFEST = "captions.jsonl"


class Layer(NamedTuple):
    """A picture and how it moves: in frame t point p of the video shows point turn[t] * p + shift[t] of the texture.

    Points are x + iy. `words` say what it is and does.
    """

    texture: Image.Image  # RGBA
    turn: npt.NDArray[np.complex128]
    shift: npt.NDArray[np.complex128]
    words: str


@dataclass(frozen=True)
class Event:
    """Frames first_frame <= t < last_frame. A cut is the new shot's first frame; static frames equal the frame before."""

    kind: Kind
    first_frame: int
    last_frame: int


@dataclass(frozen=True)
class Truth:
    """Ground truth of one video. Events are in order; a fade goes to black, from black, or to black and back.

    cuts: first frame of each shot that follows a hard cut.
    motion: pixels that the visible layer moved since the frame before, mean over a grid of points (and over both shots
        as blended in a dissolve); 0 in static and black stretches and on a shot's first frame; NaN at hard cuts.
    shots: [first, last) frames of each shot, without fades and black; a dissolve is split at its middle.
    captions: what is to be seen in each shot.
    """

    fps: int
    frames: int
    cuts: list[int]
    events: list[Event]
    motion: list[float]
    shots: list[Range]
    captions: list[str]


def _require(valid: bool, rule: str, got: object) -> None:
    if not valid:
        raise UserError(f"{rule}, got {got!r}")


def _require_int(name: str, value: object, least: int) -> None:
    _require(isinstance(value, int) and value >= least, f"{name} must be a whole number >= {least}", value)


@cache
def _photos() -> tuple[Image.Image, ...]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError(_MISSING) from error
    portrait = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return *map(Image.fromarray, load_sample_images().images), portrait


def _texture(rng: np.random.Generator, photo: Image.Image, alpha: Floats, share: float, tint: float) -> Image.Image:
    """RGBA crop of `share` of the photo, perhaps mirrored, its channels scaled and mixed by up to `tint`."""
    shape = np.array(alpha.shape[::-1])
    extent = share * (photo.size / shape).min() * shape
    corner = rng.random(2) * (photo.size - extent)
    box = (*corner.tolist(), *(corner + extent).tolist())
    mix = np.eye(3) * rng.uniform(1 - tint, 1 + tint / 3, 3) + rng.uniform(-tint, tint, (3, 3)) / 3
    matrix = tuple(np.pad(mix, ((0, 0), (0, 1))).ravel().tolist())
    pixels = np.asarray(photo.resize(tuple(shape.tolist()), Image.Resampling.BICUBIC, box).convert("RGB", matrix))
    return Image.fromarray(np.dstack([pixels[:, :: rng.choice((-1, 1))], (alpha * 255).astype(np.uint8)]))


def _background(
    rng: np.random.Generator, photo: Image.Image, name: str, clock: Floats, pace: float, size: Range
) -> Layer:
    """A camera move over a canvas of twice the picture's size: pan, zoom and roll, or hardly any motion."""
    picture = np.array(size[::-1])
    moves = ((1, 0, 0), (0.2, 1, 0), (0.8, 0.4, 1), (0.1, 0.1, 0.1))
    move = int(rng.choice(4, p=(0.35, 0.25, 0.25, 0.15)))
    pan, zoom, roll = moves[move]
    reach, phase = pace * clock[-1], clock / clock[-1] - 0.5
    growth, angle = rng.choice((-1, 1), 2) * (zoom * min(reach / 2, 0.35), roll * min(reach / 3, 0.14))
    turn = 0.95 * np.exp((growth + 1j * angle) * phase + 1j * rng.uniform(-0.03, 0.03))
    room = 0.35 * picture  # from the middle to the view's centre, with the view inside the canvas
    direction = np.exp([1j * rng.uniform(0, 2 * np.pi)]).view(float)
    travel = pan * direction * min(reach * size[0], (2 * room / np.maximum(np.abs(direction), 1e-9)).min())
    centre = picture + rng.uniform(-1, 1, 2) * (room - np.abs(travel) / 2) + np.outer(phase, travel)
    texture = _texture(rng, photo, np.ones((2 * size[0], 2 * size[1])), rng.uniform(0.6, 1.0), 0.15)
    camera = ("pans", "zooms in" if growth < 0 else "zooms out", "rolls", "hardly moves")[move]
    return Layer(texture, turn, centre @ (1, 1j) - turn * (picture @ (0.5, 0.5j)), f"{name}, the camera {camera}")


def _object(rng: np.random.Generator, photo: Image.Image, clock: Floats, pace: float, size: Range) -> Layer:
    """A disc, square or blob on a straight, swinging or bouncing path through the picture, perhaps spinning."""
    picture = np.array(size[::-1])
    radius = rng.uniform(0.09, 0.2) * min(size)
    side = math.ceil(2 * radius) + 4
    y, x = (np.indices((side, side)) + 0.5 - side / 2) / radius
    bumps = sum(rng.uniform(0.03, 0.08) * np.sin(k * np.arctan2(y, x) + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    kind = int(rng.integers(3))
    edge = (np.hypot(x, y), np.maximum(np.abs(x), np.abs(y)) / 0.7, np.hypot(x, y) / (0.75 + bumps))[kind]
    texture = _texture(rng, photo, np.clip((1 - edge) * radius / 2 + 0.5, 0, 1), rng.uniform(0.25, 0.6), 0.6)
    speed = pace * size[0] * rng.uniform(0.7, 1.8)
    direction = np.exp([1j * rng.uniform(0, 2 * np.pi)]).view(float)
    anchor = picture * rng.uniform(0.3, 0.7, 2)
    line = anchor + np.outer(clock - clock[-1] / 2, speed * direction)
    reach = picture * rng.uniform(0.15, 0.3, 2)
    swing = anchor + reach * np.sin(np.outer(clock, (1, 1.4)) * speed / np.hypot(*reach) + rng.uniform(0, 6.3, 2))
    span = picture - 2 * radius
    bounce = radius + span - np.abs(line % (2 * span) - span)
    way = int(rng.integers(3))
    path = (line, swing, bounce)[way]
    spin = rng.choice((-1, 0, 0, 1)) * rng.uniform(0.2, 0.6) * speed / radius
    turn = np.exp(1j * (spin * clock + rng.uniform(0, 6.3)))
    words = f"a {('disc', 'square', 'blob')[kind]} {('moves', 'swings', 'bounces')[way]}{' and spins' if spin else ''}"
    return Layer(texture, turn, (0.5 + 0.5j) * side - turn * (path @ (1, 1j)), words)


def _motion(layers: list[Layer], size: Range) -> Floats:
    """(T,) mean displacement in pixels between frames t-1 and t over a 16x16 grid of the topmost visible layer."""
    ticks = (np.arange(16) + 0.5) / 16
    points = np.add.outer(1j * ticks * size[0], ticks * size[1]).ravel()
    distance = np.zeros((len(layers[0][1]) - 1, len(points)))
    for texture, turn, shift, _ in layers:
        texel = turn[1:, None] * points + shift[1:, None]
        before = (texel - shift[:-1, None]) / turn[:-1, None]
        alpha = np.asarray(texture)[..., 3]
        row = np.clip(texel.imag.astype(int), 0, alpha.shape[0] - 1)
        column = np.clip(texel.real.astype(int), 0, alpha.shape[1] - 1)
        distance = np.where(alpha[row, column] >= 128, np.abs(points - before), distance)
    return np.concatenate([[0.0], distance.mean(-1)])


def _timeline(rng: np.random.Generator, seed: int, frames: int) -> tuple[Floats, list[Event]]:
    """Weight of each shot in each frame (S, frames) and the events."""
    quiet = {5: "static", 11: "black"}.get(seed % 12)
    count = 2 if quiet else min(int(rng.integers(2, 6)), frames // 16)
    leg = max(2, round(frames / count * rng.uniform(0.06, 0.12)))
    back = leg + round(frames * 0.4 if quiet else frames / count * rng.uniform(0.2, 0.4))
    spans: dict[Kind, list[tuple[Kind, int, int]]] = {
        "cut": [("cut", 0, 1)],
        "dissolve": [("dissolve", 0, 2 * leg)],
        "fade": [("fade", 0, 2 * leg + 1)],
        "black": [("fade", 0, leg), ("black", leg, back), ("fade", back, back + leg)],
    }
    names = list(spans)
    kinds: list[Kind] = [names[seed % 4], *rng.choice(names, count - 2, p=(0.55, 0.15, 0.15, 0.15)).tolist()]
    rng.shuffle(kinds)
    gaps = [0 if kind == "cut" else spans[kind][-1][2] for kind in kinds]
    shares = np.cumsum([0, *rng.uniform(0.6, 1.4, count)])
    bounds = np.round(shares / shares[-1] * (frames - sum(gaps))).astype(int)
    starts = bounds[:-1] + np.cumsum([0, *gaps])
    ends = starts + np.diff(bounds)
    weights, events = np.zeros((count, frames)), []
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        weights[i, start:end] = 1
        hold = int((end - start) * (0.8 if quiet == "static" else rng.choice((0.0, 0.4), p=(0.75, 0.25))))
        freeze = (start + end - hold + 1) // 2
        events += [Event("static", freeze, freeze + hold)] if hold else []
        if i < len(kinds):
            events += [Event(part, end + first, end + last) for part, first, last in spans[kinds[i]]]
            ramp = gaps[i] if kinds[i] == "dissolve" else min(gaps[i], leg)
            up = np.arange(1, ramp + 1) / (ramp + 1)
            weights[i, end : end + ramp] = up[::-1]
            weights[i + 1, end + gaps[i] - ramp : end + gaps[i]] = up
    return weights, events


def _draw(layers: list[Layer], t: int, size: Range) -> Frame:
    picture = Image.new("RGB", size[::-1])
    for texture, turn, shift, _ in layers:
        a, b = complex(turn[t]), complex(shift[t])
        affine = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
        view = texture.transform(size[::-1], Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        picture.paste(view, mask=view)
    return np.asarray(picture)


def render(seed: int, seconds: float = 12.0, fps: int = 24, size: Range = (240, 320)) -> tuple[Iterator[Frame], Truth]:
    """Frames, uint8 RGB (H, W, 3), rendered lazily one at a time, and their ground truth. A pure function.

    Any four seeds in a row show every transition (cut, dissolve, fade, long black). A seed with `seed % 12` of 5 is mostly
    static, with 11 two fifths black.

    Args:
        seconds: long enough for 32 frames.
        size: (height, width) in pixels, even, at least 32, at most 2.5 to 1.

    Raises:
        UserError: an argument out of its range.
    """
    _require_int("seed", seed, 0)
    _require_int("fps", fps, 1)
    _require(32 <= seconds * fps < math.inf, f"seconds must give at least 32 frames at {fps} fps", seconds)
    fits = len(size) == 2 and not any(side % 2 for side in size) and min(size) >= 32 and max(size) <= 2.5 * min(size)
    _require(fits, "size must be (height, width), both even, at least 32 and at most 2.5 times the other", size)
    rng, frames, photos = np.random.default_rng(seed), round(seconds * fps), _photos()
    weights, events = _timeline(rng, seed, frames)
    bright = (weights > 0.5) & (weights.sum(0) > 0.99)
    shots = [(int(lit[0]), int(lit[-1]) + 1) for lit in map(np.flatnonzero, bright)]
    cuts = [event.first_frame for event in events if event.kind == "cut"]
    frozen = [range(event.first_frame, event.last_frame) for event in events if event.kind == "static"]
    ticks = ~np.isin(np.arange(frames), list(chain(*frozen)))
    shot_layers, captions, moved = [], list[str](), np.zeros_like(weights)
    order = rng.permutation(len(photos))
    for i, weight in enumerate(weights):
        shown = np.flatnonzero(weight)
        clock = (np.cumsum(ticks[shown]) - 1) / fps
        pace = float(np.exp(rng.uniform(np.log(0.03), np.log(0.6))))  # picture heights per second
        # neighbouring shots never share a photo, which could hide a hard cut
        photo = int(order[i % len(photos)])
        layers = [_background(rng, photos[photo], PHOTOS[photo], clock, pace, size)]
        layers += [_object(rng, photos[k], clock, pace, size) for k in rng.choice(len(photos), rng.integers(1, 5))]
        moved[i, shown] = _motion(layers, size)
        shot_layers.append((shown[0], layers))
        captions.append("; ".join(layer.words for layer in layers))
    mean = np.round((weights * moved).sum(0) / np.maximum(weights.sum(0), 1e-9), 4).tolist()
    motion = [math.nan if t in cuts else value for t, value in enumerate(mean)]

    def stream() -> Iterator[Frame]:
        for t in range(frames):
            blend = np.zeros((*size, 3), np.float32)
            for i in np.flatnonzero(weights[:, t]):
                first, layers = shot_layers[i]
                blend += np.float32(weights[i, t]) * _draw(layers, t - first, size)
            yield np.rint(blend).astype(np.uint8)

    return stream(), Truth(fps, frames, cuts, events, motion, shots, captions)


def _partial(path: Path) -> Path:
    return path.with_name(f".partial-{path.name}")


def write_video(path: Path | str, frames: Iterable[Frame], fps: int, *, codec: str = "libx264", crf: int = 20) -> None:
    """Encode uint8 (H, W, 3) RGB frames of one even size to `path` (yuv420p, a key frame at least every second).

    The same frames give the same bytes: one encoder thread and no dates. `path` appears only once it is complete.

    Raises:
        UserError: no frames, frames of another kind, fps < 1 or crf outside 0..51.
        ValueError: an unknown codec.
    """
    path, stream = Path(path), iter(frames)
    head = next(stream, np.empty(0, np.uint8))
    shape = head.shape
    _require(len(shape) == 3 and not any(np.mod(shape[:2], 2)), "frames must be uint8 (H, W, 3), H and W even", shape)
    _require_int("fps", fps, 1)
    _require(0 <= crf <= 51, "crf must be 0 to 51", crf)
    try:
        with av.open(str(_partial(path)), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
            # with its macroblock tree, x264 sometimes writes other bytes for the same frames
            deterministic = {"mbtree": "0"} if codec == "libx264" else {}
            video = container.add_stream(codec, fps, {"crf": str(crf)} | deterministic, height=shape[0], width=shape[1])
            video.pix_fmt, video.codec_context.gop_size, video.codec_context.thread_count = "yuv420p", fps, 1
            for frame in chain([head], stream):
                _require(frame.shape == shape, f"frames must all have the shape {shape}", frame.shape)
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(video.encode())
        _partial(path).replace(path)
    finally:
        _partial(path).unlink(missing_ok=True)


def load_truth(path: Path | str) -> Truth:
    """Read a `*.truth.json` of `generate` back into an equal Truth."""
    raw = json.loads(Path(path).read_text())
    raw["events"] = [Event(**event) for event in raw["events"]]
    raw["motion"] = [math.nan if value is None else value for value in raw["motion"]]
    return Truth(**raw | {"shots": [(first, last) for first, last in raw["shots"]]})


def generate(
    folder: Path | str, count: int = 12, seed: int = 0, seconds: float = 12.0, fps: int = 24, size: Range = (240, 320)
) -> list[Path]:
    """Write `clip-000.mp4` ... and `clip-000.truth.json` ... into `folder`; returns the paths of the `count` videos.

    The truth is written last, so a video with its truth beside it is complete. Such a pair is kept if its truth is the one
    for these arguments; all else is rendered again. `captions.jsonl` is a manifest of the videos, with a timed caption for
    each shot. Raises UserError for count < 1, and as `render`.
    """
    _require_int("count", count, 1)
    _require_int("seed", seed, 0)
    videos = [Path(folder) / f"clip-{index:03d}.mp4" for index in range(count)]
    lines = []
    for index, video in enumerate(tqdm(videos, desc="footage", unit="clip")):
        frames, truth = render(seed * 1_000_000 + index, seconds, fps, size)  # no clip is in the sets of two seeds
        record = video.with_suffix(".truth.json")
        motion = [None if math.isnan(value) else value for value in truth.motion]
        text = json.dumps(asdict(truth) | {"motion": motion})
        spans = zip(truth.shots, truth.captions, strict=True)
        shots = [{"start": first / fps, "end": last / fps, "text": said} for (first, last), said in spans]
        lines.append(json.dumps({"uri": video.name, "shots": shots}) + "\n")
        if video.exists() and record.exists() and record.read_text() == text:
            continue
        video.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        write_video(video, frames, fps)
        _partial(record).write_text(text)
        _partial(record).replace(record)
    manifest = Path(folder) / MANIFEST
    _partial(manifest).write_text("".join(lines))
    _partial(manifest).replace(manifest)
    return videos
