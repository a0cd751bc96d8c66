"""How much videos move and where to, and how far two sets of videos are apart in that.

Movement is in shares of the frame's shorter side a frame, so that sizes compare; flow is that of `motion.dense_flow` on
frames whose shorter side has 64 pixels at most, which sees up to 4 of them from frame to frame.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.metrics.motion import Matching, dense_flow
from longtake.training.metrics.swap import movement

REACH = Matching().radius  # pixels from frame to frame that are seen
_SIDE = 64  # pixels
_PAIRS = 4  # of neighbouring frames of a video
_TOP = 0.05  # share of the pixels that move most [VBench]


def small(video: Tensor) -> Tensor:
    """A video (B, 3, T, H, W) whose shorter side has 64 pixels at most, by averages."""
    height, width = video.shape[-2:]
    if min(height, width) <= _SIDE:
        return video
    scale = _SIDE / min(height, width)
    frames = F.interpolate(
        video.float().transpose(1, 2).flatten(0, 1), (round(height * scale), round(width * scale)), mode="area"
    )
    return frames.unflatten(0, (len(video), -1)).transpose(1, 2)


def movements(video: Tensor, pairs: int = _PAIRS) -> Tensor:
    """How much moves into each of 8 directions (see `swap.movement`), in shares of the shorter side a frame: `(B, 8)`.

    The mean over up to `pairs` pairs of neighbouring frames, spread evenly. Their sum is how much moves at all.

    Args:
        video: `(B, 3, T, H, W)` in [-1, 1], T of at least 2.
    """
    video = small(video)
    count = video.shape[2] - 1
    first = torch.linspace(0, count - 1, min(pairs, count)).round().long().tolist()
    each = [movement(video[:, :, at : at + 2]) for at in first]
    return torch.stack(each).mean(0).cpu() / min(video.shape[-2:])


def speed_distance(real: Tensor, fake: Tensor, real_times: Tensor, fake_times: Tensor) -> Tensor:
    """Wasserstein distance of two sets of numbers, `(N,)` and `(M,)`, that count so often, `(R, N)` and `(R, M)`: `(R,)`.

    The area between their distribution functions (Vallender 1974): how far the numbers of one would have to be moved.
    """
    order = torch.cat([real, fake]).double().argsort()
    sorted_values = torch.cat([real, fake]).double()[order]
    shares = [times.double() / times.sum(1, keepdim=True) for times in (real_times, fake_times)]
    steps = torch.cat([shares[0], -shares[1]], dim=1)[:, order].cumsum(1)
    return steps[:, :-1].abs() @ sorted_values.diff()


def direction_distance(real: Tensor, fake: Tensor, real_times: Tensor, fake_times: Tensor) -> Tensor:
    """How far the shares of two sets' movement in each direction are apart, 0 to 1 (total variation), `(R,)`.

    Args:
        real, fake: `movements` (N, 8) and (M, 8); a set in which nothing moves goes into all directions alike.
    """
    first, second = (_directions(of.double() @ rows.double()) for rows, of in ((real, real_times), (fake, fake_times)))
    return (first - second).abs().sum(1) / 2


def flickering(video: Tensor) -> Tensor:
    """1 - mean |x_t - x_t-1| in 0..1 of videos (B, 3, T, H, W) in [-1, 1]: `temporal_flickering` of VBench, `(B,)`."""
    return 1 - video.float().diff(dim=2).abs().mean((1, 2, 3, 4)) / 2


def least_movement(size: tuple[int, int], fps: float) -> float:
    """The pixels from frame to frame, of videos of this size as `small` makes them, beyond which `is_dynamic` says that they move."""
    return max(1.0, 8 / fps) * 6 * min(*size, _SIDE) / 256


def is_dynamic(video: Tensor, fps: float) -> Tensor:
    """Whether videos move, `(B,)` of 0 and 1: `dynamic_degree` of VBench (arXiv 2311.17982), by our flow in place of RAFT's.

    Of frames at 8 a second: whether the pixels that move most move by 6/256 of the shorter side, or by as much more as
    frames are rarer, in a quarter of the frames. Block matching sees no movement of more than `REACH` (see `least_movement`).

    Args:
        video: (B, 3, T, H, W) in [-1, 1].
    """
    frames = small(video)[:, :, :: max(1, round(fps / 8))]
    threshold = least_movement((video.shape[-2], video.shape[-1]), fps)
    needed = round(4 * frames.shape[2] / 16)
    moves = []
    for clip in frames:
        pictures = clip.transpose(0, 1)
        speed = dense_flow(pictures[:-1], pictures[1:]).norm(dim=1).flatten(1)
        top = speed.topk(int(speed.shape[1] * _TOP), dim=1).values.mean(1)
        moves.append(float((top > threshold).sum() >= max(1, needed)))
    return torch.tensor(moves)


def consistency(frames: Tensor) -> float:
    """The mean of the cosines of each frame's features `(T, D)` to those of the first frame and of the one before.

    T is 2 at least. `subject_consistency` and `background_consistency` of VBench, by the network that it takes for each;
    cosines below 0 count as 0.
    """
    first, before = (
        F.cosine_similarity(frames[1:].double(), other.double()).clamp_min(0) for other in (frames[:1], frames[:-1])
    )
    return float((first + before).mean()) / 2


def _directions(amounts: Tensor) -> Tensor:
    total = amounts.sum(1, keepdim=True)
    return torch.where(total > 0, amounts / total.clamp_min(1e-12), 1 / amounts.shape[1])
