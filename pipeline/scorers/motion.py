"""Scorer of motion: what the camera does, and what moves before it, apart.

About twelve times a second dense optical flow is taken between two small frames, and the shift, turn and scale that most of
the picture agrees on is the camera's; what doesn't agree moves by itself. Where one thing fills the picture, such as a train,
its motion is taken for the camera's.
"""

import cv2
import numpy as np

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import opencv
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

RATE = 12  # pairs of frames a second, about
GRID = 3  # pixels of the small frame between points of the flow
TEXTURE = 3.0  # levels a pixel: where the picture is flatter there is nothing to follow
POINTS = 20  # at least, to tell a motion
AGREED = 0.3  # share of them that has to agree
ROUNDS = 4  # of refinement
NEAR = 0.5  # pixels of the small frame from the agreed motion
SMOOTH = 1.0  # seconds; what is quicker is shake
STILL, STEADY = 0.03, 0.045  # of the side a second: a camera with a slower drift and less shake than that stands still
CLEAR = 1.5  # times any other: the part of the camera's motion that names it

LABELS = ("static", "pan", "tilt", "zoom", "roll", "shake", "mixed")


class Config(StageConfig):
    """Of `motion`. It has no settings."""


def fields(config: Config) -> tuple[Field, ...]:
    """What it gives."""
    side = "of the picture's shorter side a second"
    return (
        Field("camera", "number", f"mean speed of the picture's points by the camera's motion, {side}; 0.02 is seen"),
        Field("object", "number", f"mean speed of the picture's points beside the camera's motion, {side}"),
        Field("pan", "number", f"mean speed of the camera to the right (the picture goes left), {side}"),
        Field("tilt", "number", f"mean speed of the camera upwards (the picture goes down), {side}"),
        Field(
            "zoom",
            "number",
            "mean growth of the picture a second, natural logarithm: 0.1 is about 10 %; in is positive",
        ),
        Field("roll", "number", "mean turn of the picture, degrees a second; clockwise is positive"),
        Field("shake", "number", f"mean speed about a motion that is smooth over a second, {side}"),
        Field("move", "label", "the part of the camera's motion that outweighs the others; mixed: none does", LABELS),
    )


class Watch:
    """The motion between frames of one clip."""

    def __init__(self, flow: cv2.DISOpticalFlow) -> None:
        self.flow = flow
        self.motions: list[np.ndarray] = []  # of each pair: see `_motion`, without the time
        self.last: np.ndarray | None = None
        self.seconds = 0.0  # between the frames of a pair

    def add(self, frames: Frames) -> None:
        """The next frames of the clip."""
        step = max(1, round(frames.fps / RATE))
        self.seconds = step / frames.fps
        for small in frames.small[-frames.first % step :: step]:
            if self.last is not None:
                motion = _motion(self.flow, self.last, small)
                if motion is not None:
                    self.motions.append(motion)
            self.last = small

    def values(self) -> Values:
        """The values of the clip, after its last frame; none where there is nothing to follow."""
        if not self.motions:
            return dict.fromkeys(field.name for field in fields(Config()))

        camera, beside, right, down, zoom, roll, reach = np.array(self.motions).T
        velocity = np.stack([-right, down, zoom, roll], 1) / self.seconds
        smooth = _smooth(velocity, max(3, round(SMOOTH / self.seconds)))
        shake = float(np.hypot(*(velocity - smooth)[:, :2].T).mean())
        speed = float(camera.mean()) / self.seconds

        pan, tilt, growth, turn = velocity.mean(0)
        parts = np.abs(smooth).mean(0) * [1, 1, reach[0], reach[0]]
        return {
            "camera": speed,
            "object": float(beside.mean()) / self.seconds,
            "pan": float(pan),
            "tilt": float(tilt),
            "zoom": float(growth),
            "roll": float(np.degrees(turn)),
            "shake": shake,
            "move": _label(parts, shake),
        }


def _motion(flow: cv2.DISOpticalFlow, one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """The motion from one small frame to another: the camera's mean shift and the rest's, the camera's shift to the right and
    down, zoom (natural logarithm) and roll (radians), and the mean distance of points from the middle, in shorter sides.
    """
    side = min(one.shape)
    field = flow.calc(one, other, None)[GRID // 2 :: GRID, GRID // 2 :: GRID]
    rows, columns = np.mgrid[GRID // 2 : one.shape[0] : GRID, GRID // 2 : one.shape[1] : GRID]
    middle = np.array([one.shape[1] - 1, one.shape[0] - 1]) / 2
    points = np.stack([columns, rows], -1).reshape(-1, 2) - middle
    shifts = field.reshape(-1, 2).astype(np.float64)

    # points with something to follow, that are still in the picture
    across, along = cv2.Sobel(one, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(one, cv2.CV_32F, 0, 1, scale=1 / 8)
    # not by `cv2.magnitude`, whose last bits depend on where its arrays lie
    texture = cv2.blur(np.sqrt(across * across + along * along), (5, 5))[rows, columns].ravel()
    use = (texture >= TEXTURE) & (np.abs(points + shifts) <= middle).all(1)
    if use.sum() < POINTS:
        return None

    near = NEAR + 0.05 * float(np.median(np.abs(shifts[use]).max(1)))
    _, agreed = cv2.estimateAffinePartial2D(
        points[use], (points + shifts)[use], method=cv2.RANSAC, ransacReprojThreshold=near, maxIters=300, refineIters=0
    )
    if agreed is None:
        return None
    inner = agreed.ravel().astype(bool)

    # the best of few points isn't the best of many
    for _ in range(ROUNDS):
        if inner.mean() < AGREED:
            return None
        camera = _similarity(points[use][inner], shifts[use][inner])
        inner = np.hypot(*(_shifts(camera, points[use]) - shifts[use]).T) <= near

    scale, turn, *shift = camera
    rest = np.hypot(*(shifts - _shifts(camera, points)).T)
    rest[~use | (rest <= near)] = 0
    return np.array(
        [
            np.hypot(*_shifts(camera, points).T).mean() / side,
            rest.mean() / side,
            shift[0] / side,
            shift[1] / side,
            np.log(np.hypot(1 + scale, turn)),
            np.arctan2(turn, 1 + scale),
            np.hypot(*points.T).mean() / side,
        ]
    )


def _similarity(points: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    # least squares of shift = (scale, -turn; turn, scale) point + (right, down)
    centre, mean = points.mean(0), shifts.mean(0)
    (x, y), (u, v) = (points - centre).T, (shifts - mean).T
    total = float((x * x + y * y).sum())
    turned = np.array([(x * u + y * v).sum() / total, (x * v - y * u).sum() / total, 0, 0])
    turned[2:] = mean - _shifts(turned, centre[None])[0]
    return turned


def _shifts(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    scale, turn, right, down = camera
    x, y = points.T
    return np.stack([scale * x - turn * y + right, turn * x + scale * y + down], 1)


def _smooth(velocity: np.ndarray, count: int) -> np.ndarray:
    # means over neighbours; at the ends, of those that are there
    reach = count // 2
    sums = np.concatenate([np.zeros((1, velocity.shape[1])), np.cumsum(velocity, 0)])
    starts = np.maximum(0, np.arange(len(velocity)) - reach)
    ends = np.minimum(len(velocity), np.arange(len(velocity)) + reach + 1)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts)[:, None])


def _label(drift: np.ndarray, shake: float) -> str:
    if np.linalg.norm(drift) < STILL and shake < STEADY:
        return "static"
    parts = sorted(zip([*drift, shake], LABELS[1:6], strict=True), reverse=True)
    return parts[0][1] if parts[0][0] >= CLEAR * parts[1][0] else "mixed"


def _flow() -> cv2.DISOpticalFlow:
    # of a clip's own: one that has seen small frames goes on with settings for such
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    # half the small frame's size; at a quarter of it, the preset, a turn comes out a sixth too slow
    flow.setFinestScale(1)
    return flow


def load(config: Config, device: str) -> Watching:
    """The scorer; its flow would be another one with more than one thread."""
    opencv()
    return Watching(lambda: Watch(_flow()))


SCORER = Scorer(config=Config, version=2, fields=fields, load=load)
